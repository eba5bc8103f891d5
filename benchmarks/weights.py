"""Empty networks for the baselines: parameters under the released checkpoints' names, no arithmetic.

The baselines share these and nothing else: how the parameters are used is written in each of them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from extrema_fast.config import HeadConfig, ModelConfig
from extrema_fast.models.encoder import sincos_table

ENCODER_EPS, HEAD_EPS = 1e-6, 1e-5


def group(**children: nn.Module | nn.Parameter) -> nn.Module:
    """A module that only holds what it is given."""
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """Xavier-uniform weight, zero bias."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=ENCODER_EPS)


def mlp(width: int, ratio: float) -> nn.Module:
    hidden = int(width * ratio)
    return group(fc1=linear(width, hidden), fc2=linear(hidden, width))


def trunk_block(width: int, ratio: float = 4.0) -> nn.Module:
    attention = group(qkv=linear(width, 3 * width), proj=linear(width, width))
    return group(norm1=norm(width), attn=attention, norm2=norm(width), mlp=mlp(width, ratio))


def pool_block(width: int, ratio: float, layer_scale: float) -> nn.Module:
    attention = group(**{name: linear(width, width) for name in ("q", "k", "v", "proj")})
    return group(
        gamma_1=nn.Parameter(torch.full((width,), layer_scale)),
        gamma_2=nn.Parameter(torch.full((width,), layer_scale)),
        norm1=norm(width), attn=attention, norm2=norm(width), mlp=mlp(width, ratio),
    )  # fmt: skip


def encoder(model: ModelConfig) -> nn.Module:
    """Patch kernel, position table, class token, trunk, pooling blocks, final norm."""
    width, depth, _ = model.shape
    kernel = nn.Conv2d(model.in_chans, width, model.patch_size, model.patch_size)
    nn.init.xavier_uniform_(kernel.weight.data.view(width, -1))
    net = group(
        patch_embed=group(proj=kernel),
        cls_token=nn.Parameter(torch.randn(1, 1, width) * 0.02),
        blocks=nn.ModuleList(trunk_block(width, model.mlp_ratio) for _ in range(depth)),
        blocks_token=nn.ModuleList(
            pool_block(width, model.mlp_ratio, model.layer_scale) for _ in range(model.pool_depth)
        ),
        norm=norm(width),
    )
    net.register_buffer("pos_embed", sincos_table(width, model.grid)[None])
    return net


def head(*widths: int) -> nn.Sequential:
    """Linear layers with LayerNorm and GELU between them."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        if i:
            layers += [nn.LayerNorm(fan_in, eps=HEAD_EPS), nn.GELU()]
        layers.append(linear(fan_in, fan_out))
    return nn.Sequential(*layers)


def student(model: ModelConfig, h: HeadConfig) -> nn.Module:
    """Encoder, projector, predictor."""
    projector = head(model.shape[0], h.hidden, h.hidden, h.out)
    return group(
        encoder=encoder(model), projector=projector, predictor=head(h.out, h.predictor_hidden, h.out)
    )


def teacher(model: ModelConfig, h: HeadConfig) -> nn.Module:
    """Encoder and projector, without gradients."""
    net = group(encoder=encoder(model), projector=head(model.shape[0], h.hidden, h.hidden, h.out))
    return net.requires_grad_(False)
