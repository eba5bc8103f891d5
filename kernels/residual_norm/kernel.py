"""Device code of residual_norm: whole rows in registers, column sums as partial rows (README.md).

T = R n tokens of D columns; a program holds BLOCK_R tokens at a time, the backward pass loops over its tokens.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch


@triton.jit(do_not_specialize=["tokens", "n"])
def residual_norm_fwd_kernel(
    # [T, D] dense, but bias, gain, shift [D], scale [R], mean and rstd [T]
    x_ptr,
    branch_ptr,
    bias_ptr,
    scale_ptr,
    gain_ptr,
    shift_ptr,
    out_ptr,
    u_ptr,
    mean_ptr,
    rstd_ptr,
    tokens,
    n,
    EPS: tl.constexpr,
    D: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t, mask_d = offs_t < tokens, offs_d < D
    # [BLOCK_R, BLOCK_D]
    mask = mask_t[:, None] & mask_d[None, :]
    at = offs_t[:, None] * D + offs_d[None, :]
    r = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    if HAS_BRANCH:
        f = tl.load(branch_ptr + at, mask=mask, other=0.0).to(ACC)
        if HAS_BIAS:
            f += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
        if HAS_SCALE:
            f *= tl.load(scale_ptr + offs_t // n, mask=mask_t, other=0.0).to(ACC)[:, None]
        low = (r + f).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, low, mask=mask)
        # the norm sees what was stored, as its backward pass does
        r = low.to(ACC)
    if HAS_NORM:
        mean = tl.sum(tl.where(mask_d[None, :], r, 0.0), 1) / D
        centered = tl.where(mask_d[None, :], r - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / D + EPS)
        u = centered * rstd[:, None] * tl.load(gain_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
        if HAS_SHIFT:
            u += tl.load(shift_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
        tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + offs_t, mean, mask=mask_t)
        tl.store(rstd_ptr + offs_t, rstd, mask=mask_t)


@triton.jit(do_not_specialize=["tokens"])
def residual_norm_again_kernel(
    # [T, D] dense, but gain, shift [D], mean and rstd [T]
    out_ptr,
    mean_ptr,
    rstd_ptr,
    gain_ptr,
    shift_ptr,
    u_ptr,
    tokens,
    D: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t, mask_d = offs_t < tokens, offs_d < D
    mask = mask_t[:, None] & mask_d[None, :]
    at = offs_t[:, None] * D + offs_d[None, :]
    mean = tl.load(mean_ptr + offs_t, mask=mask_t, other=0.0)
    rstd = tl.load(rstd_ptr + offs_t, mask=mask_t, other=0.0)
    r = tl.load(out_ptr + at, mask=mask, other=0.0).to(ACC)
    # the same operations in the same order as forward: the same bits
    u = tl.where(mask_d[None, :], r - mean[:, None], 0.0) * rstd[:, None]
    u = u * tl.load(gain_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
    if HAS_SHIFT:
        u += tl.load(shift_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
    tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "n"])
def residual_norm_bwd_kernel(
    # [T, D] dense, but mean and rstd [T], gain [D], scale [R]; sums [programs, SUMS, D]
    du_ptr,
    dout_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    gain_ptr,
    scale_ptr,
    dx_ptr,
    dbranch_ptr,
    sums_ptr,
    tokens,
    n,
    D: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_DOUT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    dgain = tl.zeros([BLOCK_D], ACC)
    dshift = tl.zeros([BLOCK_D], ACC)
    dbias = tl.zeros([BLOCK_D], ACC)
    if HAS_NORM:
        gain = tl.load(gain_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)
    for start in tl.range(program * BLOCK_R, tokens, PROGRAMS * BLOCK_R, num_stages=STAGES):
        offs_t = start + tl.arange(0, BLOCK_R)
        mask_t = offs_t < tokens
        # [BLOCK_R, BLOCK_D]
        mask = mask_t[:, None] & mask_d[None, :]
        at = offs_t[:, None] * D + offs_d[None, :]
        if HAS_DOUT:
            dx = tl.load(dout_ptr + at, mask=mask, other=0.0).to(ACC)
        else:
            dx = tl.zeros([BLOCK_R, BLOCK_D], ACC)
        if HAS_NORM:
            du = tl.load(du_ptr + at, mask=mask, other=0.0).to(ACC)
            r = tl.load(out_ptr + at, mask=mask, other=0.0).to(ACC)
            mean = tl.load(mean_ptr + offs_t, mask=mask_t, other=0.0)
            rstd = tl.load(rstd_ptr + offs_t, mask=mask_t, other=0.0)
            xh = (r - mean[:, None]) * rstd[:, None]
            dgain += tl.sum(du * xh, 0)
            dshift += tl.sum(du, 0)
            # du and gain are 0 beyond D, so xh need not be
            dxh = du * gain[None, :]
            c1 = tl.sum(dxh * xh, 1) / D
            c2 = tl.sum(dxh, 1) / D
            dx += (dxh - xh * c1[:, None] - c2[:, None]) * rstd[:, None]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_SCALE:
            dx *= tl.load(scale_ptr + offs_t // n, mask=mask_t, other=0.0).to(ACC)[:, None]
            tl.store(dbranch_ptr + at, dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            # c2 reaches beyond D, and beyond the last token
            dbias += tl.sum(tl.where(mask, dx, 0.0), 0)
    SUMS: tl.constexpr = (2 if HAS_NORM else 0) + (1 if HAS_BIAS else 0)
    sums = sums_ptr + program * (SUMS * D) + offs_d
    if HAS_NORM:
        tl.store(sums, dgain, mask=mask_d)
        tl.store(sums + D, dshift, mask=mask_d)
    if HAS_BIAS:
        tl.store(sums + (SUMS - 1) * D, dbias, mask=mask_d)


# ---- launchers ------------------------------------------------------------------------------------


def heuristic(direction: str, width: int, itemsize: int) -> dict[str, int]:
    """Settings where nothing was measured: a thread holds 16 bytes of each of its tokens' rows."""
    row = _launch.power_of_two(width, 16) * itemsize
    # narrow rows leave one warp, which spills four of them in the backward pass
    block = 4 if (1024 if direction == "bwd" else 0) <= row <= 2048 else 2
    chosen = {"BLOCK_R": block, "num_warps": min(8, max(1, row // 512))}
    # two tiles are on their way while one is computed with
    return chosen | ({"STAGES": 3} if direction == "bwd" else {})


def programs(device: torch.device, warps: int) -> int:
    """Programs, and so partial rows, of the backward pass; on a GPU 8 warps a multiprocessor, in 2 or more."""
    return max(2, 8 // warps) * _multiprocessors(device) if device.type == "cuda" else 8


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _options(direction: str, x: Tensor) -> dict:
    width = x.shape[-1]
    key = _launch.config_key(direction, x.dtype, D=width)
    chosen = _launch.settings("residual_norm", key, x.device, heuristic(direction, width, x.element_size()))
    return {
        "D": width,
        "BLOCK_D": _launch.power_of_two(width, 16),
        "ACC": _launch.accumulator(x.dtype),
    } | chosen


def _ready(x: Tensor) -> Tensor:
    return _launch.rows_ready(x.contiguous())


def forward(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, u, mean, rstd) of x [R, n, D]; empty where there is no branch, or no norm."""
    x, branch = _ready(x), None if branch is None else _ready(branch)
    n, width = x.shape[1:]
    tokens = x.shape[0] * n
    out = x.new_empty(0) if branch is None else _launch.empty(x.shape, x)
    u, mean, rstd = (x.new_empty(0) for _ in range(3))
    if gain is not None:
        u = _launch.empty(x.shape, x, dtype)
        mean, rstd = (_launch.empty(x.shape[:2], x, _launch.wide(x.dtype)) for _ in range(2))
    inputs = _given((x, branch, bias, scale, gain, shift), x)
    options = {
        "EPS": eps,
        "HAS_BRANCH": branch is not None,
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": scale is not None,
        "HAS_NORM": gain is not None,
        "HAS_SHIFT": shift is not None,
    } | _options("fwd", x)
    grid = (triton.cdiv(tokens, options["BLOCK_R"]),)
    _launch.launch(residual_norm_fwd_kernel, grid, x, *inputs, out, u, mean, rstd, tokens, n, **options)
    return out, u, mean, rstd


def _given(inputs: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    # an absent argument is never read; its place takes any tensor. Vectors are read as dense
    return [like if p is None else p.contiguous() for p in inputs]


def again(
    out: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, shift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """u once more from what forward returned."""
    out = _ready(out)
    tokens = out.shape[0] * out.shape[1]
    u = _launch.empty(out.shape, out, dtype)
    inputs = _given((out, mean, rstd, gain, shift), out)
    options = {"HAS_SHIFT": shift is not None} | _options("fwd", out)
    grid = (triton.cdiv(tokens, options["BLOCK_R"]),)
    _launch.launch(residual_norm_again_kernel, grid, out, *inputs, u, tokens, **options)
    return u


def backward(
    du: Tensor | None,
    dout: Tensor | None,
    out: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    gain: Tensor | None,
    scale: Tensor | None,
    bias: bool,
    dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbranch, sums [2 | 1 | 3, D] of dgain, dshift, dbias); empty where dx is dout, dbranch is dx, no sum is."""
    norm = gain is not None
    du, dout, out = (None if t is None else _ready(t) for t in (du, dout, out))
    like = dout if du is None else du
    assert like is not None
    n, width = like.shape[1:]
    tokens = like.shape[0] * n
    dx = _launch.empty(like.shape, like, dtype) if norm else like.new_empty(0)
    dbranch = like.new_empty(0) if scale is None else _launch.empty(like.shape, like, branch_dtype)
    options = {
        "HAS_NORM": norm,
        "HAS_DOUT": dout is not None,
        "HAS_SCALE": scale is not None,
        "HAS_BIAS": bias,
    } | _options("bwd", like)
    count = min(programs(like.device, options["num_warps"]), triton.cdiv(tokens, options["BLOCK_R"]))
    sums = _launch.empty((count, 2 * norm + bias, width), like, _launch.wide(like.dtype))
    inputs = _given((du, dout, out, mean, rstd, gain, scale), like)
    args = (*inputs, dx, dbranch, sums, tokens, n)
    _launch.launch(residual_norm_bwd_kernel, (count,), like, *args, PROGRAMS=count, **options)
    # one sum over the programs in their order: the same bits in every run
    return dx, dbranch, sums.sum(0)
