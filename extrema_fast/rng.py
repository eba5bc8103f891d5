"""Keyed random numbers: each is a function of (seed, sample row, epoch, stream).

Philox4x32-10 (Salmon et al., SC 2011; `kernels/_philox.py`), so CPU, GPU and Triton kernels agree bit for bit. Nothing
is stored in a checkpoint, and no number depends on the number of processes, on micro-batches or on earlier steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels._philox import philox, uniform, words

__all__ = ["permutation", "philox", "uniform", "words"]

# what a stream of numbers is for; the value is part of the counter and must not change
ORDER, CROP, COLOR_STUDENT, COLOR_TEACHER, MASK, DROP_PATH, INIT, PASS, SHARD, SUBSTITUTE = range(10)
# of fine-tuning: RandAugment and random erasing; mixup and cutmix
AUGMENT, MIX = 10, 11
# the teacher's, where it has a crop of its own
CROP_TEACHER = 12

# rows drawn at a time: whole tables of counters need tens of times the memory of the result
_CHUNK = 1 << 16


def permutation(n: int, *, seed: int, epoch: int, stream: int = ORDER) -> Tensor:
    """[n] int64 on the CPU: the order of an epoch, a stable argsort of 63-bit keys."""
    keys = torch.empty(n, dtype=torch.int64)
    for start in range(0, n, _CHUNK):
        rows = torch.arange(start, min(start + _CHUNK, n))
        w = words(rows, 2, seed=seed, epoch=epoch, stream=stream)
        keys[start : start + _CHUNK] = (w[:, 0] << 31) ^ w[:, 1]
    return torch.argsort(keys, stable=True)
