"""Device code of short_attention: a whole sequence in one tile (README.md).

R sequences of n tokens, H heads of d; PACK sequences share a tile of BLOCK_N rows, block-diagonally.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch


@triton.jit
def _tile(
    rows,
    n: tl.constexpr,
    H: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D: tl.constexpr,
):
    """(row, token, head of this program's tile; the tile's mask; which queries attend to which keys)."""
    # heads are neighbors in memory and in the grid
    pid = tl.program_id(0).to(tl.int64)
    head = pid % H
    offs = tl.arange(0, BLOCK_N)
    which = tl.zeros([BLOCK_N], tl.int32)
    if PACK > 1:
        which = offs // n
    token = offs - which * n
    row = (pid // H) * PACK + which
    valid = token < n
    if PACK > 1:
        valid = (which < PACK) & (row < rows)
    # [BLOCK_N, BLOCK_D]
    mask = valid[:, None]
    if BLOCK_D != D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    # [BLOCK_N, BLOCK_N]: a query sees the keys of its own sequence
    attends = valid[None, :]
    if PACK > 1:
        attends = attends & (which[:, None] == which[None, :])
    return row[:, None], token[:, None].to(tl.int64), head, mask, attends


@triton.jit
def _weights(q, k, attends, SCALE: tl.constexpr, PACK: tl.constexpr, ACC: tl.constexpr):
    """exp of the scores less the row's largest, [BLOCK_N, BLOCK_N], and 1 / its row sums: softmax(q k^T SCALE)."""
    # exp2 needs no handling of tiny results; scaled inside the exponent: one multiply-add
    POWER: tl.constexpr = SCALE * 1.4426950408889634
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
    s = tl.where(attends, s, float("-inf"))
    top = tl.max(s, 1)
    if PACK > 1:
        # rows without keys are padding: any finite top keeps NaN out of them
        top = tl.where(top == float("-inf"), 0.0, top)
    e = tl.exp2(s * POWER - (top * POWER)[:, None])
    norm = tl.sum(e, 1)
    if PACK > 1:
        norm = tl.where(norm == 0.0, 1.0, norm)
    return e, 1.0 / norm


@triton.jit
def _store_column_sum(ptr, x, D: tl.constexpr, ACC: tl.constexpr):
    """Stores the column sums of x [BLOCK_N, BLOCK_D], whose padding is zero."""
    offs_d = tl.arange(0, x.shape[1])
    if x.dtype.primitive_bitwidth == 16:
        # tensor cores add faster than threads exchange; a product has at least 16 rows
        ones = tl.full([16, x.shape[0]], 1.0, x.dtype)
        total = tl.dot(ones, x, input_precision="ieee", out_dtype=ACC)
        offs = tl.arange(0, 16)[:, None]
        tl.store(ptr + offs * 0 + offs_d[None, :], total, mask=(offs == 0) & (offs_d < D)[None, :])
    else:
        tl.store(ptr + offs_d, tl.sum(x.to(ACC), 0), mask=offs_d < D)


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
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    row, token, head, mask, attends = _tile(rows, n, H, PACK, BLOCK_N, BLOCK_D, D)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    source = qkv_ptr + head * stride_h + row * stride_r + token * stride_n + offs_d
    q = tl.load(source, mask=mask, other=0.0)
    k = tl.load(source + stride_3, mask=mask, other=0.0)
    # not 2 * stride_3, which 32 bits do not always hold
    v = tl.load(source + stride_3 + stride_3, mask=mask, other=0.0)
    e, inverse = _weights(q, k, attends, SCALE, PACK, ACC)
    o = tl.dot(e.to(v.dtype), v, input_precision="ieee", out_dtype=ACC) * inverse[:, None]
    target = out_ptr + (row * n + token) * (H * D) + head * D + offs_d
    tl.store(target, o.to(v.dtype), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def short_attention_bwd_kernel(
    # qkv by strides; dout [R, n, H, d], dqkv [R, n, 3, H, d] dense; [tiles, 2, H, d] dense, sums of dq and dv
    qkv_ptr,
    dout_ptr,
    dqkv_ptr,
    sums_ptr,
    rows,
    stride_r,
    stride_n,
    stride_3,
    stride_h,
    n: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    row, token, head, mask, attends = _tile(rows, n, H, PACK, BLOCK_N, BLOCK_D, D)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    low = qkv_ptr.dtype.element_ty
    source = qkv_ptr + head * stride_h + row * stride_r + token * stride_n + offs_d
    dense = (row * n + token) * (H * D) + head * D + offs_d
    target = dqkv_ptr + (row * n + token) * (3 * H * D) + head * D + offs_d
    # all loads before the first product, so that the memory is waited for once
    q = tl.load(source, mask=mask, other=0.0)
    k = tl.load(source + stride_3, mask=mask, other=0.0)
    # not 2 * stride_3, which 32 bits do not always hold
    v = tl.load(source + stride_3 + stride_3, mask=mask, other=0.0)
    do = tl.load(dout_ptr + dense, mask=mask, other=0.0)
    e, inverse = _weights(q, k, attends, SCALE, PACK, ACC)
    p = e * inverse[:, None]
    dv = tl.dot(tl.trans(p.to(low)), do, input_precision="ieee", out_dtype=ACC)
    tl.store(target + 2 * H * D, dv.to(low), mask=mask)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee", out_dtype=ACC)
    # rowsum(P * dP) needs no output: nothing but qkv is saved
    delta = tl.sum(p * dp, 1) * SCALE
    ds = (p * (dp * SCALE - delta[:, None])).to(low)
    dq = tl.dot(ds, k, input_precision="ieee", out_dtype=ACC).to(low)
    tl.store(target, dq, mask=mask)
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee", out_dtype=ACC)
    tl.store(target + H * D, dk.to(low), mask=mask)
    if HAS_BIAS:
        # rows of P sum to 1, so the columns of dv have the sums of dO's; those of dk have none
        sums = sums_ptr + (tl.program_id(0).to(tl.int64) // H) * (2 * H * D) + head * D
        _store_column_sum(sums, dq, D, ACC)
        _store_column_sum(sums + H * D, do, D, ACC)


# ---- launchers ------------------------------------------------------------------------------------


def heuristic(n: int, d: int, itemsize: int) -> dict[str, int]:
    """Settings where nothing was measured (registers: README.md)."""
    if itemsize > 2:
        # no tensor cores; larger tiles than those of `op.fits` spill
        return {"PACK": 1, "num_warps": 8}
    # sequences that fill 64 rows to 95 %: fewer instructions, more bytes on their way
    pack = 64 // n if n <= 21 else 1
    return {"PACK": pack, "num_warps": 4 if pack * n > 32 else 2}


def _options(direction: str, qkv: Tensor) -> dict[str, Any]:
    _, n, _, heads, d = qkv.shape
    key = _launch.config_key(direction, qkv.dtype, d=d, H=heads, n=n)
    default = heuristic(n, d, qkv.element_size())
    options: dict[str, Any] = {"num_stages": 1}
    options |= _launch.settings("short_attention", key, qkv.device, default)
    return options | {
        "n": n,
        "H": heads,
        "D": d,
        # a constant: an argument would be rounded to fp32
        "SCALE": d**-0.5,
        "BLOCK_N": _launch.power_of_two(options["PACK"] * n, 16),
        "BLOCK_D": _launch.power_of_two(d, 16),
        "ACC": _launch.accumulator(qkv.dtype),
    }


def _tiles(qkv: Tensor, options: dict[str, Any]) -> int:
    return triton.cdiv(qkv.shape[0], options["PACK"])


def forward(qkv: Tensor) -> Tensor:
    """Output [R, n, H, d] of qkv [R, n, 3, H, d]."""
    qkv = _launch.rows_ready(qkv)
    rows, n, _, heads, d = qkv.shape
    out = _launch.empty((rows, n, heads, d), qkv)
    options = _options("fwd", qkv)
    grid = (_tiles(qkv, options) * heads,)
    _launch.launch(short_attention_fwd_kernel, grid, qkv, qkv, out, rows, *qkv.stride()[:4], **options)
    return out


def _backward(qkv: Tensor, dout: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, [R, n, 3, H, d] dense; sums over every tile's tokens of those of q and v."""
    qkv, dout = _launch.rows_ready(qkv), dout.contiguous()
    rows, _, _, heads, d = qkv.shape
    options = _options("bwd", qkv) | {"HAS_BIAS": has_bias}
    tiles = _tiles(qkv, options)
    dqkv = _launch.empty(qkv.shape, qkv)
    sums = _launch.empty((tiles if has_bias else 0, 2, heads, d), qkv, _launch.wide(qkv.dtype))
    args = (qkv, dout, dqkv, sums, rows, *qkv.stride()[:4])
    _launch.launch(short_attention_bwd_kernel, (tiles * heads,), qkv, *args, **options)
    return dqkv, sums


def backward(qkv: Tensor, dout: Tensor) -> Tensor:
    """The gradient of qkv, [R, n, 3, H, d] dense."""
    return _backward(qkv, dout, False)[0]


def backward_bias(qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, and of a bias that was added to it, [3 * H * d] in the dtype of sums."""
    dqkv, sums = _backward(qkv, dout, True)
    q, v = sums.sum(0)
    # keys: a number added to all scores of a query cancels in the softmax
    dbias = torch.stack([q, torch.zeros_like(q), v])
    return dqkv, dbias.flatten()
