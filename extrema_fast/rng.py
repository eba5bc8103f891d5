"""Keyed random numbers: every coin is a function of (seed, sample row, epoch, stream).

Philox4x32-10 in plain int64 torch arithmetic, so CPU, GPU and Triton's `tl.philox` agree word for
word. Nothing is stored in a checkpoint, and no coin depends on the number of processes,
micro-batches or steps taken before (Salmon et al., SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

# what a stream of numbers is for; the value is part of the counter and must not change
ORDER, CROP, COLOR_STUDENT, COLOR_TEACHER, MASK, DROP_PATH, INIT = range(7)

_M32 = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # the 64-bit product wraps in int64, which leaves its bit pattern intact
    product = b * a
    return (product >> 32) & _M32, product & _M32


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> tuple[Tensor, ...]:
    """Four 32-bit words (held in int64) per counter; counters broadcast against each other."""
    k0, k1 = seed & _M32, (seed >> 32) & _M32
    for _ in range(10):
        hi_a, lo_a = _mul_hi_lo(_ROUND_A, c0)
        hi_b, lo_b = _mul_hi_lo(_ROUND_B, c2)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + _KEY_A) & _M32, (k1 + _KEY_B) & _M32
    return c0, c1, c2, c3


def words(index: Tensor, count: int, *, seed: int, epoch: int, stream: int) -> Tensor:
    """`count` random words per row.

    index:   [B] int64, row numbers of the samples
    returns  [B, count] int64 in [0, 2**32), on the device of `index`
    """
    index = index.long()[:, None]
    blocks = -(-count // 4)
    if blocks > 1 << 16:
        raise ValueError(f"count: at most {4 << 16} words per stream, got {count}")
    block = torch.arange(blocks, device=index.device)[None]
    zero = torch.zeros_like(index + block)
    out = philox(
        (index & _M32) + zero,
        ((index >> 32) & _M32) + zero,
        zero + epoch,
        (stream << 16 | block) + zero,
        seed,
    )
    return torch.stack(out, dim=-1).flatten(1)[:, :count]


def uniform(index: Tensor, count: int, *, seed: int, epoch: int, stream: int) -> Tensor:
    """[B, count] fp32 in [0, 1): the upper 24 bits of `words`."""
    return (words(index, count, seed=seed, epoch=epoch, stream=stream) >> 8).float() * 2.0**-24


def permutation(n: int, *, seed: int, epoch: int) -> Tensor:
    """[n] int64 on the CPU: the order of an epoch, a stable argsort of 63-bit keys."""
    w = words(torch.arange(n), 2, seed=seed, epoch=epoch, stream=ORDER)
    return torch.argsort((w[:, 0] << 31) ^ w[:, 1], stable=True)
