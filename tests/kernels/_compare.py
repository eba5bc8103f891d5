"""What the tests of all ops share: inputs, the tolerance rule, checks of gradients, repeatability and errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16)


def normal(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal numbers, drawn in float64, that need a gradient."""
    x = torch.randn(*shape, dtype=torch.float64) * scale + shift
    return x.to(dtype).requires_grad_()


def draw_keep(batch: int, n: int, views: int, kept: int, disjoint: bool = False) -> Tensor:
    """Keep indices [V, B, K] int32."""
    if disjoint:
        order = torch.rand(batch, n).argsort(-1)[:, : views * kept]
        return order.view(batch, views, kept).transpose(0, 1).int()
    return torch.rand(views, batch, n).argsort(-1)[..., :kept].int()


def error(y: Tensor, exact: Tensor) -> float:
    """max |y - exact| / max |exact|, in float64; NaN counts as infinite."""
    if exact.numel() == 0:
        return 0.0
    gap = (y.detach().double() - exact.detach().double()).abs().max()
    return float("inf") if gap.isnan() else float(gap / exact.detach().double().abs().max().clamp_min(1e-300))


def assert_as_good(ours: Tensor, same: Tensor, exact: Tensor, length: int, name: str = "result") -> None:
    """error(ours) <= 2 error(torch in the same dtype) + floor, against the float64 definition.

    floor = 2 u(dtype) + u(fp32) sqrt(length), u the unit roundoff (fp64: both in fp64); length: number of terms of
    the longest sum behind one element
    """
    assert ours.shape == exact.shape and ours.dtype == same.dtype, (name, ours.shape, ours.dtype, exact.shape)
    wide = torch.float64 if ours.dtype == torch.float64 else torch.float32
    floor = torch.finfo(ours.dtype).eps + torch.finfo(wide).eps / 2 * length**0.5
    # in float64 nothing is more exact: torch's own error is taken to be the floor
    mine, theirs = error(ours, exact), floor if ours.dtype == torch.float64 else error(same, exact)
    limit = 2 * theirs + floor
    print(f"{name}: ours {mine:.2e}, torch {theirs:.2e}, limit {limit:.2e}")
    assert mine <= limit, f"{name}: error {mine:.2e}, limit {limit:.2e} (torch {theirs:.2e})"


def with_gradients(f: Callable[..., Tensor], args: Sequence[Tensor], upstream: Tensor | None = None) -> tuple:
    """(out, gradients of all `args`) for an upstream gradient (ones)."""
    out = f(*args)
    upstream = torch.ones_like(out) if upstream is None else upstream.to(out.dtype)
    return out, *torch.autograd.grad((out * upstream).sum(), args)


def compare(
    ours: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    length: int,
    names: Sequence[str],
    tight: float = 1e-11,
) -> None:
    """Output and gradients of `inputs` against the definition in float64, by the rule of all kernels."""
    upstream = torch.randn(definition(*inputs).shape, dtype=torch.float64)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = with_gradients(definition, exact_inputs, upstream)
    same = with_gradients(definition, inputs, upstream)
    for name, a, b, c in zip(
        ("out", *names), with_gradients(ours, inputs, upstream), same, exact, strict=True
    ):
        if a.dtype == torch.float64:
            # small gradients are differences of larger terms
            torch.testing.assert_close(a, c, rtol=tight, atol=tight)
        else:
            assert_as_good(a, b, c, length, name)


def assert_repeats(run: Callable[[], Sequence[Tensor]]) -> None:
    """Two runs, with other garbage in freed memory, give the same bits and no NaN; use with `poisoned`."""
    runs = []
    for _ in range(2):
        torch.empty(100_000).fill_(float("nan"))
        runs.append(run())
    for a, b in zip(*runs, strict=True):
        assert not a.isnan().any() and torch.equal(a, b)


def assert_one_graph(f: Callable[..., Tensor], args: Sequence[Tensor]) -> None:
    """`f`, a scalar, compiles to one graph, forward and backward, and gives the same."""
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=False)
    a, b = compiled(*args), f(*args)
    torch.testing.assert_close(a, b)
    leaves = [x for x in args if x.requires_grad]
    torch.testing.assert_close(torch.autograd.grad(a, leaves), torch.autograd.grad(b, leaves))


def assert_errors(f: Callable[..., Any], cases: Sequence[tuple]) -> None:
    """Each case, (positional arguments, options, what the error names), is a ValueError."""
    for args, options, words in cases:
        with pytest.raises(ValueError, match=words):
            f(*args, **options)
