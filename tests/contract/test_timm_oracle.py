"""The encoder against timm, in float64 at odd sizes.

Covers: timm's `Cait` with plain trunk blocks as the whole encoder, class attention included; a stock
`VisionTransformer(class_token=False, global_pool='avg')` as the trunk and as the mean-pooled encoder with a
head; gradients of both. The weights are strictly loaded, so names and shapes agree, too.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from extrema_fast.config import ModelConfig
from extrema_fast.models.encoder import Encoder
from tests.encoders import close, randomized

timm = pytest.importorskip("timm")

# one patch; more rows than columns; a prime number of patches
GRIDS = [(1, 1), (5, 3), (1, 19)]


def config(grid: tuple[int, int]) -> ModelConfig:
    size = (4 * grid[0], 4 * grid[1])
    return ModelConfig(img_size=size, patch_size=4, width=48, depth=3, heads=3, mlp_ratio=3.0, drop_path=0.0)


def shape(cfg: ModelConfig) -> dict:
    """What both of timm's classes call the shape."""
    width, depth, heads = cfg.shape
    return {
        "img_size": cfg.img_size,
        "patch_size": cfg.patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": cfg.mlp_ratio,
        "norm_layer": partial(torch.nn.LayerNorm, eps=1e-6),
    }


def images(encoder: Encoder) -> torch.Tensor:
    return torch.randn(2, 3, *encoder.img_size, dtype=torch.float64)


def cait(cfg: ModelConfig) -> torch.nn.Module:
    """timm's Cait with stock ViT blocks in the trunk, holding a table for a grid of any shape."""
    from timm.models.cait import Cait
    from timm.models.vision_transformer import Block

    class PlainBlock(Block):
        # Cait passes options of its own blocks that a plain block does not know
        def __init__(self, **options) -> None:
            known = ("dim", "num_heads", "mlp_ratio", "qkv_bias", "norm_layer")
            super().__init__(**{k: v for k, v in options.items() if k in known})

    model = Cait(
        **shape(cfg),
        mlp_ratio_token_only=cfg.mlp_ratio,
        depth_token_only=cfg.pool_depth,
        num_classes=0,
        block_layers=PlainBlock,
    )
    return model.double().eval()


@pytest.mark.parametrize("grid", GRIDS)
def test_whole_encoder_is_timms_cait_with_plain_blocks(grid):
    encoder = randomized(Encoder(config(grid)).double())
    oracle = cait(encoder.config)
    state = {k.replace("blocks_token.", "blocks_token_only."): v for k, v in encoder.state_dict().items()}
    oracle.load_state_dict(state, strict=True)
    x = images(encoder)
    ours, theirs = encoder.forward_features(x), oracle.forward_features(x)
    assert theirs.shape == (2, 1 + grid[0] * grid[1], 48)
    assert close(ours, theirs) and close(encoder(x), oracle(x))

    upstream = torch.randn_like(ours)
    (ours * upstream).sum().backward()
    (theirs * upstream).sum().backward()
    wanted = dict(oracle.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in wanted.values() if p.grad is not None)
    for name, p in encoder.named_parameters():
        g = wanted[name.replace("blocks_token.", "blocks_token_only.")].grad
        assert float((p.grad - g).abs().max()) <= 1e-11 * largest, name


def vit(cfg: ModelConfig, **options) -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**shape(cfg), class_token=False, global_pool="avg", **options)
    return model.double().eval()


@pytest.mark.parametrize("grid", GRIDS)
def test_trunk_is_a_stock_vit(grid):
    encoder = randomized(Encoder(config(grid)).double())
    oracle = vit(encoder.config, fc_norm=False, num_classes=0)
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith(("cls_token", "blocks_token"))}
    oracle.load_state_dict(state, strict=True)
    x = images(encoder)
    assert close(encoder.encode(x).patches, oracle.forward_features(x))
    layer = oracle.get_intermediate_layers(x, n=1, norm=False)[0]
    assert close(encoder.encode(x, norm=False).patches, layer)


@pytest.mark.parametrize("fc_norm", [False, True])
def test_mean_pooled_encoder_with_a_head_is_a_stock_vit(fc_norm):
    encoder = randomized(Encoder(config((5, 3)), 5, global_pool="avg", fc_norm=fc_norm).double())
    oracle = vit(encoder.config, fc_norm=fc_norm, num_classes=5)
    oracle.load_state_dict(encoder.state_dict(), strict=True)
    x = images(encoder)
    assert encoder(x).shape == (2, 5) and close(encoder(x), oracle(x))
