"""Images in Arrow and Parquet files, such as Hugging Face datasets on a disk: a row is a byte range of an Arrow file.

The bytes of a binary column lie in an Arrow file as they are, so they are read like those of a tar, by any thread or
process, without pyarrow. Parquet is compressed in pages of many images: its columns of images and labels are copied
once into an Arrow file in the cache folder. Nothing is downloaded, and no code of a data set is run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError, ExtremaError, StorageError, UsageError, install
from ..files import new_file, read_json
from .lists import LABEL_NAMES
from .photos import cache_root

log = logging.getLogger(__name__)

SUFFIXES = (".arrow", ".parquet")
IMAGE_NAMES = ("image", "img", "picture", "photo")
# in the schema of a copy: what it was made of
_OF = b"extrema_fast"
_ROWS_AT_ONCE = 256
# of a stream: a message without length
_END = b"\xff\xff\xff\xff\0\0\0\0"


class Columns(NamedTuple):
    """The column of images, that of labels (empty: none), and the class names of its numbers (empty: not known)."""

    image: str
    label: str
    classes: list[str]


class Table(NamedTuple):
    """The images in one table.

    Attributes:
        path: the Arrow file that `spans` are of.
        names: of each row: the path written with the image where these differ in all rows, else its number.
        spans: [n, 2] int64 offset and length of each image's bytes; 0 0: none.
        files: the path written with each image, where no row has bytes; else empty.
        labels: as written, None: none.
    """

    path: str
    names: list[str]
    spans: np.ndarray
    files: list[str]
    labels: list[str | int | None]


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
    """The images in Arrow or Parquet files of the same columns.

    The column of images is the one that the data set's own description calls so, else one of bytes or of a struct with
    `bytes`; of several one named image (img, picture, photo). That of labels is named label (labels, class, class_name,
    category, target, cls), or is the first with class names.

    Raises:
        UsageError: pyarrow is missing, a file cannot be read, or the columns do not fit; lists them.
        DataError: a damaged file.
        StorageError: a copy of a Parquet file cannot be written.
    """
    pa, pq = _pyarrow(paths[0])
    columns: Columns | None = None
    tables = []
    for path in paths:
        try:
            if path.lower().endswith(".parquet"):
                with pq.ParquetFile(path) as file:
                    columns = _columns(path, file.schema_arrow, columns)
                    source = _copy(path, file, columns)
            else:
                source = path
            tables.append(_read(source, columns, path))
        except ExtremaError:
            raise
        except OSError as e:
            if e.errno:
                raise UsageError(f"{path}: cannot be read ({e.strerror or e})") from e
            raise _damaged(path, e) from e
        except (pa.ArrowException, ValueError) as e:
            raise _damaged(path, e) from e
        columns = columns or tables[-1][0]
    assert columns is not None
    log.info(
        "%s: images in column %r, %s",
        name,
        columns.image,
        f"labels in {columns.label!r}" if columns.label else "no column of labels",
    )
    return columns, [table for _, table in tables]


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
    import pyarrow.types as types

    about = ", ".join(f"{f.name} ({'struct' if types.is_struct(f.type) else f.type})" for f in schema)
    if before is not None:
        missing = [c for c in (before.image, before.label) if c and c not in schema.names]
        if missing:
            raise UsageError(
                f"{path}: no column {missing[0]!r}, as the table before it has; its columns are {about}"
            )
        return before
    described = _described(schema, path)
    images = [
        c
        for c in schema.names
        if described.get(c, {}).get("_type") == "Image" and _bytes_type(schema.field(c).type)
    ]
    images = images or [f.name for f in schema if types.is_struct(f.type) and _bytes_type(f.type)]
    images = images or [f.name for f in schema if _bytes_type(f.type)]
    if not images:
        raise UsageError(
            f"{path}: no column of images (bytes, or a struct of bytes and path); its columns are {about}"
        )
    named = [c for word in IMAGE_NAMES for c in images if c.lower() == word]
    if len(images) > 1 and not named:
        raise UsageError(f"{path}: more than one column of images, none named image; its columns are {about}")
    fit = [f.name for f in schema if types.is_integer(f.type) or _is_text(f.type)]
    labels = [c for word in (*LABEL_NAMES, "cls") for c in fit if c.lower() == word]
    labels += [c for c in fit if _names(described.get(c))]
    label = labels[0] if labels else ""
    return Columns((named or images)[0], label, _names(described.get(label)))


def _bytes_type(kind: Any) -> bool:
    """Whether a column of this type may hold images."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _bytes_type(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind)


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
        spans, written, labels = [], list[str | None](), list[Any]()
        for batch in _batches(reader):
            # pyarrow would end the process over damaged offsets
            batch.select([c for c in (found.image, found.label) if c]).validate(full=True)
            images = batch.column(found.image)
            data, names = images, None
            if pa.types.is_struct(images.type):
                data = images.field("bytes")
                at = images.type.get_field_index("path")
                names = images.field("path") if at >= 0 else None
            spans.append(_spans(data, whole, title))
            written += [None] * len(data) if names is None else names.to_pylist()
            labels += batch.column(found.label).to_pylist() if found.label else [None] * len(data)
        table = np.concatenate([np.zeros((0, 2), np.int64), *spans])
        distinct = None not in written and len(set(written)) == len(written)
        names = [str(w) if distinct else str(row) for row, w in enumerate(written)]
        files = [] if table.any() or None in written else [str(w) for w in written]
    return found, Table(path, names, table, files, labels)


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


def _copy(path: str, file: Any, columns: Columns) -> str:
    """The Arrow file with the columns of a Parquet file, written on the first call and after changes of it."""
    import pyarrow as pa

    real, about = os.path.realpath(path), os.stat(path)
    key = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    copy = cache_root() / "tables" / key / f"{Path(path).stem}.arrow"
    used = [c for c in (columns.image, columns.label) if c]
    of = json.dumps([about.st_size, about.st_mtime_ns, used]).encode()
    if _made_of(copy) == of:
        return str(copy)
    schema = pa.schema(
        [file.schema_arrow.field(c) for c in used], metadata={**(file.schema_arrow.metadata or {}), _OF: of}
    )
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    parts = [g.column(i) for g in groups for i in range(g.num_columns)]
    size = sum(c.total_uncompressed_size for c in parts if c.path_in_schema.split(".")[0] in used)
    log.info("%s: copied once to %s (%.1f MB), to be read in any order", path, copy, size / 1e6)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(copy.parent).free
        if free < size:
            raise OSError(errno.ENOSPC, f"{free / 1e9:.2g} GB are free, {size / 1e9:.2g} are needed")
        with new_file(copy) as out, pa.ipc.new_stream(out, schema) as writer:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=used):
                writer.write_batch(batch.select(used))
    except OSError as e:
        if not e.errno:
            # of pyarrow, about what it reads
            raise
        raise StorageError(
            f"{copy}: the copy of {path} cannot be written ({e.strerror or e}); XDG_CACHE_HOME names another place"
        ) from e
    return str(copy)


def _made_of(copy: Path) -> bytes | None:
    """What a copy was made of; None: there is none."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(copy)) as file:
            return (pa.ipc.open_stream(file).schema.metadata or {}).get(_OF)
    except (OSError, pa.ArrowException):
        return None
