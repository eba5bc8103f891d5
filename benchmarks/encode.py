"""Encoding images, dense and masked: our encoder, timm's ViT accelerated and as it is, Hugging Face's ViT.

python -m benchmarks encode --quick
python -m benchmarks encode --model base --batch 1 64 256 --dtypes bf16 --masks 0 75 90
python -m benchmarks encode --providers timm accelerated

Inference: a forward pass without gradients, batches of random images that are on the device already, random kept
patches. Every provider sits in a process of its own; they take turns. First its tokens are compared with float64:
nothing is concluded about one that differs.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import torch

from extrema_fast.config import SIZES, did_you_mean, keep_count
from extrema_fast.distributed import pick_device
from extrema_fast.errors import UsageError

from . import plots
from .encoders import BY_NAME, DTYPES, PATCH, PROVIDERS, EncodeProvider
from .processes import WARM_PER_TURN, WARMUP, Worker, WorkerError
from .records import heading, new_record, parser, write_record
from .stats import percentiles, ratio, verdict
from .tables import Page, Table

# (batches, rounds, timed passes per turn) where nothing is said
SIZES_OF = {"cpu": ([8], 10, 1), "cuda": ([1, 64, 256], 6, 12)}
QUICK = {"cpu": ([8], 5, 1), "cuda": ([64], 5, 10)}
MASKS = [0, 50, 75, 90]
# dense over masked time at 75 %, of the accelerated ViT on a CPU
GOAL, GOAL_MASK = 2.5, 75
RIVALS = {"timm": "best of timm", "hf": "best of Hugging Face"}


class Case(NamedTuple):
    """What all providers are timed on together."""

    dtype: str
    batch: int


def main(argv: list[str]) -> int:
    """Images/s of encoding, dense and at mask ratios, against timm's ViT and Hugging Face's of the same size."""
    args = options(argv)
    device = str(pick_device(args.device))
    if args.threads:
        torch.set_num_threads(args.threads)
    batches, rounds, steps = (QUICK if args.quick else SIZES_OF)[device.partition(":")[0]]
    args.batch, args.rounds, args.steps = args.batch or batches, args.rounds or rounds, args.steps or steps
    able, unable = chosen(args.providers, device, args.quick)
    if args.list:
        listing(device)
        return 0
    if not able:
        raise UsageError(f"--providers: none of them runs here: {unable}")
    rows = [
        row
        for dtype in args.dtypes
        for batch in args.batch
        for row in measure(able, Case(dtype, batch), args, device)
    ]
    size = {"tiny": "Ti", "small": "S", "base": "B", "large": "L"}[args.model]
    record = new_record(
        f"encoding, ViT-{size}/{PATCH} at {args.img_size} on {device.partition(':')[0]}", "encode", argv, args.note,
        settings={
            "model": args.model, "img_size": args.img_size, "masks": args.masks, "device": device,
            "threads": torch.get_num_threads(), "rounds": args.rounds, "steps_per_turn": args.steps,
        },
        gates=gates(rows), not_run=unable, rows=rows,
    )  # fmt: skip
    record["headline"] = headline(record)
    write_record(record, page(record), args.name, args.out, plots.encode)
    return 1 if any(not g["passed"] for g in record["gates"]) else 0


def options(argv: list[str]) -> argparse.Namespace:
    """The command line; UsageError for what cannot be."""
    p = parser("encode", main.__doc__)
    p.add_argument("--model", choices=list(SIZES), default="small")
    p.add_argument("--img-size", type=int, default=224, help="pixels of a side (default: %(default)s)")
    p.add_argument("--batch", type=int, nargs="+", default=[], help="images (default: by device)")
    p.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    p.add_argument("--masks", type=int, nargs="+", default=MASKS, metavar="PERCENT", help="0: dense")
    p.add_argument(
        "--providers", nargs="+", default=[], metavar="NAME", help="default: all; --quick: eager ones"
    )
    p.add_argument("--rounds", type=int, default=0, help="turns of every provider")
    p.add_argument("--steps", type=int, default=0, help="timed passes per turn")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    args = p.parse_args(argv)
    if args.img_size < PATCH or args.img_size % PATCH:
        raise UsageError(f"--img-size: expected a multiple of {PATCH}, got {args.img_size}")
    if min(args.batch, default=1) < 1:
        raise UsageError(f"--batch: expected at least 1, got {min(args.batch)}")
    patches = (args.img_size // PATCH) ** 2
    for mask in args.masks:
        if not 0 <= mask < 100 or not kept_at(patches, mask):
            raise UsageError(f"--masks: expected 0 to 99 percent that leave a patch of {patches}, got {mask}")
    for name in ("rounds", "steps", "threads"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name}: expected 0 (the default) or more, got {getattr(args, name)}")
    return args


def kept_at(patches: int, mask: int) -> int:
    """Patches kept at that percentage."""
    return keep_count(patches, mask / 100)


def chosen(names: list[str], device: str, quick: bool = False) -> tuple[list[EncodeProvider], dict[str, str]]:
    """(those that can run, {name: reason} of the others); raises UsageError for an unknown name."""
    for name in names:
        if name not in BY_NAME:
            raise UsageError(f"--providers: unknown {name!r}{did_you_mean(name, list(BY_NAME))}")
    wanted = [p for p in PROVIDERS if (p.name in names if names else not (quick and p.compiled))]
    why = {p.name: p.missing(device) for p in wanted}
    return [p for p in wanted if not why[p.name]], {name: w for name, w in why.items() if w}


def listing(device: str) -> None:
    """Prints the registry and what runs here."""
    for p in PROVIDERS:
        why = p.missing(device)
        print(f"  {p.name:22} {'not here: ' + why if why else 'runs here':24} {p.about}")


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


# ---- measuring --------------------------------------------------------------------------------------


def measure(
    providers: list[EncodeProvider], case: Case, args: argparse.Namespace, device: str
) -> list[dict[str, Any]]:
    """One row per provider and mask, with `samples_ms`, or `error`; the providers take turns mask by mask."""
    with _Bench(providers, case, args, device) as bench:
        bench.start()
        for mask in args.masks:
            bench.check(mask)
        for i in range(args.rounds):
            for mask in args.masks:
                bench.turn(mask, i)
            say(f"{case.dtype}, batch {case.batch}: round {i + 1} of {args.rounds}")
    for row in bench.rows.values():
        if row["samples_ms"] and "error" not in row:
            row |= percentiles(row["samples_ms"])
            row["images_per_s"] = 1000 * row["batch"] / row["p50_ms"]
    return list(bench.rows.values())


class _Bench:
    """The providers' processes; `live` holds the rows that are still measured, by (provider, mask)."""

    def __init__(
        self, providers: list[EncodeProvider], case: Case, args: argparse.Namespace, device: str
    ) -> None:
        self.providers, self.case, self.args, self.device = providers, case, args, device
        patches = (args.img_size // PATCH) ** 2
        self.kept = {mask: kept_at(patches, mask) if mask else 0 for mask in args.masks}
        self.rows = {
            (p.name, mask): head(p, case, mask, self.kept[mask] or patches)
            for mask in args.masks
            for p in providers
        }
        self.live = set(self.rows)
        self.workers: dict[str, Worker] = {}

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def ask(self, name: str, mask: int | None, do: str, **arguments: Any) -> dict[str, Any] | None:
        """The answer; None after noting why there is none, for that mask, or for all when the process is gone."""
        worker = self.workers[name]
        try:
            return worker(do, **arguments)
        except WorkerError as error:
            gone = mask is None or worker.process.poll() is not None
            for key in [k for k in self.live if k[0] == name and (gone or k[1] == mask)]:
                self.live.discard(key)
                self.rows[key]["error"] = str(error)
            say(f"{name}: {error}")
            return None

    def start(self) -> None:
        """Builds every provider in its process."""
        args = self.args
        for p in self.providers:
            self.workers[p.name] = Worker(args.threads, environment=p.environment)
            self.ask(
                p.name, None, "encoder", threads=args.threads, device=self.device, dtype=self.case.dtype,
                provider=p.name, size=args.model, img_size=args.img_size, batch=self.case.batch,
            )  # fmt: skip

    def names(self, mask: int) -> list[str]:
        return [p.name for p in self.providers if (p.name, mask) in self.live]

    def check(self, mask: int) -> None:
        """Every provider's first pass, against float64, and the rest of its warm-up."""
        for name in self.names(mask):
            checked = self.ask(name, mask, "encoding", kept=self.kept[mask], check=True)
            if checked is None:
                continue
            row = self.rows[name, mask]
            row |= checked
            say(f"{row['key']}: off float64 by {row['error_of']:.1e}")
            self.ask(name, mask, "turn", warm=WARMUP[self.device.partition(":")[0]] - 1, steps=1)

    def turn(self, mask: int, count: int) -> None:
        """One turn of every provider; another one begins each round."""
        names = self.names(mask)
        first = count % max(1, len(names))
        for name in names[first:] + names[:first]:
            if self.ask(name, mask, "encoding", kept=self.kept[mask], check=False) is None:
                continue
            warm = WARM_PER_TURN[self.device.partition(":")[0]]
            took = self.ask(name, mask, "turn", warm=warm, steps=self.args.steps)
            self.rows[name, mask]["samples_ms"] += took["samples_ms"] if took else []


def head(p: EncodeProvider, case: Case, mask: int, kept: int) -> dict[str, Any]:
    """A row before anything was measured."""
    return {
        "key": f"{p.name} | {case.dtype} | batch {case.batch} | {name_of(mask)}",
        "provider": p.name, "library": p.library, "about": p.about, "compiled": p.compiled,
        **case._asdict(), "mask": mask, "kept": kept, "samples_ms": [],
    }  # fmt: skip


def name_of(mask: int) -> str:
    return f"{mask} % masked" if mask else "dense"


def gates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The check of every row that got so far, under the row's key."""
    return [
        {
            "name": r["key"],
            # a NaN is no small error
            "passed": r["error_of"] <= r["limit"],
            "found": f"off float64 by {r['error_of']:.1e} of the allowed {r['limit']:.0e}",
        }
        for r in rows
        if "error_of" in r
    ]


# ---- what follows from the rows ---------------------------------------------------------------------


def usable(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with a time whose check passed."""
    right = {g["name"] for g in record["gates"] if g["passed"]}
    return [r for r in record["rows"] if "p50_ms" in r and r["key"] in right]


def against(record: dict[str, Any], row: dict[str, Any], library: str) -> dict[str, Any] | None:
    """A row beside the fastest one of `library` at the same dtype, batch and mask; None where there is none."""
    same = ("dtype", "batch", "mask")
    rivals = [r for r in usable(record) if r["library"] == library and all(r[k] == row[k] for k in same)]
    if row not in usable(record) or not rivals:
        return None
    best = min(rivals, key=lambda r: r["p50_ms"])
    found = ratio(best["samples_ms"], row["samples_ms"])
    return found | {"other": best["provider"], "verdict": verdict(found)}


def over_dense(record: dict[str, Any], row: dict[str, Any]) -> dict[str, Any] | None:
    """How many times faster a masked row is than its provider's dense one."""
    same = ("provider", "dtype", "batch")
    dense = [r for r in usable(record) if not r["mask"] and all(r[k] == row[k] for k in same)]
    return ratio(dense[0]["samples_ms"], row["samples_ms"]) if dense and row in usable(record) else None


def headline(record: dict[str, Any]) -> str:
    """For the index: the accelerated ViT at 75 % beside its dense pass and timm."""
    told = []
    for row in record["rows"]:
        if row["provider"] == "accelerated" and row["mask"] == GOAL_MASK:
            dense, timm = over_dense(record, row), against(record, row, "timm")
            where = f"{row['dtype']}, batch {row['batch']}: 75 % masked"
            if dense:
                told.append(f"{where} {dense['ratio']:.2f}x of dense")
            if timm:
                told.append(f"{where} {timm['ratio']:.2f}x {timm['other']}")
    return "; ".join(told)


# ---- the page ---------------------------------------------------------------------------------------


def page(record: dict[str, Any]) -> Page:
    """The record to read."""
    s, rows = record["settings"], record["rows"]
    out = heading(record)
    out.append(
        f"Forward passes without gradients; {s['rounds']} rounds of {s['steps_per_turn']} timed pass(es) per provider "
        "and mask, in turns, each provider in a process of its own. timm, hf and accelerated share weights; ours is "
        "another model of the same size: no class token in the trunk, two class-attention blocks after it. Masked, "
        "timm and hf embed all patches, gather the kept ones and run their own blocks. bf16: weights and images. "
        "Compiled: torch.compile, a graph per shape."
    )
    for case in dict.fromkeys((r["dtype"], r["batch"]) for r in rows):
        mine = [r for r in rows if (r["dtype"], r["batch"]) == case]
        out.append(f"## {case[0]}, batch {case[1]}")
        out += [speeds(record, mine), *comparisons(record, mine)]
    out.append("## Checks")
    out.append(Table(["row", "passed", "found"], [
        [g["name"].replace(" | ", ", "), "yes" if g["passed"] else "**no**", g["found"]] for g in record["gates"]
    ]))  # fmt: skip
    lost = [f"* {r['key'].replace(' | ', ', ')}: {r['error']}" for r in rows if "error" in r]
    lost += [f"* `{name}`: {why}" for name, why in record["not_run"].items()]
    return [*out, "## Not measured", "\n".join(lost)] if lost else out


def speeds(record: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    """Images/s of every provider: median and, in brackets, p80 to p20."""
    masks = list(dict.fromkeys(r["mask"] for r in rows))
    good = usable(record)

    def cell(row: dict[str, Any]) -> str:
        if "p50_ms" not in row:
            return "-"
        ends = [f"{1000 * row['batch'] / row[f'p{q}_ms']:.4g}" for q in (80, 20)]
        return f"{row['images_per_s']:.4g} ({ends[0]} to {ends[1]})" + ("" if row in good else " **wrong**")

    names = list(dict.fromkeys(r["provider"] for r in rows))
    return Table(
        ["images/s", *(f"{name_of(m)}, {_kept(rows, m)} patches" for m in masks)],
        [[f"`{n}`", *(cell(r) for m in masks for r in rows if (r["provider"], r["mask"]) == (n, m))] for n in names],
    )  # fmt: skip


def _kept(rows: list[dict[str, Any]], mask: int) -> int:
    return next(r["kept"] for r in rows if r["mask"] == mask)


def comparisons(record: dict[str, Any], rows: list[dict[str, Any]]) -> Page:
    """Ours beside the fastest of timm and of Hugging Face; every provider's masked passes beside its dense one."""
    lines = []
    for row in (r for r in rows if r["library"] in ("ours", "accelerated")):
        for library, what in RIVALS.items():
            r = against(record, row, library)
            if r:
                told = f"**{r['ratio']:.2f}x**", f"{r['low']:.2f} to {r['high']:.2f}", r["verdict"]
                lines.append(
                    [f"`{row['provider']}`, {name_of(row['mask'])}", f"{what}: `{r['other']}`", *told]
                )
    masked = [(r, over_dense(record, r)) for r in rows if r["mask"]]
    dense = [
        [f"`{r['provider']}`, {name_of(r['mask'])}", f"**{d['ratio']:.2f}x**", f"{d['low']:.2f} to {d['high']:.2f}",
         reached(record, r, d["ratio"])]
        for r, d in masked if d
    ]  # fmt: skip
    out: Page = []
    if lines:
        out.append(Table(["row", "beside", "times as fast", "95 % interval", "verdict"], lines))
    if dense:
        out.append(Table(["masked", "times as fast as its dense pass", "95 % interval", "goal"], dense))
    return out


def reached(record: dict[str, Any], row: dict[str, Any], found: float) -> str:
    """Whether the accelerated ViT's goal on a CPU is met; `-` for what has none."""
    on_cpu = not record["settings"]["device"].startswith("cuda")
    if not on_cpu or row["library"] != "accelerated" or row["mask"] != GOAL_MASK:
        return "-"
    return f">= {GOAL:g}: " + ("reached" if found >= GOAL else "**not reached**")
