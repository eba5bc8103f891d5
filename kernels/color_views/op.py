"""color_views and color_params: the registered ops and the public functions (README.md). Images take no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _launch
from .._launch import check, check_keep
from .reference import COLUMNS, STREAMS, color_params_reference, color_views_plain

# tiles' sums are added by one program each
MAX_PIXELS = 1 << 22


@_launch.op(
    "color_params(Tensor index, float[] strength, float jitter_prob, float gray_prob, int seed, int epoch, "
    "int[] streams) -> Tensor",
    "draw_params",
    # its products must not be fused, which only a launch of its own can say
    opaque=True,
)
def _params(index, strength, jitter_prob, gray_prob, seed, epoch, streams):
    return index.new_empty(index.shape[0], 2, COLUMNS, dtype=torch.float32)


def color_params(
    index: Tensor,
    strength: tuple[float, float, float, float],
    jitter_prob: float,
    gray_prob: float,
    *,
    seed: int,
    epoch: int,
    streams: tuple[int, int] = STREAMS,
) -> Tensor:
    """Random parameters of both views, keyed by sample; nothing is read back by the CPU.

    Runs the plain PyTorch definition where Triton cannot run.

    Args:
        index: [B] int64, global row numbers of the images.
        strength: s of brightness, contrast, saturation (factors from 1 - s to 1 + s) and hue (turns, -s to s).
        jitter_prob: probability of color jitter.
        gray_prob: probability of gray.
        seed: 64-bit seed of the generator.
        epoch: part of the generator's counter.
        streams: the generator's streams of the student's and the teacher's view.

    Returns:
        [B, 2, 10] fp32 on the index's device: on, b, c, s, h, gray, then a permutation of 0..3; the same bits on every
        device.

    Raises:
        TypeError: `index` is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    check("index", index, ("B",), (torch.int64,), hint="global row numbers")
    if len(strength) != 4:
        raise ValueError(f"strength: expected four numbers, got {strength}")
    if not _launch.use_triton(index):
        return color_params_reference(
            index, strength, jitter_prob, gray_prob, seed=seed, epoch=epoch, streams=streams
        )
    return _params(index, list(strength), jitter_prob, gray_prob, seed, epoch, list(streams))


@_launch.op(
    "color_views(Tensor images, Tensor? params, Tensor? keep, float[] mean, float[] std, int channels, int patch, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    "render",
)
def _views(images, params, keep, mean, std, channels, patch, dtype):
    batch, (height, width) = images.shape[0], images.shape[-3:-1]
    if not patch:
        shapes = ((batch, channels, height, width),) * 2
    else:
        n, numbers = (height // patch) * (width // patch), channels * patch**2
        views, kept = (1, n) if keep is None else (keep.shape[0], keep.shape[2])
        shapes = ((views * batch, kept, numbers), (batch, n, numbers))
    return tuple(images.new_empty(shape, dtype=dtype) for shape in shapes)


def color_views(
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
    """Color-jittered, normalized views of student and teacher: two of one crop, or one each of two crops.

    Maths: README.md in this folder. Runs the plain PyTorch definition where Triton cannot run, for float64, above
    4 million pixels and for other channels than RGB.

    Args:
        images: [B, H, W, 3] uint8, or [B, H, W, C] with `channels` C; [B, 2, H, W, C]: the student's crop of each
            image, and the teacher's.
        params: [B, 2, 10] fp32, of `color_params`; None: both are only normalized.
        mean: of the images' channels, in [0, 1].
        std: standard deviation of the images' channels.
        channels: 3; 1: the gray value of RGB, normalized with the mean of `mean` and of `std`; another number C: as
            they are, without `params`.
        dtype: of the result: float32, bfloat16, float16 or float64.
        patch: P: the result is cut into patches of P x P pixels, whose numbers run (channel, row, column) as in the
            weight of a patch convolution; 0: images.
        keep: [V, B, K] int32 (int64 is converted) in [0, N): the student's patches, in this order; None: all. Indices
            are checked on a CPU, elsewhere with EXTREMA_FAST_CHECK=1.

    Returns:
        (student's, teacher's), each [B, C, H, W]; with `patch` [V B, K, C P P], row v B + b, and [B, N, C P P], as
        `patch_gather` takes them.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    colors = 3 if channels == 1 else channels
    crops = (2,) if isinstance(images, Tensor) and images.dim() == 5 else ()
    check("images", images, ("B", *crops, "H", "W", colors), (torch.uint8,))
    if params is not None and colors != 3:
        raise ValueError(f"params: color jitter is defined for RGB, got {channels} channels; use params=None")
    if params is not None:
        check("params", params, (images.shape[0], 2, COLUMNS), (torch.float32,), images, "see color_params")
    if len(mean) != colors or len(std) != colors:
        raise ValueError(f"mean, std: expected {colors} numbers each, got {mean} and {std}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    batch, (height, width) = images.shape[0], images.shape[-3:-1]
    if patch < 0 or (patch and (height % patch or width % patch)):
        raise ValueError(f"patch: expected 0 or a divisor of {height} and {width}, got {patch}")
    if keep is not None:
        if not patch:
            raise ValueError("keep: needs `patch`, the side of the patches it counts")
        keep = check_keep(keep, batch, (height // patch) * (width // patch), images)
        if keep.shape[0] == 0 or keep.shape[2] == 0:
            raise ValueError(f"keep: expected [V, B, K] with V and K from 1, got {list(keep.shape)}")
    plain = colors != 3 or dtype == torch.float64 or height * width > MAX_PIXELS
    if plain or not _launch.use_triton(images):
        options = {"channels": channels, "dtype": dtype, "patch": patch, "keep": keep}
        return color_views_plain(images, params, mean, std, **options)
    return _views(images, params, keep, list(mean), list(std), channels, patch, dtype)
