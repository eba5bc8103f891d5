"""token_gather: registered ops, autograd, the public function (README.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _launch
from .._check import FLOATS, check, check_keep
from .reference import token_gather_reference

torch.library.define("extrema_fast::token_gather_fwd", "(Tensor tokens, Tensor keep, Tensor? pos) -> Tensor")
torch.library.define(
    "extrema_fast::token_gather_bwd", "(Tensor dout, Tensor keep, int num_tokens, bool disjoint) -> Tensor"
)


def inverse_table(keep: Tensor, num_tokens: int, disjoint: bool) -> Tensor:
    """int32 [T, B, N]: the slot v K + k that took token j of image b, or -1; T = 1 if disjoint, else V."""
    views, batch, kept = keep.shape
    slots = torch.arange(views * kept, dtype=torch.int32, device=keep.device).view(views, 1, kept)
    slots = slots.expand(views, batch, kept)
    tables = 1 if disjoint else views
    table = torch.full((tables, batch, num_tokens), -1, dtype=torch.int32, device=keep.device)
    if disjoint:
        rows = keep.transpose(0, 1).reshape(1, batch, views * kept)
        slots = slots.transpose(0, 1).reshape(1, batch, views * kept)
    else:
        rows = keep
    return table.scatter_(2, rows.long(), slots)


@torch.library.impl("extrema_fast::token_gather_fwd", "CompositeExplicitAutograd")
def _fwd(tokens: Tensor, keep: Tensor, pos: Tensor | None) -> Tensor:
    if _launch.use_triton(tokens):
        from .kernel import forward

        return forward(tokens, keep, pos)
    return token_gather_reference(tokens, keep, pos).contiguous()


@torch.library.impl("extrema_fast::token_gather_bwd", "CompositeExplicitAutograd")
def _bwd(dout: Tensor, keep: Tensor, num_tokens: int, disjoint: bool) -> Tensor:
    views, batch, kept = keep.shape
    if _launch.use_triton(dout):
        from .kernel import backward

        return backward(dout, inverse_table(keep, num_tokens, disjoint), views)
    out = dout.new_zeros(batch, num_tokens, dout.shape[-1])
    rows = keep.transpose(0, 1).reshape(batch, views * kept, 1).long()
    source = dout.view(views, batch, kept, dout.shape[-1]).transpose(0, 1).flatten(1, 2)
    return out.scatter_add_(1, rows.expand_as(source), source)


@torch.library.register_fake("extrema_fast::token_gather_fwd")
def _fake_fwd(tokens: Tensor, keep: Tensor, pos: Tensor | None) -> Tensor:
    views, batch, kept = keep.shape
    return tokens.new_empty(views * batch, kept, tokens.shape[-1])


@torch.library.register_fake("extrema_fast::token_gather_bwd")
def _fake_bwd(dout: Tensor, keep: Tensor, num_tokens: int, disjoint: bool) -> Tensor:
    return dout.new_empty(keep.shape[1], num_tokens, dout.shape[-1])


class _TokenGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, keep, pos, disjoint):
        ctx.save_for_backward(keep)
        ctx.num_tokens, ctx.disjoint = tokens.shape[1], disjoint
        ctx.pos_dtype = None if pos is None else pos.dtype
        return torch.ops.extrema_fast.token_gather_fwd.default(tokens, keep, pos)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        (keep,) = ctx.saved_tensors
        grad = torch.ops.extrema_fast.token_gather_bwd.default(
            dout.contiguous(), keep, ctx.num_tokens, ctx.disjoint
        )
        dpos = grad.sum(0, dtype=ctx.pos_dtype) if ctx.needs_input_grad[2] else None
        return grad, None, dpos, None


def token_gather(
    tokens: Tensor, keep: Tensor, pos: Tensor | None = None, *, disjoint: bool = False
) -> Tensor:
    """Kept rows of already embedded tokens, plus their positions, for all views at once.

    tokens    [B, N, D] bf16 | fp16 | fp32 | fp64
    keep      [V, B, K] int32 (int64 is converted), entries in [0, N), no entry twice within a view
    pos       [N, D] or None; gets a gradient when it requires one
    disjoint  no token is in two views of its image: the backward pass reads one table instead of V. A token
              that is in two all the same loses a view's gradient (EXTREMA_FAST_CHECK=1 finds it)
    returns   [V*B, K, D], row v B + b, dtype of `tokens`
    raises    TypeError, ValueError naming the argument; indices are checked on a CPU, elsewhere with
              EXTREMA_FAST_CHECK=1
    maths     kernels/token_gather/README.md
    """
    check("tokens", tokens, ("B", "N", "D"), FLOATS)
    batch, n, width = tokens.shape
    keep = check_keep(keep, batch, n, tokens, unique="image" if disjoint else "view")
    if pos is not None:
        check("pos", pos, (n, width), FLOATS, tokens)
    return _TokenGather.apply(tokens, keep, pos, disjoint)
