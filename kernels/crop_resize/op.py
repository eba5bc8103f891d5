"""crop_resize: the registered op and the public function (README.md). Images take no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _launch
from .reference import COLUMNS, crop_resize_reference


@_launch.op(
    "crop_resize(Tensor pixels, Tensor crops, int height, int width) -> Tensor", "resize", opaque=True
)
def _crops(pixels, crops, height, width):
    return pixels.new_empty(crops.shape[0], height, width, 3)


def crop_resize(pixels: Tensor, crops: Tensor, size: tuple[int, int]) -> Tensor:
    """Cuts regions out of decoded images in one buffer, resizes each to `size`, and flips it if asked.

    The filter is Pillow's antialiased bilinear one, in its integers, width first: the bytes of
    `image.crop(region).resize(size, BILINEAR, box)`. Maths: README.md in this folder. Runs the plain PyTorch
    definition where Triton cannot run.

    Args:
        pixels: [bytes] uint8; the images' red, green, blue, line by line.
        crops: [B, 9] fp64, whole numbers but for the box: `start`, offset in bytes of a region's first pixel;
            `pitch`, bytes from a line to the next; `height` and `width` of the region, which must lie within
            `pixels`; the box in it that is resized, `top, left, bottom, right`, at least one pixel wide and high;
            `flip`, 1 or 0.
        size: (height, width) of the result.

    Returns:
        [B, height, width, 3] uint8.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    _launch.check("pixels", pixels, ("bytes",), (torch.uint8,))
    _launch.check("crops", crops, ("B", len(COLUMNS)), (torch.float64,), pixels, "start, pitch, height, ...")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected (height, width) of at least 1, got {size}")
    if not pixels.is_contiguous():
        raise ValueError("pixels: expected contiguous bytes; use pixels.contiguous()")
    if not _launch.use_triton(pixels):
        return crop_resize_reference(pixels, crops, size)
    return _crops(pixels, crops, size[0], size[1])
