"""Plain PyTorch definitions of color_views: for a whole batch, and image by image for CPUs.

The semantics are torchvision's ColorJitter: images are floats in [0, 1], clamped after every operation; contrast
blends with the mean gray of the image right before the contrast step; hue is a rotation of HSV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._launch import constants
from .._philox import uniform
from ..patch_gather.reference import gather_patches

GRAY = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# columns of a parameter row [10]: color jitter on, four factors, gray, four operations in their order
ON, FACTORS, GRAY_ON, ORDER, COLUMNS = 0, slice(1, 5), 5, slice(6, 10), 10

# the streams of the student's and the teacher's view in the counter (extrema_fast.rng)
STREAMS = (2, 3)


def permutation(number: Tensor) -> Tensor:
    """[B] integers 0 to 23 -> [B, 4]: that permutation of 0..3 in lexicographic order, without a table."""
    first, second, third = number // 6, number % 6 // 2, number % 2
    second = second + (second >= first)
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    third = third + (third >= low)
    third = third + (third >= high)
    return torch.stack([first, second, third, 6 - first - second - third], 1)


def factor_range(strength: Sequence[float], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Least and largest factors [4] fp32 of brightness, contrast, saturation and hue."""
    width = constants(strength, torch.float32, device)
    centre = constants((1.0, 1.0, 1.0, 0.0), torch.float32, device)
    return torch.cat([(centre - width)[:3].clamp_min(0), -width[3:]]), centre + width


def color_params_reference(
    index: Tensor,
    strength: tuple[float, float, float, float],
    jitter_prob: float,
    gray_prob: float,
    *,
    seed: int,
    epoch: int,
    streams: tuple[int, int] = STREAMS,
) -> Tensor:
    """Arguments and result as `color_params`."""
    low, most = factor_range(strength, index.device)
    views = []
    for stream in streams:
        u = uniform(index, 8, seed=seed, epoch=epoch, stream=stream)
        on, gray = (u[:, :1] < jitter_prob).float(), (u[:, 6:7] < gray_prob).float()
        factors = low + u[:, 1:5] * (most - low)
        views.append(torch.cat([on, factors, gray, permutation((u[:, 5] * 24).long()).float()], 1))
    return torch.stack(views, 1)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], in_chans: int = 3) -> Tensor:
    """Normalizes images to fp32, (x / 255 - mean) / std.

    Args:
        images: uint8 [B, H, W, C], of RGB for C 1.
        mean: of the images' channels, in [0, 1].
        std: standard deviation of the images' channels.
        in_chans: C; 1 takes the gray value, the mean of `mean` and the mean of `std`.

    Returns:
        [B, C, H, W].
    """
    return _finish(images.permute(0, 3, 1, 2).float() / 255, mean, std, in_chans)


def _finish(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...], in_chans: int) -> Tensor:
    if in_chans == 1:
        x, mean, std = _gray(x), (sum(mean) / 3,), (sum(std) / 3,)
    m, s = (constants(v, x.dtype, x.device).view(1, -1, 1, 1) for v in (mean, std))
    return ((x - m) / s).contiguous()


def _gray(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    return (GRAY[0] * r + GRAY[1] * g + GRAY[2] * b)[:, None]


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """HSV rotation: hue += shift (turns) at fixed saturation and value; x [B, 3, H, W], shift [B, 1, 1]."""
    r, g, b = x.unbind(1)
    top, low = x.amax(1), x.amin(1)
    spread = top - low
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    hue = torch.where(top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = torch.remainder(hue / 6 + shift, 1.0)
    # V S = spread, so saturation itself is not needed
    n = constants((5.0, 3.0, 1.0), x.dtype, x.device).view(1, 3, 1, 1)
    k = torch.remainder(n + 6 * hue[:, None], 6)
    return top[:, None] - spread[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """x [B, 3, H, W] after the four operations, with factors [B, 4] in order [B, 4], clamped to [0, 1] after each."""
    f = factors.to(x.dtype).view(-1, 4, 1, 1, 1)
    by_rows = x.device.type == "cpu" and not torch.compiler.is_compiling()
    for place in range(4):
        out = x
        for op in range(4):
            hit = order[:, place] == op
            if not by_rows:
                # to know which rows take this operation, the CPU would wait for the device: all are computed
                out = torch.where(hit.view(-1, 1, 1, 1), _apply(x, op, f[:, op]), out)
            elif len(rows := hit.nonzero()[:, 0]):
                out = out.index_copy(0, rows, _apply(x[rows], op, f[rows, op]))
        x = out.clamp(0, 1)
    return x


def _apply(x: Tensor, op: int, factor: Tensor) -> Tensor:
    if op == BRIGHTNESS:
        return x * factor
    if op == HUE:
        return _shift_hue(x, factor[:, :, 0])
    gray = _gray(x)
    anchor = gray.mean((2, 3), keepdim=True) if op == CONTRAST else gray
    return factor * x + (1 - factor) * anchor


def color_views_reference(
    images: Tensor,
    params: Tensor | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
    patch: int = 0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as `color_views`, computed in fp32 (fp64 for fp64)."""
    if params is None:
        return _in_patches(_normalized(images, mean, std, channels, dtype), patch, keep)
    crops = images.movedim(-1, -3).to(torch.float64 if dtype == torch.float64 else torch.float32) / 255
    out = []
    for x, p in zip(_of_views(crops), params.unbind(1)):
        on = p[:, ON] > 0
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            rows = on.nonzero()[:, 0]
            y = x.index_copy(0, rows, jitter(x[rows], p[rows, FACTORS], p[rows, ORDER].long()))
        else:
            y = torch.where(on.view(-1, 1, 1, 1), jitter(x, p[:, FACTORS], p[:, ORDER].long()), x)
        y = torch.where((p[:, GRAY_ON] > 0).view(-1, 1, 1, 1), _gray(y).expand_as(y), y)
        out.append(_finish(y, mean, std, channels).to(dtype))
    return _in_patches(out, patch, keep)


def _of_views(images: Tensor) -> tuple[Tensor, Tensor]:
    """Student's and teacher's crops: those of [B, 2, ...], or the same ones twice."""
    if images.dim() == 4:
        return images, images
    student, teacher = images.unbind(1)
    return student, teacher


def _normalized(
    images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    crops = images.flatten(0, -4)
    if dtype == torch.float64:
        x = _finish(crops.permute(0, 3, 1, 2).double() / 255, mean, std, channels)
    else:
        x = normalize(crops, mean, std, channels).to(dtype)
    return _of_views(x.unflatten(0, images.shape[:-3]))


def _in_patches(views: Sequence[Tensor], patch: int, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    student, teacher = views
    if not patch:
        return student, teacher
    return gather_patches(student, keep, patch), gather_patches(teacher, None, patch)


# ---- image by image, for CPUs ----------------------------------------------------------------------

# torch splits an operation above this many elements over its threads, which costs more than it saves for so little
# work, and decoding needs the other cores
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
        return sum(w * float(plane.sum()) for w, plane in zip(GRAY, self.now))

    def clamp(self, low: float, high: float) -> None:
        new = self.own()
        for plane, out in zip(self.now, new):
            torch.clamp(plane, low, high, out=out)
        self.now = new

    def saturate(self, factor: float) -> None:
        gray, new = self.gray().mul_(1 - factor), self.own()
        for plane, out in zip(self.now, new):
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
    patch: int = 0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as `color_views`, on a CPU; equal to `color_views_reference` up to rounding.

    Computed in fp32 (fp64 for fp64) on the calling thread, in planes that stay in the cache, and only what an image's
    parameters ask for (README.md). Brightness and contrast are numbers (scale, offset) carried along until something
    needs the pixels; a clamp is left out where values cannot leave their range.
    """
    batch, (height, width) = images.shape[0], images.shape[-3:-1]
    pixels = height * width
    if channels == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    # pieces of nearly the same size
    size = -(-pixels // max(1, -(-pixels // PIECE)))
    scratch = torch.empty(5, size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    out = torch.empty(2, batch, channels, pixels, dtype=dtype)
    pieces = [_Piece(min(size, pixels - i), scratch) for i in range(0, pixels, size)]
    for image, rows, targets in zip(images, params.tolist(), out.unbind(1)):
        for view, (row, target) in enumerate(zip(rows, targets)):
            if view == 0 or image.dim() == 4:
                crop = image[view] if image.dim() == 4 else image
                for piece, part in zip(pieces, crop.reshape(pixels, 3).split(size)):
                    for k, plane in enumerate(piece.crop):
                        plane.copy_(part[:, k])
            _view(pieces, row, target.split(size, 1), mean, std)
    return _in_patches(out.view(2, batch, channels, height, width).unbind(0), patch, keep)


def _view(
    pieces: list[_Piece],
    row: list[float],
    targets: Sequence[Tensor],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """One view, with the parameters `row`, of the image in the pieces' crops, into `targets` ([C, pixels] each)."""
    for piece in pieces:
        piece.now = piece.crop
    scale, offset = _jitter(pieces, row[FACTORS], row[ORDER]) if row[ON] > 0 else (1.0, 0.0)
    # level = scale * plane + offset, and the view is (level / 255 - mean) / std
    scales = [scale / 255 / s for s in std]
    shifts = [(offset / 255 - m) / s for m, s in zip(mean, std)]
    # tensors without dimensions, as torch.add scales its second argument only
    added = torch.tensor(shifts, dtype=pieces[0].crop[0].dtype).unbind(0)
    for piece, target in zip(pieces, targets):
        gray = row[GRAY_ON] > 0 or len(std) == 1
        planes = [piece.gray()] * len(std) if gray else piece.now
        for plane, shift, by, out in zip(planes, added, scales, target.unbind(0)):
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


# ---- the choice ------------------------------------------------------------------------------------

# images of fewer pixels are computed all together on a CPU: calls cost more than their arithmetic
FEW_PIXELS = 48 * 48


def color_views_plain(
    images: Tensor, params: Tensor | None, mean: tuple[float, ...], std: tuple[float, ...], **options: Any
) -> tuple[Tensor, Tensor]:
    """`color_views` in plain torch: image by image on a CPU, where that is faster, else the batch definition."""
    many = images.shape[-3] * images.shape[-2] >= FEW_PIXELS
    on_cpu = images.device.type == "cpu" and not torch.compiler.is_compiling()
    if params is not None and many and on_cpu:
        return color_views_by_image(images, params, mean, std, **options)
    return color_views_reference(images, params, mean, std, **options)
