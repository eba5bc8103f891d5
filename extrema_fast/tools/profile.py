"""`extrema-fast profile`: a few real steps under torch's profiler, and a table of their time by component.

The ranges in the code (`ops/scope.py`) are on while it runs; `trace.py` reads the trace.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from ..config import Config, local_batch, to_dict
from ..data.loader import Batch
from ..distributed import World, start
from ..errors import UsageError
from ..files import write_file
from ..ops.scope import recording
from ..train import train_step
from ..training.logging import memory_gb
from ..training.resolve import flops_per_image
from ..training.run import Run, build, open_loader, open_train, prepare_torch
from ..training.run_folder import versions
from ..training.step import batches, wrap
from . import trace

log = logging.getLogger(__name__)

# without a data set: batches of noise, used in turns
_NOISE_BATCHES, _NOISE_IMAGES = 2, 1_000_000


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
        run = build(cfg, world, source)  # type: ignore[arg-type]
        _announce(cfg, world, synthetic)
        compiles = run.resolved.compile != "none"
        with recording(), _fused_names() if compiles else nullcontext():
            wrap(run)
            with nullcontext(_noise(run)) if synthetic else open_loader(run) as loader:
                times, profiler = _measure(run, batches(run, loader), steps, warmup)
    folder.mkdir(parents=True, exist_ok=True)
    # a reader of the folder sees the old trace or the new one
    temporary = folder / f".tmp-{os.getpid()}-trace.json.gz"
    profiler.export_chrome_trace(str(temporary))
    os.replace(temporary, folder / "trace.json.gz")
    found = trace.read(trace.load(folder / "trace.json.gz"))
    result = _result(run, found, times, synthetic)
    write_file(folder / "profile.json", json.dumps(result, indent=1) + "\n")
    write_file(folder / "profile.txt", describe(result) + "\n")
    return result


def _announce(cfg: Config, world: World, synthetic: bool) -> None:
    flop = flops_per_image(cfg) * cfg.train.batch_size
    log.info(
        "profiling %s: batch %d, %.3g TFLOP a step, images %s",
        world.device,
        cfg.train.batch_size,
        flop / 1e12,
        "from memory" if synthetic else cfg.data.train,
    )
    if world.device.type == "cpu" and flop > 1e13:
        log.warning("a step of this size takes minutes on a CPU; a smaller one: --train.batch-size 16")


@contextmanager
def _fused_names() -> Iterator[None]:
    """Compiled CPU code marks each fused kernel; without it they would be a gap in the trace."""
    import torch._inductor.config as inductor

    with inductor.patch("cpp.enable_kernel_profile", sys.platform == "linux"):
        yield


# ---- steps ------------------------------------------------------------------------------------------


def _noise(run: Run) -> Iterator[Batch]:
    size, device = run.cfg.train.batch_size, run.world.device
    generator = torch.Generator().manual_seed(run.cfg.train.seed)
    shape = (size, *run.cfg.model.img_size, 3)
    images = [
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        for _ in range(_NOISE_BATCHES)
    ]
    while True:
        index = torch.arange(size) + run.step * size % (len(run.source) - size + 1)
        yield Batch(images[run.step % _NOISE_BATCHES], index, 0, run.step)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clock(device: torch.device) -> Callable[[], Any]:
    if device.type != "cuda":
        return time.perf_counter

    def record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return record


def _ms(began: Any, ended: Any) -> float:
    return 1000 * (ended - began) if isinstance(began, float) else began.elapsed_time(ended)


def _measure(run: Run, given: Iterator[Batch], steps: int, warmup: int) -> tuple[dict[str, float], Any]:
    """({"step_ms": without the profiler, "profiled_step_ms": with it}, the profiler with its events)."""
    device = run.world.device

    def step() -> None:
        with record_function(trace.STEP):
            with record_function(trace.PREFIX + trace.DATA):
                batch = next(given)
            train_step(run, batch)
            run.step += 1

    def timed() -> float:
        # a GPU runs behind: its own clock, and no wait between steps
        times, clock = [], _clock(device)
        for _ in range(steps):
            began = clock()
            step()
            times.append((began, clock()))
        _wait(device)
        return statistics.median(_ms(*pair) for pair in times)

    # capture follows a few eager steps, up to 11 with several processes
    for _ in range(max(warmup, 15) if run.cfg.train.cuda_graph else warmup):
        step()
    plain = timed()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with _quiet_profiler():
        # its first use pays for starting the tracer
        with torch.profiler.profile(activities=activities):
            step()
            _wait(device)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            profiled = timed()
    return {"step_ms": plain, "profiled_step_ms": profiled}, profiler


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The tracer's own lines on standard error are left out, unless the user asks for them."""
    ours = "KINETO_LOG_LEVEL" not in os.environ
    if ours:
        os.environ["KINETO_LOG_LEVEL"] = "6"
    try:
        yield
    finally:
        if ours:
            del os.environ["KINETO_LOG_LEVEL"]


# ---- the result -------------------------------------------------------------------------------------


def _result(run: Run, found: trace.Breakdown, times: dict[str, float], synthetic: bool) -> dict[str, Any]:
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
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "basis": "kernel time on the GPU" if found.on_device else "op time on the CPU",
        "images": "from memory" if synthetic else cfg.data.train,
        "steps": found.steps,
        **times,
        "traced_step_ms": found.wall_us * per_step,
        "busy_share": found.busy_us / found.wall_us,
        "images_per_s": images_per_s,
        "precision": run.resolved.precision,
        "memory_gb": memory_gb(device),
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
            for c, name, us in found.ops[:20]
        ],
        "config": to_dict(cfg),
        "versions": versions(),
    }


HEADER = ("component", "forward ms", "backward ms", "both ms", "of step", "in matmuls")


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table as text, in the order of `HEADER`; the last one is the whole step."""

    def line(
        name: str, forward: float, backward: float, both: float, share: float, matmul: float
    ) -> tuple[str, ...]:
        parts = [f"{value:.2f}" if value else "" for value in (forward, backward)]
        in_matmuls = f"{100 * matmul / both:.0f} %" if matmul else ""
        return (name, *parts, f"{both:.2f}", f"{100 * share:.1f} %", in_matmuls)

    rows, whole = result["rows"], result["traced_step_ms"]
    lines = [
        line(
            f"{r['branch']} {r['component']}".strip(),
            *(r[k] for k in ("forward_ms", "backward_ms", "ms", "share", "matmul_ms")),
        )
        for r in rows
    ]
    if result["basis"].startswith("kernel"):
        idle = 1 - result["busy_share"]
        lines.append(line("no kernel running", 0, 0, idle * whole, idle, 0))
    forward, backward = (sum(r[k] for r in rows) for k in ("forward_ms", "backward_ms"))
    return [*lines, line("step", forward, backward, whole, 1, result["matmul"]["ms"])]


def describe(result: dict[str, Any]) -> str:
    """The table, and times with and without the profiler, as text."""
    lines = [HEADER, *table(result)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]

    def text(line: tuple[str, ...]) -> str:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    rule, matmul = "-" * (sum(widths) + 2 * len(widths) - 2), result["matmul"]
    rate = f", at {matmul['tflops_per_s']:.3g} TFLOP/s" if matmul["tflops_per_s"] else ""
    return "\n".join(
        [
            text(lines[0]),
            rule,
            *map(text, lines[1:-1]),
            rule,
            text(lines[-1]),
            "",
            f"{result['device']}, {result['precision']}, images {result['images']}; {result['basis']}, "
            f"mean over steps: {result['steps']}",
            f"a step takes {result['step_ms']:.1f} ms ({result['profiled_step_ms']:.1f} under the profiler): "
            f"{result['images_per_s']:.4g} images/s, {result['model_tflops_per_s']:.3g} TFLOP/s of the model",
            f"matmuls are {100 * matmul['share']:.0f} % of the step{rate}",
        ]
    )
