"""Plain PyTorch definition of multi-head self-attention on packed q, k, v."""

from __future__ import annotations

import torch
from torch import Tensor


def short_attention_reference(qkv: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` per row and head, [R, n, H, d], of qkv [R, n, 3, H, d]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    p = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (p @ v).transpose(1, 2)
