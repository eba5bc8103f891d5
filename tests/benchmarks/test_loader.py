"""The benchmark of the data path, with few and small images.

Covers: every way that runs here makes batches of views; two in processes, stopped between their turns; items of both
baselines; the crop boxes of the one by hand; training on batches that arrive; which ways are compared.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import loader
from benchmarks.loader import WAYS, Loading, Photos, Setting, TorchvisionPhotos, missing
from benchmarks.processes import Turns
from extrema_fast.config import DataConfig
from tests.torchvision_operators import define_torchvision_operators

pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")
HERE = [way for way in WAYS if not missing(way)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    folder = loader.made(tmp_path_factory.mktemp("made"), 6)
    return Setting(DataConfig(train=folder, threads=1), (48, 64), 3, 1)


@pytest.mark.parametrize("way", HERE)
def test_every_way_makes_batches(way, setting, monkeypatch):
    # this process keeps its cores
    monkeypatch.setattr(loader, "limit_cores", lambda count: count)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    loading = Loading(way, "views", setting, 1)
    try:
        assert loading.built["images"] == 6
        assert len(loading.turn(1, 2)["samples_ms"]) == 1 and len(loading.epochs(2)["rss_mb"]) == 2
    finally:
        loading.close()


def test_ways_take_turns_in_processes(setting):
    rows: dict[str, dict] = {way: {} for way in ("ours-held", "dataloader")}
    with Turns(rows, pause=True) as turns:
        for way in rows:
            turns.start(way, Loading, way, "views", setting, 1)
        turns.run(2, 1, 2)
        turns.add("epochs", 2)
    for way, row in rows.items():
        assert "error" not in row, (way, row)
        assert len(row["samples_ms"]) == 2 and row["cores"] == 1 and len(row["rss_mb"]) == 2


@pytest.mark.parametrize("kind", [Photos, TorchvisionPhotos])
def test_items_of_the_baselines(kind, setting):
    if kind is TorchvisionPhotos:
        define_torchvision_operators()
        pytest.importorskip("torchvision")
    assert kind(setting.data, setting.size, "crop")[0].shape == (48, 64, 3)
    views = kind(setting.data, setting.size, "views")[5]
    assert views.shape == (2, 3, 48, 64) and views.dtype == torch.float32 and views.std() > 0.1


def test_boxes_lie_inside(setting):
    photos = Photos(setting.data, (8, 8), "crop")
    for width, height in ((500, 375), (7, 4000), (1, 1)):
        for left, top, right, bottom in (photos.random_box(width, height) for _ in range(50)):
            assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_training_on_batches(setting):
    step = loader.trainer(Setting(setting.data, (48, 64), 3, torch.get_num_threads()), "dataloader")
    images = torch.randint(0, 256, (3, 48, 64, 3), dtype=torch.uint8)
    step.step(loader.Inputs(images, torch.arange(3)))
    assert step.run.step == 1 and step.loss() > 0


def test_ratios_compare_ours_with_others_of_the_same_stage():
    ways = [("ours", "views", 1.0), ("dataloader", "views", 2.0), ("dataloader", "crop", 9.0)]
    rows = [{"way": way, "stage": stage, "samples_ms": [ms] * 5, "p50_ms": ms} for way, stage, ms in ways]
    (found,) = loader.ratios(rows)
    assert (found["ours"], found["other"]) == ("ours", "dataloader") and found["ratio"] == 2
