"""short_attention: registered ops, autograd, the public function (README.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _launch
from .._check import FLOATS, autocast_dtype, check, describe
from .reference import short_attention_reference

MAX_TOKENS = 64
HEAD_DIMS = (16, 32, 64, 80)

torch.library.define("extrema_fast::short_attention_fwd", "(Tensor qkv) -> Tensor")
torch.library.define("extrema_fast::short_attention_bwd", "(Tensor qkv, Tensor dout) -> Tensor")


def fits(dtype: torch.dtype, n: int, d: int) -> bool:
    """Whether a GPU's registers and shared memory hold the tile of n tokens and d columns (README.md)."""
    # fp32 products take no tensor cores: larger tiles spill, the largest cannot start where a block has 99 KB.
    # There are none in fp64
    tile = math.prod(1 << (max(size, 16) - 1).bit_length() for size in (n, d))
    return dtype.itemsize == 2 or (dtype == torch.float32 and tile <= 2048)


def _runs(qkv: Tensor) -> bool:
    # the interpreter holds everything
    held = qkv.device.type == "cpu" or fits(qkv.dtype, qkv.shape[1], qkv.shape[4])
    return _launch.use_triton(qkv) and held


@torch.library.impl("extrema_fast::short_attention_fwd", "CompositeExplicitAutograd")
def _fwd(qkv: Tensor) -> Tensor:
    if _runs(qkv):
        from .kernel import forward

        return forward(qkv)
    return short_attention_reference(qkv).contiguous()


@torch.library.impl("extrema_fast::short_attention_bwd", "CompositeExplicitAutograd")
def _bwd(qkv: Tensor, dout: Tensor) -> Tensor:
    if _runs(qkv):
        from .kernel import backward

        return backward(qkv, dout)
    # [R, H, n, d]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    do, scale = dout.transpose(1, 2), q.shape[-1] ** -0.5
    p = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
    dp = do @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    grads = torch.stack([ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do])
    return grads.permute(1, 3, 0, 2, 4).contiguous()


@torch.library.register_fake("extrema_fast::short_attention_fwd")
def _fake_fwd(qkv: Tensor) -> Tensor:
    rows, n, _, heads, d = qkv.shape
    return qkv.new_empty(rows, n, heads, d)


@torch.library.register_fake("extrema_fast::short_attention_bwd")
def _fake_bwd(qkv: Tensor, dout: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


@register_flop_formula(torch.ops.extrema_fast.short_attention_fwd)
def _flops_fwd(shape, *_, **__) -> int:
    rows, n, _, heads, d = shape
    return 4 * rows * heads * n * n * d


@register_flop_formula(torch.ops.extrema_fast.short_attention_bwd)
def _flops_bwd(shape, *_, **__) -> int:
    rows, n, _, heads, d = shape
    return 10 * rows * heads * n * n * d


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv):
        ctx.save_for_backward(qkv)
        return torch.ops.extrema_fast.short_attention_fwd.default(qkv)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        (qkv,) = ctx.saved_tensors
        return torch.ops.extrema_fast.short_attention_bwd.default(qkv, dout)


def short_attention(qkv: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` per sequence and head, for short sequences (ExtreMA's views).

    qkv      [R, n, 3, H, d] bf16 | fp16 | fp32 | fp64, n <= 64, d in 16, 32, 64, 80: the projection's output,
             viewed; any strides (copied unless the last axis is dense); under autocast, computed in its dtype
    returns  [R, n, H, d] contiguous, so that reshaping to [R, n, H * d] costs nothing
    raises   TypeError, ValueError naming what came and what is wanted
    saves    nothing but qkv for the backward pass
    falls back to plain torch, equal but for rounding, where Triton cannot run (CPU, not installed), and on a
             GPU for fp64 and for fp32 tiles that it cannot hold (README.md)
    maths    kernels/short_attention/README.md

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
    return _ShortAttention.apply(qkv.to(autocast_dtype(qkv)))
