"""Two colour-jittered views of one crop, on the device, with torchvision's ColorJitter semantics.

Each transformation is keyed by (seed, sample row, epoch, view), see `extrema_fast.rng`. The definition of the
operations is `kernels/color_views/reference.py` (method.md section 5; data.md section 5).
"""

from __future__ import annotations

from torch import Tensor

from .. import rng
from ..config import DataConfig
from ..kernels.color_views.reference import color_params, normalize
from ..ops import dispatch as ops

__all__ = ["color_coins", "color_views", "normalize", "paint"]


def color_coins(index: Tensor, cfg: DataConfig, *, seed: int, epoch: int) -> Tensor | None:
    """What `color_views` does to each image, [B, 2, 10] (`kernels.color_views`); None without a colour policy.

    index: [B] int64 sample rows; the coins are on its device
    """
    if cfg.policy != "spatial+color":
        return None
    streams = (rng.COLOR_STUDENT, rng.COLOR_TEACHER)
    return color_params(
        index, cfg.jitter, cfg.jitter_prob, cfg.gray_prob, seed=seed, epoch=epoch, streams=streams
    )


def paint(images: Tensor, coins: Tensor | None, cfg: DataConfig, in_chans: int = 3) -> tuple[Tensor, Tensor]:
    """(student image, teacher image): colour versions of the same crop by `color_coins`, or the crop twice.

    images:  [B, H, W, 3] uint8;  coins: on its device, or None
    returns  two fp32 tensors [B, C, H, W], normalised; the same tensor twice without coins
    """
    if coins is None:
        x = normalize(images, cfg.mean, cfg.std, in_chans)
        return x, x
    return ops.color_views(images, coins, cfg.mean, cfg.std, channels=in_chans)


def color_views(
    images: Tensor, index: Tensor, cfg: DataConfig, *, seed: int, epoch: int, in_chans: int = 3
) -> tuple[Tensor, Tensor]:
    """(student image, teacher image): `paint` with the coins of these rows.

    images:  [B, H, W, 3] uint8;  index: [B] int64 sample rows on the same device
    """
    return paint(images, color_coins(index, cfg, seed=seed, epoch=epoch), cfg, in_chans)
