"""Keyed random numbers: every coin is a function of (seed, sample row, epoch, stream).

Philox4x32-10 (`kernels/_philox.py`), so CPU, GPU and Triton kernels agree word for word. Nothing is stored
in a checkpoint, and no coin depends on the number of processes, micro-batches or steps taken before
(Salmon et al., SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels._philox import philox, uniform, words

__all__ = ["permutation", "philox", "uniform", "words"]

# what a stream of numbers is for; the value is part of the counter and must not change
ORDER, CROP, COLOR_STUDENT, COLOR_TEACHER, MASK, DROP_PATH, INIT = range(7)


def permutation(n: int, *, seed: int, epoch: int) -> Tensor:
    """[n] int64 on the CPU: the order of an epoch, a stable argsort of 63-bit keys."""
    w = words(torch.arange(n), 2, seed=seed, epoch=epoch, stream=ORDER)
    return torch.argsort((w[:, 0] << 31) ^ w[:, 1], stable=True)
