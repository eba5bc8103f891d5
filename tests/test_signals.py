"""Signals: the flag, a second signal, what may be interrupted, and processes that hang.

Covers: every signal of `STOPPING`; two that come together; handlers of others; SIGHUP under nohup; `interruptible`; a
process that cannot run a handler is ended by the second signal with 128 + its number, after the farewell, and one that
has left its context is not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from extrema_fast import pretrain
from extrema_fast import signals as module
from extrema_fast.config import from_dict, smoke
from extrema_fast.signals import STOPPING, Signals, Stopped
from extrema_fast.training.logging import TrainLog


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_sets_a_flag_and_a_second_raises(monkeypatch, number):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert not signals.stop
        send(number)
        # as `timeout` does: to the process, and to its group
        send(number)
        assert signals.stop
        monkeypatch.setattr(module, "TOGETHER_S", 0.0)
        with pytest.raises(Stopped) as e:
            send(number)
        assert e.value.forced and e.value.number == number
        # what the second began is not interrupted
        send(number)
    assert signal.getsignal(number) is before


def test_handlers_of_others_are_called(monkeypatch):
    received: list[int] = []
    monkeypatch.setattr(module, "TOGETHER_S", 60.0)
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with Signals():
            send(signal.SIGUSR1)
            send(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert received == [signal.SIGUSR1] * 2


def test_nohup():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            send(signal.SIGHUP)
            assert not signals.stop
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_interruptible():
    with Signals() as signals:
        with pytest.raises(Stopped) as e, signals.interruptible():
            send(signal.SIGTERM)
        assert not e.value.forced and signals.stop
        # one that came before, too
        with pytest.raises(Stopped), signals.interruptible():
            raise AssertionError("the block must not begin")


def test_in_another_thread_there_are_no_handlers():
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with Signals():
            assert signal.getsignal(signal.SIGTERM) is before

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


# a lock stands for a collective or a read: no handler runs while the main thread waits in C for another thread
HANGS = """
import signal, sys, threading
from extrema_fast import signals
signals.GRACE_S = 0.05
signal.pthread_sigmask(signal.SIG_BLOCK, [])
deaf = threading.Thread(target=lambda: (print("hangs", flush=True), threading.Event().wait()))
with signals.Signals() as s:
    s.farewell = lambda: print("farewell", flush=True)
    deaf.start()
    while True:
        try:
            deaf.join()
        except KeyboardInterrupt:
            pass
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_hangs_is_ended_by_the_second(number):
    with subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(number)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            # the first may not have arrived yet; one more ends it
            time.sleep(module.TOGETHER_S * 1.5)
            process.send_signal(number)
        assert process.wait(1) == 128 + number and process.stdout.read() == "farewell\n"


def test_a_program_that_has_ended_by_itself_is_not_ended(monkeypatch):
    monkeypatch.setattr(module, "TOGETHER_S", 0.0)
    monkeypatch.setattr(module, "GRACE_S", 60.0)
    ended: list[int] = []
    monkeypatch.setattr(module.os, "_exit", ended.append)
    with pytest.raises(Stopped), Signals():
        send(signal.SIGINT)
        send(signal.SIGINT)
    for thread in threading.enumerate():
        if thread.name == "signals":
            thread.join(60)
    assert not ended


def test_the_thread_that_watches_ends_with_the_context():
    # it holds what `farewell` holds: freed in a thread while Python ends, tensors abort the process
    interval = sys.getswitchinterval()
    # this thread goes on until it waits for the other
    sys.setswitchinterval(10)
    try:
        with Signals():
            assert "signals" in [t.name for t in threading.enumerate()]
        assert "signals" not in [t.name for t in threading.enumerate()]
    finally:
        sys.setswitchinterval(interval)


def test_a_signal_after_the_end_was_written_is_what_status_says(tmp_path, monkeypatch):
    leave = TrainLog.__exit__

    def late(self, *args):
        leave(self, *args)
        raise Stopped(signal.SIGHUP, forced=True)

    monkeypatch.setattr(TrainLog, "__exit__", late)
    change = {"out": str(tmp_path / "run"), "train": {"epochs": 1}, "eval": {"every_epochs": 0}}
    with pytest.raises(Stopped):
        pretrain(from_dict(change, smoke()), progress=False)
    found = json.loads((tmp_path / "run/status.json").read_text())
    assert (found["state"], found["exit_code"]) == ("failed", 128 + signal.SIGHUP)
