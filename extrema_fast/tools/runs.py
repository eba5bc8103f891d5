"""Lists the run folders in a folder, with state, progress and results. Writes nothing."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, one_line
from ..files import fits, holder, open_plain, parse_records, read_json
from ..training.run_folder import LOCK, MARKER, STATUS

# folders below the one that was given
MAX_DEPTH = 6
# of a log read backwards for the last evaluation
BLOCK, MAX_TAIL = 1 << 16, 1 << 23
# without a log line for so long, and for so many times its usual interval, a run is said to be silent
SILENT_S, SILENT_LINES = 300.0, 20.0
# what status.json says of a run whose process is gone
ENDED = {"complete": "complete", "preempted": "stopped", "failed": "failed", "running": "killed"}


@dataclass
class RunInfo:
    """What is known of one run."""

    path: str
    state: str
    """`running`; `silent`: on another machine, nothing written for a while; `complete`, `stopped` (by a signal, with a
    checkpoint), `failed`; `killed`: its process is gone without a word; `new`: nothing done yet; `broken`; `no run`"""
    note: str = ""
    """why it ended, what training warns of, what is wrong with the folder"""
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    epochs: int | None = None
    knn: float | None = None
    """share of test images, of the last evaluation while training; the better of class token and mean, or the accuracy
    of a fine-tuning"""
    knn_epoch: float | None = None
    loss: float | None = None
    images_per_s: float | None = None
    written: float = 0.0
    """when anything was last written, in seconds since 1970"""
    age_s: float = 0.0
    """seconds since then"""
    host: str | None = None
    device: str | None = None


def runs(folder: str | Path = "runs") -> list[RunInfo]:
    """The runs below a folder, the last written first; then what in it is no run.

    Args:
        folder: A folder of runs, or a run.

    Raises:
        UsageError: There is no such folder.
    """
    top = Path(folder)
    if not top.is_dir():
        what = "is not a folder" if top.exists() else "no such folder"
        raise UsageError(f"{folder}: {what}; give the one that holds your runs: extrema-fast runs FOLDER")
    seen: set[tuple[int, int]] = set()
    if _is_run(top):
        return list(_search(top, 0, seen))
    found: list[RunInfo] = []
    try:
        seen.add(_identity(top))
        children = _folders(top)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror})") from None
    for child in children:
        known = len(seen)
        below = list(_search(child, MAX_DEPTH, seen))
        # what lies next to runs and has none in it is named, deeper folders are not
        if not below and len(seen) > known:
            below = [RunInfo(str(child), "no run", "a folder without a run in it")]
        found += below
    return sorted(found, key=lambda r: (r.state == "no run", -r.written, r.path))


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, links last."""
    with os.scandir(folder) as entries:
        found = [(e.is_symlink(), Path(e.path)) for e in entries if e.is_dir() and not e.name.startswith(".")]
    return [path for _, path in sorted(found)]


def _identity(folder: Path) -> tuple[int, int]:
    about = folder.stat()
    return about.st_dev, about.st_ino


def _is_run(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def _search(folder: Path, depth: int, seen: set[tuple[int, int]]) -> Iterator[RunInfo]:
    """The runs at or below `folder`, through links too, each once."""
    try:
        if (me := _identity(folder)) in seen:
            return
        seen.add(me)
        if _is_run(folder):
            yield _describe(folder)
            return
        below = _folders(folder) if depth else []
    except OSError as error:
        yield RunInfo(str(folder), "no run", f"cannot be read ({error.strerror})")
        return
    for path in below:
        yield from _search(path, depth - 1, seen)


def _describe(folder: Path) -> RunInfo:
    """One run; whatever is wrong with its files is its note."""
    info = RunInfo(str(folder), "broken")
    try:
        _read(folder, info)
    except (OSError, UsageError) as error:
        info.note = one_line(error)
    info.age_s = max(0.0, time.time() - info.written)
    return info


_CONFIG = {"train": {"epochs": int}, "log?": {"every_steps?": int}}
_ENV = {"host?": str, "gpu?": (str, None), "device?": str}


def _read(folder: Path, info: RunInfo) -> None:
    names = ("status.json", "log.jsonl", "config.json", MARKER)
    times = {name: os.stat(folder / name).st_mtime for name in names if (folder / name).exists()}
    info.written = max(times.values())
    status = read_json(folder / "status.json") if "status.json" in times else {}
    # an older or newer program may write more
    if not fits(status, STATUS):
        raise UsageError(f"{folder / 'status.json'}: damaged")
    info.note = status.get("reason") or ""
    config, env = (read_json(folder / name, {}) for name in ("config.json", "env.json"))
    config = config.get("config", config)
    env = env if fits(env, _ENV) else {}
    info.host, info.device = env.get("host"), env.get("gpu") or env.get("device")
    last = last_records(folder / "log.jsonl")
    train, evaluated = last.get("train", {}), last.get("eval", {})
    info.step, info.total_steps = status.get("step", train.get("step")), status.get("total_steps")
    info.loss, info.images_per_s = train.get("loss"), train.get("images_per_s")
    accuracies = [a for key in ("knn_cls", "knn_mean", "accuracy") if (a := evaluated.get(key)) is not None]
    if accuracies:
        info.knn, info.knn_epoch = max(accuracies), evaluated.get("epoch")
    if fits(config, _CONFIG):
        info.epochs = config["train"]["epochs"]
        if info.step is not None and info.total_steps:
            info.epoch = round(info.step / info.total_steps * info.epochs, 3)
    elif "config.json" in times:
        info.note = info.note or "config.json is damaged"
    info.state = _state(folder, info, status.get("state"), train)


def _state(folder: Path, info: RunInfo, ended: str | None, train: dict[str, Any]) -> str:
    """Whether a process works on the run; else how its last one ended."""
    held, who = holder(folder / LOCK)
    age = time.time() - info.written
    usual = (train.get("step_ms") or 0) / 1000 * _every(folder)
    silent = age > max(SILENT_S, SILENT_LINES * usual)
    if held is None and ended in ("running", None):
        # its process is on another machine, which no lock of this one tells of: its last sign of life does
        info.note = info.note or f"{who}, which cannot be asked from here"
        return "silent" if silent else "running"
    if held:
        if silent:
            info.note = f"nothing written for {_ago(age)} ({who}){'; ' * bool(info.note)}{info.note}"
        return "running"
    if ended is None:
        return "killed" if "step" in train or (folder / LOCK).exists() else "new"
    return ENDED.get(ended, "broken")


def _every(folder: Path) -> int:
    config = read_json(folder / "config.json", {})
    return config["log"]["every_steps"] if fits(config, {"log": {"every_steps": int}}) else 10


def last_records(path: Path) -> dict[str, dict[str, Any]]:
    """The last training record and the last evaluation of a log, read from its end.

    An evaluation of an earlier attempt counts only where the later attempt began at its step or after it.
    """
    found: dict[str, dict[str, Any]] = {}
    # the first step of the attempts that come later in the file
    began: dict[int, int] = {}
    for record in parse_records(_backwards(path)):
        kind, step, attempt = record["kind"], record["step"], record.get("attempt", 0)
        if kind == "train":
            found.setdefault("train", record)
            began[attempt] = min(step, began.get(attempt, step))
        elif kind == "eval" and all(step <= first for a, first in began.items() if a > attempt):
            found.setdefault("eval", record)
        if len(found) == 2:
            break
    return found


def _backwards(path: Path) -> Iterator[str]:
    """The lines of a file, last first, as far as `MAX_TAIL` bytes reach."""
    if not path.is_file():
        return
    with open_plain(path) as f:
        end, rest = f.seek(0, os.SEEK_END), b""
        least = max(0, end - MAX_TAIL)
        while end > least:
            begin = max(least, end - BLOCK)
            f.seek(begin)
            lines = (f.read(end - begin) + rest).split(b"\n")
            rest, end = lines[0], begin
            yield from (line.decode("utf-8", "replace") for line in reversed(lines[1:]))
        if not end:
            yield rest.decode("utf-8", "replace")


# ---- as text ---------------------------------------------------------------------------------------


def as_json(found: Sequence[RunInfo]) -> list[dict[str, Any]]:
    """The runs as plain data."""
    return [asdict(run) for run in found]


_TITLES = ("run", "state", "step", "epoch", "accuracy", "loss", "images/s", "written")


def format_table(found: Sequence[RunInfo], folder: str | Path = "runs") -> str:
    """The runs as aligned text, one a line, and below each what is to be said of it."""
    if not found:
        return f"{folder}: no runs in it"
    rows = [_TITLES, *(_cells(run, Path(folder)) for run in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for run, row in zip(itertools.chain([None], found), rows, strict=True):
        lines.append("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
        if run is not None and run.note:
            lines.append(f"  {one_line(Exception(run.note))}")
    return "\n".join(lines)


def _cells(run: RunInfo, folder: Path) -> tuple[str, ...]:
    path = Path(run.path)
    name = str(path.relative_to(folder)) if path != folder and path.is_relative_to(folder) else run.path
    total, epochs = (f"/{n}" if n else "" for n in (run.total_steps, run.epochs))
    knn = "" if run.knn is None else f"{100 * run.knn:.1f} %"
    if run.knn is not None and run.knn_epoch is not None:
        knn += f" at {run.knn_epoch:.4g}"
    return (
        name,
        run.state,
        "" if run.step is None else f"{run.step}{total}",
        "" if run.epoch is None else f"{run.epoch:.4g}{epochs}",
        knn,
        "" if run.loss is None else f"{run.loss:.4f}",
        "" if run.images_per_s is None else f"{run.images_per_s:.0f}",
        f"{_ago(run.age_s)} ago" if run.written else "",
    )


def _ago(seconds: float) -> str:
    for least, size, unit in ((172800, 86400, "d"), (7200, 3600, "h"), (60, 60, "min")):
        if seconds >= least:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
