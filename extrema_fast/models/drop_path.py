"""Drop-path (stochastic depth) of the student's trunk: a factor per block, branch and row."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import rng
from ..ops.scope import scoped


def scale_from_uniform(uniform: Tensor, rate: float) -> Tensor:
    """[L, 2, R] fp32 factors, 0 or 1 / (1 - p_l), from random numbers per block, branch (attention, MLP) and row.

    Block l drops with probability p_l = rate * l / (L - 1).
    """
    drop = torch.linspace(0, rate, uniform.shape[0], device=uniform.device)[:, None, None]
    return (uniform >= drop).float() / (1 - drop)


@scoped("masks")
def drop_path_scale(
    index: Tensor, views: int, depth: int, rate: float, *, seed: int, epoch: int
) -> Tensor | None:
    """Drop-path factors keyed by sample and view, so that they do not depend on how a batch is divided.

    Args:
        index: [B] int64 sample rows.
        views: V.
        depth: L.
        rate: drop probability of the last block.
        seed: of the run.
        epoch: of the batch.

    Returns:
        [L, 2, V B] fp32 as of `scale_from_uniform`, view-major; None where the rate is 0.
    """
    if rate == 0:
        return None
    b = index.shape[0]
    uniform = rng.uniform(index, views * depth * 2, seed=seed, epoch=epoch, stream=rng.DROP_PATH)
    return scale_from_uniform(
        uniform.view(b, views, depth, 2).permute(2, 3, 1, 0).reshape(depth, 2, -1), rate
    )
