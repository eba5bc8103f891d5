"""Prefetching on a CPU, waiting for images, decoding threads.

Covers: on a CPU batches are the loader's, drawn, with the time spent in the loader; on a GPU (simulated) the time its
stream waited; when waiting is reported (not at first, not twice, again when worse), the remedy that fits, the share on
the progress line; decoding threads from the cores. Real streams and buffers: tests/gpu/test_data.py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._pytree import tree_leaves

from extrema_fast.config import from_dict, smoke
from extrema_fast.data import loader as data
from extrema_fast.data.prefetch import _on_gpu, prefetch
from extrema_fast.distributed import World
from extrema_fast.errors import install
from extrema_fast.training import run as run_module
from extrema_fast.training.draw import draw
from extrema_fast.training.logging import DataWaitWarning

pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")

TINY = {
    "data": {"loader": "pil", "threads": 1, "limit": 24},
    "model": {"width": 16, "depth": 2, "drop_path": 0.2, "patch_size": 16},
    "mask": {"ratio": 0.5},
    "head": {"hidden": 16, "out": 8, "predictor_hidden": 16},
    "train": {"batch_size": 8, "accumulation": 2},
}


def begin(**data: Any) -> run_module.Run:
    cfg = from_dict({"data": data}, from_dict(TINY, smoke()))
    return run_module.build(cfg, World(torch.device("cpu")), run_module.open_train(cfg))


def test_on_a_cpu_batches_are_the_loaders_with_their_draws():
    run, cpu = begin(), torch.device("cpu")
    with run_module.open_loader(run) as one, run_module.open_loader(run) as two:
        for a, b in itertools.islice(zip(prefetch(one, partial(draw, run.cfg), cpu), two, strict=True), 5):
            assert torch.equal(a.images, b.images) and torch.equal(a.index, b.index)
            assert (a.epoch, a.step) == (b.epoch, b.step) and a.waited > 0
            drawn, expected = a.micro_batches, draw(run.cfg, b.images, b.index, b.epoch)
            assert len(drawn) == 2 and all(map(torch.equal, tree_leaves(drawn), tree_leaves(expected)))


def test_waiting_is_the_loaders_time_not_the_draws(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow(seconds, result):
        clock[0] += seconds
        return result

    batch = data.Batch(torch.zeros(1), torch.zeros(1), 0, 0)
    loader = (slow(seconds, batch) for seconds in (3.0, 5.0))
    fed = prefetch(loader, lambda *args: slow(100.0, None), torch.device("cpu"))
    assert [b.waited for b in fed] == [3.0, 5.0]


class Stream:
    """A stream as a clock: `ends` is when all that has been enqueued is done."""

    all: ClassVar[list] = []

    def __init__(self, device=None):
        self.ends = 0.0
        self.all.append(self)

    def wait_event(self, event):
        self.ends = max(self.ends, event.time)


class Event:
    all: ClassVar[list] = []

    def __init__(self, enable_timing, blocking):
        assert enable_timing and blocking
        self.time, self.recorded, self.waited_for = 0.0, 0, []
        self.all.append(self)

    def record(self, stream):
        self.time, self.recorded = stream.ends, self.recorded + 1

    def synchronize(self):
        assert self.recorded
        self.waited_for.append(self.time)

    def elapsed_time(self, end):
        return 1000 * (end.time - self.time)


@pytest.mark.parametrize(("fill_s", "step_s", "waits"), [(1.0, 3.0, 0.0), (3.0, 1.0, 2.0), (2.0, 2.0, 0.0)])
def test_how_long_a_gpu_waits_is_told_by_its_streams(monkeypatch, fill_s, step_s, waits):
    step, cpu = Stream(), torch.device("cpu")
    streams, events = [], []
    monkeypatch.setattr(Stream, "all", streams)
    monkeypatch.setattr(Event, "all", events)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    given = [data.Batch(images + t, torch.arange(2), 0, t) for t in range(9)]

    def fill(*_):
        streams[0].ends += fill_s

    told, ended = [], []
    for t, batch in enumerate(_on_gpu(iter(given), fill, cpu)):
        assert (batch.images == t).all() and step.ends >= (t + 1) * fill_s
        # the CPU is ahead of no more than what has been enqueued since the step three before
        held = [time for event in events[1::2] for time in event.waited_for]
        assert max(held, default=0.0) == (ended[t - 3] if t >= 3 else 0.0)
        told.append(batch.waited)
        step.ends += step_s
        ended.append(step.ends)
    assert told == [0.0] * 3 + [waits] * 6


def test_waiting_is_told_once_and_again_when_worse():
    watch = DataWaitWarning("buy a faster disk")
    assert watch.check(0.9, 60) == ""  # the first interval
    assert watch.check(0.05, 60) == "" and watch.check(0.5, 0.9) == ""
    # one interval may have been disturbed
    assert watch.check(0.3, 60) == ""
    assert watch.check(0.07, 60) == "steps wait for images 7 % of the time; buy a faster disk"
    assert [watch.check(share, 60) for share in (0.07, 0.01, 0.14, 0.14, 0.15)] == [""] * 5
    assert watch.check(0.16, 60).startswith("steps wait for images 15 %")
    assert watch.check(0.16, 60) == ""
    silent = DataWaitWarning()
    assert [silent.check(0.9, 60) for _ in range(3)] == [""] * 3


def test_the_remedy_fits(monkeypatch):
    run = begin()
    # built in, then as a folder of the user's, as it is and held
    folder = str(Path(run.source.paths[0]).parents[1])
    built_in, held, run = run, begin(train=folder, resident="host"), begin(train=folder)
    monkeypatch.setattr(data, "decoding_threads", lambda wanted: wanted or 7)
    for few in (built_in, held):
        with run_module.open_loader(few) as loader:
            assert loader.remedy() == "raise data.threads from 1 to 7"
    with run_module.open_loader(run) as loader:
        assert loader.remedy() == (
            f"raise data.threads from 1 to 7; install DALI ({install('dali-cuda13')}); "
            "pack the images (extrema-fast pack), or put them on a faster disk"
        )
    monkeypatch.setattr(data, "decoding_threads", lambda wanted: 1)
    with run_module.open_loader(run) as loader:
        assert "data.threads" not in loader.remedy()
    with run_module.open_loader(built_in) as loader:
        assert loader.remedy() == ""


STEP = {"SLURM_STEP_NUM_TASKS": "16"}


@pytest.mark.parametrize(
    ("wanted", "cores", "env", "threads"),
    [
        (0, 8, {}, 8),
        (0, 64, {}, 16),
        (0, 64, {"LOCAL_WORLD_SIZE": "8"}, 8),
        (0, 4, {"LOCAL_WORLD_SIZE": "8"}, 1),
        # tasks that share the step's cores of a node, and that have their own; a batch script of many tasks
        (0, 32, STEP | {"SLURM_STEP_TASKS_PER_NODE": "2,4(x2)", "SLURM_CPUS_ON_NODE": "32"}, 8),
        (0, 12, STEP | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_CPUS_ON_NODE": "96"}, 12),
        (0, 96, {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_ON_NODE": "96"}, 12),
        (0, 12, {"SLURM_NTASKS_PER_NODE": "4"}, 12),
        (3, 64, {}, 3),
        (40, 2, {}, 40),
    ],
)
def test_threads_from_the_cores(monkeypatch, wanted, cores, env, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    for name in [n for n in os.environ if n == "LOCAL_WORLD_SIZE" or n.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert data.decoding_threads(wanted) == threads
