"""Captures a skipped step, so that `extrema-fast replay` can recompute it.

    debug/step_00000012/capture.json         the step, its rows, random keys, settings, non-finite gradients
                        weights.safetensors  student and teacher as at the start of the step, if still unchanged

The step number determines the batch, and a skipped step does not change weights, so training stores nothing in
advance.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import config_hash
from ..data.loader import TrainLoader
from ..errors import StorageError, UsageError, one_line
from ..files import fits, new_folder, read_json
from .checkpoint import step_folders
from .run import Run
from .run_folder import RunFolder, versions

log = logging.getLogger(__name__)

# captures of a run; the first steps tell most
MOST = 3
# names in capture.json
NAMES = 20
DEBUG, STATE, WEIGHTS = "debug", "capture.json", "weights.safetensors"
_STATE: dict[str, Any] = {
    "step": int,
    "rows": [int],
    "world_size": int,
    "config_hash": str,
    "weights": (str, None),
}


class Capture(NamedTuple):
    """A capture as read."""

    path: Path
    state: dict[str, Any]

    def weights(self) -> dict[str, Tensor] | None:
        """State of the method before the step; None: it was no longer there."""
        return load_file(self.path / WEIGHTS) if self.state["weights"] else None


def bad_gradients(run: Run) -> list[str]:
    """Parameters whose gradient is not finite, those first that the backward pass meets first."""
    named = run.method.student_parameters()
    return [n for n, p in reversed(named) if p.grad is not None and not bool(p.grad.isfinite().all())]


def capture(run: Run, folder: RunFolder | None, loader: TrainLoader, step: int) -> str:
    """Keeps the `step`-th step, which was skipped, unless there are enough; what goes wrong is a line.

    Args:
        folder: of the run; None: another process writes.

    Returns:
        The new folder, or nothing.
    """
    if folder is None:
        return ""
    target = folder.path / DEBUG / f"step_{step:08d}"
    if target.exists() or len(step_folders(target.parent)) >= MOST:
        return ""
    # weights and gradients are those of the latest step; on a GPU others may have been taken meanwhile
    in_a_row = run.counters.in_a_row()
    still = run.step - in_a_row < step <= run.step
    weights = run.method.state_dict() if still else {}
    # each process has a part of them
    still = still and not any(hasattr(t, "full_tensor") for t in weights.values())
    names = bad_gradients(run) if still else []
    state = {
        "step": step,
        "epoch": (step - 1) // run.schedule.steps_per_epoch,
        "seed": run.cfg.train.seed,
        "rows": loader.global_rows(step - 1).tolist(),
        "world_size": run.world.size,
        "config_hash": config_hash(run.cfg),
        "fingerprint": run.source.fingerprint,
        "precision": run.resolved.precision,
        "ops": run.resolved.ops,
        "attempt": folder.attempt,
        "weights": WEIGHTS if still else None,
        "gradients_not_finite": len(names) if still else None,
        "first_gradients": names[:NAMES],
        "versions": versions(),
    }
    try:
        target.parent.mkdir(exist_ok=True)
        with new_folder(target) as new:
            if still:
                save_file({k: t.detach().cpu().contiguous() for k, t in weights.items()}, new / WEIGHTS)
            (new / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    except (OSError, StorageError, SafetensorError) as error:
        log.warning("step %d cannot be kept for replay (%s)", step, one_line(error))
        return ""
    return str(target)


def read(folder: Path) -> Capture:
    """The capture in a folder.

    Raises:
        UsageError: it is none, or damaged.
    """
    state = read_json(folder / STATE, {})
    if not fits(state, _STATE) or state["step"] < 1:
        raise UsageError(
            f"{folder}: no step is captured in it, or {STATE} is damaged; use --step N of the run"
        )
    found = Capture(folder, state)
    try:
        found.weights()
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{folder / WEIGHTS}: {one_line(error)}; remove the folder, and the step is computed from a checkpoint"
        ) from None
    return found


def captured(run: Path) -> dict[int, Path]:
    """Step -> folder of the captures of a run, ascending."""
    return step_folders(run / DEBUG)
