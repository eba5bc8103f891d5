"""Projector and predictor (method.md section 1): LayerNorm + GELU inside, no batch statistics."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from ..ops.linear import Linear


def mlp_head(*widths: int) -> nn.Sequential:
    """Linear layers between `widths`, LayerNorm (eps 1e-5) and GELU after all but the last.

    `mlp_head(D, 4096, 4096, 256)` is the projector, `mlp_head(256, 4096, 256)` the predictor; the sub-module
    numbers are those of the released checkpoints (`head.{0,1,3,4,6}`, `predictor.{0,1,3}`).
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        if i:
            layers += [nn.LayerNorm(fan_in, eps=1e-5), nn.GELU()]
        linear = Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
    return nn.Sequential(*layers)
