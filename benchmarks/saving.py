"""What does saving cost a run on a CPU that saves every 50 steps?

Windows of steps without saving, with saves in a thread (as a run makes them) and with saves that are waited for (as the
last one is), in turns in one process; the end of a window waits for what is still being written:

python -m benchmarks saving
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from extrema_fast.config import Config, from_dict, preset, smoke
from extrema_fast.distributed import start
from extrema_fast.train import train_step
from extrema_fast.training.checkpoint import Saver
from extrema_fast.training.resolve import checkpoint_bytes
from extrema_fast.training.run import Run, build, open_loader, open_train, prepare_torch, save
from extrema_fast.training.step import batches, wrap

from . import harness

EVERY = 50
# of the clock, for the preset
LIMIT = 0.02
WAYS = ("no saving", "in a thread", "waited for")
TINY: dict[str, Any] = {
    "model": {"width": 16, "depth": 1, "patch_size": 16},
    "head": {"hidden": 16, "out": 16, "predictor_hidden": 16},
    "mask": {"ratio": 0.5},
    "train": {"batch_size": 8},
}


def config(case: str, out: Path, threads: int) -> Config:
    """The run of a case: the preset `photos`, or steps of milliseconds."""
    shared = {
        "system": {"threads": threads, "device": "cpu"},
        "data": {"threads": 1},
        "train": {"epochs": 400},
    }
    base = from_dict(TINY, smoke()) if case == "tiny" else preset(case)
    return replace(from_dict(shared, base), out=str(out))


def main(argv: list[str]) -> int:
    """Steps with and without saving every 50 steps: seconds of the clock and of the processor."""
    p = harness.parser("saving", main.__doc__)
    p.add_argument("--cases", nargs="+", default=["photos", "tiny"], help="presets, or tiny")
    p.add_argument("--runs", type=Path, default=Path("runs/saving"), help="where is saved")
    args = p.parse_args(argv)
    args.device, args.threads = "cpu", args.threads or 1
    harness.settle(args)
    rounds, steps = args.rounds or (2 if args.quick else 10), args.steps or 2 * EVERY
    if steps < EVERY:
        p.error(f"--steps {steps}: no save in it; give {EVERY} or more")
    cases = args.cases[-1:] if args.quick else args.cases
    if args.list:
        print(
            "\n".join(
                f"  {case}: {rounds} windows of {steps} steps, each {', '.join(WAYS)}" for case in cases
            )
        )
        return 0
    rows: list[dict[str, Any]] = [
        row for case in cases for row in measure(case, args.runs / case, rounds, steps, args.threads)
    ]
    settings = {"every": EVERY, "rounds": rounds, "steps": steps}
    record = harness.new_record(
        "what saving costs a run", "saving", argv, args.note, settings=settings, rows=rows
    )
    threaded = [r for r in rows if r["way"] == WAYS[1]]
    record["gates"] = [
        {"name": r["key"], "passed": r["clock"]["ratio"] < 1 + LIMIT, "found": cost(r)}
        for r in threaded
        if r["case"] != "tiny"
    ]
    record["headline"] = "; ".join(
        f"{r['key']}: {cost(r)} of the clock, the loop waits {r['call_ms']:.1f} ms for a save"
        for r in threaded
    )
    harness.write_record(record, page(record), args)
    return int(not all(g["passed"] for g in record["gates"]))


@contextmanager
def running(cfg: Config) -> Iterator[tuple[Run, Iterator[Any]]]:
    """A run of the configuration, and its batches."""
    with start(cfg.system.device) as world:
        prepare_torch(cfg.system)
        run = build(cfg, world, open_train(cfg))
        wrap(run)
        with open_loader(run) as loader:
            yield run, batches(run, loader)


def measure(case: str, out: Path, rounds: int, steps: int, threads: int) -> list[dict[str, Any]]:
    """One row for each way of saving, the ways in turns."""
    shutil.rmtree(out, ignore_errors=True)
    cfg = config(case, out, threads)
    samples: dict[str, dict[str, list[float]]] = {way: {"clock": [], "cpu": [], "calls": []} for way in WAYS}
    with running(cfg) as (run, fed), Saver(out, cfg.ckpt, run.schedule.steps_per_epoch) as saver:

        def window(way: str) -> dict[str, list[float]]:
            began, cpu, calls = time.perf_counter(), time.process_time(), []
            for _ in range(steps):
                train_step(run, next(fed))
                run.step += 1
                if run.step % EVERY == 0 and way != WAYS[0]:
                    before = time.perf_counter()
                    save(run, saver, 1, must=way == WAYS[2])
                    calls.append(1000 * (time.perf_counter() - before))
            saver.wait()
            return {
                "clock": [1000 * (time.perf_counter() - began)],
                "cpu": [1000 * (time.process_time() - cpu)],
                "calls": calls,
            }

        for way in WAYS:
            window(way)
        for n in range(rounds):
            for way in (WAYS[n % 3 :] + WAYS[: n % 3])[:: 1 if n % 2 else -1]:
                for kind, found in window(way).items():
                    samples[way][kind] += found
            harness.say(f"{case}: {n + 1} of {rounds} rounds")
        size = checkpoint_bytes(run.method) / 1e6
    none = samples[WAYS[0]]
    return [
        {
            "key": f"{case}, {way}",
            "case": case,
            "way": way,
            "step_ms": float(np.median(s["clock"])) / steps,
            "step_cpu_ms": float(np.median(s["cpu"])) / steps,
            "call_ms": float(np.median(s["calls"])) if s["calls"] else None,
            "checkpoint_mb": size,
            "clock": harness.ratio(s["clock"], none["clock"]),
            "cpu": harness.ratio(s["cpu"], none["cpu"]),
            "samples_ms": {"clock": s["clock"], "processor": s["cpu"], "calls": s["calls"]},
        }
        for way, s in samples.items()
    ]


def cost(row: dict[str, Any]) -> str:
    """What saving adds to the clock."""
    return f"{100 * (row['clock']['ratio'] - 1):+.1f} %"


def page(record: dict[str, Any]) -> list[str]:
    """The record to read."""
    s = record["settings"]

    def times(name: str, key: str) -> tuple[str, ...]:
        return f"{name}=" + key + ".ratio:.4f", f"from={key}.low:.3f", f"to={key}.high:.3f"

    return [
        f"{record['headline']}.",
        f"{s['rounds']} windows of {s['steps']} steps for each way, in turns; a save every {s['every']} steps. "
        "Ratios: to no saving, of the medians, with a 95 % interval. *A save*: what the loop waits for one, median.",
        harness.columns(
            record["rows"],
            "run=key",
            "checkpoint MB=checkpoint_mb:.1f",
            "step ms=step_ms:.2f",
            "processor ms=step_cpu_ms:.2f",
            "a save, ms=call_ms:.1f",
            *times("clock", "clock"),
            *times("processor", "cpu"),
        ),
        harness.columns(record["gates"], "below 2 % of the clock=name", "passed=passed", "found=found"),
    ]
