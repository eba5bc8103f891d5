"""Projector and predictor (method.md section 1): LayerNorm + GELU after hidden layers, no batch statistics."""

from __future__ import annotations

from torch import nn


def mlp_head(*widths: int) -> nn.Sequential:
    """Linear layers between `widths`, LayerNorm (eps 1e-5) and GELU after all but the last.

    `mlp_head(D, 4096, 4096, 256)` is the projector, `mlp_head(256, 4096, 256)` the predictor; the sub-module numbers
    are those of the released checkpoints (`head.{0,1,3,4,6}`, `predictor.{0,1,3}`).
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        if i:
            layers += [nn.LayerNorm(fan_in, eps=1e-5), nn.GELU()]
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
    return nn.Sequential(*layers)
