"""Long jobs (index, pack, embed) that can be interrupted and continued: a folder with a record of each finished piece.

A job writes a piece of its result to disk, and then a record that makes it valid. Running the same command later keeps
the pieces that have a record, and computes the others. Changed settings are an error, described by `changes`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import is_torn, lock, no_links, remove, write_file


class Work:
    """The work folder of one job.

    FOLDER/000012.json   what is known of piece 12, which is finished
    FOLDER/lock          while a process works on it
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self, name: str, *results: Path, own: str = "") -> Iterator[None]:
        """Keeps other processes from the job `name`.

        Args:
            results: files that the job writes (`*` in a folder: any); what killed processes left of them is removed.
            own: matches other files that the job puts into the work folder.
        """
        no_links(self.folder.parent, [self.folder.name], name)
        ours = re.compile(rf"\d+\.json|lock|{own}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            foreign = True
        else:
            foreign = any(not (ours.fullmatch(p.name) or is_torn(p.name)) for p in self.folder.iterdir())
        if foreign:
            raise UsageError(
                f"{name}: finished work goes to {self.folder}, which is something else; move it away"
            )
        try:
            with lock(self.folder / "lock", name):
                for path in (self.folder / "*", *results):
                    for torn in path.parent.glob(f".tmp-{path.name}-*"):
                        if is_torn(torn.name):
                            torn.unlink(missing_ok=True)
                yield
        finally:
            # gone, or not empty, but for a job that did nothing
            with suppress(OSError):
                self.folder.rmdir()

    def finish(self, number: int, record: dict[str, Any]) -> None:
        """Makes a piece count; raises OSError."""
        write_file(self.folder / f"{number:06d}.json", json.dumps(record))

    def finished(self) -> dict[int, dict[str, Any]]:
        """The records by number; what is damaged is not there."""
        found = {}
        for path in sorted(self.folder.glob("[0-9]*.json")):
            try:
                record = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(record, dict) and path.stem.isdecimal():
                found[int(path.stem)] = record
        return found

    def clear(self) -> None:
        """Removes the records: nothing is finished."""
        for path in self.folder.glob("[0-9]*.json"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the folder and all that is in it."""
        remove(self.folder)


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the settings of a job and those it was begun with, as `["size: 32 -> 33", ...]`."""
    return [f"{k}: {_short(old.get(k))} -> {_short(v)}" for k, v in new.items() if old.get(k) != v]


def _short(value: Any) -> str:
    # of a hash the beginning is enough
    return value[:12] if isinstance(value, str) and len(value) >= 32 else str(value)
