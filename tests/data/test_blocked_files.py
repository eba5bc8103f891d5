"""Files that block or have no end, and errors that pass.

Covers: named pipes, devices, sockets and huge sparse files as images, in folders, manifests and the list of bad rows,
by both loaders and held in memory; named pipes as index, manifest, list, mixture and shard; an error of the disk that
passes at once, one that lasts an epoch; the budget of small sets, the advice; images replaced in place.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from extrema_fast.config import DataConfig
from extrema_fast.data import image_files
from extrema_fast.data.bad_images import BAD_ROWS, BadRows
from extrema_fast.data.image_source import ImageSource
from extrema_fast.data.loader import TrainLoader
from extrema_fast.data.manifest import Row, header_lines, row_line
from extrema_fast.data.sources import open_source
from extrema_fast.errors import DataError, UsageError
from extrema_fast.train import pretrain
from tests.training.conftest import status, tiny

from .conftest import assert_same, pack_files, picture

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")

SIZE = (24, 32)
BLOCKED = {"pipe": "a named pipe", "device": "a device", "socket": "a socket", "sparse": "bytes"}


def batches(source, kind, count, place="off", **kw):
    cfg = DataConfig(loader=kind, threads=2, bad_budget=0.2)
    with TrainLoader(source, cfg, SIZE, batch_size=4, seed=3, resident=place, **kw) as loader:
        return list(itertools.islice(loader, count)), loader.bad


def write_images(folder: Path, count: int = 12) -> None:
    for i in range(count):
        Image.fromarray(picture(i, 40 + i, 50)).save(folder / f"{i:02d}.png")


def block(path: Path, how: str) -> None:
    """Puts something at a path that must not be opened, or not be read whole."""
    path.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "socket":
        here = os.getcwd()
        # the path of a socket is short
        os.chdir(path.parent)
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.bind(path.name)
        finally:
            os.chdir(here)
    else:
        with open(path, "wb") as f:
            f.truncate(1 << 40)


@pytest.mark.parametrize("how", BLOCKED)
@pytest.mark.parametrize("place", ["off", "host"])
def test_an_image_that_blocks_is_replaced(tmp_path, kind, how, place):
    write_images(tmp_path)
    block(tmp_path / "05.png", how)
    source = open_source(str(tmp_path))
    seen, bad = batches(source, kind, 6, place)
    assert list(bad.reasons) == [5]
    assert BLOCKED[how] in bad.reasons[5] or "no known image format" in bad.reasons[5]
    assert not any(5 in batch.index for batch in seen)
    # at the next start too, without being read whole
    file = tmp_path / BAD_ROWS
    bad.keep_in(file)
    again = BadRows(source, 0.2)
    again.read(file, DataConfig())
    assert list(again.reasons) == [5]


def test_a_pipe_of_a_manifest_with_known_sizes(tmp_path, kind):
    """Its header is never read, so DALI would open it."""
    write_images(tmp_path)
    rows = [
        Row(f"{i:02d}.png", "", -1, (tmp_path / f"{i:02d}.png").stat().st_size, 0, 0, "png", 50, 40 + i)
        for i in range(12)
    ]
    table = tmp_path / "m.tsv"
    table.write_text(header_lines(".", []) + "".join(map(row_line, rows)))
    block(tmp_path / "05.png", "pipe")
    _, bad = batches(open_source(str(table), check=False), kind, 6)
    assert list(bad.reasons) == [5] and "a named pipe" in bad.reasons[5]


@pytest.mark.parametrize("name", ["shard.idx", "manifest.tsv", "list.txt", "mix.toml", "m.tar"])
def test_pipes_in_place_of_other_files(tmp_path, name):
    images = tmp_path / "images"
    images.mkdir()
    write_images(images, 4)
    folder = tmp_path / "set"
    folder.mkdir()
    block(folder / name, "pipe")
    if name in ("shard.idx", "manifest.tsv"):
        # these are optional
        pack_files(folder, sorted(images.iterdir()), (4,))
        shutil.move(folder / "0.tar", folder / "shard.tar")
        assert len(open_source(str(folder))) == 4
    else:
        with pytest.raises(UsageError, match=rf"{name}.*\(not a plain file, but a named pipe\)"):
            open_source(str(folder / name))


# ---- errors that pass -----------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path):
    """12 images in a tar, which the loader itself reads."""
    images = tmp_path / "images"
    images.mkdir()
    write_images(images)
    pack_files(tmp_path, sorted(images.iterdir()), (12,))
    return open_source(str(tmp_path / "0.tar"))


def failing(monkeypatch, row: int, number: int) -> list[int]:
    """Reads of a row fail with EIO while the list holds anything; each takes one away."""
    left, real = [number], ImageSource.read

    def read(self, r):
        if r == row and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(self, r)

    monkeypatch.setattr(ImageSource, "read", read)
    monkeypatch.setattr(image_files, "_WAITS_S", (0, 0))
    return left


def test_an_error_that_passes_at_once_changes_nothing(shard, kind, monkeypatch):
    clean, _ = batches(shard, kind, 6)
    left = failing(monkeypatch, 5, 2)
    seen, bad = batches(shard, kind, 6)
    assert left == [0] and not len(bad)
    assert_same(clean, seen)


def test_a_row_that_could_not_be_read_is_used_again_in_the_next_epoch(shard, kind, monkeypatch, caplog):
    clean, _ = batches(shard, kind, 6)
    failing(monkeypatch, 5, 3)
    seen, bad = batches(shard, kind, 6)
    # three steps an epoch
    assert not any(5 in batch.index for batch in seen[:3]) and not len(bad)
    assert_same(clean[3:], seen[3:])
    assert "left out from now on" in caplog.text


def test_a_row_that_cannot_be_decoded_is_not_tried_again(tmp_path, monkeypatch):
    write_images(tmp_path)
    (tmp_path / "05.png").write_bytes(b"no image")
    source = open_source(str(tmp_path))
    monkeypatch.setattr(BadRows, "try_again", lambda bad, files: tried.append(set(bad._unread)))
    tried: list[set[int]] = []
    _, bad = batches(source, "pil", 7)
    assert list(bad.reasons) == [5] and tried and not any(tried)


# ---- the budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "budget", "limit"),
    [(40, 1e-4, 1), (600, 1e-4, 10), (120, 1e-4, 2), (600, 0.0, 0), (10**6, 1e-4, 100), (600, 0.5, 300)],
)
def test_the_budget_of_small_sets(images, budget, limit):
    source = ImageSource("x", ["p"] * images, None, [], "f")
    assert BadRows(source, budget).limit == limit


def test_a_stop_by_the_budget_saves_first_and_its_advice_works(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    write_images(folder, 24)
    with TrainLoader(
        open_source(str(folder)), DataConfig(loader="pil"), SIZE, batch_size=8, seed=0
    ) as loader:
        # rows of the third step
        bad = list(itertools.islice(loader, 3))[2].index[:2].tolist()
    for row in bad:
        (folder / f"{row:02d}.png").write_bytes(b"no image")

    def run(**data):
        data = {"train": str(folder), "limit": 0, **data}
        return pretrain(tiny(tmp_path / "run", data=data), progress=False)

    with pytest.raises(DataError, match=r"--data\.bad-budget 0\.2; .*; step [12] is saved in") as caught:
        run()
    assert "\n" not in str(caught.value)
    # planned ahead, so perhaps found a step before it would have been used
    assert len(list((tmp_path / "run").glob("checkpoints/step_0000000[12]/COMPLETE"))) == 1
    run(bad_budget=0.2)
    assert status(tmp_path / "run")["state"] == "complete"


# ---- images replaced in place ---------------------------------------------------------------------


def test_images_replaced_in_place_at_the_same_size_are_noticed(tmp_path):
    folder, out = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    for i in range(24):
        # without compression all have one size
        Image.fromarray(picture(i, 40, 50)).save(folder / f"{i:02d}.bmp")

    def run(allow=False):
        """The last two steps, again after the first time."""
        shutil.rmtree(out / "checkpoints/step_00000006", ignore_errors=True)
        data = {"train": str(folder), "limit": 0, "bad_budget": 0.1}
        cfg = tiny(out, data=data, ckpt={"every_steps": 2, "retain": 2})
        return pretrain(cfg, progress=False, allow_config_change=allow)

    run()
    known = json.loads((out / "env.json").read_text())["sample"]
    # 64 draws of 24 rows
    assert set(known) <= {str(i) for i in range(24)} and len(known) > 12
    rows = sorted(known, key=int)
    # one that does not decode is damage, and as always replaced
    (folder / f"{int(rows[0]):02d}.bmp").write_bytes(bytes((folder / "00.bmp").stat().st_size))
    for row in rows[1:3]:
        Image.fromarray(picture(100, 40, 50)).save(folder / f"{int(row):02d}.bmp")
    with pytest.raises(
        UsageError, match=rf"other bytes .* in 2 of the {len(known)} .*{int(rows[1]):02d}\.bmp"
    ):
        run()
    run(allow=True)
    assert status(out)["state"] == "complete"
