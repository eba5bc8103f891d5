"""Segmentation of patch tokens: layouts of masks, IoU, k-means, and the command on a set made here.

Covers: VOC, ADE20K and plain folders, the pixels that each ignores; masks of another size, in colors, with unknown or
a single class, missing ones; mean IoU against scikit-learn's confusion matrix; shares of classes in patches; k-means
with an empty cluster; matching of clusters; regions that differ in texture, above chance by a random encoder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch

from extrema_fast.cli import main
from extrema_fast.config import DataConfig, smoke, to_dict
from extrema_fast.errors import UsageError
from extrema_fast.evaluation import segmentation
from extrema_fast.evaluation.masks import (
    VOC,
    confusion,
    intersection_over_union,
    mean_iou,
    open_masks,
    shares,
)
from extrema_fast.evaluation.result import format_table, is_segmentation
from extrema_fast.evaluation.segmentation import kmeans, match, segment
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.weights.folder import save_weights, weights_meta

image = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(np.asarray(array, np.uint8)).save(path)


# ---- numbers --------------------------------------------------------------------------------------


def test_mean_iou_is_that_of_scikit_learns_confusion_matrix():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (extra: dev)")
    g = np.random.default_rng(0)
    truth, predicted = g.integers(0, 5, (40, 30)), g.integers(0, 5, (40, 30))
    truth[:5] = 255
    # never there nor predicted: left out of the mean; there and never predicted: 0
    truth[truth == 4], predicted[predicted >= 3] = 2, 0
    ours = confusion(truth.astype(np.uint8), predicted, 5)
    known = truth != 255
    theirs = metrics.confusion_matrix(truth[known], predicted[known], labels=range(5))
    assert ours.tolist() == theirs.tolist()
    iou = intersection_over_union(ours)
    assert iou[3] == 0 and iou[4] is None
    wanted = metrics.jaccard_score(truth[known], predicted[known], labels=range(4), average=None)
    assert iou[:4] == pytest.approx(wanted.tolist()) and mean_iou(ours) == pytest.approx(wanted.mean())


def test_shares_of_classes_in_patches_of_any_mask():
    mask = np.array([[0, 0, 1, 1, 1], [0, 255, 1, 1, 1], [2, 2, 255, 255, 255]], np.uint8)
    found = shares(mask, (3, 2), 3)
    # columns 0 to 2 (centers below the half) are left, 2 of 5 lie right of it, the middle one on it
    assert found.shape == (6, 3)
    assert found[0].tolist() == [1, 0, 0] and found[1].tolist() == [0, 1, 0]
    assert (
        found[2].tolist() == [0.5, 0, 0] and found[4].tolist() == [0, 0, 1] and found[5].tolist() == [0, 0, 0]
    )
    # a mask coarser than the grid: patches without a pixel have no share
    assert shares(mask[:1, :1], (2, 2), 3).sum() == 1


def test_kmeans_finds_blobs_and_fills_empty_clusters():
    g = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    y = torch.arange(90) % 3
    x = centers[y] + 0.1 * torch.randn(90, 2, generator=g)
    found, cluster, reseeded = kmeans(x, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip((found, cluster), kmeans(x, 3, seed=1)[:2], strict=True))
    targets = torch.nn.functional.one_hot(y, 3).float()
    order = match(cluster, targets)
    assert torch.equal(order[y], cluster) and reseeded == 0
    torch.testing.assert_close(found[order], centers, atol=0.1, rtol=0)
    # two places for three clusters: one stays empty, whatever is done
    twice = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(10, 1)
    assert kmeans(twice, 3, seed=0)[2] > 0
    with pytest.raises(UsageError, match="2 tokens for 3 clusters"):
        kmeans(x[:2], 3, seed=0)


# ---- layouts --------------------------------------------------------------------------------------


def test_layouts_of_voc_ade20k_and_plain_folders(tmp_path):
    picture, mask = np.zeros((4, 6, 3)), np.array([[0, 1, 2, 20, 255, 0]] * 4)
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("a", "b", "unused"):
        write(voc / "JPEGImages" / f"{name}.jpg", picture)
        write(voc / "SegmentationClass" / f"{name}.png", mask)
    for split, name in (("train", "a"), ("val", "b")):
        (voc / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{name}\n")
    train, test = open_masks(str(tmp_path))
    assert (train.layout, train.classes, len(train.source), len(test.source)) == ("voc", VOC, 1, 1)
    assert len(VOC) == 21 and train.mask(0, (4, 6))[0].tolist() == [0, 1, 2, 20, 255, 0]

    ade = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        write(ade / "images" / split / "x.jpg", picture)
        write(ade / "annotations" / split / "x.png", mask % 255)
    (ade / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t.1\twall\n2\t.1\tbuilding, edifice\n")
    train, test = open_masks(str(ade))
    # 0 is no class, the others begin at 1
    assert train.layout == "ade20k" and train.mask(0, (4, 6))[0].tolist() == [255, 0, 1, 19, 255, 255]
    assert train.classes[:3] == ["wall", "building", "3"] and len(train.classes) == 150

    for split in ("train", "test"):
        write(tmp_path / "own" / "images" / split / "x.png", picture)
        write(tmp_path / "own" / "masks" / split / "x.png", mask)
    train, test = open_masks(str(tmp_path / "own"))
    assert (train.layout, train.classes) == ("plain", []) and test.mask(0)[0].tolist() == mask[0].tolist()


def test_masks_that_cannot_be_used_are_named(tmp_path):
    def plain():
        return open_masks(str(tmp_path))[0]

    for part in ("images", "masks"):
        with pytest.raises(UsageError, match="JPEGImages/"):
            plain()
        for split in ("train", "val"):
            write(tmp_path / part / split / "x.png", np.zeros((4, 6, 3) if part == "images" else (4, 6)))
        shutil.rmtree(tmp_path / "masks", ignore_errors=part == "images") if part == "images" else None
    assert plain().mask(0, (4, 6)).shape == (4, 6)
    with pytest.raises(UsageError, match=r"x\.png: 4 x 6 pixels, its image .* has 6 x 4"):
        plain().mask(0, (6, 4))
    with pytest.raises(UsageError, match=r"class number 21, but voc has 21"):
        write(tmp_path / "masks" / "train" / "x.png", np.full((4, 6), 21))
        plain()._replace(layout="voc", classes=VOC).mask(0)
    write(tmp_path / "masks" / "train" / "x.png", np.zeros((4, 6, 3)))
    with pytest.raises(UsageError, match="mode RGB; a mask has one class number per pixel"):
        plain().mask(0)
    (tmp_path / "masks" / "train" / "x.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="cannot be read as a mask"):
        plain().mask(0)
    (tmp_path / "masks" / "train" / "x.png").unlink()
    with pytest.raises(UsageError, match=r"1 file of 1 masks missing, first: .*x\.png"):
        plain()
    with pytest.raises(UsageError, match="no such folder"):
        open_masks(str(tmp_path / "none"))


# ---- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def textured(tmp_path_factory):
    """(run folder, images with masks): left or upper part stripes, the rest noise of the same mean; 40 x 48 pixels."""
    root, g = tmp_path_factory.mktemp("textured"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for i in range(count):
            mask = np.zeros((40, 48), np.uint8)
            cut = int(g.integers(12, 28))
            mask[(slice(None), slice(cut)) if i % 2 else (slice(cut),)] = 1
            stripes = np.broadcast_to(np.where(np.arange(48) % 4 < 2, 40, 200), (40, 48))
            pixels = np.where(mask == 1, stripes, g.integers(40, 200, (40, 48)))
            mask[:2] = 255
            write(root / "set" / "images" / split / f"{i}.png", pixels[..., None].repeat(3, 2))
            write(root / "set" / "masks" / split / f"{i}.png", mask)
    cfg = dataclasses.replace(smoke(), data=DataConfig(loader="pil"))
    (root / "run").mkdir()
    (root / "run" / "config.json").write_text(json.dumps(to_dict(cfg)))
    save_weights(root / "run" / "weights" / "step_00000002", ExtreMA(cfg), weights_meta(cfg, 2))
    return root / "run", root / "set"


def test_textures_are_segmented_above_chance_by_a_random_encoder(textured, monkeypatch):
    run, data = textured
    result = segment(run, str(data), seeds=2, device="cpu")
    file = run / "reports" / f"segmentation-{result['key']}.json"
    assert json.loads(file.read_text()) == result and is_segmentation(result)
    assert [r["encoder"] for r in result["rows"]] == ["pretrained", "random init", "raw pixels"]
    assert result["counts"] == {"train": 12, "test": 6, "classes": 2} and result["layout"] == "plain"
    # the larger class everywhere
    pixels = result["per_class"]["pixels"]
    assert sum(pixels) == 6 * 38 * 48
    chance = max(pixels) / sum(pixels) / 2
    random = result["rows"][1]
    assert random["probe"] > chance + 0.2 and random["kmeans"] > chance + 0.1
    assert result["rows"][0]["spread"].keys() == {"probe", "kmeans"}
    table = format_table(result)
    assert "linear probe, mIoU" in table and "12 training and 6 test images, 2 classes" in table
    monkeypatch.setattr(segmentation, "_learn", None)
    assert segment(run, str(data), seeds=2, device="cpu") == result
    # masks that were changed, in as many bytes, are measured
    mask = next(p for p in data.rglob("*.png") if "mask" in str(p) or "annotation" in str(p))
    os.utime(mask, ns=(1, 1))
    with pytest.raises(TypeError):
        segment(run, str(data), seeds=2, device="cpu")
    assert not is_segmentation(result | {"per_class": result["per_class"] | {"probe": [1.0]}})


def test_classes_of_test_masks_alone_are_named_and_one_class_is_refused(textured, tmp_path, capsys):
    run, data = textured
    copy = shutil.copytree(data, tmp_path / "set")
    mask = copy / "masks" / "test" / "0.png"
    array = np.array(image.open(mask))
    array[-4:] = 2
    write(mask, array)
    out = str(tmp_path / "found.json")
    assert main(["segment", str(run), "--data", str(copy), "--out", out, "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "1 class in the test masks alone" in result["warnings"][0] and "2" in result["warnings"][0]
    assert (
        result["per_class"]["probe"][2] == 0 and json.loads((tmp_path / "found.json").read_text()) == result
    )
    for path in (copy / "masks" / "train").iterdir():
        write(path, np.ones((40, 48)))
    assert main(["segment", str(run), "--data", str(copy), "--device", "cpu"]) == 2
    assert "one class only" in capsys.readouterr().err
    write(copy / "masks" / "train" / "3.png", np.ones((48, 40)))
    assert main(["segment", str(run), "--data", str(copy), "--device", "cpu"]) == 2
    assert "3.png: 48 x 40 pixels" in capsys.readouterr().err
