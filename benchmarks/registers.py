"""Registers and shared memory of every kernel, compiled for four architectures without a GPU.

python -m benchmarks registers
"""

from __future__ import annotations

import json
import sys

from extrema_fast.kernels._spec import OPS
from extrema_fast.kernels.aot import compile_rows

from extrema_fast.errors import UsageError

from .records import RECORDS, parser

FILE = RECORDS / "registers.json"


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
        "",
        "| op | variant | sm_80 | sm_90 | sm_100 | sm_120 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple, dict] = {}
    for name, row in table["rows"].items():
        op, variant, arch = name.split(" | ")
        groups.setdefault((op, variant), {})[arch] = row
    for (op, variant), by in groups.items():
        cells = [f"{by[a]['registers']} / {by[a]['shared']}" for a in ("sm_80", "sm_90", "sm_100", "sm_120")]
        lines.append(f"| {op} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Writes registers.json and registers.md: registers and shared memory of every kernel."""
    p = parser("registers", main.__doc__)
    p.add_argument("--jobs", type=int, default=2)
    args = p.parse_args(argv)
    import triton

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
    kept = ("registers", "shared", "stack", "local")
    table = {"triton": triton.__version__, "rows": {key(r): {k: r[k] for k in kept} for r in rows}}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.name}.json"
    file.write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(page(table), encoding="utf-8")
    print(f"{len(rows)} compiled, no spills: {file.with_suffix('.md')}")
    return 0
