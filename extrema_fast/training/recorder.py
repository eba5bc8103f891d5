"""Where the records of a run go: log.jsonl, TensorBoard, the screen and status.json, on rank 0 only."""

from __future__ import annotations

import logging
from typing import Any

from ..config import LogConfig
from ..errors import ExtremaError, Preempted
from .metrics import JsonLog, Progress, TensorBoard, describe_eval, history
from .run_folder import RunFolder

log = logging.getLogger(__name__)


class Recorder:
    """Writes every record to each place; with no folder (ranks above 0) nothing happens.

    raises UsageError when TensorBoard is asked for and not installed
    """

    def __init__(
        self,
        folder: RunFolder | None,
        cfg: LogConfig,
        step: int,
        total: int,
        steps_per_epoch: int,
        progress: bool,
    ) -> None:
        self.folder, self.total, self.steps_per_epoch = folder, total, steps_per_epoch
        self.step = step
        self.evals: list[dict[str, Any]] = []
        self.sinks: list[Any] = []
        self.warnings: list[str] = []
        self.screen = Progress(total, step, enabled=progress and folder is not None)
        if folder is not None:
            self.evals = history(folder.path / "log.jsonl", "eval", step)
            self.sinks.append(JsonLog(folder.path / "log.jsonl"))
            if cfg.tensorboard:
                self.sinks.append(TensorBoard(folder.path / "tensorboard"))

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> dict[str, Any]:
        record = {
            "kind": kind,
            "step": step,
            "epoch": round(step / self.steps_per_epoch, 6),
            "attempt": self.folder.attempt if self.folder else 0,
        } | values
        for sink in self.sinks:
            sink.write(record)
        return record

    def advance(self, step: int) -> None:
        """After every step."""
        self.step = step
        self.screen.advance(step)

    def train(self, step: int, **values: Any) -> None:
        """A log line of the loop."""
        if self.folder is not None:
            self.screen.update(self._write("train", step, values))
            self.folder.status("running", step, self.total, self._reason())

    def eval(self, step: int, values: dict[str, Any]) -> list[dict[str, Any]]:
        """An evaluation; returns all of the run so far, this one last, oldest first."""
        if self.folder is not None:
            record = self._write("eval", step, values)
            self.evals = [e for e in self.evals if e["step"] < step] + [record]
            self.screen.say(f"eval step {step}: {describe_eval(record, self.evals[0])}")
        return self.evals

    def warn(self, step: int, texts: list[str]) -> None:
        """Loud lines, also in status.json until the next evaluation replaces them."""
        self.warnings = texts
        for text in texts:
            log.warning("WARNING step %d: %s", step, text)
            self._write("warning", step, {"text": text})
        if self.folder is not None and texts:
            self.folder.status("running", step, self.total, self._reason())

    def note(self, step: int, text: str) -> None:
        """A loud line of the moment; status.json keeps what it says."""
        if self.folder is not None:
            log.warning("WARNING step %d: %s", step, text)
            self._write("warning", step, {"text": text})

    def _reason(self) -> str:
        return "; ".join(self.warnings)

    def close(self, state: str = "", reason: str = "") -> None:
        """Ends the screen and the files, with a last status when one is given."""
        self.screen.close()
        for sink in self.sinks:
            sink.close()
        self.sinks = []
        if self.folder is not None and state:
            self.folder.status(state, self.step, self.total, reason or self._reason())

    def fail(self, error: BaseException) -> None:
        """The last status of a run that was stopped or failed."""
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ExtremaError):
            reason = f"{type(error).__name__}: {reason}"
        self.close("preempted" if isinstance(error, Preempted) else "failed", reason)
