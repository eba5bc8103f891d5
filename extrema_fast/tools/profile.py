"""`extrema-fast profile`: a few real steps under torch's profiler, and a table of time per component.

It turns on the named ranges in the code (`ops/scope.py`); `trace.py` reads the trace.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from ..config import Config, local_batch, to_dict
from ..data.loader import Batch
from ..distributed import start
from ..errors import UsageError
from ..files import write_file
from ..ops.scope import recording
from ..train import train_step
from ..training.resolve import flops_per_image, settle_channels
from ..training.run import Run, build, open_loader, open_train, prepare_torch
from ..training.run_folder import versions
from ..training.step import batches, wrap
from . import trace

log = logging.getLogger(__name__)

# without a data set: images of noise
_NOISE_IMAGES = 1_000_000


def profile(
    cfg: Config, out: str | Path, *, steps: int = 3, warmup: int = 5, synthetic: bool = False
) -> dict[str, Any]:
    """Profiles `steps` training steps of a run; nothing of the run itself is written.

    Args:
        out: folder for trace.json.gz (chrome://tracing, ui.perfetto.dev), profile.json and profile.txt.
        warmup: steps before: compilation, allocator, graph capture.
        synthetic: random images from memory in place of `cfg.data.train`.

    Returns:
        What profile.json holds: milliseconds of a step by component (`rows`), matmuls and the rate they reach
        (`matmul`), the longest ops, times, settings and versions.

    Raises:
        UsageError: steps or warmup below 1, several processes, or images that are not there.
    """
    for name, value in (("steps", steps), ("warmup", warmup)):
        if value < 1:
            raise UsageError(f"--{name}: expected at least 1, got {value}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: is a file; name a folder")
    with start(cfg.system.device) as world:
        if world.size > 1:
            raise UsageError(
                f"profile: one process only, this is one of {world.size}; start it without torchrun"
            )
        prepare_torch(cfg.system)
        local_batch(cfg, 1)
        source = range(max(_NOISE_IMAGES, cfg.train.batch_size)) if synthetic else open_train(cfg)
        cfg = _with_statistics(cfg) if synthetic else settle_channels(cfg, source)  # type: ignore[arg-type]
        run = build(cfg, world, source)  # type: ignore[arg-type]
        images, flop = (
            "from memory" if synthetic else cfg.data.train,
            flops_per_image(cfg) * cfg.train.batch_size,
        )
        log.info(
            "profiling %s: batch %d, %.3g TFLOP a step, images %s",
            world.device,
            cfg.train.batch_size,
            flop / 1e12,
            images,
        )
        if world.device.type == "cpu" and flop > 1e13:
            log.warning("a step of this size takes minutes on a CPU; a smaller one: --train.batch-size 16")
        with recording(), _fused_names(run):
            wrap(run)
            with nullcontext(_noise(run)) if synthetic else open_loader(run) as loader:
                times, profiler = _measure(run, batches(run, loader), steps, warmup)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    with gzip.open(folder / "trace.json.gz") as f:
        found = trace.Breakdown(json.load(f)["traceEvents"])
    result = _result(run, found, times, images)
    write_file(folder / "profile.json", json.dumps(result, indent=1) + "\n")
    write_file(folder / "profile.txt", describe(result) + "\n")
    return result


def _fused_names(run: Run) -> AbstractContextManager[object]:
    """Compiled CPU code marks each fused kernel; without it they would be a gap in the trace."""
    if run.resolved.compile == "none":
        return nullcontext()
    import torch._inductor.config as inductor

    return inductor.patch("cpp.enable_kernel_profile", sys.platform == "linux")


def _with_statistics(cfg: Config) -> Config:
    """`cfg` with any mean and standard deviation for channels other than RGB."""
    one = replace(cfg.data, mean=(0.5,), std=(0.25,))
    return settle_channels(replace(cfg, data=one), None) if cfg.model.in_chans not in (1, 3) else cfg


def _noise(run: Run) -> Iterator[Batch]:
    size = run.cfg.train.batch_size
    generator = torch.Generator().manual_seed(run.cfg.train.seed)
    shape = (size, *run.cfg.model.img_size, run.cfg.model.read_chans)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(run.world.device)
    while True:
        index = torch.arange(size) + run.step * size % (len(run.source) - size + 1)
        yield Batch(images, index, 0, run.step)


def _measure(run: Run, given: Iterator[Batch], steps: int, warmup: int) -> tuple[dict[str, float], Any]:
    """({"step_ms": without the profiler, "profiled_step_ms": with it}, the profiler with its events)."""
    gpu = run.world.device.type == "cuda"

    def timed(count: int) -> float:
        """Milliseconds of a step."""
        began = time.perf_counter()
        for _ in range(count):
            with record_function(trace.STEP):
                with record_function(trace.PREFIX + trace.DATA):
                    batch = next(given)
                train_step(run, batch)
                run.step += 1
        # a GPU runs behind: no wait between steps
        if gpu:
            torch.cuda.synchronize()
        elif run.world.device.type == "mps":
            torch.mps.synchronize()
        return 1000 * (time.perf_counter() - began) / count

    # capture follows a few eager steps, up to 11 with several processes
    warmup = max(warmup, 15) if run.resolved.cuda_graph else warmup
    # lines, not a bar, whose thread would be in the times
    log.info("%d steps to warm up", warmup)
    each = timed(warmup)
    log.info(
        "%d steps to time and %d to profile, about %.0f s", steps, steps + 1, each * (2 * steps + 1) / 1000
    )
    plain = timed(steps)
    # the tracer's own lines on standard error are left out
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    # its first use pays for starting the tracer
    with torch.profiler.profile(activities=activities):
        timed(1)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        profiled = timed(steps)
    return {"step_ms": plain, "profiled_step_ms": profiled}, profiler


# ---- the result -------------------------------------------------------------------------------------


def _result(run: Run, found: trace.Breakdown, times: dict[str, float], images: str) -> dict[str, Any]:
    cfg, device = run.cfg, run.world.device
    per_step = 1e-3 / found.steps
    rows = [
        {
            "branch": r.branch,
            "component": r.component,
            "forward_ms": r.forward_us * per_step,
            "backward_ms": r.backward_us * per_step,
            "ms": r.us * per_step,
            "share": r.us / found.wall_us,
            "matmul_ms": r.matmul_us * per_step,
        }
        for r in found.rows
    ]
    matmul_us, flop = sum(r.matmul_us for r in found.rows), sum(r.flop for r in found.rows)
    images_per_s = 1000 * cfg.train.batch_size / times["step_ms"]
    return {
        "what": "time of a training step by component",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "basis": "kernel time on the GPU" if found.on_device else "op time on the CPU",
        "images": images,
        "steps": found.steps,
        **times,
        "traced_step_ms": found.wall_us * per_step,
        "busy_share": found.busy_us / found.wall_us,
        "images_per_s": images_per_s,
        "precision": run.resolved.precision,
        "memory_gb": run.world.memory_gb(),
        "model_tflops_per_s": flops_per_image(cfg) * images_per_s / 1e12,
        "matmul": {
            "ms": matmul_us * per_step,
            "share": matmul_us / found.wall_us,
            "tflop": flop / found.steps / 1e12,
            # shapes are unknown in a replayed CUDA graph
            "tflops_per_s": flop / matmul_us / 1e6 if flop and matmul_us else None,
        },
        "rows": rows,
        "longest": [
            {"component": c, "op": name, "ms": us * per_step, "share": us / found.wall_us}
            for (c, name), us in sorted(found.ops.items(), key=lambda op: -op[1])[:20]
        ],
        "config": to_dict(cfg),
        "versions": versions(),
    }


def describe(result: dict[str, Any]) -> str:
    """The table, and times with and without the profiler, as text."""

    def line(name: str, forward: float, backward: float, both: float, matmul: float) -> tuple[str, ...]:
        parts = [f"{value:.2f}" if value else "" for value in (forward, backward)]
        in_matmuls = f"{100 * matmul / both:.0f} %" if matmul else ""
        return (name, *parts, f"{both:.2f}", f"{100 * both / whole:.1f} %", in_matmuls)

    rows, whole, matmul = result["rows"], result["traced_step_ms"], result["matmul"]
    lines: list[tuple[str, ...]] = [
        ("component", "forward ms", "backward ms", "both ms", "of step", "in matmuls")
    ]
    for r in rows:
        name = f"{r['branch']} {r['component']}".strip()
        lines.append(line(name, r["forward_ms"], r["backward_ms"], r["ms"], r["matmul_ms"]))
    if result["basis"].startswith("kernel"):
        lines.append(line("no kernel running", 0, 0, (1 - result["busy_share"]) * whole, 0))
    forward, backward = (sum(r[k] for r in rows) for k in ("forward_ms", "backward_ms"))
    lines.append(line("step", forward, backward, whole, matmul["ms"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()
        for cells in lines
    ]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    rate = f", at {matmul['tflops_per_s']:.3g} TFLOP/s" if matmul["tflops_per_s"] else ""
    return "\n".join(
        [
            text[0],
            rule,
            *text[1:-1],
            rule,
            text[-1],
            "",
            f"{result['device']}, {result['precision']}, images {result['images']}; {result['basis']}, "
            f"mean over steps: {result['steps']}",
            f"a step takes {result['step_ms']:.1f} ms ({result['profiled_step_ms']:.1f} under the profiler): "
            f"{result['images_per_s']:.4g} images/s, {result['model_tflops_per_s']:.3g} TFLOP/s of the model",
            f"matmuls are {100 * matmul['share']:.0f} % of the step{rate}",
        ]
    )
