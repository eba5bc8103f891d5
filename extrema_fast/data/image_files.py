"""Reading image files: bytes, sizes from headers, pixels, and the error that names a file that cannot be read."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from .. import rng
from ..config import DataConfig
from ..errors import DataError
from ..files import check_plain, open_plain
from .image_source import ImageSource
from .pixels import Range, to_8_bit

REMEDY = "remove it, or leave it out: `extrema-fast index DATA --out M.tsv`, then M.tsv as the data"

TIFF = (".tif", ".tiff")
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
T = TypeVar("T")


class ReadError(DataError):
    """A file that cannot be opened or read, which may be no property of the file."""


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
        self.value_range = deep_range(source, cfg)
        self.as_bytes = source.spans is not None and bool((source.spans[:, 1] >= 0).any())
        # [n, 2] height and width after EXIF rotation if that is asked for, 0: not known yet
        self.sizes = np.zeros((len(source), 2), np.int32)
        if source.headers is not None:
            self.sizes[:] = source.headers[:, :2]
            if cfg.exif:
                rotated = source.headers[:, 2] >= 5
                self.sizes[rotated] = self.sizes[rotated, ::-1]
        # [n] whether a row's file is known to be a plain one; DALI would wait for a named pipe
        self._plain = np.zeros(len(source), bool)
        self._readers: ThreadPoolExecutor | None = None

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
            # a broken file makes PIL raise nearly anything: OSError, SyntaxError, ValueError, struct.error
            except Exception as e:
                _raise_if_lacking(e)
                if wait is None or getattr(e, "errno", None) not in _PASSING:
                    raise self.error(row, e) from e
            time.sleep(wait)
        raise AssertionError

    def rgb(self, row: int, data: np.ndarray | None, box: tuple[int, int, int, int] | None = None) -> Any:
        """Decodes an image, or the box (left, top, right, bottom) of it, as `load_rgb` does; DataError names it."""

        def load() -> Any:
            file = self.source.paths[row] if data is None else io.BytesIO(data.data)
            return load_rgb(file, self.exif, box, self.value_range)

        return self._try(row, load)

    def error(self, row: int, reason: object) -> DataError:
        """The error for a row that is no image, or a damaged one."""
        path, name = self.source.paths[row], self.source.title(row)
        text = getattr(reason, "strerror", None) or str(reason)
        text = text.replace(path, "").strip(" '\"") or type(reason).__name__
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

    def why_unusable(self, row: int) -> DataError | None:
        """What decoding a row's image says; its header is read first, and no file whole that has none."""
        failed = self.read_headers(np.array([row]), with_bytes=False).failed
        if failed:
            return failed[0]
        try:
            self.rgb(row, np.frombuffer(self.read(row), np.uint8) if self.as_bytes else None)
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
            with (
                io.BytesIO(data) if self.as_bytes else open_plain(self.source.paths[row]) as f,
                Image.open(f) as im,
            ):
                w, h = im.size
                if self.exif and im.getexif().get(_ORIENTATION_TAG, 1) >= 5:
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
    """Row -> beginning of the sha256 of its bytes, for up to 64 rows, always the same of a set; no unreadable ones.

    Names and sizes of all images do not show that some were replaced in place by others of the same size.
    """
    rows = _sampled(len(files.source))
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


def _sampled(images: int) -> list[int]:
    drawn = rng.words(torch.arange(_SAMPLED), 1, seed=0, epoch=_SAMPLE_EPOCH, stream=rng.SUBSTITUTE)
    return sorted(set((drawn[:, 0] % images).tolist()))


def replaced(files: ImageFiles, before: dict[str, str]) -> list[int]:
    """Rows whose bytes are others than those of `hash_sample` before; damaged files are not among them."""
    rows = {
        int(row): value
        for row, value in before.items()
        if row.isdecimal() and len(row) < 12 and int(row) < len(files.source)
    }
    other = [row for row, value in rows.items() if _hash(files, row) not in ("", value)]
    return [row for row in other if files.why_unusable(row) is None]


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
    """(black, white) of a source's images of more than 8 bits: as configured, else as its manifest says."""
    return cfg.range if cfg.range[0] < cfg.range[1] else source.value_range


def load_rgb(
    file: Any, exif: bool, box: tuple[int, int, int, int] | None = None, value_range: Range | None = None
) -> Any:
    """An image file as an 8-bit RGB PIL image, cut to (left, top, right, bottom); deep ones as of `to_8_bit`."""
    from PIL import Image, ImageOps

    with (
        open_plain(file) if isinstance(file, str) else nullcontext(file) as source,
        Image.open(source) as opened,
    ):
        opened.load()
        # before the cut: what is black and white belongs to the image
        eight = to_8_bit(opened, value_range, file if isinstance(file, str) else "")
        im: Image.Image = ImageOps.exif_transpose(eight) if exif else eight
        return (im if box is None else im.crop(box)).convert("RGB")
