"""Device code of crop_resize: a program makes a tile of one image, both axes of the filter in one pass (README.md)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _launch
from .reference import BITS, COLUMNS

# of a tile: 224 = 28 * 8 = 7 * 32
TILE_Y, TILE_X = 8, 32


@triton.jit
def _span(at, begin, end, size, OUT: tl.constexpr):
    """Of positions of a resized axis: center in pixels, 1 / half width of the filter, first pixel, end."""
    scale = (end - begin).to(tl.float64) / OUT
    spread = tl.maximum(scale, 1.0)
    center = begin.to(tl.float64) + (at.to(tl.float64) + 0.5) * scale
    first = tl.maximum(center - spread + 0.5, 0.0).to(tl.int32)
    end_pixel = tl.minimum((center + spread + 0.5).to(tl.int32), size)
    return center, 1.0 / spread, first, end_pixel


@triton.jit
def _weight(pixel, center, inverse, end):
    """The triangle's height over a pixel, fp64; 0 beyond the end."""
    x = tl.abs((pixel.to(tl.float64) - center + 0.5) * inverse)
    return tl.where(pixel < end, tl.maximum(1.0 - x, 0.0), 0.0)


@triton.jit
def _integer(weight, total, BITS: tl.constexpr):
    return (weight / total * (1 << BITS) + 0.5).to(tl.int32)


@triton.jit
def crop_resize_kernel(
    # uint8; fp64 [B, 9]; uint8 [B, HEIGHT, WIDTH, 3]
    pixels_ptr,
    crops_ptr,
    out_ptr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE_Y + tl.arange(0, TILE_Y)
    column = tl.program_id(2) * TILE_X + tl.arange(0, TILE_X)
    crop = crops_ptr + image * COLUMNS
    source = pixels_ptr + tl.load(crop).to(tl.int64)
    pitch = tl.load(crop + 1).to(tl.int64)
    height = tl.load(crop + 2).to(tl.int32)
    width = tl.load(crop + 3).to(tl.int32)
    # Pillow takes the box as fp32
    top = tl.load(crop + 4).to(tl.float32)
    left = tl.load(crop + 5).to(tl.float32)
    bottom = tl.load(crop + 6).to(tl.float32)
    right = tl.load(crop + 7).to(tl.float32)
    flipped = tl.load(crop + 8) > 0.0
    # beyond the image its last pixel again
    made_row = tl.minimum(row, HEIGHT - 1)
    made_column = tl.minimum(column, WIDTH - 1)
    read = tl.where(flipped, WIDTH - 1 - made_column, made_column)
    center_y, inverse_y, first_y, end_y = _span(made_row, top, bottom, height, HEIGHT)
    center_x, inverse_x, first_x, end_x = _span(read, left, right, width, WIDTH)
    taps_y = tl.max(end_y - first_y, 0)
    taps_x = tl.max(end_x - first_x, 0)
    total_y = tl.zeros([TILE_Y], tl.float64)
    total_x = tl.zeros([TILE_X], tl.float64)
    for t in range(taps_y):
        total_y += _weight(first_y + t, center_y, inverse_y, end_y)
    for t in range(taps_x):
        total_x += _weight(first_x + t, center_x, inverse_x, end_x)
    made = (row < HEIGHT)[:, None] & (column < WIDTH)[None, :]
    half: tl.constexpr = 1 << (BITS - 1)
    red = tl.full([TILE_Y, TILE_X], half, tl.int32)
    green = tl.full([TILE_Y, TILE_X], half, tl.int32)
    blue = tl.full([TILE_Y, TILE_X], half, tl.int32)
    for ty in range(taps_y):
        y = first_y + ty
        weight_y = _integer(_weight(y, center_y, inverse_y, end_y), total_y, BITS)[:, None]
        line = source + y.to(tl.int64)[:, None] * pitch
        # this line, resized: rounded to whole levels, as Pillow does
        r = tl.full([TILE_Y, TILE_X], half, tl.int32)
        g = tl.full([TILE_Y, TILE_X], half, tl.int32)
        b = tl.full([TILE_Y, TILE_X], half, tl.int32)
        for tx in range(taps_x):
            x = first_x + tx
            weight_x = _integer(_weight(x, center_x, inverse_x, end_x), total_x, BITS)[None, :]
            inside = made & (y < end_y)[:, None] & (x < end_x)[None, :]
            at = line + 3 * x[None, :]
            r += tl.load(at, mask=inside, other=0).to(tl.int32) * weight_x
            g += tl.load(at + 1, mask=inside, other=0).to(tl.int32) * weight_x
            b += tl.load(at + 2, mask=inside, other=0).to(tl.int32) * weight_x
        red += (r >> BITS) * weight_y
        green += (g >> BITS) * weight_y
        blue += (b >> BITS) * weight_y
    target = out_ptr + 3 * ((image * HEIGHT + row[:, None]) * WIDTH + column[None, :])
    tl.store(target, (red >> BITS).to(tl.uint8), mask=made)
    tl.store(target + 1, (green >> BITS).to(tl.uint8), mask=made)
    tl.store(target + 2, (blue >> BITS).to(tl.uint8), mask=made)


# ---- launcher -------------------------------------------------------------------------------------


def resize(pixels: Tensor, crops: Tensor, height: int, width: int) -> Tensor:
    """Crops [B, height, width, 3] uint8 of the rows of crops [B, 9] fp64."""
    out = _launch.empty((len(crops), height, width, 3), pixels)
    options = _launch.settings(
        "crop_resize", f"h{height}|w{width}", pixels.device, {"num_warps": 4, "num_stages": 1}
    )
    # fp64 weights rounded as on a CPU, so that the integers are the same
    options |= {"enable_fp_fusion": False}
    options |= {
        "HEIGHT": height,
        "WIDTH": width,
        "COLUMNS": len(COLUMNS),
        "BITS": BITS,
        "TILE_Y": TILE_Y,
        "TILE_X": TILE_X,
    }
    # an axis of tiles each: one for both would end at 65,535 programs, before 4,096 x 4,096 pixels
    grid = (len(crops), triton.cdiv(height, TILE_Y), triton.cdiv(width, TILE_X))
    _launch.launch(crop_resize_kernel, grid, pixels, pixels, crops.contiguous(), out, **options)
    return out
