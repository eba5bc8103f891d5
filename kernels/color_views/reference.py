"""Plain PyTorch definition of color_views, with torchvision's ColorJitter semantics.

Images stay in [0, 1] floats and are clamped after every operation; contrast blends with the gray mean of the
image as it stands when contrast is reached; hue is a rotation of HSV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._launch import constants
from .._philox import uniform

GRAY = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# columns of a parameter row [10]: colour jitter on, four factors, gray, four operations in their order
ON, FACTORS, GRAY_ON, ORDER, COLUMNS = 0, slice(1, 5), 5, slice(6, 10), 10


def permutation(number: Tensor) -> Tensor:
    """[B] integers 0 to 23 -> [B, 4]: that permutation of 0..3 in lexicographic order, without a table."""
    first, second, third = number // 6, number % 6 // 2, number % 2
    second = second + (second >= first)
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    third = third + (third >= low)
    third = third + (third >= high)
    return torch.stack([first, second, third, 6 - first - second - third], 1)


def color_params(
    index: Tensor,
    strength: tuple[float, float, float, float],
    jitter_prob: float,
    gray_prob: float,
    *,
    seed: int,
    epoch: int,
    streams: tuple[int, int] = (2, 3),
) -> Tensor:
    """The coins of both views, keyed by sample; nothing is waited for.

    index:     [B] int64 global row numbers
    strength   of brightness, contrast, saturation (factor 1 - s to 1 + s) and hue (turns, -s to s)
    streams    of the student's and the teacher's coins
    returns    [B, 2, 10] fp32 on the index's device: on, b, c, s, h, gray, then a permutation of 0..3
    """
    width = constants(strength, torch.float32, index.device)
    centre = constants((1.0, 1.0, 1.0, 0.0), torch.float32, index.device)
    low = torch.cat([(centre - width)[:3].clamp_min(0), -width[3:]])
    views = []
    for stream in streams:
        u = uniform(index, 8, seed=seed, epoch=epoch, stream=stream)
        views.append(
            torch.cat(
                [
                    (u[:, :1] < jitter_prob).float(),
                    low + u[:, 1:5] * (centre + width - low),
                    (u[:, 6:7] < gray_prob).float(),
                    permutation((u[:, 5] * 24).long()).float(),
                ],
                1,
            )
        )
    return torch.stack(views, 1)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], in_chans: int = 3) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, C, H, W], (x / 255 - mean) / std.

    C = 1 takes the gray value, the mean of the means and the mean of the deviations.
    """
    return finish(images.permute(0, 3, 1, 2).float() / 255, mean, std, in_chans)


def finish(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...], in_chans: int) -> Tensor:
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
    """Brightness, contrast, saturation and hue in each image's own order, clamped to [0, 1] after each.

    x: [B, 3, H, W] in [0, 1];  factors: [B, 4], hue in turns;  order: [B, 4] permutation of 0..3
    """
    f = factors.to(x.dtype).view(-1, 4, 1, 1, 1)
    by_rows = x.device.type == "cpu" and not torch.compiler.is_compiling()
    for place in range(4):
        out = x
        for op in range(4):
            hit = order[:, place] == op
            # a CPU computes the rows that take this operation; elsewhere their number would have to be waited
            # for, so all are computed and the right ones taken
            rows = hit.nonzero()[:, 0] if by_rows else slice(None)
            if by_rows and len(rows) == 0:
                continue
            part, factor = x[rows], f[rows, op]
            if op == BRIGHTNESS:
                part = part * factor
            elif op == HUE:
                part = _shift_hue(part, factor[:, :, 0])
            else:
                gray = _gray(part)
                anchor = gray.mean((2, 3), keepdim=True) if op == CONTRAST else gray
                part = factor * part + (1 - factor) * anchor
            out = out.index_copy(0, rows, part) if by_rows else torch.where(hit.view(-1, 1, 1, 1), part, out)
        x = out.clamp(0, 1)
    return x


def color_views_reference(
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
    """Arguments and result as `color_views`, computed in fp32 (fp64 for fp64)."""
    x = images.permute(0, 3, 1, 2).to(torch.float64 if dtype == torch.float64 else torch.float32) / 255
    out = []
    for p in params.unbind(1):
        on = p[:, ON] > 0
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            rows = on.nonzero()[:, 0]
            y = x.index_copy(0, rows, jitter(x[rows], p[rows, FACTORS], p[rows, ORDER].long()))
        else:
            y = torch.where(on.view(-1, 1, 1, 1), jitter(x, p[:, FACTORS], p[:, ORDER].long()), x)
        y = torch.where((p[:, GRAY_ON] > 0).view(-1, 1, 1, 1), _gray(y).expand_as(y), y)
        y = finish(y, mean, std, channels).to(dtype)
        out.append(in_patches(y, patch) if layout == "patches" else y.contiguous())
    return out[0], out[1]


def in_patches(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C P P], contiguous: patch-major, as `patch_gather` reads it."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, -1, c * patch**2).contiguous()
