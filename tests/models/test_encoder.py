"""The encoder: building, `encode`, attention maps, positions, drop-path.

Covers: names and suggestions; released state-dict names; deterministic building, initialization, whitened kernels;
`encode` for every shape of `keep` against embed-all-then-gather, views, permuted and repeated indices; 1 to 5
channels; the position table against an independent formula; attention maps; mean pooling; gradcheck; the drop-path
law; errors; torch.compile; torch.func.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import extrema_fast
from extrema_fast.config import ModelConfig
from extrema_fast.errors import UsageError
from extrema_fast.models.drop_path import drop_path_scale
from extrema_fast.models.encoder import Encoder, build_encoder, create_encoder, list_models, model_args
from extrema_fast.models.layers import whiten_kernel
from extrema_fast.models.positions import sincos_table
from extrema_fast.ops import dispatch as ops
from tests.encoders import close, randomized

SMALL = ModelConfig(img_size=(24, 40), patch_size=8, width=32, depth=3, heads=2, mlp_ratio=2.0)
N = 15


def make(config: ModelConfig = SMALL, **options) -> Encoder:
    """A small float64 encoder whose every parameter is random, so that none can be left out unnoticed."""
    return randomized(Encoder(config, **options).double())


def images(b: int = 2, c: int = 3, h: int = 24, w: int = 40) -> torch.Tensor:
    return torch.randn(b, c, h, w, dtype=torch.float64)


def by_definition(encoder: Encoder, x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed all patches by convolution, add positions, gather, plain blocks: (class token, patches)."""
    proj, w = encoder.patch_embed.proj, encoder.embed_dim
    tokens = F.conv2d(x, proj.weight, proj.bias, stride=encoder.patch_size).flatten(2).transpose(1, 2)
    tokens = tokens + encoder.pos_embed
    tokens = torch.stack([t[k.long()] for t, k in zip(tokens, keep, strict=True)])

    def heads(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (encoder.heads, -1)).transpose(1, 2)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        p = (heads(q) @ heads(k).transpose(-1, -2) / math.sqrt(w / encoder.heads)).softmax(-1)
        return (p @ heads(v)).transpose(1, 2).flatten(2)

    for block in encoder.blocks:
        q, k, v = block.attn.qkv(block.norm1(tokens)).chunk(3, -1)
        tokens = tokens + block.attn.proj(attend(q, k, v))
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(tokens))))
    cls = encoder.cls_token.expand(len(x), -1, -1)
    for block in encoder.blocks_token:
        u = block.norm1(torch.cat([cls, tokens], 1))
        a = block.attn
        cls = cls + block.gamma_1 * a.proj(attend(a.q(u[:, :1]), a.k(u), a.v(u)))
        cls = cls + block.gamma_2 * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(cls))))
    out = encoder.norm(torch.cat([cls, tokens], 1))
    return out[:, 0], out[:, 1:]


# ---- names and building ---------------------------------------------------------------------------


def test_names():
    sizes = (
        "base_patch16",
        "giant_patch14",
        "huge_patch14",
        "large_patch16",
        "small_patch16",
        "tiny_patch16",
    )
    names = [f"extrema_vit_{s}_224" for s in sizes]
    assert list_models() == names == extrema_fast.list_models()
    assert list_models("*small*") == [names[4]] and list_models("resnet*") == []
    with pytest.raises(UsageError, match=f"did you mean '{names[0]}'"):
        create_encoder("extrema_vit_bas_patch16_224")


def test_patches_of_14():
    with torch.device("meta"):
        encoder = create_encoder("extrema_vit_giant_patch14_224", depth=1)
    assert encoder.patch_size == 14 and encoder.grid == (16, 16) and encoder.config.shape == (1536, 1, 24)
    assert model_args(encoder)["patch_size"] == 14


def test_size_of_base():
    with torch.device("meta"):
        encoder = Encoder(ModelConfig(size="base"))
    # the trunk of the paper's ViT-B 85.65 M, and two class-attention blocks, 14.18 M, with class token
    trunk = sum(
        p.numel() for n, p in encoder.named_parameters() if not n.startswith(("cls_token", "blocks_token"))
    )
    assert trunk / 1e6 == pytest.approx(85.65, abs=0.01)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(85.65 + 14.18, abs=0.02)
    # the released ViT-B has 196 tensors, of which 10 are the projector's
    assert len(encoder.state_dict()) == 196 - 10


def test_state_dict_has_the_released_names():
    norm = ["weight", "bias"]
    wanted = {"cls_token", "pos_embed", *(f"{m}.{x}" for m in ("patch_embed.proj", "norm") for x in norm)}
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    wanted |= {f"blocks.{i}.{m}.{x}" for i in range(3) for m in parts for x in norm}
    parts = ("norm1", "attn.q", "attn.k", "attn.v", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    wanted |= {f"blocks_token.{i}.{m}.{x}" for i in range(2) for m in parts for x in norm}
    wanted |= {f"blocks_token.{i}.gamma_{j}" for i in range(2) for j in (1, 2)}
    state = Encoder(SMALL).state_dict()
    assert set(state) == wanted
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    assert shapes["pos_embed"] == (1, N, 32) and shapes["cls_token"] == (1, 1, 32)
    assert shapes["patch_embed.proj.weight"] == (32, 3, 8, 8)
    assert shapes["blocks.0.attn.qkv.weight"] == (96, 32)


def test_building_with_a_seed_touches_no_other_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = build_encoder(SMALL, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    b, other = build_encoder(SMALL, seed=3), build_encoder(SMALL, seed=4)
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert not torch.equal(a.cls_token, other.cls_token)


def test_initialization():
    config = ModelConfig(img_size=(32, 32), patch_size=8, width=64, depth=2, heads=1, layer_scale=0.25)
    encoder = build_encoder(config, seed=0)

    def bound(weight: torch.Tensor, wanted: float) -> None:
        weight = weight.detach()
        top = float(weight.abs().max())
        assert 0.97 * wanted < top <= wanted
        assert float(weight.std()) == pytest.approx(wanted / math.sqrt(3), rel=0.05)

    for block in encoder.blocks:
        # q, k and v are one matrix of 3D x D
        bound(block.attn.qkv.weight, math.sqrt(6 / (4 * 64)))
        bound(block.attn.proj.weight, math.sqrt(6 / (2 * 64)))
        bound(block.mlp.fc1.weight, math.sqrt(6 / (5 * 64)))
        assert not block.attn.qkv.bias.any() and not block.mlp.fc2.bias.any()
        assert bool((block.norm1.weight == 1).all()) and block.norm1.eps == 1e-6
    for block in encoder.blocks_token:
        for m in (block.attn.q, block.attn.k, block.attn.v, block.attn.proj):
            bound(m.weight, math.sqrt(6 / (2 * 64)))
        assert bool((block.gamma_1 == 0.25).all()) and bool((block.gamma_2 == 0.25).all())
    fan_in = 3 * 8 * 8
    bound(encoder.patch_embed.proj.weight, math.sqrt(6 / (fan_in + 64)))
    bias = encoder.patch_embed.proj.bias.detach()
    assert 0.8 / math.sqrt(fan_in) < float(bias.abs().max()) <= 1 / math.sqrt(fan_in)
    wide = build_encoder(ModelConfig(img_size=(32, 32), patch_size=16, width=1024, depth=1, heads=16), seed=0)
    assert float(wide.cls_token.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("chans", "patch"), [(1, 8), (3, 4), (3, 16), (5, 7)])
def test_a_whitened_kernel_sees_the_directions_of_natural_patches_alike(chans, patch):
    size = {"img_size": (2 * patch, 3 * patch), "in_chans": chans, "patch_size": patch, "width": 64}
    config = ModelConfig(**size, depth=1, heads=1)
    plain, white = (build_encoder(replace(config, patch_init=i), seed=3) for i in ("xavier", "whitened"))
    for (name, x), y in zip(plain.state_dict().items(), white.state_dict().values(), strict=True):
        assert torch.equal(x, y) == (name != "patch_embed.proj.weight"), name
    # random walks over pixels are smooth, as images are: nothing of the model of `whiten_kernel` is in them
    shared, own = torch.randn(4000, 1, patch, patch), torch.randn(4000, chans, patch, patch)
    patches = (shared + 0.3 * own).cumsum(2).cumsum(3).flatten(1)
    patches = (patches - patches.mean(0)) / patches.std()

    def seen(encoder: Encoder) -> torch.Tensor:
        """Eigenvalues of the covariance of tokens, as shares."""
        e = torch.linalg.eigvalsh(
            torch.cov((patches @ encoder.patch_embed.proj.weight.detach().flatten(1).T).T)
        )
        return e / e.sum()

    # effective number of directions: exp of the entropy of the shares
    before, after = (float(torch.special.entr(seen(e).clamp(min=0)).sum().exp()) for e in (plain, white))
    assert after > 2 * before and after > 4
    again = whiten_kernel(plain.patch_embed.proj.weight.bfloat16())
    assert again.dtype == torch.bfloat16
    assert close(again.float(), white.patch_embed.proj.weight, 0.02 * float(again.float().abs().max()))


# ---- encode ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep",
    [
        [[4], [0], [14]],
        [[0, 3, 9, 10], [11, 2, 0, 7], [14, 13, 5, 1]],
        [[3, 3, 8], [1, 1, 1], [0, 14, 0]],
        [[*range(N)], [*range(N)], [*reversed(range(N))]],
    ],
    ids=["one", "some, in any order", "repeated", "all"],
)
def test_encode_equals_its_definition(keep):
    encoder, x = make(), images(3)
    for dtype in (torch.int32, torch.int64):
        given = torch.tensor(keep, dtype=dtype)
        out = encoder.encode(x, given)
        cls, patches = by_definition(encoder, x, given)
        assert close(out.cls, cls) and close(out.patches, patches)
        assert out.keep is given and out.grid == (3, 5)


def test_all_patches():
    encoder, x = make(), images()
    every = torch.arange(N).expand(2, N)
    out = encoder.encode(x)
    cls, patches = by_definition(encoder, x, every)
    assert close(out.cls, cls) and close(out.patches, patches)
    assert torch.equal(out.keep, every)
    features = encoder.forward_features(x)
    assert features.shape == (2, 1 + N, 32)
    assert torch.equal(features[:, 0], out.cls) and torch.equal(features[:, 1:], out.patches)
    assert torch.equal(encoder(x), out.cls)
    raw = encoder.encode(x, norm=False)
    assert close(encoder.norm(raw.cls), out.cls) and close(encoder.norm(raw.patches), out.patches)
    assert not close(raw.patches, out.patches)
    # an image alone is the image in a batch
    assert close(encoder(x[1:]), out.cls[1:])


def test_views_are_separate_calls():
    encoder, x = make(), images(2)
    keep = torch.stack([torch.stack([torch.randperm(N)[:4] for _ in range(3)]) for _ in range(2)])
    out = encoder.encode(x, keep)
    assert out.cls.shape == (2, 3, 32) and out.patches.shape == (2, 3, 4, 32) and out.keep is keep
    for v in range(3):
        one = encoder.encode(x, keep[:, v])
        assert close(out.cls[:, v], one.cls) and close(out.patches[:, v], one.patches)


def test_pixels_of_dropped_patches_are_never_read():
    encoder, x = make(), images(1)
    keep = torch.tensor([[0, 6]])
    wanted = encoder.encode(x, keep)
    seen = torch.zeros(3, 5, dtype=torch.bool).flatten().index_fill(0, keep[0], True).view(3, 5)
    pixels = seen.repeat_interleave(8, 0).repeat_interleave(8, 1)
    x[:, :, ~pixels] = float("nan")
    out = encoder.encode(x, keep)
    assert torch.equal(out.cls, wanted.cls) and torch.equal(out.patches, wanted.patches)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_channels(channels):
    name = "extrema_vit_tiny_patch16_224"
    encoder = create_encoder(name, img_size=(16, 32), in_chans=channels).double()
    assert encoder.in_chans == channels
    x = images(1, channels, 16, 32)
    keep = torch.tensor([[1]])
    assert close(encoder.encode(x, keep).cls, by_definition(encoder, x, keep)[0])
    with pytest.raises(UsageError, match=rf"\[B, {channels}, H, W\], got \[1, {channels + 1}, 16, 32\]"):
        encoder.encode(images(1, channels + 1, 16, 32))


@pytest.mark.parametrize(("pool", "attention"), [("absorbed", "sdpa"), ("reference", "reference")])
def test_implementations_agree(pool, attention, monkeypatch):
    encoder, x = make(), images()
    keep = torch.stack([torch.randperm(N)[:7] for _ in range(2)])
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setenv("EXTREMA_FAST_BACKEND", f"attention_pool={pool},attention={attention}")
    out = encoder.encode(x, keep)
    cls, patches = by_definition(encoder, x, keep)
    assert close(out.cls, cls) and close(out.patches, patches)
    assert ops.choice("attention_pool")[0] == pool and ops.choice("attention")[0] == attention


# ---- attention ------------------------------------------------------------------------------------


def test_attention_reproduces_the_pooling():
    encoder, x = make(), images(2)
    keep = torch.stack([torch.stack([torch.randperm(N)[:5] for _ in range(3)]) for _ in range(2)])
    maps = encoder.get_attention(x, keep)
    assert maps.shape == (2, 3, 2, 2, 6) and maps.dtype == torch.float32
    assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-6) and maps.min() > 0
    assert torch.equal(maps[:, 1], encoder.get_attention(x, keep[:, 1]))
    maps, keep = maps[:, 2], keep[:, 2]
    # weights times values, block by block, give the class token
    tokens = encoder.encode(x, keep, norm=False).patches
    cls = encoder.cls_token.expand(2, -1, -1)
    for j, block in enumerate(encoder.blocks_token):
        u = block.norm1(torch.cat([cls, tokens], 1))
        values = block.attn.v(u).unflatten(-1, (2, -1)).transpose(1, 2)
        mixed = (maps[:, j, :, None].double() @ values).transpose(1, 2).flatten(2)
        cls = cls + block.gamma_1 * block.attn.proj(mixed)
        cls = cls + block.gamma_2 * block.mlp(block.norm2(cls))
    assert close(cls[:, 0], encoder.encode(x, keep, norm=False).cls, 1e-6)


def test_column_0_of_the_attention_is_the_class_token():
    encoder, x = make(), images(1)
    # a key aligned with every query draws all attention to itself, not to the tokens
    with torch.no_grad():
        block = encoder.blocks_token[0]
        block.norm1.weight.fill_(1)
        block.norm1.bias.zero_()
        u = F.layer_norm(encoder.cls_token[0, 0], (32,))
        for head in range(2):
            rows = slice(16 * head, 16 * head + 16)
            block.attn.k.weight[rows] = torch.outer(torch.ones(16).double(), u)
            block.attn.q.weight[rows], block.attn.q.bias[rows] = 0, 10.0
    maps = encoder.get_attention(x)
    assert maps.shape == (1, 2, 2, 1 + N) and maps[0, 0, :, 0].min() > 0.9


# ---- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "width"), [((1, 1), 32), ((14, 14), 192), ((3, 5), 4), ((20, 2), 32)])
def test_position_table(grid, width):
    wanted = np.zeros((grid[0] * grid[1], width))
    for p in range(len(wanted)):
        row, column = divmod(p, grid[1])
        for k in range(width // 4):
            w = 10000 ** (-k / (width / 4))
            quarter = width // 4
            wanted[p, k], wanted[p, quarter + k] = np.sin(column * w), np.cos(column * w)
            wanted[p, 2 * quarter + k], wanted[p, 3 * quarter + k] = np.sin(row * w), np.cos(row * w)
    table = sincos_table(width, grid, torch.float64)
    assert np.abs(table.numpy() - wanted).max() < 1e-13
    # computed in double, then rounded
    assert torch.equal(sincos_table(width, grid), table.float())
    with pytest.raises(UsageError, match=r"width: .*got 6"):
        sincos_table(6, grid)


# ---- pooling and heads ----------------------------------------------------------------------------


def test_mean_pooling_has_no_class_head():
    encoder, x = make(global_pool="avg"), images()
    assert not any(k.startswith(("cls_token", "blocks_token")) for k in encoder.state_dict())
    out = encoder.encode(x)
    assert close(out.cls, out.patches.mean(1)) and torch.equal(encoder(x), out.cls)
    assert torch.equal(encoder.forward_features(x), out.patches)
    raw = encoder.encode(x, norm=False).patches
    assert close(encoder.norm(raw), out.patches) and not close(raw, out.patches)
    keep = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    views = encoder.encode(x, keep)
    assert views.cls.shape == (2, 2, 32) and close(views.cls[:, 1], encoder.encode(x, keep[:, 1]).cls)


def test_gradients_by_finite_differences():
    config = ModelConfig(img_size=(4, 6), patch_size=2, width=8, depth=2, heads=2, mlp_ratio=1.0)
    encoder = make(config)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[[0, 3], [5, 5]], [[1, 2], [4, 0]]])
    names = [
        "cls_token",
        "blocks.1.attn.qkv.weight",
        "blocks_token.0.attn.k.weight",
        "blocks_token.1.gamma_1",
    ]
    weights = [encoder.get_parameter(name) for name in names]

    def run(x, *_):
        # gradcheck changes the weights in place
        return encoder.encode(x, keep)[:2]

    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)


# ---- drop-path ------------------------------------------------------------------------------------


def test_drop_path_factors_follow_the_law():
    index, views, depth, rate = torch.arange(3000), 3, 5, 0.4
    scale = drop_path_scale(index, views, depth, rate, seed=1, epoch=2)
    assert scale.shape == (depth, 2, views * 3000) and scale.dtype == torch.float32
    for i in range(depth):
        p = rate * i / (depth - 1)
        values = scale[i].unique().tolist()
        assert values == pytest.approx([0.0, 1 / (1 - p)] if i else [1.0])
        dropped = (scale[i] == 0).float().mean(1)
        # two branches of 9000 draws: five standard deviations
        assert (dropped - p).abs().max() <= 5 * math.sqrt(p * (1 - p) / 9000) + 1e-9
        assert (scale[i].mean(1) - 1).abs().max() < 0.05
    # branches, views and layers are drawn separately
    drawn = (scale[1:] == 0).float().reshape(8, views, 3000).flatten(0, 1)
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.1


def test_drop_path_belongs_to_the_sample_and_view():
    index, keys = torch.tensor([5, 2, 1 << 34, 9]), {"seed": 3, "epoch": 1}
    whole = drop_path_scale(index, 2, 4, 0.5, **keys).view(4, 2, 2, 4)
    parts = [drop_path_scale(i, 2, 4, 0.5, **keys).view(4, 2, 2, 2) for i in (index[:2], index[2:])]
    assert torch.equal(torch.cat(parts, -1), whole)
    assert torch.equal(drop_path_scale(index.flip(0), 2, 4, 0.5, **keys).view(4, 2, 2, 4).flip(-1), whole)
    many = torch.arange(64)
    base = drop_path_scale(many, 2, 4, 0.5, seed=3, epoch=1)
    for other in ({"seed": 4, "epoch": 1}, {"seed": 3, "epoch": 2}):
        assert not torch.equal(base, drop_path_scale(many, 2, 4, 0.5, **other))
    assert drop_path_scale(index, 2, 4, 0.0, **keys) is None


def test_a_dropped_branch_adds_nothing_and_survivors_are_scaled():
    encoder, x = make(), torch.randn(2, 4, 32, dtype=torch.float64)
    scale = torch.ones(3, 2, 2)
    assert close(encoder.trunk(x, scale), encoder.trunk(x))
    scale[:, :, 1] = 0
    out = encoder.trunk(x, scale)
    assert close(out[0], encoder.trunk(x)[0]) and torch.equal(out[1], x[1])
    block = encoder.blocks[0]
    mixed = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    out = block(x, mixed)
    assert close(out[0], x[0] + 2 * block.mlp(block.norm2(x))[0])
    assert close(out[1], x[1] + 2 * block.attn(block.norm1(x))[1])


def test_drop_path_in_training_mode_only():
    encoder = Encoder(SMALL).double()
    encoder.drop_path_rate = 0.9
    x = images()
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))
    encoder.train()
    assert not torch.equal(encoder(x), encoder(x))
    encoder.drop_path_rate = 0.0
    assert torch.equal(encoder(x), encoder(x))


# ---- errors ---------------------------------------------------------------------------------------


IMAGES, KEEP = torch.zeros(2, 3, 24, 40), torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "keep", "words"),
    [
        (IMAGES.byte(), None, "images: .*uint8.*preprocess"),
        (IMAGES[0], None, r"images: .*images\[None\]"),
        (IMAGES[:, :1], None, r"images: .*\[2, 1, 24, 40\]"),
        (torch.zeros(2, 3, 24, 41), None, "images: width 41 .* use 40 or 48"),
        (torch.zeros(2, 3, 4, 40), None, "images: height 4"),
        (IMAGES.double(), None, "images: .*torch.float64.*autocast"),
        (np.zeros((2, 3, 24, 40), "float32"), None, "images: .*ndarray"),
        (IMAGES, KEEP + 15, r"keep: .*\[0, 15\).* 15 to 15"),
        # the range follows the image
        (torch.zeros(2, 3, 16, 56), KEEP + 14, r"keep: .*\[0, 14\)"),
        (IMAGES, KEEP - 1, "keep: .*-1 to -1"),
        (IMAGES, KEEP.float(), "keep: .*float32"),
        (IMAGES, KEEP.bool(), "keep: .*keep_from_mask"),
        (torch.zeros(3, 3, 24, 40), KEEP, r"keep: .*\[3, K\].*\[2, 4\]"),
        (IMAGES, KEEP[0], r"keep: .*\[4\]"),
        (IMAGES, KEEP[:, None][:, :0], r"keep: .*\[2, 0, 4\]"),
        (IMAGES, KEEP.tolist(), "keep: .*list.*as_tensor"),
        (IMAGES, KEEP.to("meta"), "keep: .*cpu.*meta.*keep.to"),
        (IMAGES, (KEEP + 15).to(torch.uint16), "keep: .*15 to 15"),
    ],
)
def test_errors_of_encode(x, keep, words):
    encoder = Encoder(SMALL)
    for call in (encoder.encode, encoder.get_attention):
        with pytest.raises(UsageError, match=words):
            call(x, keep)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"img_size": 225}, "height 225 .*nearest: 224 or 240"),
        ({"img_size": (224, 224, 3)}, "img_size: "),
        ({"img_size": 32.0}, "img_size: "),
        ({"patch_size": (16, 8)}, "patch_size: "),
        ({"global_pool": "mean"}, "global_pool: "),
        ({"pos_coords": "polar"}, "pos_coords: "),
        ({"pos_embed": "rope"}, "pos_embed: "),
        ({"pos_grid": (0, 3)}, "pos_grid: "),
        ({"poolepth": 1}, "unknown option 'poolepth'; did you mean 'pool_depth'"),
        ({"width": 30}, "model.width: 30"),
        ({"width": "large"}, "width: "),
        ({"mlp_ratio": "4"}, "mlp_ratio: "),
        ({"drop_rate": 1.0}, "drop_rate: "),
        ({"drop_path_rate": 1.0}, "drop_path"),
        ({"fc_norm": True}, "fc_norm: "),
        ({"in_chans": "3"}, "in_chans: "),
        ({"num_classes": -1}, "num_classes: "),
    ],
)
def test_building_errors(options, words):
    with pytest.raises(UsageError, match=words):
        create_encoder("extrema_vit_tiny_patch16_224", **options)


# ---- other modes of use ---------------------------------------------------------------------------


def test_outputs_under_autocast_have_one_type():
    encoder, keep = Encoder(SMALL), torch.arange(8).view(2, 4)
    for pool in ("token", "avg"):
        encoder = Encoder(SMALL, global_pool=pool)
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder.encode(images().float(), keep)
        assert out.cls.dtype == out.patches.dtype


def test_traced_by_torchscript():
    encoder = Encoder(SMALL).eval()
    x = images().float()
    traced = torch.jit.trace(encoder, x)
    assert torch.equal(traced(x + 1), encoder(x + 1))


def test_a_learned_table_at_any_size():
    encoder = make(pos_embed="learned")
    x = images(h=32, w=24)
    with pytest.raises(UsageError, match=r"set_input_size.*dynamic_img_size"):
        encoder(x)
    encoder.dynamic_img_size = True
    found = encoder(x)
    encoder.set_input_size((32, 24))
    assert close(found, encoder(x))
    encoder = create_encoder(
        "extrema_vit_tiny_patch16_224", depth=1, pos_embed="learned", dynamic_img_size=True
    )
    # of a plain sum the gradient is 0: the features are normalized
    encoder(torch.zeros(1, 3, 96, 64))[:, 0].sum().backward()
    assert encoder.pos_embed.grad.abs().sum() > 1e-3


def test_a_norm_after_pooling_by_timms_rule():
    for pool in ("avg", "token"):
        after = Encoder(SMALL, global_pool=pool, fc_norm=None)
        assert isinstance(after.fc_norm, torch.nn.LayerNorm) == (pool == "avg")
        assert isinstance(after.norm, torch.nn.LayerNorm) == (pool == "token")


def test_no_images_and_shapes_without_memory():
    encoder, keep = Encoder(SMALL), torch.zeros(0, 3, 4, dtype=torch.int64)
    out = encoder.encode(torch.zeros(0, 3, 24, 40), keep)
    assert out.cls.shape == (0, 3, 32) and out.patches.shape == (0, 3, 4, 32)
    assert encoder.get_attention(torch.zeros(0, 3, 24, 40), keep).shape == (0, 3, 2, 2, 5)
    with torch.device("meta"):
        encoder, x = Encoder(SMALL), torch.zeros(2, 3, 32, 40)
        out = encoder.encode(x, torch.zeros(2, 3, 4, dtype=torch.int64))
        assert encoder(x).device.type == "meta"
    assert out.cls.shape == (2, 3, 32) and out.patches.device.type == "meta"


def test_compiles_into_one_graph():
    encoder = Encoder(ModelConfig(img_size=(8, 8), patch_size=4, width=16, depth=1, heads=1)).eval()
    ops._chosen.clear()  # the first call must compile, too
    x, keep = torch.randn(2, 3, 8, 8), torch.tensor([[0, 3], [2, 1]])
    try:
        whole = torch.compile(encoder, backend="eager", fullgraph=True)
        assert torch.allclose(whole(x), encoder(x), atol=1e-6)
        some = torch.compile(encoder.encode, backend="eager", fullgraph=True)
        assert torch.allclose(some(x, keep).cls, encoder.encode(x, keep).cls, atol=1e-6)
    finally:
        torch.compiler.reset()


def test_gradients_per_image_by_torch_func():
    class ClassToken(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, image, keep):
            return self.encoder.encode(image[None], keep[None]).cls

    model = ClassToken(randomized(create_encoder("extrema_vit_tiny_patch16_224", img_size=32)).double())
    images, keep = torch.randn(3, 3, 32, 32).double(), torch.tensor([[0, 2], [3, 1], [1, 2]])
    parameters = dict(model.named_parameters())

    def loss(parameters, image, keep):
        return torch.func.functional_call(model, parameters, (image, keep)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, images, keep)
    wanted = torch.autograd.grad(loss(parameters, images[1], keep[1]), list(parameters.values()))
    for name, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(each[name][1], gradient, msg=lambda m, n=name: f"{n}: {m}")
