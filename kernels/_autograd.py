"""Beyond a first backward pass: torch.func's transforms run plain PyTorch, second derivatives are refused in words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether torch.func (vmap, grad, jacrev, ...) or forward-mode AD is running: every op then is its definition."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# a traced graph holds the answer (as `can_run` of _launch.py)
transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Refused(torch.autograd.Function):
    """A gradient as it is; its own gradient is an error."""

    @staticmethod
    def forward(ctx, text, gradient, *inputs):
        ctx.text = text
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.text)


def first_order(op: str, instead: str = "") -> Callable[[Callable], Callable]:
    """Marks the backward pass of an `autograd.Function` as one without a second derivative.

    As torch's `once_differentiable`, which says nothing where only saved tensors need a gradient, as those of a
    gradient penalty do: the second derivative would then be missing from the sum.

    Args:
        op: named in the error.
        instead: what to use instead, in words; the plain definition by default.
    """
    instead = instead or f"the plain definition ({op}_reference, or EXTREMA_FAST_BACKEND=reference)"
    text = f"{op}: second derivatives are not implemented; use {instead}"

    def mark(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> Any:
            # a graph of the backward pass is wanted only with create_graph=True, and never in compiled code
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            inputs = [x for x in (*grads, *ctx.saved_tensors) if isinstance(x, Tensor) and x.requires_grad]
            if not inputs:
                return found
            results = found if isinstance(found, tuple) else (found,)
            refused = tuple(g if g is None else _Refused.apply(text, g, *inputs) for g in results)
            return refused if isinstance(found, tuple) else refused[0]

        return run

    return mark
