"""`accelerate` on timm's VisionTransformer.

Covers: every variant of the class, dense output bit-equal to timm's in fp64, kept tokens and all gradients equal to
"embed all, gather, run the blocks"; views, other sizes; training, low precision; parts that are not stock are called
(hooks, LoRA, replaced forwards); the owner and DistributedDataParallel notice nothing; torch.compile; errors.
"""

from __future__ import annotations

import copy
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import extrema_fast
from extrema_fast.errors import UsageError
from extrema_fast.weights.vit import accelerate
from tests.encoders import Doubled, Lora

timm = pytest.importorskip("timm")
from timm.layers import GluMlp, PatchEmbed, RmsNorm, SwiGLU, SwiGLUPacked  # noqa: E402
from timm.models.vision_transformer import Attention, VisionTransformer  # noqa: E402

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
    "registers": {"reg_tokens": 3},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 2},
    "no positions": {"pos_embed": "none", "reg_tokens": 1},
    "layer scale": {"init_values": 0.3},
    "inner norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "registers alone": {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
    "patch norm": {"embed_norm_layer": "layernorm"},
    "pre-norm": {"pre_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "heads of 6": {"num_heads": 4},
    "SwiGLU": {"mlp_layer": SwiGLU},
    "packed SwiGLU": {"mlp_layer": SwiGLUPacked},
    "gated, gate last": {"mlp_layer": GluMlp},
    "another activation": {"act_layer": nn.SiLU},
    "tanh GELU": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "timm's own GELU": {"act_layer": "gelu"},
    "RMSNorm": {"norm_layer": RmsNorm},
    "norm without weights": {"norm_layer": lambda d, **k: nn.LayerNorm(d, elementwise_affine=False, **k)},
    "patch RMSNorm": {"embed_norm_layer": "rmsnorm"},
    "rectangles": {"patch_size": (8, 4)},
    "gaps": {"embed_layer": gapped},
    "stem": {"embed_layer": Stem},
    "dynamic size": {"dynamic_img_size": True, "reg_tokens": 1},
    "parallel blocks": {"block_fn": timm.models.vision_transformer.ParallelScalingBlock},
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
    return torch.randn(batch, 3, *size, dtype=p.dtype)


def draw(batch: int, kept: int, n: int = N) -> Tensor:
    return torch.stack([torch.randperm(n)[:kept] for _ in range(batch)])


def slow(vit: VisionTransformer, images: Tensor, keep: Tensor) -> Tensor:
    """The definition: all patches embedded, positions, gather, timm's own blocks; keep [B, K] -> [B, P + K, D]."""
    x = vit._pos_embed(vit.patch_embed(images))
    p = vit.num_prefix_tokens
    kept = x[:, p:].gather(1, keep.long()[..., None].expand(-1, -1, x.shape[-1]))
    return vit.norm(vit.blocks(vit.norm_pre(torch.cat([x[:, :p], kept], 1))))


def gradients(vit: VisionTransformer, images: Tensor, out: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Of every parameter and of the images."""
    named = dict(vit.named_parameters()) | {"images": images}
    found = torch.autograd.grad((out * weight).sum(), list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def gap(fast, images: Tensor, keep: Tensor) -> float:
    """The largest difference to the definition."""
    return float((fast.encode(images, keep).tokens - slow(fast.vit, images, keep)).detach().abs().max())


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, g in wanted.items():
        off = float((found[name] - g).abs().max()) / max(1.0, float(g.abs().max()))
        assert off <= limit, f"{name}: {off:.1e}"


# ---- outputs and gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
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


@pytest.mark.parametrize("kept", [1, N])
def test_views_run_at_once_and_equal_one_by_one(kept):
    vit = build(reg_tokens=1)
    images, fast = images_for(vit, 3), accelerate(vit)
    keep = torch.stack([draw(3, kept) for _ in range(4)], 1).int()
    seen = []
    vit.blocks[0].norm1.register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape)))
    out = fast.encode(images, keep)
    assert seen == [(12, 2 + kept, 24)]
    assert out.prefix.shape == (3, 4, 2, 24) and out.cls.shape == (3, 4, 24)
    assert out.patches.shape == (3, 4, kept, 24)
    for v in range(4):
        assert (out.tokens[:, v] - slow(vit, images, keep[:, v])).abs().max() <= 1e-10


def test_no_images():
    vit = build(reg_tokens=1, qk_norm=True)
    images, fast = images_for(vit, 0), accelerate(vit)
    assert fast.encode(images).tokens.shape == vit.forward_features(images).shape == (0, 2 + N, 24)
    assert fast.encode(images, torch.zeros(0, 4, 5, dtype=torch.int64)).tokens.shape == (0, 4, 7, 24)


def test_all_patches_and_raw_tokens():
    vit = build()
    images, fast = images_for(vit), accelerate(vit)
    out, raw = fast.encode(images), fast.encode(images, norm=False).tokens
    assert torch.equal(out.tokens, vit.forward_features(images)) and out.grid == GRID
    assert torch.equal(out.keep, torch.arange(N).expand(2, N))
    assert not torch.equal(raw, out.tokens) and torch.equal(vit.norm(raw), out.tokens)


def test_pixels_beyond_the_last_patch_after_set_input_size():
    vit = build()
    fast = accelerate(vit)
    vit.set_input_size((36, 20))
    images = images_for(vit, size=(36, 20))
    keep = torch.tensor([[7, 0], [1, 2]])
    assert fast.encode(images, keep).grid == (4, 2) and gap(fast, images, keep) <= 1e-10


def test_dropped_patches_are_not_read():
    vit = build()
    images, fast = images_for(vit), accelerate(vit)
    keep = torch.tensor([[0, 7, 14], [3, 4, 5]])
    wanted = fast.encode(images, keep).tokens
    mask = torch.zeros(2, N).scatter_(1, keep, 1.0).view(2, 1, *GRID)
    images[(F.interpolate(mask, SIZE) == 0).expand_as(images)] = float("nan")
    assert torch.equal(fast.encode(images, keep).tokens, wanted)


@pytest.mark.parametrize(
    "name", ["deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_tiny_r_s16_p8_224"]
)
def test_real_models(name):
    size = 56 if "patch14" in name else 64
    vit = timm.create_model(name, num_classes=0, img_size=size).double().eval()
    images, fast = torch.randn(1, 3, size, size).double(), accelerate(vit)
    with torch.no_grad():
        assert torch.equal(fast.forward_features(images), vit.forward_features(images))
        n = vit.patch_embed.num_patches
        keep = draw(1, max(1, n // 4), n)
        assert gap(fast, images, keep) <= 1e-10


@pytest.mark.parametrize(("size", "embed_class"), [((16, 16), True), ((40, 24), False), ((48, 56), True)])
def test_other_sizes_get_timms_resampled_positions(size, embed_class):
    vit = build(dynamic_img_size=True, no_embed_class=not embed_class, reg_tokens=1)
    images, fast = images_for(vit, size=size).requires_grad_(), accelerate(vit)
    assert torch.equal(fast.forward_features(images), vit.forward_features(images))
    keep = draw(2, 3, size[0] * size[1] // 64)
    out, wanted = fast.encode(images, keep), slow(vit, images, keep)
    assert out.grid == (size[0] // 8, size[1] // 8)
    assert (out.tokens - wanted).abs().max() <= 1e-10
    weight = torch.randn_like(wanted)
    found, exact = (gradients(vit, images, t, weight) for t in (out.tokens, wanted))
    # timm resamples positions in fp32
    assert_same(found, exact, limit=1e-6)


# ---- training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"attn_drop_rate": 0.3},
        {"pos_drop_rate": 0.4},
        {"drop_path_rate": 0.5, "init_values": 0.1, "proj_drop_rate": 0.3},
        {"drop_path_rate": 0.5, "mlp_layer": SwiGLU, "proj_drop_rate": 0.1},
    ],
)
def test_training_draws_what_timm_draws(options):
    vit = build(depth=3, **options).train()
    images, keep, fast = images_for(vit, 5), draw(5, 6), accelerate(vit)

    def seeded(run, *args):
        torch.manual_seed(1)
        return run(*args)

    assert torch.equal(seeded(fast.forward_features, images), seeded(vit.forward_features, images))
    if "pos_drop_rate" in options:
        # timm drops positions of all patches, this of the kept ones: other draws
        assert (fast.encode(images, keep).tokens != fast.encode(images, keep).tokens).any()
        return
    off = seeded(fast.encode, images, keep).tokens - seeded(slow, vit, images, keep)
    assert off.abs().max() <= 1e-10
    assert ("blocks.0.attn" in fast.report().called) == ("attn_drop_rate" in options)
    vit.eval()
    assert not any("dropout" in why for why in fast.report().called.values())


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


@pytest.mark.parametrize("options", [{"init_values": 0.3, "reg_tokens": 2}, {"mlp_layer": SwiGLUPacked}])
@pytest.mark.parametrize("how", ["autocast", "bf16"])
def test_low_precision_is_as_exact_as_timms(options, how):
    vit = build(torch.float32, embed_dim=48, **options)
    images, keep = images_for(vit, 8), draw(8, 9)
    if how == "bf16":
        vit, images = vit.bfloat16(), images.bfloat16()
    wide, fast = copy.deepcopy(vit).double(), accelerate(vit)
    weight = torch.randn(8, 9 + vit.num_prefix_tokens, 48).double()
    results = []
    for model, run in (
        (wide, lambda: slow(wide, images.double(), keep)),
        (vit, lambda: slow(vit, images, keep)),
        (vit, lambda: fast.encode(images, keep).tokens),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and model is vit):
            out = run()
        results.append([out, *torch.autograd.grad((out.double() * weight).sum(), list(model.parameters()))])
    assert results[1][0].dtype == results[2][0].dtype
    names = ["out", *(n for n, _ in vit.named_parameters())]
    for name, exact, stock, ours in zip(names, *results, strict=True):
        found, allowed = (float(((x.double() - exact).norm() / exact.norm()).detach()) for x in (ours, stock))
        assert found <= 2 * allowed + 2**-9, f"{name}: {found:.1e}, timm's {allowed:.1e}"


# ---- what is not stock is called ----------------------------------------------------------------------

PLACES = [
    "patch_embed",
    "patch_embed.proj",
    "norm_pre",
    "pos_drop",
    "norm",
    "blocks",
    "blocks.0",
    "blocks.1.norm1",
    "blocks.1.attn",
    "blocks.1.attn.qkv",
    "blocks.1.attn.q_norm",
    "blocks.1.attn.proj",
    "blocks.1.attn.proj_drop",
    "blocks.1.ls1",
    "blocks.1.drop_path1",
    "blocks.0.norm2",
    "blocks.0.mlp",
    "blocks.0.mlp.fc1",
    "blocks.0.mlp.act",
    "blocks.0.mlp.drop1",
    "blocks.0.mlp.norm",
    "blocks.0.mlp.fc2",
    "blocks.0.mlp.drop2",
    "blocks.0.ls2",
]


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_fire_everywhere(kind):
    vit = build()
    images, keep, fast = images_for(vit), draw(2, 5), accelerate(vit)
    before = fast.encode(images, keep).tokens
    for place in PLACES:
        fired = []
        hook = getattr(vit.get_submodule(place), f"register_{kind}")(lambda *_, fired=fired: fired.append(1))
        out = fast.encode(images, keep).tokens
        if "backward" in kind:
            out.sum().backward()
        assert len(fired) == 1 and (out - before).abs().max() <= 1e-12, place
        hook.remove()


def test_hooks_for_all_modules_of_the_process():
    vit = build()
    images, fast = images_for(vit), accelerate(vit)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: seen.append(type(m).__name__))
    try:
        fast.encode(images, draw(2, 5))
        assert not fast.report().replaced and "for all modules" in str(fast.report())
    finally:
        handle.remove()
    assert seen.count("Linear") == 8 and seen.count("Block") == 2 and "PatchEmbed" in seen


def lora(vit: VisionTransformer, branch: str, name: str) -> None:
    parent = getattr(vit.blocks[1], branch)
    setattr(parent, name, Lora(getattr(parent, name)))


def own_forward(block: nn.Module) -> None:
    block.forward = types.MethodType(lambda self, x, **_: type(self).forward(self, 2 * x), block)


def subclass(block: nn.Module) -> None:
    kind = type("Merged", (type(block),), {"forward": lambda self, x, **k: super(kind, self).forward(3 * x)})
    block.__class__ = kind


def double_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(Doubled(layer.weight.detach()))


GATED = {"gated": True, "qkv_bias": True, "norm_layer": nn.LayerNorm}
# (part of the second block, change of the model)
CHANGES = {
    "LoRA of qkv": ("attn.qkv", lambda vit: lora(vit, "attn", "qkv")),
    "LoRA of fc2": ("mlp.fc2", lambda vit: lora(vit, "mlp", "fc2")),
    "parametrized": ("mlp.fc1", lambda vit: nn.utils.parametrizations.weight_norm(vit.blocks[1].mlp.fc1)),
    "pruned": ("attn.proj", lambda vit: prune.l1_unstructured(vit.blocks[1].attn.proj, "weight", 0.7)),
    "forward of one block": ("", lambda vit: own_forward(vit.blocks[1])),
    "forward of one attention": (
        "attn",
        lambda vit: setattr(vit.blocks[1].attn, "forward", lambda x, **_: -x),
    ),
    "subclass": ("", lambda vit: subclass(vit.blocks[1])),
    # with a forward of the class that uses it, as adapter forks of timm have
    "another part": ("attn", lambda vit: setattr(vit.blocks[1].attn, "adapter", nn.Linear(24, 24).double())),
    "gated": ("attn", lambda vit: setattr(vit.blocks[1], "attn", Attention(24, 3, **GATED).double())),
    "compiled": ("mlp.fc2", lambda vit: vit.blocks[1].mlp.fc2.compile(backend="eager")),
    "tensor subclass": ("mlp.fc2", lambda vit: double_weight(vit.blocks[1].mlp.fc2)),
}


@pytest.mark.parametrize("how", CHANGES)
def test_what_is_not_stock_is_called(how):
    vit = build()
    images, keep, fast = images_for(vit), draw(2, 5), accelerate(vit)
    before = fast.encode(images, keep).tokens
    part, change = CHANGES[how]
    change(vit)
    after, wanted = fast.encode(images, keep).tokens, slow(vit, images, keep)
    assert (after - wanted).abs().max() <= 1e-10
    assert (after - before).abs().max() > 1e-3 or how in ("another part", "compiled", "parametrized")
    if "LoRA" in how:
        trained = [p for name, p in vit.named_parameters() if name.endswith((".a", ".b"))]
        grads = [torch.autograd.grad(t.square().sum(), trained) for t in (after, wanted)]
        for a, b in zip(*grads, strict=True):
            assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-10 * b.abs().max()
    name = f"blocks.1.{part}".rstrip(".")
    assert list(fast.report().called) == [name]
    with pytest.raises(UsageError, match=f"strict, but .*\n{name}: called as it is"):
        accelerate(vit, strict=True)


@pytest.mark.parametrize(
    "place",
    [
        *(
            "patch_embed",
            "blocks.1",
            "blocks.0.norm1",
            "blocks.0.attn",
            "blocks.0.attn.qkv",
            "blocks.0.attn.proj",
        ),
        *("blocks.0.ls1", "blocks.0.drop_path1", "blocks.0.mlp", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"),
    ],
)
def test_another_output_is_an_error_that_names_the_part(place):
    vit = build(init_values=0.3)
    fast, images = accelerate(vit), images_for(vit)
    whole = place == "patch_embed"
    vit.get_submodule(place).register_forward_hook(lambda m, args, out: (out,) if whole else out[..., :-1])
    for keep in (None, draw(2, 4)):
        with pytest.raises(UsageError, match=rf"^vit\.{place}: "):
            fast.encode(images, keep)


def test_pruned_layers():
    vit = build()
    fast, images, keep = accelerate(vit), images_for(vit), draw(2, 4)
    attn, mlp = vit.blocks[0].attn, vit.blocks[1].mlp
    # one channel of each head is left out: as after structured pruning, the sizes are set with it
    rows = torch.arange(72).view(3, 3, 8)[:, :, :7].flatten()
    attn.qkv.weight, attn.qkv.bias = (nn.Parameter(p[rows].clone()) for p in (attn.qkv.weight, attn.qkv.bias))
    attn.proj.weight = nn.Parameter(attn.proj.weight[:, rows[:21]].clone())
    attn.qkv.out_features, attn.proj.in_features = 63, 21
    with pytest.raises(UsageError, match=r"^vit\.blocks\.0\.attn\.qkv: expected .*72.*63"):
        fast.encode(images, keep)
    attn.head_dim, attn.attn_dim, attn.scale = 7, 21, 7**-0.5
    assert gap(fast, images, keep) <= 1e-10
    mlp.fc1 = nn.Linear(24, 90).double()
    with pytest.raises(UsageError, match=r"^vit\.blocks\.1\.mlp\.fc1: "):
        fast.encode(images, keep)


def test_a_class_whose_forward_was_exchanged(monkeypatch):
    vit = build()
    images, keep, fast = images_for(vit), draw(2, 5), accelerate(vit)
    monkeypatch.setattr(Attention, "forward", lambda self, x, **_: 3 * x)
    assert gap(fast, images, keep) <= 1e-12
    assert "blocks.0.attn" in fast.report().called


# ---- the owner ----------------------------------------------------------------------------------------


class Project(nn.Module):
    """A model that keeps the accelerated form beside its ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build()
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


def test_distributed_data_parallel(tmp_path):
    from torch.nn.parallel import DistributedDataParallel

    model = Project()
    images, keep, named = images_for(model.vit), draw(2, 5), dict(model.named_parameters())
    wanted = torch.autograd.grad(model(images, keep), list(named.values()))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        DistributedDataParallel(model)(images, keep).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_same({n: p.grad for n, p in named.items()}, dict(zip(named, wanted, strict=True)))


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
    # more views, another count
    views = torch.stack([draw(2, 3), draw(2, 3)], 1)
    found, wanted = graph(images, views)[:, 1], slow(vit, images, views[:, 1])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ---- reports and errors -------------------------------------------------------------------------------


def test_reports_and_strict():
    vit = build()
    fast, images = accelerate(vit, strict=True), images_for(vit)
    report = fast.report()
    assert report.called == {} and str(report) == "17 of 17 parts replaced"
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
        (with_own_positions, "has its own _pos_embed"),
        (lambda: torch.compile(build()), "OptimizedModule; call it with the VisionTransformer inside"),
        (lambda: extrema_fast.create_encoder("extrema_vit_tiny_patch16_224"), r"see encode\(images, keep\)"),
        (lambda: build(dynamic_img_pad=True, dynamic_img_size=True), "dynamic_img_pad"),
    ],
)
def test_refused_models(model, words):
    with pytest.raises(UsageError, match=f"accelerate: .*{words}"):
        accelerate(model())


IMAGES, KEEP = torch.zeros(2, 3, *SIZE), torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("images", "keep", "words"),
    [
        (IMAGES[0], KEEP, r"images: .*images\[None\]"),
        (IMAGES[:, :1], KEEP, r"images: .*\[2, 1, 24, 40\]"),
        (torch.zeros(2, 3, 24, 48), KEEP, "images: 24 x 48 .*set_input_size"),
        (IMAGES.double(), KEEP, "images: .*torch.float64"),
        (IMAGES, KEEP.float(), "keep: .*torch.float32"),
        (IMAGES, KEEP + 15, "keep: .*15 to 15"),
        (IMAGES, KEEP.to("meta"), "keep: .*meta"),
    ],
)
def test_bad_input(images, keep, words):
    fast = accelerate(build(torch.float32))
    with pytest.raises(UsageError, match=words):
        fast.encode(images, keep)
    if words.startswith("images"):
        with pytest.raises(UsageError, match=words):
            fast.forward_features(images)


def test_patch_dropout_is_refused_where_it_is_active():
    vit = build(patch_drop_rate=0.5)
    fast, images = accelerate(vit), images_for(vit)
    assert torch.equal(fast.encode(images).tokens, vit.forward_features(images))
    vit.train()
    for call in (lambda: accelerate(vit), lambda: fast.encode(images), lambda: fast.encode(images, KEEP)):
        with pytest.raises(UsageError, match="PatchDropout is active"):
            call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_indices_of_any_integers(dtype):
    fast, keep = accelerate(build(torch.float32)), torch.arange(8).view(2, 4)
    x = torch.randn(2, 3, *SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast.encode(x, keep.to(dtype)).tokens, fast.encode(x, keep).tokens)


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
    with pytest.raises(UsageError, match=r"timm cannot be imported .*pip install .timm"):
        accelerate(vit)
