"""Device code of patch_gather: the GEMM reads its left operand straight from the image (README.md).

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
def patch_gather_kernel(
    # image by strides (the last axis dense); [V, B, K] int32 by strides
    image_ptr,
    keep_ptr,
    # [D, F] in the columns' order; [D]; [N, D]; [M, D]
    weight_ptr,
    bias_ptr,
    pos_ptr,
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
    D: tl.constexpr,
    F: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACC: tl.constexpr,
):
    # the tiles of one block of tokens are neighbors, so that its pixels stay in L2
    tiles: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0).to(tl.int64)
    block = pid // tiles
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    offs_n = (pid - block * tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_f = tl.arange(0, BLOCK_F)
    image, j = _patch_index(keep_ptr, row, valid, batch, stride_kv, stride_kb, stride_kk, K, HAS_KEEP)
    start = _patch_start(image, j, stride_b, stride_h, GW, P, C, LAYOUT)
    low = weight_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for f in range(0, F, BLOCK_F):
        cols = f + offs_f
        column = _column(cols, stride_c, stride_h, P, C, LAYOUT)
        mask_a = valid[:, None]
        mask_w = offs_n[:, None] < D
        if F % BLOCK_F != 0:
            mask_a = mask_a & (cols[None, :] < F)
            mask_w = mask_w & (cols[None, :] < F)
        a = tl.load(image_ptr + start[:, None] + column[None, :], mask=mask_a, other=0)
        w = tl.load(weight_ptr + offs_n[:, None] * F + cols[None, :], mask=mask_w, other=0.0)
        if LAYOUT == 0:
            # exact in bf16; the weight's padding columns are zero, so -1 there does no harm
            a = ((a.to(tl.float32) - 128.0) * 0.0078125).to(low)
        else:
            a = a.to(low)
        total = tl.dot(a, tl.trans(w), total, input_precision="ieee", out_dtype=ACC)
    mask = valid[:, None] & (offs_n[None, :] < D)
    total += tl.load(bias_ptr + offs_n, mask=offs_n < D, other=0.0).to(ACC)[None, :]
    total += tl.load(pos_ptr + j[:, None] * D + offs_n[None, :], mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + row[:, None] * D + offs_n[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "batch"])
def patch_pack_kernel(
    # as above; out [M, F]
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


# ---- launchers ------------------------------------------------------------------------------------


def heuristic(direction: str, itemsize: int, patch: int) -> dict[str, int]:
    """Settings where nothing was measured: tiles of 128 x 128 x 64 in 16 bits, smaller otherwise."""
    if direction == "pack":
        return {"BLOCK_M": 16, "BLOCK_F": 128, "num_warps": 4, "num_stages": 2}
    if itemsize > 2:
        # in the interpreter only (op.py)
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_F": 32, "num_warps": 4, "num_stages": 1}
    # patches that are no multiple of 16 pixels are read in small pieces, which takes registers
    rows = 128 if patch % 16 == 0 else 64
    columns = 64 if patch > 4 else 32
    return {"BLOCK_M": rows, "BLOCK_N": 128, "BLOCK_F": columns, "num_warps": 8, "num_stages": 2}


def _prepare(images: Tensor, keep: Tensor | None, patch: int) -> tuple[tuple, tuple, dict]:
    """((images, keep), (rows, batch, strides...), constants) of a launch."""
    images = _launch.rows_ready(images)
    batch, channels, height, width = image_size(images)
    pixels = images.dtype == torch.uint8
    if pixels and images.stride(2) != channels:
        images = images.contiguous()
    strides = (images.stride(0), 0, images.stride(1)) if pixels else images.stride()[:3]
    count = (height // patch) * (width // patch)
    views, kept = (1, count) if keep is None else (keep.shape[0], keep.shape[2])
    constants = {
        "GW": width // patch,
        "P": patch,
        "C": channels,
        "K": kept,
        "F": channels * patch**2,
        "LAYOUT": 0 if pixels else 1,
        "HAS_KEEP": keep is not None,
    }
    keep_strides = (0, 0, 0) if keep is None else keep.stride()
    pointers = images, images if keep is None else keep
    return pointers, (views * batch * kept, batch, *strides, *keep_strides), constants


def _options(direction: str, dtype: torch.dtype, device: torch.device, width: int, patch: int) -> dict:
    key = _launch.config_key(direction, dtype, D=width, P=patch)
    return _launch.settings("patch_gather", key, device, heuristic(direction, dtype.itemsize, patch))


def embed(
    images: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, pos: Tensor, patch: int
) -> Tensor:
    """Tokens [M, D] of the kept patches, in the weight's dtype; weight [D, F], bias [D], pos [N, D]."""
    pointers, numbers, constants = _prepare(images, keep, patch)
    width, dtype = weight.shape[0], weight.dtype
    out = _launch.empty((numbers[0], width), weight)
    options = constants | _options("fwd", dtype, weight.device, width, patch)
    options |= {"D": width, "ACC": _launch.accumulator(dtype)}
    tiles = triton.cdiv(numbers[0], options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"])
    pointers = (*pointers, weight.contiguous(), bias.contiguous(), pos.contiguous(), out)
    _launch.launch(patch_gather_kernel, (tiles,), images, *pointers, *numbers, **options)
    return out


def pack(images: Tensor, keep: Tensor | None, patch: int, dtype: torch.dtype) -> Tensor:
    """The kept patches' numbers alone, [M, F] of `dtype`."""
    pointers, numbers, constants = _prepare(images, keep, patch)
    out = _launch.empty((numbers[0], constants["F"]), images, dtype)
    options = constants | _options("pack", dtype, images.device, constants["F"], patch)
    blocks = triton.cdiv(numbers[0], options["BLOCK_M"])
    _launch.launch(patch_pack_kernel, (blocks,), images, *pointers, out, *numbers, **options)
    return out
