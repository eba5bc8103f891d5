"""Trackers: what reaches them, once, whatever becomes of the run, the network and the library.

Covers: a run that is killed, continues and completes, by stand-ins of wandb, trackio and MLflow that record calls
(each checked against the signature of the real one where it is installed) and by TensorBoard's own files; a remote run
that is gone; failures and later tries; a folder that was moved; a library that hangs, prints or crashes beside a real
run; packages that are missing; other ranks.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from extrema_fast import train
from extrema_fast.config import LogConfig
from extrema_fast.errors import UsageError
from extrema_fast.training import trackers
from tests.training.conftest import status, tiny

# what is called -> where the real thing is
REAL = {
    "wandb.init": "wandb:init",
    "wandb.Settings": "wandb:Settings",
    "wandb.Artifact": "wandb:Artifact",
    "wandb.teardown": "wandb:teardown",
    "Artifact.add_file": "wandb:Artifact.add_file",
    "wandb.log": "wandb.sdk.wandb_run:Run.log",
    "wandb.define_metric": "wandb.sdk.wandb_run:Run.define_metric",
    "wandb.log_artifact": "wandb.sdk.wandb_run:Run.log_artifact",
    "wandb.finish": "wandb.sdk.wandb_run:Run.finish",
    "trackio.init": "trackio:init",
    "trackio.log": "trackio:Run.log",
    "trackio.log_artifact": "trackio:Run.log_artifact",
    "trackio.finish": "trackio:Run.finish",
    "mlflow.Metric": "mlflow.entities:Metric",
    "mlflow.Param": "mlflow.entities:Param",
    **{
        f"mlflow.{name}": f"mlflow:MlflowClient.{name}"
        for name in ("get_experiment_by_name", "create_experiment", "create_run", "update_run")
    },
    **{
        f"mlflow.{name}": f"mlflow:MlflowClient.{name}"
        for name in ("log_batch", "log_artifact", "set_terminated")
    },
}


class MlflowException(Exception):
    error_code = "RESOURCE_DOES_NOT_EXIST"


class Remote:
    """What stands in for a library and its server; `calls` of its functions, points by (series, step)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple, dict]] = []
        self.points: dict[str, list[int]] = {}
        self.runs: list[str] = []
        self.failures: list[Exception] = []

    def call(self, name: str, result: Any = None) -> Any:
        def record(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args, options))
            return result(*args, **options) if callable(result) else result

        return record

    def point(self, step: int, values: dict[str, float]) -> None:
        if self.failures:
            raise self.failures.pop()
        assert values and all(isinstance(v, (int, float)) for v in values.values())
        for key in values:
            self.points.setdefault(key, []).append(step)

    def named(self, name: str) -> list[tuple[tuple, dict]]:
        return [(args, options) for n, args, options in self.calls if n == name]

    def install(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        for module, members in getattr(self, f"_{name}")().items():
            made = types.ModuleType(module)
            vars(made).update(members)
            monkeypatch.setitem(sys.modules, module, made)

    def _wandb(self) -> dict[str, dict]:
        run = types.SimpleNamespace(url=None, dir="x")
        run.define_metric, run.finish = self.call("wandb.define_metric"), self.call("wandb.finish")
        run.log_artifact = self.call("wandb.log_artifact")
        run.log = self.call(
            "wandb.log", lambda row: self.point(row["step"], {k: row[k] for k in row if k != "step"})
        )
        artifact = types.SimpleNamespace(add_file=self.call("Artifact.add_file"))

        held: set[str] = set()

        def init(**options: Any) -> Any:
            if options.get("mode") != "offline":
                held.add(options["id"])
                raise RuntimeError("no network")
            if options["id"] in held:
                raise RuntimeError("run ID is in use")
            self.runs.append(options["id"])
            return run

        made = {"init": self.call("wandb.init", init), "Settings": self.call("wandb.Settings")}
        made["teardown"] = self.call("wandb.teardown", held.clear)
        return {"wandb": made | {"Artifact": self.call("wandb.Artifact", artifact)}}

    def _trackio(self) -> dict[str, dict]:
        log = self.call("trackio.log", lambda values, step: self.point(step, values))
        run = types.SimpleNamespace(log=log, finish=self.call("trackio.finish"))
        run.log_artifact = self.call("trackio.log_artifact")

        def init(**options: Any) -> Any:
            self.runs.append(options["name"])
            return run

        return {"trackio": {"init": self.call("trackio.init", init)}}

    def _mlflow(self) -> dict[str, dict]:
        def create_run(*_: Any, **__: Any) -> Any:
            self.runs.append(f"id-{len(self.runs)}")
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=self.runs[-1]))

        def update_run(id: str, **_: Any) -> None:
            if id not in self.runs:
                raise MlflowException("no such run")

        def log_batch(id: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(params) <= 100
            for step in {m[3] for m in metrics}:
                self.point(step, {m[0]: m[1] for m in metrics if m[3] == step})

        results = {
            "get_experiment_by_name": None,
            "create_experiment": "7",
            "create_run": create_run,
            "update_run": update_run,
            "log_batch": log_batch,
            "log_artifact": None,
            "set_terminated": None,
        }
        client = types.SimpleNamespace(**{k: self.call(f"mlflow.{k}", v) for k, v in results.items()})
        entity = {
            "Metric": self.call("mlflow.Metric", lambda *a: a),
            "Param": self.call("mlflow.Param", lambda *a: a),
        }
        return {
            "mlflow": {"MlflowClient": lambda: client, "get_tracking_uri": lambda: "http://me:secret@host"},
            "mlflow.entities": entity,
            "mlflow.exceptions": {"MlflowException": MlflowException},
        }


@pytest.fixture
def folder(tmp_path):
    """A run folder with settings, the machine, and no records yet."""
    (tmp_path / "trackers").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"mask": {"ratio": 0.8}, "out": "runs/x"}))
    (tmp_path / "env.json").write_text(
        json.dumps({"device": "cpu", "argv": ["--key", "secret"], "cwd": "/secret"})
    )
    return tmp_path


def add(folder: Path, attempt: int, *steps: int, torn: bool = False) -> None:
    with open(folder / "log.jsonl", "a") as f:
        for step in steps:
            known = {"step": step, "epoch": 0.1, "attempt": attempt}
            for record in ({"kind": "train", "loss": 0.5, "nan": None}, {"kind": "warning", "text": "x"}):
                f.write(json.dumps(record | known) + "\n")
            if step % 2 == 0:
                f.write(json.dumps({"kind": "eval", "knn_cls": 0.4} | known) + "\n")
        f.write('{"kind": "train", "st' * torn)


def follow(folder: Path, name: str, *wakes: str) -> list[tuple[int, str]]:
    said: list[tuple[int, str]] = []
    trackers.follow(folder, name, "project", iter(wakes), lambda level, text: said.append((level, text)))
    return said


@pytest.mark.filterwarnings("ignore:offline")
@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_killed_continued_and_complete(name, folder, monkeypatch):
    remote = Remote()
    remote.install(monkeypatch, name)
    # two records are written before the tracker learns of them; then the run is killed within a third
    add(folder, 1, 0, 1, 2, torn=True)
    ((_, where),) = follow(folder, name, "", "killed")
    # it goes on at step 1; a torn line is ended first
    with open(folder / "log.jsonl", "a") as f:
        f.write("\n")
    add(folder, 2, 2, 3)

    def later():
        yield ""
        add(folder, 2, 4)
        yield ""
        (folder / "reports").mkdir()
        (folder / "reports" / "report.html").write_text("<html>")
        yield "complete"

    follow(folder, name, *later())
    (folder / "reports" / "report.html").unlink()
    follow(folder, name, "", "complete")
    train_series, eval_series = remote.points.pop("train/loss"), remote.points.pop("eval/knn_cls")
    assert (train_series, eval_series) == ([0, 1, 2, 3, 4], [0, 2, 4])
    assert set(remote.points) == {"train/epoch", "eval/epoch"}, "numbers alone, and no warnings"
    assert len(set(remote.runs)) == 1 and remote.runs[0] in where
    everything = repr(remote.calls)
    assert "mask.ratio" in everything and "'project'" in everything and "secret" not in everything
    assert [str(folder / "reports" / "report.html") in repr(c) for c in remote.calls].count(True) == 1
    ends = {
        "wandb": [((), {"exit_code": code}) for code in (1, 0, 0)],
        "trackio": [((), {})] * 3,
        "mlflow": [((remote.runs[0], end), {}) for end in ("KILLED", "FINISHED", "FINISHED")],
    }
    assert remote.named("mlflow.set_terminated" if name == "mlflow" else f"{name}.finish") == ends[name]


@pytest.mark.filterwarnings("ignore:offline")
@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_calls_fit_the_real_library(name, folder, monkeypatch):
    pytest.importorskip(name)
    remote = Remote()
    with monkeypatch.context() as patch:
        remote.install(patch, name)
        add(folder, 1, 0, 1)
        (folder / "reports").mkdir()
        (folder / "reports" / "report.html").write_text("<html>")
        follow(folder, name, "", "complete")
        follow(folder, name, "", "complete")
    called = {n for n, _, _ in remote.calls}
    assert called == {n for n in REAL if n.startswith((name, {"wandb": "Artifact"}.get(name, name)))}
    for n, args, options in remote.calls:
        module, _, path = REAL[n].partition(":")
        real = importlib.import_module(module)
        for part in path.split("."):
            real = getattr(real, part)
        if "." in path:
            args = (None, *args)
        inspect.signature(real).bind(*args, **options)


def test_tensorboard_files(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    add(folder, 1, 0, 1)
    follow(folder, "tensorboard", "", "killed")
    add(folder, 2, 1, 2)
    follow(folder, "tensorboard", "", "complete")
    found: dict[str, list[int]] = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    assert (
        found["train/loss"] == [0, 1, 2] and found["eval/knn_cls"] == [0, 2] and "warning/epoch" not in found
    )


def test_a_remote_run_that_is_gone_is_made_anew_with_all_steps(folder, monkeypatch):
    remote = Remote()
    remote.install(monkeypatch, "mlflow")
    add(folder, 1, 0, 1)
    follow(folder, "mlflow", "", "killed")
    # another server
    remote.runs[:] = ["another"]
    add(folder, 2, 2)
    follow(folder, "mlflow", "", "complete")
    assert remote.runs == ["another", "id-1"] and remote.points["train/loss"] == [0, 1, 0, 1, 2]


def test_a_failure_is_told_once_and_nothing_is_lost_or_doubled(folder, monkeypatch, capsys):
    remote, now = Remote(), [0.0]
    remote.install(monkeypatch, "trackio")
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])
    remote.failures = [OSError(28, "No space left on device")] * 2

    def run():
        for step in range(6):
            add(folder, 1, step)
            yield ""
            # steps 1 and 2 come within the pause, 3 is tried and fails, 4 comes within a longer pause
            now[0] += {0: 0, 1: 0, 2: trackers.RETRY_S}.get(step, 1)
        assert not remote.points
        yield "complete"

    said: list[tuple[int, str]] = []
    trackers.follow(folder, "trackio", "project", run(), lambda level, text: said.append((level, text)))
    assert remote.points["train/loss"] == [0, 1, 2, 3, 4, 5] and len(set(remote.runs)) == 1
    assert len(remote.named("trackio.init")) == 3
    (warning,) = [text for level, text in said if level == logging.WARNING]
    assert "OSError: [Errno 28] No space left on device" in warning


def test_a_folder_that_was_moved_aside_is_left_alone(tmp_path, folder, monkeypatch):
    remote = Remote()
    remote.install(monkeypatch, "trackio")
    run = folder / "run"
    (run / "trackers").mkdir(parents=True)
    add(run, 1, 0)

    def moved():
        yield ""
        run.rename(folder / "run.old-1")
        (run / "trackers").mkdir(parents=True)
        add(run, 1, 0, 1, 2)
        yield ""

    trackers.follow(run, "trackio", "project", moved(), print)
    assert remote.points["train/loss"] == [0] and not list((run / "trackers").iterdir())


# ---- beside a real run ------------------------------------------------------------------------------

LIBRARY = """
import os, sys, time, warnings
points = open({points!r}, "a")
class Run:
    def log(self, values, step):
        print("chatter" * 10000)
        points.write(f"{{step}} {{min(values)}}\\n"); points.flush()
        if step == 3: {at_3}
    def log_artifact(self, *a, **o): points.write("report\\n"); points.flush()
    def finish(self): pass
def init(**options):
    {at_init}
    return Run()
"""


@pytest.mark.parametrize(
    ("at_init", "at_3", "points", "warning"),
    [
        ("pass", "pass", "1 2 3 4 5 6 report", ""),
        ("time.sleep(3)", "pass", "", "still sends"),
        ("pass", "os._exit(7)", "1 2 3", "exit code 7"),
        (
            "warnings.warn('no disk'); warnings.warn('no disk either')",
            "pass",
            "1 2 3 4 5 6 report",
            "no disk",
        ),
        ("raise OSError('at http://me:secret@host')", "pass", "", "fails (OSError: at http://host)"),
    ],
    ids=["well", "hangs", "crashes", "warns", "fails"],
)
def test_a_run_goes_on_whatever_a_library_does(
    at_init, at_3, points, warning, tmp_path, monkeypatch, caplog, capfd
):
    written = tmp_path / "points"
    (tmp_path / "trackio.py").write_text(LIBRARY.format(points=str(written), at_init=at_init, at_3=at_3))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    # what hangs is not waited for; the others are
    monkeypatch.setattr(trackers, "WAIT_S", 0.2 if warning == "still sends" else 60)
    (tmp_path / "run" / "reports").mkdir(parents=True)
    (tmp_path / "run" / "reports" / "report.html").touch()
    (tmp_path / "run" / ".extrema-fast-run").touch()
    run = train.pretrain(tiny(tmp_path / "run", log={"tracker": "trackio"}), progress=False)
    assert status(run)["state"] == "complete"
    found = written.read_text().split("\n") if written.exists() else []
    assert " ".join(line.split()[0] for line in found if line) == points
    said = [
        r.getMessage() for r in caplog.records if "trackio" in r.getMessage() and r.levelno == logging.WARNING
    ]
    assert len(said) == bool(warning) and all(warning in line for line in said)
    out, err = capfd.readouterr()
    assert "chatter" not in out + err


def test_a_package_that_is_missing_ends_the_run_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"log.tracker: wandb is not installed; pip install"):
        train.pretrain(tiny(tmp_path / "run", log={"tracker": "wandb"}), progress=False)
    assert not (tmp_path / "run").exists()


def test_other_ranks_have_no_trackers():
    with trackers.Trackers(None, LogConfig(tracker="wandb")) as none:
        none.wake()
        assert not none.names and not none._started


def test_names_of_trackers():
    assert LogConfig(tracker="wandb, mlflow,wandb").trackers == ("wandb", "mlflow")
    with pytest.raises(UsageError, match=r"log.tracker: got 'wanb'; did you mean 'wandb'\?"):
        LogConfig(tracker="mlflow,wanb")
    with pytest.raises(UsageError, match=r"log.project"):
        LogConfig(project=" ")
