"""Reads image files: bytes, sizes from headers, pixels; errors name the file that cannot be read."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from .. import rng
from ..config import MAX_CHANS, DataConfig
from ..errors import DataError, UsageError, counted
from ..files import check_plain, open_plain
from .image_source import ImageSource
from .pixels import (
    NPY,
    PALETTES,
    Range,
    as_image,
    bands,
    is_deep,
    keeps_upper_bits,
    open_array,
    plugins,
    tiff_shape,
    to_8_bit,
    to_levels,
    warn_of_upper_bits,
)

log = logging.getLogger(__name__)

REMEDY = "remove it, or leave it out: `extrema-fast index DATA --out M.tsv`, then M.tsv as the data"

TIFF = frozenset({"tif", "tiff"})
# what Pillow or this project reads, and DALI does not
ALONE = frozenset({"avif", "gif", "heic", "heif", "npy"})
# formats of any number of channels, and those of more than 8 bits, perhaps
_ARRAYS = TIFF | {"npy"}
_MAYBE_DEEP = TIFF | {"pgm", "png", "pnm", "ppm"}
_ORIENTATION_TAG = 0x0112
# threads that read files: they wait for disks and networks rather than compute
_READERS = 8
# bytes at the end of a JPEG file searched for its end marker: some cameras and tools append to it
_TAIL = 4096
_LACKING = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
# errors of disks and networks that may have passed a moment later, and how long to wait before trying again
_PASSING = frozenset(
    getattr(errno, name)
    for name in ("EIO", "EAGAIN", "EINTR", "ESTALE", "ETIMEDOUT", "ECONNRESET", "ENETDOWN", "ENETUNREACH")
    + ("EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO", "EBUSY")
    if hasattr(errno, name)
)
_WAITS_S = (0.05, 0.5)
# rows whose bytes are hashed at a run's start; no epoch of training has this number
_SAMPLED, _SAMPLE_EPOCH = 64, 2**32 - 2
# rows whose channels are read when a source is opened, and whose pixels give mean and standard deviation
_PROBED, _MEASURED = 16, 256
# fewer levels between the hundredths at both ends leave little of a picture
_FEW_LEVELS = 8
T = TypeVar("T")


class ReadError(DataError):
    """A file that cannot be opened or read, which may be no property of the file."""


class SizeError(Exception):
    """An image has other than the expected width and height; the arguments are those it has."""


class Headers(NamedTuple):
    # [b, 2] int32 height and width, after EXIF rotation if that is asked for
    sizes: np.ndarray
    # the bytes of each image, [size] uint8; None: the decoder reads the files
    data: list[np.ndarray] | None
    # place in the batch -> why its row cannot be used
    failed: dict[int, DataError]


class ImageFiles:
    """Bytes and header sizes of a source's rows, read in threads when first needed.

    Images in shards are read here, as bytes; whole files are read by the decoder, and here only for headers that are
    not known yet.
    """

    def __init__(self, source: ImageSource, cfg: DataConfig) -> None:
        self.source, self.exif, self.max_pixels = source, cfg.exif, cfg.max_pixels
        self.value_range, self.channels = deep_range(source, cfg), source.channels
        # of a decoded image
        self.read_channels = 3 if source.channels == 1 else source.channels
        self.as_bytes = source.spans is not None and bool((source.spans[:, 1] >= 0).any())
        # [n, 2] height and width after EXIF rotation if that is asked for, 0: not known yet
        self.sizes = np.zeros((len(source), 2), np.int32)
        if source.headers is not None:
            self.sizes[:] = source.headers[:, :2]
            if cfg.exif:
                rotated = source.headers[:, 2] >= 5
                self.sizes[rotated] = self.sizes[rotated, ::-1]
        # whether DALI decodes, which reads some files otherwise than Pillow
        self.by_dali = False
        # [n] whether a row's file is known to be a plain one; DALI would wait for a named pipe
        self._plain = np.zeros(len(source), bool)
        self._readers: ThreadPoolExecutor | None = None

        plugins()
        from PIL import Image

        # Pillow's own limit, for the whole process: raised when ours needs it, never lowered
        if Image.MAX_IMAGE_PIXELS is not None:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, -(-cfg.max_pixels // 2))

    def read_headers(self, rows: np.ndarray, *, with_bytes: bool = True) -> Headers:
        """Sizes of rows ([b] int64), and their bytes if this source is read as bytes and they are wanted."""
        failed: dict[int, DataError] = {}
        with_bytes = with_bytes and self.as_bytes
        data: list[np.ndarray] | None = [np.empty(0, np.uint8)] * len(rows) if with_bytes else None
        known = self._plain[rows] & (self.sizes[rows, 0] > 0)
        todo = range(len(rows)) if with_bytes else np.flatnonzero(~known).tolist()

        def read(places: list[int]) -> None:
            for place in places:
                row, content = int(rows[place]), b""
                try:
                    if self.as_bytes and (data is not None or not self.sizes[row, 0]):
                        content = self.read(row)
                    elif not self._plain[row]:
                        self._try(row, partial(check_plain, self.source.paths[row]))
                    self._plain[row] = True
                    if data is not None:
                        data[place] = np.frombuffer(content, np.uint8)
                    if not self.sizes[row, 0]:
                        self.sizes[row] = self._header(row, content)
                except DataError as e:
                    failed[place] = e

        if todo:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
            list(self._readers.map(read, [todo[i::_READERS] for i in range(_READERS)]))
        sizes = self.sizes[rows]
        for place in np.flatnonzero(sizes.astype(np.int64).prod(1) > self.max_pixels).tolist():
            h, w = sizes[place].tolist()
            failed.setdefault(place, self._too_large(int(rows[place]), f"{w} x {h}"))
        return Headers(sizes, data, failed)

    def read(self, row: int) -> bytes:
        """Reads the bytes of a row's image; ReadError when they cannot be read."""
        return self._try(row, lambda: self.source.read(row))

    def _try(self, row: int, function: Callable[[], T]) -> T:
        """`function()`, again where an error of a disk or network may have passed; the last one is a DataError."""
        for wait in (*_WAITS_S, None):
            try:
                return function()
            except DataError:
                raise
            # a broken file makes PIL raise nearly anything: OSError, SyntaxError, ValueError, struct.error
            except Exception as e:
                _raise_if_lacking(e)
                if wait is None or getattr(e, "errno", None) not in _PASSING:
                    raise self.error(row, e) from e
            time.sleep(wait)
        raise AssertionError

    def image(self, row: int, data: np.ndarray | None, box: tuple[int, int, int, int] | None = None) -> Any:
        """Decodes an image, or the box (left, top, right, bottom) of it, as `load_image` does; DataError names it."""

        def load() -> Any:
            file = self.source.paths[row] if data is None else io.BytesIO(data.data)
            height, width = self.sizes[row].tolist()
            size = (width, height) if width else None
            try:
                return load_image(file, self.exif, box, self.value_range, self.channels, size)
            except SizeError as e:
                raise self.other_size(row, *e.args) from e

        return self._try(row, load)

    def error(self, row: int, reason: object) -> DataError:
        """The error for a row that is no image, or a damaged one."""
        path, name = self.source.paths[row], self.source.title(row)
        text = getattr(reason, "strerror", None) or str(reason)
        text = text.replace(path, "").strip(" '\":") or type(reason).__name__
        if type(reason).__name__ == "UnidentifiedImageError":
            # PIL shows the object that it was given
            text = "no known image format"
        try:
            file_size, span = (
                os.stat(path).st_size,
                -1 if self.source.spans is None else self.source.spans[row, 1],
            )
            size = f"{file_size if span < 0 else span} bytes"
        except OSError:
            size = "gone"
        # errors of the system have a number, those of decoders none
        kind = ReadError if isinstance(reason, OSError) and reason.errno else DataError
        return kind(f"{name}: cannot be decoded ({text}; {size})")

    def other_size(self, row: int, width: int, height: int) -> DataError:
        """The error for an image of another size than its row's, which crops were planned for."""
        known, headers = self.sizes[row].tolist(), self.source.headers
        listed = headers is not None and bool(headers[row, 0])
        when = "as the manifest says; index again" if listed else "as when its header was read"
        return self.error(row, f"{width} x {height} pixels, not {known[1]} x {known[0]} {when}")

    def why_unusable(self, row: int) -> DataError | None:
        """What decoding a row's image says; its header is read first, and no file whole that has none."""
        failed = self.read_headers(np.array([row]), with_bytes=False).failed
        if failed:
            return failed[0]
        try:
            self.image(row, np.frombuffer(self.read(row), np.uint8) if self.as_bytes else None)
        except DataError as error:
            return error
        return None

    def close(self) -> None:
        """Ends the threads; the next use starts them again."""
        if self._readers is not None:
            self._readers.shutdown(wait=True, cancel_futures=True)
            self._readers = None

    def _header(self, row: int, data: bytes) -> tuple[int, int]:
        from PIL import Image

        def read() -> tuple[int, int]:
            with io.BytesIO(data) if self.as_bytes else open_plain(self.source.paths[row]) as f:
                if array := open_array(f, self.channels, self.value_range is not None):
                    if self.by_dali:
                        raise UsageError("DALI does not read these numbers right; --data.loader pil")
                    return array.sizes(self.channels)[:2]
                with Image.open(f) as im:
                    w, h = im.size
                    if im.format == "TIFF":
                        w, h, orientation = tiff_shape(im)
                        if self.by_dali and orientation != 1 and not self.exif:
                            raise UsageError("DALI does not follow its orientation tag; --data.loader pil")
                    elif self.exif and im.getexif().get(_ORIENTATION_TAG, 1) >= 5:
                        w, h = h, w
                    if w * h <= self.max_pixels and im.format in ("JPEG", "MPO") and not _has_end(f):
                        # whether DALI notices depends on the crop; found now, it is the same in every epoch
                        im.load()
            return h, w

        try:
            return self._try(row, read)
        except DataError as e:
            if not isinstance(e.__cause__, Image.DecompressionBombError):
                raise
            # the first number in its words
            raise self._too_large(row, next(iter(re.findall(r"\d+", str(e.__cause__))), "its")) from None

    def _too_large(self, row: int, size: str) -> DataError:
        return self.error(row, f"{size} pixels are more than data.max_pixels {self.max_pixels}")


def hash_sample(files: ImageFiles) -> dict[str, str]:
    """Row -> beginning of the sha256 of its bytes, for 64 rows, always the same of a set, or all of fewer.

    Unreadable ones are left out.

    Names and sizes of all images do not show that some were replaced in place by others of the same size.
    """
    count = len(files.source)
    rows = _sampled(count) if count > _SAMPLED else range(count)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="hash") as pool:
        hashes = pool.map(lambda row: _hash(files, row), rows)
        return {str(row): value for row, value in zip(rows, hashes, strict=True) if value}


def are_cropped(files: ImageFiles, size: tuple[int, int]) -> bool:
    """Whether the images of the same rows all have exactly (height, width) `size`; unreadable ones do not count."""
    sizes = _sampled_headers(files)[0]
    return bool(len(sizes) and (sizes == size).all())


def sampled_sizes(files: ImageFiles) -> np.ndarray:
    """[k, 2] height and width of the images of the same rows that can be read; DataError where none can."""
    sizes, failed = _sampled_headers(files)
    if not len(sizes):
        raise DataError(f"{next(iter(failed.values()))}; nor can any other of {len(failed)} that were tried")
    return sizes


def _sampled_headers(files: ImageFiles) -> tuple[np.ndarray, dict[int, DataError]]:
    headers = files.read_headers(np.array(_sampled(len(files.source))), with_bytes=False)
    files.close()
    return np.delete(headers.sizes, list(headers.failed), axis=0), headers.failed


def _sampled(images: int, count: int = _SAMPLED) -> list[int]:
    drawn = rng.words(torch.arange(count), 1, seed=0, epoch=_SAMPLE_EPOCH, stream=rng.SUBSTITUTE)
    return sorted(set((drawn[:, 0] % images).tolist()))


def replaced(files: ImageFiles, before: dict[str, str]) -> list[int]:
    """Rows whose bytes are others than those of `hash_sample` before; damaged files are not among them."""
    rows = {
        int(row): value
        for row, value in before.items()
        if row.isdecimal() and len(row) < 12 and int(row) < len(files.source)
    }
    other = [row for row, value in rows.items() if _hash(files, row) not in ("", value)]
    reasons = {row: files.why_unusable(row) for row in other}
    # of another size than a manifest says: no training image, but a sound one
    return [row for row, reason in reasons.items() if not reason or isinstance(reason.__cause__, SizeError)]


def other_bytes(files: ImageFiles, before: dict[str, str]) -> str:
    """Of how many images the bytes are others than those of `hash_sample` before, in words; empty: of none."""
    now = hash_sample(files)
    other = [int(row) for row, value in before.items() if now.get(row, value) != value]
    if not other:
        return ""
    first = files.source.title(other[0])
    return f"the bytes of {len(other)} of {len(before)} images that were compared, first: {first}"


def _hash(files: ImageFiles, row: int) -> str:
    try:
        return hashlib.sha256(files.read(row)).hexdigest()[:16]
    except DataError:
        return ""


def _raise_if_lacking(error: Exception) -> None:
    """Raises an error again that is due to too little memory or too few file handles: the file may be sound."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in _LACKING:
        raise error


def _has_end(f: Any) -> bool:
    # PIL continues from where it was
    at = f.tell()
    f.seek(max(0, f.seek(0, os.SEEK_END) - _TAIL))
    tail = f.read()
    f.seek(at)
    return b"\xff\xd9" in tail


def deep_range(source: ImageSource, cfg: DataConfig) -> Range | None:
    """The range of a source's images of more than 8 bits: as configured, else as its manifest says."""
    return cfg.range if any(cfg.range) else source.value_range


def load_image(
    file: Any,
    exif: bool,
    box: tuple[int, int, int, int] | None = None,
    value_range: Range | None = None,
    channels: int = 3,
    size: tuple[int, int] | None = None,
) -> Any:
    """An image file with 8 bits per channel, cut to (left, top, right, bottom).

    Args:
        file: its path, or a `BytesIO`.
        exif: rotate by the EXIF tag.
        value_range: of more than 8 bits, as of `to_levels`.
        channels: 1 and 3: as RGB; else those of the file.
        size: width and height that it must have before the cut; None: any.

    Returns:
        An RGB PIL image; with another number of channels `Planes`.

    Raises:
        UsageError: the file has other channels, or values that need a range.
        SizeError: it has another size.
        Exception: nearly anything, for a damaged file.
    """
    from PIL import Image, ImageOps

    name, colors = file if isinstance(file, str) else "", channels in (1, 3)
    with open_plain(file) if isinstance(file, str) else nullcontext(file) as source:
        if array := open_array(source, channels, value_range is not None):
            values = array.values(channels)
            _check_count(values.shape[2], channels)
            _check_size((values.shape[1], values.shape[0]), size)
            # without a range, what is black and white follows from the whole image
            if box is not None and (value_range is not None or values.dtype == np.uint8):
                values, box = values[box[1] : box[3], box[0] : box[2]], None
            im = as_image(to_levels(values, value_range, name))
        else:
            with Image.open(source) as opened:
                upper_bits = keeps_upper_bits(opened)
                opened.load()
                if upper_bits:
                    warn_of_upper_bits(opened, name)
                # before the cut: what is black and white belongs to the image
                im = to_8_bit(opened, value_range, name) if colors else opened
                im = ImageOps.exif_transpose(im) if exif else im
            _check_size(im.size, size)
            if not colors:
                pixels = bands(im)
                _check_count(1 if pixels.ndim == 2 else pixels.shape[2], channels)
                im = as_image(to_levels(pixels, value_range if is_deep(opened) else None, name))
    im = im if box is None else im.crop(box)
    return im.convert("RGB") if colors else im


def _check_count(found: int, channels: int) -> None:
    if found != channels and not (channels in (1, 3) and found in (1, 3)):
        raise UsageError(f"{found} channels, the model takes {channels} (model.in_chans)")


def _check_size(found: tuple[int, int], wanted: tuple[int, int] | None) -> None:
    # Pillow pads a box that lies outside with black
    if wanted is not None and found != wanted:
        raise SizeError(*found)


# ---- what a set holds ------------------------------------------------------------------------------


def formats(source: ImageSource) -> frozenset[str]:
    """Formats of a source's images, as its manifest or the endings of their names say; without these, of a few."""
    if source.kinds:
        return source.kinds
    found = {_ending(source.title(row)) for row in range(len(source))}
    if "" in found:
        found |= {_format(source, row) for row in _sampled(len(source), _PROBED)}
    return frozenset(found)


def _ending(title: str) -> str:
    ending = os.path.splitext(title)[1][1:].lower()
    # a row of a table may have a number alone
    return "" if ":" in ending else ending


def _format(source: ImageSource, row: int) -> str:
    """The format of a row's image by the ending of its name, else by its bytes; empty: not known."""
    if ending := _ending(source.title(row)):
        return ending
    from PIL import Image

    plugins()
    try:
        data = source.read(row)
        if data.startswith(NPY):
            return "npy"
        with Image.open(io.BytesIO(data)) as im:
            return (im.format or "").lower()
    # a broken image: the loader's business
    except Exception as error:
        _raise_if_lacking(error)
        return ""


def read_as(source: ImageSource, in_chans: int) -> ImageSource:
    """The source, its images read as `in_chans` channels (1 and 3: as RGB).

    Raises:
        UsageError: most of a few images have other channels, or it is not certain which axis the channels are.
    """
    rows = _sampled(len(source), _PROBED)
    if in_chans in (1, 3):
        # Pillow makes anything else RGB
        rows = [row for row in rows if _format(source, row) in _ARRAYS]
    found: list[tuple[int, int]] = []
    problems: list[str] = []
    for row in rows:
        try:
            found.append((count_channels(source, row, in_chans), row))
        except UsageError as error:
            problems.append(f"{source.title(row)}: {error}")
        # a broken file, or one that is gone: the loader's business
        except Exception as error:
            _raise_if_lacking(error)
    wrong = [(count, row) for count, row in found if count != in_chans and not {count, in_chans} <= {1, 3}]
    if 2 * (len(wrong) + len(problems)) > len(found) + len(problems):
        if problems:
            raise UsageError(problems[0])
        count, row = wrong[0]
        which = "1 or 3" if count in (1, 3) else count
        fix = f"use --model.in-chans {which}" if count <= MAX_CHANS else f"at most {MAX_CHANS} are read"
        raise UsageError(
            f"{source.name}: images of {counted(count, 'channel')} ({source.title(row)}), the model takes {in_chans} "
            f"(model.in_chans); {fix}"
        )
    return dataclasses.replace(source, channels=in_chans)


def find_channels(source: ImageSource) -> int:
    """Channels of most of a few images of a source; 3 where they are colors or gray, or cannot be told."""
    found: Counter[int] = Counter()
    for row in _sampled(len(source), _PROBED):
        # Pillow makes anything else RGB
        if _format(source, row) in _ARRAYS:
            try:
                found[count_channels(source, row, 3)] += 1
            # `read_as` and the loader say what is wrong
            except Exception as error:
                _raise_if_lacking(error)
    count = found.most_common(1)[0][0] if found else 3
    return 3 if count == 1 else count


def count_channels(source: ImageSource, row: int, wanted: int) -> int:
    """Channels of a row's image; with `wanted` 1 or 3 those, but of an array. Raises nearly anything."""
    from PIL import Image

    plugins()
    is_file = source.spans is None or source.spans[row, 1] < 0
    with open_plain(source.paths[row]) if is_file else io.BytesIO(source.read(row)) as f:
        if array := open_array(f, wanted):
            try:
                return array.sizes(wanted)[2]
            except UsageError:
                return array.sizes(None)[2]
        if wanted in (1, 3):
            return wanted
        with Image.open(f) as im:
            return 3 if im.mode in PALETTES else len(im.getbands())


_checked: set[str] = set()


def check_depth(source: ImageSource, cfg: DataConfig) -> None:
    """Has Pillow warn of 16 bits that are nearly black, for DALI, which does not; a few images are read, once.

    Raises:
        DataError: floats that need a range; a TIFF file that DALI reads wrongly.
    """
    if source.name in _checked:
        return
    _checked.add(source.name)
    from PIL import Image

    files = ImageFiles(source, cfg)
    files.by_dali, warned = True, False
    rows = np.unique(np.linspace(0, len(source) - 1, _PROBED).astype(int)).tolist()
    for row in rows:
        kind = _format(source, row)
        if kind not in _MAYBE_DEEP:
            continue
        try:
            data = files.read(row)
            if kind in TIFF:
                files._header(row, data)
            with Image.open(io.BytesIO(data)) as im:
                deep = is_deep(im) or keeps_upper_bits(im)
            if deep and not warned:
                files.image(row, np.frombuffer(data, np.uint8))
                warned = True
        except Exception as error:
            if isinstance(error.__cause__, UsageError):
                raise


def measure_statistics(
    source: ImageSource, cfg: DataConfig, count: int = _MEASURED
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in 0..1, over up to `count` images, always the same of a set.

    Warns of channels of which the range leaves only a few levels.

    Raises:
        DataError: none of them can be read.
    """
    files = ImageFiles(source, cfg)
    rows = np.array(_sampled(len(source), count))
    headers = files.read_headers(rows, with_bytes=False)
    rows = np.delete(rows, list(headers.failed))
    error = headers.failed[min(headers.failed)] if headers.failed else None
    levels = np.zeros((files.read_channels, 256), np.int64)

    def pixels(row: int) -> np.ndarray | DataError:
        try:
            data = np.frombuffer(files.read(row), np.uint8) if files.as_bytes else None
            return np.asarray(files.image(row, data))
        except DataError as e:
            return e

    with ThreadPoolExecutor(_READERS, thread_name_prefix="measure") as pool:
        for at in range(0, len(rows), 4 * _READERS):
            for image in pool.map(pixels, rows[at : at + 4 * _READERS].tolist()):
                if isinstance(image, DataError):
                    error = error or image
                    continue
                for c, counts in enumerate(levels):
                    counts += np.bincount(image[..., c].ravel(), minlength=256)
    files.close()
    total = levels[0].sum()
    if not total:
        raise error or DataError(f"{source.name}: no image to measure")
    value = np.arange(256)
    mean = levels @ value / total
    std = np.sqrt(levels @ value**2 / total - mean**2)
    shares = levels.cumsum(1) / total
    spread = (shares < 0.99).sum(1) - (shares < 0.01).sum(1)
    few = [f"{c} ({n + 1})" for c, n in enumerate(spread.tolist()) if n + 1 < _FEW_LEVELS]
    if few:
        log.warning(
            "%s: nearly all pixels of channel %s have few of 256 levels; a data.range closer to the values keeps more",
            source.name,
            ", ".join(few),
        )
    # a constant channel is not divided by 0
    least = np.maximum(std, 1)
    return tuple((mean / 255).round(6).tolist()), tuple((least / 255).round(6).tolist())
