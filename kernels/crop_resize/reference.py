"""Plain PyTorch definition of crop_resize: Pillow's bilinear resize in its own integers, so the same bytes."""

from __future__ import annotations

import torch
from torch import Tensor

# columns of a row of `crops`: offset in bytes of the region's first pixel and from each of its lines to the next;
# its height and width; the box in it that is resized (top, left, bottom, right); 1: flipped
COLUMNS = ("start", "pitch", "height", "width", "top", "left", "bottom", "right", "flip")

# weights are whole numbers of 2^-22 (Pillow: 32 bits, less 8 of a pixel and 2 of overshoot)
BITS = 22
# pixels that are resized at a time, which bounds the memory
_CHUNK = 1 << 23


def filter_taps(begin: Tensor, end: Tensor, size: Tensor, out: int) -> tuple[Tensor, Tensor]:
    """The pixels that each position of a resized axis averages.

    Args:
        begin: [B] fp32, where the box begins on the axis; `end` likewise.
        size: [B] int64 pixels of the axis.
        out: positions.

    Returns:
        [B, out] int64 first pixels, [B, out, T] int32 weights, which add up to about 2^22.
    """
    scale = ((end - begin).double() / out)[:, None]
    spread = scale.clamp_min(1)
    center = begin.double()[:, None] + (torch.arange(out, device=begin.device) + 0.5) * scale
    first = (center - spread + 0.5).clamp_min(0).long()
    last = torch.minimum((center + spread + 0.5).long(), size[:, None])
    at = first[..., None] + torch.arange(int((last - first).max()), device=begin.device)
    weights = (1 - ((at - center[..., None] + 0.5) * (1 / spread)[..., None]).abs()).clamp_min(0)
    weights = weights * (at < last[..., None])
    return first, (weights / weights.sum(-1, keepdim=True) * 2**BITS + 0.5).int()


def crop_resize_reference(pixels: Tensor, crops: Tensor, size: tuple[int, int]) -> Tensor:
    """Arguments and result as `crop_resize`; reads back the largest region, so it waits for a GPU."""
    if not len(crops):
        return pixels.new_empty(0, *size, 3)
    lines = int(crops[:, 2].max())
    some = max(1, _CHUNK // (lines * size[1] * 3))
    return torch.cat([_resize(pixels, part, size) for part in crops.split(some)])


def _resize(pixels: Tensor, crops: Tensor, size: tuple[int, int]) -> Tensor:
    start, pitch, height, width = crops[:, :4].long().unbind(1)
    top, left, bottom, right = crops[:, 4:8].float().unbind(1)
    first_y, weights_y = filter_taps(top, bottom, height, size[0])
    first_x, weights_x = filter_taps(left, right, width, size[1])
    flip = crops[:, 8] > 0
    first_x = torch.where(flip[:, None], first_x.flip(1), first_x)
    weights_x = torch.where(flip[:, None, None], weights_x.flip(1), weights_x)
    batch, lines, device = len(crops), int(height.max()), crops.device
    # [B, lines, out, 3]: every line of a region, its last one again where it has fewer
    line = torch.minimum(torch.arange(lines, device=device), height[:, None] - 1)
    line = start[:, None] + line * pitch[:, None]
    wide = _half((batch, lines, size[1], 3), device)
    for t in range(weights_x.shape[2]):
        column = torch.minimum(first_x + t, width[:, None] - 1)
        at = (line[:, :, None] + 3 * column[:, None, :])[..., None] + torch.arange(3, device=device)
        wide += pixels[at].int() * weights_x[:, None, :, t, None]
    # rounded to whole levels in between, as Pillow does
    wide = (wide >> BITS).view(batch * lines, -1)
    image = _half((batch, size[0], wide.shape[1]), device)
    for t in range(weights_y.shape[2]):
        at = (
            torch.minimum(first_y + t, height[:, None] - 1)
            + lines * torch.arange(batch, device=device)[:, None]
        )
        image += wide[at] * weights_y[:, :, t, None]
    return (image >> BITS).to(torch.uint8).view(batch, *size, 3)


def _half(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.full(shape, 1 << (BITS - 1), dtype=torch.int32, device=device)
