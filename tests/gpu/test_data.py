"""The data path on a GPU: `make test-gpu`.

Covers: the buffers of prefetch are not read or overwritten too early, with either stream far behind; the CPU does not
wait; the measured waiting; steps are the same with and without prefetching, plain and recorded; pinned batches; DALI
decoding on the GPU against the CPU, every policy, hardware load 0 and default; unreadable images there: all other
samples undisturbed, each kind of broken file, restarts; a loader whose consumer is far behind; images on the GPU
already, and images held decoded, by the GPU and by the CPU.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from extrema_fast.config import DataConfig
from extrema_fast.data import dali_on_gpu
from extrema_fast.data.loader import Batch, TrainLoader
from extrema_fast.data.prefetch import prefetch
from extrema_fast.data.sources import open_source
from extrema_fast.ops import dispatch as ops
from extrema_fast.train import train_step
from extrema_fast.training import step
from extrema_fast.training.draw import draw as draw_batch
from tests.gpu.test_step import begin, graph_of
from tests.nullgpu import counters

pytestmark = pytest.mark.gpu

SIZE = (64, 64)
# about 50 ms: longer than anything else here
LONG = 100_000_000
PLAIN = {
    "train": {"accumulation": 2},
    "system": {"backend": "reference"},
    "optim": {"base_lr": 1.5e-4},
}


def random_batches(count: int, pinned: bool = True) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for t in range(count):
        images = torch.randint(0, 256, (16, *SIZE, 3), dtype=torch.uint8, generator=generator)
        index = torch.arange(16) + 16 * t
        made.append(
            Batch(images.pin_memory(), index.pin_memory(), 0, t) if pinned else Batch(images, index, 0, t)
        )
    return made


@pytest.mark.values
@pytest.mark.parametrize("behind", ["step", "side"])
@pytest.mark.parametrize("pinned", [True, False])
def test_no_buffer_is_read_or_written_too_early(behind, pinned):
    device, given = torch.device("cuda", 0), random_batches(9, pinned)

    def draw(images, index, epoch):
        if behind == "side":
            torch.cuda._sleep(LONG)
        return [images, index.to(device, non_blocking=True)]

    sums, rows = [], []
    for batch in prefetch(iter(given), draw, device):
        if behind == "step":
            torch.cuda._sleep(LONG)
        images, index = batch.micro_batches
        sums.append(images.long().sum())
        rows.append(index.clone())
        assert images.data_ptr() == batch.images.data_ptr()
    torch.cuda.synchronize()
    assert [int(s) for s in sums] == [int(b.images.long().sum()) for b in given]
    assert all(torch.equal(r.cpu(), b.index) for r, b in zip(rows, given, strict=True))


@pytest.mark.values
@pytest.mark.parametrize("behind", ["step", "side"])
def test_waiting_is_measured_on_the_device(behind):
    """A step that takes long does not wait for images, however long the host does; a slow copy is waited for."""
    device = torch.device("cuda", 0)

    def draw(images, index, epoch):
        if behind == "side":
            torch.cuda._sleep(LONG)
        return []

    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    torch.cuda._sleep(LONG)
    ended.record()
    torch.cuda.synchronize()
    long_s = began.elapsed_time(ended) / 1000
    waited = []
    for batch in prefetch(iter(random_batches(9)), draw, device):
        waited.append(batch.waited)
        if behind == "step":
            torch.cuda._sleep(LONG)
    assert waited[:3] == [0, 0, 0]
    if behind == "step":
        assert max(waited) < 0.2 * long_s
    else:
        assert min(waited[3:]) > 0.5 * long_s


def test_two_buffers_take_turns():
    device = torch.device("cuda", 0)
    fed = prefetch(iter(random_batches(6)), lambda *args: [], device)
    places = [batch.images.data_ptr() for batch in fed]
    assert len(set(places)) == 2 and places[::2] == places[:1] * 3 and places[1::2] == places[1:2] * 3


@pytest.mark.values
def test_the_host_only_enqueues():
    device = torch.device("cuda", 0)
    # plain draws are more than a thousand launches, and the host waits when the driver's queue is full
    run = begin("cuda", PLAIN, {"system": {"backend": "fixed"}})
    fed = prefetch(iter(random_batches(8)), lambda *args: draw_batch(run.cfg, *args), device)
    for _ in range(3):
        next(fed)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        # the step's stream is busy for about a second, also where other tests take the host's cores
        done = torch.cuda.Event()
        torch.cuda._sleep(20 * LONG)
        done.record()
        next(fed), next(fed)
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.values
@pytest.mark.parametrize(
    "change",
    # the plain optimizer waits for the device, which a graph cannot
    [{}, {"train": {"cuda_graph": "on"}, "system": {"backend": "fixed"}}],
    ids=["plain", "graph"],
)
def test_prefetched_batches_give_the_same_steps(change):
    results = []
    for ahead in (False, True):
        run = begin("cuda", PLAIN, change)
        # without prefetching each batch waits for the step before
        given = [random_batches(10)] if ahead else [[batch] for batch in random_batches(10)]
        for some in given:
            for batch in step.batches(run, some):
                train_step(run, batch)
                run.step += 1
            torch.cuda.synchronize()
        if change:
            graph_of(run)
        results.append({k: v.clone() for k, v in run.method.state_dict().items()})
    for name, value in results[0].items():
        # sums over threads in another order now and then
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.values
def test_images_on_the_gpu_are_taken_as_they_are():
    """Their memory is not given to a later batch while a step that is far behind still reads it."""
    device = torch.device("cuda", 0)

    def made():
        for batch in random_batches(9):
            images = batch.images.to(device) + 0
            made_at.append(images.data_ptr())
            yield batch._replace(images=images)

    sums, places = [], []
    made_at: list = []
    for batch in prefetch(made(), lambda *args: [], device):
        torch.cuda._sleep(LONG)
        sums.append(batch.images.long().sum())
        places.append(batch.images.data_ptr())
        del batch
    torch.cuda.synchronize()
    assert [int(s) for s in sums] == [int(b.images.long().sum()) for b in random_batches(9)]
    # no copy of them was made
    assert places == made_at


@pytest.fixture
def images(tmp_path) -> Path:
    pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for i in range(23):
        y, x = np.mgrid[0 : 90 + 7 * i, 0 : 110 + 5 * i] / 17
        pixels = 127 + 100 * np.stack([np.sin(y + i), np.sin(x), np.sin(x + y)], -1)
        suffix = "jpg" if i % 2 else "png"
        # chroma of every kind, and progressive files
        kind = {"subsampling": i % 3, "progressive": i % 5 == 0} if suffix == "jpg" else {}
        image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i:02d}.{suffix}", quality=95, **kind)
    return tmp_path


# ---- images held decoded --------------------------------------------------------------------------


@pytest.fixture
def chosen_ops():
    """The ops of a run, whatever a test before has set."""
    ops.set_backend("auto")


def held_batches(source, place, count=6, policy="spatial"):
    cfg = DataConfig(loader="pil", threads=2, policy=policy)
    device = "cpu" if place == "off" else "cuda"
    with TrainLoader(
        source, cfg, SIZE, batch_size=5, seed=3, device=device, pinned=place != "off", resident=place
    ) as loader:
        return [b._replace(images=b.images.cpu()) for b in itertools.islice(loader, count)]


@pytest.mark.values
@pytest.mark.parametrize("policy", ["spatial", "centercrop"])
@pytest.mark.parametrize("place", ["gpu", "host"])
def test_held_images_give_the_crops_of_the_pil_loader(images, chosen_ops, place, policy):
    source = open_source(str(images))
    for a, b in zip(
        held_batches(source, place, policy=policy), held_batches(source, "off", policy=policy), strict=True
    ):
        assert torch.equal(a.index, b.index) and a.images.shape == b.images.shape
        # Pillow 13 resizes the height first where it is reduced more, and rounds in between
        assert (a.images.int() - b.images.int()).abs().max() <= 1


@pytest.mark.parametrize("place", ["gpu", "host"])
def test_held_images_are_cropped_without_a_wait(images, chosen_ops, place):
    cfg = DataConfig(loader="pil", threads=2)
    source = open_source(str(images))
    with TrainLoader(
        source, cfg, SIZE, batch_size=5, seed=3, device="cuda", pinned=True, resident=place
    ) as loader:
        next(loader)
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            assert next(loader).images.is_cuda
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- DALI on the GPU ----------------------------------------------------------------------------------


def batches(source, count, device="cuda", **kw):
    if device == "cuda" and counters.active():
        pytest.skip("DALI has a CUDA runtime of its own, which the null GPU does not replace")
    loader_kw = {k: kw.pop(k) for k in ("start_step", "bad") if k in kw}
    cfg = DataConfig(loader="dali", threads=2, **{"hw_decoder_load": 0.0, **kw})
    with TrainLoader(source, cfg, SIZE, batch_size=5, seed=3, device=device, **loader_kw) as loader:
        return [b._replace(images=b.images.cpu()) for b in itertools.islice(loader, count)], loader.bad


@pytest.mark.parametrize("policy", ["spatial", "centercrop"])
@pytest.mark.parametrize("load", [0.0, 0.65])
def test_the_gpu_decodes_what_the_cpu_decodes(images, policy, load):
    source = open_source(str(images))
    for a, b in zip(
        batches(source, 9, policy=policy, hw_decoder_load=load)[0],
        batches(source, 9, "cpu", policy=policy)[0],
        strict=True,
    ):
        assert torch.equal(a.index, b.index)
        gap = (a.images.int() - b.images.int()).abs().float()
        assert gap.mean() < 2, gap.mean()


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("load", [0.0, 0.65])
def test_large_batches_of_every_kind_of_jpeg(load, regions):
    """What decides how a run decodes: whole batches, regions of images."""
    pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    if counters.active():
        pytest.skip("DALI has a CUDA runtime of its own, which the null GPU does not replace")
    assert dali_on_gpu._wrong(torch.device("cuda", 0), load, regions) == ""


def test_restarts_are_exact(images):
    source = open_source(str(images))
    whole, _ = batches(source, 10)
    for start in (1, 6):
        for a, b in zip(whole[start:], batches(source, 10 - start, start_step=start)[0], strict=True):
            assert torch.equal(a.index, b.index) and torch.equal(a.images, b.images)


@pytest.mark.parametrize("how", ["text", "cut", "gone"])
def test_all_other_samples_are_undisturbed(images, how):
    source = open_source(str(images))
    clean, _ = batches(source, 12)
    path = Path(source.paths[6])
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"no image" if how == "text" else data[: len(data) // 2])
    replaced, bad = batches(source, 12)
    assert list(bad.reasons) == [6]
    for a, b in zip(clean, replaced, strict=True):
        same = a.index != 6
        assert torch.equal(a.index[same], b.index[same]) and torch.equal(a.images[same], b.images[same])
        assert 6 not in b.index
    again, _ = batches(source, 12, bad=bad)
    assert all(torch.equal(a.images, b.images) for a, b in zip(replaced, again, strict=True))


def test_every_odd_file_is_used_or_named(images):
    root = os.environ.get("EXTREMA_FAST_SHARED", Path(__file__).resolve().parents[3] / "shared")
    shared = Path(root) / "data" / "odd-images"
    if not shared.is_dir():
        pytest.skip(f"no odd images at {shared}")
    for path in shared.iterdir():
        if path.stat().st_size:
            shutil.copy(path, images)
    source = open_source(str(images))
    count = len(source)
    seen, bad = batches(source, 3 * (count // 5), bad_budget=0.5)
    names = {Path(source.paths[row]).name for row in bad.reasons}
    # what its decoder makes of broken JPEG files differs from a CPU's; good ones are never named
    assert all(name.startswith("bad_") for name in names), names
    assert {"bad_text.jpg", "bad_random_bytes.jpg", "bad_header_only.jpg", "bad_truncated_half.jpg"} <= names
    rows = torch.cat([b.index for b in seen]).tolist()
    assert not set(rows) & set(bad.reasons)


@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_a_consumer_that_is_far_behind(images, load):
    """Batches stay what they were although the stream that reads them is busy while DALI continues."""
    source = open_source(str(images))
    want, _ = batches(source, 8, hw_decoder_load=load)
    cfg = DataConfig(loader="dali", threads=2, hw_decoder_load=load)
    sums = []
    with TrainLoader(source, cfg, SIZE, batch_size=5, seed=3, device="cuda") as loader:
        for batch in itertools.islice(loader, 8):
            torch.cuda._sleep(LONG)
            sums.append(batch.images.long().sum())
            del batch
    assert [int(s) for s in sums] == [int(b.images.long().sum()) for b in want]


def test_batches_of_the_cpu_lie_in_pinned_memory(images):
    source = open_source(str(images))
    for kind in ("pil", "dali"):
        cfg = DataConfig(loader=kind, threads=2)
        with (
            TrainLoader(source, cfg, SIZE, batch_size=5, seed=3, device="cpu", pinned=True) as pinned,
            TrainLoader(source, cfg, SIZE, batch_size=5, seed=3, device="cpu") as plain,
        ):
            for a, b in itertools.islice(zip(pinned, plain, strict=True), 3):
                assert a.images.is_pinned() and a.index.is_pinned() and not b.images.is_pinned()
                assert torch.equal(a.images, b.images) and torch.equal(a.index, b.index)
