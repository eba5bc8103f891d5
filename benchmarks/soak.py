"""Does a long run stay as large as it is? Memory, descriptors and threads of one process over thousands of steps.

A tiny run in a process of its own, by the product's own command, with saves and evaluations, on images that become
unreadable one after the other while it goes on; read from /proc (Linux):

python -m benchmarks soak

Ctrl-C ends it early, with a record of the steps until then.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from extrema_fast.errors import Preempted, UsageError
from extrema_fast.files import parse_records, read_log, read_text

from . import harness

# steps of an epoch
EPOCH = 64
BATCH = 4
# steps between two readings, two saves, two images that become unreadable
READ, SAVE, BREAK = 50, 50, 500
# windows of the table; the first is warm-up, and what follows is compared with the second
WINDOWS = 20
LIMIT = 0.01
OPTIONS = {
    "--data.limit": "0",
    "--data.bad-budget": "0.5",
    "--data.threads": "1",
    "--data.loader": "pil",
    "--data.resident": "off",
    # what costs a tiny step most
    "--data.policy": "spatial",
    "--model.drop-path": "0",
    "--model.pool-depth": "1",
    "--model.width": "16",
    "--model.depth": "1",
    "--model.img-size": "16 16",
    "--mask.ratio": "0.5",
    "--head.hidden": "16",
    "--head.out": "16",
    "--head.predictor-hidden": "16",
    "--train.batch-size": str(BATCH),
    "--ckpt.every-epochs": "0",
    "--ckpt.every-steps": str(SAVE),
    "--eval.every-epochs": "5",
    "--eval.max-train": "32",
    "--eval.max-test": "32",
    "--log.every-steps": "10",
    "--log.no-report": "",
    "--system.threads": "1",
    "--system.device": "cpu",
}


def main(argv: list[str]) -> int:
    """Memory, descriptors and threads over a long run of tiny steps; fails where they grow."""
    p = harness.parser("soak", main.__doc__, timed=False)
    p.add_argument("--steps", type=int, default=20_000)
    p.add_argument("--runs", type=Path, default=Path("runs/soak"), help="where images and run go")
    args = p.parse_args(argv)
    steps = 2_000 if args.quick else args.steps
    if steps < 2_000:
        raise UsageError(f"--steps: {steps} are too few for {WINDOWS} windows; use at least 2000")
    if not Path("/proc/self/status").is_file():
        raise UsageError("soak: reads /proc, which this system does not have; use Linux")
    command = ["pretrain", "smoke", "--train.epochs", str(-(-steps // EPOCH))]
    if args.list:
        print(f"  {' '.join(command)}, {steps} steps")
        return 0
    shutil.rmtree(args.runs, ignore_errors=True)
    images = write_images(args.runs / "images", EPOCH * BATCH)
    command += ["--data.train", str(args.runs / "images"), "--data.test", str(args.runs / "images")]
    command += ["--out", str(args.runs / "run")]
    for option, value in OPTIONS.items():
        command += [option, *value.split()]
    record = harness.new_record("soak: a long run stays as large as it is", "soak", argv, args.note)
    record["settings"] = {"steps": steps, "options": OPTIONS, "images": len(images), "breaks_every": BREAK}
    record |= watch(command, args.runs / "run", images)
    record["rows"] = windows(record["samples"])
    record["gates"] = gates(record["rows"])
    record["headline"] = headline(record)
    harness.write_record(record, page(record), args)
    return int(not all(g["passed"] for g in record["gates"]))


def write_images(folder: Path, count: int) -> list[Path]:
    """Small images in two classes; returns their paths."""
    from PIL import Image

    found = []
    for n in range(count):
        path = folder / "ab"[n % 2] / f"{n:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        found.append(path)
    return found


def watch(command: list[str], out: Path, images: list[Path]) -> dict[str, Any]:
    """Runs the command to its end or a Ctrl-C; reads its process every `READ` steps, spoils an image every `BREAK`."""
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = out.with_suffix(".txt")
    samples: list[dict[str, float]] = []
    broken = 0
    with open(log, "wb") as text:
        process = subprocess.Popen(
            [sys.executable, "-m", "extrema_fast", *command], stdout=text, stderr=text, env=environment
        )
        try:
            while process.poll() is None:
                step = last_step(out / "log.jsonl")
                if step >= (samples[-1]["step"] if samples else 0) + READ and (found := read(process.pid)):
                    samples.append({"step": step, **found})
                if step >= BREAK * (broken + 1):
                    images[7 * broken % len(images)].write_bytes(b"broken")
                    broken += 1
                time.sleep(0.5)
        except KeyboardInterrupt:
            harness.say("soak: ended early")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
    if process.returncode not in (0, Preempted.exit_code):
        raise UsageError(f"soak: the run ended with code {process.returncode}: {log.read_text()[-600:]}")
    if len(samples) < 3:
        raise UsageError(f"soak: the run ended after {len(samples)} readings; use more --steps")
    records = read_log(out / "log.jsonl")
    kinds = {kind: sum(r["kind"] == kind for r in records) for kind in ("train", "eval", "warning")}
    last = [r for r in records if r["kind"] == "train"][-1]
    return {
        "samples": samples,
        "steps": int(last["step"]),
        "log": kinds,
        "saves": int(last["step"]) // SAVE,
        "bad_images": last["bad_images"],
        "seconds": round(time.monotonic() - began, 1),
    }


def last_step(file: Path) -> int:
    """The step of the last record in a log.jsonl; 0 without one."""
    if not file.is_file():
        return 0
    with open(file, "rb") as f:
        f.seek(max(0, file.stat().st_size - 4096))
        found = [r["step"] for r in parse_records(f.read().decode(errors="replace").splitlines())]
    return found[-1] if found else 0


def read(pid: int) -> dict[str, float] | None:
    """Resident memory in MB, descriptors and threads of a process; None: it has ended."""
    try:
        status = dict(
            line.split(":", 1) for line in read_text(f"/proc/{pid}/status").splitlines() if ":" in line
        )
        return {
            "rss_mb": int(status["VmRSS"].split()[0]) / 1024,
            "threads": int(status["Threads"]),
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        }
    except (OSError, KeyError):
        return None


KINDS = ("rss_mb", "threads", "descriptors")


def windows(samples: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Lowest, middle and highest reading of each of `WINDOWS` parts of the run, or of as many as it has readings."""
    rows = []
    for part in np.array_split(np.arange(len(samples)), min(WINDOWS, len(samples))):
        some = [samples[i] for i in part]
        row: dict[str, Any] = {"key": f"steps {some[0]['step']} to {some[-1]['step']}", "readings": len(some)}
        for kind in KINDS:
            values = [s[kind] for s in some]
            row[kind] = {"low": min(values), "middle": float(np.median(values)), "high": max(values)}
        rows.append(row)
    return rows


def gates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether what follows the warm-up stays as its first window is: memory within 1 %, the others equal."""
    found = []
    for kind in KINDS:
        # a save and an evaluation have a thread and files of their own, for a moment
        values = [r[kind]["middle"] for r in rows[1:]]
        growth = max(values) / values[0] - 1
        limit = LIMIT if kind == "rss_mb" else 0.0
        found.append({"name": kind, "passed": growth <= limit, "found": f"{100 * growth:+.2f} %"})
    return found


def headline(record: dict[str, Any]) -> str:
    """What came of it, in a line."""
    grown = {g["name"]: g["found"] for g in record["gates"]}
    return (
        f"{record['steps']} steps, {record['saves']} saves, {record['log']['eval']} evaluations, "
        f"{record['bad_images']:.0f} images failing: memory {grown['rss_mb']}, descriptors "
        f"{grown['descriptors']}, threads {grown['threads']} after the warm-up"
    )


def page(record: dict[str, Any]) -> list[str]:
    """The record to read."""
    specs = ["part=key", "readings=readings"]
    for kind, (name, form) in zip(
        KINDS, (("MB", ":.1f"), ("threads", ":.0f"), ("descriptors", ":.0f")), strict=True
    ):
        specs += [f"{name}={kind}.middle{form}", f"highest={kind}.high{form}"]
    return [
        f"{record['headline']}.",
        f"A save every {SAVE} steps, an evaluation of 32 images every {5 * EPOCH}; an image becomes unreadable every "
        f"{BREAK} steps. Median and highest reading of each part; the first is warm-up, and the medians of the others "
        f"are compared with that of the second. {record['seconds']:g} s.",
        harness.columns(record["rows"], *specs),
        harness.columns(record["gates"], "what=name", "passed=passed", "grown=found"),
    ]
