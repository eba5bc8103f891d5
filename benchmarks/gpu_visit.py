"""Everything that only a GPU can show, in one command without network: `make gpu-check`.

python -m benchmarks gpu_visit --out FOLDER [--minutes 9] [--only PART ...] [--list]

The parts run in the order of their worth: what `auto` takes (used from there on), a run from images to weights, the
ops, the step, the tests, a profile; that much in about 9 minutes, all of it in about 30. Each is its own process with
a time limit; one that fails or hangs costs its limit only. Records are written as they come, FOLDER/summary.json and
summary.md after every part; FOLDER/<part>/ holds its log, records and pictures. Parts that could not run say why.
torch, triton, numpy, safetensors and pytest are enough. Exit code: 0, 1 when a part failed, 2 without a GPU (then
nothing is run or written).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import logging
import os
import shlex
import shutil
import signal
import statistics
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

from . import harness
from .harness import ROOT, columns, say

# seconds: for the summary, for a part to end by itself, and the least to begin a part with
RESERVE_S, GRACE_S, LEAST_S = 10.0, 20.0, 10.0
PYTEST = (
    "-m pytest -v -p no:cacheprovider -o addopts=-ra\\ --import-mode=importlib --junitxml={out}/junit.xml -m"
)
STEP = "-m benchmarks step --quick --out {out} --name"
# what a part's program prints for the summary begins with this
MARK = "found: "
# test processes at a time, each with its own file, and with pytest-xdist
PROCESSES, SPREAD = 4, 8
# images of a batch, model and masks of the step that is measured, timed and profiled
BATCH = 256
# optional packages -> what is missing without them
OPTIONAL = {
    "matplotlib": "no pictures",
    "PIL": "no images can be read: no run, no loader benchmark",
    "nvidia.dali": "no loader benchmark",
    "xformers": "its attention is no candidate",
}


@dataclass(frozen=True)
class Part:
    """One process: its folder's name, what it is, its limit, its command (`{out}` stands for its folder).

    Neighbors with the same `group` run at the same time. `needs` are optional packages. An optional part runs only when
    asked for by name.
    """

    name: str
    about: str
    seconds: float
    words: tuple[str, ...]
    optional: bool = False
    group: str = ""
    needs: tuple[str, ...] = ()


def _python(name: str, about: str, seconds: float, command: str, *more: str, **options: Any) -> Part:
    return Part(name, about, seconds, (sys.executable, *shlex.split(command), *more), **options)


def _call(name: str, about: str, seconds: float, call: str, **options: Any) -> Part:
    # functions of this file, since commands need more packages than torch
    words = (sys.executable, "-c", f"from benchmarks import gpu_visit; gpu_visit.{call}")
    return Part(name, about, seconds, words, **options)


def plan() -> list[Part]:
    """Returns the parts in the order in which they run: what pays most comes first."""
    tests = [f"tests/gpu/{f.name}" for f in sorted((ROOT / "tests/gpu").glob("test_*.py"))]
    ours = "--providers ours ours-cuda-graph"
    sanitize = ("compute-sanitizer", "--error-exitcode", "9", "--tool", "{tool}", sys.executable, "-c")
    sanitized = "from benchmarks import gpu_visit; gpu_visit.every_kernel()"

    def tested(name: str, about: str, seconds: float, which: str) -> list[Part]:
        if _is_installed("xdist"):
            spread = ("-n", str(SPREAD), "--dist", "worksteal", "tests/gpu")
            return [_python(name, about, seconds, PYTEST, which, *spread)]
        return [
            _python(f"{name}-{i + 1}", about, seconds, PYTEST, which, *files, group=name)
            for i in range(PROCESSES)
            if (files := tests[i::PROCESSES])
        ]

    return [
        _call("environment", "GPU, driver, versions, what is missing", 60, "environment()"),
        _call(
            "measure", "what `auto` takes for the ViT-B step; used from here on", 180, "measure_step('{out}')"
        ),
        _call(
            "pretrain",
            "ten steps from images to a checkpoint",
            90,
            "short_run('{out}/run', 10)",
            needs=("PIL",),
        ),
        _call(
            "pretrain-resume",
            "the same run to step 30",
            60,
            "short_run('{out}/../pretrain/run', 30, after=10)",
            needs=("PIL",),
        ),
        _call(
            "pretrain-graph",
            "30 steps in a CUDA graph",
            90,
            "short_run('{out}/run', 30, graph=True)",
            needs=("PIL",),
        ),
        _call(
            "pretrain-dali",
            "30 steps and evaluations with DALI, JPEG files of every kind",
            120,
            "short_run('{out}/run', 30, dali=True)",
            needs=("PIL", "nvidia.dali"),
        ),
        _python(
            "kernels",
            "ops of the step: correct? then times",
            120,
            "-m benchmarks kernels --quick --out {out} --op color_views attention_pool adamw_ema short_attention "
            "residual_norm mlp",
        ),
        _python(
            "step",
            "ViT-B, 80 % x 5: ours, with a CUDA graph, strong",
            300,
            f"{STEP} step --model base --batch {BATCH} {ours} strong",
        ),
        *tested("tests", "tests that need a GPU, but the slow ones", 180, "gpu and not slow"),
        _call("profile", "where the time of a ViT-B step goes", 90, "profiled('{out}')"),
        *tested("tests-slow", "the slow ones: compiled steps", 300, "gpu and slow"),
        _python(
            "modes", "ViT-B, compile modes, kernels", 400, f"{STEP} modes --model base --providers ours modes"
        ),
        _python("small", "ViT-S, 256 images", 240, f"{STEP} small --model small {ours} strong released"),
        _python(
            "released", "ViT-B, released", 200, f"{STEP} released --model base --providers ours released"
        ),
        _python("kernels-all", "every op: correct? then times", 240, "-m benchmarks kernels --out {out}"),
        _python(
            "attention",
            "attention backends: correct? then times",
            90,
            "-m benchmarks attention --models B --dtypes bf16 --quick --images 256 --out {out}",
        ),
        _python("batch64", "ViT-B, 64 images", 200, f"{STEP} batch64 --model base --batch 64 {ours}"),
        _python(
            "batch1024",
            "ViT-B, 1024 images",
            240,
            f"{STEP} batch1024 --model base --batch 1024 --providers ours",
        ),
        _python(
            "base90x8", "ViT-B, 90 % x 8", 300, f"{STEP} base90x8 --model base --mask 90x8 {ours} strong"
        ),
        _python(
            "loader",
            "DALI on CPU and GPU next to a DataLoader of PIL",
            180,
            "-m benchmarks loader --data made "
            "--quick --batch 64 --threads 15 --ways ours ours-gpu dataloader --stages crop views --out {out}",
            needs=("nvidia.dali", "PIL"),
        ),
        *(
            Part(
                tool,
                f"compute-sanitizer {tool}",
                120,
                (*(w.replace("{tool}", tool) for w in sanitize), sanitized),
            )
            for tool in ("memcheck", "racecheck")
        ),
        _call("tune", "launch settings of the ViT-B step", 600, "measure_step('{out}', tune=True)"),
        _python("encode", "inference", 200, "-m benchmarks encode --quick --out {out}", optional=True),
        _python("scaling", "how a step grows", 900, f"{STEP} scaling --scaling --model base", optional=True),
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
        pairs = list(zip(parts, entries, strict=True))
        # neighbors of one group, or a part alone
        for _, group in itertools.groupby(pairs, lambda pair: pair[0].group or pair[0].name):
            together = list(group)
            say("\n".join(f"{part.name}: {part.about}" for part, _ in together))
            left = seconds - RESERVE_S - (time.monotonic() - began)
            with contextlib.ExitStack() as running:
                started_parts = [
                    running.enter_context(Process(p, out / p.name, min(p.seconds, left), out / "cache"))
                    for p, _ in together
                ]
                for process, (part, entry) in zip(started_parts, together, strict=True):
                    entry |= process.finish()
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


class Process:
    """A part that runs in its own session, until its context ends at the latest.

    One cache of compiled code and of measurements serves all parts. At its limit a part gets SIGINT, on which pytest
    and the benchmarks write what they have, and is killed after a while.
    """

    def __init__(self, part: Part, folder: Path, limit: float, cache: Path) -> None:
        self.skipped, self.limit, self.began = "", limit, time.monotonic()
        missing = [name for name in part.needs if not _is_installed(name)]
        if shutil.which(part.words[0]) is None:
            self.skipped = f"skipped: {part.words[0]} is not on PATH"
        elif missing:
            self.skipped = f"skipped: {', '.join(missing)} not installed"
        elif limit < min(LEAST_S, part.seconds):
            self.skipped = "skipped: no time left"
        if self.skipped:
            return
        folder.mkdir(parents=True)
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "TRITON_CACHE_DIR": "triton",
            "XDG_CACHE_HOME": "home",
        }
        # 0: where the device has an unusual name the tests would take Triton's interpreter
        env = os.environ | {name: str(cache / where) for name, where in caches.items()}
        env |= {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
        self.log = folder / "log.txt"
        with open(self.log, "wb") as sink:
            self.process = subprocess.Popen(
                [w.replace("{out}", str(folder)) for w in part.words],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                # a visit in the background of a shell ignores it, which its parts would inherit
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def finish(self) -> dict[str, Any]:
        """Waits until it has ended; returns state, seconds, the last lines of its log, and what it printed as found."""
        if self.skipped:
            return {"state": self.skipped}
        try:
            code = self.process.wait(max(0.0, self.limit - (time.monotonic() - self.began)))
            state = "passed" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            state = f"failed: not ready after {self.limit:.0f} s"
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
        self._kill()
        seconds = time.monotonic() - self.began
        tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        return {"state": state, "seconds": seconds, "tail": tail}

    def _kill(self) -> None:
        # also what it started and left behind, which would disturb the next part
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # a process stuck in the driver cannot be reaped: go on without it
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.skipped and self.process.returncode is None:
            self._kill()


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def findings(folder: Path, state: str) -> dict[str, Any]:
    """Returns `found`, lines that say what a part's files hold, and its `state`, which they can change."""
    lines: list[str] = []
    log = folder / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    lines += [line.removeprefix(MARK) for line in text if line.startswith(MARK)]
    for file in sorted(folder.glob("*/record.json")):
        record = read_json(file, {})
        lines.append(f"{record.get('what')}: {record.get('headline', '')}")
        lines += [record["unfinished"]] if record.get("unfinished") else []
        rows = [r for r in record.get("rows", []) if r.get("images_per_s")]
        lines += [f"{r['key']}: {r['images_per_s']:.0f} images/s" for r in rows]
        lines += [f"not measured: {r['key']}: {r['error']}" for r in record.get("rows", []) if "error" in r]
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


# ---- what parts run ---------------------------------------------------------------------------------


def environment() -> None:
    """Prints the machine, what is chosen without measuring, and which optional packages are missing."""
    from extrema_fast.ops import dispatch

    print(json.dumps(harness.machine() | {"ops": dispatch.choices("cuda")}, indent=1, default=str))
    for package, lost in OPTIONAL.items():
        if not _is_installed(package):
            print(f"{MARK}without {package}: {lost}")


def measure_step(folder: str, *, tune: bool = False) -> None:
    """Measures what `auto` takes for the step of `benchmarks step --model base`; `tune`: launch settings first.

    Writes a record of it into `folder`.
    """
    import torch
    from extrema_fast.kernels import _cache
    from extrema_fast.kernels._spec import OPS

    from extrema_fast.distributed import World
    from extrema_fast.ops import measure
    from extrema_fast.training.resolve import resolve

    from .step import configuration

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda", 0)

    def choose(problems: list[measure.Problem]) -> measure.Choices:
        if tune:
            found = measure.tune_and_measure(problems, str(device))
        else:
            found = measure.choose(problems, World(device))
        for name, choice in found.items():
            out = "".join(f"; not {candidate}: {why}" for candidate, why in choice.out.items())
            print(f"{MARK}{name}: {choice.implementation or 'the fixed rule'}, {choice.reason}{out}")
        return found

    resolve(configuration("base", batch=BATCH, color=True), device, choose=choose)
    entries = [entry for op in OPS for entry in _cache.entries(str(device), op)]
    write_choices(entries, Path(folder), "tuned" if tune else "choices")


def write_choices(
    entries: list[tuple[dict[str, Any], dict[str, Any]]], out: Path, name_of_record: str
) -> Path:
    """Writes a record of what was measured for `auto`, from the (key, value) pairs of the cache; returns its folder."""
    rows, choices = [], []
    for key, value in entries:
        if "choice" not in key:
            continue
        name = f"{key['choice']} {key['label']}".strip()
        choices.append(
            {"key": name, "taken": value["implementation"] or "the rule's", "why": value["reason"]}
        )
        for case, times in value["times"].items():
            best = min(map(statistics.median, times.values()))
            for implementation, us in sorted(times.items(), key=lambda item: statistics.median(item[1])):
                row = {
                    "key": f"{key['choice']}, {case}, {implementation}",
                    "samples_ms": [x / 1000 for x in us],
                }
                row |= harness.percentiles(row["samples_ms"]) | {"of_best": statistics.median(us) / best}
                rows.append(row)
    what = f"what `auto` takes: ViT-base/16, 80 % x 5, {BATCH} images"
    record = harness.new_record(what, "gpu_visit", ["--only", "measure"], choices=choices, rows=rows)
    record["headline"] = "; ".join(f"{c['key']}: {c['taken']}" for c in choices)
    page = [
        harness.columns(choices, "op=key", "taken=taken", "why=why"),
        "Forward and backward pass of one call, student or teacher; adamw_ema: the tensors of four blocks; a "
        "candidate far behind has one sample.",
        harness.columns(
            rows, "op, case, implementation=key", *harness.TIMES, "times the fastest=of_best:.2f"
        ),
    ]
    return harness.write_record(record, page, argparse.Namespace(out=out, name=name_of_record))


def short_run(folder: str, steps: int, *, after: int = 0, graph: bool = False, dali: bool = False) -> None:
    """Pretrains the smallest model to `steps` on made images, from a checkpoint at step `after` where that is not 0.

    With `dali` on JPEG files, evaluated at the end of each epoch.

    Raises:
        RuntimeError: another number of steps was made, or a loss is not finite (on a null GPU none is a number).
    """
    from extrema_fast import pretrain
    from extrema_fast.config import from_dict, preset
    from extrema_fast.data.dali_on_gpu import write_jpegs

    # without measuring, which another part covers
    batch, data = 9, {"loader": "pil"}
    if dali:
        batch, images = 32, Path(folder).with_name("images")
        images.mkdir(parents=True)
        write_jpegs(str(images), 10 * batch)
        data = {"loader": "dali", "train": str(images), "test": "", "resident": "off"}
    change: dict[str, Any] = {
        "out": folder,
        "data": {"limit": 10 * batch, **data},
        "eval": {"every_epochs": int(dali)},
        "train": {
            "batch_size": batch,
            "epochs": steps // 10,
            "cuda_graph": "on" if graph else "off",
            "precision": "auto",
        },
        "system": {"backend": "fixed"},
    }
    pretrain(from_dict(change, preset("smoke")), allow_config_change=after > 0, progress=False)
    lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    trained = [entry for entry in map(json.loads, lines) if entry["kind"] == "train"]
    made, losses = [e["step"] for e in trained], {e["step"]: e["loss"] for e in trained}
    # each once: a run that began anew would have the first ones twice, or only its own
    if made != list(range(1, steps + 1)):
        raise RuntimeError(f"steps in log.jsonl: expected 1 to {steps}, got {made}")
    if wrong := [step for step in made if losses[step] is None]:
        raise RuntimeError(f"all {steps} steps were made, but the loss is not a number at steps {wrong}")
    print(f"{MARK}steps {after + 1} to {steps}, loss {losses[after + 1]:.4f} to {losses[steps]:.4f}")


def profiled(folder: str) -> None:
    """Profiles three steps of ViT-B on noise."""
    from extrema_fast.tools.profile import profile

    from .step import configuration

    profile(configuration("base", batch=BATCH, color=True), folder, steps=3, synthetic=True)


def every_kernel() -> None:
    """Runs every op's smallest case once, forward and backward."""
    import torch
    from extrema_fast.kernels import tune
    from extrema_fast.kernels._spec import OPS, spec

    for op in OPS:
        case, dtype = spec(op).cases(True)[0], spec(op).dtypes[0]
        tune.run_case(case, case.make("cuda", dtype, torch.Generator("cuda").manual_seed(0)), "ours")


# ---- the command ------------------------------------------------------------------------------------

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
