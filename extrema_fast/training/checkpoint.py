"""Checkpoints: saved atomically, verified when read, the newest few kept.

    checkpoints/step_00000100/state.safetensors   weights, teacher, optimizer moments, counters
                              state.json          step, attempt, config, data fingerprint, versions
                              COMPLETE            names, sizes and sha256 of the two
    latest                                        the newest folder's name
    weights/step_00000100/                        weights alone, readable without a run

A save writes a temporary folder, syncs it and renames it; a folder counts only when its files match `COMPLETE` and
its weights are finite. Nothing is removed that this run has neither read nor written. Steps go on while a thread writes
what was copied; a run that ends, or stops, waits for it.
`EXTREMA_FAULT=point:n` kills the process at the n-th pass of a named point (tests).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import CheckpointConfig, Config, changed_maths, to_dict
from ..distributed import TELL_S, double, is_sharded, part_of, whole
from ..errors import NonFiniteError, StorageError, UsageError, one_line
from ..files import fits, new_folder, read_json, remove, sync, write_file
from ..models.extrema import StudentTeacher
from .counters import GOOD, SKIPPED, Counters
from .optim import FAMILIES, KEPT, check_family

log = logging.getLogger(__name__)

FORMAT = 1
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

    def tensors(self, copy: bool = True) -> dict[str, Tensor]:
        """Everything in state.safetensors, copied to CPU memory, or as it is in the file."""
        found = load_file(self.path / TENSORS)
        return {name: t.clone() for name, t in found.items()} if copy else found


# ---- what is saved ---------------------------------------------------------------------------------


def collect(method: StudentTeacher, optimizer: torch.optim.Optimizer, counters: Tensor) -> dict[str, Tensor]:
    """Name -> tensor of everything that resuming needs; optimizer state by parameter name.

    Live tensors, no copies; sharded ones are gathered on the CPU, for which all processes call this.
    """
    tensors = {f"method.{name}": t for name, t in method.state_dict().items()}
    for name, p in method.student_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    # of any device the same
    tensors["counters"] = double(counters)
    return {name: whole(t).cpu() if is_sharded(t) else t.detach() for name, t in tensors.items()}


class Snapshot:
    """Tensors as they were, in CPU memory that the next snapshot takes again (pinned, for those of a GPU)."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._arrived: torch.cuda.Event | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors; those of a GPU in the order of its work, without waiting for it."""
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
        """What was copied last, once it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._kept


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `state_dict()` of student and teacher in what `collect` has named."""
    return {n.removeprefix("method."): t for n, t in tensors.items() if n.startswith("method.")}


def restore(
    tensors: dict[str, Tensor],
    method: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    counters: Tensor,
    saved_by: str = "",
) -> None:
    """The inverse of `collect`.

    Args:
        saved_by: class name of the optimizer whose state this is; empty: that of `optimizer`.

    Raises:
        UsageError: another architecture, or another family of optimizers (`optim.name`).
    """
    if saved_by:
        check_family(saved_by, optimizer)
    try:
        now = method.state_dict()
        method.load_state_dict({n: part_of(t, now.get(n)) for n, t in weights_of(tensors).items()})
    except RuntimeError as error:
        raise UsageError(f"checkpoint: another architecture ({one_line(error, 300)})") from None
    params = dict(method.student_parameters())
    names = {p: name for name, p in params.items()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    by_name: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        if full.startswith("optimizer."):
            # keys hold no dot
            name, _, key = full.removeprefix("optimizer.").rpartition(".")
            by_name.setdefault(name, {})[key] = value if key == "step" else part_of(value, params.get(name))
    state = {i: by_name[name] for i, name in enumerate(order) if name in by_name}
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    # a rate in a tensor stays that tensor, which a CUDA graph reads; torch would replace it by a copy
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    counters.copy_(tensors["counters"])


def unfit(
    tensors: Mapping[str, Tensor], step: int, method: StudentTeacher, optimizer: torch.optim.Optimizer
) -> str:
    """What these tensors lack, have too much or otherwise for `restore` at a step; empty: nothing."""
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
    # an optimizer that was never called, since all steps were skipped, keeps nothing
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
    """The first weight or moment with a value that is not finite; empty when there is none."""
    floating = [t for t in tensors.values() if t.is_floating_point() and t.numel()]
    # an eighth of the time, as a thread that saves takes it from the steps; a norm that overflows is looked at below
    if floating and torch.stack([n.double() for n in torch._foreach_norm(floating)]).isfinite().all():
        return ""
    for name, t in tensors.items():
        # an infinite second moment only stops its weight
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


def write(run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Writes checkpoints/step_*/ and `latest`.

    Raises:
        StorageError, OSError, SafetensorError: it could not be written; nothing incomplete is left.
    """
    fault("begin")
    target = run / "checkpoints" / f"step_{step:08d}"
    with new_folder(target) as new:
        save_file(tensors, new / TENSORS)
        fault("tensors")
        (new / STATE).write_text(
            json.dumps(state | {"format": FORMAT, "step": step}, indent=1), encoding="utf-8"
        )
        fault("state")
        files = {n: {"size": (new / n).stat().st_size, "sha256": _digest(new / n)} for n in (TENSORS, STATE)}
        for name in files:
            sync(new / name)
        (new / COMPLETE).write_text(json.dumps(files), encoding="utf-8")
        fault("complete")
    fault("renamed")
    write_file(run / "latest", target.name + "\n")
    fault("latest")
    return target


def step_folders(parent: Path) -> dict[int, Path]:
    """{step: folder} of the `step_*` folders, ascending."""
    found = {}
    for path in parent.glob("step_*") if parent.is_dir() else ():
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def remove_temporaries(run: Path) -> None:
    """Removes what an interrupted save left (at start, under the run's lock)."""
    for parent in (run, run / "checkpoints", run / "weights"):
        for path in (*parent.glob(".tmp-*"), *parent.glob(".replaced-*")):
            log.info("removing the unfinished %s", path)
            remove(path)


Export = Callable[[Path, Mapping[str, Tensor]], Any]


class Saver:
    """Saves a run, removes old checkpoints, and decides when a failing save ends the run.

    A context: leaving it waits for the save that is under way.

    Args:
        resumed: step of the checkpoint that was read.
    """

    def __init__(self, run: Path, cfg: CheckpointConfig, steps_per_epoch: int, resumed: int = -1) -> None:
        self.run, self.cfg = run, cfg
        self.milestone = cfg.milestone_epochs * steps_per_epoch
        self.failures = 0
        self.last_step = -1
        # step -> whether its checkpoint can be continued from
        self._usable = {resumed: True}
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._began = 0.0
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
        """Writes the weights, then the checkpoint, so that a run that counts as finished has its weights.

        Args:
            tensors: on any device; unless this is the final save they are copied, and written while the run goes on.
            export: writes the weights files into a folder, from these tensors on the CPU.
            final: whether to wait until all is written, and a failure is an error already now.

        Raises:
            StorageError: the third save in a row failed, or a final one.
            NonFiniteError: the weights of a final one are not finite.
        """
        self.wait()
        if final:
            self._save(step, {n: t.cpu().contiguous() for n, t in tensors.items()}, state, export, final)
            return
        self._snapshot.take(tensors)
        # a process that is about to end waits for it: no daemon
        self._thread = threading.Thread(target=self._in_thread, args=(step, state, export), name="save")
        self._began = time.monotonic()
        self._thread.start()

    def wait(self) -> None:
        """Waits for the save that is under way.

        Raises:
            StorageError: it was the third in a row that failed.
        """
        if self._thread is not None:
            self._thread.join(TELL_S)
            if self._thread.is_alive():
                seconds = time.monotonic() - self._began
                log.warning("%s: the last save has taken %.0f s so far and is waited for", self.run, seconds)
                self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def failed(self) -> bool:
        """Whether `wait` has something to raise."""
        return self._error is not None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: Any) -> None:
        try:
            self.wait()
        except StorageError as failure:
            if error is None:
                raise
            log.warning("%s", failure)

    def _in_thread(self, step: int, state: dict[str, Any], export: Export) -> None:
        try:
            self._save(step, self._snapshot.tensors(), state, export, False)
        except BaseException as error:
            self._error = error

    def _save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], export: Export, final: bool
    ) -> None:
        if name := not_finite(tensors):
            text = f"step {step}: {name} is not finite: nothing was saved, earlier checkpoints are untouched"
            remedy = "continue from the last one with a lower optim.base_lr and --allow-config-change"
            if final:
                raise NonFiniteError(f"{text}; {remedy}")
            log.warning("%s; %s", text, remedy)
            return
        try:
            with new_folder(self.run / "weights" / f"step_{step:08d}") as new:
                export(new, tensors)
                fault("weights")
            write(self.run, step, tensors, state)
            self._usable[step] = True
        except (OSError, SafetensorError, StorageError) as error:
            self.failures += 1
            text = f"checkpoint of step {step} in {self.run} failed ({one_line(error, 300)})"
            if final or self.failures >= 3:
                raise StorageError(f"{text}; free some space, then run the same command again") from None
            log.warning("%s; training goes on, earlier checkpoints are untouched", text)
        else:
            self.failures, self.last_step = 0, step
            try:
                self._prune(step)
            except OSError as error:
                log.warning("%s: old checkpoints cannot be removed (%s)", self.run, one_line(error))

    def _prune(self, step: int) -> None:
        folders, weights = (step_folders(self.run / name) for name in ("checkpoints", "weights"))
        # a checkpoint of a later step is not usable, or the run would have resumed from it
        folders = {s: path for s, path in folders.items() if s <= step}
        for s, path in folders.items():
            # from an earlier start: only what has been read may be removed
            if s not in self._usable and len(folders) > self.cfg.retain:
                self._usable[s] = not (damage(path) or other_format(path))
        for s in [s for s in folders if self._usable.get(s)][: -self.cfg.retain]:
            if s in weights and not (self.milestone and s % self.milestone == 0):
                _remove(weights[s])
            _remove(folders[s])
        fault("pruned")


def _remove(folder: Path) -> None:
    # renamed first, so that an interruption leaves it whole or removed
    temporary = folder.with_name(f".tmp-old-{folder.name}")
    os.rename(folder, temporary)
    remove(temporary)


# ---- reading ---------------------------------------------------------------------------------------


def damage(folder: Path) -> str:
    """Why a checkpoint cannot be continued from; empty when it can."""
    try:
        return _damage(folder)
    except (OSError, SafetensorError) as error:
        return one_line(error)


# of the images, in env.json too
IMAGES = {"images?": int, "shards?": int, "fingerprint?": str, "sample?": dict}
_STATE: dict[str, Any] = IMAGES | {
    "step": int,
    "total_steps": int,
    "ema_ahead": bool,
    "config": dict,
    "optimizer?": str,
    "init_from?": (dict, None),
}


def _damage(folder: Path) -> str:
    files = read_json(folder / COMPLETE, {})
    if set(files) != {TENSORS, STATE}:
        return "not marked complete"
    for name, expected in files.items():
        path = folder / name
        if not isinstance(expected, dict):
            return "not marked complete"
        size = path.stat().st_size if path.is_file() else -1
        if size != expected.get("size"):
            return f"{name} has {size} bytes instead of {expected.get('size')}"
        if _digest(path) != expected.get("sha256"):
            return f"{name} has changed since it was written"
    if other_format(folder):
        return ""
    state = read_json(folder / STATE, {})
    step = int(folder.name.removeprefix("step_"))
    if not fits(state, _STATE) or state["step"] != step or not 0 < step <= state["total_steps"]:
        return f"{STATE} makes no sense"
    name = not_finite(load_file(folder / TENSORS))
    return f"{name} is not finite" if name else ""


def other_format(folder: Path) -> str:
    """How the format of an undamaged checkpoint differs from this version's; empty when it does not."""
    found = read_json(folder / STATE, {}).get("format")
    return "" if found == FORMAT else f"checkpoint format {found}, this version reads {FORMAT}"


def newest(run: Path, check: Callable[[Checkpoint], str] = lambda found: "") -> Checkpoint | None:
    """The newest checkpoint that is undamaged and finite; newer ones are named in the log. None: there are none.

    Args:
        check: why an undamaged one cannot be continued from all the same; empty when it can.

    Raises:
        StorageError: none can be read, or the newest undamaged one is of another format.
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
    what = "its checkpoint is of another version" if stop else "no checkpoint can be read"
    why = f"{what} ({reasons[-1 if stop else 0]})"
    raise StorageError(
        f"--out {run}: {why}; restore a copy, or use --overwrite, which moves this run aside and starts again "
        f"(with --init-from {run / 'weights'}/step_N from its weights)"
    )


# options that set the shapes of tensors: a run cannot continue with others
_SHAPES = ("model.", "head.hidden", "head.out", "head.predictor_hidden", "tune.pool")
_NOT_SHAPES = ("model.drop_path", "model.layer_scale")


def other_shapes(changes: list[str]) -> list[str]:
    """Of changed settings (`changed_maths`) those with which tensors have other shapes."""
    return [c for c in changes if c.startswith(_SHAPES) and not c.startswith(_NOT_SHAPES)]


def check_same(
    cfg: Config, old: dict[str, Any], allow: bool, known: dict[str, Any], images: dict[str, Any]
) -> list[str]:
    """The differences, all of them accepted, between a recorded run and the one that is to continue it.

    Args:
        old: recorded configuration.
        allow: accept differences; other shapes are never accepted.
        known: number, shards and fingerprint of the recorded images, as far as known.
        images: the same of the images now, and names of those `replaced` in place; empty: not compared.

    Raises:
        UsageError: names every difference and the remedies.
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
