"""Weights for another input: channels, patch size, and the grid of a learned position table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError


def adapt_in_chans(weight: Tensor, in_chans: int) -> Tensor:
    """A patch kernel for another number of channels, by timm's rule.

    weight    [D, C, p, p] float
    in_chans  1: the sum over the channels; else the channels repeated, cut to `in_chans` and scaled by
              C / in_chans, so that an image of equal channels gives the same tokens where C divides `in_chans`
    returns   [D, in_chans, p, p] of the same type; `weight` itself where nothing changes
    raises    UsageError for fewer than one channel
    """
    if not isinstance(in_chans, int) or in_chans < 1:
        raise UsageError(f"in_chans: expected a whole number, at least 1, got {in_chans!r}")
    have = weight.shape[1]
    if in_chans == have:
        return weight
    wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    if in_chans == 1:
        return wide.sum(1, keepdim=True).to(weight.dtype)
    tiled = wide.repeat(1, -(-in_chans // have), 1, 1)[:, :in_chans]
    return (tiled * (have / in_chans)).to(weight.dtype)


def resample_patch_kernel(weight: Tensor, new_patch: int) -> Tensor:
    """A patch kernel for another patch size, by the pseudo-inverse of resizing (FlexiViT, arXiv 2212.08013).

    Of all kernels it is the one whose tokens of a resized image are nearest to the tokens of the image itself;
    they are equal where the patch grows.

    weight     [D, C, p, p] float
    new_patch  q pixels
    returns    [D, C, q, q] of the same type, computed in float64; `weight` itself where q = p
    raises     UsageError for a kernel that is not square, or a patch below one pixel
    """
    p = weight.shape[-1]
    if weight.dim() != 4 or weight.shape[-2] != p:
        raise UsageError(f"patch kernel: expected [D, C, p, p], got {list(weight.shape)}")
    if new_patch < 1:
        raise UsageError(f"patch_size: expected at least 1, got {new_patch}")
    if new_patch == p:
        return weight
    unit = torch.eye(p * p, dtype=torch.float64, device=weight.device).view(p * p, 1, p, p)
    # row i: the picture that is 1 at pixel i alone, resized
    resize = F.interpolate(unit, size=(new_patch, new_patch), mode="bicubic", antialias=True).flatten(1)
    kernel = weight.double().flatten(2) @ torch.linalg.pinv(resize).T
    return kernel.view(*weight.shape[:2], new_patch, new_patch).to(weight.dtype)


def resample_table(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool = True
) -> Tensor:
    """A learned position table for another grid, bicubic in fp32.

    table      [1, N, D] or [N, D] of `old_grid` (rows, columns)
    antialias  as timm does; False as the released code does
    returns    [.., N', D] of the same type; `table` itself where the grid is the same
    raises     UsageError for a table of another length than its grid
    """
    rows, columns = old_grid
    if table.shape[-2] != rows * columns:
        raise UsageError(
            f"position table: {table.shape[-2]} rows do not make a grid of {rows} x {columns} patches"
        )
    if tuple(old_grid) == tuple(new_grid):
        return table
    picture = table.float().view(1, rows, columns, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(picture, size=tuple(new_grid), mode="bicubic", antialias=antialias)
    return resized.flatten(2).transpose(1, 2).to(table.dtype).view(*table.shape[:-2], -1, table.shape[-1])
