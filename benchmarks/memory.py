"""Peak memory of a step over batch sizes, and what the recomputation options save and cost.

python -m benchmarks memory --model small --batches 8 16 32

Every row is a process of its own, one after another, so that nothing shares its memory.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from extrema_fast.distributed import pick_device
from extrema_fast.errors import UsageError

from . import plots
from .processes import WARMUP, Job, WorkerError, check_gates, check_warmup, measure
from .providers import chosen, configuration
from .records import heading, new_record, parser, write_record
from .stats import percentiles
from .step import parse_mask
from .tables import Page, Table

BATCHES = {"cpu": ([2, 4], [8, 16, 32]), "cuda": ([64, 128], [64, 128, 256, 512, 1024])}
PROVIDERS = ["released", "strong-eager", "ours", "memory"]


def main(argv: list[str]) -> int:
    """Peak memory over batch sizes for released, strong and ours with its recomputation options."""
    p = parser("memory", main.__doc__)
    p.add_argument("--model", choices=("tiny", "small", "base", "large"), default="small")
    p.add_argument("--mask", type=parse_mask, default=(0.8, 5), metavar="80x5")
    p.add_argument("--batches", type=int, nargs="+", default=[])
    p.add_argument("--providers", nargs="+", default=PROVIDERS, metavar="NAME", help="as of `step --list`")
    p.add_argument("--ours", nargs="+", default=[], metavar="OPTION=VALUE")
    p.add_argument("--steps", type=int, default=5, help="timed steps per row")
    p.add_argument("--warmup", type=int, default=-1)
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--device", default="auto")
    args = p.parse_args(argv)
    device = str(pick_device(args.device))
    kind = device.partition(":")[0]
    warmup = WARMUP[kind] if args.warmup < 0 else check_warmup(args.warmup, kind)
    batches = args.batches or BATCHES[kind][0 if args.quick else 1]
    able, unable = chosen(args.providers, device, extra=args.ours)
    if args.list:
        print(f"  batches {batches}; {', '.join(p.name for p in able)}")
        return 0
    jobs = [
        Job(f"{q.name} batch {b}", q, configuration(args.model, *args.mask, b), device, args.threads)
        for b in batches
        for q in able
    ]
    with tempfile.TemporaryDirectory() as folder:
        try:
            _, gates = check_gates(jobs[: len(able)], Path(folder) / "weights.safetensors")
        except WorkerError as error:
            raise UsageError(f"the comparison with the product failed: {error}") from None
    rows, _ = measure(jobs, rounds=1, steps=args.steps, warmup=warmup, together=False, say=_say)
    for row in rows:
        if row.get("samples_ms"):
            row |= percentiles(row["samples_ms"])
    record = new_record(
        f"memory of a step, ViT-{args.model} on {kind}", "memory", argv, args.note,
        settings={"model": args.model, "mask_ratio": args.mask[0], "views": args.mask[1], "device": device,
                  "threads": torch.get_num_threads(), "warmup": warmup},
        gates=gates, not_run=unable, rows=rows, per_image=per_image(rows),
    )  # fmt: skip
    record["headline"] = "; ".join(f"{n} {v:.1f} MB per image" for n, v in record["per_image"].items())
    write_record(record, page(record), args.name, args.out, plots.memory)
    return 1 if any(not g["passed"] for g in gates) else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def per_image(rows: list[dict[str, Any]]) -> dict[str, float]:
    """MB that one more image adds to the peak, per provider: between its smallest and largest batch."""
    found = {}
    for name in dict.fromkeys(r["provider"] for r in rows):
        mine = sorted((r["batch"], r["peak_mb"]) for r in rows if r["provider"] == name and "peak_mb" in r)
        if len(mine) > 1 and mine[-1][0] > mine[0][0]:
            (a, low), (b, high) = mine[0], mine[-1]
            found[name] = (high - low) / (b - a)
    return found


def page(record: dict[str, Any]) -> Page:
    """The record to read."""
    out = heading(record)
    rows = record["rows"]
    base = {r["batch"]: r for r in rows if r["provider"] == "ours" and "p50_ms" in r}
    failed = {g["name"] for g in record["gates"] if not g["passed"]}
    lines = []
    for r in rows:
        if "p50_ms" not in r:
            lines.append([f"`{r['provider']}`", str(r["batch"]), "-", "-", "-", "-", r.get("error", "")])
            continue
        ours = base.get(r["batch"])
        compared = ours is not None and not {r["provider"], "ours"} & failed
        lines.append(
            [f"`{r['provider']}`", str(r["batch"]), r["precision"], f"{r['peak_mb']:.0f}", f"{r['step_adds_mb']:.0f}",
             f"{r['peak_mb'] / ours['peak_mb']:.2f}x" if compared else "-",
             f"{r['p50_ms']:.1f}" + (f" ({r['p50_ms'] / ours['p50_ms']:.2f}x)" if compared else "")]
        )  # fmt: skip
    head = [
        "provider",
        "batch",
        "dtype",
        "peak MB",
        "the step adds MB",
        "peak against ours",
        "p50 ms (against ours)",
    ]
    out.append(Table(head, lines))
    if record["per_image"]:
        told = ", ".join(f"`{n}` {v:.1f}" for n, v in record["per_image"].items())
        out.append(f"MB that one more image adds to the peak: {told}.")
    out.append(
        "Peak after warm-up: resident memory of the process on a CPU, memory allocated by torch on a GPU. *The step "
        "adds*: minus what was there before the first step. Times are taken one row after another and are rougher "
        "than those of `step`."
    )
    if failed:
        out.append(f"**Checks failed**, so nothing is compared with: {', '.join(sorted(failed))}.")
    return out
