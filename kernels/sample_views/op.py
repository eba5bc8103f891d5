"""sample_views: the registered op and the public function (README.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _launch
from .._check import check
from .reference import sample_views_reference

MAX_PATCHES = 4096

torch.library.define(
    "extrema_fast::sample_views",
    "(Tensor index, int num_patches, int num_keep, int num_views, bool disjoint, int seed, int epoch) -> Tensor",
)


@torch.library.impl("extrema_fast::sample_views", "CompositeExplicitAutograd")
def _sample_views(
    index: Tensor, num_patches: int, num_keep: int, num_views: int, disjoint: bool, seed: int, epoch: int
) -> Tensor:
    if _launch.use_triton(index) and num_patches <= MAX_PATCHES:
        from .kernel import sample

        return sample(index, num_patches, num_keep, num_views, disjoint, seed, epoch)
    mode = "disjoint" if disjoint else "independent"
    return sample_views_reference(index, num_patches, num_keep, num_views, mode=mode, seed=seed, epoch=epoch)


@torch.library.register_fake("extrema_fast::sample_views")
def _fake(index, num_patches, num_keep, num_views, disjoint, seed, epoch) -> Tensor:
    return index.new_empty(num_views, index.shape[0], num_keep, dtype=torch.int32)


def sample_views(
    index: Tensor,
    num_patches: int,
    num_keep: int,
    num_views: int,
    *,
    mode: str = "disjoint",
    seed: int = 0,
    epoch: int = 0,
) -> Tensor:
    """Random kept tokens of every view, keyed by sample; made on the index's device, nothing is waited for.

    index    [B] int64: global row numbers of the images
    mode     `disjoint`: views share no token (needs V K <= N); `independent`
    returns  [V, B, K] int32, contiguous: bitwise `sample_views_reference`, whatever the device
    raises   TypeError, ValueError naming the argument
    falls back to the reference above 4,096 patches
    """
    check("index", index, ("B",), (torch.int64,), hint="global row numbers")
    if mode not in ("disjoint", "independent"):
        raise ValueError(f"mode: expected 'disjoint' or 'independent', got {mode!r}")
    if num_views < 1 or not 1 <= num_keep <= num_patches:
        raise ValueError(
            f"num_keep: expected 1..{num_patches} tokens in 1 view or more, got {num_keep}, {num_views}"
        )
    if mode == "disjoint" and num_views * num_keep > num_patches:
        raise ValueError(
            f"num_keep: {num_views} disjoint views of {num_keep} need {num_views * num_keep} tokens, "
            f"there are {num_patches}; use mode='independent'"
        )
    return torch.ops.extrema_fast.sample_views.default(
        index, num_patches, num_keep, num_views, mode == "disjoint", seed, epoch
    )
