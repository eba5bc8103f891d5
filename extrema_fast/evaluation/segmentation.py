"""Dense evaluation: how well frozen patch tokens predict segmentation masks, by a linear probe and by k-means.

Each image is resized as a whole to the encoder's size, whatever its aspect ratio; predictions are compared with the
masks pixel by pixel at the masks' original size. The probe applies the paper's rule for images (`train_heads`) to
tokens, with the fraction of each class among a token's pixels as target. k-means never sees a mask: it makes as many
clusters as there are classes, which are matched one to one to the classes on the training images (Hungarian matching by
IoU).
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng
from ..config import DataConfig, EvalConfig
from ..data.augment import normalize
from ..data.image_files import ImageFiles, read_as
from ..data.loader import EvalLoader
from ..data.preprocess import Resizing
from ..distributed import pick_device
from ..errors import UsageError, cannot_import, counted
from ..models.encoder import Encoder
from ..progress import ImageProgress
from .features import content_hash
from .masks import IGNORED, MaskSet, confusion, intersection_over_union, mean_iou, open_masks, shares
from .probes import Heads, train_heads
from .result import PIXELS, PRETRAINED, RANDOM, TOKENS, is_segmentation
from .subject import FORMAT, keep_result, known_result, open_subject, result_file, result_key

log = logging.getLogger(__name__)

# training tokens that probe and k-means learn from, as many of each image
MAX_TOKENS = 200_000
# of k-means
ITERATIONS = 50
_TOKEN_EPOCH = 2**32 - 4

# images [b, C, H, W], normalized, to tokens [b, N, d]
Tokens = Callable[[Tensor], Tensor]


def segment(
    path: str | Path,
    data: str,
    *,
    out: str | Path | None = None,
    which: str = "teacher",
    img_size: Sequence[int] | None = None,
    max_train: int = 0,
    max_test: int = 0,
    seed: int = 0,
    seeds: int = 1,
    batch_size: int | None = None,
    device: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Mean IoU of a linear probe and of k-means on patch tokens, for an encoder, its initialization, and raw pixels.

    Args:
        path: Run folder, weights folder or released `.pth`.
        data: Folder with images and masks in the layout of VOC, of ADE20K, or images/ and masks/ (docs/evaluation.md).
        out: Result file (JSON). None: `reports/segmentation-KEY.json` for a run folder, otherwise no file.
        which: `teacher` or `student`.
        img_size: Size that images are resized to, (height, width); None: the encoder's.
        max_train: Maximum number of training images (0: all).
        max_test: Maximum number of test images (0: all).
        seed: Random seed of the subsets, the probe's order and weights, and the initial k-means centers.
        seeds: Number of consecutive seeds, starting at `seed`, to average over; `spread` has the standard deviation.
        batch_size: Images per forward pass; None: the run's.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        force: Compute the result even if the file already holds it.

    Returns:
        A dict of plain data: `rows` (encoder, mean IoU of `probe` and `kmeans`), `gain` over random initialization,
        `per_class` IoU of the pretrained encoder with the first seed (None for a class that is neither present nor
        predicted), `warnings`, `counts`, the settings, and a key over weights, images and settings.

    Raises:
        UsageError: The folder layout is unknown, a mask does not match its image or has unknown classes, or there is
            only one class.
        DataError: An image cannot be read.
        StorageError: `out` cannot be written; the error's `result` holds the result.
    """
    for name, value, low in (
        ("max_train", max_train, 0),
        ("max_test", max_test, 0),
        ("batch_size", batch_size, 1),
        ("seeds", seeds, 1),
    ):
        if value is not None and value < low:
            raise UsageError(f"{name}: expected at least {low}, got {value}")
    where = pick_device(device)
    subject = open_subject(path, which, img_size)
    encoder, cfg = subject.encoder, dataclasses.replace(subject.data, exif=False)
    train, test = (
        _opened(masked, encoder, limit, seed)
        for masked, limit in zip(open_masks(data), (max_train, max_test), strict=True)
    )
    settings: dict[str, Any] = {
        "which": which,
        "data": data,
        "seed": seed,
        "mean": list(cfg.mean),
        "std": list(cfg.std),
    }
    if seeds > 1:
        settings["seeds"] = seeds
    if encoder.value_range:
        settings["range"] = list(encoder.value_range)
    key = result_key(
        settings,
        encoder,
        "segmentation",
        train.source.fingerprint,
        test.source.fingerprint,
        list(encoder.img_size),
        train.state(),
        test.state(),
    )
    if out is None and subject.cfg is not None:
        out = result_file(subject.path, f"segmentation-{key}.json")
        log.info("the result goes to %s", out)
    images = {name: content_hash(m.source) for name, m in (("train", train), ("test", test))}
    if out is not None and not force and (known := known_result(Path(out), key, is_segmentation, images)):
        return known

    started = time.monotonic()
    pixels = [_count_pixels(masked, cfg) for masked in (train, test)]
    names = train.classes or [str(c) for c in range(1 + int((pixels[0] + pixels[1]).nonzero().max()))]
    if int((pixels[0] > 0).sum()) < 2:
        raise UsageError(
            f"{train.source.name}: the masks hold one class only; segmentation needs two or more"
        )
    patch = encoder.patch_size
    size = (encoder.img_size[0] // patch, encoder.img_size[1] // patch)
    picked, targets = _targets(train, size, len(names))
    warnings = []
    if unknown := ((pixels[0] == 0) & (pixels[1] > 0)).nonzero()[:, 0].tolist():
        warnings.append(
            f"{counted(len(unknown), 'class')} in the test masks alone, which nothing can predict (IoU 0): "
            f"{', '.join(names[c] for c in unknown[:5])}"
        )
    views: dict[str, Tokens] = {
        PRETRAINED: partial(_patch_tokens, encoder.to(where)),
        RANDOM: partial(_patch_tokens, subject.initial().to(where)),
        PIXELS: partial(_pixel_tokens, patch),
    }
    # a class map of every pixel is large; a few images at a time keep it small
    usual = min(32, (EvalConfig() if subject.cfg is None else subject.cfg.eval).batch_size)
    loaded = partial(_batches, cfg=cfg, encoder=encoder, batch=batch_size or usual, device=where)
    rows: list[dict[str, Any]] = []
    per_class: dict[str, Any] = {}
    for name, tokens in views.items():
        scores = _learn(
            loaded(train.source), tokens, picked, targets, range(seed, seed + seeds), warnings, name
        )
        counts = _compare(loaded(test.source), tokens, scores, test, size, len(names))
        values = {m: [mean_iou(c) for c in found] for m, found in counts.items()}
        row: dict[str, Any] = {"encoder": name, "feature": TOKENS} | {
            m: statistics.fmean(v) for m, v in values.items()
        }
        if seeds > 1:
            row["spread"] = {m: statistics.stdev(v) for m, v in values.items()}
        rows.append(row)
        if not per_class:
            per_class = {"names": names, "pixels": pixels[1][: len(names)].tolist()}
            per_class |= {m: intersection_over_union(found[0]) for m, found in counts.items()}
        log.debug("%s: mean IoU %s", name, ", ".join(f"{m} {row[m]:.1%}" for m in values))
    result: dict[str, Any] = {
        "format": FORMAT,
        "key": key,
        "kind": "segmentation",
        "metrics": ["probe", "kmeans"],
        "path": str(subject.path),
        "step": subject.meta.get("step"),
        **settings,
        "images": images,
        "layout": train.layout,
        "img_size": list(encoder.img_size),
        "grid": list(size),
        "counts": {"train": len(train.masks), "test": len(test.masks), "classes": len(names)},
        "rows": rows,
        "gain": {TOKENS: {m: rows[0][m] - rows[1][m] for m in ("probe", "kmeans")}},
        "per_class": per_class,
        "warnings": warnings,
        "seconds": round(time.monotonic() - started, 1),
    }
    for line in warnings:
        log.warning("%s", line)
    if out is not None:
        keep_result(out, result)
    return result


def _opened(masked: MaskSet, encoder: Encoder, limit: int, seed: int) -> MaskSet:
    if 0 < limit < len(masked.masks):
        rows = rng.permutation(len(masked.masks), seed=seed, epoch=0)[:limit].sort().values
        masked = masked.only(rows)
    return masked._replace(source=read_as(masked.source, encoder.in_chans))


def _count_pixels(masked: MaskSet, cfg: DataConfig) -> Tensor:
    """[255] int64: pixels of each class number; each mask is checked against the size of its image."""
    headers = ImageFiles(masked.source, cfg).read_headers(np.arange(len(masked.masks)), with_bytes=False)
    if headers.failed:
        raise next(iter(headers.failed.values()))
    total = np.zeros(IGNORED + 1, np.int64)
    with ImageProgress(f"masks of {masked.source.name}", len(masked.masks)) as bar:
        for row, size in enumerate(headers.sizes.tolist()):
            total += np.bincount(masked.mask(row, size).ravel(), minlength=IGNORED + 1)
            bar.advance(1)
    return torch.from_numpy(total[:IGNORED])


def _targets(masked: MaskSet, grid: tuple[int, int], classes: int) -> tuple[Tensor, Tensor]:
    """Which tokens of each image are learned from, [n, t] int64, and their shares of the classes, [n, t, classes]."""
    n, per_image = len(masked.masks), grid[0] * grid[1]
    taken = min(per_image, max(1, MAX_TOKENS // n))
    keys = rng.uniform(torch.arange(n), per_image, seed=0, epoch=_TOKEN_EPOCH, stream=rng.ORDER)
    picked = keys.argsort(1)[:, :taken].sort(1).values
    return picked, torch.stack([shares(masked.mask(i), grid, classes)[rows] for i, rows in enumerate(picked)])


def _batches(source: Any, *, cfg: DataConfig, encoder: Encoder, batch: int, device: torch.device) -> Any:
    """(images [b, C, H, W] normalized, rows [b]) of every image, resized whole."""
    loader = EvalLoader(
        source,
        cfg,
        encoder.img_size,
        batch_size=batch,
        device=device,
        resizing=Resizing(1.0, encoder.interpolation, whole=True),
    )
    with ImageProgress(f"encoding {source.name}", len(source)) as bar:
        for images, rows in loader:
            yield normalize(images.to(device), cfg.mean, cfg.std, encoder.in_chans), rows
            bar.advance(len(rows))


@torch.inference_mode()
def _patch_tokens(encoder: Encoder, images: Tensor) -> Tensor:
    return encoder.encode(images).patches.float()


def _pixel_tokens(patch: int, images: Tensor) -> Tensor:
    return F.unfold(images.float(), patch, stride=patch).transpose(1, 2)


# ---- learning from training tokens ------------------------------------------------------------------


def _learn(
    batches: Any,
    tokens: Tokens,
    picked: Tensor,
    targets: Tensor,
    seeds: Sequence[int],
    warnings: list[str],
    name: str,
) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """For each seed what gives tokens [m, d] scores of the classes: the probe, and k-means."""
    classes, found = targets.shape[2], []
    for images, rows in batches:
        made = tokens(images)
        found.append(made.gather(1, picked[rows].to(made.device)[..., None].expand(-1, -1, made.shape[2])))
    x, wanted = torch.cat(found).flatten(0, 1), targets.flatten(0, 1)
    labeled = wanted.sum(1).nonzero()[:, 0]
    x, wanted = x[labeled.to(x.device)], wanted[labeled]
    out: dict[str, list[Callable[[Tensor], Tensor]]] = {"probe": [], "kmeans": []}
    reseeded = 0
    for seed in seeds:
        (head,) = train_heads([x], wanted, classes, seed=seed, what=f"segmentation probe, {name}")
        out["probe"].append(partial(_first, head))
        centers, cluster, again = kmeans(F.normalize(x, dim=1), classes, seed)
        reseeded += again
        out["kmeans"].append(partial(_nearness, centers[match(cluster.cpu(), wanted)]))
    if reseeded:
        warnings.append(
            f"{name}: k-means has found {counted(reseeded, 'empty cluster')} and begun them again"
        )
    return out


def _first(head: Heads, x: Tensor) -> Tensor:
    return head(x)[:, 0]


def _nearness(centers: Tensor, x: Tensor) -> Tensor:
    """[m, classes]: the less far from the center of a class's cluster, the higher."""
    return -torch.cdist(F.normalize(x, dim=1), centers)


def kmeans(x: Tensor, clusters: int, seed: int, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor, int]:
    """Lloyd's k-means from k-means++ centers, deterministic on one device.

    An empty cluster begins again at the row farthest from its center.

    Args:
        x: [n, d] float.
        clusters: How many.
        seed: Of the first centers.

    Returns:
        (centers [clusters, d], cluster of each row [n] int64, empty clusters that began again).

    Raises:
        UsageError: Fewer rows than clusters.
    """
    if len(x) < clusters:
        raise UsageError(f"k-means: {len(x)} tokens for {clusters} clusters; give more training images")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(clusters, generator=generator, dtype=torch.float64)
    centers = x[int(draws[0] * len(x))][None]
    far = torch.cdist(x, centers)[:, 0].square()
    for draw in draws[1:].tolist():
        # on the CPU: a sum over all rows whose order is fixed
        weight = far.double().cpu().cumsum(0)
        row = int(torch.searchsorted(weight, draw * weight[-1], right=True).clamp_max(len(x) - 1))
        centers = torch.cat([centers, x[row][None]])
        far = torch.minimum(far, torch.cdist(x, centers[-1:])[:, 0].square())
    nearest, reseeded = torch.full((len(x),), -1, device=x.device), 0
    with ImageProgress("k-means", iterations, unit="iterations") as bar:
        for i in range(iterations):
            distance, now = torch.cdist(x, centers).min(1)
            if torch.equal(now, nearest):
                bar.reached(iterations)
                break
            nearest = now
            # sums as a matmul, since scattered additions have no order on a GPU
            members = F.one_hot(nearest, clusters).to(x.dtype)
            sizes = members.sum(0)
            centers = members.T @ x / sizes.clamp_min(1)[:, None]
            for empty in (sizes == 0).nonzero()[:, 0].tolist():
                row = int(distance.argmax())
                centers[empty], distance[row] = x[row], -1
                reseeded += 1
            bar.reached(i + 1)
    return centers, torch.cdist(x, centers).argmin(1), reseeded


def match(cluster: Tensor, targets: Tensor) -> Tensor:
    """[classes] int64: the cluster of each class, one to one, so that the sum of their IoU is largest.

    Args:
        cluster: [n] int64.
        targets: [n, classes] shares of the classes in each row; there are as many clusters.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise UsageError(f"segment: {cannot_import('scipy', error, 'train')}") from error
    members = F.one_hot(cluster, targets.shape[1]).double()
    inter = targets.double().T @ members
    pixels = targets.double().sum(1) @ members
    union = targets.double().sum(0)[:, None] + pixels - inter
    return torch.from_numpy(linear_sum_assignment((inter / union.clamp_min(1e-12)).numpy(), maximize=True)[1])


# ---- comparing with masks ---------------------------------------------------------------------------


@torch.inference_mode()
def _compare(
    batches: Any,
    tokens: Tokens,
    scores: dict[str, list[Callable[[Tensor], Tensor]]],
    masked: MaskSet,
    grid: tuple[int, int],
    classes: int,
) -> dict[str, list[Tensor]]:
    """Confusion [classes, classes] over all pixels, for each metric and seed."""
    counts = {
        metric: [torch.zeros(classes, classes, dtype=torch.int64) for _ in of]
        for metric, of in scores.items()
    }
    for images, rows in batches:
        x, truth = tokens(images), [masked.mask(row) for row in rows.tolist()]
        for metric, of in scores.items():
            for total, score in zip(counts[metric], of, strict=True):
                maps = score(x.flatten(0, 1)).float().view(len(x), *grid, classes).permute(0, 3, 1, 2)
                for one, mask in zip(maps, truth, strict=True):
                    large = F.interpolate(one[None], size=mask.shape, mode="bilinear", align_corners=False)
                    total += confusion(mask, large[0].argmax(0).cpu().numpy(), classes)
    return counts
