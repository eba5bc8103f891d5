"""Images in Arrow and Parquet files, such as Hugging Face data sets on disk: a row is a byte range of an Arrow file.

Arrow files store the bytes of a binary column uncompressed, so they are read like those of a tar, by any thread or
process, without pyarrow. Parquet compresses many images into one page, so its image and label columns are copied once
to an Arrow file in the cache folder. Nothing is downloaded, and no data set code is run.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError, ExtremaError, StorageError, UsageError, install
from ..files import new_file, read_json, remove
from .lists import LABEL_NAMES, PATH_NAMES
from .photos import cache_root

log = logging.getLogger(__name__)

SUFFIXES = (".arrow", ".parquet")
IMAGE_NAMES = ("image", "img", "picture", "photo")
# of a Parquet file; a row group may be larger than the memory
_ROWS_AT_ONCE, _READ_AHEAD = 256, 1 << 20
_DEAD_S = 3600.0
# of a stream: a message without length
_END = b"\xff\xff\xff\xff\0\0\0\0"


class Columns(NamedTuple):
    """The column of images, that of labels (empty: none), and the class names of its numbers (empty: not known)."""

    image: str
    label: str
    classes: list[str]
    # labels are numbers without names
    numbers: bool


class Table(NamedTuple):
    """The images in one table.

    Attributes:
        path: the Arrow file that `spans` are of.
        names: of each row: the path written with the image where these differ in all rows, else its number.
        spans: [n, 2] int64 offset and length of each image's bytes; 0 0: none.
        files: the path written with each image (empty: none), where no row has bytes; else empty.
        labels: names of classes; None: none.
    """

    path: str
    names: list[str]
    spans: np.ndarray
    files: list[str]
    labels: list[str | None]


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether a file is named as a table."""
    return str(path).lower().endswith(SUFFIXES)


def saved_tables(folder: Path) -> list[str] | None:
    """The tables of a data set as `save_to_disk` writes it, without those of its caches; None: it is none."""
    files = read_json(folder / "state.json", {}).get("_data_files")
    if not isinstance(files, list) or not all(
        isinstance(f, dict) and isinstance(f.get("filename"), str) for f in files
    ):
        return None
    return [str(folder / f["filename"]) for f in files]


def read_tables(name: str, paths: list[str]) -> tuple[Columns, list[Table]]:
    """The images in Arrow or Parquet files of the same columns, whose classes may have other numbers in each.

    The column of images is the one that the data set's own description calls so, else one of bytes or of a struct with
    `bytes`, else one of text that is named as paths are in a list; of several the one named image (img, picture,
    photo). That of labels is named label (labels, class, class_name, category, target, cls), or is the first with class
    names.

    Raises:
        UsageError: pyarrow is missing, a file cannot be read, or the columns do not fit; lists them.
        DataError: a damaged file.
        StorageError: a copy of a Parquet file cannot be written.
    """
    pa, pq = _pyarrow(paths[0])
    columns: Columns | None = None
    classes = dict[str, None]()
    tables = []
    for path in paths:
        try:
            source = path
            if path.lower().endswith(".parquet"):
                with pq.ParquetFile(path, buffer_size=_READ_AHEAD, pre_buffer=False) as file:
                    source = _copy(path, file, columns)
            columns, table = _read(source, columns, path)
        except ExtremaError:
            raise
        except OSError as e:
            if e.errno:
                raise UsageError(f"{path}: cannot be read ({e.strerror or e})") from e
            raise _damaged(path, e) from e
        except (pa.ArrowException, ValueError) as e:
            raise _damaged(path, e) from e
        classes |= dict.fromkeys(columns.classes)
        tables.append(table)
    assert columns is not None
    log.info(
        "%s: images in column %r, %s",
        name,
        columns.image,
        f"labels in {columns.label!r}" if columns.label else "no column of labels",
    )
    return columns._replace(classes=[*classes]), tables


def _damaged(path: str, error: Exception) -> DataError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return DataError(f"{path}: not a table, or a damaged one ({reason[:200]}); copy or write it again")


def _pyarrow(path: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"{path}: tables need pyarrow, which is not installed; {install('parquet')}"
        ) from None
    return pyarrow, pyarrow.parquet


# ---- columns --------------------------------------------------------------------------------------


def _columns(path: str, schema: Any, before: Columns | None) -> Columns:
    """The columns to read in a table with this schema, or those of the tables before if it has them."""
    fields = {f.name: f.type for f in schema}
    described = _described(schema, path)
    about = ", ".join(f"{f.name} ({str(f.type).partition('<')[0]})" for f in schema)
    if before is None:
        image, label = _choose(path, fields, described, about)
    else:
        image, label = before.image, before.label
        for column, fits in (
            (image, lambda kind: _holds_bytes(kind) or _is_text(kind)),
            (label, _may_be_label),
        ):
            if column and not (column in fields and fits(fields[column])):
                what = "images" if column == image else "labels"
                raise UsageError(
                    f"{path}: no {what} in column {column!r}, as in the table before it; its columns are {about}"
                )
    if twice := [c for c in (image, label) if schema.names.count(c) > 1]:
        raise UsageError(f"{path}: more than one column {twice[0]!r}; its columns are {about}")
    classes = _names(described.get(label)) or (before.classes if before else [])
    numbers = bool(label) and not classes and not _is_text(fields[label])
    if before is not None and numbers != before.numbers:
        kinds = ("names", "numbers")
        raise UsageError(
            f"{path}: labels in {label!r} are {kinds[numbers]}, those of the table before it {kinds[not numbers]}"
        )
    return Columns(image, label, classes, numbers)


def _choose(path: str, fields: dict[str, Any], described: dict[str, Any], about: str) -> tuple[str, str]:
    """The columns of images and of labels (empty: none) among columns of these types."""
    import pyarrow.types as types

    images = [c for c, kind in fields.items() if _holds_bytes(kind)]
    images = (
        [c for c in images if described.get(c, {}).get("_type") == "Image"]
        or [c for c in images if types.is_struct(fields[c])]
        or images
        or [c for c, kind in fields.items() if _is_text(kind) and c.lower() in PATH_NAMES]
    )
    if not images:
        raise UsageError(
            f"{path}: no column of images (bytes, or a struct of bytes and path), nor of paths "
            f"({', '.join(PATH_NAMES)}); its columns are {about}"
        )
    named = _named(images, (*IMAGE_NAMES, *PATH_NAMES))
    if len(images) > 1 and not named:
        raise UsageError(f"{path}: more than one column of images, none named image; its columns are {about}")
    fit = [c for c, kind in fields.items() if _may_be_label(kind)]
    wanted = (*LABEL_NAMES, "cls")
    labels = _named(fit, wanted) + [c for c in fit if _names(described.get(c))]
    if not labels and (other := _named(fields, wanted)):
        kind = fields[other[0]]
        log.warning("%s: no labels in column %r (%s): neither whole numbers nor text", path, other[0], kind)
    return (named or images)[0], next(iter(labels), "")


def _named(columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The columns with one of these names, in the order of the names."""
    return [c for name in names for c in columns if c.lower() == name]


def _holds_bytes(kind: Any) -> bool:
    """Whether the images of a column of this type lie in an Arrow file as they are."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _may_be_label(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_integer(_plain(kind)) or types.is_boolean(kind) or _is_text(kind)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    kind = _plain(kind)
    return types.is_string(kind) or types.is_large_string(kind)


def _plain(kind: Any) -> Any:
    """A type without dictionaries and views, which cannot be read in place."""
    import pyarrow as pa

    types = pa.types
    if types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_binary_view(kind):
        return pa.large_binary()
    return pa.large_string() if types.is_string_view(kind) else kind


def _described(schema: Any, path: str) -> dict[str, dict[str, Any]]:
    """What Hugging Face's library wrote about each column, in the table or next to it."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]
    except (KeyError, ValueError, TypeError):
        info = read_json(Path(path).with_name("dataset_info.json"), {})
    features = info.get("features") if isinstance(info, dict) else None
    return {c: f for c, f in features.items() if isinstance(f, dict)} if isinstance(features, dict) else {}


def _names(feature: dict[str, Any] | None) -> list[str]:
    """The class names of a column; empty: none, or not usable."""
    names = (feature or {}).get("names")
    fine = (
        isinstance(names, list)
        and all(n and isinstance(n, str) for n in names)
        and len(set(names)) == len(names)
    )
    return names if fine and names else []


# ---- Arrow ----------------------------------------------------------------------------------------


def _read(path: str, columns: Columns | None, title: str) -> tuple[Columns, Table]:
    """Where the images of an Arrow file lie in it."""
    import pyarrow as pa

    with pa.memory_map(path) as file:
        # nothing is read but what is asked for; batches refer to the bytes in it
        whole = file.read_buffer()
        is_file = whole[:6].to_pybytes() == b"ARROW1"
        reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(whole)
        if not is_file and whole[-8:].to_pybytes() != _END:
            log.warning("%s: has no end mark; it may have been cut off", title)
        found = _columns(title, reader.schema, columns)
        spans, written, labels = [], list[str | None](), list[str | None]()
        for batch in _batches(reader):
            # pyarrow would end the process over damaged offsets
            batch.select([c for c in (found.image, found.label) if c]).validate(full=True)
            images, names = batch.column(found.image), None
            if pa.types.is_struct(images.type):
                # a row that is null has no bytes, whatever lies below
                fields = dict(zip((f.name for f in images.type), images.flatten(), strict=True))
                images, names = fields["bytes"], fields.get("path")
            elif _is_text(images.type):
                images, names = None, images
            spans.append(
                np.zeros((len(batch), 2), np.int64) if images is None else _spans(images, whole, title)
            )
            written += [None] * len(batch) if names is None else names.to_pylist()
            values = batch.column(found.label).to_pylist() if found.label else [None] * len(batch)
            text = {value: _label_text(value, found.classes) for value in set(values)}
            labels += [text[value] for value in values]
        table = np.concatenate([np.zeros((0, 2), np.int64), *spans])
        distinct = None not in written and len(set(written)) == len(written)
        names = [str(w) if distinct else str(row) for row, w in enumerate(written)]
        files = [] if table.any() or not any(written) else [w or "" for w in written]
    return found, Table(path, names, table, files, labels)


def _label_text(label: str | int | None, classes: list[str]) -> str | None:
    """A label as the name of its class; None: none, as -1 in test sets without labels."""
    if isinstance(label, int):
        if label < 0:
            return None
        return str(label) if not classes else classes[label] if label < len(classes) else None
    return (label or "").strip() or None


def _batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return iter(reader)


def _spans(data: Any, whole: Any, title: str) -> np.ndarray:
    """[n, 2] int64 offset in the file and length of the values of a binary array; 0 0 for those that are null."""
    _, offsets, values = data.buffers()
    spans = np.zeros((len(data), 2), np.int64)
    if not len(data) or values is None or not values.size:
        return spans
    kind = np.int64 if str(data.type).startswith("large") else np.int32
    ends = np.frombuffer(offsets, kind)[data.offset : data.offset + len(data) + 1].astype(np.int64)
    begin = values.address - whole.address
    if not 0 <= begin <= begin + values.size <= whole.size:
        raise UsageError(
            f"{title}: a compressed Arrow file, whose images cannot be read in place; write it without"
        )
    if ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] > values.size:
        raise ValueError("offsets beyond the values")
    spans[:, 0], spans[:, 1] = begin + ends[:-1], np.diff(ends)
    spans[spans[:, 1] == 0] = 0
    spans[data.is_null().to_numpy(zero_copy_only=False)] = 0
    return spans


# ---- Parquet --------------------------------------------------------------------------------------


def _copy(path: str, file: Any, before: Columns | None) -> str:
    """The Arrow file with the columns of a Parquet file, written on the first call and after changes of it."""
    import pyarrow as pa

    plain = pa.schema([f.with_type(_plain(f.type)) for f in file.schema_arrow], file.schema_arrow.metadata)
    columns = _columns(path, plain, before)
    used = [c for c in (columns.image, columns.label) if c]
    schema = pa.schema([plain.field(c) for c in used], plain.metadata)
    about = os.stat(path)
    # a folder for these columns of the file, and one in it for its state: a copy is never replaced by another one
    place = cache_root() / "tables" / _digest(os.path.realpath(path), *used)
    copy = place / _digest(str(about.st_size), str(about.st_mtime_ns)) / f"{Path(path).stem}.arrow"
    if copy.is_file():
        return str(copy)
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    parts = [g.column(i) for g in groups for i in range(g.num_columns)]
    size = sum(
        c.total_uncompressed_size
        for c in parts
        if f"{c.path_in_schema}.".startswith(tuple(f"{u}." for u in used))
    )
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with open(place / "lock", "wb") as lock:
            # of several processes one copies; where files cannot be locked, all do
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if copy.is_file():
                return str(copy)
            log.info("%s: copied once to %s (%.1f MB), to be read in any order", path, copy, size / 1e6)
            for old in place.glob("*/*"):
                with suppress(FileNotFoundError):
                    # of another state of the file, or left by a process that was killed: a live one writes all the time
                    if old.parent != copy.parent or time.time() - old.stat().st_mtime > _DEAD_S:
                        remove(old)
            free = shutil.disk_usage(place).free
            if free < size:
                raise OSError(errno.ENOSPC, f"{free / 1e9:.2g} GB are free, {size / 1e9:.2g} are needed")
            with new_file(copy) as out, pa.ipc.new_stream(out, schema) as writer:
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=used):
                    writer.write_batch(batch.select(used).cast(schema))
    except OSError as e:
        if not e.errno:
            # of pyarrow, about what it reads
            raise
        raise StorageError(
            f"{copy}: the copy of {path} cannot be written ({e.strerror or e}); XDG_CACHE_HOME names another place"
        ) from e
    return str(copy)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
