"""The training step: the released formulation, a strong plain-PyTorch baseline and ours in one run.

python -m benchmarks step --quick
python -m benchmarks step --model base --mask 90x8 --batch 256 --providers main modes
python -m benchmarks step --released-code DIR    a checkout of the released code in place of its formulation
python -m benchmarks step --memory               peak memory over batch sizes and recomputation options
python -m benchmarks step --scaling              how our step grows with batch, views, masks and model

Every provider gets the same random uint8 images, draws its own masks and drop-path, and makes whole optimizer steps
in its own process; the processes take turns. First each one's loss and gradients are compared with ours: nothing is
concluded about one that differs. Color jitter is left out unless --color asks for it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from extrema_fast.config import Config
from extrema_fast.errors import UsageError
from extrema_fast.models.drop_path import drop_path_scale
from extrema_fast.models.masking import draw_views
from extrema_fast.training.resolve import flops_per_image

from . import harness
from .baselines import Inputs, Stepper, with_settings
from .harness import Record, Row, percentiles, say, table
from .processes import Memory, Rates, Turns, Worker, WorkerError, clock, matmul_share, prepare
from .providers import PROVIDERS, Provider, chosen, configuration
from .released_code import check as check_released_code

MODELS = ("tiny", "small", "base", "large")
SETS = 4
# untimed steps at first, and before each turn
WARMUP = {"cpu": (2, 0), "cuda": (20, 3)}
# (images per step, rounds, timed steps per turn): --quick, and otherwise
SIZES = {"cpu": [(16, 6, 1), (16, 10, 1)], "cuda": [(256, 5, 10), (256, 6, 12)]}
MEMORY_BATCHES = {"cpu": [[2, 4], [8, 16, 32]], "cuda": [[64, 128], [64, 128, 256, 512, 1024]]}
MEMORY_PROVIDERS = ["released", "strong-eager", "ours", "memory"]
# axis of --scaling -> values of `configuration`
SCALING: dict[str, dict[str, list[list[dict[str, Any]]]]] = {
    kind: {
        "batch": [[{"batch": b} for b in batches[:3]], [{"batch": b} for b in batches]],
        "views": [[{"views": v} for v in (1, 3, 5)], [{"views": v} for v in (1, 2, 3, 4, 5)]],
        "masks": [[{"ratio": r, "views": v} for r, v in ((0.5, 2), (0.8, 5), (0.9, 8))]] * 2,
        "model": [[{"size": m} for m in models[:2]], [{"size": m} for m in models]],
    }
    for kind, batches, models in (
        ("cpu", (4, 8, 16, 32), MODELS[:3]),
        ("cuda", (64, 128, 256, 512), MODELS[1:]),
    )
}
# relative errors allowed: loss and gradients in fp32; a first step's loss in 16 bits against fp32
LOSS_FP32, GRADIENTS_FP32, LOSS_16 = 1e-4, 2e-3, 1e-2


# ---- inside a process -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One row: a provider at a configuration on a device; axis and value: what --scaling changes."""

    key: str
    provider: Provider
    cfg: Config
    device: str
    threads: int = 0
    axis: str = ""
    value: float | str = 0

    @property
    def precision(self) -> str:
        """Returns fp32, bf16 or fp16."""
        return self.provider.resolved(self.device)


def random_images(cfg: Config, sets: int, device: torch.device) -> list[Inputs]:
    """Returns batches of random uint8 images, the same for every provider (zeros would draw less power)."""
    generator = torch.Generator().manual_seed(0)
    b, shape = cfg.train.batch_size, (cfg.train.batch_size, *cfg.model.img_size, 3)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(sets)]
    return [Inputs(x.to(device), torch.arange(i * b, (i + 1) * b)) for i, x in enumerate(images)]


def given(inputs: Inputs, cfg: Config, device: torch.device) -> Inputs:
    """Returns the inputs with our own masks and drop-path factors, for the others to use."""
    index, seed = inputs.index.to(device), cfg.train.seed
    model, mask = cfg.model, cfg.mask
    keep = draw_views(index, model.num_patches, cfg.num_keep, mask.views, mode=mask.mode, seed=seed, epoch=0)
    scale = drop_path_scale(index, mask.views, model.shape[1], model.drop_path, seed=seed, epoch=0)
    return replace(inputs, keep=keep, scale=scale)


class Stepping:
    """A provider ready to step.

    Args:
        job: what to build.
        weights: safetensors file to start from; None: its own random weights.
    """

    def __init__(self, job: Job, weights: Path | None) -> None:
        self.device = prepare(job.device, job.threads, job.precision)
        self.inputs, self.count = random_images(job.cfg, SETS, self.device), 0
        first, self.usage = given(self.inputs[0], job.cfg, self.device), Memory(self.device)
        began = time.perf_counter()
        self.stepper = job.provider.make(job.cfg, self.device, job.precision)
        if weights is not None:
            self.stepper.load(weights)
        built, self.before_mb = time.perf_counter(), self.usage.now()
        self.stepper.step(first)
        loss = self.stepper.loss()
        first_step_s = time.perf_counter() - built
        clock(self.one, self.device, WARMUP[self.device.type][0] - 1)
        self.built = {
            "build_s": built - began,
            "first_step_s": first_step_s,
            "first_loss": loss,
            "startup_peak_mb": self.usage.peak(),
            "before_first_step_mb": self.before_mb,
        }
        self.usage.reset()

    def one(self) -> None:
        """Makes one step."""
        self.stepper.step(self.inputs[self.count % SETS])
        self.count += 1

    def turn(self, warm: int, steps: int) -> dict[str, list[float]]:
        """Makes `warm` untimed steps, then `steps` timed ones."""
        clock(self.one, self.device, warm)
        samples = clock(self.one, self.device, steps)
        if self.device.type == "cuda":
            # the next provider's turn may need it
            torch.cuda.empty_cache()
        return {"samples_ms": samples}

    def memory(self) -> dict[str, float]:
        """Returns the peak since the warm-up, and what steps add to what was there before the first one."""
        peak = self.usage.peak()
        return {"peak_mb": peak, "step_adds_mb": peak - self.before_mb}

    def matmuls(self) -> dict[str, Any]:
        """Profiles three steps and returns the one least disturbed by other programs."""
        found = [matmul_share(self.one, self.device) for _ in range(3)]
        return {"products": min(found, key=lambda f: f["step_ms"])}


class Check:
    """In one process: fp32 loss and gradients of every provider against ours, eager, at a batch of 2.

    `built` holds the checks, and the fp32 loss of the first timed step, whose initial weights go to `weights`.
    """

    def __init__(self, jobs: list[Job], weights: Path) -> None:
        cfg, device = jobs[0].cfg, prepare(jobs[0].device, jobs[0].threads, "fp32")
        small = with_settings(cfg, {"train.batch_size": 2})
        ours = next(p for p in PROVIDERS if p.name == "ours").eager()
        reference = ours.make(small, device, "fp32")
        save_file({n: p.detach().cpu().contiguous() for n, p in reference.student().items()}, weights)
        inputs = given(random_images(small, 1, device)[0], small, device)
        truth, checks = one_step(reference, inputs), []
        for provider in [job.provider for job in jobs]:
            stepper = provider.eager().make(small, device, "fp32")
            stepper.load(weights)
            checks.append(compare(provider.name, one_step(stepper, inputs), truth))
        del reference, stepper
        timed = ours.make(cfg, device, "fp32")
        timed.load(weights)
        loss, _ = one_step(timed, given(random_images(cfg, 1, device)[0], cfg, device))
        self.built = {"first_loss": loss, "checks": checks}


Found = tuple[float, dict[str, Tensor]]


def one_step(stepper: Stepper, inputs: Inputs) -> Found:
    """Returns loss and gradients of a step."""
    stepper.step(inputs)
    gradients = {n: p.grad.detach().clone() for n, p in stepper.student().items() if p.grad is not None}
    return stepper.loss(), gradients


def compare(name: str, found: Found, truth: Found) -> dict[str, Any]:
    """Returns {name, passed, found}: whether loss and gradients are ours.

    Gradients of key biases are zero in exact arithmetic and rounding noise otherwise; they are left out.
    """
    error = abs(found[0] - truth[0]) / max(abs(truth[0]), 1e-12)
    largest = max(float(g.abs().max()) for g in truth[1].values())
    gaps: dict[str, float] = {}
    for key, g in truth[1].items():
        if key.endswith("attn.k.bias"):
            continue
        if key not in found[1]:
            return {"name": name, "passed": False, "found": f"no gradient for {key}"}
        gap = (found[1][key] - g).abs()
        if key.endswith("qkv.bias"):
            gap[len(g) // 3 : 2 * len(g) // 3] = 0
        # a gradient that is nearly zero everywhere is judged by the others' size
        relative = float(gap.max()) / max(float(g.abs().max()), 1e-4 * largest)
        # NaN is as wrong as can be
        gaps[key] = relative if relative == relative else float("inf")
    where = max(gaps, key=lambda k: gaps[k])
    worst = gaps[where]
    text = f"fp32 loss {found[0]:.6f}, off by {error:.1e}; gradients by {worst:.1e} ({where})"
    return {"name": name, "passed": error <= LOSS_FP32 and worst <= GRADIENTS_FP32, "found": text}


# ---- the command ----------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Training steps side by side: released, strong, ours; --memory over batch sizes; --scaling of ours."""
    args = options(argv)
    able, unable = chosen(args.providers, args.device, released_code=args.released_code, extra=args.ours)
    if not able:
        raise UsageError(f"--providers: none of them runs here: {unable}")
    groups, what = plan(args, able)
    if args.list:
        for p in PROVIDERS:
            state = p.missing(args.device) or p.resolved(args.device)
            print(f"  {p.name:30} {state:22} {p.about}  [{' '.join(p.groups)}]")
        print(f"measured with these options: {', '.join(job.key for group in groups for job in group)}")
        return 0
    if args.released_code:
        check_released_code(Path(args.released_code), groups[0][0].cfg)
    record = harness.new_record(what, "step", argv, args.note, **measure(groups, args), not_run=unable)
    record |= conclusions(record, args)
    harness.write_record(record, page(record), args)
    return 1 if any(not c["passed"] for c in record["gates"]) else 0


def options(argv: list[str]) -> argparse.Namespace:
    """Reads the command line and fills in what depends on the device; raises UsageError."""
    p = harness.parser("step", main.__doc__)
    add = p.add_argument
    add("--model", choices=MODELS, default="small")
    add("--mask", type=parse_mask, default=(0.8, 5), metavar="80x5", help="dropped percent x views")
    add("--batch", type=int, nargs="+", default=[], help="images per step (several: with --memory)")
    add(
        "--providers", nargs="+", default=[], metavar="NAME", help="names or groups of --list (default: main)"
    )
    add("--ours", nargs="+", default=[], metavar="OPTION=VALUE,...", help="more rows of ours, with options")
    add("--released-code", default="", metavar="DIR", help="a checkout of microsoft/ExtreMA")
    add("--color", action="store_true", help="with color jitter, computed in the step")
    add("--drop-path", type=float, default=0.1)
    add("--one-by-one", action="store_true", help="not in turns: less memory, more drift")
    add("--memory", action="store_true", help="peak memory over batch sizes, one process after another")
    add("--scaling", action="store_true", help="our time over batch, views, masks and model size")
    args = p.parse_args(argv)
    if args.memory and args.scaling:
        raise UsageError("--memory and --scaling are two benchmarks; choose one")
    if len(args.batch) > 1 and not args.memory:
        raise UsageError(f"--batch: got {args.batch}; several numbers are for --memory, use one")
    harness.settle(args)
    kind, size = args.device.partition(":")[0], int(not args.quick)
    batch, rounds, steps = SIZES[kind][size]
    args.batch = args.batch or (MEMORY_BATCHES[kind][size] if args.memory else [batch])
    args.rounds, args.steps = (
        (1, args.steps or 5) if args.memory else (args.rounds or rounds, args.steps or steps)
    )
    default = MEMORY_PROVIDERS if args.memory else ["ours"] if args.scaling else ["main"]
    args.providers = args.providers or default
    if args.name == "step" and (args.memory or args.scaling):
        args.name = "memory" if args.memory else "scaling"
    return args


def parse_mask(text: str) -> tuple[float, int]:
    """Reads `80x5` as (0.8, 5)."""
    percent, _, views = text.partition("x")
    try:
        return float(percent) / 100, int(views)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected PERCENTxVIEWS like 80x5, got {text!r}") from None


def plan(args: argparse.Namespace, providers: list[Provider]) -> tuple[list[list[Job]], str]:
    """Returns the jobs by group (those of a group take turns), and what is measured, in words."""
    kind, (ratio, views) = args.device.partition(":")[0], args.mask
    point = {"size": args.model, "ratio": ratio, "views": views, "batch": args.batch[0]}
    model = f"ViT-{args.model}/16"

    def job(p: Provider, key: str, changed: dict[str, Any], axis: str = "", value: float | str = 0) -> Job:
        cfg = configuration(**point | changed, color=args.color, drop_path=args.drop_path)
        return Job(key, p, cfg, args.device, args.threads, axis, value)

    if args.memory:
        groups = [[job(p, f"{p.name} batch {b}", {"batch": b})] for b in args.batch for p in providers]
        return groups, f"memory of a step, {model} on {kind}"
    if args.scaling:
        groups = []
        for axis, values in SCALING[kind].items():
            points = values[int(not args.quick)]
            names = [
                "x".join(f"{v:g}" if isinstance(v, float) else str(v) for v in c.values()) for c in points
            ]
            rows = zip(points, names, strict=True)
            groups.append(
                [job(p, f"{axis} {n}", c, axis, c.get(axis, n)) for c, n in rows for p in providers]
            )
        return groups, f"how a step of {model} grows, on {kind}"
    jobs = [job(p, p.name, {}) for p in providers]
    what = f"training step, {model}, {100 * ratio:g} % x {views}, batch {args.batch[0]} on {kind}"
    return [[j] for j in jobs] if args.one_by_one else [jobs], what


def measure(groups: list[list[Job]], args: argparse.Namespace) -> dict[str, Any]:
    """Checks every provider, then times each group in turns; returns settings, rates, checks and rows."""
    jobs = [job for group in groups for job in group]
    cfg = jobs[0].cfg
    rows: dict[str, Row] = {job.key: first_row(job) for job in jobs}
    different = [job for job in jobs if job.cfg == cfg]
    sampled: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        say(f"comparing loss and gradients of {', '.join(j.provider.name for j in different)}")
        try:
            with Worker(Check, different, weights) as worker:
                checks, truth = worker.built["checks"], worker.built["first_loss"]
        except WorkerError as error:
            raise UsageError(f"the comparison with ours failed: {error}") from None
        with Worker(Rates, args.device, sorted({j.precision for j in jobs}), args.threads) as rates:
            for group in groups:
                with Turns(rows) as turns:
                    for job in group:
                        start = weights if job.cfg == cfg else None
                        turns.start(job.key, Stepping, job, start, environment=job.provider.environment)
                    warm = WARMUP[torch.device(args.device).type][1]
                    turns.run(args.rounds, warm, args.steps, before=lambda: sampled.append(rates("sample")))
                    turns.add("memory")
                    if not (args.memory or args.scaling):
                        turns.add("matmuls")
                if turns.interrupted:
                    break
    measured = harness.medians(sampled)
    for row in rows.values():
        if row.get("samples_ms"):
            finish(row, measured)
    checks += [first_step(rows[j.key], truth) for j in different if "first_loss" in rows[j.key]]
    width, depth, heads = cfg.model.shape
    settings = {
        "model": args.model, "width": width, "depth": depth, "heads": heads, "mask_ratio": cfg.mask.ratio,
        "views": cfg.mask.views, "kept": cfg.num_keep, "patches": cfg.model.num_patches, "batch": args.batch[0],
        "drop_path": cfg.model.drop_path, "policy": cfg.data.policy, "loss": cfg.head.loss, "device": args.device,
        "threads": torch.get_num_threads(), "warmup": WARMUP[torch.device(args.device).type][0],
        "rounds": args.rounds, "steps_per_turn": args.steps, "in_turns": len(groups[0]) > 1, "input_sets": SETS,
        "gflops_per_image": flops_per_image(cfg) / 1e9,
    }  # fmt: skip
    return {
        "settings": settings,
        "rates": measured,
        "rate_samples": sampled,
        "gates": checks,
        "rows": list(rows.values()),
    }


def first_row(job: Job) -> Row:
    """Returns a job's row before anything is measured."""
    p, cfg = job.provider, job.cfg
    row = {
        "key": job.key,
        "provider": p.name,
        "family": p.family,
        "about": p.about,
        "precision": job.precision,
    }
    row |= {"batch": cfg.train.batch_size, "views": cfg.mask.views, "kept": cfg.num_keep}
    row |= {
        "gflops_per_image": flops_per_image(cfg) / 1e9,
        "options": p.options,
        "environment": p.environment,
    }
    return row | ({"axis": job.axis, "value": job.value} if job.axis else {})


def finish(row: Row, rates: dict[str, float]) -> None:
    """Adds percentiles, images/s and MFU to a timed row."""
    row |= percentiles(row["samples_ms"])
    row["images_per_s"] = 1000 * row["batch"] / row["p50_ms"]
    row["tflops"] = row["images_per_s"] * row["gflops_per_image"] / 1000
    large = rates.get(f"products_{row['precision']}_tflops")
    if large:
        row["mfu"] = row["tflops"] / large
        if row.get("products", {}).get("tflops"):
            row["products"]["of_large"] = row["products"]["tflops"] / large


def first_step(row: Row, truth: float) -> dict[str, Any]:
    """Returns the check of a first step, compiled and in its own precision, against the fp32 loss."""
    loss, precision = row["first_loss"], row["precision"]
    error = abs(loss - truth) / max(abs(truth), 1e-12)
    text = f"first step's {precision} loss {loss:.5f}, off by {error:.1e} from fp32"
    passed = error <= (LOSS_FP32 if precision == "fp32" else LOSS_16)
    return {"name": row["provider"], "passed": passed, "found": text}


# ---- conclusions ----------------------------------------------------------------------------------


def conclusions(record: Record, args: argparse.Namespace) -> dict[str, Any]:
    """Returns what follows from the rows, and the headline for the index."""
    rows = record["rows"]
    if args.memory:
        found = per_image(rows)
        return {
            "per_image": found,
            "headline": "; ".join(f"{n} {v:.1f} MB per image" for n, v in found.items()),
        }
    if args.scaling:
        powers = growth(rows)
        return {"growth": powers, "headline": "; ".join(f"time ~ {a}^{p:.2f}" for a, p in powers.items())}
    compared = ratios(record)
    texts = [
        f"{r['other']}: {'not compared' if 'refused' in r else format(r['ratio'], '.2f') + 'x'}"
        for r in compared
    ]
    return {"ratios": compared, "headline": "; ".join(texts)}


def ratios(record: Record) -> list[dict[str, Any]]:
    """Returns ours against the others; `refused` in place of a number where a check failed or a time is missing.

    `limit` is the ratio that ours would reach if everything but its matmuls were free.
    """
    rows = {r["provider"]: r for r in record["rows"]}
    ours = rows.get("ours")
    if ours is None:
        return []
    failed = {c["name"] for c in record["gates"] if not c["passed"]}
    rivals = [(r["about"], r) for r in rows.values() if r["family"] == "released"]
    strong = [r for r in rows.values() if r["family"] == "strong" and r["precision"] == ours["precision"]]
    if strong:
        rivals.append(("best strong baseline", min(strong, key=lambda r: r.get("p50_ms", float("inf")))))
    found = []
    for what, other in rivals:
        entry: dict[str, Any] = {"what": what, "other": other["provider"]}
        bad = [r["provider"] for r in (ours, other) if r["provider"] in failed or "p50_ms" not in r]
        if bad:
            found.append(entry | {"refused": f"{', '.join(bad)}: no result to compare"})
            continue
        entry |= harness.ratio(other["samples_ms"], ours["samples_ms"])
        entry["memory"] = ours["peak_mb"] / other["peak_mb"] if other.get("peak_mb") else None
        if ours.get("products", {}).get("ms"):
            entry["limit"] = other["p50_ms"] / ours["products"]["ms"]
        found.append(entry)
    return found


def per_image(rows: list[Row]) -> dict[str, float]:
    """Returns the MB that one more image adds to each provider's peak, between its smallest and largest batch."""
    found = {}
    for name in dict.fromkeys(r["provider"] for r in rows):
        mine = sorted((r["batch"], r["peak_mb"]) for r in rows if r["provider"] == name and "peak_mb" in r)
        if len(mine) > 1:
            found[name] = (mine[-1][1] - mine[0][1]) / (mine[-1][0] - mine[0][0])
    return found


def growth(rows: list[Row]) -> dict[str, float]:
    """Returns per numeric axis the exponent p of ms ~ value^p; 1 is linear, less grows slower."""
    found = {}
    for axis in ("batch", "views"):
        points = [(r["value"], r["p50_ms"]) for r in rows if r.get("axis") == axis and "p50_ms" in r]
        if len(points) > 1:
            found[axis] = harness.slope(*zip(*points, strict=True))
    return found


def page(record: Record) -> list[str]:
    """Returns the record to read."""
    s, rows = record["settings"], record["rows"]
    how = "in turns" if s["in_turns"] else "one after another"
    out = [
        *harness.heading(record),
        f"{s['gflops_per_image']:.2f} GFLOP per image, {s['kept']} of {s['patches']} tokens in each of {s['views']} "
        f"views, drop-path {s['drop_path']:g}, policy {s['policy']}, {s['loss']} loss. {s['warmup']} warm-up steps, "
        f"then {s['rounds']} rounds of {s['steps_per_turn']} timed step(s) per provider, {how}. In the same run: "
        + ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in record["rates"].items())
        + ".",
    ]
    if record.get("ratios"):
        lines = []
        for r in record["ratios"]:
            result = ["**not compared**", r["refused"], "-"] if "refused" in r else harness.ratio_cells(r)
            more = [f"{r[k]:.2f}" if r.get(k) else "-" for k in ("limit", "memory")]
            lines.append([f"{r['what']} (`{r['other']}`)", *result, *more])
        head = ["ours against", "time", "95 % interval", "verdict", "limit", "peak memory"]
        out += ["## Ratios", table(head, lines)]
        out.append("*limit*: the ratio if everything in our step but its matmuls were free.")
    out += [
        f"* `{n}`: one more image adds {mb:.1f} MB to the peak."
        for n, mb in record.get("per_image", {}).items()
    ]
    out += [f"* time ~ {axis}^{p:.2f}" for axis, p in record.get("growth", {}).items()]
    steps = ["row=key", "dtype=precision", "p20 ms=p20_ms:.1f", "p50 ms=p50_ms:.1f", "p80 ms=p80_ms:.1f"]
    steps += [
        "images/s=images_per_s:.2f",
        "MFU=mfu:.1%",
        "peak MB=peak_mb:.0f",
        "steps add MB=step_adds_mb:.0f",
    ]
    steps += [
        "first step s=first_step_s:.1f",
        "matmuls=products.share:.0%",
        "their TFLOP/s=products.tflops:.3f",
    ]
    return [
        *out,
        "## Steps",
        harness.columns([r for r in rows if "p50_ms" in r], *steps),
        "MFU: model FLOPs over the rate of large matmuls of the same dtype in this run. Peak: memory of the provider's "
        "own process after warm-up (resident on a CPU, allocated by torch on a GPU); *steps add*: minus what was there "
        "before the first step. Matmuls: their share of one profiled step, without fused attention. On a CPU ours has "
        "the memory settings of the command line (huge pages, freed memory is kept), the others the system's; "
        "--providers allocator compares them.",
        "## Checks",
        harness.columns(record["gates"], "provider=name", "passed=passed", "found=found"),
        *harness.lost(record),
    ]
