"""Two processes over gloo against one.

Covers: equal losses and weights to fp32 rounding, BYOL and InfoNCE (gathered targets), with accumulation, from a trunk;
saved by two, continued by one and the other way round; a non-finite loss on one rank skips the step on both, which is kept;
a signal to one rank stops both at the same step; an error on rank 0 ends both with its exit code; leaving; a partner
that never comes, dies, is stopped or hangs; which process opens the images first.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from extrema_fast.distributed import World
from extrema_fast.tools.replay import replay
from extrema_fast.files import history
from tests.training.conftest import command, final_hash, saved, status, tiny
from tests.weights._weights import foreign_vit

__all__ = ["command"]

RUN = {
    # a large eps: AdamW's division by tiny moments would turn rounding into steps
    "optim": {"eps": 1e-2},
    "ckpt": {"every_steps": 2},
    "eval": {"every_epochs": 2},
    "log": {"every_steps": 1},
}
STEPS = 6


@pytest.fixture
def pretrain(command, tmp_path):
    """`pretrain(folder, *flags, processes=..., ...)` -> (exit codes, output, folder)."""

    def run(name: str, *flags: str, **options):
        return *command(tiny(tmp_path / name, RUN), *flags, **options), tmp_path / name

    return run


def assert_close(a: Path, b: Path) -> None:
    """Losses, norms and all saved tensors agree to fp32 rounding."""
    for x, y in zip(*(history(p / "log.jsonl", "train", STEPS) for p in (a, b)), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)
    one, two = saved(a, STEPS), saved(b, STEPS)
    assert one.keys() == two.keys()
    moved = 0
    for name in one:
        if not name.startswith("counters"):
            # a gradient adds up terms that cancel: its rounding is that of the largest
            atol = 5e-5 * float(one[name].abs().max()) if name.startswith("optimizer.") else 1e-6
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=max(atol, 1e-6), msg=name)
            moved += name.endswith("exp_avg") and bool(one[name].abs().max() > 0)
    assert moved > 10


@pytest.mark.parametrize(
    ("loss", "accumulation", "begun"), [("byol", 2, False), ("infonce", 1, True), ("infonce", 2, False)]
)
def test_two_equal_one(pretrain, tmp_path, loss, accumulation, begun):
    flags = ["--head.loss", loss]
    if accumulation == 2 and loss == "infonce":
        flags += ["--head.queue", "12"]
    if begun:
        # the trunk is frozen for one of six steps
        torch.save(foreign_vit(tiny(tmp_path, RUN).model), tmp_path / "vit.pth")
        flags += ["--init-from", str(tmp_path / "vit.pth"), "--optim.warmup-epochs", "1"]
    codes, text, one = pretrain("one", *flags)
    assert codes == [0], text
    more = ["--train.accumulation", str(accumulation)]
    codes, text, two = pretrain("two", *flags, *more, processes=2)
    assert codes == [0, 0], text
    assert_close(one, two)
    assert json.loads((two / "env.json").read_text())["world_size"] == 2
    # one process writes and prints
    assert len(history(two / "log.jsonl", "train", STEPS)) == STEPS and text.count("complete: 6 steps") == 1
    assert (two / "log.jsonl").read_text().count('"kind": "train"') == STEPS
    assert text.count("the trunk is frozen for 1 step,") == text.count("left out         class token") == begun


def test_process_0_evaluates_heads_with_batch_norm_alone(pretrain):
    codes, text, out = pretrain("run", "--head.norm", "batch", processes=2)
    assert codes == [0, 0], text
    assert all("teacher_proj_std" in r for r in history(out / "log.jsonl", "eval", STEPS))


# graphs without code generation
EAGER_BACKEND = """
from extrema_fast.training import step
step.BACKEND = "aot_eager"
"""


def test_compiled_blocks_on_two_equal_plain_ones_on_one(pretrain):
    codes, text, one = pretrain("one")
    assert codes == [0], text
    codes, text, two = pretrain("two", "--train.compile", "block", processes=2, setup=EAGER_BACKEND)
    assert codes == [0, 0], text
    assert_close(one, two)
    codes, text, _ = pretrain("three", "--train.compile", "step", processes=2)
    assert codes == [2, 2] and "bypasses the all-reduce of gradients between 2 processes" in text


@pytest.mark.parametrize(("rank", "local_rank", "turn"), [(0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 2)])
def test_one_process_of_each_machine_opens_the_images_first(monkeypatch, rank, local_rank, turn):
    for name, value in (("RANK", rank), ("WORLD_SIZE", 4), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, str(value))
    done = []
    # what the others send: nobody has failed
    monkeypatch.setattr(World, "broadcast", lambda *_: done.append("broadcast"))
    monkeypatch.setattr(World, "all_gather", lambda *_: done.append("all-gather") or [None] * 4)
    assert World(torch.device("cpu"), rank, 4).rank_zero_first(lambda: len(done)) == turn
    assert done == ["broadcast", "all-gather", "all-gather"]


STOP_ONE = """
import os, signal
from extrema_fast import train
original = train.train_step
def stopping(run, batch):
    if run.step == 2 and run.world.rank == run.world.size - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(run, batch)
train.train_step = stopping
"""


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_continued_by_another_number(pretrain, before, after):
    loss = ["--head.loss", "infonce", "--head.queue", "12"]
    codes, text, straight = pretrain("straight", *loss)
    assert codes == [0], text
    codes, text, out = pretrain("run", *loss, processes=before, setup=STOP_ONE)
    # the signal went to the last rank alone
    assert codes == [75] * before, text
    assert status(out)["step"] == 3
    assert (out / "checkpoints" / "step_00000003" / "COMPLETE").exists()
    codes, text, _ = pretrain("run", *loss, processes=after)
    assert codes == [0] * after, text
    assert text.count("continuing at step 3 of 6") == 1
    assert_close(straight, out)


NAN_ON_ONE = """
from extrema_fast.models.extrema import ExtreMA
import torch.distributed
original, calls = ExtreMA.loss, []
def bad(self, *args):
    calls.append(1)
    loss = original(self, *args)
    return loss * float("nan") if len(calls) == 3 and torch.distributed.get_rank() == 1 else loss
ExtreMA.loss = bad
"""


def test_a_bad_loss_on_one_rank_skips_on_both(pretrain):
    codes, text, out = pretrain("run", "--eval.every-epochs", "0", processes=2, setup=NAN_ON_ONE)
    assert codes == [0, 0], text
    records = history(out / "log.jsonl", "train", STEPS)
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1, 1]
    assert records[2]["loss"] is None and records[3]["loss"] is not None
    counts = load_file(out / "checkpoints" / "step_00000006" / "state.safetensors")
    assert {int(v) for k, v in counts.items() if k.endswith(".step")} == {STEPS - 1}
    # what was kept holds the rows of both; nothing spoils them here
    for rank, images in ((None, 8), (1, 4)):
        found = replay(out, rank=rank)
        assert (found["step"], found["images"], found["same_rows"], found["first"]) == (3, images, True, None)


def test_an_error_on_rank_0_and_a_batch_that_does_not_divide(pretrain, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("x")
    codes, text, _ = pretrain("run", processes=2)
    assert codes == [2, 2] and "not a run" in text
    codes, text, out = pretrain("other", "--train.batch-size", "9", processes=2)
    assert codes == [2, 2] and "8 or 10" in text
    assert text.count("9 does not divide over 2 processes") == 1
    assert not out.exists()


LEAVE = """
import os, torch
from extrema_fast.distributed import start
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for _ in range(60):
    with start("cpu") as world:
        model = world.wrap(torch.nn.Linear(3, 3))
        model(torch.ones(1, 3)).sum().backward()
        for _ in range(3):
            world.sum(torch.ones(3))
    del model
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="one core for both processes, on Linux")
def test_processes_part_without_a_deadlock(run_cli):
    # with DistributedDataParallel the last to hold the group, each process stops within a few rounds; see World.wrap
    codes, text = run_cli("--version", processes=2, setup="import faulthandler\nfaulthandler.dump_traceback_later(60, exit=True)" + LEAVE)
    assert codes == [0, 0], text


@pytest.mark.parametrize(("rank", "words"), [(0, "for process 1 of 2 at 127.0.0.1:"), (1, "for process 0,")])
def test_a_partner_that_never_comes(run_cli, tmp_path, rank, words):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    short = "from extrema_fast import distributed as d\nd.JOIN_S, d.TELL_S = 0.3, 0.1"
    codes, text = run_cli("pretrain", "smoke", "--out", tmp_path / "run", env=env, setup=short)
    assert codes == [2], text
    assert f"process {rank} has waited" in text and text.count(words) >= 2 and "socket.cpp" not in text and "Traceback" not in text


# what happens to process LOST at step 3; a child ends it when the other has ended, since it could not be waited for
LOSES = """
import os, signal, subprocess, threading
from extrema_fast import distributed, train
distributed.ASK_S, distributed.TELL_S, distributed.LOST_S, distributed.WAIT_S = 0.3, 0.6, 3.0, 6.0
distributed.STACKS_S = 0.6
original = train.train_step
def step(run, batch):
    if run.step == 3 and run.world.rank == LOST:
        pid, parent = os.getpid(), os.getppid()
        both = open(f"/proc/{parent}/task/{parent}/children").read().split()
        other = next(p for p in both if p != str(pid))
        runs = f"grep -q State:.[^Z] /proc/{other}/status"
        subprocess.Popen(["sh", "-c", f"while {runs}; do sleep 0.05; done; kill -9 {pid}"])
        HAPPENS
    return original(run, batch)
train.train_step = step
"""
LOST = {
    "dies": ("os.kill(os.getpid(), signal.SIGKILL)", "another process of the run has ended"),
    "is stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", "for process LOST, which does not answer"),
    "hangs": ("threading.Event().wait()", "for process LOST, which is in _step (train.py:"),
}


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="/proc tells the other process")
@pytest.mark.parametrize("how", LOST)
def test_a_partner_that(pretrain, how):
    happens, words = LOST[how]
    setup = LOSES.replace("HAPPENS", happens).replace("LOST:", "1:")
    flags = ("--system.deterministic",) if how == "is stopped" else ()
    codes, text, out = pretrain("run", *flags, processes=2, setup=setup)
    assert codes == [6, -9], text
    assert words.replace("LOST", "1") in text and text.count("error:") == 1 and "Traceback" not in text
    # saved with what was done
    assert status(out)["state"] == "failed" and (out / "latest").read_text() == "step_00000003\n"
    assert "step 3 is saved in" in text and "step 3 is saved in" in status(out)["reason"]
    if how == "hangs":
        both = [(out / "debug" / f"stacks_rank{n}.txt").read_text() for n in (0, 1)]
        assert "process 0 of 2 has waited" in both[0] and "in step" in both[1]
    if how == "is stopped":
        assert pretrain("run", *flags, processes=2)[0] == [0, 0]
        assert pretrain("straight", *flags, processes=2)[0] == [0, 0]
        assert final_hash(out, STEPS) == final_hash(out.with_name("straight"), STEPS)
