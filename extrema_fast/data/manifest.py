"""The manifest: a table of verified images, one per row, good or bad (format: docs/data.md).

A tab-separated UTF-8 text file. Line 1 is a magic word and a JSON object, line 2 the column names; each further line
is an image.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch

from ..errors import DataError, StorageError, UsageError
from ..files import new_file, open_plain
from .image_source import ImageSource
from .photos import cache_root
from .pixels import USUAL, Range, natural_range
from .zips import is_zip

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
_INT32 = ("width", "height", "orientation")
# columns with escapes
_TEXT = ("path", "member", "label", "status")
# kinds of images of more than 8 bits and of arrays: the format, then the smallest and the largest value of each channel
_DEEP_KIND = re.compile(r"\w+ (\S+\.\.\S+)")
# rows turned from text into arrays at a time: whole tables as Python strings need gigabytes
_CHUNK = 1 << 16
# good rows whose file is checked when a manifest is opened
_CHECKED = 16


@dataclass(frozen=True)
class Manifest:
    """A manifest's columns, with one entry per row.

    Attributes:
        root: folder that relative paths start at, as written in the file.
        classes: names in label order.
        label: [n] int64 index into `classes`; -1: none.
        offset, bytes, mtime_ns, crc32: [n] int64.
        width, height, orientation: [n] int32.
        path, member, kind, status: lists of n str.
        notes: the other entries of the first line.
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


# ---- text -----------------------------------------------------------------------------------------

_ESCAPED = {"\t": "\\t", "\n": "\\n", "\r": "\\r", "\\": "\\\\"}
_PLAIN = {v: k for k, v in _ESCAPED.items()}
_ODD = re.compile("[\t\n\r\\\\\ud800-\udfff]")
_ESCAPE = re.compile(r"\\(?:[tnr\\]|x[0-9a-f]{2})")


def escape(text: str) -> str:
    """`text` without tabs, line ends and surrogates (as `os.fsdecode` makes them of undecodable bytes)."""
    return _ODD.sub(lambda m: _ESCAPED.get(m[0]) or _byte(m[0]), text) if _ODD.search(text) else text


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
    text = row._asdict() | {c: escape(getattr(row, c)) for c in _TEXT} | {"crc32": f"{row.crc32:08x}"}
    return "\t".join(map(str, text.values())) + "\n"


def parse_header(first: str, columns: str, name: str) -> dict[str, Any]:
    """The JSON object in the first of the two lines that begin a manifest; UsageError names a wrong line."""
    version, _, about = first.removeprefix(MAGIC).partition("\t")
    if not first.startswith(MAGIC):
        raise UsageError(
            f"{name}: line 1: not a manifest (expected {MAGIC + str(VERSION)!r}); see extrema-fast index --help"
        )
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


def write_lines(path: str | os.PathLike[str], head: str, lines: Iterable[str]) -> None:
    """Writes `head` and `lines` to a file atomically; after a StorageError the old one is untouched."""
    target = Path(path)
    try:
        with new_file(target) as f:
            f.write(head.encode())
            f.writelines(line.encode() for line in lines)
    except OSError as e:
        raise StorageError(f"{target}: cannot be written ({e.strerror})") from e


# ---- tables ---------------------------------------------------------------------------------------


def is_manifest(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a manifest; False for what cannot be read."""
    try:
        with open_plain(path) as f:
            return f.read(len(MAGIC)) == MAGIC.encode()
    except OSError:
        return False


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads a whole manifest, bad rows too.

    Raises:
        UsageError: no manifest, or a damaged one; names file, line and column.
    """
    name = str(path)
    try:
        with open_plain(path) as plain, io.TextIOWrapper(plain, "utf-8", newline="\n") as f:
            header = parse_header(f.readline(), f.readline(), name)
            root, classes = header.pop("root"), header.pop("classes")
            chunks = list(_read_rows(f, name, classes))
    except UnicodeDecodeError as e:
        raise UsageError(f"{name}: not a manifest: not UTF-8 text ({e.reason})") from e
    except OSError as e:
        raise UsageError(f"{name}: cannot be read ({e.strerror})") from e
    columns: dict[str, Any] = {}
    for c in COLUMNS:
        is_list = c in ("path", "member", "kind", "status")
        columns[c] = (
            [v for part in chunks for v in part[c]] if is_list else np.concatenate([p[c] for p in chunks])
        )
    return Manifest(root, classes, **columns, notes=header)


def _read_rows(f: TextIO, name: str, classes: list[str]) -> Iterator[dict[str, Any]]:
    """Columns of `_CHUNK` rows at a time, at least once."""
    number_of = {"": -1} | {c: i for i, c in enumerate(classes)}
    first, lines = 3, list(islice(f, _CHUNK))
    yield _columns(lines, f"{name}: line", first, number_of)
    while len(lines) == _CHUNK:
        first, lines = first + _CHUNK, list(islice(f, _CHUNK))
        yield _columns(lines, f"{name}: line", first, number_of)


def _columns(lines: list[str], where: str, first: int, number_of: dict[str, int]) -> dict[str, Any]:
    """The columns of some lines, the first of which has the number `first`; UsageError names a wrong one."""

    def check(fine: Any, problem: str, values: Sequence[Any] | np.ndarray) -> None:
        wrong = np.flatnonzero(~np.asarray(fine, bool)).tolist()
        if wrong:
            raise UsageError(f"{where} {first + wrong[0]}: {problem.format(values[wrong[0]])}")

    counts = [line.count("\t") + 1 for line in lines]
    wanted = f"expected {len(COLUMNS)} fields separated by tabs, got {{}}"
    check([n == len(COLUMNS) for n in counts], wanted, counts)
    text = "".join(lines).replace("\r\n", "\n").removesuffix("\n")
    fields = text.replace("\n", "\t").split("\t") if lines else []
    columns: dict[str, Any] = {c: fields[i :: len(COLUMNS)] for i, c in enumerate(COLUMNS)}
    if "\\" in text:
        columns |= {c: [unescape(v) for v in columns[c]] for c in _TEXT}
    # the same few words in every row
    columns |= {c: list(map(intern, columns[c])) for c in ("kind", "status")}
    paths, labels = columns["path"], columns["label"]
    check([p != "" for p in paths], "the path is empty", paths)
    unknown = f"label {{!r:.80}} is none of the {len(number_of) - 1} classes in line 1"
    check([v in number_of for v in labels], unknown, labels)
    columns["label"] = np.array([number_of[v] for v in labels], np.int64)
    for c, (least, most) in _RANGES.items():
        column, base = columns[c], 16 if c == "crc32" else 10
        wanted = "8 hexadecimal digits" if c == "crc32" else f"a whole number from {least} to {most}"
        try:
            numbers = np.array([int(v, base) for v in column], np.int64)
            fine: Any = (numbers >= least) & (numbers <= most)
        except (ValueError, OverflowError):
            fine = [_is_in(v, base, least, most) for v in column]
        check(fine, f"{c}: expected {wanted}, got {{!r:.40}}", column)
        columns[c] = numbers.astype(np.int32) if c in _INT32 else numbers
    sizes = np.stack([columns[c] for c in ("bytes", "width", "height")], 1)
    fine = np.array([s != OK for s in columns["status"]], bool) | sizes.all(1)
    check(fine, "status is ok with {0[0]} bytes, width {0[1]}, height {0[2]}", sizes)
    return columns


def _is_in(text: str, base: int, least: int, most: int) -> bool:
    try:
        return least <= int(text, base) <= most
    except ValueError:
        return False


def root_folder(path: str | os.PathLike[str], root: str) -> str:
    """The folder that a manifest's relative paths start at, given the `root` of its first line."""
    # of the file itself, not of a link to it
    return os.path.normpath(os.path.join(os.path.dirname(os.path.realpath(path)), root))


def root_for(path: str | os.PathLike[str], folder: str) -> str:
    """The `root` to write in a manifest at `path`: relative where both can move together, else absolute."""
    here = os.path.dirname(os.path.realpath(path))
    real = os.path.realpath(folder)
    return os.path.relpath(real, here) if os.path.commonpath([here, real]) == here else real


# ---- as images ------------------------------------------------------------------------------------


def manifest_source(path: str | os.PathLike[str], *, check: bool = True) -> ImageSource:
    """Opens the good rows of a manifest as an image source.

    Sizes and orientations come from the table; the fingerprint is sha256 over path, offset, bytes, crc32
    and label of the good rows, so a data set that has moved is the same and a changed one is not.

    Args:
        check: whether the files of a few rows are looked up, with their sizes.

    Raises:
        UsageError: a damaged manifest, a root that is gone, or files that changed.
        DataError: no good row.
    """
    name = str(path)
    manifest = read_manifest(path)
    good = manifest.good()
    if not len(good):
        raise DataError(f"{name}: none of its {len(manifest)} rows has status ok; nothing to train on")
    root = root_folder(path, manifest.root)
    if Path(root).is_relative_to(os.path.realpath(cache_root())):
        _fill_cache(name, manifest, root)
    if not os.path.isdir(root):
        raise UsageError(
            f'{name}: its images should be in {root}, which does not exist; set "root" in its first line to '
            "where they are now"
        )
    rows = good.tolist()
    paths = [os.path.join(root, manifest.path[r]) for r in rows]
    offset, size, label = manifest.offset[good], manifest.bytes[good], manifest.label[good]
    if check:
        _check_files(name, paths, offset, size)
    labels = None
    if manifest.classes:
        if (label < 0).any():
            line = rows[int((label < 0).argmax())] + 3
            raise UsageError(f"{name}: line {line}: no label, though line 1 names classes")
        labels = torch.from_numpy(label)
    in_shard, spans, names = offset >= 0, None, None
    kinds = {manifest.kind[r] for r in rows}
    # sizes of TIFF files are those after rotation, though older versions wrote their orientation
    tiff = [kind.partition(" ")[0] == "tiff" for kind in manifest.kind]
    orientation = np.where(tiff, 1, manifest.orientation).astype(np.int32)
    if in_shard.any():
        spans = np.stack([np.maximum(offset, 0), np.where(in_shard, size, -1)], 1)
        members = [manifest.member[r] for r in rows]
        names = [f"{p}:{m}" if m else p for p, m in zip(paths, members, strict=True)]
    return ImageSource(
        name,
        paths,
        labels,
        manifest.classes,
        _fingerprint(manifest, rows),
        spans=spans,
        names=names,
        headers=np.stack([manifest.height, manifest.width, orientation], 1)[good],
        shards=_shards(paths) if in_shard.all() else None,
        value_range=value_range(kinds) or _range_before(manifest.notes),
        statistics=statistics(manifest.notes),
        kinds=frozenset(kind.partition(" ")[0] for kind in kinds)
        | {"deep" for kind in kinds if ".." in kind},
        root=root,
        left_out=dict(Counter(s.partition(":")[0] for s in manifest.status if s != OK)),
    )


def _fill_cache(name: str, manifest: Manifest, root: str) -> None:
    """Writes the files of built-in sets and the copies of Parquet files again, where the cache has been cleared."""
    from .sources import BUILT_IN, open_source

    def lost() -> bool:
        return not all(os.path.exists(os.path.join(root, p)) for p in set(manifest.path))

    data = manifest.notes.get("data")
    if not isinstance(data, str) or not lost():
        return
    data = data if data in BUILT_IN else root_folder(name, data)
    try:
        if not is_manifest(data):
            open_source(data, check=False)
    except UsageError as e:
        raise UsageError(f"{name}: its images were copied to {root}, which has been cleared, from {e}") from e
    if lost():
        raise UsageError(
            f"{name}: its images were copied to {root}, which has been cleared, from {data}, which has changed; run "
            "`extrema-fast index` again"
        )


def _range_before(notes: dict[str, Any]) -> Range | None:
    """The range that a packed set's images had before they became 8 bits."""
    found = _floats(notes.get("range"))
    whole = len(found) % 2 == 0 and all(b < w for b, w in zip(found[::2], found[1::2], strict=True))
    return (found or None) if whole else None


def statistics(notes: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of each channel, in the first line of a manifest; None: not there."""
    mean, std = (_floats(notes.get(name)) for name in ("mean", "std"))
    return (mean, std) if len(mean) == len(std) > 0 and min(std) > 0 else None


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, list) and all(type(v) is float for v in values) else ()


def value_range(kinds: Iterable[str]) -> Range | None:
    """The range of a set's images of more than 8 bits, from the values in their kinds; None: the usual one.

    It is that of each channel, where they differ.
    """
    found = [m[1].split(",") for kind in set(kinds) if (m := _DEEP_KIND.fullmatch(kind))]
    if not found:
        return None
    # those of another number of channels cannot be read with the rest
    channels = max(Counter(map(len, found)).items(), key=lambda item: (item[1], item[0]))[0]
    ranges = []
    for pairs in zip(*(texts for texts in found if len(texts) == channels), strict=True):
        values = [text.partition("..")[::2] for text in pairs]
        low, high = min(float(v) for v, _ in values), max(float(v) for _, v in values)
        # as written by `deep_kind`, and by older versions
        floats = any(set(".en") & set(text.replace("..", "")) for text in pairs)
        ranges.append((natural_range(low, high, floats), floats, low == high))
    different = {r for r, _, _ in ranges}
    if len(different) > 1:
        return tuple(v for r, _, _ in ranges for v in r)
    only, floats, constant = ranges[0]
    return None if only == USUAL[not floats] or (constant and channels == 1) else only


def _fingerprint(manifest: Manifest, rows: list[int]) -> str:
    paths = [escape(manifest.path[r]) for r in rows]
    numbers = [c[rows].tolist() for c in (manifest.offset, manifest.bytes, manifest.crc32)]
    names = [escape(c) for c in [*manifest.classes, ""]]
    labels = [names[i] for i in manifest.label[rows].tolist()]
    digest = hashlib.sha256()
    for row in zip(paths, *numbers, labels, strict=True):
        digest.update("\t".join(map(str, row)).encode() + b"\n")
    return digest.hexdigest()


def _check_files(name: str, paths: list[str], offset: np.ndarray, size: np.ndarray) -> None:
    rows = np.unique(np.linspace(0, len(paths) - 1, _CHECKED).astype(int)).tolist()
    changed = []
    for r in rows:
        try:
            found = os.stat(paths[r]).st_size
            # the size of a shard is not in the table, nor how far a member of a zip archive is compressed
            least = offset[r] if is_zip(paths[r]) else offset[r] + size[r]
            same = found == size[r] if offset[r] < 0 else found >= least
        except (OSError, ValueError):
            same = False
        if not same:
            changed.append(paths[r])
    if changed:
        raise UsageError(
            f"{name}: {len(changed)} of {len(rows)} files checked are gone or have another size, first: "
            f"{changed[0]}; run `extrema-fast index` again"
        )


def _shards(paths: list[str]) -> np.ndarray | None:
    """[n] int32 numbers of runs of equal paths; None where a path comes again after another."""
    starts = np.array([r == 0 or paths[r] != paths[r - 1] for r in range(len(paths))])
    return None if starts.sum() != len(set(paths)) else (np.cumsum(starts) - 1).astype(np.int32)
