"""Opens image sources given by the user: folders, list files, manifests, archives, tables, mixtures, built-in sets."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .. import rng
from ..config import did_you_mean
from ..errors import UsageError, counted, install
from ..files import check_plain, read_text
from ..progress import ImageProgress
from .image_source import (
    ImageSource,
    hold_out,
    in_shards,
    match_classes,
    number_classes,
    subset,
    warn_of_empty,
)
from .lists import Disk, read_list
from .manifest import is_manifest, manifest_source
from .mixture import Entry, join, read_mixture, without_held_out
from .photos import write_photos, write_synthetic
from .pixels import plugins
from .shards import expand, is_pattern, is_tar, shard_source
from .tables import SUFFIXES as TABLES
from .tables import is_table, read_tables, saved_tables
from .zips import Member, is_hidden, is_zip, members, shared_folders

__all__ = ["BUILT_IN", "EXTENSIONS", "UNREAD", "ImageSource", "match_classes", "open_source", "subset"]

log = logging.getLogger(__name__)

BUILT_IN: dict[str, Callable[[], Path]] = {"photos": write_photos, "synthetic": write_synthetic}
# what is read everywhere; `plugins` adds what this Pillow reads
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
# arrays; in a folder or a sample of a shard only where there is no other image, since they are often something else
NPY = ".npy"
# images that are read with a plug-in of Pillow or not at all; `index` reports them
UNREAD = (".avif", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jxl", ".psd", ".svg")
# left out with a count, too
_NO_IMAGES = (".arw", ".cr2", ".dcm", ".dng", ".eps", ".exr", ".nef", ".pdf")
# what holds many images, by its ending
SHARDS = (".tar", ".zip", *TABLES)
# the manifest of a packed set, next to its shards
MANIFEST = "manifest.tsv"

_ARCHIVES = (".gz", ".tgz", ".bz2", ".xz", ".txz", ".zst", ".7z", ".rar")
_EXPECTED = (
    "photos, synthetic, a folder of class folders, a folder of images, a list file (one path per line, with or "
    "without a label), a manifest, tar shards, zip archives, Arrow or Parquet tables, or a mixture (.toml)"
)
# folder names of each part of a data set
SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
_SPLIT_NAMES = {name for names in SPLITS.values() for name in names}
# no epoch of training has this number, so `limit` does not repeat the order of one
_LIMIT_EPOCH = 2**32 - 1


def open_source(
    spec: str,
    split: str = "train",
    *,
    limit: int = 0,
    seed: int = 0,
    holdout: float = 0.0,
    check: bool = True,
) -> ImageSource:
    """Opens the images that `spec` names.

    Folders below a class folder belong to it, links are followed, hidden files are skipped. A folder of shards
    that holds the manifest of exactly these shards (`manifest.tsv`, as `pack` writes it) is read by that.

    Args:
        spec: `photos` or `synthetic` (built in; `./photos` is a folder of that name), or the path of
            a folder with one folder per class;
            a folder of images (no labels);
            a text file with one path per line, or path and label (tab, comma, semicolon, or the last word); relative
            paths start at its folder;
            a manifest, as `extrema-fast index` writes it;
            a .tar, .zip, .arrow or .parquet, a folder of them (without images), or a pattern:
            `set/{0000..0009}.tar`, `set/*.zip`;
            a folder in a .zip: `set.zip/train`;
            a mixture of these (.toml, see `mixture.py`).
        split: `train` or `test`: which part of a built-in set, or of one that is split by `holdout`.
        limit: only the first `limit` images of a shuffle keyed by `seed`, in row order; 0: all.
        holdout: share of the images that are the split `test`, by their names (`hold_out`), and not in `train`; 0: no
            split. `limit` counts what is left. In a mixture each source is split, and `test` has each of them once.
        check: False keeps rows that are gone or of a kind that no loader reads, for `index` to report.

    Raises:
        UsageError: nothing there, or not what is expected.
        DataError: no image with bytes, or a broken shard.
    """
    if split not in SPLITS:
        raise UsageError(f"split: expected 'train' or 'test', got {split!r}")
    if limit < 0:
        raise UsageError(f"data.limit: expected 0 (all) or more, got {limit}")
    if not spec:
        raise UsageError(f"no {split} images given; expected {_EXPECTED}")
    refuse_url(spec)
    if holdout and spec in BUILT_IN:
        raise UsageError(f"data.holdout: {spec} has test images of its own; leave data.holdout at 0")
    source = _open(spec, split, check, holdout)
    if 0 < limit < len(source):
        if source.parts:
            raise UsageError(
                f"data.limit: {limit} of a mixture with parts of an epoch would change its shares; use "
                "--data.limit 0 (all) and lower its passes"
            )
        rows = rng.permutation(len(source), seed=seed, epoch=_LIMIT_EPOCH)[:limit].sort().values
        source = subset(source, rows)
    return source


_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


def refuse_url(spec: str, where: str = "") -> None:
    """UsageError for a URL, which says how its images get on a disk."""
    scheme = _SCHEME.match(os.fspath(spec))
    if not scheme:
        return
    kind, rest = scheme[1].lower(), spec[scheme.end() :]
    # owner and name of a data set
    hub = re.match(r"(?:huggingface\.co/)?datasets/([^/@]+/[^/@]+)", rest)
    first = {
        "s3": f"aws s3 sync {spec} DIR (or mount it by mount-s3), and give DIR",
        "gs": f"gcloud storage rsync -r {spec} DIR (or mount it by gcsfuse), and give DIR",
        "http": f"wget {spec}, unpack it if it is an archive other than .zip or .tar, and give the path",
        "file": f"give {rest}",
    }
    first["https"] = first["http"]
    if hub:
        first[kind] = f"hf download --repo-type dataset {hub[1]} --local-dir DIR, and give DIR"
    raise UsageError(
        f"{where}{spec}: images are read from a disk, not from {kind}://; "
        + first.get(kind, "download or mount them, and give the path")
    )


def _open(spec: str, split: str, check: bool, holdout: float) -> ImageSource:
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".toml" and os.path.isfile(path):
        return _mixture(spec, path, split, check, holdout)
    source = _open_one(spec, split, check)
    return hold_out(source, holdout)[split == "test"] if holdout else source


def _open_one(spec: str, split: str, check: bool) -> ImageSource:
    extensions = EXTENSIONS + plugins() + (() if check else UNREAD)
    if spec in BUILT_IN and os.path.exists(spec):
        log.warning(
            "%s: the built-in images, not what is here under that name; for that, say ./%s", spec, spec
        )
    path = BUILT_IN[spec]() / split if spec in BUILT_IN else Path(spec).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as e:
        raise UsageError(f"{spec}: cannot be read ({e.strerror})") from e
    if is_folder:
        return _from_folder(spec, path, split, extensions, check)
    if is_file and is_manifest(path):
        return manifest_source(path, check=check)
    if is_file and _kind_of_shard(str(path)):
        return _from_shards(spec, [str(path)], split, extensions, check)
    if is_file:
        return _from_list(spec, path, check)
    if is_pattern(spec):
        return _from_shards(spec, expand(spec), split, extensions, check)
    if (archive := _archive_of(path)) is not None:
        return _from_zips(
            spec, [str(archive)], split, extensions, check, path.relative_to(archive).as_posix()
        )
    raise UsageError(f"{spec}: {_why_not_found(path)}; expected {_EXPECTED}")


def is_there(spec: str) -> bool:
    """Whether a path, a pattern or a folder in a zip archive names something on this disk."""
    path = Path(spec).expanduser()
    if path.exists():
        return True
    if is_pattern(spec):
        try:
            return bool(expand(spec))
        except UsageError:
            return False
    return _archive_of(path) is not None


def _archive_of(path: Path) -> Path | None:
    """The zip archive that a path leads into."""
    return next((p for p in path.parents if p.is_file() and is_zip(p)), None)


def split_folders(spec: str) -> tuple[str, str]:
    """(training images, test images) of a folder that holds `train`, and `test` or `val`; else (spec, "").

    Without either of these the test images are "". Capitals do not count. A zip archive may hold them, too, in a folder
    around them or not.
    """
    root, around = Path(spec).expanduser(), Path(spec)
    if spec in BUILT_IN:
        return spec, ""
    if root.is_file() and root.suffix.lower() == ".zip":
        folders = [Path(m.name).parts[:-1] for m in members(str(root), (*EXTENSIONS, *plugins(), NPY))[0]]
        if len({f[:1] for f in folders}) == 1 and folders[0] and folders[0][0].lower() not in _SPLIT_NAMES:
            around = around / folders[0][0]
            folders = [f[1:] for f in folders]
        names = {f[0] for f in folders if f}
    else:
        names = {e.name for e in os.scandir(root) if e.is_dir()} if root.is_dir() else set()

    def first(split: str) -> str:
        found = [name for wanted in SPLITS[split] for name in sorted(names) if name.lower() == wanted]
        return str(around / found[0]) if found else ""

    train = first("train")
    return (train, first("test")) if train else (spec, "")


def _why_not_found(path: Path) -> str:
    try:
        check_plain(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as e:
        return f"cannot be read ({getattr(e, 'strerror', None) or e})"
    parent = next((p for p in path.parents if p.is_dir()), path.parent)
    if parent != path.parent:
        return f"does not exist ({path.parent} neither{'' if str(parent) == '.' else f'; {parent} does'})"
    try:
        names = sorted(e.name for e in os.scandir(parent) if not e.name.startswith("."))
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    similar = did_you_mean(path.name, [*names, *BUILT_IN])
    return "does not exist" + (similar if similar.startswith("; did") else "")


# ---- folders --------------------------------------------------------------------------------------


def _from_folder(name: str, root: Path, split: str, extensions: tuple[str, ...], check: bool) -> ImageSource:
    """The images below a folder, or in the tar files in it where there are tars and no image."""
    folders, files = _list(root)
    found = Counter(map(_suffix, files))
    images = [str(root / f) for f in files if f.lower().endswith(extensions)]
    _reject_splits(name, root, folders, split)
    above = {os.path.realpath(root)}
    inside = {}
    with ImageProgress(f"listing {name}", len(folders), unit="folders") as bar:
        for folder in folders:
            inside[folder] = _walk(root / folder, above, found, extensions)
            bar.advance(1)
    nested = [path for paths in inside.values() for path in paths]
    if not images and not nested:
        # what lies next to tar shards describes them: img2dataset writes a table for each
        kinds = ([str(root / f) for f in files if f.lower().endswith(k)] for k in (".tar", ".zip", TABLES))
        shards = saved_tables(root) or next(filter(None, kinds), [])
        if shards:
            _reject_split_files(name, root, shards, split)
            return _from_shards(name, shards, split, extensions, check, root / MANIFEST)
        if found[NPY] and extensions != (NPY,):
            return _from_folder(name, root, split, (NPY,), check)
        near = [f for f in folders if any(n.lower().endswith(SHARDS) for n in _list(root / f)[1])]
        raise UsageError(
            _no_images(name, len(folders), found) + (f"; did you mean {root / near[0]}?" if near else "")
        )
    if images:
        if check:
            _warn_of_unread(name, found, extensions)
        if nested:
            _warn_of_loose(name, len(images), len(nested))
        source = _from_paths(name, root, sorted(images) + nested, None, [], check)
        return dataclasses.replace(source, left_out=_unused(found, extensions))
    if check:
        _warn_of_unread(name, found, extensions)
    labels = [label for label, folder in enumerate(folders) for _ in inside[folder]]
    empty = [folder for folder in folders if not inside[folder]]
    if empty:
        log.warning("%s: no images in %d of %d class folders: %s", name, len(empty), len(folders), empty[:3])
    if len(folders) - len(empty) == 1:
        _warn_of_wrapper(name, root / next(f for f in folders if inside[f]), nested)
    source = _from_paths(name, root, nested, labels, folders, check)
    return dataclasses.replace(source, left_out=_unused(found, extensions))


def _warn_of_wrapper(name: str, folder: Path, paths: list[str]) -> None:
    """Warns where the only class is a folder around what look like the classes."""
    below = [Path(path).relative_to(folder).parts for path in paths]
    while (
        len(folders := sorted({parts[0] for parts in below if len(parts) > 1})) == 1
        and min(map(len, below)) > 1
    ):
        folder, below = folder / folders[0], [parts[1:] for parts in below]
    if len(folders) > 1 and min(map(len, below)) > 1:
        log.warning(
            "%s: all images are of one class; the %d folders in %s (%s) look like the classes; did you mean %s?",
            *(name, len(folders), folder, ", ".join(folders[:3]), folder),
        )


def _unused(found: Counter[str], extensions: tuple[str, ...]) -> dict[str, int]:
    return {kind: n for kind, n in found.items() if kind not in extensions}


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the files in a folder, hidden ones left out."""
    try:
        entries = sorted((e.name, _is_dir(e)) for e in os.scandir(folder) if not is_hidden(e.name))
    except OSError as e:
        raise UsageError(f"{folder}: cannot be read ({e.strerror}); check its permissions") from e
    return [name for name, is_dir in entries if is_dir], [name for name, is_dir in entries if not is_dir]


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as e:
        # a link to itself is a broken file, not a reason to give up the folder
        if e.errno != errno.ELOOP:
            raise
        return False


def _walk(folder: Path, above: set[str], found: Counter[str], extensions: tuple[str, ...]) -> list[str]:
    real = os.path.realpath(folder)
    # a link to a folder above would be followed for ever
    if any(real == s or s.startswith(real + os.sep) for s in above):
        log.warning("%s: a link to a folder above it, skipped", folder)
        return []
    folders, files = _list(folder)
    found.update(map(_suffix, files))
    paths = [str(folder / f) for f in files if f.lower().endswith(extensions)]
    for name in folders:
        paths += _walk(folder / name, above | {real}, found, extensions)
    return sorted(paths)


def _unread() -> tuple[str, ...]:
    """Endings of images that are left out."""
    return tuple(sorted({*UNREAD, *_NO_IMAGES} - {*plugins()}))


def _warn_of_unread(name: str, found: Counter[str], extensions: tuple[str, ...]) -> None:
    left_out = {kind: found[kind] for kind in _unread() if found[kind]}
    if left_out:
        heic = f"; HEIC: {install('formats')}" if {".heic", ".heif"} & left_out.keys() else ""
        log.warning(
            "%s: left out %s of kinds that are not read: %s%s",
            name,
            counted(sum(left_out.values()), "image"),
            ", ".join(f"{kind} {n}" for kind, n in left_out.items()),
            heic,
        )
    if found[NPY] and extensions != (NPY,):
        log.warning(
            "%s: left out %s next to images; to read them, give a list of them or a folder of their own",
            name,
            counted(found[NPY], ".npy file"),
        )


def _warn_of_loose(name: str, loose: int, nested: int) -> None:
    log.warning(
        "%s: %d images next to folders with %d more; all are used, without labels", name, loose, nested
    )


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no extension"


def _reject_splits(name: str, root: Path, folders: list[str], split: str) -> None:
    # the root of a data set instead of one of its splits: `train` and `test` would become the classes
    splits = [f for f in folders if f.lower() in _SPLIT_NAMES]
    if splits and (len(splits) == len(folders) or len(splits) > 1):
        match = next((f for f in splits if f.lower() in SPLITS[split]), splits[0])
        raise UsageError(
            f"{name}: holds {', '.join(p + '/' for p in splits)}, which look like the parts of a data set, "
            f"not like classes; did you mean {root / match}?"
        )


def _reject_split_files(name: str, root: Path, shards: list[str], split: str) -> None:
    # as in train-00000-of-00002.parquet and test-00000-of-00001.parquet, or in set-train-000.tar and set-val-000.tar
    words = re.compile(r"(?:^|.*[-_.])(train|test|val(?:id(?:ation)?)?)(?=[-_.0-9])", re.IGNORECASE)
    begins = {m[1].lower(): m[0] for p in shards if (m := words.match(os.path.basename(p)))}
    if len(begins) > 1:
        match = next((begin for part, begin in begins.items() if part in SPLITS[split]), min(begins.values()))
        raise UsageError(
            f"{name}: holds files of {', '.join(sorted(begins))}, which look like the parts of a data set; did you "
            f"mean '{root / match}*{Path(shards[0]).suffix}'?"
        )


def _no_images(name: str, folders: int, found: Counter[str]) -> str:
    total, known = sum(found.values()), (*EXTENSIONS, *plugins(), NPY)
    if not total:
        what = f"found {folders} folders without files" if folders else "the folder is empty"
    else:
        kinds = ", ".join(f"{kind} {n}" for kind, n in found.most_common(5))
        what = f"found {total} files, of: {kinds}" + (", ..." if len(found) > 5 else "")
    return f"{name}: no images; looked for {', '.join(known)} (also in folders below); {what}"


# ---- shards ---------------------------------------------------------------------------------------


def _kind_of_shard(path: str) -> str:
    return "table" if is_table(path) else "tar" if is_tar(path) else "zip" if is_zip(path) else ""


def _from_shards(
    name: str,
    paths: list[str],
    split: str,
    extensions: tuple[str, ...],
    check: bool,
    manifest: Path | None = None,
) -> ImageSource:
    """The images in shards of one kind, by the manifest of exactly these where there is one."""
    if check and manifest is not None and is_manifest(manifest):
        source = manifest_source(manifest)
        if set(map(os.path.realpath, source.paths)) == set(map(os.path.realpath, paths)):
            return source
        log.warning("%s: is not used, since it names other shards than those in %s", manifest, name)
    if twice := next((p for p, n in Counter(paths).items() if n > 1), None):
        raise UsageError(f"{name}: names the shard {twice} more than once")
    kinds = Counter(map(_kind_of_shard, paths))
    if kinds[""]:
        first = next(p for p in paths if not _kind_of_shard(p))
        raise UsageError(
            f"{name}: {kinds['']} of {len(paths)} files are no shards, first: {first}; a pattern names "
            f"{', '.join(SHARDS)}; give a folder or a list file for image files"
        )
    if len(kinds) > 1:
        found = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        raise UsageError(
            f"{name}: shards of {len(kinds)} kinds: {found}; give those of one kind, as {paths[0]}"
        )
    if "zip" in kinds:
        return _from_zips(name, paths, split, extensions, check)
    if "table" in kinds:
        return _from_tables(name, paths, check)
    source = shard_source(name, paths, extensions, _unread() if check else (), check=check)
    _warn_of_unread(name, Counter(source.left_out), extensions)
    return source


def _from_zips(
    name: str, paths: list[str], split: str, extensions: tuple[str, ...], check: bool, inside: str = ""
) -> ImageSource:
    """The images in zip archives, in the order of their names, as if unpacked.

    The classes are the folders below `inside`, or below the one that holds all images.
    """
    found: Counter[str] = Counter()
    rows: list[tuple[int, list[str], Member]] = []
    for number, path in enumerate(paths):
        images, other = members(path, extensions)
        found.update(_suffix(n) for n in other if n.startswith(f"{inside}/" if inside else ""))
        rows += [(number, m.name.split("/"), m) for m in images]
    above = inside.split("/") if inside else []
    rows = [row for row in rows if row[1][: len(above)] == above]
    if not rows and found[NPY] and extensions != (NPY,):
        return _from_zips(name, paths, split, (NPY,), check, inside)
    if not rows:
        raise UsageError(_no_images(name, 0, found))
    if check:
        _warn_of_unread(name, found, extensions)
    shared = shared_folders([parts[:-1] for _, parts, _ in rows])
    rows = sorted((number, parts[len(shared) :], member) for number, parts, member in rows)
    folders = sorted({below[0] for _, below, _ in rows if len(below) > 1})
    _reject_splits(name, Path(paths[0], *shared), folders, split)
    loose = sum(len(below) == 1 for _, below, _ in rows)
    if loose and folders:
        _warn_of_loose(name, loose, len(rows) - loose)
    number_of = {folder: label for label, folder in enumerate(folders)}
    labels = None if loose else torch.tensor([number_of[below[0]] for _, below, _ in rows])
    source = in_shards(
        name,
        paths,
        np.array([number for number, _, _ in rows]),
        [m.name for _, _, m in rows],
        np.array([(m.offset, m.size) for _, _, m in rows], np.int64),
        labels,
        [] if loose else folders,
        marks=[f"{m.crc32:08x}" for _, _, m in rows],
        check=check,
    )
    return dataclasses.replace(source, left_out=_unused(found, extensions))


def _from_tables(name: str, paths: list[str], check: bool) -> ImageSource:
    """The images in Arrow or Parquet files, in their order."""
    columns, tables = read_tables(name, paths)
    written = [label for table in tables for label in table.labels]
    if not written:
        raise UsageError(f"{name}: no rows in {counted(len(paths), 'table')}")
    labels, classes = None, list[str]()
    given = [label for label in written if label is not None]
    if len(given) == len(written):
        labels, classes = number_classes(given, columns.classes)
    elif given:
        what = f"{len(written) - len(given)} of {len(written)} rows have no label in {columns.label!r}"
        log.warning("%s: %s; used without labels", name, what)
    if any(table.files for table in tables):
        folders = [os.path.dirname(path) for path in paths]
        files = [os.path.join(d, f) for d, table in zip(folders, tables, strict=True) for f in table.files]
        if len(files) < len(written):
            raise UsageError(
                f"{name}: {len(files)} of {len(written)} rows name files, the others hold images"
            )
        root = Path(os.path.commonpath(folders)) if len(set(folders)) > 1 else Path(folders[0])
        return _from_paths(name, root, files, None if labels is None else labels.tolist(), classes, check)
    numbers = np.repeat(np.arange(len(tables)), [len(table.names) for table in tables])
    members = [member for table in tables for member in table.names]
    spans = np.concatenate([table.spans for table in tables])
    return in_shards(
        name, [table.path for table in tables], numbers, members, spans, labels, classes, check=check
    )


# ---- list files -----------------------------------------------------------------------------------


def _from_list(name: str, path: Path, check: bool) -> ImageSource:
    if path.name.lower().endswith(EXTENSIONS + plugins() + (NPY,)):
        raise UsageError(f"{name}: is one image; expected {_EXPECTED}")
    if path.name.lower().endswith(UNREAD):
        raise UsageError(
            f"{name}: is an image of a kind that is not read; read are {', '.join(EXTENSIONS + plugins())}: "
            "convert it, e.g. to PNG"
        )
    try:
        text = read_text(path, "utf-8-sig")
    except UnicodeDecodeError as e:
        archive = "a compressed archive: unpack it first, or decompress it to a .tar"
        what = archive if path.suffix in _ARCHIVES else "not a text file"
        raise UsageError(f"{name}: {what}; expected {_EXPECTED}") from e
    except OSError as e:
        raise UsageError(f"{name}: cannot be read ({e.strerror})") from e
    for line in text.split("\n", 2)[:2]:
        # the first may be a header
        refuse_url(re.split(r"[\s,;\"']", line.lstrip("\"' "))[0], f"{name}: ")
    paths, written = read_list(name, path.parent, text, (*EXTENSIONS, *UNREAD, NPY))
    if not written:
        return _from_paths(name, path.parent, paths, None, [], check)
    labels, classes = number_classes(written)
    return _from_paths(name, path.parent, paths, labels.tolist(), classes, check)


def _from_paths(
    name: str, root: Path, paths: list[str], labels: list[int] | None, classes: list[str], check: bool
) -> ImageSource:
    digest, prefix = hashlib.sha256(), str(root) + os.sep
    missing, empty, disk = [], [], Disk()
    for row, path in enumerate(paths):
        try:
            size = os.stat(path).st_size
            empty += [] if size else [path]
        except (OSError, ValueError):
            if other := disk.find(path):
                paths[row] = path = other
                size = os.stat(path).st_size
            else:
                size = 0
                missing.append(path)
        # below the root, so that a moved data set is still the same
        below = path.removeprefix(prefix)
        label = "" if labels is None else classes[labels[row]]
        digest.update(f"{below}\t{size}\t{label}\n".encode("utf-8", "surrogateescape"))
    if check:
        if missing:
            hint = "; is it a list of images?" if len(missing) == len(paths) else ""
            raise UsageError(
                f"{name}: {len(missing)} of {len(paths)} files do not exist, first: {missing[0][:300]}{hint}"
            )
        warn_of_empty(name, len(empty), len(paths), empty[0] if empty else "")
    tensor = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    return ImageSource(name, paths, tensor, classes, digest.hexdigest(), root=str(root))


# ---- mixtures -------------------------------------------------------------------------------------


def _mixture(name: str, path: Path, split: str, check: bool, holdout: float) -> ImageSource:
    """The sources of a mixture file as one."""
    entries = read_mixture(name, path)
    if holdout and split == "test":
        entries = [e._replace(passes=1.0) for e in entries]
    opened = [
        _open_entry(f"{name}: source {n}", path, e, split, check, holdout) for n, e in enumerate(entries, 1)
    ]
    sources = [source for source, _ in opened]
    if holdout and split == "train":
        sources = without_held_out(name, sources, [held for _, held in opened])
    return join(name, sources, [e.passes for e in entries])


def _open_entry(
    where: str, mixture: Path, entry: Entry, split: str, check: bool, holdout: float
) -> tuple[ImageSource, ImageSource | None]:
    """The images of a source, and those that are held out of it (None: its test images are its own, or none)."""
    spec = entry.path
    refuse_url(spec, f"{where}: ")
    if spec not in BUILT_IN:
        spec = os.path.join(mixture.parent, os.path.expanduser(spec))
    if spec.lower().endswith(".toml"):
        raise UsageError(f"{where}: {entry.path} is a mixture itself; name its sources here")
    held = None
    try:
        source = _open_one(spec, split, check)
        if holdout and spec not in BUILT_IN:
            others, held = hold_out(source, holdout)
            source = held if split == "test" else others
    except UsageError as e:
        raise UsageError(f"{where}: {e}") from e
    if entry.label is not None:
        labels = torch.zeros(len(source), dtype=torch.int64)
        source = dataclasses.replace(source, labels=labels, classes=[entry.label])
    return source, held
