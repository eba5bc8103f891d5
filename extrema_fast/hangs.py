"""Finds out where a program hangs: stacks of all threads, and a watchdog over the steps of a run.

Reading from a dead file system, a lock or a device may block forever, where no exception can be raised. So a thread in
each process checks that steps finish; otherwise it reports where the program is, writes all stacks, and finally ends
the process.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from .errors import LostProcessError

log = logging.getLogger(__name__)

# no step has ended for so long: it is told, with the stacks of all threads
TELL_S = 120.0
# and the process ends
END_S = 1800.0
# both are at least so many times the longest step so far
TELL_STEPS, END_STEPS = 10, 30
# how often the watch looks
LOOK_S = 5.0
# a process that computes this share of the time, or reads and writes so many bytes a second, is at work
BUSY, BYTES_S = 0.2, 10_000
# what is left to save before a process is ended
SAVE_S = 120.0


def where(thread: int, without: str = __file__) -> str:
    """The innermost function of this package that a thread is in; empty: none.

    Args:
        thread: its identifier.
        without: a file that does not count.
    """
    here, frame = str(Path(__file__).parent), sys._current_frames().get(thread)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(here) and file not in (without, __file__):
            return f"{frame.f_code.co_name} ({Path(file).relative_to(here).as_posix()}:{frame.f_lineno})"
        frame = frame.f_back
    return ""


def everywhere(main: int) -> str:
    """Where the program and its other threads are, at most four of these."""
    quiet = ("signals", "lock", "watch", "watchdog")
    threads = [t for t in threading.enumerate() if t.ident != main and t.name not in quiet]
    others = [(t.name, where(t.ident or 0)) for t in threads]
    places = dict.fromkeys(f"{name} in {place}" for name, place in others if place)
    return "; ".join([f"the program is in {where(main) or 'another library'}", *list(places)[:4]])


def dump_stacks(folder: Path | None, rank: int, why: str) -> str:
    """Writes the stacks of all threads to `stacks_rank{rank}.txt`, or to standard error; says where they are."""
    names = "".join(f"  {t.ident:#018x} {t.name}\n" for t in threading.enumerate() if t.ident is not None)
    head = (
        f"{datetime.now().astimezone().isoformat(timespec='seconds')} process {os.getpid()}: {why}\n{names}\n"
    )
    with suppress(OSError):
        if folder is not None:
            folder.mkdir(exist_ok=True)
            file = folder / f"stacks_rank{rank}.txt"
            with open(file, "w", encoding="utf-8") as f:
                f.write(head)
                f.flush()
                faulthandler.dump_traceback(f, all_threads=True)
            return f"all stacks are in {file}"
    with suppress(OSError, ValueError, AttributeError):
        print(head, file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)  # type: ignore[arg-type]
    return "all stacks are above"


def _moved() -> int:
    """Bytes that this process has read and written so far, where the system tells."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/self/io").read_text().splitlines()[:2]
        return sum(int(line.split()[1]) for line in lines)
    return 0


def _is_debugged(thread: int) -> bool:
    """Whether a thread is at the prompt of a debugger."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_globals.get("__name__", "") in ("bdb", "pdb"):
            return True
        frame = frame.f_back
    return False


class Watchdog:
    """Context in which a process must go on: steps end, or it works on something else.

    Time counts in which no step has ended and the process neither computes, reads nor writes; between two steps of the
    loop all time counts. What it is stopped for, or waits for other processes (`distributed.Watch`), does not.

    Args:
        waits: whether this process waits for others now.
        rank: of this process.

    Attributes:
        debug: folder for the stacks; None: standard error.
        farewell: called before the process is ended, with the reason and whether nothing that is saved changes
            meanwhile; returns what it has saved.
    """

    def __init__(self, waits: Callable[[], bool] = lambda: False, rank: int = 0) -> None:
        self.waits, self.rank = waits, rank
        self.debug: Path | None = None
        self.farewell: Callable[[str, bool], str] = lambda reason, still: ""
        self._main, self._left, self._lock = threading.get_ident(), threading.Event(), threading.Lock()
        # of any kind; steps; when the last step ended, and the longest one
        self._events, self._steps, self._began, self._longest = 0, 0, 0.0, 0.0
        self._aside = self._still = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        # held while the process is being ended
        self._thread.join(2 * SAVE_S)

    def step(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        if self._steps > 1:
            # the first two compile and fill caches
            self._longest = max(self._longest, now - self._began)
        self._steps, self._events, self._began = self._steps + 1, self._events + 1, now

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context of work between two steps, which may take long."""
        self._aside = True
        try:
            yield
        finally:
            self._aside, self._events, self._began = False, self._events + 1, time.monotonic()

    @contextmanager
    def still(self) -> Iterator[None]:
        """Context in which nothing that is saved changes."""
        self._still = True
        try:
            yield
        finally:
            with self._lock:
                self._still = False

    def _run(self) -> None:
        waited, told, seen = 0.0, 0.0, -1
        before, used, moved = time.monotonic(), time.process_time(), _moved()
        while not self._left.wait(LOOK_S):
            now, cpu, total = time.monotonic(), time.process_time(), _moved()
            # a process that was stopped for a while has not waited for that time
            passed = min(now - before, 2 * LOOK_S)
            idle = cpu - used < BUSY * passed and total - moved < BYTES_S * passed
            before, used, moved = now, cpu, total
            events = self._events
            if events != seen or self.waits() or _is_debugged(self._main):
                waited, told, seen = 0.0, 0.0, events
                continue
            if idle or (self._steps and not self._aside):
                waited += passed
            if waited >= max(END_S, END_STEPS * self._longest):
                self._end(events, waited)
            elif waited >= max(TELL_S, TELL_STEPS * self._longest) and waited >= 2 * told:
                reason = self._describe(waited)
                if not told:
                    reason += f"; {dump_stacks(self.debug, self.rank, reason)}"
                told = waited
                log.warning("%s", reason)

    def _describe(self, waited: float) -> str:
        what = "no step has ended" if self._steps else "nothing has happened"
        return f"{what} for {waited:.0f} s: {everywhere(self._main)}"

    def _end(self, events: int, waited: float) -> None:
        """Ends this process, unless it has gone on."""
        with self._lock:
            if self._events != events:
                return
            reason, still, saved = self._describe(waited), self._still, [""]

            def save() -> None:
                saved[0] = self.farewell(reason, still)

            last = threading.Thread(target=save, daemon=True)
            last.start()
            last.join(SAVE_S)
            log.error(
                "extrema-fast: error: %s%s; %s; see whether disk, network file system or device answers, then the same "
                "command continues",
                *(reason, saved[0], dump_stacks(self.debug, self.rank, reason)),
            )
            os._exit(LostProcessError.exit_code)
