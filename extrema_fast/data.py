"""From image files to batches: the order of an epoch, the crop of each image, and the two loaders.

The step number alone says which rows a batch holds, and (seed, row, epoch) alone says how each row is
cropped and flipped. So a run continues exactly where it stopped, any number of processes sees the
same global batches, and DALI and PIL (`data_decode.py`) carry out the same plan.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import rng
from .config import DataConfig
from .data_decode import Headers, Work, dali_batches, pil_batches
from .errors import UsageError
from .sources import ImageSource, match_classes, open_source, subset

__all__ = [
    "Batch",
    "EvalLoader",
    "ImageSource",
    "TrainLoader",
    "center_boxes",
    "match_classes",
    "open_source",
    "random_boxes",
    "subset",
]

log = logging.getLogger(__name__)

# evaluation resizes the short side to this multiple of the crop (256 for 224; method.md section 7)
EVAL_RESIZE = 256 / 224
TRIES = 10


class Batch(NamedTuple):
    """One process's part of a global batch.

    images  [b, H, W, 3] uint8, one crop per image (on the GPU when DALI decodes there)
    index   [b] int64 row numbers in the source, on the CPU
    """

    images: Tensor
    index: Tensor
    epoch: int
    step: int


def random_boxes(
    sizes: np.ndarray, rows: np.ndarray, cfg: DataConfig, *, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Crop boxes by torchvision's RandomResizedCrop rule, and flips.

    sizes    [b, 2] height and width of the images in pixels
    rows     [b] row numbers: with `seed` and `epoch` they decide everything
    returns  [b, 4] float64 of whole pixels (top, left, bottom, right), always inside the image and not
             empty, and [b] bool flips
    maths    area uniform, log of the ratio uniform, at most 10 tries; then the largest centred box
             whose ratio is allowed
    """
    u = rng.uniform(torch.from_numpy(rows), 2 * TRIES + 3, seed=seed, epoch=epoch, stream=rng.CROP)
    u = u.numpy().astype(np.float64)
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * (cfg.area[0] + (cfg.area[1] - cfg.area[0]) * u[:, :TRIES])
    low, high = np.log(cfg.ratio[0]), np.log(cfg.ratio[1])
    ratio = np.exp(low + (high - low) * u[:, TRIES : 2 * TRIES])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # [b, TRIES]
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    height, width = height[:, 0], width[:, 0]
    whole = width / height
    # DALI refuses an empty or outside box and loses the batch, so the fallback is clamped
    fallback_w = np.where(whole > cfg.ratio[1], np.rint(height * cfg.ratio[1]), width).clip(1, width)
    fallback_h = np.where(whole < cfg.ratio[0], np.rint(width / cfg.ratio[0]), height).clip(1, height)
    ok = fits.any(1)
    w, h = np.where(ok, w, fallback_w), np.where(ok, h, fallback_h)
    place_y, place_x = u[:, 2 * TRIES], u[:, 2 * TRIES + 1]
    top = np.where(ok, np.floor(place_y * (height - h + 1)), (height - h) // 2)
    left = np.where(ok, np.floor(place_x * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, top + h, left + w], 1), u[:, 2 * TRIES + 2] < cfg.flip


def center_boxes(sizes: np.ndarray, img_size: tuple[int, int]) -> np.ndarray:
    """Boxes of "resize so that the short side fits 256/224 of the crop, then crop the centre".

    sizes    [b, 2] height and width of the images in pixels
    returns  [b, 4] float64 (top, left, bottom, right) in pixels of the image, fractions included; the
             whole image where it already has `img_size`
    """
    target = np.asarray(img_size, np.float64)
    resized = np.rint(target * EVAL_RESIZE)
    scale = (resized / sizes).max(1, keepdims=True)
    side = np.where((sizes == target).all(1, keepdims=True), sizes, target / scale)
    start = ((sizes - side) / 2).clip(0)
    return np.concatenate([start, start + side], 1)


class _Order:
    """Rows of a global batch: a permutation per epoch, the incomplete last batch left out."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps = rows // batch_size
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __call__(self, step: int) -> tuple[int, np.ndarray]:
        epoch, batch = divmod(step, self.steps)
        if epoch != self._epoch:
            self._permutation = rng.permutation(self.rows, seed=self.seed, epoch=epoch).numpy()
            self._epoch = epoch
        return epoch, self._permutation[batch * self.batch_size : (batch + 1) * self.batch_size]


class TrainLoader:
    """Endless training batches from `start_step` on; decodes about two batches ahead.

    img_size    (height, width) of the crops
    batch_size  global; each of `world` processes gets its part, `batch_size // world` images
    device      where images are decoded: "cpu", "cuda" (DALI only), None: the GPU when there is one
    raises      UsageError for sizes that do not fit; while iterating DataError naming the file

    Iterating yields `Batch`. Rows of a global batch do not depend on `world`. With
    `policy="centercrop"` each image is resized and centre-cropped as for evaluation, never flipped.
    """

    def __init__(
        self,
        source: ImageSource,
        cfg: DataConfig,
        img_size: tuple[int, int],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        if batch_size % world:
            raise UsageError(f"train.batch_size: {batch_size} is not a multiple of the {world} processes")
        if len(source) < batch_size:
            raise UsageError(
                f"train.batch_size: {batch_size} is more than the {len(source)} images of {source.name}; "
                f"use at most {len(source)}"
            )
        self.steps_per_epoch = len(source) // batch_size
        self.kind = choose_loader(cfg.loader)
        self._seed, self._cfg, self._img_size = seed, cfg, img_size
        self._order = _Order(len(source), batch_size, seed)
        self._part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._headers = Headers(source.paths, cfg.exif)
        self._step = start_step
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._batches = _decode(
            self.kind,
            self._headers,
            self._plans(start_step),
            cfg,
            img_size,
            batch_size // world,
            whole=cfg.policy == "centercrop",
            device=device,
        )

    def _plans(self, step: int) -> Iterator[Future[Work]]:
        while True:
            yield self._planner.submit(self._plan, step)
            step += 1

    def _plan(self, step: int) -> Work:
        epoch, rows = self._order(step)
        rows = rows[self._part]
        sizes = self._headers.sizes(rows)
        if self._cfg.policy == "centercrop":
            return Work(rows, center_boxes(sizes, self._img_size), np.zeros(len(rows), bool))
        return Work(rows, *random_boxes(sizes, rows, self._cfg, seed=self._seed, epoch=epoch))

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        work, images = next(self._batches)
        step, self._step = self._step, self._step + 1
        return Batch(images, torch.from_numpy(work.rows.copy()), step // self.steps_per_epoch, step)

    def close(self) -> None:
        """Stops decoding; the loader cannot be used afterwards."""
        self._batches.close()
        self._planner.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EvalLoader:
    """Every image once, in row order, resized and centre-cropped; iterate as often as needed.

    Iterating yields (images [b, H, W, 3] uint8, index [b] int64); the last batch may be smaller. The
    short side is resized to round(img_size * 256/224); an image of exactly `img_size` stays as it is.
    `len()` is the number of images. Raises DataError naming a file that cannot be decoded.
    """

    def __init__(
        self,
        source: ImageSource,
        cfg: DataConfig,
        img_size: tuple[int, int],
        *,
        batch_size: int = 256,
        device: str | torch.device | None = None,
    ) -> None:
        self.kind = choose_loader(cfg.loader)
        self._rows, self._cfg, self._img_size = len(source), cfg, img_size
        self._batch_size, self._device = min(batch_size, max(1, len(source))), device
        self._headers = Headers(source.paths, cfg.exif)

    def __len__(self) -> int:
        return self._rows

    def _plan(self, start: int) -> Work:
        rows = np.arange(start, min(start + self._batch_size, self._rows))
        boxes = center_boxes(self._headers.sizes(rows), self._img_size)
        return Work(rows, boxes, np.zeros(len(rows), bool))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        planner = ThreadPoolExecutor(1, thread_name_prefix="plan")
        batches = _decode(
            self.kind,
            self._headers,
            (planner.submit(self._plan, start) for start in range(0, self._rows, self._batch_size)),
            self._cfg,
            self._img_size,
            self._batch_size,
            whole=True,
            device=self._device,
        )
        try:
            for work, images in batches:
                yield images, torch.from_numpy(work.rows)
        finally:
            batches.close()
            planner.shutdown(wait=True, cancel_futures=True)


def _decode(
    kind: str,
    headers: Headers,
    plans: Iterator[Future[Work]],
    cfg: DataConfig,
    img_size: tuple[int, int],
    batch: int,
    *,
    whole: bool,
    device: str | torch.device | None,
) -> Iterator[tuple[Work, Tensor]]:
    if kind == "pil":
        return pil_batches(plans, headers, img_size, threads=cfg.threads, whole=whole)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return dali_batches(
        plans, headers, img_size, batch=batch, threads=cfg.threads, whole=whole, device=torch.device(device)
    )


_announced: set[str] = set()


def choose_loader(wanted: str) -> Literal["dali", "pil"]:
    """The loader for `data.loader`; says once in the log why `auto` took PIL.

    raises UsageError when the one asked for, or for `auto` both, are not installed
    """
    if wanted != "pil":
        try:
            importlib.import_module("nvidia.dali.fn")
            return "dali"
        except (ImportError, OSError) as e:
            if wanted == "dali":
                raise UsageError(
                    f'data.loader: DALI cannot be loaded ({e}); pip install "extrema-fast[dali-cuda13]", '
                    "or --data.loader pil"
                ) from e
            reason = f"DALI cannot be loaded ({e})"
        if reason not in _announced:
            _announced.add(reason)
            log.info("images are decoded by PIL: %s; DALI: pip install extrema-fast[dali-cuda13]", reason)
    try:
        importlib.import_module("PIL.Image")
    except ImportError as e:
        raise UsageError('reading images needs Pillow: pip install "extrema-fast[train]"') from e
    return "pil"
