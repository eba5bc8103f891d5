"""Pictures before time: every way's crops and colour views beside PIL's, for the same boxes, flips and factors."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from extrema_fast.kernels.color_views.reference import FACTORS, GRAY_ON, ON, ORDER
from torch import Tensor

from extrema_fast.data.augment import color_jitter, jitter_params
from extrema_fast.data.loader import TrainLoader, random_boxes

from .gates import Gate
from .loader_baselines import DATASETS, Photos
from .loader_ways import WAYS, Setting

# mean difference allowed, in levels of 0 to 255. PIL rounds down after each colour operation
CROPS, VIEWS = 1.0, 2.5


def pictures(ways: list[str], setting: Setting, count: int = 16) -> list[Gate]:
    """One check per way: its first `count` crops and both their colour views against PIL's, made by `Photos`."""
    count = min(count, len(setting.source))
    rows = _rows(setting, count)
    truth = _by_hand(Photos(setting.source, setting.data, setting.size, "views"), rows, setting)
    return [_gate(name, _made(name, rows, setting, count), truth, setting.data.std) for name in ways]


def _rows(setting: Setting, count: int) -> Tensor:
    # a loader's first batch: the order is the same for all of ours
    with TrainLoader(setting.source, dataclasses.replace(setting.data, loader="pil"), setting.size,
                     batch_size=count, seed=0, device="cpu") as loader:  # fmt: skip
        return next(loader).index


def _by_hand(photos: Photos, rows: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """([b, H, W, 3] crops in levels, [2, b, 3, H, W] normalised views) of the product's boxes, flips and coins."""
    loaded = [photos.load(row) for row in rows.tolist()]
    sizes = np.array([(p.height, p.width) for p in loaded])
    boxes, flips = random_boxes(sizes, rows.numpy(), setting.data, seed=0, epoch=0)
    coins = jitter_params(rows, setting.data, seed=0, epoch=0)
    crops, views = [], []
    for picture, (top, left, bottom, right), flip, both in zip(
        loaded, boxes.astype(int).tolist(), flips.tolist(), coins.tolist(), strict=True
    ):
        picture = photos.cut(picture, (left, top, right, bottom), flip)
        crops.append(torch.from_numpy(np.array(picture)))
        for coin in both:
            order = [int(o) for o in coin[ORDER]] if coin[ON] else []
            views.append(photos.tensor(photos.color(picture, coin[FACTORS], order, coin[GRAY_ON] > 0)))
    return torch.stack(crops).float(), torch.stack(views).unflatten(0, (-1, 2)).transpose(0, 1)


def _made(name: str, rows: Tensor, setting: Setting, count: int) -> tuple[Tensor, Tensor]:
    way = WAYS[name]
    if not way.ours:
        return _by_hand(DATASETS[name](setting.source, setting.data, setting.size, "views"), rows, setting)
    own = dataclasses.replace(setting.data, loader=way.kind)
    with TrainLoader(
        setting.source, own, setting.size, batch_size=count, seed=0, device=way.device
    ) as loader:
        batch = next(loader)
    params = jitter_params(batch.index.to(batch.images.device), own, seed=0, epoch=0)
    views = color_jitter(batch.images, params, own)
    return batch.images.float().cpu(), torch.stack(views).cpu()


def _gate(
    name: str, made: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], std: tuple[float, ...]
) -> Gate:
    levels = 255 * torch.tensor(std).view(3, 1, 1)
    crops = float((made[0] - truth[0]).abs().mean())
    views = float(((made[1] - truth[1]).abs() * levels).mean())
    return Gate(
        name, crops <= CROPS and views <= VIEWS,
        f"mean difference from PIL: crops {crops:.2f} levels, colour views {views:.2f}",
    )  # fmt: skip
