"""How much of a step is matrix products, and the rate they reach; read by `extrema_fast.tools.trace`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from extrema_fast.tools import trace


def products(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """One profiled step of any provider.

    returns  step_ms (device time on a GPU), products: ms, share of the step, gflop, tflops (None without
             shapes: a replayed CUDA graph), and `largest`: the shapes that take longest
    """
    gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=kinds):
        # the tracer's first use pays for its start
        step()
    with profile(activities=kinds, record_shapes=True) as prof:
        with record_function(trace.STEP):
            step()
        if gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json.gz"
        prof.export_chrome_trace(str(file))
        found = trace.read(trace.load(file))
    us, flop = sum(r.products_us for r in found.rows), sum(r.flop for r in found.rows)
    return {
        "step_ms": found.wall_us / 1000,
        "ms": us / 1000,
        "share": us / found.wall_us,
        "gflop": flop / 1e9,
        "tflops": flop / us / 1e6 if flop and us else None,
        "largest": largest(prof, gpu),
    }


def largest(prof: Any, gpu: bool, count: int = 12) -> list[dict[str, Any]]:
    """The products that take longest, by shape: op, shapes, calls, ms, tflops."""
    found = []
    for e in prof.key_averages(group_by_input_shape=True):
        flop = e.count * trace.Event(e.key, "cpu_op", 0, 0, dims=e.input_shapes).flop
        us = e.self_device_time_total if gpu else e.self_cpu_time_total
        if flop and us:
            shapes = " x ".join(str(s) for s in e.input_shapes if s)
            found.append(
                {"op": e.key, "shapes": shapes, "calls": e.count, "ms": us / 1000, "tflops": flop / us / 1e6}
            )
    return sorted(found, key=lambda f: -f["ms"])[:count]
