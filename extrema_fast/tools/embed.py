"""`extrema-fast embed`: features of every image of a source, in parts, so that it can be interrupted and continued.

Images are split in row order into parts of a fixed number of rows. A part is encoded in batches that do not cross its
boundaries, written once, and never changed. So its bytes depend neither on where an earlier run stopped nor on the
number of processes. The files are described in `embeddings.py`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..data.augment import normalize
from ..data.bad_images import BadRows
from ..data.image_files import ImageFiles, deep_range, hash_sample, other_bytes, read_as
from ..data.image_source import ImageSource
from ..data.loader import EvalLoader, loader_for
from ..data.manifest import escape, write_lines
from ..data.preprocess import KEEP_EXACT, Resizing, check_crop_pct
from ..data.sources import BUILT_IN, open_source, subset
from ..distributed import World, start
from ..errors import (
    DataError,
    ExtremaError,
    NonFiniteError,
    OutOfMemoryError,
    StorageError,
    UsageError,
    counted,
    is_out_of_memory,
)
from ..evaluation.subject import weights_hash
from ..files import is_torn, no_links
from ..models.encoder import Encoder
from ..models.masking import sample_views
from ..progress import ImageProgress
from ..training.resolve import precision
from ..weights import load as convert
from ..weights.folder import check_name
from .embeddings import (
    BROKEN,
    DTYPES,
    FEATURES,
    FORMAT,
    RECORDS,
    ROWS,
    VERSION,
    Embeddings,
    Row,
    check_format,
    finished,
    load_embeddings,
    read_config,
    remove,
    write_config,
    write_part,
)
from .work import Work, changes

log = logging.getLogger(__name__)

TOKENS = ("class", "mean", "patch")
# a part has about so many images, fewer where their features are large
PART_IMAGES, PART_BYTES = 1024, 64 << 20


@dataclass(frozen=True)
class Settings:
    """Everything that determines a feature, except weights and images; written to config.json.

    Attributes:
        tokens: `class`: class token [D]; `mean`: mean of the patch tokens [D]; `patch`: patch tokens [N, D].
        norm: whether the final LayerNorm is applied (the paper's linear probe uses tokens without it).
        dtype: stored dtype: fp32, fp16 or bf16. For the latter two, matmuls also run in bf16 if supported.
        format: npy, parquet or safetensors.
        img_size: (height, width) that images are resized and cropped to.
        mean: pixel mean of the weights.
        std: pixel standard deviation of the weights.
        keep_ratio: fraction of the patches that is encoded, sampled at random by the image's row number.
        exif: whether images are rotated by their EXIF orientation.
        loader: dali or pil; their pixels differ by rounding.
        part_images: images per part.
        precision: precision of the matmuls.
        crop_pct: as in `data.preprocess.Resizing`; None (older versions): images of exactly the size are not resized.
        interpolation: as in `data.preprocess.Resizing`.
        range: black and white of images with more than 8 bits, of the weights or else the images; empty: default.
    """

    tokens: str
    norm: bool
    dtype: str
    format: str
    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    keep_ratio: float
    exif: bool
    loader: str
    part_images: int
    precision: str
    crop_pct: float | None = None
    interpolation: str = "bilinear"
    range: tuple[float, ...] = ()

    @property
    def resizing(self) -> Resizing:
        """How images are resized."""
        return KEEP_EXACT if self.crop_pct is None else Resizing(self.crop_pct, self.interpolation)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        """The settings in a config.json."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


@dataclass
class Job:
    """Everything one process needs to make parts."""

    encoder: Encoder
    source: ImageSource
    settings: Settings
    data: DataConfig
    batch_size: int
    world: World
    strict: bool

    @property
    def part_count(self) -> int:
        return -(-len(self.source) // self.settings.part_images)

    def part_rows(self, number: int) -> range:
        """Rows of the source in a part."""
        first = number * self.settings.part_images
        return range(first, min(first + self.settings.part_images, len(self.source)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image's features."""
        width, patches = self.encoder.embed_dim, self.encoder.num_patches
        return (patches, width) if self.settings.tokens == "patch" else (width,)

    def images(self, source: ImageSource, bad: BadRows | None = None) -> EvalLoader:
        """The images of a source, [b, H, W, C] uint8 with their row numbers; `bad` takes those left out."""
        return EvalLoader(
            source,
            self.data,
            self.settings.img_size,
            batch_size=self.batch_size,
            device=self.world.device,
            bad=bad,
            resizing=self.settings.resizing,
        )

    def describe(self) -> dict[str, Any]:
        """What config.json says besides weights and data; plain data, equal to itself read back."""
        settings = json.loads(json.dumps(dataclasses.asdict(self.settings)))
        return {
            "format": FORMAT,
            "version": VERSION,
            "settings": settings,
            "shape": list(self.shape),
            "grid": list(self.encoder.grid),
            "part_count": self.part_count,
        }

    def row(self, number: int) -> Row:
        labels = self.source.labels
        label = "" if labels is None else self.source.classes[int(labels[number])]
        return Row(number, self.source.title(number), label)


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
    crop_pct: float | None = None,
    keep_ratio: float = 1.0,
    batch_size: int | None = None,
    part_images: int | None = None,
    split: str = "train",
    limit: int = 0,
    loader: Literal["auto", "dali", "pil"] = "auto",
    threads: int = 0,
    exif: bool = False,
    device: str = "auto",
    strict: bool = False,
    force: bool = False,
    progress: bool = True,
) -> Embeddings:
    """Encodes every image of `data` and writes the features to the folder `out`.

    The same call continues after an interruption. Under torchrun each process encodes a share of the images, and all
    of them return the result.

    Args:
        data: images as accepted by `open_source`: a folder, list file, shards, manifest, `photos`, ...
        out: folder for the features.
        weights: weights as accepted by `load_encoder`.
        which: `teacher` or `student`.
        tokens: `class`: class token [D]; `mean`: mean of the patch tokens [D]; `patch`: patch tokens [N, D].
        norm: apply the final LayerNorm.
        dtype: `fp32`, `fp16` or `bf16`. For the latter two, matmuls also run in bf16 if the hardware supports it.
        format: `npy`, `parquet` or `safetensors`.
        img_size: pixels, or (height, width); None: the encoder's.
        crop_pct: as in `Encoder.preprocess`; None: the weights' own. Features started by an older version are continued
            with that version's resizing.
        keep_ratio: fraction of the patches to encode, sampled at random by the image's row number.
        batch_size: images at a time; None: 32 on a CPU, 256 on a GPU.
        part_images: images per file, a multiple of the batch size; None: about 1,024, fewer if their features are
            large.
        split: `train` or `test`, for a built-in image set.
        limit: encode a random subset of this many images; 0: all.
        loader: `auto`, `dali` or `pil`; their pixels differ by rounding.
        threads: decoding threads; 0: from the number of cores.
        exif: rotate images by their EXIF orientation.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        strict: raise for an image that cannot be read, instead of listing it in broken.tsv and leaving it out.
        force: first remove features in `out` that have other settings (and nothing else).
        progress: show progress.

    Returns:
        The features (`Embeddings`).

    Raises:
        UsageError: an invalid option, or features with other settings in `out`.
        DataError: no image can be read, or with `strict` one of them cannot.
        StorageError: `out` cannot be written.
        NonFiniteError: the weights produce NaN. Files finished before that are kept.
    """
    out = Path(out)
    check_format(format, dtype)
    _check(tokens, keep_ratio, batch_size, part_images)
    if crop_pct is not None:
        check_crop_pct(crop_pct, "--crop-pct")
    check_name(weights)
    with start(device) as world:
        source = world.rank_zero_first(lambda: open_source(data, split, limit=limit, check=False))
        seen = {"images": len(source), "fingerprint": source.fingerprint}
        world.agree(str(data), seen, "give all nodes the same images")
        encoder = convert.load_encoder(weights, which, img_size=img_size)
        source = read_as(source, encoder.in_chans)
        if tokens == "class" and encoder.global_pool != "token":
            raise UsageError(f"{weights}: this encoder has no class token; use --tokens mean")
        vectors = encoder.num_patches if tokens == "patch" else 1
        image_bytes = encoder.embed_dim * vectors * DTYPES[dtype].itemsize
        default = 256 if world.device.type == "cuda" else 32
        batch_size, part_images = world.broadcast(
            world.rank_zero_only(lambda: _sizes(out, batch_size, default, part_images, image_bytes, force))
        )
        older = world.broadcast(world.rank_zero_only(lambda: not force and _is_of_older_version(out)))
        resizing = None if older and crop_pct is None else encoder.resizing(crop_pct)
        cfg = DataConfig(loader=loader, exif=exif, threads=threads, range=encoder.value_range or (0.0, 0.0))
        settings = Settings(
            tokens=tokens,
            norm=norm,
            dtype=dtype,
            format=format,
            img_size=(encoder.img_size[0], encoder.img_size[1]),
            mean=tuple(encoder.mean),
            std=tuple(encoder.std),
            keep_ratio=keep_ratio,
            exif=exif,
            loader=loader_for(source, cfg),
            part_images=part_images,
            precision="fp32" if dtype == "fp32" else precision("auto", world.device.type),
            crop_pct=None if resizing is None else resizing.crop_pct,
            interpolation="bilinear" if resizing is None else resizing.interpolation,
            range=deep_range(source, cfg) or (),
        )
        job = Job(encoder.to(world.device).eval(), source, settings, cfg, batch_size, world, strict)
        where = data if data in BUILT_IN else os.path.abspath(Path(data).expanduser())
        config = job.describe() | {
            "weights": {"path": os.path.abspath(weights), "which": which, "hash": weights_hash(encoder)},
            "data": {
                "path": where,
                # at which relative paths in rows.tsv begin
                "cwd": os.getcwd(),
                "split": split,
                "limit": limit,
                "images": len(source),
                "fingerprint": source.fingerprint,
            },
        }
        with ExitStack() as held:
            world.rank_zero_only(lambda: _lock(out, held))
            todo = world.broadcast(world.rank_zero_only(lambda: _prepare(job, out, config, force)))
            if todo is not None:
                log.debug("images are %s; --crop-pct sets it", settings.resizing)
                _make(job, out, todo, progress)
                world.rank_zero_only(lambda: _finish(job, out))
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


def _is_of_older_version(out: Path) -> bool:
    """Whether features in the folder were begun by a version that took images of exactly the size whole."""
    begun = read_config(out).get("settings")
    return begun is not None and begun.get("crop_pct") is None


# ---- the folder -----------------------------------------------------------------------------------


def _lock(out: Path, held: ExitStack) -> None:
    """Makes sure that the folder is there and ours, and locks it until `held` is closed."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; give a new folder for the features")
    # earlier versions left the file of the lock there
    names = {name for name in os.listdir(out) if not is_torn(name)} if out.is_dir() else set()
    if names - {RECORDS, ".lock"} and not read_config(out):
        raise UsageError(f"{out}: holds other files; nothing was touched, give a new folder for the features")
    no_links(out, [FEATURES], str(out))
    try:
        held.enter_context(Work(out / RECORDS).locked(str(out), out / "*", out / FEATURES / "*"))
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror})") from None


def _prepare(job: Job, out: Path, config: dict[str, Any], force: bool) -> list[int] | None:
    """Numbers of the parts to make; None when everything is finished."""
    old = read_config(out)
    found = changes(_identity(old), _identity(config)) if old else []
    if old and "range" not in old["settings"]:
        # an older version used that of the images without writing it down
        found = [change for change in found if not change.startswith("range:")]
    files = ImageFiles(job.source, job.data)
    sample = hash_sample(files)
    # older versions have none
    before = old["data"].get("sample", {}) if old else {}
    if not found and (other := other_bytes(files, before)):
        found = [other]
    if found and not force:
        raise UsageError(
            f"{out}: holds features made with other settings or images ({'; '.join(found)}); give another folder, or "
            "--force to replace them"
        )
    if found:
        remove(out)
        old = {}
    done = finished(out, old) if old else {}
    todo = [n for n in range(config["part_count"]) if n not in done]
    if not todo and old.get("complete") and (out / ROWS).is_file():
        and_bytes = f", and the bytes of {counted(len(before), 'image')}" if before else ""
        log.info(
            "%s: complete; unchanged are weights, settings, names, sizes and labels of images%s; nothing to compute",
            *(out, and_bytes),
        )
        Work(out / RECORDS).remove()
        return None
    if old:
        log.info("%s: continues, %d of %d parts are finished", out, len(done), config["part_count"])
    config = config | {"data": config["data"] | {"sample": sample}}
    write_config(out, config | {"complete": False, "parts": old.get("parts", [])})
    return todo


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What features follow from, of a config.json."""
    weights, data = config["weights"], config["data"]
    found = {"version": config.get("version")}
    found |= {f"weights {key}": weights.get(key) for key in ("which", "hash")}
    found |= {f"data {key}": data.get(key) for key in ("images", "fingerprint")}
    # of older versions
    return found | {"crop_pct": None, "interpolation": "bilinear"} | config["settings"]


def _finish(job: Job, out: Path) -> None:
    """The tables of a folder whose parts are all there; rows.tsv last but for the mark in config.json."""
    config = read_config(out)
    done = finished(out, config)
    if len(done) < job.part_count:
        raise StorageError(
            f"{out}: {job.part_count - len(done)} parts have vanished; run the same command again"
        )
    parts = [done[n] for n in range(job.part_count)]
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
    Work(out / RECORDS).remove()


# ---- the work -------------------------------------------------------------------------------------


def _make(job: Job, out: Path, todo: list[int], progress: bool) -> None:
    """This process's share of the parts; an error of one process ends all of them, once each is through."""
    rank, size = job.world.rank, job.world.size
    mine = todo[rank * len(todo) // size : (rank + 1) * len(todo) // size]
    images, failure = sum(len(job.part_rows(n)) for n in mine), None
    try:
        with ImageProgress("embedding", images, progress and job.world.is_rank_zero) as bar:
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
        pending: list[Future[None]] = []
        for number, features, broken in _encode_parts(job, numbers, bar):
            left_out = {row for row, _ in broken}
            rows = [job.row(n) for n in job.part_rows(number) if n not in left_out]
            for written in pending:
                written.result()
            pending = [writer.submit(write_part, out, number, job.settings.format, features, rows, broken)]
        for written in pending:
            written.result()


def _encode_parts(
    job: Job, numbers: list[int], bar: ImageProgress
) -> Iterator[tuple[int, Tensor, list[tuple[int, str]]]]:
    """(number, features, [(row, reason) of images left out]) of each part, by one reader over all of them."""
    if not numbers:
        return
    rows = torch.cat([torch.arange(r.start, r.stop) for r in map(job.part_rows, numbers)])
    source = subset(job.source, rows)
    # any number of them: what cannot be read is a result here
    bad = BadRows(source, 1.0, warn=False)
    # where in `rows` a part begins and ends
    ends = np.cumsum([len(job.part_rows(n)) for n in numbers]).tolist()
    waiting = deque(zip(numbers, [0, *ends], ends, strict=False))
    batches: list[Tensor] = []

    def part() -> tuple[int, Tensor, list[tuple[int, str]]]:
        number, first, end = waiting.popleft()
        none = torch.empty(0, *job.shape, dtype=DTYPES[job.settings.dtype])
        features = torch.cat([none, *batches])
        batches.clear()
        # a reason without the path, which stands next to it
        broken = [
            (int(rows[place]), bad.reasons[place].removeprefix(f"{source.title(place)}: "))
            for place in range(first, end)
            if bad.known[place]
        ]
        return number, features, broken

    try:
        for images, index in job.images(source, None if job.strict else bad):
            # batches do not cross parts
            while int(index[0]) >= waiting[0][2]:
                yield part()
            batches.append(encode_batch(job, images, rows[index]))
            bar.reached(int(index[-1]) + 1)
    except DataError:
        # of all images not one can be read: no error of this process's share alone
        if len(bad) < len(rows):
            raise
    while waiting:
        yield part()


@torch.inference_mode()
def encode_batch(job: Job, images: Tensor, rows: Tensor) -> Tensor:
    """Features [b, D] (or patch tokens [b, N, D]) of images [b, H, W, C] uint8, on the CPU in the stored type.

    The row numbers [b] choose the patches kept with `keep_ratio`.
    """
    s, device, encoder = job.settings, job.world.device, job.encoder
    x = normalize(images.to(device, non_blocking=device.type == "cuda"), s.mean, s.std, encoder.in_chans)
    keep = None
    if s.keep_ratio < 1:
        count = max(1, round(encoder.num_patches * s.keep_ratio))
        keep = sample_views(rows.to(device), encoder.num_patches, count, 1)[:, 0]
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16"):
            out = encoder.encode(x, keep, norm=s.norm)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"{len(x)} images at a time do not fit into the memory of {device}; use a smaller --batch-size"
        ) from None
    if s.tokens == "class":
        full = out.cls.float()
    else:
        full = out.patches.float()
        full = full.mean(1) if s.tokens == "mean" else full
    features = full.to(DTYPES[s.dtype]).cpu()
    bad = (~features.isfinite()).flatten(1).any(1)
    if bad.any():
        i = int(bad.nonzero()[0])
        name = job.source.title(int(rows[i]))
        if full[i].isfinite().all():
            raise UsageError(
                f"{name}: a feature of {float(full[i].abs().max()):.3g} does not fit --dtype fp16; use fp32"
            )
        raise NonFiniteError(
            f"{name}: its features are not finite; the weights have diverged: take earlier ones"
        )
    return features
