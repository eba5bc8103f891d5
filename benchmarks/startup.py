"""Time to start: imports, the first step with a cold and a warm compiler cache, the first batch of images.

python -m benchmarks startup --model small --modes none block step
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

from . import harness
from .harness import ROOT, TIMES, Row, columns, percentiles, say
from .processes import Worker, WorkerError
from .step import MODELS, Job, Provider, Stepping, configuration

IMPORTS = ("torch", "extrema_fast", "extrema_fast.models.encoder", "extrema_fast.train", "extrema_fast.cli")
IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
FIRST_BATCH = """
import sys, time
from extrema_fast.config import DataConfig
from extrema_fast.data.loader import TrainLoader
from extrema_fast.data.sources import open_source
began = time.perf_counter()
source = open_source(sys.argv[1], "train")
with TrainLoader(source, DataConfig(train=sys.argv[1], loader=sys.argv[2]), (224, 224), batch_size=16, seed=0) as l:
    next(l)
    print(time.perf_counter() - began)
"""


def main(argv: list[str]) -> int:
    """Times imports, first steps per compile mode (cold and warm cache) and the first batch."""
    p = harness.parser("startup", main.__doc__)
    p.add_argument("--model", choices=MODELS, default="")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--modes", nargs="+", choices=("none", "block", "step"), default=[])
    p.add_argument("--data", default="photos", help="images of the first batch, as data.train")
    args = p.parse_args(argv)
    harness.settle(args)
    args.model = args.model or ("tiny" if args.quick else "small")
    modes = args.modes or (["none", "block"] if args.quick else ["none", "block", "step"])
    if args.list:
        print(
            f"  imports of {', '.join(IMPORTS)}; first batch; steps of ViT-{args.model}: {', '.join(modes)}"
        )
        return 0
    rows = [timed(f"import {name}", args.rounds or 3, IMPORT.format(name)) for name in IMPORTS]
    rows += [timed(f"first batch of 16, {kind}", 1, FIRST_BATCH, args.data, kind) for kind in ("pil", "dali")]
    for mode in modes:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm") if mode != "none" else ("no",):
                rows.append(first_step(mode, state, cache, args))
    settings = {"model": args.model, "batch": args.batch, "device": args.device, "data": args.data}
    what = f"time to start, ViT-{args.model} on {args.device}"
    record = harness.new_record(what, "startup", argv, args.note, settings=settings, rows=rows)
    steps = ("build s=build_s:.2f", "first step s=first_step_s:.2f", "process start to warm s=ready_s:.2f")
    fresh = [r for r in rows if "error" not in r]
    table = columns(fresh, "row=key", *TIMES, *steps, "later steps ms=steady_ms:.0f")
    harness.write_record(record, [table, *harness.lost(record)], args)
    return 0


def timed(key: str, repeats: int, code: str, *arguments: str) -> Row:
    """Runs a program that prints seconds, in fresh interpreters."""
    samples = []
    for _ in range(repeats):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            return {"key": key, "error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
        samples.append(1000 * float(done.stdout))
    return {"key": key, "samples_ms": samples} | percentiles(samples)


def first_step(mode: str, state: str, cache: str, args: argparse.Namespace) -> Row:
    """Times building and stepping with the compiler's caches in the folder `cache`."""
    key = f"train.compile {mode}, {state} cache"
    say(key)
    provider = Provider("ours", key, options={"train.compile": mode})
    environment = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": os.path.join(cache, "triton")}
    job = Job(key, provider, configuration(args.model, batch=args.batch), args.device, args.threads)
    began = time.perf_counter()
    try:
        with Worker(Stepping, job, None, environment=environment | provider.environment) as worker:
            row = {"key": key} | worker.built | {"ready_s": time.perf_counter() - began}
            row["steady_ms"] = percentiles(worker("turn", 0, 3)["samples_ms"])["p50_ms"]
    except WorkerError as error:
        return {"key": key, "error": str(error)}
    first = [1000 * row["first_step_s"]]
    return row | {"samples_ms": first} | percentiles(first)
