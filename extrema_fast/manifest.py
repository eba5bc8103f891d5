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

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch

from .errors import DataError, StorageError, UsageError
from .image_source import ImageSource

MAGIC = "# extrema-fast manifest "
VERSION = 1
OK = "ok"

# rows turned from text into arrays at a time: whole tables as Python strings need gigabytes
_CHUNK = 1 << 16
# good rows whose file is looked at when a manifest is opened
_PROBES = 16


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
_WHOLE = ("offset", "bytes", "mtime_ns", "width", "height", "orientation")
_TEXT = ("path", "member", "kind", "status")


@dataclass(frozen=True)
class Manifest:
    """A manifest's columns, each with one entry per row; see the top of this file.

    root         folder that relative paths start at, as it stands in the file
    classes      names in label order
    label        [n] int64 index into `classes`, -1: none
    offset, bytes, mtime_ns, crc32   [n] int64
    width, height, orientation       [n] int32
    path, member, kind, status       lists of n str
    notes        the other entries of the first line
    """

    root: str
    classes: list[str]
    path: list[str]
    member: list[str]
    offset: np.ndarray
    bytes: np.ndarray
    mtime_ns: np.ndarray
    crc32: np.ndarray
    kind: list[str]
    width: np.ndarray
    height: np.ndarray
    orientation: np.ndarray
    label: np.ndarray
    status: list[str]
    notes: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.path)

    def good(self) -> np.ndarray:
        """[k] int64: the rows with status `ok`, in order."""
        return np.flatnonzero(np.fromiter((s == OK for s in self.status), bool, len(self)))

    def rows(self) -> Iterator[Row]:
        """The table row by row."""
        names = np.array([*self.classes, ""], dtype=object)[self.label]
        columns = dict.fromkeys(COLUMNS, names)
        columns |= {c: getattr(self, c) for c in COLUMNS if c != "label"}
        lists = [v.tolist() if isinstance(v, np.ndarray) else v for v in columns.values()]
        return map(Row._make, zip(*lists, strict=True))


def from_rows(
    rows: Iterable[Row], *, root: str, classes: list[str], notes: dict[str, Any] | None = None
) -> Manifest:
    """The table of `rows`, whose labels are names in `classes`; KeyError for another label."""
    table = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    columns = dict(zip(COLUMNS, map(list, table), strict=True))
    number_of = {"": -1} | {name: i for i, name in enumerate(classes)}
    columns["label"] = [number_of[name] for name in columns["label"]]
    return Manifest(root, classes, **_arrays(columns), notes=notes or {})


def _arrays(columns: dict[str, list[Any]]) -> dict[str, Any]:
    return {c: v if c in _TEXT else np.array(v, _dtype(c)) for c, v in columns.items()}


def _dtype(column: str) -> type:
    return np.int32 if column in ("width", "height", "orientation") else np.int64


# ---- text -----------------------------------------------------------------------------------------

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
    numbers = {c: _number(c, getattr(row, c)) for c in (*_WHOLE, "crc32")}
    text = {c: unescape(getattr(row, c)) for c in (*_TEXT, "label")}
    row = Row(**text, **numbers)
    if not row.path:
        raise ValueError("the path is empty")
    if row.offset < -1 or row.bytes < 0 or not (0 <= row.width < 2**31 and 0 <= row.height < 2**31):
        raise ValueError(
            f"offset {row.offset}, bytes {row.bytes}, width {row.width}, height {row.height}: out of range"
        )
    if not 1 <= row.orientation <= 8:
        raise ValueError(f"orientation: expected 1 to 8, got {row.orientation}")
    if row.status == OK and not (row.bytes and row.width and row.height):
        raise ValueError(f"status is ok with {row.bytes} bytes, width {row.width}, height {row.height}")
    return row


def _number(column: str, text: str) -> int:
    try:
        return int(text, 16 if column == "crc32" else 10)
    except ValueError:
        what = "8 hexadecimal digits" if column == "crc32" else "a whole number"
        raise ValueError(f"{column}: expected {what}, got {text[:40]!r}") from None


# ---- files ----------------------------------------------------------------------------------------


def is_manifest(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a manifest; False for what cannot be read."""
    try:
        with open(path, "rb") as f:
            return f.read(len(MAGIC)) == MAGIC.encode()
    except OSError:
        return False


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


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads a whole manifest, bad rows too.

    raises UsageError naming file, line and column for what is no manifest or a damaged one
    """
    name = str(path)
    try:
        with open(path, encoding="utf-8", newline="\n") as f:
            header = parse_header(f.readline(), f.readline(), name)
            root, classes = header.pop("root"), header.pop("classes")
            chunks = list(_read_rows(f, name, classes))
    except UnicodeDecodeError as e:
        raise UsageError(f"{name}: not a manifest: not UTF-8 text ({e.reason})") from e
    except OSError as e:
        raise UsageError(f"{name}: cannot be read ({e.strerror})") from e
    columns: dict[str, Any] = {}
    for c in COLUMNS:
        parts = [chunk[c] for chunk in chunks]
        columns[c] = [v for part in parts for v in part] if c in _TEXT else np.concatenate(parts)
    return Manifest(root, classes, **columns, notes=header)


def _read_rows(f: TextIO, name: str, classes: list[str]) -> Iterator[dict[str, Any]]:
    """Columns of `_CHUNK` rows at a time, at least once."""
    number_of = {"": -1} | {c: i for i, c in enumerate(classes)}
    line, more = 3, True
    while more:
        lines = list(islice(f, _CHUNK))
        more = len(lines) == _CHUNK
        try:
            yield _columns(lines, number_of)
        except (ValueError, OverflowError, KeyError):
            # slower, but it knows which line
            raise _first_bad(lines, line, name, number_of) from None
        line += len(lines)


def _columns(lines: list[str], number_of: dict[str, int]) -> dict[str, Any]:
    """The columns of some lines; ValueError, OverflowError or KeyError when any is wrong."""
    if any(line.count("\t") != len(COLUMNS) - 1 for line in lines):
        raise ValueError
    text = "".join(lines).replace("\r\n", "\n").removesuffix("\n")
    fields = text.replace("\n", "\t").split("\t") if lines else []
    columns: dict[str, Any] = {c: fields[i :: len(COLUMNS)] for i, c in enumerate(COLUMNS)}
    if "\\" in text:
        columns |= {c: [unescape(v) for v in columns[c]] for c in ("path", "member", "label", "status")}
    # the same few words in every row
    columns |= {c: list(map(intern, columns[c])) for c in ("kind", "status")}
    columns["crc32"] = [int(v, 16) for v in columns["crc32"]]
    columns["label"] = [number_of[v] for v in columns["label"]]
    columns |= {c: list(map(int, columns[c])) for c in _WHOLE}
    arrays = _arrays(columns)
    if not all(arrays["path"]) or not _in_range(arrays).all():
        raise ValueError
    return arrays


def _in_range(a: dict[str, Any]) -> np.ndarray:
    good = np.array([s == OK for s in a["status"]], bool)
    seen = (a["bytes"] > 0) & (a["width"] > 0) & (a["height"] > 0)
    whole = (a["offset"] >= -1) & (a["bytes"] >= 0) & (a["width"] >= 0) & (a["height"] >= 0)
    return whole & (a["orientation"] >= 1) & (a["orientation"] <= 8) & (seen | ~good)


def _first_bad(lines: list[str], line: int, name: str, number_of: dict[str, int]) -> UsageError:
    for number, text in enumerate(lines, line):
        try:
            label = parse_row(text).label
        except ValueError as e:
            return UsageError(f"{name}: line {number}: {e}")
        if label not in number_of:
            known = f"is none of the {len(number_of) - 1} classes in line 1"
            return UsageError(f"{name}: line {number}: label {label!r} {known}")
    raise AssertionError("a table is wrong, but none of its lines")


def write_manifest(path: str | os.PathLike[str], manifest: Manifest) -> None:
    """Writes a manifest so that a reader sees the old file or the new, never a part.

    raises StorageError
    """
    head = header_lines(manifest.root, manifest.classes, manifest.notes)
    write_lines(path, head, map(row_line, manifest.rows()))


def write_lines(path: str | os.PathLike[str], head: str, lines: Iterable[str]) -> None:
    """Writes `head` and `lines` to a file atomically; StorageError when that fails, the old file untouched."""
    # through a link, so that it stays one
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        try:
            with open(temporary, "w", encoding="utf-8", newline="\n") as f:
                f.write(head)
                f.writelines(lines)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise StorageError(f"{target}: cannot be written ({e.strerror})") from e


def root_folder(path: str | os.PathLike[str], root: str) -> str:
    """The folder that a manifest's relative paths start at, given the `root` of its first line."""
    # of the file itself, not of a link to it
    return os.path.normpath(os.path.join(os.path.dirname(os.path.realpath(path)), root))


def root_for(path: str | os.PathLike[str], folder: str) -> str:
    """What stands as `root` in a manifest at `path`: relative where both can move together, else absolute."""
    here = os.path.dirname(os.path.realpath(path))
    real = os.path.realpath(folder)
    return os.path.relpath(real, here) if os.path.commonpath([here, real]) == here else real


# ---- as images ------------------------------------------------------------------------------------


def manifest_source(path: str | os.PathLike[str], *, check: bool = True) -> ImageSource:
    """The good rows of a manifest as an image source.

    Sizes and orientations come from the table; the fingerprint is sha256 over path, offset, bytes, crc32
    and label of the good rows, so a data set that has moved is the same and a changed one is not.

    check   False: files are not looked at
    raises UsageError for a damaged manifest, a root that is gone, or files that changed since (a few rows
    are looked at); DataError when no row is good
    """
    name = str(path)
    manifest = read_manifest(path)
    good = manifest.good()
    if not len(good):
        raise DataError(f"{name}: none of its {len(manifest)} rows has status ok; nothing to train on")
    root = root_folder(path, manifest.root)
    if not os.path.isdir(root):
        raise UsageError(
            f'{name}: its images should be in {root}, which does not exist; set "root" in its first line to '
            "where they are now"
        )
    rows = good.tolist()
    paths = [os.path.join(root, manifest.path[r]) for r in rows]
    offset, size, label = manifest.offset[good], manifest.bytes[good], manifest.label[good]
    if check:
        _probe(name, paths, offset, size)
    labels = None
    if manifest.classes:
        if (label < 0).any():
            line = rows[int((label < 0).argmax())] + 3
            raise UsageError(f"{name}: line {line}: no label, though line 1 names classes")
        labels = torch.from_numpy(label)
    what = [escape(manifest.path[r]) for r in rows]
    numbers = [c.tolist() for c in (offset, size, manifest.crc32[good])]
    classes = [escape(c) for c in [*manifest.classes, ""]]
    label_names = ["" if labels is None else classes[i] for i in label.tolist()]
    digest = hashlib.sha256()
    for row in zip(what, *numbers, label_names, strict=True):
        digest.update("\t".join(map(str, row)).encode() + b"\n")
    inside = offset >= 0
    spans = np.stack([np.maximum(offset, 0), np.where(inside, size, -1)], 1) if inside.any() else None
    names = None
    if spans is not None:
        members = [manifest.member[r] for r in rows]
        names = [f"{p}:{m}" if m else p for p, m in zip(paths, members, strict=True)]
    return ImageSource(
        name,
        paths,
        labels,
        manifest.classes,
        digest.hexdigest(),
        spans=spans,
        names=names,
        headers=np.stack([manifest.height, manifest.width, manifest.orientation], 1)[good],
        shards=_shards(paths) if inside.all() else None,
    )


def _probe(name: str, paths: list[str], offset: np.ndarray, size: np.ndarray) -> None:
    rows = np.unique(np.linspace(0, len(paths) - 1, _PROBES).astype(int)).tolist()
    changed = []
    for r in rows:
        try:
            stat = os.stat(paths[r])
            # a shard's own size is not in the table
            same = stat.st_size == size[r] if offset[r] < 0 else stat.st_size >= offset[r] + size[r]
        except (OSError, ValueError):
            same = False
        if not same:
            changed.append(paths[r])
    if changed:
        raise UsageError(
            f"{name}: {len(changed)} of {len(rows)} files looked at are gone or have another size, first: "
            f"{changed[0]}; run `extrema-fast index` again"
        )


def _shards(paths: list[str]) -> np.ndarray | None:
    """[n] int32 numbers of runs of equal paths; None where a path comes again after another."""
    starts = np.array([r == 0 or paths[r] != paths[r - 1] for r in range(len(paths))])
    return None if starts.sum() != len(set(paths)) else (np.cumsum(starts) - 1).astype(np.int32)


__all__ = [
    "COLUMNS",
    "OK",
    "Manifest",
    "Row",
    "from_rows",
    "is_manifest",
    "manifest_source",
    "read_manifest",
    "root_folder",
    "root_for",
    "write_manifest",
]
