"""Patch-level analysis of images: attention of each head, similarity to a patch, principal components as colors.

Works on arrays only; `figures.py` turns them into pictures, for the report and for `extrema-fast visualize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ..models.encoder import Encoder

# what `compress` may change in a cosine, and how many directions it tries
TOLERANCE, FEWEST = 0.02, 16


class Patches(NamedTuple):
    """What an encoder makes of one image.

    Attributes:
        tokens: [rows, columns, D] fp32, after the final norm, on the CPU.
        attention: [P, H, rows, columns] fp32: of the class token in each pooling block and head, in even shares of
            what goes to patches (1: no preference); None without class head.
    """

    tokens: Tensor
    attention: Tensor | None

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.tokens.shape[0], self.tokens.shape[1]


@torch.inference_mode()
def read_patches(encoder: Encoder, images: Tensor) -> list[Patches]:
    """`Patches` of each image [B, C, H, W], normalized and on the encoder's device, in one pass of its trunk."""
    grid = encoder.check_images(images)
    tokens = encoder.trunk(encoder.embed(images))
    maps: list[Tensor | None] = [None] * len(images)
    if encoder.num_prefix_tokens:
        weights = torch.stack(encoder.pool(tokens, return_weights=True)[1], 1).float()[..., 1:]
        weights = weights / weights.sum(-1, keepdim=True) * weights.shape[-1]
        maps = list(weights.unflatten(-1, grid).cpu())
    found = encoder.norm(tokens).float().unflatten(1, grid).cpu()
    return [Patches(*both) for both in zip(found, maps, strict=True)]


def flat_tokens(images: Sequence[Patches]) -> Tensor:
    """[M, D]: the patch tokens of all images, one after the other."""
    return torch.cat([image.tokens.flatten(0, 1) for image in images])


def split_like(values: np.ndarray, images: Sequence[Patches]) -> list[np.ndarray]:
    """[M, ...] of all patches of images -> per image [rows, columns, ...]."""
    ends = np.cumsum([np.prod(image.grid) for image in images])[:-1]
    return [
        part.reshape(*image.grid, *values.shape[1:])
        for part, image in zip(np.split(values, ends), images, strict=True)
    ]


# ---- principal components ---------------------------------------------------------------------------


def principal_components(x: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """The `count` first principal components of rows, and each one's share of the variance.

    Args:
        x: [n, D] float.
        count: How many; those that D lacks are 0.

    Returns:
        [n, count] fp64, each axis pointing to its largest entry; shares.
    """
    x = x.double()
    x = x - x.mean(0)
    values, axes = torch.linalg.eigh(x.T @ x)
    axes = axes[:, -count:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    y, share = x @ axes, values.clamp_min(0).flip(0) / values.clamp_min(0).sum().clamp_min(1e-300)
    missing = count - y.shape[1]
    return F.pad(y, (0, missing)), share[:count].tolist() + [0.0] * missing


def token_colors(tokens: Tensor) -> np.ndarray:
    """[..., D] -> uint8 [..., 3]: the first three principal components as red, green and blue.

    One basis for all tokens, so equal colors mean similar tokens; each axis points to its largest entry, and its
    middle 96 % fill the range of the color.
    """
    y, _ = principal_components(tokens.reshape(-1, tokens.shape[-1]), 3)
    low, high = np.quantile(y.numpy(), (0.02, 0.98), axis=0)
    y = ((y.numpy() - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return np.rint(255 * y).astype(np.uint8).reshape(*tokens.shape[:-1], 3)


def foreground(images: Sequence[Patches]) -> np.ndarray:
    """bool [M] over the patches of all images: which side of the first principal component is the foreground.

    As DINOv2 (2304.07193, section 7.5) separates it, with one component for all images. The threshold is the one that
    separates two groups best (Otsu). The component's sign means nothing: the background is the side that holds the
    larger share of the patches at the images' borders.
    """
    y = principal_components(flat_tokens(images), 1)[0][:, 0].numpy()
    above = y > otsu(y)
    border = []
    for image in images:
        edge = np.ones(image.grid, bool)
        edge[1:-1, 1:-1] = False
        border.append(edge.ravel())
    edges = np.concatenate(border)
    inside, outside = above[~edges], above[edges]
    share = (inside.mean() if inside.size else 0.0, outside.mean())
    return above if share[0] >= share[1] else ~above


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """The threshold that leaves the least variance within the two groups of values (Otsu 1979), by a histogram."""
    counts, edges = np.histogram(values, bins)
    middle = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts)[:-1], counts.sum()
    sums = np.cumsum(counts * middle)
    above = total - below
    mean_below = sums[:-1] / np.maximum(below, 1)
    mean_above = (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1 + int(np.argmax(below * above * (mean_below - mean_above) ** 2))])


def pca_colors(images: Sequence[Patches]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per image uint8 [rows, columns, 3]: components of all tokens as colors, and those of the foreground, rest black.

    Both have one basis for all images; fewer than four tokens in the foreground stay black.
    """
    tokens, front = flat_tokens(images), foreground(images)
    objects = np.zeros((len(tokens), 3), np.uint8)
    if front.sum() > 3:
        objects[front] = token_colors(tokens[torch.from_numpy(front)])
    return split_like(token_colors(tokens), images), split_like(objects, images)


# ---- similarity -------------------------------------------------------------------------------------


def similarity(image: Patches, token: Tensor) -> np.ndarray:
    """[rows, columns] fp32: cosine of an image's patch tokens with one token [D]."""
    return (F.normalize(image.tokens, dim=-1) @ F.normalize(token, dim=0)).numpy()


def salient(image: Patches) -> tuple[int, int]:
    """(row, column) of the patch that the last pooling block attends to most; without class head the middle."""
    rows, columns = image.grid
    if image.attention is None:
        return rows // 2, columns // 2
    at = int(image.attention[-1].mean(0).argmax())
    return at // columns, at % columns


class Compressed(NamedTuple):
    """Patch tokens such that the cosine of two is sum_k codes_k codes'_k weights_k, nearly (`error`).

    Attributes:
        codes: [M, d] int8.
        weights: [d] fp32.
        error: The largest difference to a cosine, of at most 1,024 evenly spaced tokens with all.
    """

    codes: np.ndarray
    weights: np.ndarray
    error: float


def compress(tokens: Tensor) -> Compressed:
    """Tokens [M, D] as few bytes whose cosines are those of the tokens, to `TOLERANCE` where D allows it.

    The directions that hold most of the normalized tokens, as many as are needed, each with its own scale.
    """
    x = F.normalize(tokens.double(), dim=1)
    values, axes = torch.linalg.eigh(x.T @ x)
    y, count = x @ axes.flip(1), min(FEWEST, x.shape[1])
    some = torch.linspace(0, len(x) - 1, min(len(x), 1024)).long()
    while True:
        scale = y[:, :count].abs().amax(0).clamp_min(1e-12) / 127
        codes = (y[:, :count] / scale).round()
        known = (codes * scale).float()
        error = float((known[some] @ known.T - (x[some] @ x.T).float()).abs().max())
        if error <= TOLERANCE or count == x.shape[1]:
            return Compressed(codes.numpy().astype(np.int8), (scale**2).float().numpy(), error)
        count = min(2 * count, x.shape[1])
