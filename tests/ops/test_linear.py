"""Linear layers in low precision.

Covers: each prologue (nothing, GELU, LayerNorm), kept or recomputed, against fp64, outputs and all gradients, by the
rule of the kernels (at most twice the plain formula's error in the same dtype plus a floor); inputs of odd shapes;
one graph under torch.compile; fp32 and fp64 run the plain formula with second derivatives; layers that are not
`Linear`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from extrema_fast.ops.linear import Linear, linear

LOW = torch.bfloat16


def prologue(name: str, width: int) -> nn.Module | str | None:
    if name != "norm":
        return name or None
    norm = nn.LayerNorm(width, eps=1e-6)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    nn.init.normal_(norm.bias)
    return norm


def by_definition(x, layer, before):
    u = F.gelu(x) if before == "gelu" else x if before is None else before(x)
    return F.linear(u, layer.weight, layer.bias)


def results(function, x, layer, before, upstream):
    leaves = [x, *layer.parameters(), *(before.parameters() if isinstance(before, nn.Module) else ())]
    y = function(x, layer, before)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def check(ours, plain, exact, names):
    for a, b, e, name in zip(ours, plain, exact, names, strict=True):
        assert a.shape == e.shape and a.isfinite().all()
        scale = e.abs().max()
        mine, theirs = ((t.double() - e).abs().max() / scale for t in (a, b))
        limit = 2 * theirs + torch.finfo(LOW).eps
        assert mine <= limit, f"{name}: error {mine:.2e}, torch's {theirs:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("before", ["", "gelu", "norm"])
@pytest.mark.parametrize("shape", [(5, 39, 64), (1, 1, 64), (7, 64)])
def test_against_fp64(before, recompute, shape):
    layer, f = Linear(64, 48), prologue(before, 64)
    nn.init.normal_(layer.bias)
    x = torch.randn(shape).to(LOW).requires_grad_()
    upstream = torch.randn(*shape[:-1], 48).to(LOW)
    with torch.autocast("cpu", LOW):
        ours = results(lambda *a: linear(*a, recompute), x, layer, f, upstream)
        plain = results(by_definition, x, layer, f, upstream)
    wide = layer.__class__(64, 48).double()
    wide.load_state_dict(layer.state_dict())
    g = prologue(before, 64)
    if isinstance(g, nn.Module):
        g = g.double()
        g.load_state_dict(f.state_dict())
    exact = results(by_definition, x.detach().double().requires_grad_(), wide, g, upstream.double())
    assert ours[0].dtype == LOW and all(t.dtype == torch.float32 for t in ours[2:])
    check(ours, plain, exact, ["y", "dx", "dweight", "dbias", "dgain", "dshift"][: len(ours)])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("before", ["", "gelu", "norm"])
def test_one_graph(before, recompute):
    layer, f = Linear(64, 48), prologue(before, 64)
    x = torch.randn(3, 5, 64).to(LOW).requires_grad_()

    def run(x):
        with torch.autocast("cpu", LOW):
            return linear(x, layer, f, recompute)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    upstream = torch.randn(3, 5, 48).to(LOW)
    leaves = [x, *layer.parameters()]
    a, b = (torch.autograd.grad(function(x), leaves, upstream) for function in (compiled, run))
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)


def test_layers_without_gradients_or_bias():
    layer = Linear(16, 8, bias=False)
    x = torch.randn(3, 16)
    with torch.autocast("cpu", LOW), torch.no_grad():
        assert not linear(x, layer).requires_grad
    layer.requires_grad_(False)
    x.requires_grad_()
    with torch.autocast("cpu", LOW):
        (dx,) = torch.autograd.grad(linear(x, layer, "gelu").float().sum(), x)
    assert dx.dtype == torch.float32 and dx.shape == x.shape


def test_full_precision_is_the_plain_formula():
    layer, norm = Linear(6, 5).double(), prologue("norm", 6).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for before in (None, "gelu", norm):
        assert torch.equal(linear(x, layer, before), by_definition(x, layer, before))
        assert torch.autograd.gradgradcheck(lambda x, before=before: linear(x, layer, before), (x,))


def test_other_layers_are_called():
    class Doubling(nn.Module):
        def forward(self, u):
            return 2 * u

    x = torch.randn(2, 8)
    with torch.autocast("cpu", LOW):
        assert torch.equal(linear(x, Doubling(), "gelu"), 2 * F.gelu(x))
        assert torch.equal(linear(x, Doubling(), nn.Identity()), 2 * x)
