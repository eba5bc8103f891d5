"""Converts images with more than 8 bits, or with channels other than RGB, to the 8-bit images used in training.

A single file does not show which values are black and white (12-bit data is stored in 16-bit files, floats have any
unit), so a range belongs to the data set: `index` measures it, `data.range` sets it. Arrays are .npy files and
multi-channel TIFF files. Imports no torch, for the decoding processes.
"""

from __future__ import annotations

import functools
import importlib
import io
import logging
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np

from ..config import MAX_CHANS
from ..errors import UsageError, install

log = logging.getLogger(__name__)

# the bits that cameras and scanners give, of whole numbers
_BITS = (8, 10, 12, 14, 16)
# black and white; or black and white of each channel in turn
Range = tuple[float, ...]
# of floats and of whole numbers, where nothing is known of the set
USUAL = ((0.0, 1.0), (0.0, 65535.0))
# modes of PIL images whose channels are computed from others
PALETTES = ("P", "PA", "HSV", "LAB", "YCbCr")
NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WIDTH_TAG, _HEIGHT_TAG, _BITS_TAG, _ORIENTATION_TAG, _SAMPLES_TAG = 256, 257, 258, 274, 277
_warned = False


# ---- range ----------------------------------------------------------------------------------------


def is_deep(im: Any) -> bool:
    """Whether a PIL image has more than 8 bits per channel (modes I, I;16, F)."""
    return im.mode[0] in "IF"


def extremes(values: Any) -> tuple[float, float]:
    """The smallest and the largest finite value of an array or a deep PIL image."""
    values = np.asarray(values)
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def natural_range(low: float, high: float, floats: bool = False) -> Range:
    """(black, white) for values between `low` and `high`.

    That is 0 to 1, or for whole numbers 0 to the largest of 8 to 16 bits; other values are taken as they are.
    """
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    if low < 0 or high > 2 ** _BITS[-1] - 1 or floats:
        # of a constant only that it is one can be seen
        return (low, high) if low < high else (low, low + 1)
    return 0.0, float(next(2**bits - 1 for bits in _BITS if high <= 2**bits - 1))


def range_of(values: np.ndarray) -> Range:
    """The natural range of one image [H, W] or [H, W, C], of each channel."""
    channels = values[..., None] if values.ndim == 2 else values
    floats = values.dtype.kind == "f"
    every = [natural_range(*extremes(channels[..., c]), floats) for c in range(channels.shape[2])]
    return tuple(v for pair in every for v in pair)


def deep_kind(kind: str, values: np.ndarray) -> str:
    """The kind of an array or a deep image, [H, W] or [H, W, C]: with the number or the values of its channels."""
    channels = values[..., None] if values.ndim == 2 else values
    if values.dtype == np.uint8:
        return f"{kind} {channels.shape[2]}x8bit"

    def text(value: float) -> str:
        # a point tells floats from whole numbers
        return repr(float(f"{value:.7g}")) if values.dtype.kind == "f" else f"{value:.0f}"

    every = (extremes(channels[..., c]) for c in range(channels.shape[2]))
    return f"{kind} {','.join(f'{text(low)}..{text(high)}' for low, high in every)}"


def array_channels(kind: str) -> int:
    """Channels of an array of a kind by `deep_kind`; 0: an image that Pillow reads."""
    name, _, values = kind.partition(" ")
    if values.endswith("x8bit"):
        return int(values.partition("x")[0])
    count = values.count("..")
    return count if name == "npy" or count > 1 else 0


def to_levels(values: np.ndarray, value_range: Range | None = None, name: str = "") -> np.ndarray:
    """Numbers [H, W] or [H, W, C] as uint8: from black to white 0 to 255, values outside are clipped.

    Args:
        value_range: of more than 8 bits, which stay as they are; None: whole numbers are 0 to 65535, floats 0 to 1.

    Raises:
        UsageError: values outside these without a range; a range of another number of channels.
    """
    if values.dtype == np.uint8:
        return values
    if value_range is None:
        low, high = extremes(values)
        floats = values.dtype.kind == "f"
        value_range = USUAL[0] if floats or values.dtype.kind == "b" else USUAL[1]
        if low < value_range[0] or high > value_range[1]:
            kind = "floats" if floats else "whole numbers"
            raise UsageError(
                f"{kind} from {low:g} to {high:g}: which are black and white? give data.range, or list the images "
                "with `extrema-fast index`, which finds it"
            )
        if value_range == USUAL[1]:
            _warn_once(name, high)
    pairs = np.reshape(value_range, (-1, 2))
    if values.ndim == 2:
        # one channel has the range of the first
        pairs = pairs[:1]
    if len(pairs) not in (1, values.shape[-1]):
        raise UsageError(f"{values.shape[2]} channels, but data.range has {len(pairs)} pairs")
    black, white = pairs[:, 0], pairs[:, 1]
    numbers = values.astype(np.float64)
    if values.dtype.kind == "f":
        for special, at in ((np.isnan, black), (np.isposinf, white), (np.isneginf, black)):
            if (hit := special(numbers)).any():
                numbers = np.where(hit, at, numbers)
    return np.rint(((numbers - black) * (255 / (white - black))).clip(0, 255)).astype(np.uint8)


def to_8_bit(im: Any, value_range: Range | None = None, name: str = "") -> Any:
    """A deep PIL image as 8 bits, by `to_levels`; any other is returned as it is."""
    if not is_deep(im):
        return im
    from PIL import Image

    return Image.fromarray(to_levels(np.asarray(im), value_range, name))


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


def keeps_upper_bits(im: Any) -> bool:
    """Whether Pillow will read the upper 8 bits alone of a color image that is opened, not loaded yet (PNG, TIFF)."""
    raw = im.tile[0][3] if im.tile else ""
    # of a TIFF the first of several arguments
    raw = str(raw[0]) if isinstance(raw, tuple) and raw else str(raw)
    return "16" in raw and raw.startswith(("RGB", "LA"))


def warn_of_upper_bits(im: Any, name: str) -> None:
    """Says once that such an image is nearly black, where its values fill 12 bits or fewer."""
    global _warned
    values = np.asarray(im)[..., : 1 if im.mode == "LA" else 3]
    if not _warned and values.max() < 16:
        _warned = True
        remedy = "store such colors as TIFF, whose range data.range and `extrema-fast index` know"
        if im.format == "TIFF":
            white = natural_range(0, 256 * float(values.max()) + 255)[1]
            remedy = (
                f"give data.range 0 {white:g}, or list the images with `extrema-fast index`, which finds it"
            )
        log.warning(
            "%s: nearly black: Pillow reads the upper 8 of its 16 bits per channel, and the values fill fewer than 13; "
            "%s", name or "image", remedy,
        )  # fmt: skip


def tiff_shape(im: Any) -> tuple[int, int, int]:
    """Width, height and orientation of a TIFF file that Pillow has opened: it rotates the image when it loads it.

    The sizes are those after that, which Pillow's own are only from some version on.
    """
    tags = im.tag_v2
    orientation = tags.get(_ORIENTATION_TAG, 1)
    sides = tags[_WIDTH_TAG], tags[_HEIGHT_TAG]
    width, height = sides[::-1] if orientation in range(5, 9) else sides
    return width, height, orientation


# ---- any number of channels -----------------------------------------------------------------------


class Planes:
    """An image of any number of channels, [H, W, C] uint8, with those methods of a PIL image that loaders call."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self.height, self.width = pixels.shape[:2]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.width, self.height

    def crop(self, box: tuple[int, int, int, int]) -> Planes:
        """The box (left, top, right, bottom), which lies inside."""
        left, top, right, bottom = box
        return Planes(self._pixels[top:bottom, left:right])

    def resize(
        self, size: tuple[int, int], kernel: Any, box: tuple[float, float, float, float] | None = None
    ) -> Planes:
        """Each channel resized to (width, height) by Pillow."""
        from PIL import Image

        out = np.empty((size[1], size[0], self._pixels.shape[2]), np.uint8)
        for c in range(out.shape[2]):
            plane = Image.fromarray(np.ascontiguousarray(self._pixels[..., c]))
            out[..., c] = np.asarray(plane.resize(size, kernel, box))
        return Planes(out)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._pixels, dtype)


def as_image(pixels: np.ndarray) -> Any:
    """A PIL image of [H, W], [H, W, 1] or [H, W, 3] uint8, and `Planes` of any other number of channels."""
    from PIL import Image

    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels) if pixels.ndim == 2 or pixels.shape[2] == 3 else Planes(pixels)


def shown(pixels: np.ndarray) -> np.ndarray:
    """[..., C] -> [..., 3] to look at: the first three channels, or the first alone as gray."""
    return pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, -1)


def bands(im: Any) -> np.ndarray:
    """[H, W] or [H, W, C]: the channels of a PIL image; those of a palette are red, green and blue."""
    return np.asarray(im.convert("RGB") if im.mode in PALETTES else im)


# ---- arrays ---------------------------------------------------------------------------------------


class Array(NamedTuple):
    """The numbers of a .npy or TIFF file, not read before `values` is used."""

    # of the file; of a TIFF the channels come last
    shape: tuple[int, ...]
    # () -> the numbers, memory-mapped where the file is a plain .npy
    read: Any
    # whether the order of the axes is known
    ordered: bool

    def sizes(self, channels: int | None) -> tuple[int, int, int]:
        """Height, width and number of channels; UsageError when the axis of the channels is not certain."""
        axis = self._axis(channels)
        shape = (*self.shape, 1) if len(self.shape) == 2 else self.shape
        height, width = (n for a, n in enumerate(shape) if a != axis % 3)
        return height, width, shape[axis]

    def values(self, channels: int | None) -> np.ndarray:
        """[H, W, C]; arguments and errors as of `sizes`."""
        axis, values = self._axis(channels), self.read()
        return values[..., None] if values.ndim == 2 else np.moveaxis(values, axis, -1)

    def _axis(self, channels: int | None) -> int:
        shape = list(self.shape)
        if len(shape) == 2:
            shape.append(1)
        if len(shape) != 3 or 0 in shape:
            raise UsageError(f"numbers of shape {list(self.shape)}: expected [H, W], [H, W, C] or [C, H, W]")
        if self.ordered or len(self.shape) == 2:
            return -1
        fits: Any = (
            range(1, MAX_CHANS + 1) if channels is None else (1, 3) if channels in (1, 3) else (channels,)
        )
        found = [axis for axis in (0, -1) if shape[axis] in fits]
        if len(found) == 1:
            return found[0]
        wanted = f"1 to {MAX_CHANS}" if channels is None else " or ".join(map(str, fits))
        raise UsageError(
            f"numbers of shape {shape}: {'both the first and the last' if found else 'neither the first nor the last'} "
            f"axis may hold the channels ({wanted} of them); save them as [H, W, C] or [C, H, W]"
            + (", larger than that, or as TIFF" if found else "")
        )


def open_array(f: BinaryIO, channels: int | None, ranged: bool = False) -> Array | None:
    """The array in an open file; None for what Pillow reads.

    Of TIFF files Pillow reads those of 8 bits on one page; for 1 and 3 channels also the first of several pages, and
    without a range the upper 8 bits of colors of more.

    Args:
        channels: that are wanted; None: not known.
        ranged: a range is known.

    Raises:
        UsageError: what it holds is no numbers, or tifffile is missing.
        Exception: nearly anything, for a damaged file.
    """
    start = f.read(8)
    f.seek(0)
    if start.startswith(NPY):
        return _npy(f)
    return _tiff(f) if start.startswith(_TIFF) and not _pillow_reads(f, channels, ranged) else None


def _npy(f: BinaryIO) -> Array:
    from numpy.lib import format

    version = format.read_magic(f)
    if version not in ((1, 0), (2, 0)):
        raise UsageError(f"a .npy file of version {version[0]}.{version[1]}, which holds no plain numbers")
    read_header = format.read_array_header_1_0 if version == (1, 0) else format.read_array_header_2_0
    shape, fortran, dtype = read_header(f)
    if dtype.kind not in "buif":
        raise UsageError(f"a .npy file of {dtype}, expected whole numbers or floats")
    order: Literal["C", "F"]
    at, order = f.tell(), "F" if fortran else "C"

    def read() -> np.ndarray:
        if isinstance(f, io.BytesIO):
            count = int(np.prod(shape, dtype=np.int64))
            return np.frombuffer(f.getbuffer(), dtype, count, at).reshape(shape, order=order)
        return np.memmap(cast("Any", f), dtype, "r", at, shape, order)

    return Array(shape, read, ordered=False)


def _pillow_reads(f: BinaryIO, channels: int | None, ranged: bool) -> bool:
    from PIL import Image

    try:
        # not as a context, which would close the file
        im = Image.open(f)
        tags, colors, found = getattr(im, "tag_v2", {}), channels in (1, 3), len(im.getbands())
        if found == 1:
            # Pillow takes several samples for one, and fails
            return tags.get(_SAMPLES_TAG, 1) == 1 and (colors or getattr(im, "n_frames", 1) == 1)
        if tags.get(_SAMPLES_TAG, found) > found:
            # it leaves out what is neither color nor opacity, as infrared
            return colors
        return max(tags.get(_BITS_TAG, (8,))) <= 8 or (colors and not ranged)
    except Image.UnidentifiedImageError:
        return False
    finally:
        f.seek(0)


def _tiff(f: BinaryIO) -> Array:
    try:
        tifffile = importlib.import_module("tifffile")
    except ImportError:
        raise UsageError(f"a TIFF file that Pillow does not read; tifffile may: {install('train')}") from None
    # of every tag that is not as it should be, for each file and epoch
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with tifffile.TiffFile(f, name="file.tif") as file:
        # tifffile makes one series of equal pages; pages written one by one are a series each
        series = file.series
        same = [s for s in series if (s.shape, s.dtype) == (series[0].shape, series[0].dtype)]
        pages = len(series) if len(same) == len(series) else 1
        axes = [(a, n) for a, n in zip(series[0].axes, series[0].shape, strict=True) if a in "YX" or n > 1]
        names, shape = "".join(a for a, _ in axes), [n for _, n in axes]
        orientation = file.pages.first.tags.valueof(_ORIENTATION_TAG, default=1)
    others = [a for a in names if a not in "YX"]
    if "Y" not in names or "X" not in names or len(others) > 1 or (others and pages > 1):
        raise UsageError(
            f"a TIFF file of axes {names} and shape {shape}: expected height, width and channels"
        )
    if series[0].dtype.kind not in "buif":
        raise UsageError(f"a TIFF file of {series[0].dtype}, expected whole numbers or floats")
    order = [names.index(a) for a in ["Y", "X", *others]]
    sides = tuple(shape[a] for a in order)
    if orientation in range(5, 9):
        sides = sides[1], sides[0], *sides[2:]

    def read() -> np.ndarray:
        f.seek(0)
        with tifffile.TiffFile(f, name="file.tif") as file:
            found = [s.asarray().reshape(shape).transpose(order) for s in file.series[:pages]]
        return _rotated(np.stack(found, -1) if pages > 1 else found[0], orientation)

    return Array((*sides, pages) if pages > 1 else sides, read, ordered=True)


def _rotated(values: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, ...] as the orientation tag says, which Pillow follows of TIFF files, too."""
    if orientation in range(5, 9):
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values


# ---- what the installed libraries read ------------------------------------------------------------


@functools.cache
def plugins() -> tuple[str, ...]:
    """Extensions that the installed Pillow reads besides the usual ones; makes pillow-heif known to it."""
    try:
        features = importlib.import_module("PIL.features")
    except ImportError:
        return ()
    found = [*((".avif",) if "avif" in features.modules and features.check("avif") else ())]
    if features.check("jpg_2000"):
        found += [".j2k", ".jp2"]
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
        found += [".heic", ".heif"]
    except (ImportError, OSError):
        pass
    return tuple(found)
