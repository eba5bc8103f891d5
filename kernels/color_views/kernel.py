"""Device code of color_views: two passes over tiles of pixels (README.md).

Pass 1 sums the gray values of a tile as they stand when contrast is reached; pass 2 adds the tiles' sums in their
order, applies everything and stores. No atomics, no random numbers inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch
from .reference import COLUMNS

BLOCK = 1024


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _gray(r, g, b):
    return 0.299 * r + 0.587 * g + 0.114 * b


@triton.jit
def _hue_channel(top, spread, hue, n: tl.constexpr):
    k = n + 6.0 * hue
    k = k - 6.0 * tl.floor(k / 6.0)
    return top - spread * tl.minimum(tl.maximum(tl.minimum(k, 4.0 - k), 0.0), 1.0)


@triton.jit
def _apply(r, g, b, op, base, mean):
    """One operation: 0 brightness, 1 contrast (towards `mean`), 2 saturation, 3 hue; factors at `base`."""
    factor = tl.load(base + 1 + op)
    if op == 0:
        r, g, b = r * factor, g * factor, b * factor
    elif op == 3:
        top = tl.maximum(tl.maximum(r, g), b)
        spread = top - tl.minimum(tl.minimum(r, g), b)
        safe = tl.where(spread > 0.0, spread, 1.0)
        hue = tl.where(
            top == r, (g - b) / safe, tl.where(top == g, 2.0 + (b - r) / safe, 4.0 + (r - g) / safe)
        )
        hue = hue / 6.0 + factor
        hue = hue - tl.floor(hue)
        r, g, b = (
            _hue_channel(top, spread, hue, 5.0),
            _hue_channel(top, spread, hue, 3.0),
            _hue_channel(top, spread, hue, 1.0),
        )
    else:
        anchor = _gray(r, g, b)
        if op == 1:
            anchor = anchor * 0.0 + mean
        r = factor * r + (1.0 - factor) * anchor
        g = factor * g + (1.0 - factor) * anchor
        b = factor * b + (1.0 - factor) * anchor
    return _clamp(r), _clamp(g), _clamp(b)


@triton.jit
def _pixels(images_ptr, image, tile, stride_b, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] red, green, blue in [0, 1]; beyond the image 0."""
    # whole bytes of the tile, 16 per thread, then every third one: blocks must be powers of two, so 4 BLOCK
    offs_b = tl.arange(0, 4 * BLOCK)
    inside = (offs_b < 3 * BLOCK) & (offs_b < 3 * (PIXELS - tile * BLOCK))
    pixel_bytes = images_ptr + image * stride_b + tile * (3 * BLOCK) + offs_b
    raw = tl.load(pixel_bytes, mask=inside, other=0)
    offs = 3 * tl.arange(0, BLOCK)
    r = tl.gather(raw, offs, 0).to(tl.float32) / 255.0
    g = tl.gather(raw, offs + 1, 0).to(tl.float32) / 255.0
    b = tl.gather(raw, offs + 2, 0).to(tl.float32) / 255.0
    return r, g, b


@triton.jit
def color_sums_kernel(
    # uint8 [B, H, W, 3]; fp32 [B, 2, 10]; fp32 [B, 2, TILES]
    images_ptr,
    params_ptr,
    sums_ptr,
    stride_b,
    PIXELS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    which = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    base = params_ptr + which * COLUMNS
    if tl.load(base) > 0.0:
        offs = tile * BLOCK + tl.arange(0, BLOCK)
        mask = offs < PIXELS
        r, g, b = _pixels(images_ptr, which // 2, tile, stride_b, PIXELS, BLOCK)
        before = 1
        for place in range(4):
            op = tl.load(base + 6 + place).to(tl.int32)
            if op == 1:
                before = 0
            if before == 1:
                r, g, b = _apply(r, g, b, op, base, 0.0)
        total = tl.sum(tl.where(mask, _gray(r, g, b), 0.0), 0)
        tl.store(sums_ptr + which * TILES + tile, total)


@triton.jit(do_not_specialize=["batch"])
def color_views_kernel(
    # as above; out [2, B, C, H, W]
    images_ptr,
    params_ptr,
    sums_ptr,
    out_ptr,
    # of each channel: mean, 1 / standard deviation
    mean_r,
    mean_g,
    mean_b,
    scale_r,
    scale_g,
    scale_b,
    batch,
    stride_b,
    PIXELS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
):
    which = tl.program_id(0).to(tl.int64)
    image = which // 2
    view = which - image * 2
    base = params_ptr + which * COLUMNS
    tile = tl.program_id(1)
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offs < PIXELS
    r, g, b = _pixels(images_ptr, image, tile, stride_b, PIXELS, BLOCK)
    if tl.load(base) > 0.0:
        tiles = tl.arange(0, BLOCK_T)
        sums = tl.load(sums_ptr + which * TILES + tiles, mask=tiles < TILES, other=0.0)
        mean = tl.sum(sums, 0) / PIXELS
        for place in range(4):
            r, g, b = _apply(r, g, b, tl.load(base + 6 + place).to(tl.int32), base, mean)
    if tl.load(base + 5) > 0.0:
        level = _gray(r, g, b)
        r, g, b = level, level, level
    target = out_ptr + (view * batch + image) * (C * PIXELS) + offs
    low = out_ptr.dtype.element_ty
    if C == 1:
        r = _gray(r, g, b)
    r = (r - tl.cast(mean_r, tl.float32)) * tl.cast(scale_r, tl.float32)
    tl.store(target, r.to(low), mask=mask)
    if C == 3:
        g = (g - tl.cast(mean_g, tl.float32)) * tl.cast(scale_g, tl.float32)
        b = (b - tl.cast(mean_b, tl.float32)) * tl.cast(scale_b, tl.float32)
        tl.store(target + PIXELS, g.to(low), mask=mask)
        tl.store(target + 2 * PIXELS, b.to(low), mask=mask)


# ---- launcher -------------------------------------------------------------------------------------


def render(
    images: Tensor,
    params: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int,
    dtype: torch.dtype,
) -> Tensor:
    """Both views [2, B, C, H, W] of images uint8 [B, H, W, 3] with params [B, 2, 10]."""
    if channels == 1:
        mean, std = [sum(mean) / 3] * 3, [sum(std) / 3] * 3
    # numbers, not a tensor: copying one to a GPU waits, and cannot be captured in a graph
    norm = (*map(float, mean), *(1 / float(s) for s in std))
    images, params = images.contiguous(), params.contiguous()
    batch, height, width, _ = images.shape
    pixels, tiles = height * width, triton.cdiv(height * width, BLOCK)
    out = _launch.empty((2, batch, channels, height, width), images, dtype)
    sums = _launch.empty((batch, 2, tiles), images, torch.float32)
    default = {"num_warps": 4, "num_stages": 1}
    options = _launch.settings("color_views", f"both|n{pixels}", images.device, default)
    options |= {"PIXELS": pixels, "TILES": tiles, "BLOCK": BLOCK, "COLUMNS": COLUMNS}
    grid, reads, stride_b = (2 * batch, tiles), (images, params, sums), images.stride(0)
    _launch.launch(color_sums_kernel, grid, images, *reads, stride_b, **options)
    options |= {"BLOCK_T": triton.next_power_of_2(tiles), "C": channels}
    _launch.launch(color_views_kernel, grid, images, *reads, out, *norm, batch, stride_b, **options)
    return out
