"""sample_views: the registered op and the public function (README.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _launch
from .reference import sample_views_reference

MAX_PATCHES = 4096


@_launch.op(
    "sample_views(Tensor index, int num_patches, int num_keep, int num_views, bool disjoint, int seed, int epoch)"
    " -> Tensor",
    "sample",
)
def _sample(index, num_patches, num_keep, num_views, disjoint, seed, epoch):
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
    """Random kept tokens of every view, keyed by sample, made on the index's device.

    Maths: README.md in this folder. Nothing is read back by the CPU. Runs the plain PyTorch definition where Triton
    cannot run and above 4,096 patches.

    Args:
        index: [B] int64, global row numbers of the images.
        num_patches: N, patches per image.
        num_keep: K, kept tokens per view.
        num_views: V.
        mode: `disjoint`: views share no token (needs V K <= N); or `independent`.
        seed: 64-bit seed.
        epoch: epoch; another one gives other views.

    Returns:
        [V, B, K] int32, contiguous; the same bits on every device.

    Raises:
        TypeError: `index` is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    _launch.check("index", index, ("B",), (torch.int64,), hint="global row numbers")
    if mode not in ("disjoint", "independent"):
        raise ValueError(f"mode: expected 'disjoint' or 'independent', got {mode!r}")
    if num_views < 1 or not 1 <= num_keep <= num_patches:
        raise ValueError(
            f"num_keep: expected 1..{num_patches} tokens in 1 view or more, got {num_keep}, {num_views}"
        )
    disjoint = mode == "disjoint"
    if disjoint and num_views * num_keep > num_patches:
        raise ValueError(
            f"num_keep: {num_views} disjoint views of {num_keep} need {num_views * num_keep} tokens, "
            f"there are {num_patches}; use mode='independent'"
        )
    if not _launch.use_triton(index) or num_patches > MAX_PATCHES:
        return sample_views_reference(
            index, num_patches, num_keep, num_views, mode=mode, seed=seed, epoch=epoch
        )
    return _sample(index, num_patches, num_keep, num_views, disjoint, seed, epoch)
