"""From a picture to the encoder's input, with the numbers the weights were trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import normalize
from .errors import UsageError

CROP_PCT = 224 / 256


def resize_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Short side to size * 256 / 224 (bilinear, antialiased), then the centre.

    image:   [H, W, 3] uint8;  size: (height, width) of the result
    returns  [height, width, 3] uint8; an image of exactly that size is returned as it is
    """
    h, w = image.shape[:2]
    if (h, w) == size:
        return image
    # the smallest scale at which the enlarged target box still fits
    scale = max(round(s / CROP_PCT) / side for s, side in zip(size, (h, w), strict=True))
    new = [max(t, round(side * scale)) for side, t in zip((h, w), size, strict=True)]
    x = F.interpolate(image.permute(2, 0, 1)[None].float(), size=new, mode="bilinear", antialias=True)
    top, left = (new[0] - size[0]) // 2, (new[1] - size[1]) // 2
    x = x[0, :, top : top + size[0], left : left + size[1]]
    return x.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


class Preprocess:
    """PIL image or uint8 [H, W, 3] tensor -> fp32 [C, H, W]; see `Encoder.preprocess`."""

    def __init__(
        self, size: tuple[int, int], in_chans: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        if in_chans not in (1, 3):
            raise UsageError(
                f"preprocess: pictures have 3 channels or 1 (gray), this encoder takes {in_chans}"
            )
        self.size, self.in_chans, self.mean, self.std = size, in_chans, tuple(mean), tuple(std)

    @property
    def metadata(self) -> dict:
        """input_size (C, H, W), mean, std, interpolation, crop_pct."""
        return {
            "input_size": (self.in_chans, *self.size),
            "mean": self.mean,
            "std": self.std,
            "interpolation": "bilinear",
            "crop_pct": CROP_PCT,
        }

    def __call__(self, image) -> Tensor:
        if not isinstance(image, Tensor):
            if not hasattr(image, "convert"):
                raise UsageError(
                    f"image: expected a PIL image or a uint8 tensor [H, W, 3], got {type(image).__name__}"
                )
            rgb = image.convert("RGB")
            pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
            image = pixels.view(rgb.height, rgb.width, 3)
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] != 3:
            raise UsageError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        return normalize(resize_crop(image, self.size)[None], self.mean, self.std, self.in_chans)[0]

    def __repr__(self) -> str:
        return f"Preprocess({self.metadata})"
