"""mlp: registered ops, autograd, the public function (README.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _launch
from .._autograd import first_order
from .._launch import FLOATS, autocast_dtype, check
from ..residual_norm.op import norm_again
from . import quack
from .reference import mlp_reference


def fits(dtype: torch.dtype) -> bool:
    """Whether a GPU's matmul units take the type: fp32 tiles spill, there are none in fp64."""
    return dtype.itemsize == 2


@_launch.op(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, bool keep) -> (Tensor, Tensor)", "linear_gelu"
)
def linear_gelu(x, weight, bias, keep):
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


@_launch.op("linear_dgelu(Tensor dy, Tensor weight, Tensor h) -> (Tensor, Tensor)", "linear_dgelu")
def linear_dgelu(dy, weight, h):
    return _fake(h)


@_launch.op(
    "quack_linear_gelu(Tensor x, Tensor weight, Tensor? bias, bool keep) -> (Tensor, Tensor)",
    "quack.linear_gelu",
    opaque=True,
)
def quack_linear_gelu(x, weight, bias, keep):
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


@_launch.op(
    "quack_linear_dgelu(Tensor dy, Tensor weight, Tensor h) -> (Tensor, Tensor)",
    "quack.linear_dgelu",
    opaque=True,
)
def quack_linear_dgelu(dy, weight, h):
    return _fake(h)


# implementation of the fused matmuls -> its forward and backward op
EPILOGUES = {"triton": (linear_gelu, linear_dgelu), "quack": (quack_linear_gelu, quack_linear_dgelu)}


@_launch.op("gelu_fwd(Tensor h) -> Tensor", "gelu")
def gelu(h):
    return h.new_empty(h.shape)


@_launch.op("gelu_bwd(Tensor dg, Tensor h) -> (Tensor, Tensor)", "dgelu")
def dgelu(dg, h):
    return _fake(h)


def _fake(h: Tensor) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape[-1], dtype=_launch.wide(h.dtype))


@register_flop_formula([linear_gelu.overloadpacket, quack_linear_gelu.overloadpacket])
def _flops_forward(x_shape, weight_shape, *_, **__) -> int:
    return 2 * weight_shape[0] * torch.Size(x_shape).numel()


@register_flop_formula([linear_dgelu.overloadpacket, quack_linear_dgelu.overloadpacket])
def _flops_backward(dy_shape, weight_shape, *_, **__) -> int:
    return 2 * weight_shape[1] * torch.Size(dy_shape).numel()


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x in `dtype`, of dy [..., N] and x [..., K]: [N, K]; on a GPU the matmul itself writes fp32."""
    dy, x = dy.reshape(-1, dy.shape[-1]).t(), x.reshape(-1, x.shape[-1])
    if dy.device.type == "cuda" and dtype == torch.float32 and dy.dtype.itemsize == 2:
        return torch.mm(dy, x, out_dtype=torch.float32)
    return (dy @ x).to(dtype)


class Mlp(torch.autograd.Function):
    """`mlp` without b2, with low-precision copies of its parameters, and a choice of what backward recomputes.

    `source`: what `residual_norm.op.norm_again` recomputes x from; none: x is kept.
    """

    @staticmethod
    def forward(ctx, x, w1, b1, w2, low1, low_b1, low2, train, by, keep_gelu, *source):
        low1, low2 = (w.to(x.dtype) if low is None else low for w, low in ((w1, low1), (w2, low2)))
        if by in EPILOGUES:
            g, h = EPILOGUES[by][0](x, low1, b1, train)
        else:
            bias = b1.to(x.dtype) if b1 is not None and low_b1 is None else low_b1
            h = F.linear(x, low1, bias)
            g = gelu(h)
        if train:
            ctx.save_for_backward(None if source else x, h, g if keep_gelu else None, low1, low2, *source)
        ctx.by, ctx.dtypes = by, (w1.dtype, None if b1 is None else b1.dtype, w2.dtype)
        return F.linear(g, low2)

    @staticmethod
    @first_order("mlp")
    def backward(ctx, df):
        x, h, g, low1, low2, *source = ctx.saved_tensors
        needs, (d1, db, d2) = ctx.needs_input_grad, ctx.dtypes
        df = df.to(h.dtype)
        dw2 = weight_gradient(df, gelu(h) if g is None else g, d2) if needs[3] else None
        dh, dbias = EPILOGUES[ctx.by][1](df, low2, h) if ctx.by in EPILOGUES else dgelu(df @ low2, h)
        dw1 = None
        if needs[1]:
            dw1 = weight_gradient(dh, norm_again(*source, h.dtype) if source else x, d1)
        dx = dh @ low1 if needs[0] else None
        return dx, dw1, dbias.to(db) if needs[2] else None, dw2, *(None,) * (6 + len(source))


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None = None,
    *,
    by: str = "triton",
) -> Tensor:
    """`GELU(x w1^T + b1) w2^T + b2` with exact GELU (maths: README.md in this folder).

    Runs the plain PyTorch definition where Triton cannot run and, on a GPU, for fp32 and fp64.

    Args:
        x: [..., D] bf16 | fp16 | fp32 | fp64; under autocast computed in its dtype.
        w1: [N, D]; weights and biases of any float dtype, gradients in theirs.
        b1: [N] or None.
        w2: [E, N].
        b2: [E] or None.
        by: `triton`: GELU and its derivative inside this folder's matmuls; `split`: the library's matmuls, and one pass
            each; `quack`: inside QuACK's matmuls.

    Returns:
        [..., E] in the dtype computed in.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    width = x.shape[-1] if isinstance(x, Tensor) and x.dim() else "D"
    check("x", x, (*x.shape[:-1], width) if isinstance(x, Tensor) and x.dim() else ("...", "D"), FLOATS)
    check("w1", w1, ("N", width), FLOATS, x)
    inner = w1.shape[0]
    check("w2", w2, ("E", inner), FLOATS, x)
    for name, bias, size in (("b1", b1, inner), ("b2", b2, w2.shape[0])):
        if bias is not None:
            check(name, bias, (size,), FLOATS, x)
    if by not in ("split", *EPILOGUES):
        raise ValueError(f"by: expected triton, split or quack, got {by!r}")
    if by == "quack" and (reason := quack.missing(x.device)):
        raise ValueError(f"by: {reason}; use triton or split")
    x = x.to(autocast_dtype(x))
    if not (_launch.use_triton(x) and (x.device.type == "cpu" or fits(x.dtype))):
        return mlp_reference(x, w1, b1, w2, b2)
    train = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2))
    y = Mlp.apply(x, w1, b1, w2, None, None, None, train, by, True)
    return y if b2 is None else y + b2.to(y.dtype)
