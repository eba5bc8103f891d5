"""Features of every image of a source, in parts that survive being killed (`extrema-fast embed`).

Images are cut in row order into parts of a fixed number of rows; a part is encoded, written and never touched
again. So the bytes of a part depend neither on where an earlier run stopped nor on the number of processes.
`embeddings.py` says what lies where, `embed_parts.py` does the work.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..config import Config, DataConfig
from ..data.loader import choose_loader
from ..data.manifest import escape, write_lines
from ..data.sources import BUILT_IN, ImageSource, open_source
from ..distributed import start
from ..errors import DataError, ExtremaError, StorageError, UsageError
from ..evaluation.evaluate import weights_hash
from ..models.encoder import Encoder
from ..training.plan import precision
from ..weights import load as convert
from .embed_parts import Job, Settings, encode_parts
from .embeddings import (
    BROKEN,
    DTYPES,
    FEATURES,
    RECORDS,
    ROWS,
    Embeddings,
    check_format,
    finished,
    load_embeddings,
    read_config,
    remove,
    write_config,
    write_part,
)
from .progress import ImageProgress

log = logging.getLogger(__name__)

TOKENS = ("class", "mean", "patch")
# a part has about so many images, fewer where their features are large
PART_IMAGES, PART_BYTES = 1024, 64 << 20
_LOCK = ".lock"


def embed(
    data: str,
    out: str | Path,
    weights: str | Path,
    *,
    which: str = "teacher",
    tokens: str = "class",
    norm: bool = True,
    dtype: str = "fp32",
    format: str = "npy",
    img_size: int | tuple[int, int] | None = None,
    keep_ratio: float = 1.0,
    batch_size: int | None = None,
    part_images: int | None = None,
    split: str = "train",
    limit: int = 0,
    loader: str = "auto",
    threads: int = 0,
    exif: bool = False,
    device: str = "auto",
    strict: bool = False,
    force: bool = False,
    progress: bool = True,
) -> Embeddings:
    """Features of every image of `data` in the folder `out`, or the rest of them after an interruption.

    data         what `open_source` takes: folder, list file, shards, manifest, `photos`; `split` and `limit` too
    weights      what `load_encoder` takes; `which`: teacher or student
    batch_size   images at a time (None: 32 on a CPU, 256 on a GPU)
    part_images  images per part, a multiple of the batch (None: about 1,024, fewer when they are large)
    strict       an image that cannot be read ends the run; else it is left out and listed in broken.tsv
    force        removes features of other settings in `out` first (never anything else)
    others       as `Settings`; they must be the same when a run is continued
    returns      the finished features; under torchrun each process makes its share, and all return them
    raises       UsageError; DataError when no image can be read; StorageError when `out` cannot be written;
                 NonFiniteError for weights that give NaN. What is finished by then stays
    """
    out = Path(out)
    check_format(format, dtype)
    _check(tokens, keep_ratio, batch_size, part_images)
    with start(device) as world:
        source = world.rank_zero_first(lambda: open_source(data, split, limit=limit, check=False))
        encoder = convert.load_encoder(weights, which, img_size=img_size)
        if tokens == "class" and encoder.global_pool != "token":
            raise UsageError(f"{weights}: this encoder has no class token; use --tokens mean")
        image_bytes = (
            encoder.embed_dim * (encoder.num_patches if tokens == "patch" else 1) * DTYPES[dtype].itemsize
        )
        default = 256 if world.device.type == "cuda" else 32
        batch_size, part_images = world.broadcast(
            world.rank_zero_only(lambda: _sizes(out, batch_size, default, part_images, image_bytes, force))
        )
        settings = Settings(
            tokens=tokens,
            norm=norm,
            dtype=dtype,
            format=format,
            img_size=tuple(encoder.img_size),
            mean=tuple(encoder.mean),
            std=tuple(encoder.std),
            keep_ratio=keep_ratio,
            exif=exif,
            loader=choose_loader(loader),
            part_images=part_images,
            precision="fp32" if dtype == "fp32" else precision(Config(), world.device.type),
        )
        cfg = DataConfig(loader=loader, exif=exif, threads=threads)
        job = Job(encoder.to(world.device).eval(), source, settings, cfg, batch_size, world, strict)
        config = job.describe() | {
            "weights": _weights(encoder, weights, which),
            "data": _data(source, data, split, limit),
        }
        lock = world.rank_zero_only(lambda: _open(out))
        try:
            todo = world.broadcast(world.rank_zero_only(lambda: _prepare(out, config, force)))
            if todo is not None:
                _make(job, out, todo, progress)
                world.rank_zero_only(lambda: _finish(job, out))
        finally:
            if lock is not None:
                os.close(lock)
    return load_embeddings(out)


def describe(result: Embeddings) -> str:
    """What `extrema-fast embed` prints at its end."""
    c, s = result.config, result.config["settings"]
    what = {"class": "class token", "mean": "mean of patch tokens", "patch": "patch tokens"}[s["tokens"]]
    left_out = f"; {result.broken} more could not be read, listed in {BROKEN}" if result.broken else ""
    return (
        f"{result.folder}: {len(result)} images{left_out}\n"
        f"{what} of the {c['weights']['which']}, {list(result.shape)} {s['dtype']} each, in {c['part_count']} "
        f"{s['format']} file{'s' * (c['part_count'] > 1)}; row i belongs to line i of {ROWS}"
    )


def _check(tokens: str, keep_ratio: float, batch_size: int | None, part_images: int | None) -> None:
    if tokens not in TOKENS:
        raise UsageError(f"--tokens: expected {', '.join(TOKENS)}, got {tokens!r}")
    if not 0 < keep_ratio <= 1:
        raise UsageError(f"--keep-ratio: expected a share in (0, 1], got {keep_ratio}")
    if keep_ratio < 1 and tokens == "patch":
        raise UsageError("--keep-ratio: patch tokens of a random part of an image have no fixed place; use 1")
    for name, value in (("--batch-size", batch_size), ("--part-images", part_images)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}")


def _sizes(
    out: Path, batch: int | None, default: int, part: int | None, image_bytes: int, force: bool
) -> tuple[int, int]:
    """Images in a batch and in a part, a multiple of it; as they were begun with where nothing else is asked."""
    begun = 0 if force else (read_config(out).get("settings", {}).get("part_images", 0))
    if batch is None:
        # another device has another default
        batch = math.gcd(begun, default)
    if part is None:
        part = begun if begun and begun % batch == 0 else 0
    elif part % batch:
        raise UsageError(f"--part-images: {part} is not a multiple of the {batch} images of --batch-size")
    return batch, part or batch * max(1, min(PART_IMAGES, PART_BYTES // image_bytes) // batch)


def _weights(encoder: Encoder, path: str | Path, which: str) -> dict[str, Any]:
    return {"path": os.path.abspath(path), "which": which, "hash": weights_hash(encoder)}


def _data(source: ImageSource, spec: str, split: str, limit: int) -> dict[str, Any]:
    where = spec if spec in BUILT_IN else os.path.abspath(Path(spec).expanduser())
    return {
        "path": where,
        "split": split,
        "limit": limit,
        "images": len(source),
        "fingerprint": source.fingerprint,
    }


# ---- the folder -----------------------------------------------------------------------------------


def _open(out: Path) -> int | None:
    """The folder, there and ours: the descriptor of its lock."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; give a new folder for the features")
    if out.is_dir() and not read_config(out) and set(os.listdir(out)) - {_LOCK}:
        raise UsageError(f"{out}: holds other files; nothing was touched, give a new folder for the features")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UsageError(
            f"{out}: another job is writing features here; wait for it, or give another folder"
        ) from None
    except OSError as error:
        log.warning("%s: cannot be locked (%s); start no second job on it", out, error.strerror)
    return lock


def _prepare(out: Path, config: dict[str, Any], force: bool) -> list[int] | None:
    """Numbers of the parts to make; None when everything is finished."""
    old = read_config(out)
    changes = _changes(old, config) if old else []
    if changes and not force:
        raise UsageError(
            f"{out}: holds features made with other settings ({'; '.join(changes)}); give another folder, or "
            "--force to replace them"
        )
    if changes:
        remove(out)
        old = {}
    for folder in (out, out / FEATURES, out / RECORDS):
        for torn in folder.glob(".tmp-*"):
            # of a process that was killed while writing
            torn.unlink(missing_ok=True)
    done = finished(out, old) if old else {}
    todo = [n for n in range(config["part_count"]) if n not in done]
    if not todo and old.get("complete") and (out / ROWS).is_file():
        log.info("%s: complete; weights, images and settings are unchanged, nothing to compute", out)
        return None
    if old:
        log.info("%s: continues, %d of %d parts are finished", out, len(done), config["part_count"])
    write_config(out, config | {"complete": False, "parts": old.get("parts", [])})
    return todo


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs in a way that changes features, as `dtype: fp16 there, fp32 now`."""
    found = [("version", old.get("version"), new["version"])]
    for group, keys in (
        ("weights", ("which", "hash")),
        ("data", ("images", "fingerprint")),
        ("settings", None),
    ):
        before = old.get(group, {})
        for key in keys or new[group]:
            name = key if group == "settings" else f"{group} {key}"
            found.append((name, before.get(key), new[group][key]))
    return [f"{name}: {_short(a)} there, {_short(b)} now" for name, a, b in found if a != b]


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _finish(job: Job, out: Path) -> None:
    """The tables of a folder whose parts are all there; rows.tsv last but for the mark in config.json."""
    config = read_config(out)
    parts = finished(out, config)
    if len(parts) < job.part_count:
        raise StorageError(
            f"{out}: {job.part_count - len(parts)} parts have vanished; run the same command again"
        )
    parts = [parts[n] for n in range(job.part_count)]
    broken = [b for p in parts for b in p.broken]
    if broken and len(broken) == len(job.source):
        row, reason = broken[0]
        raise DataError(
            f"none of the {len(broken)} images can be read, first: {job.source.title(row)} ({reason})"
        )
    left_out = {row for row, _ in broken}
    rows = (job.row(n) for n in range(len(job.source)) if n not in left_out)
    write_lines(out / ROWS, "row\tpath\tlabel\n", (f"{n}\t{escape(p)}\t{escape(c)}\n" for n, p, c in rows))
    if broken:
        lines = (f"{n}\t{escape(job.source.title(n))}\t{escape(why)}\n" for n, why in broken)
        write_lines(out / BROKEN, "row\tpath\treason\n", lines)
    write_config(out, config | {"parts": [p._asdict() for p in parts], "complete": True})
    shutil.rmtree(out / RECORDS, ignore_errors=True)


# ---- the work -------------------------------------------------------------------------------------


def _make(job: Job, out: Path, todo: list[int], progress: bool) -> None:
    """This process's share of the parts; an error of one process ends all of them, once each is through."""
    rank, size = job.world.rank, job.world.size
    mine = todo[rank * len(todo) // size : (rank + 1) * len(todo) // size]
    failure = None
    try:
        with ImageProgress(
            "embedding", sum(len(job.part_rows(n)) for n in mine), progress and job.world.is_rank_zero
        ) as bar:
            _write_parts(job, out, mine, bar)
    except ExtremaError as error:
        failure = error
    if job.world.any(failure is not None):
        raise failure or DataError(
            "another process has stopped with an error, see its message; what is finished stays"
        )


def _write_parts(job: Job, out: Path, numbers: list[int], bar: ImageProgress) -> None:
    # one part is written while the next is computed; more would only fill the memory
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        pending = None
        for number, features, broken in encode_parts(job, numbers, bar.reached):
            left_out = {row for row, _ in broken}
            rows = [job.row(n) for n in job.part_rows(number) if n not in left_out]
            if pending is not None:
                pending.result()
            pending = writer.submit(write_part, out, number, job.settings.format, features, rows, broken)
        if pending is not None:
            pending.result()
