"""Ops next to their plain definitions and strong baselines, self-attention backends, and registers of every kernel.

python -m benchmarks kernels [--op NAME ...] [--dtype bf16] [--quick]
python -m benchmarks attention [--models S B] [--dtypes bf16] [--quick]
python -m benchmarks registers

No time is given for a result that is wrong. On a CPU the Triton kernels would run in an interpreter, so only the plain
definitions are timed there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from extrema_fast.kernels import aot
from extrema_fast.kernels._spec import OPS, Case, spec
from extrema_fast.kernels.tune import capture, is_correct, run_case
from torch import Tensor

from extrema_fast.errors import UsageError
from extrema_fast.ops import dispatch

from . import harness
from .harness import TIMES, Record, Row, columns, percentiles, say
from .processes import DTYPES, Rates, clock

WARMUP = 3
# calls in a graph of the GPU timing
CALLS = 10
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
# heads of a model; tokens -> views per image: a view at 90, 80, 75 and 67 %, and the teacher's whole image
HEADS = {"S": 6, "B": 12, "L": 16}
VIEWS = {19: 8, 39: 5, 49: 4, 64: 3, 196: 1}
HEAD_DIM = 64


def in_turns(calls: Mapping[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Returns the milliseconds of each call, in turns; on a GPU each is a CUDA graph, without the time of Python.

    A call that fails is left out, which is printed.
    """
    device, ready = torch.device(args.device), {}
    gpu = device.type == "cuda"
    for name, call in calls.items():
        try:
            for _ in range(WARMUP):
                call()
            ready[name] = capture(call, calls=CALLS)[0].replay if gpu else call
        # a baseline that lacks what it needs here
        except Exception as error:
            say(f"{name}: {type(error).__name__}: {str(error)[:100]}")
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(args.rounds or (5 if args.quick else 20)):
        for name, call in ready.items():
            samples[name] += [ms / (CALLS if gpu else 1) for ms in clock(call, device)]
    return samples


# ---- ops ------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Times every op next to its plain definition and strong baselines; on a CPU the plain definitions only."""
    p = harness.parser("kernels", main.__doc__)
    p.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    p.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    args = p.parse_args(argv)
    kind = harness.settle(args)
    cases = [(op, case) for op in args.op for case in spec(op).cases(args.quick)]
    if args.list:
        print(
            "\n".join(f"  {op:16} {case.label:16} {', '.join(providers(case, kind))}" for op, case in cases)
        )
        return 0
    rates = Rates(args.device, [args.dtype])
    sampled, rows, checks = [rates.sample()], [], []
    record = harness.new_record(
        f"ops of the project, {args.dtype} on {kind}",
        "kernels",
        argv,
        args.note,
        settings={"dtype": args.dtype, "device": args.device, "quick": args.quick, "warmup": WARMUP},
        rate_samples=sampled,
        gates=checks,
        rows=rows,
    )
    for i, (op, case) in enumerate(cases):
        found, check = measure(op, case, args)
        rows += found
        checks += check
        sampled.append(rates.sample())
        record["rates"] = harness.medians(sampled)
        for row in rows:
            row["of_copy"] = row["gb_per_s"] / record["rates"]["copy_gb_per_s"]
        ours = [row for row in found if row["provider"] == "ours"]
        for row in found:
            if ours and row["provider"] != "ours":
                row["against_ours"] = harness.ratio(row["samples_ms"], ours[0]["samples_ms"])
        harness.save_record(record, args, f"{i + 1} of {len(cases)} cases measured")
    harness.write_record(record, page(record), args)
    return 1 if any(not c["passed"] for c in checks) else 0


def providers(case: Case, kind: str) -> list[str]:
    """Returns the names of what is timed: on a CPU neither the interpreter nor a compiler for each case."""
    return [p for p in case.providers if kind == "cuda" or (p != "ours" and "compiled" not in p)]


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
    calls = {p: partial(run_case, case, inputs, p) for p in providers(case, kind)}
    moved = case.bytes_fwd + (case.bytes_bwd if case.backward else 0)
    flops = case.flops_fwd + (case.flops_bwd if case.backward else 0)
    rows = []
    for p, samples in in_turns(calls, args).items():
        row = {"key": f"{op} | {case.label} | {p}", "op": op, "case": case.label, "provider": p}
        row |= percentiles(samples) | {"samples_ms": samples}
        rows.append(row | {"gb_per_s": moved / row["p50_ms"] / 1e6, "tflops": flops / row["p50_ms"] / 1e9})
    return rows, checks


def page(record: Record) -> list[str]:
    """Returns the record to read."""
    more = ("bytes of copy=of_copy:.0%", "TFLOP/s=tflops:.3g", "time of ours=against_ours.ratio:.2f")
    rates = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in record["rates"].items())
    return [
        f"In the same run: {rates}. Bytes are those that must move (README of the op). No time for a wrong result.",
        columns(record["rows"], "row=key", *TIMES, *more, "ours is=against_ours.verdict"),
        columns(record["gates"], "check=name", "passed=passed", "found=found"),
    ]


# ---- self-attention -------------------------------------------------------------------------------


def attention(argv: list[str]) -> int:
    """Times every self-attention backend on the student's and the teacher's shapes, checked against float64."""
    p = harness.parser("attention", attention.__doc__)
    p.add_argument("--models", nargs="*", choices=list(HEADS), default=list(HEADS))
    p.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=["bf16", "fp32"])
    p.add_argument("--images", type=int, default=0, help="of a batch (default: 256, on a CPU 16)")
    args = p.parse_args(argv)
    kind = harness.settle(args)
    images = args.images or (8 if args.quick else 256 if kind == "cuda" else 16)
    shapes = [(m, images * views, n, HEADS[m]) for m in args.models for n, views in VIEWS.items()]
    names = [n for n in dispatch.IMPLEMENTATIONS["attention"] if n not in ("auto", "triton")]
    if args.list:
        print("\n".join(f"  {m}: {rows} x {n} tokens x {heads} heads" for m, rows, n, heads in shapes))
        print(f"  dtypes {', '.join(args.dtypes)}; backends {', '.join(names)}")
        return 0
    what, rows = "self-attention backends", []
    record = harness.new_record(what, "attention", argv, args.note, rows=rows)
    for dtype, train, shape in itertools.product(args.dtypes, (True, False), shapes):
        rows += measure_attention(names, shape, dtype, train, args)
        harness.save_record(record, args, f"{dtype}, {shape[2]} tokens was the last case measured")
    unable = {r["backend"]: r["error"] for r in rows if "error" in r and not r["wrong"]}
    rows = [r for r in rows if "error" not in r or r["wrong"]]
    record |= {"rows": rows, "not_run": unable}
    timed = [r for r in rows if "p50_ms" in r]
    text = f"Milliseconds per call, head_dim {HEAD_DIM}. A result that is wrong against float64 has no time."
    harness.write_record(record, [text, columns(timed, "row=key", *TIMES), *harness.lost(record)], args)
    return 1 if any(r["wrong"] for r in rows) else 0


def measure_attention(
    names: list[str], shape: tuple[str, int, int, int], dtype: str, train: bool, args: argparse.Namespace
) -> list[Row]:
    """Returns a row per backend; one that is wrong or cannot run has an `error` in place of times."""
    model, rows, n, heads = shape
    generator = torch.Generator(args.device).manual_seed(0)
    qkv = torch.randn(rows, n, 3, heads, HEAD_DIM, device=args.device, generator=generator).to(DTYPES[dtype])
    grad = torch.randn(rows, n, heads, HEAD_DIM, device=args.device, generator=generator).to(DTYPES[dtype])
    qkv.requires_grad_(train)

    def call(name: str, qkv: Tensor = qkv, grad: Tensor = grad) -> list[Tensor]:
        with torch.set_grad_enabled(train):
            out = dispatch.attention(qkv, name)
            return [out.detach(), *(torch.autograd.grad(out, qkv, grad) if train else [])]

    wide = qkv.detach()[:8].double().requires_grad_(train)
    exact = call("reference", wide, grad[:8].double())

    def error(name: str) -> float:
        gaps = [
            (g[:8].double() - e).abs().max() / e.abs().max() for g, e in zip(call(name), exact, strict=True)
        ]
        return float(torch.stack(gaps).max())

    # twice the plain formula's own error in this dtype, and a floor
    limit = 2 * error("reference") + torch.finfo(DTYPES[dtype]).eps + 6e-8 * n**0.5
    case = f"{dtype} | {'train' if train else 'inference'} | {model} {rows} x {n} x {heads}"
    found: dict[str, Row] = {}
    for name in names:
        found[name] = row = {"key": f"{case} | {name}", "backend": name, "limit": limit, "wrong": False}
        try:
            row["relative_error"] = error(name)
        except (UsageError, RuntimeError) as problem:
            row["error"] = str(problem).splitlines()[0][:200]
            continue
        # `not <=`: NaN is wrong
        row["wrong"] = not row["relative_error"] <= limit
        if row["wrong"]:
            row["error"] = f"wrong: {row['relative_error']:.1e}, at most {limit:.1e}"
    calls = {name: partial(call, name) for name, row in found.items() if "error" not in row}
    for name, samples in in_turns(calls, args).items():
        found[name] |= {"samples_ms": samples} | percentiles(samples)
    say(f"{case} ms: " + ", ".join(f"{n} {r['p50_ms']:.3f}" for n, r in found.items() if "p50_ms" in r))
    return list(found.values())


# ---- registers ------------------------------------------------------------------------------------


def registers(argv: list[str]) -> int:
    """Writes registers.json and registers.md: each kernel's machine code on four GPU architectures, without a GPU."""
    p = harness.parser("registers", registers.__doc__, timed=False)
    p.add_argument("--jobs", type=int, default=2, help="compiling processes")
    p.add_argument(
        "--op", nargs="+", choices=OPS, default=OPS, help="make their rows again, keep the others'"
    )
    args = p.parse_args(argv)
    ops = list(OPS)[-1:] if args.quick else list(args.op)
    if args.list:
        print(f"  {', '.join(ops)}")
        return 0
    if args.quick and args.out == harness.RECORDS:
        raise UsageError("--quick: the committed table holds all ops; name another folder with --out")
    import triton

    rows = {f"{r['op']} | {r['variant']} | sm_{r['arch']}": r for r in aot.compile_rows(ops, args.jobs)}
    bad = [f"{name}: {problem}" for name, row in rows.items() for problem in row["problems"]]
    if bad:
        print("\n".join(bad), file=sys.stderr)
        return 1
    kept = ("registers", "shared", "stack", "local", "ctas", "accesses", "wide")
    content = {name: {k: row[k] for k in kept if k in row} for name, row in rows.items()}
    sources = {f"{r['op']} | {r['variant']}": r["source"] for r in rows.values()}
    target = args.out / f"{args.name}.json"
    if target.is_file() and len(ops) < len(OPS):
        old = json.loads(target.read_text(encoding="utf-8"))

        def whole(new: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
            found = new | {k: v for k, v in before.items() if k.partition(" | ")[0] not in ops}
            return dict(sorted(found.items(), key=lambda item: OPS.index(item[0].partition(" | ")[0])))

        content, sources = whole(content, old["rows"]), whole(sources, old["sources"])
    variants: dict[str, Row] = {}
    for name, row in content.items():
        key, _, arch = name.rpartition(" | ")
        entry = f"{row['registers']} / {row['shared']} / {row['ctas']} / {row['wide']} of {row['accesses']}"
        variants.setdefault(key, {"key": key})[arch] = entry
    page = [
        "# Registers of every kernel",
        f"Compiled ahead of time with Triton {triton.__version__}, no GPU: `python -m benchmarks registers`. "
        "Registers of a thread / bytes of shared memory / programs that fit on a multiprocessor / accesses to global "
        "memory of 16 bytes per thread, of all in the machine code (those of a path for ragged ends among them). "
        "No variant spills.",
        columns(variants.values(), "op, variant=key", *(f"{a}={a}" for a in ARCHITECTURES)),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    table = {"triton": triton.__version__, "sources": sources, "rows": content}
    target.write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print(f"{len(rows)} compiled, no spills: {target.with_suffix('.md')}")
    return 0
