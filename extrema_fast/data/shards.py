"""Images in tar shards, read in place: a row is a shard and the byte range of an image in it.

Samples and labels follow webdataset's convention (docs/data.md). Each tar has an index file in DALI's format (`wds2idx`
v1.2: a line per sample with extension, offset, size and name of each component), except that white space in a name is
written as `\\x20` and so on, since lines would be ambiguous otherwise.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, UsageError
from ..files import check_plain, open_plain, read_text, write_file
from ..progress import ImageProgress
from .image_source import ImageSource, number_classes, warn_of_empty
from .manifest import unescape
from .photos import cache_root

log = logging.getLogger(__name__)

CLASSES = "classes.txt"
VERSION = "v1.2"
BLOCK = tarfile.BLOCKSIZE
_MAX_SHARDS = 1_000_000
# a label is a few bytes; what is longer is no label
_MAX_LABEL = 1 << 20
# samples, spread over a shard, whose labels are read first; if none has one, the others are not read, since that takes
# as long as all else
_PROBED = 64
_THREADS = 8
# members whose header is compared when an index is read
_CHECKED = 8
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A regular file in a tar: name, offset of its first byte and size in bytes."""

    name: str
    offset: int
    size: int


class _Sample(NamedTuple):
    key: str
    image: Member
    # the member that holds it
    label: Member | None


class _Shard(NamedTuple):
    path: str
    bytes: int
    # in tar order
    samples: list[_Sample]
    # of each sample as written; None: it has none
    labels: list[str | None]
    # ending -> members of kinds that are not read
    unread: Counter[str]


# ---- the members of a tar -------------------------------------------------------------------------


def split_name(name: str) -> tuple[str, str]:
    """Key and extension by webdataset's rule: split at the first dot of the base name."""
    key, dot, extension = name.rpartition("/")[2].partition(".")
    return name[: len(name) - len(dot) - len(extension)], extension


def _is_hidden(name: str) -> bool:
    # as a desktop's own files; not part of a sample
    return name.rpartition("/")[2].startswith(".")


def members(path: str) -> list[Member]:
    """The regular files of a tar, from its index or by a scan of its headers, whose result becomes its index."""
    real = os.path.realpath(path)
    key = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    places = [Path(path).with_suffix(".idx"), cache_root() / "shards" / f"{Path(real).stem}-{key}.idx"]
    for place in places:
        found = _from_index(path, place)
        if found is not None:
            return found
    found = scan(path)
    if found:
        for place in places:
            # root may write everywhere, and still should not where nobody is meant to
            if place.parent.is_dir() and not place.parent.stat().st_mode & 0o222:
                continue
            # somebody else's file of that name
            if os.path.lexists(place) and not _is_index(place):
                continue
            with suppress(OSError):
                write_file(place, index_text(found))
                break
    return found


def scan(path: str) -> list[Member]:
    """The regular files of a tar in its order, by its headers, hidden and sparse ones left out.

    DataError when it is no tar, or a truncated or damaged one; OSError when it cannot be read.
    """
    found: list[Member] = []
    left_out: list[str] = []
    if not check_plain(path).st_size:
        raise DataError(f"{path}: an empty file (0 bytes), not a tar; write it again, or remove it")
    try:
        with open_plain(path) as f, tarfile.open(path, "r:", f, errors="surrogateescape") as tar:
            while (m := tar.next()) is not None:
                # it keeps every member otherwise
                tar.members.clear()  # type: ignore[attr-defined]
                # tarfile believes a negative size, and goes round for ever
                if m.size < 0 or tar.offset <= m.offset:
                    raise ValueError(f"{m.name} claims {m.size} bytes")
                if _is_hidden(m.name):
                    continue
                if m.isreg() and not m.issparse():
                    found.append(Member(m.name, m.offset_data, m.size))
                elif not m.isdir():
                    left_out.append(m.name)
            end = tar.offset
    # a damaged header makes tarfile raise nearly anything
    except (tarfile.TarError, ValueError, EOFError, RecursionError, ArithmeticError) as e:
        raise _damaged(path, str(e), found) from e
    # tarfile takes a damaged header for the end
    with open_plain(path) as f:
        f.seek(end)
        block = f.read(BLOCK)
    if not block:
        log.warning("%s: has no end mark; it may have been cut off after %d files", path, len(found))
    elif block.strip(b"\0"):
        raise _damaged(path, f"no valid header at byte {end}", found)
    elif len(block) < BLOCK:
        raise _damaged(path, f"ends within a block at byte {end}", found)
    if left_out:
        log.warning(
            "%s: %d links, devices or sparse files left out, first: %s", path, len(left_out), left_out[0]
        )
    return found


def _damaged(path: str, reason: str, found: list[Member]) -> DataError:
    with open_plain(path) as f:
        head = f.read(8)
    for magic, command in _COMPRESSED.items():
        if head.startswith(magic):
            return DataError(
                f"{path}: a compressed tar; images are read in place, so decompress it first ({command} -d)"
            )
    if not found:
        return DataError(f"{path}: not a tar file, or cut off before its first image ({reason})")
    return DataError(
        f"{path}: truncated or damaged after {found[-1].name} (file {len(found)}): {reason}; copy or write it "
        "again"
    )


# ---- index files ----------------------------------------------------------------------------------


def index_text(found: Iterable[Member]) -> str:
    """The index of a tar with these members."""

    def words(m: Member) -> str:
        # without a dot wds2idx takes the whole name
        parts = (split_name(m.name)[1] or m.name, str(m.offset), str(m.size), m.name)
        return " ".join(re.sub(r"[ \t\n\v\f\r]", lambda c: f"\\x{ord(c[0]):02x}", part) for part in parts)

    lines = [" ".join(map(words, group)) for _, group in groupby(found, key=lambda m: split_name(m.name)[0])]
    return f"{VERSION} {len(lines)}\n" + "".join(line + "\n" for line in lines)


def parse_index(text: str) -> list[Member]:
    """The members of an index; ValueError for anything else."""
    head, *lines = text.removesuffix("\n").split("\n")
    version, count = head.split(" ")
    if version != VERSION or int(count) != len(lines):
        raise ValueError(f"starts with {head[:40]!r} and has {len(lines)} lines")
    found = []
    for line in lines:
        words = line.split(" ")
        if len(words) % 4:
            raise ValueError(f"{line[:80]!r}: expected 4 words per file")
        for i in range(0, len(words), 4):
            name = words[i + 3]
            if "\\x" in name:
                name = re.sub(r"\\x(20|09|0a|0b|0c|0d)", lambda m: chr(int(m[1], 16)), name)
            found.append(Member(name, int(words[i + 1]), int(words[i + 2])))
    return found


def _is_index(place: Path) -> bool:
    try:
        with open_plain(place) as f:
            return not place.is_symlink() and f.read(len(VERSION)) == VERSION.encode()
    except OSError:
        return False


def _from_index(path: str, index: Path) -> list[Member] | None:
    """The members that an index names; None when there is none, it is old, or it does not match the tar."""
    try:
        if index.stat().st_mtime_ns < os.stat(path).st_mtime_ns:
            log.info("%s: older than its tar, not used", index)
            return None
        found = parse_index(read_text(index, errors="surrogateescape"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        log.warning("%s: not used as an index (%s)", index, e)
        return None
    problem = _mismatch(path, found)
    if problem:
        log.warning("%s: does not match %s (%s), not used", index, path, problem)
        return None
    return found


def _mismatch(path: str, found: list[Member]) -> str:
    """Evidence that an index is not of this tar, from a few headers; empty: none."""
    last = max(found, key=lambda m: m.offset, default=Member("", 0, 0))
    with open_plain(path) as f:
        for m in {*found[:: max(1, len(found) // _CHECKED)], *found[-1:]}:
            info = _header_at(f, m.offset - BLOCK)
            if info is None or not info.isreg() or info.size != m.size:
                return f"no file of {m.size} bytes at byte {m.offset}"
        end = last.offset + -(-last.size // BLOCK) * BLOCK
        if os.fstat(f.fileno()).st_size < end:
            return f"the tar ends before {last.name} does"
        following = _header_at(f, end)
        if following is not None and not _is_hidden(following.name) and not following.isdir():
            return f"more files follow after {last.name}"
    return ""


def _header_at(f: BinaryIO, offset: int) -> tarfile.TarInfo | None:
    f.seek(max(0, offset))
    with suppress(tarfile.TarError):
        return tarfile.TarInfo.frombuf(f.read(BLOCK), "utf-8", "surrogateescape")
    return None


# ---- which shards ---------------------------------------------------------------------------------


def is_pattern(spec: str) -> bool:
    """Whether `spec` names shards by braces or wildcards."""
    return bool(re.search(r"[*?\[{]", spec))


def is_tar(path: str | os.PathLike[str]) -> bool:
    """Whether a file is named .tar or begins like one."""
    if str(path).lower().endswith(".tar"):
        return True
    try:
        with open_plain(path) as f:
            return f.read(262)[257:] == b"ustar"
    except OSError:
        return False


def expand(pattern: str) -> list[str]:
    """The paths a pattern names: `{0000..0009}` and `{a,b}` by bash's rules, then `*`, `?`, `[...]`, `**`."""
    found: list[str] = []
    for path in _expand_braces(os.path.expanduser(pattern)):
        has_wildcards = re.search(r"[*?\[]", path) and not os.path.exists(path)
        found += sorted(glob.glob(path, recursive=True)) if has_wildcards else [path]
        if len(found) > _MAX_SHARDS:
            raise UsageError(f"{pattern}: names more than {_MAX_SHARDS} files")
    missing = [path for path in found if not os.path.isfile(path)]
    if missing:
        raise UsageError(
            f"{pattern}: {len(missing)} of {len(found)} do not exist as files, first: {missing[0]}"
        )
    if not found:
        raise UsageError(
            f"{pattern}: matches no file; expected shards, as in shards/train-{{0000..0009}}.tar"
        )
    return found


def _expand_braces(text: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        yield text
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
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


# ---- samples and labels ---------------------------------------------------------------------------


def _samples(path: str, found: list[Member], extensions: tuple[str, ...]) -> list[_Sample]:
    """The images among a shard's members, each with its label's member.

    A member such as `photo.1.jpg`, an image by its last dot alone, is an image of its own where its sample has
    no other image, and something next to the image (a mask, a depth map) where it has.
    """
    samples = []
    kinds = {extension[1:] for extension in extensions}
    for key, group in groupby(((*split_name(m.name), m) for m in found), key=itemgetter(0)):
        parts = [(kind.lower(), m) for _, kind, m in group]
        images = [m for kind, m in parts if kind in kinds]
        # often something next to the image
        images = images or [m for kind, m in parts if kind == "npy"]
        if len(images) > 1:
            raise DataError(
                f"{path}: two images of one key, {images[0].name} and {images[1].name}; a sample is one image, so "
                "give them names that differ before the first dot"
            )
        if images:
            labels = [m for wanted in ("cls", "json") for kind, m in parts if kind == wanted]
            samples.append(_Sample(key, images[0], next(iter(labels), None)))
        else:
            alone = [m for _, m in parts if m.name.lower().endswith(extensions)]
            samples += [_Sample(os.path.splitext(m.name)[0], m, None) for m in alone]
    seen: dict[str, Member] = {}
    for key, image, _ in samples:
        if key in seen:
            raise DataError(
                f"{path}: the key {key} comes twice, as {seen[key].name} at byte {seen[key].offset} and "
                f"{image.name} at byte {image.offset}; write the shard again with different names"
            )
        seen[key] = image
    return samples


def _open_shard(path: str, extensions: tuple[str, ...], unread: tuple[str, ...]) -> _Shard:
    try:
        found = members(path)
        samples = _samples(path, found, extensions)
        with open_plain(path) as f:
            labels: list[str | None] = [None] * len(samples)
            if any(s.label and _label(f.fileno(), s.label) for s in samples[:: 1 + len(samples) // _PROBED]):
                labels = [s.label and _label(f.fileno(), s.label) for s in samples]
            left_out = (name for m in found if (name := m.name.lower()).endswith(unread))
            endings = Counter(os.path.splitext(name)[1] for name in left_out)
            return _Shard(path, os.fstat(f.fileno()).st_size, samples, labels, endings)
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror})") from e


def _label(fd: int, member: Member) -> str | None:
    """The label in a `cls` or `json` component; None where it has none."""
    try:
        value: Any = os.pread(fd, min(member.size, _MAX_LABEL), member.offset).decode()
        if split_name(member.name)[1].lower() == "json":
            value = json.loads(value)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (str(value).strip() or None) if type(value) in (int, str) else None


# ---- as images ------------------------------------------------------------------------------------


def shard_source(
    name: str, paths: list[str], extensions: tuple[str, ...], unread: tuple[str, ...], *, check: bool = True
) -> ImageSource:
    """Opens the images in tar shards, in the order of `paths` and within each of the tar.

    Labels are kept where every image has one. The same key in two shards is two images.

    Args:
        name: the name of the set in messages.
        extensions: of images, in lower case, with the dot; `unread`: of those that are only counted.
        check: False: no warning about images of 0 bytes.
    """
    found = list(_open_shards(name, paths, extensions, unread))
    damaged = [shard for shard in found if isinstance(shard, DataError)]
    opened = [shard for shard in found if isinstance(shard, _Shard)]
    if len(damaged) > 1:
        for error in damaged:
            log.warning("%s", error)
        raise DataError(f"{name}: {len(damaged)} of {len(paths)} shards cannot be used, first: {damaged[0]}")
    if damaged:
        raise damaged[0]
    shards = [shard for shard in opened if shard.samples]
    if not shards:
        raise UsageError(
            f"{name}: no images in {len(paths)} tar {'file' if len(paths) == 1 else 'files'}; looked for members "
            f"named {', '.join('*' + e for e in extensions)}"
        )
    if len(shards) < len(paths):
        empty = sorted(set(paths) - {s.path for s in shards})
        log.warning("%s: no images in %d of %d shards, first: %s", name, len(empty), len(paths), empty[0])
    spans = np.array([s.image[1:] for shard in shards for s in shard.samples], np.int64)
    names = [f"{shard.path}:{s.image.name}" for shard in shards for s in shard.samples]
    if check:
        void = spans[:, 1] == 0
        warn_of_empty(name, int(void.sum()), len(names), names[int(void.argmax())])
    labels, classes = _labels(name, shards, names)
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
        left_out=dict(sum((shard.unread for shard in opened), Counter[str]())),
    )


def _open_shards(
    name: str, paths: list[str], extensions: tuple[str, ...], unread: tuple[str, ...]
) -> Iterator[_Shard | DataError]:
    def open_shard(path: str) -> _Shard | DataError:
        try:
            return _open_shard(path, extensions, unread)
        except DataError as error:
            return error

    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
    try:
        with ImageProgress(f"opening {name}", len(paths), unit="shards") as bar:
            for shard in pool.map(open_shard, paths):
                bar.advance(1)
                yield shard
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _labels(name: str, shards: list[_Shard], names: list[str]) -> tuple[Tensor | None, list[str]]:
    written = [label for shard in shards for label in shard.labels]
    given = [label for label in written if label is not None]
    if given and len(given) < len(written):
        what = f"{len(written) - len(given)} of {len(written)} images have no label (cls, or label in json)"
        log.warning("%s: %s, first: %s; used without labels", name, what, names[written.index(None)])
    if not given:
        folders = {s.image.name.rpartition("/")[0] for shard in shards for s in shard.samples}
        # a folder for each image is no class
        if 1 < len(folders) <= len(names) // 2:
            log.info(
                "%s: no labels (cls, or label in json), but %d folders (%s); if these are classes, unpack the tars, or "
                "put the folders into a .zip: there folders are labels",
                *(name, len(folders), ", ".join(sorted(folders)[:3])),
            )
    if len(given) < len(written):
        return None, []
    return _name_classes(shards[0].path, *number_classes(given))


def _name_classes(path: str, labels: Tensor, classes: list[str]) -> tuple[Tensor, list[str]]:
    """Labels and classes by the file `classes.txt` next to a shard, where there is one that fits."""
    listing = Path(path).with_name(CLASSES)
    if not listing.is_file() or not all(c.isdecimal() for c in classes):
        return labels, classes
    try:
        names = [unescape(line) for line in read_text(listing).splitlines()]
        if int(classes[-1]) >= len(names) or len(set(names)) < len(names):
            raise ValueError(f"{len(set(names))} different names do not name the classes up to {classes[-1]}")
    except (OSError, ValueError) as e:
        log.warning("%s: not used (%s); classes keep their numbers", listing, e)
        return labels, classes
    return torch.tensor([int(c) for c in classes])[labels], names


def _fingerprint(shards: list[_Shard], labels: Tensor | None, classes: list[str]) -> str:
    """sha256 over names and sizes of the shards and, for every image, name, offset, size and label."""
    digest = hashlib.sha256()
    label_of = iter([] if labels is None else labels.tolist())
    for shard in shards:
        digest.update(f"{os.path.basename(shard.path)}\t{shard.bytes}\n".encode("utf-8", "surrogateescape"))
        for s in shard.samples:
            label = "" if labels is None else classes[next(label_of)]
            line = f"{s.image.name}\t{s.image.offset}\t{s.image.size}\t{label}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
