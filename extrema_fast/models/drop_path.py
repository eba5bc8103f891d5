"""Drop-path (stochastic depth): which branches of which samples are left out, and what the others are scaled by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import rng
from .layers import Kept


def scale_from_coins(coins: Tensor, rate: float) -> Tensor:
    """Coins [L, ...] uniform in [0, 1) -> fp32 factors: 0, or 1 / (1 - p_l) with p_l = rate * l / (L - 1)."""
    # block i drops with probability rate * i / (L - 1); survivors are divided by what they had to survive
    depth = coins.shape[0]
    drop = torch.linspace(0, rate, depth, device=coins.device)[:, None, None]
    return (coins >= drop).float() / (1 - drop)


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


def compact_path(scale: Tensor, capacity: Sequence[int] | None = None) -> list[tuple[Kept, Kept]] | None:
    """The same coins as rows to compute: dropped rows cost nothing (step.md section 5).

    scale:    [L, 2, R] of `drop_path_scale`
    capacity  rows computed per layer (static shapes), or None: just the kept ones (reads `scale` on the host)
    returns   per layer (attention's, MLP's) `Kept`; None where a layer keeps more rows than its capacity
    """
    kept = scale > 0
    # kept rows first, in order, then dropped ones
    order = torch.argsort((~kept).to(torch.uint8), dim=-1, stable=True)
    most = kept.sum(-1).amax(-1).tolist() if scale.device.type == "cpu" else None
    if capacity is None:
        counts = kept.sum(-1).tolist()
    else:
        if most is not None and any(m > c for m, c in zip(most, capacity, strict=True)):
            return None
        counts = [(c, c) for c in capacity]
    return [
        tuple(Kept(order[i, j, :c], scale[i, j].take(order[i, j, :c])) for j, c in enumerate(pair))
        for i, pair in enumerate(counts)
    ]  # type: ignore[misc]


def compact_capacity(rows: int, depth: int, rate: float, classes: int = 4) -> list[int]:
    """Rows per layer that hold every kept one but for one branch in a thousand million (6 deviations).

    rows     R;  rate: of the last layer
    classes  different sizes over depth at most: each is one more compiled graph of a block
    """
    out = []
    for i in range(depth):
        p = rate * i / max(depth - 1, 1)
        most = rows * (1 - p) + 6 * math.sqrt(rows * p * (1 - p))
        out.append(min(rows, -(-math.ceil(most) // 64) * 64))
    # the layers of a group share the size of its first, the largest
    size = -(-depth // classes)
    return [out[i // size * size] for i in range(depth)]
