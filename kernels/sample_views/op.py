"""sample_views and drop_path_factors: the registered ops and the public functions (README.md)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _launch
from .reference import DROP_PATH_STREAM, drop_path_reference, sample_views_reference

MAX_PATCHES = 4096
# of one sample: what a stream has
MAX_WORDS = 1 << 18


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
        mode: `disjoint`: views share no token (needs V K <= N); or `independent` (needs V N <= 2^18).
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
    # beyond, the counter runs into the next stream
    if (1 if disjoint else num_views) * num_patches > MAX_WORDS:
        raise ValueError(
            f"num_views, num_patches: expected at most {MAX_WORDS} random words per image, one for each patch"
            f"{'' if disjoint else ' of each view'}, got {num_views}, {num_patches}"
        )
    if not _launch.use_triton(index) or num_patches > MAX_PATCHES:
        return sample_views_reference(
            index, num_patches, num_keep, num_views, mode=mode, seed=seed, epoch=epoch
        )
    return _sample(index, num_patches, num_keep, num_views, disjoint, seed, epoch)


@_launch.op(
    "drop_path_factors(Tensor index, Tensor table, int num_views, int seed, int epoch, int stream) -> Tensor",
    "drop_path",
)
def _factors(index, table, num_views, seed, epoch, stream):
    return table.new_empty(table.shape[1], 2, num_views * index.shape[0])


# unbounded: a CUDA graph keeps reading its table, of a few hundred bytes
@functools.cache
def _table(depth: int, rate: float, device: torch.device) -> Tensor:
    # made on the CPU, whose rounding is the definition's
    drop = torch.linspace(0, rate, depth)
    return torch.stack([drop, 1 / (1 - drop)]).to(device)


def drop_path_factors(
    index: Tensor,
    num_views: int,
    depth: int,
    rate: float,
    *,
    seed: int,
    epoch: int,
    stream: int = DROP_PATH_STREAM,
) -> Tensor:
    """Drop-path factors of every block, branch (attention, MLP), view and image, keyed by sample.

    Maths: README.md in this folder. Nothing is read back by the CPU. Runs the plain PyTorch definition where Triton
    cannot run.

    Args:
        index: [B] int64, global row numbers of the images.
        num_views: V.
        depth: L, blocks.
        rate: drop probability of the last block, below 1; block l drops with rate * l / (L - 1).
        seed: 64-bit seed.
        epoch: epoch; another one gives other factors.
        stream: the generator's stream.

    Returns:
        [L, 2, V B] fp32, view-major: 0 for a dropped branch, else 1 / (1 - its probability); the same bits on every
        device.

    Raises:
        TypeError: `index` is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    _launch.check("index", index, ("B",), (torch.int64,), hint="global row numbers")
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected from 0 to below 1, got {rate}")
    if num_views < 1 or depth < 1 or 2 * num_views * depth > MAX_WORDS:
        raise ValueError(
            f"num_views, depth: expected at least 1 and at most {MAX_WORDS} factors per image, "
            f"got {num_views}, {depth}"
        )
    if not _launch.use_triton(index):
        return drop_path_reference(index, num_views, depth, rate, seed=seed, epoch=epoch, stream=stream)
    table = _table(depth, float(rate), index.device)
    return _factors(index, table, num_views, seed, epoch, stream)
