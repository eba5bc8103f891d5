"""Drop-path (stochastic depth) of the student's trunk: a factor per block, branch and row."""

from __future__ import annotations

from torch import Tensor

from .. import rng
from ..ops import dispatch as ops
from ..ops.scope import scoped


@scoped("masks")
def drop_path_scale(
    index: Tensor, views: int, depth: int, rate: float, *, seed: int, epoch: int
) -> Tensor | None:
    """Drop-path factors keyed by sample and view, so that they do not depend on how a batch is split.

    Args:
        index: [B] int64 sample rows.
        views: V.
        depth: L.
        rate: drop-path rate of the last block.
        seed: random seed of the run.
        epoch: epoch of the batch.

    Returns:
        [L, 2, V B] fp32 as from `ops.drop_path_from_uniform`, view-major; None if the rate is 0.
    """
    if rate == 0:
        return None
    return ops.drop_path(index, views, depth, rate, seed=seed, epoch=epoch, stream=rng.DROP_PATH)
