"""Plain PyTorch definitions of class attention (CaiT block as in ExtreMA), two algebraically equal forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PoolWeights(NamedTuple):
    """Parameters of one class attention: LayerNorm, and the q, k, v, output projections.

    norm_weight, norm_bias [D]; wq, wk, wv, wo [D, D]; bq, bk, bv, bo [D].
    """

    norm_weight: Tensor
    norm_bias: Tensor
    wq: Tensor
    bq: Tensor
    wk: Tensor
    bk: Tensor
    wv: Tensor
    bv: Tensor
    wo: Tensor
    bo: Tensor


def attention_pool_reference(
    tokens: Tensor, cls: Tensor, w: PoolWeights, heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Class attention as the paper writes it, `softmax(q k^T / sqrt(d)) v` of the class row over `LN([cls; tokens])`.

    Arguments as `attention_pool`; returns its first two results, the probabilities in the dtype computed in.
    """
    r, n, width = tokens.shape
    d = width // heads
    u = F.layer_norm(torch.cat([cls[:, None], tokens], 1), (width,), w.norm_weight, w.norm_bias, eps)
    q = F.linear(u[:, 0], w.wq, w.bq).view(r, heads, 1, d)
    k = F.linear(u, w.wk, w.bk).view(r, n + 1, heads, d).transpose(1, 2)
    v = F.linear(u, w.wv, w.bv).view(r, n + 1, heads, d).transpose(1, 2)
    p = torch.softmax(q @ k.transpose(-1, -2) * d**-0.5, dim=-1)
    out = (p @ v).transpose(1, 2).reshape(r, width)
    return F.linear(out, w.wo, w.bo), p.squeeze(2)


def attention_pool_absorbed(
    tokens: Tensor, cls: Tensor, w: PoolWeights, heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The same result without forming keys or values: the two projections move to the single query's side.

    With u = LN(.), scores are `(Wk_h^T q_h) . u_j + q_h . bk_h` and outputs `Wv_h (sum_j p_j u_j) + bv_h`,
    which costs `4 D^2 + 4 H (n + 1) D` FLOPs per row instead of `4 (n + 1) D^2`.

    Arguments and result as `attention_pool_reference`; equal to it in real arithmetic.
    """
    r, n, width = tokens.shape
    d = width // heads
    u = F.layer_norm(torch.cat([cls[:, None], tokens], 1), (width,), w.norm_weight, w.norm_bias, eps)
    # [R, H, d]
    q = F.linear(u[:, 0], w.wq, w.bq).view(r, heads, d) * d**-0.5
    # [R, H, D]
    query = torch.einsum("rhd,hdc->rhc", q, w.wk.view(heads, d, width))
    # bk adds one number to every score of a head: no effect on p, kept so that its gradient exists (zero)
    bias = (q * w.bk.view(heads, d)).sum(-1, keepdim=True)
    # [R, H, 1 + n]
    p = torch.softmax(query @ u.transpose(1, 2) + bias, dim=-1)
    z = p @ u
    out = torch.einsum("rhc,hdc->rhd", z, w.wv.view(heads, d, width)).reshape(r, width)
    return F.linear(out + w.bv, w.wo, w.bo), p
