"""The training step: the released formulation, a strong plain-PyTorch baseline and the product in one run.

python -m benchmarks step --quick
python -m benchmarks step --model base --mask 90x8 --batch 256 --providers main modes yardsticks
python -m benchmarks step --scaling

Every provider gets the same uint8 images (random, several sets in turn), normalises them, draws its own masks and
drop-path coins (rate 0.1, the recipe's) and makes whole optimizer steps in a process of its own; the processes take
turns. First each one's loss and gradients are compared with the product's: nothing is concluded about one that
differs. Colour jitter is left out unless `--color` asks for it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from extrema_fast.config import Config
from extrema_fast.distributed import pick_device
from extrema_fast.errors import UsageError
from extrema_fast.training.memory import HUGE_PAGES
from extrema_fast.training.plan import flops_per_image

from . import plots, scaling
from .gates import first_step
from .processes import WARMUP, Job, WorkerError, check_gates, check_warmup, measure
from .providers import PROVIDERS, Provider, chosen, configuration
from .rates import medians
from .records import heading, new_record, parser, write_record
from .stats import percentiles, ratio, verdict
from .tables import Page, Table

# (images, rounds, timed steps per turn) where nothing is said
SIZES = {"cpu": (16, 10, 1), "cuda": (256, 6, 12)}
QUICK = {"cpu": (16, 6, 1), "cuda": (256, 5, 10)}
# what the ratios are to reach, by device: what, ours / the other's time, or memory
GOALS = {
    "cpu": {"released": 1.3, "released-fp32": 2.5, "strong": 1.05, "memory": 0.7},
    "cuda": {"released": 3.0, "strong": 1.25},
}
# share of our step that should be matrix products, and their rate over that of a large product
PRODUCT_GOALS = (0.85, 0.8)


def main(argv: list[str]) -> int:
    """Training steps side by side (released, strong, ours, yardsticks); --scaling: how ours grows."""
    p = parser("step", main.__doc__)
    p.add_argument("--model", choices=("tiny", "small", "base", "large"), default="small")
    p.add_argument(
        "--mask", type=parse_mask, default=(0.8, 5), metavar="80x5", help="dropped percent x views"
    )
    p.add_argument("--batch", type=int, default=0, help="images per step (default: by device)")
    p.add_argument(
        "--providers", nargs="+", default=["main"], metavar="NAME", help="names or groups; see --list"
    )
    p.add_argument(
        "--ours", nargs="+", default=[], metavar="OPTION=VALUE", help="more rows of ours, with options"
    )
    p.add_argument(
        "--released-code", default="", metavar="PATH", help="a checkout of microsoft/ExtreMA to run"
    )
    p.add_argument("--color", action="store_true", help="with colour jitter, computed in the step")
    p.add_argument("--drop-path", type=float, default=0.1)
    p.add_argument("--rounds", type=int, default=0, help="turns of every provider")
    p.add_argument("--steps", type=int, default=0, help="timed steps per turn")
    p.add_argument(
        "--warmup", type=int, default=-1, help="untimed steps first (at least 20 on CUDA, 2 on CPU)"
    )
    p.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    p.add_argument("--no-profile", action="store_true", help="without the share of the matrix products")
    p.add_argument("--one-by-one", action="store_true", help="not in turns: less memory, more drift")
    p.add_argument("--scaling", action="store_true", help="time over batch, views, mask ratio and model size")
    args = p.parse_args(argv)
    device = str(pick_device(args.device))
    kind = device.partition(":")[0]
    if args.threads:
        torch.set_num_threads(args.threads)
    batch, rounds, steps = (QUICK if args.quick else SIZES)[kind]
    args.batch, args.rounds, args.steps = args.batch or batch, args.rounds or rounds, args.steps or steps
    args.warmup = WARMUP[kind] if args.warmup < 0 else check_warmup(args.warmup, kind)
    if args.scaling:
        return scaling.run(args, argv, device)
    able, unable = chosen(args.providers, device, released_code=args.released_code, extra=args.ours)
    if args.list:
        list_providers(device)
        return 0
    if not able:
        raise UsageError(f"--providers: none of them runs here: {unable}")
    cfg = configuration(*((args.model, *args.mask, args.batch)), color=args.color, drop_path=args.drop_path)
    record = run(able, unable, cfg, device, args, argv)
    write_record(record, page(record), args.name, args.out, plots.step)
    return 1 if any(not g["passed"] for g in record["gates"]) else 0


def parse_mask(text: str) -> tuple[float, int]:
    """`80x5` as (0.8, 5)."""
    ratio_text, _, views = text.partition("x")
    try:
        return float(ratio_text) / 100, int(views)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected PERCENTxVIEWS like 80x5, got {text!r}") from None


def list_providers(device: str) -> None:
    """Prints the registry and what runs here."""
    for p in PROVIDERS:
        why = p.missing(device)
        state = p.resolved(device) if not why else f"not here: {why}"
        print(f"  {p.name:34} {state:10} {p.about}  [{' '.join(p.groups)}]")


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def run(
    providers: list[Provider],
    unable: dict[str, str],
    cfg: Config,
    device: str,
    args: argparse.Namespace,
    argv: list[str],
) -> dict[str, Any]:
    """Gates, interleaved timing, profile: the record."""
    kind = device.partition(":")[0]
    jobs = [Job(p.name, p, cfg, device, args.threads) for p in providers]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        say(f"comparing loss and gradients of {len(jobs)} providers")
        try:
            truth, gates = check_gates(jobs, weights)
        except WorkerError as error:
            raise UsageError(f"the comparison with the product failed: {error}") from None
        names = [p.name for p in providers if p.family != "yardstick"]
        rows, sampled = measure(
            jobs, rounds=args.rounds, steps=args.steps, warmup=args.warmup, weights=str(weights), rates=True,
            profile=[] if args.no_profile else names, together=not args.one_by_one, say=say,
        )  # fmt: skip
    rates = medians(sampled)
    by_name = {p.name: p for p in providers}
    for row in rows:
        if row.get("samples_ms"):
            finish(row, rates)
            gates.append(
                vars(first_step(by_name[row["provider"]], row["precision"], row["first_loss"], truth))
            )
    width, depth, heads = cfg.model.shape
    record = new_record(
        f"training step, {describe(cfg)} on {kind}", "step", argv, args.note,
        settings={
            "model": cfg.model.size, "width": width, "depth": depth, "heads": heads,
            "mask_ratio": cfg.mask.ratio, "views": cfg.mask.views, "kept": cfg.num_keep,
            "patches": cfg.model.num_patches, "batch": cfg.train.batch_size, "drop_path": cfg.model.drop_path,
            "policy": cfg.data.policy, "loss": cfg.head.loss, "device": device, "threads": torch.get_num_threads(),
            "warmup": args.warmup, "rounds": args.rounds, "steps_per_turn": args.steps,
            "in_turns": not args.one_by_one, "input_sets": jobs[0].sets, "seed": cfg.train.seed,
            "gflops_per_image": flops_per_image(cfg) / 1e9,
        },
        rates=rates, rate_samples=sampled, gates=gates, not_run=unable, rows=rows,
    )  # fmt: skip
    record["ratios"] = ratios(record)
    record["headline"] = "; ".join(short_ratio(r) for r in record["ratios"])
    return record


def describe(cfg: Config) -> str:
    """`ViT-S/16, 80 % x 5, batch 16`."""
    letter = {"tiny": "Ti", "small": "S", "base": "B", "large": "L"}[cfg.model.size]
    return (
        f"ViT-{letter}/{cfg.model.patch_size}, {100 * cfg.mask.ratio:g} % x {cfg.mask.views}, "
        f"batch {cfg.train.batch_size}"
    )


def finish(row: dict[str, Any], rates: dict[str, float]) -> None:
    """Adds percentiles, images/s and MFU to a timed row."""
    row |= percentiles(row["samples_ms"])
    row["images_per_s"] = 1000 * row["batch"] / row["p50_ms"]
    row["tflops"] = row["images_per_s"] * row["gflops_per_image"] / 1000
    large = rates.get(f"products_{row['precision']}_tflops")
    if large:
        row["mfu"] = row["tflops"] / large
        if "products" in row and row["products"]["tflops"]:
            row["products"]["of_large"] = row["products"]["tflops"] / large


# ---- what follows from the rows -------------------------------------------------------------------


def passed(record: dict[str, Any], name: str) -> bool:
    """Whether every check of a provider passed, and there was one."""
    found = [g["passed"] for g in record["gates"] if g["name"] == name]
    return bool(found) and all(found)


def ratios(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours against the others; `refused` instead of a number where a check failed or a time is missing.

    limit  the ratio that ours could reach if everything but its matrix products were free
    """
    rows = {r["provider"]: r for r in record["rows"]}
    ours = rows.get("ours")
    if ours is None:
        return []
    goals = GOALS["cuda" if record["settings"]["device"].startswith("cuda") else "cpu"]
    found = []

    def against(label: str, other: dict[str, Any] | None, goal: float | None) -> None:
        if other is None:
            return
        entry: dict[str, Any] = {"what": label, "other": other["provider"], "goal": goal}
        bad = [r["provider"] for r in (ours, other) if not passed(record, r["provider"]) or "p50_ms" not in r]
        if bad:
            found.append(entry | {"refused": f"{', '.join(bad)}: no result to compare (see below)"})
            return
        entry |= ratio(other["samples_ms"], ours["samples_ms"])
        entry["verdict"] = verdict(entry)
        if "products" in ours and ours["products"]["ms"]:
            entry["limit"] = other["p50_ms"] / ours["products"]["ms"]
        found.append(entry)

    released = next((r for n, r in rows.items() if n in ("released", "released-code")), None)
    wide = next((r for n, r in rows.items() if n in ("released-fp32", "released-code-fp32")), None)
    same = released is not None and released["precision"] == ours["precision"]
    # on a GPU the released code runs in fp16 with a loss scaler
    how = "same dtype" if same else released["precision"] if released else ""
    against(f"released formulation, {how}", released, goals.get("released"))
    against("released formulation, fp32", wide, goals.get("released-fp32"))
    rivals = [r for r in rows.values() if r["family"] == "strong" and r["precision"] == ours["precision"]]
    timed = [r for r in rivals if "p50_ms" in r]
    best = min(timed, key=lambda r: r["p50_ms"]) if timed else next(iter(rivals), None)
    against("best strong baseline", best, goals.get("strong"))
    if released and all(passed(record, r["provider"]) and r.get("peak_mb") for r in (ours, released)):
        found.append(
            {"what": f"peak memory, released formulation, {how}", "other": released["provider"],
             "goal": goals.get("memory"), "memory": True, "ratio": ours["peak_mb"] / released["peak_mb"],
             "adds": ours["step_adds_mb"] / released["step_adds_mb"]}
        )  # fmt: skip
    return found


def short_ratio(r: dict[str, Any]) -> str:
    """One ratio for the index."""
    if "refused" in r:
        return f"{r['other']}: not compared"
    if r.get("memory"):
        return f"memory {r['ratio']:.2f}x of {r['other']}"
    return f"{r['ratio']:.2f}x {r['other']}"


def ratio_rows(record: dict[str, Any]) -> list[list[str]]:
    """The table of ratios."""
    rows = []
    for r in record["ratios"]:
        sign = "<=" if r.get("memory") else ">="
        goal = f"{sign} {r['goal']:g}" if r["goal"] else "-"
        against = f"{r['what']} (`{r['other']}`)"
        if "refused" in r:
            rows.append([against, "**not compared**", r["refused"], goal, "-", "-"])
            continue
        met = (
            r["ratio"] <= r["goal"]
            if r.get("memory") and r["goal"]
            else r["goal"] and r["ratio"] >= r["goal"]
        )
        reached = "-" if not r["goal"] else "yes" if met else "no"
        if r.get("memory"):
            rows.append(
                [against, f"**{r['ratio']:.2f}x**", f"{r['adds']:.2f}x without weights", goal, reached, "-"]
            )
        else:
            interval = f"{r['low']:.2f} to {r['high']:.2f}, {r['verdict']}"
            limit = f"{r['limit']:.2f}" if "limit" in r else "-"
            rows.append([against, f"**{r['ratio']:.2f}x**", interval, goal, reached, limit])
    return rows


# ---- the page -------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def page(record: dict[str, Any]) -> Page:
    """The record to read."""
    s, rates = record["settings"], record["rates"]
    timed = [r for r in record["rows"] if "p50_ms" in r]
    out = heading(record)
    out.append(
        f"{s['gflops_per_image']:.2f} GFLOP per image (absorbed pooling, forward and backward), "
        f"{s['kept']} of {s['patches']} tokens in each of {s['views']} views, drop-path {s['drop_path']:g}, "
        f"policy {s['policy']}, {s['loss']} loss. {s['warmup']} warm-up steps, then {s['rounds']} rounds of "
        f"{s['steps_per_turn']} timed step(s) per provider"
        + (", in turns. " if s["in_turns"] else ", one provider after another. ")
        + f"{s['input_sets']} sets of random images."
    )
    own = [f"`{r['provider']}`" for r in record["rows"] if r.get("environment", {}).get(HUGE_PAGES) == "1"]
    if own and not s["device"].startswith("cuda"):
        out.append(
            f"Memory of {', '.join(own)}: huge pages ({HUGE_PAGES}=1), and freed memory is kept, as the command line "
            "sets it; the others run with the system's settings. `--providers allocator` shows what that is worth."
        )
    out.append(
        "In the same run: "
        + ", ".join(
            f"{k.removeprefix('products_').removesuffix('_tflops')} products {1000 * v:.0f} GFLOP/s"
            if v < 1
            else f"{k.removeprefix('products_').removesuffix('_tflops')} products {v:.2f} TFLOP/s"
            for k, v in rates.items()
            if k.startswith("products")
        )
        + f", copies {rates['copy_gb_per_s']:.1f} GB/s (read + write)."
    )
    if record["ratios"]:
        out.append("## Ratios")
        out.append(
            Table(["ours against", "ratio", "95 % interval", "goal", "reached", "limit"], ratio_rows(record))
        )
        out.append(
            "*limit*: what the ratio would be if everything in our step but its matrix products were free, at the "
            "rate they have now. Only providers whose checks passed are compared."
        )
    out.append("## Steps")
    out.append(
        Table(
            ["provider", "dtype", "p20 ms", "p50 ms", "p80 ms", "images/s", "MFU %", "peak MB", "the step adds MB",
             "first step s"],
            [
                [f"`{r['provider']}`", r["precision"], *(number(r[f"p{q}_ms"]) for q in (20, 50, 80)),
                 number(r["images_per_s"], 2), number(100 * r.get("mfu", math.nan)), number(r.get("peak_mb"), 0),
                 number(r.get("step_adds_mb"), 0), number(r["first_step_s"])]
                for r in timed
            ],
        )
    )  # fmt: skip
    out.append(
        "MFU: model FLOPs over the rate of large products of the same dtype in this run. Peak: resident memory of "
        "the provider's own process after warm-up"
        + (" (allocated by torch on the GPU)" if s["device"].startswith("cuda") else "")
        + "; *the step adds*: the same minus what was there before the first step, that is activations, "
        "gradients and the optimizer's moments."
    )
    out += product_part(timed)
    out.append("## Checks")
    out.append(
        Table(
            ["provider", "passed", "found"],
            [[f"`{g['name']}`", "yes" if g["passed"] else "**no**", g["found"]] for g in record["gates"]],
        )
    )
    lost = [f"* `{r['provider']}`: {r['error']}" for r in record["rows"] if "error" in r]
    lost += [f"* `{name}`: {why}" for name, why in record["not_run"].items()]
    if lost:
        out += ["## Not measured", "\n".join(lost)]
    return out


def product_part(timed: list[dict[str, Any]]) -> Page:
    """How much of each step is matrix products, and how fast they are."""
    with_products = [r for r in timed if "products" in r]
    if not with_products:
        return []
    rows = []
    for r in with_products:
        q = r["products"]
        rows.append(
            [f"`{r['provider']}`", number(q["step_ms"]), number(q["ms"]), number(100 * q["share"]),
             number(q["tflops"] and 1000 * q["tflops"], 0), number(100 * q.get("of_large", math.nan))]
        )  # fmt: skip
    return [
        "## Matrix products",
        Table(
            ["provider", "profiled step ms", "products ms", "% of the step", "GFLOP/s", "% of large products"], rows
        ),
        "One profiled step each; fused attention kernels are not among the products. A step cannot be faster than "
        "its products; their rate is held against the rate of a large product in the same run."
        + product_goal(with_products),
    ]  # fmt: skip


def product_goal(rows: list[dict[str, Any]]) -> str:
    """Whether our step is as much product, and its products as fast, as one can hope."""
    q = next((r["products"] for r in rows if r["provider"] == "ours"), None)
    if q is None or not q.get("of_large"):
        return ""
    share, rate = PRODUCT_GOALS
    reached = "reached" if q["share"] >= share and q["of_large"] >= rate else "not reached"
    return (
        f" Goal for `ours`: products at least {100 * share:.0f} % of the step, at {100 * rate:.0f} % of that rate: "
        f"{reached} ({100 * q['share']:.0f} % at {100 * q['of_large']:.0f} %)."
    )
