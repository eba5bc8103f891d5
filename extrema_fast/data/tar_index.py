"""Where the members of a tar lie, and the index file beside it in DALI's format (`wds2idx`, v1.2).

An index holds a line per sample: of each component its extension, offset, size and name, separated by
blanks. White space in a name is written as `\\x20` and the like, which `wds2idx` does not do (its lines
cannot be told apart then). It is made where it is missing, older than its tar or does not match it: beside
the tar, else in the cache folder, else in memory alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from ..files import write_file
from .photos import cache_root

log = logging.getLogger(__name__)

VERSION = "v1.2"
BLOCK = tarfile.BLOCKSIZE
# members whose header is compared when an index is read
_PROBES = 8
_SPACE = re.compile(r"[ \t\n\v\f\r]")
_ESCAPED_SPACE = re.compile(r"\\x(20|09|0a|0b|0c|0d)")
_COMPRESSED = {
    b"\x1f\x8b": "gzip -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ\x00": "xz -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
}


class Member(NamedTuple):
    """A regular file in a tar: name, offset of its first byte and size in bytes."""

    name: str
    offset: int
    size: int


def split_name(name: str) -> tuple[str, str]:
    """Key and extension by webdataset's rule: the first dot of the base name parts them."""
    key, dot, extension = name.rpartition("/")[2].partition(".")
    return name[: len(name) - len(dot) - len(extension)], extension


def is_hidden(name: str) -> bool:
    """Whether a member's base name begins with a dot, as a desktop's own files do; no part of a sample."""
    return name.rpartition("/")[2].startswith(".")


def members(path: str) -> list[Member]:
    """The regular files of a tar, from its index or by a scan of its headers.

    raises DataError for what is no tar, a truncated or a damaged one; OSError when it cannot be read
    """
    found, places = None, [Path(path).with_suffix(".idx"), _cached(path)]
    for place in places:
        found = _from_index(path, place)
        if found is not None:
            return found
    found = scan(path)
    if found:
        text = index_text(found)
        # a place that cannot be written is no harm: the next one, or a scan each time
        for place in places:
            # root may write everywhere, and still should not where nobody is meant to
            if place.parent.is_dir() and not place.parent.stat().st_mode & 0o222:
                continue
            with suppress(OSError):
                write_file(place, text)
                break
    return found


def _cached(path: str) -> Path:
    real = os.path.realpath(path)
    key = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    return cache_root() / "shards" / f"{Path(real).stem}-{key}.idx"


# ---- scan -----------------------------------------------------------------------------------------


def scan(path: str) -> list[Member]:
    """The regular files of a tar in its order, by its headers; hidden files, links, devices and sparse files left out.

    raises DataError; OSError when it cannot be read
    """
    found: list[Member] = []
    left_out: list[str] = []
    size = os.path.getsize(path)
    if not size:
        raise DataError(f"{path}: an empty file (0 bytes), not a tar; write it again, or remove it")
    try:
        with tarfile.open(path, "r:", errors="surrogateescape") as tar:
            while (m := tar.next()) is not None:
                # it keeps every member otherwise
                tar.members.clear()
                # tarfile believes a negative size, and goes round for ever
                if m.size < 0 or tar.offset <= m.offset:
                    raise ValueError(f"{m.name} claims {m.size} bytes")
                if is_hidden(m.name):
                    continue
                if m.isreg() and not m.issparse():
                    found.append(Member(m.name, m.offset_data, m.size))
                elif not m.isdir():
                    left_out.append(m.name)
            end = tar.offset
    # a damaged header makes tarfile raise nearly anything
    except (tarfile.TarError, ValueError, EOFError, RecursionError, ArithmeticError) as e:
        raise _damaged(path, str(e), found) from e
    # tarfile takes a damaged header for the end
    _check_end(path, end, found)
    if left_out:
        log.warning(
            "%s: %d links, devices or sparse files left out, first: %s", path, len(left_out), left_out[0]
        )
    return found


def _damaged(path: str, reason: str, found: list[Member]) -> DataError:
    with open(path, "rb") as f:
        head = f.read(8)
    for magic, command in _COMPRESSED.items():
        if head.startswith(magic):
            return DataError(
                f"{path}: a compressed tar; images are read in place, so decompress it first ({command})"
            )
    if not found:
        return DataError(f"{path}: not a tar file, or cut off before its first image ({reason})")
    return DataError(
        f"{path}: truncated or damaged after {found[-1].name} (file {len(found)}): {reason}; copy or write it "
        "again"
    )


def _check_end(path: str, end: int, found: list[Member]) -> None:
    with open(path, "rb") as f:
        f.seek(end)
        block = f.read(BLOCK)
    if not block:
        log.warning("%s: has no end mark; it may have been cut off after %d files", path, len(found))
    elif block.strip(b"\0"):
        raise _damaged(path, f"no valid header at byte {end}", found)
    elif len(block) < BLOCK:
        raise _damaged(path, f"ends within a block at byte {end}", found)


# ---- index ----------------------------------------------------------------------------------------


def index_text(found: Iterable[Member]) -> str:
    """The index of a tar with these members."""
    lines: list[str] = []
    last = None
    for name, offset, size in found:
        key, extension = split_name(name)
        # without a dot wds2idx takes the whole name
        words = (_no_space(extension or name), str(offset), str(size), _no_space(name))
        if key == last:
            lines[-1] += " " + " ".join(words)
        else:
            lines.append(" ".join(words))
        last = key
    return f"{VERSION} {len(lines)}\n" + "".join(line + "\n" for line in lines)


def _no_space(name: str) -> str:
    return _SPACE.sub(lambda m: f"\\x{ord(m[0]):02x}", name)


def parse_index(text: str) -> list[Member]:
    """The members of an index; ValueError for anything else."""
    head, *lines = text.removesuffix("\n").split("\n")
    version, count = head.split(" ")
    if version != VERSION or int(count) != len(lines):
        raise ValueError(f"starts with {head[:40]!r} and has {len(lines)} lines")
    found = []
    for line in lines:
        words = line.split(" ")
        if len(words) % 4:
            raise ValueError(f"{line[:80]!r}: expected 4 words per file")
        for i in range(0, len(words), 4):
            name = _ESCAPED_SPACE.sub(lambda m: chr(int(m[1], 16)), words[i + 3])
            found.append(Member(name, int(words[i + 1]), int(words[i + 2])))
    return found


def _from_index(path: str, index: Path) -> list[Member] | None:
    """The members that an index names; None when there is none, it is old, or it does not match the tar."""
    try:
        if index.stat().st_mtime_ns < os.stat(path).st_mtime_ns:
            log.info("%s: older than its tar, not used", index)
            return None
        found = parse_index(index.read_text(encoding="utf-8", errors="surrogateescape"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        log.warning("%s: not used as an index (%s)", index, e)
        return None
    problem = _mismatch(path, found)
    if problem:
        log.warning("%s: does not match %s (%s), not used", index, path, problem)
        return None
    return found


def _mismatch(path: str, found: list[Member]) -> str:
    """What shows that an index is not of this tar; a few headers are looked at."""
    step = max(1, (len(found) - 1) // (_PROBES - 1))
    with open(path, "rb") as f:
        for m in sorted({*found[::step], *found[-1:]}, key=lambda m: m.offset):
            info = _header_at(f, m.offset - BLOCK)
            if info is None or not info.isreg() or info.size != m.size:
                return f"no file of {m.size} bytes at byte {m.offset}"
        last = max(found, key=lambda m: m.offset, default=Member("", 0, 0))
        end = last.offset + -(-last.size // BLOCK) * BLOCK
        if os.fstat(f.fileno()).st_size < end:
            return f"the tar ends before {last.name} does"
        following = _header_at(f, end)
        if following is not None and not is_hidden(following.name) and not following.isdir():
            return f"more files follow after {last.name}"
    return ""


def _header_at(f: object, offset: int) -> tarfile.TarInfo | None:
    if offset < 0:
        return None
    f.seek(offset)  # type: ignore[attr-defined]
    try:
        return tarfile.TarInfo.frombuf(f.read(BLOCK), "utf-8", "surrogateescape")  # type: ignore[attr-defined]
    except tarfile.TarError:
        return None
