"""What `pack` does to one image: keep its bytes, or make it smaller and write a JPEG."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np

from ..config import MAX_PIXELS
from .verify import OK, check, reason

# extension in a shard of the kinds of `image_check.READ`
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "tiff": "tif", "bmp": "bmp", "pnm": "pnm"}
_ORIENTATION = 0x0112


class Packed(NamedTuple):
    """An image as it goes into a shard; width and height as stored, orientation the EXIF tag (1 to 8)."""

    data: bytes
    kind: str
    width: int
    height: int
    orientation: int


def pack_image(data: bytes, size: int, side: str, quality: int) -> Packed | str:
    """An image file's bytes as they are packed, or why they cannot be: every image is decoded once.

    size     its `side` ("short" or "long") becomes so many pixels where it has more; 0: bytes stay as they are
    quality  of the JPEG files written, 1 to 100

    A JPEG that is small enough keeps its bytes. Everything else becomes a JPEG of the pixels a loader sees
    (`load_rgb`): gray stays gray, CMYK, palettes and alpha become RGB, 16 bits become 8. Pixels
    are stored as they were, and so is the EXIF orientation, so that training may follow it or not.
    """
    from PIL import Image

    # all but the decoding, which comes below anyway
    found = check(data, lambda _: None, MAX_PIXELS)
    if found.status != OK:
        return found.status
    try:
        with Image.open(io.BytesIO(data)) as im:
            im.load()
            target = _target(im.size, size, side)
            if not size or (found.kind == "jpeg" and target == im.size):
                return Packed(data, found.kind, *im.size, found.orientation)
            small = _pixels(im).resize(target, Image.Resampling.BICUBIC)
            return Packed(_jpeg(small, quality, found.orientation), "jpeg", *target, found.orientation)
    # a broken file makes Pillow raise nearly anything
    except Exception as e:
        return f"cannot be decoded: {reason(e)}"


def _target(given: tuple[int, int], size: int, side: str) -> tuple[int, int]:
    """Width and height after resizing; never larger than before."""
    measured = min(given) if side == "short" else max(given)
    if not size or measured <= size:
        return given
    width, height = (max(1, round(n * size / measured)) for n in given)
    return width, height


def _pixels(im: Any) -> Any:
    """What a loader sees of an open PIL image, in one channel where its three are equal by kind."""
    from PIL import Image

    if im.mode.startswith("I"):
        # PIL's own conversion clips 16 bits at 255 instead of scaling them
        deep = np.asarray(im).astype(np.float64).clip(0, 65535)
        return Image.fromarray(np.rint(deep / 257).astype(np.uint8))
    return im.convert("L" if im.mode in ("1", "L", "LA", "La") else "RGB")


def _jpeg(im: Any, quality: int, orientation: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    options: dict[str, Any] = {"quality": quality}
    if orientation != 1:
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
        options["exif"] = exif
    im.save(out, "JPEG", **options)
    return out.getvalue()
