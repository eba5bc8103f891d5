"""Everything that only a GPU can show, in one command without network: `make gpu-check`.

python -m benchmarks gpu_visit --out FOLDER [--minutes 9] [--only PART ...] [--list]

The parts run one after another, correctness first, then the step, then the rest; each is its own process with a time
limit. A part that fails or hangs costs its limit only. After every part FOLDER/summary.json and summary.md are written
again; FOLDER/<part>/ holds its log, records and pictures. Parts for which no time is left are named. Exit code: 0, 1
when a part failed, 2 without a GPU (then nothing is run or written).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from extrema_fast.errors import UsageError
from extrema_fast.files import read_json, write_file

from .harness import ROOT, columns, say

# seconds: for the summary, for a part to end by itself, and the least to begin a part with
RESERVE_S, GRACE_S, LEAST_S = 10.0, 20.0, 10.0
PYTEST = "-m pytest -m gpu -v -p no:cacheprovider -o addopts=-ra\\ --import-mode=importlib --junitxml={out}/junit.xml"
STEP = "-m benchmarks step --quick --out {out} --name"
# functions, not commands, which need more packages than torch
ENVIRONMENT = (
    "import json, benchmarks.harness as h; from extrema_fast.ops import dispatch;"
    "print(json.dumps(h.machine() | {'ops': dispatch.choices('cuda')}, indent=1, default=str))"
)
PRETRAIN = (
    "from extrema_fast import pretrain; from extrema_fast.config import from_dict, preset;"
    "pretrain(from_dict({'out': '{out}/run', 'train': {'cuda_graph': %s}}, preset('smoke')), progress=False)"
)
PROFILE = (
    "from extrema_fast.config import from_dict, preset; from extrema_fast.tools.profile import profile;"
    "cfg = from_dict({'train': {'batch_size': 256}}, preset('paper_base_80x5'));"
    "profile(cfg, '{out}', steps=3, synthetic=True)"
)
KERNELS = (
    "import torch; from extrema_fast.kernels import tune; from extrema_fast.kernels._spec import OPS, spec;"
    "cases = [(spec(op).cases(True)[0], spec(op).dtypes[0]) for op in OPS];"
    "[tune.run_case(c, c.make('cuda', d, torch.Generator('cuda').manual_seed(0)), 'ours') for c, d in cases]"
)


@dataclass(frozen=True)
class Part:
    """One process: its folder's name, what it is, its limit, its command (`{out}` stands for its folder).

    An optional part runs only when asked for by name.
    """

    name: str
    about: str
    seconds: float
    words: tuple[str, ...]
    optional: bool = False


def _python(name: str, about: str, seconds: float, command: str, *more: str, optional: bool = False) -> Part:
    return Part(name, about, seconds, (sys.executable, *shlex.split(command), *more), optional)


def plan() -> list[Part]:
    """Returns the parts in the order in which they run."""
    tests = [f"tests/gpu/{f.name}" for f in sorted((ROOT / "tests/gpu").glob("test_*.py"))]
    ours = "--providers ours ours-cuda-graph"
    sanitize = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    return [
        _python("environment", "GPU, driver, versions, what is chosen here", 60, "-c", ENVIRONMENT),
        _python("kernels", "every op: correct? then times", 120, "-m benchmarks kernels --quick --out {out}"),
        _python(
            "attention",
            "attention backends: correct? then times",
            90,
            "-m benchmarks attention --models B --dtypes bf16 --quick --images 256 --out {out}",
        ),
        _python("pretrain", "a short run from images to weights", 90, "-c", PRETRAIN % False),
        _python("pretrain-graph", "the same with train.cuda_graph", 90, "-c", PRETRAIN % True),
        _python(
            "step",
            "ViT-B, 80 % x 5, color: ours, with a CUDA graph, strong",
            270,
            f"{STEP} step --model base --color {ours} strong",
        ),
        _python("tests", "the tests that need a GPU", 240, PYTEST, *tests),
        _python("profile", "where the time of a ViT-B step goes", 90, "-c", PROFILE),
        _python(
            "released", "ViT-B, released", 200, f"{STEP} released --model base --providers released ours"
        ),
        _python(
            "modes", "ViT-B, compile modes, kernels", 300, f"{STEP} modes --model base --providers ours modes"
        ),
        _python("small", "ViT-S, 256 images", 150, f"{STEP} small --model small {ours} strong released"),
        _python("batch64", "ViT-B, 64 images", 120, f"{STEP} batch64 --model base --batch 64 {ours}"),
        _python(
            "batch1024",
            "ViT-B, 1024 images",
            150,
            f"{STEP} batch1024 --model base --batch 1024 --providers ours",
        ),
        _python(
            "base90x8", "ViT-B, 90 % x 8", 200, f"{STEP} base90x8 --model base --mask 90x8 {ours} strong"
        ),
        _python(
            "loader",
            "DALI on CPU and GPU next to a DataLoader of PIL",
            180,
            "-m benchmarks loader --data made "
            "--quick --batch 64 --threads 15 --ways ours ours-gpu dataloader --stages crop views --out {out}",
        ),
        *(
            Part(tool, f"compute-sanitizer {tool}", 90, (*sanitize, tool, sys.executable, "-c", KERNELS))
            for tool in ("memcheck", "racecheck")
        ),
        _python("encode", "inference", 200, "-m benchmarks encode --quick --out {out}", optional=True),
        _python("scaling", "how a step grows", 900, f"{STEP} scaling --scaling --model base", optional=True),
        _python("tune", "launch settings", 600, "-m extrema_fast tune paper_base_80x5", optional=True),
    ]


def run(parts: Sequence[Part], out: Path, seconds: float, gpu: str) -> int:
    """Runs the parts within `seconds` in all; returns the exit code. Ctrl-C and SIGTERM end the visit with a summary.

    Raises:
        UsageError: `out` is not a new or empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: exists and is not empty; name a new folder")
    began, code = time.monotonic(), 0
    entries: list[dict[str, Any]] = [
        {"name": p.name, "about": p.about, "state": "not run", "command": shlex.join(p.words), "found": []}
        for p in parts
    ]
    started = datetime.now().isoformat(timespec="seconds")
    summary: dict[str, Any] = {"gpu": gpu, "started": started, "parts": entries}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for part, entry in zip(parts, entries, strict=True):
            say(f"{part.name}: {part.about}")
            left = seconds - RESERVE_S - (time.monotonic() - began)
            entry |= run_part(part, out / part.name, min(part.seconds, left), out / "cache")
            entry |= findings(out / part.name, entry["state"])
            say("\n".join("    " + line for line in (entry["state"], *entry["found"])))
            write(summary, out)
    except KeyboardInterrupt:
        code = 130
    finally:
        signal.signal(signal.SIGTERM, before)
        summary["seconds"] = time.monotonic() - began
        write(summary, out)
    say(f"{summary['seconds']:.0f} s: {out / 'summary.md'}")
    return code or int(any(e["state"].startswith("failed") for e in entries))


def run_part(part: Part, folder: Path, limit: float, cache: Path) -> dict[str, Any]:
    """Runs one part in its own session; returns its state, seconds and the last lines of its log.

    One cache of compiled code serves all parts. At its limit a part gets SIGINT, on which pytest and the benchmarks
    write what they have, and is killed after a while.
    """
    if shutil.which(part.words[0]) is None:
        return {"state": f"skipped: {part.words[0]} is not on PATH"}
    if limit < min(LEAST_S, part.seconds):
        return {"state": "skipped: no time left"}
    folder.mkdir(parents=True)
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | caches
    log, began = folder / "log.txt", time.monotonic()
    with open(log, "wb") as sink:
        process = subprocess.Popen(
            [w.replace("{out}", str(folder)) for w in part.words],
            cwd=ROOT,
            env=env | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            state = "passed" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            state = f"failed: not ready after {limit:.0f} s"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            # also what it started and left behind, which would disturb the next part
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # a process stuck in the driver cannot be reaped: go on without it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    return {"state": state, "seconds": time.monotonic() - began, "tail": tail}


def findings(folder: Path, state: str) -> dict[str, Any]:
    """Returns `found`, lines that say what a part's files hold, and its `state`, which they can change."""
    lines: list[str] = []
    for file in sorted(folder.glob("*/record.json")):
        record = read_json(file, {})
        lines.append(f"{record.get('what')}: {record.get('headline', '')}")
        rows = [r for r in record.get("rows", []) if r.get("images_per_s")]
        lines += [f"{r['key']}: {r['images_per_s']:.0f} images/s" for r in rows]
        lines += [f"CHECK FAILED {c['name']}" for c in record.get("gates", []) if not c["passed"]]
    if (folder / "junit.xml").is_file():
        bad, passed, skipped = [], 0, 0
        with contextlib.suppress(xml.ParseError):
            for case in xml.parse(folder / "junit.xml").iter("testcase"):
                kinds = {child.tag for child in case}
                if kinds & {"failure", "error"}:
                    bad.append(f"FAILED {case.get('classname')}::{case.get('name')}")
                skipped += "skipped" in kinds
                passed += not kinds & {"failure", "error", "skipped"}
        lines += [f"{passed} passed, {len(bad)} failed, {skipped} skipped", *bad[:20]]
        if not passed and state == "passed":
            state = "failed: no test has run"
    return {"found": lines, "state": state}


def write(summary: dict[str, Any], out: Path) -> None:
    """Writes summary.json and summary.md."""
    write_file(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    parts = summary["parts"]
    text = [f"# GPU visit: {summary['gpu']}", summary["started"]]
    text.append(columns(parts, "part=name", "result=state", "s=seconds:.0f", "what it is=about"))
    for p in parts:
        failed = p["state"].startswith("failed")
        if p["found"] or failed:
            found = "\n".join(f"* {line}" for line in p["found"])
            text += [f"## {p['name']}", f"`{p['command']}`", found]
            text += ["\n".join(["```", *p.get("tail", []), "```"])] * failed
            text += [f"![{f.stem}]({f.relative_to(out)})" for f in sorted((out / p["name"]).glob("*/*.png"))]
    text.append(
        "To keep a record: copy its folder into benchmarks/records/, then `python -m benchmarks index`."
    )
    write_file(out / "summary.md", "\n\n".join(text) + "\n")


_PROBE = """
import sys, torch
if torch.version.cuda is None: sys.exit(f"torch {torch.__version__} is built without CUDA; PyPI has one with it")
if not torch.cuda.is_available(): sys.exit(f"torch {torch.__version__} finds no GPU it can use")
print(torch.cuda.get_device_name(0))
"""


def find_gpu(command: Sequence[str] = (sys.executable, "-c", _PROBE), seconds: float = 120) -> str:
    """Returns the name of the NVIDIA GPU, asked for in another process, since a broken driver can hang it.

    Raises:
        UsageError: there is none.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip().splitlines()[-1]
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    except subprocess.TimeoutExpired:
        why = f"torch gave no answer in {seconds:g} s (see nvidia-smi)"
    raise UsageError(f"no NVIDIA GPU: {why}; nothing was run")


def main(argv: list[str]) -> int:
    """Runs everything that only a GPU can show: correctness of every op, the step, the rest."""
    p = argparse.ArgumentParser(prog="python -m benchmarks gpu_visit", description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, metavar="FOLDER", help="new folder (default: runs/gpu-check-<time>)")
    p.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: %(default)g)")
    p.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts")
    p.add_argument("--list", action="store_true", help="print the parts, their limits and commands, and stop")
    args = p.parse_args(argv)
    if args.minutes <= 0:
        raise UsageError(f"--minutes: expected more than 0, got {args.minutes:g}")
    known = [part.name for part in plan()]
    for name in args.only:
        if name not in known:
            raise UsageError(f"--only: unknown part {name!r}; known: {', '.join(known)}")
    parts = [part for part in plan() if (part.name in args.only if args.only else not part.optional)]
    if args.list:
        for part in parts:
            print(f"{part.name:16} {part.seconds:4.0f} s  {part.about}\n{'':24}{shlex.join(part.words)}")
        return 0
    began, gpu = time.monotonic(), find_gpu()
    out = args.out or Path("runs") / f"gpu-check-{datetime.now():%Y-%m-%d-%H%M%S}"
    say(f"{gpu}: {len(parts)} parts, at most {args.minutes:g} minutes, results in {out}")
    return run(parts, out.resolve(), 60 * args.minutes - (time.monotonic() - began), gpu)
