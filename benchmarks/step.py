"""The training step: the released formulation, a strong plain-PyTorch baseline and ours in one run.

python -m benchmarks step --quick
python -m benchmarks step --model base --mask 90x8 --batch 256 --providers main modes
python -m benchmarks step --released-code DIR    a checkout of the released code in place of its formulation
python -m benchmarks step --memory               peak memory over batch sizes and recomputation options
python -m benchmarks step --scaling              how our step grows with batch, views, masks and model

Every provider gets the same random uint8 images, draws its own masks and drop-path, and makes whole optimizer steps
in its own process; the processes take turns. First each one's loss and gradients are compared with ours: nothing is
concluded about one that differs. Color jitter is part of the step; --no-color leaves it out.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from extrema_fast.config import Config, did_you_mean, from_dict
from extrema_fast.errors import UsageError
from extrema_fast.models.drop_path import drop_path_scale
from extrema_fast.models.masking import draw_views
from extrema_fast.ops import dispatch
from extrema_fast.training.resolve import flops_per_image, precision
from extrema_fast.training.run import keep_freed_memory

from . import harness
from .baselines import Inputs, Ours, Released, ReleasedCode, Stepper, Strong, check_checkout, with_settings
from .harness import RATIO, Record, Row, columns, say
from .processes import Rates, Turns, Worker, WorkerError, clock, matmul_share, memory_mb, prepare, reset_peak

MODELS = ("tiny", "small", "base", "large")
SETS = 4
# untimed steps at first, and before each turn
WARMUP = {"cpu": (2, 0), "cuda": (20, 3)}
# (images per step, rounds, timed steps per turn): --quick, and otherwise
SIZES = {"cpu": [(16, 6, 1), (16, 10, 1)], "cuda": [(256, 5, 10), (256, 6, 12)]}
MEMORY_BATCHES = {"cpu": [[2, 4], [8, 16, 32]], "cuda": [[64, 128], [64, 128, 256, 512, 1024]]}
MEMORY_PROVIDERS = ["released", "strong-eager", "ours", "memory"]
# relative errors allowed: loss and gradients in fp32; a first step's loss in 16 bits against fp32
LOSS_FP32, GRADIENTS_FP32, LOSS_16 = 1e-4, 2e-3, 1e-2
# what a row holds of its times
FIGURES = ("samples_ms", "p20_ms", "p50_ms", "p80_ms", "images_per_s", "tflops", "mfu")
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


# ---- providers ------------------------------------------------------------------------------------

CLASSES = {"released": Released, "strong": Strong, "ours": Ours}
EAGER: dict[str, Any] = {"compile": False}
FORMULA: dict[str, Any] = {"plain_attention": True}


@dataclass(frozen=True)
class Provider:
    """One way to make a training step.

    Attributes:
        name: unique; a row of the table. It begins with the family: which ratios it takes part in.
        about: one line.
        groups: names under which it can be asked for together with others.
        precision: auto (the configuration's), amp (fp16 with a loss scaler on a GPU, else auto), or fp32.
        options: keyword arguments of its class; for ours dotted options of the configuration.
        needs: cuda, or an implementation of `mlp` that can run: triton, quack.
        allocator: `ours` (huge pages, freed memory is kept, as the command line sets it), `system`, or auto.
        build: its class; by default that of the family.
    """

    name: str
    about: str
    groups: tuple[str, ...] = ()
    precision: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    needs: str = ""
    allocator: str = "auto"
    build: type[Stepper] | None = None

    @property
    def family(self) -> str:
        """Returns released, strong or ours."""
        return re.split("[- ]", self.name)[0]

    def resolved(self, device: str) -> str:
        """Returns the precision it runs in on that device: fp32, bf16 or fp16."""
        kind = device.partition(":")[0]
        if self.precision == "amp":
            return "fp16" if kind == "cuda" else precision("auto", kind)
        return precision(self.precision, kind)

    def missing(self, device: str) -> str:
        """Returns why it cannot run there; empty when it can."""
        if self.needs and not device.startswith("cuda"):
            return "needs a CUDA device"
        return "" if self.needs in ("", "cuda") else dispatch.unsupported("mlp", self.needs, device)

    @property
    def environment(self) -> dict[str, str]:
        """Returns the variables of its process."""
        if self.keeps_memory:
            return {HUGE_PAGES: "1"}
        # glibc's default, set explicitly, keeps our step from changing it
        return {HUGE_PAGES: "0", "MALLOC_TOP_PAD_": "131072"} if self.family == "ours" else {}

    @property
    def keeps_memory(self) -> bool:
        """Whether it has the memory settings of the command line; a strong baseline has them as well."""
        return self.allocator == "ours" or (self.allocator == "auto" and self.family != "released")

    def eager(self) -> Provider:
        """Returns the same arithmetic without compilation or graph capture."""
        off = {"ours": {"train.compile": "none", "train.cuda_graph": "off"}, "strong": EAGER}
        # nor are implementations measured for a size that is not timed
        first = {"system.backend": "fixed"} if self.family == "ours" else {}
        return replace(self, options=first | self.options | off.get(self.family, {}))

    def make(self, cfg: Config, device: torch.device, dtype: str) -> Stepper:
        """Builds it."""
        if self.keeps_memory and device.type == "cpu":
            keep_freed_memory()
        return (self.build or CLASSES[self.family])(cfg, device, dtype, **self.options)


MAIN, STRONG, MODES = ("main",), ("main", "baselines"), ("modes",)
GRAPH, TRITON = {"train.cuda_graph": "on"}, {"system.backend": "triton"}
QUACK = {"system.backend": "mlp=quack"}
PROVIDERS: tuple[Provider, ...] = (
    Provider("released", "the released formulation, eager, autocast", MAIN, "amp"),
    Provider("released-fp32", "the released formulation, eager, fp32", MAIN, "fp32"),
    Provider("strong", "same maths: full-graph compile, fastest SDPA, fused AdamW, foreach EMA", STRONG),
    Provider("strong-plain-attention", "strong with the attention formula", STRONG, options=FORMULA),
    Provider("strong-eager", "strong, not compiled", STRONG, options=EAGER),
    Provider("strong-eager-plain-attention", "neither", STRONG, options=EAGER | FORMULA),
    Provider("strong-fp32", "strong in fp32", ("fp32",), "fp32"),
    Provider("ours", "this project, default settings", MAIN),
    Provider("ours-fp32", "this project in fp32", ("fp32",), "fp32"),
    *(
        Provider(f"ours-compile-{mode}", f"train.compile {mode}", MODES, options={"train.compile": mode})
        for mode in ("none", "block", "step")
    ),
    Provider("ours-cuda-graph", "the whole step recorded", MODES, options=GRAPH, needs="cuda"),
    Provider("ours-triton", "every Triton kernel", MODES, options=TRITON, needs="triton"),
    Provider("ours-quack", "QuACK's GELU matmuls in the trunk", MODES, options=QUACK, needs="quack"),
    *(
        Provider(f"ours-recompute-{x}", f"train.recompute {x}", ("memory",), options={"train.recompute": x})
        for x in ("none", "gelu", "norm")
    ),
    # how much of a ratio on a CPU comes from the allocator
    Provider("ours-system-allocator", "the system's memory settings", ("allocator",), allocator="system"),
    Provider("strong-system-allocator", "strong, the same", ("allocator",), allocator="system"),
)


def chosen(
    names: list[str], device: str, *, released_code: str = "", extra: list[str] | None = None
) -> tuple[list[Provider], dict[str, str]]:
    """Selects providers by name or group.

    Args:
        names: names or groups of `PROVIDERS`, or `all`; the rows come in this order.
        device: where they are to run.
        released_code: path of a checkout, which takes the place of the released formulation.
        extra: more rows of ours with options, such as `train.compile=step,train.recompute=gelu`.

    Returns:
        Those that can run and differ from each other, and {name: reason} of the rest.

    Raises:
        UsageError: an unknown name or option.
    """
    known = [*sorted({g for p in PROVIDERS for g in p.groups}), "all", *(p.name for p in PROVIDERS)]
    for name in names:
        if name not in known:
            raise UsageError(f"--providers: unknown {name!r}{did_you_mean(name, known)}")
    wanted = [p for name in dict.fromkeys(names) for p in PROVIDERS if name in (p.name, *p.groups, "all")]
    wanted = list({p.name: p for p in wanted}.values())
    if released_code:
        options: dict[str, Any] = {"path": released_code}
        for i, p in enumerate(wanted):
            if p.family == "released":
                name = p.name.replace("released", "released-code")
                wanted[i] = replace(p, name=name, about="that checkout", options=options, build=ReleasedCode)
    for text in extra or []:
        options = parse_settings(text)
        with_settings(Config(), options)
        wanted.append(Provider(f"ours {text}", f"this project with {text}", options=options))
    able: dict[str, Provider] = {}
    unable: dict[str, str] = {}
    for p in wanted:
        identity = str((p.build, p.family, p.resolved(device), sorted(p.options.items()), p.environment))
        if why := p.missing(device):
            unable[p.name] = why
        elif identity in able:
            unable[p.name] = f"the same as {able[identity].name} here"
        else:
            able[identity] = p
    return list(able.values()), unable


def parse_settings(text: str) -> dict[str, Any]:
    """Reads `train.compile=step,system.backend=lamb=foreach,adamw_ema=fused` as dotted options."""
    found: dict[str, Any] = {}
    # a comma that no section.option follows belongs to the value
    for setting in re.split(r",(?=\w+\.\w+=)", text):
        name, equals, value = setting.partition("=")
        if not equals or "." not in name:
            raise UsageError(
                f"--ours: expected section.option=value like train.compile=step, got {setting!r}"
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def configuration(
    size: str = "small",
    ratio: float = 0.8,
    views: int = 5,
    batch: int = 16,
    *,
    color: bool = False,
    drop_path: float = 0.1,
    **sections: dict[str, Any],
) -> Config:
    """Returns the paper's recipe at a size, batch and masks; `sections` replace further options.

    Without warm-up epochs, so that the first steps change the weights; that changes no time.
    """
    recipe = {
        "data": {"policy": "spatial+color" if color else "spatial"},
        "mask": {"ratio": float(ratio), "views": views},
        "model": {"size": size, "drop_path": drop_path},
        "optim": {"warmup_epochs": 0.0},
        "train": {"batch_size": batch},
    }
    return from_dict(sections, from_dict(recipe, Config()))


# ---- inside a process -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One row: a provider at a configuration on a device; axis: what --scaling changes."""

    key: str
    provider: Provider
    cfg: Config
    device: str
    threads: int = 0
    axis: str = ""

    @property
    def precision(self) -> str:
        """Returns fp32, bf16 or fp16."""
        return self.provider.resolved(self.device)


def random_images(cfg: Config, sets: int, device: torch.device) -> list[Inputs]:
    """Returns batches of random uint8 images, the same for every provider (zeros would draw less power)."""
    generator = torch.Generator().manual_seed(0)
    b, shape = cfg.train.batch_size, (cfg.train.batch_size, *cfg.model.img_size, 3)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(sets)]
    rows = [torch.arange(i * b, (i + 1) * b) for i in range(sets)]
    if device.type == "cuda":
        # as the loaders give them: their copy is not waited for
        rows = [index.pin_memory() for index in rows]
    return [Inputs(x.to(device), index) for x, index in zip(images, rows, strict=True)]


def given(inputs: Inputs, cfg: Config, device: torch.device) -> Inputs:
    """Returns the inputs with our own masks and drop-path factors, for the others to use."""
    index, seed = inputs.index.to(device), cfg.train.seed
    model, mask = cfg.model, cfg.mask
    keep = draw_views(index, model.num_patches, cfg.num_keep, mask.views, mode=mask.mode, seed=seed, epoch=0)
    scale = drop_path_scale(index, mask.views, model.shape[1], model.drop_path, seed=seed, epoch=0)
    return replace(inputs, keep=keep, scale=scale)


class Stepping:
    """A provider ready to step, from the weights in a safetensors file or, with None, its own random ones."""

    def __init__(self, job: Job, weights: Path | None) -> None:
        self.device = prepare(job.device, job.threads, job.precision)
        self.inputs, self.count = random_images(job.cfg, SETS, self.device), 0
        first = given(self.inputs[0], job.cfg, self.device)
        began = time.perf_counter()
        self.stepper = job.provider.make(job.cfg, self.device, job.precision)
        if weights is not None:
            self.stepper.load(weights)
        built, before = time.perf_counter(), memory_mb(self.device)
        self.stepper.step(first)
        loss = self.stepper.loss()
        self.built: dict[str, Any] = {
            "attention": dict(zip(("student", "teacher"), self.stepper.attention, strict=True)),
            "build_s": built - began,
            "first_step_s": time.perf_counter() - built,
            "first_loss": loss,
        }
        clock(self.one, self.device, WARMUP[self.device.type][0] - 1)
        self.built |= {"startup_peak_mb": memory_mb(self.device, peak=True), "before_first_step_mb": before}
        reset_peak(self.device)

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
        """Returns the peak since the warm-up, and what steps add to what was there before the first one.

        A recorded step's memory is taken when it is recorded, so its peak is that of the start.
        """
        peak = memory_mb(self.device, peak=True)
        if isinstance(self.stepper, Ours) and self.stepper.run.resolved.cuda_graph:
            peak = max(peak, self.built["startup_peak_mb"])
        return {"peak_mb": peak, "step_adds_mb": peak - self.built["before_first_step_mb"]}

    def host(self) -> dict[str, float]:
        """Returns the CPU time of a GPU's step in milliseconds: all threads, an empty queue before it."""
        if self.device.type != "cuda":
            return {}
        samples = []
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.process_time()
            self.one()
            samples.append(1000 * (time.process_time() - began))
        return {"cpu_ms": float(np.median(samples))}

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
        save_file({n: p.detach().cpu().contiguous() for n, p in reference.student.items()}, weights)
        inputs = given(random_images(small, 1, device)[0], small, device)
        truth, checks = one_step(reference, inputs), []
        del reference
        for provider in [job.provider for job in jobs]:
            stepper = provider.eager().make(small, device, "fp32")
            stepper.load(weights)
            checks.append(compare(provider.name, one_step(stepper, inputs), truth))
            del stepper
        timed = ours.make(cfg, device, "fp32")
        timed.load(weights)
        loss, _ = one_step(timed, given(random_images(cfg, 1, device)[0], cfg, device))
        self.built = {"first_loss": loss, "checks": checks}


Found = tuple[float, dict[str, Tensor]]


def one_step(stepper: Stepper, inputs: Inputs) -> Found:
    """Returns loss and gradients of a step."""
    stepper.step(inputs)
    gradients = {n: p.grad.detach().clone() for n, p in stepper.student.items() if p.grad is not None}
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
        # a missing gradient and NaN are as wrong as can be
        gap = (found[1].get(key, g + torch.inf) - g).abs().nan_to_num(torch.inf)
        if key.endswith("qkv.bias"):
            gap[len(g) // 3 : 2 * len(g) // 3] = 0
        # a gradient that is nearly zero everywhere is judged by the others' size
        gaps[key] = float(gap.max()) / max(float(g.abs().max()), 1e-4 * largest, 1e-12)
    where = max(gaps, key=lambda k: gaps[k])
    text = f"fp32 loss {found[0]:.6f}, off by {error:.1e}; gradients by {gaps[where]:.1e} ({where})"
    return {"name": name, "passed": error <= LOSS_FP32 and gaps[where] <= GRADIENTS_FP32, "found": text}


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
        check_checkout(Path(args.released_code), groups[0][0].cfg)
    record = harness.new_record(what, "step", argv, args.note, not_run=unable)

    def save(found: dict[str, Any], unfinished: str) -> None:
        harness.save_record(record | found, args, unfinished)

    record |= measure(groups, args, save)
    record |= conclusions(record)
    harness.write_record(record, page(record), args)
    return 1 if any(not c["passed"] for c in record["gates"]) else 0


def options(argv: list[str]) -> argparse.Namespace:
    """Reads the command line and fills in what depends on the device; raises UsageError."""
    p = harness.parser("step", main.__doc__)
    add = p.add_argument
    add("--model", choices=MODELS, default="small")
    add("--mask", type=parse_mask, default=(0.8, 5), metavar="80x5", help="dropped percent x views")
    add("--batch", type=int, nargs="+", default=[], help="images per step (several: with --memory)")
    add("--providers", nargs="+", default=[], metavar="NAME", help="names or groups (default: main)")
    add("--ours", nargs="+", default=[], metavar="OPTION=VALUE,...", help="more rows of ours, with options")
    add("--released-code", default="", metavar="DIR", help="a checkout of microsoft/ExtreMA")
    color = argparse.BooleanOptionalAction
    add("--color", action=color, default=True, help="color jitter, computed in the step (default: on)")
    add("--drop-path", type=float, default=0.1)
    add("--memory", action="store_true", help="peak memory over batch sizes, one process after another")
    add("--scaling", action="store_true", help="our time over batch, views, masks and model size")
    args = p.parse_args(argv)
    if args.memory and args.scaling:
        raise UsageError("--memory and --scaling are two benchmarks; choose one")
    if len(args.batch) > 1 and not args.memory:
        raise UsageError(f"--batch: got {args.batch}; several numbers are for --memory, use one")
    kind, size = harness.settle(args), int(not args.quick)
    batch, rounds, steps = SIZES[kind][size]
    default, providers = [batch], ["ours"] if args.scaling else ["main"]
    if args.memory:
        default, providers, rounds, steps = MEMORY_BATCHES[kind][size], MEMORY_PROVIDERS, 1, 5
    args.batch, args.providers = args.batch or default, args.providers or providers
    args.rounds, args.steps = args.rounds or rounds, args.steps or steps
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
    kind, batch, (ratio, views) = args.device.partition(":")[0], args.batch[0], args.mask
    model = f"ViT-{args.model}/16"

    def jobs(key: str, axis: str = "", **changed: Any) -> list[Job]:
        point = {"size": args.model, "ratio": ratio, "views": views, "batch": batch} | changed
        cfg = configuration(**point, color=args.color, drop_path=args.drop_path)
        return [Job(key.format(p.name), p, cfg, args.device, args.threads, axis) for p in providers]

    if args.memory:
        every = [job for b in args.batch for job in jobs(f"{{}} batch {b}", batch=b)]
        return [[job] for job in every], f"memory of a step, {model} on {kind}"
    if args.scaling:
        axes: dict[str, list[dict[str, Any]]] = {
            "batch": [{"batch": max(1, int(batch * f))} for f in (0.25, 0.5, 1, 2)],
            "views": [{"views": v} for v in (1, 2, 3, 4, 5)],
            "masks": [{"ratio": r, "views": v} for r, v in ((0.5, 2), (0.8, 5), (0.9, 8))],
            "model": [{"size": size} for size in (MODELS[:3] if kind == "cpu" else MODELS[1:])],
        }
        groups = []
        for axis, points in axes.items():
            points = points[:-1] if args.quick else points
            named = [(f"{{}} {axis} {'x'.join(map(str, point.values()))}", point) for point in points]
            groups.append([job for key, point in named for job in jobs(key, axis, **point)])
        return groups, f"how a step of {model} grows, on {kind}"
    every = jobs("{}")
    what = f"training step, {model}, {100 * ratio:g} % x {views}, batch {batch} on {kind}"
    return [every], what


def measure(
    groups: list[list[Job]], args: argparse.Namespace, save: Callable[[dict[str, Any], str], object]
) -> dict[str, Any]:
    """Checks every provider, then times each group in turns; returns settings, rates, checks and rows.

    Args:
        save: called with what was found so far and what is missing, after the checks, each start and each round.
    """
    jobs = [job for group in groups for job in group]
    cfg = jobs[0].cfg
    rows = {job.key: first_row(job) for job in jobs}
    same = [job for job in jobs if job.cfg == cfg]
    sampled: list[dict[str, float]] = []
    checks: list[dict[str, Any]] = []
    warm = WARMUP[torch.device(args.device).type][1]

    def found() -> dict[str, Any]:
        measured = harness.medians(sampled)
        for row in rows.values():
            harness.speed(row)
            large = measured.get(f"products_{row['precision']}_tflops")
            if large and "images_per_s" in row:
                row["tflops"] = row["images_per_s"] * row["gflops_per_image"] / 1000
                row["mfu"] = row["tflops"] / large
        results = {"settings": settings(groups, args), "rates": measured, "rate_samples": sampled}
        return results | {"gates": checks, "rows": list(rows.values())}

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        say(f"comparing loss and gradients of {', '.join(j.provider.name for j in same)}")
        try:
            with Worker(Check, same, weights) as worker:
                checks, truth = worker.built["checks"], worker.built["first_loss"]
        except WorkerError as error:
            raise UsageError(f"the comparison with ours failed: {error}") from None
        save(found(), "nothing was timed")

        def begin(turns: Turns, job: Job, wait: bool = True) -> None:
            start = weights if job in same else None
            turns.start(job.key, Stepping, job, start, environment=job.provider.environment, wait=wait)

        with Worker(Rates, args.device, sorted({j.precision for j in jobs}), args.threads) as rates:
            for group in groups:
                with Turns(rows) as turns:
                    # a GPU's time is dear: all compile at once there
                    at_once = args.device.startswith("cuda")
                    for job in group if at_once else ():
                        begin(turns, job, wait=False)
                    for job in group:
                        if at_once:
                            turns.ready(job.key)
                        else:
                            begin(turns, job)
                        # for a record that is cut off while the next one compiles; it is not kept
                        rows[job.key] |= turns.ask(job.key, "turn", warm, args.steps)
                        save(found(), f"{job.key} had one turn of its own, and no one waited for the others")
                    for job in group:
                        for name in FIGURES:
                            rows[job.key].pop(name, None)

                    def before_round() -> None:
                        sampled.append(rates("sample"))
                        save(found(), "some rounds are missing")

                    turns.run(args.rounds, warm, args.steps, before=before_round)
                    turns.add("memory")
                    turns.add("host")
                    if not (args.memory or args.scaling):
                        turns.add("matmuls")
                if turns.interrupted:
                    break
    checks += [first_step(rows[j.key], truth) for j in same if "first_loss" in rows[j.key]]
    return found()


def settings(groups: list[list[Job]], args: argparse.Namespace) -> dict[str, Any]:
    """Returns what a record says about how it was measured."""
    cfg = groups[0][0].cfg
    width, depth, heads = cfg.model.shape
    return {
        "model": args.model,
        "width": width,
        "depth": depth,
        "heads": heads,
        "mask_ratio": cfg.mask.ratio,
        "views": cfg.mask.views,
        "kept": cfg.num_keep,
        "patches": cfg.model.num_patches,
        "batch": args.batch[0],
        "drop_path": cfg.model.drop_path,
        "policy": cfg.data.policy,
        "loss": cfg.head.loss,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "warmup": WARMUP[torch.device(args.device).type][0],
        "rounds": args.rounds,
        "steps_per_turn": args.steps,
        "in_turns": len(groups[0]) > 1,
        "input_sets": SETS,
        "gflops_per_image": flops_per_image(cfg) / 1e9,
    }


def first_row(job: Job) -> Row:
    """Returns a job's row before anything is measured."""
    p, cfg = job.provider, job.cfg
    return {
        "key": job.key,
        "provider": p.name,
        "family": p.family,
        "about": p.about,
        "precision": job.precision,
        "batch": cfg.train.batch_size,
        "views": cfg.mask.views,
        "kept": cfg.num_keep,
        "axis": job.axis,
        "gflops_per_image": flops_per_image(cfg) / 1e9,
        "options": p.options,
        "environment": p.environment,
    }


def first_step(row: Row, truth: float) -> dict[str, Any]:
    """Returns the check of a first step, compiled and in its own precision, against the fp32 loss."""
    loss, dtype = row["first_loss"], row["precision"]
    error = abs(loss - truth) / max(abs(truth), 1e-12)
    text = f"first step's {dtype} loss {loss:.5f}, off by {error:.1e} from fp32"
    return {
        "name": row["provider"],
        "passed": error <= (LOSS_FP32 if dtype == "fp32" else LOSS_16),
        "found": text,
    }


# ---- conclusions ----------------------------------------------------------------------------------


def conclusions(record: Record) -> dict[str, Any]:
    """Returns what follows from the rows, and the headline for the index."""
    rows = record["rows"]
    powers, found = growth(rows), per_image(rows)
    if powers:
        return {"growth": powers, "headline": "; ".join(f"time ~ {a}^{p:.2f}" for a, p in powers.items())}
    if found:
        texts = [f"{name} {mb:.1f} MB per image" for name, mb in found.items()]
        return {"per_image": found, "headline": "; ".join(texts)}
    compared = ratios(record)
    texts = [
        f"{r['ratio']:.2f}x {r['other']}" if "ratio" in r else f"{r['other']}: refused" for r in compared
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
    rivals = [r for r in rows.values() if r["family"] == "released"]
    strong = [r for r in rows.values() if r["family"] == "strong" and r["precision"] == ours["precision"]]
    # the fastest of them
    rivals += sorted(strong, key=lambda r: r.get("p50_ms", float("inf")))[:1]
    found = []
    for other in rivals:
        entry: dict[str, Any] = {"what": other["about"], "other": other["provider"]}
        bad = [r["provider"] for r in (ours, other) if r["provider"] in failed or "p50_ms" not in r]
        if bad:
            found.append(entry | {"refused": f"{', '.join(bad)}: no result to compare"})
            continue
        entry |= harness.ratio(other["samples_ms"], ours["samples_ms"])
        if other.get("peak_mb"):
            entry["memory"] = ours["peak_mb"] / other["peak_mb"]
        if ours.get("products", {}).get("ms"):
            entry["limit"] = other["p50_ms"] / ours["products"]["ms"]
        found.append(entry)
    return found


def per_image(rows: list[Row]) -> dict[str, float]:
    """Returns the MB that one more image adds to each provider's peak, between its smallest and largest batch."""
    found = {}
    for name in dict.fromkeys(r["provider"] for r in rows):
        mine = sorted((r["batch"], r["peak_mb"]) for r in rows if r["provider"] == name and "peak_mb" in r)
        if len({batch for batch, _ in mine}) > 1:
            found[name] = (mine[-1][1] - mine[0][1]) / (mine[-1][0] - mine[0][0])
    return found


def growth(rows: list[Row]) -> dict[str, float]:
    """Returns per numeric axis the exponent p of ms ~ value^p; 1 is linear, less grows slower."""
    found = {}
    for axis in ("batch", "views"):
        points = [(r[axis], r["p50_ms"]) for r in rows if r.get("axis") == axis and "p50_ms" in r]
        if len(points) > 1:
            value, ms = np.log(points).T
            found[axis] = float(np.polyfit(value, ms, 1)[0])
    return found


def page(record: Record) -> list[str]:
    """Returns the record to read."""
    s, rows = record["settings"], record["rows"]
    rates = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in record["rates"].items())
    out = [
        f"{s['gflops_per_image']:.2f} GFLOP per image, {s['kept']} of {s['patches']} tokens in each of {s['views']} "
        f"views, drop-path {s['drop_path']:g}, policy {s['policy']}, {s['loss']} loss. {s['warmup']} warm-up steps, "
        f"then {s['rounds']} rounds of {s['steps_per_turn']} timed step(s) per provider, "
        f"{'in turns' if s['in_turns'] else 'one after another'}. In the same run: {rates}."
    ]
    if record.get("ratios"):
        beside = ("limit=limit:.2f", "peak memory=memory:.2f", "not compared=refused")
        out += ["## Ratios", columns(record["ratios"], "ours against=other", *RATIO, *beside)]
        out.append("*limit*: the ratio if everything in our step but its matmuls were free.")
    else:
        out.append(record["headline"])
    times = ("p20 ms=p20_ms:.1f", "p50 ms=p50_ms:.1f", "p80 ms=p80_ms:.1f", "images/s=images_per_s:.2f")
    more = (
        "attention=attention.student",
        "of the teacher=attention.teacher",
        "MFU=mfu:.1%",
        "peak MB=peak_mb:.0f",
        "steps add MB=step_adds_mb:.0f",
        "CPU ms=cpu_ms:.1f",
        "first step s=first_step_s:.1f",
    )
    matmuls = ("matmuls=products.share:.0%", "their TFLOP/s=products.tflops:.3f")
    timed = [r for r in rows if "p50_ms" in r]
    return [
        *out,
        "## Steps",
        columns(timed, "row=key", "dtype=precision", *times, *more, *matmuls),
        "Attention: what the self-attention of the student, and of the teacher, ran on; `sdpa` is the first of "
        "torch's kernels that runs. MFU: model FLOPs over the rate of large matmuls of the same dtype in this run. "
        "Peak: memory of the provider's own process after warm-up (resident on a CPU, allocated by torch on a GPU); "
        "*steps add*: minus what was there before the first step. Matmuls: their share of one profiled step, without "
        "fused attention. CPU ms: what the process's threads spend on one step of a GPU before they wait for it. On a "
        "CPU ours and the strong baselines have the memory settings of the command line (huge pages, freed memory is "
        "kept), the released formulation the system's; --providers allocator compares them.",
        "## Checks",
        columns(record["gates"], "provider=name", "passed=passed", "found=found"),
        *harness.lost(record),
    ]
