"""Checkpoints and the run folder under faults, without training.

Covers: everything restored bit for bit; what COMPLETE, `latest` and retention hold; truncated, flipped,
unmarked and missing files, weights that are not finite, another format; only what was read or written is
removed; what changes while a save is written; a rename or a write that fails, once and three times; little
space; stale temporaries; other shapes; which differences a resumed run may have; marker, lock, --overwrite,
status on a slow disk.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from extrema_fast.config import CheckpointConfig, config_hash, from_dict, smoke, to_dict
from extrema_fast.errors import NonFiniteError, StorageError, UsageError
from extrema_fast.files import new_folder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.training import checkpoint, run_folder
from extrema_fast.training.checkpoint import (
    check_same,
    collect,
    newest,
    remove_temporaries,
    restore,
)
from extrema_fast.training.counters import Counters
from extrema_fast.training.optim import build_optimizer
from extrema_fast.training.resolve import checkpoint_bytes
from extrema_fast.training.run import warn_of_space
from extrema_fast.training.run_folder import RunFolder, check
from extrema_fast.weights.folder import save_weights

CFG = from_dict(
    {"model": {"width": 16, "depth": 1}, "head": {"hidden": 8, "out": 8, "predictor_hidden": 8}}, smoke()
)
STATE = {"config": {}, "total_steps": 10, "ema_ahead": True}
SMALL = {"x": torch.arange(100.0), "y": torch.ones(3, 2)}


def trained(cfg=CFG, steps: int = 2):
    """(method, optimizer, counters) with moments, as after some steps on random gradients."""
    method = ExtreMA(cfg)
    optimizer, counters = build_optimizer(method, cfg), Counters()
    for _ in range(steps):
        for _, p in method.student_parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        method.ema_update(1 - 0.9)
        counters.add(torch.rand(()), torch.rand(()), torch.zeros(()))
    return method, optimizer, counters


def put(run: Path, step: int, tensors: dict, state: dict = STATE) -> Path:
    """A checkpoint of these tensors, whatever they are."""
    with new_folder(run / "checkpoints" / f"step_{step:08d}") as new:
        checkpoint.complete(new, step, state, checkpoint.write(new, tensors))
    return run / "checkpoints" / f"step_{step:08d}"


def save(run: Path, step: int) -> Path:
    return put(run, step, SMALL)


def export(folder: Path, tensors: dict) -> None:
    (folder / "w").write_text("x")


class Saver(checkpoint.Saver):
    """Waits for each save, so that what it left can be looked at."""

    def save(self, *args, **options) -> None:
        super().save(*args, **options)
        self.wait()


def files(run: Path) -> set[str]:
    return {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}


def test_everything_is_restored(tmp_path):
    method, optimizer, counters = trained()
    put(tmp_path, 7, collect(method, optimizer, counters.tensor), STATE | {"note": "x"})
    found = newest(tmp_path)
    assert found.step == 7 and found.state["note"] == "x"

    other = trained(from_dict({"train": {"seed": 1}}, CFG), steps=1)
    restore(found.tensors(), other[0], other[1], other[2].tensor)
    before, after = (collect(m, o, c.tensor) for m, o, c in ((method, optimizer, counters), other))
    assert before.keys() == after.keys()
    assert any(k.endswith("exp_avg_sq") for k in before) and any("teacher_branch" in k for k in before)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_before_the_first_step_and_other_shapes():
    method, optimizer, counters = trained(steps=0)
    tensors = collect(method, optimizer, counters.tensor)
    other = trained(steps=1)
    restore(tensors, other[0], other[1], other[2].tensor)
    assert not any(other[1].state.values()), "moments of another run were kept"
    other = trained(from_dict({"model": {"depth": 2}}, CFG), steps=0)
    with pytest.raises(UsageError, match="another architecture"):
        restore(tensors, other[0], other[1], other[2].tensor)


def test_what_a_checkpoint_holds(tmp_path):
    Saver(tmp_path, CheckpointConfig(), 10).save(12, SMALL, STATE, export)
    folder = tmp_path / "checkpoints" / "step_00000012"
    assert (tmp_path / "latest").read_text().strip() == folder.name
    inside = {f"checkpoints/{folder.name}/{n}" for n in ("COMPLETE", "state.json", "state.safetensors")}
    assert files(tmp_path) == {"latest", f"weights/{folder.name}/w"} | inside
    marks = json.loads((folder / "COMPLETE").read_text())
    for name, mark in marks.items():
        assert mark["size"] == (folder / name).stat().st_size and len(mark["sha256"]) == 64
    with safe_open(folder / "state.safetensors", "pt") as f:
        assert set(f.keys()) == set(SMALL)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda folder: os.truncate(folder / "state.safetensors", 500),
    "flipped byte": lambda folder: flip(folder / "state.safetensors"),
    "flipped state": lambda folder: flip(folder / "state.json"),
    "no COMPLETE": lambda folder: (folder / "COMPLETE").unlink(),
    "garbage in COMPLETE": lambda folder: (folder / "COMPLETE").write_text(
        '{"state.safetensors": 1, "state.json": 2}'
    ),
    "torn COMPLETE": lambda folder: os.truncate(folder / "COMPLETE", 20),
    "no tensors": lambda folder: (folder / "state.safetensors").unlink(),
    "not finite": lambda folder: put(
        folder.parents[1], int(folder.name[5:]), SMALL | {"method.w": torch.tensor([1, float("nan")])}
    ),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_falls_back_and_says_so(tmp_path, how, caplog):
    save(tmp_path, 1)
    newer = save(tmp_path, 2)
    assert newest(tmp_path).step == 2
    DAMAGES[how](newer)
    assert newest(tmp_path).step == 1
    assert str(newer) in caplog.text and "falling back" in caplog.text
    DAMAGES[how](tmp_path / "checkpoints" / "step_00000001")
    with pytest.raises(StorageError, match=rf"--out {tmp_path}: .*{newer}: .*--overwrite") as error:
        newest(tmp_path)
    assert error.value.exit_code == 5 and "\n" not in str(error.value)


def test_another_format_stops(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "FORMAT", 9)
        save(tmp_path, 2)
    with pytest.raises(StorageError, match="step_00000002: checkpoint format 9, this version reads 1 and 2"):
        newest(tmp_path)


def steps(run: Path) -> tuple[list[int], list[int]]:
    """The steps that have checkpoints and weights."""
    return tuple(sorted(int(p.name[5:]) for p in (run / d).iterdir()) for d in ("checkpoints", "weights"))


def test_only_what_was_read_or_written_is_removed(tmp_path):
    before = Saver(tmp_path, CheckpointConfig(retain=9), 10)
    for step in (1, 2, 3, 4, 8):
        before.save(step, SMALL, STATE, export)
    for step, how in {2: "flipped byte", 4: "no COMPLETE", 8: "truncated"}.items():
        DAMAGES[how](tmp_path / "checkpoints" / f"step_{step:08d}")
    saver = Saver(tmp_path, CheckpointConfig(retain=2), 10, resumed=3)
    saver.save(5, SMALL, STATE, export)
    assert steps(tmp_path) == ([2, 3, 4, 5, 8], [2, 3, 4, 5, 8])
    saver.save(6, SMALL, STATE, export)
    assert steps(tmp_path) == ([2, 4, 5, 6, 8], [2, 4, 5, 6, 8])


VALUES = {
    "method.w": (float("nan"), float("inf")),
    "optimizer.w.exp_avg": (float("nan"),),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in VALUES.items() for v in values])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, caplog, name, value):
    saver = Saver(tmp_path, CheckpointConfig(retain=2), 10)
    saver.save(1, SMALL, STATE, export)
    before, bad = files(tmp_path), SMALL | {name: torch.tensor([0.0, value])}
    for step in range(2, 6):
        saver.save(step, bad, STATE, export)
    assert "step 5: " in caplog.text and "not finite" in caplog.text
    with pytest.raises(NonFiniteError, match=r"step 6: .*w.* is not finite.*optim\.base_lr") as error:
        saver.save(6, bad, STATE, export, final=True)
    assert error.value.exit_code == 3 and files(tmp_path) == before and newest(tmp_path).step == 1
    # a second moment that overflowed only stops its weight
    saver.save(7, SMALL | {"optimizer.w.exp_avg_sq": torch.tensor(float("inf"))}, STATE, export, final=True)
    assert newest(tmp_path).step == 7


def test_damaged_is_replaced_and_not_counted(tmp_path):
    saver = Saver(tmp_path, CheckpointConfig(retain=2), 10)
    for step in (1, 2, 3):
        saver.save(step, SMALL, STATE, export)
    DAMAGES["truncated"](tmp_path / "checkpoints" / "step_00000003")
    # continued from 2 with another cadence: a damaged 3 ahead must not push the good ones out
    save(tmp_path, 1)
    saver.save(2, SMALL, STATE, export)
    assert steps(tmp_path)[0] == [1, 2, 3]
    saver.save(3, SMALL, STATE, export)
    assert newest(tmp_path).step == 3


def test_retention_and_milestones(tmp_path):
    saver = Saver(tmp_path, CheckpointConfig(retain=3, milestone_epochs=2), steps_per_epoch=2)
    for step in range(1, 11):
        saver.save(step, SMALL, STATE, export)
    assert steps(tmp_path) == ([8, 9, 10], [4, 8, 9, 10])
    assert newest(tmp_path).step == 10


@pytest.mark.parametrize("what", ["rename", "write", "export", "latest"])
def test_a_failing_save_leaves_the_old_one(tmp_path, monkeypatch, caplog, what):
    saver = Saver(tmp_path, CheckpointConfig(), 10)
    saver.save(1, SMALL, STATE, export)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(tensors, path):
        path.write_bytes(b"half")
        full()

    with monkeypatch.context() as m:
        if what == "rename":
            m.setattr(checkpoint.os, "rename", full)
        elif what == "write":
            m.setattr(checkpoint, "save_file", half)
        elif what == "latest":
            m.setattr(checkpoint, "write_file", full)
        bad_export = full if what == "export" else export
        saver.save(2, SMALL, STATE, bad_export)
        assert "training continues" in caplog.text and "No space left" in caplog.text
        assert newest(tmp_path).step == (2 if what == "latest" else 1)
        saver.save(3, SMALL, STATE, bad_export)
        with pytest.raises(StorageError, match="No space left") as error:
            saver.save(4, SMALL, STATE, bad_export)
        assert error.value.exit_code == 5
    saver.save(5, SMALL, STATE, export)
    assert newest(tmp_path).step == 5 and saver.failures == 0
    assert not [f for f in files(tmp_path) if ".tmp" in f]
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save_file", half)
        with pytest.raises(StorageError):
            saver.save(6, SMALL, STATE, export, final=True)
    assert newest(tmp_path).step == 5


def test_what_changes_while_a_save_is_written(tmp_path, monkeypatch):
    """A periodic save returns at once, and holds what was there; the next one and the end wait for it."""
    original, reached, free = checkpoint.save_file, threading.Event(), threading.Event()

    def held(tensors, path):
        reached.set()
        assert free.wait(240)
        original(tensors, path)

    def weights(folder: Path, tensors: dict) -> None:
        save_file(dict(tensors), folder / "w")

    monkeypatch.setattr(checkpoint, "save_file", held)
    live = {"method.w": torch.ones(7), "optimizer.w.step": torch.tensor(1.0)}
    threads = threading.active_count()
    with checkpoint.Saver(tmp_path, CheckpointConfig(), 10) as saver:
        saver.save(1, live, STATE, weights)
        assert reached.wait(240) and newest(tmp_path) is None
        memory = [t.data_ptr() for t in saver._snapshot._kept.values()]
        for t in live.values():
            t += 1
        waits, takes = saver.wait, saver._snapshot.take

        def take(tensors) -> None:
            assert free.is_set() and threading.active_count() == threads
            takes(tensors)

        monkeypatch.setattr(saver, "wait", lambda: (free.set(), waits()))
        monkeypatch.setattr(saver._snapshot, "take", take)
        saver.save(2, live, STATE, weights)
        # neither more memory nor more threads with each save
        assert memory == [t.data_ptr() for t in saver._snapshot._kept.values()]
        for t in live.values():
            t += 1
    assert threading.active_count() == threads
    for step in (1, 2):
        found = checkpoint.Checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}", {}).tensors()
        assert all((t == step).all() for t in found.values()) and found.keys() == live.keys()
        assert (load_file(tmp_path / "weights" / f"step_{step:08d}" / "w")["method.w"] == step).all()


def test_an_error_of_the_thread_is_not_lost(tmp_path):
    def broken(folder: Path, tensors: dict) -> None:
        raise ZeroDivisionError("a bug")

    saver = checkpoint.Saver(tmp_path, CheckpointConfig(), 10)
    with pytest.raises(ZeroDivisionError), saver:
        saver.save(1, SMALL, STATE, broken)
    # what ends a run is told, not what failed beside it
    with pytest.raises(KeyError), saver:
        saver.failures = 2
        saver.save(2, SMALL, STATE, lambda folder, tensors: os.rmdir(folder / "nothing"))
        raise KeyError


@pytest.mark.parametrize(("share", "told"), [(1.9, True), (2.1, False)])
def test_little_space_is_told(tmp_path, monkeypatch, caplog, share, told):
    method, optimizer, counters = trained()
    path = put(tmp_path, 1, collect(method, optimizer, counters.tensor))
    save_weights(path, method, {})
    size = sum(file.stat().st_size for file in path.iterdir())
    # headers and descriptions are beside the tensors
    assert 0.7 * size < checkpoint_bytes(method) < size
    free = SimpleNamespace(free=int(share * checkpoint_bytes(method)))
    monkeypatch.setattr("extrema_fast.training.run.shutil.disk_usage", lambda path: free)
    warn_of_space(SimpleNamespace(cfg=replace(CFG, out=str(tmp_path)), method=method))
    assert (f"--out {tmp_path}: " in caplog.text) == told and ("ckpt.retain 2" in caplog.text) == told


def test_stale_temporaries_are_removed(tmp_path):
    save(tmp_path, 1)
    before = files(tmp_path)
    for name in ("checkpoints/.tmp-step_2/state.safetensors", "weights/.tmp-step_2/w", ".tmp-latest-1"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    remove_temporaries(tmp_path)
    assert files(tmp_path) == before


OLD = {"fingerprint": "aaa", "images": 9, "shards": 0}


@pytest.mark.parametrize(
    ("change", "images", "allow", "words"),
    [
        ({}, {}, False, None),
        ({"out": "elsewhere", "log": {"every_steps": 7}, "system": {"threads": 2}}, OLD, False, None),
        ({"mask": {"ratio": 0.5}}, OLD, False, "mask.ratio: 0.75 -> 0.5.*--overwrite.*--allow-config-change"),
        ({"mask": {"ratio": 0.5}}, OLD, True, None),
        ({"train": {"seed": 4}, "optim": {"base_lr": 1.0}}, OLD, False, "optim.base_lr.*train.seed: 0 -> 4"),
        ({"model": {"width": 32}}, OLD, False, "another architecture.*model.width: 16 -> 32"),
        ({"model": {"width": 32}}, OLD, True, "another architecture"),
        ({"head": {"out": 16}}, OLD, True, "another architecture"),
        ({"model": {"drop_path": 0.0}}, OLD, True, None),
        ({"model": {"patch_init": "whitened"}}, OLD, True, None),
        ({}, OLD | {"fingerprint": "b"}, True, None),
        (
            {},
            OLD | {"fingerprint": "b", "images": 8},
            False,
            r"other images \(data fingerprint: aaa -> b; images: 9 -> 8\); use the images as they were",
        ),
        (
            {"train": {"seed": 4}},
            OLD | {"fingerprint": "b"},
            False,
            r"other settings .*data fingerprint: aaa -> b.*the images as they were",
        ),
    ],
)
def test_which_differences_a_resumed_run_may_have(change, images, allow, words):
    def compare() -> list[str]:
        return check_same(from_dict(change, CFG), to_dict(CFG), allow, OLD, images)

    if words:
        with pytest.raises(UsageError, match=words) as error:
            compare()
        assert ("--allow-config-change" in str(error.value)) == ("architecture" not in words)
    else:
        assert bool(compare()) == allow


# ---- the run folder --------------------------------------------------------------------------------


def test_a_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "holiday.jpg").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="other content"):
            RunFolder(tmp_path, overwrite=overwrite)
    assert files(tmp_path) == {"holiday.jpg"}
    with pytest.raises(UsageError, match="not a folder"):
        check(tmp_path / "holiday.jpg")
    assert not check(tmp_path / "new")


def test_a_new_folder_is_locked_and_counts_its_attempts(tmp_path):
    run = tmp_path / "run"
    for attempt in (1, 2, 3):
        with RunFolder(run) as folder:
            assert folder.attempt == attempt and check(run)
            folder.write_json("env.json", {"attempt": attempt})
            for overwrite in (False, True):
                with pytest.raises(UsageError, match=f"process {os.getpid()} on"):
                    RunFolder(run, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_overwrite_moves_aside(tmp_path):
    run = tmp_path / "run"
    for text in ("first", "second"):
        with RunFolder(run, overwrite=True):
            (run / "log.jsonl").write_text(text)
    with RunFolder(run, overwrite=True) as folder:
        assert not (run / "log.jsonl").exists() and folder.attempt == 1
    assert (tmp_path / "run.old-1" / "log.jsonl").read_text() == "first"
    assert (tmp_path / "run.old-2" / "log.jsonl").read_text() == "second"


def test_status_leaves_a_slow_disk_alone(tmp_path, monkeypatch):
    clock, written = [100.0], []

    def write(path, text):
        clock[0] += 0.5
        written.append(json.loads(text)["step"])

    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with RunFolder(tmp_path / "run") as folder:
        monkeypatch.setattr(run_folder, "write_file", write)
        for step in range(1, 41):
            clock[0] += 1
            # told from step 30 on
            folder.status("running", step, 50, "a warning" if step >= 30 else "")
        folder.status("failed", 41, 50, "a warning")
    assert written == [1, 26, 30, 41]


def test_an_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run")


def test_config_is_hashed_over_the_mathematics_only():
    assert config_hash(CFG) == config_hash(replace(CFG, out="x"))
    assert config_hash(CFG) != config_hash(from_dict({"train": {"seed": 9}}, CFG))
