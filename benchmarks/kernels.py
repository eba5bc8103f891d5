"""Every op against its plain definition and strong baselines, forward and forward + backward.

python -m benchmarks kernels [--op NAME ...] [--dtype bf16] [--quick]

Correctness first: no time is printed for a case whose result is wrong. Providers are timed in turns. On a CPU
the Triton kernels would run in an interpreter, so only the plain definitions are timed there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import date

import torch
from extrema_fast.kernels._spec import OPS, Case, spec
from extrema_fast.kernels.tune import DTYPES, is_correct, run_case

from .records import machine, write_record


def main(argv: list[str]) -> int:
    """Times every op beside its plain definition and strong baselines; CPU: plain definitions only."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=main.__doc__)
    parser.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--name", default="kernels")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copy = copy_gb_per_s(device)
    rows = []
    for op in args.op:
        for case in spec(op).cases(args.quick):
            rows += measure(op, case, DTYPES[args.dtype], device, args.repeats, copy)
    record = {
        "what": "kernels, forward and backward",
        "command": "python -m benchmarks kernels " + " ".join(argv),
        "date": date.today().isoformat(),
        "note": f"{args.dtype} on {device}; copy {copy:.0f} GB/s",
        "machine": machine(),
        "copy_gb_per_s": copy,
        "rows": rows,
    }
    write_record(record, page(record), args.name)
    return 0


def clock(function, device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    began = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - began)


def copy_gb_per_s(device: str) -> float:
    """Read + write rate of a large copy, measured here and now."""
    source = torch.empty(2**29 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [clock(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * source.numel() / statistics.median(times) / 1e6


def measure(op: str, case: Case, dtype: torch.dtype, device: str, repeats: int, copy: float) -> list[dict]:
    """One row per provider: p20, p50, p80 in ms; `wrong` instead where ours differs from the definition."""
    args = case.make(device, dtype, torch.Generator(device).manual_seed(0))
    providers = [p for p in case.providers if device == "cuda" or (p != "ours" and "compiled" not in p)]
    if device == "cuda" and not is_correct(case, args, dtype)[0]:
        return [{"op": op, "case": case.label, "provider": "ours", "wrong": True}]
    times: dict[str, list[float]] = {p: [] for p in providers}
    for i in range(repeats + 3):
        for p in list(times):
            try:
                ms = clock(lambda p=p: run_case(case, args, p), device)
            except Exception as error:
                print(f"{op} {case.label} {p}: {type(error).__name__}: {str(error)[:100]}")
                del times[p]
                continue
            if i >= 3:
                times[p].append(ms)
    moved = case.bytes_fwd + (case.bytes_bwd if case.backward else 0)
    rows = []
    for p, values in times.items():
        p20, p50, p80 = (
            statistics.quantiles(values, n=5)[0],
            statistics.median(values),
            statistics.quantiles(values, n=5)[3],
        )
        rate = moved / p50 / 1e6
        rows.append(
            {
                "op": op, "case": case.label, "provider": p, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
                "gb_per_s": rate, "of_copy": rate / copy, "samples_ms": values,
            }
        )  # fmt: skip
    return rows


def page(record: dict) -> str:
    """The record as a table."""
    lines = [
        f"# {record['what']}",
        "",
        f"`{record['command']}`, {record['date']}, {record['machine']['gpu'] or record['machine']['cpu']}, "
        f"torch {record['machine']['torch']}; copy {record['copy_gb_per_s']:.0f} GB/s in the same run.",
        "",
        "| op | case | provider | p20 ms | p50 ms | p80 ms | budget's bytes, % of copy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in record["rows"]:
        if r.get("wrong"):
            lines.append(f"| {r['op']} | {r['case']} | ours | wrong result: not timed | | | |")
            continue
        lines.append(
            f"| {r['op']} | {r['case']} | {r['provider']} | {r['p20_ms']:.3f} | {r['p50_ms']:.3f} "
            f"| {r['p80_ms']:.3f} | {100 * r['of_copy']:.0f} |"
        )
    return "\n".join(lines) + "\n"
