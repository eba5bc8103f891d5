"""`ImageSource`: images in a fixed order, each a whole file or a byte range of a larger one.

Training refers to images by row number: it keys all random parameters and the labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import did_you_mean
from ..errors import DataError, UsageError, counted
from ..files import open_plain
from .zips import is_zip, read_range, shared_folders

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSource:
    """Images in a fixed order, one per row.

    Attributes:
        name: what the user asked for.
        paths: the file of each row; for an image in a shard (tar, zip, table), the shard.
        labels: [n] int64 index into `classes`; None when the images have no labels.
        fingerprint: sha256 over the names (below the root), sizes in bytes and labels of all rows.
        spans: [n, 2] int64 offset and length in bytes within the file; length -1: the whole file; of a zip archive
            the offset of the member's header and its length when unpacked (`read_range`). None: whole files only.
        names: the name of each row in messages; None: its path.
        headers: [n, 3] int32 height and width as stored, EXIF orientation; 0: not known. None: none known.
        shards: [n] int32 number of the shard each row lies in, non-decreasing; None: no shards.
        value_range: of images of more than 8 bits (`pixels.Range`), as a manifest records it; None: not known.
        statistics: (mean, standard deviation) of the pixels of each channel, likewise.
        kinds: formats of its images, as a manifest records them, and `deep` for more than 8 bits; empty: not known.
        channels: that its images are read with, as of `image_files.load_image`; set by `read_as`.
        parts: (first row, end row, passes per epoch) of each source of a mixture; empty: each row once per epoch.
        root: folder below which whole files have the names that `hold_out` goes by.
        left_out: kind -> number of files (of a manifest: status -> rows) that are there and not used.
    """

    name: str
    paths: list[str]
    labels: Tensor | None
    classes: list[str]
    fingerprint: str
    spans: np.ndarray | None = None
    names: list[str] | None = None
    headers: np.ndarray | None = None
    shards: np.ndarray | None = None
    parts: tuple[tuple[int, int, float], ...] = ()
    value_range: tuple[float, ...] | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    kinds: frozenset[str] = frozenset()
    channels: int = 3
    root: str = ""
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def title(self, row: int) -> str:
        """The name of a row in messages."""
        return self.paths[row] if self.names is None else self.names[row]

    def size(self, row: int) -> int:
        """Bytes of a row's image; -1 when its file is gone."""
        if self.spans is not None and (length := int(self.spans[row, 1])) >= 0:
            return length
        try:
            return os.stat(self.paths[row]).st_size
        except OSError:
            return -1

    def read(self, row: int) -> bytes:
        """Reads the bytes of a row's image; OSError when the file is gone or ends too early."""
        offset, length = (0, -1) if self.spans is None else self.spans[row].tolist()
        path = self.paths[row]
        with open_plain(path) as f:
            return read_range(f, offset, length, path)


# class names that are written out
_SHOWN = 5


def among(classes: Sequence[str]) -> str:
    """` in 3 classes (ape, bee, cat)`; empty without classes."""
    if not classes:
        return ""
    shown = [*classes] if len(classes) <= _SHOWN else [*classes[: _SHOWN - 2], "..."]
    return f" in {counted(len(classes), 'class')} ({', '.join(shown)})"


def left_out(source: ImageSource) -> str:
    """`left out 3 files: .txt 2, .heic 1`; empty where nothing was."""
    kinds = sorted(source.left_out.items(), key=lambda item: -item[1])
    if not kinds:
        return ""
    text = ", ".join(f"{kind} {n}" for kind, n in kinds[:_SHOWN]) + (", ..." if len(kinds) > _SHOWN else "")
    return f"left out {counted(sum(source.left_out.values()), 'file')}: {text}"


def in_shards(
    name: str,
    paths: list[str],
    shards: np.ndarray,
    members: list[str],
    spans: np.ndarray,
    labels: Tensor | None,
    classes: list[str],
    *,
    marks: Sequence[str] = (),
    check: bool,
) -> ImageSource:
    """A source of images that are parts of larger files.

    Args:
        name: of the set in messages.
        paths: the files.
        shards: [n] the number of the file of each image, non-decreasing; `members`: its name there.
        spans: as of `ImageSource`.
        labels: [n] int64 index into `classes`; None: no labels.
        marks: what else tells each image from others.
        check: False: no warning about images of 0 bytes.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{os.path.basename(path)}\n".encode("utf-8", "surrogateescape"))
    numbers, sizes = shards.tolist(), spans[:, 1]
    written = [""] * len(members) if labels is None else [classes[label] for label in labels.tolist()]
    rows = zip(numbers, members, sizes.tolist(), marks or [""] * len(members), written, strict=True)
    for row in rows:
        digest.update(("\t".join(map(str, row)) + "\n").encode("utf-8", "surrogateescape"))
    names = [f"{paths[number]}:{member}" for number, member in zip(numbers, members, strict=True)]
    if check and not sizes.all():
        warn_of_empty(name, int((sizes == 0).sum()), len(names), names[int(sizes.argmin())])
    return ImageSource(
        name,
        [paths[number] for number in numbers],
        labels,
        classes,
        digest.hexdigest(),
        spans=spans,
        names=names,
        shards=shards.astype(np.int32),
    )


def number_classes(names: Sequence[str], first: Sequence[str] = ()) -> tuple[Tensor, list[str]]:
    """Labels ([n] int64) and class names of rows, given the class name of each row.

    Args:
        first: classes that come first, in this order, whether a row has them or not; the others are sorted.
    """
    others = set(names) - set(first)
    # numbers in numeric order, so that a label that is a number usually keeps it
    numeric = all(c.isdecimal() for c in others)
    classes = [*first, *(sorted(others, key=lambda c: (int(c), c)) if numeric else sorted(others))]
    number_of = {c: i for i, c in enumerate(classes)}
    return torch.tensor([number_of[c] for c in names], dtype=torch.int64), classes


def subset(source: ImageSource, rows: Tensor) -> ImageSource:
    """Returns the given rows ([k] int64) of a source, with the same classes."""
    key = hashlib.sha256(source.fingerprint.encode() + rows.numpy().tobytes())
    arrays: dict[str, Any] = {c: getattr(source, c) for c in ("labels", "spans", "headers", "shards")}
    arrays = {c: None if array is None else array[rows] for c, array in arrays.items()}
    return dataclasses.replace(
        source,
        paths=[source.paths[r] for r in rows.tolist()],
        names=None if source.names is None else [source.names[r] for r in rows.tolist()],
        fingerprint=key.hexdigest(),
        parts=(),
        **arrays,
    )


def hold_out(source: ImageSource, share: float) -> tuple[ImageSource, ImageSource]:
    """Splits off a share of a source's images: (the others, the ones held out), each in row order.

    An image is held out by a hash of its name below the root of the set (in one zip archive below the folder that holds
    all its images, in other shards of its shard and its name there), so it stays where it is when images are added or
    removed, or the set is moved. Every class (all images, where there are no
    labels) of at least two names has images on both sides: where the hash alone leaves none on one, the name with the
    smallest or the largest hash changes sides. A class of one name stays with the others.

    Args:
        share: probability of each image, between 0 and 1.

    Raises:
        UsageError: no image can be held out.
    """
    keys = np.fromiter((_key(name) for name in _names(source)), np.uint64, len(source))
    labels = np.zeros(len(source), np.int64) if source.labels is None else source.labels.numpy()
    low = np.full(labels.max(initial=0) + 1, np.iinfo(np.uint64).max)
    high = np.zeros_like(low)
    np.minimum.at(low, labels, keys)
    np.maximum.at(high, labels, keys)
    held = ((keys < np.uint64(share * 2**64)) | (keys == low[labels])) & (keys != high[labels])
    single = np.flatnonzero((low == high) & (np.bincount(labels, minlength=len(low)) > 0)).tolist()
    if not held.any():
        which = "every class has one image" if source.classes else "it has one image"
        raise UsageError(f"data.holdout: nothing of {source.name} can be held out: {which}; use data.test")
    if single and source.classes:
        log.warning(
            "%s: %s with one image, which is not held out, first: %s",
            source.name,
            counted(len(single), "class"),
            source.classes[single[0]],
        )
    rows = torch.arange(len(source))
    mask = torch.from_numpy(held)
    return subset(source, rows[~mask]), subset(source, rows[mask])


def _names(source: ImageSource) -> Iterator[str]:
    """The name of each row that stays when the set is moved."""
    # a list may hold absolute paths, and be named by a relative one
    roots = [os.path.join(r, "") for r in (source.root, os.path.abspath(source.root)) if source.root]
    if len(set(source.paths)) == 1 and source.names is not None and is_zip(source.paths[0]):
        # as when unpacked
        members = [name.removeprefix(f"{source.paths[0]}:").split("/") for name in source.names]
        around = len(shared_folders([parts[:-1] for parts in members]))
        yield from ("/".join(parts[around:]) for parts in members)
        return
    for row, path in enumerate(source.paths):
        name = source.title(row)
        if name != path:
            # in a shard
            yield name.removeprefix(os.path.join(os.path.dirname(path), ""))
            continue
        yield next((name[len(r) :] for r in roots if name.startswith(r)), name)


def _key(name: str) -> int:
    # in one Unicode form: file systems differ in which they keep
    text = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def match_classes(test: ImageSource, train: ImageSource) -> ImageSource:
    """Returns `test` with labels that index `train.classes`.

    Without it, a class folder that only one of two trees has would shift every later label.

    Raises:
        UsageError: a class of `test` is not in `train`.
    """
    if test.labels is None or train.labels is None or test.classes == train.classes:
        return test
    # the same name in another Unicode form is the same class
    number_of = {unicodedata.normalize("NFC", c): i for i, c in enumerate(train.classes)}
    numbers = [number_of.get(unicodedata.normalize("NFC", c), -1) for c in test.classes]
    unknown = sorted(c for c, number in zip(test.classes, numbers, strict=True) if number < 0)
    if unknown:
        raise UsageError(
            f"{test.name}: {len(unknown)} of {len(test.classes)} classes are not in {train.name}, "
            f"first: {unknown[0]!r}{did_you_mean(unknown[0], train.classes[:20])}"
        )
    return dataclasses.replace(test, labels=torch.tensor(numbers)[test.labels], classes=train.classes)


def warn_of_empty(name: str, empty: int, images: int, first: str) -> None:
    """Warns that some images have 0 bytes (training replaces them); DataError when all have."""
    what = f"{name}: {empty} of {images} images are empty (0 bytes), first: {first}"
    if images and empty == images:
        raise DataError(what)
    if empty:
        log.warning("%s; `extrema-fast index` lists the good ones", what)
