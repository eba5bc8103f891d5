"""Preprocessing of single images: resize, center crop and normalize, with the values used to train the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from .augment import normalize
from .pixels import Range, as_image, bands, is_deep, to_8_bit, to_levels

CROP_PCT = 224 / 256
INTERPOLATIONS = ("bilinear", "bicubic")


class Resizing(NamedTuple):
    """How an image of any size is resized and center-cropped to the encoder's size, as in timm.

    Attributes:
        crop_pct: the short side is resized to size / crop_pct; 1: images are already cropped.
        interpolation: `bilinear` or `bicubic`, antialiased.
        keep_exact: images of exactly the encoder's size are not resized, as in older versions.
        whole: resize the whole image without cropping, ignoring its aspect ratio.
    """

    crop_pct: float = CROP_PCT
    interpolation: str = "bilinear"
    keep_exact: bool = False
    whole: bool = False

    def __str__(self) -> str:
        if self.whole:
            text = "resized whole to the encoder's size"
        elif self.crop_pct == 1:
            text = "resized to the encoder's size, the longer side cut"
        else:
            text = f"resized to 1 / {self.crop_pct:g} of the encoder's size, center-cropped"
        return text + (
            ", except those of exactly that size, which are taken whole" if self.keep_exact else ""
        )


# of weights that say nothing of `crop_mode` (older versions), and of training without random crops
KEEP_EXACT = Resizing(keep_exact=True)


def check_crop_pct(crop_pct: float, name: str = "crop_pct") -> float:
    """Returns `crop_pct`; raises UsageError unless it is above 0 and at most 1."""
    if not 0 < crop_pct <= 1:
        raise UsageError(f"{name}: expected above 0, to 1 (images are already cropped), got {crop_pct}")
    return crop_pct


def resize_crop(
    image: Tensor, size: tuple[int, int], interpolation: str = "bilinear", crop_pct: float = CROP_PCT
) -> Tensor:
    """Resizes the short side to size / crop_pct, antialiased, and crops the center, as in timm.

    Args:
        image: [H, W, C] uint8.
        size: (height, width) of the result.
        interpolation: `bilinear` or `bicubic`.
        crop_pct: as in `Resizing`; by default the short side becomes size * 256 / 224.

    Returns:
        [height, width, C] uint8.
    """
    new = scaled_size(image.shape[:2], size, crop_pct)
    x = image.permute(2, 0, 1)
    if new != tuple(image.shape[:2]):
        x = F.interpolate(x[None].float(), size=new, mode=interpolation, antialias=True)[0]
    top, left = center_of(new, size)
    x = x[:, top : top + size[0], left : left + size[1]]
    return x.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def scaled_size(old: Sequence[int], size: tuple[int, int], crop_pct: float = CROP_PCT) -> tuple[int, int]:
    """(height, width) before the crop: the smallest size of the same aspect ratio that covers size / crop_pct."""
    box = [math.floor(s / crop_pct) for s in size]
    # torchvision cuts the long side, timm rounds both where the box is not square
    whole = int if size[0] == size[1] else round
    short = min(range(2), key=lambda i: old[i] / box[i])
    new = [whole(side * box[short] / old[short]) for side in old]
    new[short] = box[short]
    return max(new[0], size[0]), max(new[1], size[1])


def center_of(scaled: Sequence[int], size: tuple[int, int]) -> tuple[int, int]:
    """(top, left) of a center crop of `size` in an image of (height, width) `scaled`."""
    # round half to even, as torchvision does
    top, left = (round((n - s) / 2) for n, s in zip(scaled, size, strict=True))
    return top, left


def _per_channel(name: str, values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    if len(values) == in_chans:
        return tuple(values)
    if len(values) == 1:
        return tuple(values) * in_chans
    # the gray value of RGB has the mean of the means
    if in_chans == 1 and len(values) == 3:
        return (sum(values) / 3,)
    raise UsageError(
        f"preprocess: this encoder takes {in_chans} channels, {name} has {len(values)} entries; "
        f"set encoder.{name} to {in_chans} numbers"
    )


class Preprocess:
    """Converts an image (PIL, NumPy array or uint8 tensor) to normalized fp32 [C, H, W]; see `Encoder.preprocess`.

    Arrays are [H, W] or [H, W, C] of any integer or float dtype; tensors are uint8 [H, W, C].

    Args:
        size: (height, width) of the result.
        in_chans: 3; 1 for gray, computed from RGB or from a single channel; or another number, which requires images
            with as many channels.
        mean: pixel mean, one value or one per channel.
        std: pixel standard deviation, one value or one per channel.
        interpolation: `bilinear` or `bicubic`.
        crop_pct: as in `Resizing`.
        value_range: black and white for images with more than 8 bits (`pixels.Range`); None: 0 to 65535, and 0 to 1 for
            floats.
    """

    def __init__(
        self,
        size: tuple[int, int],
        in_chans: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bilinear",
        crop_pct: float = CROP_PCT,
        value_range: Range | None = None,
    ) -> None:
        if interpolation not in INTERPOLATIONS:
            raise UsageError(
                f"preprocess: interpolation: expected 'bilinear' or 'bicubic', got {interpolation!r}"
            )
        check_crop_pct(crop_pct, "preprocess: crop_pct")
        self.size, self.in_chans = (size[0], size[1]), in_chans
        self.mean, self.std = _per_channel("mean", mean, in_chans), _per_channel("std", std, in_chans)
        self.interpolation, self.crop_pct, self.value_range = interpolation, crop_pct, value_range

    @property
    def metadata(self) -> dict[str, Any]:
        """The transform's input_size (C, H, W), mean, std, interpolation and crop_pct."""
        return {
            "input_size": (self.in_chans, *self.size),
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
        }

    def __call__(self, image: Any) -> Tensor:
        whole = isinstance(image, Tensor)
        if not whole:
            image = self._cropped(image)
        channels = (1, 3) if self.in_chans == 1 else (self.in_chans,)
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] not in channels:
            raise UsageError(
                f"image: expected uint8 [H, W, {channels[-1]}], got {image.dtype} {list(image.shape)}"
            )
        pixels, mean, std = image, self.mean, self.std
        if self.in_chans == 1:
            # as RGB, which `normalize` makes gray
            pixels, mean, std = image.expand(-1, -1, 3), mean * 3, std * 3
        if whole:
            pixels = resize_crop(pixels, self.size, self.interpolation, self.crop_pct)
        return normalize(pixels[None], mean, std, self.in_chans)[0]

    def _cropped(self, image: Any) -> Tensor:
        """The pixels of an image after resize and crop by Pillow, byte for byte those of timm's transform."""
        im = self._in_8_bits(image)
        (height, width), new = self.size, scaled_size((im.height, im.width), self.size, self.crop_pct)
        top, left = center_of(new, self.size)
        if new != (im.height, im.width):
            from PIL import Image

            im = im.resize(new[::-1], Image.Resampling[self.interpolation.upper()])
        return torch.from_numpy(np.array(im.crop((left, top, left + width, top + height))))

    def _in_8_bits(self, image: Any) -> Any:
        """Converts a PIL image or an array to an RGB PIL image, or to `Planes` for other channels."""
        colors = self.in_chans in (1, 3)
        if hasattr(image, "convert"):
            if colors:
                return to_8_bit(image, self.value_range).convert("RGB")
            deep, values = is_deep(image), bands(image)
        elif isinstance(image, np.ndarray):
            deep, values = True, image
        else:
            raise UsageError(
                "image: expected a PIL image, an array or a uint8 tensor [H, W, C], got "
                f"{type(image).__name__}"
            )
        values = values[..., None] if values.ndim == 2 else values
        found = values.shape[2] if values.ndim == 3 else 0
        if found not in ((1, 3) if colors else (self.in_chans,)) or values.dtype.kind not in "buif":
            raise UsageError(
                f"image: this encoder takes {self.in_chans} channels, expected numbers [H, W, {self.in_chans}], got "
                f"{values.dtype} {list(values.shape)}"
            )
        im = as_image(to_levels(values, self.value_range if deep else None))
        return im.convert("RGB") if colors else im

    def __repr__(self) -> str:
        return f"Preprocess({self.metadata})"
