"""Images held decoded: the batches of the PIL loader, and where they are held.

Covers: the same rows and bytes for every kind of source, policy and size, enlarged only and reduced; restarts, two
processes; regions copied as for a GPU; unreadable images replaced as by the decoding loader; what `data.resident`
chooses, with its errors; the choice of a begun run.
"""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from extrema_fast.config import DataConfig
from extrema_fast.data import resident
from extrema_fast.data.decode import Settings, Work
from extrema_fast.data.image_files import ImageFiles
from extrema_fast.data.loader import TrainLoader, random_boxes
from extrema_fast.data.resident import HeldDecoder, choose_place, estimate_bytes, hold
from extrema_fast.data.sources import open_source
from extrema_fast.errors import DataError, UsageError
from extrema_fast.train import pretrain
from tests.training.conftest import tiny

from .conftest import assert_same, picture

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")

SIZE = (24, 32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """16 images of 20 x 24: crops of `SIZE` only enlarge them."""
    root = tmp_path_factory.mktemp("small")
    for i in range(16):
        Image.fromarray(picture(i, 20, 24)).save(root / f"{i:02d}.png")
    return root


@pytest.fixture(params=["folder", "small", "shards", "mixture"])
def source(request, tree, small, shards, tmp_path):
    if request.param == "mixture":
        path = tmp_path / "mix.toml"
        entries = [(tree, 2), (small, 1.5)]
        path.write_text("".join(f'[[source]]\npath = "{p}"\npasses = {n}\n' for p, n in entries))
        return open_source(str(path))
    return open_source(str({"folder": tree, "small": small, "shards": shards}[request.param]))


def batches(source, count, place="host", policy="spatial", crop="shared", **kw):
    cfg = DataConfig(loader="pil", threads=2, policy=policy, crop=crop, bad_budget=0.3)
    kw = {"batch_size": 6, "seed": 3, **kw}
    with TrainLoader(source, cfg, SIZE, resident=place, device="cpu", **kw) as loader:
        return list(itertools.islice(loader, count))


@pytest.mark.parametrize(
    ("policy", "crop"), [("spatial", "shared"), ("spatial", "separate"), ("centercrop", "shared")]
)
def test_the_batches_of_the_pil_loader(source, policy, crop):
    options = {"policy": policy, "crop": crop}
    assert_same(batches(source, 8, **options), batches(source, 8, "off", **options))


def test_restarts_and_two_processes(small, tree):
    for folder in (small, tree):
        whole = batches(open_source(str(folder)), 6)
        assert_same(whole[2:], batches(open_source(str(folder)), 4, start_step=2))
        parts = [batches(open_source(str(folder)), 6, rank=r, world=2) for r in range(2)]
        for step, batch in enumerate(whole):
            assert torch.equal(torch.cat([p[step].images for p in parts]), batch.images)


@pytest.mark.parametrize("policy", ["spatial", "centercrop"])
def test_regions_copied_to_a_device_give_the_crops_of_images_that_lie_there(source, policy):
    """As for a GPU; Pillow's crops up to one gray level, where it resizes the height first."""
    files = ImageFiles(source, DataConfig())
    held, failed = hold(files, np.zeros(len(source), bool), CPU, 2)
    assert not failed
    rows = np.arange(len(source))[::-1].copy()
    boxes, flips = random_boxes(held.sizes[rows], rows, DataConfig(), seed=1, epoch=0)
    work = Work(rows, boxes, flips if policy == "spatial" else np.zeros(len(rows), bool), None, 0)
    decoder = HeldDecoder(held, Settings(SIZE, len(rows), 1, policy == "centercrop", CPU, 0.0, False))
    near = decoder.decode(work).images
    decoder._near = False
    assert torch.equal(decoder.decode(work).images, near)
    decoder.close()
    for image, row, box, flip in zip(near.numpy(), rows, boxes, work.flips, strict=True):
        top, left, bottom, right = map(int, box)
        im = (
            Image.open(source.paths[row])
            if source.spans is None
            else files.image(row, np.frombuffer(files.read(row), np.uint8))
        )
        if policy == "spatial":
            im = (
                im.convert("RGB")
                .crop((left, top, right, bottom))
                .resize(SIZE[::-1], Image.Resampling.BILINEAR)
            )
        else:
            im = im.convert("RGB").resize(
                SIZE[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom)
            )
        want = np.asarray(im)[:, ::-1] if flip else np.asarray(im)
        assert np.abs(image.astype(int) - want).max() <= 1, source.title(row)


def test_a_file_is_held_once_in_a_mixture(tree, tmp_path):
    path = tmp_path / "twice.toml"
    path.write_text(f'[[source]]\npath = "{tree}"\npasses = 3\n')
    for spec in (tree, path):
        source = open_source(str(spec))
        files = ImageFiles(source, DataConfig())
        estimated = estimate_bytes(files)
        held, _ = hold(files, np.zeros(len(source), bool), CPU, 1)
        wanted = sum(np.asarray(Image.open(p).convert("RGB")).size for p in set(source.paths))
        assert len(held.pixels) == wanted == estimated


@pytest.mark.parametrize("how", ["text", "cut"])
def test_unreadable_images_are_replaced_as_by_the_decoding_loader(tmp_path, how):
    for i in range(16):
        Image.fromarray(picture(i, 40, 30)).save(tmp_path / f"{i:02d}.jpg", quality=92)
    for i in (3, 11):
        path = tmp_path / f"{i:02d}.jpg"
        path.write_bytes(b"no image" if how == "text" else path.read_bytes()[:600])
    source = open_source(str(tmp_path))
    assert_same(batches(source, 6), batches(source, 6, "off"))
    cfg = DataConfig(loader="pil", threads=1, bad_budget=0.3)
    with TrainLoader(source, cfg, SIZE, batch_size=6, seed=3, resident="host") as loader:
        next(loader)
        assert sorted(loader.bad.reasons) == [3, 11]
    with (
        TrainLoader(
            source, replace(cfg, bad_budget=0.0), SIZE, batch_size=6, seed=3, resident="host"
        ) as loader,
        pytest.raises(DataError, match="1 of 16 images cannot be used"),
    ):
        next(loader)


def test_an_image_that_differs_from_its_recorded_size_is_unreadable(small):
    source = open_source(str(small))
    headers = np.array([[20, 24, 1]] * 16, np.int32)
    headers[5] = (24, 20, 1)
    held, failed = hold(
        ImageFiles(replace(source, headers=headers), DataConfig()), np.zeros(16, bool), CPU, 1
    )
    assert list(failed) == [5] and "24 x 20 pixels" in str(failed[5])
    assert np.array_equal(held.image(6), np.asarray(Image.open(source.paths[6])))


# ---- where ----------------------------------------------------------------------------------------

# `small` takes 23,040 bytes
NEEDED = 16 * 20 * 24 * 3


@pytest.mark.parametrize(
    ("setting", "device", "free", "reads", "place"),
    [
        ("off", "cuda", (1e12, 1e12), 100, "off"),
        ("auto", "cpu", (0, 1e12), 2, "off"),
        ("host", "cpu", (0, NEEDED * 2), 1, "host"),
        ("auto", "cuda", (NEEDED * 4, 0), 2, "gpu"),
        ("auto", "cuda", (NEEDED * 4, 1e12), 1, "off"),
        ("auto", "cuda", (NEEDED * 3, NEEDED * 4), 2, "host"),
        ("auto", "cuda", (NEEDED * 3, NEEDED * 3), 2, "off"),
        ("gpu", "cuda", (NEEDED * 2, 0), 1, "gpu"),
    ],
)
def test_where_images_are_held(small, monkeypatch, caplog, setting, device, free, reads, place):
    gpu, host = free
    monkeypatch.setattr(resident, "free_on_host", lambda: int(2 * host))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gpu), 0))
    files = ImageFiles(open_source(str(small)), DataConfig())
    with caplog.at_level(logging.INFO, "extrema_fast"):
        found = choose_place(setting, files, torch.device(device), reads=reads, local=2)
    assert found == place
    assert place == "off" or ("16 images" in caplog.text and len(caplog.records) == 1)


@pytest.mark.parametrize(("setting", "device"), [("gpu", "cpu"), ("host", "cpu"), ("gpu", "cuda")])
def test_a_place_asked_for_by_name_that_cannot_be_is_an_error(small, monkeypatch, setting, device):
    monkeypatch.setattr(resident, "free_on_host", lambda: NEEDED)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (NEEDED, 0))
    files = ImageFiles(open_source(str(small)), DataConfig())
    with pytest.raises(UsageError, match=rf"data\.resident: {setting}.* use (host|off)") as error:
        choose_place(setting, files, torch.device(device), reads=2)
    if device == "cpu" and setting == "host":
        # 20 x 24 pixels fill it, 0.9 of that may be filled: 18.97 x 22.77
        assert str(error.value).endswith(f"extrema-fast pack {small} packed --size 16")


# ---- a run ----------------------------------------------------------------------------------------


def test_a_run_with_held_images_is_the_run_without(tmp_path):
    def weights(place):
        out = tmp_path / place
        pretrain(tiny(out, data={"resident": place}), progress=False)
        assert json.loads((out / "env.json").read_text())["resolved"]["resident"] == place
        return load_file(out / "weights/step_00000006/student.safetensors")

    without, held = weights("off"), weights("host")
    assert held.keys() == without.keys() and all(torch.equal(held[k], without[k]) for k in held)
