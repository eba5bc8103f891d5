"""What every benchmark shares: options, the machine, statistics, records, tables, comparison of two records."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from extrema_fast.distributed import pick_device
from extrema_fast.errors import UsageError
from extrema_fast.files import read_json, write_file

ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).parent / "records"
# packages whose versions can change a result
PACKAGES = (
    "extrema-fast",
    "torch",
    "triton",
    "numpy",
    "timm",
    "transformers",
    "torchvision",
    "xformers",
    "torchao",
    "pillow",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
)
# fewer samples than this give no verdict
FEW = 5
# two identical programs timed one after the other often differ by this share
NOISE = 0.01
Record = dict[str, Any]
Row = dict[str, Any]


def parser(name: str, summary: str | None, *, timed: bool = True) -> argparse.ArgumentParser:
    """Returns the options that every benchmark has; `timed` adds --rounds, --steps, --threads and --device."""
    p = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=summary)
    p.add_argument("--quick", action="store_true", help="fewer or smaller cases")
    p.add_argument(
        "--out", type=Path, default=RECORDS, metavar="FOLDER", help="where the record's folder goes"
    )
    p.add_argument("--name", default=name, help="last part of the record's name (default: %(default)s)")
    p.add_argument("--note", default="", help="for the record's page; its first paragraph also for the index")
    p.add_argument("--list", action="store_true", help="print what would be measured and stop")
    if timed:
        p.add_argument("--rounds", type=int, default=0, help="turns of every provider (0: the default)")
        p.add_argument("--steps", type=int, default=0, help="timed calls per turn (0: the default)")
        p.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's default)")
        p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    return p


def settle(args: argparse.Namespace) -> str:
    """Checks the options of a timed benchmark, sets CPU threads, resolves the device; returns its kind."""
    for name in ("rounds", "steps", "threads"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name}: expected 0 (the default) or more, got {getattr(args, name)}")
    device = pick_device(args.device)
    args.device = str(device)
    if args.threads:
        torch.set_num_threads(args.threads)
    return device.type


def say(text: str) -> None:
    """Prints progress on standard error."""
    print(text, file=sys.stderr, flush=True)


# ---- the machine ----------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Returns processor, threads, memory, GPU, versions and commit of this machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    found = {
        "short": (gpu or f"cpu{torch.get_num_threads()}").lower().replace(" ", "-"),
        "gpu": gpu,
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "versions": {p: installed[p] for p in PACKAGES if p in installed},
    }
    if gpu:
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,temperature.gpu"
        values = output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0").split(",")
        found["cuda"] = torch.version.cuda
        found["gpu_state"] = dict(zip(fields.split(","), (v.strip() for v in values), strict=False))
    return found


def commit() -> str | None:
    """Returns the checked-out commit, with `+` when files differ from it; None outside a repository."""
    status = ("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/records")
    head = output("git", "rev-parse", "--short=12", "HEAD")
    return head + ("+" if output("git", *status) else "") if head else None


def output(*command: str) -> str:
    """Returns what a program prints; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


# ---- statistics -----------------------------------------------------------------------------------


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Returns `{"p20_ms", "p50_ms", "p80_ms"}` of at least one sample in milliseconds."""
    return {f"p{p}_ms": float(np.percentile(samples, p)) for p in (20, 50, 80)}


def speed(row: Row) -> None:
    """Adds percentiles and images/s to a row with `samples_ms` and `batch`."""
    if row.get("samples_ms"):
        row |= percentiles(row["samples_ms"])
        row["images_per_s"] = 1000 * row["batch"] / row["p50_ms"]


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Compares two sets of samples by their medians.

    Args:
        a: milliseconds of the other program.
        b: milliseconds of the program to judge; samples of equal number are resampled in pairs.

    Returns:
        `ratio` (median of `a` over median of `b`), `low` and `high` (95 % bootstrap interval, fixed seed), `samples`
        and `verdict` on `b`: faster, slower, within noise or too few samples.
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    generator = np.random.default_rng(0)
    rows_x = generator.integers(len(x), size=(2000, len(x)))
    rows_y = rows_x if len(x) == len(y) else generator.integers(len(y), size=(2000, len(y)))
    low, high = map(float, np.percentile(np.median(x[rows_x], 1) / np.median(y[rows_y], 1), (2.5, 97.5)))
    count = min(len(x), len(y))
    verdict = "faster" if low > 1 + NOISE else "slower" if high < 1 - NOISE else "within noise"
    verdict = verdict if count >= FEW else "too few samples"
    middle = float(np.median(x) / np.median(y))
    return {"ratio": middle, "low": low, "high": high, "samples": count, "verdict": verdict}


def medians(samples: list[dict[str, float]]) -> dict[str, float]:
    """Returns the median of every key over a list of dictionaries."""
    return {key: float(np.median([s[key] for s in samples])) for key in (samples[0] if samples else ())}


# ---- pages ----------------------------------------------------------------------------------------

# columns of a time and of a ratio
TIMES = ("p20 ms=p20_ms:.2f", "p50 ms=p50_ms:.2f", "p80 ms=p80_ms:.2f")
RATIO = ("ratio=ratio:.3f", "from=low:.2f", "to=high:.2f", "verdict=verdict")


def columns(rows: Iterable[Row], *specs: str) -> str:
    """Returns a markdown table with one line per row.

    Args:
        rows: rows of a record.
        specs: `heading=field` or `heading=field:format`; `a.b` is field b of field a; `-` where there is no value.
    """

    def cell(row: Row, field: str) -> str:
        path, _, form = field.partition(":")
        value: Any = row
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return "-" if value is None else f"{value:{form}}".replace(" | ", ", ")

    heads, _, fields = zip(*(spec.partition("=") for spec in specs), strict=True)
    lines = [heads, ["---"] + ["---:"] * (len(specs) - 1), *([cell(r, f) for f in fields] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def lost(record: Record) -> list[str]:
    """Returns the section of a page that names what could not be measured, and why."""
    lines = [f"* {r['key']}: {r['error']}" for r in record["rows"] if "error" in r]
    lines += [f"* {name}: {why}" for name, why in record.get("not_run", {}).items()]
    return ["## Not measured", "\n".join(lines)] if lines else []


# ---- records --------------------------------------------------------------------------------------


def new_record(what: str, name: str, argv: list[str], note: str = "", **measured: Any) -> Record:
    """Returns a record: question, command, date and machine, then what was measured."""
    at = argv.index("--note") if "--note" in argv else len(argv)  # it stands on the page anyway
    command = "python -m benchmarks " + shlex.join([name, *argv[:at], *argv[at + 2 :]])
    head = {"what": what, "benchmark": name, "command": command, "date": date.today().isoformat()}
    return {**head, "note": note, "machine": machine(), **measured}


def dumps(value: Any) -> str:
    """Returns indented JSON with lists of numbers on one line and floats of six digits."""
    rounded = json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.6g}"))
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda m: " ".join(m[0].split()), json.dumps(rounded, indent=1))


def write_record(record: Record, page: list[str], args: argparse.Namespace) -> Path:
    """Writes <args.out>/<date>_<machine>_<args.name>/ and the index, prints the page, returns the folder.

    The machine's name is left out where its `short` is empty: what was counted is the same on every machine.

    Args:
        record: content of record.json.
        page: paragraphs of README.md after title, machine, note and command.
        args: the options (`parser`); out and name are used.
    """
    m = record["machine"]
    folder = save_record(record, args)
    on = f"{m['gpu']}, CUDA {m['cuda']}" if m["gpu"] else f"{m['cpu']}, {m['threads']} threads"
    line = f"{record['date']}, {on}, torch {m['torch']}, Python {m['python']}, commit {m['commit'] or 'unknown'}."
    head = [f"# {record['what']}", line, record["note"], f"```\n{record['command']}\n```"]
    text = "\n\n".join(filter(None, [*head, *page])) + "\n"
    pictures = f"\n![images per second, peak memory]({BARS})\n" if picture(record, folder) else ""
    (folder / "README.md").write_text(text + pictures, encoding="utf-8")
    write_index(args.out)
    print(f"{text}\nrecord: {folder}")
    return folder


def record_folder(record: Record, args: argparse.Namespace) -> Path:
    """Returns <args.out>/<date>_<machine>_<args.name>."""
    return args.out / "_".join(filter(None, [record["date"], record["machine"]["short"], args.name]))


def save_record(record: Record, args: argparse.Namespace, unfinished: str = "") -> Path:
    """Writes record.json of `write_record` alone, also before everything is measured, and returns its folder.

    Args:
        unfinished: what is still missing, for whoever finds the record of a benchmark that was cut off.
    """
    folder = record_folder(record, args)
    folder.mkdir(parents=True, exist_ok=True)
    content = record | ({"unfinished": unfinished} if unfinished else {})
    write_file(folder / "record.json", dumps(content) + "\n")
    return folder


def read_record(path: Path) -> Record:
    """Reads a record from its file or folder; raises UsageError where there is none."""
    record = read_json(path / "record.json" if path.is_dir() else path)
    if "what" not in record:
        raise UsageError(f"{path}: not a record: it has no `what`; name a folder of benchmarks/records/")
    return record


def write_index(out: Path) -> Path:
    """Writes <out>/README.md with one row per record and returns it."""
    text = "# Records\n\nMade by the commands they name; this page by `python -m benchmarks index`.\n\n"
    text += "| record | what | result, note |\n| --- | --- | --- |\n"
    for file in sorted(out.glob("*/record.json")):
        record, name = read_record(file), file.parent.name
        summary = record["note"].partition("\n\n")[0]
        result = "; ".join(filter(None, [record.get("headline"), summary])).replace(" | ", ", ")
        text += f"| [{name}]({name}/README.md) | {record['what']} | {result} |\n"
    (out / "README.md").write_text(text, encoding="utf-8")
    return out / "README.md"


def index(argv: list[str]) -> int:
    """Writes README.md of the folder of records."""
    p = argparse.ArgumentParser(prog="python -m benchmarks index", description=index.__doc__)
    p.add_argument("--out", type=Path, default=RECORDS, metavar="FOLDER", help="the folder of records")
    print(write_index(p.parse_args(argv).out))
    return 0


BARS = "bars.png"


def picture(record: Record, folder: Path) -> bool:
    """Draws images/s and peak memory of every row; nothing without matplotlib or such rows."""
    rows = [r for r in record.get("rows", []) if "images_per_s" in r][::-1]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not rows:
        return False
    figure = Figure(figsize=(8, 1 + 0.28 * len(rows)), layout="constrained")
    bars = {"images per second": "images_per_s", "peak memory, MB": "peak_mb"}
    for ax, (title, field) in zip(figure.subplots(1, 2, sharey=True), bars.items(), strict=True):
        ax.barh([r["key"] for r in rows], [r.get(field, 0) for r in rows])
        ax.set_title(title, loc="left", fontsize=9)
    figure.savefig(folder / BARS, dpi=100)
    return True


# ---- two records ----------------------------------------------------------------------------------


def compare(argv: list[str]) -> int:
    """Compares two records row by row: ratios with an interval and a verdict on noise."""
    p = argparse.ArgumentParser(prog="python -m benchmarks compare", description=compare.__doc__)
    p.add_argument("a", type=Path, metavar="A", help="a record's folder or file")
    p.add_argument("b", type=Path, metavar="B")
    args = p.parse_args(argv)
    a, b = read_record(args.a), read_record(args.b)
    print("\n\n".join(comparison_page(a, b)))
    return 0 if compared(a, b) else 1


def samples_of(record: Record) -> dict[str, list[float]]:
    """Returns `{row's name: milliseconds}` of every row with raw samples, of old and new records."""
    found: dict[str, list[float]] = {}
    for row in record.get("rows", []):
        name = row.get("key") or " ".join(str(v) for v in row.values() if type(v) in (str, int))
        raw = row.get("samples_ms") or {}
        found |= {f"{name} {p}": v for p, v in raw.items() if v} if isinstance(raw, dict) else {name: raw}
    return found


def compared(a: Record, b: Record) -> list[dict[str, Any]]:
    """Returns one entry per row of both records: `a_ms`, `b_ms`, and `ratio`'s result unless a check failed."""
    left, right = samples_of(a), samples_of(b)
    bad = {c["name"] for r in (a, b) for c in r.get("gates", []) if not c["passed"]}
    found = []
    for name in [n for n in left if n in right]:
        entry = {"name": name, "a_ms": np.median(left[name]), "b_ms": np.median(right[name])}
        failed = {"verdict": "its check failed"}
        found.append(entry | (failed if name in bad else ratio(left[name], right[name])))
    return found


def comparison_page(a: Record, b: Record) -> list[str]:
    """Returns the comparison to read, with what differs between the machines, versions and settings."""
    out = [f"# {a['what']}: A against B (verdict on B)"]
    out += [f"* {n}: {r['date']}, `{r.get('command')}`" for n, r in (("A", a), ("B", b))]
    for part in ("machine", "settings", "rates"):
        old, new = a.get(part, {}), b.get(part, {})
        for key in old | new if part != "machine" else ("cpu", "gpu", "threads", "torch", "commit"):
            x, y = old.get(key), new.get(key)
            # a twentieth is the machine's own unrest
            if x != y and not (part == "rates" and (not x or not y or 0.95 < x / y < 1.05)):
                out.append(f"**Different {part}**: {key} {x} and {y}.")
    rows = compared(a, b)
    out.append(columns(rows, "row=name", "A ms=a_ms:.4g", "B ms=b_ms:.4g", *RATIO))
    alone = samples_of(a).keys() ^ samples_of(b).keys()
    return out + [f"In one of them only: {', '.join(sorted(alone))}."] * bool(alone)
