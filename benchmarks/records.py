"""Where records go, what machine they were made on, and the page that lists them."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import extrema_fast
from extrema_fast.errors import UsageError

from .tables import Page, markdown, show

RECORDS = Path(__file__).parent / "records"
# whose versions can change a figure
PACKAGES = ("torch", "triton", "numpy", "timm", "xformers", "torchao", "nvidia-dali-cuda130",
            "nvidia-dali-cuda120", "pillow")  # fmt: skip


def parser(name: str, summary: str | None) -> argparse.ArgumentParser:
    """The options every benchmark has; it adds its own."""
    p = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=summary)
    p.add_argument("--quick", action="store_true", help="the short form: minutes, or tiny sizes")
    p.add_argument(
        "--out", type=Path, default=RECORDS, metavar="FOLDER", help="where the record's folder goes"
    )
    p.add_argument("--name", default=name, help="last part of the record's name (default: %(default)s)")
    p.add_argument("--note", default="", help="a line for the record's page and the index")
    p.add_argument("--list", action="store_true", help="what would be measured here, then stop")
    return p


# ---- the machine ----------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures were measured on: processor, threads, memory, GPU, versions, commit."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (r.split(":")[1].strip() for r in info.read_text().splitlines() if r.startswith("model name")),
            cpu,
        )
    short = (gpu or f"cpu{torch.get_num_threads()}").lower().replace(" ", "-")
    return {
        "short": short,
        "gpu": gpu,
        "cpu": cpu,
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
    """The commit the figures belong to, with `+` when files differ from it; None outside a repository."""

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/records"
        )
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks, power and temperature as nvidia-smi tells them; None without it."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields.split(","), (v.strip() for v in done.stdout.split(",")), strict=False))


# ---- writing --------------------------------------------------------------------------------------


def new_record(what: str, name: str, argv: list[str], note: str = "", **more: Any) -> dict[str, Any]:
    """A record's head: question, command, date, machine; `more` is what was measured."""
    return {
        "what": what,
        "benchmark": name,
        "command": " ".join(["python -m benchmarks", name, *argv]),
        "date": date.today().isoformat(),
        "note": note,
        "machine": machine(),
        **more,
    }


def heading(record: dict[str, Any]) -> Page:
    """The first paragraphs of a record's page: title, machine, note, command."""
    m = record["machine"]
    on = f"{m['gpu']}, CUDA {m['cuda']}" if m["gpu"] else f"{m['cpu']}, {m['threads']} threads"
    line = f"{record['date']}, {on}, torch {m['torch']}, Python {m['python']}"
    line += f", commit {m['commit']}." if m.get("commit") else "."
    page: Page = [f"# {record['what']}", line]
    if record["note"]:
        page.append(record["note"])
    return [*page, f"```\n{record['command']}\n```"]


def dumps(value: Any) -> str:
    """Indented JSON with lists of numbers on one line, and floats of six digits."""

    def rounded(v: Any) -> Any:
        if isinstance(v, float):
            return float(f"{v:.6g}")
        if isinstance(v, dict):
            return {k: rounded(x) for k, x in v.items()}
        return [rounded(x) for x in v] if isinstance(v, (list, tuple)) else v

    text = json.dumps(rounded(value), indent=1)
    return re.sub(
        r"\[[\s\d.,eE+\-]+\]", lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"), text
    )


def write_record(
    record: dict[str, Any],
    page: Page | str,
    name: str,
    out: Path | None = None,
    plots: Callable[[dict[str, Any], Path], list[str]] | None = None,
) -> Path:
    """Writes <out>/<date>_<machine>_<name>/{record.json, README.md, *.png} and the index; prints the page.

    out      default: benchmarks/records
    plots    (record, folder) -> names of the pictures written there, which the page then shows
    returns  the record's folder
    """
    out = out or RECORDS
    folder = out / f"{record['date']}_{record['machine']['short']}_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(dumps(record) + "\n", encoding="utf-8")
    pictures = "".join(f"\n![{Path(p).stem}]({p})\n" for p in (plots(record, folder) if plots else []))
    (folder / "README.md").write_text(markdown(page) + pictures, encoding="utf-8")
    write_index(out)
    show(page)
    print(f"record: {folder}")
    return folder


def read_record(path: Path) -> dict[str, Any]:
    """A record, from its file or folder; raises UsageError when there is none."""
    file = path / "record.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: no record there ({error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"{file}: not a record ({error})") from None
    if not isinstance(record, dict) or "what" not in record:
        raise UsageError(f"{file}: not a record: it has no `what`")
    return record


def write_index(out: Path | None = None) -> Path:
    """<out>/README.md: one row per record; returns the file."""
    out = out or RECORDS
    rows = []
    for file in sorted(out.glob("*/record.json")):
        record = read_record(file)
        told = "; ".join(p for p in (record.get("headline", ""), record["note"]) if p)
        rows.append(f"| [{file.parent.name}]({file.parent.name}/README.md) | {record['what']} | {told} |")
    text = "# Records\n\nMade by the commands they name; this page by `python -m benchmarks index`.\n\n"
    text += "| record | what | result, note |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    (out / "README.md").write_text(text, encoding="utf-8")
    return out / "README.md"
