"""Signals that end a program: the first asks it to stop, the second ends any wait.

Python runs a handler only between bytecode instructions, so a read from a dead network file system, or a collective
that a lost process never joins, could delay it forever. So a thread reads the signals as they arrive, and ends the
program if it has not ended by itself after the second.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distributed import World

# a lost terminal, batch systems and launchers, Ctrl-C and Ctrl-\
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# `timeout` and some launchers send a signal to a process and again to its group: within this time, one request
# torchrun passes on what its processes may have got from a batch system, too
TOGETHER_S = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.2
# what is left to a program to end by itself after the second signal
GRACE_S = 5.0


class Stopped(KeyboardInterrupt):
    """Raised where the program is, by a signal that does not wait.

    Args:
        number: of the signal.
        forced: whether it is a second one.
    """

    def __init__(self, number: int, forced: bool) -> None:
        again = "a second signal" if forced else "a signal"
        super().__init__(f"ended by {again} ({signal.Signals(number).name})")
        self.number, self.forced = number, forced


@contextmanager
def watched(farewell: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Context in which a second signal ends the process (exit code 128 + signal) where it hangs.

    No effect outside the main thread.

    Args:
        farewell: called before that; it may hang.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    left = threading.Event()
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    previous = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(receiving, left, farewell), name="signals", daemon=True)
    watch.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(previous)
        os.close(sending)
        # its `farewell` may hold the last reference to a whole run, whose tensors must not be freed in a thread
        # while Python ends: that aborts the process
        watch.join(GRACE_S)


def _watch(receiving: int, left: threading.Event, farewell: Callable[[], None]) -> None:
    first = None
    with open(receiving, "rb", buffering=0) as pipe:
        while numbers := pipe.read(64):
            stopping = [n for n in numbers if n in STOPPING]
            now = time.monotonic()
            if stopping and first is not None and now - first > TOGETHER_S:
                break
            if stopping and first is None:
                first = now
        else:
            return
        # read from until the end: Python would tell of every further signal that nobody reads it
        if left.wait(GRACE_S):
            return
        last = threading.Thread(target=farewell, daemon=True)
        last.start()
        last.join(1.0)
        os._exit(128 + stopping[-1])


class Signals:
    """Context in which the signals of `STOPPING` only set a flag: the loop finishes its step, saves and stops.

    A second signal raises `Stopped` at once, and ends the process where that cannot be raised; others do
    nothing. SIGHUP stays ignored where it is (nohup). No effect outside the main thread.

    Attributes:
        stop: whether a signal has come; may be set for another reason to stop.
        raises: whether the first signal, too, raises `Stopped`: where there is nothing to save.
        ended: whether the program has recorded how it ends: a second signal raises nothing any more.
        farewell: called before a process that hangs is ended.
    """

    def __init__(self) -> None:
        self.stop = False
        self.raises = False
        self.ended = False
        self.farewell: Callable[[], None] = lambda: None
        self._at, self._forced = 0.0, False
        self._previous: dict[int, Any] = {}
        self._watched = watched(lambda: self.farewell())

    def __enter__(self) -> Signals:
        self._watched.__enter__()
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._watched.__exit__(None, None, None)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context of work that leaves nothing half done: a signal raises `Stopped` in it.

        Raises:
            Stopped: also when a signal has come before.
        """
        before, self.raises = self.raises, True
        try:
            if self.stop:
                raise Stopped(signal.SIGTERM, forced=False)
            yield
        finally:
            self.raises = before

    def stop_agreed(self, world: World, log_line_due: bool = True) -> bool:
        """True on all processes alike once any of them got a signal.

        Args:
            log_line_due: several GPUs ask only then, because asking waits for the other processes.
        """
        if world.size > 1 and world.device.type == "cuda" and not log_line_due:
            return False
        return world.any(self.stop)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), not self.stop
        self.stop = True
        if first:
            self._at = now
        previous = self._previous.get(number)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)
        if first and self.raises:
            raise Stopped(number, forced=False)
        if not first and not self._forced and not self.ended and now - self._at > TOGETHER_S:
            # once: what records the end is not interrupted by further ones
            self._forced = True
            raise Stopped(number, forced=True)
