"""The work of `embed`: images of a source in, features of whole parts out.

A part is a fixed range of rows, encoded in batches that never cross it, so its numbers depend on nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..data.augment import normalize
from ..data.bad_images import BadRows
from ..data.loader import EvalLoader
from ..data.sources import ImageSource, subset
from ..distributed import World
from ..errors import DataError, NonFiniteError, OutOfMemoryError, UsageError
from ..models.encoder import Encoder
from ..models.masking import sample_views
from ..training.memory import is_out_of_memory
from .embeddings import DTYPES, FORMAT, VERSION, Row


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

    def images(self, source: ImageSource, bad: BadRows | None = None) -> EvalLoader:
        """The images of a source, [b, H, W, 3] uint8 with their row numbers; `bad` takes those left out."""
        return EvalLoader(
            source,
            self.data,
            self.settings.img_size,
            batch_size=self.batch_size,
            device=self.world.device,
            bad=bad,
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
    """(number, features, [(row, reason) of images left out]) of each part, by one reader over all of them.

    numbers  ascending
    reached  called after every batch with the number of images so far
    raises   DataError for an image that cannot be read, with `job.strict`; NonFiniteError
    """
    if not numbers:
        return
    rows = torch.cat([torch.arange(r.start, r.stop) for r in map(job.part_rows, numbers)])
    source = subset(job.source, rows)
    # any number of them: what cannot be read is a result here
    bad = BadRows(source, 1.0, quiet=True)
    # where in `rows` a part begins and ends
    ends = np.cumsum([len(job.part_rows(n)) for n in numbers]).tolist()
    waiting = deque(zip(numbers, [0, *ends], ends, strict=False))
    batches: list[Tensor] = []

    def part() -> tuple[int, Tensor, list[tuple[int, str]]]:
        number, first, end = waiting.popleft()
        none = torch.empty(0, *job.shape, dtype=DTYPES[job.settings.dtype])
        features = torch.cat([none, *batches])
        batches.clear()
        found = [place for place in range(first, end) if bad.known[place]]
        return number, features, [(int(rows[place]), _reason(source, bad, place)) for place in found]

    try:
        for images, index in job.images(source, None if job.strict else bad):
            # batches do not cross parts
            while int(index[0]) >= waiting[0][2]:
                yield part()
            batches.append(encode_batch(job, images, rows[index]))
            reached(int(index[-1]) + 1)
    except DataError:
        # of all images not one can be read: no error of this process's share alone
        if len(bad) < len(rows):
            raise
    while waiting:
        yield part()


def _reason(source: ImageSource, bad: BadRows, place: int) -> str:
    # without the path, which stands beside it
    return bad.reasons[place].removeprefix(f"{source.title(place)}: ")


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
