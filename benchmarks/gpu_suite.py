"""Everything that only a GPU can show, in one command without network: `make gpu-check`.

python -m benchmarks gpu_suite --out FOLDER [--minutes 9] [--only NAME ...] [--tune] [--list]

The parts run one after another, the most valuable first, each a process of its own with its own time limit. A part
that fails, hangs or is killed costs its limit and no more. After every part FOLDER/summary.json and summary.md are
written again; FOLDER/<part>/ holds its log, records and pictures. What the time does not suffice for is skipped and
named. Exit code: 0, 1 when a part failed, 2 without a GPU (then nothing is run or written).
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from extrema_fast.errors import ExtremaError, UsageError
from extrema_fast.files import read_json, write_file

ROOT = Path(__file__).parents[1]
MINUTES = 9.0
# what the summary needs at the end, what a part gets to end by itself, and the least a part is begun with
RESERVE_S, GRACE_S, LEAST_S = 12.0, 5.0, 10.0


@dataclass(frozen=True)
class Part:
    """One process of the suite.

    command  its words; `{out}` stands for the part's folder
    seconds  its limit
    needs    a program that must be on PATH; without it the part is skipped
    optional only when asked for by name (or `--tune`)
    """

    name: str
    about: str
    command: tuple[str, ...]
    seconds: float
    needs: str = ""
    optional: bool = False


def plan() -> list[Part]:
    """The parts, most valuable first."""
    python = sys.executable
    own = (python, "-m", "benchmarks.gpu_suite", "--out", "{out}", "--do")
    pytest = (
        python, "-m", "pytest", "-m", "gpu", "-v", "--durations=10", "--junitxml={out}/junit.xml",
        # an environment without the plugin of our setting for timeouts can run them too
        "-p", "no:cacheprovider", "-o", "addopts=-ra --import-mode=importlib --strict-markers",
    )  # fmt: skip

    def step(
        model: str, mask: str, batch: int, providers: str, seconds: float, about: str, name: str
    ) -> Part:
        command = (
            python, "-m", "benchmarks", "step", "--quick", "--model", model, "--mask", mask, "--batch", str(batch),
            "--providers", *providers.split(), "--out", "{out}", "--name", name,
        )  # fmt: skip
        return Part(name, about, command, seconds)

    loader = (
        python, "-m", "benchmarks", "loader", "--data", "made", "--quick", "--batch", "64", "--device", "cuda",
        "--out", "{out}",
    )  # fmt: skip
    baselines, alone = "released strong ours", "ours ours-cuda-graph"
    modes = "ours ours-compile-none ours-compile-loss ours-cuda-graph"
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    return [
        Part("environment", "GPU, driver, clocks, versions, what is chosen here", (*own, "environment"), 30),
        Part("ceilings", "copies and large matrix products", (*own, "ceilings"), 40),
        step("base", "80x5", 256, baselines, 150, "ViT-B, 80 % x 5: released, strong, ours", "step-base-80x5"),
        Part("tests-step", "tests of the step, attention and optimizers",
             (*pytest, *(f"tests/gpu/test_{n}.py" for n in ("step", "optimizers", "attention", "data"))), 150),
        Part("attention", "self-attention backends, for the table `auto` follows",
             (python, "-m", "benchmarks", "attention", "--models", "S", "B", "--dtypes", "bfloat16", "--repeats",
              "10", "--out", "{out}"), 60),
        step("base", "80x5", 128, modes, 130, "ViT-B: compile modes, CUDA graph", "step-base-modes"),
        step("small", "80x5", 256, baselines, 110, "ViT-S, 80 % x 5: released, strong, ours", "step-small-80x5"),
        Part("tests-kernels", "tests of the kernels", (*pytest, "tests/gpu/test_kernels.py"), 110),
        Part("kernels", "every op beside its definition and baselines",
             (python, "-m", "benchmarks", "kernels", "--repeats", "10", "--out", "{out}"), 70),
        Part("profile", "where the time of a ViT-B step goes",
             (python, "-m", "extrema_fast", "profile", "paper_base_80x5", "--train.batch-size", "256",
              "--synthetic", "--out", "{out}"), 70),
        Part("loader", "the data path: DALI on CPU and GPU beside a DataLoader of PIL, 15 threads",
             (*loader, "--ways", "ours", "ours-gpu", "dataloader", "--stages", "crop", "views", "--threads", "15",
              "--batches", "8", "--rounds", "4"), 150),
        step("base", "90x8", 256, baselines, 120, "ViT-B, 90 % x 8: released, strong, ours", "step-base-90x8"),
        step("small", "90x8", 256, alone, 80, "ViT-S, 90 % x 8: ours, with a CUDA graph", "step-small-90x8"),
        step("base", "80x5", 64, alone, 80, "ViT-B, 64 images: ours, with a CUDA graph", "step-base-batch64"),
        step("base", "80x5", 1024, "ours", 90, "ViT-B, 1024 images: ours", "step-base-batch1024"),
        Part("loader-sweep", "DALI's hardware decoder: its share over threads, decoding and cropping",
             (*loader, "--ways", "ours-gpu", "--stages", "crop", "--sweep", "0", "0.65", "0.9", "--threads", "8", "15",
              "--batches", "8", "--rounds", "3"), 120),
        *(Part(f"sanitizer-{tool}", f"compute-sanitizer's {tool} over one small case of every kernel",
               (*sanitizer, tool, *own, "kernels"), 60, "compute-sanitizer") for tool in ("memcheck", "racecheck")),
        Part("tune", "launch settings of the kernels on this GPU",
             (python, "-m", "extrema_fast", "tune", "--out", "{out}"), 600, optional=True),
        Part("scaling", "how a step grows with batch, views, mask ratio and model",
             (python, "-m", "benchmarks", "step", "--scaling", "--quick", "--model", "base", "--out", "{out}"),
             900, optional=True),
    ]  # fmt: skip


# ---- running ----------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """A signal arrived: the part that runs is ended, the summary written."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted(number)

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(
    parts: Sequence[Part],
    out: Path,
    seconds: float,
    gpu: str,
    say: Callable[[str], None] = print,
    state: Callable[[], Any] = lambda: None,
) -> int:
    """Runs the parts within `seconds` in all; returns the exit code.

    out    a folder that is new or empty
    gpu    its name, for the summary
    state  clocks and temperature, asked for before every part
    raises UsageError for a folder with content
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: exists and is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    summary: dict[str, Any] = {
        "gpu": gpu,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "minutes": round(seconds / 60, 2),
        "state": "running",
        "parts": [
            {
                "name": p.name,
                "about": p.about,
                "state": "waiting",
                "command": shlex.join(words(p, out / p.name)),
            }
            for p in parts
        ],
    }
    code = 0
    with _signals():
        try:
            for i, (part, entry) in enumerate(zip(parts, summary["parts"], strict=True)):
                left = seconds - RESERVE_S - (time.monotonic() - began)
                entry |= {"state": "running", "gpu_state": state()}
                write(summary, out)
                say(f"[{i + 1}/{len(parts)}] {part.name}: {part.about}")
                entry |= run_part(part, out / part.name, min(part.seconds, left))
                try:
                    entry |= found(out / part.name, entry)
                except Exception as error:
                    # a part's odd file must not end the visit
                    entry["found"] = [f"its files cannot be read: {type(error).__name__}: {error}"]
                say(f"        {result(entry)}, {entry.get('seconds', 0):.0f} s")
                for line in entry["found"]:
                    say(f"        {line}")
            summary["state"] = "complete"
        except Interrupted as interrupted:
            for entry in summary["parts"]:
                if entry["state"] == "running":
                    entry |= {"state": "interrupted"}
            summary["state"] = "interrupted"
            code = 128 + interrupted.number
        finally:
            summary["seconds"] = time.monotonic() - began
            write(summary, out)
    failed = [p["name"] for p in summary["parts"] if p["state"] == "failed"]
    skipped = [p["name"] for p in summary["parts"] if p["state"] in ("skipped", "waiting")]
    say(f"{summary['state']} after {summary['seconds']:.0f} s: {out / 'summary.md'}")
    if skipped:
        say(f"not run: {', '.join(skipped)}")
    if failed:
        say(f"FAILED: {', '.join(failed)}")
    return code or (1 if failed else 0)


def words(part: Part, folder: Path) -> list[str]:
    """The command of a part, with its folder put in."""
    return [w.replace("{out}", str(folder)) for w in part.command]


def run_part(part: Part, folder: Path, limit: float) -> dict[str, Any]:
    """One part in a process group of its own: state, why, seconds, limit, exit code, last lines of its log."""
    if part.needs and shutil.which(part.needs) is None:
        return {"state": "skipped", "why": f"{part.needs} is not on PATH"}
    if limit < min(LEAST_S, part.seconds):
        return {"state": "skipped", "why": "no time left"}
    folder.mkdir(parents=True, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONUNBUFFERED": "1"}
    log, began, why, code = folder / "log.txt", time.monotonic(), "", None
    with open(log, "wb") as sink:
        try:
            process = subprocess.Popen(
                words(part, folder), cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=sink,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return {"state": "failed", "why": f"cannot be started: {error}", "seconds": 0.0, "limit": limit}
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            why = f"not ready after {limit:.0f} s"
            if limit < part.seconds:
                why += f" (all that was left; its own limit is {part.seconds:.0f} s)"
        finally:
            # also what it started and left behind, which would disturb the next part
            _end(process)
    if code:
        why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return {
        "state": "failed" if why else "passed",
        "why": why,
        "seconds": time.monotonic() - began,
        "limit": limit,
        "exit_code": code,
        "tail": log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:],
    }


def _end(process: subprocess.Popen) -> None:
    """Ends a process group: asks, waits, kills."""

    def send(number: int) -> bool:
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    if process.poll() is None and send(signal.SIGTERM):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    send(signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        # a process stuck in the driver cannot be reaped: go on without it
        process.wait(GRACE_S)


# ---- what a part has found -------------------------------------------------------------------------


def found(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """`found`: lines that say what a part's files hold; with `state` and `why` where they show a failure."""
    lines, more = [], {}
    for file in sorted(folder.glob("**/record.json")):
        lines += of_record(read_json(file, {}))
    if (folder / "profile.json", {}).is_file():
        p = read_json(folder / "profile.json", {}).get("products", {})
        if p.get("tflops_per_s"):
            lines.append(
                f"matrix products are {100 * p['share']:.0f} % of the step, at {p['tflops_per_s']:.3g} TFLOP/s"
            )
    if (folder / "ceilings.json", {}).is_file():
        rates = read_json(folder / "ceilings.json", {}).get("rates", {})
        lines.append(", ".join(f"{name} {value:.0f}" for name, value in rates.items()))
    if (folder / "junit.xml").is_file():
        counts, failures = of_tests(folder / "junit.xml")
        lines.append(", ".join(f"{n} {word}" for word, n in counts.items() if n))
        lines += [f"FAILED {name}" for name in failures[:20]]
        if entry["state"] == "passed" and not counts["passed"]:
            more = {"state": "failed", "why": "no test has run"}
    return {"found": [line for line in lines if line], **more}


def of_record(record: dict[str, Any]) -> list[str]:
    """A benchmark's record in a few lines: its headline, and images/s where it has them."""
    lines = [": ".join(filter(None, [record.get("what", ""), record.get("headline", "")]))]
    for row in record.get("rows", []):
        if not isinstance(row, dict) or not row.get("images_per_s"):
            continue
        if "way" in row:
            lines.append(
                f"{row['key']}: {row['images_per_s']:.0f} images/s, {row['cpu_ms_per_image']:.2f} ms CPU each"
            )
        elif "provider" in row:
            mfu = f", MFU {100 * row['mfu']:.1f} %" if row.get("mfu") else ""
            peak = f", {row['peak_mb'] / 1024:.1f} GiB" if row.get("peak_mb") else ""
            lines.append(f"{row['provider']}: {row['images_per_s']:.0f} images/s{mfu}{peak}")
    lines += [f"CHECK FAILED {g['name']}" for g in record.get("gates", []) if not g.get("passed", True)]
    return lines


def of_tests(file: Path) -> tuple[dict[str, int], list[str]]:
    """({"passed": ..., "failed": ..., "skipped": ...}, names of failed tests) of a JUnit file."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    try:
        cases = list(xml.parse(file).getroot().iter("testcase"))
    except xml.ParseError:
        return counts, []
    for case in cases:
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            failures.append(f"{case.get('classname', '')}::{case.get('name', '')}")
    return counts, failures


def result(entry: dict[str, Any]) -> str:
    """`passed`, or `failed: why`."""
    return ": ".join(filter(None, [entry["state"], entry.get("why", "")]))


def write(summary: dict[str, Any], out: Path) -> None:
    """summary.json and summary.md, whole at any time."""
    write_file(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_file(out / "summary.md", page(summary, out))


def page(summary: dict[str, Any], out: Path) -> str:
    """The summary to read."""
    lines = [
        f"# GPU visit: {summary['gpu']}",
        "",
        f"{summary['started']}, {summary['state']}, {summary['minutes']:g} minutes allowed"
        + (f", {summary['seconds']:.0f} s taken." if "seconds" in summary else "."),
        "",
        "| part | result | s | what it is |",
        "| --- | --- | --- | --- |",
    ]
    for p in summary["parts"]:
        name = f"[{p['name']}]({p['name']}/log.txt)" if (out / p["name"] / "log.txt").is_file() else p["name"]
        told = f"**{result(p)}**" if p["state"] == "failed" else result(p)
        lines.append(f"| {name} | {told} | {p.get('seconds', 0):.0f} | {p['about']} |")
    for p in summary["parts"]:
        pictures = sorted(f.relative_to(out) for f in (out / p["name"]).glob("**/*.png"))
        records = sorted(f.relative_to(out) for f in (out / p["name"]).glob("*/README.md"))
        if not (p.get("found") or pictures or p["state"] == "failed"):
            continue
        lines += ["", f"## {p['name']}", "", f"`{p['command']}`", ""]
        lines += [f"* {line}" for line in p.get("found", [])]
        lines += [f"* all of it: [{f.parent.name}]({f})" for f in records]
        if p["state"] == "failed" and p.get("tail"):
            lines += ["", "```", *p["tail"], "```"]
        lines += [f"\n![{f.stem}]({f})" for f in pictures]
    lines += [
        "",
        "To keep a record: copy its dated folder into `benchmarks/records/`, then `python -m benchmarks index`; for "
        "attention also `python -m benchmarks attention --write-table --record benchmarks/records/<folder>`.",
    ]
    return "\n".join(lines) + "\n"


# ---- parts of our own, each in a process of its own ------------------------------------------------


def environment(out: Path) -> None:
    """environment.json: machine, versions, what is chosen for this GPU; nvidia-smi.txt: everything it tells."""
    from extrema_fast.ops import dispatch as ops
    from extrema_fast.ops import optimizers

    from .records import machine

    values = machine() | {
        "choices": ops.choices("cuda"),
        "apex": optimizers.find_apex("FusedAdam", "cuda")[1],
    }
    write_file(out / "environment.json", json.dumps(values, indent=1, default=str) + "\n")
    print(json.dumps(values, indent=1, default=str))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=15)
        write_file(out / "nvidia-smi.txt", done.stdout)


def ceilings(out: Path, repeats: int = 30) -> None:
    """ceilings.json: rates of large products and copies, raw and their medians."""
    from .rates import Rates, medians
    from .records import gpu_state

    rates = Rates("cuda", ["bf16", "fp16", "fp32"])
    samples = [rates.sample() for _ in range(repeats)]
    result = {"rates": medians(samples), "samples": samples, "gpu_state": gpu_state()}
    write_file(out / "ceilings.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["rates"], indent=1))


def every_kernel(out: Path) -> None:
    """One small case of every kernel, forward and backward: what compute-sanitizer watches."""
    import torch
    from extrema_fast.kernels import tune
    from extrema_fast.kernels._spec import OPS, spec

    for op in OPS:
        case, dtype = spec(op).cases(True)[0], spec(op).dtypes[0]
        tune.run_case(case, case.make("cuda", dtype, torch.Generator("cuda").manual_seed(0)), "ours")
        torch.cuda.synchronize()
        print(f"{op} {case.label} {dtype}")


OWN = {"environment": environment, "ceilings": ceilings, "kernels": every_kernel}

# ---- the command ------------------------------------------------------------------------------------

_PROBE = """
import sys, torch
if torch.version.cuda is None: sys.exit(f"torch {torch.__version__} is built without CUDA; PyPI has one with it")
if not torch.cuda.is_available(): sys.exit(f"torch {torch.__version__} finds no GPU it can use")
print(torch.cuda.get_device_name(0))
"""


def find_gpu(command: Sequence[str] = (sys.executable, "-c", _PROBE), seconds: float = 120) -> str:
    """Name of the NVIDIA GPU, asked for in another process, since a broken driver can hang it.

    raises UsageError without one
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"no NVIDIA GPU to measure: torch gave no answer in {seconds:.0f} s (see nvidia-smi); nothing was run"
        ) from None
    if done.returncode or not done.stdout.strip():
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"no NVIDIA GPU to measure: {why}; nothing was run")
    return done.stdout.strip().splitlines()[-1]


def chosen(parts: list[Part], only: Sequence[str], skip: Sequence[str], tune: bool) -> list[Part]:
    """The parts asked for; raises UsageError for an unknown name, or when none is left."""
    known = [p.name for p in parts]
    for name in (*only, *skip):
        if name not in known:
            raise UsageError(f"unknown part {name!r}; known: {', '.join(known)}")
    wanted = [
        p
        for p in parts
        if p.name not in skip and (p.name in only if only else not p.optional or (tune and p.name == "tune"))
    ]
    if not wanted:
        raise UsageError("--skip leaves no part to run")
    return wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite on the GPU of this machine."""
    p = argparse.ArgumentParser(prog="python -m benchmarks gpu_suite", description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, metavar="FOLDER", help="new folder (default: runs/gpu-check-<time>)")
    p.add_argument(
        "--minutes", type=float, default=MINUTES, help="time for everything (default: %(default)g)"
    )
    p.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts, in the suite's order")
    p.add_argument("--skip", nargs="+", default=[], metavar="PART")
    p.add_argument("--tune", action="store_true", help="also measure the kernels' launch settings")
    p.add_argument("--list", action="store_true", help="the parts with their limits and commands, then stop")
    p.add_argument("--do", choices=OWN, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.do:
        OWN[args.do](args.out)
        return 0
    if args.minutes <= 0:
        raise UsageError(f"--minutes: expected more than 0, got {args.minutes:g}")
    parts = chosen(plan(), args.only, args.skip, args.tune)
    if args.list:
        for part in parts:
            print(f"{part.name:20} {part.seconds:4.0f} s  {part.about}\n{'':28}{shlex.join(part.command)}")
        return 0
    began, gpu = time.monotonic(), find_gpu()
    from .records import gpu_state

    out = args.out or Path("runs") / f"gpu-check-{datetime.now():%Y-%m-%d-%H%M%S}"
    print(f"{gpu}: {len(parts)} parts, at most {args.minutes:g} minutes, results in {out}", flush=True)
    # finding the GPU counts
    left = 60 * args.minutes - (time.monotonic() - began)
    return run(parts, out.resolve(), left, gpu, _say, gpu_state)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ExtremaError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        sys.exit(2)
