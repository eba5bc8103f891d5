"""How far a pass over images is: a bar on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from ..training.logging import duration

log = logging.getLogger(__name__)


class ImageProgress:
    """Images done of a total: a bar on a terminal, else a line for every twentieth, at most one a second.

    what     the first word of bar and lines
    enabled  False: says nothing
    """

    def __init__(self, what: str, total: int, enabled: bool = True) -> None:
        self.what, self.total, self.enabled = what, total, enabled
        self.began, self.shown, self.shown_at = time.monotonic(), 0, 0.0
        self.bar: Any = self._rich() if enabled and sys.stderr.isatty() else None

    def _rich(self) -> Any:
        try:
            from rich import progress
            from rich.console import Console
        except ImportError:
            return None
        columns = (
            progress.TextColumn(self.what),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[text]}"),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )
        bar = progress.Progress(*columns, console=Console(file=sys.stderr))
        self.task = bar.add_task("", total=self.total, text="")
        bar.start()
        return bar

    def reached(self, images: int, note: str = "") -> None:
        """So many images are done; `note` is shown after the rate."""
        now = time.monotonic()
        text = f"{images / max(now - self.began, 1e-9):.0f} images/s" + (f", {note}" if note else "")
        if self.bar is not None:
            self.bar.update(self.task, completed=images, text=text)
        elif self.enabled and now - self.shown_at > 1 and images - self.shown >= self.total / 20:
            self.shown, self.shown_at = images, now
            left = duration((now - self.began) / images * (self.total - images))
            log.info("%s: %d of %d images, %s, left %s", self.what, images, self.total, text, left)

    def __enter__(self) -> ImageProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
