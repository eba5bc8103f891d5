"""The work of `embed`: images of a source in, features of whole parts out.

A part is a fixed range of rows, encoded in batches that never cross it, so its numbers depend on nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .augment import normalize
from .config import DataConfig
from .data import EvalLoader
from .dist import World
from .embeddings import DTYPES, FORMAT, VERSION, Row
from .encoder import Encoder
from .errors import DataError, NonFiniteError, OutOfMemoryError, UsageError
from .masking import sample_views
from .memory import is_out_of_memory
from .sources import ImageSource, subset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What decides a feature, beside weights and images; written to config.json.

    tokens        `class`: class token [D]; `mean`: mean of the patch tokens [D]; `patch`: patch tokens [N, D]
    norm          after the final LayerNorm (False: raw tokens, as the paper's linear probe uses)
    dtype         of the stored numbers: fp32, fp16, bf16; the two short ones are also computed with bf16
                  products where the hardware has them
    format        npy, parquet, safetensors
    img_size      (height, width) the images are resized and cropped to
    keep_ratio    share of the patches the encoder sees, chosen at random by the image's row number
    part_images   images in a part
    loader        dali or pil: their pixels differ by rounding
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

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        """The settings in a config.json."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


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

    def images(self, rows: Tensor) -> EvalLoader:
        """The images of these rows, [b, H, W, 3] uint8 with their places in `rows`."""
        return EvalLoader(
            subset(self.source, rows),
            self.data,
            self.settings.img_size,
            batch_size=self.batch_size,
            device=self.world.device,
        )

    def describe(self) -> dict[str, Any]:
        """What config.json says beside weights and data; plain data, equal to itself read back."""
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


def encode_parts(
    job: Job, numbers: list[int], reached: Callable[[int], None] = lambda images: None
) -> Iterator[tuple[int, Tensor, list[tuple[int, str]]]]:
    """(number, features, [(row, reason) of images left out]) of each part.

    reached  called after every batch with the number of images so far
    raises   DataError for an image that cannot be read, with `job.strict`; NonFiniteError
    """
    waiting, done = list(numbers), 0
    while waiting:
        try:
            for features in _stream(job, tuple(waiting), lambda seen, before=done: reached(before + seen)):
                done += len(features)
                yield waiting.pop(0), features, []
        except DataError as error:
            if job.strict:
                raise
            log.debug("part %d: %s", waiting[0], error)
            number = waiting.pop(0)
            done += len(job.part_rows(number))
            features, broken = _mend(job, job.part_rows(number))
            reached(done)
            yield number, features, broken


def _stream(job: Job, numbers: tuple[int, ...], reached: Callable[[int], None]) -> Iterator[Tensor]:
    """Features of whole parts from one reader over all of them."""
    sizes = [len(job.part_rows(n)) for n in numbers]
    rows = torch.cat([torch.arange(r.start, r.stop) for r in map(job.part_rows, numbers)])
    batches: list[Tensor] = []
    seen = 0
    for features in _batches(job, rows):
        batches.append(features)
        seen += len(features)
        reached(seen)
        if sum(map(len, batches)) == sizes[0]:
            yield torch.cat(batches)
            batches.clear()
            sizes.pop(0)


def _mend(job: Job, part: range) -> tuple[Tensor, list[tuple[int, str]]]:
    """Features of the images of one part that can be read, and the (row, reason) of the others."""
    rows = torch.arange(part.start, part.stop)
    broken: list[tuple[int, str]] = []
    while len(rows):
        try:
            features = torch.cat(list(_batches(job, rows)))
            break
        except DataError:
            found = _refused(job, rows)
            if not found:
                # no image's fault
                raise
            broken += found
            rows = rows[~torch.isin(rows, torch.tensor([row for row, _ in found]))]
    else:
        features = torch.empty(0, *job.shape, dtype=DTYPES[job.settings.dtype])
    return features, sorted(broken)


def _refused(job: Job, rows: Tensor) -> list[tuple[int, str]]:
    """(row, reason) of the images the reader cannot decode, found by halving."""
    try:
        for _ in job.images(rows):
            pass
    except DataError as error:
        if len(rows) > 1:
            half = len(rows) // 2
            return _refused(job, rows[:half]) + _refused(job, rows[half:])
        row = int(rows)
        # without the path, which stands beside it, and without the advice for training
        reason = str(error).removeprefix(f"{job.source.title(row)}: ").partition("; remove it")[0]
        return [(row, reason)]
    return []


def _batches(job: Job, rows: Tensor) -> Iterator[Tensor]:
    for images, index in job.images(rows):
        yield encode_batch(job, images, rows[index])


@torch.inference_mode()
def encode_batch(job: Job, images: Tensor, rows: Tensor) -> Tensor:
    """Features of one batch, on the CPU in the stored type.

    images  [b, H, W, 3] uint8;  rows: [b] row numbers, which choose the patches kept with `keep_ratio`
    returns [b, D], or [b, N, D] for patch tokens
    raises  NonFiniteError naming the first image; UsageError when only fp16 cannot hold the numbers
    """
    s, device, encoder = job.settings, job.world.device, job.encoder
    x = normalize(images.to(device, non_blocking=True), s.mean, s.std, encoder.in_chans)
    keep = None
    if s.keep_ratio < 1:
        count = max(1, round(encoder.num_patches * s.keep_ratio))
        keep = sample_views(rows.to(device), encoder.num_patches, count, 1)[0]
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16"):
            out = encoder.encode(x, keep, norm=s.norm)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"{len(x)} images at a time do not fit into the memory of {device}; use a smaller --batch-size"
        ) from None
    full = {
        "class": lambda: out.cls,
        "mean": lambda: out.patches.float().mean(1),
        "patch": lambda: out.patches,
    }
    full = full[s.tokens]().float()
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
