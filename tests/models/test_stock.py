"""A part that is not stock is called as a module, dense and masked; a stock one is replaced (`ops.stock`).

Covers: every kind of hook on every submodule; adapters, pruning, parametrizations, weights of other types, own forwards
on every layer, outputs and gradients against a model made of module calls; patch embeddings of other kinds; attention
maps; the called model equals the replaced one; low precision; one compiled graph; shadows; what quantizes `nn.Linear`;
errors that name the part.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from extrema_fast.config import Config, HeadConfig, ModelConfig
from extrema_fast.errors import UsageError
from extrema_fast.models import layers
from extrema_fast.models.encoder import Encoder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.ops import linear as linears
from extrema_fast.ops import stock
from tests.encoders import Doubled, Lora, assert_same, close, encoded, randomized

CONFIG = ModelConfig(img_size=(8, 12), patch_size=4, width=16, depth=1, heads=2, mlp_ratio=2.0, pool_depth=1)
N = 6
KEEP = torch.tensor([[4, 0, 3], [1, 1, 5]])
LINEAR = [
    *(f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    *(f"blocks_token.0.{name}" for name in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")),
]
NORMS = [f"{block}.0.norm{i}" for block in ("blocks", "blocks_token") for i in (1, 2)]
# every part that is called, or read in its place
PARTS = [
    "patch_embed",
    "patch_embed.proj",
    "norm",
    *(f"{block}.0{part}" for block in ("blocks", "blocks_token") for part in ("", ".attn", ".mlp")),
    *LINEAR,
    *NORMS,
]


def make(**options) -> Encoder:
    return randomized(Encoder(CONFIG, **options).double())


def images() -> Tensor:
    return torch.randn(2, 3, 8, 12, dtype=torch.float64)


# ---- hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_fire_everywhere(kind, masked):
    encoder, x = make(), images()
    keep = KEEP if masked else None
    before = encoded(encoder, x, keep)
    for place in PARTS:
        fired = []
        part = encoder.get_submodule(place)
        hook = getattr(part, f"register_{kind}")(lambda *_, fired=fired: fired.append(1))
        out = encoded(encoder, x.clone().requires_grad_(), keep)
        if "backward" in kind:
            out.sum().backward()
        assert len(fired) == 1, place
        assert close(out, before, 1e-11), place
        hook.remove()


def test_what_hooks_see_and_change():
    encoder, x = make(), images()
    seen = {}
    for place in ("blocks.0.attn", "blocks.0.mlp", "blocks_token.0.attn", "patch_embed.proj"):
        encoder.get_submodule(place).register_forward_hook(
            lambda module, args, out, place=place: seen.update({place: (args[0], out)})
        )
    encoder(x)
    tokens = encoder.embed(x)
    block = encoder.blocks[0]
    assert close(seen["blocks.0.attn"][0], block.norm1(tokens), 1e-11)
    assert seen["blocks.0.mlp"][1].shape == (2, N, 16) and seen["blocks_token.0.attn"][1].shape == (2, 16)
    assert close(seen["patch_embed.proj"][1], encoder.patch_embed.proj(x))
    before = encoder(x)
    encoder.blocks_token[0].attn.k.register_forward_hook(lambda module, args, out: out * 2)
    assert not close(encoder(x), before)


def test_hooks_for_all_modules_of_the_process():
    encoder, seen = make(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        encoder.encode(images(), KEEP)
    finally:
        handle.remove()
    assert {encoder.get_submodule(place) for place in PARTS} <= set(seen)


# ---- changes of one part --------------------------------------------------------------------------


def put(encoder: Encoder, place: str, module: nn.Module) -> None:
    parent, _, name = place.rpartition(".")
    setattr(encoder.get_submodule(parent), name, module)


def change(encoder: Encoder, place: str, how: str) -> None:
    part = encoder.get_submodule(place)
    if how == "LoRA":
        put(encoder, place, Lora(part))
    elif how == "pruned":
        prune.l1_unstructured(part, "weight", 0.7)
    elif how == "weight_norm":
        parametrizations.weight_norm(part)
        part.parametrizations.weight.original0.data.mul_(3)
    elif how == "spectral_norm":
        parametrizations.spectral_norm(part)
    elif how == "old weight_norm":
        nn.utils.weight_norm(part)
        part.weight_g.data.mul_(3)
    elif how == "tensor subclass":
        part.weight = nn.Parameter(Doubled(part.weight.detach()))
    elif how == "own forward":
        part.forward = lambda x, forward=part.forward: 2 * forward(x)
    elif how == "subclass":
        kind = type("Other", (type(part),), {"forward": lambda self, x: -super(kind, self).forward(x)})
        part.__class__ = kind


CHANGES = [
    *((place, how) for place in LINEAR for how in ("LoRA", "pruned", "weight_norm", "spectral_norm")),
    *((place, how) for place in LINEAR[:1] + LINEAR[5:6] for how in ("old weight_norm", "tensor subclass")),
    *((place, how) for place in NORMS for how in ("pruned", "tensor subclass", "own forward")),
    *(
        ("patch_embed.proj", how)
        for how in ("pruned", "weight_norm", "spectral_norm", "tensor subclass", "own forward", "subclass")
    ),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(("place", "how"), CHANGES)
def test_a_changed_part_is_called(place, how):
    encoder, x = make(), images()
    before = encoded(encoder, x, KEEP)
    change(encoder, place, how)
    after = encoded(encoder, x, KEEP)
    # keys' biases alone would change nothing
    assert not close(after, before, 1e-6)
    assert_same(encoder, None)
    assert_same(encoder, KEEP)
    assert encoder.get_attention(x, KEEP).shape == (2, 1, 2, 4)


def test_called_equals_replaced(monkeypatch):
    encoder, x = make(), images()
    wanted = [encoder(x), encoded(encoder, x, KEEP), encoder.get_attention(x)]
    monkeypatch.setattr(stock, "PLAIN", ())
    monkeypatch.setattr(layers.ops, "attention_pool", None)
    monkeypatch.setattr(layers.ops, "patch_gather", None)
    found = [encoder(x), encoded(encoder, x, KEEP), encoder.get_attention(x)]
    assert all(
        close(a, b, 1e-6 if i == 2 else 1e-11) for i, (a, b) in enumerate(zip(found, wanted, strict=True))
    )


# ---- patch embedding ------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def stem() -> nn.Module:
    """Convolutions that overlap: a token depends on other patches' pixels."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 16, 3, 2, 1)).double()


@pytest.mark.parametrize("place", ["patch_embed", "patch_embed.proj"])
@pytest.mark.parametrize("kind", [Wrapped, lambda part: stem()])
def test_another_patch_embedding(place, kind):
    encoder = make()
    if place == "patch_embed":
        embed = encoder.patch_embed
        new = kind(embed) if kind is Wrapped else nn.Sequential(stem(), nn.Flatten(2), Transposed())
        for name in ("patch_size", "img_size", "grid_size", "num_patches"):
            setattr(new, name, getattr(embed, name))
        new.proj = None
        encoder.patch_embed = new
    else:
        encoder.patch_embed.proj = kind(encoder.patch_embed.proj)
    assert_same(encoder, None)
    assert_same(encoder, KEEP)
    with pytest.raises(UsageError, match="patch_embed: it needs whole images"):
        encoder.embed(torch.zeros(2, 3, 48, dtype=torch.float64), KEEP[None])


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_patches_are_embedded_one_by_one_where_they_can_be():
    encoder, x = make(), images()
    wanted, rows = encoder.embed(x, KEEP[None]), layers.ops.gather_patches(x, KEEP[None], 4)
    seen = []
    encoder.patch_embed.proj.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    assert close(encoder.embed(x, KEEP[None]), wanted) and close(encoder.embed(rows, KEEP[None]), wanted)
    assert close(encoder.embed(layers.ops.gather_patches(x, None, 4)), encoder.embed(x))
    assert seen == [(6, 16, 1, 1), (6, 16, 1, 1), (12, 16, 1, 1), (2, 16, 2, 3)]


# ---- low precision, compiling, quantizing ---------------------------------------------------------


def test_a_computed_weight_is_left_to_torch_in_low_precision(monkeypatch):
    encoder, x = make().float(), images().float()
    change(encoder, "blocks.0.mlp.fc1", "weight_norm")
    wanted = encoder(x)
    seen = []
    forward = linears._forward
    monkeypatch.setattr(linears, "_forward", lambda *a: seen.append(type(a[1])) or forward(*a))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert close(encoder(x), wanted, 0.05)
        assert set(seen) == {nn.Parameter} and len(seen) == 3 + 2
        seen.clear()
        parameters = {name: p.detach() for name, p in encoder.named_parameters()}
        assert close(torch.func.functional_call(encoder, parameters, (x,)), wanted, 0.05)
    assert not seen


# a stock one: test_encoder.py
@pytest.mark.parametrize("how", ["LoRA", "hooks"])
def test_one_graph(how):
    encoder = make()
    if how == "LoRA":
        change(encoder, "blocks.0.attn.qkv", how)
        change(encoder, "blocks_token.0.attn.v", how)
    else:
        for place in PARTS:
            encoder.get_submodule(place).register_forward_hook(lambda module, args, out: out * 0.5)
    x = images()
    run = lambda x: encoded(encoder, x, KEEP)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert close(compiled(x), run(x), 1e-10)


def test_shadows_are_of_stock_layers():
    method = ExtreMA(Config(model=CONFIG, head=HeadConfig(hidden=8, out=8, predictor_hidden=8)))
    block = method.student.blocks[0]
    parametrizations.weight_norm(block.mlp.fc1)
    method.add_shadow_weights(torch.bfloat16)
    assert not hasattr(block.mlp.fc1, "shadow") and block.mlp.fc2.shadow.dtype == torch.bfloat16
    assert method.projector[0].bias_shadow.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantization_sees_every_linear_layer():
    from torch.ao.quantization import quantize_dynamic

    encoder, x = make(num_classes=3).float(), images().float()
    few = quantize_dynamic(copy.deepcopy(encoder), {nn.Linear}, dtype=torch.qint8)
    kinds = [type(few.get_submodule(place)).__module__ for place in [*LINEAR, "head"]]
    assert all("quantized.dynamic" in kind for kind in kinds)
    out = few(x)
    assert not torch.equal(out, encoder(x)) and close(out, encoder(x), 0.2)
    assert few.encode(x, KEEP).patches.shape == (2, 3, 16)


def test_flops_are_counted_without_gradients():
    from torch.utils.flop_counter import FlopCounterMode

    encoder = make(num_classes=3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(images())
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    rows = 2 * N
    assert counts["Encoder.patch_embed.proj"] == rows * 3 * 4 * 4 * 16
    assert counts["Encoder.blocks.0.attn.qkv"] == rows * 16 * 48
    assert counts["Encoder.blocks.0.mlp"] == rows * 2 * 16 * 32
    assert counts["Encoder.blocks_token.0.attn.k"] == (rows + 2) * 16 * 16


# ---- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [place for place in PARTS if place != "patch_embed.proj"])
@pytest.mark.parametrize("keep", [None, KEEP], ids=["dense", "masked"])
@pytest.mark.parametrize(
    "wrong", [lambda out: out[..., :-1], lambda out: (out, None)], ids=["width", "tuple"]
)
def test_another_output_is_an_error_that_names_the_part(place, keep, wrong):
    encoder = make()
    encoder.get_submodule(place).register_forward_hook(lambda module, args, out: wrong(out))
    with pytest.raises(UsageError, match=rf"^{place.removesuffix('.proj') if 'embed' in place else place}: "):
        encoder.encode(images(), keep)


def test_heads_that_do_not_divide():
    encoder = make()
    encoder.blocks[0].attn.heads = 3
    with pytest.raises(UsageError, match=r"blocks\.0\.attn\.qkv"):
        encoder(images())


def test_a_wrapped_patch_kernel_is_not_resampled():
    encoder = make()
    encoder.patch_embed.proj = Wrapped(encoder.patch_embed.proj)
    with pytest.raises(UsageError, match=r"patch_size: .*patch_embed\.proj"):
        encoder.set_input_size((8, 12), patch_size=2)
    assert encoder.patch_size == 4
