"""`accelerate` on timm's VisionTransformer.

Covers: every variant of the class, dense output bit-equal to timm's in fp64, kept tokens and all gradients equal to
"embed all, gather, run the blocks", views, other sizes; training (drop-path, dropout, recomputation), autocast, bf16;
everything that is not stock is called (hooks, LoRA, replaced forwards, parametrised, compiled, quantised parts); the
owner (state_dict, optimizer, copies, two processes); torch.compile; reports, strict; refused models, bad input.
"""

from __future__ import annotations

import copy
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import extrema_fast
from extrema_fast.errors import UsageError
from extrema_fast.models.accelerate import accelerate
from tests.torchvision_operators import define_torchvision_operators

# also where a spawned process imports this file without conftest.py
define_torchvision_operators()
timm = pytest.importorskip("timm")
from timm.layers import GluMlp, PatchEmbed, RmsNorm, SwiGLU, SwiGLUPacked  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

SIZE, GRID = (24, 40), (3, 5)
N = 15


class Stem(nn.Module):
    """Overlapping convolutions; no attribute but the number of patches."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True, **_):
        super().__init__()
        self.num_patches = img_size[0] * img_size[1] // patch_size**2
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, 8, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(8, embed_dim, patch_size // 2, patch_size // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def gapped(**options) -> PatchEmbed:
    """Patches of 8 of which 7 x 7 pixels are read."""
    embed = PatchEmbed(**options)
    old = embed.proj
    embed.proj = nn.Conv2d(old.in_channels, old.out_channels, 7, 8)
    return embed


VARIANTS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 3},
    "registers alone": {"class_token": False, "global_pool": "avg", "reg_tokens": 2, "fc_norm": True},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 2},
    "no positions": {"pos_embed": "none", "reg_tokens": 1},
    "layer scale": {"init_values": 0.3},
    "qk-norm": {"qk_norm": True},
    "scale norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "pre-norm": {"pre_norm": True},
    "fc_norm": {"global_pool": "avg", "fc_norm": True},
    "no final norm": {"final_norm": False},
    "no qkv bias": {"qkv_bias": False},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "heads of 16": {"num_heads": 2, "embed_dim": 32},
    "heads of 6": {"num_heads": 4},
    "SwiGLU": {"mlp_layer": SwiGLU},
    "packed SwiGLU": {"mlp_layer": SwiGLUPacked},
    "gated, gate last": {"mlp_layer": GluMlp},
    "another activation": {"act_layer": nn.SiLU},
    "tanh GELU": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "timm's tanh GELU": {"act_layer": "gelu_tanh"},
    "timm's own GELU": {"act_layer": "gelu"},
    "RMSNorm": {"norm_layer": RmsNorm},
    "norm without weights": {"norm_layer": lambda d, **k: nn.LayerNorm(d, elementwise_affine=False, **k)},
    "one channel": {"in_chans": 1},
    "patch norm": {"embed_norm_layer": "layernorm"},
    "patch RMSNorm": {"embed_norm_layer": "rmsnorm"},
    "rectangles": {"patch_size": (8, 4)},
    "gaps": {"embed_layer": gapped},
    "stem": {"embed_layer": Stem},
    "dynamic size": {"dynamic_img_size": True, "reg_tokens": 1},
    "parallel blocks": {"block_fn": timm.models.vision_transformer.ParallelScalingBlock},
    "post-norm": {"block_fn": timm.models.vision_transformer.ResPostBlock, "init_values": 0.2},
    "differential attention": {"attn_layer": "diff"},
}
# variants whose patches are embedded one by one all the same
WHOLE = ("rectangles", "gaps", "stem", "patch RMSNorm")


def build(dtype: torch.dtype = torch.float64, **options) -> VisionTransformer:
    """A small model with every weight drawn, so that none is without effect."""
    given = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    given |= options
    if given.get("norm_layer") is RmsNorm:
        given["depth"] = 1
    vit = VisionTransformer(**given).to(dtype).eval()
    with torch.no_grad():
        for name, p in vit.named_parameters():
            p.normal_(std=0.5 if p.dim() < 2 or "embed" in name or "token" in name else 0.2)
    return vit


def images_for(vit: VisionTransformer, batch: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    p = next(vit.parameters())
    channels = 1 if vit.in_chans == 1 else 3
    return torch.randn(batch, channels, *size, dtype=p.dtype)


def draw(batch: int, kept: int, n: int = N) -> Tensor:
    return torch.stack([torch.randperm(n)[:kept] for _ in range(batch)])


def slow(vit: VisionTransformer, images: Tensor, keep: Tensor, norm: bool = True) -> Tensor:
    """The definition: all patches embedded, positions, gather, timm's own blocks; keep [B, K] -> [B, P + K, D]."""
    x = vit._pos_embed(vit.patch_embed(images))
    p = vit.num_prefix_tokens
    kept = x[:, p:].gather(1, keep.long()[..., None].expand(-1, -1, x.shape[-1]))
    x = vit.blocks(vit.norm_pre(torch.cat([x[:, :p], kept], 1)))
    return vit.norm(x) if norm else x


def gradients(vit: VisionTransformer, images: Tensor, out: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Of every parameter and of the images."""
    named = dict(vit.named_parameters()) | {"images": images}
    found = torch.autograd.grad((out * weight).sum(), list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, g in wanted.items():
        gap = float((found[name] - g).abs().max()) / max(1.0, float(g.abs().max()))
        assert gap <= limit, f"{name}: {gap:.1e}"


# ---- outputs and gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, seed):
    vit = build(**VARIANTS[name])
    images = images_for(vit).requires_grad_()
    n = 30 if name == "rectangles" else N
    fast = accelerate(vit)
    with torch.no_grad():
        assert torch.equal(fast.forward_features(images), vit.forward_features(images))

    keep = draw(2, 4, n)
    keep[0, 1] = keep[0, 0]
    wanted = slow(vit, images, keep)
    out = fast.encode(images, keep)
    assert (out.tokens - wanted).abs().max() <= 1e-10
    weight = torch.randn_like(wanted)
    assert_same(gradients(vit, images, out.tokens, weight), gradients(vit, images, wanted, weight))

    p = vit.num_prefix_tokens
    assert torch.equal(out.patches, out.tokens[:, p:]) and out.keep is keep
    assert (out.prefix is None) == (p == 0) and (p == 0 or torch.equal(out.prefix, out.tokens[:, :p]))
    assert (out.cls is None) == (vit.cls_token is None)
    assert out.cls is None or torch.equal(out.cls, out.tokens[:, 0])
    assert out.grid == ((3, 10) if name == "rectangles" else GRID)
    assert bool(fast.report().called.get("patch_embed")) == (name in WHOLE)


@pytest.mark.parametrize("kept", [1, 7, N])
def test_views_run_at_once_and_equal_one_by_one(kept, seed):
    vit = build(reg_tokens=1)
    images, fast = images_for(vit, 3), accelerate(vit)
    keep = torch.stack([draw(3, kept) for _ in range(4)], 1).int()
    seen = []
    vit.blocks[0].norm1.register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape)))
    out = fast.encode(images, keep)
    assert seen == [(12, 2 + kept, 24)]
    assert out.tokens.shape == (3, 4, 2 + kept, 24) and out.prefix.shape == (3, 4, 2, 24)
    assert out.cls.shape == (3, 4, 24) and out.patches.shape == (3, 4, kept, 24)
    for v in range(4):
        assert (out.tokens[:, v] - slow(vit, images, keep[:, v])).abs().max() <= 1e-10


@pytest.mark.parametrize("options", [{"reg_tokens": 1}, {"qk_norm": True}])
def test_no_images(options):
    vit = build(**options)
    images, fast = images_for(vit, 0), accelerate(vit)
    p = vit.num_prefix_tokens
    assert fast.encode(images).tokens.shape == vit.forward_features(images).shape == (0, p + N, 24)
    assert fast.encode(images, torch.zeros(0, 4, 5, dtype=torch.int64)).tokens.shape == (0, 4, p + 5, 24)


def test_all_patches_raw_tokens_and_order():
    vit = build()
    images, fast = images_for(vit), accelerate(vit)
    out = fast.encode(images)
    assert torch.equal(out.tokens, vit.forward_features(images))
    assert torch.equal(out.keep, torch.arange(N).expand(2, N)) and out.grid == GRID
    raw = fast.encode(images, norm=False).tokens
    assert not torch.equal(raw, out.tokens) and torch.equal(vit.norm(raw), out.tokens)
    keep, order = draw(2, 7), torch.randperm(7)
    a, b = fast.encode(images, keep), fast.encode(images, keep[:, order])
    assert (a.patches[:, order] - b.patches).abs().max() <= 1e-12 and (a.cls - b.cls).abs().max() <= 1e-12


def test_pixels_beyond_the_last_patch_after_set_input_size():
    vit = build()
    fast = accelerate(vit)
    vit.set_input_size((36, 20))
    images = images_for(vit, size=(36, 20))
    out = fast.encode(images, torch.tensor([[7, 0], [1, 2]]))
    assert out.grid == (4, 2) and (out.tokens - slow(vit, images, out.keep)).abs().max() <= 1e-10


def test_dropped_patches_are_not_read():
    vit = build()
    images, fast = images_for(vit), accelerate(vit)
    keep = torch.tensor([[0, 7, 14], [3, 4, 5]])
    wanted = fast.encode(images, keep).tokens
    mask = torch.zeros(2, N).scatter_(1, keep, 1.0).view(2, 1, *GRID)
    images[(F.interpolate(mask, SIZE) == 0).expand_as(images)] = float("nan")
    assert torch.equal(fast.encode(images, keep).tokens, wanted)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch32_224",
     "vit_tiny_r_s16_p8_224"],
)  # fmt: skip
def test_real_models(name, seed):
    size = 56 if "patch14" in name else 64
    vit = timm.create_model(name, num_classes=0, img_size=size).double().eval()
    images, fast = torch.randn(1, 3, size, size).double(), accelerate(vit)
    with torch.no_grad():
        assert torch.equal(fast.forward_features(images), vit.forward_features(images))
        n = vit.patch_embed.num_patches
        keep = draw(1, max(1, n // 4), n)
        assert (fast.encode(images, keep).tokens - slow(vit, images, keep)).abs().max() <= 1e-10


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (48, 56)])
@pytest.mark.parametrize("embed_class", [True, False])
def test_other_sizes_get_timms_resampled_positions(size, embed_class, seed):
    vit = build(dynamic_img_size=True, no_embed_class=not embed_class, reg_tokens=1)
    images, fast = images_for(vit, size=size), accelerate(vit)
    assert torch.equal(fast.forward_features(images), vit.forward_features(images))
    n = size[0] * size[1] // 64
    keep = draw(2, 3, n)
    out, wanted = fast.encode(images, keep), slow(vit, images, keep)
    assert out.grid == (size[0] // 8, size[1] // 8)
    # timm resamples positions in fp32, both times the same way
    assert (out.tokens - wanted).abs().max() <= 1e-10
    weight = torch.randn_like(wanted)
    images.requires_grad_()
    found = [gradients(vit, images, f(images, keep), weight) for f in (lambda *a: fast.encode(*a).tokens,
                                                                     lambda *a: slow(vit, *a))]  # fmt: skip
    assert_same(*found, limit=1e-6)


# ---- training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"drop_path_rate": 0.6}, {"proj_drop_rate": 0.3}, {"attn_drop_rate": 0.3}, {"pos_drop_rate": 0.4},
     {"drop_path_rate": 0.5, "init_values": 0.1, "mlp_layer": SwiGLU, "proj_drop_rate": 0.1}],
)  # fmt: skip
def test_training_draws_what_timm_draws(options, seed):
    vit = build(depth=3, **options).train()
    images, keep, fast = images_for(vit, 5), draw(5, 6), accelerate(vit)
    torch.manual_seed(1)
    dense = fast.forward_features(images)
    torch.manual_seed(1)
    assert torch.equal(dense, vit.forward_features(images))
    if "pos_drop_rate" in options:
        # timm drops positions of all patches, this of the kept ones: other draws
        assert (fast.encode(images, keep).tokens != fast.encode(images, keep).tokens).any()
        return
    torch.manual_seed(2)
    wanted = slow(vit, images, keep)
    torch.manual_seed(2)
    assert (fast.encode(images, keep).tokens - wanted).abs().max() <= 1e-10
    called = fast.report().called
    assert ("blocks.0.attn" in called) == ("attn_drop_rate" in options)
    assert not any("dropout" in why for why in accelerate(vit.eval()).report().called.values())


def test_recomputation_changes_nothing():
    vit = build(drop_path_rate=0.3).train()
    images, keep, fast = images_for(vit).requires_grad_(), draw(2, 6), accelerate(vit)
    found = []
    for enable in (False, True):
        vit.set_grad_checkpointing(enable)
        count = []
        handle = vit.blocks[1].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(3)
        out = fast.encode(images, keep).tokens
        found.append(gradients(vit, images, out, torch.ones_like(out)))
        handle.remove()
        assert len(count) == 1 + enable
    assert_same(*found)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3, "reg_tokens": 2}, {"mlp_layer": SwiGLUPacked}])
@pytest.mark.parametrize("how", ["autocast", "bf16"])
def test_low_precision_is_as_exact_as_timms(options, how, seed):
    vit = build(torch.float32, embed_dim=48, **options)
    images, keep = images_for(vit, 8), draw(8, 9)
    wide = copy.deepcopy(vit).double()
    if how == "bf16":
        vit = vit.bfloat16()
        # the same values in both precisions
        wide = copy.deepcopy(vit).double()
        images = images.bfloat16()
    fast = accelerate(vit)
    weight = torch.randn(8, 9 + vit.num_prefix_tokens, 48).double()
    results = []
    for model, run in (
        (wide, lambda: slow(wide, images.double(), keep)),
        (vit, lambda: slow(vit, images, keep)),
        (vit, lambda: fast.encode(images, keep).tokens),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and model is vit):
            out = run()
        named = dict(model.named_parameters())
        grads = torch.autograd.grad((out.double() * weight).sum(), list(named.values()))
        results.append([out, *grads])
    exact, stock, ours = results
    assert ours[0].dtype == stock[0].dtype
    for name, e, s, o in zip(["out", *named], exact, stock, ours, strict=True):
        scale = float(e.detach().abs().max())
        found, allowed = (float(((x.double() - e).norm() / e.norm()).detach()) for x in (o, s))
        assert found <= 2 * allowed + 2**-9, f"{name}: {found:.1e}, timm's {allowed:.1e} of {scale:.1e}"


# ---- what is not stock is called ----------------------------------------------------------------------

PLACES = [
    "patch_embed", "patch_embed.proj", "norm_pre", "pos_drop", "norm", "blocks", "blocks.0", "blocks.1.norm1",
    "blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.attn.q_norm", "blocks.1.attn.proj", "blocks.1.attn.proj_drop",
    "blocks.1.ls1", "blocks.1.drop_path1", "blocks.0.norm2", "blocks.0.mlp", "blocks.0.mlp.fc1", "blocks.0.mlp.act",
    "blocks.0.mlp.drop1", "blocks.0.mlp.norm", "blocks.0.mlp.fc2", "blocks.0.mlp.drop2", "blocks.0.ls2",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_fire_everywhere(kind, seed):
    vit = build()
    images, keep, fast = images_for(vit), draw(2, 5), accelerate(vit)
    with torch.no_grad():
        before = fast.encode(images, keep).tokens
    for place in PLACES:
        fired = []
        module = vit.get_submodule(place)
        if kind == "backward":
            handle = module.register_full_backward_hook(lambda *_: fired.append(1))  # noqa: B023
        elif kind == "pre":
            handle = module.register_forward_pre_hook(lambda *_: fired.append(1))  # noqa: B023
        else:
            handle = module.register_forward_hook(lambda *_: fired.append(1))  # noqa: B023
        out = fast.encode(images, keep).tokens
        if kind == "backward":
            out.sum().backward()
        assert len(fired) == 1, place
        assert (out - before).abs().max() <= 1e-12, place
        handle.remove()


def test_hooks_for_all_modules_of_the_process():
    vit = build()
    images, fast = images_for(vit), accelerate(vit)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: seen.append(type(m).__name__))
    try:
        fast.encode(images, draw(2, 5))
        assert fast.report().called == {"model": "hooks are registered for all modules"}
    finally:
        handle.remove()
    assert seen.count("Linear") == 8 and seen.count("Block") == 2 and "PatchEmbed" in seen


class Lora(nn.Module):
    """A layer with a low-rank addition, as adapter libraries put it in the layer's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


@pytest.mark.parametrize("place", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_lora_runs_and_is_trained(place, seed):
    vit = build()
    fast = accelerate(vit)
    parent = vit.get_submodule("blocks.0." + place.split(".")[0])
    setattr(parent, place.split(".")[1], Lora(vit.get_submodule(f"blocks.0.{place}")))
    images, keep = images_for(vit), draw(2, 5)
    wanted, out = slow(vit, images, keep), fast.encode(images, keep).tokens
    assert (out - wanted).abs().max() <= 1e-10
    weight = torch.randn_like(out)
    named = [f"blocks.0.{place}.{x}" for x in "ab"]
    grads = [
        torch.autograd.grad((t * weight).sum(), [vit.get_parameter(n) for n in named]) for t in (out, wanted)
    ]
    for a, b in zip(*grads, strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-10 * b.abs().max()
    assert fast.report().called == {f"blocks.0.{place}": "Lora is not Linear"}


def not_stock(vit: VisionTransformer, how: str) -> str:
    """Changes one part; returns its name."""
    block = vit.blocks[1]
    if how == "parametrised":
        nn.utils.parametrizations.weight_norm(block.mlp.fc1)
        return "blocks.1.mlp.fc1"
    if how == "pruned":
        prune.l1_unstructured(block.attn.proj, "weight", 0.7)
        return "blocks.1.attn.proj"
    if how == "forward of one block":
        block.forward = types.MethodType(lambda self, x, **_: type(self).forward(self, 2 * x), block)
        return "blocks.1"
    if how == "forward of one attention":
        block.attn.forward = lambda x, **_: -x
        return "blocks.1.attn"
    if how == "subclass":
        kind = type(
            "Merged", (type(block),), {"forward": lambda self, x, **k: super(kind, self).forward(3 * x)}
        )
        block.__class__ = kind
        return "blocks.1"
    if how == "another part":
        # with a forward of the class that uses it, as adapter forks of timm have
        block.attn.adapter = nn.Linear(24, 24).double()
        return "blocks.1.attn"
    if how == "gated":
        block.attn = type(block.attn)(24, 3, gated=True, qkv_bias=True, norm_layer=nn.LayerNorm).double()
        return "blocks.1.attn"
    if how == "compiled":
        block.mlp.fc2.compile(backend="eager")
        return "blocks.1.mlp.fc2"
    if how == "tensor subclass":
        block.mlp.fc2.weight = nn.Parameter(Doubled(block.mlp.fc2.weight.detach()))
        return "blocks.1.mlp.fc2"
    raise AssertionError(how)


class Doubled(Tensor):
    """A weight whose product is not the plain one, as quantised weights are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return (2 * out).as_subclass(Tensor) if function is F.linear else out


@pytest.mark.parametrize(
    "how",
    ["parametrised", "pruned", "forward of one block", "forward of one attention", "subclass", "another part",
     "gated", "compiled", "tensor subclass"],
)  # fmt: skip
def test_what_is_not_stock_is_called(how, seed):
    vit = build()
    images, keep, fast = images_for(vit), draw(2, 5), accelerate(vit)
    before = fast.encode(images, keep).tokens
    name = not_stock(vit, how)
    after = fast.encode(images, keep).tokens
    assert (after - slow(vit, images, keep)).abs().max() <= 1e-12
    assert (after - before).abs().max() > 1e-3 or how in ("another part", "compiled", "parametrised")
    assert list(fast.report().called) == [name]
    with pytest.raises(UsageError, match=f"strict, but .*\n{name}: called as it is"):
        accelerate(vit, strict=True)


def test_a_class_whose_forward_was_exchanged(monkeypatch):
    vit = build()
    images, keep, fast = images_for(vit), draw(2, 5), accelerate(vit)
    monkeypatch.setattr(type(vit.blocks[0].attn), "forward", lambda self, x, **_: 3 * x)
    assert (fast.encode(images, keep).tokens - slow(vit, images, keep)).abs().max() <= 1e-12
    assert "blocks.0.attn" in fast.report().called


# ---- the owner ----------------------------------------------------------------------------------------


class Project(nn.Module):
    """A model that keeps the accelerated form beside its ViT."""

    def __init__(self, dtype: torch.dtype = torch.float64, **options) -> None:
        super().__init__()
        self.vit = build(dtype, **options)
        self.fast = accelerate(self.vit)

    def forward(self, images: Tensor, keep: Tensor) -> Tensor:
        return self.fast.encode(images, keep).tokens.square().mean()


def test_the_owner_notices_nothing():
    model = Project()
    assert all(name.startswith("vit.") for name in model.state_dict())
    assert len(list(model.parameters())) == len(list(model.vit.parameters()))
    assert len(list(model.modules())) == 1 + len(list(model.vit.modules()))
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    images, keep = images_for(model.vit), draw(2, 5)
    first = model(images, keep)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first.backward()
    optimizer.step()
    second = model(images, keep)
    assert second < first
    assert abs(second - slow(model.vit, images, keep).square().mean()) <= 1e-12
    assert before == {n: p.data_ptr() for n, p in model.named_parameters()}
    copied = copy.deepcopy(model)
    assert copied.fast.vit is copied.vit is not model.vit
    with torch.no_grad():
        copied.vit.norm.weight.zero_()
    assert model(images, keep) == second != copied(images, keep)


def train_with_another_process(file: str) -> None:
    """What one process of two runs; the first saves its weights."""
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    images, keep, model = _ddp_inputs()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(images[rank::2], keep[rank::2]).backward()
        optimizer.step()
    if rank == 0:
        torch.save(model.state_dict(), file)
    torch.distributed.destroy_process_group()


def _ddp_inputs() -> tuple[Tensor, Tensor, Project]:
    torch.manual_seed(0)
    model = Project()
    return torch.randn(4, 3, *SIZE).double(), draw(4, 5), model


def test_two_processes_step_as_one(tmp_path, run_cli):
    here = (
        "from tests.torchvision_operators import define_torchvision_operators\ndefine_torchvision_operators()\n"
        "from tests.contract.test_accelerate import train_with_another_process as train\n"
    )
    codes, output = run_cli("encoders", processes=2, setup=f"{here}train({str(tmp_path / 'w.pt')!r})")
    assert codes == [0, 0], output
    images, keep, model = _ddp_inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(images, keep).backward()
        optimizer.step()
    two = torch.load(tmp_path / "w.pt", weights_only=True)
    for name, p in model.state_dict().items():
        assert (two[name] - p).abs().max() <= 1e-12, name


def test_compiled():
    # one block, and few graphs: tracing takes the time of this test
    vit = build(torch.float32, depth=1, reg_tokens=1)
    images, keep, fast = images_for(vit).requires_grad_(), draw(2, 5), accelerate(vit)
    graph = torch.compile(lambda x, k: fast.encode(x, k).tokens, fullgraph=True, backend="aot_eager")
    found, wanted = graph(images, keep), slow(vit, images, keep)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(wanted)
    grads = [gradients(vit, images, out, weight) for out in (found, wanted)]
    for name, g in grads[1].items():
        torch.testing.assert_close(grads[0][name], g, rtol=1e-3, atol=1e-4)
    # more views, another count, and a hook put on before the graph is made
    views = torch.stack([draw(2, 3), draw(2, 3)], 1)
    torch.testing.assert_close(
        graph(images, views)[:, 1], slow(vit, images, views[:, 1]), rtol=1e-4, atol=1e-5
    )


# ---- reports and errors -------------------------------------------------------------------------------


def test_reports_and_strict():
    vit = build()
    fast, images = accelerate(vit, strict=True), images_for(vit)
    report = fast.report()
    assert report.called == {} and str(report) == "17 of 17 parts replaced" and "17 of 17" in repr(fast)
    assert "blocks.1.mlp.fc2" in report.replaced
    fast.encode(images)
    # strict holds at later passes, too
    handle = vit.blocks[0].norm1.register_forward_hook(lambda *_: None)
    with pytest.raises(UsageError, match=r"16 of 17 parts replaced\nblocks\.0\.norm1: .*has hooks"):
        fast.encode(images)
    handle.remove()
    fast.encode(images)
    report = accelerate(build(mlp_layer=SwiGLU, norm_layer=RmsNorm)).report()
    assert "blocks.0.norm1: called as it is (RmsNorm is not LayerNorm)" in str(report)
    assert len(report) == len(report.called) + len(report.replaced)


class OtherFeatures(VisionTransformer):
    def forward_features(self, x):
        return super().forward_features(x)[:, 1:]


class OtherHead(VisionTransformer):
    def forward(self, x):
        return self.forward_features(x).mean(1)


def with_own_positions() -> VisionTransformer:
    vit = OtherHead(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    accelerate(vit)
    vit._pos_embed = lambda x: x
    return vit


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Linear(2, 2), "Linear; it takes timm's VisionTransformer"),
        (lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28), "Eva; it takes timm's"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224"), "Distilled has its own"),
        (lambda: OtherFeatures(img_size=16, depth=1), "OtherFeatures has its own forward_features"),
        (with_own_positions, "has its own _pos_embed"),
        (lambda: nn.DataParallel(build()), "DataParallel; call it with the VisionTransformer inside"),
        (lambda: torch.compile(build()), "OptimizedModule; call it with the VisionTransformer inside"),
        (lambda: extrema_fast.create_encoder("extrema_vit_tiny_patch16_224"), r"see encode\(images, keep\)"),
        (lambda: build(dynamic_img_pad=True, dynamic_img_size=True), "dynamic_img_pad"),
        (lambda: build(patch_drop_rate=0.5).train(), "PatchDropout"),
    ],
)
def test_refused_models(model, words):
    with pytest.raises(UsageError, match=f"accelerate: .*{words}"):
        accelerate(model())


def test_patch_dropout_is_refused_where_it_is_active():
    vit = build(patch_drop_rate=0.5)
    images, fast = images_for(vit), accelerate(vit)
    assert torch.equal(fast.encode(images).tokens, vit.forward_features(images))
    vit.train()
    for keep in (None, draw(2, 5)):
        with pytest.raises(UsageError, match="PatchDropout is active"):
            fast.encode(images, keep)


IMAGES, KEEP = torch.zeros(2, 3, *SIZE), torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("images", "keep", "words"),
    [
        (IMAGES[0], KEEP, r"images: .*images\[None\]"),
        (IMAGES.byte(), KEEP, "images: .*torch.uint8"),
        (IMAGES[:, :1], KEEP, r"images: .*\[2, 1, 24, 40\]"),
        (torch.zeros(2, 3, 24, 48), KEEP, "images: 24 x 48 .*set_input_size"),
        (IMAGES.double(), KEEP, "images: .*torch.float64"),
        (np.zeros((2, 3, *SIZE), "float32"), KEEP, "images: .*ndarray"),
        (IMAGES, KEEP.float(), "keep: .*torch.float32"),
        (IMAGES, KEEP[0], r"keep: .*\[4\]"),
        (IMAGES, KEEP + 15, "keep: .*15 to 15"),
    ],
)
def test_bad_input(images, keep, words):
    fast = accelerate(build(torch.float32))
    with pytest.raises(UsageError, match=words):
        fast.encode(images, keep)
    if words.startswith("images"):
        with pytest.raises(UsageError, match=words):
            fast.forward_features(images)


def test_more_bad_input(monkeypatch):
    vit = build(torch.float32, dynamic_img_size=True)
    with pytest.raises(UsageError, match="24 x 41 is not a multiple of the patch size 8"):
        accelerate(vit).encode(torch.zeros(2, 3, 24, 41), KEEP)
    for masks in ({"attn_mask": torch.zeros(16, 16)}, {"is_causal": True}):
        with pytest.raises(UsageError, match=r"attn_mask, is_causal: .*vit\.forward_features"):
            accelerate(vit).forward_features(IMAGES, **masks)
    with pytest.raises(UsageError, match="'sdpaa'; did you mean 'sdpa'"):
        accelerate(vit, attention="sdpaa")
    stem = build(torch.float32, embed_layer=Stem)
    stem.patch_embed.proj.append(nn.MaxPool2d((1, 5)))
    stem.pos_embed = None
    with pytest.raises(UsageError, match="patch_embed: its 3 patches are no grid of 24 x 40 pixels"):
        accelerate(stem).encode(IMAGES, KEEP)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"timm cannot be imported .*extrema-fast\[timm\]"):
        accelerate(vit)
