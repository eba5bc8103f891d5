"""The shards of a packed set: written under a temporary name, renamed into place, then noted as finished."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..data.manifest import Row
from ..data.shards import BLOCK, Member, index_text
from ..files import write_file

# the folder of what is not finished, in that of the set
WORK = ".pack"
# two blocks of zeros end a tar
END = 2 * BLOCK


class Done(NamedTuple):
    """A finished shard: the places [first, end) of the shuffled order, its manifest rows, what is left out."""

    name: str
    first: int
    end: int
    bytes: int
    sums: dict[str, str]
    rows: list[Row]
    left_out: list[tuple[int, str, str]]


class ShardWriter:
    """A tar being written, under a temporary name until `finish`."""

    def __init__(self, out: Path, number: int, first: int) -> None:
        self.name, self.out, self.first = f"shard-{number:06d}", out, first
        self.path = out / WORK / f"{self.name}.tar"
        self.file = open(self.path, "wb", buffering=1 << 20)  # noqa: SIM115
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
        """Gives the shard its name and notes what is in it; one without images is noted alone."""
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
        write_file(_note(self.out, self.name), json.dumps(done))
        return done

    def discard(self) -> None:
        """Gives the space of an unfinished shard back."""
        # what is buffered may still not fit
        with suppress(OSError):
            self.file.close()
        self.path.unlink(missing_ok=True)


def _note(out: Path, shard: str) -> Path:
    return out / WORK / f"{shard}.json"


def space(parts: list[tuple[str, bytes]]) -> int:
    """Bytes that components take in a tar."""
    return sum(BLOCK + len(data) + -len(data) % BLOCK for _, data in parts)


def _member(name: str, data: bytes) -> bytes:
    """A file in a tar: header, bytes, padding; no times, no owner."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def finished_shards(out: Path) -> list[Done]:
    """The shards noted as finished, as far as they are there."""
    found: list[Done] = []
    while True:
        name = f"shard-{len(found):06d}"
        try:
            done = Done(*json.loads(_note(out, name).read_text(encoding="utf-8")))
            rows = [Row(*row) for row in done.rows]
            if rows and (out / f"{name}.tar").stat().st_size != done.bytes:
                return found
        except (OSError, ValueError, TypeError):
            return found
        found.append(done._replace(rows=rows, left_out=[tuple(x) for x in done.left_out]))
