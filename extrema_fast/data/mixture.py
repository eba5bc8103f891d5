"""Several image sources as one, each with its share of an epoch, described by a TOML file.

    [[source]]
    path = "imagenet/train"      # whatever --data.train takes, relative to this file
    passes = 1.0                 # how often an epoch goes through it (default 1)
    [[source]]
    path = "shards/web-{000..099}.tar"
    passes = 0.25
    label = "web"                # the class of all its images (default: their own)

An epoch goes through each source `passes` times. Whole passes repeat the source's rows in the table, as rows
of their own with random coins of their own. A fraction f that is left is one more copy of the rows, as an
entry (first row, end row, f) in `ImageSource.parts`: an epoch takes that share of them, so that each comes
once in 1/f epochs. 2.5 passes over n rows are thus 2n rows that come each epoch and n that come every second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import did_you_mean, parse_toml
from ..errors import UsageError
from .image_source import ImageSource, number_classes

log = logging.getLogger(__name__)

KEYS = ("path", "passes", "label")
MAX_PASSES = 1000


class Entry(NamedTuple):
    """One source of a mixture."""

    path: str
    passes: float
    label: str | None


def read_mixture(name: str, path: Path) -> list[Entry]:
    """The sources a mixture file names; UsageError saying what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{name}: cannot be read ({getattr(e, 'strerror', None) or e})") from e
    table = _toml(name, text)
    unknown = sorted(set(table) - {"source"})
    if unknown:
        raise UsageError(
            f"{name}: unknown key {unknown[0]!r}{did_you_mean(unknown[0], ['source'])}; {_EXAMPLE}"
        )
    entries = table.get("source")
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise UsageError(f"{name}: no [[source]] in it; {_EXAMPLE}")
    return [_entry(name, number, e) for number, e in enumerate(entries, 1)]


_EXAMPLE = 'a mixture has an entry such as [[source]] path = "folder" passes = 1.0 for each source'


def _toml(name: str, text: str) -> dict[str, Any]:
    try:
        return parse_toml(text)
    except ValueError as e:
        raise UsageError(f"{name}: not TOML ({e})") from e


def _entry(name: str, number: int, fields: dict[str, Any]) -> Entry:
    where = f"{name}: source {number}"
    for key in fields:
        if key not in KEYS:
            raise UsageError(
                f"{where}: unknown key {key!r}{did_you_mean(key, list(KEYS))}; known: {', '.join(KEYS)}"
            )
    path, passes, label = fields.get("path"), fields.get("passes", 1.0), fields.get("label")
    if not isinstance(path, str) or not path:
        raise UsageError(f"{where}: path: expected the place of images, got {path!r}")
    number_given = isinstance(passes, (int, float)) and not isinstance(passes, bool)
    if not number_given or not 0 < passes <= MAX_PASSES:
        raise UsageError(f"{where}: passes: expected a number above 0, at most {MAX_PASSES}, got {passes!r}")
    if label is not None and not (isinstance(label, str) and label.strip()):
        raise UsageError(f"{where}: label: expected the name of a class as text, got {label!r}")
    return Entry(path, float(passes), label)


def mixture_source(
    name: str, path: Path, open_one: Callable[[str], ImageSource], built_in: set[str]
) -> ImageSource:
    """The sources of a mixture file as one.

    open_one  opens a source by what its `path` says, made relative to the mixture file
    built_in  names that are no paths
    raises    UsageError: the file is wrong, or one of its sources (named with its number)

    Labels are kept where every source has them: its classes are the union of their names. They are dropped,
    with a warning, where one source has none, or where some name their classes by numbers and some by words.
    `shards` is kept where every source has shards.
    """
    entries = read_mixture(name, path)
    sources = [_open(name, path, n, e, open_one, built_in) for n, e in enumerate(entries, 1)]
    # one block of rows per whole pass, and one for the fraction that is left
    blocks = [
        (source, share)
        for n, (source, entry) in enumerate(zip(sources, entries, strict=True), 1)
        for share in _shares(len(source), entry.passes, f"{name}: source {n}")
    ]
    ends = np.cumsum([len(s) for s, _ in blocks]).tolist()
    parts = tuple((end - len(s), end, share) for (s, share), end in zip(blocks, ends, strict=True))
    labels, classes = _join_labels(name, sources, [s for s, _ in blocks])
    digest = hashlib.sha256()
    for source, entry in zip(sources, entries, strict=True):
        digest.update(f"{source.fingerprint}\t{entry.passes!r}\n".encode())
    if labels is not None:
        digest.update(labels.numpy().tobytes() + "\n".join(classes).encode("utf-8", "surrogateescape"))
    each = [s for s, _ in blocks]
    return ImageSource(
        name,
        [p for s in each for p in s.paths],
        labels,
        classes,
        digest.hexdigest(),
        spans=_join([s.spans for s in each], [(len(s), (0, -1)) for s in each], np.int64),
        names=[n for s in each for n in s.names or s.paths]
        if any(s.names is not None for s in each)
        else None,
        headers=_join([s.headers for s in each], [(len(s), (0, 0, 0)) for s in each], np.int32),
        shards=_join_shards(each),
        parts=parts if any(share < 1 for _, share in blocks) else (),
    )


def _open(
    name: str,
    path: Path,
    number: int,
    entry: Entry,
    open_one: Callable[[str], ImageSource],
    built_in: set[str],
) -> ImageSource:
    where = entry.path
    if where not in built_in:
        where = os.path.join(path.parent, os.path.expanduser(where))
    if where.lower().endswith(".toml"):
        raise UsageError(f"{name}: source {number}: {entry.path} is a mixture itself; name its sources here")
    try:
        source = open_one(where)
    except UsageError as e:
        raise UsageError(f"{name}: source {number}: {e}") from e
    if entry.label is None:
        return source
    return dataclasses.replace(
        source, labels=torch.zeros(len(source), dtype=torch.int64), classes=[entry.label]
    )


def _shares(rows: int, passes: float, where: str) -> list[float]:
    """1.0 for each whole pass, then the fraction that is left; UsageError where that is less than a row."""
    whole = math.floor(passes)
    rest = passes - whole
    # 0.1 + 0.2 and the like
    if rest < 1e-9:
        return [1.0] * whole
    if round(rest * rows) == 0:
        raise UsageError(f"{where}: passes: {rest:g} of {rows} images is less than one image an epoch")
    return [1.0] * whole + [rest]


def _join(tables: list[np.ndarray | None], blank: list[tuple[int, tuple[int, ...]]], dtype: type) -> Any:
    """Tables below each other, those that are None filled with a blank row; None when all are."""
    if all(t is None for t in tables):
        return None
    filled = [np.tile(np.array(row, dtype), (n, 1)) for n, row in blank]
    return np.concatenate([f if t is None else t for t, f in zip(tables, filled, strict=True)])


def _join_shards(sources: list[ImageSource]) -> np.ndarray | None:
    """Shard numbers that go on from source to source; None where a source has no shards."""
    tables, first = [], 0
    for source in sources:
        if source.shards is None:
            return None
        tables.append(source.shards + first)
        first = int(tables[-1][-1]) + 1
    return np.concatenate(tables).astype(np.int32)


def _join_labels(
    name: str, sources: list[ImageSource], blocks: list[ImageSource]
) -> tuple[Tensor | None, list[str]]:
    bare = [s.name for s in sources if s.labels is None]
    if bare:
        if len(bare) < len(sources):
            log.warning("%s: no labels in %s; the mixture has none", name, bare[0])
        return None, []
    numeric = [all(c.isdecimal() for c in s.classes) for s in sources]
    if len(set(numeric)) > 1:
        numbers, words = sources[numeric.index(True)], sources[numeric.index(False)]
        log.warning(
            "%s: classes are numbers in %s and names in %s (first: %r); the mixture has no labels",
            name,
            numbers.name,
            words.name,
            words.classes[0],
        )
        return None, []
    union = set().union(*(s.classes for s in sources))
    classes = sources[0].classes if set(sources[0].classes) == union else number_classes(sorted(union))[1]
    number_of = {c: i for i, c in enumerate(classes)}
    tables = [torch.tensor([number_of[c] for c in s.classes])[s.labels] for s in blocks]
    return torch.cat(tables), classes
