"""A folder of features, written by `embed` and read by `search` or your own code.

    config.json          weights, images and settings that determine the features; the parts; whether complete
    rows.tsv             header, then one line per feature row: row number of the image in the source, path, label
    broken.tsv           the same for images that could not be read, with the reason; only if there are any
    features/00000.npy   the features of consecutive rows, in order (or .parquet, .safetensors)

Features are [n, D] for one vector per image, [n, N, D] for patch tokens. Broken images are left out, so feature
row i over all parts is line i of rows.tsv. Files are written atomically.
In the tables, tabs, line ends, backslashes and bytes that are not UTF-8 are escaped as in a manifest
(`data/manifest.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.manifest import escape, unescape
from ..data.preprocess import INTERPOLATIONS
from ..errors import StorageError, UsageError, install
from ..files import fits, new_file, read_json, write_file
from .work import Work

FORMAT, VERSION = "extrema-fast-embeddings", 1
CONFIG, ROWS, BROKEN, FEATURES, RECORDS = "config.json", "rows.tsv", "broken.tsv", "features", ".parts"
SUFFIX = {"npy": ".npy", "parquet": ".parquet", "safetensors": ".safetensors"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Row(NamedTuple):
    """One image: its row number in the image source, its path, its label (class name; empty: none known)."""

    row: int
    path: str
    label: str


class Record(NamedTuple):
    """A finished part: features in it, bytes of its file, and the (row, reason) of the images left out."""

    rows: int
    bytes: int
    broken: list[tuple[int, str]]


# ---- writing --------------------------------------------------------------------------------------


def check_format(file_format: str, dtype: str) -> None:
    """UsageError when features of that type cannot be stored so, or pyarrow is missing for parquet."""
    if file_format not in SUFFIX:
        raise UsageError(f"--format: expected {', '.join(SUFFIX)}, got {file_format!r}")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "bf16" and file_format != "safetensors":
        raise UsageError(
            f"--dtype bf16: {file_format} files have no such type; use --dtype fp16 or fp32, or --format safetensors"
        )
    if file_format == "parquet":
        _parquet()


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"parquet files need pyarrow, which is not installed; {install('parquet')}"
        ) from None
    return pyarrow, pyarrow.parquet


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    """Makes an OSError in the block a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error}); what is finished stays, and the same "
            "command continues once there is room"
        ) from None


def part_file(folder: Path, number: int, file_format: str) -> Path:
    """Where the features of a part lie."""
    return folder / FEATURES / f"{number:05d}{SUFFIX[file_format]}"


def write_part(
    folder: Path,
    number: int,
    file_format: str,
    features: Tensor,
    rows: list[Row],
    broken: list[tuple[int, str]],
) -> None:
    """Writes one part (features [n, ...] of n images) and, after it, the record that makes it count."""
    path = part_file(folder, number, file_format)
    with _storing(path):
        with new_file(path) as f:
            _WRITERS[file_format](f, features, rows)
        record = Record(len(rows), path.stat().st_size, broken)
        Work(folder / RECORDS).finish(number, record._asdict())


def _write_npy(f: BinaryIO, features: Tensor, rows: list[Row]) -> None:
    np.save(f, features.numpy())


def _write_safetensors(f: BinaryIO, features: Tensor, rows: list[Row]) -> None:
    from safetensors.torch import save

    f.write(save({"features": features, "rows": torch.tensor([r.row for r in rows], dtype=torch.int64)}))


def _write_parquet(f: BinaryIO, features: Tensor, rows: list[Row]) -> None:
    pa, pq = _parquet()
    values = pa.array(features.numpy().reshape(-1))
    columns = {
        "row": pa.array([r.row for r in rows], pa.int64()),
        "path": pa.array([escape(r.path) for r in rows], pa.string()),
        "label": pa.array([r.label or None for r in rows], pa.string()),
        "features": pa.FixedSizeListArray.from_arrays(values, int(np.prod(features.shape[1:]))),
    }
    table = pa.table(columns, metadata={"shape": json.dumps(list(features.shape[1:]))})
    # numbers of a network have no pattern that compression finds
    pq.write_table(table, f, compression="NONE", use_dictionary=["path", "label"])


_WRITERS = {"npy": _write_npy, "parquet": _write_parquet, "safetensors": _write_safetensors}


def finished(folder: Path, config: dict[str, Any]) -> dict[int, Record]:
    """The parts that are there whole, by number: as the records say, and with as many bytes."""
    records = dict(enumerate(config.get("parts") or [])) | Work(folder / RECORDS).finished()
    found = {}
    for number, r in records.items():
        file = part_file(folder, number, config["settings"]["format"])
        if fits(r, _RECORD) and file.is_file() and file.stat().st_size == r["bytes"]:
            found[number] = Record(r["rows"], r["bytes"], [(row, why) for row, why in r["broken"]])
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder of features; empty when there is none; UsageError when it is damaged."""
    config = read_json(folder / CONFIG, {})
    if config.get("format") != FORMAT:
        return {}
    known = {key.removesuffix("?") for key in _CONFIG["settings"]}
    whole = fits(config, _CONFIG) and config["settings"].keys() <= known
    whole = whole and min([*config["shape"], config["part_count"]], default=0) > 0
    settings = config["settings"] if whole else {}
    whole = whole and 0 < (settings.get("crop_pct") or 1) <= 1
    whole = whole and settings.get("interpolation", "bilinear") in INTERPOLATIONS
    if not whole or settings["format"] not in SUFFIX or settings["dtype"] not in DTYPES:
        raise UsageError(f"{folder / CONFIG}: damaged; move {folder} away and embed again")
    return config


_RECORD = {"rows": int, "bytes": int, "broken": [[int, str]]}
_CONFIG: dict[str, Any] = {
    "part_count": int,
    "shape": [int],
    "parts": [_RECORD],
    "weights": {"path": str, "which": str, "hash": str},
    # not in older versions: of a few rows the hash of their bytes; where relative paths begin
    "data": {"path": str, "split": str, "limit": int, "fingerprint": str, "sample?": dict, "cwd?": str},
    "settings": {
        "tokens": str,
        "norm": bool,
        "dtype": str,
        "format": str,
        "img_size": [int, int],
        "mean": [float],
        "std": [float],
        "keep_ratio": float,
        "exif": bool,
        "loader": str,
        "part_images": int,
        "precision": str,
        # not in older versions
        "crop_pct?": (float, None),
        "interpolation?": str,
        "range?": [float],
    },
}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Replaces config.json."""
    with _storing(folder / CONFIG):
        write_file(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def remove(folder: Path) -> None:
    """Removes what `embed` wrote there, and nothing else."""
    Work(folder / RECORDS).clear()
    for pattern in (CONFIG, ROWS, BROKEN, *(f"{FEATURES}/[0-9]*{s}" for s in SUFFIX.values())):
        for path in sorted(folder.glob(pattern)):
            path.unlink()


# ---- reading --------------------------------------------------------------------------------------


def load_embeddings(folder: str | Path) -> Embeddings:
    """Opens a finished folder of features written by `embed`.

    Raises:
        UsageError: the folder does not exist, or is unfinished or damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not config:
        if folder.is_file():
            raise UsageError(f"{folder}: is a file; expected a folder that extrema-fast embed has written")
        what = "is no folder of features" if folder.is_dir() else "does not exist"
        raise UsageError(f"{folder}: {what}; make one with: extrema-fast embed DATA {folder} --weights PATH")
    if config.get("version") != VERSION:
        raise UsageError(
            f"{folder}: version {config.get('version')}, this program reads {VERSION}; embed again"
        )
    done, total = finished(folder, config), config["part_count"]
    if not config.get("complete") or len(done) < total or not (folder / ROWS).is_file():
        raise UsageError(
            f"{folder}: not finished ({len(done)} of {total} parts); the same embed command as before continues"
        )
    return Embeddings(folder, config)


class Embeddings:
    """Features of many images, read file by file; returned by `load_embeddings` and `embed`.

    Attributes:
        folder: the folder of the features.
        config: the content of its config.json.
        shape: shape of one image's features: (D,), or (N, D) for patch tokens.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.config = folder, config
        self.shape = tuple(config["shape"])
        self._counts = [p["rows"] for p in config["parts"]]

    def __len__(self) -> int:
        return sum(self._counts)

    @property
    def broken(self) -> int:
        """Number of images that could not be read (listed in broken.tsv)."""
        return sum(len(p["broken"]) for p in self.config["parts"])

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first feature row, features [n, *shape] in the stored dtype) of each file, one in memory at a time.

        Raises:
            UsageError: a file is damaged or does not match config.json.
        """
        first, file_format = 0, self.config["settings"]["format"]
        dtype = DTYPES[self.config["settings"]["dtype"]]
        for number, count in enumerate(self._counts):
            path = part_file(self.folder, number, file_format)
            try:
                features = _READERS[file_format](path).reshape(count, *self.shape)
            except UsageError:
                raise
            except Exception as error:
                # three libraries, each with errors of its own for damaged bytes
                raise UsageError(
                    f"{path}: damaged ({error}); delete it and embed again: only that part is made again"
                ) from None
            if features.dtype != dtype:
                raise UsageError(f"{path}: holds {features.dtype}, not the {dtype} of {CONFIG}")
            yield first, features
            first += count

    def features(self) -> Tensor:
        """All features, [n, *shape] in the stored dtype; loads everything into memory."""
        return torch.cat([part for _, part in self.parts()])

    def rows(self) -> Iterator[Row]:
        """Yields the row number, path and label of each image, in the order of the features."""
        # bytes that are no UTF-8 are damage: paths are escaped
        with open(self.folder / ROWS, encoding="utf-8", errors="surrogateescape", newline="\n") as f:
            next(f, None)
            for number, line in enumerate(f, 2):
                row, *texts = line.rstrip("\n").split("\t")
                if (
                    not re.fullmatch("[0-9]{1,18}", row)
                    or len(texts) != 2
                    or re.search(r"[\ud800-\udfff]", line)
                ):
                    raise UsageError(f"{self.folder / ROWS}: line {number} is damaged; embed again")
                yield Row(int(row), *map(unescape, texts))


def _read_npy(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _read_safetensors(path: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(path)["features"]


def _read_parquet(path: Path) -> Tensor:
    _, pq = _parquet()
    column = pq.read_table(path, columns=["features"])["features"].combine_chunks()
    # a copy: Arrow's memory is read-only
    return torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).copy())


_READERS = {"npy": _read_npy, "parquet": _read_parquet, "safetensors": _read_safetensors}
