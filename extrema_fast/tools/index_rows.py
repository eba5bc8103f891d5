"""What an index run already knows: rows of an earlier manifest, and of runs that were stopped.

`OUT.part` is written while a run goes on: the two lines that begin a manifest, then finished rows in any order;
the next run adds its own two lines and rows. A row is taken over when its file has the same size and time of
change, and it was looked at at least as closely as now.
"""

from __future__ import annotations

import fcntl
import io
import os
import sys
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from ..data.image_source import ImageSource
from ..data.manifest import (
    COLUMNS,
    MAGIC,
    escape,
    header_lines,
    parse_header,
    root_folder,
    root_for,
    write_lines,
)
from ..data.sources import BUILT_IN
from ..errors import StorageError, UsageError

PATH, OFFSET, BYTES, MTIME, CRC32, WIDTH, HEIGHT, LABEL, STATUS = (
    COLUMNS.index(c)
    for c in ("path", "offset", "bytes", "mtime_ns", "crc32", "width", "height", "label", "status")
)
# path and offset as they stand in a line -> the line
Known = dict[tuple[str, str], str]


class Job(NamedTuple):
    """The images, where their manifest goes and how closely they are looked at."""

    source: ImageSource
    data: str
    """DATA as an absolute path, or the name of a built-in set"""
    root: str
    paths: list[str]
    """relative to the root, where they lie below it"""
    offsets: list[int]
    labels: list[int] | None
    out: Path
    strict: bool
    max_pixels: int
    expected: list[int] | None
    """the checksums that the rows should have; None: not known"""

    @property
    def part(self) -> Path:
        return self.out.with_name(self.out.name + ".part")

    def head(self) -> str:
        data = self.data if self.data in BUILT_IN else root_for(self.out, self.data)
        notes = {"data": data, "strict": self.strict, "max_pixels": self.max_pixels}
        return header_lines(root_for(self.out, self.root), self.source.classes, notes)

    def label(self, row: int) -> str:
        return "" if self.labels is None else self.source.classes[self.labels[row]]


def open_part(job: Job, force: bool) -> io.FileIO:
    """The file that finished rows are added to, locked, and cut after its last whole line.

    raises UsageError: another process has it, or it is something else; StorageError
    """
    try:
        part = io.FileIO(os.open(job.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
    except OSError as e:
        raise StorageError(f"{job.part}: cannot be written ({e.strerror})") from e
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        part.close()
        raise UsageError(f"--out {job.out}: another `index` is writing it; wait for it, or stop it") from None
    except OSError:
        # a file system without locks
        pass
    size, start = part.seek(0, os.SEEK_END), os.pread(part.fileno(), len(MAGIC), 0).decode("latin-1")
    # shorter when the very first write was cut
    if not force and not MAGIC.startswith(start):
        part.close()
        raise UsageError(
            f"--out {job.out}: finished rows go to {job.part}, which is something else; choose another --out, "
            "or --force replaces it"
        )
    part.seek(max(0, size - (1 << 20)))
    tail = part.read()
    part.truncate(0 if force else size - len(tail) + tail.rfind(b"\n") + 1)
    part.seek(0, os.SEEK_END)
    return part


def known_rows(job: Job, path: Path) -> Known:
    """The rows in a manifest, or a beginning of one, that were looked at as this run would.

    raises UsageError when it is of other images
    """
    known: Known = {}
    if not path.exists():
        return known
    fits, limit = False, None
    with open(path, encoding="utf-8", errors="replace", newline="\n") as f:
        for line in f:
            # every run that was stopped has begun with a header of its own
            if line.startswith(MAGIC):
                columns = f.readline()
                if columns:
                    fits, limit = _settings(job, parse_header(line, columns, str(path)), path)
                continue
            fields = line.split("\t")
            # what a power cut leaves of a line is not a row
            if not fits or len(fields) != len(COLUMNS) or not line.endswith("\n"):
                continue
            if limit is None or _pixels(fields) <= limit:
                known[fields[PATH], fields[OFFSET]] = line
    return known


def _settings(job: Job, header: dict[str, Any], path: Path) -> tuple[bool, int | None]:
    """Whether rows below this header can be used, and up to how many pixels; None: any number."""
    data = header.get("data")
    there = data if data in BUILT_IN else os.path.realpath(root_folder(path, str(data)))
    here = job.data if job.data in BUILT_IN else os.path.realpath(job.data)
    if data is None or there != here:
        of = "other images" if data is None else there
        raise UsageError(
            f"--out {job.out}: {path.name} is of {of}, not of {here}; choose another --out, or --force replaces it"
        )
    pixels = header.get("max_pixels")
    limit = min(pixels, job.max_pixels) if isinstance(pixels, int) else 0
    limit = None if pixels == job.max_pixels else limit
    return bool(header.get("strict")) or not job.strict, limit


def _pixels(fields: list[str]) -> int:
    try:
        return int(fields[WIDTH]) * int(fields[HEIGHT])
    except ValueError:
        return sys.maxsize


def take_over(job: Job, known: Known) -> tuple[list[str], list[int]]:
    """The line of each row that is known and unchanged, "" for the others, and the rows of these."""
    lines, todo, about = [], [], ("", (-1, -1))
    spans = None if job.source.spans is None else job.source.spans[:, 1].tolist()
    for row, path in enumerate(job.source.paths):
        line = known.get((escape(job.paths[row]), str(job.offsets[row])), "")
        if line:
            # the rows of a shard have one file
            about = about if about[0] == path else (path, _size_and_time(path))
            size, mtime_ns = about[1]
            size = size if spans is None or spans[row] < 0 else spans[row]
            line = _still(line.split("\t"), size, mtime_ns, job, row)
        lines.append(line)
        if not line:
            todo.append(row)
    return lines, todo


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        about = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return about.st_size, about.st_mtime_ns


def _still(fields: list[str], size: int, mtime_ns: int, job: Job, row: int) -> str:
    """The line, with the label of today; "" when the file is not what it was."""
    # what could not be read has time 0, so it is tried again
    if fields[BYTES] != str(size) or fields[MTIME] != str(mtime_ns):
        return ""
    if job.expected is not None and fields[CRC32] != f"{job.expected[row]:08x}":
        return ""
    fields[LABEL] = escape(job.label(row))
    return "\t".join(fields)


def append(part: io.FileIO, text: str, job: Job, *, sync: bool = False) -> None:
    """Adds to what is kept, with `sync` down to the disk; StorageError when that fails."""
    data = text.encode()
    try:
        while data:
            data = data[part.write(data) :]
        if sync:
            os.fsync(part)
    except OSError as e:
        raise StorageError(
            f"{job.part}: cannot be written ({e.strerror}); what it holds is kept, and the same command continues"
        ) from e


def finish(job: Job, lines: list[str]) -> None:
    """Writes the manifest; StorageError when that fails."""
    try:
        write_lines(job.out, job.head(), lines)
    except StorageError as e:
        raise StorageError(
            f"{e}; what was found is kept in {job.part}, and the same command continues"
        ) from e


def holds(job: Job, lines: list[str]) -> bool:
    """Whether the manifest is there with just these lines."""
    if not job.out.exists():
        return False
    with open(job.out, encoding="utf-8", errors="replace", newline="\n") as f:
        return all(a == b for a, b in zip_longest(f, chain(job.head().splitlines(True), lines)))
