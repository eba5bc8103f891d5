"""Time to start: imports, the first step with a cold and a warm compiler cache, the first batch of images.

python -m benchmarks startup --model small --modes none block step
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

from . import harness
from .harness import ROOT, Record, Row, percentiles, say
from .processes import Worker, WorkerError
from .providers import PROVIDERS, configuration
from .step import MODELS, Job, Stepping

IMPORTS = ("torch", "extrema_fast", "extrema_fast.models.encoder", "extrema_fast.train", "extrema_fast.cli")
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
            f"  imports of {', '.join(IMPORTS)}; first batch; first steps of ViT-{args.model}: {', '.join(modes)}"
        )
        return 0
    repeats = args.rounds or 3
    import_code = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    rows = [timed(f"import {name}", repeats, import_code.format(name)) for name in IMPORTS]
    rows += [timed(f"first batch of 16, {kind}", 1, FIRST_BATCH, args.data, kind) for kind in ("pil", "dali")]
    for mode in modes:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm") if mode != "none" else ("no",):
                rows.append(first_step(mode, state, cache, args.model, args.batch, args.device, args.threads))
    settings = {"model": args.model, "batch": args.batch, "device": args.device, "data": args.data}
    what = f"time to start, ViT-{args.model} on {args.device}"
    record = harness.new_record(what, "startup", argv, args.note, settings=settings, rows=rows)
    harness.write_record(record, page(record), args)
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


def first_step(mode: str, state: str, cache: str, model: str, batch: int, device: str, threads: int) -> Row:
    """Times building and stepping with the compiler's caches in the folder `cache`."""
    key = f"train.compile {mode}, {state} cache"
    say(key)
    ours = next(q for q in PROVIDERS if q.name == "ours")
    provider = replace(ours, options={"train.compile": mode})
    environment = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": os.path.join(cache, "triton")}
    job = Job(key, provider, configuration(model, batch=batch), device, threads)
    began = time.perf_counter()
    try:
        with Worker(Stepping, job, None, environment=environment | provider.environment) as worker:
            row = {"key": key} | worker.built
            ready = time.perf_counter() - began
            steady = worker("turn", 0, 3)["samples_ms"]
    except WorkerError as error:
        return {"key": key, "error": str(error)}
    first = 1000 * row["first_step_s"]
    return row | {"ready_s": ready, "steady_ms": percentiles(steady)["p50_ms"], "samples_ms": [first]}


def page(record: Record) -> list[str]:
    """Returns the record to read."""
    rows = [r for r in record["rows"] if "error" not in r]
    steps = ("build s=build_s:.2f", "first step s=first_step_s:.2f", "process start to warm s=ready_s:.2f")
    return [
        *harness.heading(record),
        harness.columns(
            [r for r in rows if "p50_ms" in r],
            "fresh interpreter=key",
            "p20 ms=p20_ms:.0f",
            "p80 ms=p80_ms:.0f",
        ),
        harness.columns(
            [r for r in rows if "ready_s" in r], "row=key", *steps, "later steps ms=steady_ms:.0f"
        ),
        *harness.lost(record),
    ]
