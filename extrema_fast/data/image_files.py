"""Reading image files: bytes, sizes from headers, pixels, and the error that names a file that cannot be read."""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ..config import DataConfig
from ..errors import DataError, UsageError
from .image_source import ImageSource

REMEDY = "remove it, or leave it out: `extrema-fast index DATA --out M.tsv`, then M.tsv as the data"

_ORIENTATION_TAG = 0x0112
# threads that read files: they wait for disks and networks rather than compute
_READERS = 8
# shards kept open; a set with more of them opens one per image
_MAX_OPEN = 256
# bytes at the end of a JPEG file searched for its end marker: some cameras and tools append to it
_TAIL = 4096


class Headers(NamedTuple):
    """Result of reading the headers of some rows.

    Attributes:
        sizes: [b, 2] int32 height and width, after EXIF rotation if that is asked for.
        data: the bytes of each image, [size] uint8; None: the decoder reads the files.
        failed: place in the batch -> why its row cannot be used.
    """

    sizes: np.ndarray
    data: list[np.ndarray] | None
    failed: dict[int, DataError]


class ImageFiles:
    """Bytes and header sizes of a source's rows, read in threads when first needed.

    Images in shards are read here, as bytes; whole files are read by the decoder, and here only for headers that are
    not known yet.
    """

    def __init__(self, source: ImageSource, cfg: DataConfig) -> None:
        self.source, self.exif, self.max_pixels = source, cfg.exif, cfg.max_pixels
        self.as_bytes = source.spans is not None and bool((source.spans[:, 1] >= 0).any())
        # [n, 2] height and width, 0: not known yet
        self._sizes = np.zeros((len(source), 2), np.int32)
        if source.headers is not None:
            self._sizes[:] = source.headers[:, :2]
            if cfg.exif:
                rotated = source.headers[:, 2] >= 5
                self._sizes[rotated] = self._sizes[rotated, ::-1]
        shards = source.shards if source.shards is not None else np.arange(len(source))
        self._keep_open = self.as_bytes and len(np.unique(shards)) <= _MAX_OPEN
        self._readers: ThreadPoolExecutor | None = None
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()
        _raise_pillow_limit(cfg.max_pixels)

    def read_headers(self, rows: np.ndarray) -> Headers:
        """Sizes of rows ([b] int64), and their bytes if this source is read as bytes."""
        failed: dict[int, DataError] = {}
        data: list[np.ndarray] | None = [np.empty(0, np.uint8)] * len(rows) if self.as_bytes else None
        todo = range(len(rows)) if self.as_bytes else np.flatnonzero(self._sizes[rows, 0] == 0).tolist()

        def read(places: list[int]) -> None:
            for place in places:
                row, content = int(rows[place]), b""
                try:
                    if data is not None:
                        content = self.read(row)
                        data[place] = np.frombuffer(content, np.uint8)
                    if not self._sizes[row, 0]:
                        self._sizes[row] = self._header(row, content)
                except DataError as e:
                    failed[place] = e

        if todo:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
            list(self._readers.map(read, [todo[i::_READERS] for i in range(_READERS)]))
        sizes = self._sizes[rows]
        for place in np.flatnonzero(sizes.astype(np.int64).prod(1) > self.max_pixels).tolist():
            failed.setdefault(place, self._too_large(int(rows[place])))
        return Headers(sizes, data, failed)

    def read(self, row: int) -> bytes:
        """Reads the bytes of a row's image.

        Raises:
            DataError: it cannot be read.
        """
        if self._keep_open and self.source.spans[row, 1] >= 0:  # type: ignore[index]
            offset, length = self.source.spans[row].tolist()  # type: ignore[index]
            # a network disk may have lost the open file: then once more, below
            with contextlib.suppress(OSError):
                data = os.pread(self._fd(self.source.paths[row]), length, offset)
                if len(data) == length:
                    return data
        try:
            return self.source.read(row)
        except OSError as e:
            raise self.error(row, e.strerror or e) from e

    def rgb(self, row: int, data: np.ndarray | None, box: tuple[int, int, int, int] | None = None) -> Any:
        """Decodes an image, or the box (left, top, right, bottom) of it, as an 8-bit RGB PIL image.

        Raises:
            DataError: it cannot be decoded.
        """
        try:
            return load_rgb(self.source.paths[row] if data is None else io.BytesIO(data.data), self.exif, box)
        # a broken file makes PIL raise nearly anything: OSError, SyntaxError, ValueError, struct.error
        except Exception as e:
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
            size = os.stat(path).st_size
            if self.source.spans is not None and self.source.spans[row, 1] >= 0:
                size = int(self.source.spans[row, 1])
            length = f"{size} bytes"
        except OSError:
            length = "gone"
        return DataError(f"{name}: cannot be decoded ({text}; {length})")

    def close(self) -> None:
        """Ends threads and closes files; the next use opens them again."""
        if self._readers is not None:
            self._readers.shutdown(wait=True, cancel_futures=True)
            self._readers = None
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()

    def _fd(self, path: str) -> int:
        with self._lock:
            if path not in self._fds:
                self._fds[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            return self._fds[path]

    def _header(self, row: int, data: bytes) -> tuple[int, int]:
        try:
            from PIL import Image
        except ImportError:
            raise UsageError('reading images needs Pillow: pip install "extrema-fast[train]"') from None
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
            raise self.error(row, e) from e
        return h, w

    def _too_large(self, row: int, size: str = "") -> DataError:
        h, w = self._sizes[row].tolist()
        size = size or f"{w} x {h}"
        return self.error(row, f"{size} pixels are more than data.max_pixels {self.max_pixels}")


def _has_end(f: Any) -> bool:
    # PIL continues from where it was
    at = f.tell()
    f.seek(0, os.SEEK_END)
    f.seek(max(0, f.tell() - _TAIL))
    tail = f.read()
    f.seek(at)
    return b"\xff\xd9" in tail


def _raise_pillow_limit(limit: int) -> None:
    # Pillow's own limit, for the whole process: raised when `limit` needs it, never lowered
    try:
        from PIL import Image
    except ImportError:
        return
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, -(-limit // 2))


def load_rgb(file: Any, exif: bool, box: tuple[int, int, int, int] | None = None) -> Any:
    """Decodes an image file with PIL.

    Args:
        file: path or file object.
        exif: whether to rotate it as its EXIF orientation says.
        box: (left, top, right, bottom) to cut out; None: all.

    Returns:
        An 8-bit RGB PIL image; 16 bits are scaled to 8.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        opened.load()
        im: Image.Image = ImageOps.exif_transpose(opened) if exif else opened
        if box is not None:
            im = im.crop(box)
        if im.mode.startswith("I"):
            # PIL's own conversion clips 16 bits at 255 instead of scaling them
            deep = np.asarray(im).astype(np.float64).clip(0, 65535)
            im = Image.fromarray(np.rint(deep / 257).astype(np.uint8))
        return im.convert("RGB")
