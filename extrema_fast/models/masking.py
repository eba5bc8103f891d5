"""Keep indices: which patches each view of an image keeps (arXiv 2206.04667, section 3.1).

The public layout is [B, V, K], or [B, K] for one view. The training step and the kernels work view-major, [V, B, K],
so that each view is one contiguous batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..ops import dispatch as ops
from ..ops.scope import scoped


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
    """Samples random keep indices for every view.

    They depend only on seed, epoch and row number, not on batch composition or the number of processes.

    Args:
        index: [B] int64 row numbers of the images in their data set; the result is on the same device. An int B stands
            for rows 0 to B - 1, which get the same views at every call with the same seed and epoch.
        num_patches: N.
        num_keep: K.
        num_views: V.
        mode: `disjoint`: one permutation per image, of which view v gets entries [v K, (v + 1) K); `independent`: the
            first K entries of a separate permutation per view.
        seed: random seed.
        epoch: changes the views; in a loop without row numbers, pass the step number.

    Returns:
        [B, V, K] int32; an entry is row * grid_width + column.

    Raises:
        UsageError: K is not in 1..N, V < 1, or disjoint views need more than N patches.
    """
    views = draw_views(index, num_patches, num_keep, num_views, mode=mode, seed=seed, epoch=epoch)
    return views.transpose(0, 1).contiguous()


@scoped("masks")
def draw_views(
    index: Tensor | int,
    num_patches: int,
    num_keep: int,
    num_views: int,
    *,
    mode: str = "disjoint",
    **keys: Any,
) -> Tensor:
    """`sample_views` in the layout used for training: view-major [V, B, K] int32, contiguous."""
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
    index = torch.arange(index) if isinstance(index, int) else index
    return ops.sample_views(index, num_patches, num_keep, num_views, mode=mode, **keys)


def check_keep(keep: Tensor, batch: int, num_patches: int, device: torch.device | None = None) -> Tensor:
    """Checks keep indices [B, K] or [B, V, K] of B images, and returns them view-major, [V, B, K].

    Raises:
        UsageError: wrong type, dtype, shape or device; on a CPU, except in compiled code, also an index out of range.
    """
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
    if device is not None and keep.device != device:
        raise UsageError(
            f"keep: expected indices on {device}, as the images, got {keep.device}; use keep.to(images)"
        )
    # on a GPU the check would synchronize (there the gather itself asserts); torch.compile and torch.func cannot branch
    # on values
    if (
        keep.device.type == "cpu"
        and keep.numel()
        and not (torch.compiler.is_compiling() or ops.transforming())
    ):
        # not every integer dtype implements min
        least, most = int(keep.long().min()), int(keep.long().max())
        if least < 0 or most >= num_patches:
            raise UsageError(
                f"keep: expected indices in [0, {num_patches}), which count patches only, got {least} to {most}"
            )
    return keep[None] if keep.dim() == 2 else keep.transpose(0, 1)


def image_major(x: Tensor, keep: Tensor) -> Tensor:
    """View-major rows [V B, ...] -> [B, V, ...] for `keep` [B, V, K]; unchanged for [B, K]."""
    return x if keep.dim() == 2 else x.unflatten(0, (keep.shape[1], keep.shape[0])).transpose(0, 1)


def keep_from_mask(mask: Tensor) -> Tensor:
    """Converts a boolean mask to keep indices.

    Args:
        mask: [..., N] bool, True = kept; every row must keep the same number of patches.

    Returns:
        [..., K] int32, in ascending order.

    Raises:
        UsageError: the mask is not bool, or rows keep different numbers of patches, or none.
    """
    if mask.dtype != torch.bool:
        raise UsageError(f"mask: expected bool (True = kept), got {mask.dtype}; use mask.bool()")
    counts = mask.sum(-1)
    least, most = int(counts.min()), int(counts.max())
    if least != most or least < 1:
        raise UsageError(
            f"mask: every row must keep the same number of tokens, at least 1, got {least} to {most}"
        )
    order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)
    return order[..., :least].to(torch.int32)


def mae_mask(keep: Tensor, num_patches: int) -> tuple[Tensor, Tensor]:
    """Converts keep indices to the mask and order used by the decoder and loss of MAE (arXiv 2111.06377).

    The decoder's input is `cat([kept, mask tokens], 1)` gathered by `ids_restore`. Passed as `noise` to ViTMAE of
    transformers, `ids_restore` makes it keep the same patches in the same order.

    Args:
        keep: [..., K] integer indices in 0..N-1, without duplicates in a row.
        num_patches: N.

    Returns:
        (mask, ids_restore). mask: [..., N] fp32, 0 = kept, 1 = dropped. ids_restore: [..., N] int64, the position of
        patch j when the kept patches are followed by the dropped ones in ascending order.

    Raises:
        UsageError: on a CPU, an index that is out of range or repeated in a row.
    """
    rows = check_keep(keep.reshape(-1, keep.shape[-1]), keep[..., 0].numel(), num_patches)[0].long()
    mask = torch.ones(len(rows), num_patches, device=keep.device).scatter(-1, rows, 0.0)
    if mask.device.type == "cpu" and int((mask == 0).sum()) != rows.numel():
        raise UsageError("keep: an index is twice in a row, which a mask cannot say")
    dropped = torch.argsort(mask, dim=-1, descending=True, stable=True)[:, : num_patches - rows.shape[1]]
    ids_restore = torch.argsort(torch.cat([rows, dropped], -1), dim=-1)
    shape = (*keep.shape[:-1], num_patches)
    return mask.view(shape), ids_restore.view(shape)
