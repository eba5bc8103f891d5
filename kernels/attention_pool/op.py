"""attention_pool: registered ops for the streaming core, autograd, and the public function (README.md)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _launch
from .._autograd import first_order
from .._launch import FLOATS, autocast_dtype, check
from .reference import PoolWeights, attention_pool_absorbed, attention_pool_reference, project

MAX_TOKENS = 256
MAX_HEADS = 16


def fits(dtype: torch.dtype, n: int) -> bool:
    """Whether the kernel fits in a GPU's registers for tokens of this dtype (README.md)."""
    # fp32 matmuls use no tensor cores: their tiles spill above 64 tokens. There are none in fp64
    return dtype.itemsize == 2 or (dtype == torch.float32 and n <= 64)


@_launch.op(
    "attention_pool_fwd_stats(Tensor x, Tensor? xh0, Tensor u, Tensor mu, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    "forward_stats",
)
def _fwd_stats(x, xh0, u, mu, rstd):
    return _fake(x, xh0, u, None)[:3]


@_launch.op(
    "attention_pool_fwd(Tensor x, Tensor? xh0, Tensor u, float? eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "forward",
)
def _fwd(x, xh0, u, eps):
    return _fake(x, xh0, u, eps)


@_launch.op(
    "attention_pool_bwd(Tensor x, Tensor? xh0, Tensor u, Tensor dz, Tensor scores, Tensor lse, Tensor mu,"
    " Tensor rstd) -> (Tensor, Tensor, Tensor)",
    "backward",
)
def _bwd(x, xh0, u, dz, scores, lse, mu, rstd):
    dxh0 = x.new_empty(0) if xh0 is None else x.new_empty(x.shape[0], x.shape[2])
    return x.new_empty(x.shape), x.new_empty(dz.shape), dxh0


def _fake(x: Tensor, xh0: Tensor | None, u: Tensor, eps: float | None) -> tuple[Tensor, ...]:
    (rows, n, width), heads = x.shape, u.shape[0]
    norm = (0,) if eps is None else (rows, n)
    statistics = ((rows, heads, n + (xh0 is not None)), (rows, heads), norm, norm)
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
    @first_order("attention_pool")
    def backward(ctx, dz, *_):
        if dz is None:
            return (None,) * 6
        x, xh0, u, scores, lse, mu, rstd = ctx.saved_tensors
        dx, du, dxh0 = _bwd(x, xh0, u, dz.to(x.dtype), scores, lse, mu, rstd)
        # one class row for all: its gradient is a column sum
        if u.shape[1] != du.shape[1]:
            du = du.sum(1, keepdim=True)
        if xh0 is None:
            dxh0 = None
        elif xh0.shape[0] != dxh0.shape[0]:
            dxh0 = dxh0.sum(0, keepdim=True)
        return dx, dxh0, du, None, None, None


def attention_pool(
    tokens: Tensor,
    cls: Tensor,
    weights: PoolWeights,
    heads: int,
    eps: float | None = 1e-6,
    *,
    stats: tuple[Tensor, Tensor] | None = None,
    include_cls: bool = True,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Attention of one query or a few over a row's tokens, before the residual (ExtreMA section 3.2; CaiT, MAP heads).

    Maths, and the poolings of timm and transformers in these arguments: README.md in this folder. Plain PyTorch
    runs instead of the kernel where Triton cannot run, above 256 tokens, for more than 16 heads times queries, for a
    width that is not a multiple of 16 and, on a GPU, for fp64 and for fp32 above 64 tokens; it does not use or return
    `stats`.

    Args:
        tokens: [R, n, D] bf16 | fp16 | fp32 | fp64; under autocast, computed in its dtype (fp64 stays fp64).
        cls: [R, D] class rows or queries, [R, Q, D] several; [1, D], [1, Q, D] shared by all rows (cheaper).
        weights: LayerNorm and the q, k, v, output projections, any float dtype; what is None is left out.
        heads: H, divides D.
        eps: of the LayerNorm of tokens and class row; None: there is none.
        stats: (mean, 1 / standard deviation) [R, n] of the same tokens, as an earlier call returned them: successive
            blocks normalize the same tokens, so the second need not measure them.
        include_cls: the class row is a key and value too; False: `cls` holds queries only.
        return_weights: whether to return the probabilities.

    Returns:
        (out [R, E] or [R, Q, E] in the dtype computed in; probabilities [R, H, 1 + n] or [R, Q, H, n] fp32, detached,
        column 0 the class row where it is included, or None; stats for the next block, or None).

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    check("tokens", tokens, ("R", "n", "D"), FLOATS)
    rows, n, width = tokens.shape
    several = isinstance(cls, Tensor) and cls.dim() == 3 and not include_cls
    shared = isinstance(cls, Tensor) and cls.dim() == 2 + several and cls.shape[0] == 1
    shape = (1 if shared else rows, "Q", width) if several else (1 if shared else rows, width)
    check("cls", cls, shape, FLOATS, tokens, "[R, Q, D] with include_cls=False")
    if heads < 1 or width < 1 or width % heads:
        raise ValueError(f"heads: {heads} does not divide the width {width}")
    _check_weights(weights, tokens, eps, include_cls)
    if stats is not None:
        if len(stats) != 2 or eps is None:
            raise ValueError(
                f"stats: expected (mean, 1 / standard deviation) of a norm, got {len(stats)} tensors"
            )
        for name, s in zip(("stats[0]", "stats[1]"), stats):
            check(name, s, (rows, n), (torch.float32, torch.float64), tokens)

    dtype, queries = autocast_dtype(tokens), cls.shape[1] if several else 1
    possible = 1 <= n <= MAX_TOKENS and 1 <= heads * queries <= MAX_HEADS and width % 16 == 0
    # every tile fits in the interpreter
    possible = possible and (tokens.device.type == "cpu" or fits(dtype, n))
    if not (possible and _launch.use_triton(tokens)):
        # for many queries keys and values are cheaper (README.md)
        few = queries == 1 or queries * (n + width // heads) < n * (width // heads)
        plain = attention_pool_absorbed if few else attention_pool_reference
        out, p = plain(tokens, cls.expand(rows, *cls.shape[1:]), weights, heads, eps, include_cls)
        return out, p.detach().float() if return_weights else None, None
    if stats is not None:
        stats = stats[0].to(_launch.wide(dtype)), stats[1].to(_launch.wide(dtype))
    with torch.autocast(tokens.device.type, enabled=False):
        out, scores, lse, stats = _folded(tokens.to(dtype), cls, weights, heads, eps, stats, include_cls)
    if not return_weights:
        return out, None, stats
    p = (scores - lse[..., None]).exp().float()
    return out, p.unflatten(1, (heads, queries)).transpose(1, 2) if several else p, stats


def _check_weights(w: PoolWeights, tokens: Tensor, eps: float | None, include_cls: bool) -> None:
    if len(w) != len(PoolWeights._fields):
        raise ValueError(f"weights: expected PoolWeights{PoolWeights._fields}, got {len(w)} tensors")
    width = tokens.shape[-1]
    out = "E" if w.wo is None or w.wo.dim() != 2 else w.wo.shape[0]
    for name in PoolWeights._fields:
        shape = (out if name in ("wo", "bo") else width, *((width,) if name.startswith("w") else ()))
        if name in ("wk", "wv") or getattr(w, name) is not None:
            check(f"weights.{name}", getattr(w, name), shape, FLOATS, tokens)
    norm = w.norm_weight is not None or w.norm_bias is not None
    for name, unused, why in (
        ("norm_weight, norm_bias", eps is None and norm, "without a norm (eps is None)"),
        ("norm_bias", w.norm_weight is None and w.norm_bias is not None, "without norm_weight"),
        ("bq", w.wq is None and w.bq is not None, "without wq"),
        ("bo", w.wo is None and w.bo is not None, "without wo"),
    ):
        if unused:
            raise ValueError(f"weights.{name}: expected None {why}, got a tensor")
    if w.wq is None and include_cls:
        raise ValueError(
            "weights.wq: expected [D, D] of a class row that is a key too; use include_cls=False"
        )


def _sum(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _folded(
    x: Tensor,
    cls: Tensor,
    w: PoolWeights,
    heads: int,
    eps: float | None,
    stats: tuple[Tensor, Tensor] | None,
    include_cls: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    rows, _, width = x.shape
    d, dtype, wide = width // heads, x.dtype, _launch.wide(x.dtype)
    scale = d**-0.5
    wide_weights: list[Any] = [None if t is None else t.to(wide) for t in w]
    gain, shift, wq, bq, wk, bk, wv, bv, wo, bo = wide_weights

    def folded(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """LayerNorm's gain and shift moved into a projection (autograd unfolds them)."""
        bias = _sum(None if shift is None else weight @ shift, bias)
        return weight if gain is None else weight * gain, bias

    k_weight, v_weight, v_bias = wk if gain is None else wk * gain, *folded(wv, bv)
    # bk adds one number to every score of a head: it cancels in the softmax; 0 * bk keeps its gradient, zero
    nothing = None if bk is None else 0 * bk
    xh0 = cls.to(wide)
    if wq is None:
        q = _sum(scale * xh0, nothing).to(dtype)
    else:
        xh0 = xh0 if eps is None else F.layer_norm(xh0, (width,), eps=eps)
        xh0 = xh0.to(dtype)
        q_weight, q_bias = folded(wq, bq)
        q_bias = _sum(None if q_bias is None else scale * q_bias, nothing)
        q = F.linear(xh0, (scale * q_weight).to(dtype), None if q_bias is None else q_bias.to(dtype))
    several = cls.dim() == 3
    shared, queries = cls.shape[0], cls.shape[1] if several else 1
    q = q.view(shared * queries, heads, d).transpose(0, 1)
    if several:
        # the rows of a query are next to each other
        q = q.unflatten(1, (shared, queries)).transpose(1, 2).flatten(1, 2)
    # [H, Q (R or 1), d] x [H, d, D]
    u = torch.bmm(q, k_weight.to(dtype).view(heads, d, width)).view(heads * queries, shared, width)
    mu, rstd = stats if stats is not None else (None, None)
    z, scores, lse, mu, rstd = _Core.apply(x, xh0 if include_cls else None, u, eps, mu, rstd)
    # [H, Q R, D] x [H, D, d]
    o = torch.bmm(
        z.view(heads, queries * rows, width), v_weight.to(dtype).view(heads, d, width).transpose(1, 2)
    )
    if several:
        o = o.unflatten(1, (queries, rows)).permute(2, 1, 0, 3).flatten(2)
    else:
        o = o.transpose(0, 1).reshape(rows, width)
    o = _sum(o, None if v_bias is None else v_bias.to(dtype))
    out = project(o, None if wo is None else wo.to(dtype), None if bo is None else bo.to(dtype))
    return out, scores, lse, None if eps is None else (mu, rstd)
