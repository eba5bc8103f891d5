"""What the tests of the tools share: trees of images, and weights of a tiny encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from extrema_fast.config import from_dict
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.weights.folder import save_weights, weights_meta
from tests.data.conftest import config, kind, odd_images, tree

__all__ = ["config", "kind", "odd_images", "tree"]

CFG = from_dict(
    {
        "model": dict(img_size=[24, 24], patch_size=8, width=16, depth=1, heads=2, drop_path=0.0),
        "mask": {"ratio": 0.5, "views": 1},
        "head": {"hidden": 16, "out": 8, "predictor_hidden": 16},
        "data": {"mean": [0.4, 0.5, 0.6]},
    }
)
SMALL = {"batch_size": 3, "part_images": 6, "loader": "pil", "progress": False}


def random_weights(folder: Path, seed: int = 1) -> Path:
    """A weights folder of a tiny encoder whose class token depends visibly on the image."""
    torch.manual_seed(seed)
    method = ExtreMA(CFG)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return save_weights(folder, method, weights_meta(CFG, 7))


def write_images(root: Path, count: int) -> Path:
    """Images in two class folders, of different sizes."""
    from PIL import Image

    draw = np.random.default_rng(5)
    for i in range(count):
        path = root / ("ape", "bee")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = draw.integers(0, 256, (3, 4, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((30 + i, 41 - i)).save(path)
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    return random_weights(tmp_path_factory.mktemp("w") / "weights")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """19 images in two class folders."""
    return write_images(tmp_path_factory.mktemp("images"), 19)
