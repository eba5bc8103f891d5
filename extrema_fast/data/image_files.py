"""Reading image files: bytes, sizes from headers, pixels, and the error that names a file that cannot be read."""

from __future__ import annotations

import errno
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ..config import DataConfig
from ..errors import DataError
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
        todo = range(len(rows)) if with_bytes else np.flatnonzero(self.sizes[rows, 0] == 0).tolist()

        def read(places: list[int]) -> None:
            for place in places:
                row, content = int(rows[place]), b""
                try:
                    if self.as_bytes:
                        content = self.read(row)
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
        """Reads the bytes of a row's image; DataError when they cannot be read."""
        try:
            return self.source.read(row)
        except OSError as e:
            _raise_if_lacking(e)
            raise self.error(row, e.strerror or e) from e

    def rgb(self, row: int, data: np.ndarray | None, box: tuple[int, int, int, int] | None = None) -> Any:
        """Decodes an image, or the box (left, top, right, bottom) of it, as `load_rgb` does; DataError names it."""
        try:
            file = self.source.paths[row] if data is None else io.BytesIO(data.data)
            return load_rgb(file, self.exif, box, self.value_range)
        # a broken file makes PIL raise nearly anything: OSError, SyntaxError, ValueError, struct.error
        except Exception as e:
            _raise_if_lacking(e)
            raise self.error(row, e) from e

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
        return DataError(f"{name}: cannot be decoded ({text}; {size})")

    def close(self) -> None:
        """Ends the threads; the next use starts them again."""
        if self._readers is not None:
            self._readers.shutdown(wait=True, cancel_futures=True)
            self._readers = None

    def _header(self, row: int, data: bytes) -> tuple[int, int]:
        from PIL import Image

        try:
            with (
                io.BytesIO(data) if self.as_bytes else open(self.source.paths[row], "rb") as f,
                Image.open(f) as im,
            ):
                w, h = im.size
                if self.exif and im.getexif().get(_ORIENTATION_TAG, 1) >= 5:
                    w, h = h, w
                if w * h <= self.max_pixels and im.format in ("JPEG", "MPO") and not _has_end(f):
                    # whether DALI notices depends on the crop; found now, it is the same in every epoch
                    im.load()
        except Image.DecompressionBombError as e:
            # the first number in its words
            raise self._too_large(row, next(iter(re.findall(r"\d+", str(e))), "its")) from None
        except Exception as e:
            _raise_if_lacking(e)
            raise self.error(row, e) from e
        return h, w

    def _too_large(self, row: int, size: str) -> DataError:
        return self.error(row, f"{size} pixels are more than data.max_pixels {self.max_pixels}")


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

    with Image.open(file) as opened:
        opened.load()
        # before the cut: what is black and white belongs to the image
        eight = to_8_bit(opened, value_range, file if isinstance(file, str) else "")
        im: Image.Image = ImageOps.exif_transpose(eight) if exif else eight
        return (im if box is None else im.crop(box)).convert("RGB")
