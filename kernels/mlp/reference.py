"""Plain PyTorch definition of mlp: any float dtype, any device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mlp_reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None = None) -> Tensor:
    """`GELU(x w1^T + b1) w2^T + b2`, GELU exact; arguments and result as `mlp`."""
    b1, b2 = (None if b is None else b.to(x.dtype) for b in (b1, b2))
    return F.linear(F.gelu(F.linear(x, w1.to(x.dtype), b1)), w2.to(x.dtype), b2)
