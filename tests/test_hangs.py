"""The watch over the steps of a run, and stacks.

Covers: a process that waits is told where it is and ends; one that computes, reads, waits for others, is suspended or
takes steps is not; limits follow the longest step; what is saved first; stacks of all threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from extrema_fast import hangs
from extrema_fast.hangs import Watchdog, dump_stacks, everywhere, where


@pytest.fixture
def ended(monkeypatch) -> Iterator[dict]:
    """Filled when the process is to end; short limits, and a clock that each look moves by one second."""
    found: dict = {"event": threading.Event(), "cpu": 0.0, "now": 0.0, "moved": 0}

    def end(code: int) -> None:
        found["code"] = code
        found["event"].set()

    monkeypatch.setattr(hangs.os, "_exit", end)
    monkeypatch.setattr(hangs, "TELL_S", 5.0)
    monkeypatch.setattr(hangs, "END_S", 20.0)
    monkeypatch.setattr(hangs, "LOOK_S", 1.0)
    monkeypatch.setattr(hangs, "_moved", lambda: found["moved"])
    monkeypatch.setattr(hangs.time, "monotonic", lambda: found["now"])
    monkeypatch.setattr(hangs.time, "process_time", lambda: found["cpu"])
    yield found


def looks(dog: Watchdog, found: dict, count: int, each: Callable[[], None] = lambda: None) -> bool:
    """Lets the watch look so many times, a second each; whether the process was to end."""
    left = iter(range(count))

    def wait(seconds: float) -> bool:
        found["now"] += 1.0
        each()
        return next(left, None) is None or found["event"].is_set()

    dog._left.wait = wait  # type: ignore[method-assign]
    with dog:
        dog._thread.join(10)
    return found["event"].is_set()


def test_a_process_that_waits_ends(ended, tmp_path, caplog):
    dog = Watchdog(rank=3)
    dog.debug = tmp_path / "debug"
    said = []
    dog.farewell = lambda reason, still: said.append((reason, still)) or "; saved"
    with dog.still():
        assert not looks(dog, ended, 18)
    assert caplog.text.count("nothing has happened for 5 s: the program is in ") == 1
    assert caplog.text.count("nothing has happened for") == 2, "told again when it has doubled"
    text = (tmp_path / "debug" / "stacks_rank3.txt").read_text()
    assert "nothing has happened for 5 s" in text and "watchdog" in text and "test_hangs.py" in text
    dog = Watchdog()
    dog.debug, dog.farewell = (
        tmp_path / "debug",
        lambda reason, still: said.append((reason, still)) or "; saved",
    )
    with dog.still():
        assert looks(dog, ended, 25) and ended["code"] == 6
    assert (
        len(said) == 1
        and said[0][1]
        and "for 20 s" in said[0][0]
        and "; saved; all stacks are in" in caplog.text
    )


def test_a_process_at_work_goes_on(ended):
    def works() -> None:
        ended["cpu"] += 0.5

    def reads() -> None:
        ended["moved"] += 20_000

    def suspended() -> None:
        ended["now"] += 1000.0
        if ended["now"] > 5000:
            dog.step()

    assert not looks(Watchdog(), ended, 60, works) and not looks(Watchdog(), ended, 60, reads)
    assert not looks(Watchdog(lambda: True), ended, 60)
    dog = Watchdog()
    assert not looks(dog, ended, 60, dog.step)
    dog = Watchdog()
    assert not looks(dog, ended, 8, suspended)
    # between two steps computing is no reason
    dog = Watchdog()
    dog.step()
    with dog.aside():
        assert not looks(dog, ended, 60, works)
    dog = Watchdog()
    dog.step()
    assert looks(dog, ended, 60, works)


def test_limits_follow_the_longest_step(ended):
    dog = Watchdog()
    for _ in range(4):
        dog.step()
        ended["now"] += 3.0
    # 30 of 3 seconds
    assert not looks(dog, ended, 85)
    dog = Watchdog()
    dog._longest = 3.0
    assert looks(dog, ended, 100)


def test_stacks(tmp_path, capfd):
    entered, leave = threading.Event(), threading.Event()

    def reading() -> None:
        entered.set()
        leave.wait()

    thread = threading.Thread(target=reading, name="reader")
    thread.start()
    entered.wait()
    try:
        told = dump_stacks(tmp_path, 0, "why")
        text = (tmp_path / "stacks_rank0.txt").read_text()
        assert told.endswith("stacks_rank0.txt") and "why" in text and " reader" in text
        assert text.count("in reading") == 1 and text.count("most recent call first") >= 2
        (tmp_path / "file").touch()
        assert dump_stacks(tmp_path / "file", 0, "elsewhere") == "all stacks are above"
        assert where(thread.ident) == "" and "the program is in" in everywhere(threading.get_ident())
    finally:
        leave.set()
        thread.join()
