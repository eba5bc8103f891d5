"""Device code of sample_views: a permutation by counting how many keys are smaller (README.md)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch
from .reference import STREAM


@triton.jit
def _word(row, place, seed, epoch, STREAM: tl.constexpr):
    """Random word number `place` of a sample: lane place % 4 of its Philox block; uint32."""
    block = (place // 4) | (STREAM << 16)
    lane = place % 4
    zero = block * 0
    low = (row & 0xFFFFFFFF).to(tl.uint32) + zero.to(tl.uint32)
    high = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero.to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, (zero + epoch).to(tl.uint32), block.to(tl.uint32))
    return tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))


@triton.jit(do_not_specialize=["batch", "seed", "epoch"])
def sample_views_kernel(
    # [B] int64; [V, B, K] int32
    index_ptr,
    keep_ptr,
    batch,
    seed,
    epoch,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DISJOINT: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    # one permutation per image, or one per view; a program ranks BLOCK_N of its words
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    draw = tl.program_id(1) // blocks
    row = tl.load(index_ptr + image)
    i = tl.program_id(1) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mine = _word(row, draw * N + i, seed, epoch, STREAM)
    rank = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, N, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = _word(row, draw * N + j, seed, epoch, STREAM)
        # [BLOCK_N, BLOCK_J]: equal words keep their order, as a stable sort does
        before = (other[None, :] < mine[:, None]) | (
            (other[None, :] == mine[:, None]) & (j[None, :] < i[:, None])
        )
        rank += tl.sum((before & (j[None, :] < N)).to(tl.int32), 1)
    if DISJOINT:
        view = rank // K
        slot = rank - view * K
        kept = (i < N) & (rank < V * K)
    else:
        view = draw + rank * 0
        slot = rank
        kept = (i < N) & (rank < K)
    tl.store(keep_ptr + (view.to(tl.int64) * batch + image) * K + slot, i, mask=kept)


# ---- launcher -------------------------------------------------------------------------------------


def sample(
    index: Tensor, num_patches: int, num_keep: int, num_views: int, disjoint: bool, seed: int, epoch: int
) -> Tensor:
    """Keep indices [V, B, K] int32 of index [B] int64."""
    batch = index.shape[0]
    keep = _launch.empty((num_views, batch, num_keep), index, torch.int32)
    # the words of one program: up to 256
    default = {"BLOCK_N": min(256, triton.next_power_of_2(num_patches)), "num_warps": 8, "num_stages": 1}
    options = _launch.settings("sample_views", f"sample|N{num_patches}", index.device, default)
    options |= {"N": num_patches, "K": num_keep, "V": num_views, "DISJOINT": disjoint}
    blocks = triton.cdiv(num_patches, options["BLOCK_N"]) * (1 if disjoint else num_views)
    args = (index.contiguous(), keep, batch, seed, epoch)
    _launch.launch(sample_views_kernel, (batch, blocks), index, *args, STREAM=STREAM, BLOCK_J=32, **options)
    return keep
