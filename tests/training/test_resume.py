"""A run that is stopped in any way ends bit for bit like one that was not.

Covers: 12 steps = 5 + 7 over an epoch's edge with masks, colors and drop-path on (weights, teacher, moments, log
values); SIGKILL at named points of a save and of an evaluation (at random moments: test_kill_data); a damaged newest
checkpoint, none that can be read; skipped steps, weights that are not finite; a run that breaks during a save, saves
that fail; death after the last save; a finished run; changed settings, shapes and images; --init-from.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from extrema_fast import train
from extrema_fast.errors import NonFiniteError, Preempted, StorageError, UsageError
from extrema_fast.files import history
from extrema_fast.models import extrema
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.ops.optimizers import ema_
from extrema_fast.training import checkpoint, step
from extrema_fast.weights.load import load_encoder
from tests.training.conftest import final_hash, status, stop_at, tiny

# 34 images: 4 steps an epoch, two images left out each time
RUN = {
    "data": {"limit": 34},
    # a step and a half
    "head": {"loss": "infonce", "queue": 12},
    "train": {"epochs": 3},
    "ckpt": {"every_steps": 3},
    "log": {"every_steps": 3},
}
STEPS = 12


def pretrain(out: Path, change: dict | None = None, **options) -> Path:
    return train.pretrain(tiny(out, RUN, change or {}), progress=False, **options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The run nothing happened to."""
    return pretrain(tmp_path_factory.mktemp("straight") / "run")


@pytest.fixture
def copy(straight, tmp_path) -> Path:
    """The finished run, to be changed."""
    return Path(shutil.copytree(straight, tmp_path / "run"))


def values(run: Path) -> list[tuple]:
    keys = ("step", "epoch", "images", "loss", "lr", "momentum", "grad_norm", "skipped")
    return [tuple(r[k] for k in keys) for r in history(run / "log.jsonl", "train", STEPS)]


def assert_same(run: Path, straight: Path) -> None:
    assert final_hash(run, STEPS) == final_hash(straight, STEPS)
    assert values(run) == values(straight)
    assert status(run)["state"] == "complete" and status(run)["step"] == STEPS
    for which in ("teacher", "student"):
        name = f"weights/step_{STEPS:08d}/{which}.safetensors"
        assert (run / name).read_bytes() == (straight / name).read_bytes()
    assert not [p for p in run.rglob("*") if ".tmp" in p.name], "unfinished files"


def test_the_reference_learned_something(straight):
    assert [v[0] for v in values(straight)] == [3, 6, 9, 12]
    first, last = values(straight)[0], values(straight)[-1]
    assert last[3] < first[3] and all(v[3] is not None and v[7] == 0 for v in values(straight))


def state(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())


@pytest.mark.parametrize("step", [5, 1, 11])
def test_stopped_and_continued_is_bit_equal(tmp_path, monkeypatch, straight, step):
    run = tmp_path / "run"
    calls: list[str] = []
    spy = {name: partial(calls.append, name) for name in ("collect", "freeze", "unfreeze")}
    monkeypatch.setattr(train, "gc", SimpleNamespace(**spy))
    monkeypatch.setattr(train, "COLLECT_STEPS", 3)
    with monkeypatch.context() as m:
        stop_at(step, m)
        with pytest.raises(Preempted, match=f"after step {step} of {STEPS}") as error:
            pretrain(run)
    assert error.value.exit_code == 75
    assert (status(run)["state"], status(run)["step"]) == ("preempted", step)
    # the last step has no EMA update
    assert state(run, step)["ema_ahead"] is True
    pretrain(run)
    assert_same(run, straight)
    assert state(run, STEPS)["ema_ahead"] is False
    attempts = [r["attempt"] for r in history(run / "log.jsonl", "train", STEPS)]
    assert attempts[-1] == 2 and (step < 3 or attempts[0] == 1)
    # garbage: after steps 3, 6, 9 and 12, wherever the run began
    first, second = ["collect", "freeze"] * (step >= 3), ["collect", "freeze"]
    before, after = max(0, step // 3 - 1), 3 - step // 3
    assert calls == [*first, *["collect"] * before, "unfreeze", *second, *["collect"] * after, "unfreeze"]


@pytest.mark.parametrize("named", [False, True])
def test_a_machine_with_another_precision_is_named(tmp_path, monkeypatch, caplog, named):
    run, auto = tmp_path / "run", {"train": {"epochs": 1, "precision": "auto"}}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    with monkeypatch.context() as m:
        stop_at(1, m)
        with pytest.raises(Preempted):
            pretrain(run, auto)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    if named:
        pretrain(run, {"train": {"epochs": 1, "precision": "bf16"}}, allow_config_change=True)
    else:
        pretrain(run, auto)
    text = "auto is fp32 on this machine and was bf16 before; --train.precision bf16 --allow"
    assert (text in caplog.text) == (not named)
    assert json.loads((run / "env.json").read_text())["precision"] == ("bf16" if named else "fp32")


# the pass at which each point strikes lies between the first save and the end
POINTS = [
    "begin:2",
    "tensors:1",
    "complete:2",
    "renamed:2",
    "latest:1",
    "weights:3",
    "pruned:4",
    "evaluated:3",
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_named_point(tmp_path, command, straight, point):
    cfg, flags = tiny(tmp_path / "run", RUN), ["--eval.every-epochs", "1"] * (point == "evaluated:3")
    codes, _ = command(cfg, *flags, env={"EXTREMA_FAULT": point})
    assert codes == [-signal.SIGKILL] and status(tmp_path / "run")["state"] == "running"
    codes, text = command(cfg, *flags)
    assert codes == [0], text
    assert_same(tmp_path / "run", straight)
    if flags:
        evals = history(tmp_path / "run" / "log.jsonl", "eval", STEPS)
        assert [r["step"] for r in evals] == [0, 4, 8, 12]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run stopped after step 7: checkpoints 6 and 7."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as m:
        stop_at(7, m)
        with pytest.raises(Preempted):
            pretrain(run)
    return run


@pytest.fixture
def half(stopped, tmp_path) -> Path:
    """That run, to be continued and changed."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_damaged_newest_checkpoint(half, straight, caplog):
    # weights can be read while a run goes on
    assert load_encoder(half).embed_dim == 16
    path = half / "checkpoints" / "step_00000007" / "state.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    pretrain(half)
    assert "falling back" in caplog.text
    assert_same(half, straight)


def test_only_damaged_checkpoints_stop_the_run(half, straight):
    for path in half.glob("checkpoints/step_*/state.safetensors"):
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
    before = {p: p.read_bytes() for p in half.rglob("*") if p.is_file()}
    with pytest.raises(StorageError, match=r"step_00000007: .* has changed .*--overwrite") as error:
        pretrain(half)
    assert error.value.exit_code == 5
    assert {p: p.read_bytes() for p in half.rglob("*") if p.is_file()} == before
    # the remedy
    pretrain(half, overwrite=True, init_from=half / "weights" / "step_00000007")
    assert status(half)["state"] == "complete" and final_hash(half, STEPS) != final_hash(straight, STEPS)


@pytest.mark.parametrize("stops", [False, True])
def test_nothing_is_saved_while_steps_are_skipped(tmp_path, monkeypatch, caplog, stops):
    original, calls = ExtreMA.loss, []

    def bad(self, *args):
        calls.append(1)
        return original(self, *args) * (float("nan") if len(calls) in (6, 7) else 1)

    monkeypatch.setattr(ExtreMA, "loss", bad)
    run, change = tmp_path / "run", {"ckpt": {"retain": 9}}
    if stops:
        stop_at(7, monkeypatch)
        with pytest.raises(Preempted):
            pretrain(run, change)
    else:
        pretrain(run, change)
    saved = [int(p.name[5:]) for p in sorted((run / "checkpoints").iterdir())]
    # the checkpoint of step 6 waits; a stopped run keeps the finite weights that step 5 left
    assert saved == ([3, 7] if stops else [3, 8, 9, 12])
    assert caplog.text.count("step 6 was skipped") == 1 and "step 7 was skipped" not in caplog.text


# at a save that may fail, between two, and at the last step
@pytest.mark.parametrize(("step", "left"), [(6, [3]), (7, [3, 6]), (STEPS, [6, 9])])
def test_weights_that_are_not_finite_leave_the_checkpoints(tmp_path, monkeypatch, straight, step, left):
    original, run = train.train_step, tmp_path / "run"

    def spoiled(run, batch):
        stats = original(run, batch)
        if run.step + 1 == step:
            with torch.no_grad():
                next(run.method.student.parameters()).view(-1)[0] = float("nan")
        return stats

    with monkeypatch.context() as m:
        m.setattr(train, "train_step", spoiled)
        with pytest.raises(NonFiniteError) as error:
            pretrain(run, {"ckpt": {"retain": 2}})
    assert error.value.exit_code == 3 and status(run)["state"] == "failed"
    for folder in ("checkpoints", "weights"):
        assert sorted(int(p.name[5:]) for p in (run / folder).iterdir()) == left
    pretrain(run)
    assert_same(run, straight)


def test_a_run_that_breaks_waits_for_the_save_under_way(tmp_path, monkeypatch, straight):
    original, write, broken = train.train_step, checkpoint.save_file, threading.Event()

    def breaking(run, batch):
        if run.step == 4:
            broken.set()
            raise ZeroDivisionError
        return original(run, batch)

    def waiting(*args):
        assert broken.wait(240)
        write(*args)

    with monkeypatch.context() as m:
        m.setattr(train, "train_step", breaking)
        m.setattr(checkpoint, "save_file", waiting)
        with pytest.raises(ZeroDivisionError):
            pretrain(tmp_path / "run")
    assert (tmp_path / "run" / "latest").read_text() == "step_00000003\n"
    pretrain(tmp_path / "run")
    assert_same(tmp_path / "run", straight)


def test_the_third_save_that_fails_ends_the_run(tmp_path, monkeypatch, straight):
    original, run = train.train_step, tmp_path / "run"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def waiting(run, batch):
        for thread in threading.enumerate():
            if thread.name == "save":
                thread.join()
        return original(run, batch)

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save_file", full)
        m.setattr(train, "train_step", waiting)
        with pytest.raises(StorageError, match=r"checkpoint of step 9 .*No space left") as error:
            pretrain(run)
    # after the next step, not only at the next save
    assert error.value.exit_code == 5 and (status(run)["state"], status(run)["step"]) == ("failed", 10)
    pretrain(run)
    assert_same(run, straight)


def test_died_after_the_last_save(copy, straight):
    (copy / "status.json").write_text('{"state": "running", "step": 9}')
    pretrain(copy)
    assert_same(copy, straight)


def test_a_finished_run_is_left_alone(copy, caplog):
    caplog.set_level("INFO")
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    assert pretrain(copy) == copy and "complete" in caplog.text
    with pytest.raises(UsageError, match=r"optim\.momentum"):
        pretrain(copy, {"optim": {"momentum": 0.5}})
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before


def test_changed_settings(half, caplog):
    contents = {p: p.read_bytes() for p in half.rglob("*") if p.is_file()}
    for change, words in (
        ({"mask": {"ratio": 0.75}}, r"mask.ratio: 0.5 -> 0.75.*--allow-config-change"),
        ({"model": {"depth": 3}}, r"another architecture \(model.depth: 2 -> 3\)"),
        ({"data": {"limit": 40}}, "data fingerprint"),
    ):
        with pytest.raises(UsageError, match=words):
            pretrain(half, change)
    assert {p: p.read_bytes() for p in half.rglob("*") if p.is_file()} == contents
    pretrain(half, {"optim": {"weight_decay": 0.0}}, allow_config_change=True)
    assert "optim.weight_decay: 0.1 -> 0.0" in caplog.text and status(half)["state"] == "complete"
    assert "continued on other images" not in caplog.text


def test_other_images_are_said_in_the_log(half):
    pretrain(half, {"data": {"limit": 40}}, allow_config_change=True)
    lines = map(json.loads, (half / "log.jsonl").read_text().splitlines())
    said = [line["text"] for line in lines if line["kind"] == "warning"]
    assert any("continued on other images" in text for text in said)


def test_a_longer_run_makes_up_for_the_last_ema_update(copy, monkeypatch):
    weights = []
    for module in (extrema, step):
        monkeypatch.setattr(
            module, "ema_", lambda t, s, w, *skip: (weights.append(float(w)), ema_(t, s, w, *skip))[1]
        )
    pretrain(copy, {"train": {"epochs": 4}}, allow_config_change=True)
    # the one left out at step 12, then one per step; the last has no weight
    assert len(weights) == 1 + 4 and weights[-1] == 0 and all(weights[:-1])


def test_overwrite_starts_again(half, straight):
    pretrain(half, overwrite=True)
    assert_same(half, straight)
    assert (half.with_name("run.old-1") / "checkpoints" / "step_00000007").is_dir()


def test_init_from(tmp_path, straight, half, caplog):
    caplog.set_level("INFO")
    # the rate is 0 at step 0, so one step leaves the student as it was read
    change = {"train": {"seed": 5, "epochs": 1}, "ckpt": {"every_steps": 1, "retain": 9}}
    pretrain(tmp_path / "new", change, init_from=straight)
    first = load_file(tmp_path / "new" / "weights" / "step_00000001" / "student.safetensors")
    source = load_file(straight / "weights" / f"step_{STEPS:08d}" / "student.safetensors")
    assert all((first[k] == source[k]).all() for k in source)
    pretrain(half, init_from=straight)
    assert "--init-from" in caplog.text and "ignored" in caplog.text
    assert_same(half, straight)
    with pytest.raises(UsageError, match="another architecture") as error:
        pretrain(tmp_path / "other", {"model": {"width": 32}}, init_from=straight)
    assert "\n" not in str(error.value) and not (tmp_path / "other").exists()
