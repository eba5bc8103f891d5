"""The list of unusable images: each is reported once and left out, and too many of them end the run.

Whether an image is usable depends only on its file, and its replacement only on (seed, epoch, position in the epoch).
So results do not depend on when or by which process an image is found, or on whether the list survives a restart: the
list only saves finding it again. (Exception: damage inside an image that DALI notices in some crops only.)
"""

from __future__ import annotations

import logging
import math
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..distributed import World
from ..errors import DataError, StorageError
from ..files import read_text
from .image_files import ImageFiles, ReadError
from .image_source import ImageSource
from .manifest import escape, unescape, write_lines

log = logging.getLogger(__name__)

BAD_ROWS = "bad_rows.tsv"
_HEAD = "# extrema-fast bad rows 1\t"


class BadRows:
    """The rows of a source that were found to be unusable, with the reasons; safe to use from several threads.

    Args:
        budget: share of the rows that may be unusable (`data.bad_budget`): at least one row, and one in fifty up to
            ten; none with 0.
        warn: whether each row found is logged as a warning.
    """

    def __init__(self, source: ImageSource, budget: float, *, warn: bool = True) -> None:
        self.source, self.warn = source, warn
        self.limit = max(1, int(budget * len(source)), min(10, len(source) // 50)) if budget else 0
        # [n] bool
        self.known = np.zeros(len(source), bool)
        self.reasons: dict[int, str] = {}
        # rows whose file could not be read, which may pass
        self._unread: set[int] = set()
        self._not_sent: list[int] = []
        # some process could not continue: its last images were none
        self.failed = False
        self._file: Path | None = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, row: int, error: DataError, *, check: bool = True) -> None:
        """Adds a row found by this process, and why; with `check`, DataError when there are too many."""
        with self._lock:
            reason = str(error)
            if not self._add(row, reason, isinstance(error, ReadError)):
                return
            self._not_sent.append(row)
            log.log(logging.WARNING if self.warn else logging.DEBUG, "left out from now on: %s", reason)
            self._write()
            if check:
                self.check()

    def try_again(self, files: ImageFiles) -> None:
        """Takes rows whose file could not be read off the list, if they can be read and decoded now."""
        for row in sorted(self._unread):
            if files.why_unusable(row) is None:
                with self._lock:
                    self._unread.discard(row)
                    self.known[row] = False
                    self.reasons.pop(row, None)
                    log.info("%s can be read again, and is used again", self.source.title(row))
                    self._write()

    def check(self) -> None:
        """Raises DataError when more rows are unusable than the budget allows."""
        with self._lock:
            first = "; ".join(self.source.title(row) for row in list(self.reasons)[:3])
        if len(self) > self.limit:
            raise DataError(
                f"{self.source.name}: {len(self)} of {len(self.source)} images cannot be used, data.bad_budget allows "
                f"{self.limit}; first: {first}; to continue without them: --data.bad-budget {self._enough():g}; "
                f"or `extrema-fast index {shlex.quote(self.source.name)} --out M.tsv`, which lists what is wrong, then "
                "a new run (another --out) with --data.train M.tsv"
            )

    def tell(self, told: set[str] | None = None) -> None:
        """Logs how many rows an evaluation has left out, if any are not among those `told`; adds them to these."""
        names = {self.source.title(row) for row in self.reasons}
        if names <= (told or set()):
            return
        if told is not None:
            told |= names
        log.warning(
            "%s: %d of %d images cannot be decoded and are left out, first: %s",
            *(self.source.name, len(self), len(self.source), next(iter(self.reasons.values()))),
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
            mine = [
                [row, self.reasons[row], row in self._unread] for row in self._not_sent if self.known[row]
            ]
            self._not_sent.clear()
        if world.size > 1 and world.any(bool(mine or failure)):
            received = world.all_gather([failure, mine])
            with self._lock:
                new = [self._add(*row) for _, rows in received for row in rows]
                if any(new):
                    self._write()
            failure = next((text for text, _ in received if text), "")
        self.failed = bool(failure)
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
            error = files.why_unusable(row)
            if error is None:
                log.info("%s can be decoded again", self.source.title(row))
            else:
                self._add(row, reason, isinstance(error, ReadError))
        files.close()
        if self.reasons:
            log.warning("%d images were found unusable before (%s)", len(self), file)
        self.check()

    def _add(self, row: int, reason: str, unread: bool) -> bool:
        if row in self.reasons:
            return False
        self.known[row], self.reasons[row] = True, reason
        if unread:
            self._unread.add(row)
        return True

    def _enough(self) -> float:
        """A budget with room for twice as many: 1, 2 or 5 in a power of ten."""
        share = 2 * len(self) / len(self.source)
        unit = 10.0 ** math.floor(math.log10(share))
        return min(1.0, next(m * unit for m in (1, 2, 5, 10) if m * unit >= share))

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
        head, *lines = read_text(file).split("\n")
    except (OSError, ValueError):
        return
    # rows of other images, after a change that was allowed
    if head != _HEAD + source.fingerprint:
        return
    for line in lines[1:]:
        row, _, reason = (line.split("\t") + ["", ""])[:3]
        if row.isdecimal() and int(row) < len(source):
            yield int(row), unescape(reason)
