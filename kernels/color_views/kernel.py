"""Device code of color_views: two passes over tiles of pixels (README.md).

Pass 1 sums the gray values of a tile as they stand when contrast is reached; pass 2 adds the tiles' sums in their
order, applies everything and stores. No atomics, no random numbers inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch

BLOCK = 1024
COLUMNS = 10


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
def _pixels(images_ptr, image, offs, mask, stride_b):
    """[BLOCK] red, green, blue in [0, 1]."""
    base = images_ptr + image * stride_b + offs * 3
    r = tl.load(base, mask=mask, other=0).to(tl.float32) / 255.0
    g = tl.load(base + 1, mask=mask, other=0).to(tl.float32) / 255.0
    b = tl.load(base + 2, mask=mask, other=0).to(tl.float32) / 255.0
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
        r, g, b = _pixels(images_ptr, which // 2, offs, mask, stride_b)
        before = 1
        for place in range(4):
            op = tl.load(base + 6 + place).to(tl.int32)
            if op == 1:
                before = 0
            if before == 1:
                r, g, b = _apply(r, g, b, op, base, 0.0)
        total = tl.sum(tl.where(mask, _gray(r, g, b), 0.0), 0)
        tl.store(sums_ptr + which * TILES + tile, total)


@triton.jit
def color_views_kernel(
    # as above; fp32 [2 C]: means, 1 / deviations; out [2, B, C, H, W] or [2, B, N, C P P]
    images_ptr,
    params_ptr,
    sums_ptr,
    norm_ptr,
    out_ptr,
    batch,
    stride_b,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
    PATCH: tl.constexpr,
):
    which = tl.program_id(0).to(tl.int64)
    image = which // 2
    view = which - image * 2
    base = params_ptr + which * COLUMNS
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < PIXELS
    r, g, b = _pixels(images_ptr, image, offs, mask, stride_b)
    if tl.load(base) > 0.0:
        tiles = tl.arange(0, BLOCK_T)
        sums = tl.load(sums_ptr + which * TILES + tiles, mask=tiles < TILES, other=0.0)
        mean = tl.sum(sums, 0) / PIXELS
        for place in range(4):
            r, g, b = _apply(r, g, b, tl.load(base + 6 + place).to(tl.int32), base, mean)
    if tl.load(base + 5) > 0.0:
        level = _gray(r, g, b)
        r, g, b = level, level, level
    # where channel 0 of each pixel goes, and how far apart its channels lie
    target = out_ptr + (view * batch + image) * (C * PIXELS)
    if PATCH == 0:
        place0 = offs
        step: tl.constexpr = PIXELS
    else:
        y = offs // WIDTH
        x = offs - y * WIDTH
        patch = (y // PATCH) * (WIDTH // PATCH) + x // PATCH
        place0 = patch * (C * PATCH * PATCH) + (y % PATCH) * PATCH + x % PATCH
        step: tl.constexpr = PATCH * PATCH
    low = out_ptr.dtype.element_ty
    if C == 1:
        r = _gray(r, g, b)
    tl.store(target + place0, ((r - tl.load(norm_ptr)) * tl.load(norm_ptr + C)).to(low), mask=mask)
    if C == 3:
        g = (g - tl.load(norm_ptr + 1)) * tl.load(norm_ptr + 4)
        b = (b - tl.load(norm_ptr + 2)) * tl.load(norm_ptr + 5)
        tl.store(target + place0 + step, g.to(low), mask=mask)
        tl.store(target + place0 + 2 * step, b.to(low), mask=mask)


def render(
    images: Tensor, params: Tensor, norm: Tensor, channels: int, dtype: torch.dtype, patch: int
) -> Tensor:
    """[2, B, C, H, W], or [2, B, N, C P P] when `patch`; norm [2 C]: means, 1 / deviations."""
    images, params = images.contiguous(), params.contiguous()
    batch, height, width, _ = images.shape
    pixels, tiles = height * width, triton.cdiv(height * width, BLOCK)
    shape = (2, batch, channels, height, width)
    if patch:
        shape = (2, batch, (height // patch) * (width // patch), channels * patch**2)
    out = _launch.empty(shape, images, dtype)
    sums = _launch.empty((batch, 2, tiles), images, torch.float32)
    config = _launch.settings(
        "color_views", f"both|n{pixels}", images.device, lambda: {"num_warps": 4, "num_stages": 1}
    )
    sizes = {"PIXELS": pixels, "TILES": tiles, "BLOCK": BLOCK, "COLUMNS": COLUMNS}
    grid = (2 * batch, tiles)
    _launch.launch(color_sums_kernel, grid, images, images, params, sums, images.stride(0), **sizes, **config)
    _launch.launch(
        color_views_kernel, grid, images, images, params, sums, norm, out, batch, images.stride(0),
        WIDTH=width, BLOCK_T=triton.next_power_of_2(tiles), C=channels, PATCH=patch, **sizes, **config,
    )  # fmt: skip
    return out
