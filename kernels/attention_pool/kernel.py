"""Device code of attention_pool: one program reads a row's tokens once from memory (README.md).

Order: forward kernel, backward kernel, their launchers. R rows, n tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import _launch

# dots need at least 16 rows on every architecture: heads are padded to this
HEADS = 16

# NORM: tokens are normalized. CLS: the class row, column 0 of the scores, is a key and value like the tokens.
# CENTRE: the tokens' mean is subtracted before the matmuls. In 16 bits that would round them a second time: there raw
# tokens are multiplied and the sums corrected. In fp32 the correction would cost digits where the mean is large.


@triton.jit
def _merge(mean, m2, x, start, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """Chan's merge of (mean, M2) of the columns so far with the next chunk's [n, BLOCK_D]: no cancellation."""
    chunk = tl.sum(x, 1) / BLOCK_D
    centered = x - chunk[:, None]
    gap = chunk - mean
    # in ACC: the quotient of two integers would be fp32
    before = tl.cast(start, ACC)
    share = BLOCK_D / (before + BLOCK_D)
    return mean + gap * share, m2 + tl.sum(centered * centered, 1) + gap * gap * (before * share)


@triton.jit
def attention_pool_fwd_kernel(
    # [R, n, D]; [R or 1, D] if CLS; [H, R or 1, D]
    x_ptr,
    xh0_ptr,
    u_ptr,
    # [H, R, D]; [R, H, n + CLS]; [R, H]; if NORM [R, n], [R, n]
    z_ptr,
    scores_ptr,
    lse_ptr,
    mu_ptr,
    rstd_ptr,
    stride_xr,
    stride_xn,
    stride_cr,
    stride_uh,
    stride_ur,
    stride_zh,
    n: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_STATS: tl.constexpr,
    NORM: tl.constexpr,
    CLS: tl.constexpr,
    CENTRE: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < n
    mask_h = offs_h < H
    # [BLOCK_N, BLOCK_D], [BLOCK_H, BLOCK_D]
    x_tile = x_ptr + row * stride_xr + offs_n[:, None].to(tl.int64) * stride_xn + offs_d[None, :]
    u_tile = u_ptr + row * stride_ur + offs_h[:, None].to(tl.int64) * stride_uh + offs_d[None, :]
    c_tile = xh0_ptr + row * stride_cr + offs_d
    z_tile = z_ptr + row * D + offs_h[:, None].to(tl.int64) * stride_zh + offs_d[None, :]

    mean = tl.zeros([BLOCK_N], ACC)
    m2 = tl.zeros([BLOCK_N], ACC)
    if HAS_STATS:
        mean = tl.load(mu_ptr + row * n + offs_n, mask=mask_n, other=0.0)
    elif CENTRE:
        for start in range(0, D, BLOCK_D):
            x = tl.load(x_tile + start, mask=mask_n[:, None], other=0.0)
            mean, m2 = _merge(mean, m2, x.to(ACC), start, BLOCK_D, ACC)
    raw = tl.zeros([BLOCK_H, BLOCK_N], ACC)
    raw0 = tl.zeros([BLOCK_H], ACC)
    u_sum = tl.zeros([BLOCK_H], ACC)
    for start in range(0, D, BLOCK_D):
        x = tl.load(x_tile + start, mask=mask_n[:, None], other=0.0)
        u = tl.load(u_tile + start, mask=mask_h[:, None], other=0.0)
        if CLS:
            c = tl.load(c_tile + start).to(ACC)
        if NORM and not HAS_STATS and not CENTRE:
            mean, m2 = _merge(mean, m2, x.to(ACC), start, BLOCK_D, ACC)
        if CENTRE:
            x -= mean[:, None]
        raw = tl.dot(u, tl.trans(x), raw, input_precision="ieee", out_dtype=ACC)
        wide_u = u.to(ACC)
        u_sum += tl.sum(wide_u, 1)
        if CLS:
            raw0 += tl.sum(wide_u * c[None, :], 1)

    rstd = tl.full([BLOCK_N], 1.0, ACC)
    if HAS_STATS:
        rstd = tl.load(rstd_ptr + row * n + offs_n, mask=mask_n, other=0.0)
    elif NORM:
        rstd = 1.0 / tl.sqrt(m2 / D + EPS)
        tl.store(mu_ptr + row * n + offs_n, mean, mask=mask_n)
        tl.store(rstd_ptr + row * n + offs_n, rstd, mask=mask_n)

    # scores of the normalized tokens; from raw ones r_j (u . x_j - mu_j sum(u))
    a = rstd[None, :] * raw
    if NORM and not CENTRE:
        a = rstd[None, :] * (raw - mean[None, :] * u_sum[:, None])
    a = tl.where(mask_n[None, :], a, float("-inf"))
    top = tl.max(a, 1)
    if CLS:
        top = tl.maximum(top, raw0)
    e = tl.exp(a - top[:, None])
    e0 = tl.exp(raw0 - top)
    norm = tl.sum(e, 1)
    if CLS:
        norm += e0
    p = e / norm[:, None]
    p0 = e0 / norm
    score_tile = scores_ptr + row * (H * (n + CLS)) + offs_h * (n + CLS)
    if CLS:
        tl.store(score_tile, raw0, mask=mask_h)
    tl.store(score_tile[:, None] + CLS + offs_n[None, :], a, mask=mask_h[:, None] & mask_n[None, :])
    tl.store(lse_ptr + row * H + offs_h, top + tl.log(norm), mask=mask_h)

    # the correction uses the rounded weights, so that a mean offset costs nothing
    g = (p * rstd[None, :]).to(x_ptr.dtype.element_ty)
    shift = tl.sum(g.to(ACC) * mean[None, :], 1)
    # backwards: what was read last is still in the cache
    for back in range(BLOCK_D, D + BLOCK_D, BLOCK_D):
        start = D - back
        x = tl.load(x_tile + start, mask=mask_n[:, None], other=0.0)
        if CLS:
            c = tl.load(c_tile + start).to(ACC)
        if CENTRE:
            x -= mean[:, None]
        z = tl.dot(g, x, input_precision="ieee", out_dtype=ACC)
        if CLS:
            z += p0[:, None] * c[None, :]
        if NORM and not CENTRE:
            z -= shift[:, None]
        tl.store(z_tile + start, z.to(z_ptr.dtype.element_ty), mask=mask_h[:, None])


@triton.jit
def attention_pool_bwd_kernel(
    # as in the forward pass; dz [H, R, D]
    x_ptr,
    xh0_ptr,
    u_ptr,
    dz_ptr,
    scores_ptr,
    lse_ptr,
    mu_ptr,
    rstd_ptr,
    # [R, n, D]; [H, R, D]; [R, D] if CLS
    dx_ptr,
    du_ptr,
    dxh0_ptr,
    stride_xr,
    stride_xn,
    stride_cr,
    stride_uh,
    stride_ur,
    stride_zh,
    n: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NORM: tl.constexpr,
    CLS: tl.constexpr,
    CENTRE: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < n
    mask_h = offs_h < H
    x_tile = x_ptr + row * stride_xr + offs_n[:, None].to(tl.int64) * stride_xn + offs_d[None, :]
    u_tile = u_ptr + row * stride_ur + offs_h[:, None].to(tl.int64) * stride_uh + offs_d[None, :]
    c_tile = xh0_ptr + row * stride_cr + offs_d
    # dz and du share the layout of z
    by_head = row * D + offs_h[:, None].to(tl.int64) * stride_zh + offs_d[None, :]
    dx_tile = dx_ptr + row * (n * D) + offs_n[:, None] * D + offs_d[None, :]

    mean = tl.zeros([BLOCK_N], ACC)
    rstd = tl.full([BLOCK_N], 1.0, ACC)
    if NORM:
        mean = tl.load(mu_ptr + row * n + offs_n, mask=mask_n, other=0.0)
        rstd = tl.load(rstd_ptr + row * n + offs_n, mask=mask_n, other=0.0)
    raw = tl.zeros([BLOCK_H, BLOCK_N], ACC)
    dp0 = tl.zeros([BLOCK_H], ACC)
    u_sum = tl.zeros([BLOCK_H], ACC)
    dz_sum = tl.zeros([BLOCK_H], ACC)
    for start in range(0, D, BLOCK_D):
        x = tl.load(x_tile + start, mask=mask_n[:, None], other=0.0)
        dz = tl.load(dz_ptr + by_head + start, mask=mask_h[:, None], other=0.0)
        u = tl.load(u_tile + start, mask=mask_h[:, None], other=0.0)
        if CLS:
            c = tl.load(c_tile + start).to(ACC)
        if CENTRE:
            x -= mean[:, None]
        raw = tl.dot(dz, tl.trans(x), raw, input_precision="ieee", out_dtype=ACC)
        dz_sum += tl.sum(dz.to(ACC), 1)
        if CLS:
            dp0 += tl.sum(dz.to(ACC) * c[None, :], 1)
        u_sum += tl.sum(u.to(ACC), 1)

    score_tile = scores_ptr + row * (H * (n + CLS)) + offs_h * (n + CLS)
    both = mask_h[:, None] & mask_n[None, :]
    a = tl.load(score_tile[:, None] + CLS + offs_n[None, :], mask=both, other=float("-inf"))
    a0 = tl.full([BLOCK_H], float("-inf"), ACC)
    if CLS:
        a0 = tl.load(score_tile, mask=mask_h, other=float("-inf"))
    lse = tl.load(lse_ptr + row * H + offs_h, mask=mask_h, other=0.0)
    # padded heads and tokens: exp(-inf) = 0
    p = tl.exp(a - lse[:, None])
    p0 = tl.exp(a0 - lse)
    a = tl.where(both, a, 0.0)
    dp = rstd[None, :] * raw
    if NORM and not CENTRE:
        dp = rstd[None, :] * (raw - mean[None, :] * dz_sum[:, None])
    delta = tl.sum(p * dp, 1) + p0 * dp0
    da = p * (dp - delta[:, None])
    da0 = p0 * (dp0 - delta)
    # the LayerNorm's two means over D, from [H, n] numbers
    m = tl.sum(p * dz_sum[:, None] + da * u_sum[:, None], 0) / D
    k = tl.sum(p * dp + da * a, 0) / D

    low = x_ptr.dtype.element_ty
    g = (da * rstd[None, :]).to(low)
    shift = tl.sum(g.to(ACC) * mean[None, :], 1)
    # [BLOCK_N, BLOCK_H]
    p_low = tl.trans(p.to(low))
    da_low = tl.trans(da.to(low))
    for back in range(BLOCK_D, D + BLOCK_D, BLOCK_D):
        start = D - back
        x = tl.load(x_tile + start, mask=mask_n[:, None], other=0.0)
        dz = tl.load(dz_ptr + by_head + start, mask=mask_h[:, None], other=0.0)
        u = tl.load(u_tile + start, mask=mask_h[:, None], other=0.0)
        if CLS:
            c = tl.load(c_tile + start).to(ACC)
        if CENTRE:
            x -= mean[:, None]
        du = tl.dot(g, x, input_precision="ieee", out_dtype=ACC)
        if CLS:
            du += da0[:, None] * c[None, :]
        if NORM and not CENTRE:
            du -= shift[:, None]
        tl.store(du_ptr + by_head + start, du.to(low), mask=mask_h[:, None])
        if CLS:
            dxh0 = tl.sum(p0[:, None] * dz.to(ACC) + da0[:, None] * u.to(ACC), 0)
            tl.store(dxh0_ptr + row * D + start + offs_d, dxh0.to(low))
        dxh = tl.dot(p_low, dz, input_precision="ieee", out_dtype=ACC)
        dx = tl.dot(da_low, u, dxh, input_precision="ieee", out_dtype=ACC)
        if NORM:
            xh = x.to(ACC) * rstd[:, None]
            if not CENTRE:
                xh = (x.to(ACC) - mean[:, None]) * rstd[:, None]
            dx = rstd[:, None] * (dx - m[:, None] - xh * k[:, None])
        tl.store(dx_tile + start, dx.to(low), mask=mask_n[:, None])


# ---- launchers ------------------------------------------------------------------------------------


def heuristic(direction: str, n: int, width: int, itemsize: int, heads: int) -> dict[str, int]:
    """Settings where nothing was measured: none spills (benchmarks/records/registers.md)."""
    # the largest power of two up to 64 that divides the width: no column is ever masked
    block = min(64, width & -width)
    if itemsize > 2 or (direction == "bwd" and n > 128 and heads == HEADS):
        # tiles of 64 columns spill in fp32, and where no head is padding
        return {"BLOCK_D": min(block, 32), "num_warps": 8, "num_stages": 1}
    # with more than one stage these spill a word on one architecture or another
    one = n <= 128 and (block < 64 or (direction == "fwd" and n > 64))
    warps = 4 if n <= 64 or (direction == "bwd" and one) else 8
    # two stages overlap nothing: a loop's end asks for what its top waits for. Backward a third costs a program per
    # multiprocessor
    stages = 1 if one else 3 if direction == "fwd" else 2
    return {"BLOCK_D": block, "num_warps": warps, "num_stages": stages}


def _launch_on(
    direction: str,
    kernel: Any,
    x: Tensor,
    xh0: Tensor | None,
    u: Tensor,
    others: tuple[Tensor, ...],
    **options: Any,
) -> None:
    rows, n, width = x.shape
    heads, tile = u.shape[0], _launch.power_of_two(n, 16)
    key = _launch.config_key(direction, x.dtype, D=width, H=heads, n=tile)
    default = heuristic(direction, n, width, x.element_size(), heads)
    options |= _launch.settings("attention_pool", key, x.device, default)
    options |= {
        "n": n,
        "D": width,
        "H": heads,
        "BLOCK_N": tile,
        "BLOCK_H": HEADS,
        "CLS": int(xh0 is not None),
        "CENTRE": options["NORM"] and x.element_size() > 2,
        "ACC": _launch.accumulator(x.dtype),
    }
    # a class row and queries shared by all rows are read with a stride of 0
    stride_cr = 0 if xh0 is None or xh0.shape[0] == 1 else xh0.stride(0)
    stride_ur = 0 if u.shape[1] == 1 else u.stride(1)
    strides = (x.stride(0), x.stride(1), stride_cr, u.stride(0), stride_ur, rows * width)
    _launch.launch(kernel, (rows,), x, x, x if xh0 is None else xh0, u, *others, *strides, **options)


def _ready(x: Tensor, xh0: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    return _launch.rows_ready(x), None if xh0 is None else _launch.rows_ready(xh0), _launch.rows_ready(u)


def forward(
    x: Tensor,
    xh0: Tensor | None,
    u: Tensor,
    eps: float | None,
    stats: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(z [H, R, D], scores [R, H, n + 1], lse [R, H], mu [R, n], rstd [R, n]) of x [R, n, D], xh0 and u.

    Without xh0 scores are [R, H, n]. Without eps and stats there is no norm; then mu and rstd are empty.
    """
    rows, n, width = x.shape
    heads, wide = u.shape[0], _launch.wide(x.dtype)
    x, xh0, u = _ready(x, xh0, u)
    z = _launch.empty((heads, rows, width), x)
    scores = _launch.empty((rows, heads, n + (xh0 is not None)), x, wide)
    lse = _launch.empty((rows, heads), x, wide)
    norm = eps is not None or stats is not None
    if stats is None:
        shape = (rows, n) if norm else (0,)
        mu, rstd = _launch.empty(shape, x, wide), _launch.empty(shape, x, wide)
    else:
        mu, rstd = stats[0].contiguous(), stats[1].contiguous()
    outs = (z, scores, lse, mu, rstd)
    options = {"EPS": eps or 0.0, "HAS_STATS": stats is not None, "NORM": norm}
    _launch_on("fwd", attention_pool_fwd_kernel, x, xh0, u, outs, **options)
    return outs


def forward_stats(
    x: Tensor, xh0: Tensor | None, u: Tensor, mu: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, scores, lse) as `forward`, from statistics of the tokens."""
    return forward(x, xh0, u, None, (mu, rstd))[:3]


def backward(
    x: Tensor,
    xh0: Tensor | None,
    u: Tensor,
    dz: Tensor,
    scores: Tensor,
    lse: Tensor,
    mu: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [R, n, D], du [H, R, D], dxh0 [R, D] or empty); the last two per row, also for shared inputs."""
    x, xh0, u = _ready(x, xh0, u)
    dx, du = _launch.empty(x.shape, x), _launch.empty(dz.shape, x)
    dxh0 = _launch.empty((0,) if xh0 is None else (x.shape[0], x.shape[2]), x)
    dense = (t.contiguous() for t in (dz, scores, lse, mu, rstd))
    others = (*dense, dx, du, dxh0)
    # as the forward pass left them
    norm = mu.dim() == 2
    _launch_on("bwd", attention_pool_bwd_kernel, x, xh0, u, others, NORM=norm)
    return dx, du, dxh0
