"""The list of images that cannot be used: each is named once and left out, and too many of them end the run.

Whether an image can be used is a property of its file, and what replaces it one of (seed, epoch, place in the epoch).
So it makes no difference when an image is found, by which process, or whether the list survives a restart: it only
saves finding it again. (The exception: damage inside an image that DALI notices in some crops only.)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..distributed import World
from ..errors import DataError, StorageError
from .image_files import ImageFiles
from .image_source import ImageSource
from .manifest import escape, unescape, write_lines

log = logging.getLogger(__name__)

BAD_ROWS = "bad_rows.tsv"
_HEAD = "# extrema-fast bad rows 1\t"


class BadRows:
    """The rows of a source that were found to be unusable, with the reasons; safe to use from several threads.

    Args:
        budget: share of the rows that may be unusable (`data.bad_budget`): at least one row, none with 0.
        warn: whether each row found is logged as a warning.
    """

    def __init__(self, source: ImageSource, budget: float, *, warn: bool = True) -> None:
        self.source, self.warn = source, warn
        self.limit = max(1, int(budget * len(source))) if budget else 0
        # [n] bool
        self.known = np.zeros(len(source), bool)
        self.reasons: dict[int, str] = {}
        self._not_sent: list[int] = []
        self._file: Path | None = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, row: int, reason: str) -> None:
        """Adds a row found by this process; DataError when there are too many."""
        with self._lock:
            if not self._add(row, reason):
                return
            self._not_sent.append(row)
            log.log(logging.WARNING if self.warn else logging.DEBUG, "left out from now on: %s", reason)
            self._write()
            self.check()

    def check(self) -> None:
        """Raises DataError when more rows are unusable than the budget allows."""
        with self._lock:
            first = "; ".join(self.source.title(row) for row in list(self.reasons)[:3])
        if len(self) > self.limit:
            raise DataError(
                f"{self.source.name}: {len(self)} of {len(self.source)} images cannot be used, data.bad_budget allows "
                f"{self.limit}; first: {first}; run `extrema-fast index {self.source.name} --out M.tsv`, which lists "
                "what is wrong, then train with --data.train M.tsv, or raise data.bad_budget"
            )

    def agree(self, world: World, failure: str = "") -> int:
        """Exchanges what each process has found since the last call; all call it after the same step.

        Args:
            failure: why this process cannot continue; empty: it can.

        Returns:
            The number of rows known to be unusable.

        Raises:
            DataError: on every process: too many rows, or some process cannot continue.
        """
        with self._lock:
            mine = [[row, self.reasons[row]] for row in self._not_sent]
            self._not_sent.clear()
        if world.size > 1 and world.any(bool(mine or failure)):
            received = world.all_gather([failure, mine])
            with self._lock:
                new = [self._add(row, reason) for _, rows in received for row, reason in rows]
                if any(new):
                    self._write()
            failure = next((text for text, _ in received if text), "")
        self.check()
        if failure:
            raise DataError(failure)
        return len(self)

    def keep_in(self, file: Path) -> None:
        """Writes the list to `file`, now if it is not empty, and whenever it grows."""
        self._file = file
        if self.reasons:
            self._write()

    def read(self, file: Path, cfg: DataConfig) -> None:
        """Adds the rows listed in `file`, if they are of the same images and still cannot be decoded."""
        files = ImageFiles(self.source, cfg)
        for row, reason in _read(file, self.source):
            try:
                files.rgb(row, np.frombuffer(files.read(row), np.uint8))
            except DataError:
                self._add(row, reason)
            else:
                log.info("%s can be decoded again", self.source.title(row))
        files.close()
        if self.reasons:
            log.warning("%d images were found unusable before (%s)", len(self), file)
        self.check()

    def _add(self, row: int, reason: str) -> bool:
        if row in self.reasons:
            return False
        self.known[row], self.reasons[row] = True, reason
        return True

    def _write(self) -> None:
        if self._file is None:
            return
        lines = (
            f"{row}\t{escape(self.source.title(row))}\t{escape(reason)}\n"
            for row, reason in sorted(self.reasons.items())
        )
        try:
            write_lines(self._file, f"{_HEAD}{self.source.fingerprint}\nrow\tname\treason\n", lines)
        except StorageError as error:
            log.warning("%s; training continues", error)


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
