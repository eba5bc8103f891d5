"""A trunk block in few passes over its tokens: residual and norm fused, GELU inside the MLP's matmuls.

`models.layers.Block` calls this when kernels are selected (`residual_norm`, `mlp` in `ops.dispatch`). Branches come
without the bias of their last layer, which is added, and gets its gradient, where the branch joins the residual stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels._autograd import first_order, transforming
from ..kernels.mlp.op import Mlp, fits, weight_gradient
from ..kernels.residual_norm.op import norm_again
from . import dispatch as ops
from .linear import affine, compute_dtype, shadows

# what a normalized tensor is recomputed from: tokens, their mean and 1 / standard deviation, gain, shift
Source = tuple[Tensor | None, ...]


def fuses(x: Tensor) -> bool:
    """Whether a block computes `x` with this module: kernels are chosen, and they take the dtype computed in."""
    if x.device.type != "cpu" and compute_dtype(x).itemsize != 2:
        # matmuls in fp32 and fp64 keep their second derivatives there
        return False
    return not transforming() and any(
        ops.implementation(op, x) != "reference" for op in ("residual_norm", "mlp")
    )


def residual_norm(
    x: Tensor,
    norm: nn.LayerNorm,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Source]:
    """(out = x + scale (branch + bias), norm(out) in the dtype computed in, its source).

    The source is empty unless the backward pass of the next layer is to recompute norm(out).
    """
    out, u, mean, rstd = ops.residual_norm(
        x, norm.weight, norm.bias, norm.eps, branch=branch, bias=bias, scale=scale, dtype=compute_dtype(x)
    )
    # the plain definition gives no statistics
    if not recompute or mean is None:
        return out, u, ()
    return out, u, (out.detach(), mean, rstd, norm.weight.detach(), norm.bias.detach())


def residual(x: Tensor, branch: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """x + scale (branch + bias)."""
    return ops.residual_norm(x, branch=branch, bias=bias, scale=scale)[0]


def project(u: Tensor, layer: nn.Linear, source: Source, bias: Tensor | None) -> Tensor:
    """`layer(u)` with another bias (or none)."""
    if source:
        return _Projection.apply(u, layer.weight, bias, *shadows(layer), *source)
    return affine(u, layer.weight, bias, shadows=shadows(layer))


def mlp(u: Tensor, fc1: nn.Linear, fc2: nn.Linear, source: Source, recompute_gelu: bool) -> Tensor:
    """fc2(GELU(fc1(u))) without the bias of fc2."""
    train = torch.is_grad_enabled() and any(t.requires_grad for t in (u, *fc1.parameters(), fc2.weight))
    low = (*shadows(fc1), shadows(fc2)[0])

    def run(name: str) -> Tensor:
        if name == "reference" or not (u.device.type == "cpu" or fits(u.dtype)):
            hidden = project(u, fc1, source, fc1.bias)
            return affine(hidden, fc2.weight, None, "gelu", recompute_gelu, (low[2], None))
        weights, kept = (fc1.weight, fc1.bias, fc2.weight), not recompute_gelu
        return Mlp.apply(u, *weights, *low, train, name, kept, *source)

    return ops.run("mlp", u, run)


class _Projection(torch.autograd.Function):
    """A linear layer whose input is recomputed from its source."""

    @staticmethod
    def forward(ctx, u, weight, bias, shadow, bias_shadow, *source):
        low = weight.to(u.dtype) if shadow is None else shadow
        ctx.save_for_backward(weight if shadow is None else shadow, *source)
        ctx.low, ctx.dtypes = u.dtype, (weight.dtype, None if bias is None else bias.dtype)
        if bias is not None:
            bias = bias.to(u.dtype) if bias_shadow is None else bias_shadow
        return F.linear(u, low, bias)

    @staticmethod
    @first_order("linear layer with recomputed input", "EXTREMA_FAST_BACKEND=reference")
    def backward(ctx, dy):
        weight, *source = ctx.saved_tensors
        needs, dy = ctx.needs_input_grad, dy.to(ctx.low)
        du = dy @ weight.to(ctx.low) if needs[0] else None
        dw = weight_gradient(dy, norm_again(*source, ctx.low), ctx.dtypes[0]) if needs[1] else None
        db = dy.flatten(0, -2).sum(0).to(ctx.dtypes[1]) if needs[2] else None
        return du, dw, db, *(None,) * (2 + len(source))
