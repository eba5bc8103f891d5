"""Features of image sources: encoder outputs, raw pixels, and the small fixed subsets evaluation uses."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng
from ..config import DataConfig
from ..data.augment import normalize
from ..data.bad_images import BadRows
from ..data.image_files import ImageFiles, hash_sample
from ..data.loader import EvalLoader
from ..data.preprocess import KEEP_EXACT, Resizing
from ..data.sources import ImageSource, match_classes, subset
from ..errors import UsageError
from ..progress import ImageProgress

if TYPE_CHECKING:
    from ..models.encoder import Encoder

# numbers a raw-pixel matrix may hold; beyond that images are averaged to a coarser grid
PIXEL_BUDGET = 4e8


@dataclass(frozen=True)
class Features:
    """cls [n, D] fp32 and mean [n, D] fp32 on the CPU; labels [n] int64 or None; rows [n] int64: which images."""

    cls: Tensor
    mean: Tensor
    labels: Tensor | None
    rows: Tensor


@dataclass(frozen=True)
class Embedded:
    """Images and their class tokens after the final norm, [n, D] fp32 on the CPU."""

    source: ImageSource
    cls: Tensor


@torch.inference_mode()
def extract(
    encoder: Encoder,
    source: ImageSource,
    cfg: DataConfig,
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    strict: bool = True,
    resizing: Resizing | None = None,
    told: set[str] | None = None,
) -> Features:
    """Class token and mean of the patch tokens, both after the final norm, of every image in order.

    Args:
        encoder: Moved to `device` and left there; its training flags are restored.
        source: The images.
        cfg: How they are read and normalized.
        batch_size: Images per forward pass.
        device: Where to compute.
        strict: An image that cannot be decoded is a DataError; otherwise it is left out, and the log says how many.
        resizing: of the images; None: the encoder's.
        told: of `BadRows.tell`: names of images that the log need not say again.
    """
    resizing = resizing or encoder.resizing()
    bad = None if strict else BadRows(source, 1.0, warn=False)
    modes = [(m, m.training) for m in encoder.modules()]
    encoder.to(device).eval()
    cls, mean, rows = [], [], []
    loader = EvalLoader(
        source, cfg, encoder.img_size, batch_size=batch_size, device=device, bad=bad, resizing=resizing
    )
    try:
        with ImageProgress(f"encoding {source.name}", len(source)) as bar:
            for images, index in loader:
                rows.append(index)
                out = encoder.encode(normalize(images.to(device), cfg.mean, cfg.std, encoder.in_chans))
                cls.append(out.cls.float().cpu())
                mean.append(out.patches.float().mean(1).cpu())
                bar.advance(len(index))
    finally:
        for module, mode in modes:
            module.training = mode
    if bad:
        bad.tell(told)
    kept = torch.cat(rows)
    labels = None if source.labels is None else source.labels[kept]
    return Features(torch.cat(cls), torch.cat(mean), labels, kept)


@torch.inference_mode()
def raw_pixels(
    source: ImageSource,
    cfg: DataConfig,
    img_size: tuple[int, int],
    *,
    side: int = 32,
    batch_size: int = 256,
    resizing: Resizing = KEEP_EXACT,
) -> Features:
    """Pixels in 0..1 as features, [n, P]; larger images are averaged to `side` pixels first.

    Gray images stored as RGB give one number per pixel; images that cannot be decoded are left
    out. `cls` and `mean` are the same tensor.
    """
    channels = ImageFiles(source, cfg).read_channels
    while len(source) * channels * side * side > PIXEL_BUDGET and side > 8:
        side //= 2
    height, width = (min(s, side) for s in img_size)
    pixels, rows = [], []
    bad = BadRows(source, 1.0, warn=False)
    loader = EvalLoader(source, cfg, img_size, batch_size=batch_size, bad=bad, resizing=resizing)
    with ImageProgress(f"pixels of {source.name}", len(source)) as bar:
        for images, index in loader:
            x = images.permute(0, 3, 1, 2).float() / 255
            pixels.append(F.adaptive_avg_pool2d(x, (height, width)))
            rows.append(index)
            bar.advance(len(index))
    x, kept = torch.cat(pixels), torch.cat(rows)
    if x.shape[1] == 3 and torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2]):
        x = x[:, :1]
    x = x.flatten(1)
    return Features(x, x, None if source.labels is None else source.labels[kept], kept)


def cap(source: ImageSource, limit: int, seed: int) -> ImageSource:
    """At most `limit` images (0: all): a keyed choice in row order, the same at every evaluation."""
    if limit <= 0 or len(source) <= limit:
        return source
    return subset(source, rng.permutation(len(source), seed=seed, epoch=0)[:limit].sort().values)


def labeled(train: ImageSource, test: ImageSource) -> ImageSource:
    """`test` with labels numbered as in `train`; UsageError without labels or for unknown classes."""
    for name, source in (("training", train), ("test", test)):
        if source.labels is None:
            raise UsageError(
                f"{source.name}: {name} images without labels, which k-NN and the linear probe need; give "
                "a folder with one sub-folder per class, or a list file with 'path<tab>label' lines"
            )
    return match_classes(test, train)


# test images whose bytes are looked for among the training images
OVERLAP_IMAGES = 256


def overlap(train: ImageSource, test: ImageSource, seed: int = 0) -> list[str]:
    """A warning (or none) that test images are also training images: same file, or same bytes.

    Looks at a keyed choice of at most 256 test images, and among the training images at those of the same size.
    """
    few = cap(test, OVERLAP_IMAGES, seed)
    sizes = dict.fromkeys(map(few.size, range(len(few))))
    by_size: dict[int, list[int]] = {}
    with ImageProgress(f"sizes of {train.name}", len(train), unit="files") as bar:
        for row in range(len(train)):
            if (size := train.size(row)) in sizes:
                by_size.setdefault(size, []).append(row)
            if row % 1000 == 0:
                bar.reached(row)
    digests: dict[int, bytes] = {}
    found, first = 0, ""

    def digest(source: ImageSource, row: int) -> bytes:
        with suppress(OSError):
            return hashlib.sha256(source.read(row)).digest()
        return os.urandom(32)

    for row in range(len(few)):
        candidates = by_size.get(few.size(row), [])
        if not candidates or few.size(row) <= 0:
            continue
        own = digest(few, row)
        for other in candidates:
            if other not in digests:
                digests[other] = digest(train, other)
            if digests[other] == own:
                found, first = found + 1, first or few.title(row)
                break
    if not found:
        return []
    return [
        f"{found} of {len(few)} test images looked at are training images too, first: {first}: k-NN and probe "
        "are better than they should be; give test images that are not among the training images"
    ]


def content_hash(source: ImageSource) -> str:
    """Short hash of the images of a source: its fingerprint, and the bytes of a few images (`hash_sample`).

    Uncompressed images of one shape have the same size, and so the same fingerprint where their names are equal.
    """
    sample = json.dumps([source.fingerprint, hash_sample(ImageFiles(source, DataConfig()))])
    return hashlib.sha256(sample.encode()).hexdigest()[:16]


def load_batch(
    source: ImageSource,
    cfg: DataConfig,
    img_size: tuple[int, int],
    count: int,
    *,
    strict: bool = True,
    resizing: Resizing = KEEP_EXACT,
) -> Tensor:
    """[min(count, n), H, W, C] uint8: evenly spaced images of a source, the same every time.

    `strict` and `resizing` as for `extract`.
    """
    n = len(source)
    count = min(count, n)
    few = subset(source, torch.tensor([int((j + 0.5) * n / count) for j in range(count)]))
    bad = None if strict else BadRows(few, 1.0, warn=False)
    return torch.cat([images for images, _ in EvalLoader(few, cfg, img_size, bad=bad, resizing=resizing)])
