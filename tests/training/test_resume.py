"""A run that is stopped in any way ends bit for bit like one that was not.

Covers: 12 steps = 5 + 7 over an epoch's edge with masks, colours and drop-path on (weights, teacher,
moments, log values); SIGKILL at named points of a save and of an evaluation; death at random moments; a
damaged newest checkpoint; death after the last save; a finished run; changed settings, shapes and images;
--init-from.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from extrema_fast import train
from extrema_fast.config import Config, from_dict, smoke
from extrema_fast.errors import Preempted, UsageError
from extrema_fast.training.logging import history
from extrema_fast.weights.load import load_encoder

TINY = {
    "data": {"loader": "pil", "threads": 1, "limit": 34},
    "model": {"width": 16, "depth": 2, "drop_path": 0.2, "patch_size": 16},
    "mask": {"ratio": 0.5},
    "head": {"loss": "infonce", "hidden": 16, "out": 8, "predictor_hidden": 16},
    "optim": {"base_lr": 0.02},
    # 34 images: 4 steps per epoch, two images left out each time
    "train": {"epochs": 3, "batch_size": 8},
    "ckpt": {"every_epochs": 0, "every_steps": 3},
    "eval": {"every_epochs": 0},
    "log": {"every_steps": 3},
}
STEPS = 12


def tiny(out: Path, **change) -> Config:
    cfg = from_dict(TINY | {"out": str(out)}, smoke())
    return from_dict(change, cfg)


def flags(out: Path) -> list[str]:
    """The same configuration for a process of its own."""
    file = out.with_suffix(".json")
    file.write_text(json.dumps(TINY))
    return ["pretrain", "smoke", "--config", str(file), "--out", str(out)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The run nothing happened to."""
    return train.pretrain(tiny(tmp_path_factory.mktemp("straight") / "run"), progress=False)


def final_hash(run: Path) -> str:
    """sha256 of the last checkpoint's tensors: weights, teacher, moments, counters."""
    folder = run / "checkpoints" / f"step_{STEPS:08d}"
    return json.loads((folder / "COMPLETE").read_text())["state.safetensors"]["sha256"]


def values(run: Path) -> list[tuple]:
    keys = ("step", "epoch", "images", "loss", "lr", "momentum", "grad_norm", "skipped")
    return [tuple(r[k] for k in keys) for r in history(run / "log.jsonl", "train", STEPS)]


def assert_same(run: Path, straight: Path) -> None:
    assert final_hash(run) == final_hash(straight)
    assert values(run) == values(straight)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "complete" and status["step"] == STEPS
    for which in ("teacher", "student"):
        name = f"weights/step_{STEPS:08d}/{which}.safetensors"
        assert (run / name).read_bytes() == (straight / name).read_bytes()
    assert not [p for p in run.rglob("*") if ".tmp" in p.name], "debris"


def stop_at(step: int, monkeypatch) -> None:
    """SIGTERM arrives during that step."""
    original = train.train_step

    def stopping(run, batch):
        if run.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, batch)

    monkeypatch.setattr(train, "train_step", stopping)


def test_the_reference_learned_something(straight):
    assert [v[0] for v in values(straight)] == [3, 6, 9, 12]
    first, last = values(straight)[0], values(straight)[-1]
    assert last[3] < first[3] and all(v[3] is not None and v[7] == 0 for v in values(straight))


@pytest.mark.parametrize("step", [5, 1, 11])
def test_stopped_and_continued_is_bit_equal(tmp_path, monkeypatch, straight, step):
    cfg = tiny(tmp_path / "run")
    with monkeypatch.context() as m:
        stop_at(step, m)
        with pytest.raises(Preempted, match=f"after step {step} of {STEPS}") as error:
            train.pretrain(cfg, progress=False)
    assert error.value.exit_code == 75
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", step)
    state = json.loads((tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    assert state["ema_ahead"] is True
    train.pretrain(cfg, progress=False)
    assert_same(tmp_path / "run", straight)
    attempts = [r["attempt"] for r in history(tmp_path / "run" / "log.jsonl", "train", STEPS)]
    assert attempts[-1] == 2 and (step < 3 or attempts[0] == 1)


def test_the_last_step_moves_no_teacher(straight):
    state = json.loads((straight / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())
    assert state["ema_ahead"] is False


# the pass at which each point strikes lies between the first save and the end
POINTS = ["begin:2", "tensors:1", "complete:2", "renamed:2", "latest:1", "weights:3", "pruned:4"]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_named_point(tmp_path, run_cli, straight, point):
    codes, _ = run_cli(*flags(tmp_path / "run"), env={"EXTREMA_FAULT": point})
    assert codes == [-signal.SIGKILL]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "running"
    codes, text = run_cli(*flags(tmp_path / "run"))
    assert codes == [0], text
    assert_same(tmp_path / "run", straight)


def test_killed_in_an_evaluation(tmp_path, run_cli):
    args = [*flags(tmp_path / "run"), "--eval.every-epochs", "1"]
    codes, _ = run_cli(*args, env={"EXTREMA_FAULT": "evaluated:3"})
    assert codes == [-signal.SIGKILL]
    codes, text = run_cli(*args)
    assert codes == [0], text
    assert [r["step"] for r in history(tmp_path / "run" / "log.jsonl", "eval", STEPS)] == [0, 4, 8, 12]


# writes the CPU seconds of a whole run into a file
TIMED = """
import pathlib, time, extrema_fast.cli as cli
main = cli.main
def timed(args):
    code = main(args)
    pathlib.Path({file!r}).write_text(str(time.process_time()))
    return code
cli.main = timed
"""


def test_killed_at_random_moments(tmp_path, run_cli, straight, seed):
    moments = random.Random(seed)
    codes, text = run_cli(*flags(tmp_path / "whole"), setup=TIMED.format(file=str(tmp_path / "seconds")))
    assert codes == [0], text
    # in CPU seconds, which a busy machine does not stretch, and in parts of what a whole run takes
    whole = float((tmp_path / "seconds").read_text())
    args, died = flags(tmp_path / "run"), 0
    for latest in (0.5, 0.9, 0.9, 0.9):
        codes, text = run_cli(*args, cpu_seconds=whole * moments.uniform(0.02, latest))
        assert codes in ([-signal.SIGPROF], [0]), text
        died += codes != [0]
    codes, text = run_cli(*args)
    assert codes == [0], text
    assert died, "no moment was early enough"
    assert_same(tmp_path / "run", straight)


@pytest.fixture
def half(tmp_path, monkeypatch) -> Path:
    """A run stopped after step 7: checkpoints 6 and 7."""
    with monkeypatch.context() as m:
        stop_at(7, m)
        with pytest.raises(Preempted):
            train.pretrain(tiny(tmp_path / "run"), progress=False)
    return tmp_path / "run"


def test_damaged_newest_checkpoint(half, straight, caplog):
    path = half / "checkpoints" / "step_00000007" / "state.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    train.pretrain(tiny(half), progress=False)
    assert "falling back" in caplog.text
    assert_same(half, straight)


def test_died_after_the_last_save(tmp_path, straight):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "status.json").write_text('{"state": "running", "step": 9}')
    train.pretrain(tiny(run), progress=False)
    assert_same(run, straight)


def test_a_finished_run_is_left_alone(tmp_path, straight, caplog):
    caplog.set_level("INFO")
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert train.pretrain(tiny(run), progress=False) == run
    assert "complete" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    with pytest.raises(UsageError, match=r"optim\.momentum"):
        train.pretrain(tiny(run, optim={"momentum": 0.5}), progress=False)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": {"ratio": 0.75}}, r"mask.ratio: 0.5 -> 0.75.*--allow-config-change"),
        ({"model": {"depth": 3}}, r"another architecture \(model.depth: 2 -> 3\)"),
        ({"data": {"limit": 40}}, "data fingerprint"),
    ],
)
def test_changed_settings_are_refused(half, change, words):
    contents = {p: p.read_bytes() for p in half.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match=words):
        train.pretrain(tiny(half, **change), progress=False)
    assert {p: p.read_bytes() for p in half.rglob("*") if p.is_file()} == contents


def test_changed_settings_allowed(half, caplog):
    train.pretrain(tiny(half, optim={"weight_decay": 0.0}), allow_config_change=True, progress=False)
    assert "optim.weight_decay: 0.1 -> 0.0" in caplog.text
    assert json.loads((half / "status.json").read_text())["state"] == "complete"


def test_a_longer_run_makes_up_for_the_teachers_move(tmp_path, straight, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    moved = []
    from extrema_fast.models.extrema import ExtreMA

    # the one that makes up for it, and the steps' own
    update = ExtreMA.ema_update
    monkeypatch.setattr(ExtreMA, "ema_update", lambda self, w: (moved.append(float(w)), update(self, w))[1])
    train.pretrain(tiny(run, train={"epochs": 4}), allow_config_change=True, progress=False)
    # the move left out at step 12, then one per step; the last has no weight
    assert len(moved) == 1 + 4 and moved[-1] == 0 and all(moved[:-1])


def test_overwrite_starts_anew(half, straight):
    train.pretrain(tiny(half), overwrite=True, progress=False)
    assert_same(half, straight)
    assert (half.with_name("run.old-1") / "checkpoints" / "step_00000007").is_dir()


def test_init_from(tmp_path, straight, half, caplog):
    caplog.set_level("INFO")
    # the rate is 0 at step 0, so one step leaves the student as it was read
    cfg = tiny(tmp_path / "new", train={"seed": 5, "epochs": 1}, ckpt={"every_steps": 1, "retain": 9})
    train.pretrain(cfg, init_from=straight, progress=False)
    first = load_file(tmp_path / "new" / "weights" / "step_00000001" / "student.safetensors")
    source = load_file(straight / "weights" / f"step_{STEPS:08d}" / "student.safetensors")
    assert all((first[k] == source[k]).all() for k in source)
    train.pretrain(tiny(half), init_from=straight, progress=False)
    assert "--init-from" in caplog.text and "ignored" in caplog.text
    assert_same(half, straight)


def test_init_from_another_architecture(tmp_path, straight):
    with pytest.raises(UsageError, match="another architecture") as error:
        train.pretrain(tiny(tmp_path / "new", model={"width": 32}), init_from=straight, progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_weights_are_readable_while_running(half):
    assert load_encoder(half).embed_dim == 16
