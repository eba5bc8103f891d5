"""Checkpoints of several processes, each of which writes its rows; threads stand for the processes.

Covers: rows that do not divide, fewer than processes; read whole and by any rows, weights; damaged, missing, exchanged,
foreign and forged parts; a part that cannot be written, is not finite or never comes, once and three times; a process
that is gone.
"""

from __future__ import annotations

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from extrema_fast.config import CheckpointConfig
from extrema_fast.distributed import World
from extrema_fast.errors import NonFiniteError, StorageError
from extrema_fast.training import checkpoint
from extrema_fast.training.checkpoint import Saver, newest, part_names
from tests.training.test_checkpoint import STATE, files, flip, put

SIZE = 4
# fewer rows than processes, more, one, and of two dimensions
SHARDED = {
    "method.a": torch.arange(9.0),
    "method.b": torch.arange(10.0).view(5, 2),
    "optimizer.a.exp_avg": torch.arange(1.0),
    "method.c": torch.arange(24.0).view(8, 3),
}
TENSORS = SHARDED | {"counters": torch.arange(3.0), "optimizer.a.step": torch.tensor(7.0)}


def chunks(t: torch.Tensor, size: int) -> list[torch.Tensor]:
    """As FSDP2 spreads the rows of a tensor."""
    found = list(t.chunk(size))
    return found + [t[:0]] * (size - len(found))


@dataclass(frozen=True)
class Rows:
    """Stands for a DTensor."""

    rows: torch.Tensor
    placements: str = "rows"

    def to_local(self) -> torch.Tensor:
        return self.rows


@dataclass(frozen=True)
class Together(World):
    """One of several threads that stand for processes."""

    place: dict[str, Any] = field(default_factory=dict)

    def broadcast(self, value: Any) -> Any:
        if self.is_rank_zero:
            self.place["value"] = value
        self.place["barrier"].wait(60)
        value = self.place["value"]
        self.place["barrier"].wait(60)
        return value


class Savers:
    """The savers of all processes of a run."""

    def __init__(self, run: Path, size: int = SIZE) -> None:
        self.run, self.pool = run, ThreadPoolExecutor(size)
        place = {"barrier": threading.Barrier(size)}
        worlds = [Together(torch.device("cpu"), n, size, place=place) for n in range(size)]
        self.savers = [Saver(run, CheckpointConfig(retain=9), 10, world=w) for w in worlds]

    def save(self, step: int, tensors: dict = TENSORS, final: bool = True, missing: int = -1) -> list[str]:
        """What each of them raises, when all wait for what they have begun."""

        def one(n: int) -> str:
            own = {k: Rows(chunks(t, SIZE)[n]) if k in SHARDED else t for k, t in tensors.items()}
            saver = self.savers[n]
            if n == missing:
                saver.world.rank_zero_only(lambda: None)
                saver.world.broadcast(None)
                return ""
            try:
                saver.save(step, own, STATE, export, final=final)
                saver.wait()
            except (StorageError, NonFiniteError) as error:
                return f"{type(error).__name__}: {error}"
            return ""

        return list(self.pool.map(one, range(len(self.savers))))


def export(folder: Path, tensors: Any) -> None:
    save_file({n: tensors[n] for n in tensors if n.startswith("method.")}, folder / "w")


@pytest.fixture
def savers(tmp_path, monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    return Savers(tmp_path)


def test_rows_of_each_are_read_whole_and_by_others(savers, tmp_path):
    assert savers.save(1, final=False) == [""] * SIZE
    assert savers.save(2, {n: t + 1 for n, t in TENSORS.items()}) == [""] * SIZE
    folder = tmp_path / "checkpoints" / "step_00000002"
    inside = {*part_names(SIZE), "state.safetensors", "state.json", "COMPLETE"}
    assert {p.name for p in folder.iterdir()} == inside and not [f for f in files(tmp_path) if ".tmp" in f]
    # what an older version compares and reads before it says that the format is another
    assert set(json.loads((folder / "COMPLETE").read_text())) == {"state.safetensors", "state.json"}
    assert json.loads((folder / "state.json").read_text())["format"] == 2
    assert len(load_file(folder / "state-00004-of-00004.safetensors")["method.b"]) == 0
    assert set(load_file(folder / "state.safetensors")) == set(TENSORS) - set(SHARDED)

    found = newest(tmp_path)
    stored = found.tensors()
    assert found.step == 2 and stored.keys() == TENSORS.keys()
    for name, t in TENSORS.items():
        assert torch.equal(stored[name], t + 1) and stored.shape(name) == t.shape
    for name, t in SHARDED.items():
        for size in (1, 2, 3, 7):
            begin = 0
            for rows in chunks(t + 1, size):
                assert torch.equal(stored.rows(name, begin, begin + len(rows)), rows)
                begin += len(rows)
    for step in (1, 2):
        weights = load_file(tmp_path / "weights" / f"step_{step:08d}" / "w")
        assert set(weights) == {"method.a", "method.b", "method.c"}
        assert all(torch.equal(w, TENSORS[n] + step - 1) for n, w in weights.items())


def reseal(folder: Path, parts: dict) -> None:
    """Parts of other contents, with sums that are right."""
    marks = {name: checkpoint._mark(folder / name) for name in ("state.safetensors", *parts)}
    checkpoint.complete(folder, int(folder.name[5:]), STATE, marks)


def exchange(folder: Path, one: Path, two: Path) -> None:
    body = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(body)


def change(folder: Path, name: str, **tensors: torch.Tensor) -> None:
    held = {k: v.clone() for k, v in load_file(folder / name).items()} | tensors
    save_file(held, folder / name)
    reseal(folder, dict.fromkeys(part_names(SIZE)))


A, B = part_names(SIZE)[1:3]
DAMAGES = {
    "missing": (lambda f: (f / A).unlink(), f"{A} has -1 bytes"),
    "flipped": (lambda f: flip(f / B), f"{B} has changed"),
    "exchanged": (lambda f: exchange(f, f / A, f / B), A),
    "of another step": (lambda f: (f / A).write_bytes((f.with_name("step_00000001") / A).read_bytes()), f"{A} has ch"),
    "not finite": (lambda f: change(f, A, **{"method.c": torch.full((2, 3), float("nan"))}), "(c is not finite)"),
    "another width": (lambda f: change(f, A, **{"method.c": torch.zeros(2, 4)}), "parts of method.c do not match"),
    "another dtype": (lambda f: change(f, B, **{"method.a": torch.zeros(3).half()}), "parts of method.a do not match"),
    "one tensor more": (lambda f: change(f, B, x=torch.zeros(3)), "parts of x do not match"),
    "in two places": (lambda f: change(f, "state.safetensors", **{"method.a": torch.zeros(9)}), "parts of method.a"),
    "one part less": (lambda f: reseal(f, dict.fromkeys(part_names(SIZE)[:-1])), "state.json is invalid"),
    "another folder": (lambda f: reseal(f, {"../../x": 1}), "state.json is invalid"),
}  # fmt: skip


def test_damaged_parts_fall_back(savers, tmp_path, caplog):
    assert savers.save(1) == [""] * SIZE
    put(tmp_path, 3, {"x": torch.zeros(1)})
    (tmp_path / "x").write_text("x")
    for how, (damage, words) in DAMAGES.items():
        caplog.clear()
        assert savers.save(2, {n: t + 1 for n, t in TENSORS.items()}) == [""] * SIZE
        assert newest(tmp_path, lambda found: "" if found.step < 3 else "another").step == 2, how
        for saver in savers.savers:
            saver.last_step = -1
        damage(tmp_path / "checkpoints" / "step_00000002")
        assert newest(tmp_path, lambda found: "" if found.step < 3 else "another").step == 1, how
        assert words in caplog.text, how


def test_a_part_that_fails(savers, tmp_path, monkeypatch, caplog):
    assert savers.save(1) == [""] * SIZE
    original, bad = checkpoint.save_file, {part_names(SIZE)[2]}

    def full(tensors, path):
        if path.name in bad:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    for step in (2, 3):
        assert savers.save(step, final=False) == [""] * SIZE
        assert f"step {step} in {tmp_path} failed" in caplog.text and "(process 2 on " in caplog.text
    assert savers.save(4, final=False)[1:] == [""] * (SIZE - 1)
    # told to all at the next save
    monkeypatch.setattr(savers.savers[0], "_error", StorageError("third"))
    assert savers.save(5, final=False) == ["StorageError: third"] * SIZE
    answers = savers.save(6)
    assert len(set(answers)) == 1 and answers[0].startswith("StorageError: checkpoint of step 6")
    bad.clear()
    assert savers.save(7, final=False) == [""] * SIZE and newest(tmp_path).step == 7
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step_00000001", "step_00000007"}


def test_a_part_that_is_not_finite(savers, tmp_path, caplog):
    assert savers.save(1) == [""] * SIZE
    # of process 1
    bad = TENSORS | {"method.c": torch.tensor([0.0] * 9 + [float("nan")] + [0.0] * 14).view(8, 3)}
    assert savers.save(2, bad, final=False) == [""] * SIZE
    assert "step 2: c is not finite: nothing was saved" in caplog.text
    answers = savers.save(3, bad)
    assert len(set(answers)) == 1 and answers[0].startswith("NonFiniteError: step 3: c is not finite")
    assert newest(tmp_path).step == 1 and not [
        f for f in files(tmp_path) if ".tmp" in f or "step_00000003" in f
    ]


def test_a_part_that_never_comes(savers, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "WAIT_S", 0.05)
    assert savers.save(1, final=False, missing=3) == [""] * SIZE
    assert "nothing was heard from process 3 of 4" in caplog.text and newest(tmp_path) is None
    # one that ends since others are gone waits for what they may have written before
    monkeypatch.setattr(checkpoint, "WAIT_S", 600.0)
    monkeypatch.setattr(checkpoint, "LEAVE_S", 0.05)
    own = {k: Rows(chunks(t, SIZE)[0]) if k in SHARDED else t for k, t in TENSORS.items()}
    saver = savers.savers[0]
    monkeypatch.setattr(Together, "broadcast", lambda self, value: value)
    with pytest.raises(RuntimeError, match="gone"), saver:
        saver.save(2, own, STATE, export)
        raise RuntimeError("a process is gone")
    assert "step 2" in caplog.text and not [f for f in files(tmp_path) if ".tmp" in f]


def test_a_folder_of_another_machine(savers, tmp_path, monkeypatch, caplog):
    original = checkpoint.write

    def elsewhere(folder, *args):
        found = original(folder, *args)
        if args[-2] == 1:
            (folder / A).unlink()
        return found

    monkeypatch.setattr(checkpoint, "write", elsewhere)
    assert savers.save(1, final=False) == [""] * SIZE
    assert f"{A} has -1 bytes" in caplog.text and "a disk that all nodes share" in caplog.text
