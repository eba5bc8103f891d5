"""`python -m benchmarks step --scaling`: how the product's step grows with batch, views, mask ratio and model."""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import pairwise
from typing import Any

import torch

from extrema_fast.config import Config, to_dict
from extrema_fast.training.plan import flops_per_image

from . import plots
from .processes import Job, Worker, WorkerError, measure
from .providers import PROVIDERS, configuration
from .records import heading, new_record, write_record
from .stats import percentiles, slope
from .tables import Page, Table

# values along each axis: quick, and otherwise
BATCHES = {"cpu": ([2, 4, 8], [4, 8, 16, 32]), "cuda": ([64, 128, 256], [32, 64, 128, 256, 512, 1024])}
VIEWS = ([1, 3, 5], [1, 2, 3, 4, 5])
# (mask ratio, views): each covers the image once, or nearly
MASKS = ([(0.5, 2), (0.8, 5), (0.9, 8)], [(0.5, 2), (0.75, 4), (0.8, 5), (0.9, 8)])
MODELS = {
    "cpu": (["tiny", "small"], ["tiny", "small", "base"]),
    "cuda": (["small", "base"], ["small", "base", "large"]),
}
# growth up to this much above linear is noise
TOLERANCE = 1.1


def axes(args: argparse.Namespace, kind: str) -> dict[str, list[tuple[str, Config]]]:
    """Per axis: (value's label, configuration), everything else as asked for on the command line."""
    which = 0 if args.quick else 1
    mask_ratio, views = args.mask

    def at(**changed: Any) -> Config:
        point = {"size": args.model, "ratio": mask_ratio, "views": views, "batch": args.batch} | changed
        return configuration(**point, color=args.color, drop_path=args.drop_path)

    return {
        "batch": [(str(b), at(batch=b)) for b in BATCHES[kind][which]],
        "views": [(str(v), at(views=v)) for v in VIEWS[which]],
        "masks": [(f"{100 * r:.0f}x{v}", at(ratio=r, views=v)) for r, v in MASKS[which]],
        "model": [(m, at(size=m)) for m in MODELS[kind][which]],
    }


def run(args: argparse.Namespace, argv: list[str], device: str) -> int:
    """Times every point of every axis (an axis' points in turns), with the share of each component."""
    kind = device.partition(":")[0]
    ours = next(p for p in PROVIDERS if p.name == "ours")
    found: dict[str, list[dict[str, Any]]] = {}
    sampled: list[dict[str, float]] = []
    for axis, points in axes(args, kind).items():
        if args.list:
            print(f"  {axis:6} {', '.join(label for label, _ in points)}")
            continue
        jobs = [Job(f"{axis} {label}", ours, cfg, device, args.threads) for label, cfg in points]
        rows, rates = measure(
            jobs, rounds=args.rounds, steps=args.steps, warmup=args.warmup, rates=True,
            together=not args.one_by_one, say=_say,
        )  # fmt: skip
        sampled += rates
        for row, (label, cfg) in zip(rows, points, strict=True):
            row |= {"axis": axis, "value": label, "gflops_per_image": flops_per_image(cfg) / 1e9}
            row |= {"views": cfg.mask.views, "kept": cfg.num_keep}
            if row.get("samples_ms"):
                row |= percentiles(row["samples_ms"])
                row["ms_per_image"] = row["p50_ms"] / row["batch"]
                row["components"] = components(cfg, device, args.threads)
        found[axis] = rows
    if args.list:
        return 0
    record = new_record(
        f"how a step grows, on {kind}", "step", argv, args.note,
        settings={
            "model": args.model, "mask_ratio": args.mask[0], "views": args.mask[1], "batch": args.batch,
            "device": device, "threads": torch.get_num_threads(), "warmup": args.warmup, "rounds": args.rounds,
            "steps_per_turn": args.steps,
        },
        rate_samples=sampled, rows=[row for rows in found.values() for row in rows],
    )  # fmt: skip
    record["growth"] = growth(record["rows"])
    record["headline"] = "; ".join(g["told"] for g in record["growth"])
    name = "scaling" if args.name == "step" else args.name
    write_record(record, page(record), name, args.out, plots.scaling)
    return 0


def components(cfg: Config, device: str, threads: int) -> list[dict[str, Any]] | None:
    """The profile of one step without compilation, in a process of its own; None where it fails."""
    try:
        with tempfile.TemporaryDirectory() as folder, Worker(threads) as worker:
            return worker("components", config=to_dict(cfg), device=device, threads=threads, out=folder)[
                "rows"
            ]
    except WorkerError as error:
        _say(f"components: {error}")
        return None


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the cost grows no worse than linearly with batch and with views.

    exponent  p of ms ~ value^p
    worst     largest rise of the cost per image (or view) from any smaller value to a larger one
    marginal  milliseconds that one more costs, between neighbouring values
    """
    found = []
    for axis in ("batch", "views"):
        points = [(int(r["value"]), r["p50_ms"]) for r in rows if r["axis"] == axis and "p50_ms" in r]
        if len(points) < 2:
            continue
        x, y = zip(*points, strict=True)
        per_unit = [b / a for a, b in points]
        worst = max(later / first for i, first in enumerate(per_unit) for later in per_unit[i + 1 :])
        linear = worst <= TOLERANCE
        p = slope(x, y)
        told = f"time ~ {axis}^{p:.2f}, {'no worse than linear' if linear else '**worse than linear**'}"
        marginal = [(d - b) / (c - a) for (a, b), (c, d) in pairwise(points)]
        found.append(
            {
                "axis": axis,
                "exponent": p,
                "worst": worst,
                "marginal": marginal,
                "linear": linear,
                "told": told,
            }
        )
    return found


def shares(row: dict[str, Any]) -> dict[str, float]:
    """Share of a step per component, student and teacher together, in %."""
    out: dict[str, float] = {}
    for part in row["components"] or []:
        out[part["component"]] = out.get(part["component"], 0.0) + 100 * part["share"]
    return out


def cells(r: dict[str, Any]) -> list[str]:
    """A row of an axis' table."""
    start = [r["value"], f"{r['views']} x {r['kept']}"]
    if "p50_ms" not in r:
        return [*start, r["error"], *["-"] * 5]
    rate = 1000 * r["gflops_per_image"] / r["ms_per_image"]
    times = [f"{r[f'p{q}_ms']:.1f}" for q in (20, 50, 80)]
    return [*start, *times, f"{r['ms_per_image']:.2f}", f"{r['gflops_per_image']:.2f}", f"{rate:.0f}"]


def page(record: dict[str, Any]) -> Page:
    """The record to read."""
    s, rows = record["settings"], record["rows"]
    out = heading(record)
    out.append(
        f"The product with default settings; ViT-{s['model']}, {100 * s['mask_ratio']:g} % x {s['views']}, batch "
        f"{s['batch']} where nothing else is said. The points of an axis take turns: {s['rounds']} rounds of "
        f"{s['steps_per_turn']} step(s) after {s['warmup']} warm-up steps."
    )
    lines = [
        f"* {g['told']}: from one value to a larger one the cost of a unit rises to at most {g['worst']:.2f}x; one "
        f"more costs {', '.join(f'{m:.1f}' for m in g['marginal'])} ms."
        for g in record["growth"]
    ]
    out.append("\n".join(lines))
    for axis in dict.fromkeys(r["axis"] for r in rows):
        mine = [r for r in rows if r["axis"] == axis]
        out.append(f"## {axis.capitalize()}")
        head = [
            axis,
            "views x tokens",
            "p20 ms",
            "p50 ms",
            "p80 ms",
            "ms per image",
            "GFLOP per image",
            "GFLOP/s",
        ]
        out.append(Table(head, [cells(r) for r in mine]))
        told = {r["value"]: shares(r) for r in mine if r.get("components")}
        parts = list(dict.fromkeys(p for t in told.values() for p in t))
        if told:
            head = ["component, % of the step", *told]
            out.append(Table(head, [[p, *(f"{t.get(p, 0):.1f}" for t in told.values())] for p in parts]))
    out.append(
        "Components: `extrema-fast profile` of one step without compilation, student and teacher together."
    )
    return out


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
