"""The one tolerance rule of all kernels (see `assert_as_good`)."""

from __future__ import annotations

import torch
from torch import Tensor


def error(y: Tensor, exact: Tensor) -> float:
    """max |y - exact| / max |exact|, in float64; NaN counts as infinite."""
    if exact.numel() == 0:
        return 0.0
    gap = (y.detach().double() - exact.detach().double()).abs().max()
    return float("inf") if gap.isnan() else float(gap / exact.detach().double().abs().max().clamp_min(1e-300))


def floor(dtype: torch.dtype, length: int) -> float:
    """2 u(dtype) + u(fp32) sqrt(length), u the unit roundoff; fp64: both in fp64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(dtype).eps + torch.finfo(wide).eps / 2 * length**0.5


def assert_as_good(ours: Tensor, same: Tensor, exact: Tensor, length: int, name: str = "result") -> None:
    """error(ours) <= 2 error(torch in the same dtype) + floor, against the float64 definition.

    length: number of terms of the longest sum behind one element
    """
    assert ours.shape == exact.shape and ours.dtype == same.dtype, (name, ours.shape, ours.dtype, exact.shape)
    mine, theirs = error(ours, exact), error(same, exact)
    if ours.dtype == torch.float64:
        # nothing is more exact: torch's own error is taken to be the floor
        theirs = floor(ours.dtype, length)
    limit = 2 * theirs + floor(ours.dtype, length)
    print(f"{name}: ours {mine:.2e}, torch {theirs:.2e}, limit {limit:.2e}")
    assert mine <= limit, f"{name}: error {mine:.2e}, limit {limit:.2e} (torch {theirs:.2e})"
