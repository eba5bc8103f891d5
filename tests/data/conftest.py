"""Fixtures of the data tests: small image trees, both loaders, and the shared odd images."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from extrema_fast.config import DataConfig
from extrema_fast.data.sources import open_source
from extrema_fast.errors import UsageError

from .tars import write_tar

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["pil", "dali"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each test that names it runs with both loaders."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed (extra: dali-cuda13)")
    return request.param


@pytest.fixture(scope="session")
def odd_images() -> Path:
    """The folder of unusual and broken files, outside the repository."""
    shared = Path(os.environ.get("EXTREMA_FAST_SHARED", REPO.parent / "shared"))
    folder = shared / "data" / "odd-images"
    if not folder.is_dir():
        pytest.skip(f"no odd images at {folder}; EXTREMA_FAST_SHARED names the folder that holds data/")
    return folder


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8: smooth shapes with noise on top, no two seeds alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 20
    waves = np.sin(y[..., None] * rng.uniform(0.5, 2, 3) + x[..., None] * rng.uniform(0.5, 2, 3))
    noise = rng.normal(0, 8, (height, width, 3))
    return (127 + 90 * waves + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 JPEG and PNG files of many sizes in three class folders, one of them nested."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")
    root = tmp_path_factory.mktemp("tree")
    for i in range(23):
        folder = root / ("ape", "bee", "cat/young")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = picture(i, 40 + 7 * i % 60, 44 + 11 * i % 70)
        image.fromarray(pixels).save(folder / f"{i:02d}.{'jpg' if i % 2 else 'png'}", quality=92)
    return root


@pytest.fixture(scope="session")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 23 images of `tree` in four tar shards of 7, 1, 9 and 6."""
    folder = tmp_path_factory.mktemp("shards")
    pack_files(folder, sorted(p for p in tree.rglob("*") if p.is_file()), (7, 1, 9, 6))
    return folder


def fails(spec, pattern: str, error: type[Exception] = UsageError, **kw) -> None:
    """`open_source` ends in one line that matches `pattern`."""
    with pytest.raises(error, match=pattern) as caught:
        open_source(str(spec), **kw)
    assert "\n" not in str(caught.value)


def assert_same(a, b) -> None:
    """The same batches."""
    for x, y in zip(a, b, strict=True):
        assert (x.epoch, x.step) == (y.epoch, y.step)
        assert torch.equal(x.index, y.index) and torch.equal(x.images, y.images)


def pack_files(folder: Path, paths: list[Path], counts: tuple[int, ...]) -> None:
    """Writes image files into tar shards of so many images each."""
    rows = iter(enumerate(paths))
    for number, count in enumerate(counts):
        some = [(f"{i:04d}{path.suffix}", path.read_bytes()) for i, path in itertools.islice(rows, count)]
        write_tar(folder / f"{number}.tar", some)


def write_table(path: Path, data, options=None, rows: int = 3) -> Path:
    """An Arrow stream, an Arrow file (.file.arrow) or a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(data, path, row_group_size=rows)
        return path
    make = pa.ipc.new_file if path.name.endswith(".file.arrow") else pa.ipc.new_stream
    with make(str(path), data.schema, options=options) as writer:
        writer.write_table(data, rows)
    return path


@pytest.fixture
def config():
    """DataConfig with one decoding thread; keyword arguments override."""
    return lambda **kw: DataConfig(**{"threads": 1, **kw})
