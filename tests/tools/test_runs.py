"""The table of runs.

Covers: the state of a run from its lock, its status and its last line, here and on another machine; the last evaluation
of a log, however long and however often continued; folders that are broken, foreign, unreadable or linked in a circle;
that nothing is written.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from extrema_fast.cli import main
from extrema_fast.config import preset, to_dict
from extrema_fast.errors import UsageError
from extrema_fast.files import lock
from extrema_fast.tools import runs as module
from extrema_fast.tools.runs import format_table, last_records, runs
from extrema_fast.training.run_folder import LOCK, MARKER


def train(step: int, attempt: int = 1, **more: float) -> dict:
    return {"kind": "train", "step": step, "attempt": attempt, "loss": 1 / (step + 1), "step_ms": 10} | more


def evaluated(step: int, knn: float | None, attempt: int = 1) -> dict:
    return {
        "kind": "eval",
        "step": step,
        "epoch": step / 10,
        "attempt": attempt,
        "knn_cls": knn,
        "knn_mean": 0.1,
    }


def make(folder: Path, state: str = "", records: tuple[dict, ...] = (), age_s: float = 0, **env: str) -> Path:
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    (folder / "config.json").write_text(json.dumps(to_dict(preset("smoke"))))
    (folder / "env.json").write_text(json.dumps(env))
    if records:
        (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if state:
        status = {"state": state, "step": 4, "total_steps": 8, "reason": "low light" * (state == "failed")}
        (folder / "status.json").write_text(json.dumps(status))
    for path in folder.iterdir():
        os.utime(path, (time.time() - age_s,) * 2)
    return folder


@pytest.mark.parametrize(
    ("status", "locked", "age_s", "state"),
    [
        ("complete", "", 0, "complete"),
        ("preempted", "", 0, "stopped"),
        ("failed", "", 0, "failed"),
        ("running", "", 0, "killed"),
        ("", "", 0, "new"),
        ("", "left", 0, "killed"),
        ("running", "left", 0, "killed"),
        ("", "held", 0, "running"),
        ("running", "held", 1e6, "running"),
        # continued a moment ago
        ("complete", "held", 0, "running"),
        ("preempted", "held", 0, "running"),
        ("running", "elsewhere", 0, "running"),
        ("running", "elsewhere", 1e4, "silent"),
        ("failed", "elsewhere", 1e4, "failed"),
    ],
)
def test_state(tmp_path, status, locked, age_s, state):
    run = make(tmp_path / "r", status, (train(4),) if status else (), age_s)
    owner = {"host": "gpu7" if locked == "elsewhere" else os.uname().nodename, "pid": os.getpid()}
    if locked in ("left", "elsewhere"):
        (run / LOCK).write_text(json.dumps(owner))
    before = {p: p.stat().st_mtime_ns for p in (run, *run.iterdir())}
    if locked == "held":
        with lock(run / LOCK, "run"):
            (found,) = runs(tmp_path)
        before.pop(run)
    else:
        (found,) = runs(tmp_path)
    assert found.state == state
    assert ("gpu7" in found.note) == (locked == "elsewhere" and status == "running")
    assert ("nothing written for 12 d" in found.note) == (locked == "held" and age_s > 0)
    assert ("low light" in found.note) == (status == "failed")
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_run_that_starts_while_it_is_asked_for_is_not_refused(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text(json.dumps({"host": os.uname().nodename, "pid": 1 << 30}))
    asking = os.open(tmp_path / LOCK, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    waits = []
    monkeypatch.setattr("extrema_fast.files.time.sleep", lambda s: (waits.append(s), os.close(asking)))
    with lock(tmp_path / LOCK, "run"):
        assert waits == [0.02]


@pytest.mark.parametrize(
    ("records", "train_step", "knn"),
    [
        ((evaluated(0, 0.2),), None, 0.2),
        ((train(1), evaluated(1, 0.3)), 1, 0.3),
        ((evaluated(0, 0.2), train(1), train(2)), 2, 0.2),
        # attempt 2 went back to step 4: the evaluation at 6 is of weights that are gone
        ((evaluated(4, 0.4), train(6), evaluated(6, 0.6), train(5, 2)), 5, 0.4),
        # and here it began with step 7
        ((evaluated(4, 0.4), train(6), evaluated(6, 0.6), train(7, 2)), 7, 0.6),
        ((evaluated(0, 0.5), *(train(i, pad=i) for i in range(3000))), 2999, 0.5),
        ((train(1),), 1, None),
        ((), None, None),
    ],
)
@pytest.mark.parametrize("torn", ["", '{"kind": "tra'])
def test_last_records(tmp_path, monkeypatch, records, train_step, knn, torn):
    monkeypatch.setattr(module, "BLOCK", 100)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in records) + torn)
    found = last_records(log)
    assert found.get("train", {}).get("step") == train_step
    assert found.get("eval", {}).get("knn_cls") == knn


def test_a_log_without_end_is_read_for_a_while_only(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_TAIL", 500)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in (evaluated(0, 0.5), *(train(i) for i in range(99)))))
    assert list(last_records(log)) == ["train"]


def test_folders_of_all_kinds(tmp_path, capsys):
    good = make(tmp_path / "group" / "good", "complete", (evaluated(0, 0.2), train(4)), 50, host="h", gpu="G")
    make(tmp_path / "old", "complete", age_s=5000)
    broken = {
        "not json": ("status.json", "{"),
        "a list": ("status.json", "[1]"),
        "a word": ("status.json", '{"step": "4"}'),
        "no utf-8": ("status.json", b"\xff\xfe"),
        "config": ("config.json", "null"),
        "env": ("env.json", '{"host": 3}'),
        "log": ("log.jsonl", b"\xff\n[]\n{}\n" + b"[" * 3000),
    }
    for name, (file, content) in broken.items():
        run = make(tmp_path / name, "complete", (train(4),), 500)
        (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    os.mkfifo(make(tmp_path / "pipe") / "status.json")
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden").mkdir()
    # a circle, and a second way to the same run
    (tmp_path / "group" / "up").symlink_to(tmp_path)
    (tmp_path / "zz").symlink_to(good)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")

    found = {Path(r.path).name: r for r in runs(tmp_path)}
    states = {name: r.state for name, r in found.items()}
    assert states == {
        "good": "complete",
        "old": "complete",
        "pipe": "broken",
        "not json": "broken",
        "a list": "broken",
        "a word": "broken",
        "no utf-8": "broken",
        "config": "complete",
        "env": "complete",
        "log": "complete",
        "photos": "no run",
    }
    assert all(found[name].note for name, state in states.items() if state in ("broken", "no run"))
    assert "config.json" in found["config"].note
    g = found["good"]
    assert (g.step, g.total_steps, g.epoch, g.epochs, g.loss) == (4, 8, 1.0, 2, 0.2)
    assert (g.knn, g.knn_epoch, g.host, g.device) == (0.2, 0.0, "h", "G") and 49 < g.age_s < 100
    # the newest first, what is no run last
    order = list(found)
    assert order.index("good") < order.index("old") < order.index("photos") == len(order) - 1

    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("group/good "))
    for word in ("complete", "4/8", "1/2", "20.0 % at 0", "0.2000", "50 s ago"):
        assert f"  {word}" in row
    assert main(["runs", str(good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["knn"] == 0.2


def test_without_runs(tmp_path):
    assert runs(tmp_path) == [] and "no runs" in format_table([], tmp_path)
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(UsageError, match=str(wrong)):
            runs(wrong)
