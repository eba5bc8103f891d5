"""Images of more than 8 bits: which of their values are black and white, and the 8-bit image that training reads.

Which range a data set uses cannot be seen in one file (12-bit data lie in 16-bit files, floats have any unit), so it
belongs to the set: `index` finds it, `data.range` gives it. Imports no torch, for processes that decode.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ..errors import UsageError

log = logging.getLogger(__name__)

# the bits that cameras and scanners give, of whole numbers
_BITS = (8, 10, 12, 14, 16)
Range = tuple[float, float]
# of floats and of whole numbers, where nothing is known of the set
USUAL = ((0.0, 1.0), (0.0, 65535.0))
_warned = False


def is_deep(im: Any) -> bool:
    """Whether a PIL image has more than 8 bits per channel (modes I, I;16, F)."""
    return im.mode[0] in "IF"


def extremes(im: Any) -> Range:
    """The smallest and the largest finite value of a deep PIL image."""
    values = np.asarray(im)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def natural_range(low: float, high: float) -> Range:
    """(black, white) for values between `low` and `high`: 0 to 1, 0 to the largest number of 8 to 16 bits, or those."""
    if low < 0 or high > 2 ** _BITS[-1] - 1:
        return low, high
    if high <= 1:
        return 0.0, 1.0
    return 0.0, float(next(2**bits - 1 for bits in _BITS if high <= 2**bits - 1))


def to_8_bit(im: Any, value_range: Range | None = None, name: str = "") -> Any:
    """A deep PIL image as 8 bits: `value_range` (black, white) becomes 0 to 255, values outside are clipped.

    Any other image is returned as it is. Without a range whole numbers are 0 to 65535, floats 0 to 1.

    Raises:
        UsageError: floats outside 0..1 without a range.
    """
    if not is_deep(im):
        return im
    values = np.asarray(im)
    if value_range is None:
        low, high = extremes(im)
        if values.dtype.kind == "f":
            if low < 0 or high > 1:
                raise UsageError(
                    f"floats from {low:g} to {high:g}: which are black and white? give data.range, or list the images "
                    "with `extrema-fast index`, which finds it"
                )
            value_range = USUAL[0]
        else:
            value_range = USUAL[1]
            _warn_once(name, high)
    black, white = value_range
    scaled = (np.nan_to_num(values.astype(np.float64), nan=black, posinf=white, neginf=black) - black) * (
        255 / (white - black)
    )
    from PIL import Image

    return Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8))


def _warn_once(name: str, high: float) -> None:
    global _warned
    # less than 13 of 16 bits: nearly black
    if not _warned and 255 < high < 4096:
        _warned = True
        log.warning(
            "%s: the largest value of this 16-bit image is %g, so it is nearly black; if that is so in all of them, "
            "give data.range 0 %g, or list the images with `extrema-fast index`, which finds it",
            name or "image", high, natural_range(0, high)[1],
        )  # fmt: skip
