"""Resolves a configuration on this machine: settles every `auto` once, checks modes, derives values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import config
from ..config import Config, FinetuneConfig, ModelConfig, local_batch
from ..data.image_files import measure_statistics
from ..data.image_source import ImageSource, among
from ..data.loader import choose_loader, decoding_threads
from ..data.resident import Place
from ..errors import UsageError, counted
from ..files import read_json
from ..models.extrema import StudentTeacher
from ..ops import dispatch as ops
from ..ops.measure import Choices, Problem, Sizes
from .optim import Schedule

log = logging.getLogger(__name__)

# what the CPU takes to launch a step, at most, and what a GPU computes in a second (`is_short`)
LAUNCHES_S, GPU_FLOPS = 0.04, 4.5e14


@dataclass(frozen=True)
class Resolved:
    """The settings of a run with every `auto` settled; recorded in env.json as `resolved`."""

    device: str
    """`cpu`, `cuda` or `mps`"""
    precision: str
    """`fp32` or `bf16`, of the matrix products"""
    shadow_weights: bool
    """whether linear layers keep bf16 copies of their weights"""
    compile: str
    """`none`, `block` or `step`"""
    cuda_graph: bool
    recompute: str
    """`none`, `gelu` or `norm`"""
    attention: str
    """backend of the student's self-attention at the kept tokens"""
    attention_teacher: str
    """backend of the teacher's at all tokens"""
    ops: dict[str, str]
    """op -> implementation"""
    loader: str
    """`dali` or `pil`"""
    decoding_threads: int
    torch_threads: int
    sharded: bool = False
    """whether each process holds a part of the model"""
    resident: Place = "off"
    """`gpu`, `host` or `off`: where decoded images are held; settled when the images are opened"""

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs of matmuls."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> torch.autocast:
        """Context of the forward passes: bf16 products, or none."""
        # a CUDA graph would replay a cast whose cached result is not renewed
        enabled, cached = self.precision == "bf16", not self.cuda_graph
        return torch.autocast(self.device, torch.bfloat16, enabled, cache_enabled=cached)


def resolve(
    cfg: Config,
    device: torch.device,
    world_size: int = 1,
    choose: Callable[[list[Problem]], Choices] | None = None,
) -> Resolved:
    """Settles what `cfg` leaves open, once, where a run begins; sets and logs the implementation of each op.

    Args:
        choose: chooses between implementations on a GPU (`ops.measure`); None: the fixed rule, and the cache.

    Raises:
        UsageError: modes that cannot run together or on this device, or something asked for by name that is
            missing here.
    """
    train, system, kind = cfg.train, cfg.system, device.type
    # on a CPU compiled code is no faster, needs more memory, and takes a minute to compile (record `modes`)
    mode = {"auto": "block" if kind == "cuda" else "none"}.get(train.compile, train.compile)
    if train.compile == "auto" and (reason := ops.unsupported("color_views", "compiled", device)):
        mode = "none"
        log.warning("nothing is compiled: %s", reason)
    elif kind == "cuda" and (reason := ops.unsupported("attention_pool", "triton", device)):
        log.warning("plain torch runs in place of the kernels: %s", reason)
    _check_modes(cfg, mode, kind, world_size)
    one_gpu = kind == "cuda" and world_size == 1
    dtype_name = precision(train.precision, kind)
    dtype = torch.bfloat16 if dtype_name == "bf16" else torch.float32
    sharded = system.parallel == "fsdp" and world_size > 1
    width, _, heads = cfg.model.shape
    teacher = system.attention if system.attention_teacher == "same" else system.attention_teacher
    ops.set_backend(system.backend)
    if choose is not None:
        unused = {"color_views"} if cfg.data.policy != "spatial+color" else set()
        unused |= {"adamw_ema"} if cfg.optim.name != "adamw" or sharded else set()
        sizes = step_sizes(cfg, world_size)
        problems = ops.problems(
            device,
            sizes,
            dtype_name,
            compiled=mode != "none",
            attention=(system.attention, teacher),
            unused=unused,
        )
        ops.use(problems, choose(problems) if problems else {})
        ops.probe(device, sizes, dtype_name, unused)
    implementations = {op: choice["implementation"] for op, choice in ops.choices(device).items()}
    return Resolved(
        device=kind,
        precision=dtype_name,
        # on a CPU a cast in the forward pass takes as long as syncing a copy, and no memory
        # what gathers shards makes them bf16
        shadow_weights=kind == "cuda" and dtype_name == "bf16" and not sharded,
        compile=mode,
        cuda_graph=train.cuda_graph == "on"
        # the plain optimizers wait for the device, and cannot be recorded
        or (
            train.cuda_graph == "auto"
            and one_gpu
            and implementations["adamw_ema"] == "triton"
            and is_short(cfg)
        ),
        # no cost could be measured on a CPU (record `memory`)
        recompute={"auto": "norm" if kind == "cpu" else "none"}.get(train.recompute, train.recompute),
        attention=ops.check_attention(system.attention, device, dtype, cfg.num_keep, width // heads, True),
        attention_teacher=ops.check_attention(
            teacher, device, dtype, cfg.model.num_patches, width // heads, False
        ),
        ops=implementations,
        loader=choose_loader(cfg.data.loader),
        decoding_threads=decoding_threads(cfg.data.threads),
        torch_threads=system.threads or torch.get_num_threads(),
        sharded=sharded,
    )


def settle_channels(cfg: Config, source: ImageSource | None, *, continued: bool = True) -> Config:
    """`cfg` with mean, standard deviation and policy for channels other than RGB; any other is returned as it is.

    What is not given is that of the run in `cfg.out`, else of the manifest, else measured on a few of the images.

    Args:
        source: training images; None: only what the run has recorded is taken.
        continued: a run in `cfg.out` goes on.
    """
    data, chans = cfg.data, cfg.model.in_chans
    if chans in (1, 3):
        return cfg
    new: dict[str, Any] = {}
    if data.policy == "spatial+color":
        new["policy"] = "spatial"
        log.info(
            "data.policy: spatial, since color jitter and grayscale are for RGB, not for %d channels",
            chans,
        )
    before = read_json(Path(cfg.out) / "config.json", {}).get("data", {}) if continued else {}
    found: dict[str, Any] = {}
    where = "of the run"
    for i, name in enumerate(("mean", "std")):
        values = getattr(data, name)
        if len(values) == chans:
            continue
        if len(values) == 1:
            new[name] = values * chans
            continue
        recorded = before.get(name) if isinstance(before, dict) else None
        if isinstance(recorded, list) and len(recorded) == chans:
            found[name] = tuple(recorded)
        elif source is not None:
            statistics = source.statistics
            where = "of the manifest"
            if statistics is None or len(statistics[0]) != chans:
                statistics, where = measure_statistics(source, data), "measured on a few images"
            found[name] = statistics[i]
    if source:
        for name, values in found.items():
            log.info("data.%s: %s (%s)", name, " ".join(f"{v:g}" for v in values), where)
    return replace(cfg, data=replace(data, **new, **found))


def is_short(cfg: Config) -> bool:
    """Whether a GPU computes a step of one process in less time than a CPU needs to launch it.

    The launches take up to 40 ms (35 in record 2026-11-27_nvidia-h200_step_base, whose GPU computes 464 TFLOP/s).
    """
    return (
        not isinstance(cfg, FinetuneConfig)
        and cfg.optim.name == "adamw"
        and cfg.train.fp8 == "off"
        and flops_per_image(cfg) * cfg.train.batch_size < LAUNCHES_S * GPU_FLOPS
    )


def step_sizes(cfg: Config, world_size: int) -> Sizes:
    """What one process computes in one forward and backward pass."""
    model = cfg.model
    width, depth, heads = model.shape
    return Sizes(
        images=local_batch(cfg, world_size),
        views=cfg.mask.views,
        kept=cfg.num_keep,
        patches=model.num_patches,
        width=width,
        heads=heads,
        depth=depth,
        hidden=int(width * model.mlp_ratio),
        patch=model.patch_size,
        height=model.img_size[0],
        width_px=model.img_size[1],
        chans=model.in_chans,
    )


def _check_modes(cfg: Config, mode: str, kind: str, world_size: int) -> None:
    train = cfg.train
    recorded = train.cuda_graph == "on"
    if recorded and kind != "cuda":
        raise UsageError(
            f"train.cuda_graph: needs a CUDA device, this run is on {kind}; use train.compile instead"
        )
    if kind == "mps" and cfg.optim.name != "adamw":
        raise UsageError(
            f"optim.name: {cfg.optim.name} is not made for MPS; use optim.name adamw, or system.device cpu"
        )
    for name, on in (("cuda_graph", recorded), ("compile step", mode == "step")):
        if on and world_size > 1:
            raise UsageError(
                f"train.{name}: bypasses the all-reduce of gradients between {world_size} processes; "
                "use train.compile block"
            )
    if cfg.system.parallel == "fsdp" and world_size > 1:
        if cfg.optim.name != "adamw":
            raise UsageError(
                f"optim.name: {cfg.optim.name} takes norms of whole layers, and system.parallel fsdp spreads them over "
                f"{world_size} processes; use optim.name adamw, or system.parallel ddp"
            )
        if cfg.train.fp8 != "off":
            raise UsageError(
                f"train.fp8: {cfg.train.fp8} is not made for system.parallel fsdp; use train.fp8 off, or "
                "system.parallel ddp"
            )
    if mode == "step" and cfg.head.whole_batch and train.accumulation > 1:
        raise UsageError(
            f"train.compile step: with InfoNCE or whitened targets the teacher must cover all {train.accumulation} "
            "micro-batches before the first student pass; use train.accumulation 1, or train.compile block"
        )


def precision(setting: str, device_type: str) -> str:
    """`fp32` or `bf16` for `train.precision`; `auto` is bf16 on GPUs and CPUs (AVX512-BF16, AMX) that multiply it.

    On MPS it is fp32, which older systems of Apple alone have.
    """
    if setting != "auto":
        return setting
    if device_type == "mps":
        return "fp32"
    if device_type == "cpu":
        # torch 2.10 does not tell yet
        has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"
    # before compute capability 8.0 it is emulated
    emulated = device_type == "cuda" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False)
    return "fp32" if emulated else "bf16"


# ---- derived values ---------------------------------------------------------------------------------


def flops_per_image(cfg: Config) -> float:
    """FLOPs of one training step per image: three times the student's forward pass of V views, once the teacher's.

    The patch embedding counts all N patches for both branches, whatever is gathered first, and twice for the
    student, because pixels have no gradient. Recomputation does not change the count. Fine-tuning has no teacher.
    """
    h, width, views = cfg.head, cfg.model.shape[0], cfg.mask.views
    if isinstance(cfg, FinetuneConfig):
        patches = cfg.model.num_patches * cfg.model.in_chans * cfg.model.patch_size**2
        return 3 * _count_flops(cfg.model, 1, cfg.model.num_patches) + 4 * patches * width
    projector = 2 * (width * h.hidden + h.hidden**2 + h.hidden * h.out)
    predictor = 2 * (h.out * h.predictor_hidden + h.predictor_hidden * h.out)
    student = _count_flops(cfg.model, views, cfg.num_keep) + views * (projector + predictor)
    teacher = _count_flops(cfg.model, 1, cfg.model.num_patches) + projector
    patches = 2 * cfg.model.num_patches * cfg.model.in_chans * cfg.model.patch_size**2 * width
    return 3 * student + teacher + 3 * patches


def _count_flops(model: ModelConfig, rows: int, n: int) -> float:
    """Forward FLOPs of `rows` sequences of `n` tokens through trunk and absorbed pooling."""
    width, depth, _ = model.shape
    trunk = depth * (24 * width**2 * n + 4 * n**2 * width)
    pool = model.pool_depth * (24 * width**2 + 4 * model.shape[2] * (n + 1) * width)
    return float(rows * (trunk + pool))


def checkpoint_bytes(method: StudentTeacher) -> int:
    """Bytes of one checkpoint and its weights folder: fp32 weights twice, two AdamW moments."""
    trained = sum(p.numel() for _, p in method.student_parameters())
    weights = sum(t.numel() for t in method.state_dict().values())
    return 4 * (2 * weights + 2 * trained)


def derived(cfg: Config, processes: int = 1, images: int | None = None) -> dict[str, Any]:
    """Values that follow from the configuration (and from the number of training images, when known)."""
    schedule = None if images is None else Schedule(cfg, images // cfg.train.batch_size)
    return config.derived(cfg, processes) | {
        "gflops_per_image": round(flops_per_image(cfg) / 1e9, 6),
        "images": images,
        "steps_per_epoch": schedule and schedule.steps_per_epoch,
        "total_steps": schedule and schedule.total_steps,
        "warmup_steps": schedule and schedule.warmup_steps,
    }


_LOADING = {"gpu": "images held by the GPU", "host": "images held by the CPU", "off": ""}


def headline(
    cfg: Config, resolved: Resolved, processes: int, images: int, classes: Sequence[str] = (), what: str = ""
) -> str:
    """The run in three lines: what is trained on how many images an epoch, batch and rate, how it is computed.

    Args:
        what: is trained; empty: views, tokens and loss of pretraining.
    """
    v, r = derived(cfg, processes, images), resolved
    what = what or f"{cfg.mask.views} views of {v['num_keep']} of {v['num_patches']} tokens; {cfg.head.loss}"
    factors = f"{processes} x {cfg.train.accumulation} x {v['local_batch']}"
    return (
        f"{cfg.data.train}: {images} images{among(classes)}, {counted(cfg.train.epochs, 'epoch')} of "
        f"{v['steps_per_epoch']} steps; "
        f"{what}, {r.precision} on {r.device}, {_LOADING[r.resident] or r.loader + ' loader'}\n"
        f"batch {cfg.train.batch_size} (processes x micro-batches x images = {factors}), "
        f"peak learning rate {cfg.peak_lr:.3g} = {cfg.optim.base_lr:g} x {cfg.train.batch_size} / 256\n"
        f"compile {r.compile}{' in a CUDA graph' if r.cuda_graph else ''}, recompute {r.recompute}, attention "
        f"{r.attention} (student) {r.attention_teacher} (teacher), threads {r.torch_threads} (torch) "
        f"{r.decoding_threads} (decoding)"
    )


def describe(values: dict[str, Any]) -> str:
    """Aligned `name  value` lines."""
    width = max(len(name) for name in values)

    def text(v: Any) -> str:
        return f"{v:.4g}" if isinstance(v, float) else str(v)

    return "\n".join(f"{name:<{width}}  {text(value)}" for name, value in values.items())
