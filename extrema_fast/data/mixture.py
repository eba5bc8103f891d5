"""Mixtures: a TOML file that combines several sources (format: docs/data.md).

Each whole pass repeats the rows of a source, with different random parameters. A fractional pass f is one more copy of
the rows, as an entry (first row, end row, f) of `ImageSource.parts`: an epoch takes that fraction of them, so that each
row appears once in 1/f epochs.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import did_you_mean, parse_toml
from ..errors import UsageError, counted
from ..files import read_text
from .image_source import ImageSource, number_classes, subset
from .pixels import Range

log = logging.getLogger(__name__)

MAX_PASSES = 1000


class Entry(NamedTuple):
    """A source: its place, its passes per epoch, and the class of all its images (None: their own)."""

    path: str
    passes: float
    label: str | None


def read_mixture(name: str, path: Path) -> list[Entry]:
    """The entries of a mixture file; UsageError names what is wrong in it."""
    example = 'a mixture has an entry such as [[source]] path = "folder" passes = 1.0 for each source'
    try:
        table = parse_toml(read_text(path, "utf-8-sig"))
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{name}: cannot be read ({getattr(e, 'strerror', None) or e})") from e
    except ValueError as e:
        raise UsageError(f"{name}: not TOML ({e})") from e
    for key in table.keys() - {"source"}:
        raise UsageError(f"{name}: unknown key {key!r}{did_you_mean(key, ['source'])}; {example}")
    entries = table.get("source")
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise UsageError(f"{name}: no [[source]] in it; {example}")
    return [_entry(f"{name}: source {number}", e) for number, e in enumerate(entries, 1)]


def _entry(where: str, fields: dict[str, Any]) -> Entry:
    keys = list(Entry._fields)
    for key in fields.keys() - keys:
        raise UsageError(f"{where}: unknown key {key!r}{did_you_mean(key, keys)}; known: {', '.join(keys)}")
    path, passes, label = fields.get("path"), fields.get("passes", 1.0), fields.get("label")
    if not isinstance(path, str) or not path:
        raise UsageError(f"{where}: path: expected the place of images, got {path!r}")
    is_number = isinstance(passes, (int, float)) and not isinstance(passes, bool)
    if not is_number or not 0 < passes <= MAX_PASSES:
        raise UsageError(f"{where}: passes: expected a number above 0, at most {MAX_PASSES}, got {passes!r}")
    if label is not None and not (isinstance(label, str) and label.strip()):
        raise UsageError(f"{where}: label: expected the name of a class as text, got {label!r}")
    return Entry(path, float(passes), label)


def without_held_out(
    name: str, sources: list[ImageSource], held: list[ImageSource | None]
) -> list[ImageSource]:
    """The training images of each source without those that another source, under another name, holds out."""
    holders: dict[tuple[str, int], set[int]] = {}
    for number, source in enumerate(held):
        for place in [] if source is None else _places(source):
            holders.setdefault(place, set()).add(number)
    found, left_out = list[ImageSource](), 0
    for number, source in enumerate(sources):
        rows = [r for r, place in enumerate(_places(source)) if not holders.get(place, set()) - {number}]
        if not rows:
            raise UsageError(
                f"{name}: source {number + 1}: every image of {source.name} is held out as a test image by other "
                "sources of the mixture; remove it"
            )
        left_out += len(source) - len(rows)
        # a subset has another fingerprint, and other runs would not continue
        found.append(source if len(rows) == len(source) else subset(source, torch.tensor(rows)))
    if left_out:
        log.warning(
            "%s: left out %s for training that another source of the mixture holds out as test images",
            name,
            counted(left_out, "image"),
        )
    return found


def _places(source: ImageSource) -> Iterator[tuple[str, int]]:
    """Where each image is, by whatever name: real path of its file, and where in the file it begins."""
    real = cache(os.path.realpath)
    offsets = [0] * len(source) if source.spans is None else source.spans[:, 0].tolist()
    for path, offset in zip(source.paths, offsets, strict=True):
        folder, name = os.path.split(path)
        # links are resolved once per folder: there are millions of files in few
        yield (real(path) if os.path.islink(path) else os.path.join(real(folder), name)), offset


def join(name: str, sources: list[ImageSource], passes: list[float]) -> ImageSource:
    """Several sources as one, each with its passes per epoch.

    Labels are kept where every source has them: the classes are the union of their names. `shards` is kept where
    every source has shards.
    """
    # one block of rows per whole pass, and one for the remaining fraction
    blocks = [
        (source, share)
        for n, (source, times) in enumerate(zip(sources, passes, strict=True), 1)
        for share in _shares(len(source), times, f"{name}: source {n}")
    ]
    each = [source for source, _ in blocks]
    ends = np.cumsum([len(source) for source in each]).tolist()
    labels, classes = _join_labels(name, sources, each)
    digest = hashlib.sha256()
    for source, times in zip(sources, passes, strict=True):
        digest.update(f"{source.fingerprint}\t{times!r}\n".encode())
    if labels is not None:
        digest.update(labels.numpy().tobytes() + "\n".join(classes).encode("utf-8", "surrogateescape"))
    named = any(source.names is not None for source in each)
    return ImageSource(
        name,
        [p for source in each for p in source.paths],
        labels,
        classes,
        digest.hexdigest(),
        spans=_join(each, "spans", (0, -1), np.int64),
        names=[n for source in each for n in source.names or source.paths] if named else None,
        headers=_join(each, "headers", (0, 0, 0), np.int32),
        shards=_join_shards(each),
        value_range=_join_ranges(name, sources),
        parts=tuple((end - len(s), end, share) for (s, share), end in zip(blocks, ends, strict=True))
        if any(share < 1 for _, share in blocks)
        else (),
        left_out=dict(sum((Counter(source.left_out) for source in sources), Counter[str]())),
    )


def _shares(rows: int, passes: float, where: str) -> list[float]:
    """1.0 for each whole pass, then the remaining fraction; UsageError where that is less than one row."""
    rest, whole = math.modf(passes)
    # less is rounding, as of 0.1 + 0.2
    shares = [1.0] * int(whole) + [rest] * (rest >= 1e-9 or not whole)
    if round(shares[-1] * rows) == 0:
        raise UsageError(f"{where}: passes: {rest:g} of {rows} images is less than one image an epoch")
    return shares


def _join(sources: list[ImageSource], column: str, blank: tuple[int, ...], dtype: type) -> np.ndarray | None:
    """A column of all sources, with a blank row for each image of those that lack it; None when all do."""
    tables = [getattr(s, column) for s in sources]
    if all(t is None for t in tables):
        return None
    blanks = (np.full((len(s), len(blank)), blank) for s in sources)
    return np.concatenate([b if t is None else t for t, b in zip(tables, blanks, strict=True)]).astype(dtype)


def _join_shards(sources: list[ImageSource]) -> np.ndarray | None:
    """Shard numbers that continue from source to source; None where a source has no shards."""
    tables, first = [], 0
    for source in sources:
        if source.shards is None:
            return None
        tables.append(source.shards + first)
        first = int(tables[-1][-1]) + 1
    return np.concatenate(tables).astype(np.int32)


def _join_ranges(name: str, sources: list[ImageSource]) -> Range | None:
    """The range of the images of more than 8 bits of all sources; UsageError where they differ."""
    found = {s.value_range: s.name for s in sources if s.value_range is not None}
    if len(found) > 1:
        (a, one), (b, other), *_ = found.items()
        raise UsageError(
            f"{name}: images of more than 8 bits have the range {_shown(a)} in {one} and {_shown(b)} in {other}; list "
            "them all with one `extrema-fast index`, which finds one for all"
        )
    return next(iter(found), None)


def _shown(value_range: Range) -> str:
    return " ".join(f"{v:g}" for v in value_range)


def _join_labels(
    name: str, sources: list[ImageSource], blocks: list[ImageSource]
) -> tuple[Tensor | None, list[str]]:
    """Labels and classes where all sources have them, as numbers or as names; None and a warning elsewhere."""
    unlabeled = [s for s in sources if s.labels is None]
    kinds = {all(c.isdecimal() for c in s.classes): s for s in sources}
    why = ""
    if len(unlabeled) < len(sources) and unlabeled:
        why = f"no labels in {unlabeled[0].name}"
    elif len(kinds) > 1:
        why = f"classes are numbers in {kinds[True].name} and names in {kinds[False].name}"
    if why:
        log.warning("%s: %s; the mixture has no labels", name, why)
    if why or unlabeled:
        return None, []
    union = set().union(*(s.classes for s in sources))
    classes = sources[0].classes if set(sources[0].classes) == union else number_classes(sorted(union))[1]
    number_of = {c: i for i, c in enumerate(classes)}
    tables = [torch.tensor([number_of[c] for c in s.classes])[s.labels] for s in blocks]
    return torch.cat(tables), classes
