"""Runs that are killed, signalled, or lose the reader of their output: saved, said, and continued to the same bits.

Covers: every signal of `STOPPING`, and a storm of them, at a step, before the first, in an evaluation and while
saving; a dead pipe; a second signal in a wait; a hang in reading, a step, an evaluation or a save; saves by the thread
that fail; death at every named point of a save and after a random time; two processes of which one is signalled, dies,
is stopped or hangs; death of one or all of two, with whole and with sharded weights.
"""

from __future__ import annotations

import errno
import hashlib
import json
import signal
from pathlib import Path

import pytest

from extrema_fast.config import to_dict
from extrema_fast.files import history
from extrema_fast.signals import STOPPING
from tests.dist.test_two_processes import LOSES, LOST
from tests.training.conftest import final_hash, status

# sends signals to this process when a function of a module is called for the n-th time
SENDS = """
import os, signal, threading, time
from extrema_fast import signals, train
from extrema_fast.evaluation import online
from extrema_fast.training import checkpoint, run
# as in a terminal, whatever started the tests (nohup)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signals.TOGETHER_S, signals.GRACE_S = 0.05, 0.3
def send(module, name, passes, numbers, gap=0.0):
    original, calls = getattr(module, name), []
    def storm():
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(gap)
    def sending(*args, **options):
        calls.append(1)
        if len(calls) == passes and os.environ.get("RANK", "0") == "0":
            if gap:
                # those after the first would end the function that sends them
                threading.Thread(target=storm, daemon=True).start()
            else:
                storm()
        return original(*args, **options)
    setattr(module, name, sending)
"""
STEPS = 8
POINTS = ("begin", "weights", "tensors", "state", "complete", "renamed", "latest", "pruned", "evaluated")


@pytest.fixture(scope="module")
def pretrain(originals, run_cli, tmp_path_factory):
    """`pretrain(name, ...)` -> (exit codes, output, run folder) of a run of 8 steps, each time in the same folder."""
    root = tmp_path_factory.mktemp("stopping")
    cfg = originals.config(train={"epochs": 2}, ckpt={"every_steps": 3})
    (root / "c.json").write_text(json.dumps(to_dict(cfg)))

    def run(name: str, *flags: str, fails: str = "", **options):
        out = root / name
        if fails:
            # of tests/faults/shim.c, below the run's folder
            options["env"] = {"SHIM": f"{out}/{fails}"}
        return *run_cli("pretrain", "--config", root / "c.json", "--out", out, *flags, **options), out

    return run


@pytest.fixture(scope="module")
def straight(pretrain) -> str:
    codes, text, out = pretrain("straight")
    assert codes == [0], text
    return final_hash(out, STEPS)


def check(tries, pretrain, straight, name, what, codes, text, out, code=75, processes=1) -> None:
    """The run ended with (one of) `code` and says so, and is continued to the same bits, with each evaluation once."""
    wanted, code = code if isinstance(code, tuple) else (code,), codes[0]
    state = "preempted" if code == 75 else "failed"
    held = code in wanted and set(codes) == {code} and "Traceback" not in text
    if (out / "status.json").exists():
        held = held and (code < 0 or status(out)["state"] == state)
    if code == 75:
        held = held and text.count("to continue:") == 1
    tries.expect(what, held, f"exit codes {codes}: {text[-500:]}")
    codes, text, out = pretrain(name, processes=processes)
    same = codes[0] == 0 and final_hash(out, STEPS) == straight if processes == 1 else codes == [0, 0]
    tries.expect(f"{what}: continued to the same bits", same, f"exit codes {codes}: {text[-500:]}")
    steps = [r["step"] for r in history(out / "log.jsonl", "eval", STEPS)]
    tries.expect(f"{what}: evaluations", steps == [0, 4, 8], steps)


# where a signal comes, and what is known of it
PLACES = {
    "at a step": ("train", "train_step"),
    "before the first step": ("train", "open_train"),
    "in an evaluation": ("online", "extract"),
    "while saving": ("checkpoint", "save_file"),
}

STORM = [signal.SIGTERM, signal.SIGHUP] * 10


def test_signals(tries, pretrain, straight):
    cases = [(place, [number] * 2) for place in PLACES for number in STOPPING]
    cases += [(place, STORM) for place in PLACES]
    if tries.factor == 1:
        # two places, and a signal of six
        one, two = tries.rng.permutation([*PLACES])[:2]
        cases = [(one, [STOPPING[tries.rng.integers(6)]] * 2), (two, STORM)]
    for i, (place, numbers) in enumerate(cases):
        module, name = PLACES[place]
        # the run is complete with its third save
        passes = 1 if place == "before the first step" else int(tries.rng.integers(1, 3))
        # two are one request, also where much time passes between them under load; a storm lasts
        gap, together = (0.02, 0.05) if numbers is STORM else (0.0, 60.0)
        call = f"send({module}, {name!r}, {passes}, {[*map(int, numbers)]}, {gap})"
        # under load it takes longer than that to write how it ended
        setup = f"{SENDS}\nsignals.TOGETHER_S, signals.GRACE_S = {together}, 5.0\n{call}"
        many = "a storm" if numbers is STORM else signal.Signals(numbers[0]).name
        # what comes later than together ends the run at once, and what comes after its end the process
        code = (75, *(128 + n for n in STORM), *(-n for n in STORM)) if numbers is STORM else 75
        what, name = f"{many} {place}, pass {passes}", f"signal{i}"
        check(tries, pretrain, straight, name, what, *pretrain(name, setup=setup), code=code)


def test_a_dead_pipe(tries, pretrain, straight):
    dead = "import os\nr, w = os.pipe()\nos.close(r)\nos.dup2(w, {fd})"
    codes, text, out = pretrain("pipe", setup=dead.format(fd=1))
    check(tries, pretrain, straight, "pipe", "standard output", codes, text, out)
    if tries.factor == 1:
        return
    # standard error alone is not missed
    codes, text, out = pretrain("error", setup=dead.format(fd=2))
    tries.expect("standard error", codes == [0] and final_hash(out, STEPS) == straight, codes)


# a thread that nothing wakes stands for a read of a dead file system
WAITS = """
def wait(*args, **options):
    threading.Thread(target=twice, daemon=True).start()
    t = threading.Thread(target=threading.Event().wait)
    t.start()
    while True:
        try:
            t.join()
        except KeyboardInterrupt:
            if not DEAF:
                raise
def twice():
    for _ in range(2):
        time.sleep(0.2)
        os.kill(os.getpid(), NUMBER)
train.train_step = wait
"""


def test_a_second_signal_ends_a_wait(tries, pretrain, straight):
    cases = [(deaf, n) for deaf in (True, False) for n in STOPPING]
    for i, (deaf, number) in enumerate(cases if tries.factor > 1 else cases[:1]):
        setup = SENDS + WAITS.replace("NUMBER", str(int(number))).replace("DEAF", str(deaf))
        what = f"{signal.Signals(number).name} twice, {'no handler runs' if deaf else 'waiting'}"
        result = pretrain(f"wait{i}", setup=setup)
        check(tries, pretrain, straight, f"wait{i}", what, *result, code=128 + number)


# the first signal at a step, the second once the run has recorded that it was preempted
LATE = """
send(train, "train_step", 2, [15])
leave = train.Trackers.__exit__
def late(*args):
    time.sleep(0.1)
    os.kill(os.getpid(), 15)
    time.sleep(0.1)
    return leave(*args)
train.Trackers.__exit__ = late
"""


def test_a_second_signal_after_the_end_was_recorded(tries, pretrain, straight):
    check(tries, pretrain, straight, "late", "a second signal late", *pretrain("late", setup=SENDS + LATE))


# a function that never returns, when it is called for the n-th time
HANGS = """
import threading
from extrema_fast import hangs, train
from extrema_fast.data.image_files import ImageFiles
from extrema_fast.evaluation import online
from extrema_fast.training import checkpoint
hangs.LOOK_S, hangs.TELL_S, hangs.END_S, hangs.TELL_STEPS, hangs.END_STEPS = 0.2, 0.5, 4.0, 1, 1
original, calls = PLACE.NAME, []
def hang(*args, **options):
    calls.append(1)
    if len(calls) == PASS:
        threading.Event().wait()
    return original(*args, **options)
PLACE.NAME = hang
"""
# where, and what is said of it: nothing changes while images are waited for
HANG_PLACES = {
    "reading": ("ImageFiles", "read_headers", "_plan (data/loader.py", "is saved in"),
    "a step": ("train", "train_step", "_step (train.py", ""),
    "an evaluation": ("online", "extract", "online_eval (evaluation/online.py", ""),
    "a save": ("checkpoint", "save_file", "write (training/checkpoint.py", ""),
}


def test_a_hang(tries, pretrain, straight):
    for i, place in enumerate(HANG_PLACES if tries.factor > 1 else ["reading"]):
        module, name, where, saved = HANG_PLACES[place]
        passes = 10 if place == "reading" else 2
        setup = HANGS.replace("PLACE", module).replace("NAME", name).replace("PASS", str(passes))
        codes, text, out = pretrain(f"hang{i}", setup=setup)
        stacks = (out / "debug" / "stacks_rank0.txt").read_text()
        held = where in text and saved in text and text.count("error:") == 1 and "in hang" in stacks
        tries.expect(f"{place} hangs: told", held, text[-1000:])
        check(tries, pretrain, straight, f"hang{i}", f"{place} hangs", codes, text, out, code=6)


# calls of the thread that saves, and where
FAILING = {
    "a full disk": f"checkpoints:write:{errno.ENOSPC}",
    "a full disk, weights": f"weights:write:{errno.ENOSPC}",
    "rename": f"checkpoints:rename:{errno.EIO}",
    "rename, weights": f"weights:rename:{errno.EIO}",
    "fsync": f"checkpoints:fsync:{errno.EIO}",
    "open": f"checkpoints:open:{errno.EROFS}",
}


def test_saves_that_fail(shim, tries, pretrain, straight):
    """The final one, too: the run is not complete, and what was saved before goes on."""
    if shim is None:
        pytest.skip("needs Linux and a C compiler")
    for n, what in enumerate(FAILING if tries.factor > 1 else ["rename"]):
        after = int(tries.rng.integers(0, 3))
        codes, text, out = pretrain(f"save{n}", fails=f"{FAILING[what]}:{after}")
        what = f"{what} fails after {after}"
        tries.expect(
            f"{what}: said", text.count("extrema-fast: error: ") == 1 and "step 8" in text, text[-500:]
        )
        check(tries, pretrain, straight, f"save{n}", what, codes, text, out, code=5)


def test_death(tries, pretrain, straight):
    """Without any cleaning up, at the points of a save and at random times."""
    points = tries.rng.permutation(POINTS)[: None if tries.factor > 1 else 1]
    for n, point in enumerate(points):
        at = f"{point}:{tries.rng.integers(1, 4)}"
        result = pretrain(f"point{n}", env={"EXTREMA_FAULT": at})
        check(tries, pretrain, straight, f"point{n}", f"killed at {at}", *result, code=-signal.SIGKILL)
    for n in range(tries.factor - 1):
        seconds = float(tries.rng.uniform(0.02, 0.6))
        codes, text, out = pretrain(f"time{n}", cpu_seconds=seconds)
        if codes != [0]:
            codes, text, out = pretrain(f"time{n}")
        held = codes == [0] and final_hash(out, STEPS) == straight
        tries.expect(f"killed after {seconds:.3f} s of work", held, f"exit codes {codes}: {text[-500:]}")


def test_one_of_two_processes_is_signalled(full_table, tries, pretrain, straight):
    for n, place in enumerate(p for p in PLACES if p != "before the first step"):
        module, name = PLACES[place]
        setup = f"{SENDS}\nsend({module}, {name!r}, 2, [{int(signal.SIGTERM)}])"
        result = pretrain(f"two{n}", setup=setup, processes=2)
        check(tries, pretrain, straight, f"two{n}", f"SIGTERM to one of two {place}", *result, processes=2)


def test_one_of_two_processes_is_lost(full_table, tries, pretrain):
    codes, text, out = pretrain("two", processes=2)
    assert codes == [0, 0], text
    wanted = final_hash(out, STEPS)
    for lost in (0, 1):
        for how, (happens, words) in LOST.items():
            what, name = f"process {lost} of two {how}", f"lost{lost}{how[:3]}"
            setup = LOSES.replace("HAPPENS", happens).replace("LOST:", f"{lost}:")
            codes, text, out = pretrain(name, processes=2, setup=setup)
            held = codes[1 - lost] == 6 and words.replace("LOST", str(lost)) in text
            held = held and "Traceback" not in text and ("is saved in" in text) == (lost == 1)
            tries.expect(what, held, f"exit codes {codes}: {text[-500:]}")
            codes, text, out = pretrain(name, processes=2)
            same = codes == [0, 0] and final_hash(out, STEPS) == wanted
            tries.expect(f"{what}: continued to the same bits", same, f"exit codes {codes}: {text[-500:]}")


# one of two processes dies once it has used some processor time, without any cleaning up; waits are short
DIES = """
import os, signal
from extrema_fast import distributed
distributed.ASK_S, distributed.TELL_S, distributed.LOST_S = 0.3, 0.6, 5.0
distributed.JOIN_S = distributed.WAIT_S = 20.0
distributed.STACKS_S = 0.6
if os.environ["RANK"] in RANKS:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
"""


def weights(out: Path) -> dict[str, str]:
    """Name -> sha256 of the files of the final weights, which every layout of checkpoints leads to."""
    files = sorted((out / "weights" / f"step_{STEPS:08d}").glob("*.safetensors"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_or_all_of_two_processes_die(full_table, tries, pretrain, parallel):
    flags = ("--system.parallel", parallel)
    codes, text, out = pretrain(parallel, *flags, processes=2)
    assert codes == [0, 0], text
    wanted = weights(out)
    assert len(wanted) == 2
    # at a point of the save, which the thread of process 0 passes, and of others where these save, too
    deaths = {}
    for n, point in enumerate(tries.rng.permutation(POINTS)[: 2 * tries.factor]):
        at = f"{point}:{1 + n % 2}"
        deaths[f"at {at}"] = {"env": {"EXTREMA_FAULT": at}, "setup": dies("", 1)}
    for _ in range(tries.factor):
        for ranks, who in (("0", "0"), ("1", "1"), ("01", "both")):
            seconds = float(tries.rng.uniform(0.02, 1.5))
            deaths[f"{who} after {seconds:.3f} s of work"] = {"setup": dies(ranks, seconds)}
    for n, (when, options) in enumerate(deaths.items()):
        name = f"{parallel} dies {n}"
        codes, text, out = pretrain(name, *flags, processes=2, **options)
        # those that were killed, ended before that, or lost the other
        held = set(codes) <= {-signal.SIGKILL, -signal.SIGPROF, 0, 2, 6} and "Traceback" not in text
        tries.expect(f"{parallel}, {when}: ended", held, f"exit codes {codes}: {text[-500:]}")
        codes, text, out = pretrain(name, *flags, processes=2)
        same = codes == [0, 0] and weights(out) == wanted
        tries.expect(
            f"{parallel}, {when}: continued to the same bits", same, f"exit codes {codes}: {text[-500:]}"
        )


def dies(ranks: str, seconds: float) -> str:
    return DIES.replace("RANKS", repr(ranks)).replace("SECONDS", str(seconds))
