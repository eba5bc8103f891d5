"""Trackers: TensorBoard, Weights & Biases, trackio and MLflow, each in a process that follows the run's log.jsonl.

The run only signals that there is a new record. Whatever a tracker library does (wait for a network, print, hang,
crash), it neither delays nor ends the run. RUN/trackers/NAME.json stores the remote run and the last steps it has, so
that a continued run continues there, no step is sent twice, and what could not be sent offline is sent later.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..config import LogConfig, flatten
from ..errors import UsageError, install, one_line
from ..files import fits, open_new, open_plain, open_to_append, parse_records, read_json
from ..signals import STOPPING
from .run_folder import RunFolder

log = logging.getLogger(__name__)

# how long a run waits at its end (a fifth of it when it was stopped), and how long a tracker may go on alone
WAIT_S, LINGER_S = 30, 300
# after a failure the first pause, which doubles, and the longest
RETRY_S, LONGEST_S = 60, 1800
# of env.json, what describes a run to others
_ENV = (
    "device",
    "gpu",
    "world_size",
    "precision",
    "loader",
    "images",
    "config_hash",
    "versions",
    "init_from",
)


class About(NamedTuple):
    """What a tracker is opened with; `id` is empty for a new run."""

    folder: Path
    project: str
    id: str
    settings: dict[str, Any]


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, about: About) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(about.folder / "tensorboard"))
        self.id = "tensorboard"
        self.where = f"tensorboard --logdir {about.folder}"

    def log(self, step: int, values: dict[str, float]) -> None:
        summary = self._summary(value=[self._summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def attach(self, report: Path) -> None:
        pass

    def finish(self, complete: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; offline, in RUN/trackers/wandb, without a login or a network."""

    def __init__(self, about: About) -> None:
        import wandb

        self.id = about.id or uuid.uuid4().hex[:8]
        options: dict[str, Any] = {
            "project": about.project,
            "name": about.folder.name,
            "id": self.id,
            "resume": "allow",
            "config": about.settings,
            "allow_val_change": True,
            "dir": about.folder / "trackers",
            "settings": wandb.Settings(console="off", silent=True, disable_git=True, init_timeout=20),
        }
        try:
            self._run = wandb.init(**options)
        except Exception as error:
            warnings.warn(f"offline ({one_line(error)})", stacklevel=1)
            # the process of wandb holds the id of what failed
            wandb.teardown()
            self._run = wandb.init(mode="offline", **options)
        # not wandb's own count of steps, which cannot go back
        self._run.define_metric("*", step_metric="step")
        self._artifact = wandb.Artifact
        self.where = self._run.url or f"wandb sync {about.folder}/trackers/wandb/*-{self.id}"

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def attach(self, report: Path) -> None:
        artifact = self._artifact(f"report-{self.id}", type="report")
        artifact.add_file(str(report))
        self._run.log_artifact(artifact)

    def finish(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class Trackio:
    """A run of trackio: on this machine, or where its variables TRACKIO_SPACE_ID and TRACKIO_SERVER_URL say."""

    def __init__(self, about: About) -> None:
        import trackio

        # it finds a run by its name
        self.id = about.id or f"{about.folder.name}-{uuid.uuid4().hex[:6]}"
        self._run = trackio.init(
            project=about.project, name=self.id, config=about.settings, resume="allow", embed=False
        )
        self.where = f"run {self.id}: trackio show --project {about.project}"

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def attach(self, report: Path) -> None:
        self._run.log_artifact(str(report), name=f"report-{self.id}", type="report")

    def finish(self, complete: bool) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, where its variable MLFLOW_TRACKING_URI says, in the experiment `log.project`."""

    def __init__(self, about: About) -> None:
        from mlflow import MlflowClient, get_tracking_uri
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self._client, self._metric, self.id = MlflowClient(), Metric, about.id
        try:
            if self.id:
                self._client.update_run(self.id, status="RUNNING")
        except MlflowException as error:
            # another server than before, or removed there
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.id = ""
        if not self.id:
            found = self._client.get_experiment_by_name(about.project)
            experiment = found.experiment_id if found else self._client.create_experiment(about.project)
            self.id = self._client.create_run(experiment, run_name=about.folder.name).info.run_id
            params = [Param(k, str(v)[:500]) for k, v in about.settings.items()]
            for at in range(0, len(params), 100):
                self._client.log_batch(self.id, params=params[at : at + 100])
        self.where = f"run {self.id} in experiment {about.project}, {get_tracking_uri()}"

    def log(self, step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self.id, metrics=[self._metric(k, v, now, step) for k, v in values.items()])

    def attach(self, report: Path) -> None:
        self._client.log_artifact(self.id, str(report))

    def finish(self, complete: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if complete else "KILLED")


OPEN: dict[str, Callable[[About], TensorBoard | WandB | Trackio | MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def check_installed(names: Iterable[str]) -> None:
    """UsageError for a tracker whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"log.tracker: {name} is not installed; {install(name)}")


# ---- in the run -------------------------------------------------------------------------------------


class Trackers:
    """The trackers of a run, started with its first record and told of every one; a context manager.

    Args:
        folder: of the run; None on other ranks than 0, which have none.
    """

    def __init__(self, folder: RunFolder | None, cfg: LogConfig) -> None:
        self.folder, self.project = None if folder is None else folder.path.absolute(), cfg.project
        self.names = [] if folder is None else list(cfg.trackers)
        self._started: dict[str, tuple[subprocess.Popen[bytes], threading.Thread]] = {}

    def wake(self, end: str = "") -> None:
        """Tells them of a new record in log.jsonl, or how the run has ended."""
        for name in list(self.names):
            try:
                if name not in self._started:
                    self._started[name] = self._start(name)
                process = self._started[name][0]
                assert process.stdin is not None
                os.write(process.stdin.fileno(), f"{end}\n".encode())
            except BlockingIOError:
                # thousands of lines that it has not read yet
                continue
            except OSError as error:
                # it has ended, which `_relay` tells
                self.names.remove(name)
                if not isinstance(error, BrokenPipeError):
                    log.warning("%s: not started (%s); training goes on", name, error.strerror or error)

    def _start(self, name: str) -> tuple[subprocess.Popen[bytes], threading.Thread]:
        assert self.folder is not None
        (self.folder / "trackers").mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self.folder), name, self.project],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if log.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL,
            # Ctrl-C is the run's to handle
            start_new_session=True,
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        thread = threading.Thread(target=_relay, args=(name, process), name=f"tracker {name}", daemon=True)
        thread.start()
        return process, thread

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._started:
            self.wake("failed" if kind else "complete")
        for process, _thread in self._started.values():
            assert process.stdin is not None
            process.stdin.close()
        until = time.monotonic() + (WAIT_S / 5 if kind else WAIT_S)
        for name, (_process, thread) in self._started.items():
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                log.warning("%s: still sends; its process goes on alone for at most %d s", name, LINGER_S)


def _relay(name: str, process: subprocess.Popen[bytes]) -> None:
    """Logs what the process of a tracker says, until it ends."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            level, _, text = line.decode(errors="replace").rstrip("\n").partition(" ")
            # what was printed before it began
            if level.isdecimal():
                log.log(int(level), "%s: %s", name, text)
    if code := process.wait():
        log.warning("%s: its process has ended (exit code %d); training goes on", name, code)


# ---- in the process of a tracker --------------------------------------------------------------------


def follow(
    folder: Path, name: str, project: str, wakes: Iterable[str], say: Callable[[int, str], None]
) -> None:
    """Sends the records of a run to a tracker as they come; after a failure tries again later.

    Args:
        folder: of the run.
        name: of the tracker.
        project: where the remote run belongs.
        wakes: an item whenever there are new records; how the run ended: the last one.
        say: takes what the run is to log, with its level.
    """
    file, place = folder / "trackers" / f"{name}.json", os.stat(folder)
    tracker, told, later, pause = None, False, 0.0, RETRY_S
    for end in wakes:
        if tracker is None and time.monotonic() < later and not end:
            continue
        try:
            if not os.path.samestat(os.stat(folder), place):
                # moved aside, and another run is here
                return
            if tracker is None:
                state = read_json(file, {})
                state = state if fits(state, {"id": str, "sent": {"train?": int, "eval?": int}}) else {}
                tracker = OPEN[name](About(folder, project, state.get("id", ""), _settings(folder)))
                if tracker.id != state.get("id"):
                    state = {"id": tracker.id, "sent": {}}
                    _keep(file, state)
                say(logging.INFO, tracker.where)
                records = _records(folder / "log.jsonl")
            for record in next(records):
                _send(tracker, record, state, file)
            if end:
                report = folder / "reports" / "report.html"
                if end == "complete" and report.is_file():
                    tracker.attach(report)
                tracker.finish(end == "complete")
        except Exception as error:
            traceback.print_exc()
            tracker, later, pause = None, time.monotonic() + pause, min(2 * pause, LONGEST_S)
            if not told:
                told, reason = True, f"{type(error).__name__}: {one_line(error)}"
                say(logging.WARNING, f"fails ({reason}); training goes on, and what is missing is sent later")


def _send(tracker: Any, record: dict[str, Any], state: dict[str, Any], file: Path) -> None:
    kind, step, sent = record["kind"], record["step"], state["sent"]
    before = sent.get(kind, -1)
    if kind not in ("train", "eval") or step <= before:
        return
    values = {f"{kind}/{k}": v for k, v in record.items() if k not in ("step", "attempt") and fits(v, float)}
    # first: of a process that is killed here a step is rather lost than twice there
    _keep(file, state | {"sent": sent | {kind: step}})
    try:
        tracker.log(step, values)
    except Exception:
        _keep(file, state)
        raise
    sent[kind] = step


def _keep(path: Path, data: dict[str, Any]) -> None:
    # whole after a kill, without waiting for the disk
    temporary = path.with_suffix(".new")
    with open_new(temporary) as f:
        f.write(json.dumps(data).encode())
    os.replace(temporary, path)


def _settings(folder: Path) -> dict[str, Any]:
    env = read_json(folder / "env.json", {})
    return flatten(read_json(folder / "config.json", {})) | flatten({k: env[k] for k in _ENV if k in env})


def _records(path: Path) -> Iterator[list[dict[str, Any]]]:
    """What was added to a log since the last item, in whole lines."""
    rest = b""
    with open_plain(path) as f:
        while True:
            whole, _, rest = (rest + f.read()).rpartition(b"\n")
            yield list(parse_records(whole.decode(errors="replace").splitlines()))


def main() -> None:
    """`python -m extrema_fast.training.trackers FOLDER NAME PROJECT`, told by lines on standard input."""
    folder, name, project = Path(sys.argv[1]), *sys.argv[2:]
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    to_run = os.dup(1)
    # what libraries print
    os.dup2(2, 1)

    def say(level: int, text: str) -> None:
        # without passwords in addresses; the run may be gone
        with suppress(OSError):
            os.write(to_run, f"{level} {re.sub(r'//[^/@ ]*@', '//', ' '.join(text.split()))}\n".encode())

    said = False

    def warn(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        # libraries go on without what they cannot write or send
        nonlocal said
        if issubclass(category, (UserWarning, RuntimeWarning)) and not said:
            said = True
            say(logging.WARNING, one_line(Exception(message)))

    warnings.showwarning = warn

    def wakes() -> Iterator[str]:
        end = ""
        for line in sys.stdin:
            yield (end := line.strip())
        timer = threading.Timer(LINGER_S, os._exit, [1])
        timer.daemon = True
        timer.start()
        if not end:
            yield "killed"

    # of a run that was killed, it may still be sending
    with open_to_append(folder / "trackers" / f"{name}.lock") as held:
        # a file system may have no locks
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        follow(folder, name, project, wakes(), say)


if __name__ == "__main__":
    main()
