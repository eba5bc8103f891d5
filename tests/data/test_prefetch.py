"""From loader to step on a CPU, and what is said of waiting.

Covers: batches pass through and are the loader's; a step with parts drawn ahead equals one that draws for itself; when
waiting is told (not at first, not twice, again when worse), a GPU's by the times of its streams (simulated); the remedy
that fits; the share on the progress line; threads from the cores. The stream and its buffers: tests/gpu/test_data.py.
"""

from __future__ import annotations

import contextlib
import io
import itertools

import pytest
import torch

from extrema_fast.config import from_dict, smoke
from extrema_fast.data import loader as data
from extrema_fast.data.prefetch import _Feed, feed
from extrema_fast.distributed import World
from extrema_fast.train import train_step
from extrema_fast.training import state
from extrema_fast.training.metrics import Meter, Progress, WaitWatch
from extrema_fast.training.step import draw

pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")

TINY = {
    "data": {"loader": "pil", "threads": 1, "limit": 24},
    "model": {"width": 16, "depth": 2, "drop_path": 0.2, "patch_size": 16},
    "mask": {"ratio": 0.5},
    "head": {"hidden": 16, "out": 8, "predictor_hidden": 16},
    "train": {"batch_size": 8, "accumulation": 2},
}


def begin() -> state.Run:
    cfg = from_dict(TINY, smoke())
    return state.build(cfg, World(torch.device("cpu")), state.open_train(cfg))


def test_a_cpu_gets_the_loaders_batches():
    run, cpu = begin(), torch.device("cpu")
    with state.open_loader(run) as one, state.open_loader(run) as two:
        fed = feed(one, lambda *args: pytest.fail("drawn ahead on a CPU"), cpu)
        for a, b in itertools.islice(zip(fed, two, strict=True), 5):
            assert torch.equal(a.images, b.images) and torch.equal(a.index, b.index)
            assert (a.epoch, a.step, a.parts) == (b.epoch, b.step, None)


def test_parts_drawn_ahead_change_nothing():
    runs = begin(), begin()
    with state.open_loader(runs[0]) as loader:
        for batch in itertools.islice(loader, 4):
            ahead = batch._replace(parts=draw(runs[1], batch.images, batch.index, batch.epoch), images=None)
            for run, given in zip(runs, (batch, ahead), strict=True):
                train_step(run, given)
                run.step += 1
    one, two = (run.method.state_dict() for run in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)


class Stream:
    """A stream as a clock: `ends` is when all that has been enqueued is done."""

    def __init__(self, device=None):
        self.ends = 0.0

    def wait_event(self, event):
        self.ends = max(self.ends, event.time)


class Event:
    def __init__(self, enable_timing, blocking):
        assert enable_timing and blocking
        self.time, self.recorded, self.waited_for = 0.0, 0, []

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
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    given = [data.Batch(images + t, torch.arange(2), 0, t) for t in range(9)]

    def fill(*_):
        fed.side.ends += fill_s

    fed, told, ended = _Feed(iter(given), fill, cpu), [], []
    for t, batch in enumerate(fed):
        assert (batch.images == t).all() and step.ends >= (t + 1) * fill_s
        # the host is ahead of no more than what has been enqueued since the step three before
        held = [time for buffer in fed.buffers for time in buffer.read.waited_for]
        assert max(held, default=0.0) == (ended[t - 3] if t >= 3 else 0.0)
        told.append(batch.waited)
        step.ends += step_s
        ended.append(step.ends)
    assert told == [0.0] * 3 + [waits] * 6


def test_the_meter_takes_the_devices_word():
    meter, batch = Meter(8), data.Batch(torch.zeros(1), torch.zeros(1), 0, 0)
    meter.next(iter([batch._replace(waited=1000.0)]))
    assert meter.waited == 1000
    meter.next(iter([batch]))
    assert 1000 < meter.waited < 1001


def test_waiting_is_told_once_and_again_when_worse():
    watch = WaitWatch("buy a faster disk")
    assert watch.look(0.9, 60) == ""  # the first interval
    assert watch.look(0.05, 60) == "" and watch.look(0.5, 0.9) == ""
    # one interval may have been disturbed
    assert watch.look(0.3, 60) == ""
    assert watch.look(0.07, 60) == "steps wait for images 7 % of the time; buy a faster disk"
    assert [watch.look(share, 60) for share in (0.07, 0.01, 0.14, 0.14, 0.15)] == [""] * 5
    assert watch.look(0.16, 60).startswith("steps wait for images 15 %")
    assert watch.look(0.16, 60) == ""


def test_the_remedy_fits(monkeypatch):
    run = begin()
    monkeypatch.setattr(data, "decoding_threads", lambda wanted: wanted or 7)
    with state.open_loader(run) as loader:
        assert loader.remedy() == (
            'raise data.threads from 1 to 7; install DALI (pip install "extrema-fast[dali-cuda13]"); '
            "pack the images (extrema-fast pack), or put them on a faster disk"
        )
    monkeypatch.setattr(data, "decoding_threads", lambda wanted: 1)
    with state.open_loader(run) as loader:
        assert "data.threads" not in loader.remedy()


def test_the_share_stands_on_the_progress_line():
    stream = io.StringIO()
    record = {"step": 1, "epoch": 0.1, "loss": 1.0, "images_per_s": 10, "lr": 1e-3, "data_wait": 0.126}
    Progress(10, stream=stream).update(record)
    assert "10 img/s  wait 13 %  lr" in stream.getvalue()


@pytest.mark.parametrize(
    ("wanted", "cores", "env", "threads"),
    [
        (0, 8, {}, 8), (0, 64, {}, 16), (0, 64, {"LOCAL_WORLD_SIZE": "8"}, 8), (0, 4, {"LOCAL_WORLD_SIZE": "8"}, 1),
        (0, 32, {"SLURM_NTASKS_PER_NODE": "4"}, 8), (0, 32, {"SLURM_NTASKS_PER_NODE": "4(x2)"}, 16),
        (3, 64, {}, 3), (40, 2, {}, 40),
    ],
)  # fmt: skip
def test_threads_from_the_cores(monkeypatch, wanted, cores, env, threads):
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert data.decoding_threads(wanted) == threads
