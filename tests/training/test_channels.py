"""A run of five-channel images, from the files to a search.

Covers: mean, standard deviation and policy settled at the start and recorded; exact resume, also when they would be
measured differently; held images; a completed run is known again; evaluation with random encoder and raw pixels; the
weights' range in `embed` and `search`; report; rehearsal and profile; RGB weights to start from; export.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from extrema_fast.config import from_dict
from extrema_fast.errors import Preempted, UsageError
from extrema_fast.evaluation.evaluate import evaluate
from extrema_fast.reporting.report import report
from extrema_fast.tools.dry_run import dry_run
from extrema_fast.tools.embed import embed
from extrema_fast.tools.profile import profile
from extrema_fast.tools.search import search
from extrema_fast.train import pretrain
from extrema_fast.training import resolve
from extrema_fast.weights.export import export
from extrema_fast.weights.load import load_encoder
from tests.training.conftest import final_hash, stop_at, tiny

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")
RANGE = [0.0, 1.0, 0.0, 3000.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    """24 .npy files [40, 44, 5] in two classes, reflectances and a height in meters that tells the classes apart."""
    root, rng = tmp_path_factory.mktemp("stacks"), np.random.default_rng(0)
    for i in range(24):
        x = rng.random((40, 44, 5)).astype(np.float32)
        x[..., 1] *= (900, 3000)[i % 2]
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        np.save(root / "ab"[i % 2] / f"{i}.npy", x)
    return root


@pytest.fixture(scope="module")
def made(stacks, tmp_path_factory):
    """(configuration, folder) of a finished run of 4 steps."""
    cfg = tiny(tmp_path_factory.mktemp("run") / "run", _change(stacks), ckpt={"every_steps": 2})
    pretrain(cfg, progress=False)
    return cfg, cfg.out


def _change(stacks) -> dict:
    return {
        "data": {
            "train": str(stacks),
            "test": str(stacks),
            "policy": "spatial+color",
            "range": RANGE,
            "limit": 0,
        },
        "model": {"in_chans": 5},
        "train": {"epochs": 2, "batch_size": 12},
        "eval": {"every_epochs": 2, "k": 2},
    }


def test_statistics_are_settled_once_and_said(made, caplog):
    caplog.set_level(logging.INFO)
    cfg, out = made
    recorded = json.loads(Path(out, "config.json").read_text())["data"]
    assert recorded["policy"] == "spatial" and len(recorded["mean"]) == len(recorded["std"]) == 5
    # uniform numbers; the height fills 30 % and all of its range
    assert recorded["mean"] == pytest.approx([0.5, (0.15 + 0.5) / 2, 0.5, 0.5, 0.5], abs=0.02)
    pretrain(cfg, progress=False)
    assert "the run is complete" in caplog.text and "color jitter and grayscale are for RGB" in caplog.text
    one = from_dict({"data": {"mean": [0.4], "std": [0.2]}}, cfg)
    settled = resolve.settle_channels(one, None).data
    assert settled.mean == (0.4,) * 5 and settled.std == (0.2,) * 5
    with pytest.raises(UsageError, match=r"data\.mean: model\.in_chans is 5, got 2 values"):
        from_dict({"data": {"mean": [0.4, 0.5]}}, cfg)
    rgb = tiny()
    assert resolve.settle_channels(rgb, None) is rgb


@pytest.mark.parametrize("resident", ["off", "host"])
def test_resume_is_exact(made, tmp_path, monkeypatch, resident):
    """Of images read and held: stopped after a step, continued, it ends in the same bytes."""
    cfg, out = made
    half = from_dict({"out": str(tmp_path / "run"), "data": {"resident": resident}}, cfg)
    with monkeypatch.context() as m:
        stop_at(2, m)
        with pytest.raises(Preempted):
            pretrain(half, progress=False)
    # what was recorded counts, not what would be measured now
    monkeypatch.setattr(resolve, "measure_statistics", lambda *_: ((0.0,) * 5, (1.0,) * 5))
    pretrain(half, progress=False)
    assert final_hash(tmp_path / "run", 4) == final_hash(Path(out), 4)


def test_evaluation_report_and_profile(made, tmp_path):
    cfg, out = made
    result = evaluate(out, metrics=("knn",), out=tmp_path / "e.json")
    rows = {(r["encoder"], r["feature"]): r["knn"] for r in result["rows"]}
    # the height is in the numbers that the network gets
    assert rows["raw pixels", "pixels"] == 1.0 and len(rows) == 5
    page = report(out, images=2).read_text()
    assert "Of the 5 channels the first three are shown" in page
    assert "data:image/png" in page and "Pictures are left out" not in page
    assert dry_run(cfg, steps=1)["loader"] == "pil"
    profile(cfg, out=tmp_path / "profile", steps=1, warmup=1, synthetic=True)


def test_embed_and_search(made, stacks, tmp_path):
    embed(str(stacks), tmp_path / "index", made[1], progress=False)
    copy = shutil.copy(stacks / "b/3.npy", tmp_path / "query.npy")
    (found,) = search(copy, tmp_path / "index", k=1, out=tmp_path / "sheet.png")
    assert found["neighbors"][0]["path"].endswith("b/3.npy") and found["neighbors"][0]["score"] > 0.9999
    tile = np.asarray(Image.open(tmp_path / "sheet.png"))[16:160, 16:160]
    assert tile.std() > 20 and (tile[..., 0] != tile[..., 1]).any()
    np.save(tmp_path / "four.npy", np.load(copy)[..., :4])
    with pytest.raises(UsageError, match=r"4 channels .* takes 5"):
        search(tmp_path / "four.npy", tmp_path / "index")


def test_weights_prepare_raw_images(made, stacks, tmp_path):
    encoder = load_encoder(made[1])
    assert encoder.value_range == tuple(RANGE) and encoder.in_chans == len(encoder.mean) == 5
    image = np.load(stacks / "b/3.npy")
    x = encoder.preprocess(crop_pct=1.0)(image)
    # nothing is clipped, and noise that is resized keeps its mean
    assert x[1].mean().item() == pytest.approx((0.5 - encoder.mean[1]) / encoder.std[1], abs=0.1)
    export(made[1], tmp_path / "exported", "extrema")
    again = load_encoder(tmp_path / "exported")
    assert (again.mean, again.std, again.value_range) == (encoder.mean, encoder.std, encoder.value_range)
    assert torch.equal(again.preprocess()(image), encoder.preprocess()(image))


def test_begins_from_rgb_weights(made, tmp_path):
    rgb = tiny(tmp_path / "rgb", train={"epochs": 1}, optim={"warmup_epochs": 0.5})
    pretrain(rgb, progress=False)
    cfg = from_dict(
        {"out": str(tmp_path / "five"), "train": {"epochs": 1}, "optim": {"warmup_epochs": 0.5}}, made[0]
    )
    pretrain(cfg, init_from=rgb.out, progress=False)
    env = json.loads((tmp_path / "five/env.json").read_text())
    assert any("adapted from 3 to 5 channels" in text for text in env["init_from"].values())
