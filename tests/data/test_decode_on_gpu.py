"""DALI's graph for a GPU, put together on a machine without one.

Covers: files and bytes, boxes cut first or whole images; every operator takes its arguments, and what leaves it is on
the device; a GPU that DALI cannot use. Running it needs a GPU: tests/gpu/test_data.py.
"""

from __future__ import annotations

import logging

import pytest
import torch

from extrema_fast.config import DataConfig
from extrema_fast.data import loader
from extrema_fast.data.decode import DaliDecoder, Settings
from extrema_fast.data.image_files import ImageFiles
from extrema_fast.data.loader import TrainLoader
from extrema_fast.data.sources import open_source
from extrema_fast.errors import UsageError


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_the_graph_ends_on_the_device(whole, as_bytes, tmp_path, monkeypatch):
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image.new("RGB", (30, 20)).save(tmp_path / "0.png")
    # building asks for the device; before that the graph is checked
    monkeypatch.setattr(dali.Pipeline, "build", lambda pipe: pipe._build_graph())
    files = ImageFiles(open_source(str(tmp_path)), DataConfig())
    files.as_bytes = as_bytes
    settings = Settings((16, 16), 4, 1, whole, torch.device("cuda", 0), 0.65, False)
    pipe = DaliDecoder(files, settings)._pipeline(lambda: (), 4)
    assert [out.device for out in pipe._graph_outputs] == ["gpu"] and pipe.device_id == 0
    names = " ".join(op.name for op in pipe._ops)
    assert ("ImageSlice" in names) != whole and ("Read" in names) != as_bytes


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
