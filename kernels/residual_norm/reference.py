"""Plain PyTorch definition of residual_norm: any float dtype, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_norm_reference(
    x: Tensor,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    *,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`out = x + scale (branch + bias)`, `u = LN(out)`; arguments and result as `residual_norm`."""
    out = x
    if branch is not None:
        wide = torch.promote_types(torch.promote_types(x.dtype, branch.dtype), torch.float32)
        f = branch.to(wide)
        if bias is not None:
            f = f + bias.to(wide)
        if scale is not None:
            f = f * scale.to(wide)[:, None, None]
        out = (x.to(wide) + f).to(x.dtype)
    if gain is None:
        return out, None
    wide = torch.promote_types(x.dtype, torch.float32)
    u = F.layer_norm(
        out.to(wide), (x.shape[-1],), gain.to(wide), None if shift is None else shift.to(wide), eps
    )
    return out, u.to(dtype or x.dtype)
