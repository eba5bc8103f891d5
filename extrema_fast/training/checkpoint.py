"""Checkpoints: saved atomically, verified when read, with the most recent ones kept.

    checkpoints/step_00000100/state.safetensors   weights, teacher, optimizer moments, counters
                              state.json          step, attempt, config, data fingerprint, versions
                              COMPLETE            names, sizes and sha256 of the two
    latest                                        the newest folder's name
    weights/step_00000100/                        weights only, readable without a run

A save writes a temporary folder, syncs it and renames it; a folder is valid only if its files match `COMPLETE` and
its weights are finite. Only checkpoints that this run has read or written are removed. Training continues while a
thread writes a copy; a run waits for the thread before it ends.

In a sharded run of N processes, each process writes its rows of every sharded tensor, in process order:

    checkpoints/step_00000100/state-00001-of-00004.safetensors   rows of process 0
                              state.safetensors                  tensors that are the same on all processes
                              state.json                         also `parts`: names, sizes and sha256 of the N

and notifies process 0, which assembles the weights from the files and completes the folder. Any number of processes can
read both kinds. `torch.distributed.checkpoint` would need collectives in the writing thread, whose order relative to
those of the steps is not guaranteed, and it neither verifies what it reads nor renames a complete folder into place.
`EXTREMA_FAULT=point:n` kills the process at the n-th pass of a named point (for tests).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import CheckpointConfig, Config, changed_maths, to_dict
from ..distributed import LEAVE_S, TELL_S, WAIT_S, World, double, is_sharded, local, rows_of, sharded_as
from ..errors import ExtremaError, NonFiniteError, StorageError, UsageError, one_line
from ..files import begin_folder, filled_folder, fits, new_folder, read_json, remove, sync, write_file
from ..models.extrema import StudentTeacher
from ..weights.folder import Renamed
from .counters import GOOD, SKIPPED, Counters
from .optim import FAMILIES, KEPT, check_family

log = logging.getLogger(__name__)

# with one file of tensors, and with parts
FORMAT, FORMAT_PARTS = 1, 2
TENSORS, STATE, COMPLETE = "state.safetensors", "state.json", "COMPLETE"
_hits: dict[str, int] = {}


def fault(point: str) -> None:
    """Kills the process (SIGKILL) when EXTREMA_FAULT names this point and this pass of it; for tests."""
    wanted = os.environ.get("EXTREMA_FAULT")
    if wanted:
        _hits[point] = _hits.get(point, 0) + 1
        if wanted == f"{point}:{_hits[point]}":
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def tensors(self) -> Stored:
        """All of its tensors, read on access."""
        return Stored(self.path, self.state.get("parts", ()))


# ---- what is saved ---------------------------------------------------------------------------------


def collect(method: StudentTeacher, optimizer: torch.optim.Optimizer, counters: Tensor) -> dict[str, Tensor]:
    """Name -> tensor of everything that resuming needs; optimizer state by parameter name.

    The tensors themselves, not copies; in a sharded run DTensors.
    """
    tensors = {f"method.{name}": t for name, t in method.state_dict().items()}
    for name, p in method.student_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    # the same dtype for any device
    tensors["counters"] = double(counters)
    return {name: t.detach() for name, t in tensors.items()}


class Snapshot:
    """A copy of tensors in CPU memory, which the next snapshot reuses (pinned for tensors of a GPU)."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._arrived: torch.cuda.Event | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors; from a GPU in stream order, without waiting for it."""
        like = {name: (t.shape, t.dtype) for name, t in tensors.items()}
        if like != {name: (t.shape, t.dtype) for name, t in self._kept.items()}:
            self._kept = {
                name: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for name, t in tensors.items()
            }
        gpu = [t.device for t in tensors.values() if t.is_cuda]
        # MPS has no events to wait for
        for name, t in tensors.items():
            self._kept[name].copy_(t, non_blocking=bool(gpu))
        self._arrived = torch.cuda.current_stream(gpu[0]).record_event() if gpu else None

    def tensors(self) -> dict[str, Tensor]:
        """The last copy, once it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._kept


def weights_of(tensors: Mapping[str, Tensor]) -> Renamed:
    """The `state_dict()` of student and teacher, from tensors named by `collect`."""
    return Renamed(tensors, {n.removeprefix("method."): n for n in tensors if n.startswith("method.")})


class Stored(Mapping[str, Tensor]):
    """The full tensors of a checkpoint, read on access, whatever number of parts has their rows.

    A tensor from a single file is memory of that file: copy it to keep or change it.

    Args:
        folder: That of a checkpoint, complete or not.
        parts: Names of the files with rows, in order.

    Raises:
        StorageError: A file cannot be read, or the parts do not match.
    """

    def __init__(self, folder: Path, parts: Collection[str] = ()) -> None:
        try:
            first, *others = (safe_open(folder / name, "pt") for name in (TENSORS, *parts))
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{folder}: cannot be read ({one_line(error)})") from None
        names = [list(f.keys()) for f in (first, *others)]
        self._files = {name: [first] for name in names[0]}
        self._shapes = {name: first.get_slice(name).get_shape() for name in names[0]}
        for name in dict.fromkeys(n for some in names[1:] for n in some):
            held = [f.get_slice(name) for f, some in zip(others, names[1:], strict=True) if name in some]
            shapes = [h.get_shape() for h in held]
            alike = len({(h.get_dtype(), *shape[1:]) for h, shape in zip(held, shapes, strict=True)}) == 1
            if name in self._files or len(held) < len(others) or not alike or not all(shapes):
                raise StorageError(f"{folder}: the parts of {name} do not match")
            self._files[name] = others
            self._shapes[name] = [sum(shape[0] for shape in shapes), *shapes[0][1:]]

    def __getitem__(self, name: str) -> Tensor:
        found = [f.get_tensor(name) for f in self._files[name]]
        return found[0] if len(found) == 1 else torch.cat(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> torch.Size:
        """The shape of the full tensor, without reading it."""
        return torch.Size(self._shapes[name])

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """A copy of rows `begin` to `end`."""
        found, at = [], 0
        for file in self._files[name]:
            part = file.get_tensor(name)
            found.append(part[max(begin - at, 0) : max(end - at, 0)])
            at += len(part)
        return torch.cat(found)


def _copied(tensors: Mapping[str, Tensor], name: str, like: Any) -> Tensor:
    """A copy of a tensor, sharded like `like`: of a stored one each process keeps its own rows."""
    if not is_sharded(like):
        return tensors[name].clone()
    stored = tensors if isinstance(tensors, Stored) else None
    shape = stored.shape(name) if stored else tensors[name].shape
    if shape != like.shape:
        raise UsageError(
            f"checkpoint: another architecture ({name} is {list(shape)}, not {list(like.shape)})"
        )
    begin, end = rows_of(like)
    rows = stored.rows(name, begin, end) if stored else tensors[name][begin:end].clone()
    return sharded_as(rows, like)


def restore(
    tensors: Mapping[str, Tensor],
    method: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    counters: Tensor,
    saved_by: str = "",
) -> None:
    """The inverse of `collect`.

    Args:
        saved_by: Class name of the optimizer whose state this is; empty: that of `optimizer`.

    Raises:
        UsageError: Another architecture, or another family of optimizers (`optim.name`).
    """
    if saved_by:
        check_family(saved_by, optimizer)
    try:
        now = method.state_dict()
        names = {n: f"method.{n}" for n in weights_of(tensors)}
        method.load_state_dict({n: _copied(tensors, full, now.get(n)) for n, full in names.items()})
    except RuntimeError as error:
        raise UsageError(f"checkpoint: another architecture ({one_line(error, 300)})") from None
    params = dict(method.student_parameters())
    by_param = {p: name for name, p in params.items()}
    order = [by_param[p] for group in optimizer.param_groups for p in group["params"]]
    by_name: dict[str, dict[str, Tensor]] = {}
    for full in tensors:
        if full.startswith("optimizer."):
            # keys have no dot
            name, _, key = full.removeprefix("optimizer.").rpartition(".")
            like = None if key == "step" else params.get(name)
            by_name.setdefault(name, {})[key] = _copied(tensors, full, like)
    state = {i: by_name[name] for i, name in enumerate(order) if name in by_name}
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    # a learning rate in a tensor must stay that tensor, which a CUDA graph reads; torch would replace it by a copy
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    counters.copy_(tensors["counters"])


def unfit(
    tensors: Mapping[str, Tensor], step: int, method: StudentTeacher, optimizer: torch.optim.Optimizer
) -> str:
    """The first missing, unknown or invalid tensor for `restore` at a step, in words; empty: none."""
    kept = {
        f"optimizer.{name}.{key}": torch.zeros(()) if key == "step" else p.detach()
        for name, p in method.student_parameters()
        for key in KEPT[FAMILIES[type(optimizer).__name__]]
    }
    wanted = {f"method.{name}": t for name, t in method.state_dict().items()}
    counts, like = tensors.get("counters", torch.zeros(0)), Counters().tensor
    if counts.shape != like.shape or counts.dtype != like.dtype:
        return f"counters are {describe(counts)}, expected {describe(like)}"
    if not ((counts[GOOD:] >= 0) & (counts[GOOD:] <= step)).all():
        return f"counters are {counts.tolist()} at step {step}"
    # an optimizer that was never called, since all steps were skipped, has no state
    if counts[SKIPPED] < step or any(name in tensors for name in kept):
        wanted |= kept
    for name in dict.fromkeys([*wanted, *tensors]):
        if name == "counters":
            continue
        if name not in tensors:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} is unknown"
        t, like = tensors[name], wanted[name]
        same = t.is_floating_point() if name in kept else t.dtype == like.dtype
        if t.shape != like.shape or not same:
            return f"{name} is {describe(t)}, expected {describe(like)}"
        if name.endswith(".step") and not 0 <= t.item() <= step:
            return f"{name} is {t.item():g} at step {step}"
        if name.endswith(".exp_avg_sq") and t.numel() and t.min() < 0:
            return f"{name} is negative"
    return ""


def describe(t: Tensor) -> str:
    """`float32 [16, 3]`."""
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first weight or moment with a value that is not finite; empty if there is none."""
    floating = [t for t in tensors.values() if t.is_floating_point() and t.numel()]
    # norms take an eighth of the time, which the saving thread takes from the steps; overflow is checked below
    if floating and torch.stack([n.double() for n in torch._foreach_norm(floating)]).isfinite().all():
        return ""
    for name, t in tensors.items():
        # an infinite second moment only stops the updates of its weight
        square = name.endswith(".exp_avg_sq")
        if t.is_floating_point() and not (~t.isnan() if square else t.isfinite()).all():
            return name.removeprefix("method.")
    return ""


# ---- writing ---------------------------------------------------------------------------------------


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def part_names(size: int) -> list[str]:
    """The names of the files with the rows of each of `size` processes."""
    return [f"state-{n:05d}-of-{size:05d}.safetensors" for n in range(1, size + 1)]


def write(
    folder: Path, tensors: Mapping[str, Tensor], rows: Collection[str] = (), rank: int = 0, size: int = 1
) -> dict[str, dict[str, Any]]:
    """Writes the tensors of one process into the folder of a checkpoint and syncs them.

    Args:
        tensors: On the CPU.
        rows: Names of sharded tensors, of which these are the process's rows; process 0 writes the others.

    Returns:
        Size and sha256 of each file, by name.

    Raises:
        OSError, SafetensorError: They could not be written.
    """
    files = {TENSORS: {n: t for n, t in tensors.items() if n not in rows}} if rank == 0 else {}
    if rows:
        files[part_names(size)[rank]] = {n: tensors[n] for n in rows}
    for name, some in files.items():
        save_file(some, folder / name)
        sync(folder / name)
    fault("tensors")
    return {name: _mark(folder / name) for name in files}


def _mark(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _digest(path)}


def complete(folder: Path, step: int, state: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Writes the description of a checkpoint whose tensors are written, and marks it as complete.

    Args:
        files: The results of `write` of all processes, in order.

    Raises:
        OSError: It could not be written.
    """
    parts = {name: mark for name, mark in files.items() if name != TENSORS}
    # older versions read the format and report that they do not support it
    more = {"format": FORMAT_PARTS, "parts": parts} if parts else {"format": FORMAT}
    (folder / STATE).write_text(json.dumps(state | more | {"step": step}, indent=1), encoding="utf-8")
    fault("state")
    sync(folder / STATE)
    marks = {TENSORS: files[TENSORS], STATE: _mark(folder / STATE)}
    (folder / COMPLETE).write_text(json.dumps(marks), encoding="utf-8")
    fault("complete")


def step_folders(parent: Path) -> dict[int, Path]:
    """{step: folder} of the `step_*` folders, ascending."""
    found = {}
    for path in parent.glob("step_*") if parent.is_dir() else ():
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def remove_temporaries(run: Path) -> None:
    """Removes temporary folders of an interrupted save (at start, under the run's lock)."""
    for parent in (run, run / "checkpoints", run / "weights"):
        for path in (*parent.glob(".tmp-*"), *parent.glob(".replaced-*")):
            log.info("removing the unfinished %s", path)
            remove(path)


Export = Callable[[Path, Mapping[str, Tensor]], Any]


class Saver:
    """Saves a run, removes old checkpoints, and decides when a failing save ends the run.

    A context manager: leaving it waits for the save in progress.

    Args:
        resumed: Step of the checkpoint that was read.
        world: The processes of a sharded run, each of which has a saver and writes its rows; None: one writes all.
    """

    def __init__(
        self,
        run: Path,
        cfg: CheckpointConfig,
        steps_per_epoch: int,
        resumed: int = -1,
        world: World | None = None,
    ) -> None:
        self.run, self.cfg = run, cfg
        self.world = world or World(torch.device("cpu"))
        self.milestone = cfg.milestone_epochs * steps_per_epoch
        self.failures = 0
        self.last_step = -1
        # step -> whether its checkpoint can be resumed
        self._usable = {resumed: True}
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._began, self._until, self._saves = 0.0, math.inf, 0
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: dict[str, Any],
        export: Export,
        *,
        final: bool = False,
    ) -> None:
        """Writes the weights, then the checkpoint, so that a finished run always has its weights.

        All processes that write rows call this. Does nothing if this step was saved already.

        Args:
            tensors: On any device; unless this is the final save they are copied, and written while training continues.
            export: Writes the weights files into a folder, from these tensors on the CPU.
            final: Wait until all is written, and raise the first failure.

        Raises:
            StorageError: The third save in a row failed, or a final one; on all processes.
            NonFiniteError: The weights of a final save are not finite; on all processes.
        """
        world = self.world
        new = world.broadcast(world.rank_zero_only(partial(self._begin, step, final)))
        # processes other than 0 have not waited in `_begin`
        self.wait()
        if not new:
            return
        self._saves += 1
        self._began = time.monotonic()
        self._until = self._began + WAIT_S
        rows = [n for n, t in tensors.items() if is_sharded(t)]
        own = {n: local(t) for n, t in tensors.items() if world.is_rank_zero or is_sharded(t)}
        act = partial(self._save, self._folder(step).with_name(new), step, rows, state, export, final)
        if final:
            own = {n: t.cpu().contiguous() for n, t in own.items()}
            if not world.is_rank_zero:
                act(own)
            world.rank_zero_only(partial(act, own))
            return
        self._snapshot.take(own)
        # not a daemon: the process waits for it before it exits
        self._thread = threading.Thread(target=self._in_thread, args=(act,), name="save")
        self._thread.start()

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
            StorageError: It was the third failure in a row.
        """
        if self._thread is not None:
            self._thread.join(TELL_S)
            if self._thread.is_alive():
                seconds = time.monotonic() - self._began
                log.warning("%s: waiting for the last save, which has taken %.0f s so far", self.run, seconds)
                self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def failed(self) -> bool:
        """Whether `wait` will raise an error."""
        return self._error is not None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: Any) -> None:
        if error is not None and not isinstance(error, ExtremaError):
            # other processes may be gone, and with them their rows
            self._until = time.monotonic() + LEAVE_S
        try:
            self.wait()
        except StorageError as failure:
            if error is None:
                raise
            log.warning("%s", failure)

    def _folder(self, step: int) -> Path:
        return self.run / "checkpoints" / f"step_{step:08d}"

    def _begin(self, step: int, final: bool) -> str:
        """Name of the folder for all processes (on process 0); empty: nothing to save, or it cannot be created."""
        self.wait()
        if self.last_step == step:
            return ""
        fault("begin")
        try:
            return begin_folder(self._folder(step)).name
        except StorageError as error:
            self._failed(step, error, final)
            return ""

    def _in_thread(self, act: Callable[[Mapping[str, Tensor]], None]) -> None:
        try:
            act(self._snapshot.tensors())
        except BaseException as error:
            self._error = error

    def _save(
        self,
        new: Path,
        step: int,
        rows: Collection[str],
        state: dict[str, Any],
        export: Export,
        final: bool,
        own: Mapping[str, Tensor],
    ) -> None:
        if not self.world.is_rank_zero:
            with suppress(OSError):
                self._hand_in(new, own, rows, final)
            return
        try:
            with filled_folder(new, self._folder(step)):
                files = self._files(new, step, self._hand_in(new, own, rows, final))
                parts = [name for name in files if name != TENSORS]
                with new_folder(self.run / "weights" / f"step_{step:08d}") as weights:
                    export(weights, Stored(new, parts) if parts else own)
                    fault("weights")
                complete(new, step, state, files)
            fault("renamed")
            write_file(self.run / "latest", self._folder(step).name + "\n")
            fault("latest")
            self._usable[step] = True
        except NonFiniteError as error:
            if final:
                raise
            log.warning("%s", error)
        except (OSError, SafetensorError, StorageError) as error:
            self._failed(step, error, final)
        else:
            self.failures, self.last_step = 0, step
            try:
                self._prune(step)
            except OSError as error:
                log.warning("%s: cannot remove old checkpoints (%s)", self.run, one_line(error))

    def _hand_in(
        self, new: Path, own: Mapping[str, Tensor], rows: Collection[str], final: bool
    ) -> list[dict[str, Any]]:
        """Writes the tensors of this process and sends the outcome to process 0, which gets those of all."""
        world, mine = self.world, dict[str, Any]()
        who = f" (process {world.rank} on {socket.gethostname()})" if world.size > 1 else ""
        try:
            if name := not_finite(own):
                mine["not_finite"] = name
            else:
                mine["files"] = write(new, own, rows, world.rank, world.size)
        except (OSError, SafetensorError) as error:
            mine["failed"] = one_line(error, 300) + who
        # only the final save runs in the main thread
        with world.waiting() if final else nullcontext():
            return world.hand_in(f"{new.name}/{self._saves}", mine, lambda: self._until)

    def _files(self, new: Path, step: int, told: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The files of all processes; raises the error of one that failed."""
        for mine in told:
            if "failed" in mine:
                raise StorageError(mine["failed"])
        for mine in told:
            if "not_finite" in mine:
                raise NonFiniteError(
                    f"step {step}: {mine['not_finite']} is not finite: nothing was saved, earlier checkpoints are "
                    "unchanged; continue from the last one with a lower optim.base_lr and --allow-config-change"
                )
        files = {name: mark for mine in told for name, mark in mine["files"].items()}
        if len(told) > 1 and (reason := _changed(new, files, digests=False)):
            raise StorageError(f"{new}: {reason}; put --out on a disk that all nodes share")
        return files

    def _failed(self, step: int, error: Exception, final: bool) -> None:
        self.failures += 1
        text = f"checkpoint of step {step} in {self.run} failed ({one_line(error, 300)})"
        if final or self.failures >= 3:
            raise StorageError(f"{text}; free some space, then run the same command again") from None
        log.warning("%s; training continues, earlier checkpoints are unchanged", text)

    def _prune(self, step: int) -> None:
        folders, weights = (step_folders(self.run / name) for name in ("checkpoints", "weights"))
        # a checkpoint of a later step is unusable, otherwise the run would have resumed from it
        folders = {s: path for s, path in folders.items() if s <= step}
        for s, path in folders.items():
            # from an earlier start: only a checkpoint that has been read may be removed
            if s not in self._usable and len(folders) > self.cfg.retain:
                self._usable[s] = not (damage(path) or other_format(path))
        for s in [s for s in folders if self._usable.get(s)][: -self.cfg.retain]:
            if s in weights and not (self.milestone and s % self.milestone == 0):
                _remove(weights[s])
            _remove(folders[s])
        fault("pruned")


def _remove(folder: Path) -> None:
    # renamed first, so that after an interruption it is complete or gone
    temporary = folder.with_name(f".tmp-old-{folder.name}")
    os.rename(folder, temporary)
    remove(temporary)


# ---- reading ---------------------------------------------------------------------------------------


def damage(folder: Path) -> str:
    """Why a checkpoint cannot be resumed; empty if it can."""
    try:
        return _damage(folder)
    except (OSError, SafetensorError, StorageError) as error:
        return one_line(error)


# about the images; also in env.json
IMAGES = {"images?": int, "shards?": int, "fingerprint?": str, "sample?": dict}
_STATE: dict[str, Any] = IMAGES | {
    "step": int,
    "total_steps": int,
    "ema_ahead": bool,
    "config": dict,
    "optimizer?": str,
    "init_from?": (dict, None),
    "parts?": dict,
}


def _damage(folder: Path) -> str:
    files = read_json(folder / COMPLETE, {})
    if set(files) != {TENSORS, STATE}:
        return "not marked complete"
    if reason := _changed(folder, files):
        return reason
    if other_format(folder):
        return ""
    state = read_json(folder / STATE, {})
    step, parts = int(folder.name.removeprefix("step_")), state.get("parts", {})
    if not fits(state, _STATE) or state["step"] != step or not 0 < step <= state["total_steps"]:
        return f"{STATE} is invalid"
    if list(parts) != part_names(len(parts)):
        return f"{STATE} is invalid"
    if reason := _changed(folder, parts):
        return reason
    tensors = Stored(folder, parts)
    # one at a time: tensors in parts are joined in memory
    name = next(filter(None, (not_finite({n: tensors[n]}) for n in tensors)), "")
    return f"{name} is not finite" if name else ""


def _changed(folder: Path, files: dict[str, Any], digests: bool = True) -> str:
    """How files differ from their recorded sizes and hashes; empty if they do not."""
    for name, expected in files.items():
        path = folder / name
        if not fits(expected, {"size": int, "sha256": str}):
            return "not marked complete"
        size = path.stat().st_size if path.is_file() else -1
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if digests and _digest(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return ""


def other_format(folder: Path) -> str:
    """How the format of an undamaged checkpoint differs from this version's; empty if it does not."""
    found = read_json(folder / STATE, {}).get("format")
    known = f"this version reads {FORMAT} and {FORMAT_PARTS}"
    return "" if found in (FORMAT, FORMAT_PARTS) else f"checkpoint format {found}, {known}"


def newest(run: Path, check: Callable[[Checkpoint], str] = lambda found: "") -> Checkpoint | None:
    """The newest checkpoint that is undamaged and finite; logs why newer ones are not used. None: there are none.

    Args:
        check: Returns why an undamaged one cannot be resumed nevertheless; empty if it can.

    Raises:
        StorageError: None can be read, or the newest undamaged one has another format.
    """
    reasons: list[str] = []
    for _, path in reversed(step_folders(run / "checkpoints").items()):
        reason = damage(path)
        stop = "" if reason else other_format(path)
        if not (reason or stop):
            found = Checkpoint(path, read_json(path / STATE, {}))
            reason = check(found)
            if not reason:
                if reasons:
                    log.warning("falling back to checkpoint %s", path)
                return found
        reasons.append(f"{path}: {reason or stop}")
        if stop:
            break
        log.warning("checkpoint %s cannot be used (%s)", path, reason)
    if not reasons:
        return None
    what = "its checkpoint is from another version" if stop else "no checkpoint can be read"
    why = f"{what} ({reasons[-1 if stop else 0]})"
    raise StorageError(
        f"--out {run}: {why}; restore a copy, or use --overwrite, which moves this run aside and starts again "
        f"(with --init-from {run / 'weights'}/step_N from its weights)"
    )


# options that set the shapes of tensors and cannot change when a run continues
_SHAPES = (
    *("model.", "head.norm", "head.queue", "head.hidden", "head.out"),
    *("head.predictor_hidden", "tune.pool"),
)
_NOT_SHAPES = ("model.drop_path", "model.layer_scale", "model.patch_init")


def other_shapes(changes: list[str]) -> list[str]:
    """The changed settings (of `changed_maths`) that change the shapes of tensors."""
    return [c for c in changes if c.startswith(_SHAPES) and not c.startswith(_NOT_SHAPES)]


def check_same(
    cfg: Config, old: dict[str, Any], allow: bool, known: dict[str, Any], images: dict[str, Any]
) -> list[str]:
    """The accepted differences between a recorded run and the one that continues it.

    Args:
        old: Recorded configuration.
        allow: Accept differences; other shapes are never accepted.
        known: Number, shards and fingerprint of the recorded images, as far as known.
        images: The same of the current images, and names of those `replaced` in place; empty: not compared.

    Raises:
        UsageError: Names every difference and the remedies.
    """
    kinds = ["a fine-tuning" if "tune" in c else "a pretraining" for c in (old, to_dict(cfg))]
    if kinds[0] != kinds[1]:
        raise UsageError(f"--out {cfg.out}: holds {kinds[0]}, not {kinds[1]}; choose another --out")
    changes = changed_maths(old, to_dict(cfg))
    shapes = other_shapes(changes)
    what = "another architecture" if shapes else "other settings" if changes else "other images"
    remedy = "--overwrite (moves the old run aside) or another --out"
    if not shapes:
        remedy += ", or --allow-config-change to continue with the change"
    before, now = known.get("fingerprint"), images.get("fingerprint")
    if before and now and before != now:
        changes.append(f"data fingerprint: {before[:12]} -> {now[:12]}")
        counts = [k for k in ("images", "shards") if known.get(k, images[k]) != images[k]]
        changes += [f"{k}: {known[k]} -> {images[k]}" for k in counts]
        remedy = f"the images as they were (their names, sizes in bytes and labels count), {remedy}"
    elif names := images.get("replaced"):
        count = len(known.get("sample", ()))
        changes.append(
            f"other bytes of the same size in {len(names)} of the {count} images compared, first {names[0]}"
        )
        remedy = f"the images as they were, {remedy}"
    if changes and (shapes or not allow):
        raise UsageError(f"--out {cfg.out}: holds a run with {what} ({'; '.join(changes)}); use {remedy}")
    return changes
