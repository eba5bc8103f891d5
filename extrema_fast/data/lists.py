"""List files: image paths, with or without labels, in common formats (docs/data.md)."""

from __future__ import annotations

import csv
import logging
import os
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError

log = logging.getLogger(__name__)

FORMATS = (
    "one path per line, or path and label: a tab, a comma or a semicolon between (quotes and a header are read; a "
    "header names one column label, and more than two columns need one), or the label as the last word"
)
LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target")
PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
# lines whose files are looked for to tell the formats apart
_PROBED = 40

Line = tuple[int, str]
Split = Callable[[str], list[str]]


class _Reading(NamedTuple):
    """A way to read a list: how a line is split, and which field is the path."""

    split: Split
    column: int
    # whether a file is found by it
    finds: bool
    # whether the file that a field names is there
    exists: Callable[[str], bool]


def read_list(name: str, folder: Path, text: str, extensions: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The paths and the labels (empty: none) in the text of a list file.

    Of the ways to split a line that one is taken by which most files are found, among the first line and others spread
    over the list. A first line without a file is a header.

    Args:
        name: of the list in messages.
        folder: where relative paths start.
        extensions: of images; a first line with one is no header.

    Raises:
        UsageError: shows the first line that does not fit, or the first line of a list that no or more than one
            format fits.
    """
    # not splitlines(), which also splits at characters that a file name may contain
    lines = [(n, line.rstrip("\r")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UsageError(f"{name}: the list is empty; expected {FORMATS}")
    reading = _reading(name, folder, lines)
    rows = [(number, _split(name, number, line, reading.split)) for number, line in lines]
    first, fields = rows[0]
    width, column = len(fields), reading.column
    has_header = (
        reading.finds
        and column < width
        and not reading.exists(fields[column])
        and not fields[column].lower().endswith(extensions)
    )
    label = _label_column(name, lines[0], fields, column, has_header)
    if has_header:
        log.info("%s: line %d is taken for a header: %s", name, first, lines[0][1][:80])
        rows = rows[1:]
    used = [column] if label is None else [column, label]
    for number, row in rows:
        if len(row) != width or not all(c < width and row[c].strip() for c in used):
            wanted = f"{width} fields" if width > 2 else f"a path{' and a label' if width == 2 else ''}"
            raise UsageError(
                f"{name}: line {number}: expected {wanted} as in line {first}, got {len(row)} fields: "
                f"{' | '.join(row)[:80]!r}; a list has {FORMATS}"
            )
    paths = [str(folder / row[column]) for _, row in rows]
    return paths, [] if label is None else [row[label].strip() for _, row in rows]


def _reading(name: str, folder: Path, lines: list[Line]) -> _Reading:
    """The reading by which most files are found."""
    if any("\t" in line for _, line in lines[:2]):
        formats: list[Split] = [lambda line: line.split("\t")]
    else:
        formats = [
            lambda line: [line],
            lambda line: _delimited(line, ","),
            lambda line: _delimited(line, ";"),
            lambda line: line.strip().rsplit(maxsplit=1),
        ]
    disk = Disk()

    def exists(field: str) -> bool:
        path = disk.find(str(folder / field)) if field.strip() else None
        return path is not None and not os.path.isdir(path)

    step = max(1, len(lines) // _PROBED)
    probed = [line for _, line in [*lines[:2], *lines[2::step]]]
    most, best = 0, dict[str, tuple[_Reading, list[list[str]]]]()
    for split in formats:
        rows = []
        for line in probed:
            # it is named when all lines are split
            with suppress(csv.Error):
                rows.append(split(line))
        for column in range(max(map(len, rows), default=0)):
            found = sum(column < len(row) and exists(row[column]) for row in rows)
            if found > most:
                most, best = found, {}
            if found and found == most:
                # the same fields by another format are no other reading
                best.setdefault(repr((column, rows)), (_Reading(split, column, True, exists), rows))
    first = lines[0][1][:80]
    if len(best) > 1:
        named = [r for r, rows in best.values() if _word(*rows[0][r.column : r.column + 1]) in PATH_NAMES]
        if len(named) == 1:
            return named[0]
        raise UsageError(
            f"{name}: more than one way to read it finds files; its first line is {first!r}; a list has {FORMATS}"
        )
    if best:
        return next(iter(best.values()))[0]
    if len(formats) == 1:
        return _Reading(formats[0], 0, False, exists)
    raise UsageError(
        f"{name}: no file that it lists exists below {folder}; its first line is {first!r}; a list has {FORMATS}"
    )


def _label_column(name: str, line: Line, fields: list[str], column: int, has_header: bool) -> int | None:
    if len(fields) == 1:
        return None
    if len(fields) == 2 and not has_header:
        return 1 - column
    names = [_word(f) for f in fields] if has_header else []
    found = [names.index(word) for word in LABEL_NAMES if word in names]
    if found:
        return found[0]
    hint = ""
    if len(fields) == 2:
        other = fields[1 - column].strip()
        hint = f"; rename {other!r} if it holds the labels, else leave it out"
        hint = hint if other else "; leave out the column without a name (pandas: index=False)"
    raise UsageError(
        f"{name}: line {line[0]}: {len(fields)} fields, and no header that names one of them label: "
        f"{line[1][:80]!r}{hint}; a list has {FORMATS}"
    )


def _split(name: str, number: int, line: str, split: Split) -> list[str]:
    try:
        return split(line)
    except csv.Error as e:
        raise UsageError(f"{name}: line {number}: {e}: {line[:80]!r}; a list has {FORMATS}") from None


def _delimited(line: str, mark: str) -> list[str]:
    return next(csv.reader([line], delimiter=mark, skipinitialspace=True), [])


def _word(field: str = "") -> str:
    return field.strip().lower()


# ---- names in another Unicode form ----------------------------------------------------------------


class Disk:
    """Finds files whose names are on the disk in another Unicode form (NFD, as some systems and archives write it)."""

    def __init__(self) -> None:
        # of folders: as asked -> as on the disk; as on the disk -> {NFC: name}, names beyond ASCII only
        self._folders: dict[str, str | None] = {}
        self._names: dict[str, dict[str, str]] = {}

    def find(self, path: str) -> str | None:
        """`path` as it is on the disk; None when it is not there."""
        if os.path.exists(path):
            return path
        folder, name = os.path.split(path)
        if path.isascii() or not name:
            return None
        if folder not in self._folders:
            self._folders[folder] = self.find(folder) if folder else ""
        above = self._folders[folder]
        if above is None:
            return None
        if above not in self._names:
            with suppress(OSError):
                names = os.listdir(above or ".")
                self._names[above] = {unicodedata.normalize("NFC", n): n for n in names if not n.isascii()}
        found = self._names.get(above, {}).get(unicodedata.normalize("NFC", name), name)
        found = os.path.join(above, found)
        return found if os.path.exists(found) else None
