"""Plain PyTorch definition of sample_views; the same words, so the same indices, on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from .._philox import words

# the stream of masks in the counter (extrema_fast.rng)
STREAM = 4


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
