"""Linear layers in low precision.

Covers: each prologue (nothing, GELU, LayerNorm), kept or recomputed, against fp64, outputs and all gradients, by the
rule of the kernels; one graph under torch.compile; fp32 and fp64 run the plain formula with second derivatives, 16 bits
refuse them and run it under torch.func; layers that are not `Linear`.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from extrema_fast.ops.linear import Linear, linear
from tests.kernels._compare import assert_one_graph, compare, normal

LOW = torch.bfloat16


def prologue(name: str, width: int) -> nn.Module | str | None:
    if name != "norm":
        return name or None
    norm = nn.LayerNorm(width, eps=1e-6)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    nn.init.normal_(norm.bias)
    return norm


def by_definition(x, weight, bias, *norm, before):
    u = F.gelu(x) if before == "gelu" else F.layer_norm(x, x.shape[-1:], *norm, 1e-6) if norm else x
    return F.linear(u, weight, bias)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("before", ["", "gelu", "norm"])
@pytest.mark.parametrize("shape", [(5, 39, 64), (1, 1, 64), (7, 64)])
def test_against_fp64(before, recompute, shape):
    layer, f = Linear(64, 48), prologue(before, 64)
    nn.init.normal_(layer.bias)
    leaves = [normal(*shape, dtype=LOW), *layer.parameters(), *(f.parameters() if before == "norm" else ())]
    with torch.autocast("cpu", LOW):
        assert linear(leaves[0], layer, f, recompute).dtype == LOW
        compare(
            lambda x, *_: linear(x, layer, f, recompute),
            partial(by_definition, before=before),
            leaves,
            64,
            ["dx", "dweight", "dbias", "dgain", "dshift"][: len(leaves)],
        )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("before", ["", "gelu", "norm"])
def test_one_graph(before, recompute):
    layer, f = Linear(64, 48), prologue(before, 64)

    def run(x, *_):
        with torch.autocast("cpu", LOW):
            return linear(x, layer, f, recompute).float().sum()

    assert_one_graph(run, [normal(3, 5, 64, dtype=LOW), *layer.parameters()])


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


def test_a_shift_that_trains_alone_and_a_norm_without_one():
    layer, norm = Linear(16, 8).requires_grad_(False), prologue("norm", 16)
    x = torch.randn(3, 16)
    norm.weight.requires_grad_(False)
    with torch.autocast("cpu", LOW):
        linear(x, layer, norm).float().sum().backward()
    want = 3 * layer.weight.sum(0)
    assert (norm.bias.grad - want).abs().max() < 0.02 * want.abs().max()
    norm = nn.LayerNorm(16, bias=False)
    with torch.autocast("cpu", LOW):
        linear(x, layer, norm).float().sum().backward()
    assert norm.weight.grad.abs().sum() > 0


def test_full_precision_is_the_plain_formula():
    layer, norm = Linear(6, 5).double(), prologue("norm", 6).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for before in (None, "gelu", norm):
        gain = norm.parameters() if before is norm else ()
        assert torch.equal(
            linear(x, layer, before), by_definition(x, *layer.parameters(), *gain, before=before)
        )
        assert torch.autograd.gradgradcheck(lambda x, before=before: linear(x, layer, before), (x,))


@pytest.mark.parametrize("before", ["", "gelu", "norm"])
def test_second_derivatives_in_16_bits_are_refused_and_torch_func_runs_the_formula(before):
    layer, f, x = Linear(64, 48), prologue(before, 64), normal(3, 5, 64, dtype=torch.float32)

    def run(x):
        with torch.autocast("cpu", LOW):
            return linear(x, layer, f).float().square().sum()

    (first,) = torch.autograd.grad(run(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear layer in 16 bits: second derivatives .* fp32"):
        first.square().sum().backward()
    each = torch.func.vmap(torch.func.grad(run))(x.detach())
    torch.testing.assert_close(each, first.detach(), rtol=0.05, atol=0.05)


def test_other_layers_are_called():
    class Doubling(nn.Module):
        def forward(self, u):
            return 2 * u

    x = torch.randn(2, 8)
    with torch.autocast("cpu", LOW):
        assert torch.equal(linear(x, Doubling(), "gelu"), 2 * F.gelu(x))
        assert torch.equal(linear(x, Doubling(), nn.Identity()), 2 * x)
