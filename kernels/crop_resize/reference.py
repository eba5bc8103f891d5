"""Plain PyTorch definition of crop_resize: Pillow's bilinear resize in its own integers, so the same bytes."""

from __future__ import annotations

import torch
from torch import Tensor

# columns of a row of `crops`: offset in bytes of the region's first pixel and from each of its lines to the next;
# its height and width; the box in it that is resized (top, left, bottom, right); 1: flipped
COLUMNS = ("start", "pitch", "height", "width", "top", "left", "bottom", "right", "flip")

# weights are whole numbers of 2^-22 (Pillow: 32 bits, less 8 of a pixel and 2 of overshoot)
BITS = 22
# values that are resized at a time, which bounds the memory
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
    # every region in a window of the largest one's size, column by column, so that a tap copies whole columns; what
    # lies beyond a region has no weight
    batch, lines, columns, device = len(crops), int(height.max()), int(width.max()), crops.device
    rows = (
        start[:, None]
        + torch.minimum(torch.arange(lines, device=device), height[:, None] - 1) * pitch[:, None]
    )
    room = len(pixels) - 3 * columns
    if room < 0 or int(rows.max()) > room:
        pixels = torch.cat([pixels, pixels.new_zeros(3 * columns)])
    window = pixels.unfold(0, 3 * columns, 1)[rows].view(batch, lines, columns, 3)
    wide = _average(window.transpose(1, 2).reshape(batch, columns, 3 * lines), first_x, weights_x)
    # rounded to whole levels in between, as Pillow does
    wide = wide.view(batch, size[1], lines, 3).transpose(1, 2).reshape(batch, lines, 3 * size[1])
    return _average(wide, first_y, weights_y).view(batch, *size, 3)


def _average(x: Tensor, first: Tensor, weights: Tensor) -> Tensor:
    """x [B, n, L] uint8 -> [B, out, L] uint8: weighted sums of neighbors along the middle axis."""
    batch, n, length = x.shape
    flat, above = x.view(batch * n, length), n * torch.arange(batch, device=x.device)[:, None]
    total: Tensor | None = None
    for t in range(weights.shape[2]):
        at = above + (first + t).clamp_max(n - 1)
        part = flat.index_select(0, at.view(-1)).view(batch, -1, length).int().mul_(weights[:, :, t, None])
        total = part if total is None else total.add_(part)
    return (total.add_(1 << (BITS - 1)) >> BITS).to(torch.uint8)  # type: ignore[union-attr]
