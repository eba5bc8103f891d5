"""What every benchmark shares: options, the machine, statistics, records, tables, plots, comparison of records."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import extrema_fast
from extrema_fast.distributed import pick_device
from extrema_fast.errors import UsageError

ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).parent / "records"
# packages whose versions can change a result
PACKAGES = ("torch", "triton", "numpy", "timm", "transformers", "torchvision", "xformers", "torchao", "pillow",
            "nvidia-dali-cuda130", "nvidia-dali-cuda120")  # fmt: skip
# fewer samples than this give no interval
FEW = 5
# two identical programs timed one after the other often differ by this share
NOISE = 0.01
Record = dict[str, Any]
Row = dict[str, Any]


def parser(name: str, summary: str | None, *, timed: bool = True) -> argparse.ArgumentParser:
    """Returns the options that every benchmark has.

    Args:
        name: the sub-command; also the default for the last part of the record's name.
        summary: shown by --help.
        timed: adds --rounds, --steps, --threads and --device.
    """
    p = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=summary)
    p.add_argument("--quick", action="store_true", help="fewer or smaller cases")
    p.add_argument(
        "--out", type=Path, default=RECORDS, metavar="FOLDER", help="where the record's folder is created"
    )
    p.add_argument("--name", default=name, help="last part of the record's name (default: %(default)s)")
    p.add_argument("--note", default="", help="a line for the record's page and the index")
    p.add_argument("--list", action="store_true", help="print what would be measured and stop")
    if timed:
        p.add_argument("--rounds", type=int, default=0, help="turns of every provider (0: the default)")
        p.add_argument("--steps", type=int, default=0, help="timed calls per turn (0: the default)")
        p.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's default)")
        p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    return p


def settle(args: argparse.Namespace) -> None:
    """Checks the options of `parser` for timed benchmarks, sets CPU threads, and resolves the device.

    Raises:
        UsageError: a negative number, or a device that is not there.
    """
    for name in ("rounds", "steps", "threads"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name}: expected 0 (the default) or more, got {getattr(args, name)}")
    args.device = str(pick_device(args.device))
    if args.threads:
        torch.set_num_threads(args.threads)


def say(text: str) -> None:
    """Prints progress on standard error."""
    print(text, file=sys.stderr, flush=True)


# ---- the machine ----------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Returns processor, threads, memory, GPU, versions and commit of this machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return {
        "short": (gpu or f"cpu{torch.get_num_threads()}").lower().replace(" ", "-"),
        "gpu": gpu,
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "extrema_fast": extrema_fast.__version__,
        "commit": commit(),
        "versions": {p: v for p in PACKAGES if (v := _version(p))},
        **({"cuda": torch.version.cuda, "gpu_state": gpu_state()} if gpu else {}),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Returns the checked-out commit, with `+` when files differ from it; None outside a repository."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/records"
        )
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def gpu_state() -> dict[str, str] | None:
    """Returns driver, clocks, power and temperature from nvidia-smi; None without it."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields.split(","), (v.strip() for v in done.stdout.split(",")), strict=False))


# ---- statistics -----------------------------------------------------------------------------------


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Returns `{"p20_ms", "p50_ms", "p80_ms"}` of at least one sample in milliseconds."""
    return {
        f"p{p}_ms": float(v) for p, v in zip((20, 50, 80), np.percentile(samples, (20, 50, 80)), strict=True)
    }


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
    low, high = np.percentile(np.median(x[rows_x], 1) / np.median(y[rows_y], 1), (2.5, 97.5))
    verdict = "faster" if low > 1 + NOISE else "slower" if high < 1 - NOISE else "within noise"
    count = min(len(x), len(y))
    return {
        "ratio": float(np.median(x) / np.median(y)), "low": float(low), "high": float(high), "samples": count,
        "verdict": verdict if count >= FEW else "too few samples",
    }  # fmt: skip


def ratio_cells(r: dict[str, Any]) -> list[str]:
    """Returns the ratio, its interval and the verdict as cells of a table."""
    return [f"**{r['ratio']:.2f}x**", f"{r['low']:.2f} to {r['high']:.2f}", r["verdict"]]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns the exponent p of the least-squares fit y ~ x^p."""
    return float(np.polyfit(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), 1)[0])


def medians(samples: list[dict[str, float]]) -> dict[str, float]:
    """Returns the median of every key over a list of dictionaries."""
    return {key: float(np.median([s[key] for s in samples])) for key in (samples[0] if samples else ())}


# ---- pages ----------------------------------------------------------------------------------------


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Returns a markdown table; columns after the first are aligned right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(page: str) -> None:
    """Prints a markdown page: rendered by rich on a terminal, as it is elsewhere or without rich."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.markdown import Markdown
        except ImportError:
            pass
        else:
            Console().print(Markdown(page))
            return
    print(page)


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

    split = [spec.partition("=") for spec in specs]
    return table(
        [head for head, _, _ in split], [[cell(row, field) for _, _, field in split] for row in rows]
    )


def lost(record: Record) -> list[str]:
    """Returns the section of a page that names what could not be measured, and why."""
    lines = [f"* {r['key']}: {r['error']}" for r in record["rows"] if "error" in r]
    lines += [f"* {name}: {why}" for name, why in record.get("not_run", {}).items()]
    return ["## Not measured", "\n".join(lines)] if lines else []


# ---- records --------------------------------------------------------------------------------------


def new_record(what: str, name: str, argv: list[str], note: str = "", **measured: Any) -> Record:
    """Returns a record: question, command, date and machine, then what was measured."""
    command = " ".join(["python -m benchmarks", name, *argv])
    head = {
        "what": what,
        "benchmark": name,
        "command": command,
        "date": date.today().isoformat(),
        "note": note,
    }
    return {**head, "machine": machine(), **measured}


def heading(record: Record) -> list[str]:
    """Returns the first paragraphs of a record's page: title, machine, note, command."""
    m = record["machine"]
    on = f"{m['gpu']}, CUDA {m['cuda']}" if m["gpu"] else f"{m['cpu']}, {m['threads']} threads"
    line = f"{record['date']}, {on}, torch {m['torch']}, Python {m['python']}, commit {m.get('commit') or 'unknown'}."
    return [f"# {record['what']}", line, *filter(None, [record["note"]]), f"```\n{record['command']}\n```"]


def dumps(value: Any) -> str:
    """Returns indented JSON with lists of numbers on one line and floats of six digits."""

    def rounded(v: Any) -> Any:
        if isinstance(v, float):
            return float(f"{v:.6g}")
        if isinstance(v, dict):
            return {k: rounded(x) for k, x in v.items()}
        return [rounded(x) for x in v] if isinstance(v, (list, tuple)) else v

    def one_line(m: re.Match) -> str:
        return re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]")

    return re.sub(r"\[[\s\d.,eE+\-]+\]", one_line, json.dumps(rounded(value), indent=1))


def write_record(record: Record, page: list[str], args: argparse.Namespace) -> Path:
    """Writes <args.out>/<date>_<machine>_<args.name>/ and the index, and prints the page.

    Args:
        record: content of record.json.
        page: paragraphs of README.md.
        args: the options (`parser`); out and name are used.

    Returns:
        The record's folder.
    """
    folder = args.out / f"{record['date']}_{record['machine']['short']}_{args.name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(dumps(record) + "\n", encoding="utf-8")
    text = "\n\n".join(page) + "\n"
    pictures = "".join(f"\n![{Path(p).stem}]({p})\n" for p in picture(record, folder))
    (folder / "README.md").write_text(text + pictures, encoding="utf-8")
    write_index(args.out)
    show(text)
    print(f"record: {folder}")
    return folder


def read_record(path: Path) -> Record:
    """Reads a record from its file or folder.

    Raises:
        UsageError: there is none.
    """
    file = path / "record.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path}: no record there ({error.strerror}); name a folder of {RECORDS.name}/"
        ) from None
    except ValueError as error:
        raise UsageError(f"{file}: not a record ({error})") from None
    if not isinstance(record, dict) or "what" not in record:
        raise UsageError(f"{file}: not a record: it has no `what`")
    return record


def write_index(out: Path) -> Path:
    """Writes <out>/README.md with one row per record and returns it."""
    rows = []
    for file in sorted(out.glob("*/record.json")):
        record = read_record(file)
        result = "; ".join(p for p in (record.get("headline", ""), record["note"]) if p)
        rows.append(f"| [{file.parent.name}]({file.parent.name}/README.md) | {record['what']} | {result} |")
    text = "# Records\n\nMade by the commands they name; this page by `python -m benchmarks index`.\n\n"
    text += "| record | what | result, note |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    (out / "README.md").write_text(text, encoding="utf-8")
    return out / "README.md"


def index(argv: list[str]) -> int:
    """Writes README.md of the folder of records."""
    p = argparse.ArgumentParser(prog="python -m benchmarks index", description=index.__doc__)
    p.add_argument("--out", type=Path, default=RECORDS, metavar="FOLDER", help="the folder of records")
    print(write_index(p.parse_args(argv).out))
    return 0


# ---- plots ----------------------------------------------------------------------------------------

COLORS = {"released": "#9aa0a6", "ours": "#d9542b"}


def picture(record: Record, folder: Path) -> list[str]:
    """Draws bars.png: images/s (with p20 to p80) and peak memory of every row.

    Returns:
        The file's name in a list; empty without matplotlib or such rows.
    """
    rows = [r for r in record.get("rows", []) if "images_per_s" in r][::-1]
    try:
        import matplotlib
    except ImportError:
        return []
    if not rows:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with_memory = [r for r in rows if r.get("peak_mb")]
    size = (8, 1 + 0.28 * len(rows))
    figure, axes = plt.subplots(1, 1 + bool(with_memory), figsize=size, sharey=True, squeeze=False)
    labels = [r["key"] for r in rows]
    colors = [next((c for k, c in COLORS.items() if name.startswith(k)), "#5b8def") for name in labels]
    speed = [r["images_per_s"] for r in rows]
    ends = [[abs(1000 * r["batch"] / r[f"p{q}_ms"] - r["images_per_s"]) for r in rows] for q in (80, 20)]
    axes[0, 0].barh(labels, speed, xerr=ends, color=colors, error_kw={"lw": 1, "ecolor": "#333333"})
    axes[0, 0].set_title("images per second", loc="left", fontsize=9)
    if with_memory:
        axes[0, 1].barh(labels, [r.get("peak_mb", 0) / 1024 for r in rows], color=colors)
        axes[0, 1].set_title("peak memory, GiB", loc="left", fontsize=9)
    for ax in axes.flat:
        ax.grid(axis="x", lw=0.5, color="#dddddd")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(record["what"], x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(folder / "bars.png", dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return ["bars.png"]


# ---- two records ----------------------------------------------------------------------------------


def compare(argv: list[str]) -> int:
    """Compares two records row by row: ratios with an interval and a verdict on noise."""
    p = argparse.ArgumentParser(prog="python -m benchmarks compare", description=compare.__doc__)
    p.add_argument("a", type=Path, metavar="A", help="a record's folder or file")
    p.add_argument("b", type=Path, metavar="B")
    args = p.parse_args(argv)
    a, b = read_record(args.a), read_record(args.b)
    show("\n\n".join(comparison_page(a, b)))
    return 0 if compared(a, b) else 1


def samples_of(record: Record) -> dict[str, list[float]]:
    """Returns `{row's name: milliseconds}` of every row with raw samples, of old and new records."""
    found: dict[str, list[float]] = {}
    for row in record.get("rows", []):
        name = row.get("key") or " ".join(
            str(v) for v in row.values() if isinstance(v, (str, int)) and not isinstance(v, bool)
        )
        raw = row.get("samples_ms")
        if isinstance(raw, dict):
            found |= {f"{name} {provider}": values for provider, values in raw.items() if values}
        elif raw:
            found[name] = raw
    return found


def compared(a: Record, b: Record) -> list[dict[str, Any]]:
    """Returns one entry per row of both records: `a_ms`, `b_ms`, and `ratio`'s result unless a check failed."""
    left, right = samples_of(a), samples_of(b)
    bad = {c["name"] for r in (a, b) for c in r.get("gates", []) if not c["passed"]}
    return [
        {"name": n, "a_ms": left[n], "b_ms": right[n]} | ({} if n in bad else ratio(left[n], right[n]))
        for n in left
        if n in right
    ]


def comparison_page(a: Record, b: Record) -> list[str]:
    """Returns the comparison to read, with warnings about different machines, versions and settings."""
    out = [f"# {a['what']}: A against B"]
    for name, r in (("A", a), ("B", b)):
        m = r.get("machine", {})
        out.append(f"* {name}: {r['date']}, {m.get('gpu') or m.get('cpu')}, {m.get('threads')} threads, torch "
                   f"{m.get('torch')}, commit {m.get('commit', 'unknown')}: `{r.get('command')}`")  # fmt: skip
    for key in ("cpu", "gpu", "threads", "torch"):
        x, y = (r.get("machine", {}).get(key) for r in (a, b))
        if x != y:
            out.append(f"**Different {key}**: {x} and {y}; the ratios compare machines, not programs.")
    old, new = a.get("settings", {}), b.get("settings", {})
    changed = [f"{k} {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k)]
    if changed:
        out.append(f"**Different settings**: {', '.join(changed)}.")
    for key, x in a.get("rates", {}).items():
        y = b.get("rates", {}).get(key)
        if y and not 0.95 < x / y < 1.05:
            out.append(f"**The machine itself was not equally fast**: {key} {x:.4g} and {y:.4g}.")
    rows = []
    for c in compared(a, b):
        middle = [f"{np.median(c[k]):.4g}" for k in ("a_ms", "b_ms")]
        if "ratio" not in c:
            rows.append([c["name"], *middle, "-", "-", "its check failed"])
            continue
        interval = f"{c['low']:.3f} to {c['high']:.3f}"
        rows.append([c["name"], *middle, f"**{c['ratio']:.3f}**", interval, f"B is {c['verdict']}"])
    head = ["row", "A ms", "B ms", "A / B", "95 % interval", "verdict"]
    out.append(table(head, rows) if rows else "**No row is in both records.**")
    for name, one, other in (("A", a, b), ("B", b, a)):
        alone = [r for r in samples_of(one) if r not in samples_of(other)]
        if alone:
            out.append(f"Only in {name}: {', '.join(alone)}.")
    return out
