"""What the tests of the encoder share."""

from __future__ import annotations

import torch

from extrema_fast.models.encoder import Encoder


def randomized(encoder: Encoder) -> Encoder:
    """The encoder in eval mode with every parameter random, so that none can be left out unnoticed."""
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return encoder.eval()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float | None = None) -> bool:
    """Same shape, and equal up to `tolerance` (default: rounding) times the largest value of `b`, at least 1."""
    a, b = a.detach(), b.detach()
    if tolerance is None:
        tolerance = 1e-11 if b.dtype == torch.float64 else 2e-6
    largest = float(b.abs().max()) if b.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance * max(1.0, largest))
