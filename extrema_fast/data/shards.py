"""Images in tar shards, read in place: a row is a shard and the place of an image's bytes in it.

webdataset's convention: members whose names agree up to the first dot of the base name are one sample; its
image has an image's extension, its label stands in `cls` (text, usually a number) or under "label" in
`json`. Other components are left alone. Nothing is unpacked, so the names of members are only names.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, UsageError
from .image_source import ImageSource, number_classes, warn_of_empty
from .manifest import unescape
from .tar_index import Member, members, split_name

log = logging.getLogger(__name__)

CLASSES = "classes.txt"
_PATTERN = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_SHARDS = 1_000_000
# a label is a few bytes; what is longer is no label
_MAX_LABEL = 1 << 20
_THREADS = 8
_SAY_EVERY_S = 10.0


class Sample(NamedTuple):
    """An image in a shard, with the member that holds its label."""

    key: str
    image: Member
    label: Member | None


class Shard(NamedTuple):
    """A shard's images in tar order, and the label of each as written (None: it has none)."""

    path: str
    bytes: int
    samples: list[Sample]
    labels: list[str | None]


# ---- which shards ---------------------------------------------------------------------------------


def is_pattern(spec: str) -> bool:
    """Whether `spec` names shards by braces or wildcards."""
    return bool(_PATTERN.search(spec))


def is_tar(path: str | os.PathLike[str]) -> bool:
    """Whether a file is named .tar or begins like one."""
    if str(path).lower().endswith(".tar"):
        return True
    try:
        with open(path, "rb") as f:
            return f.read(262)[257:] == b"ustar"
    except OSError:
        return False


def expand(pattern: str) -> list[str]:
    """The paths a pattern names: `{0000..0009}` and `{a,b}` by bash's rules, then `*`, `?`, `[...]`, `**`.

    raises UsageError when a path is missing or nothing matches
    """
    found: list[str] = []
    missing: list[str] = []
    for path in _expand_braces(os.path.expanduser(pattern)):
        if re.search(r"[*?\[]", path) and not os.path.exists(path):
            found += sorted(glob.glob(path, recursive=True))
        else:
            found.append(path)
            if not os.path.isfile(path):
                missing.append(path)
        if len(found) > _MAX_SHARDS:
            raise UsageError(f"{pattern}: names more than {_MAX_SHARDS} files")
    if missing:
        raise UsageError(f"{pattern}: {len(missing)} of {len(found)} files do not exist, first: {missing[0]}")
    if not found:
        raise UsageError(
            f"{pattern}: matches no file; expected tar files, as in shards/train-{{0000..0009}}.tar"
        )
    other = [p for p in found if not is_tar(p)]
    if other:
        raise UsageError(
            f"{pattern}: {len(other)} of {len(found)} files are not named .tar, first: {other[0]}; a pattern "
            "names tar shards; give a folder or a list file for image files"
        )
    return found


def _expand_braces(text: str) -> Iterator[str]:
    match = _BRACES.search(text)
    if not match:
        yield text
        return
    span = _RANGE.fullmatch(match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if abs(last - first) >= _MAX_SHARDS:
            raise UsageError(f"{text}: names more than {_MAX_SHARDS} files")
        width = max(map(len, span.groups())) if any(len(g) > 1 and g[0] == "0" for g in span.groups()) else 0
        step = 1 if last >= first else -1
        words = [f"{n:0{width}d}" for n in range(first, last + step, step)]
    else:
        words = match[1].split(",")
    for word in words:
        yield from _expand_braces(text[: match.start()] + word + text[match.end() :])


# ---- one shard ------------------------------------------------------------------------------------


def samples_of(path: str, found: list[Member], extensions: tuple[str, ...]) -> list[Sample]:
    """The images among a shard's members, each with its label's member.

    A member such as `photo.1.jpg`, an image by its last dot alone, is an image of its own where its sample has
    no other image, and something beside the image (a mask, a depth map) where it has.

    raises DataError for a key that comes twice, or a sample with two images
    """
    samples = []
    for key, group in groupby(found, key=lambda m: split_name(m.name)[0]):
        parts = list(group)
        kinds = [split_name(m.name)[1].lower() for m in parts]
        images = [m for m, kind in zip(parts, kinds, strict=True) if f".{kind}" in extensions]
        if len(images) > 1:
            raise DataError(
                f"{path}: two images of one key, {images[0].name} and {images[1].name}; a sample is one image, so "
                "give them names that differ before the first dot"
            )
        label = next((m for m, kind in zip(parts, kinds, strict=True) if kind == "cls"), None)
        label = label or next((m for m, kind in zip(parts, kinds, strict=True) if kind == "json"), None)
        if images:
            samples.append(Sample(key, images[0], label))
        else:
            alone = [m for m in parts if m.name.lower().endswith(extensions)]
            samples += [Sample(os.path.splitext(m.name)[0], m, None) for m in alone]
    seen: dict[str, Member] = {}
    for key, image, _ in samples:
        if key in seen:
            raise DataError(
                f"{path}: the key {key} comes twice, as {seen[key].name} at byte {seen[key].offset} and "
                f"{image.name} at byte {image.offset}; write the shard again with different names"
            )
        seen[key] = image
    return samples


def _open_shard(path: str, extensions: tuple[str, ...]) -> Shard:
    try:
        samples = samples_of(path, members(path), extensions)
        with open(path, "rb") as f:
            labels = [s.label and _label(f.fileno(), s.label) for s in samples]
            return Shard(path, os.fstat(f.fileno()).st_size, samples, labels)
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror})") from e


def _label(fd: int, member: Member) -> str | None:
    """What a `cls` or `json` component says; None where that is no label."""
    try:
        text = os.pread(fd, min(member.size, _MAX_LABEL), member.offset).decode()
        if split_name(member.name)[1].lower() == "cls":
            return text.strip() or None
        value = json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    return str(value).strip() or None


# ---- all shards -----------------------------------------------------------------------------------


def shard_source(
    name: str, paths: list[str], extensions: tuple[str, ...], *, check: bool = True
) -> ImageSource:
    """The images in tar shards, in the order of `paths` and within each of the tar.

    name        what messages call them
    extensions  of images, in lower case, with the dot
    check       False: nothing is said of images of 0 bytes
    raises      UsageError: a shard that cannot be read, or no image in any; DataError: no tar, a truncated or
                compressed one, a key that comes twice in a shard, or nothing but images of 0 bytes

    Labels are kept where every image has one. A file `classes.txt` beside the first shard names the classes
    of labels that are line numbers, counted from 0. The same key in two shards is two images.
    """
    shards = [s for s in _open_all(name, paths, extensions) if s.samples]
    if not shards:
        raise UsageError(
            f"{name}: no images in {len(paths)} tar {_files(paths)}; looked for members named "
            f"{', '.join('*' + e for e in extensions)}"
        )
    empty = len(paths) - len(shards)
    if empty:
        bare = sorted(set(paths) - {s.path for s in shards})
        log.warning("%s: no images in %d of %d shards, first: %s", name, empty, len(paths), bare[0])
    _warn(name, shards)
    spans = np.array([s.image[1:] for shard in shards for s in shard.samples], np.int64)
    names = [f"{shard.path}:{s.image.name}" for shard in shards for s in shard.samples]
    if check:
        void = spans[:, 1] == 0
        warn_of_empty(name, int(void.sum()), len(names), names[int(void.argmax())])
    labels, classes = _labels(name, shards)
    counts = [len(shard.samples) for shard in shards]
    return ImageSource(
        name,
        [shard.path for shard in shards for _ in shard.samples],
        labels,
        classes,
        _fingerprint(shards, labels, classes),
        spans=spans,
        names=names,
        shards=np.repeat(np.arange(len(shards), dtype=np.int32), counts),
    )


def _files(paths: list[str]) -> str:
    return "file" if len(paths) == 1 else "files"


def _open_all(name: str, paths: list[str], extensions: tuple[str, ...]) -> Iterator[Shard]:
    twice = sorted(p for p in paths if paths.count(p) > 1) if len(set(paths)) < len(paths) else []
    if twice:
        raise UsageError(f"{name}: names the shard {twice[0]} more than once")
    said = time.monotonic()
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
    try:
        for number, shard in enumerate(pool.map(lambda p: _open_shard(p, extensions), paths), 1):
            if time.monotonic() - said > _SAY_EVERY_S:
                said = time.monotonic()
                log.info("%s: %d of %d shards opened", name, number, len(paths))
            yield shard
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _warn(name: str, shards: list[Shard]) -> None:
    samples = [(shard, s) for shard in shards for s in shard.samples]
    outside = [
        s.image.name for _, s in samples if s.image.name.startswith("/") or ".." in s.image.name.split("/")
    ]
    if outside:
        log.warning(
            "%s: %d members have absolute or parent paths, first: %s; they are read in place, never unpacked",
            name,
            len(outside),
            outside[0],
        )
    first: dict[str, Shard] = {}
    again = [(shard, s.key) for shard, s in samples if first.setdefault(s.key, shard) is not shard]
    if again:
        shard, key = again[0]
        log.warning(
            "%s: %d keys are in more than one shard, first: %s in %s and %s; they are taken for different images",
            name,
            len(again),
            key,
            first[key].path,
            shard.path,
        )


def _labels(name: str, shards: list[Shard]) -> tuple[Tensor | None, list[str]]:
    written = [label for shard in shards for label in shard.labels]
    missing = written.count(None)
    if missing == len(written):
        return None, []
    if missing:
        row = written.index(None)
        titles = (f"{shard.path}:{s.image.name}" for shard in shards for s in shard.samples)
        log.warning(
            "%s: %d of %d images have no label (cls, or label in json), first: %s; used without labels",
            name,
            missing,
            len(written),
            next(islice(titles, row, None)),
        )
        return None, []
    labels, classes = number_classes(written)
    return _named(shards[0].path, labels, classes)


def _named(path: str, labels: Tensor, classes: list[str]) -> tuple[Tensor, list[str]]:
    """Labels and classes by the file `classes.txt` beside a shard, where there is one that fits."""
    listing = Path(path).with_name(CLASSES)
    if not listing.is_file() or not all(c.isdecimal() for c in classes):
        return labels, classes
    try:
        names = [unescape(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as e:
        log.warning("%s: cannot be read (%s); classes keep their numbers", listing, e)
        return labels, classes
    if int(classes[-1]) >= len(names) or len(set(names)) < len(names):
        log.warning(
            "%s: %d different names do not name the classes up to %s; classes keep their numbers",
            listing,
            len(set(names)),
            classes[-1],
        )
        return labels, classes
    return torch.tensor([int(c) for c in classes])[labels], names


def _fingerprint(shards: list[Shard], labels: Tensor | None, classes: list[str]) -> str:
    """sha256 over names and sizes of the shards and, for every image, name, place, size and label."""
    digest = hashlib.sha256()
    label_of = iter([] if labels is None else labels.tolist())
    for shard in shards:
        digest.update(f"{os.path.basename(shard.path)}\t{shard.bytes}\n".encode("utf-8", "surrogateescape"))
        for s in shard.samples:
            label = "" if labels is None else classes[next(label_of)]
            line = f"{s.image.name}\t{s.image.offset}\t{s.image.size}\t{label}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
