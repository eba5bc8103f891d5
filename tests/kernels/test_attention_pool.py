"""attention_pool against the unabsorbed definition (what holds for every op: test_contract.py).

Covers: outputs, probabilities and all gradients from 1 to 197 tokens in fp64, fp32, fp16, with a mean offset; what may
be left out: class row, norm, projections, biases; several queries; poolings of timm and transformers by the README's
helpers; two chained blocks sharing statistics, one shared class row; the statistics; expanded class rows; the fallback;
autocast; errors.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels.attention_pool import (
    PoolWeights,
    attention_pool,
    attention_pool_absorbed,
    attention_pool_reference,
)

from tests.kernels._compare import DTYPES, assert_errors, compare, normal
from tests.torchvision_operators import define_torchvision_operators

NAMES = ("tokens", "cls", *PoolWeights._fields)


def make(rows, n, width, dtype=torch.float64, offset=0.0, shared=False):
    """(tokens, cls, the ten weights)."""
    shapes = [(width,), (width,)] + [(width, width), (width,)] * 4
    weights = [normal(*s, dtype=dtype, scale=width**-0.5, shift=float(i == 0)) for i, s in enumerate(shapes)]
    cls = normal(1 if shared else rows, width, dtype=dtype)
    return [normal(rows, n, width, dtype=dtype, shift=offset), cls, *weights]


def ours(tokens, cls, *w, heads=2, **options):
    return attention_pool(tokens, cls, PoolWeights(*w), heads, **options)


def definition(tokens, cls, *w, heads=2):
    return attention_pool_reference(tokens, cls.expand(len(tokens), -1), PoolWeights(*w), heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "width", "heads", "offset"),
    [
        (1, 1, 16, 1, 0.5),
        (3, 7, 192, 6, 0.0),
        (2, 19, 192, 3, 3.0),
        (1, 39, 384, 12, 0.5),
        (1, 49, 96, 3, 0.0),
        (2, 197, 64, 16, 0.5),
    ],
)
def test_output_and_gradients(rows, n, width, heads, offset, dtype, poisoned):
    inputs = make(rows, n, width, dtype, offset)
    # the key bias has no gradient: exactly zero here, rounding noise in the definition
    at = NAMES.index("bk")
    bias, names = inputs.pop(at), [name for name in NAMES if name != "bk"]

    def with_bias(f):
        return lambda *args: f(*args[:at], bias.to(args[0].dtype), *args[at:], heads=heads)[0]

    compare(with_bias(ours), with_bias(definition), inputs, max(width, rows * (n + 1)), names)
    inputs.insert(at, bias)
    assert (torch.autograd.grad(ours(*inputs, heads=heads)[0].sum(), bias)[0] == 0).all()


# what is left out, queries (0: one class row), whether they are shared
VARIANTS = {
    "no biases": (("bq", "bk", "bv", "bo", "norm_bias"), 0, False),
    "no affine norm, shared": (("norm_weight", "norm_bias"), 0, True),
    "no norm": (("norm",), 0, False),
    "no class row": (("cls",), 0, False),
    "no class row, no norm, shared": (("cls", "norm"), 0, True),
    "three queries": (("cls", "norm", "bq"), 3, False),
    "three shared queries and a norm": (("cls",), 3, True),
    "a projected query, no output projection": (("cls", "norm", "wq", "bq", "wo", "bo"), 1, True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_may_be_left_out(variant, dtype, path, poisoned):
    out, queries, shared = VARIANTS[variant]
    rows, n, width, heads = 3, 19, 64, 4
    eps = None if "norm" in out else 1e-6
    tokens, cls, *weights = make(rows, n, width, dtype, 0.5, shared)
    if queries:
        cls = normal(len(cls), queries, width, dtype=dtype)
    dropped = {*out, *(("norm_weight", "norm_bias") if "norm" in out else ())}
    names = [name for name in PoolWeights._fields if name not in dropped]
    # the key bias gets exactly zero (above)
    names = [name for name in names if name != "bk"]
    bias = None if "bk" in out else weights[PoolWeights._fields.index("bk")]
    inputs = [tokens, cls, *(weights[PoolWeights._fields.index(name)] for name in names)]

    def with_weights(f):
        def run(tokens, cls, *w):
            key_bias = None if bias is None else bias.to(tokens.dtype)
            given = PoolWeights(**dict(zip(names, w, strict=True)), bk=key_bias)
            return f(tokens, cls, given, heads, eps, include_cls="cls" not in out)[0]

        return run

    def exact(tokens, cls, *args, **options):
        return attention_pool_reference(tokens, cls.expand(rows, *cls.shape[1:]), *args, **options)

    compare(with_weights(attention_pool), with_weights(exact), inputs, rows * n, ["tokens", "cls", *names])


def test_probabilities_of_several_queries(path):
    tokens, _, *w = make(2, 7, 32)
    queries = normal(1, 3, 32)
    p = attention_pool(tokens, queries, PoolWeights(*w), 2, include_cls=False, return_weights=True)[1]
    for i in range(3):
        query = queries[:, i].expand(2, -1)
        one = attention_pool_reference(tokens, query, PoolWeights(*w), 2, include_cls=False)[1]
        torch.testing.assert_close(p[:, i], one.float())


# ---- other people's modules -----------------------------------------------------------------------


def latent(**options):
    define_torchvision_operators()
    pytest.importorskip("timm")
    from timm.layers import AttentionPoolLatent

    return AttentionPoolLatent(64, num_heads=4, feat_size=19, norm_layer=torch.nn.LayerNorm, **options)


def siglip():
    define_torchvision_operators()
    modeling = pytest.importorskip("transformers.models.siglip.modeling_siglip")
    config = modeling.SiglipVisionConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96)
    return modeling.SiglipMultiheadAttentionPoolingHead(config)


def block(model, name, **options):
    define_torchvision_operators()
    models = pytest.importorskip(f"timm.models.{model}")
    return getattr(models, name)(64, 4, **options)


# the README's helper, the module, how many tensors [R, n, D] it takes and their n
FOREIGN = {
    "AttentionPoolLatent": ("pool_latent", latent, (19,)),
    "AttentionPoolLatent, plain": (
        "pool_latent",
        lambda: latent(latent_len=3, qkv_bias=False, q_proj=False, pool_type="avg", out_features=0),
        (19,),
    ),
    "AttentionPoolLatent, wide": (
        "pool_latent",
        lambda: latent(latent_len=2, latent_dim=24, pos_embed="abs", pool_type="", out_features=48),
        (19,),
    ),
    "SigLIP": ("pool_siglip", siglip, (19,)),
    "CaiT": ("pool_cait", lambda: block("cait", "LayerScaleBlockClassAttn", init_values=0.5), (19, 1)),
    "CaiT with biases": (
        "pool_cait",
        lambda: block("cait", "LayerScaleBlockClassAttn", qkv_bias=True, init_values=0.5),
        (19, 1),
    ),
    "XCiT": ("pool_xcit", lambda: block("xcit", "ClassAttentionBlock", tokens_norm=True), (20,)),
    "XCiT with biases": ("pool_xcit", lambda: block("xcit", "ClassAttentionBlock", qkv_bias=True), (20,)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_modules_of_timm_and_transformers_by_the_readmes_helpers(name, repository, path):
    helper, module, sizes = FOREIGN[name]
    module = module().double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.25)
    text = (repository / "kernels/attention_pool/README.md").read_text(encoding="utf-8")
    scope = {}
    for code in text.split("```python\n")[2:]:
        exec(compile(code.partition("```")[0], "kernels/attention_pool/README.md", "exec"), scope)
    inputs = [normal(3, n, 64) for n in sizes]
    wanted, got = module(*inputs), scope[helper](module, *inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(wanted)
    names, leaves = zip(*module.named_parameters(), strict=True)
    results = [torch.autograd.grad((y * upstream).sum(), [*inputs, *leaves]) for y in (got, wanted)]
    for what, a, b in zip((*sizes, *names), *results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, w=what: f"{w}: {m}")


# ---- the pooling blocks of ExtreMA ----------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 39])
def test_probabilities(n, path):
    inputs = make(3, n, 32)
    p, exact = ours(*inputs, return_weights=True)[1], definition(*inputs)[1]
    torch.testing.assert_close(p.double(), exact, rtol=1e-6, atol=1e-6)
    assert not p.requires_grad and p.dtype == torch.float32


def test_two_blocks_share_statistics_and_the_first_a_class_row(path):
    inputs = [*make(3, 19, 64, shared=True), *make(1, 1, 64)[2:]]

    def chain(pool):
        def run(tokens, cls, *w):
            out, _, stats = pool(tokens, cls, w[:10], None)
            cls = cls + 0.1 * out
            return cls + 0.1 * pool(tokens, cls, w[10:], stats)[0]

        return run

    names = [*NAMES, *(f"second {name}" for name in PoolWeights._fields)]
    compare(
        chain(lambda tokens, cls, w, stats: ours(tokens, cls, *w, stats=stats)),
        chain(lambda tokens, cls, w, stats: (*definition(tokens, cls, *w), None)),
        inputs,
        64,
        names,
    )


def test_statistics_are_those_of_the_tokens_and_given_ones_are_used():
    inputs = make(3, 7, 96, torch.float32, offset=100.0)
    right, _, (mu, rstd) = ours(*inputs, heads=3)
    var, mean = torch.var_mean(inputs[0].detach().double(), -1, correction=0)
    torch.testing.assert_close(mu.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (var + 1e-6).rsqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(ours(*inputs, heads=3, stats=(mu, rstd))[0], right, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(right, ours(*inputs, heads=3, stats=(mu, 2 * rstd))[0])


def test_an_expanded_class_row():
    tokens, cls, *w = make(3, 7, 32, torch.float32, shared=True)
    torch.testing.assert_close(ours(tokens, cls.expand(3, -1), *w)[0], ours(tokens, cls, *w)[0])


@pytest.mark.parametrize(
    ("n", "width", "heads", "path"),
    [(257, 32, 2, "kernel"), (5, 34, 17, "kernel"), (5, 40, 2, "kernel"), (19, 32, 2, "plain")],
    indirect=["path"],
)
def test_what_the_kernel_cannot_run_takes_the_absorbed_form(n, width, heads, path):
    tokens, cls, *w = make(2, n, width)
    out, p, stats = ours(tokens, cls, *w, heads=heads, return_weights=True)
    exact, exact_p = attention_pool_absorbed(tokens, cls, PoolWeights(*w), heads)
    assert torch.equal(out, exact) and stats is None and not p.requires_grad
    torch.testing.assert_close(p, exact_p.float())


def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs(path):
    # the interpreter gets bf16 wrong
    low = torch.bfloat16 if path == "plain" else torch.float16
    inputs = make(2, 7, 32, torch.float32)
    with torch.autocast("cpu", low):
        out, _, stats = ours(*inputs)
    assert out.dtype == low and (path == "plain" or stats[0].dtype == torch.float32)
    torch.testing.assert_close(out.float(), definition(*inputs)[0], rtol=0.05, atol=0.05)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), inputs))


def test_errors():
    tokens, cls, *w = make(2, 7, 32, torch.float32)
    w = PoolWeights(*w)
    stats = torch.zeros(2, 8), torch.zeros(2, 7)
    cases = [
        ((tokens[0], cls, w, 2), {}, r"tokens: expected .*\[R, n, D\], got float32 \[7, 32\]"),
        ((tokens, cls[:, :16], w, 2), {}, r"cls: expected .*\[2, 32\], got float32 \[2, 16\]"),
        ((tokens, cls, w._replace(wk=w.wk[:16]), 2), {}, r"weights.wk: expected .*\[32, 32\]"),
        ((tokens, cls, w[:9], 2), {}, "weights: expected PoolWeights.*, got 9"),
        ((tokens, cls, w, 3), {}, "heads: 3 does not divide the width 32"),
        ((tokens, cls, w, 2), {"stats": stats}, r"stats\[0\]: expected .*\[2, 7\]"),
        ((tokens, cls, w, 2), {"stats": stats[:1]}, "stats: expected .* got 1 tensors"),
        ((tokens, cls, w, 2, None), {}, "norm_weight, norm_bias: expected None without a norm"),
        ((tokens, cls, w._replace(wq=None), 2), {}, "weights.bq: expected None without wq"),
        ((tokens, cls, w._replace(wq=None, bq=None), 2), {}, "weights.wq: .* use include_cls=False"),
        ((tokens, cls, w._replace(wo=None), 2), {}, "weights.bo: expected None without wo"),
        ((tokens, cls[:, None], w, 2), {}, r"cls: expected .*\[2, 32\], .* include_cls=False"),
    ]
    assert_errors(attention_pool, cases)
    with pytest.raises(TypeError, match="tokens: expected a tensor"):
        attention_pool([1], cls, w, 2)
