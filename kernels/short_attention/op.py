"""short_attention: registered ops, autograd, the public function (README.md)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _launch
from .._autograd import first_order, transforming
from .._launch import FLOATS, autocast_dtype, check, describe, power_of_two
from .reference import short_attention_reference

MAX_TOKENS = 64
HEAD_DIMS = (16, 32, 64, 80)


def fits(dtype: torch.dtype, n: int, d: int) -> bool:
    """Whether a GPU's registers and shared memory fit the tile of n tokens and d columns (README.md)."""
    # fp32 matmuls use no tensor cores: larger tiles spill, the largest cannot start where a block has 99 KB.
    # There are none in fp64
    tile = power_of_two(n, 16) * power_of_two(d, 16)
    return dtype.itemsize == 2 or (dtype == torch.float32 and tile <= 2048)


@_launch.op("short_attention_fwd(Tensor qkv) -> Tensor", "forward")
def _fwd(qkv):
    rows, n, _, heads, d = qkv.shape
    return qkv.new_empty(rows, n, heads, d)


@_launch.op("short_attention_bwd(Tensor qkv, Tensor dout) -> Tensor", "backward")
def _bwd(qkv, dout):
    return qkv.new_empty(qkv.shape)


@_launch.op("short_attention_bwd_bias(Tensor qkv, Tensor dout) -> (Tensor, Tensor)", "backward_bias")
def _bwd_bias(qkv, dout):
    heads, d = qkv.shape[-2:]
    return qkv.new_empty(qkv.shape), qkv.new_empty(3 * heads * d, dtype=_launch.wide(qkv.dtype))


@register_flop_formula(_fwd.overloadpacket)
def _flops_fwd(shape, *_, **__) -> int:
    rows, n, _, heads, d = shape
    return 4 * rows * heads * n * n * d


@register_flop_formula([_bwd.overloadpacket, _bwd_bias.overloadpacket])
def _flops_bwd(shape, *_, **__) -> int:
    rows, n, _, heads, d = shape
    return 10 * rows * heads * n * n * d


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias):
        ctx.save_for_backward(qkv)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _fwd(qkv)

    @staticmethod
    @first_order("short_attention")
    def backward(ctx, dout):
        (qkv,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return _bwd(qkv, dout), None
        dqkv, dbias = _bwd_bias(qkv, dout)
        return dqkv, dbias.to(ctx.bias_dtype)


class _ContainsBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias):
        ctx.bias_dtype = bias.dtype
        return qkv.view_as(qkv)

    @staticmethod
    @first_order("short_attention")
    def backward(ctx, dqkv):
        return dqkv, dqkv.sum((0, 1), dtype=_launch.wide(dqkv.dtype)).flatten().to(ctx.bias_dtype)


def contains_bias(qkv: Tensor, bias: Tensor) -> Tensor:
    """qkv, which contains `bias` already; the bias gets the column sums of its gradient."""
    if transforming():
        return qkv + (bias - bias.detach()).view(qkv.shape[2:]).to(qkv.dtype)
    return _ContainsBias.apply(qkv, bias)


def short_attention(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` per sequence and head, for short sequences (maths: README.md in this folder).

    Saves nothing but qkv for the backward pass. Runs the plain PyTorch definition where Triton cannot run and, on a
    GPU, for fp64 and for fp32 tiles that are too large (README.md).

    Args:
        qkv: [R, n, 3, H, d] bf16 | fp16 | fp32 | fp64, n <= 64, d in 16, 32, 64, 80: the projection's output, viewed.
            Any strides (copied unless the last axis is dense). Under autocast, computed in its dtype.
        bias: [3 * H * d], any float dtype, or None: the projection's bias, which `qkv` contains already (add it there
            detached). It changes nothing here; its gradient, the column sums of qkv's, is made by the kernel that
            writes these, and is exactly zero for the keys.

    Returns:
        [R, n, H, d] contiguous, so that reshaping to [R, n, H * d] costs nothing.

    Raises:
        TypeError: `qkv` is not a tensor.
        ValueError: says what came, what is expected and what to use instead.

    Example::

        qkv = self.qkv(x).view(rows, n, 3, heads, d)
        x = self.proj(short_attention(qkv).reshape(rows, n, heads * d))
    """
    check("qkv", qkv, ("R", "n <= 64", 3, "H", "d"), FLOATS)
    n, d = qkv.shape[1], qkv.shape[-1]
    if not 1 <= n <= MAX_TOKENS:
        raise ValueError(
            f"qkv: expected 1 to {MAX_TOKENS} tokens, got {n}; use torch's scaled_dot_product_attention"
        )
    if qkv.shape[3] < 1:
        raise ValueError(f"qkv: expected one head or more, got {describe(qkv)}")
    if d not in HEAD_DIMS:
        raise ValueError(
            f"qkv: head_dim {d} is not one of {HEAD_DIMS}; use torch's scaled_dot_product_attention"
        )
    if bias is not None:
        check("bias", bias, (3 * qkv.shape[3] * d,), FLOATS, qkv)
    qkv = qkv.to(autocast_dtype(qkv))
    # every tile fits in the interpreter
    if _launch.use_triton(qkv) and (qkv.device.type == "cpu" or fits(qkv.dtype, n, d)):
        return _ShortAttention.apply(qkv, bias)
    if bias is not None:
        qkv = contains_bias(qkv, bias)
    return short_attention_reference(qkv).contiguous()
