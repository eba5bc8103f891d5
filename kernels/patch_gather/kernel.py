"""Device code of patch_gather: what comes before and after the matmul (README.md).

M = V B K tokens in view-major order, F = C P P numbers per patch, D width. LAYOUT: 0 for uint8 images [B, H, W, C],
1 for float images [B, C, H, W].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch
from .op import image_size


@triton.jit
def _patch_index(
    keep_ptr, row, valid, batch, stride_kv, stride_kb, stride_kk, K: tl.constexpr, HAS_KEEP: tl.constexpr
):
    """(image, patch) of output rows; all int64."""
    vb = row // K
    k = row - vb * K
    view = vb // batch
    image = vb - view * batch
    j = k
    if HAS_KEEP:
        j = tl.load(keep_ptr + view * stride_kv + image * stride_kb + k * stride_kk, mask=valid, other=0).to(
            tl.int64
        )
    return image, j


@triton.jit
def _patch_start(
    image, j, stride_b, stride_h, GW: tl.constexpr, P: tl.constexpr, C: tl.constexpr, LAYOUT: tl.constexpr
):
    """Offset of each patch's first number."""
    gy = j // GW
    gx = j - gy * GW
    if LAYOUT == 0:
        return image * stride_b + gy * P * stride_h + gx * (P * C)
    return image * stride_b + gy * P * stride_h + gx * P


@triton.jit
def _column(offs, stride_c, stride_h, P: tl.constexpr, C: tl.constexpr, LAYOUT: tl.constexpr):
    """Offset of column f within a patch; columns run (py, px, c) for NHWC, (c, py, px) otherwise."""
    if LAYOUT == 0:
        py = offs // (P * C)
        return py.to(tl.int64) * stride_h + (offs - py * (P * C))
    c = offs // (P * P)
    rest = offs - c * (P * P)
    py = rest // P
    return c.to(tl.int64) * stride_c + py.to(tl.int64) * stride_h + (rest - py * P)


@triton.jit(do_not_specialize=["rows", "batch"])
def patch_pack_kernel(
    # image by strides (the last axis dense); [V, B, K] int32 by strides; [M, F]
    image_ptr,
    keep_ptr,
    out_ptr,
    rows,
    batch,
    stride_b,
    stride_c,
    stride_h,
    stride_kv,
    stride_kb,
    stride_kk,
    GW: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    image, j = _patch_index(keep_ptr, row, valid, batch, stride_kv, stride_kb, stride_kk, K, HAS_KEEP)
    start = _patch_start(image, j, stride_b, stride_h, GW, P, C, LAYOUT)
    offs_f = tl.arange(0, BLOCK_F)
    for f in range(0, F, BLOCK_F):
        cols = f + offs_f
        mask = valid[:, None]
        if F % BLOCK_F != 0:
            mask = mask & (cols[None, :] < F)
        column = _column(cols, stride_c, stride_h, P, C, LAYOUT)
        a = tl.load(image_ptr + start[:, None] + column[None, :], mask=mask, other=0)
        if LAYOUT == 0:
            a = (a.to(tl.float32) - 128.0) * 0.0078125
        tl.store(out_ptr + row[:, None] * F + cols[None, :], a.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def positions_kernel(
    # [M, D]; [M] int32; [D]; [N, D]; [M, D]
    tokens_ptr,
    keep_ptr,
    bias_ptr,
    pos_ptr,
    out_ptr,
    rows,
    N: tl.constexpr,
    D: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    j = row % N
    if HAS_KEEP:
        j = tl.load(keep_ptr + row, mask=valid, other=0).to(tl.int64)
    for d in range(0, D, BLOCK_D):
        cols = d + tl.arange(0, BLOCK_D)
        mask = valid[:, None]
        if D % BLOCK_D != 0:
            mask = mask & (cols[None, :] < D)
        offs = row[:, None] * D + cols[None, :]
        x = tl.load(tokens_ptr + offs, mask=mask, other=0.0).to(ACC)
        x += tl.load(pos_ptr + j[:, None] * D + cols[None, :], mask=mask, other=0.0).to(ACC)
        if HAS_BIAS:
            x += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(ACC)[None, :]
        tl.store(out_ptr + offs, x.to(out_ptr.dtype.element_ty), mask=mask)


# ---- launchers ------------------------------------------------------------------------------------


def pack(images: Tensor, keep: Tensor | None, patch: int, dtype: torch.dtype) -> Tensor:
    """The kept patches' numbers [M, F] in `dtype`."""
    images = _launch.rows_ready(images)
    batch, channels, height, width = image_size(images)
    pixels = images.dtype == torch.uint8
    if pixels and images.stride(2) != channels:
        images = images.contiguous()
    strides = (images.stride(0), 0, images.stride(1)) if pixels else images.stride()[:3]
    count, numbers = (height // patch) * (width // patch), channels * patch**2
    views, kept = (1, count) if keep is None else (keep.shape[0], keep.shape[2])
    rows = views * batch * kept
    out = _launch.empty((rows, numbers), images, dtype)
    default = {"BLOCK_M": 16, "BLOCK_F": 128, "num_warps": 4, "num_stages": 2}
    key = _launch.config_key("pack", dtype, D=numbers, P=patch)
    options = _launch.settings("patch_gather", key, images.device, default)
    options |= {"GW": width // patch, "P": patch, "C": channels, "K": kept, "F": numbers}
    options |= {"LAYOUT": 0 if pixels else 1, "HAS_KEEP": keep is not None}
    keep_strides = (0, 0, 0) if keep is None else keep.stride()
    args = (images, images if keep is None else keep, out, rows, batch, *strides, *keep_strides)
    _launch.launch(patch_pack_kernel, (triton.cdiv(rows, options["BLOCK_M"]),), images, *args, **options)
    return out


def add_positions(tokens: Tensor, keep: Tensor | None, bias: Tensor | None, pos: Tensor) -> Tensor:
    """tokens [M, D] + bias [D] + pos [N, D] at keep [V, B, K], or at 0 to N - 1 again and again; rounded once."""
    tokens, (rows, width) = _launch.rows_ready(tokens).contiguous(), tokens.shape
    out = _launch.empty(tokens.shape, tokens)
    default = {"BLOCK_M": 16, "BLOCK_D": 128, "num_warps": 4, "num_stages": 1}
    key = _launch.config_key("positions", tokens.dtype, D=width)
    options = _launch.settings("patch_gather", key, tokens.device, default)
    options |= {"N": pos.shape[0], "D": width, "ACC": _launch.accumulator(tokens.dtype)}
    options |= {"HAS_KEEP": keep is not None, "HAS_BIAS": bias is not None}
    pointers = (
        tokens,
        tokens if keep is None else keep.contiguous(),
        tokens if bias is None else bias.contiguous(),
        pos.contiguous(),
        out,
    )
    blocks = triton.cdiv(rows, options["BLOCK_M"])
    _launch.launch(positions_kernel, (blocks,), tokens, *pointers, rows, **options)
    return out
