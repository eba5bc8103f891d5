"""Images that are files: a folder of class folders, a flat folder, a list file."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections import Counter
from pathlib import Path

import torch

from ..errors import UsageError
from .image_source import ImageSource, number_classes, warn_of_empty

log = logging.getLogger(__name__)

# what both decoders read; GIF is left out because DALI does not
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
# images that no loader reads; `index` reports them
UNREAD = (".avif", ".gif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".psd", ".svg")
# read through, but not in place
ARCHIVES = (".gz", ".tgz", ".bz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar")
EXPECTED = (
    "photos, synthetic, a folder of class folders, a folder of images, a list file (one path per line, optionally "
    "a tab and a label), a manifest, tar shards, or a mixture (.toml)"
)

SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
_SPLIT_NAMES = {name for names in SPLITS.values() for name in names}


# ---- folders --------------------------------------------------------------------------------------


def from_folder(name: str, root: Path, split: str, check: bool) -> ImageSource | list[str]:
    """The images below a folder, or the tar files in it where there is no image but there are tars."""
    kinds = EXTENSIONS if check else EXTENSIONS + UNREAD
    folders, files = _list(root)
    found = Counter(_suffix(f) for f in files)
    flat = [f for f in files if f.lower().endswith(kinds)]
    _refuse_splits(name, root, folders, split)
    seen = {os.path.realpath(root)}
    inside = {folder: _walk(root / folder, seen, found, kinds) for folder in folders}
    if not flat and not any(inside.values()):
        tars = [str(root / f) for f in files if f.lower().endswith(".tar")]
        if tars:
            return tars
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
        kinds = [_is_dir(e) for e in entries]
    except OSError as e:
        raise UsageError(f"{folder}: cannot be read ({e.strerror}); check its permissions") from e
    folders = [e.name for e, is_dir in zip(entries, kinds, strict=True) if is_dir]
    return folders, [e.name for e, is_dir in zip(entries, kinds, strict=True) if not is_dir]


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as e:
        # a link to itself is a broken file, not a reason to give up the folder
        if e.errno != errno.ELOOP:
            raise
        return False


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
        match = next((f for f in parts if f.lower() in SPLITS[split]), parts[0])
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


def from_list(name: str, path: Path, check: bool) -> ImageSource:
    """The images whose paths a text file holds."""
    if path.name.lower().endswith(EXTENSIONS):
        raise UsageError(f"{name}: is one image; expected {EXPECTED}")
    try:
        # not splitlines(), which also splits at characters that a file name may contain
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as e:
        packed = path.suffix in ARCHIVES
        what = (
            "a compressed archive: unpack it first, or decompress it to a .tar"
            if packed
            else "not a text file"
        )
        raise UsageError(f"{name}: {what}; expected {EXPECTED}") from e
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
    labels, classes = number_classes([row[1].strip() for _, row in rows])
    return _finish(name, root, paths, labels.tolist(), classes, check)


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
    if check:
        warn_of_empty(name, len(empty), len(paths), empty[0] if empty else "")
    tensor = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    return ImageSource(name, paths, tensor, classes, digest.hexdigest())
