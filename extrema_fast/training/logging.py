"""Training output: log.jsonl, the progress bar and status.json."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..errors import ExtremaError, NonFiniteError, Preempted, one_line
from ..evaluation.collapse import OUTPUTS, checks_spread, spread_warning
from ..files import history, open_to_append
from ..hangs import Watchdog
from ..progress import Progress
from ..signals import Stopped
from .run_folder import RunFolder

# without torch: the tools print their progress from here
if TYPE_CHECKING:
    from .counters import Arrival, Reading
    from .run import Run
    from .step import StepStats

log = logging.getLogger(__name__)


class _Line(NamedTuple):
    """A log line whose loss may still be on its way from the device."""

    step: int
    values: dict[str, Any]
    reading: Reading


class TrainLog:
    """Log of a run: log.jsonl, its trackers, the terminal and status.json, all written by rank 0.

    A context manager: leaving it records in status.json how the run ended.

    Args:
        folder: the run's folder; None on other ranks, which write nothing.
        progress: show a progress bar, or some lines of text where there is no terminal.
        on_record: called after each record of log.jsonl.
        dog: is told of steps, and of what lies between them.
    """

    def __init__(
        self,
        run: Run,
        folder: RunFolder | None,
        progress: bool = True,
        on_record: Callable[[], None] = lambda: None,
        dog: Watchdog | None = None,
    ) -> None:
        self.run, self.folder, self.on_record = run, folder, on_record
        self.dog = dog or Watchdog()
        self.bad_images = 0
        # called with a step that was skipped, on the process that writes; returns the folder that keeps it, or nothing
        self.on_skipped: Callable[[int], str] = lambda step: ""
        self.warnings: list[str] = []
        self.evals: list[dict[str, Any]] = []
        self.file: JsonLog | None = None
        self._spikes = SpikeWarning()
        total = run.schedule.total_steps
        self.progress = Progress("step", total, run.step, enabled=progress and folder is not None)
        run.world.rank_zero_only(self._open)
        self._data_wait = DataWaitWarning()
        self._pending: _Line | None = None
        self._spread: tuple[int, Arrival] | None = None
        self._spreads: list[dict[str, Any]] = []
        self._told_of_spread = False
        self._skipped, self._told_of_skipped = 0, False
        self._restart()

    def _open(self) -> None:
        if self.folder is not None:
            file = self.folder.path / "log.jsonl"
            self.evals = history(file, "eval", self.run.step)
            self._spreads = history(file, "spread", self.run.step)
            self._spikes = SpikeWarning(history(file, "train", self.run.step))
            self.file = JsonLog(file)

    def start(self, headline: str, remedy: str) -> None:
        """Prints what begins; `remedy` says what shortens waiting for images on this machine."""
        self.progress.say(headline)
        self._data_wait.remedy = remedy
        self._restart()

    def due(self) -> bool:
        """Whether the current step ends with a log line."""
        return self.run.last or self.run.step % self.run.cfg.log.every_steps == 0

    def is_evaluated(self) -> bool:
        """Whether the log of the run has an evaluation of the current step."""
        return bool(self.evals) and self.evals[-1]["step"] == self.run.step

    def interrupted(
        self, reason: str = "ended by a second signal while it was waiting", code: int | None = None
    ) -> None:
        """Records in status.json that the process is being ended while it hangs."""
        self._status("failed", reason, code)

    def step(self, stats: StepStats) -> None:
        """Counts a step; writes a line when it is due and its values have arrived from the device.

        Raises:
            NonFiniteError: too many steps in a row were skipped.
        """
        run, due = self.run, self.due()
        self.dog.step()
        self.progress.update(run.step)
        self._steps += 1
        self._waited += stats.waited_s
        if due:
            self._write_pending()
            self._pending = self._line(stats)
            run.counters.restart()
            self._restart()
        if self.folder is not None and checks_spread(run.step) and (spread := run.spread()):
            self._write_spread()
            self._spread = run.step, spread
        if self._spread and self._spread[1].arrived():
            self._write_spread()
        on_cpu = run.world.device.type == "cpu"
        # several GPUs write at the next line or save: all stop at the same step when values are not finite
        if self._pending and (on_cpu or run.world.size == 1) and self._pending.reading.arrived():
            self._write_pending()
        if on_cpu:
            if run.counters.in_a_row() == 1:
                self._keep_skipped(run.step)
            self._check_finite(run.step, run.counters.worst_in_a_row())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context for evaluating and saving: writes what is pending; its duration is not counted as training."""
        self._write_pending()
        self._write_spread()
        began = time.perf_counter()
        with self.dog.aside():
            yield
        self._began += time.perf_counter() - began

    def eval(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        """Records an evaluation; returns all of the run so far, oldest first, this one last."""
        if self.folder is not None:
            record = self._write("eval", self.run.step, values)
            self.evals = [e for e in self.evals if e["step"] < self.run.step] + [record]
            self.progress.say(f"eval step {self.run.step}: {describe_eval(record, self.evals[0])}")
        return self.evals

    def warn(self, texts: list[str]) -> None:
        """Warns of the state of training; status.json shows these texts until the next call."""
        self.warnings = texts
        for text in texts:
            self._warning(text)
        if texts:
            self._status("running")

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        state, reason, code = "complete", "", 0
        if error is not None:
            code = 128 + error.number if isinstance(error, Stopped) else getattr(error, "exit_code", 1)
            state = "preempted" if isinstance(error, Preempted) else "failed"
            reason = one_line(error, 1000)
            if not isinstance(error, (ExtremaError, Stopped)):
                reason = f"{type(error).__name__}: {reason}"
        else:
            peak = self.run.world.memory_gb()
            steps = self.run.schedule.total_steps
            skipped = f" ({self._skipped} skipped)" if self._skipped else ""
            self.progress.say(
                f"complete: {steps} steps{skipped}, peak memory {peak:.2f} GB, {self.run.cfg.out}"
            )
        self.progress.close()
        if self.file is not None:
            self.file.close()
        self._status(state, reason, code)

    def _restart(self) -> None:
        self._began, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def _line(self, stats: StepStats) -> _Line:
        run, seconds = self.run, max(time.perf_counter() - self._began, 1e-9)
        images_per_s, data_wait = self._steps * run.cfg.train.batch_size / seconds, self._waited / seconds
        if slow := self._data_wait.check(data_wait, seconds):
            self._warning(slow)
        values = {
            "images": run.step * run.cfg.train.batch_size,
            "lr": stats.lr,
            "momentum": run.schedule.momentum(run.step),
            "tflops_per_s": images_per_s * run.flops_per_image / 1e12,
            "memory_gb": run.world.memory_gb(),
            "bad_images": self.bad_images,
            "images_per_s": images_per_s,
            "step_ms": 1000 * seconds / max(self._steps, 1),
            "data_wait": data_wait,
        }
        return _Line(run.step, values, run.counters.read())

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        (step, values, reading), self._pending = self._pending, None
        sums = reading.values()
        before = sums.pop("since_skipped")
        if before is not None and self.run.world.device.type != "cpu":
            self._keep_skipped(step - before)
        self._check_finite(step, sums.pop("skipped_in_a_row"))
        spike = self._spikes.check(sums)
        record = self._write("train", step, values | sums | ({"spike": 1} if spike else {}))
        if spike:
            self._warning(spike)
        self._check_skipped(step, record["skipped"])
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        self.progress.update(
            step,
            f"epoch {record['epoch']:.2f}  loss {loss}  {record['images_per_s']:.0f} img/s  "
            f"wait {100 * record['data_wait']:.0f} %  lr {record['lr']:.2e}",
        )
        self._status("running")

    def _write_spread(self) -> None:
        """Records how much the outputs of a batch differ; warns once when they are collapsing."""
        if self._spread is None:
            return
        (step, arrival), self._spread = self._spread, None
        self._spreads.append(self._write("spread", step, dict(zip(OUTPUTS, arrival.numbers(), strict=True))))
        text = "" if self._told_of_spread else spread_warning(self._spreads, self.run.cfg.head.loss)
        if text:
            self._told_of_spread = True
            self.warnings = [*self.warnings, text]
            self._warning(text)
            self._status("running")

    def _keep_skipped(self, step: int) -> None:
        if self.folder is not None and (kept := self.on_skipped(step)):
            self._warning(
                f"the loss or the gradient of step {step} was not finite, so it was skipped; which module and which "
                f"images: extrema-fast replay {shlex.quote(kept)}"
            )

    def _check_skipped(self, step: int, skipped: int) -> None:
        self._skipped = skipped
        # one in twenty: the run is not what its settings say
        if not self._told_of_skipped and skipped >= max(5, step / 20):
            self._told_of_skipped = True
            self._warning(
                f"{skipped} of {step} steps were skipped so far, since their loss or gradient was not finite; they "
                "changed no weights: a lower optim.base_lr may help"
            )

    def _check_finite(self, step: int, worst: int) -> None:
        limit = self.run.cfg.train.max_nonfinite
        if worst >= limit:
            raise NonFiniteError(
                f"step {step}: {worst} steps in a row had a loss or gradient that is not finite "
                f"(train.max_nonfinite {limit}); they changed no weights; for the module and the images: "
                f"extrema-fast replay {shlex.quote(str(self.run.cfg.out))}; try a lower optim.base_lr"
                + (", or train.precision fp32" if self.run.resolved.precision != "fp32" else "")
            )

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> dict[str, Any]:
        epoch = round(step / self.run.schedule.steps_per_epoch, 6)
        attempt = self.folder.attempt if self.folder else 0
        record = {"kind": kind, "step": step, "epoch": epoch, "attempt": attempt} | values
        if self.file is not None:
            self.file.write(record)
            self.on_record()
        return record

    def _warning(self, text: str) -> None:
        if self.folder is not None:
            log.warning("WARNING step %d: %s", self.run.step, text)
            self._write("warning", self.run.step, {"text": text})

    def _status(self, state: str, reason: str = "", code: int | None = None) -> None:
        if self.folder is not None:
            reason = reason or "; ".join(self.warnings)
            self.folder.status(state, self.run.step, self.run.schedule.total_steps, reason, code)


class DataWaitWarning:
    """Decides when to warn that steps wait for images: in two intervals in a row, and again when it has doubled.

    The first interval (files not cached, kernels not compiled) and those below a second are left out. Without a remedy
    nothing is said: the log has the share.
    """

    LIMIT, SHORTEST_S = 0.05, 1.0

    def __init__(self, remedy: str = "") -> None:
        self.remedy, self.warned, self.last, self.first = remedy, 0.0, 0.0, True

    def check(self, share: float, seconds: float) -> str:
        """The warning for an interval that spent `share` of its time waiting; empty: none."""
        first, self.first = self.first, False
        if first or seconds < self.SHORTEST_S:
            return ""
        share, self.last = min(share, self.last), share
        if not self.remedy or share <= max(self.LIMIT, 2 * self.warned):
            return ""
        self.warned = share
        return f"steps wait for images {100 * share:.0f} % of the time; {self.remedy}"


class SpikeWarning:
    """Decides whether loss or gradient norm of a log interval jump, by those of the intervals before.

    That is above their median and the last few of them by both a share of the median and `DEVIATIONS` times the median
    difference of neighbors, which a trend hardly changes. Told when it begins.
    """

    WINDOW, LEAST, LAST, DEVIATIONS = 16, 8, 4, 6.0
    # of the median
    SHARES: ClassVar = {"loss": 0.25, "grad_norm": 1.0}

    def __init__(self, past: Iterable[dict[str, Any]] = ()) -> None:
        self._past: dict[str, list[float]] = {key: [] for key in self.SHARES}
        self._high = False
        for record in past:
            self.check(record)

    def check(self, record: dict[str, Any]) -> str:
        """The warning for an interval's record; empty: none."""
        found = []
        for key, share in self.SHARES.items():
            value, past = record.get(key), self._past[key]
            # nothing but skipped steps
            if value is None or not math.isfinite(value):
                continue
            if len(past) >= self.LEAST:
                middle = median(past)
                usual = median([abs(b - a) for a, b in pairwise(past)])
                if value > max(middle, *past[-self.LAST :]) + max(
                    self.DEVIATIONS * usual, share * abs(middle)
                ):
                    found.append(f"{key} {value:.4g}, usually {middle:.4g}")
            past.append(value)
            del past[: -self.WINDOW]
        begins, self._high = bool(found) and not self._high, bool(found)
        if not begins:
            return ""
        return f"a spike: {'; '.join(found)}; if it does not come back: a lower optim.base_lr, or optim.clip_grad 1"


# ---- log.jsonl -----------------------------------------------------------------------------------------


class JsonLog:
    """Appends one JSON object per line; a full disk is reported once and does not stop training."""

    def __init__(self, path: Path) -> None:
        self.path, self.failed, self._torn = path, False, False
        self.file = open_to_append(path)
        # a line cut off by a crash is ended, so that the next record has a line of its own
        if self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            self._torn = self.file.read(1) != b"\n"

    def write(self, record: dict[str, Any]) -> None:
        # NaN is not JSON
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            line = ("\n" if self._torn else "") + json.dumps(plain, allow_nan=False) + "\n"
            # on a full disk a part of it may be written
            self._torn = self.file.write(line.encode()) != len(line)
        except OSError as error:
            self._torn = True
            if not self.failed:
                log.warning("%s cannot be written (%s); training goes on", self.path, error)
            self.failed = True

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as error:
            log.warning("%s: %s", self.path, error)


# ---- the terminal -----------------------------------------------------------------------------------


def describe_eval(record: dict[str, Any], first: dict[str, Any]) -> str:
    """`test accuracy 62.1 %, loss 1.0821`, or `k-NN class token 41.2 % (step 0: 25.2 %), spread 0.53, ...`."""
    parts = []
    if record.get("accuracy") is not None:
        parts.append(f"test accuracy {100 * record['accuracy']:.1f} %, loss {record['test_loss']:.4f}")
    for key, name in (("knn_cls", "k-NN class token"), ("knn_mean", "k-NN patch mean")):
        if record.get(key) is not None:
            start = first.get(key)
            change = f" (step 0: {100 * start:.1f} %)" if start is not None and record is not first else ""
            parts.append(f"{name} {100 * record[key]:.1f} %{change}")
    for key, name in (("teacher_std", "spread"), ("teacher_rank", "rank"), ("teacher_cosine", "cosine")):
        if record.get(key) is not None:
            parts.append(f"{name} {record[key]:.3g}")
    return ", ".join(parts)
