"""Training and evaluation batches: which rows, which crops, and the replacement of unreadable images.

The step number alone determines the rows of a batch (`order.py`), and (seed, row, epoch) alone the crop and flip of an
image. So a run resumes exactly, any number of processes gets the same global batches, and DALI and PIL (`decode.py`)
execute the same plan. An unreadable image does not end a run; another image replaces it.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..config import DataConfig
from ..distributed import World, share_of_cores
from ..errors import DataError, UsageError, install
from .bad_images import BadRows
from .dali_on_gpu import decoding_on, most_images, release_memory
from .decode import DaliDecoder, PilDecoder, Settings, Work
from .image_files import ALONE, REMEDY, TIFF, ImageFiles, check_depth, deep_range, formats
from .image_source import ImageSource
from .order import Order
from .preprocess import KEEP_EXACT, Resizing, center_of, scaled_size
from .resident import HeldDecoder, Place, hold
from .sources import BUILT_IN

log = logging.getLogger(__name__)

_TRIES = 10


class Batch(NamedTuple):
    """One process's part of a global batch.

    Attributes:
        images: [b, H, W, C] uint8, one crop per image (on the GPU when DALI decodes there); with separate crops
            [b, 2, H, W, C], the student's and the teacher's.
        index: [b] int64 row numbers in the source, on the CPU.
        micro_batches: the same images cut into micro-batches, with their random parameters; set by `prefetch`.
        waited: seconds that the step waited for a batch (on a GPU one of a few steps before); set by `prefetch`.
    """

    images: Tensor
    index: Tensor  # type: ignore[assignment]
    epoch: int
    step: int
    micro_batches: Any = None
    waited: float = 0.0


def random_boxes(
    sizes: np.ndarray, rows: np.ndarray, cfg: DataConfig, *, seed: int, epoch: int, stream: int = rng.CROP
) -> tuple[np.ndarray, np.ndarray]:
    """Crop boxes by torchvision's RandomResizedCrop rule, and flips, for images of `sizes` [b, 2] (height, width).

    Area uniform, log of the ratio uniform, at most 10 tries; then the largest centered box whose ratio is allowed.
    Returns [b, 4] float64 of whole pixels (top, left, bottom, right), inside the image and not empty, and [b] bool.
    """
    u = rng.uniform(torch.from_numpy(rows), 2 * _TRIES + 3, seed=seed, epoch=epoch, stream=stream)
    u = u.numpy().astype(np.float64)
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * (cfg.area[0] + (cfg.area[1] - cfg.area[0]) * u[:, :_TRIES])
    low, high = np.log(cfg.ratio[0]), np.log(cfg.ratio[1])
    ratio = np.exp(low + (high - low) * u[:, _TRIES : 2 * _TRIES])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # [b, _TRIES]
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
    place_y, place_x = u[:, 2 * _TRIES], u[:, 2 * _TRIES + 1]
    top = np.where(ok, np.floor(place_y * (height - h + 1)), (height - h) // 2)
    left = np.where(ok, np.floor(place_x * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, top + h, left + w], 1), u[:, 2 * _TRIES + 2] < cfg.flip


def center_boxes(sizes: np.ndarray, img_size: tuple[int, int], resizing: Resizing = KEEP_EXACT) -> np.ndarray:
    """[b, 4] float64 boxes as of `random_boxes`, fractions included, that images are resized and center-cropped to."""
    boxes = [_center_box(size, img_size, resizing) for size in sizes.tolist()]
    return np.array(boxes, np.float64).reshape(-1, 4)


def _center_box(size: list[int], img_size: tuple[int, int], resizing: Resizing) -> list[float]:
    if resizing.whole or (resizing.keep_exact and tuple(size) == tuple(img_size)):
        return [0, 0, *size]
    new = scaled_size(size, img_size, resizing.crop_pct)
    start = center_of(new, img_size)
    end = [at + side for at, side in zip(start, img_size, strict=True)]
    return [at * old / to for at, old, to in zip((*start, *end), size * 2, new * 2, strict=True)]


class _Loader(ABC):
    """What both loaders share: planning batches in a thread, decoding them ahead, replacing unreadable images."""

    def __init__(
        self,
        source: ImageSource,
        cfg: DataConfig,
        img_size: tuple[int, int],
        batch: int,
        device: str | torch.device | None,
        bad: BadRows | None,
        *,
        whole: bool,
        pinned: bool = False,
        resident: Place = "off",
        resizing: Resizing = KEEP_EXACT,
    ) -> None:
        self._resizing = resizing
        self._files, self.bad, self.resident = ImageFiles(source, cfg), bad, resident
        self.kind, self._world = loader_for(source, cfg), 1
        self._files.by_dali = self.kind == "dali" and resident == "off"
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        regions = True
        if resident == "off":
            device, regions = _decoding_device(self.kind, cfg, device)
        if resident == "off" and device.type == "cuda":
            area = sum(cfg.area) / 2 if regions and not whole else 1.0
            most = most_images(self._files, device, area)
            if most < batch and self._any_batch:
                batch = max(1, most)
            elif most < batch:
                device = torch.device("cpu")
                _warn_once(
                    "%s: images are decoded on the CPU: batches of %d would take more than a fifth of the GPU's "
                    "memory; packed smaller they fit (extrema-fast pack)",
                    source.name,
                    batch,
                )
        self._settings = Settings(
            img_size,
            batch,
            decoding_threads(cfg.threads),
            whole,
            device,
            cfg.hw_decoder_load,
            pinned,
            resizing.interpolation,
            regions,
        )

    # crops of each image, one after the other in boxes and flips
    _per_image = 1
    # whether batches may be smaller than asked for
    _any_batch = False

    @abstractmethod
    def _rows(self, step: int) -> np.ndarray:
        """[b] int64 rows of a batch, without those known to be unusable."""

    def _crops(self, sizes: np.ndarray, rows: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes and flips of the `_per_image` crops of images of these sizes."""
        boxes = center_boxes(sizes, self._settings.img_size, self._resizing)
        return boxes, np.zeros(len(rows), bool)

    def _plan(self, step: int) -> Work:
        while True:
            rows = self._rows(step)
            headers = self._files.read_headers(rows, with_bytes=self.resident == "off")
            if not headers.failed:
                boxes, flips = self._crops(headers.sizes, rows, step)
                data = headers.data and [d for d in headers.data for _ in range(self._per_image)]
                return Work(np.repeat(rows, self._per_image), boxes, flips, data, step)
            self._add_bad(rows, headers.failed)

    def _add_bad(self, rows: np.ndarray, failed: dict[int, DataError]) -> None:
        if self.bad is None:
            raise DataError(f"{failed[min(failed)]}; {REMEDY}")
        for place, error in sorted(failed.items()):
            # of several processes none stops alone: `agree` does, after a step with images
            self.bad.add(int(rows[place]), error, check=self._world == 1)

    def _open_decoder(self) -> PilDecoder | DaliDecoder | HeldDecoder:
        if self.resident == "off":
            return (PilDecoder if self.kind == "pil" else DaliDecoder)(self._files, self._settings)
        s, rows = self._settings, np.arange(len(self._files.source))
        known = np.zeros(len(rows), bool) if self.bad is None else self.bad.known
        device = s.device if self.resident == "gpu" else torch.device("cpu")
        held, failed = hold(self._files, known, device, s.threads)
        if failed:
            self._add_bad(rows, failed)
        # on a CPU batches of small images are faster in torch; the bytes are Pillow's where nothing is reduced
        if held.channels == 3 and (s.device.type == "cuda" or (held.sizes <= s.img_size).all()):
            return HeldDecoder(held, s)
        return PilDecoder(self._files, s, held.image)

    def _decoded(self, steps: Iterable[int]) -> Generator[tuple[Work, Tensor], None, None]:
        """(work, images) of each step; a batch with unreadable images is planned and decoded again without them.

        Any other error in planning, reading or decoding a batch ends the iteration, after the batches before it.
        """
        decoder = self._open_decoder()
        planner = ThreadPoolExecutor(1, thread_name_prefix="plan")
        to_plan, due = itertools.tee(steps)
        try:
            for work, (images, failed) in decoder.stream(planner.submit(self._plan, s) for s in to_plan):
                step = next(due, None)
                if work.step != step:
                    raise RuntimeError(
                        f"the {self.kind} loader decoded step {work.step} where {step} was due"
                    )
                while failed:
                    self._add_bad(work.rows, failed)
                    work = planner.submit(self._plan, work.step).result()
                    images, failed = decoder.decode(work)
                if len(images) != len(work.rows):
                    raise RuntimeError(
                        f"the {self.kind} loader decoded {len(images)} images of step {step}, not {len(work.rows)}"
                    )
                yield work, images
            step = next(due, None)
            if step is not None:
                raise RuntimeError(f"the {self.kind} loader ended where step {step} was due")
        finally:
            decoder.close()
            planner.shutdown(wait=True, cancel_futures=True)
            self._files.close()


class TrainLoader(_Loader):
    """Endless training batches from `start_step` on; decodes about two batches ahead.

    Iterating yields `Batch`. Rows of a global batch do not depend on `world`. An image that cannot be read or decoded
    is named in the log, and another replaces it (`Order.substitutes`); all others stay where they were. With several
    processes none ends by itself: one that cannot continue yields empty images until `agree`, which all call after
    the same step, raises everywhere. With `policy="centercrop"` each image is resized and center-cropped, and never
    flipped; one of exactly `img_size` is taken whole.

    Args:
        img_size: (height, width) of the crops.
        batch_size: global; each of `world` processes gets its part, `batch_size // world` images.
        device: where images are decoded: "cpu", "cuda" (DALI only); None: the GPU when there is one.
        bad: rows known to be unusable; those found are added.
        pinned: batches decoded on the CPU lie in page-locked memory.
        resident: `gpu` or `host`: the first batch decodes all images into the memory of the device or of the CPU.

    Raises:
        UsageError: sizes or an order that do not fit.
        DataError: while iterating: more rows are unusable than `data.bad_budget` allows.
        Exception: while iterating: any other error in planning, reading or decoding, at once and from then on.
    """

    bad: BadRows

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
        resident: Place = "off",
    ) -> None:
        if batch_size % world:
            raise UsageError(f"train.batch_size: {batch_size} is not a multiple of the {world} processes")
        bad = BadRows(source, cfg.bad_budget) if bad is None else bad
        whole, size = cfg.policy == "centercrop", batch_size // world
        self._streams = (rng.CROP, rng.CROP_TEACHER) if cfg.crop == "separate" else (rng.CROP,)
        self._size, self._per_image = size, len(self._streams)
        decoded = size * self._per_image
        super().__init__(
            source, cfg, img_size, decoded, device, bad, whole=whole, pinned=pinned, resident=resident
        )
        self._order = Order(source, cfg, batch_size, seed)
        self.steps_per_epoch = self._order.steps
        self._seed, self._cfg, self._first = seed, cfg, rank * size
        self._step, self._world, self._failure = start_step, world, ""
        self._epoch = start_step // self._order.steps
        self._error: Exception | None = None
        self._batches = self._decoded(itertools.count(start_step))

    def _rows(self, step: int) -> np.ndarray:
        epoch, batch = self._order(step)
        if epoch != self._epoch and self.resident == "off":
            self._epoch = epoch
            self.bad.try_again(self._files)
        return self._replaced(self._order, step, batch, self._first, self._size)

    def global_rows(self, step: int) -> np.ndarray:
        """The rows of a step's batch on all processes, by what is known of unusable ones now."""
        # the loader's own is in use by the thread that plans
        own = self._order
        order = Order(own.source, own.cfg, own.batch_size, own.seed)
        try:
            _, batch = order(step)
            return self._replaced(order, step, batch, 0, len(batch))
        finally:
            order.close()

    def _replaced(self, order: Order, step: int, batch: np.ndarray, first: int, count: int) -> np.ndarray:
        """`count` places of a global batch from the `first` on, without rows known to be unusable."""
        rows = batch[first : first + count].copy()
        for place in np.flatnonzero(self.bad.known[rows]).tolist():
            candidates = order.substitutes(step, first + place)
            usable = candidates[~self.bad.known[candidates]]
            if not len(usable):
                raise DataError(
                    f"{self.bad.source.name}: {len(self.bad)} images cannot be used, hardly one can"
                )
            rows[place] = usable[0]
        return rows

    def _crops(self, sizes: np.ndarray, rows: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        if self._settings.whole:
            return super()._crops(sizes, rows, step)
        keys = {"seed": self._seed, "epoch": step // self.steps_per_epoch}
        drawn = [random_boxes(sizes, rows, self._cfg, **keys, stream=s) for s in self._streams]
        boxes, flips = (np.stack(d, 1) for d in zip(*drawn, strict=True))
        return boxes.reshape(-1, 4), flips.reshape(-1)

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._error:
            raise self._error
        step, self._step = self._step, self._step + 1
        epoch = step // self.steps_per_epoch
        if not self._failure:
            try:
                work, images = next(self._batches)
                index = torch.from_numpy(work.rows[:: self._per_image].copy())
                if self._per_image > 1:
                    images = images.unflatten(0, (-1, self._per_image))
                return Batch(images, index.pin_memory() if self._settings.pinned else index, epoch, step)
            except DataError as error:
                self._failure = str(error)
            except Exception as error:
                self._error = error
                raise
        if self._world == 1:
            raise DataError(self._failure)
        s = self._settings
        crops = (self._per_image,) if self._per_image > 1 else ()
        shape = (self._size, *crops, *s.img_size, self._files.read_channels)
        images = torch.zeros(shape, dtype=torch.uint8, device=s.device)
        return Batch(images, torch.zeros(self._size, dtype=torch.int64), epoch, step)

    def agree(self, world: World) -> int:
        """Exchanges unusable rows between the processes; see `BadRows.agree`.

        Returns:
            The number of rows known to be unusable.

        Raises:
            DataError: on every process: more than `data.bad_budget` allows, or a process that cannot continue.
        """
        return self.bad.agree(world, self._failure)

    def remedy(self) -> str:
        """What makes waiting for images shorter, on this machine with these settings; empty: nothing that is known."""
        cores, ways = decoding_threads(0), []
        # for the small built-in ones steps wait for a busy processor: it is the same with all of them held
        from_files = self.resident == "off" and self._cfg.train not in BUILT_IN
        if from_files and (self.kind, self._settings.device.type) == ("dali", "cpu"):
            ways.append("hold the images decoded, if they fit into memory (--data.resident host)")
        if self._settings.threads < cores:
            ways.append(f"raise data.threads from {self._settings.threads} to {cores}")
        if not from_files:
            return "; ".join(ways)
        if self.kind == "pil":
            ways.append(f"install DALI ({install('dali-cuda13')})")
        if self._files.as_bytes:
            ways.append("put the shards on a faster disk")
        else:
            if self.kind == "dali" and not self._files.sizes.all():
                # their headers are read in Python, in the first epoch
                ways.append("index the images once (extrema-fast index) and train on the manifest")
            ways.append("pack the images (extrema-fast pack), or put them on a faster disk")
        return "; ".join(ways)

    def close(self) -> None:
        """Stops decoding; the loader cannot be used afterwards."""
        self._batches.close()
        self._order.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EvalLoader(_Loader):
    """Every image once, in row order, resized and center-cropped; iterate as often as needed.

    Iterating yields (images [b, H, W, C] uint8, index [b] int64); the last batch may be smaller. `len()` is the number
    of images.

    Args:
        resizing: that of an encoder (`Encoder.resizing`) gives the images of its `preprocess`; by default images of
            exactly `img_size` are taken whole.
        bad: unreadable images are left out and added here; None: they are errors.

    Raises:
        DataError: while iterating: names an image that cannot be decoded; with `bad`, no image can be.
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
        resizing: Resizing = KEEP_EXACT,
    ) -> None:
        batch, self._any_batch = min(batch_size, max(1, len(source))), True
        super().__init__(source, cfg, img_size, batch, device, bad, whole=True, resizing=resizing)
        self._length = len(source)

    def __len__(self) -> int:
        return self._length

    def _rows(self, step: int) -> np.ndarray:
        batch = self._settings.batch
        rows = np.arange(step * batch, min((step + 1) * batch, self._length))
        return rows if self.bad is None else rows[~self.bad.known[rows]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        steps = range(-(-self._length // self._settings.batch))
        with closing(self._decoded(steps)) as batches:
            for work, images in batches:
                if len(work.rows):
                    yield images, torch.from_numpy(work.rows)
        if self._settings.device.type == "cuda":
            release_memory()
        if self.bad and len(self.bad) == self._length:
            raise DataError(f"{next(iter(self.bad.reasons.values()))}; nor can any other of {self._length}")


def decoding_threads(wanted: int) -> int:
    """`data.threads`; 0: this process's share of the cores, at least 1 and at most 16."""
    return wanted or min(16, share_of_cores())


_log_once, _warn_once = functools.cache(log.info), functools.cache(log.warning)


def loader_for(source: ImageSource, cfg: DataConfig) -> Literal["dali", "pil"]:
    """The loader of a source: `choose_loader`, or Pillow for what DALI does not read right.

    That is images of more than 8 bits with a range (`data.range`, or of the manifest), of other channels than RGB, of
    formats that DALI does not know, and TIFF files, whose damaged strips DALI fills with black.

    Raises:
        UsageError: DALI is asked for by name, and is not installed or reads them wrongly or not at all.
        DataError: DALI is to read images of more than 8 bits that need a range.
    """
    if cfg.loader == "pil":
        return choose_loader("pil")
    what, found = "", formats(source)
    if source.channels not in (1, 3):
        what = f"images of {source.channels} channels"
    elif deep_range(source, cfg) is not None and (not source.kinds or "deep" in source.kinds):
        what = "images of more than 8 bits with a range"
    elif alone := sorted(ALONE & found):
        what = f"{', '.join(alone)} files"
    if what and cfg.loader == "dali":
        raise UsageError(
            f"data.loader dali: {source.name} has {what}, which Pillow alone reads; use data.loader auto or pil"
        )
    if not what and cfg.loader == "auto" and TIFF & found:
        what = "TIFF files"
    if what:
        _log_once("%s: %s are decoded by Pillow", source.name, what)
        return choose_loader("pil")
    kind = choose_loader(cfg.loader)
    if kind == "dali":
        check_depth(source, cfg)
    return kind


def choose_loader(wanted: str) -> Literal["dali", "pil"]:
    """The loader for `data.loader`; logs once why `auto` took PIL.

    Raises:
        UsageError: the one asked for is not installed, or Pillow, which both need for headers.
    """
    try:
        importlib.import_module("PIL.Image")
    except ImportError as e:
        raise UsageError(f"reading images needs Pillow: {install('train')}") from e
    if wanted != "pil":
        try:
            importlib.import_module("nvidia.dali.fn")
            return "dali"
        except (ImportError, OSError) as e:
            if wanted == "dali":
                raise UsageError(
                    f"data.loader: DALI cannot be loaded ({e}); {install('dali-cuda13')}, or --data.loader pil"
                ) from e
            _log_once(
                "images are decoded by PIL: DALI cannot be loaded (%s); DALI: %s",
                str(e),
                install("dali-cuda13"),
            )
    return "pil"


def _decoding_device(kind: str, cfg: DataConfig, device: torch.device) -> tuple[torch.device, bool]:
    """Where a loader decodes for `device`, and `Settings.regions`: there by DALI, or it says once why not."""
    if kind == "pil" or device.type != "cuda":
        return torch.device("cpu"), True
    way, reason = decoding_on(device, cfg.hw_decoder_load)
    if way:
        if reason:
            _warn_once("DALI decodes %s on this GPU, which takes longer and more memory (%s)", way, reason)
        return device, way == "regions"
    remedy = f"install the DALI of the driver's CUDA ({install('dali-cuda12')}, or ...-cuda130)"
    if cfg.loader == "dali":
        raise UsageError(
            f"data.loader: DALI cannot decode on this GPU ({reason}); {remedy}, or --data.loader pil"
        )
    _warn_once("images are decoded on the CPU: DALI cannot decode on this GPU (%s); %s", reason, remedy)
    return torch.device("cpu"), True
