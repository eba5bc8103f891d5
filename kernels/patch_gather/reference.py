"""Plain PyTorch definition of patch_gather: any float dtype, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._launch import constants


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """`(x / 255 - mean) / std` per channel.

    images:  [B, H, W, C] uint8;  mean, std: C numbers
    returns  [B, C, H, W] of `dtype`; 16-bit ones are computed in fp32 and rounded once
    """
    wide = dtype if dtype.itemsize > 2 else torch.float32
    m, s = (constants(x, wide, images.device) for x in (mean, std))
    return ((images.to(wide) / 255 - m) / s).to(dtype).permute(0, 3, 1, 2)


def gather_patches(images: Tensor, keep: Tensor | None, patch: int) -> Tensor:
    """Pixels of the kept patches.

    images:  [B, C, H, W] float, H and W multiples of `patch`
    keep:    [V, B, K] integer, entry = row * (W / patch) + column; None: all patches, one view
    returns  [V*B, K, C * patch * patch] (view-major rows; channel, row, column innermost)
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


def pick(patches: Tensor, keep: Tensor | None) -> Tensor:
    """[B, N, F] -> [V*B, K, F] at keep [V, B, K]; all rows for None."""
    if keep is None:
        return patches
    v, b, k = keep.shape
    image = torch.arange(b, device=patches.device)[None, :, None].expand_as(keep)
    return patches[image, keep.long()].reshape(v * b, k, patches.shape[-1])


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

    images:  float [B, C, H, W], or patches [B, N, C * P * P], or uint8 [B, H, W, C] with `mean` and `std`
    keep:    [V, B, K] integer or None (all patches)
    weight:  [D, C, P, P];  bias: [D] or None;  pos: [N, D]
    returns  [V*B, K, D]
    """
    if images.dtype == torch.uint8:
        images = normalize(images, mean, std, weight.dtype)
    patches = pick(images, keep) if images.dim() == 3 else gather_patches(images, keep, weight.shape[-1])
    tokens = F.linear(patches, weight.flatten(1), bias)
    if keep is None:
        return tokens + pos.to(tokens.dtype)
    return tokens + pos.to(tokens.dtype)[keep.flatten(0, 1).long()]
