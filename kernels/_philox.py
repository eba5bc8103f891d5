"""Keyed random numbers: Philox4x32-10 in plain int64 torch arithmetic, word for word Triton's `tl.philox`.

Counter: (row low, row high, epoch, stream << 16 | block); key: the 64-bit seed (Salmon et al., SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    """[B, count] random words, int64 in [0, 2**32), on the device of `index`: [B] int64, row numbers of samples."""
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
