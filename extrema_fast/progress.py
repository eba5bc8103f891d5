"""Progress of long tasks: a bar on a terminal, otherwise an occasional line of text.

The level of the logger `extrema_fast` decides what is shown: WARNING (`--quiet`): warnings and errors; INFO (the
default of commands): also what a user needs, and progress; DEBUG (`--verbose`): also automatic choices and their
reasons. In Python the caller sets the level: `logging.basicConfig(level="INFO")` shows what a command shows.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, TextIO

from .errors import printable

log = logging.getLogger(__name__)

BAR_AFTER_S = 0.5


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


class Progress:
    """Progress of a long task; a task within another one has its bar below that one's.

    Args:
        what: what is counted; the first word of bar and lines.
        total: how many there are.
        start: how many were done before.
        enabled: False shows nothing; None: as the level of the logger says.
        lines: about how many lines are printed without a terminal; at least one a minute.
        pause_s: seconds before the first of these lines, and at least between two; the bar comes after half a second.
        stays: whether a finished bar stays on the screen.
        stream: standard output by default.

    Attributes:
        broken: whether the reader of a pipe has left (`| head`).
    """

    # a terminal has room for one display, which holds the bars of all tasks
    _display: ClassVar[Any] = None

    def __init__(
        self,
        what: str,
        total: int,
        start: int = 0,
        *,
        enabled: bool | None = True,
        lines: int = 40,
        pause_s: float = 0,
        stays: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.what, self.total, self.start, self.lines, self.pause_s = what, total, start, lines, pause_s
        self.enabled = log.isEnabledFor(logging.INFO) if enabled is None else enabled
        # a program without standard output has None
        self.stream: TextIO | None = stream or sys.stdout
        self.broken = self._owns = False
        self.bar: Any
        self.began, self.shown, self.shown_at = time.monotonic(), -total, -math.inf
        self.stays, self.bar, self._begun = stays, None, False
        if not pause_s:
            self._begin()

    def _begin(self) -> None:
        self._begun = True
        if self.enabled and (Progress._display or (self.stream and self.stream.isatty())):
            self.bar = Progress._display or self._open()
        if self.bar is not None:
            self.task = self.bar.add_task(self.what, total=self.total, completed=self.start, text="")

    def _open(self) -> Any:
        try:
            from rich import progress
            from rich.console import Console
            from rich.table import Column
        except ImportError:
            return None
        columns = (
            progress.TextColumn("{task.description}", markup=False),
            # what a long text leaves to them
            progress.BarColumn(table_column=Column(min_width=10)),
            progress.MofNCompleteColumn(table_column=Column(min_width=max(11, 2 * len(str(self.total)) + 1))),
            progress.TextColumn("left", table_column=Column(min_width=4)),
            progress.TimeRemainingColumn(table_column=Column(min_width=7)),
            progress.TextColumn("{task.fields[text]}", markup=False),
        )
        display = progress.Progress(*columns, console=Console(file=self.stream), transient=not self.stays)
        display.start()
        Progress._display, self._owns = display, True
        return display

    def update(self, done: int, text: str = "") -> None:
        """Moves the bar to `done`; with `text` (rates, losses) also shows it, on a line when one is due."""
        now = time.monotonic()
        # what is done at once would only flicker
        if not self._begun and now - self.began > BAR_AFTER_S:
            self._begin()
        if self.bar is not None:
            with self._showing():
                self.bar.update(self.task, completed=done, **({"text": text} if text else {}))
            return
        late = now - self.shown_at > 60
        if not text or not (late or done - self.shown >= self.total / self.lines or done == self.total):
            return
        if now - max(self.began, self.shown_at) < self.pause_s:
            return
        self.shown, self.shown_at = done, now
        left = (now - self.began) / max(done - self.start, 1) * (self.total - done)
        self.say(f"{self.what} {done:>{len(str(self.total))}}/{self.total}  {text}  left {duration(left)}")

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        text = printable(text)
        with self._showing():
            if self.bar is not None:
                self.bar.console.print(text, highlight=False, markup=False)
            elif self.enabled and self.stream is not None:
                self.stream.write(text + "\n")
                self.stream.flush()

    def close(self) -> None:
        """Ends the bar."""
        bar, self.bar = self.bar, None
        if bar is None:
            return
        with self._showing():
            if self._owns:
                Progress._display = None
                bar.stop()
            else:
                bar.remove_task(self.task)

    @contextmanager
    def _showing(self) -> Iterator[None]:
        """Context of writing: what is shown ends with its terminal or pipe, the work does not."""
        try:
            yield
        except OSError as error:
            self.enabled, self.bar = False, None
            display, Progress._display = Progress._display, None
            if display is not None:
                with suppress(OSError):
                    display.stop()
            self.broken = isinstance(error, BrokenPipeError)
            log.warning("%s: progress is no longer shown (%s)", self.what, error.strerror or error)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ImageProgress(Progress):
    """Images (or others) done of a total, with their rate, on standard error; a quick task prints no lines.

    Args:
        what: what is done to them.
        total: how many there are.
        enabled: False shows nothing; None: as the level of the logger says.
        unit: what they are.
    """

    def __init__(self, what: str, total: int, enabled: bool | None = None, *, unit: str = "images") -> None:
        super().__init__(what, total, enabled=enabled, lines=20, pause_s=5, stays=False, stream=sys.stderr)
        self.done, self.unit = 0, unit

    def __enter__(self) -> ImageProgress:
        return self

    def advance(self, images: int) -> None:
        """So many more are done."""
        self.reached(self.done + images)

    def reached(self, images: int, note: str = "") -> None:
        """So many are done; `note` is shown after the rate."""
        self.done = images
        rate = images / max(time.monotonic() - self.began, 1e-9)
        self.update(
            images, f"{rate:.{'0f' if rate >= 10 else '2g'}} {self.unit}/s" + (f", {note}" if note else "")
        )
