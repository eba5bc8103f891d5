"""How long until it runs: imports, building, the first step with a cold and a warm compiler cache, the first image.

python -m benchmarks startup --model small --modes none block loss
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from extrema_fast.config import to_dict
from extrema_fast.distributed import pick_device

from .processes import ROOT, WARMUP, Worker, WorkerError
from .providers import PROVIDERS, configuration
from .records import heading, new_record, parser, write_record
from .stats import percentiles
from .tables import Page, Table

IMPORTS = ("torch", "extrema_fast", "extrema_fast.models.encoder", "extrema_fast.train", "extrema_fast.cli")
# data options -> time from opening the images to the first batch
FIRST_IMAGES = """
import sys, time
began = time.perf_counter()
from extrema_fast.config import DataConfig
from extrema_fast.data.loader import TrainLoader
from extrema_fast.data.sources import open_source
imported = time.perf_counter()
source = open_source(sys.argv[1], "train")
opened = time.perf_counter()
with TrainLoader(source, DataConfig(train=sys.argv[1], loader=sys.argv[2]), (224, 224), batch_size=16, seed=0) as l:
    next(l)
    print(imported - began, opened - imported, time.perf_counter() - opened)
"""


def main(argv: list[str]) -> int:
    """Import, build and first-step times per compile mode (cold and warm cache), time to the first image."""
    p = parser("startup", main.__doc__)
    p.add_argument("--model", choices=("tiny", "small", "base", "large"), default="")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--modes", nargs="+", choices=("none", "block", "loss", "step"), default=[])
    p.add_argument("--repeats", type=int, default=3, help="of the imports")
    p.add_argument("--data", default="photos", help="images for the first batch, as data.train")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--device", default="auto")
    args = p.parse_args(argv)
    device = str(pick_device(args.device))
    model = args.model or ("tiny" if args.quick else "small")
    modes = args.modes or (["none", "block"] if args.quick else ["none", "block", "loss"])
    if args.list:
        print(
            f"  imports of {', '.join(IMPORTS)}; first steps of ViT-{model} with {', '.join(modes)}; first images"
        )
        return 0
    rows = [import_row(name, args.repeats) for name in IMPORTS]
    for mode in modes:
        rows += first_steps(mode, model, args.batch, device, args.threads)
    rows += [first_images(args.data, loader) for loader in ("pil", "dali")]
    record = new_record(
        f"time to start, ViT-{model} on {device}", "startup", argv, args.note,
        settings={"model": model, "batch": args.batch, "device": device, "data": args.data}, rows=rows,
    )  # fmt: skip
    write_record(record, page(record), args.name, args.out)
    return 0


def import_row(name: str, repeats: int) -> dict[str, Any]:
    """Seconds of `import name` in a fresh interpreter."""
    code = f"import time; t = time.perf_counter(); import {name}; print(time.perf_counter() - t)"
    samples = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        )
        samples.append(1000 * float(done.stdout))
    return {"key": f"import {name}", "samples_ms": samples} | percentiles(samples)


def first_steps(mode: str, model: str, batch: int, device: str, threads: int) -> list[dict[str, Any]]:
    """Build and first steps with an empty compiler cache, then with the one this left."""
    ours = next(q for q in PROVIDERS if q.name == "ours")
    provider = replace(ours, name=f"ours {mode}", options={"train.compile": mode})
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "warm") if mode != "none" else ("no",):
            key = f"train.compile {mode}, {state} cache"
            print(key, file=sys.stderr, flush=True)
            began = time.perf_counter()
            try:
                environment = {
                    "TORCHINDUCTOR_CACHE_DIR": cache,
                    "TRITON_CACHE_DIR": str(Path(cache) / "triton"),
                }
                with Worker(threads, environment=environment) as worker:
                    built = worker(
                        "build", provider=asdict(provider), config=to_dict(configuration(model, batch=batch)),
                        device=device, precision=provider.resolved(device), sets=2, threads=threads,
                    )  # fmt: skip
                    ready = worker("warmup", steps=1)
                    until_first = time.perf_counter() - began
                    kind = device.partition(":")[0]
                    worker("turn", warm=WARMUP[kind], steps=1)
                    steady = worker("turn", warm=0, steps=3)["samples_ms"]
            except WorkerError as error:
                rows.append({"key": key, "error": str(error)})
                continue
            rows.append(
                {"key": key, "build_ms": 1000 * built["build_s"], "first_step_ms": 1000 * ready["first_step_s"],
                 "until_first_step_ms": 1000 * until_first, "steady_ms": percentiles(steady)["p50_ms"],
                 "samples_ms": [1000 * ready["first_step_s"]]}
            )  # fmt: skip
    return rows


def first_images(data: str, loader: str) -> dict[str, Any]:
    """Milliseconds from opening the images to the first batch of 16, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IMAGES, data, loader], capture_output=True, text=True, cwd=ROOT
    )
    key = f"first 16 images, {loader}"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"key": key, "error": lines[-1][:300]}
    imported, opened, first = (1000 * float(v) for v in done.stdout.split())
    return {"key": key, "import_ms": imported, "open_ms": opened, "first_ms": first, "samples_ms": [first]}


def page(record: dict[str, Any]) -> Page:
    """The record to read."""
    rows = record["rows"]

    def cells(row: dict[str, Any], *names: str) -> list[str]:
        return [row["key"], *(f"{row[n] / 1000:.2f}" if n in row else "-" for n in names)]

    imports = [r for r in rows if r["key"].startswith("import ")]
    steps = [r for r in rows if r["key"].startswith("train.compile") and "error" not in r]
    images = [r for r in rows if r["key"].startswith("first ") and "error" not in r]
    out = heading(record)
    out.append(
        Table(
            ["fresh interpreter", "p20 s", "p50 s", "p80 s"],
            [cells(r, "p20_ms", "p50_ms", "p80_ms") for r in imports],
        )
    )
    names = ("build_ms", "first_step_ms", "until_first_step_ms", "steady_ms")
    out.append(
        Table(
            ["first step", "build s", "first step s", "process start to first step s", "later steps s"],
            [cells(r, *names) for r in steps],
        )
    )
    out.append(
        Table(
            [f"first images of {record['settings']['data']}", "import s", "open s", "first batch s"],
            [cells(r, "import_ms", "open_ms", "first_ms") for r in images],
        )
    )
    lost = [f"* {r['key']}: {r['error']}" for r in rows if "error" in r]
    return [*out, "\n".join(lost)] if lost else out
