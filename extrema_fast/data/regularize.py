"""Augmentation in fine-tuning: RandAugment and random erasing on the CPU, mixup and CutMix on the device.

Everything is keyed by (seed, row, epoch), so a run resumes exactly, and any number of processes mixes the same images.
timm's classes for mixup, CutMix and erasing draw from the process's generators, once per batch; this module follows
their rules instead. timm's RandAugment is used directly, with separate generators.
"""

from __future__ import annotations

import importlib.util
import math
import random
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng
from ..config import FinetuneConfig
from ..errors import UsageError, cannot_import
from .loader import Batch, decoding_threads

# ---- one image, on the CPU ------------------------------------------------------------------------

# random erasing as timm's recipes have it: share of the area, ratio of height to width, tries
AREA, RATIO, TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10


class _Numpy:
    """numpy with another generator."""

    def __init__(self) -> None:
        self.random = np.random.RandomState()

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def load_rand_augment(setting: str, mean: Iterable[float], img_size: tuple[int, int]) -> tuple[Any, Any]:
    """timm's RandAugment as a function of a PIL image, and the module whose `random` and `np.random` it draws from.

    The module is a copy of timm's: each thread seeds one, and nobody else's numbers change.

    Raises:
        UsageError: timm is missing, or the setting is none of its.
    """
    try:
        spec = importlib.util.find_spec("timm.data.auto_augment")
        module: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except (ImportError, RuntimeError) as error:
        what = cannot_import("timm", error, "timm")
        raise UsageError(f"tune.rand_augment: {what}, or go without it: --tune.rand-augment ''") from None
    module.random, module.np = random.Random(), _Numpy()
    # as timm.data.create_transform has it
    options = {
        "translate_const": int(min(img_size) * 0.45),
        "img_mean": tuple(min(255, round(255 * m)) for m in mean),
        "interpolation": module.Image.BICUBIC,
    }
    try:
        if not setting.startswith("rand"):
            raise ValueError("it begins with 'rand'")
        return module.rand_augment_transform(setting, options), module
    except Exception as error:
        reason = f" ({error})" if str(error) else ""
        raise UsageError(
            f"tune.rand_augment: {setting!r} is no setting of timm's{reason}; try rand-m9-mstd0.5-inc1"
        ) from None


class Augmenter:
    """RandAugment and random erasing of the images of a batch, in place, in threads.

    Erased pixels are noise of the training images' mean and standard deviation.

    Raises:
        UsageError: as `load_rand_augment`.
    """

    def __init__(self, cfg: FinetuneConfig) -> None:
        self.tune, self.seed, self.data = cfg.tune, cfg.train.seed, cfg.data
        self._size = cfg.model.img_size
        self._own = threading.local()
        if self.tune.rand_augment:
            # a missing package is told before threads begin
            load_rand_augment(self.tune.rand_augment, self.data.mean, self._size)
        self._pool = ThreadPoolExecutor(decoding_threads(self.data.threads), thread_name_prefix="augment")

    def __call__(self, batch: Batch) -> None:
        """Changes `batch.images`, which are on the CPU."""
        keys = rng.words(batch.index, 4, seed=self.seed, epoch=batch.epoch, stream=rng.AUGMENT).tolist()
        # waits for all, and raises what one has raised
        list(self._pool.map(self._one, batch.images.numpy(), keys))

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, pixels: np.ndarray, key: list[int]) -> None:
        if self.tune.rand_augment:
            from PIL import Image

            if not hasattr(self._own, "augment"):
                self._own.augment, self._own.module = load_rand_augment(
                    self.tune.rand_augment, self.data.mean, self._size
                )
            self._own.module.random.seed(key[0] << 32 | key[1])
            self._own.module.np.random.seed(key[:2])
            pixels[:] = np.asarray(self._own.augment(Image.fromarray(pixels)))
        if self.tune.erasing:
            erase(pixels, np.random.RandomState(key[2:]), self.tune.erasing, self.data.mean, self.data.std)


def erase(pixels: np.ndarray, draw: np.random.RandomState, probability: float, mean: Any, std: Any) -> None:
    """Random erasing of [H, W, C] uint8 in place: with `probability`, noise in a box of 2 to 33 % of the area."""
    if draw.rand() >= probability:
        return
    height, width, chans = pixels.shape
    for _ in range(TRIES):
        area = draw.uniform(*AREA) * height * width
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = draw.randint(height - h + 1), draw.randint(width - w + 1)
            noise = np.asarray(mean) + np.asarray(std) * draw.standard_normal((h, w, chans))
            pixels[top : top + h, left : left + w] = np.clip(255 * noise + 0.5, 0, 255).astype(np.uint8)
            return


def augmented(loader: Iterable[Batch], cfg: FinetuneConfig) -> Iterator[Batch]:
    """The loader's batches, their images augmented."""
    if not needs_cpu(cfg):
        yield from loader
        return
    augment = Augmenter(cfg)
    try:
        for batch in loader:
            augment(batch)
            yield batch
    finally:
        augment.close()


def needs_cpu(cfg: FinetuneConfig) -> bool:
    """Whether the images of a batch have to be on the CPU first."""
    return bool(cfg.tune.rand_augment or cfg.tune.erasing)


# ---- pairs of images, on the device ---------------------------------------------------------------

# pairs of numbers drawn for lam until one is accepted; none of 24 is, one time in ten million
_DRAWS = 24
# columns of the parameters of mixing: share of an image in its own pixels, and in its own label; the box of its partner
OWN, LABEL, TOP, BOTTOM, LEFT, RIGHT, COLUMNS = *range(6), 6


def mix_params(
    rows: Tensor, mixup: float, cutmix: float, img_size: tuple[int, int], *, seed: int, epoch: int
) -> Tensor | None:
    """Random parameters of mixup and cutmix, each image its own; None without.

    Args:
        rows: [b] int64 sample rows.
        mixup: alpha: an image keeps lam ~ Beta(alpha, alpha) of its pixels and label; 0: none.
        cutmix: alpha: a box of 1 - lam of its area, cut at the borders, comes from its partner; 0: none. With both, an
            image gets either at equal odds.

    Returns:
        [b, 6] fp32 on the device of `rows`.
    """
    if not (mixup or cutmix):
        return None
    u = rng.uniform(rows, 3 + 2 * _DRAWS, seed=seed, epoch=epoch, stream=rng.MIX)
    cuts = torch.full_like(u[:, 0], float(cutmix > 0)) if not (mixup and cutmix) else (u[:, 0] < 0.5).float()
    alpha = torch.where(cuts > 0, cutmix or 1.0, mixup or 1.0)[:, None]
    # Joehnk's rule: x^(1/a), y^(1/a) of uniform x, y, where their sum is at most 1
    log_x, log_y = ((u[:, 3:] + 2.0**-25).log() / alpha).split(_DRAWS, 1)
    accepted = (log_x.exp() + log_y.exp() <= 1).float().argmax(1, keepdim=True)
    lam = torch.sigmoid((log_x - log_y).gather(1, accepted))[:, 0]
    height, width = img_size
    box = []
    for side, place in ((height, u[:, 1]), (width, u[:, 2])):
        extent, center = (side * (1 - lam).sqrt()).floor(), (side * place).floor()
        first, last = center - (extent / 2).floor(), center + ((extent + 1) / 2).floor()
        box += [first.clamp(0, side) * cuts, last.clamp(0, side) * cuts]
    top, bottom, left, right = box
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return torch.stack([torch.where(cuts > 0, 1.0, lam), torch.where(cuts > 0, kept, lam), *box], 1)


def partners(x: Tensor) -> Tensor:
    """[b, ...] with each image in the place of its neighbor: 0 and 1, 2 and 3, ..."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix(images: Tensor, params: Tensor | None) -> Tensor:
    """[b, C, H, W], each mixed with its partner (`mix_params`)."""
    if params is None:
        return images
    others = partners(images)
    own = params[:, OWN].view(-1, 1, 1, 1)
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    top, bottom, left, right = (params[:, i, None] for i in (TOP, BOTTOM, LEFT, RIGHT))
    down, across = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside = (down[:, :, None] & across[:, None])[:, None]
    return torch.where(inside, others, own * images + (1 - own) * others)


def soft_labels(labels: Tensor, classes: int, smoothing: float, params: Tensor | None) -> Tensor:
    """[b] int64 -> [b, classes] fp32: smoothed, and mixed as the images are."""
    targets = F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes
    if params is None:
        return targets
    share = params[:, LABEL, None]
    return share * targets + (1 - share) * partners(targets)
