"""`extrema-fast pack`: images as shuffled webdataset shards, optionally downscaled, with indexes and checksums.

    OUT/shard-000000.tar   KEY.jpg; KEY.cls, its label as a decimal number, if there are labels; KEY.idx, its row in
                           the source as a little-endian int64 (DALI: dtypes=[..., types.INT64]).
                           KEY is the position in the shuffled order
    OUT/shard-000000.idx   offsets of its members, for DALI's readers.webdataset and for this package
    OUT/manifest.tsv       every image with size and checksum; used by `--data.train OUT`
    OUT/classes.txt        the name of class n in line n + 1, if there are labels
    OUT/left_out.tsv       images that could not be packed, and why
    OUT/SHA256SUMS         checksums of all of these: `cd OUT && sha256sum -c SHA256SUMS`
    OUT/pack.json          the settings, and whether it is finished
    OUT/.pack/             until it is finished: the current shard, and the records of finished ones (`work.py`)

The same source, settings and Pillow version give the same bytes, regardless of threads and interruptions.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shlex
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .. import rng
from ..config import DataConfig
from ..data.image_files import ImageFiles, hash_sample, other_bytes
from ..data.image_source import ImageSource
from ..data.manifest import Row, escape, header_lines, is_manifest, row_line
from ..data.shards import CLASSES
from ..data.sources import BUILT_IN, MANIFEST, open_source
from ..distributed import cores
from ..errors import DataError, ExtremaError, StorageError, UsageError, counted, install
from ..files import is_torn, read_json, write_file
from ..progress import ImageProgress
from .shard_writer import END, EXTENSIONS, Done, Packed, ShardWriter, pack_image, space
from .work import Work, changes

log = logging.getLogger(__name__)

FORMAT = "extrema-fast pack 1"
ABOUT, WORK, SUMS, LEFT_OUT = "pack.json", ".pack", "SHA256SUMS", "left_out.tsv"
MB = 1_000_000
# share of the images that may be unreadable
MAX_BAD = 0.01
# images that wait, encoded, for their turn, per thread
_AHEAD = 4
# no epoch of training has this number
_PACK_EPOCH = 2**32 - 2
# images of which the loader's rate is measured, at most
_MEASURED = 512
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a packed set, besides its source; see `pack`."""

    size: int = 256
    side: str = "short"
    quality: int = 90
    shard_mb: float = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UsageError(f"--size: expected pixels, or 0 (as they are), got {self.size}")
        if self.side not in ("short", "long"):
            raise UsageError(f"--side: expected short or long, got {self.side!r}")
        if not 1 <= self.quality <= 100:
            raise UsageError(f"--quality: expected 1 to 100, got {self.quality}")
        if not 0 < self.shard_mb <= 1e6:
            raise UsageError(f"--shard-mb: expected more than 0 and at most 1000000, got {self.shard_mb:g}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed: expected 0 to 2^63 - 1, got {self.seed}")


def pack(
    data: str,
    out: str | os.PathLike[str],
    *,
    size: int = 256,
    side: str = "short",
    quality: int = 90,
    shard_mb: float = 512,
    seed: int = 0,
    threads: int = 0,
    max_bad: float = MAX_BAD,
    force: bool = False,
    measure: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Packs the images `data` names into the folder `out`; the same call again continues where it stopped.

    Args:
        data: a manifest, or whatever `open_source` takes.
        size: pixels of the `side` ("short" or "long") of larger images; 0: every image keeps its bytes.
        quality: of the JPEG files written; see `pack_image` for what is written how.
        shard_mb: a shard is at most so many million bytes, unless one image is more.
        seed: of the shuffle.
        threads: that decode and encode (0: one per core).
        max_bad: share of the images that may be unreadable (one always may); they are left out and listed.
        force: moves what is in `out` aside and starts again.
        measure: False: the loader's rate is not measured.

    Returns:
        out, images, shards, bytes, left_out, finished_before, and `loader` when measured: kind, threads, images,
        images_per_s of decoding and cropping to 224 x 224.

    Raises:
        UsageError: settings, or an `out` that holds something else.
        DataError: too many unreadable images.
        StorageError: `out` cannot be written, e.g. no space (finished shards stay).
    """
    settings = Settings(size, side, quality, float(shard_mb), seed)
    if threads < 0:
        raise UsageError(f"--threads: expected 0 (one per core) or more, got {threads}")
    if not 0 <= max_bad <= 1:
        raise UsageError(f"--max-bad: expected a share between 0 and 1, got {max_bad}")
    threads = threads or cores()
    out = Path(out).expanduser()
    pillow = _pillow()
    source = _open_source(data)
    _check_apart(out, source)
    about = {
        "format": FORMAT,
        "source": source.fingerprint,
        "images": len(source),
        **dataclasses.asdict(settings),
    }
    work = Work(out / WORK)
    sample = hash_sample(ImageFiles(source, DataConfig()))
    try:
        finished = _prepare(source, out, work, about, force)
        if not finished:
            with _locked(out, work):
                finished = _is_finished(source, out, about)
                if not finished:
                    before = read_json(out / ABOUT, {}).get("pillow", pillow)
                    if before != pillow:
                        log.warning("%s: begun with Pillow %s, now %s: bytes may differ", out, before, pillow)
                    _write_about(out, {**about, "sample": sample, "pillow": pillow, "complete": False})
                    _pack(source, out, work, settings, threads, max_bad, progress)
                    _finish(source, out, work, about, sample, pillow)
    except OSError as e:
        raise StorageError(
            f"{out}: cannot be written ({e.strerror or e}); {len(_finished_shards(out, work))} finished shards stay, "
            "and the same command goes on from there"
            + (" once there is space" if e.errno in _NO_SPACE else "")
        ) from e
    if finished:
        # it may have been killed just before it could
        work.remove()
    about = read_json(out / ABOUT)
    result = {
        "out": str(out),
        "images": about["packed"],
        **{k: about[k] for k in ("shards", "bytes", "left_out")},
    }
    result["finished_before"] = finished
    if measure:
        try:
            result["loader"] = measure_loader(str(out), threads)
        except ExtremaError as e:
            # the packed set is finished all the same
            log.warning("the loader's rate was not measured: %s", e)
    return result


def describe(result: dict[str, Any]) -> str:
    """The result of `pack` as text."""
    images, size, out = result["images"], result["bytes"], result["out"]
    lines = [
        f"{out}: {counted(images, 'image')} in {counted(result['shards'], 'shard')}, {size / MB:.1f} MB, "
        f"{size / images / 1000:.1f} kB/image"
    ]
    if result["finished_before"]:
        lines[0] += " (was finished already)"
    if result["left_out"]:
        left_out = counted(result["left_out"], "image")
        lines.append(f"left out, since unreadable: {left_out}, listed in {out}/{LEFT_OUT}")
    if "loader" in result:
        m = result["loader"]
        lines.append(
            f"loader: {m['images_per_s']:.0f} images/s, decode and crop to 224, measured now over {m['images']} of "
            f"them, from memory, {m['kind']} on {m['threads']} threads"
        )
    place = shlex.quote(str(out))
    lines.append(f"check: cd {place} && sha256sum -c {SUMS}    train: extrema-fast pretrain {place}")
    return "\n".join(lines)


# ---- the source --------------------------------------------------------------------


def _open_source(data: str) -> ImageSource:
    source, path = open_source(data), Path(data).expanduser()
    if data not in BUILT_IN and not (path.is_file() and is_manifest(path)):
        log.info(
            "%s: no manifest; unreadable images show up only as they are packed "
            "(extrema-fast index %s --out M.tsv finds them first)",
            data,
            data,
        )
    if source.parts:
        raise UsageError(
            f"{data}: a mixture with parts of an epoch; pack its sources and mix the packed sets"
        )
    return source


def _pillow() -> str:
    """The version of what writes the images; UsageError without it."""
    try:
        import PIL
        from PIL import features
    except ImportError:
        raise UsageError(f"pack needs Pillow, which is not installed; {install('train')}") from None
    return f"{PIL.__version__}, libjpeg {features.version('libjpeg_turbo') or features.version('jpg')}"


# ---- the folder -----------------------------------------------------------------------------------


def _check_apart(out: Path, source: ImageSource) -> None:
    inside = os.path.realpath(out) + os.sep
    folders = {os.path.dirname(p) for p in source.paths}
    if any((os.path.realpath(folder) + os.sep).startswith(inside) for folder in folders):
        raise UsageError(f"{out}: the images are in there; give another folder for the packed set")


def _locked(out: Path, work: Work) -> Any:
    # earlier versions noted a finished shard as shard-000000.json; it is made again
    return work.locked(str(out), out / "*", own=r"shard-\d+\.(tar|json)")


def _prepare(source: ImageSource, out: Path, work: Work, about: dict[str, Any], force: bool) -> bool:
    """Whether the set is there already; UsageError for a folder that holds anything else."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; give a folder for the shards")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    if not force:
        return _is_finished(source, out, about)
    aside = _aside(out)
    # nobody is packing into it
    with _locked(out, work) if work.folder.is_dir() else nullcontext():
        out.rename(aside)
    log.info("%s: what was there is now in %s", out, aside)
    return False


def _aside(out: Path) -> Path:
    number, out = 1, Path(os.path.abspath(out))
    while (place := out.with_name(f"{out.name}.before{number if number > 1 else ''}")).exists():
        number += 1
    return place


def _is_finished(source: ImageSource, out: Path, about: dict[str, Any]) -> bool:
    """Whether a finished set of this source and these settings is there; UsageError when it is of others."""
    old = read_json(out / ABOUT, {})
    if old.get("format") != FORMAT:
        if any(p.name != WORK and not is_torn(p.name) for p in out.iterdir()):
            raise UsageError(
                f"{out}: holds other files; give a new folder, or --force to move them to {_aside(out).name}"
            )
        return False
    found = changes(old, {k: v for k, v in about.items() if k != "source"})
    if old.get("source") != about["source"]:
        found.append("the images (names, sizes or labels)")
    # older versions have none
    before = old.get("sample", {})
    if not found and (other := other_bytes(ImageFiles(source, DataConfig()), before)):
        found.append(other)
    if found:
        state = "finished" if old.get("complete") else "unfinished"
        raise UsageError(
            f"{out}: holds a packed set ({state}) that differs: {'; '.join(found)}; give another folder, or --force "
            f"to move it to {_aside(out).name}"
        )
    if not old.get("complete"):
        return False
    files = {n: out / n for n in old["files"]}
    broken = [n for n, f in files.items() if not f.is_file() or f.stat().st_size != old["files"][n]]
    if broken:
        raise UsageError(
            f"{out}: the packed set was finished, but {len(broken)} of its files are gone or changed, first: "
            f"{broken[0]}; --force packs again"
        )
    and_bytes = f", and the bytes of {counted(len(before), 'image')}" if before else ""
    log.info(
        "%s: finished; unchanged are settings, names, sizes and labels of images%s; nothing to pack",
        *(out, and_bytes),
    )
    return True


def _write_about(out: Path, about: dict[str, Any]) -> None:
    write_file(out / ABOUT, json.dumps(about, indent=1) + "\n")


# ---- the work -------------------------------------------------------------------------------------


def _pack(
    source: ImageSource,
    out: Path,
    work: Work,
    settings: Settings,
    threads: int,
    max_bad: float,
    progress: bool,
) -> None:
    """Writes the shards that are not there yet."""
    done = _finished_shards(out, work)
    start = done[-1].end if done else 0
    bad = sum(len(d.left_out) for d in done)
    if start:
        log.info(
            "%s: goes on after %s, %d of %d images", out, counted(len(done), "shard"), start, len(source)
        )
    order = rng.permutation(len(source), seed=settings.seed, epoch=_PACK_EPOCH)
    width = max(8, len(str(len(source) - 1)))
    shard: ShardWriter | None = None
    number = len(done)

    def encode(place: int) -> tuple[int, int, Packed | str]:
        row = int(order[place])
        try:
            data = source.read(row)
        except OSError as e:
            return place, row, f"cannot be read: {e.strerror or e}"
        return (
            place,
            row,
            pack_image(data, settings.size, settings.side, settings.quality, source.value_range),
        )

    pool = ThreadPoolExecutor(threads, thread_name_prefix="pack")
    try:
        with ImageProgress("packing", len(source) - start, progress) as bar:
            for place, row, image in _in_order(pool, encode, range(start, len(source)), threads * _AHEAD):
                if isinstance(image, str):
                    shard = shard or ShardWriter(out, work, number, place)
                    shard.left_out.append((row, source.title(row), image))
                    bad += 1
                    if bad > max(1, max_bad * len(source)):
                        raise DataError(
                            f"{source.name}: {bad} of {len(source)} images cannot be packed, more than --max-bad "
                            f"{max_bad:g} allows, last: {source.title(row)} ({image}); `extrema-fast index` lists "
                            f"them all; finished shards in {out} stay, and a larger --max-bad goes on"
                        )
                else:
                    parts, entry = _sample(source, row, f"{place:0{width}d}", image)
                    if shard and shard.rows and shard.bytes + space(parts) + END > settings.shard_mb * MB:
                        shard.finish(place)
                        shard, number = None, number + 1
                    shard = shard or ShardWriter(out, work, number, place)
                    shard.add(parts, entry)
                bar.reached(place + 1 - start)
            if shard:
                shard.finish(len(source))
                shard = None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if shard:
            shard.discard()


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[R]:
    """Results in the order of `items`, computed up to `ahead` items early."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _sample(source: ImageSource, row: int, key: str, image: Packed) -> tuple[list[tuple[str, bytes]], Row]:
    """The components of an image, and its manifest row (the shard puts path and offset in)."""
    kind = image.kind.split()[0]
    member = f"{key}.{EXTENSIONS.get(kind, kind)}"
    parts = [(member, image.data)]
    label = ""
    if source.labels is not None:
        number = int(source.labels[row])
        label = source.classes[number]
        parts.append((f"{key}.cls", str(number).encode()))
    parts.append((f"{key}.idx", struct.pack("<q", row)))
    about = image._asdict() | {"bytes": len(image.data), "crc32": zlib.crc32(image.data)}
    del about["data"]
    return parts, Row(path="", member=member, label=label, **about)


def _finish(
    source: ImageSource, out: Path, work: Work, about: dict[str, Any], sample: dict[str, str], pillow: str
) -> None:
    """Manifest, classes, checksums; then the folder is marked finished."""
    done = _finished_shards(out, work)
    rows = [row for d in done for row in d.rows]
    left_out = [entry for d in done for entry in d.left_out]
    if not rows:
        _, title, why = left_out[0]
        raise DataError(
            f"{source.name}: none of its {len(source)} images can be packed, first: {title} ({why})"
        )
    sums = {name: value for d in done for name, value in d.sums.items()}
    classes = source.classes if source.labels is not None else []
    notes: dict[str, Any] = {"packed": about}
    if source.value_range:
        # of the images before, which the weights will be given
        notes["range"] = [float(v) for v in source.value_range]
    if source.statistics:
        notes |= dict(zip(("mean", "std"), source.statistics, strict=True))
    texts = {MANIFEST: header_lines(".", classes, notes) + "".join(map(row_line, rows))}
    if classes:
        texts[CLASSES] = "".join(f"{escape(c)}\n" for c in classes)
    if left_out:
        lines = (f"{row}\t{escape(title)}\t{escape(why)}\n" for row, title, why in left_out)
        texts[LEFT_OUT] = "row\timage\treason\n" + "".join(lines)
    for name, text in texts.items():
        write_file(out / name, text)
        sums[name] = hashlib.sha256(text.encode()).hexdigest()
    write_file(out / SUMS, "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())))
    files = {name: (out / name).stat().st_size for name in [*sums, SUMS]}
    counts = {
        "packed": len(rows),
        "shards": sum(bool(d.rows) for d in done),
        "bytes": sum(d.bytes for d in done if d.rows),
        "left_out": len(left_out),
    }
    about = {**about, **counts, "sample": sample, "pillow": pillow}
    _write_about(out, {**about, "complete": True, "files": files})
    work.remove()


def _finished_shards(out: Path, work: Work) -> list[Done]:
    """The shards with a record, from the first one on, as far as they are there."""
    records, found = work.finished(), list[Done]()
    while len(found) in records:
        try:
            done = Done(**records[len(found)])
            rows = [Row(*row) for row in done.rows]
            if rows and (out / f"{done.name}.tar").stat().st_size != done.bytes:
                break
        except (OSError, TypeError):
            break
        found.append(done._replace(rows=rows, left_out=[(r, t, why) for r, t, why in done.left_out]))
    return found


def measure_loader(data: str, threads: int) -> dict[str, Any]:
    """The training loader's rate on a few hundred images of `data`: decode, crop to 224 x 224, flip."""
    from ..data.image_files import count_channels, read_as
    from ..data.loader import TrainLoader

    source = open_source(data)
    # of arrays as many as they have
    source = read_as(source, count_channels(source, 0, 3))
    batch = min(64, len(source))
    batches = max(1, min(_MEASURED, len(source)) // batch)
    with TrainLoader(source, DataConfig(threads=threads), (224, 224), batch_size=batch, seed=0) as loader:
        # the decoder starts, and what it does ahead is in memory
        for _ in range(3):
            next(loader)
        began = time.perf_counter()
        for _ in range(batches):
            next(loader)
        seconds = time.perf_counter() - began
        return {
            "kind": loader.kind,
            "threads": threads,
            "images": batch * batches,
            "images_per_s": batch * batches / seconds,
        }
