"""Where records go, what machine they were made on, and the page that lists them."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

import extrema_fast

RECORDS = Path(__file__).parent / "records"


def machine() -> dict:
    """What the figures were measured on."""
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
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "extrema_fast": extrema_fast.__version__,
    }


def write_record(record: dict, page: str, name: str) -> None:
    """Writes records/<date>_<machine>_<name>/{record.json, README.md}, the index, and prints the page."""
    folder = RECORDS / f"{record['date']}_{record['machine']['short']}_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(page, encoding="utf-8")
    write_index()
    print(page)


def write_index() -> None:
    """records/README.md: one row per record."""
    rows = []
    for file in sorted(RECORDS.glob("*/record.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        rows.append(
            f"| [{file.parent.name}]({file.parent.name}/README.md) | {record['what']} | {record['note']} |"
        )
    text = "# Records\n\nMade by the commands they name; this page by `python -m benchmarks`.\n\n"
    text += "| record | what | note |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    (RECORDS / "README.md").write_text(text, encoding="utf-8")
