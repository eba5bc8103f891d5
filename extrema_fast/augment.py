"""Two colour-jittered views of one crop, on the device, with torchvision's ColorJitter semantics.

Each transformation is keyed by (seed, sample row, epoch, view), see `extrema_fast.rng`; images stay in [0, 1]
floats and are clamped after every operation (method.md section 5; data.md section 5).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from . import rng
from .config import DataConfig

_GRAY = (0.299, 0.587, 0.114)
_ORDERS = torch.tensor(list(itertools.permutations(range(4))))
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], in_chans: int = 3) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, C, H, W], (x / 255 - mean) / std.

    C = 1 takes the gray value, the mean of the means and the mean of the deviations.
    """
    return _finish(images.permute(0, 3, 1, 2).float() / 255, mean, std, in_chans)


def _finish(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...], in_chans: int) -> Tensor:
    if in_chans == 1:
        x, mean, std = _gray(x), (sum(mean) / 3,), (sum(std) / 3,)
    m, s = (torch.tensor(v, dtype=x.dtype, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
    return ((x - m) / s).contiguous()


def _gray(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    return (_GRAY[0] * r + _GRAY[1] * g + _GRAY[2] * b)[:, None]


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """HSV rotation: hue += shift (turns) at fixed saturation and value; x [B, 3, H, W], shift [B, 1, 1]."""
    r, g, b = x.unbind(1)
    top, low = x.amax(1), x.amin(1)
    spread = top - low
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    hue = torch.where(top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = torch.remainder(hue / 6 + shift, 1.0)
    # V S = spread, so saturation itself is not needed
    n = torch.tensor([5.0, 3.0, 1.0], device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
    k = torch.remainder(n + 6 * hue[:, None], 6)
    return top[:, None] - spread[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_params(index: Tensor, cfg: DataConfig, *, seed: int, epoch: int, stream: int) -> dict[str, Tensor]:
    """The coins of one view: `on`, `gray` [B] bool; `factors`, `order` [B, 4] as `jitter` takes them."""
    u = rng.uniform(index, 8, seed=seed, epoch=epoch, stream=stream)
    strength = torch.tensor(cfg.jitter, device=index.device)
    centre = torch.tensor([1.0, 1.0, 1.0, 0.0], device=index.device)
    low = torch.cat([(centre - strength)[:3].clamp_min(0), -strength[3:]])
    order = _ORDERS.to(index.device)[(u[:, 5] * 24).long()]
    return {
        "on": u[:, 0] < cfg.jitter_prob,
        "factors": low + u[:, 1:5] * (centre + strength - low),
        "order": order,
        "gray": u[:, 6] < cfg.gray_prob,
    }


def jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order, clamped to [0, 1] after each.

    x: [B, 3, H, W] in [0, 1];  factors: [B, 4], hue in turns;  order: [B, 4] permutation of 0..3
    """
    f = factors.to(x.dtype).view(-1, 4, 1, 1, 1)
    for place in range(4):
        out = x
        for op in range(4):
            rows = (order[:, place] == op).nonzero()[:, 0]
            if len(rows) == 0:
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
            out = out.index_copy(0, rows, part)
        x = out.clamp(0, 1)
    return x


def color_view(
    images: Tensor, index: Tensor, cfg: DataConfig, *, seed: int, epoch: int, stream: int, in_chans: int = 3
) -> Tensor:
    """One keyed colour version: uint8 [B, H, W, 3] -> fp32 normalised [B, C, H, W]."""
    x = images.permute(0, 3, 1, 2).float() / 255
    p = color_params(index, cfg, seed=seed, epoch=epoch, stream=stream)
    rows = p["on"].nonzero()[:, 0]
    if len(rows):
        x = x.index_copy(0, rows, jitter(x[rows], p["factors"][rows], p["order"][rows]))
    x = torch.where(p["gray"].view(-1, 1, 1, 1), _gray(x).expand_as(x), x)
    return _finish(x, cfg.mean, cfg.std, in_chans)


def color_views(
    images: Tensor, index: Tensor, cfg: DataConfig, *, seed: int, epoch: int, in_chans: int = 3
) -> tuple[Tensor, Tensor]:
    """(student image, teacher image): independent colour versions of the same crop, or the crop twice.

    images:  [B, H, W, 3] uint8;  index: [B] int64 sample rows on the same device
    returns  two fp32 tensors [B, C, H, W], normalised; the same tensor twice unless cfg.policy has colour
    """
    if cfg.policy != "spatial+color":
        x = normalize(images, cfg.mean, cfg.std, in_chans)
        return x, x
    student, teacher = (
        color_view(images, index, cfg, seed=seed, epoch=epoch, stream=stream, in_chans=in_chans)
        for stream in (rng.COLOR_STUDENT, rng.COLOR_TEACHER)
    )
    return student, teacher
