"""Ops next to their plain definitions and strong baselines, self-attention backends, and registers of every kernel.

python -m benchmarks kernels [--op NAME ...] [--dtype bf16] [--quick]
python -m benchmarks attention [--models S B] [--dtypes bf16] [--quick]
python -m benchmarks registers

No time is given for a result that is wrong. On a CPU the Triton kernels would run in an interpreter, so only the plain
definitions are timed there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from extrema_fast.kernels import aot
from extrema_fast.kernels._spec import OPS, Case, spec
from extrema_fast.kernels.tune import is_correct, run_case
from torch import Tensor

from extrema_fast.errors import UsageError
from extrema_fast.ops import dispatch

from . import harness
from .harness import Record, Row, percentiles, say, table
from .processes import DTYPES, Rates, clock

WARMUP = 3
# calls in a graph of the GPU timing
CALLS = 10
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
# heads of a model; tokens -> views per image: a view at 90, 80, 75 and 67 %, and the teacher's whole image
HEADS = {"S": 6, "B": 12, "L": 16}
VIEWS = {19: 8, 39: 5, 49: 4, 64: 3, 196: 1}
HEAD_DIM = 64


def in_turns(calls: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, list[float]]:
    """Returns the milliseconds of each call, in turns; on a GPU each is a CUDA graph, without the time of Python.

    A call that fails is left out, which is printed.
    """
    gpu, ready = device.startswith("cuda"), {}
    for name, call in calls.items():
        try:
            for _ in range(WARMUP):
                call()
            ready[name] = captured(call) if gpu else call
        # a baseline that lacks what it needs here
        except Exception as error:
            say(f"{name}: {type(error).__name__}: {str(error)[:100]}")
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, call in ready.items():
            samples[name] += [ms / (CALLS if gpu else 1) for ms in clock(call, device)]
    return samples


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Returns the replay of a CUDA graph of `CALLS` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay


# ---- ops ------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Times every op next to its plain definition and strong baselines; on a CPU the plain definitions only."""
    p = harness.parser("kernels", main.__doc__)
    p.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    p.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    args = p.parse_args(argv)
    harness.settle(args)
    cases = [(op, case) for op in args.op for case in spec(op).cases(args.quick)]
    if args.list:
        for op, case in cases:
            print(f"  {op:16} {case.label:16} {', '.join(providers(case, args.device))}")
        return 0
    rates = Rates(args.device, [args.dtype])
    sampled, rows, checks = [rates.sample()], [], []
    for op, case in cases:
        found, check = measure(op, case, args)
        rows += found
        checks += check
        sampled.append(rates.sample())
    measured = harness.medians(sampled)
    record = harness.new_record(
        f"ops of the project, {args.dtype} on {args.device.partition(':')[0]}", "kernels", argv, args.note,
        settings={"dtype": args.dtype, "device": args.device, "quick": args.quick, "warmup": WARMUP},
        rates=measured, rate_samples=sampled, gates=checks, rows=rows,
    )  # fmt: skip
    harness.write_record(record, page(record), args)
    return 1 if any(not c["passed"] for c in checks) else 0


def providers(case: Case, device: str) -> list[str]:
    """Returns the names of what is timed: on a CPU neither the interpreter nor a compiler for each case."""
    return [p for p in case.providers if device.startswith("cuda") or (p != "ours" and "compiled" not in p)]


def measure(op: str, case: Case, args: argparse.Namespace) -> tuple[list[Row], list[dict[str, Any]]]:
    """Returns one row per provider, and on a GPU the check of ours; no rows where that failed."""
    kind, dtype = args.device.partition(":")[0], DTYPES[args.dtype]
    inputs, checks = case.make(kind, dtype, torch.Generator(kind).manual_seed(0)), []
    if kind == "cuda":
        correct, worst = is_correct(case, inputs, dtype)
        found = f"largest error {worst:.2f} of the allowed"
        checks.append({"name": f"{op} {case.label}", "passed": correct, "found": found})
        if not correct:
            return [], checks
    calls = {p: (lambda p=p: run_case(case, inputs, p)) for p in providers(case, kind)}
    moved = case.bytes_fwd + (case.bytes_bwd if case.backward else 0)
    flops = case.flops_fwd + (case.flops_bwd if case.backward else 0)
    rows = []
    for p, samples in in_turns(calls, args.device, args.rounds or (5 if args.quick else 20)).items():
        row = {"key": f"{op} | {case.label} | {p}", "op": op, "case": case.label, "provider": p}
        row |= percentiles(samples) | {"samples_ms": samples, "flop_per_byte": flops / moved if moved else 0}
        rows.append(row | {"gb_per_s": moved / row["p50_ms"] / 1e6, "tflops": flops / row["p50_ms"] / 1e9})
    return rows, checks


def page(record: Record) -> list[str]:
    """Returns the record to read."""
    rows, rates = record["rows"], record["rates"]
    for r in rows:
        ours = [o for o in rows if (o["op"], o["case"], o["provider"]) == (r["op"], r["case"], "ours")]
        if ours and r["provider"] != "ours":
            r["against_ours"] = harness.ratio(r["samples_ms"], ours[0]["samples_ms"])
        r["of_copy"] = r["gb_per_s"] / rates["copy_gb_per_s"]
    specs = ("p20 ms=p20_ms:.3f", "p50 ms=p50_ms:.3f", "p80 ms=p80_ms:.3f", "bytes of copy=of_copy:.0%")
    specs += ("TFLOP/s=tflops:.3g", "time of ours=against_ours.ratio:.2f", "ours is=against_ours.verdict")
    rates_text = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in rates.items())
    wrong = [
        f"* {c['name']}: **wrong result, not timed** ({c['found']})"
        for c in record["gates"]
        if not c["passed"]
    ]
    text = f"In the same run: {rates_text}. Bytes are those that must move (README of the op)."
    return [*harness.heading(record), text, harness.columns(rows, "row=key", *specs), *wrong]


# ---- self-attention -------------------------------------------------------------------------------


def attention(argv: list[str]) -> int:
    """Times every self-attention backend on the student's and the teacher's shapes, checked against float64."""
    p = harness.parser("attention", attention.__doc__)
    p.add_argument("--models", nargs="*", choices=list(HEADS), default=list(HEADS))
    p.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=["bf16", "fp32"])
    p.add_argument("--images", type=int, default=0, help="of a batch (default: 256, on a CPU 16)")
    args = p.parse_args(argv)
    harness.settle(args)
    images = args.images or (8 if args.quick else 256 if args.device.startswith("cuda") else 16)
    shapes = [(m, images * views, n, HEADS[m]) for m in args.models for n, views in VIEWS.items()]
    names = [n for n in dispatch.IMPLEMENTATIONS["attention"] if n not in ("auto", "triton")]
    if args.list:
        print("\n".join(f"  {m}: {rows} x {n} tokens x {heads} heads" for m, rows, n, heads in shapes))
        print(f"  dtypes {', '.join(args.dtypes)}; backends {', '.join(names)}")
        return 0
    rows = [
        measure_attention(names, shape, dtype, train, args)
        for dtype in args.dtypes
        for train in (True, False)
        for shape in shapes
    ]
    record = harness.new_record("self-attention backends", "attention", argv, args.note, rows=rows)
    harness.write_record(record, attention_page(record), args)
    return 1 if any(row["wrong"] for row in rows) else 0


def measure_attention(
    names: list[str], shape: tuple[str, int, int, int], dtype: str, train: bool, args: argparse.Namespace
) -> Row:
    """Returns a row: percentiles and raw milliseconds per backend; those in `wrong` have no time."""
    model, rows, n, heads = shape
    generator = torch.Generator(args.device).manual_seed(0)
    qkv = torch.randn(rows, n, 3, heads, HEAD_DIM, device=args.device, generator=generator).to(DTYPES[dtype])
    grad = torch.randn(rows, n, heads, HEAD_DIM, device=args.device, generator=generator).to(DTYPES[dtype])
    qkv.requires_grad_(train)

    def call(name: str, qkv: Tensor = qkv, grad: Tensor = grad) -> list[Tensor]:
        with torch.set_grad_enabled(train):
            out = dispatch.attention(qkv, name)
            return [out.detach(), *(torch.autograd.grad(out, qkv, grad) if train else [])]

    some = slice(0, max(1, min(8, rows)))
    wide = qkv.detach()[some].double().requires_grad_(train)
    exact = call("reference", wide, grad[some].double())
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in ["reference", *(n for n in names if n != "reference")]:
        try:
            got = call(name)
        except (UsageError, RuntimeError) as error:
            missing[name] = str(error).splitlines()[0][:200]
            continue
        gaps = [(g[some].double() - e).abs().max() / e.abs().max() for g, e in zip(got, exact, strict=True)]
        errors[name] = float(torch.stack(gaps).max())
    # twice the plain formula's own error in this dtype, and a floor; `not <=`: NaN is wrong
    limit = 2 * errors["reference"] + torch.finfo(DTYPES[dtype]).eps + 6e-8 * n**0.5
    wrong = [name for name, e in errors.items() if not e <= limit]
    calls = {name: (lambda name=name: call(name)) for name in errors if name not in wrong}
    samples = in_turns(calls, args.device, args.rounds or (5 if args.quick else 20))
    found = {name: percentiles(v) for name, v in samples.items()}
    row: Row = {
        "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype],
        "mode": "train" if train else "inference",
        **{"model": model, "rows": rows, "n": n, "heads": heads, "head_dim": HEAD_DIM},
        "ms": {name: v["p50_ms"] for name, v in found.items()},
        **{"samples_ms": samples, "relative_error": errors, "limit": limit, "wrong": wrong, "unavailable": missing},
    }  # fmt: skip
    say(
        f"{dtype} {row['mode']} {model} {rows} x {n}: {', '.join(f'{k} {v:.3f}' for k, v in row['ms'].items())} ms"
    )
    return row


def attention_page(record: Record) -> list[str]:
    """Returns the record to read: a table per dtype and mode, the fastest in bold."""
    rows = record["rows"]
    out = [
        *harness.heading(record),
        f"Median milliseconds per call, head_dim {HEAD_DIM}, checked against float64.",
    ]
    for dtype, mode in dict.fromkeys((r["dtype"], r["mode"]) for r in rows):
        case = [r for r in rows if (r["dtype"], r["mode"]) == (dtype, mode)]
        names = list(dict.fromkeys(name for r in case for name in (*r["ms"], *r["wrong"])))
        lines = []
        for r in case:
            best = min(r["ms"], key=r["ms"].get)
            texts = {name: f"{ms:.3f}" for name, ms in r["ms"].items()} | dict.fromkeys(r["wrong"], "wrong")
            texts[best] = f"**{texts[best]}**"
            lines.append(
                [f"{r['model']}: {r['rows']} x {r['n']} x {r['heads']}", *(texts.get(n, "") for n in names)]
            )
        passes = "forward + backward" if mode == "train" else "forward"
        out += [f"## {dtype}, {passes}", table(["rows x tokens x heads", *names], lines)]
    reasons = {name: why for r in rows for name, why in r["unavailable"].items()}
    return out + (
        [f"Not measured: {'; '.join(f'{n}: {why}' for n, why in reasons.items())}."] if reasons else []
    )


# ---- registers ------------------------------------------------------------------------------------


def registers(argv: list[str]) -> int:
    """Writes registers.json and registers.md: what each kernel needs on four GPU architectures, without a GPU."""
    p = harness.parser("registers", registers.__doc__, timed=False)
    p.add_argument("--jobs", type=int, default=2, help="compiling processes")
    args = p.parse_args(argv)
    ops = list(OPS)[-1:] if args.quick else list(OPS)
    if args.list:
        print(f"  {', '.join(ops)}")
        return 0
    if args.quick and args.out == harness.RECORDS:
        raise UsageError("--quick: the committed table holds all ops; name another folder with --out")
    import triton

    rows = aot.compile_rows(ops, args.jobs)
    names = [f"{r['op']} | {r['variant']} | sm_{r['arch']}" for r in rows]
    bad = [f"{name}: {problem}" for name, r in zip(names, rows, strict=True) for problem in r["problems"]]
    if bad:
        print("\n".join(bad), file=sys.stderr)
        return 1
    kept = ("registers", "shared", "stack", "local")
    content = {n: {k: r[k] for k in kept if k in r} for n, r in zip(names, rows, strict=True)}
    found = {"triton": triton.__version__, "rows": content}
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / f"{args.name}.json"
    target.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(registers_page(found), encoding="utf-8")
    print(f"{len(rows)} compiled, no spills: {target.with_suffix('.md')}")
    return 0


def registers_page(found: dict[str, Any]) -> str:
    """Returns the table to read, one line per variant."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for name, row in found["rows"].items():
        op, variant, arch = name.split(" | ")
        groups.setdefault((op, variant), {})[arch] = row
    lines = [
        [
            op,
            variant,
            *(f"{by[a]['registers']} / {by[a]['shared']}" if a in by else "-" for a in ARCHITECTURES),
        ]
        for (op, variant), by in groups.items()
    ]
    return "\n\n".join([
        "# Registers of every kernel",
        f"Compiled ahead of time with Triton {found['triton']}, no GPU: `python -m benchmarks registers`. "
        "Registers per thread / shared memory in bytes. No variant spills.",
        table(["op", "variant", *ARCHITECTURES], lines),
    ]) + "\n"  # fmt: skip
