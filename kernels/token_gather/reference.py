"""Plain PyTorch definition of token_gather: any float dtype, any device."""

from __future__ import annotations

from torch import Tensor


def token_gather_reference(tokens: Tensor, keep: Tensor, pos: Tensor | None = None) -> Tensor:
    """`out[v B + b, k] = tokens[b, j] + pos[j]` with `j = keep[v, b, k]`; arguments and result as `token_gather`."""
    b, n, width = tokens.shape
    v, _, k = keep.shape
    rows = keep.transpose(0, 1).reshape(b, v * k, 1).long()
    if pos is not None:
        tokens = tokens + pos.to(tokens.dtype)
    picked = tokens.gather(1, rows.expand(-1, -1, width))
    return picked.view(b, v, k, width).transpose(0, 1).reshape(v * b, k, width)
