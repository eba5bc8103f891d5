"""What follows from a configuration: derived values, FLOPs, sizes; for --print-config and --dry-run."""

from __future__ import annotations

from typing import Any

import torch

from ..config import Config, local_batch
from ..models.encoder import count_flops
from ..models.extrema import ExtreMA
from .optim import Schedule


def flops_per_image(cfg: Config) -> float:
    """FLOPs of one training step per image: student V views of K tokens x 3, teacher N tokens once, heads.

    The factor 3 is forward plus backward. The patch embedding counts all N patches for both branches, whatever
    is gathered first, and twice for the student: pixels have no gradient. Recomputation never changes the count.
    """
    h, width, views = cfg.head, cfg.model.shape[0], cfg.mask.views
    projector = 2 * (width * h.hidden + h.hidden**2 + h.hidden * h.out)
    predictor = 2 * (h.out * h.predictor_hidden + h.predictor_hidden * h.out)
    student = count_flops(cfg.model, views, cfg.num_keep) + views * (projector + predictor)
    teacher = count_flops(cfg.model, 1, cfg.model.num_patches) + projector
    patches = 2 * cfg.model.num_patches * cfg.model.in_chans * cfg.model.patch_size**2 * width
    return 3 * student + teacher + 3 * patches


def derived(cfg: Config, processes: int = 1, images: int | None = None) -> dict[str, Any]:
    """Values that follow from the configuration (and from the number of training images, when known)."""
    out: dict[str, Any] = {
        "grid": list(cfg.model.grid),
        "num_patches": cfg.model.num_patches,
        "num_keep": cfg.num_keep,
        "width_depth_heads": list(cfg.model.shape),
        "peak_lr": cfg.peak_lr,
        "global_batch": cfg.train.batch_size,
        "processes": processes,
        "local_batch": local_batch(cfg, processes),
        "gflops_per_image": round(flops_per_image(cfg) / 1e9, 6),
        "images": images,
        "steps_per_epoch": None,
        "total_steps": None,
        "warmup_steps": None,
    }
    if images is not None:
        schedule = Schedule(cfg, images // cfg.train.batch_size)
        out["steps_per_epoch"] = schedule.steps_per_epoch
        out["total_steps"], out["warmup_steps"] = schedule.total_steps, schedule.warmup_steps
    return out


def headline(cfg: Config, processes: int, images: int, device: str, loader: str) -> str:
    """The run in two lines: what is trained on how many images an epoch, and the values derived from the batch size."""
    v = derived(cfg, processes, images)
    parts = f"{processes} x {cfg.train.accumulation} x {v['local_batch']}"
    return (
        f"{cfg.data.train}: {images} images, {cfg.train.epochs} epochs of {v['steps_per_epoch']} steps; "
        f"{cfg.mask.views} views of {v['num_keep']} of {v['num_patches']} tokens; {cfg.head.loss}, "
        f"{precision(cfg, torch.device(device).type)} on {device}, {loader} loader\n"
        f"batch {cfg.train.batch_size} (processes x micro-batches x images = {parts}), "
        f"peak learning rate {cfg.peak_lr:.3g} = {cfg.optim.base_lr:g} x {cfg.train.batch_size} / 256"
    )


def precision(cfg: Config, device_type: str) -> str:
    """`fp32` or `bf16` of the matrix products.

    `auto` is bf16 where the hardware multiplies it: CUDA, and processors with AVX512-BF16 or AMX.
    """
    if cfg.train.precision != "auto":
        return cfg.train.precision
    if device_type == "cpu":
        # torch 2.10 has no such list yet
        has = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"
    return "bf16"


def checkpoint_bytes(method: ExtreMA) -> int:
    """Bytes of one checkpoint and its weights folder: fp32 weights twice, two AdamW moments."""
    trained = sum(p.numel() for _, p in method.student_parameters())
    weights = sum(t.numel() for t in method.state_dict().values())
    return 4 * (2 * weights + 2 * trained)


def describe(values: dict[str, Any]) -> str:
    """Aligned `name  value` lines."""
    width = max(len(name) for name in values)

    def text(v: Any) -> str:
        return f"{v:.4g}" if isinstance(v, float) else str(v)

    return "\n".join(f"{name:<{width}}  {text(value)}" for name, value in values.items())
