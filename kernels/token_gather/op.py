"""token_gather: registered ops, autograd, the public function (README.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _launch
from .._autograd import first_order
from .._launch import FLOATS, check, check_keep
from .reference import token_gather_reference


@_launch.op("token_gather_fwd(Tensor tokens, Tensor keep, Tensor? pos) -> Tensor", "forward")
def _fwd(tokens, keep, pos):
    views, batch, kept = keep.shape
    return tokens.new_empty(views * batch, kept, tokens.shape[-1])


@_launch.op("token_gather_bwd(Tensor dout, Tensor keep, int num_tokens, bool disjoint) -> Tensor", "backward")
def _bwd(dout, keep, num_tokens, disjoint):
    return dout.new_empty(keep.shape[1], num_tokens, dout.shape[-1])


class _TokenGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, keep, pos, disjoint):
        ctx.save_for_backward(keep)
        ctx.num_tokens, ctx.disjoint = tokens.shape[1], disjoint
        ctx.pos_dtype = None if pos is None else pos.dtype
        return _fwd(tokens, keep, pos)

    @staticmethod
    @first_order("token_gather")
    def backward(ctx, dout):
        (keep,) = ctx.saved_tensors
        grad = _bwd(dout.contiguous(), keep, ctx.num_tokens, ctx.disjoint)
        dpos = grad.sum(0, dtype=ctx.pos_dtype) if ctx.needs_input_grad[2] else None
        return grad, None, dpos, None


def token_gather(
    tokens: Tensor, keep: Tensor, pos: Tensor | None = None, *, disjoint: bool = False
) -> Tensor:
    """Kept rows of already embedded tokens, plus their positions, for all views (maths: README.md in this folder).

    Runs the plain PyTorch definition where Triton cannot run.

    Args:
        tokens: [B, N, D] bf16 | fp16 | fp32 | fp64.
        keep: [V, B, K] int32 (int64 is converted), entries in [0, N), no entry twice within a view. Indices are
            checked on a CPU, elsewhere with EXTREMA_FAST_CHECK=1.
        pos: [N, D] or None; gets a gradient when it requires one.
        disjoint: no token is in two views of its image, so the backward pass reads one table instead of V. If a
            token is in two views all the same, a view's gradient is lost (EXTREMA_FAST_CHECK=1 finds it).

    Returns:
        [V*B, K, D], row v B + b, dtype of `tokens`.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    check("tokens", tokens, ("B", "N", "D"), FLOATS)
    batch, n, width = tokens.shape
    keep = check_keep(keep, batch, n, tokens, unique="image" if disjoint else "view")
    if pos is not None:
        check("pos", pos, (n, width), FLOATS, tokens)
    if not _launch.use_triton(tokens):
        return token_gather_reference(tokens, keep, pos)
    return _TokenGather.apply(tokens, keep, pos, disjoint)
