"""Which images there are: a built-in set, a folder of classes, a flat folder or a list file.

`open_source` tells them apart and gives an `ImageSource` (`image_source.py`).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from pathlib import Path

import torch

from . import rng
from .config import did_you_mean
from .errors import DataError, UsageError
from .image_source import ImageSource, match_classes, subset
from .manifest import is_manifest, manifest_source
from .photos import write_photos, write_synthetic

__all__ = ["ImageSource", "match_classes", "open_source", "subset"]

log = logging.getLogger(__name__)

# what both decoders read; GIF is left out because DALI does not
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
# images that no loader reads; `index` reports them
UNREAD = (".avif", ".gif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".psd", ".svg")
BUILT_IN = {"photos": write_photos, "synthetic": write_synthetic}

_SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
_SPLIT_NAMES = {name for names in _SPLITS.values() for name in names}
# no epoch of training has this number, so `limit` does not repeat the order of one
_LIMIT_EPOCH = 2**32 - 1


def open_source(
    spec: str, split: str = "train", *, limit: int = 0, seed: int = 0, check: bool = True
) -> ImageSource:
    """The images `spec` names.

    spec     `photos` or `synthetic` (built in; `./photos` is a folder of that name), a folder with one
             folder per class, a folder of images (no labels), or a text file with one path per line,
             optionally a tab and a label; relative paths start at the folder of that file
    split    `train` or `test`: which part of a built-in set; no effect on a folder or list file
    limit    only the first N of a shuffle keyed by `seed`, in row order (0: all)
    check    False keeps rows that are gone, have 0 bytes or a kind that no loader reads, for `index` to report
    raises   UsageError: nothing there, or not what is expected; DataError: files of 0 bytes

    Folders below a class folder belong to it, links are followed, hidden files are skipped.
    """
    if split not in _SPLITS:
        raise UsageError(f"split: expected 'train' or 'test', got {split!r}")
    if limit < 0:
        raise UsageError(f"data.limit: expected 0 (all) or more, got {limit}")
    if spec in BUILT_IN:
        source = _from_folder(spec, BUILT_IN[spec]() / split, split, check)
    elif not spec:
        raise UsageError(f"no {split} images given; expected {_EXPECTED}")
    else:
        path = Path(spec).expanduser()
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
        except OSError as e:
            raise UsageError(f"{spec}: cannot be read ({e.strerror})") from e
        if is_folder:
            source = _from_folder(spec, path, split, check)
        elif is_file and is_manifest(path):
            source = manifest_source(spec)
        elif is_file:
            source = _from_list(spec, path, check)
        else:
            raise UsageError(f"{spec}: {_what_is_there(path)}; expected {_EXPECTED}")
    if 0 < limit < len(source):
        rows = rng.permutation(len(source), seed=seed, epoch=_LIMIT_EPOCH)[:limit].sort().values
        source = subset(source, rows)
    return source


_EXPECTED = (
    "photos, synthetic, a folder of class folders, a folder of images, or a list file "
    "(one path per line, optionally a tab and a label)"
)


def _what_is_there(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    if parent != path.parent:
        return f"does not exist ({path.parent} neither; {parent} does)"
    try:
        names = sorted(e.name for e in os.scandir(parent) if not e.name.startswith("."))
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    near = did_you_mean(path.name, [*names, *BUILT_IN])
    return "does not exist" + (near if near.startswith("; did") else "")


# ---- folders --------------------------------------------------------------------------------------


def _from_folder(name: str, root: Path, split: str, check: bool) -> ImageSource:
    kinds = EXTENSIONS if check else EXTENSIONS + UNREAD
    folders, files = _list(root)
    found = Counter(_suffix(f) for f in files)
    flat = [f for f in files if f.lower().endswith(kinds)]
    _refuse_splits(name, root, folders, split)
    seen = {os.path.realpath(root)}
    inside = {folder: _walk(root / folder, seen, found, kinds) for folder in folders}
    if not flat and not any(inside.values()):
        raise UsageError(_no_images(name, len(inside), found))
    if flat:
        nested = [p for folder in folders for p in inside[folder]]
        if nested:
            log.warning(
                "%s: %d images beside folders with %d more; all are used, without labels",
                name,
                len(flat),
                len(nested),
            )
        return _finish(name, root, sorted([str(root / f) for f in flat] + nested), None, [], check)
    paths = [p for folder in folders for p in inside[folder]]
    labels = [label for label, folder in enumerate(folders) for _ in inside[folder]]
    empty = [folder for folder in folders if not inside[folder]]
    if empty:
        log.warning("%s: no images in %d of %d class folders: %s", name, len(empty), len(folders), empty[:3])
    return _finish(name, root, paths, labels, folders, check)


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the files in a folder, hidden ones left out."""
    try:
        entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)
        kinds = [e.is_dir() for e in entries]
    except OSError as e:
        raise UsageError(f"{folder}: cannot be read ({e.strerror}); check its permissions") from e
    folders = [e.name for e, is_dir in zip(entries, kinds, strict=True) if is_dir]
    return folders, [e.name for e, is_dir in zip(entries, kinds, strict=True) if not is_dir]


def _walk(folder: Path, seen: set[str], found: Counter[str], kinds: tuple[str, ...]) -> list[str]:
    real = os.path.realpath(folder)
    # a link to a folder above would be followed for ever
    if any(real == s or s.startswith(real + os.sep) for s in seen):
        log.warning("%s: a link to a folder above it, skipped", folder)
        return []
    folders, files = _list(folder)
    found.update(_suffix(f) for f in files)
    paths = [str(folder / f) for f in files if f.lower().endswith(kinds)]
    for name in folders:
        paths += _walk(folder / name, seen | {real}, found, kinds)
    return sorted(paths)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no extension"


def _refuse_splits(name: str, root: Path, folders: list[str], split: str) -> None:
    # a data set's root instead of one of its parts: `train` and `test` would become the classes
    parts = [f for f in folders if f.lower() in _SPLIT_NAMES]
    if parts and (len(parts) == len(folders) or len(parts) > 1):
        match = next((f for f in parts if f.lower() in _SPLITS[split]), parts[0])
        raise UsageError(
            f"{name}: holds {', '.join(p + '/' for p in parts)}, which look like the parts of a data set, "
            f"not like classes; did you mean {root / match}?"
        )


def _no_images(name: str, folders: int, found: Counter[str]) -> str:
    total = sum(found.values())
    if not total and not folders:
        what = "the folder is empty"
    elif not total:
        what = f"found {folders} folders without files"
    else:
        kinds = ", ".join(f"{kind} {n}" for kind, n in found.most_common(5))
        what = f"found {total} files, of: {kinds}" + (", ..." if len(found) > 5 else "")
    return f"{name}: no images; looked for {', '.join(EXTENSIONS)} (also in folders below); {what}"


# ---- list files -----------------------------------------------------------------------------------


def _from_list(name: str, path: Path, check: bool) -> ImageSource:
    if path.name.lower().endswith(EXTENSIONS):
        raise UsageError(f"{name}: is one image; expected {_EXPECTED}")
    try:
        # not splitlines(), which also splits at characters that a file name may contain
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as e:
        packed = path.suffix in (".tar", ".gz", ".xz", ".zip", ".tgz")
        what = "an archive: unpack it first" if packed else "not a text file"
        raise UsageError(f"{name}: {what}; expected {_EXPECTED}") from e
    except OSError as e:
        raise UsageError(f"{name}: cannot be read ({e.strerror})") from e
    rows = [(n, line.rstrip("\r").split("\t")) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UsageError(f"{name}: the list is empty; expected one path per line, optionally tab and label")
    fields = len(rows[0][1])
    for number, row in rows:
        if len(row) != fields or len(row) > 2 or not all(part.strip() for part in row):
            raise UsageError(
                f"{name}: line {number}: expected a path{' and a label' if fields == 2 else ''} as in "
                f"line {rows[0][0]} (tab between), got {len(row)} fields: {' | '.join(row)[:80]!r}"
            )
    root = path.parent
    paths = [str(root / row[0]) for _, row in rows]
    if fields == 1:
        return _finish(name, root, paths, None, [], check)
    names = {row[1].strip() for _, row in rows}
    # numbers in numeric order, so that a label that is a number usually keeps it
    classes = sorted(names, key=int) if all(c.isdecimal() for c in names) else sorted(names)
    number_of = {c: i for i, c in enumerate(classes)}
    return _finish(name, root, paths, [number_of[row[1].strip()] for _, row in rows], classes, check)


# ---- both -----------------------------------------------------------------------------------------


def _finish(
    name: str, root: Path, paths: list[str], labels: list[int] | None, classes: list[str], check: bool
) -> ImageSource:
    digest, prefix = hashlib.sha256(), str(root) + os.sep
    missing, empty = [], []
    for row, path in enumerate(paths):
        try:
            size = os.stat(path).st_size
        except (OSError, ValueError):
            missing.append(path)
            size = 0
        else:
            if not size:
                empty.append(path)
        # below the root, so that a moved data set is still the same
        shown = path[len(prefix) :] if path.startswith(prefix) else path
        label = "" if labels is None else classes[labels[row]]
        digest.update(f"{shown}\t{size}\t{label}\n".encode("utf-8", "surrogateescape"))
    if missing and check:
        whole = "; is it a list of images?" if len(missing) == len(paths) else ""
        raise UsageError(
            f"{name}: {len(missing)} of {len(paths)} files do not exist, first: {missing[0][:300]}{whole}"
        )
    if empty and check:
        raise DataError(
            f"{name}: {len(empty)} of {len(paths)} files are empty (0 bytes), first: {empty[0]}; "
            "remove them, or leave them out with `extrema-fast index`"
        )
    tensor = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    return ImageSource(name, paths, tensor, classes, digest.hexdigest())
