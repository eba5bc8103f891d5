"""Device code of sample_views and drop_path_factors (README.md): keyed random words, and what is made of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch
from .reference import STREAM


@triton.jit
def keyed_words(row, block, seed, epoch):
    """The four uint32 random words of a sample's Philox block, which includes the stream (README.md)."""
    zero = block * 0
    low = (row & 0xFFFFFFFF).to(tl.uint32) + zero.to(tl.uint32)
    high = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero.to(tl.uint32)
    return tl.philox(seed, low, high, (zero + epoch).to(tl.uint32), block.to(tl.uint32))


@triton.jit
def _keyed_word(row, place, seed, epoch, STREAM: tl.constexpr):
    """Random word number `place` of a sample: lane place % 4 of its Philox block; uint32."""
    lane = place % 4
    a, b, c, d = keyed_words(row, (place // 4) | (STREAM << 16), seed, epoch)
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
    mine = _keyed_word(row, draw * N + i, seed, epoch, STREAM)
    rank = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, N, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = _keyed_word(row, draw * N + j, seed, epoch, STREAM)
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


@triton.jit
def keyed_uniform(word):
    """fp32 in [0, 1) of a random word: its upper 24 bits."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit(do_not_specialize=["batch", "seed", "epoch"])
def drop_path_kernel(
    # [B] int64; [2, L] fp32: drop probabilities, factors of kept branches; [L, 2, V, B] fp32
    index_ptr,
    table_ptr,
    out_ptr,
    batch,
    seed,
    epoch,
    V: tl.constexpr,
    L: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # all factors of one image: 2 L for every view
    image = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + image)
    for start in range(0, 2 * V * L, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < 2 * V * L
        view = place // (2 * L)
        branch = place - view * (2 * L)
        drop = tl.load(table_ptr + branch // 2, mask=inside, other=0.0)
        kept = tl.load(table_ptr + L + branch // 2, mask=inside, other=0.0)
        uniform = keyed_uniform(_keyed_word(row, place, seed, epoch, STREAM))
        target = out_ptr + (branch * V + view).to(tl.int64) * batch + image
        tl.store(target, tl.where(uniform >= drop, kept, 0.0), mask=inside)


# ---- launchers ------------------------------------------------------------------------------------


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


def drop_path(index: Tensor, table: Tensor, num_views: int, seed: int, epoch: int, stream: int) -> Tensor:
    """Factors [L, 2, V B] fp32 of index [B] int64, table [2, L] fp32."""
    batch, depth = index.shape[0], table.shape[1]
    out = _launch.empty((depth, 2, num_views * batch), index, torch.float32)
    args = (index.contiguous(), table.contiguous(), out, batch, seed, epoch)
    options = {"V": num_views, "L": depth, "STREAM": stream, "BLOCK": 128, "num_warps": 4}
    _launch.launch(drop_path_kernel, (batch,), index, *args, **options)
    return out
