"""Random parameters of a batch: keep indices, color jitter and drop-path factors, split into micro-batches."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..config import Config
from ..data.augment import jitter_params
from ..models.drop_path import drop_path_scale
from ..models.masking import draw_views


class MicroBatch(NamedTuple):
    """Images of one forward and backward pass, with their random parameters, all on the device."""

    images: Tensor
    """[b, H, W, 3] uint8; with separate crops [b, 2, H, W, 3], the student's and the teacher's"""
    jitter: Tensor | None
    """[b, 2, 10] parameters of the color jitter; None without"""
    keep: Tensor
    """[V, b, K] int32 kept tokens"""
    drop_path: Tensor | None
    """[L, 2, V b] drop-path factors of the student's trunk; None without"""


def draw(cfg: Config, images: Tensor, index: Tensor, epoch: int) -> list[MicroBatch]:
    """The micro-batches of one process's images; every number is a function of (seed, row, epoch).

    Args:
        images: [B, H, W, 3] uint8 on the device of the step, or [B, 2, H, W, 3].
        index: [B] int64 sample rows, on the CPU.
    """
    mask, model = cfg.mask, cfg.model
    keys = {"seed": cfg.train.seed, "epoch": epoch}
    size = len(index) // cfg.train.accumulation
    rows = index.to(images.device, non_blocking=images.is_cuda)
    return [
        MicroBatch(
            some_images,
            jitter_params(some, cfg.data, **keys),
            draw_views(some, model.num_patches, cfg.num_keep, mask.views, mode=mask.mode, **keys),
            drop_path_scale(some, mask.views, model.shape[1], model.drop_path, **keys),
        )
        for some_images, some in zip(images.split(size), rows.split(size), strict=True)
    ]
