"""Numbers of a run: device counters, log.jsonl, progress on the screen, TensorBoard when asked for."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ..errors import UsageError

log = logging.getLogger(__name__)

LOSS, NORM, GOOD, SKIPPED, IN_A_ROW, WORST = range(6)


class Reading:
    """Counters as they stood when this was made."""

    def __init__(self, tensor: Tensor) -> None:
        on_gpu = tensor.device.type == "cuda"
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self.host.copy_(tensor, non_blocking=True)
        self.event = torch.cuda.Event() if on_gpu else None
        if self.event is not None:
            self.event.record()

    def arrived(self) -> bool:
        """Whether `values` returns at once."""
        return self.event is None or self.event.query()

    def values(self) -> dict[str, float | int | None]:
        """Means over the good steps (None without any), steps skipped since the start, most in a row."""
        if self.event is not None:
            self.event.synchronize()
        values = self.host.tolist()
        mean = [v / values[GOOD] if values[GOOD] else None for v in values[:2]]
        return {
            "loss": mean[0],
            "grad_norm": mean[1],
            "skipped": int(values[SKIPPED]),
            "skipped_in_a_row": int(values[WORST]),
        }


class Counters:
    """Sums over the steps since the last log line, on the device: reading them is the only wait for it.

    `tensor` [6] fp64 goes into the checkpoint, so that a log line after a resumption has the same values.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.tensor = torch.zeros(6, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, norm: Tensor, bad: Tensor) -> None:
        """loss, norm: scalars; bad: scalar, 1 when the step was skipped."""
        t, good = self.tensor, 1 - bad.double()
        zero = torch.zeros_like(good)
        t[LOSS] += torch.where(good > 0, loss.double(), zero)
        t[NORM] += torch.where(good > 0, norm.double(), zero)
        t[GOOD] += good
        t[SKIPPED] += 1 - good
        t[IN_A_ROW] = (t[IN_A_ROW] + 1) * (1 - good)
        t[WORST] = torch.maximum(t[WORST], t[IN_A_ROW])

    def read(self) -> Reading:
        """The values so far, on their way to the host; a GPU is not waited for."""
        return Reading(self.tensor)

    def worst_in_a_row(self) -> int:
        """Most skipped steps in a row since the last `restart`; waits for the device."""
        return int(self.tensor[WORST].item())

    def restart(self) -> None:
        """Begins the next interval; totals stay."""
        self.tensor[:SKIPPED] = 0
        self.tensor[WORST] = self.tensor[IN_A_ROW]


class Meter:
    """Wall time of an interval, split into waiting for images and the rest; pauses are left out.

    Each batch says how long it was waited for (`Batch.waited`).
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def next(self, batches: Any) -> Any:
        """next(batches), counted."""
        batch = next(batches)
        self.waited += batch.waited
        self.steps += 1
        return batch

    def read(self) -> dict[str, float]:
        spent = max(time.perf_counter() - self.start, 1e-9)
        return {
            "images_per_s": self.steps * self.batch_size / spent,
            "step_ms": 1000 * spent / max(self.steps, 1),
            "data_wait": self.waited / spent,
        }

    @property
    def seconds(self) -> float:
        """Length of the interval so far."""
        return time.perf_counter() - self.start

    def pause(self, since: float) -> None:
        """Leaves out what was spent (evaluating, saving) since `time.perf_counter()` read `since`."""
        self.start += time.perf_counter() - since


class WaitWatch:
    """Says when steps wait for images in two intervals running: once, and again only when it has become clearly worse.

    The first interval of a start is left out (files not cached, kernels not compiled), so are those below a second.
    """

    LIMIT, WORSE, SHORTEST = 0.05, 2.0, 1.0

    def __init__(self, remedy: str) -> None:
        self.remedy, self.told, self.intervals, self.last = remedy, 0.0, 0, 0.0

    def look(self, share: float, seconds: float) -> str:
        """What to say of an interval in which `share` of the time was spent waiting; empty: nothing."""
        self.intervals += 1
        if self.intervals == 1 or seconds < self.SHORTEST:
            return ""
        share, self.last = min(share, self.last), share
        if share <= max(self.LIMIT, self.WORSE * self.told):
            return ""
        self.told = share
        return f"steps wait for images {100 * share:.0f} % of the time; {self.remedy}"


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---- log.jsonl -------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, oldest first; a last line torn by a crash is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def history(path: Path, kind: str, up_to: int) -> list[dict[str, Any]]:
    """Records of one kind up to a step, ascending; of a step that was repeated, the last."""
    found = {
        r["step"]: r for r in read_log(path) if r.get("kind") == kind and r.get("step", up_to + 1) <= up_to
    }
    return [found[step] for step in sorted(found)]


def _plain(value: Any) -> Any:
    # NaN is not JSON
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLog:
    """Appends one JSON object per line; a full disk is reported once and does not stop training."""

    def __init__(self, path: Path) -> None:
        self.path, self.failed = path, False
        # a line torn by a crash ends here, so that the next record starts on its own
        torn = path.is_file() and path.stat().st_size and path.read_bytes()[-1:] != b"\n"
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if torn:
            self.file.write("\n")

    def write(self, record: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps({k: _plain(v) for k, v in record.items()}, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            if not self.failed:
                log.warning("%s cannot be written (%s); training goes on", self.path, error)
            self.failed = True

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as error:
            log.warning("%s: %s", self.path, error)


class TensorBoard:
    """The same records as scalars; raises UsageError when TensorBoard is missing, later only warns."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                'log.tensorboard: TensorBoard is not installed; pip install "extrema-fast[tensorboard]"'
            ) from None
        self.writer: Any = SummaryWriter(str(folder))

    def write(self, record: dict[str, Any]) -> None:
        try:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key not in ("step", "attempt"):
                    self.writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])
        except Exception as error:
            log.warning("TensorBoard stopped (%s); training goes on", error)
            self.write = lambda record: None  # type: ignore[method-assign]

    def close(self) -> None:
        self.writer.close()


# ---- the screen ------------------------------------------------------------------------------------


def describe_eval(record: dict[str, Any], first: dict[str, Any]) -> str:
    """`k-NN 41.2 % (step 0: 25.2 %), spread 0.53, rank 12.1, cosine 0.42` of the teacher's class token."""
    parts = []
    for key, name in (("knn_cls", "k-NN class token"), ("knn_mean", "k-NN patch mean")):
        if record.get(key) is not None:
            start = first.get(key)
            beside = f" (step 0: {100 * start:.1f} %)" if start is not None and record is not first else ""
            parts.append(f"{name} {100 * record[key]:.1f} %{beside}")
    for key, name in (("teacher_std", "spread"), ("teacher_rank", "rank"), ("teacher_cosine", "cosine")):
        if record.get(key) is not None:
            parts.append(f"{name} {record[key]:.3g}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


class Progress:
    """What a person watches: a bar on a terminal, at most about forty lines (or one a minute) elsewhere."""

    LINES = 40

    def __init__(
        self, total: int, start: int = 0, *, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self.total, self.enabled = total, enabled
        self.stream = stream or sys.stdout
        self.began, self.first = time.monotonic(), start
        self.shown, self.shown_at = -total, -math.inf
        self.bar: Any = None
        if enabled and self.stream.isatty():
            self.bar = self._rich(start)

    def _rich(self, start: int) -> Any:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar
        except ImportError:
            return None
        bar = Bar(
            TextColumn("pretraining"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=self.stream),
        )
        self.task = bar.add_task("", total=self.total, completed=start, text="")
        bar.start()
        return bar

    def advance(self, step: int) -> None:
        """After every step; moves the bar only."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def update(self, record: dict[str, Any]) -> None:
        """After every log record."""
        if not self.enabled:
            return
        step, loss = record["step"], record["loss"]
        shown = "not finite" if loss is None else f"{loss:.4f}"
        text = f"loss {shown}  {record['images_per_s']:.0f} img/s"
        if "data_wait" in record:
            text += f"  wait {100 * record['data_wait']:.0f} %"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
            return
        late = time.monotonic() - self.shown_at > 60
        if step - self.shown < self.total / self.LINES and not late and step != self.total:
            return
        self.shown, self.shown_at = step, time.monotonic()
        left = (time.monotonic() - self.began) / max(step - self.first, 1) * (self.total - step)
        self.say(f"step {step:>{len(str(self.total))}}/{self.total}  epoch {record['epoch']:.2f}  {text}  "
                 f"lr {record['lr']:.2e}  left {duration(left)}")  # fmt: skip

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
