"""Color jitter on the device, drawn separately for student and teacher, with torchvision's semantics.

The random parameters are keyed by (seed, sample row, epoch, view), see `extrema_fast.rng`; the operations are defined
in `kernels/color_views/reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import rng
from ..config import DataConfig
from ..kernels.color_views.reference import normalize
from ..ops import dispatch as ops
from ..ops.scope import scoped

__all__ = ["color_jitter", "jitter_params", "normalize"]


@scoped("augment")
def jitter_params(index: Tensor, cfg: DataConfig, *, seed: int, epoch: int) -> Tensor | None:
    """Random parameters of the color jitter.

    Args:
        index: [B] int64 sample rows.

    Returns:
        [B, 2, 10] on the device of `index`, for student and teacher (layout: `kernels/color_views`); None unless
        `data.policy` is spatial+color.
    """
    if cfg.policy != "spatial+color":
        return None
    streams = (rng.COLOR_STUDENT, rng.COLOR_TEACHER)
    return ops.color_params(
        index, cfg.jitter, cfg.jitter_prob, cfg.gray_prob, seed=seed, epoch=epoch, streams=streams
    )


@scoped("augment")
def color_jitter(
    images: Tensor,
    params: Tensor | None,
    cfg: DataConfig,
    in_chans: int = 3,
    *,
    patch: int = 0,
    keep: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Student's and teacher's version of each crop, or each one's own crop: jittered, then normalized.

    Args:
        images: [B, H, W, 3] uint8; [B, 2, H, W, 3]: the student's crop of each image, and the teacher's.
        params: from `jitter_params`, on the device of `images`; None: no jitter.
        patch: side P of the patches that both are cut into; 0: images.
        keep: [V, B, K] int32, the student's patches; None: all.
        dtype: of the result.

    Returns:
        Two tensors [B, C, H, W], of one crop without `params` the same one twice; with `patch` the student's
        [V B, K, C P P] and the teacher's [B, N, C P P], which `Encoder.embed` takes.
    """
    options = {"channels": in_chans, "dtype": dtype, "patch": patch, "keep": keep}
    return ops.color_views(images, params, cfg.mean, cfg.std, **options)
