"""Device code of token_gather: kept rows out, and their gradients back without atomics (README.md)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch


@triton.jit(do_not_specialize=["batch"])
def token_gather_fwd_kernel(
    # [B, N, D] by strides; [V, B, K] int32 by strides; [N, D]; [V*B, K, D]
    tokens_ptr,
    keep_ptr,
    pos_ptr,
    out_ptr,
    batch,
    stride_tb,
    stride_tn,
    stride_kv,
    stride_kb,
    stride_kk,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_POS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    view = row // batch
    image = row - view * batch
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = offs_k < K
    j = tl.load(
        keep_ptr + view * stride_kv + image * stride_kb + offs_k.to(tl.int64) * stride_kk, mask=mask, other=0
    ).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    # [BLOCK_K, BLOCK_D]
    source = tokens_ptr + image * stride_tb + j[:, None] * stride_tn + offs_d[None, :]
    target = out_ptr + (row * K + offs_k[:, None]) * D + offs_d[None, :]
    for start in range(0, D, BLOCK_D):
        x = tl.load(source + start, mask=mask[:, None], other=0.0)
        if HAS_POS:
            p = tl.load(pos_ptr + j[:, None] * D + offs_d[None, :] + start, mask=mask[:, None], other=0.0)
            x = (x.to(ACC) + p.to(ACC)).to(out_ptr.dtype.element_ty)
        tl.store(target + start, x, mask=mask[:, None])


@triton.jit(do_not_specialize=["batch"])
def token_gather_bwd_kernel(
    # [V*B, K, D]; int32 [T, B, N] slots v K + k, or -1; [B, N, D]
    dout_ptr,
    inverse_ptr,
    dtokens_ptr,
    batch,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    TABLES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    offs_d = tl.arange(0, BLOCK_D)
    target = dtokens_ptr + (image * N + offs_n[:, None]) * D + offs_d[None, :]
    for start in range(0, D, BLOCK_D):
        total = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        # views in order: the sum is the same every time
        for t in range(TABLES):
            slot = tl.load(inverse_ptr + (t * batch + image) * N + offs_n, mask=mask, other=-1).to(tl.int64)
            used = slot >= 0
            view = slot // K
            source = dout_ptr + ((view * batch + image) * K + (slot - view * K))[:, None] * D
            total += tl.load(source + offs_d[None, :] + start, mask=used[:, None], other=0.0).to(ACC)
        # every row once, zeros included
        tl.store(target + start, total.to(dtokens_ptr.dtype.element_ty), mask=mask[:, None])


# ---- launchers ------------------------------------------------------------------------------------


def block_d(width: int) -> int:
    """The largest power of two up to 128 that divides the width: no column is masked."""
    return min(128, width & -width)


def heuristic(width: int) -> dict[str, int]:
    """16 tokens x 128 columns a program."""
    return {"BLOCK_D": block_d(width), "num_warps": 4, "num_stages": 2}


def _options(direction: str, x: Tensor) -> dict:
    key = _launch.config_key(direction, x.dtype, D=x.shape[-1])
    chosen = _launch.settings("token_gather", key, x.device, lambda: heuristic(x.shape[-1]))
    return {"ACC": tl.float64 if x.dtype == torch.float64 else tl.float32} | chosen


def forward(tokens: Tensor, keep: Tensor, pos: Tensor | None) -> Tensor:
    """[V*B, K, D]."""
    tokens = _launch.rows_ready(tokens)
    (batch, _, width), (views, _, kept) = tokens.shape, keep.shape
    out = _launch.empty((views * batch, kept, width), tokens)
    _launch.launch(
        token_gather_fwd_kernel, (views * batch, triton.cdiv(kept, 16)), tokens,
        tokens, keep, out if pos is None else pos.contiguous(), out,
        batch, tokens.stride(0), tokens.stride(1), *keep.stride(),
        K=kept, D=width, HAS_POS=pos is not None, BLOCK_K=16, **_options("fwd", tokens),
    )  # fmt: skip
    return out


def backward(dout: Tensor, inverse: Tensor, views: int) -> Tensor:
    """[B, N, D] from dout [V*B, K, D] and the inverse table [T, B, N]."""
    dout = dout.contiguous()
    (tables, batch, n), (_, kept, width) = inverse.shape, dout.shape
    if kept == 0:
        return dout.new_zeros(batch, n, width)
    dtokens = _launch.empty((batch, n, width), dout)
    _launch.launch(
        token_gather_bwd_kernel, (batch, triton.cdiv(n, 16)), dout,
        dout, inverse, dtokens, batch,
        N=n, K=kept, D=width, TABLES=tables, BLOCK_N=16, **_options("bwd", dout),
    )  # fmt: skip
    return dtokens
