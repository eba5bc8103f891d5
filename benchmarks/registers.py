"""Registers, shared memory and access widths of every kernel, compiled for four architectures without a GPU.

python -m benchmarks registers
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from extrema_fast.errors import UsageError

from .records import RECORDS, parser

FILE = RECORDS / "registers.json"


def compile_rows(ops: list[str], jobs: int = 1) -> list[dict]:
    """Rows of `extrema_fast.kernels.aot`, made in a process without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "extrema_fast.kernels.aot", "--jobs", str(jobs), "--json", str(out)]
        done = subprocess.run([*command, "--op", *ops], env=env, capture_output=True, text=True)
        if not out.is_file():
            raise RuntimeError(done.stderr[-2000:] or done.stdout[-2000:])
        return json.loads(out.read_text(encoding="utf-8"))


def key(row: dict) -> str:
    """The name of a row: op, variant, architecture."""
    return f"{row['op']} | {row['variant']} | sm_{row['arch']}"


def page(table: dict) -> str:
    """The table for reading, one line per variant."""
    lines = [
        "# Registers of every kernel",
        "",
        f"Compiled ahead of time with Triton {table['triton']}, no GPU: `python -m benchmarks registers`.",
        "Registers per thread / shared memory in bytes. No variant spills (stack and local memory are 0 everywhere).",
        "Wide: how many of the global loads and stores in the code move 16 bytes or more per thread (sm_90).",
        "",
        "| op | variant | sm_80 | sm_90 | sm_100 | sm_120 | wide loads | wide stores |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple, dict] = {}
    for name, row in table["rows"].items():
        op, variant, arch = name.split(" | ")
        groups.setdefault((op, variant), {})[arch] = row
    for (op, variant), by in groups.items():
        cells = [f"{by[a]['registers']} / {by[a]['shared']}" for a in ("sm_80", "sm_90", "sm_100", "sm_120")]
        wide = by["sm_90"]
        lines.append(
            f"| {op} | {variant} | {' | '.join(cells)} | {wide['wide_loads']} of {wide['loads']} "
            f"| {wide['wide_stores']} of {wide['stores']} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Writes registers.json and registers.md: registers, shared memory, access widths of every kernel."""
    p = parser("registers", main.__doc__)
    p.add_argument("--jobs", type=int, default=2)
    args = p.parse_args(argv)
    import triton
    from extrema_fast.kernels._spec import OPS

    # quick: one op, to see that the compiler works; the committed table is of all
    ops = list(OPS)[:1] if args.quick else list(OPS)
    if args.list:
        print(f"  {', '.join(ops)}")
        return 0
    if args.quick and args.out == RECORDS:
        raise UsageError(
            "registers --quick: the committed table is of all ops; name another folder with --out"
        )
    rows = compile_rows(ops, args.jobs)
    bad = [f"{key(r)}: {p}" for r in rows for p in r["problems"]]
    if bad:
        print("\n".join(bad), file=sys.stderr)
        return 1
    kept = ("registers", "shared", "stack", "local", "loads", "wide_loads", "stores", "wide_stores")
    table = {"triton": triton.__version__, "rows": {key(r): {k: r[k] for k in kept} for r in rows}}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.name}.json"
    file.write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(page(table), encoding="utf-8")
    print(f"{len(rows)} compiled, no spills: {file.with_suffix('.md')}")
    return 0
