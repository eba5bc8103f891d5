"""The race between methods: what it does without lightly, with it, and what it says of the results.

Covers: others are left out with a line where lightly is missing, and finished runs are taken as they are; the rules
that scale published settings, and whitened patch kernels; a step of every method moves student and teacher; standings
over seeds and settings.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks import race
from benchmarks.__main__ import main
from benchmarks.harness import read_record
from extrema_fast.config import from_dict, nested, preset
from extrema_fast.models.layers import whiten_kernel


def test_without_lightly_ours_races_and_is_kept(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lightly" else find(name, *a)
    )
    command = ["race", "--quick", "--methods", "extrema_byol", "mae", "--out", str(tmp_path / "records")]
    command += ["--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert main(command) == 0
    record = read_record(next((tmp_path / "records").glob("*race")))
    (row,) = record["rows"]
    assert row["method"] == "extrema_byol" and row["points"][-1]["steps"] >= 1
    assert row["points"][-1]["minutes"] >= record["minutes"] == 0.003
    assert list(record["not_run"]) == ["mae"] and "lightly" in record["not_run"]["mae"]
    figure = next((tmp_path / "records").glob("*/race.svg")).read_text()
    assert "ours, BYOL" in figure and len(figure) < 100_000
    # the same command trains nothing again; other minutes are another run
    monkeypatch.setattr(race.Ring, "_train", lambda *_: pytest.fail("trained again"))
    assert main(command) == 0
    assert "extrema_byol" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "word"),
    [(["--methods", "maee"], "'mae'"), (["--minutes", "0"], "--minutes"), (["--points", "0"], "--points")],
)
def test_wrong_options_are_one_line(argv, word, capsys):
    assert main(["race", *argv]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


def test_published_settings_are_scaled_by_their_rules():
    def at(batch, method, **more):
        cfg = from_dict(nested({"train.batch_size": batch, **more}), preset("cifar10"))
        return race.published(method, cfg)

    for method in race.THEIRS:
        factor = {"simclr": 2.0, "lejepa": 1.0}.get(method, 4.0)
        assert at(256, method).rate == pytest.approx(factor * at(64, method).rate), method
    # 96 of 224 pixels, in whole patches; blur is for large pictures
    assert at(64, "dino").views["local_crop_size"] == 12 and at(64, "dino").views["gaussian_blur"][0] == 0
    large = {"model.img_size": (224, 224), "model.patch_size": 16}
    assert at(64, "dino", **large).views["local_crop_size"] == 96
    assert at(64, "simclr", **large).views["gaussian_blur"] == 0.5
    assert race.short("dino", preset("cifar10")).rate == preset("cifar10").peak_lr


@pytest.mark.parametrize("settings", race.SETTINGS)
@pytest.mark.parametrize("method", race.THEIRS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_step_moves_student_and_teacher(method, settings):
    pytest.importorskip("lightly")
    pytest.importorskip("timm")
    from PIL import Image

    pixels = torch.randint(
        256, (16, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = [Image.fromarray(p.numpy()) for p in pixels]
    ring = type("Ring", (), {"cfg": preset("smoke"), "device": torch.device("cpu"), "images": images})
    racer = race.Theirs(ring, method, settings, 0)
    student = [p.detach().clone() for p in racer.trained]
    teachers = [t for _, t in racer.parts.followed]
    teacher = [p.detach().clone() for t in teachers for p in t.parameters()]
    for progress in (0.3, 0.6):
        racer.step(racer.fetch(), progress)
    after = [p for t in teachers for p in t.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(student, racer.trained, strict=True))
    assert not teacher or any(not torch.equal(a, b) for a, b in zip(teacher, after, strict=True))
    out = racer.encoder.encode(torch.zeros(2, 3, 32, 32))
    assert out.cls.shape == (2, 64) and out.patches.shape == (2, 16, 64) and out.cls.isfinite().all()


@pytest.mark.parametrize("method", ["simclr", "dino"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_whitened_changes_the_patch_kernels_alone(method):
    pytest.importorskip("lightly")
    pytest.importorskip("timm")
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(race.THEIRS[method](preset("smoke")))
    before, after = made
    race.whiten(after)
    modules = [[*parts.trained, *(teacher for _, teacher in parts.followed)] for parts in made]
    kernels = 0
    for old, new in zip(*modules, strict=True):
        want = old.state_dict()
        for name in want:
            if name.endswith("patch_embed.proj.weight"):
                want[name], kernels = whiten_kernel(want[name]), kernels + 1
        torch.testing.assert_close(new.state_dict(), want, rtol=0, atol=0)
    # dino has a teacher
    assert kernels == (2 if method == "dino" else 1)


def row(method: str, settings: str, seed: int, start: float, end: float) -> dict:
    points = [{"minutes": m, "steps": 9, "cls": v, "mean": 0.5} for m, v in ((0.0, start), (2.0, end))]
    more = {"epochs": 1.0, "share_of_augmentation": 0.5, "clock_s": 3.0, "parameters": 7}
    key = f"{method} {settings}"
    entry = {"key": key, "method": method, "settings": settings, "seed": seed, "feature": "cls"}
    return entry | {"points": points, **more}


def test_standings_take_the_better_settings_and_the_mean_of_seeds():
    rows = [row("mae", "published", s, 0.2, v) for s, v in ((0, 0.3), (1, 0.5))]
    # one lucky seed does not count more than two
    rows += [row("mae", "short", 0, 0.2, 0.45), row("extrema_byol", "preset", 0, 0.2, 0.35)]
    broken = {
        "key": "dino short",
        "method": "dino",
        "settings": "short",
        "seed": 0,
        "error": "seed 0: not finite",
    }
    record = {"rows": [*rows, broken], "minutes": 2.0}
    race.standings(record)
    third, first, second = record["standings"]
    assert (first["key"], first["counts"]) == ("mae published", True)
    assert first["curve"][-1] == {
        "minutes": 2.0,
        "mean": pytest.approx(0.4),
        "stdev": pytest.approx(0.141421, 1e-4),
    }
    assert (second["key"], second["counts"]) == ("extrema_byol preset", True)
    assert (third["key"], third["counts"]) == ("mae short", False)
    assert record["headline"] == "k-NN after 2 minutes: mae 40.0%, extrema_byol 35.0%"


def test_later_seeds_race_with_the_better_settings():
    rows = [row("mae", "published", 0, 0.2, 0.3), row("mae", "short", 0, 0.2, 0.4)]
    rows += [row("extrema_byol", "preset", 0, 0.2, 0.1)]
    broken = {"method": "dino", "settings": "short", "seed": 0, "error": "seed 0: not finite"}
    entries = [(r["method"], r["settings"]) for r in (*rows, broken)] + [("dino", "published")]
    rows += [broken, row("dino", "published", 0, 0.3, 0.2)]
    assert race.better(rows, entries) == [
        ("mae", "short"),
        ("extrema_byol", "preset"),
        ("dino", "published"),
    ]
