"""Plain PyTorch definitions of sample_views and drop_path_factors: the same words, and so results, on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from .._philox import uniform, words

# the streams of masks and of drop-path in the counter (extrema_fast.rng)
STREAM, DROP_PATH_STREAM = 4, 5


def sample_views_reference(
    index: Tensor,
    num_patches: int,
    num_keep: int,
    num_views: int,
    *,
    mode: str = "disjoint",
    seed: int = 0,
    epoch: int = 0,
) -> Tensor:
    """The first entries of a stable argsort of keyed random words; arguments and result as `sample_views`."""
    batch = index.shape[0]
    draws = 1 if mode == "disjoint" else num_views
    keys = words(index, draws * num_patches, seed=seed, epoch=epoch, stream=STREAM)
    order = torch.argsort(keys.view(batch, draws, num_patches), dim=-1, stable=True)
    if mode == "disjoint":
        order = order[:, 0, : num_views * num_keep].view(batch, num_views, num_keep)
    else:
        order = order[:, :, :num_keep]
    return order.transpose(0, 1).to(torch.int32).contiguous()


def drop_path_from_uniform(uniform: Tensor, rate: float) -> Tensor:
    """[L, 2, R] fp32 factors, 0 or 1 / (1 - p_l), from random numbers per block, branch (attention, MLP) and row.

    Block l drops with probability p_l = rate * l / (L - 1).
    """
    drop = torch.linspace(0, rate, uniform.shape[0], device=uniform.device)[:, None, None]
    return (uniform >= drop).float() / (1 - drop)


def drop_path_reference(
    index: Tensor,
    num_views: int,
    depth: int,
    rate: float,
    *,
    seed: int,
    epoch: int,
    stream: int = DROP_PATH_STREAM,
) -> Tensor:
    """`drop_path_from_uniform` of keyed random numbers; arguments and result as `drop_path_factors`."""
    drawn = uniform(index, num_views * depth * 2, seed=seed, epoch=epoch, stream=stream)
    rows = drawn.view(-1, num_views, depth, 2).permute(2, 3, 1, 0).reshape(depth, 2, -1)
    return drop_path_from_uniform(rows, rate)
