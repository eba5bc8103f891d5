"""The check that every implementation passes before its time counts.

Covers: right, rounded, wrong in the first, a middle and the last row, in a gradient only, in the gradient of a second
output, NaN, runs that differ, an output that is not written, spilled registers; rows of two views; the shapes of a
training step.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from extrema_fast.kernels import _launch, tune
from extrema_fast.kernels._spec import OPS, Case, Sizes, spec

pytestmark = pytest.mark.plain
ROWS = 100


def double(x):
    return x * 2


def wrong_in(row):
    def run(x):
        out = x * 2
        return torch.cat([out[:row], 1.01 * out[row : row + 1], out[row + 1 :]])

    return run


class _Swapped(torch.autograd.Function):
    """(2 x, 3 x), each with the other's gradient."""

    @staticmethod
    def forward(ctx, x):
        return x * 2, x * 3

    @staticmethod
    def backward(ctx, first, second):
        return 3 * first + 2 * second


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dout):
        return dout


def varying():
    calls = []
    return lambda x: x * 2 + 1e-7 * (calls.append(0) or len(calls))


def unwritten(x):
    # the kernel leaves out its last row
    out = _launch.empty(x.shape, x)
    out[:-1] = x[:-1] * 2
    return out


def spilling(x):
    kernel = {(1,): lambda *args, **options: SimpleNamespace(n_spills=4)}
    _launch.launch(kernel, (1,), x)
    return x * 2


def case(**options) -> Case:
    def make(device, dtype, generator):
        x = torch.randn(ROWS, 4, device=device, generator=generator).to(dtype)
        return (x.requires_grad_(options.get("backward", True)),)

    return replace(Case("only", make, {"reference": double}, 1, row_dims={0: 0}), **options)


def fault(function, c=None, dtype=torch.float32) -> str:
    c = c or case()
    return tune.fault(c, lambda: c.make("cpu", dtype, torch.Generator().manual_seed(0)), dtype, function)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (double, ""),
        (lambda x: (x.bfloat16() * 2).float(), "times the allowed"),
        *((wrong_in(row), "times the allowed") for row in (0, ROWS // 2, ROWS - 1)),
        (_WrongGradient.apply, "wrong gradient"),
        (lambda x: x * 2 * torch.where(torch.arange(ROWS) == 7, float("nan"), 1.0)[:, None], "NaN"),
        (varying(), "two runs differ"),
        (spilling, "spills"),
    ],
)
def test_what_is_found(function, words):
    found = fault(function)
    assert words in found and bool(found) == bool(words)


def test_an_output_that_is_not_written_is_found():
    assert "NaN" in fault(unwritten, case(backward=False)) or "allowed" in fault(
        unwritten, case(backward=False)
    )


def test_code_is_compiled_as_a_step_has_it():
    """Not with the filling of outputs, which would be timed with it."""
    checked = []

    def function(x):
        checked.append(_launch.checking())
        return x * 2

    assert fault(function) == "" and checked == [False, True, True]


def test_rounding_of_16_bits_is_allowed():
    assert fault(lambda x: (x.float() * 2).bfloat16(), dtype=torch.bfloat16) == ""


def test_rows_of_two_views():
    c = case(views=2, backward=False, providers={"reference": lambda x: torch.cat([x, 3 * x])})
    assert fault(lambda x: torch.cat([x, 3 * x]), c) == ""
    # the second view's last row
    assert fault(lambda x: torch.cat([x, wrong_in(ROWS - 1)(x) * 1.5]), c)


def test_gradients_of_every_output_are_compared():
    c = case(providers={"reference": lambda x: (x * 2, x * 3)})
    assert fault(c.providers["reference"], c) == ""
    assert "wrong gradient" in fault(_Swapped.apply, c)
    assert "wrong gradient" in fault(lambda x: (x * 2, x.detach() * 3 + 0 * x), c)


@pytest.mark.parametrize("op", OPS)
def test_the_shapes_of_a_step(op):
    s = spec(op)
    sizes = Sizes(
        images=3,
        views=2,
        kept=5,
        patches=16,
        width=32,
        heads=2,
        depth=1,
        hidden=64,
        patch=4,
        height=16,
        width_px=16,
        chans=3,
    )
    cases = s.step_cases(sizes) if s.step_cases else []
    assert cases or op in ("token_gather", "crop_resize")
    for c in cases:
        args = c.make("cpu", torch.float32, torch.Generator().manual_seed(0))
        assert tune.is_correct(c, args, torch.float32)[0]
        # a row axis is one of the argument
        assert all(args[i].shape[dim] >= 3 for i, dim in c.row_dims.items())
