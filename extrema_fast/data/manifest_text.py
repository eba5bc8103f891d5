"""The manifest: a table of images that have been looked at once, one row each, good or bad.

A text file in UTF-8, fields separated by tabs:

    line 1   `# extrema-fast manifest 1`, a tab, and a JSON object: `root` (where relative paths start; if
             relative itself, at the folder of the manifest), `classes` (names in label order; [] without
             labels), and what its writer notes beside them
    line 2   the names of the columns
    others   one image each:

    path         of the file, or of the shard that holds the image; relative to the root, or absolute
    member       the image's name inside the shard; empty: the file is the image
    offset       where in the shard its bytes begin; -1: the file is the image
    bytes        how many there are
    mtime_ns     time of the file's last change, nanoseconds since 1970
    crc32        of the bytes, 8 hexadecimal digits
    kind         jpeg, png, ... as its first bytes say; empty: not known
    width        pixels as stored, before any EXIF rotation; 0: not known
    height
    orientation  EXIF 1 to 8; 1 where there is none
    label        the name of its class; empty: none
    status       `ok`, or why the image cannot be used

In path, member, label and status `\\t \\n \\r \\\\` stand for tab, line feed, carriage return and backslash, and
`\\xNN` for a byte of a file name that is not UTF-8. `pandas.read_csv(M, sep="\\t", header=1)` reads it, so
does `tail -n +2 M | cut -f1`. Rows may be taken out with any tool; training takes those with status `ok`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import StorageError, UsageError
from ..files import new_file

MAGIC = "# extrema-fast manifest "
VERSION = 1
OK = "ok"


class Row(NamedTuple):
    """One image; the fields are the columns."""

    path: str
    member: str = ""
    offset: int = -1
    bytes: int = 0
    mtime_ns: int = 0
    crc32: int = 0
    kind: str = ""
    width: int = 0
    height: int = 0
    orientation: int = 1
    label: str = ""
    status: str = OK


COLUMNS = Row._fields
# least and most
_RANGES = {
    "offset": (-1, 2**63 - 1),
    "bytes": (0, 2**63 - 1),
    "mtime_ns": (-(2**63), 2**63 - 1),
    "crc32": (0, 2**32 - 1),
    "width": (0, 2**31 - 1),
    "height": (0, 2**31 - 1),
    "orientation": (1, 8),
}
# with text that may hold anything
TEXT = ("path", "member", "label", "status")
# read as decimal numbers
NUMBERS = ("offset", "bytes", "mtime_ns", "width", "height", "orientation")

_ESCAPED = {"\t": "\\t", "\n": "\\n", "\r": "\\r", "\\": "\\\\"}
_PLAIN = {v: k for k, v in _ESCAPED.items()}
_ODD = re.compile("[\t\n\r\\\\\ud800-\udfff]")
_ESCAPE = re.compile(r"\\(?:[tnr\\]|x[0-9a-f]{2})")


def escape(text: str) -> str:
    """`text` without tabs, line ends and surrogates (as `os.fsdecode` makes them of undecodable bytes)."""
    if not _ODD.search(text):
        return text
    return _ODD.sub(lambda m: _ESCAPED.get(m[0]) or _byte(m[0]), text)


def _byte(surrogate: str) -> str:
    # one that stands for no byte comes from a Windows name
    code = ord(surrogate)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else "?"


def unescape(text: str) -> str:
    """The inverse of `escape`; a backslash that begins no escape stays."""
    if "\\" not in text:
        return text

    def plain(m: re.Match[str]) -> str:
        return _PLAIN.get(m[0]) or bytes([int(m[0][2:], 16)]).decode("utf-8", "surrogateescape")

    return _ESCAPE.sub(plain, text)


def header_lines(root: str, classes: list[str], notes: dict[str, Any] | None = None) -> str:
    """The first two lines of a manifest."""
    about = json.dumps({"root": root, "classes": classes, **(notes or {})})
    return f"{MAGIC}{VERSION}\t{about}\n" + "\t".join(COLUMNS) + "\n"


def row_line(row: Row) -> str:
    """The line of a row."""
    named = row._replace(
        path=escape(row.path),
        member=escape(row.member),
        label=escape(row.label),
        status=escape(row.status),
        crc32=f"{row.crc32:08x}",
    )
    return "\t".join(map(str, named)) + "\n"


def parse_row(line: str) -> Row:
    """The row of a line; ValueError saying what is wrong with it."""
    fields = line.rstrip("\r\n").split("\t")
    if len(fields) != len(COLUMNS):
        raise ValueError(f"expected {len(COLUMNS)} fields separated by tabs, got {len(fields)}")
    row = Row._make(fields)
    numbers = {c: _number(c, getattr(row, c)) for c in _RANGES}
    text = {c: unescape(getattr(row, c)) for c in (*TEXT, "kind")}
    row = Row(**text, **numbers)
    if not row.path:
        raise ValueError("the path is empty")
    for column, (least, most) in _RANGES.items():
        if not least <= getattr(row, column) <= most:
            raise ValueError(f"{column}: expected {least} to {most}, got {getattr(row, column)}")
    if row.status == OK and not (row.bytes and row.width and row.height):
        raise ValueError(f"status is ok with {row.bytes} bytes, width {row.width}, height {row.height}")
    return row


def _number(column: str, text: str) -> int:
    try:
        return int(text, 16 if column == "crc32" else 10)
    except ValueError:
        what = "8 hexadecimal digits" if column == "crc32" else "a whole number"
        raise ValueError(f"{column}: expected {what}, got {text[:40]!r}") from None


def parse_header(first: str, columns: str, name: str) -> dict[str, Any]:
    """The JSON object in the first of the two lines that begin a manifest; UsageError naming the line."""
    version, _, about = first.removeprefix(MAGIC).partition("\t")
    if not first.startswith(MAGIC):
        raise UsageError(f"{name}: line 1: not a manifest (expected {MAGIC + str(VERSION)!r}); see {_MAKE}")
    if version.strip() != str(VERSION):
        raise UsageError(f"{name}: line 1: a manifest of version {version!r}, this program reads {VERSION}")
    try:
        header = json.loads(about)
        classes = header["classes"]
        valid = isinstance(header["root"], str) and len(set(classes)) == len(classes)
        valid = valid and isinstance(classes, list) and all(c and isinstance(c, str) for c in classes)
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise UsageError(
            f'{name}: line 1: expected a JSON object with "root" (text) and "classes" (list of different '
            f"names) after the tab, got {about[:80]!r}"
        )
    if tuple(columns.rstrip("\r\n").split("\t")) != COLUMNS:
        raise UsageError(
            f"{name}: line 2: expected the columns {' '.join(COLUMNS)}, got {columns[:200].split()}"
        )
    return header


_MAKE = "extrema-fast index --help"


def write_lines(path: str | os.PathLike[str], head: str, lines: Iterable[str]) -> None:
    """Writes `head` and `lines` to a file atomically; StorageError when that fails, the old file untouched."""
    # through a link, so that it stays one
    target = Path(os.path.realpath(path))
    try:
        with new_file(target) as f:
            f.write(head.encode())
            f.writelines(line.encode() for line in lines)
    except OSError as e:
        raise StorageError(f"{target}: cannot be written ({e.strerror})") from e
