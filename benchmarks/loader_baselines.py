"""What a user would otherwise write: PIL and a DataLoader, with torchvision's transforms or the same by hand.

Both draw their own crops and colours; `cut` and `color` do what was drawn, so that their pictures can be compared with
the product's for the same boxes and factors.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from extrema_fast.config import DataConfig
from extrema_fast.data.sources import ImageSource
from extrema_fast.errors import UsageError

# of a DataLoader's worker; torch's default
PREFETCH = 2


def missing_torchvision() -> str:
    """Why torchvision's transforms cannot be used here; empty when they can."""
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    from .with_timm import mend_torchvision

    try:
        mend_torchvision()
        importlib.import_module("torchvision.transforms.v2")
    # a torchvision of another torch fails in many ways
    except Exception as error:
        return f"torchvision cannot be imported: {error}"
    return ""


class Photos(Dataset):
    """Pictures of a source at a stage, as PIL and Python make them, with torchvision's laws restated.

    stage  `decode`: [2] int64 height and width of the decoded image; `crop`: [H, W, 3] uint8; `views`:
           [2, 3, H, W] fp32, two colour versions of one crop, normalised
    """

    def __init__(self, source: ImageSource, cfg: DataConfig, size: tuple[int, int], stage: str) -> None:
        self.source, self.cfg, self.size, self.stage = source, cfg, size, stage

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> Tensor:
        picture = self.load(row)
        if self.stage == "decode":
            return torch.tensor([picture.height, picture.width])
        picture = self.random_crop(picture)
        if self.stage == "crop":
            return torch.from_numpy(np.array(picture))
        return torch.stack([self.tensor(self.random_color(picture)) for _ in range(2)])

    def load(self, row: int) -> Any:
        from io import BytesIO

        from PIL import Image

        if self.source.spans is None:
            with open(self.source.paths[row], "rb") as file:
                return Image.open(file).convert("RGB")
        return Image.open(BytesIO(self.source.read(row))).convert("RGB")

    # ---- what is drawn ---------------------------------------------------------------------------

    def random_crop(self, picture: Any) -> Any:
        box = self.random_box(picture.width, picture.height)
        return self.cut(picture, box, random.random() < self.cfg.flip)

    def random_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) as torchvision's RandomResizedCrop draws it."""
        low, high = map(math.log, self.cfg.ratio)
        for _ in range(10):
            area = width * height * random.uniform(*self.cfg.area)
            ratio = math.exp(random.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        ratio = width / height
        w = round(height * self.cfg.ratio[1]) if ratio > self.cfg.ratio[1] else width
        h = round(width / self.cfg.ratio[0]) if ratio < self.cfg.ratio[0] else height
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def random_color(self, picture: Any) -> Any:
        on = random.random() < self.cfg.jitter_prob
        b, c, s, h = self.cfg.jitter
        factors = [random.uniform(max(0, 1 - x), 1 + x) for x in (b, c, s)] + [random.uniform(-h, h)]
        order = random.sample(range(4), 4)
        return self.color(picture, factors, order if on else [], random.random() < self.cfg.gray_prob)

    # ---- what is done ----------------------------------------------------------------------------

    def cut(self, picture: Any, box: tuple[int, int, int, int], flip: bool) -> Any:
        """The box (left, top, right, bottom), resized; perhaps flipped."""
        from PIL import Image

        height, width = self.size
        picture = picture.crop(box).resize((width, height), Image.Resampling.BILINEAR)
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture

    def color(self, picture: Any, factors: list[float], order: list[int], gray: bool) -> Any:
        """Brightness, contrast, saturation, hue (numbers 0 to 3) in the given order; perhaps gray."""
        from PIL import ImageEnhance

        for op in order:
            if op == 3:
                picture = self.turn_hue(picture, factors[3])
            else:
                kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[op]
                picture = kind(picture).enhance(factors[op])
        return picture.convert("L").convert("RGB") if gray else picture

    def turn_hue(self, picture: Any, turns: float) -> Any:
        from PIL import Image

        h, s, v = picture.convert("HSV").split()
        # 8 bits wrap around
        turned = np.array(h, dtype=np.uint8) + np.uint8(int(turns * 255) % 256)
        return Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")

    def tensor(self, picture: Any) -> Tensor:
        """[3, H, W] fp32, normalised."""
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div_(255)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.cfg.mean, self.cfg.std))
        return x.sub_(mean).div_(std)


class TorchvisionPhotos(Photos):
    """The same with torchvision's own transforms (v2) on PIL images."""

    def __init__(self, source: ImageSource, cfg: DataConfig, size: tuple[int, int], stage: str) -> None:
        super().__init__(source, cfg, size, stage)
        if why := missing_torchvision():
            raise UsageError(why)
        from torchvision.transforms import v2

        b, c, s, h = cfg.jitter
        self.random_crop = v2.Compose(
            [v2.RandomResizedCrop(size, cfg.area, cfg.ratio), v2.RandomHorizontalFlip(cfg.flip)]
        )
        self.random_color = v2.Compose(
            [v2.RandomApply([v2.ColorJitter(b, c, s, h)], cfg.jitter_prob), v2.RandomGrayscale(cfg.gray_prob)]
        )
        self.tensor = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(cfg.mean, cfg.std)]
        )

    def cut(self, picture: Any, box: tuple[int, int, int, int], flip: bool) -> Any:
        from torchvision.transforms.v2 import functional as F

        left, top, right, bottom = box
        picture = F.resized_crop(picture, top, left, bottom - top, right - left, list(self.size))
        return F.horizontal_flip(picture) if flip else picture

    def color(self, picture: Any, factors: list[float], order: list[int], gray: bool) -> Any:
        from torchvision.transforms.v2 import functional as F

        steps = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for op in order:
            picture = steps[op](picture, factors[op])
        return F.rgb_to_grayscale(picture, num_output_channels=3) if gray else picture


DATASETS = {"dataloader": Photos, "torchvision": TorchvisionPhotos}


def batches(dataset: Photos, batch: int, threads: int) -> Iterator[Tensor]:
    """Endless shuffled batches from `threads` worker processes; closing it ends them."""
    loader = DataLoader(
        dataset, batch, num_workers=threads, prefetch_factor=PREFETCH, drop_last=True,
        # one endless epoch: a user's would wait for its first batches again and again
        sampler=RandomSampler(dataset, num_samples=10**9),
    )  # fmt: skip
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        iterator._shutdown_workers()
