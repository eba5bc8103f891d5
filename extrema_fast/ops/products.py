"""Self-attention as batched products with a written-out backward pass: what a CPU in bf16 takes.

torch's fused CPU attention is slower than two products at these lengths, and the plain formula under autograd
copies q, k and v more often than it multiplies them. Here q, k, v are brought into place once, and their
gradients once back.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor) -> Tensor:
        rows, n, _, heads, d = qkv.shape
        # [3, R, H, n, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().view(3, rows * heads, n, d).unbind(0)
        # scaled inside the product; the softmax is fp32 inside
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=d**-0.5)
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.shape = qkv.shape
        return torch.bmm(p, v).view(rows, heads, n, d).transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> Tensor:
        q, k, v, p = ctx.saved_tensors
        rows, n, _, heads, d = ctx.shape
        do = dout.transpose(1, 2).reshape(rows * heads, n, d)
        grads = q.new_empty(3, rows * heads, n, d)
        torch.bmm(p.mT, do, out=grads[2])
        dp = torch.bmm(do, v.mT)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        torch.baddbmm(grads[0], ds, k, beta=0, alpha=d**-0.5, out=grads[0])
        torch.baddbmm(grads[1], ds.mT, q, beta=0, alpha=d**-0.5, out=grads[1])
        return grads.view(3, rows, heads, n, d).permute(1, 3, 0, 2, 4).contiguous()


def attention_products(qkv: Tensor) -> Tensor:
    """Self-attention per row.

    qkv:     [R, n, 3, H, d], any float type
    returns  [R, n, H, d], contiguous
    """
    return _Products.apply(qkv)
