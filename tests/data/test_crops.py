"""The crop plan: the law of random boxes, flips, determinism, small and long images. Center boxes: test_loaders.py."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from extrema_fast.config import DataConfig
from extrema_fast.data.loader import random_boxes


def boxes_for(height: int, width: int, count: int = 4000, cfg: DataConfig | None = None, epoch: int = 0):
    sizes = np.tile([height, width], (count, 1))
    return random_boxes(sizes, np.arange(count), cfg or DataConfig(), seed=5, epoch=epoch)


def reference_box(rng: random.Random, height: int, width: int, area, ratio) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params, written out."""
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    whole = width / height
    if whole < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif whole > ratio[1]:
        h, w = height, round(height * ratio[1])
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


def ks(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sample Kolmogorov-Smirnov distance times sqrt(n m / (n + m)); 1.95 is p = 0.001."""
    a, b = np.sort(a), np.sort(b)
    points = np.concatenate([a, b])
    gap = np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b)
    return float(np.abs(gap).max() * math.sqrt(len(a) * len(b) / (len(a) + len(b))))


@pytest.mark.parametrize(
    "height, width, area", [(240, 320, (0.2, 1.0)), (500, 200, (0.08, 1.0)), (33, 900, (0.2, 1.0))]
)
def test_law_equals_torchvision(height, width, area):
    cfg = DataConfig(area=area)
    mine, _ = boxes_for(height, width, cfg=cfg)
    rng = random.Random(0)
    other = np.array([reference_box(rng, height, width, area, cfg.ratio) for _ in range(4000)])
    h, w = mine[:, 2] - mine[:, 0], mine[:, 3] - mine[:, 1]
    pairs = {
        "area": (h * w, other[:, 2] * other[:, 3]),
        "ratio": (w / h, other[:, 3] / other[:, 2]),
        "top": (mine[:, 0], other[:, 0]),
        "left": (mine[:, 1], other[:, 1]),
        "bottom": (mine[:, 2], other[:, 0] + other[:, 2]),
    }
    far = {name: ks(*pair) for name, pair in pairs.items() if ks(*pair) > 1.95}
    assert not far, f"other distributions than torchvision's: {far}"
    assert (h * w).min() >= 0.95 * area[0] * height * width or width > 4 * height


def test_every_place_is_reached_equally_often():
    # boxes of 2 x 2 in 4 x 8 pixels: few places, the last one included
    cfg = DataConfig(area=(0.125, 0.125), ratio=(1.0, 1.0))
    boxes, _ = boxes_for(4, 8, 14000, cfg)
    assert (boxes[:, 2:] - boxes[:, :2] == 2).all()
    for axis, places in ((0, 3), (1, 7)):
        counts = np.bincount(boxes[:, axis].astype(int), minlength=places)
        assert len(counts) == places
        expected = 14000 / places
        assert np.abs(counts - expected).max() < 5 * math.sqrt(expected), counts


def test_flips_are_half_and_independent_of_the_box():
    boxes, flips = boxes_for(100, 100, 20000)
    assert abs(flips.mean() - 0.5) < 0.015
    assert abs(np.corrcoef(flips, boxes[:, 1])[0, 1]) < 0.03
    assert not boxes_for(100, 100, cfg=DataConfig(flip=0.0))[1].any()
    assert boxes_for(100, 100, cfg=DataConfig(flip=1.0))[1].all()


def test_a_box_depends_on_row_epoch_and_seed_alone():
    sizes = np.tile([90, 120], (50, 1))
    rows = np.arange(50)
    whole, flips = random_boxes(sizes, rows, DataConfig(), seed=1, epoch=3)
    part, part_flips = random_boxes(sizes[7:9], rows[7:9], DataConfig(), seed=1, epoch=3)
    assert (whole[7:9] == part).all() and (flips[7:9] == part_flips).all()
    for other in (dict(seed=2, epoch=3), dict(seed=1, epoch=4)):
        assert (random_boxes(sizes, rows, DataConfig(), **other)[0] != whole).any(1).mean() > 0.9


@pytest.mark.parametrize("size", [(1, 1), (7, 4000), (4000, 7), (3, 5)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (4.0, 5.0), (0.1, 0.2)])
def test_boxes_stay_inside_and_are_whole_pixels(size, ratio):
    boxes, _ = boxes_for(*size, cfg=DataConfig(area=(0.08, 1.0), ratio=ratio))
    assert (boxes == np.rint(boxes)).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= size).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()


def test_fallback_is_the_largest_centred_box():
    # area 1 never fits a 7 x 4000 image with ratio <= 4/3
    boxes, _ = boxes_for(7, 4000, count=10, cfg=DataConfig(area=(1.0, 1.0)))
    assert (boxes == [0, (4000 - 9) // 2, 7, (4000 - 9) // 2 + 9]).all()
