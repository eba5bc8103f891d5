"""Prepares single images for `pack` (the original bytes, or a smaller JPEG), and writes them into tar shards."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import MAX_PIXELS
from ..data.manifest import Row
from ..data.pixels import Array, Planes, Range, deep_kind, open_array, to_8_bit, to_levels
from ..data.shards import BLOCK, Member, index_text
from ..files import open_new, write_file
from .verify import OK, check, reason
from .work import Work

# two blocks of zeros end a tar
END = 2 * BLOCK
# extension in a shard of the kinds in `verify.READ`
EXTENSIONS = {"jpeg": "jpg", "jpeg2000": "jp2", "pnm": "pnm", "tiff": "tif"}
_ORIENTATION = 0x0112


class Packed(NamedTuple):
    """An image as it goes into a shard; width and height as stored, orientation the EXIF tag (1 to 8)."""

    data: bytes
    kind: str
    width: int
    height: int
    orientation: int


def pack_image(
    data: bytes, size: int, side: str, quality: int, value_range: Range | None = None
) -> Packed | str:
    """An image file's bytes as they are packed, or why they cannot be: every image is decoded once.

    A JPEG that is small enough keeps its bytes. Everything else becomes a JPEG of the pixels a loader sees
    (`load_image`): gray stays gray, CMYK, palettes and alpha become RGB, 16 bits become 8. Pixels
    are stored as they were, and so is the EXIF orientation, so that training may follow it or not. Arrays become .npy
    files [H, W, C] of 8 bits.
    """
    from PIL import Image

    # all but the decoding, which comes below anyway
    found = check(data, lambda _: None, MAX_PIXELS)
    if found.status != OK:
        return found.status
    try:
        if array := open_array(io.BytesIO(data), None):
            if not size:
                return Packed(data, found.kind, found.width, found.height, 1)
            return _pack_array(array, size, side, value_range)
        with Image.open(io.BytesIO(data)) as im:
            im.load()
            target = _target(im.size, size, side)
            if not size or (found.kind == "jpeg" and target == im.size):
                width, height = im.size
                return Packed(data, found.kind, width, height, found.orientation)
            # what a loader sees, in one channel where its three are equal by kind
            pixels = to_8_bit(im, value_range)
            pixels = pixels.convert("L" if pixels.mode in ("1", "L", "LA", "La") else "RGB")
            small = pixels.resize(target, Image.Resampling.BICUBIC)
            smaller = _jpeg(small, quality, found.orientation)
            return Packed(smaller, "jpeg", *target, found.orientation)
    # a broken file makes Pillow raise nearly anything
    except Exception as e:
        return f"cannot be decoded: {reason(e)}"


def _pack_array(array: Array, size: int, side: str, value_range: Range | None) -> Packed:
    from PIL import Image

    levels = to_levels(array.values(None), value_range)
    target = _target((levels.shape[1], levels.shape[0]), size, side)
    out = io.BytesIO()
    pixels = np.asarray(Planes(levels).resize(target, Image.Resampling.BICUBIC))
    np.save(out, pixels, allow_pickle=False)
    return Packed(out.getvalue(), deep_kind("npy", pixels), *target, 1)


def _target(given: tuple[int, int], size: int, side: str) -> tuple[int, int]:
    """Width and height after resizing; never larger than before."""
    measured = min(given) if side == "short" else max(given)
    if not size or measured <= size:
        return given
    width, height = (max(1, round(n * size / measured)) for n in given)
    return width, height


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


# ---- one shard ------------------------------------------------------------------------------------


class Done(NamedTuple):
    """The record of a finished shard: places [first, end) of the shuffled order, manifest rows, what is left out."""

    name: str
    first: int
    end: int
    bytes: int
    sums: dict[str, str]
    rows: list[Row]
    left_out: list[tuple[int, str, str]]


class ShardWriter:
    """A tar being written, under a temporary name until `finish`."""

    def __init__(self, out: Path, work: Work, number: int, first: int) -> None:
        self.out, self.work, self.number, self.first = out, work, number, first
        self.name = f"shard-{number:06d}"
        self.path = work.folder / f"{self.name}.tar"
        self.file = open_new(self.path, buffering=1 << 20)
        self.bytes, self.hash = 0, hashlib.sha256()
        self.members: list[Member] = []
        self.rows: list[Row] = []
        self.left_out: list[tuple[int, str, str]] = []

    def add(self, parts: list[tuple[str, bytes]], row: Row) -> None:
        """Writes a sample: its components, the image first; `row` gets path and offset here."""
        at = self.bytes + BLOCK
        for name, data in parts:
            self.members.append(Member(name, self.bytes + BLOCK, len(data)))
            self._write(_member(name, data))
        self.rows.append(row._replace(path=f"{self.name}.tar", offset=at))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.bytes += len(data)

    def finish(self, end: int) -> Done:
        """Gives the shard its name, then it has a record; one without images has the record alone."""
        sums = {}
        if not self.rows:
            self.discard()
        else:
            self._write(bytes(END))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.path, self.out / f"{self.name}.tar")
            index = index_text(self.members)
            write_file(self.out / f"{self.name}.idx", index)
            sums = {
                f"{self.name}.tar": self.hash.hexdigest(),
                f"{self.name}.idx": hashlib.sha256(index.encode()).hexdigest(),
            }
        done = Done(self.name, self.first, end, self.bytes, sums, self.rows, self.left_out)
        self.work.finish(self.number, done._asdict())
        return done

    def discard(self) -> None:
        """Gives the space of an unfinished shard back."""
        # what is buffered may still not fit
        with suppress(OSError):
            self.file.close()
        self.path.unlink(missing_ok=True)


def space(parts: list[tuple[str, bytes]]) -> int:
    """Bytes that components take in a tar."""
    return sum(BLOCK + len(data) + -len(data) % BLOCK for _, data in parts)


def _member(name: str, data: bytes) -> bytes:
    """A file in a tar: header, bytes, padding; no times, no owner."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
