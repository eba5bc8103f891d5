"""Keep indices of the student's views (paper section 3.1; method.md section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import keep_count
from ..errors import UsageError
from ..ops import dispatch as ops
from ..ops.scope import scoped

__all__ = ["keep_count", "keep_from_mask", "sample_views"]


@scoped("masks")
def sample_views(
    index: Tensor | int,
    num_patches: int,
    num_keep: int,
    num_views: int,
    *,
    mode: str = "disjoint",
    seed: int = 0,
    epoch: int = 0,
) -> Tensor:
    """Random kept tokens of every view, keyed by sample: the same for any batch or process layout.

    index:    [B] int64 row numbers of the images (its device is the result's), or a batch size
    mode      `disjoint`: one permutation per image, view v takes entries [v K, (v+1) K);
              `independent`: a permutation per view, its first K entries
    returns   [V, B, K] int32, contiguous; view-major, entry = row * grid_width + column
    raises    UsageError when K is not in 1..N, or when disjoint views need more than N tokens
    """
    if not 1 <= num_keep <= num_patches:
        raise UsageError(f"num_keep: expected 1..{num_patches} tokens, got {num_keep}")
    if num_views < 1:
        raise UsageError(f"num_views: expected at least 1, got {num_views}")
    if mode == "disjoint" and num_views * num_keep > num_patches:
        raise UsageError(
            f"{num_views} disjoint views of {num_keep} tokens need {num_views * num_keep}, "
            f"the image has {num_patches}; use fewer views, fewer tokens, or mode='independent'"
        )
    if mode not in ("disjoint", "independent"):
        raise UsageError(f"mode: expected 'disjoint' or 'independent', got {mode!r}")
    if isinstance(index, int):
        index = torch.arange(index)
    return ops.sample_views(index, num_patches, num_keep, num_views, mode=mode, seed=seed, epoch=epoch)


def check_keep(keep: Tensor, batch: int, num_patches: int) -> None:
    """raises UsageError unless `keep` is [B, K] or [B, V, K] of integers in [0, N), V and K at least 1."""
    if not isinstance(keep, Tensor):
        raise UsageError(
            f"keep: expected a tensor of integer indices, got {type(keep).__name__}; use torch.as_tensor(keep)"
        )
    if keep.is_floating_point() or keep.is_complex() or keep.dtype == torch.bool:
        raise UsageError(f"keep: expected integer indices, got {keep.dtype}; see extrema_fast.keep_from_mask")
    if keep.dim() not in (2, 3) or keep.shape[0] != batch or 0 in keep.shape[1:]:
        raise UsageError(
            f"keep: expected [{batch}, K] or [{batch}, V, K] with V and K >= 1, got {list(keep.shape)}"
        )
    # on a GPU the check would wait for the device (there the gather itself asserts); torch.compile cannot
    # branch on values
    if keep.device.type == "cpu" and keep.numel() and not torch.compiler.is_compiling():
        low, high = int(keep.min()), int(keep.max())
        if low < 0 or high >= num_patches:
            raise UsageError(
                f"keep: expected indices in [0, {num_patches}), which count patches only, got {low} to {high}"
            )


def keep_from_mask(mask: Tensor) -> Tensor:
    """Keep indices from a boolean mask (True = kept).

    mask:    [..., N] bool with the same number of True in every row
    returns  [..., K] int32, ascending
    raises   UsageError when rows keep different numbers of tokens, or none
    """
    if mask.dtype != torch.bool:
        raise UsageError(f"mask: expected bool (True = kept), got {mask.dtype}; use mask.bool()")
    counts = mask.sum(-1)
    if counts.unique().numel() != 1:
        raise UsageError(
            f"mask: every row must keep the same number of tokens, got {int(counts.min())} "
            f"to {int(counts.max())}"
        )
    k = int(counts.flatten()[0])
    if k < 1:
        raise UsageError("mask: every row must keep at least 1 token, got 0")
    order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)
    return order[..., :k].to(torch.int32)
