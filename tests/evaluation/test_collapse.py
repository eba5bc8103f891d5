"""Collapse seen in the outputs of training batches: measures against their definitions, the rule on known courses, and
short runs: one that collapses is warned of within 200 steps, the recipes of `photos` and `smoke` are not.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from extrema_fast import pretrain
from extrema_fast.config import from_dict, nested, preset, typed
from extrema_fast.data.photos import PHOTOS_RECIPE, write_photos
from extrema_fast.evaluation.collapse import OUTPUTS, checks_spread, spread_warning
from extrema_fast.evaluation.probes import batch_spread, indicators
from extrema_fast.files import read_log


def test_spread_and_directions_by_definition():
    g = torch.Generator().manual_seed(0)
    target = torch.randn(12, 6, generator=g) + 1
    views = [torch.randn(12, 6, generator=g) * (i + 1) - 0.5 for i in range(3)]
    got = batch_spread(torch.cat(views), target).tolist()

    def expected(x):
        eigenvalues = torch.linalg.eigvalsh(torch.cov(torch.nn.functional.normalize(x, dim=1).double().T))
        dims = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
        return (1 - indicators(x)["cosine"]) ** 0.5, float(dims)

    want = [sum(v) / 3 for v in zip(*map(expected, views), strict=True)]
    assert got == pytest.approx([*want, *expected(target)], rel=1e-4)
    # constant up to rounding, and one direction
    line = torch.linspace(-1, 1, 12)[:, None] * torch.randn(1, 6, generator=g) + torch.eye(6)[0]
    flat = batch_spread(torch.ones(12, 6), line)
    assert flat[0] < 1e-3 and flat[2] > 0.1 and flat[3] < 2


HEALTHY = (0.6, 2.4, 0.6, 2.2)


@pytest.mark.parametrize(
    ("course", "word"),
    [
        ([HEALTHY] * 6, ""),
        ([HEALTHY, *[(0.9, 5.0, 0.8, 3.5)] * 5], ""),
        # a random encoder that is nearly constant, and moves away from that
        ([(8e-4, 1.4, 8e-4, 1.3), *[(0.01 * i, 2.0, 0.002 * i, 1.4) for i in range(1, 6)]], ""),
        ([(8e-4, 1.4, 8e-4, 1.3), *[(0.04, 2.0, 0.01, 1.4)] * 3, *[(0.01, 2.0, 0.01, 1.4)] * 3], ""),
        # one batch of images that are alike, and a contraction that ends
        ([HEALTHY, HEALTHY, (0.1, 1.05, 0.1, 1.05), HEALTHY, HEALTHY], ""),
        ([HEALTHY, HEALTHY, *[(0.42, 1.4, 0.55, 1.3)] * 4], ""),
        ([HEALTHY, HEALTHY, *[(0.1, 2.0, 0.5, 2.0)] * 3], "predictions 0.1"),
        ([HEALTHY, HEALTHY, *[(0.5, 2.0, 0.1, 2.0)] * 3], "targets 0.1"),
        ([(0.0, 1.0, 0.5, 2.0)] * 3, "predictions 0 "),
        ([HEALTHY, HEALTHY, *[(0.5, 1.05, 0.5, 1.1)] * 3], "directions"),
        # of a skipped step
        ([HEALTHY, HEALTHY, (None,) * 4, *[(0.1, 2.0, 0.5, 2.0)] * 3], "predictions 0.1"),
        ([(None,) * 4] * 6, ""),
        ([(0.0, 1.0, 0.0, 1.0)] * 2, ""),
    ],
)
def test_rule_on_known_courses(course, word):
    history = [{"step": 20 * i or 1} | dict(zip(OUTPUTS, row, strict=True)) for i, row in enumerate(course)]
    text = spread_warning(history, "byol")
    assert bool(text) == bool(word) and word in text and "\n" not in text
    assert not text or ("optim.base_lr" in text and "head.loss infonce" in text)
    assert "infonce" not in spread_warning(history, "infonce")


def test_checked_at_least_every_hundred_steps():
    steps = [i for i in range(1, 2001) if checks_spread(i)]
    assert steps[0] == 1 and sum(i <= 200 for i in steps) > 10
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 100


TINY = {
    "data.test": "",
    "data.limit": 160,
    "data.threads": 1,
    "data.resident": "host",
    "mask.views": 3,
    "mask.keep": 3,
    "model.img_size": (32, 32),
    "model.patch_size": 8,
    "model.width": 32,
    "model.depth": 1,
    "model.heads": 1,
    "head.hidden": 64,
    "head.out": 32,
    "head.predictor_hidden": 64,
    "train.batch_size": 8,
    "train.epochs": 10,
    "train.precision": "fp32",
    "optim.warmup_epochs": 0.5,
    "ckpt.every_epochs": 0,
    "ckpt.every_steps": 0,
    "eval.every_epochs": 0,
    "log.every_steps": 100,
    "log.report": False,
}


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("photos", {}),
        ("smoke", {}),
        ("photos", {"head.loss": "byol", "optim.momentum": 0.0, "optim.base_lr": 3.2e-2}),
    ],
    ids=["photos", "smoke", "collapses"],
)
def test_a_collapsing_run_says_so_within_200_steps_and_presets_never(base, changes, tmp_path):
    # 162 crops of the photographs of `photos`
    folder = write_photos(PHOTOS_RECIPE | {"counts": {"train": 9, "test": 1}}) / "train"
    options = TINY | changes | {"data.train": str(folder), "out": str(tmp_path / "run")}
    out = pretrain(from_dict(nested(typed(options)), preset(base)), progress=False)
    log = read_log(out / "log.jsonl")
    told = [r for r in log if r["kind"] == "warning" and "become alike" in r["text"]]
    assert [r["step"] for r in log if r["kind"] == "spread"] == [1, *range(20, 201, 20)]
    # once, however long it lasts
    assert len(told) == (1 if changes.get("head.loss") else 0)
