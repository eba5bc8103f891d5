"""Plain PyTorch definitions of attention pooling (in ExtreMA a CaiT block's), two algebraically equal forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PoolWeights(NamedTuple):
    """Parameters of an attention pooling: LayerNorm, and the q, k, v and output projections.

    norm_weight, norm_bias [D]; wq, wk, wv [D, D]; wo [E, D]; bq, bk, bv [D]; bo [E]. All but wk and wv may be None.
    Without wq the query is given projected, without wo what the heads attended to is returned.
    """

    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    wq: Tensor | None = None
    bq: Tensor | None = None
    wk: Tensor = None  # type: ignore[assignment]
    bk: Tensor | None = None
    wv: Tensor = None  # type: ignore[assignment]
    bv: Tensor | None = None
    wo: Tensor | None = None
    bo: Tensor | None = None


def project(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A projection, where there is one."""
    return out if weight is None else F.linear(out, weight, bias)


def _inputs(
    tokens: Tensor, cls: Tensor, w: PoolWeights, eps: float | None, include_cls: bool
) -> tuple[Tensor, Tensor]:
    """(projected queries [R Q, D], normalized keys and values [R, n (+ 1), D])."""

    def norm(x: Tensor) -> Tensor:
        # a plain number, which the older ONNX exporter requires
        size = [int(x.shape[-1])]
        return x if eps is None else F.layer_norm(x, size, w.norm_weight, w.norm_bias, eps)

    if include_cls:
        keys = norm(torch.cat([cls[:, None], tokens], 1))
        return project(keys[:, 0], w.wq, w.bq), keys
    queries = cls if w.wq is None else norm(cls)
    return project(queries.reshape(-1, cls.shape[-1]), w.wq, w.bq), norm(tokens)


def attention_pool_reference(
    tokens: Tensor,
    cls: Tensor,
    w: PoolWeights,
    heads: int,
    eps: float | None = 1e-6,
    include_cls: bool = True,
) -> tuple[Tensor, Tensor]:
    """Class attention as the paper writes it, `softmax(q k^T / sqrt(d)) v` of the class row over `LN([cls; tokens])`.

    Arguments as `attention_pool`, `cls` of every row; returns its first two results, the probabilities in the dtype
    computed in.
    """
    r, n, width = tokens.shape
    # a plain number where sizes are traced
    d, n, queries = int(width) // heads, n + include_cls, cls.shape[1:-1].numel()
    q, u = _inputs(tokens, cls, w, eps, include_cls)
    # [R, H, Q, d]
    q = q.view(r, queries, heads, d).transpose(1, 2)
    k = F.linear(u, w.wk, w.bk).view(r, n, heads, d).transpose(1, 2)
    v = F.linear(u, w.wv, w.bv).view(r, n, heads, d).transpose(1, 2)
    p = torch.softmax(q @ k.transpose(-1, -2) * d**-0.5, dim=-1)
    out = project((p @ v).transpose(1, 2).reshape(cls.shape), w.wo, w.bo)
    return out, p.squeeze(2) if cls.dim() == 2 else p.transpose(1, 2)


def attention_pool_absorbed(
    tokens: Tensor,
    cls: Tensor,
    w: PoolWeights,
    heads: int,
    eps: float | None = 1e-6,
    include_cls: bool = True,
) -> tuple[Tensor, Tensor]:
    """The same result without forming keys or values: the two projections move to the queries' side.

    With u = LN(.), scores are `(Wk_h^T q_h) . u_j + q_h . bk_h` and outputs `Wv_h (sum_j p_j u_j) + bv_h`,
    which costs `4 D^2 + 4 H (n + 1) D` FLOPs per query instead of `4 (n + 1) D^2` per row.

    Arguments and result as `attention_pool_reference`; equal to it in real arithmetic.
    """
    r, width = tokens.shape[0], int(tokens.shape[-1])
    d, queries = width // heads, cls.shape[1:-1].numel()
    q, u = _inputs(tokens, cls, w, eps, include_cls)
    # [R Q, H, d]
    q = q.view(r * queries, heads, d) * d**-0.5
    # [R, Q H, D]
    query = torch.einsum("rhd,hdc->rhc", q, w.wk.view(heads, d, width)).reshape(r, queries * heads, width)
    scores = query @ u.transpose(1, 2)
    if w.bk is not None:
        # one number for every score of a head: no effect on p, kept so that its gradient exists (zero)
        scores = scores + (q * w.bk.view(heads, d)).sum(-1, keepdim=True).view(r, queries * heads, 1)
    p = torch.softmax(scores, dim=-1)
    z = (p @ u).view(r * queries, heads, width)
    out = torch.einsum("rhc,hdc->rhd", z, w.wv.view(heads, d, width)).reshape(cls.shape)
    out = project(out if w.bv is None else out + w.bv, w.wo, w.bo)
    return out, p if cls.dim() == 2 else p.unflatten(1, (queries, heads))
