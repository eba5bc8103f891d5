"""color_views: the registered op and the public function (README.md). Images take no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _launch
from .._launch import check
from .reference import COLUMNS, color_views_plain

# tiles' sums are added by one program each
MAX_PIXELS = 1 << 22


@_launch.op(
    "color_views(Tensor images, Tensor params, float[] mean, float[] std, int channels, ScalarType dtype) -> Tensor",
    "render",
)
def _views(images, params, mean, std, channels, dtype):
    batch, height, width, _ = images.shape
    return images.new_empty(2, batch, channels, height, width, dtype=dtype)


def color_views(
    images: Tensor,
    params: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Two color-jittered, normalized versions of each crop, ExtreMA's student and teacher view of a shared crop.

    Maths: README.md in this folder. Runs the plain PyTorch definition where Triton cannot run, for float64 and above
    4 million pixels.

    Args:
        images: [B, H, W, 3] uint8.
        params: [B, 2, 10] fp32, of `color_params`.
        mean: of the three channels, in [0, 1].
        std: standard deviation of the three channels.
        channels: 3, or 1: the gray value, normalized with the mean of `mean` and of `std`.
        dtype: of the result: float32, bfloat16, float16 or float64.

    Returns:
        (student's, teacher's), each [B, C, H, W].

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    check("images", images, ("B", "H", "W", 3), (torch.uint8,))
    check("params", params, (images.shape[0], 2, COLUMNS), (torch.float32,), images, "see color_params")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean, std: expected three numbers each, got {mean} and {std}")
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    pixels = images.shape[1] * images.shape[2]
    if not _launch.use_triton(images) or dtype == torch.float64 or pixels > MAX_PIXELS:
        return color_views_plain(images, params, mean, std, channels=channels, dtype=dtype)
    out = _views(images, params, list(mean), list(std), channels, dtype)
    return out[0], out[1]
