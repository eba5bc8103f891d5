"""Two colour-jittered views of one crop, on the device, with torchvision's ColorJitter semantics.

Each transformation is keyed by (seed, sample row, epoch, view), see `extrema_fast.rng`. The definition of the
operations is `kernels/color_views/reference.py` (method.md section 5; data.md section 5).
"""

from __future__ import annotations

from torch import Tensor

from . import ops, rng
from .config import DataConfig
from .kernels.color_views.reference import color_params, normalize

__all__ = ["color_views", "normalize"]


def color_views(
    images: Tensor, index: Tensor, cfg: DataConfig, *, seed: int, epoch: int, in_chans: int = 3
) -> tuple[Tensor, Tensor]:
    """(student image, teacher image): independent colour versions of the same crop, or the crop twice.

    images:  [B, H, W, 3] uint8;  index: [B] int64 sample rows on the same device
    returns  two fp32 tensors [B, C, H, W], normalised; the same tensor twice unless cfg.policy has colour
    """
    if cfg.policy != "spatial+color":
        x = normalize(images, cfg.mean, cfg.std, in_chans)
        return x, x
    params = color_params(
        index,
        cfg.jitter,
        cfg.jitter_prob,
        cfg.gray_prob,
        seed=seed,
        epoch=epoch,
        streams=(rng.COLOR_STUDENT, rng.COLOR_TEACHER),
    )
    return ops.color_views(images, params, cfg.mean, cfg.std, channels=in_chans)
