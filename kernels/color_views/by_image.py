"""color_views on a CPU: image by image, in planes that stay in the cache, computing only what an image's coins ask for.

The result is that of reference.py up to rounding. What is saved: brightness and contrast are numbers (scale, offset)
carried along until something needs the pixels; a clamp is left out where values cannot leave their range; hue turns
without division, branches or HSV (README.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import BRIGHTNESS, CONTRAST, FACTORS, GRAY, GRAY_ON, HUE, ON, ORDER, SATURATION, in_patches

# torch splits an operation above this many elements over its threads: for so little work they wait for each other
# longer than they compute, and decoding needs the other cores
PIECE = 32768
Planes = Sequence[Tensor]


class _Piece:
    """Some pixels of one image: its planes, two sets of planes to write to, and which of the three is current.

    Values are levels: level = scale * plane + offset, with the scale and offset of the whole image.
    """

    def __init__(self, pixels: int, scratch: Tensor) -> None:
        self.crop, self.one, self.two = (scratch.new_empty(3, pixels).unbind(0) for _ in range(3))
        self.scratch = scratch[:, :pixels].unbind(0)
        self.now: Planes = self.crop

    def own(self) -> Planes:
        """Planes that may take the place of the current ones: themselves, but never the crop."""
        return self.one if self.now is self.crop else self.now

    def gray(self) -> Tensor:
        out = torch.mul(self.now[0], GRAY[0], out=self.scratch[0])
        return out.add_(self.now[1], alpha=GRAY[1]).add_(self.now[2], alpha=GRAY[2])

    def gray_sum(self) -> float:
        return sum(w * float(plane.sum()) for w, plane in zip(GRAY, self.now, strict=True))

    def clamp(self, low: float, high: float) -> None:
        new = self.own()
        for plane, out in zip(self.now, new, strict=True):
            torch.clamp(plane, low, high, out=out)
        self.now = new

    def saturate(self, factor: float) -> None:
        gray, new = self.gray().mul_(1 - factor), self.own()
        for plane, out in zip(self.now, new, strict=True):
            torch.add(gray, plane, alpha=factor, out=out)
        self.now = new

    def turn_hue(self, turns: float) -> None:
        sextants = 6 * turns
        # thirds of a turn are an exchange of channels; -1 to 1 sextants are left
        thirds = round(sextants / 2)
        sextants -= 2 * thirds
        planes = [self.now[(k - thirds) % 3] for k in range(3)]
        new = self.two if self.now is self.one else self.one
        low, mid, top, step, side = self.scratch
        a, b, c = planes
        torch.minimum(a, b, out=low)
        torch.maximum(a, b, out=top)
        torch.minimum(top, c, out=mid)
        torch.maximum(mid, low, out=mid).neg_()
        torch.minimum(low, c, out=low)
        torch.maximum(top, c, out=top)
        torch.sub(top, low, out=step).mul_(abs(sextants))
        for k, out in enumerate(new):
            # clamp(2 c - mid -+ step, low, top): README.md
            torch.sub(planes[(k + 1) % 3], planes[(k + 2) % 3], out=side)
            torch.copysign(step, side, out=side)
            torch.add(mid, planes[k], alpha=2, out=out).sub_(side, alpha=1 if sextants > 0 else -1)
            torch.clamp(out, low, top, out=out)
        self.now = new


def color_views_by_image(
    images: Tensor,
    params: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
    layout: str = "nchw",
    patch: int = 0,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as `color_views`, on a CPU; computed in fp32 (fp64 for fp64), on the calling thread."""
    batch, height, width, _ = images.shape
    pixels = height * width
    if channels == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    # pieces of nearly the same size
    size = -(-pixels // max(1, -(-pixels // PIECE)))
    scratch = torch.empty(5, size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    out = torch.empty(2, batch, channels, pixels, dtype=dtype)
    pieces = [_Piece(min(size, pixels - i), scratch) for i in range(0, pixels, size)]
    for image, coins, targets in zip(images, params.tolist(), out.unbind(1), strict=True):
        for piece, part in zip(pieces, image.reshape(pixels, 3).split(size), strict=True):
            for k, plane in enumerate(piece.crop):
                plane.copy_(part[:, k])
        for row, target in zip(coins, targets, strict=True):
            _view(pieces, row, target.split(size, 1), mean, std)
    views = out.view(2, batch, channels, height, width).unbind(0)
    return tuple(in_patches(v, patch) if layout == "patches" else v for v in views)  # type: ignore[return-value]


def _view(
    pieces: list[_Piece],
    row: list[float],
    targets: Sequence[Tensor],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """One view of the image that lies in the pieces' crops.

    row      its coins, as of `color_params`
    targets  [C, pixels] of each piece
    """
    for piece in pieces:
        piece.now = piece.crop
    scale, offset = _jitter(pieces, row[FACTORS], row[ORDER]) if row[ON] > 0 else (1.0, 0.0)
    # level = scale * plane + offset, and the view is (level / 255 - mean) / std
    scales = [scale / 255 / s for s in std]
    shifts = [(offset / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    # tensors without dimensions, as torch.add scales its second argument only
    added = torch.tensor(shifts, dtype=pieces[0].crop[0].dtype).unbind(0)
    for piece, target in zip(pieces, targets, strict=True):
        gray = row[GRAY_ON] > 0 or len(std) == 1
        planes = [piece.gray()] * len(std) if gray else piece.now
        for plane, shift, by, out in zip(planes, added, scales, target.unbind(0), strict=True):
            torch.add(shift, plane, alpha=by, out=out)


def _jitter(pieces: list[_Piece], factors: list[float], order: list[float]) -> tuple[float, float]:
    """Applies the four operations in their order to all pieces; returns (scale, offset) of the result."""
    scale, offset = 1.0, 0.0
    pixels = sum(len(piece.crop[0]) for piece in pieces)
    for op in map(int, order):
        factor = factors[op]
        if op == BRIGHTNESS:
            scale, offset = factor * scale, factor * offset
        elif op == CONTRAST:
            anchor = scale * sum(piece.gray_sum() for piece in pieces) / pixels + offset
            scale, offset = factor * scale, factor * offset + (1 - factor) * anchor
        for piece in pieces:
            if op == SATURATION:
                piece.saturate(factor)
            elif op == HUE:
                piece.turn_hue(factor)
        # up to 1 these are means of levels; a scale of 0 leaves one level
        if op != HUE and factor > 1 and scale > 0:
            for piece in pieces:
                piece.clamp(-offset / scale, (255 - offset) / scale)
    return scale, offset
