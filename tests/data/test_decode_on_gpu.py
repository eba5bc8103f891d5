"""DALI's graph for a GPU, put together on a machine without one.

Covers: files and bytes, boxes cut first or whole images; every operator takes its arguments, and what leaves it is on
the device; a GPU that DALI cannot use, or on which decoding regions ends the process; regions and whole images give the
same crops; batches too large for the GPU's memory. Running it needs a GPU: tests/gpu/test_data.py.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from extrema_fast.config import DataConfig
from extrema_fast.data import dali_on_gpu, loader
from extrema_fast.data.decode import DaliDecoder, Settings
from extrema_fast.data.image_files import ImageFiles
from extrema_fast.data.loader import EvalLoader, TrainLoader
from extrema_fast.data.sources import open_source
from extrema_fast.errors import UsageError


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_the_graph_ends_on_the_device(whole, as_bytes, regions, tmp_path, monkeypatch):
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image.new("RGB", (30, 20)).save(tmp_path / "0.png")
    # building asks for the device; before that the graph is checked
    monkeypatch.setattr(dali.Pipeline, "build", lambda pipe: pipe._build_graph())
    files = ImageFiles(open_source(str(tmp_path)), DataConfig())
    files.as_bytes = as_bytes
    settings = Settings((16, 16), 4, 1, whole, torch.device("cuda", 0), 0.65, False, regions=regions)
    pipe = DaliDecoder(files, settings)._pipeline(lambda: (), 4)
    assert [out.device for out in pipe._graph_outputs] == ["gpu", "cpu"] and pipe.device_id == 0
    names = " ".join(op.name for op in pipe._ops)
    assert ("ImageSlice" in names) == (regions and not whole) and ("Read" in names) != as_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="DALI has a GPU")
def test_a_gpu_that_dali_cannot_use_leaves_decoding_to_the_cpu(tmp_path, caplog):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for i in range(8):
        image.new("RGB", (30, 20), (9 * i, 50, 0)).save(tmp_path / f"{i}.png")
    source = open_source(str(tmp_path))
    loader._warn_once.cache_clear()

    def first(device: str, wanted: str) -> torch.Tensor:
        options = {"batch_size": 4, "seed": 0, "device": device}
        with TrainLoader(source, DataConfig(loader=wanted, resident="off"), (16, 16), **options) as batches:
            return next(batches).images

    found = [first(device, "auto") for device in ("cpu", "cuda:0", "cuda:0")]
    assert torch.equal(found[0], found[1]) and found[1].device.type == "cpu"
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "CUDA is not available" in line and "dali-cuda12" in line and "\n" not in line
    with pytest.raises(UsageError, match=r"data\.loader: DALI cannot decode on this GPU"):
        first("cuda:0", "dali")


def test_regions_and_whole_images_give_the_same_crops(monkeypatch):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    for regions in (True, False):
        assert dali_on_gpu._wrong(torch.device("cpu"), 0.0, regions) == ""
    real = DaliDecoder._decode
    monkeypatch.setattr(DaliDecoder, "_decode", lambda *args: real(*args).roll(9, 1))
    assert "differ from Pillow's" in dali_on_gpu._wrong(torch.device("cpu"), 0.0, True)


TRIES = {
    # what stands in for the process that tries -> what is found
    "echo noise; echo 'decoding: regions|'": ("regions", ""),
    "case $2 in *0) kill -SEGV $$;; esac; echo 'decoding: whole images|'": (
        "whole images",
        "regions: ended by signal 11",
    ),
    "echo 'decoding: whole images|regions: failure #8'": ("whole images", "regions: failure #8"),
    "echo 'decoding: |no driver'": ("", "no driver"),
    "echo broken >&2; exit 3": ("", "regions: ended by broken; whole images: ended by broken"),
    "sleep 60": ("", "regions: it hangs; whole images: it hangs"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is found would be kept")
@pytest.mark.parametrize("script", TRIES)
def test_what_a_gpu_cannot_decode_ends_another_process(script, tmp_path, monkeypatch):
    file = tmp_path / "python"
    file.write_text(f'#!/bin/sh\nset -- $1 "${{2%)}}"\n{script}\n')
    file.chmod(0o755)
    monkeypatch.setattr(dali_on_gpu.sys, "executable", str(file))
    monkeypatch.setattr(dali_on_gpu, "_TRY_S", 0.5 if "sleep" in script else 60)
    assert tuple(dali_on_gpu.decoding_on.__wrapped__(torch.device("cuda", 0), 0.65)) == TRIES[script]


def test_a_loader_that_decodes_whole_images(tmp_path, monkeypatch, caplog):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for i in range(8):
        image.effect_noise((90 + i, 70), 90).save(tmp_path / f"{i}.jpg")
    source, seen = open_source(str(tmp_path)), []
    for regions in (True, False):
        monkeypatch.setattr(loader, "_decoding_device", lambda *args, r=regions: (torch.device("cpu"), r))
        with TrainLoader(source, DataConfig(loader="dali"), (16, 16), batch_size=4, seed=0) as batches:
            assert batches._settings.regions == regions
            seen.append([next(batches).images for _ in range(4)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    monkeypatch.undo()
    loader._warn_once.cache_clear()
    monkeypatch.setattr(loader, "decoding_on", lambda *args: ("whole images", "regions: failure #8"))
    device = torch.device("cuda", 0)
    assert loader._decoding_device("dali", DataConfig(), device) == (device, False)
    assert "DALI decodes whole images on this GPU" in caplog.text


def test_large_images_leave_memory_to_the_step(tmp_path, monkeypatch, caplog):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for i in range(64):
        image.new("RGB", (100, 80)).save(tmp_path / f"{i}.png")
    source, device = open_source(str(tmp_path)), torch.device("cuda", 0)
    # a fifth holds four batches of ten whole images, 40 * 24,000 bytes
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=5 * 40 * 24_000)
    )
    monkeypatch.setattr(loader, "loader_for", lambda *args: "dali")
    monkeypatch.setattr(loader, "decoding_on", lambda *args: ("regions", ""))
    loader._warn_once.cache_clear()
    assert EvalLoader(source, DataConfig(), (16, 16), batch_size=32, device=device)._settings.batch == 10
    assert EvalLoader(source, DataConfig(), (16, 16), batch_size=8, device=device)._settings.batch == 8

    def place(batch: int, **options: Any) -> str:
        with TrainLoader(
            source,
            DataConfig(train=str(tmp_path), **options),
            (16, 16),
            batch_size=batch,
            seed=0,
            device=device,
        ) as made:
            assert made._settings.batch == batch * (2 if options.get("crop") == "separate" else 1)
            assert "index the images once" in made.remedy()
            return made._settings.device.type

    # crops are three fifths of an image on average
    assert [place(16), place(17)] == ["cuda", "cpu"]
    assert [place(10, policy="centercrop"), place(11, policy="centercrop")] == ["cuda", "cpu"]
    assert [place(8, crop="separate"), place(9, crop="separate")] == ["cuda", "cpu"]
    (line,) = {r.getMessage() for r in caplog.records if "batches of 17" in r.getMessage()}
    assert "decoded on the CPU" in line and "extrema-fast pack" in line
