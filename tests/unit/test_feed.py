"""From loader to step on a CPU, and what is said of waiting.

Covers: batches pass through and are the loader's; a step with parts drawn ahead equals one that draws for itself; when
waiting is told (not at first, not twice, again when worse); the remedy that fits; the share on the progress line;
threads from the cores. The stream and its buffers: tests/gpu/test_data.py.
"""

from __future__ import annotations

import io
import itertools

import pytest
import torch

from extrema_fast import data, state
from extrema_fast.config import from_dict, smoke
from extrema_fast.data_feed import feed
from extrema_fast.dist import World
from extrema_fast.metrics import Progress, WaitWatch
from extrema_fast.step import draw
from extrema_fast.train import train_step

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


def test_waiting_is_told_once_and_again_when_worse():
    watch = WaitWatch("buy a faster disk")
    assert watch.look(0.9, 60) == ""  # the first interval
    assert watch.look(0.05, 60) == "" and watch.look(0.5, 0.9) == ""
    assert watch.look(0.07, 60) == "steps wait for images 7 % of the time; buy a faster disk"
    assert [watch.look(share, 60) for share in (0.07, 0.01, 0.14)] == [""] * 3
    assert watch.look(0.15, 60).startswith("steps wait for images 15 %")
    assert watch.look(0.15, 60) == ""


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
