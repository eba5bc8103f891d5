"""Augmentation of labeled crops.

Covers: mixup and cutmix (distribution of lam, boxes, labels, keyed by row alone), soft labels as timm's, random
erasing, RandAugment as timm's with the same generators, which leaves those of the process alone.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from extrema_fast.config import FinetuneConfig, from_dict
from extrema_fast.data import regularize as reg
from extrema_fast.data.loader import Batch
from extrema_fast.errors import UsageError

ROWS = torch.arange(20000)
KEYS = {"seed": 3, "epoch": 1}


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_lam_is_beta(alpha):
    lam = reg.mix_params(ROWS, alpha, 0.0, (32, 32), **KEYS)[:, reg.LABEL].numpy()
    wanted = np.random.RandomState(0).beta(alpha, alpha, len(ROWS))
    at = np.linspace(0.02, 0.98, 25)
    # deviation of a quantile of 20,000 numbers, four times, in shares of the sample
    share = (lam[:, None] <= np.quantile(wanted, at)).mean(0)
    assert np.abs(share - at).max() < 4 * np.sqrt(2 * 0.25 / len(ROWS))


def test_cutmix_takes_the_box_of_the_partner():
    p = reg.mix_params(ROWS[:64], 0.0, 1.0, (8, 12), **KEYS)
    images, labels = torch.rand(64, 3, 8, 12), ROWS[:64] % 5
    mixed, others = reg.mix(images, p), images.view(32, 2, 3, 8, 12).flip(1).flatten(0, 1)
    targets = reg.soft_labels(labels, 5, 0.0, p)
    cut = 0
    for i, (_, share, top, bottom, left, right) in enumerate(p.tolist()):
        wanted = images[i].clone()
        box = slice(int(top), int(bottom)), slice(int(left), int(right))
        wanted[:, box[0], box[1]] = others[i][:, box[0], box[1]]
        torch.testing.assert_close(mixed[i], wanted)
        area = (bottom - top) * (right - left) / 96
        assert share == pytest.approx(1 - area, abs=1e-6)
        label = torch.zeros(5)
        label[labels[i]] += share
        label[labels[i ^ 1]] += 1 - share
        torch.testing.assert_close(targets[i], label)
        cut += area > 0
    assert cut > 48


def test_each_image_has_one_of_both_keyed_by_its_row():
    both = reg.mix_params(ROWS, 0.8, 1.0, (32, 32), **KEYS)
    cuts = both[:, reg.OWN] == 1
    assert cuts.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (both[~cuts, reg.TOP : reg.COLUMNS] == 0).all()
    torch.testing.assert_close(both[~cuts, reg.OWN], both[~cuts, reg.LABEL])
    some = torch.tensor([7, 19999, 7])
    torch.testing.assert_close(reg.mix_params(some, 0.8, 1.0, (32, 32), **KEYS), both[some], rtol=0, atol=0)
    assert not reg.mix_params(some, 0.8, 1.0, (32, 32), seed=3, epoch=2).equal(both[some])
    assert reg.mix_params(some, 0.0, 0.0, (32, 32), **KEYS) is None


def test_soft_labels_are_timms():
    mixup = pytest.importorskip("timm.data.mixup", exc_type=ImportError)
    labels = torch.tensor([0, 2, 1, 1])
    p = torch.zeros(4, 6)
    p[:, reg.OWN] = p[:, reg.LABEL] = 0.3
    # timm pairs the first with the last
    theirs = mixup.mixup_target(labels[[0, 2, 3, 1]], 3, lam=0.3, smoothing=0.1)
    torch.testing.assert_close(reg.soft_labels(labels, 3, 0.1, p), theirs[[0, 3, 1, 2]])


def test_erasing():
    draw, mean, std = np.random.RandomState(0), (0.5, 0.4, 0.3), (0.1, 0.1, 0.05)
    erased = []
    for _ in range(400):
        pixels = np.zeros((24, 36, 3), np.uint8)
        reg.erase(pixels, draw, 0.25, mean, std)
        changed = np.argwhere(pixels.any(-1))
        if len(changed):
            (top, left), (bottom, right) = changed.min(0), changed.max(0) + 1
            area, ratio = (
                (bottom - top) * (right - left) / pixels[..., 0].size,
                (bottom - top) / (right - left),
            )
            # rounded sides
            assert 0.01 < area < 0.38 and 0.2 < ratio < 5
            erased.append(pixels[top:bottom, left:right].reshape(-1, 3) / 255)
    assert 70 < len(erased) < 130
    noise = np.concatenate(erased)
    np.testing.assert_allclose(noise.mean(0), mean, atol=0.005)
    np.testing.assert_allclose(noise.std(0), std, atol=0.005)


def batch_of(images: torch.Tensor, index: list[int]) -> Batch:
    return Batch(images[index].clone(), torch.tensor(index), 4, 0)


def augment(cfg: FinetuneConfig, batch: Batch) -> torch.Tensor:
    (out,) = reg.augmented([batch], cfg)
    return out.images


def tune(**change) -> FinetuneConfig:
    base = {"mixup": 0.0, "cutmix": 0.0, "rand_augment": "", "erasing": 0.0}
    return from_dict({"tune": base | change, "data": {"threads": 2}}, FinetuneConfig())


def test_rand_augment_is_timms_and_leaves_the_generators_of_the_process_alone():
    theirs = pytest.importorskip("timm.data.auto_augment", exc_type=ImportError)
    from PIL import Image

    from extrema_fast import rng

    cfg = tune(rand_augment="rand-m9-mstd0.5-inc1")
    images = torch.randint(
        0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    before = random.getstate(), np.random.get_state()[1].copy()
    made = augment(cfg, batch_of(images, list(range(8))))
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    # of each row the same, in any order and company
    assert augment(cfg, batch_of(images, [5, 2])).equal(made[[5, 2]])
    options = {
        "translate_const": int(224 * 0.45),
        "img_mean": (124, 116, 104),
        "interpolation": Image.BICUBIC,
    }
    function = theirs.rand_augment_transform("rand-m9-mstd0.5-inc1", options)
    try:
        for row in range(8):
            key = rng.words(torch.tensor([row]), 4, seed=0, epoch=4, stream=rng.AUGMENT)[0].tolist()
            random.seed(key[0] << 32 | key[1])
            np.random.seed(key[:2])
            wanted = np.asarray(function(Image.fromarray(images[row].numpy())))
            np.testing.assert_array_equal(made[row].numpy(), wanted)
    finally:
        random.setstate(before[0])
    assert not made.equal(images)


def test_without_either_the_batch_is_untouched_and_wrong_settings_are_named():
    batch = batch_of(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), [0, 1])
    assert augment(tune(), batch) is batch.images
    pytest.importorskip("timm", exc_type=ImportError)
    with pytest.raises(UsageError, match=r"tune.rand_augment: 'augmix'"):
        augment(tune(rand_augment="augmix"), batch)
