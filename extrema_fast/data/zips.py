"""Images in zip archives, read in place: a row is an archive and the offset of a member's header.

`read_range` recognizes such a header and inflates the data after it, so everything that reads byte ranges can read zip
archives.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from itertools import takewhile
from typing import BinaryIO, NamedTuple

from ..errors import DataError, UsageError, counted
from ..files import check_size, open_plain

MAGIC = b"PK\x03\x04"
# signature, version, flags, method, time, date, crc32, sizes compressed and not, lengths of name and extra field
_HEADER = struct.Struct("<4s5H3I2H")
_ENCRYPTED, _SIZES_FOLLOW = 1, 8
# not known here, but in the table of contents
_UNKNOWN = 0xFFFFFFFF


class Member(NamedTuple):
    """A file in a zip archive: name, where its header begins, bytes when unpacked, checksum."""

    name: str
    offset: int
    size: int
    crc32: int


def is_zip(path: str | os.PathLike[str]) -> bool:
    """Whether a file is named .zip or begins like one."""
    if str(path).lower().endswith(".zip"):
        return True
    try:
        with open_plain(path) as f:
            return f.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def members(path: str, extensions: tuple[str, ...]) -> tuple[list[Member], list[str]]:
    """The files with one of the `extensions` in a zip archive, and the names of the other ones; no hidden ones.

    Raises:
        UsageError: it cannot be read, or is encrypted or compressed in a way that is not read.
        DataError: it is no zip archive, or a damaged one.
    """
    try:
        with open_plain(path) as f, zipfile.ZipFile(f) as archive:
            # some programs begin every name so; one that comes twice is replaced in unpacking, too
            every = {i.filename.removeprefix("./"): i for i in archive.infolist() if not i.is_dir()}
            found = {name: i for name, i in every.items() if not is_hidden(name)}
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror})") from e
    # a damaged table makes zipfile raise nearly anything
    except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError, struct.error, UnicodeError) as e:
        raise DataError(f"{path}: not a zip archive, or a damaged one ({e}); copy or write it again") from e
    images = {name: i for name, i in found.items() if name.lower().endswith(extensions)}
    for what, odd in (
        ("encrypted", [i for i in images.values() if i.flag_bits & _ENCRYPTED]),
        (
            "compressed in a way that is not read",
            [i for i in images.values() if i.compress_type not in (0, 8)],
        ),
    ):
        if odd:
            raise UsageError(
                f"{path}: {counted(len(odd), 'image')} of {len(images)} {what}, first: {odd[0].filename}; unpack it, "
                "and give the folder"
            )
    members = [Member(name, i.header_offset, i.file_size, i.CRC) for name, i in images.items()]
    return members, [name for name in found if name not in images]


def is_hidden(name: str) -> bool:
    """Whether a file or a folder above it is a desktop's own, such as the copies of attributes in macOS' archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def shared_folders(folders: Sequence[list[str]]) -> list[str]:
    """The folders around all of several, each given as the names on its path."""
    ends = min(folders), max(folders)
    return [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False))]


# ---- byte ranges ----------------------------------------------------------------------------------


def read_range(f: BinaryIO, offset: int, length: int, path: str) -> bytes:
    """`length` bytes of an open file from `offset` on, or as many of the zip member whose header begins there.

    Args:
        length: -1: the whole file.
        path: the file, in errors.

    Raises:
        OSError: the file ends too early or is too large, or the member is damaged.
    """
    size = os.fstat(f.fileno()).st_size
    check_size(size if length < 0 else length, path)
    if length < 0:
        return f.read()
    f.seek(offset)
    head = f.read(_HEADER.size)
    if head.startswith(MAGIC) and len(head) == _HEADER.size:
        return _read_member(f, head, length, path)
    if path.lower().endswith(".zip"):
        raise OSError(f"{path}: damaged, no file begins at byte {offset}")
    data = head[:length] + f.read(max(0, length - len(head)))
    if len(data) < length:
        raise OSError(f"{path} ends after {size} bytes, not {offset + length}")
    return data


def _read_member(f: BinaryIO, head: bytes, length: int, path: str) -> bytes:
    _, _, flags, method, _, _, crc32, packed, _, name, extra = _HEADER.unpack(head)
    f.seek(name + extra, os.SEEK_CUR)
    known = not flags & _SIZES_FOLLOW and packed != _UNKNOWN
    if method == 0:
        data = f.read(length)
    elif method == 8:
        # at worst in blocks that are not compressed, each with a head of 5 bytes
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflater.decompress(
                f.read(packed if known else length + length // 1000 + 1024), length + 1
            )
        except zlib.error as e:
            raise OSError(f"{path}: damaged ({e})") from e
    else:
        raise OSError(f"{path}: compressed in a way that is not read (method {method})")
    if len(data) != length:
        raise OSError(f"{path}: {len(data)} bytes or more, not {length}")
    if not flags & _SIZES_FOLLOW and zlib.crc32(data) != crc32:
        raise OSError(f"{path}: damaged (its checksum is {zlib.crc32(data):08x}, not {crc32:08x})")
    return data
