"""Self-attention backends side by side, and the table that `auto` follows.

python -m benchmarks attention [--quick] [--dtypes bfloat16 float32] [--models S B L] [--write-table]
python -m benchmarks attention --write-table --record FOLDER ...

Each backend that can run is first compared with float64, forward and gradients; one that is wrong gets no time.
Then all take turns. `--write-table` brings the medians into extrema_fast/attention_table.json, from this record or
from committed ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from extrema_fast.errors import UsageError
from extrema_fast.ops import attention

from .records import RECORDS, heading, new_record, parser, read_record, write_record
from .tables import Page, Table

HEADS = {"demo": 2, "S": 6, "B": 12, "L": 16}
# tokens: views of so many; 12 and 64 are the demo's, 49 and 64 a quarter and a third of 196, the teacher's
VIEWS = {"demo": {12: 5, 64: 1}, "*": {19: 8, 39: 5, 49: 4, 64: 3, 196: 1}}
HEAD_DIM = 64
WARM_UP = 3
# what a graph of the GPU timing repeats
CALLS = 10


class Shape(NamedTuple):
    """`rows` sequences of `n` tokens."""

    model: str
    rows: int
    n: int
    heads: int


Function = Callable[[Tensor], Tensor]


def shapes(models: Sequence[str], images: int) -> list[Shape]:
    """What is measured: views of `images` images, and whole images."""
    return [
        Shape(model, images * views, n, HEADS[model])
        for model in models
        for n, views in VIEWS.get(model, VIEWS["*"]).items()
    ]


def main(argv: list[str]) -> int:
    """Times every self-attention backend on the student's and the teacher's shapes; can write `auto`'s table."""
    args = options(argv)
    if args.record:
        rows = [row for folder in args.record for row in table_rows(read_record(folder), committed(folder))]
        print(f"{write_table(rows)}: {len(rows)} rows")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = args.images or (256 if device.type == "cuda" else 16)
    todo = shapes(args.models or list(HEADS), 8 if args.quick else images)
    dtypes = args.dtypes or (["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"])
    if args.list:
        listing(todo, dtypes, device)
        return 0
    rows = []
    for dtype in dtypes:
        for mode in ("train", "inference"):
            for shape in todo:
                rows.append(
                    measure(shape, getattr(torch, dtype), mode, device, 5 if args.quick else args.repeats)
                )
    record = new_record("self-attention backends", "attention", argv, args.note, rows=rows)
    folder = write_record(record, page(record), args.name, args.out)
    if args.write_table:
        print(f"{write_table(table_rows(record, committed(folder)))}: commit it together with {folder.name}")
    return 1 if any(row["wrong"] for row in rows) else 0


def options(argv: list[str]) -> argparse.Namespace:
    """The command line; UsageError for what does not go together."""
    p = parser("attention", main.__doc__)
    p.add_argument("--models", nargs="*", choices=HEADS, help="default: all")
    p.add_argument("--dtypes", nargs="*", choices=["bfloat16", "float16", "float32"],
                   help="default: bfloat16, on a CPU float32 and bfloat16")  # fmt: skip
    p.add_argument("--images", type=int, default=0, help="of a batch (default: 256, on a CPU 16)")
    p.add_argument("--repeats", type=int, default=20, help="turns per backend")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    p.add_argument(
        "--write-table", action="store_true", help="bring the result into the table `auto` follows"
    )
    p.add_argument("--record", nargs="+", type=Path, metavar="FOLDER", help="with --write-table: measure nothing, "
                   "take committed records, a later one over an earlier one")  # fmt: skip
    args = p.parse_args(argv)
    if args.record and not args.write_table:
        raise UsageError("--record: only with --write-table")
    if args.write_table and args.quick:
        raise UsageError("--write-table: the table takes no --quick measurements; leave out one of the two")
    if args.repeats < 5:
        raise UsageError(f"--repeats: expected at least 5, got {args.repeats}")
    if args.write_table and not args.record and args.out.resolve() != RECORDS.resolve():
        raise UsageError(f"--write-table: the record must be committed, in {RECORDS.name}; leave out --out")
    return args


def listing(todo: list[Shape], dtypes: list[str], device: torch.device) -> None:
    """Prints the shapes and what can run on each, then why the rest cannot."""
    reasons: dict[str, str] = {}
    for dtype in dtypes:
        for s in todo:
            can, cannot = candidates(s, getattr(torch, dtype), True, device)
            reasons |= cannot
            print(f"{dtype} {s.model}: {s.rows} x {s.n} tokens x {s.heads} heads: {', '.join(can)}")
    for name, why in reasons.items():
        print(f"not everywhere {name}: {why}")


# ---- measuring ------------------------------------------------------------------------------------


def candidates(
    s: Shape, dtype: torch.dtype, train: bool, device: torch.device
) -> tuple[dict[str, Function], dict[str, str]]:
    """(functions of qkv by name, why the others cannot run)."""
    can: dict[str, Function] = {}
    cannot: dict[str, str] = {}
    for name, function in attention.BACKENDS.items():
        why = attention.unsupported(name, device, dtype, s.n, HEAD_DIM, train)
        if why:
            cannot[name] = why
            continue
        can[name] = partial(attention.run, name, function, train=train)
    return can, cannot


def measure(s: Shape, dtype: torch.dtype, mode: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """One row of the record: median, p20, p80 and raw milliseconds per backend; `wrong` ones have no time."""
    train = mode == "train"
    generator = torch.Generator(device).manual_seed(0)
    # drawn anew: zeros would draw less power and raise clocks
    qkv = torch.randn(s.rows, s.n, 3, s.heads, HEAD_DIM, device=device, generator=generator)
    grad = torch.randn(s.rows, s.n, s.heads, HEAD_DIM, device=device, generator=generator).to(dtype)
    qkv = qkv.to(dtype).requires_grad_(train)
    can, cannot = candidates(s, dtype, train, device)
    errors = {name: error(function, qkv, grad) for name, function in can.items()}
    # kernels.md section 8: twice the plain formula's own error in this dtype, and a floor
    limit = 2 * errors["reference"] + torch.finfo(dtype).eps + 6e-8 * s.n**0.5
    wrong = [name for name, e in errors.items() if not e <= limit]
    calls = {name: partial(call, can[name], qkv, grad) for name in can if name not in wrong}
    samples = clock_gpu(calls, repeats) if device.type == "cuda" else clock_cpu(calls, repeats)
    row = {
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        **s._asdict(),
        "head_dim": HEAD_DIM,
        "input_mb": qkv.nbytes / 1e6,
        "ms": {name: statistics.median(v) for name, v in samples.items()},
        "p20_ms": {name: statistics.quantiles(v, n=5)[0] for name, v in samples.items()},
        "p80_ms": {name: statistics.quantiles(v, n=5)[3] for name, v in samples.items()},
        "samples_ms": samples,
        "relative_error": errors,
        "limit": limit,
        "wrong": wrong,
        "unavailable": cannot,
    }
    told = ", ".join(f"{name} {ms:.3f}" for name, ms in sorted(row["ms"].items(), key=lambda x: x[1]))
    print(f"{row['dtype']} {mode} {s.model} {s.rows} x {s.n}: {told} ms", file=sys.stderr)
    return row


def call(function: Function, qkv: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Forward, and backward where qkv wants a gradient."""
    if not qkv.requires_grad:
        with torch.no_grad():
            return (function(qkv),)
    out = function(qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, grad)


def error(function: Function, qkv: Tensor, grad: Tensor) -> float:
    """Largest error of result and gradient relative to the largest value, against float64; NaN counts.

    All rows run, as they are timed; first, middle and last ones are compared.
    """
    rows = len(qkv)
    some = sorted(
        {*range(min(8, rows)), *range(rows // 2, min(rows // 2 + 8, rows)), *range(max(0, rows - 8), rows)}
    )
    wide = qkv.detach()[some].double().requires_grad_(qkv.requires_grad)
    exact = call(attention.BACKENDS["reference"], wide, grad[some].double())
    worst = 0.0
    for ours, wanted in zip(call(function, qkv, grad), exact, strict=True):
        gap = float((ours[some].double() - wanted).abs().max() / wanted.abs().max())
        worst = gap if gap != gap else max(worst, gap)
    return worst


def clock_cpu(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds per call, in turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(WARM_UP + repeats):
        for name, function in calls.items():
            began = time.perf_counter()
            function()
            if i >= WARM_UP:
                samples[name].append((time.perf_counter() - began) * 1e3)
    return samples


def clock_gpu(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds per call, in turns, each a replay of a CUDA graph: the time of the kernels, not of Python."""
    graphs = {name: captured(function) for name, function in calls.items()}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(WARM_UP + repeats):
        for name, graph in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= WARM_UP:
                samples[name].append(begin.elapsed_time(end) / CALLS)
    return samples


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of CALLS calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    return graph


# ---- the record's page, and the table -------------------------------------------------------------


def page(record: dict[str, Any]) -> Page:
    """The record to read: one table per dtype and mode, milliseconds, the fastest in bold."""
    rows = record["rows"]
    parts: Page = [
        *heading(record),
        f"Median of {len(next(iter(rows[0]['samples_ms'].values())))} turns after {WARM_UP}, milliseconds per call, "
        f"head_dim {HEAD_DIM}. Checked against float64 before it was timed. `packed`: the same sequences through the "
        "block-diagonal form; it is no candidate of the table.",
    ]
    for dtype, mode in dict.fromkeys((r["dtype"], r["mode"]) for r in rows):
        chosen = [r for r in rows if (r["dtype"], r["mode"]) == (dtype, mode)]
        names = list(dict.fromkeys(name for r in chosen for name in r["ms"]))
        lines = []
        for r in chosen:
            best = min(r["ms"].values())
            cells = [
                f"{r['ms'][x]:.3f}" if x in r["ms"] else "wrong" if x in r["wrong"] else "" for x in names
            ]
            cells = [f"**{c}**" if r["ms"].get(x) == best else c for x, c in zip(names, cells, strict=True)]
            lines.append([f"{r['model']}: {r['rows']} x {r['n']} x {r['heads']}", *cells])
        passes = "forward + backward" if mode == "train" else "forward"
        parts += [f"## {dtype}, {passes}", Table(["rows x tokens x heads", *names], lines)]
    reasons = {name: why for r in rows for name, why in r["unavailable"].items()}
    if reasons:
        parts.append("Not measured: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()) + ".")
    return parts


def committed(folder: Path) -> str:
    """A record's name; UsageError unless it lies in benchmarks/records."""
    if folder.resolve().parent != RECORDS.resolve():
        raise UsageError(
            f"{folder}: the table takes records of benchmarks/{RECORDS.name} only, which are committed"
        )
    return folder.name


def table_rows(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Rows of attention_table.json: per device, dtype, head_dim, n and mode every shape's medians, and the winner.

    Records without a mode are of forward + backward at head_dim 64.
    """
    device = record["machine"]["gpu"] or "cpu"
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in record["rows"]:
        key = (r["dtype"], r.get("head_dim", HEAD_DIM), r.get("mode", "train"), r["n"])
        ms = {x: round(v, 4) for x, v in r["ms"].items() if x in attention.BACKENDS}
        groups.setdefault(key, []).append({"rows": r["rows"], "heads": r["heads"], "ms": ms})
    rows = []
    for (dtype, head_dim, mode, n), measured in sorted(groups.items()):
        default = attention.fallback("cuda" if record["machine"]["gpu"] else "cpu", getattr(torch, dtype))
        backend = attention.ranking(measured, default)[0]
        rows.append(
            {"device": device, "dtype": dtype, "head_dim": head_dim, "mode": mode, "n": n, "backend": backend,
             "record": name, "shapes": measured}
        )  # fmt: skip
    return rows


def write_table(rows: list[dict[str, Any]], file: Path) -> Path:
    """Puts the rows into the table, over those of the same device, dtype, head_dim, mode and n."""

    def key(row: dict[str, Any]) -> tuple:
        return row["device"], row["dtype"], row["head_dim"], row["mode"], row["n"]

    old = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    merged = {key(row): row for row in [*old, *rows]}
    lines = ",\n".join(" " + json.dumps(merged[k]) for k in sorted(merged))
    about = "made by `python -m benchmarks attention --write-table` from benchmarks/records; milliseconds"
    file.write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")
    attention.table.cache_clear()
    return file
