"""attention_pool against the unabsorbed definition.

Covers: outputs, probabilities and all gradients in fp64 (kernel and plain path), two chained blocks sharing
statistics, one shared class row; accuracy in fp32 and fp16 over odd sizes; the statistics; gradcheck; opcheck;
one graph under torch.compile, forward and backward; strided, expanded and offset inputs; poisoned outputs;
repeatability; empty batches; the fallback; autocast; every error.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels import _launch
from extrema_fast.kernels.attention_pool import (
    PoolWeights,
    attention_pool,
    attention_pool_absorbed,
    attention_pool_reference,
)
from extrema_fast.kernels.attention_pool.op import token_stats

from tests.kernels._compare import assert_as_good

OPS = torch.ops.extrema_fast


def make(rows, n, width, dtype=torch.float64, offset=0.0, shared=False):
    tokens = (torch.randn(rows, n, width, dtype=torch.float64) + offset).to(dtype).requires_grad_()
    cls = torch.randn(1 if shared else rows, width, dtype=torch.float64).to(dtype).requires_grad_()
    shapes = [(width,), (width,)] + [(width, width), (width,)] * 4
    weights = [torch.randn(*s, dtype=torch.float64) * width**-0.5 for s in shapes]
    weights[0] = weights[0] + 1
    return tokens, cls, PoolWeights(*(w.to(dtype).requires_grad_() for w in weights))


def gradients(out, inputs, upstream):
    return torch.autograd.grad((out * upstream.to(out.dtype)).sum(), inputs)


def close(a, b, tolerance):
    scale = max(1.0, float(b.detach().abs().max()))
    assert a.shape == b.shape and float((a - b).detach().abs().max()) <= tolerance * scale


NAMES = ("tokens", "cls", *PoolWeights._fields)


@pytest.mark.parametrize("path", ["kernel", "plain"])
@pytest.mark.parametrize(
    ("rows", "n", "width", "heads"),
    [(1, 1, 16, 1), (3, 7, 96, 3), (2, 19, 192, 3), (1, 39, 384, 6), (1, 196, 32, 2), (3, 197, 64, 16)],
)
def test_fp64_output_probabilities_and_all_gradients(path, rows, n, width, heads, request):
    if path == "plain":
        request.getfixturevalue("plain")
    tokens, cls, w = make(rows, n, width, offset=0.5)
    out, p, _ = attention_pool(tokens, cls, w, heads, return_weights=True)
    exact, exact_p = attention_pool_reference(tokens, cls, w, heads)
    close(out, exact, 1e-12)
    close(p.double(), exact_p, 1e-6)
    assert not p.requires_grad and p.dtype == torch.float32
    upstream = torch.randn_like(exact)
    for name, a, b in zip(
        NAMES,
        gradients(out, (tokens, cls, *w), upstream),
        gradients(exact, (tokens, cls, *w), upstream),
        strict=True,
    ):
        close(a, b, 1e-11)
        if name == "bk":
            assert (a == 0).all()


def chain(pool, tokens, cls, blocks, heads):
    stats = None
    for w in blocks:
        out, _, stats = pool(tokens, cls, w, heads, stats)
        cls = cls + 0.1 * out
    return cls


def ours(tokens, cls, w, heads, stats):
    return attention_pool(tokens, cls, w, heads, stats=stats)


def definition(tokens, cls, w, heads, stats):
    return *attention_pool_reference(tokens, cls.expand(len(tokens), -1), w, heads), None


@pytest.mark.parametrize("path", ["kernel", "plain"])
def test_two_blocks_share_statistics_and_the_first_a_class_row(path, request):
    if path == "plain":
        request.getfixturevalue("plain")
    tokens, cls, w = make(3, 19, 64, shared=True)
    blocks = [w, make(1, 1, 64)[2]]
    out = chain(ours, tokens, cls, blocks, 4)
    exact = chain(definition, tokens, cls, blocks, 4)
    close(out, exact, 1e-12)
    inputs = (tokens, cls, *blocks[0], *blocks[1])
    upstream = torch.randn_like(exact)
    for a, b in zip(gradients(out, inputs, upstream), gradients(exact, inputs, upstream), strict=True):
        close(a, b, 1e-11)


def test_statistics_returned_are_those_of_the_tokens():
    tokens, cls, w = make(3, 7, 96, torch.float32, offset=100.0)
    _, _, (mu, rstd) = attention_pool(tokens, cls, w, 3)
    exact = token_stats(tokens.detach().double(), 1e-6)
    torch.testing.assert_close(mu.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), exact[1], rtol=1e-4, atol=0)
    # given ones are used: wrong ones give another result
    right = attention_pool(tokens, cls, w, 3, stats=(mu, rstd))[0]
    assert not torch.equal(right, attention_pool(tokens, cls, w, 3, stats=(mu, 2 * rstd))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "n", "width", "heads", "offset"),
    [
        (1, 39, 384, 6, 0.0),
        (2, 19, 192, 3, 3.0),
        (1, 49, 96, 3, 0.0),
        (1, 196, 192, 3, 0.0),
        (1, 39, 768, 12, 0.0),
    ],
)
def test_as_accurate_as_torch_in_the_same_dtype(dtype, rows, n, width, heads, offset):
    tokens, cls, w = make(rows, n, width, dtype, offset)
    inputs = (tokens, cls, *w)
    upstream = torch.randn(rows, width, dtype=torch.float64)
    results = []
    for kind in (dtype, "torch", torch.float64):
        if kind == torch.float64:
            args = [t.detach().double().requires_grad_() for t in inputs]
        else:
            args = inputs
        a_tokens, a_cls, a_w = args[0], args[1], PoolWeights(*args[2:])
        if kind == dtype:
            out = attention_pool(a_tokens, a_cls, a_w, heads)[0]
        else:
            out = attention_pool_reference(a_tokens, a_cls, a_w, heads)[0]
        results.append((out, *gradients(out, tuple(args), upstream)))
    for name, a, b, exact in zip(("out", *NAMES), *results, strict=True):
        if name != "bk":
            assert_as_good(a, b, exact, width, name)


def test_gradcheck():
    tokens, cls, w = make(2, 3, 16)

    def f(tokens, cls, *w):
        return attention_pool(tokens, cls, PoolWeights(*w), 2)[0]

    assert torch.autograd.gradcheck(f, (tokens, cls, *w), fast_mode=True)
    x, xh0, u = (t.detach() for t in (tokens, cls, torch.randn(2, 2, 16).double()))
    x.requires_grad_(), xh0.requires_grad_(), u.requires_grad_()
    from extrema_fast.kernels.attention_pool.op import _Core

    def core(*a):
        return _Core.apply(*a, 1e-6, None, None)[0]

    assert torch.autograd.gradcheck(core, (x, xh0, u), fast_mode=True)


@pytest.mark.parametrize("rows", [3, 0])
def test_opcheck(rows):
    x = torch.randn(rows, 5, 32)
    xh0, u = torch.randn(rows, 32), torch.randn(2, rows, 32)
    strided = torch.randn(5, rows, 32).transpose(0, 1)
    z, scores, lse, mu, rstd = OPS.attention_pool_fwd(x, xh0, u, 1e-6)
    for tokens in (x, strided):
        torch.library.opcheck(OPS.attention_pool_fwd.default, (tokens, xh0, u, 1e-6))
        torch.library.opcheck(OPS.attention_pool_fwd_stats.default, (tokens, xh0, u, mu, rstd))
        torch.library.opcheck(OPS.attention_pool_bwd.default, (tokens, xh0, u, z, scores, lse, mu, rstd))


def test_one_graph_forward_and_backward():
    def loss(tokens, cls, *w):
        out, _, stats = attention_pool(tokens, cls, PoolWeights(*w), 2)
        out, p, _ = attention_pool(tokens, cls + out, PoolWeights(*w), 2, stats=stats, return_weights=True)
        return (out**2).sum() + p.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    for rows, n in ((3, 7), (2, 19)):
        tokens, cls, w = make(rows, n, 32)
        value, expected = compiled(tokens, cls, *w), loss(tokens, cls, *w)
        close(value, expected, 1e-12)
        for a, b in zip(
            torch.autograd.grad(value, (tokens, cls, *w)),
            torch.autograd.grad(expected, (tokens, cls, *w)),
            strict=True,
        ):
            close(a, b, 1e-12)


LAYOUTS = {
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "offset base": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "wide rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    tokens, cls, w = make(2, 7, 32, torch.float32)
    expected = attention_pool(tokens, cls, w, 2)[0]
    strided = LAYOUTS[layout](tokens)
    assert torch.equal(strided, tokens)
    out = attention_pool(strided, cls, w, 2)[0]
    assert torch.equal(out, expected)
    # a sum sends a gradient of stride 0
    a = torch.autograd.grad(out.sum(), (tokens, cls))
    b = torch.autograd.grad((expected * torch.ones_like(expected)).sum(), (tokens, cls))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_expanded_tokens_and_an_expanded_class_row():
    tokens, cls, w = make(1, 7, 32, torch.float32)
    same = tokens.expand(3, -1, -1)
    out = attention_pool(same, cls.expand(3, -1), w, 2)[0]
    torch.testing.assert_close(out, attention_pool(tokens, cls, w, 2)[0].expand(3, -1))
    torch.testing.assert_close(out, attention_pool(same, cls, w, 2)[0])


def test_every_output_element_is_written_and_runs_repeat_bitwise(poisoned):
    tokens, cls, w = make(3, 7, 96, torch.float32)
    runs = []
    for _ in range(2):
        torch.empty(100_000).fill_(float("nan"))
        out, p, stats = attention_pool(tokens, cls, w, 3, return_weights=True)
        runs.append((out, p, *stats, *torch.autograd.grad(out.sum(), (tokens, cls, *w))))
    for a, b in zip(*runs, strict=True):
        assert not a.isnan().any() and torch.equal(a, b)


def test_an_empty_batch():
    tokens, cls, w = make(0, 7, 32, torch.float32)
    out, p, _ = attention_pool(tokens, cls, w, 2, return_weights=True)
    assert out.shape == (0, 32) and p.shape == (0, 2, 8)
    out.sum().backward()
    assert tokens.grad.shape == (0, 7, 32) and (w.wk.grad == 0).all()


@pytest.mark.parametrize(("n", "width", "heads"), [(257, 32, 2), (5, 34, 17), (5, 40, 2)])
def test_shapes_outside_the_kernel_take_the_absorbed_form(n, width, heads):
    tokens, cls, w = make(2, n, width)
    out, p, stats = attention_pool(tokens, cls, w, heads, return_weights=True)
    exact, exact_p = attention_pool_absorbed(tokens, cls, w, heads)
    assert torch.equal(out, exact) and stats is None
    torch.testing.assert_close(p, exact_p.float())


def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs(plain):
    tokens, cls, w = make(2, 7, 32, torch.float32)
    exact = attention_pool_reference(tokens, cls, w, 2)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out, _, stats = attention_pool(tokens, cls, w, 2)
    assert out.dtype == torch.bfloat16 and stats[0].dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert tokens.grad.dtype == w.wq.grad.dtype == torch.float32


def test_the_plain_path_equals_the_kernel(monkeypatch):
    tokens, cls, w = make(3, 19, 96, torch.float32)
    kernel = attention_pool(tokens, cls, w, 3)[0]
    monkeypatch.setattr(_launch, "INTERPRET", False)
    torch.testing.assert_close(attention_pool(tokens, cls, w, 3)[0], kernel, rtol=1e-4, atol=1e-5)


def test_errors():
    tokens, cls, w = make(2, 7, 32, torch.float32)
    for args, words in [
        ((tokens[0], cls, w, 2), r"tokens: expected .*\[R, n, D\], got float32 \[7, 32\]"),
        ((tokens.int(), cls, w, 2), "tokens: expected float32 | .* got int32"),
        ((tokens, cls[:, :16], w, 2), r"cls: expected .*\[2, 32\], got float32 \[2, 16\]"),
        ((tokens, cls, w._replace(wk=w.wk[:16]), 2), r"weights.wk: expected .*\[32, 32\]"),
        ((tokens, cls, w, 3), "heads: 3 does not divide the width 32"),
        ((tokens, cls.to("meta"), w, 2), "cls: expected on cpu"),
    ]:
        with pytest.raises(ValueError, match=words):
            attention_pool(*args)
    with pytest.raises(TypeError, match="tokens: expected a tensor"):
        attention_pool([1], cls, w, 2)
    with pytest.raises(ValueError, match=r"stats\[0\]: expected .*\[2, 7\]"):
        attention_pool(tokens, cls, w, 2, stats=(torch.zeros(2, 8), torch.zeros(2, 7)))
