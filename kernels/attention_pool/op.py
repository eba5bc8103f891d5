"""attention_pool: registered ops for the streaming core, autograd, and the public function (README.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _launch
from .._launch import FLOATS, autocast_dtype, check
from .reference import PoolWeights, attention_pool_absorbed

MAX_TOKENS = 256
MAX_HEADS = 16


def fits(dtype: torch.dtype, n: int) -> bool:
    """Whether a GPU's registers hold the kernel for tokens of this type (README.md)."""
    # fp32 matmuls use no tensor cores: their tiles spill above 64 tokens. There are none in fp64
    return dtype.itemsize == 2 or (dtype == torch.float32 and n <= 64)


@_launch.op(
    "attention_pool_fwd_stats(Tensor x, Tensor xh0, Tensor u, Tensor mu, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    "forward_stats",
)
def _fwd_stats(x, xh0, u, mu, rstd):
    return _fake(x, u)[:3]


@_launch.op(
    "attention_pool_fwd(Tensor x, Tensor xh0, Tensor u, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "forward",
)
def _fwd(x, xh0, u, eps):
    return _fake(x, u)


@_launch.op(
    "attention_pool_bwd(Tensor x, Tensor xh0, Tensor u, Tensor dz, Tensor scores, Tensor lse, Tensor mu,"
    " Tensor rstd) -> (Tensor, Tensor, Tensor)",
    "backward",
)
def _bwd(x, xh0, u, dz, scores, lse, mu, rstd):
    return x.new_empty(x.shape), x.new_empty(dz.shape), x.new_empty(x.shape[0], x.shape[2])


def _fake(x: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    (rows, n, width), heads = x.shape, u.shape[0]
    statistics = ((rows, heads, n + 1), (rows, heads), (rows, n), (rows, n))
    return x.new_empty(heads, rows, width), *(x.new_empty(s, dtype=_launch.wide(x.dtype)) for s in statistics)


class _Core(torch.autograd.Function):
    """(z, scores, lse, mu, rstd) from tokens, normalized class row and absorbed queries."""

    @staticmethod
    def forward(ctx, x, xh0, u, eps, mu, rstd):
        if mu is None:
            z, scores, lse, mu, rstd = _fwd(x, xh0, u, eps)
            made = (mu, rstd)
        else:
            z, scores, lse = _fwd_stats(x, xh0, u, mu, rstd)
            # an output must not be an input
            made = (mu.detach(), rstd.detach())
        ctx.save_for_backward(x, xh0, u, scores, lse, mu, rstd)
        ctx.mark_non_differentiable(scores, lse, *made)
        # or zeros would be filled in for each of them
        ctx.set_materialize_grads(False)
        return z, scores, lse, *made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dz, *_):
        if dz is None:
            return (None,) * 6
        x, xh0, u, scores, lse, mu, rstd = ctx.saved_tensors
        dx, du, dxh0 = _bwd(x, xh0, u, dz.to(x.dtype), scores, lse, mu, rstd)
        # one class row for all: its gradient is a column sum
        if u.shape[1] != du.shape[1]:
            du = du.sum(1, keepdim=True)
        if xh0.shape[0] != dxh0.shape[0]:
            dxh0 = dxh0.sum(0, keepdim=True)
        return dx, dxh0, du, None, None, None


def attention_pool(
    tokens: Tensor,
    cls: Tensor,
    weights: PoolWeights,
    heads: int,
    eps: float = 1e-6,
    *,
    stats: tuple[Tensor, Tensor] | None = None,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Class attention of one query over its own row, before the residual (ExtreMA section 3.2, a CaiT block).

    Maths: README.md in this folder. `attention_pool_absorbed` runs instead of the kernel where Triton cannot run,
    above 256 tokens or 16 heads, for a width that is no multiple of 16 and, on a GPU, for fp64 and for fp32 above 64
    tokens; it neither takes nor returns `stats`.

    Args:
        tokens: [R, n, D] bf16 | fp16 | fp32 | fp64; under autocast, computed in its dtype (fp64 stays fp64).
        cls: [R, D], or [1, D] shared by all rows (cheaper).
        weights: LayerNorm and the q, k, v, output projections, any float dtype.
        heads: H, divides D.
        eps: of the LayerNorm.
        stats: (mean, 1 / standard deviation) [R, n] of the same tokens, as an earlier call returned them: successive
            blocks normalize the same tokens, so the second need not measure them.
        return_weights: whether to return the probabilities.

    Returns:
        (out [R, D] in the dtype computed in; probabilities [R, H, 1 + n] fp32, detached, column 0 the class row, or
        None; stats for the next block, or None).

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    check("tokens", tokens, ("R", "n", "D"), FLOATS)
    rows, n, width = tokens.shape
    shared = isinstance(cls, Tensor) and cls.dim() == 2 and cls.shape[0] == 1
    check("cls", cls, (1 if shared else rows, width), FLOATS, tokens)
    if heads < 1 or width < 1 or width % heads:
        raise ValueError(f"heads: {heads} does not divide the width {width}")
    if len(weights) != len(PoolWeights._fields):
        raise ValueError(f"weights: expected PoolWeights{PoolWeights._fields}, got {len(weights)} tensors")
    for name, w in zip(PoolWeights._fields, weights, strict=True):
        shape = (width, width) if name in ("wq", "wk", "wv", "wo") else (width,)
        check(f"weights.{name}", w, shape, FLOATS, tokens)
    if stats is not None:
        if len(stats) != 2:
            raise ValueError(f"stats: expected (mean, 1 / standard deviation), got {len(stats)} tensors")
        for name, s in zip(("stats[0]", "stats[1]"), stats, strict=True):
            check(name, s, (rows, n), (torch.float32, torch.float64), tokens)

    dtype = autocast_dtype(tokens)
    possible = 1 <= n <= MAX_TOKENS and heads <= MAX_HEADS and width % 16 == 0
    # the interpreter holds every tile
    possible = possible and (tokens.device.type == "cpu" or fits(dtype, n))
    if not (possible and _launch.use_triton(tokens)):
        out, probabilities = attention_pool_absorbed(tokens, cls.expand(rows, -1), weights, heads, eps)
        return out, probabilities.detach().float() if return_weights else None, None
    if stats is not None:
        stats = stats[0].to(_launch.wide(dtype)), stats[1].to(_launch.wide(dtype))
    with torch.autocast(tokens.device.type, enabled=False):
        out, scores, lse, stats = _folded(tokens.to(dtype), cls, weights, heads, eps, stats)
    p = (scores - lse[..., None]).exp().float() if return_weights else None
    return out, p, stats


def _folded(
    x: Tensor, cls: Tensor, w: PoolWeights, heads: int, eps: float, stats: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    rows, _, width = x.shape
    d, dtype, wide = width // heads, x.dtype, _launch.wide(x.dtype)
    scale = d**-0.5
    gain, shift, wq, bq, wk, bk, wv, bv, wo, bo = (t.to(wide) for t in w)
    # LayerNorm's gain and shift, and the scale, moved into the projections (autograd unfolds them)
    q_weight, v_weight, k_weight = scale * wq * gain, wv * gain, wk * gain
    # bk adds one number to every score of a head: it cancels in the softmax; 0 * bk keeps its gradient, zero
    q_bias = scale * (wq @ shift + bq) + 0 * bk
    v_bias = wv @ shift + bv

    xh0 = F.layer_norm(cls.to(wide), (width,), eps=eps).to(dtype)
    q = F.linear(xh0, q_weight.to(dtype), q_bias.to(dtype))
    # [H, R or 1, d] x [H, d, D]
    u = torch.bmm(q.view(-1, heads, d).transpose(0, 1), k_weight.to(dtype).view(heads, d, width))
    mu, rstd = stats if stats is not None else (None, None)
    z, scores, lse, mu, rstd = _Core.apply(x, xh0, u, eps, mu, rstd)
    o = torch.bmm(z, v_weight.to(dtype).view(heads, d, width).transpose(1, 2))
    o = o.transpose(0, 1).reshape(rows, width) + v_bias.to(dtype)
    return F.linear(o, wo.to(dtype), bo.to(dtype)), scores, lse, (mu, rstd)
