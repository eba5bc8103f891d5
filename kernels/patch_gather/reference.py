"""Plain PyTorch definition of patch_gather: any float dtype, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._launch import constants


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """`(x / 255 - mean) / std` per channel.

    Args:
        images: [B, H, W, C] uint8.
        mean: C numbers.
        std: C numbers.
        dtype: of the result; 16-bit ones are computed in fp32 and rounded once.

    Returns:
        [B, C, H, W].
    """
    wide = dtype if dtype.itemsize > 2 else torch.float32
    m, s = (constants(x, wide, images.device) for x in (mean, std))
    return ((images.to(wide) / 255 - m) / s).to(dtype).permute(0, 3, 1, 2)


def gather_patches(images: Tensor, keep: Tensor | None, patch: int) -> Tensor:
    """Pixels of the kept patches.

    Args:
        images: [B, C, H, W] float, H and W multiples of `patch`.
        keep: [V, B, K] integer, entry = row * (W / patch) + column; None: all patches, one view.
        patch: side of a patch in pixels.

    Returns:
        [V*B, K, C * patch * patch]: view-major rows; channel, row, column innermost.
    """
    b, c, h, w = images.shape
    gh, gw = h // patch, w // patch
    # [B, gh, gw, C, P, P]: a view, nothing is copied before the kept patches are picked
    cells = images.reshape(b, c, gh, patch, gw, patch).permute(0, 2, 4, 1, 3, 5)
    if keep is None:
        return cells.reshape(b, gh * gw, c * patch * patch)
    # contiguous: a traced gather relies on the layout it was traced with, which follows that of the indices
    keep = keep.long().contiguous()
    row, column = keep // gw, keep % gw
    image = torch.arange(b, device=images.device)[None, :, None].expand_as(keep)
    v, _, k = keep.shape
    return cells[image, row, column].reshape(v * b, k, c * patch * patch)


def patch_gather_reference(
    images: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Embedded tokens of the kept patches plus their positions.

    Args:
        images: float [B, C, H, W], or uint8 [B, H, W, C] with `mean` and `std`.
        keep: [V, B, K] integer, or None: all patches, one view.
        weight: [D, C, P, P].
        bias: [D] or None.
        pos: [N, D].
        mean: C numbers, for uint8 images.
        std: C numbers, for uint8 images.

    Returns:
        [V*B, K, D], view-major.
    """
    if images.dtype == torch.uint8:
        assert mean is not None and std is not None
        images = normalize(images, mean, std, weight.dtype)
    patches = gather_patches(images, keep, weight.shape[-1])
    tokens = F.linear(patches, weight.flatten(1), bias)
    if keep is None:
        return tokens + pos.to(tokens.dtype)
    return tokens + pos.to(tokens.dtype)[keep.flatten(0, 1).long()]
