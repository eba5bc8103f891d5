"""Drop-path (stochastic depth): which branches of which samples are left out, and what the others are scaled by."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import rng
from ..ops.scope import scoped


def scale_from_coins(coins: Tensor, rate: float) -> Tensor:
    """Coins [L, ...] uniform in [0, 1) -> fp32 factors: 0, or 1 / (1 - p_l) with p_l = rate * l / (L - 1)."""
    # block i drops with probability rate * i / (L - 1); survivors are divided by what they had to survive
    depth = coins.shape[0]
    drop = torch.linspace(0, rate, depth, device=coins.device)[:, None, None]
    return (coins >= drop).float() / (1 - drop)


@scoped("masks")
def drop_path_scale(
    index: Tensor, views: int, depth: int, rate: float, *, seed: int, epoch: int
) -> Tensor | None:
    """Keyed drop-path factors of the student trunk (method.md section 6): each view is its own sample.

    index:   [B] int64 sample rows
    returns  [L, 2, V*B] fp32: 0, or 1 / (1 - p_l) with p_l = rate * l / (L - 1); None when the rate is 0
    """
    if rate == 0:
        return None
    b = index.shape[0]
    coins = rng.uniform(index, views * depth * 2, seed=seed, epoch=epoch, stream=rng.DROP_PATH)
    coins = coins.view(b, views, depth, 2).permute(2, 3, 1, 0).reshape(depth, 2, views * b)
    return scale_from_coins(coins, rate)
