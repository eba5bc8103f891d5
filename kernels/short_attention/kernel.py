"""Device code of short_attention: a whole sequence in one tile (README.md).

R sequences of n tokens, H heads of d; PACK sequences share a tile of BLOCK_N rows, block-diagonally.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import _launch


@triton.jit
def _probabilities(q, k, attends, SCALE: tl.constexpr, ACC: tl.constexpr):
    """softmax(q k^T SCALE) over the keys a query attends to: [BLOCK_N, BLOCK_N]; rows without keys are padding."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * SCALE
    s = tl.where(attends, s, float("-inf"))
    # any finite top keeps NaN out of padding
    top = tl.max(s, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    e = tl.exp(s - top[:, None])
    norm = tl.sum(e, 1)
    return e / tl.where(norm == 0.0, 1.0, norm)[:, None]


@triton.jit(do_not_specialize=["rows"])
def short_attention_fwd_kernel(
    # [R, n, 3, H, d] by strides; [R, n, H, d] dense
    qkv_ptr,
    out_ptr,
    rows,
    stride_r,
    stride_n,
    stride_3,
    stride_h,
    n: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    # PACK neighboring sequences, HEADS heads one after the other
    first = tl.program_id(0).to(tl.int64) * PACK
    head0 = tl.program_id(1) * HEADS
    offs = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    which = offs // n
    token = offs - which * n
    row = first + which
    valid = (which < PACK) & (row < rows)
    mask_d = offs_d < D
    # [BLOCK_N, BLOCK_D]
    mask = valid[:, None]
    if BLOCK_D != D:
        mask = mask & mask_d[None, :]
    source = row[:, None] * stride_r + token[:, None].to(tl.int64) * stride_n + offs_d[None, :]
    target = (row[:, None] * n + token[:, None]) * (H * D) + offs_d[None, :]
    # [BLOCK_N, BLOCK_N]: a query sees the keys of its own sequence
    attends = valid[None, :] & (which[:, None] == which[None, :])
    for i in range(HEADS):
        head = (head0 + i).to(tl.int64)
        q = tl.load(qkv_ptr + source + head * stride_h, mask=mask, other=0.0)
        k = tl.load(qkv_ptr + source + head * stride_h + stride_3, mask=mask, other=0.0)
        v = tl.load(qkv_ptr + source + head * stride_h + 2 * stride_3, mask=mask, other=0.0)
        p = _probabilities(q, k, attends, SCALE, ACC)
        o = tl.dot(p.to(v.dtype), v, input_precision="ieee", out_dtype=ACC)
        tl.store(out_ptr + target + head * D, o.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def short_attention_bwd_kernel(
    # qkv by strides; dout [R, n, H, d] dense; dqkv [R, n, 3, H, d] dense
    qkv_ptr,
    dout_ptr,
    dqkv_ptr,
    rows,
    stride_r,
    stride_n,
    stride_3,
    stride_h,
    n: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * PACK
    head0 = tl.program_id(1) * HEADS
    offs = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    which = offs // n
    token = offs - which * n
    row = first + which
    valid = (which < PACK) & (row < rows)
    mask_d = offs_d < D
    mask = valid[:, None]
    if BLOCK_D != D:
        mask = mask & mask_d[None, :]
    source = row[:, None] * stride_r + token[:, None].to(tl.int64) * stride_n + offs_d[None, :]
    flat = row[:, None] * n + token[:, None]
    dense = flat * (H * D) + offs_d[None, :]
    target = flat * (3 * H * D) + offs_d[None, :]
    attends = valid[None, :] & (which[:, None] == which[None, :])
    low = qkv_ptr.dtype.element_ty
    for i in range(HEADS):
        head = (head0 + i).to(tl.int64)
        q = tl.load(qkv_ptr + source + head * stride_h, mask=mask, other=0.0)
        k = tl.load(qkv_ptr + source + head * stride_h + stride_3, mask=mask, other=0.0)
        p = _probabilities(q, k, attends, SCALE, ACC)
        do = tl.load(dout_ptr + dense + head * D, mask=mask, other=0.0)
        dv = tl.dot(tl.trans(p.to(low)), do, input_precision="ieee", out_dtype=ACC)
        tl.store(dqkv_ptr + target + head * D + 2 * H * D, dv.to(low), mask=mask)
        v = tl.load(qkv_ptr + source + head * stride_h + 2 * stride_3, mask=mask, other=0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee", out_dtype=ACC)
        # rowsum(P * dP) needs no output: nothing but qkv is saved
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * SCALE).to(low)
        dq = tl.dot(ds, k, input_precision="ieee", out_dtype=ACC)
        tl.store(dqkv_ptr + target + head * D, dq.to(low), mask=mask)
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee", out_dtype=ACC)
        tl.store(dqkv_ptr + target + head * D + H * D, dk.to(low), mask=mask)


# ---- launchers ------------------------------------------------------------------------------------


def heuristic(direction: str, n: int, heads: int, d: int, itemsize: int, pack: int = 1) -> dict[str, int]:
    """Settings where nothing was measured: one sequence per tile, all heads in a program's loop."""
    backward = direction == "bwd"
    # two warps spill in the forward pass of narrow heads
    warps = 2 if n <= 32 and (backward or d > 32) else 4
    if itemsize > 2 or pack > 1:
        warps = 8
    # a loop over heads costs registers: without it fp32 and the backward pass of 128-token tiles do not spill
    # (larger fp32 tiles than those of `op.fits` do all the same)
    alone = itemsize > 2 or (backward and pack * n > 64)
    # two stages of the backward pass and of short tiles spill on some architecture; fp32 and padded head dims, too
    stages = 1 if backward or n <= 32 or d > 64 or itemsize > 2 else 2
    return {"PACK": pack, "HEADS": 1 if alone else heads, "num_warps": warps, "num_stages": stages}


def _launch_on(direction: str, kernel: Any, qkv: Tensor, *pointers: Tensor) -> None:
    rows, n, _, heads, d = qkv.shape
    key = _launch.config_key(direction, qkv.dtype, d=d, H=heads, n=n)
    default = heuristic(direction, n, heads, d, qkv.element_size())
    options = _launch.settings("short_attention", key, qkv.device, default)
    if heads % options["HEADS"]:
        options["HEADS"] = heads
    options |= {
        "n": n,
        "H": heads,
        "D": d,
        # a constant: an argument would be rounded to fp32
        "SCALE": d**-0.5,
        "BLOCK_N": _launch.power_of_two(options["PACK"] * n, 16),
        "BLOCK_D": _launch.power_of_two(d, 16),
        "ACC": _launch.accumulator(qkv.dtype),
    }
    grid = (triton.cdiv(rows, options["PACK"]), heads // options["HEADS"])
    _launch.launch(kernel, grid, qkv, *pointers, rows, *qkv.stride()[:4], **options)


def forward(qkv: Tensor) -> Tensor:
    """Output [R, n, H, d] of qkv [R, n, 3, H, d]."""
    qkv = _launch.rows_ready(qkv)
    rows, n, _, heads, d = qkv.shape
    out = _launch.empty((rows, n, heads, d), qkv)
    _launch_on("fwd", short_attention_fwd_kernel, qkv, qkv, out)
    return out


def backward(qkv: Tensor, dout: Tensor) -> Tensor:
    """The gradient of qkv, [R, n, 3, H, d] dense."""
    qkv, dout = _launch.rows_ready(qkv), dout.contiguous()
    dqkv = _launch.empty(qkv.shape, qkv)
    _launch_on("bwd", short_attention_bwd_kernel, qkv, qkv, dout, dqkv)
    return dqkv
