"""What a training step costs without its arithmetic: launches, copies, waits, memory, CPU time; bytes it moves.

tests/nullgpu/run .venv-nullgpu python -m benchmarks step_bytes
tests/nullgpu/run .venv-nullgpu python -m benchmarks step_bytes --model small --batch 64 --providers ours strong

Counted on the null GPU (tests/nullgpu/README.md): every figure but the CPU time is exact and the same on a GPU; no
figure is a time on one. Each provider makes whole optimizer steps in its own process; for the CPU time they take turns.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from extrema_fast.config import Config
from extrema_fast.errors import UsageError
from extrema_fast.ops import scope
from extrema_fast.training.draw import draw
from tests.nullgpu import counters

from . import harness
from .harness import Record, columns
from .processes import Turns, reset_peak
from .step import MODELS, Job, Stepping, chosen, configuration, first_row, parse_mask
from .traffic import traffic

# steps that are counted
COUNTED = 4
# launches of these scopes (extrema_fast/ops/scope.py) make the images of the two branches from a batch
DRAWING = ("masks", "augment")


class Counting(Stepping):
    """A provider whose steps are counted."""

    def turn(self, warm: int, steps: int) -> dict[str, list[float]]:
        """Makes `warm` steps, then `steps` whose CPU time, of all threads, is measured."""
        samples = []
        for _ in range(warm + steps):
            began = time.process_time()
            self.one()
            samples.append(1000 * (time.process_time() - began))
        torch.cuda.synchronize()
        return {"cpu_samples_ms": samples[warm:]}

    def tally(self) -> dict[str, Any]:
        """Returns launches, copies and waits per step, peak memory, the most frequent kernels and launches by scope."""
        torch.cuda.synchronize()
        reset_peak(self.device)
        counters.reset()
        for _ in range(COUNTED):
            self.one()
        found: dict[str, Any] = {name: n / COUNTED for name, n in counters.counts().items()}
        kernels = {name: n / COUNTED for name, n in counters.kernels().items()}
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        with launches_by_scope() as scopes:
            self.one()
        if hasattr(self.stepper, "run"):
            cfg, inputs = self.stepper.run.cfg, self.inputs[0]
            with launches_by_scope() as drawing:
                counters.reset()
                draw(cfg, inputs.images, inputs.index, 0)
            outside = work() - sum(drawing.values())
            # color jitter is a part of the step; random parameters are drawn beside the step before
            found["draw_launches"] = sum(scopes[name] for name in DRAWING) + outside
        return found | {"kernels": dict(list(kernels.items())[:30]), "scopes": dict(scopes)}


def work() -> int:
    """Returns launches and copies since the counters were reset."""
    found = counters.counts()
    return found["launches"] + found["copies"]


@contextmanager
def launches_by_scope() -> Iterator[Counter[str]]:
    """Counts launches and copies by the innermost scope they are made in; those outside of any are not in it."""
    found: Counter[str] = Counter()
    open_scopes: list[str] = []
    before = 0

    def charge() -> None:
        nonlocal before
        now = work()
        if open_scopes:
            found[open_scopes[-1].removeprefix(scope.PREFIX)] += now - before
        before = now

    @contextmanager
    def counted(name: str) -> Iterator[None]:
        charge()
        open_scopes.append(name)
        try:
            yield
        finally:
            charge()
            open_scopes.pop()

    with patch.object(scope, "record_function", counted), scope.recording():
        yield found


# ---- the command ----------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Launches, copies, waits, peak memory and CPU time of a step on the null GPU, and the bytes it moves."""
    p = harness.parser("step_bytes", main.__doc__)
    p.add_argument("--model", choices=MODELS, default="base")
    p.add_argument(
        "--mask", type=parse_mask, default=(0.8, 5), metavar="80x5", help="dropped percent x views"
    )
    p.add_argument("--batch", type=int, default=256, help="images per step (default: %(default)s)")
    p.add_argument("--providers", nargs="+", default=["ours", "ours-cuda-graph", "strong"], metavar="NAME")
    p.add_argument("--spatial", action="store_true", help="without color jitter")
    args = p.parse_args(argv)
    args.device = "cuda"
    providers, unable = chosen(args.providers, args.device)
    ratio, views = args.mask
    cfg = configuration(args.model, ratio, views, args.batch, color=not args.spatial)
    # by name alone: `strong` is the name of a group too
    jobs = [Job(p.name, p, cfg, args.device) for p in providers if p.name in args.providers]
    if args.list:
        print("\n".join(job.key for job in jobs))
        return 0
    if not counters.active():
        raise UsageError(
            "step_bytes counts on the null GPU: tests/nullgpu/run .venv-nullgpu python -m benchmarks ..."
        )
    harness.settle(args)
    rows = {job.key: first_row(job) for job in jobs}
    with Turns(rows) as turns:
        for job in jobs:
            turns.start(job.key, Counting, job, None, environment=job.provider.environment)
        turns.add("tally")
        turns.run(args.rounds or 5, 1, args.steps or 4)
    for row in rows.values():
        if "cpu_samples_ms" in row:
            row["cpu_ms"] = float(np.median(row["cpu_samples_ms"]))
    share = f"{100 * args.mask[0]:g} % x {args.mask[1]}"
    passes = moved(cfg) if "ours" in args.providers else {}
    what = f"launches, memory and bytes of a step, ViT-{args.model}/16, {share}, batch {args.batch}"
    record = harness.new_record(what, "step_bytes", argv, args.note, rows=list(rows.values()), not_run=unable)
    record["traffic"] = passes
    # what was counted is the same on every machine
    record["machine"]["short"] = ""
    record |= conclusions(record)
    harness.write_record(record, page(record), args)
    return 1 if any("error" in row for row in rows.values()) else 0


def moved(cfg: Config) -> dict[str, Any]:
    """Returns the bytes of our trunk, and those without its fused passes (`traffic`)."""
    plain = {"residual_norm": "reference", "mlp": "reference"}
    return {"ours": traffic(cfg), "without fused passes": traffic(cfg, **plain)}


def conclusions(record: Record) -> dict[str, Any]:
    """Returns the figures of our default step, and the headline for the index."""
    rows = {row["key"]: row for row in record["rows"] if "launches" in row}
    if "ours" not in rows:
        return {"headline": "ours was not counted"}
    ours = rows["ours"]
    found = {"launches": ours["launches"] + ours["copies"], "draw_launches": ours["draw_launches"]}
    found |= {name: ours[name] for name in ("syncs", "peak_gib", "cpu_ms") if name in ours}
    found |= {name: record["traffic"]["ours"][name] for name in ("student_D", "teacher_D")}
    text = "{launches:.0f} launches and copies, {draw_launches:.0f} of them before the first patch; ".format(
        **found
    ) + "the trunk moves {student_D:.0f} D student and {teacher_D:.0f} D teacher".format(**found)
    return found | {"headline": text}


def page(record: Record) -> list[str]:
    """Returns the record to read."""
    rows = [row for row in record["rows"] if "launches" in row]
    counts = ("launches=launches:.0f", "copies=copies:.0f", "in a graph=graph_nodes:.0f", "waits=syncs:.0f")
    more = ("peak GiB=peak_gib:.2f", "CPU ms=cpu_ms:.1f", "draw, color=draw_launches:.0f")
    out = [
        "Counted on a null GPU: torch, Triton and inductor are real and compile for sm_90, kernels compute nothing. "
        "Per step; *launches* are kernels and fills, *waits* those of the host for the device, *draw, color* what "
        "makes the images and random parameters of both branches. CPU time is the process's, without a driver's "
        "share, the median of turns that alternate; it depends on the machine, all else does not.",
        columns(rows, "row=key", *counts, *more),
    ]
    for row in rows:
        scopes = [
            {"scope": name, "launches": n} for name, n in sorted(row["scopes"].items(), key=lambda x: -x[1])
        ]
        names = harness.output("c++filt", "-p", *row["kernels"]).splitlines() or row["kernels"]
        kernels = [
            {"kernel": f"`{n[:100]}`", "launches": x}
            for n, x in zip(names, row["kernels"].values(), strict=True)
        ]
        out += (
            [f"## {row['key']}", columns(scopes, "forward scope=scope", "launches=launches")]
            if scopes
            else []
        )
        out += [columns(kernels, "kernel=kernel", "per step=launches:.4g")] if kernels else []
    for name, found in record["traffic"].items():
        out += [
            f"## Bytes of the trunk, {name}: {found['student_D']} D student, {found['teacher_D']} D teacher",
            columns(found["passes"], "network=network", "pass=op", "D=D:.3f", "calls per block=calls:.3g"),
        ]
    if record["traffic"]:
        out.append(
            "Outside matmuls and attention, per token and block; reading or writing one 16-bit activation is 2 D. "
            "See benchmarks/traffic.py for what counts."
        )
    return [*out, *harness.lost(record)]
