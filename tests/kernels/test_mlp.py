"""mlp against its plain definition (what holds for every op: test_contract.py).

Covers: output and all gradients in fp64, fp32, fp16 with GELU in the matmuls, in passes of its own and by QuACK (a
stand-in of plain torch with its signatures, which are compared where it is installed), without biases,
odd widths and more than one tile; GELU and its derivative over the whole line; weights in another dtype; only some
gradients; FLOPs; errors.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from functools import partial

import pytest
import torch
from extrema_fast.kernels.mlp import mlp, mlp_reference
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels import _quack
from tests.kernels._compare import DTYPES, assert_errors, assert_one_graph, compare, normal

BY = pytest.mark.parametrize("by", ["triton", "split", "quack"])
NAMES = ("x", "w1", "b1", "w2", "b2")


def make(tokens, width, inner, out, dtype=torch.float64):
    return [
        normal(*tokens, width, dtype=dtype),
        normal(inner, width, dtype=dtype, scale=width**-0.5),
        normal(inner, dtype=dtype),
        normal(out, inner, dtype=dtype, scale=inner**-0.5),
        normal(out, dtype=dtype),
    ]


@BY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "inner", "out"),
    [((1,), 16, 64, 16), ((2, 39), 96, 384, 96), ((3, 49), 20, 70, 24), ((196,), 32, 40, 8)],
)
def test_output_and_gradients(tokens, width, inner, out, dtype, by, poisoned, fake_quack):
    args = make(tokens, width, inner, out, dtype)
    length = max(math.prod(tokens), width, inner)
    compare(partial(mlp, by=by), mlp_reference, args, length, NAMES)


@BY
def test_without_biases_and_with_some_gradients(by, path, fake_quack):
    x, w1, _, w2, _ = make((2, 7), 16, 32, 16)
    for wanted in ((x,), (w1,), (w2,), (x, w1, w2)):
        args = [t if any(t is w for w in wanted) else t.detach() for t in (x, w1, w2)]
        outs = [f(args[0], args[1], None, args[2]) for f in (partial(mlp, by=by), mlp_reference)]
        a, b = (torch.autograd.grad(o.square().sum(), wanted) for o in outs)
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x, w1, None, w2, by=by), mlp_reference(x, w1, None, w2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_its_derivative_are_exact_over_the_whole_line(dtype):
    ops = torch.ops.extrema_fast
    h = torch.cat(
        [torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.tensor([0.0, -60000.0, 60000.0])]
    )
    h = h.to(dtype)
    exact = h.double().requires_grad_()
    g = torch.nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(g.sum(), exact)
    got, _ = ops.gelu_bwd(torch.ones_like(h)[None], h[None])
    tolerance = {torch.float64: 1e-14, torch.float32: 3e-7, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(ops.gelu_fwd(h).double(), g.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[0].double(), slope, rtol=tolerance, atol=tolerance)


def test_weights_keep_their_dtype():
    x, *weights = make((2, 7), 16, 32, 16, torch.float16)
    weights = [w.detach().float().requires_grad_() for w in weights]
    y = mlp(x, *weights)
    assert y.dtype == torch.float16
    grads = torch.autograd.grad(y.float().sum(), (x, *weights))
    assert [g.dtype for g in grads] == [torch.float16] + [torch.float32] * 4


def test_flops(fake_quack):
    args = make((5,), 16, 32, 8, torch.float32)
    totals = []
    for f in (mlp_reference, *(partial(mlp, by=by) for by in ("triton", "split", "quack"))):
        with FlopCounterMode(display=False) as counter:
            f(*args).sum().backward()
        totals.append(counter.get_total_flops())
    assert set(totals) == {3 * 2 * 5 * (16 * 32 + 32 * 8)}


def test_errors():
    x, w1, b1, w2, b2 = make((2, 7), 16, 32, 8)
    cases = [
        ((x, w1[:, :8], b1, w2), {}, r"w1: expected .*\[N, 16\], got float64 \[32, 8\]"),
        ((x, w1, b1[:8], w2), {}, r"b1: expected .*\[32\]"),
        ((x, w1, b1, w2[:, :8]), {}, r"w2: expected .*\[E, 32\]"),
        ((x, w1, b1, w2, b2[:3]), {}, r"b2: expected .*\[8\]"),
        ((x.int(), w1, b1, w2), {}, "x: expected"),
        ((x, w1, b1, w2), {"by": "cublas"}, "by: expected triton, split or quack, got 'cublas'"),
        ((x, w1, b1, w2), {"by": "quack"}, r"by: QuACK (is not installed \(pip|needs a CUDA device)"),
    ]
    assert_errors(mlp, cases)
    with pytest.raises(TypeError, match=r"x: expected a tensor"):
        mlp([1.0], w1, b1, w2)


def test_quack_is_called_within_one_graph(fake_quack):
    x, *weights = make((2, 7), 16, 32, 16, torch.float32)

    def f(x, *weights):
        return mlp(x, *weights, by="quack").square().sum()

    assert_one_graph(f, [x, *weights])
    empty = mlp(x.detach()[:0].requires_grad_(), *weights, by="quack")
    assert empty.shape == (0, 7, 16) and not any(g.any() for g in torch.autograd.grad(empty.sum(), weights))


def test_the_stand_in_for_quack_has_its_signatures():
    pytest.importorskip("quack", exc_type=ImportError)
    for name, functions in _quack.STANDS_FOR.items():
        for key, function in functions.items():
            real = functools.reduce(getattr, key.split("."), importlib.import_module(name))
            wanted, found = (inspect.signature(f).parameters.values() for f in (real, function))
            # a parameter of ours that it lacks, or that stands elsewhere, would hide a wrong call
            assert [(p.name, p.kind) for p in wanted] == [(p.name, p.kind) for p in found], key
