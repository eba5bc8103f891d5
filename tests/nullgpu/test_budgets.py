"""What the default ViT-B step may cost: figures that are the same on a GPU.

Covers: launches and copies of a step, those of random parameters and color views, waits of the host; peak memory
next to the strong baseline's. Times are not asserted.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from benchmarks.step import Job, chosen, configuration
from benchmarks.step_bytes import Counting

pytestmark = pytest.mark.timeout(1800)

# launches and copies: of a step (strong: 1,134), of random parameters and color views; share of strong's peak memory
LAUNCHES, DRAW_LAUNCHES, PEAK = 800, 10, 1.0


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, Any]]:
    """Counts per provider, one after another in this process."""
    # 80 % x 5, 256 images, color on, the fixed rule of implementations
    cfg = configuration("base", batch=256, color=True)
    found = {}
    for provider in chosen(["ours", "strong"], "cuda")[0]:
        if provider.name in ("ours", "strong"):
            counting = Counting(Job(provider.name, provider, cfg, "cuda"), None)
            found[provider.name] = counting.tally()
            del counting
            torch.compiler.reset()
            # a step refers to itself: what it holds would count for the next
            gc.collect()
            torch.cuda.empty_cache()
    return found


def test_launches(counted):
    ours = counted["ours"]
    assert ours["launches"] + ours["copies"] <= LAUNCHES
    assert ours["draw_launches"] <= DRAW_LAUNCHES


def test_no_wait(counted):
    ours = counted["ours"]
    assert ours["syncs"] == ours["event_syncs"] == ours["copies_d2h"] == 0


def test_peak_memory(counted):
    assert counted["ours"]["peak_gib"] <= PEAK * counted["strong"]["peak_gib"]
