"""Arrays for the report's pictures, and PNG files made of them without an image library.

What the student sees, where the pooling head looks, what patch tokens encode, which images are near.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config
from ..data.augment import normalize
from ..data.sources import ImageSource, match_classes, subset
from ..evaluation.features import cap, extract, load_batch
from ..models.masking import sample_views

if TYPE_CHECKING:
    from ..models.encoder import Encoder

MAX_SIDE = 128  # pixels; larger pictures are averaged down to keep the report small
BANK = 4000  # training images searched for neighbours, at most

# nine points of the perceptually uniform map "viridis"
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    dtype=np.float64,
)


def viridis(x: np.ndarray) -> np.ndarray:
    """Values in 0..1 (clipped), any shape -> uint8 [..., 3]."""
    at = np.clip(x, 0, 1) * (len(_VIRIDIS) - 1)
    low = np.minimum(at.astype(int), len(_VIRIDIS) - 2)
    part = (at - low)[..., None]
    return np.round(_VIRIDIS[low] * (1 - part) + _VIRIDIS[low + 1] * part).astype(np.uint8)


def png(array: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W] gray, [H, W, 3] RGB or [H, W, 4] RGBA; lossless."""
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(
            f"png: expected uint8 [H, W], [H, W, 3] or [H, W, 4], got {array.dtype} {array.shape}"
        )
    height, width = array.shape[:2]
    kind = 0 if array.ndim == 2 else {3: 2, 4: 6}[array.shape[2]]
    # filter 1: each byte minus that of the pixel to the left; photographs compress better so
    flat = array.reshape(height, width, -1)
    left = np.concatenate([np.zeros_like(flat[:, :1]), flat[:, :-1]], axis=1)
    rows = (flat - left).reshape(height, -1)
    raw = np.concatenate([np.ones((height, 1), np.uint8), rows], axis=1).tobytes()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw, 9))
        + chunk(b"IEND", b"")
    )


def data_uri(array: np.ndarray) -> str:
    """The array as an inline PNG address; see `png`."""
    return "data:image/png;base64," + base64.b64encode(png(array)).decode("ascii")


def small(images: Tensor) -> np.ndarray:
    """uint8 [n, H, W, 3] -> uint8 numpy, area-averaged to at most `MAX_SIDE` pixels a side."""
    height, width = images.shape[1:3]
    factor = max(height, width) / MAX_SIDE
    if factor > 1:
        size = (max(1, round(height / factor)), max(1, round(width / factor)))
        x = F.interpolate(images.permute(0, 3, 1, 2).float(), size, mode="area")
        images = x.round().to(torch.uint8).permute(0, 2, 3, 1)
    return images.numpy()


@dataclass(frozen=True)
class Samples:
    """What is shown of a few fixed test images.

    images     uint8 [n, h, w, 3]
    views      bool [n, V, gh, gw]: True where the student sees the patch
    attention  fp32 [n, P, gh, gw]: attention of the class token per pooling block, mean over heads,
               times the number of patches (1 = no preference); `initial` the same before training
    colors     uint8 [n, gh, gw, 3]: three main directions of the patch tokens
    """

    images: np.ndarray
    views: np.ndarray
    attention: np.ndarray
    initial: np.ndarray | None
    colors: np.ndarray


@torch.inference_mode()
def samples(
    encoder: Encoder, initial: Encoder | None, source: ImageSource, cfg: Config, count: int
) -> Samples:
    """Pictures of `count` evenly spaced images of a source; nothing random."""
    images = load_batch(source, cfg.data, encoder.img_size, count)
    x = normalize(images, cfg.data.mean, cfg.data.std, encoder.in_chans)
    n, (gh, gw) = len(images), encoder.grid
    keep = sample_views(n, gh * gw, cfg.num_keep, cfg.mask.views, mode=cfg.mask.mode, seed=cfg.train.seed)
    views = torch.zeros(cfg.mask.views, n, gh * gw, dtype=torch.bool).scatter_(2, keep.long(), True)

    def attention(model: Encoder) -> np.ndarray:
        maps = model.get_attention(x).mean(2)[..., 1:]
        maps = maps / maps.sum(-1, keepdim=True) * (gh * gw)
        return maps.reshape(n, -1, gh, gw).numpy()

    return Samples(
        small(images),
        views.transpose(0, 1).reshape(n, -1, gh, gw).numpy(),
        attention(encoder),
        None if initial is None else attention(initial),
        token_colors(encoder.encode(x).patches).reshape(n, gh, gw, 3),
    )


def token_colors(tokens: Tensor) -> np.ndarray:
    """[n, N, D] -> uint8 [n, N, 3]: first three principal components as RGB.

    One basis for all images, so equal colours mean alike tokens; each axis points to its largest entry.
    """
    n, count, _ = tokens.shape
    x = tokens.double().flatten(0, 1)
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    y = x @ axes
    if y.shape[1] < 3:
        y = F.pad(y, (0, 3 - y.shape[1]))
    low, high = (torch.quantile(y, q, dim=0) for q in (0.02, 0.98))
    y = ((y - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return (255 * y).round().to(torch.uint8).reshape(n, count, 3).numpy()


def overlay(kept: np.ndarray) -> np.ndarray:
    """bool [gh, gw] -> RGBA: slate blue where a patch is dropped, clear where it is kept."""
    out = np.zeros((*kept.shape, 4), np.uint8)
    # not a gray, which would look like a part of a gray photograph
    out[~kept] = (112, 120, 156, 255)
    return out


def heat(values: np.ndarray, top: float, alpha: float = 0.72) -> np.ndarray:
    """[gh, gw] -> RGBA of the colour map, 0 to `top`, half clear."""
    color = viridis(values / max(top, 1e-12))
    return np.concatenate([color, np.full((*values.shape, 1), round(255 * alpha), np.uint8)], axis=-1)


@dataclass(frozen=True)
class Neighbours:
    """Test images and the training images nearest to them.

    queries uint8 [q, h, w, 3]; near uint8 [q, k, h, w, 3]; cosine [q, k];
    names: class of each query and of its neighbours, [q] and [q][k]; None without labels
    """

    queries: np.ndarray
    near: np.ndarray
    cosine: np.ndarray
    names: list[str] | None
    near_names: list[list[str]] | None
    searched: int


@torch.inference_mode()
def neighbours(
    encoder: Encoder, train: ImageSource, test: ImageSource, cfg: Config, *, queries: int = 6, k: int = 5
) -> Neighbours:
    """The `k` nearest training images (cosine of class tokens) of evenly spaced test images."""
    bank = cap(train, min(BANK, cfg.eval.max_train), cfg.train.seed)
    test = match_classes(test, train)
    n = len(test)
    count = min(queries, n)
    # offset against `samples`, so that other images are shown
    rows = torch.tensor([int((j + 0.25) * n / count) for j in range(count)])
    asked = subset(test, rows)
    a, b = (
        F.normalize(extract(encoder, s, cfg.data, batch_size=cfg.eval.batch_size).cls, dim=1)
        for s in (asked, bank)
    )
    cosine, index = (a @ b.T).topk(min(k, len(bank)), dim=1)
    found = load_batch(subset(bank, index.flatten()), cfg.data, encoder.img_size, index.numel())
    shown = small(found)
    labelled = asked.labels is not None and bank.labels is not None
    return Neighbours(
        small(load_batch(asked, cfg.data, encoder.img_size, count)),
        shown.reshape(count, index.shape[1], *shown.shape[1:]),
        cosine.numpy(),
        [train.classes[i] for i in asked.labels.tolist()] if labelled else None,
        [[train.classes[i] for i in row] for row in bank.labels[index].tolist()] if labelled else None,
        len(bank),
    )


# ---- HTML ------------------------------------------------------------------------------------------


def _tile(index: int, cover: np.ndarray | None, label: str) -> str:
    label = escape(label)
    inner = "" if cover is None else f'<img alt="" src="{data_uri(cover)}">'
    tile = f'<span class="tile i{index}" role="img" aria-label="{label}" title="{label}">{inner}</span>'
    return f"<td>{tile}</td>"


def sample_table(s: Samples) -> tuple[str, str]:
    """(style rules, HTML): one row per image."""
    n, views, blocks = len(s.images), s.views.shape[1], s.attention.shape[1]
    height, width = s.images.shape[1:3]
    # each picture is stored once, as a background; what differs lies on top at patch resolution
    css = f".tile{{aspect-ratio:{width}/{height}}}" + "".join(
        f".i{i}{{background-image:url({data_uri(image)})}}" for i, image in enumerate(s.images)
    )
    # one scale for all maps, trained and initial, so that an indecisive head looks flat
    top = max(2.0, float(np.quantile(s.attention, 0.99)))
    heads = ["image", *(f"view {v + 1}" for v in range(views))]
    for p in range(blocks):
        heads += [f"attention {p + 1}"] + ([f"{p + 1} at init"] if s.initial is not None else [])
    heads.append("patch PCA")
    rows = []
    for i in range(n):
        cells = [_tile(i, None, f"test image {i + 1}")]
        cells += [_tile(i, overlay(s.views[i, v]), f"view {v + 1}") for v in range(views)]
        for p in range(blocks):
            cells.append(_tile(i, heat(s.attention[i, p], top), f"attention of pooling block {p + 1}"))
            if s.initial is not None:
                cells.append(_tile(i, heat(s.initial[i, p], top), f"block {p + 1} before training"))
        cells.append(_tile(i, s.colors[i], "main directions of the patch tokens"))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    ramp = ",".join("rgb({},{},{})".format(*c) for c in viridis(np.linspace(0, 1, 7)))
    text = (
        f"The {views} masked views are what the student sees (blue: dropped patches). Attention is that of "
        "the class token in each pooling block, averaged over heads, beside the same network at the start. "
        "PCA shows three main directions of the teacher's patch tokens as colours, one basis for all images: "
        "equal colours mean alike tokens."
    )
    legend = (
        '<p class="muted">Attention: 0 '
        f'<span class="scale" style="background:linear-gradient(90deg,{ramp})"></span>'
        f"{top:.1f} times an even share</p>"
    )
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    table = f'<table class="tiles"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return css, f'<p>{escape(text)}</p><div class="scroll">{table}</div>{legend}'


def near_table(found: Neighbours) -> str:
    """HTML: a test image and its neighbours per row, framed by whether the class is right."""

    def cell(image: np.ndarray, label: str, kind: str, lines: Sequence[str]) -> str:
        below = "".join(f'<div class="name">{escape(t)}</div>' for t in lines if t)
        return f'<td class="{kind}"><img alt="{escape(label)}" src="{data_uri(image)}">{below}</td>'

    rows, right, total = [], 0, 0
    for i, image in enumerate(found.queries):
        name = found.names[i] if found.names else ""
        cells = [cell(image, f"test image {name}", "query", [name])]
        for j, near in enumerate(found.near[i]):
            other = found.near_names[i][j] if found.near_names else ""
            kind, mark = "", ""
            if found.names:
                hit = other == name
                kind, mark = ("right", "✓ ") if hit else ("wrong", "✗ ")
                right, total = right + hit, total + 1
            cells.append(
                cell(near, f"neighbour {j + 1} {other}", kind, [f"{mark}{found.cosine[i, j]:.2f}", other])
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    score = f" {right} of {total} neighbours shown are of the same class." if total else ""
    text = (
        f"Left: a test image. Right: the nearest of {found.searched:,} training images by cosine of the "
        f"class token (number below).{score}"
    )
    table = f'<table class="near"><tbody>{"".join(rows)}</tbody></table>'
    return f'<p>{escape(text)}</p><div class="scroll">{table}</div>'
