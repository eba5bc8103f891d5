"""attention_pool: registered ops for the streaming core, autograd, and the public function (README.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _launch
from .._check import FLOATS, autocast_dtype, check
from .reference import PoolWeights, attention_pool_absorbed

MAX_TOKENS = 256
MAX_HEADS = 16

for _schema in (
    "attention_pool_fwd(Tensor x, Tensor xh0, Tensor u, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "attention_pool_fwd_stats(Tensor x, Tensor xh0, Tensor u, Tensor mu, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    "attention_pool_bwd(Tensor x, Tensor xh0, Tensor u, Tensor dz, Tensor scores, Tensor lse, Tensor mu,"
    " Tensor rstd) -> (Tensor, Tensor, Tensor)",
):
    torch.library.define(f"extrema_fast::{_schema.split('(')[0]}", "(" + _schema.split("(", 1)[1])


def fits(dtype: torch.dtype, n: int) -> bool:
    """Whether a GPU's registers hold the kernel for tokens of this type (README.md)."""
    # fp32 products take no tensor cores: their tiles spill above 64 tokens. There are none in fp64
    return dtype.itemsize == 2 or (dtype == torch.float32 and n <= 64)


def _runs(x: Tensor) -> bool:
    # the interpreter holds everything
    return _launch.use_triton(x) and (x.device.type == "cpu" or fits(x.dtype, x.shape[1]))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- the core in plain torch: the same quantities, formed one after the other -----------------------


def _plain_forward(x: Tensor, xh0: Tensor, u: Tensor, mu: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    wide, rows = _wide(x), x.shape[0]
    # [R, n, D], [R, D], [R, H, D]
    xh = (x.to(wide) - mu[..., None]) * rstd[..., None]
    c = xh0.to(wide).expand(rows, -1)
    query = u.to(wide).expand(-1, rows, -1).transpose(0, 1)
    scores = torch.cat([query @ c[..., None], query @ xh.transpose(1, 2)], -1)
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp()
    z = p[..., 1:] @ xh + p[..., :1] * c[:, None]
    return z.transpose(0, 1).to(x.dtype).contiguous(), scores, lse


def _plain_backward(
    x: Tensor, xh0: Tensor, u: Tensor, dz: Tensor, scores: Tensor, lse: Tensor, mu: Tensor, rstd: Tensor
) -> tuple[Tensor, ...]:
    wide, rows = _wide(x), x.shape[0]
    xh = (x.to(wide) - mu[..., None]) * rstd[..., None]
    c = xh0.to(wide).expand(rows, -1)
    query, upstream = (t.to(wide).expand(-1, rows, -1).transpose(0, 1) for t in (u, dz))
    p = (scores - lse[..., None]).exp()
    dp = torch.cat([upstream @ c[..., None], upstream @ xh.transpose(1, 2)], -1)
    da = p * (dp - (p * dp).sum(-1, keepdim=True))
    du = da[..., 1:] @ xh + da[..., :1] * c[:, None]
    both = p.transpose(1, 2) @ upstream + da.transpose(1, 2) @ query
    dxh0, dxh = both[:, 0], both[:, 1:]
    mean = dxh.mean(-1, keepdim=True)
    dx = rstd[..., None] * (dxh - mean - xh * (dxh * xh).mean(-1, keepdim=True))
    return (
        dx.to(x.dtype).contiguous(),
        du.transpose(0, 1).to(x.dtype).contiguous(),
        dxh0.to(x.dtype).contiguous(),
    )


def token_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / deviation) over D of tokens [R, n, D], fp32 (fp64 for fp64)."""
    var, mu = torch.var_mean(x.to(_wide(x)), dim=-1, correction=0)
    return mu, (var + eps).rsqrt()


# ---- registration ---------------------------------------------------------------------------------


@torch.library.impl("extrema_fast::attention_pool_fwd", "CompositeExplicitAutograd")
def _fwd(x: Tensor, xh0: Tensor, u: Tensor, eps: float) -> tuple[Tensor, ...]:
    if _runs(x):
        from .kernel import forward

        return forward(x, xh0, u, eps, None)
    mu, rstd = token_stats(x, eps)
    return (*_plain_forward(x, xh0, u, mu, rstd), mu, rstd)


@torch.library.impl("extrema_fast::attention_pool_fwd_stats", "CompositeExplicitAutograd")
def _fwd_stats(x: Tensor, xh0: Tensor, u: Tensor, mu: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    if _runs(x):
        from .kernel import forward

        return forward(x, xh0, u, 0.0, (mu, rstd))[:3]
    return _plain_forward(x, xh0, u, mu, rstd)


@torch.library.impl("extrema_fast::attention_pool_bwd", "CompositeExplicitAutograd")
def _bwd(
    x: Tensor, xh0: Tensor, u: Tensor, dz: Tensor, scores: Tensor, lse: Tensor, mu: Tensor, rstd: Tensor
) -> tuple[Tensor, ...]:
    if _runs(x):
        from .kernel import backward

        return backward(x, xh0, u, dz, scores, lse, mu, rstd)
    return _plain_backward(x, xh0, u, dz, scores, lse, mu, rstd)


@torch.library.register_fake("extrema_fast::attention_pool_fwd_stats")
def _fake_stats(x: Tensor, xh0: Tensor, u: Tensor, mu: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    (rows, n, width), heads = x.shape, u.shape[0]
    return (
        x.new_empty(heads, rows, width),
        x.new_empty(rows, heads, n + 1, dtype=_wide(x)),
        x.new_empty(rows, heads, dtype=_wide(x)),
    )


@torch.library.register_fake("extrema_fast::attention_pool_fwd")
def _fake(x: Tensor, xh0: Tensor, u: Tensor, eps: float) -> tuple[Tensor, ...]:
    mu, rstd = (x.new_empty(x.shape[:2], dtype=_wide(x)) for _ in range(2))
    return (*_fake_stats(x, xh0, u, mu, rstd), mu, rstd)


@torch.library.register_fake("extrema_fast::attention_pool_bwd")
def _fake_bwd(x: Tensor, xh0: Tensor, u: Tensor, dz: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty(dz.shape), x.new_empty(x.shape[0], x.shape[2])


class _Core(torch.autograd.Function):
    """(z, scores, lse, mu, rstd) from tokens, normalised class row and absorbed queries."""

    @staticmethod
    def forward(ctx, x, xh0, u, eps, mu, rstd):
        ops = torch.ops.extrema_fast
        if mu is None:
            z, scores, lse, mu, rstd = ops.attention_pool_fwd.default(x, xh0, u, eps)
            made = (mu, rstd)
        else:
            z, scores, lse = ops.attention_pool_fwd_stats.default(x, xh0, u, mu, rstd)
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
        dx, du, dxh0 = torch.ops.extrema_fast.attention_pool_bwd.default(
            x, xh0, u, dz.to(x.dtype), scores, lse, mu, rstd
        )
        # one class row for all: its gradient is a column sum
        if u.shape[1] != du.shape[1]:
            du = du.sum(1, keepdim=True)
        if xh0.shape[0] != dxh0.shape[0]:
            dxh0 = dxh0.sum(0, keepdim=True)
        return dx, dxh0, du, None, None, None


# ---- public ---------------------------------------------------------------------------------------


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
    """Class attention of one query over its own row (ExtreMA section 3.2, a CaiT block), before the residual.

    tokens   [R, n, D] bf16 | fp16 | fp32 | fp64; under autocast, computed in its dtype (fp64 is left alone)
    cls      [R, D], or [1, D] shared by all rows (cheaper)
    weights  PoolWeights: LayerNorm and the q, k, v, output projections, any float dtype
    stats    (mean, 1 / deviation) [R, n] of the same tokens, as an earlier call returned them: successive
             blocks normalise the same tokens, so the second need not measure them again
    returns  (out [R, D] in the dtype computed in; probabilities [R, H, 1 + n] fp32, detached, column 0 the
             class row, or None unless `return_weights`; stats for the next block)
    raises   TypeError, ValueError naming the argument, what it got and what it needs
    falls back to `attention_pool_absorbed` (stats None) above 256 tokens or 16 heads, or for a width that is
             no multiple of 16; to plain torch inside on a GPU for fp64, and for fp32 above 64 tokens
    maths    kernels/attention_pool/README.md
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
            raise ValueError(f"stats: expected (mean, 1 / deviation), got {len(stats)} tensors")
        for name, s in zip(("stats[0]", "stats[1]"), stats, strict=True):
            check(name, s, (rows, n), (torch.float32, torch.float64), tokens)

    if n > MAX_TOKENS or n < 1 or heads > MAX_HEADS or width % 16:
        out, p = attention_pool_absorbed(tokens, cls.expand(rows, -1), weights, heads, eps)
        return out, p.detach().float() if return_weights else None, None

    x = tokens.to(autocast_dtype(tokens))
    if stats is not None:
        stats = stats[0].to(_wide(x)), stats[1].to(_wide(x))
    with torch.autocast(tokens.device.type, enabled=False):
        out, scores, lse, stats = _folded(x, cls, weights, heads, eps, stats)
    p = (scores - lse[..., None]).exp().float() if return_weights else None
    return out, p, stats


def _folded(
    x: Tensor, cls: Tensor, w: PoolWeights, heads: int, eps: float, stats: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    rows, _, width = x.shape
    d, dtype, wide = width // heads, x.dtype, _wide(x)
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
