"""color_views: the registered op and the public function (README.md). Images take no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _launch
from .._check import check
from .by_image import color_views_by_image
from .reference import COLUMNS, color_views_reference

# tiles' sums are added by one program each
MAX_PIXELS = 1 << 22
# on a CPU, images of fewer pixels are computed all together: calls cost more than their arithmetic
FEW_PIXELS = 48 * 48

torch.library.define(
    "extrema_fast::color_views",
    "(Tensor images, Tensor params, float[] mean, float[] std, int channels, ScalarType dtype, int patch) -> Tensor",
)


@torch.library.impl("extrema_fast::color_views", "CompositeExplicitAutograd")
def _color_views(images, params, mean, std, channels, dtype, patch) -> Tensor:
    pixels = images.shape[1] * images.shape[2]
    if _launch.use_triton(images) and dtype != torch.float64 and pixels <= MAX_PIXELS:
        from .kernel import render

        return render(images, params, mean, std, channels, dtype, patch)
    layout = "patches" if patch else "nchw"
    return torch.stack(
        color_views_plain(
            images, params, mean, std, channels=channels, dtype=dtype, layout=layout, patch=patch
        )
    )


@torch.library.register_fake("extrema_fast::color_views")
def _fake(images, params, mean, std, channels, dtype, patch) -> Tensor:
    batch, height, width, _ = images.shape
    shape = (2, batch, channels, height, width)
    if patch:
        shape = (2, batch, (height // patch) * (width // patch), channels * patch**2)
    return images.new_empty(shape, dtype=dtype)


def color_views_plain(
    images: Tensor, params: Tensor, mean: tuple[float, ...], std: tuple[float, ...], **options: Any
) -> tuple[Tensor, Tensor]:
    """`color_views` in plain torch: image by image on a CPU, where that is faster, else the plain definition."""
    many = images.shape[1] * images.shape[2] >= FEW_PIXELS
    by_image = images.device.type == "cpu" and many and not torch.compiler.is_compiling()
    return (color_views_by_image if by_image else color_views_reference)(images, params, mean, std, **options)


def color_views(
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
    """Two colour-jittered, normalised versions of each crop (ExtreMA's "shared crop, two colours").

    images    [B, H, W, 3] uint8
    params    [B, 2, 10] fp32 of `color_params`: each view's coins, factors and order of operations
    mean, std of the three channels, in [0, 1]
    channels  3, or 1: the gray value, normalised with the mean of the means and of the deviations
    dtype     of the result: float32, bfloat16, float16 (float64: the plain definition)
    layout    `nchw`: [B, C, H, W]; `patches`: [B, N, C P P] with `patch` = P, as `patch_gather` reads it
    returns   (student's, teacher's), views of one tensor
    raises    TypeError, ValueError naming the argument
    falls back to the plain definition where Triton cannot run, for float64, above 4 million pixels
    maths     kernels/color_views/README.md
    """
    check("images", images, ("B", "H", "W", 3), (torch.uint8,))
    check("params", params, (images.shape[0], 2, COLUMNS), (torch.float32,), images, "see color_params")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean, std: expected three numbers each, got {mean} and {std}")
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    if layout not in ("nchw", "patches"):
        raise ValueError(f"layout: expected 'nchw' or 'patches', got {layout!r}")
    if layout == "patches" and (patch < 1 or images.shape[1] % patch or images.shape[2] % patch):
        raise ValueError(f"patch: {patch} does not divide the sides {tuple(images.shape[1:3])}")
    out = torch.ops.extrema_fast.color_views.default(
        images, params, list(mean), list(std), channels, dtype, patch if layout == "patches" else 0
    )
    return out[0], out[1]
