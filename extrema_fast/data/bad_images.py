"""Rows that cannot be used: found, named once, left out from then on, and too many of them end the run.

Whether a row can be used is a property of its file, and what takes its place one of (seed, epoch, place in the epoch)
(`data_order.Order.substitutes`): the first candidate that can be used. So it makes no difference when a row is
found, by which process, or whether the list below is still there after a restart; the list saves finding it again.
(The exception is damage inside a picture that DALI notices in some crops only. A JPEG file without its end, the usual
kind, is not among them: `data_files.Files` looks for that.)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..distributed import World
from ..errors import DataError, StorageError
from .files import Files
from .image_source import ImageSource
from .manifest_text import escape, unescape, write_lines

log = logging.getLogger(__name__)

BAD_ROWS = "bad_rows.tsv"
_HEAD = "# extrema-fast bad rows 1\t"


class BadRows:
    """The rows of a source that were found to be unusable, with the reason; safe to use from several threads.

    share  of the rows that may be unusable (`data.bad_budget`): at least one row, none with 0
    quiet  nothing is said of each row
    """

    def __init__(self, source: ImageSource, share: float, *, quiet: bool = False) -> None:
        self.source, self.quiet = source, quiet
        self.limit = max(1, int(share * len(source))) if share else 0
        self.known = np.zeros(len(source), bool)
        self.reasons: dict[int, str] = {}
        self._unshared: list[int] = []
        self._file: Path | None = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, row: int, reason: str) -> None:
        """Notes a row found here; DataError when there are too many."""
        with self._lock:
            if not self._note(row, reason):
                return
            self._unshared.append(row)
            log.log(logging.DEBUG if self.quiet else logging.WARNING, "left out from now on: %s", reason)
            self._write()
            self.check()

    def check(self) -> None:
        """DataError when more rows are unusable than the budget allows."""
        with self._lock:
            if len(self) <= self.limit:
                return
            first = "; ".join(self.source.title(row) for row in list(self.reasons)[:3])
            raise DataError(
                f"{self.source.name}: {len(self)} of {len(self.source)} images cannot be used, data.bad_budget allows "
                f"{self.limit}; first: {first}; run `extrema-fast index {self.source.name} --out M.tsv`, which lists "
                "what is wrong, then train with --data.train M.tsv, or raise data.bad_budget"
            )

    def agree(self, world: World, failure: str = "") -> int:
        """Shares with all processes what each has found since; returns how many rows are known to be unusable.

        failure  why this process cannot go on; empty: it can
        raises   DataError, everywhere alike: too many rows, or some process cannot go on
        """
        with self._lock:
            mine = [[row, self.reasons[row]] for row in self._unshared]
            self._unshared.clear()
        if world.size > 1 and world.any(bool(mine or failure)):
            told = world.all_gather([failure, mine])
            with self._lock:
                news = [self._note(row, reason) for _, rows in told for row, reason in rows]
                if any(news):
                    self._write()
            failure = next((text for text, _ in told if text), "")
        self.check()
        if failure:
            raise DataError(failure)
        return len(self)

    def keep_in(self, file: Path) -> None:
        """Writes the list to `file`, now if there is something in it, and whenever it grows."""
        self._file = file
        if self.reasons:
            self._write()

    def read(self, file: Path, files: Files) -> None:
        """Takes up the list of an earlier start: rows of the same images that still cannot be decoded."""
        for row, reason in _read(file, self.source):
            try:
                files.rgb(row, np.frombuffer(files.bytes(row), np.uint8))
            except DataError:
                self._note(row, reason)
            else:
                log.info("%s can be decoded again", self.source.title(row))
        if self.reasons:
            log.warning("%d images were found unusable before (%s)", len(self), file)
        self.check()

    def _note(self, row: int, reason: str) -> bool:
        new = row not in self.reasons
        if new:
            self.known[row] = True
            self.reasons[row] = reason
        return new

    def _write(self) -> None:
        if self._file is None:
            return
        rows = sorted(self.reasons)
        lines = (f"{r}\t{escape(self.source.title(r))}\t{escape(self.reasons[r])}\n" for r in rows)
        try:
            write_lines(self._file, f"{_HEAD}{self.source.fingerprint}\nrow\tname\treason\n", lines)
        except StorageError as error:
            log.warning("%s; training goes on", error)


def _read(file: Path, source: ImageSource) -> Iterator[tuple[int, str]]:
    try:
        head, *lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError):
        return
    # rows of other images, after a change that was allowed
    if head != _HEAD + source.fingerprint:
        return
    for line in lines[1:]:
        row, _, reason = (line.split("\t") + ["", ""])[:3]
        if row.isdecimal() and int(row) < len(source):
            yield int(row), unescape(reason)
