"""Which images there are: `open_source` tells the kinds apart and gives an `ImageSource` (`image_source.py`).

Folders and list files are read by `folders.py`, tar shards by `shards.py`, manifests by `manifest.py`, mixtures
by `mixture.py`.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

from .. import rng
from ..config import did_you_mean
from ..errors import UsageError
from .folders import EXPECTED, EXTENSIONS, SPLITS, UNREAD, from_folder, from_list
from .image_source import ImageSource, match_classes, subset
from .manifest import is_manifest, manifest_source
from .mixture import mixture_source
from .photos import write_photos, write_synthetic
from .shards import expand, is_pattern, is_tar, shard_source

__all__ = ["BUILT_IN", "EXTENSIONS", "UNREAD", "ImageSource", "match_classes", "open_source", "subset"]

log = logging.getLogger(__name__)

BUILT_IN = {"photos": write_photos, "synthetic": write_synthetic}

# the table of a packed set, beside its shards
MANIFEST = "manifest.tsv"
# no epoch of training has this number, so `limit` does not repeat the order of one
_LIMIT_EPOCH = 2**32 - 1


def open_source(
    spec: str, split: str = "train", *, limit: int = 0, seed: int = 0, check: bool = True
) -> ImageSource:
    """The images `spec` names.

    spec     `photos` or `synthetic` (built in; `./photos` is a folder of that name), or the path of
             a folder with one folder per class;
             a folder of images (no labels);
             a text file with one path per line, optionally a tab and a label; relative paths start at its folder;
             a manifest, as `extrema-fast index` writes it;
             a .tar, a folder of them (without images), or a pattern: `set/{0000..0009}.tar`, `set/*.tar`;
             a mixture of these (.toml, see `mixture.py`)
    split    `train` or `test`: which part of a built-in set; no effect on any other
    limit    only the first N of a shuffle keyed by `seed`, in row order (0: all)
    check    False keeps rows that are gone or of a kind that no loader reads, for `index` to report
    raises   UsageError: nothing there, or not what is expected; DataError: no image with bytes, a broken shard

    Folders below a class folder belong to it, links are followed, hidden files are skipped. A folder of shards
    that holds the manifest of exactly these shards (`manifest.tsv`, as `pack` writes it) is read by that.
    """
    if split not in SPLITS:
        raise UsageError(f"split: expected 'train' or 'test', got {split!r}")
    if limit < 0:
        raise UsageError(f"data.limit: expected 0 (all) or more, got {limit}")
    if not spec:
        raise UsageError(f"no {split} images given; expected {EXPECTED}")
    source = _open(spec, split, check)
    if 0 < limit < len(source):
        if source.parts:
            raise UsageError(
                f"data.limit: {limit} of a mixture with parts of an epoch would change its shares; use "
                "--data.limit 0 (all) and lower its passes"
            )
        rows = rng.permutation(len(source), seed=seed, epoch=_LIMIT_EPOCH)[:limit].sort().values
        source = subset(source, rows)
    return source


def _open(spec: str, split: str, check: bool) -> ImageSource:
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
        source = from_folder(spec, path, split, check)
        return _of_tars(spec, path, source, check) if isinstance(source, list) else source
    if is_file and is_manifest(path):
        return manifest_source(path, check=check)
    if is_file and is_tar(path):
        return shard_source(spec, [str(path)], EXTENSIONS if check else EXTENSIONS + UNREAD, check=check)
    if is_file and path.suffix.lower() == ".toml":
        return mixture_source(spec, path, partial(_open, split=split, check=check), set(BUILT_IN))
    if is_file:
        return from_list(spec, path, check)
    if is_pattern(spec):
        return shard_source(spec, expand(spec), EXTENSIONS if check else EXTENSIONS + UNREAD, check=check)
    raise UsageError(f"{spec}: {_what_is_there(path)}; expected {EXPECTED}")


def _of_tars(spec: str, folder: Path, tars: list[str], check: bool) -> ImageSource:
    table = folder / MANIFEST
    if check and is_manifest(table):
        source = manifest_source(table)
        if set(map(os.path.realpath, source.paths)) == set(map(os.path.realpath, tars)):
            return source
        log.warning("%s: is not used, since it names other shards than those in %s", table, folder)
    return shard_source(spec, tars, EXTENSIONS if check else EXTENSIONS + UNREAD, check=check)


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
