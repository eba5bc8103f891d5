"""`extrema-fast profile`: a few real steps under torch's profiler, and a table of their time by component.

The ranges in the code (`ops/scope.py`) are on while it runs; `trace.py` reads the trace.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
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
from ..training.metrics import memory_gb
from ..training.plan import flops_per_image, precision
from ..training.run_folder import versions
from ..training.state import Run, build, open_loader, open_train, prepare_torch, wrap
from ..training.step import batches, compile_mode
from . import trace

log = logging.getLogger(__name__)

# without a data set: batches of noise, used in turns
_NOISE_BATCHES, _NOISE_IMAGES = 2, 1_000_000


def profile(
    cfg: Config, out: str | Path, *, steps: int = 3, warmup: int = 5, synthetic: bool = False
) -> dict[str, Any]:
    """Profiles `steps` training steps of a run; nothing of the run itself is written.

    out        folder for trace.json.gz (chrome://tracing, ui.perfetto.dev), profile.json and profile.txt
    warmup     steps before: compilation, allocator, graph capture
    synthetic  random pictures from memory in place of `cfg.data.train`
    returns    what profile.json holds: milliseconds of a step by component (`rows`), matrix products and the
               rate they reach (`products`), the longest ops, times, settings and versions
    raises     UsageError for steps or warmup below 1, several processes, or images that are not there
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
        compiles = compile_mode(cfg, world.device.type) != "none"
        with recording(), _fused_names() if compiles else contextlib.nullcontext():
            wrap(run)
            loaded = _noise(run) if synthetic else _loaded(run)
            with contextlib.closing(loaded):
                times, profiler = _measure(run, batches(run, loaded), steps, warmup)
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


@contextlib.contextmanager
def _fused_names() -> Iterator[None]:
    """Compiled CPU code marks each fused kernel; without it they would be a gap in the trace."""
    try:
        import torch._inductor.config as inductor

        patch = inductor.patch("cpp.enable_kernel_profile", sys.platform == "linux")
    except (ImportError, AttributeError, KeyError):
        patch = contextlib.nullcontext()
    with patch:
        yield


# ---- steps ------------------------------------------------------------------------------------------


def _loaded(run: Run) -> Iterator[Batch]:
    with open_loader(run) as loader:
        yield from loader


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


@contextlib.contextmanager
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


def large_product_tflops(device: torch.device, dtype: torch.dtype, repeats: int = 15) -> float:
    """TFLOP/s of one large matrix product of random numbers, median of `repeats`: what this machine can reach."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times, clock = [], _clock(device)
    for _ in range(repeats + 2):
        began = clock()
        torch.mm(a, b)
        times.append((began, clock()))
    _wait(device)
    return 2 * n**3 / statistics.median(_ms(*pair) for pair in times[2:]) / 1e9


def _result(run: Run, found: trace.Breakdown, times: dict[str, float], synthetic: bool) -> dict[str, Any]:
    cfg, device = run.cfg, run.world.device
    dtype = precision(cfg, device.type)
    large = large_product_tflops(device, torch.bfloat16 if dtype == "bf16" else torch.float32)
    per_step = 1e-3 / found.steps

    def rate(flop: float, us: float) -> float | None:
        return flop / us / 1e6 if flop and us else None

    rows = [
        {
            "branch": r.branch,
            "component": r.component,
            "forward_ms": r.forward_us * per_step,
            "backward_ms": r.backward_us * per_step,
            "ms": r.us * per_step,
            "share": r.us / found.wall_us,
            "products_ms": r.products_us * per_step,
            "products_gflop": r.flop / found.steps / 1e9,
            "products_tflops_per_s": rate(r.flop, r.products_us),
        }
        for r in found.rows
    ]
    products, flop = sum(r.products_us for r in found.rows), sum(r.flop for r in found.rows)
    reached = rate(flop, products)
    step_s = times["step_ms"] / 1000
    images_per_s = cfg.train.batch_size / step_s
    return {
        "what": "time of a training step by component",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "basis": "kernel time on the GPU" if found.on_device else "op time on the CPU",
        "images": "from memory" if synthetic else cfg.data.train,
        "steps": found.steps,
        "steps_left_out": found.left_out,
        **times,
        "traced_step_ms": found.wall_us * per_step,
        "busy_share": found.busy_us / found.wall_us,
        "images_per_s": images_per_s,
        "precision": dtype,
        "memory_gb": memory_gb(device),
        "model_tflop_per_step": flops_per_image(cfg) * cfg.train.batch_size / 1e12,
        "model_tflops_per_s": flops_per_image(cfg) * images_per_s / 1e12,
        "large_product_tflops_per_s": large,
        "products": {
            "ms": products * per_step,
            "share": products / found.wall_us,
            "tflop": flop / found.steps / 1e12,
            "tflops_per_s": reached,
            "of_large_product": reached / large if reached else None,
        },
        "rows": rows,
        "longest": [
            {"component": c, "op": name, "ms": us * per_step, "share": us / found.wall_us}
            for c, name, us in found.ops[:20]
        ],
        "config": to_dict(cfg),
        "versions": versions(),
    }


HEADER = ("component", "forward ms", "backward ms", "both ms", "of step", "in products", "TFLOP/s")


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table as text, in the order of `HEADER`; the last one is the whole step."""

    def ms(value: float) -> str:
        return f"{value:.2f}" if value else ""

    lines = []
    for r in result["rows"]:
        rate = r["products_tflops_per_s"]
        share = f"{100 * r['products_ms'] / r['ms']:.0f} %" if r["products_ms"] else ""
        lines.append(
            (
                f"{r['branch']} {r['component']}".strip(), ms(r["forward_ms"]), ms(r["backward_ms"]),
                f"{r['ms']:.2f}", f"{100 * r['share']:.1f} %", share, f"{rate:.3g}" if rate else "",
            )
        )  # fmt: skip
    if result["basis"].startswith("kernel"):
        idle = 1 - result["busy_share"]
        lines.append(
            ("no kernel running", "", "", ms(idle * result["traced_step_ms"]), f"{100 * idle:.1f} %", "", "")
        )
    p = result["products"]
    sums = [ms(sum(r[k] for r in result["rows"])) for k in ("forward_ms", "backward_ms")]
    rate = f"{p['tflops_per_s']:.3g}" if p["tflops_per_s"] else ""
    lines.append(("step", *sums, ms(result["traced_step_ms"]), "100 %", f"{100 * p['share']:.0f} %", rate))
    return lines


def summary(result: dict[str, Any]) -> str:
    """What the table does not say: times with and without the profiler, products against a large one."""
    p, large, slow = result["products"], result["large_product_tflops_per_s"], result["steps_left_out"]
    left_out = f" (left out, taking twice as long: {slow})" if slow else ""
    lines = [
        f"{result['device']}, {result['precision']}, images {result['images']}; {result['basis']}, "
        f"mean over steps: {result['steps']}{left_out}",
        f"a step takes {result['step_ms']:.1f} ms ({result['profiled_step_ms']:.1f} under the profiler): "
        f"{result['images_per_s']:.4g} images/s, {result['model_tflops_per_s']:.3g} TFLOP/s of the model, "
        f"{100 * result['model_tflops_per_s'] / large:.0f} % of a large matrix product's {large:.3g}",
    ]
    if p["tflops_per_s"]:
        lines.append(
            f"matrix products are {100 * p['share']:.0f} % of the step, at {p['tflops_per_s']:.3g} TFLOP/s: "
            f"{100 * p['of_large_product']:.0f} % of a large one's rate"
        )
    return "\n".join(lines)


def describe(result: dict[str, Any]) -> str:
    """Table and summary as plain text."""
    lines = [HEADER, *table(result)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]

    def text(line: tuple[str, ...]) -> str:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    rule = "-" * len(text(tuple("x" * w for w in widths)))
    return "\n".join(
        [text(lines[0]), rule, *map(text, lines[1:-1]), rule, text(lines[-1]), "", summary(result)]
    )
