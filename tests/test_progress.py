"""Progress of long tasks.

Covers: what follows the level of the logger; lines without a terminal, of a run and of a tool; a bar on a terminal, a
task within a task; a pipe whose reader has left, where no bar is left over.
"""

from __future__ import annotations

import io
import logging
import sys

import pytest

from extrema_fast import progress
from extrema_fast.progress import ImageProgress, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_about_forty_lines():
    stream = io.StringIO()
    off = Progress("step", 10, enabled=False, stream=stream)
    off.update(1, "loss")
    off.say("x")
    assert stream.getvalue() == ""
    screen = Progress("step", 1000, stream=stream)
    for at in range(1, 1001):
        screen.update(at)
        screen.update(at, f"loss {at}")
    lines = stream.getvalue().splitlines()
    assert 38 <= len(lines) <= 43 and lines[-1].startswith("step 1000/1000  loss 1000  left 0:00")


def test_a_tools_lines_come_now_and_then(clock, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with ImageProgress("decoding", 100, enabled=True) as quick:
        for _ in range(100):
            clock[0] += 0.04
            quick.advance(1)
    assert stream.getvalue() == "", "done within five seconds"
    clock[0] = 0
    with ImageProgress("decoding", 1000, enabled=True) as slow:
        for _ in range(100):
            clock[0] += 1
            slow.advance(10)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 20 and lines[0] == "decoding   50/1000  10 images/s  left 1:35"


@pytest.mark.parametrize(("level", "shown"), [("WARNING", False), ("INFO", True), ("DEBUG", True)])
def test_progress_follows_the_level_of_the_logger(level, shown, monkeypatch):
    logger = logging.getLogger("extrema_fast")
    monkeypatch.setattr(logger, "level", getattr(logging, level))
    logger.manager._clear_cache()
    assert ImageProgress("decoding", 10).enabled is shown
    assert ImageProgress("decoding", 10, enabled=not shown).enabled is not shown
    monkeypatch.undo()
    logger.manager._clear_cache()


def test_a_bar_on_a_terminal_and_one_below_it(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with Progress("step", 10, stream=stream) as screen:
        assert screen.bar is not None
        screen.update(4, "loss 0.5000")
        screen.say("hello [1/2]")
        with ImageProgress("features [/]", 20, enabled=True) as below:
            below.reached(2)
            assert below.bar is None, "it may be done at once"
            below.began -= 1
            below.reached(3)
            assert below.bar is screen.bar
            below.reached(7)
            assert [(t.description, t.completed) for t in screen.bar.tasks] == [
                ("step", 4),
                ("features [/]", 7),
            ]
        assert [t.description for t in screen.bar.tasks] == ["step"]
        screen.update(10)
        screen.bar.refresh()
    assert "hello [1/2]" in stream.getvalue() and "loss 0.5000" in stream.getvalue()
    assert Progress._display is None


# of the thread that refreshes the bar
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("error", "terminal"),
    [(BrokenPipeError(32, "Broken pipe"), False), (OSError(5, "Input/output error"), True)],
)
def test_what_shows_it_may_go_away(error, terminal, caplog):
    class Stream(io.StringIO):
        gone = False

        def isatty(self) -> bool:
            return terminal

        def write(self, text: str) -> int:
            if self.gone:
                raise error
            return super().write(text)

    stream = Stream()
    before = sys.stdout, sys.stderr
    screen = Progress("step", 10, stream=stream)
    stream.gone = True
    screen.say("x")
    assert screen.broken is not terminal and Progress._display is None and (sys.stdout, sys.stderr) == before
    screen.update(3, "loss")
    screen.close()
    (line,) = [r.getMessage() for r in caplog.records]
    assert f"no longer shown ({error.strerror})" in line
