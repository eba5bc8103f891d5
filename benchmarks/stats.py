"""What raw samples say: percentiles, and ratios with the interval that their noise allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# below this many samples an interval says nothing
FEW = 5
# two identical programs, timed one after the other, differ by this much often enough
NOISE = 0.01


def percentiles(samples: Sequence[float], unit: str = "ms") -> dict[str, float]:
    """`{"p20_ms": ..., "p50_ms": ..., "p80_ms": ...}` of at least one sample."""
    return {
        f"p{p}_{unit}": float(v)
        for p, v in zip((20, 50, 80), np.percentile(samples, (20, 50, 80)), strict=True)
    }


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Median of `a` over median of `b`, with a 95 % interval.

    a, b     samples in ms; of equal length when they were taken in turns, and are then resampled in pairs
    returns  {"ratio", "low", "high", "samples"}: a bootstrap over samples with a fixed seed
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    generator = np.random.default_rng(0)
    rows_a = generator.integers(len(a), size=(2000, len(a)))
    rows_b = rows_a if len(a) == len(b) else generator.integers(len(b), size=(2000, len(b)))
    draws = np.median(a[rows_a], 1) / np.median(b[rows_b], 1)
    low, high = np.percentile(draws, (2.5, 97.5))
    middle = float(np.median(a) / np.median(b))
    return {"ratio": middle, "low": float(low), "high": float(high), "samples": min(len(a), len(b))}


def verdict(r: dict[str, float]) -> str:
    """`faster`, `slower`, `within noise` or `too few samples`: of the program under the line, from `ratio`."""
    if r["samples"] < FEW:
        return "too few samples"
    if r["low"] > 1 + NOISE:
        return "faster"
    if r["high"] < 1 - NOISE:
        return "slower"
    return "within noise"


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of the least-squares fit y ~ x^p: 1 is linear, below 1 grows slower."""
    return float(np.polyfit(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), 1)[0])
