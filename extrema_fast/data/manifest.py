"""Manifests as tables and as image sources; `manifest_text.py` describes the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from sys import intern
from typing import Any, TextIO

import numpy as np
import torch

from ..errors import DataError, UsageError
from .image_source import ImageSource
from .manifest_text import (
    COLUMNS,
    MAGIC,
    NUMBERS,
    OK,
    TEXT,
    Row,
    escape,
    header_lines,
    parse_header,
    parse_row,
    row_line,
    unescape,
    write_lines,
)

__all__ = [
    "COLUMNS",
    "MAGIC",
    "OK",
    "Manifest",
    "Row",
    "escape",
    "header_lines",
    "is_manifest",
    "manifest_source",
    "parse_header",
    "read_manifest",
    "root_folder",
    "root_for",
    "row_line",
    "unescape",
    "write_lines",
]

_LISTS = ("path", "member", "kind", "status")
# rows turned from text into arrays at a time: whole tables as Python strings need gigabytes
_CHUNK = 1 << 16
# good rows whose file is looked at when a manifest is opened
_PROBES = 16


@dataclass(frozen=True)
class Manifest:
    """A manifest's columns, each with one entry per row; `manifest_text.py` says what they are.

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


def _arrays(columns: dict[str, list[Any]]) -> dict[str, Any]:
    return {c: v if c in _LISTS else np.array(v, _dtype(c)) for c, v in columns.items()}


def _dtype(column: str) -> type:
    return np.int32 if column in ("width", "height", "orientation") else np.int64


# ---- files ----------------------------------------------------------------------------------------


def is_manifest(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a manifest; False for what cannot be read."""
    try:
        with open(path, "rb") as f:
            return f.read(len(MAGIC)) == MAGIC.encode()
    except OSError:
        return False


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
        columns[c] = [v for part in parts for v in part] if c in _LISTS else np.concatenate(parts)
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
        columns |= {c: [unescape(v) for v in columns[c]] for c in TEXT}
    # the same few words in every row
    columns |= {c: list(map(intern, columns[c])) for c in ("kind", "status")}
    columns["crc32"] = [int(v, 16) for v in columns["crc32"]]
    columns["label"] = [number_of[v] for v in columns["label"]]
    columns |= {c: list(map(int, columns[c])) for c in NUMBERS}
    arrays = _arrays(columns)
    if not all(arrays["path"]) or not _in_range(arrays).all():
        raise ValueError
    return arrays


def _in_range(a: dict[str, Any]) -> np.ndarray:
    good = np.array([s == OK for s in a["status"]], bool)
    seen = (a["bytes"] > 0) & (a["width"] > 0) & (a["height"] > 0)
    whole = (a["offset"] >= -1) & (a["bytes"] >= 0) & (a["width"] >= 0) & (a["height"] >= 0)
    whole &= (a["crc32"] >= 0) & (a["crc32"] < 2**32)
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

    check   looks whether the files of a few rows are there, with their sizes
    raises  UsageError: a damaged manifest, a root that is gone, files that changed; DataError: no good row
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
        _fingerprint(manifest, rows),
        spans=spans,
        names=names,
        headers=np.stack([manifest.height, manifest.width, manifest.orientation], 1)[good],
        shards=_shards(paths) if inside.all() else None,
    )


def _fingerprint(manifest: Manifest, rows: list[int]) -> str:
    paths = [escape(manifest.path[r]) for r in rows]
    numbers = [c[rows].tolist() for c in (manifest.offset, manifest.bytes, manifest.crc32)]
    names = [escape(c) for c in [*manifest.classes, ""]]
    labels = [names[i] for i in manifest.label[rows].tolist()]
    digest = hashlib.sha256()
    for row in zip(paths, *numbers, labels, strict=True):
        digest.update("\t".join(map(str, row)).encode() + b"\n")
    return digest.hexdigest()


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
