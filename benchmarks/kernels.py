"""Every op against its plain definition and strong baselines, forward and forward + backward.

python -m benchmarks kernels [--op NAME ...] [--dtype bf16] [--quick]

Correctness first: no time is given for a case whose result is wrong. Providers are timed in turns. On a CPU
the Triton kernels would run in an interpreter, so only the plain definitions are timed there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from extrema_fast.kernels._spec import OPS, Case, spec
from extrema_fast.kernels.tune import DTYPES, is_correct, run_case

from extrema_fast.distributed import pick_device

from . import plots
from .rates import Rates, clock, medians
from .records import heading, new_record, parser, write_record
from .stats import percentiles, ratio, verdict
from .tables import Page, Table

WARMUP = 3


def main(argv: list[str]) -> int:
    """Times every op beside its plain definition and strong baselines; CPU: plain definitions only."""
    p = parser("kernels", main.__doc__)
    p.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--repeats", type=int, default=20)
    p.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    p.add_argument("--device", default="auto")
    args = p.parse_args(argv)
    device = str(pick_device(args.device))
    kind = device.partition(":")[0]
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [(op, case) for op in args.op for case in spec(op).cases(args.quick)]
    if args.list:
        for op, case in cases:
            print(f"  {op:16} {case.label:12} {', '.join(providers(case, kind))}")
        return 0
    rates = Rates(device, [args.dtype])
    sampled, rows, gates = [rates.sample()], [], []
    for op, case in cases:
        found, gate = measure(op, case, DTYPES[args.dtype], kind, args.repeats)
        rows += found
        gates += gate
        sampled.append(rates.sample())
    measured = medians(sampled)
    for row in rows:
        row["of_copy"] = row["gb_per_s"] / measured["copy_gb_per_s"]
    record = new_record(
        f"ops of the project, {args.dtype} on {kind}", "kernels", argv, args.note,
        settings={"dtype": args.dtype, "device": device, "quick": args.quick, "warmup": WARMUP},
        rates=measured, rate_samples=sampled, gates=gates, rows=rows,
    )  # fmt: skip
    write_record(record, page(record), args.name, args.out, plots.roofline)
    return 1 if any(not g["passed"] for g in gates) else 0


def providers(case: Case, kind: str) -> list[str]:
    """Names of what is timed: on a CPU neither the interpreter nor a compiler for each case."""
    return [p for p in case.providers if kind == "cuda" or (p != "ours" and "compiled" not in p)]


def measure(
    op: str, case: Case, dtype: torch.dtype, kind: str, repeats: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row per provider, and the check of ours; no rows where it failed."""
    args = case.make(kind, dtype, torch.Generator(kind).manual_seed(0))
    gates = []
    if kind == "cuda":
        correct, worst = is_correct(case, args, dtype)
        told = f"largest error {worst:.2f} of the allowed"
        gates.append({"name": f"{op} {case.label}", "passed": correct, "found": told})
        if not correct:
            return [], gates
    samples: dict[str, list[float]] = {p: [] for p in providers(case, kind)}
    for i in range(repeats + WARMUP):
        for p in list(samples):
            try:
                ms = clock(lambda p=p: run_case(case, args, p), kind)
            except Exception as error:
                # a baseline that lacks what it needs here is left out, and said so
                print(f"{op} {case.label} {p}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
                del samples[p]
                continue
            if i >= WARMUP:
                samples[p].append(ms)
    moved = case.bytes_fwd + (case.bytes_bwd if case.backward else 0)
    flops = case.flops_fwd + (case.flops_bwd if case.backward else 0)
    rows = []
    for p, values in samples.items():
        row = {
            "key": f"{op} | {case.label} | {p}",
            "op": op,
            "case": case.label,
            "provider": p,
        } | percentiles(values)
        row |= {"gb_per_s": moved / row["p50_ms"] / 1e6, "tflops": flops / row["p50_ms"] / 1e9}
        rows.append(row | {"flop_per_byte": flops / moved if moved else 0, "samples_ms": values})
    return rows, gates


def against(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """How a provider's time stands to ours in the same case: `1.31x, slower`."""
    ours = [r for r in rows if (r["op"], r["case"], r["provider"]) == (row["op"], row["case"], "ours")]
    if not ours or row["provider"] == "ours":
        return "-"
    r = ratio(row["samples_ms"], ours[0]["samples_ms"])
    return f"{r['ratio']:.2f}x, ours {verdict(r)}"


def page(record: dict[str, Any]) -> Page:
    """The record to read."""
    rows, rates = record["rows"], record["rates"]
    out = heading(record)
    product = next(v for k, v in rates.items() if k.startswith("products"))
    out.append(
        f"In the same run: copies {rates['copy_gb_per_s']:.1f} GB/s (read + write), large products "
        f"{product:.3g} TFLOP/s. Bytes are those of the op's budget (its README)."
    )
    out.append(
        Table(
            ["op", "case", "provider", "p20 ms", "p50 ms", "p80 ms", "budget's bytes, % of copy", "TFLOP/s",
             "time against ours"],
            [
                [r["op"], r["case"], r["provider"], *(f"{r[f'p{q}_ms']:.3f}" for q in (20, 50, 80)),
                 f"{100 * r['of_copy']:.0f}", f"{r['tflops']:.3g}", against(r, rows)]
                for r in rows
            ],
        )
    )  # fmt: skip
    wrong = [
        f"* {g['name']}: **wrong result, not timed** ({g['found']})"
        for g in record["gates"]
        if not g["passed"]
    ]
    return [*out, "\n".join(wrong)] if wrong else out
