"""Plain PyTorch definition of patch_gather: any float dtype, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._launch import constants, wide


def gather_patches(images: Tensor, keep: Tensor | None, patch: int) -> Tensor:
    """Pixels [V*B, K, C * P * P] of the kept patches of float images [B, C, H, W]; keep as in `patch_gather`."""
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
    pos: Tensor | None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Embedded tokens of the kept patches plus their positions; arguments and result as `patch_gather`."""
    if images.dtype == torch.uint8:
        assert mean is not None and std is not None
        # 16-bit types are computed in fp32 and rounded once
        dtype = wide(weight.dtype)
        m, s = (constants(x, dtype, images.device) for x in (mean, std))
        images = ((images.to(dtype) / 255 - m) / s).to(weight.dtype).permute(0, 3, 1, 2)
    patches = images if images.dim() == 3 else gather_patches(images, keep, weight.shape[-1])
    tokens = F.linear(patches, weight.flatten(1), bias)
    if pos is None:
        return tokens
    pos = pos.to(tokens.dtype)
    return tokens + (pos if keep is None else pos[keep.flatten(0, 1).long()])
