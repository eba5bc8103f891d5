"""From image files to batches: the crop of each image, and the loaders for training and evaluation.

The step number alone says which rows a batch holds (`data_order.py`), and (seed, row, epoch) alone says how each row
is cropped and flipped. So a run continues exactly where it stopped, any number of processes sees the
same global batches, and DALI and PIL (`data_decode.py`) carry out the same plan. A file that cannot be decoded does
not end a run (`data_recover.py`).
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..config import DataConfig
from ..distributed import World, cores
from ..errors import DataError, UsageError
from .bad_images import BadRows
from .decode import Mender, Settings, Work, dali_batches, pil_batches
from .files import REMEDY, Files
from .order import Order, epoch_length
from .preprocess import center_of, scaled_size
from .sources import ImageSource, match_classes, open_source, subset

__all__ = [
    "BadRows",
    "Batch",
    "EvalLoader",
    "ImageSource",
    "TrainLoader",
    "center_boxes",
    "decoding_threads",
    "epoch_length",
    "match_classes",
    "open_source",
    "random_boxes",
    "subset",
]

log = logging.getLogger(__name__)

TRIES = 10


class Batch(NamedTuple):
    """One process's part of a global batch.

    images         [b, H, W, 3] uint8, one crop per image (on the GPU when DALI decodes there)
    index          [b] int64 row numbers in the source, on the CPU
    micro_batches  the same images cut into micro-batches, with their random parameters; set by `prefetch`
    waited         seconds that the step waited for a batch (on a GPU one of a few steps before); set by `prefetch`
    """

    images: Tensor
    index: Tensor
    epoch: int
    step: int
    micro_batches: Any = None
    waited: float = 0.0


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
    """Boxes of "resize so that the short side fits 256/224 of the crop, then crop the centre", as `preprocess` does.

    sizes    [b, 2] height and width of the images in pixels
    returns  [b, 4] float64 (top, left, bottom, right) in pixels of the image, fractions included; the
             whole image where it already has `img_size`
    """
    return np.array([_center_box(size, img_size) for size in sizes.tolist()], np.float64).reshape(-1, 4)


def _center_box(size: list[int], img_size: tuple[int, int]) -> list[float]:
    if tuple(size) == tuple(img_size):
        return [0, 0, *size]
    new = scaled_size(size, img_size)
    start = center_of(new, img_size)
    end = [at + side for at, side in zip(start, img_size, strict=True)]
    return [at * old / to for at, old, to in zip((*start, *end), size * 2, new * 2, strict=True)]


class TrainLoader:
    """Endless training batches from `start_step` on; decodes about two batches ahead.

    img_size    (height, width) of the crops
    batch_size  global; each of `world` processes gets its part, `batch_size // world` images
    device      where images are decoded: "cpu", "cuda" (DALI only), None: the GPU when there is one
    bad         rows known to be unusable; what is found is added
    pinned      batches decoded on the CPU lie in page-locked memory
    raises      UsageError for sizes or an order that do not fit; while iterating DataError: more rows are unusable
                than `data.bad_budget` allows

    Iterating yields `Batch`. Rows of a global batch do not depend on `world`. A row that cannot be read or decoded
    is named in the log, and another takes its place (`data_order.Order.substitutes`); all others stay where they
    were. With several processes none ends by itself: one that cannot go on yields empty images until `agree`, which
    all call after the same step, raises everywhere.

    With `policy="centercrop"` each image is resized and centre-cropped as for evaluation, never flipped.
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
        bad: BadRows | None = None,
        pinned: bool = False,
    ) -> None:
        if batch_size % world:
            raise UsageError(f"train.batch_size: {batch_size} is not a multiple of the {world} processes")
        self.kind = choose_loader(cfg.loader)
        self.bad = BadRows(source, cfg.bad_budget) if bad is None else bad
        self._order = Order(source, cfg, batch_size, seed)
        self.steps_per_epoch = self._order.steps
        self._seed, self._cfg = seed, cfg
        self._first, self._size = rank * batch_size // world, batch_size // world
        self._files = Files(source, cfg)
        self._step, self._world, self._failure = start_step, world, ""
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._how = Settings(
            img_size,
            self._size,
            decoding_threads(cfg.threads),
            whole=cfg.policy == "centercrop",
            device=_decoding_device(self.kind, device),
            hw=cfg.hw_decoder_load,
            pinned=pinned,
        )
        # planned in one thread, also when a batch is mended
        mender = Mender(self.bad, lambda step: self._planner.submit(self._plan, step).result())
        decode = pil_batches if self.kind == "pil" else dali_batches
        self._batches = decode(self._plans(start_step), self._files, self._how, mender)

    def _plans(self, step: int) -> Iterator[Future[Work]]:
        while True:
            yield self._planner.submit(self._plan, step)
            step += 1

    def _plan(self, step: int) -> Work:
        epoch, batch = self._order(step)
        drawn = batch[self._first : self._first + self._size]
        while True:
            rows = self._usable(drawn, step)
            seen = self._files.look(rows)
            if not seen.failed:
                break
            for place, error in sorted(seen.failed.items()):
                self.bad.add(int(rows[place]), str(error))
        if self._how.whole:
            boxes, flips = center_boxes(seen.sizes, self._how.img_size), np.zeros(len(rows), bool)
        else:
            boxes, flips = random_boxes(seen.sizes, rows, self._cfg, seed=self._seed, epoch=epoch)
        return Work(rows, boxes, flips, seen.data, step)

    def _usable(self, drawn: np.ndarray, step: int) -> np.ndarray:
        """The rows of a batch, each one known to be unusable replaced by its first substitute that is not."""
        rows = drawn.copy()
        for place in np.flatnonzero(self.bad.known[drawn]).tolist():
            others = self._order.substitutes(step, self._first + place)
            usable = others[~self.bad.known[others]]
            if not len(usable):
                raise DataError(
                    f"{self.bad.source.name}: {len(self.bad)} images cannot be used, hardly one can"
                )
            rows[place] = usable[0]
        return rows

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        step, self._step = self._step, self._step + 1
        if not self._failure:
            try:
                work, images = next(self._batches)
                index = torch.from_numpy(work.rows)
                return Batch(
                    images,
                    index.pin_memory() if self._how.pinned else index,
                    step // self.steps_per_epoch,
                    step,
                )
            except DataError as error:
                self._failure = str(error)
        if self._world == 1:
            raise DataError(self._failure)
        images = torch.zeros(self._size, *self._how.img_size, 3, dtype=torch.uint8, device=self._how.device)
        return Batch(images, torch.zeros(self._size, dtype=torch.int64), step // self.steps_per_epoch, step)

    def agree(self, world: World) -> int:
        """How many rows are known to be unusable, after all processes have told each other.

        raises DataError, everywhere alike: more than `data.bad_budget` allows, or a process that cannot go on
        """
        return self.bad.agree(world, self._failure)

    def remedy(self) -> str:
        """What makes waiting for images shorter, on this machine with these settings."""
        cores, ways = decoding_threads(0), []
        if self._how.threads < cores:
            ways.append(f"raise data.threads from {self._how.threads} to {cores}")
        if self.kind == "pil":
            ways.append('install DALI (pip install "extrema-fast[dali-cuda13]")')
        if self._files.as_bytes:
            ways.append("put the shards on a faster disk")
        else:
            ways.append("pack the images (extrema-fast pack), or put them on a faster disk")
        return "; ".join(ways)

    def close(self) -> None:
        """Stops decoding; the loader cannot be used afterwards."""
        self._batches.close()
        self._planner.shutdown(wait=True, cancel_futures=True)
        self._order.close()
        self._files.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EvalLoader:
    """Every image once, in row order, resized and centre-cropped; iterate as often as needed.

    Iterating yields (images [b, H, W, 3] uint8, index [b] int64); the last batch may be smaller. The
    short side is resized to 256/224 of `img_size`, cut to whole pixels, as by `Encoder.preprocess`; an image of
    exactly `img_size` stays as it is.
    `len()` is the number of images. Raises DataError naming a file that cannot be decoded; with `bad` it is left
    out and noted there, and only having no usable image at all is an error.
    """

    def __init__(
        self,
        source: ImageSource,
        cfg: DataConfig,
        img_size: tuple[int, int],
        *,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        bad: BadRows | None = None,
    ) -> None:
        self.kind = choose_loader(cfg.loader)
        self._rows, self._img_size, self._bad = len(source), img_size, bad
        self._batch_size = min(batch_size, max(1, len(source)))
        self._files = Files(source, cfg)
        self._how = Settings(
            img_size,
            self._batch_size,
            decoding_threads(cfg.threads),
            whole=True,
            device=_decoding_device(self.kind, device),
            hw=cfg.hw_decoder_load,
        )

    def __len__(self) -> int:
        return self._rows

    def _plan(self, step: int) -> Work:
        start = step * self._batch_size
        rows = np.arange(start, min(start + self._batch_size, self._rows))
        if self._bad is not None:
            rows = rows[~self._bad.known[rows]]
        seen = self._files.look(rows)
        if seen.failed:
            if self._bad is None:
                raise DataError(f"{seen.failed[min(seen.failed)]}; {REMEDY}")
            for place, error in sorted(seen.failed.items()):
                self._bad.add(int(rows[place]), str(error))
            return self._plan(step)
        boxes = center_boxes(seen.sizes, self._img_size)
        return Work(rows, boxes, np.zeros(len(rows), bool), seen.data, step)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        planner = ThreadPoolExecutor(1, thread_name_prefix="plan")
        steps = range(-(-self._rows // self._batch_size))
        mender = None if self._bad is None else Mender(self._bad, self._plan)
        decode = pil_batches if self.kind == "pil" else dali_batches
        batches = decode((planner.submit(self._plan, step) for step in steps), self._files, self._how, mender)
        try:
            for work, images in batches:
                if len(work.rows):
                    yield images, torch.from_numpy(work.rows)
            if self._bad and len(self._bad) == self._rows:
                raise DataError(
                    f"{next(iter(self._bad.reasons.values()))}; nor can any other of {self._rows}"
                )
        finally:
            batches.close()
            planner.shutdown(wait=True, cancel_futures=True)
            self._files.close()


def decoding_threads(wanted: int) -> int:
    """`data.threads`; 0: this process's share of the cores, at least 1 and at most 16."""
    if wanted:
        return wanted
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1"
    return max(1, min(16, cores() // max(1, int(here) if here.isdecimal() else 1)))


def _decoding_device(kind: str, device: str | torch.device | None) -> torch.device:
    if kind == "pil":
        return torch.device("cpu")
    return (
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device is None
        else torch.device(device)
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
