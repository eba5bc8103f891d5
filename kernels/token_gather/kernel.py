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


def heuristic(width: int) -> dict[str, int]:
    """Settings where nothing was measured: the largest power of two up to 128 columns that divides the width."""
    return {"BLOCK_D": min(128, width & -width), "num_warps": 4, "num_stages": 2}


def _options(direction: str, x: Tensor) -> dict:
    width = x.shape[-1]
    key = _launch.config_key(direction, x.dtype, D=width)
    chosen = _launch.settings("token_gather", key, x.device, heuristic(width))
    return {"D": width, "ACC": _launch.accumulator(x.dtype)} | chosen


def forward(tokens: Tensor, keep: Tensor, pos: Tensor | None) -> Tensor:
    """Output [V*B, K, D] of tokens [B, N, D], keep [V, B, K] int32 and pos [N, D]."""
    tokens = _launch.rows_ready(tokens)
    (batch, _, width), (views, _, kept) = tokens.shape, keep.shape
    out = _launch.empty((views * batch, kept, width), tokens)
    pointers = (tokens, keep, out if pos is None else pos.contiguous(), out)
    strides = (*tokens.stride()[:2], *keep.stride())
    options = {"K": kept, "HAS_POS": pos is not None, "BLOCK_K": 16} | _options("fwd", tokens)
    grid = (views * batch, triton.cdiv(kept, 16))
    _launch.launch(token_gather_fwd_kernel, grid, tokens, *pointers, batch, *strides, **options)
    return out


def inverse_table(keep: Tensor, num_tokens: int, disjoint: bool) -> Tensor:
    """[T, B, N] int32: the slot v K + k that took token j of image b, or -1; T = 1 if disjoint, else V."""
    views, batch, kept = keep.shape
    table = torch.full(
        (1 if disjoint else views, batch, num_tokens), -1, dtype=torch.int32, device=keep.device
    )
    slots = torch.arange(views * kept, dtype=torch.int32, device=keep.device).view(views, 1, kept)
    slots = slots.expand(views, batch, kept)
    if disjoint:
        keep, slots = (x.transpose(0, 1).reshape(1, batch, views * kept) for x in (keep, slots))
    return table.scatter_(2, keep.long(), slots)


def backward(dout: Tensor, keep: Tensor, num_tokens: int, disjoint: bool) -> Tensor:
    """The tokens' gradient [B, N, D] from dout [V*B, K, D]."""
    (_, batch, kept), dout = keep.shape, dout.contiguous()
    if kept == 0:
        return dout.new_zeros(batch, num_tokens, dout.shape[-1])
    table = inverse_table(keep, num_tokens, disjoint)
    dtokens = _launch.empty((batch, num_tokens, dout.shape[-1]), dout)
    options = {"N": num_tokens, "K": kept, "TABLES": len(table), "BLOCK_N": 16} | _options("bwd", dout)
    grid = (batch, triton.cdiv(num_tokens, 16))
    _launch.launch(token_gather_bwd_kernel, grid, dout, dout, table, dtokens, batch, **options)
    return dtokens
