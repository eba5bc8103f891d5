"""Zip archives: rows, classes and bytes as of the unpacked folder, damage, and reading by the loaders and `index`."""

from __future__ import annotations

import io
import logging
import os
import shutil
import zipfile
import zlib
from pathlib import Path

import pytest

from extrema_fast.data.image_files import ImageFiles
from extrema_fast.data.sources import EXTENSIONS, open_source, split_folders
from extrema_fast.data.zips import members
from extrema_fast.errors import DataError, UsageError

from .conftest import fails
from .tars import write_tar

NAMES = ["b/1.jpg", "a/2.png", "a/sub/3.JPG", "a b/4.jpg"]


def content(name: str) -> bytes:
    # of text that deflates well, and of none at all
    return name.encode() * 500 + zlib.compress(os.urandom(300))


def write_zip(path, files, prefix="", streamed=False):
    """A zip archive of name -> bytes, every other file deflated; streamed: sizes follow the data."""
    path.parent.mkdir(parents=True, exist_ok=True)

    class Pipe(io.BufferedWriter):
        def seekable(self):
            return not streamed

        def tell(self):
            if streamed:
                raise OSError
            return super().tell()

    with open(path, "wb", buffering=0) as raw, zipfile.ZipFile(Pipe(raw), "w") as archive:
        for i, (name, data) in enumerate(files.items()):
            about = zipfile.ZipInfo(prefix + name)
            about.compress_type = [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED][i % 2]
            # sizes in 64 bits, as of large archives
            with archive.open(about, "w", force_zip64=i % 3 == 0) as f:
                f.write(data)
    return path


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("prefix", ["", "set/", "my set/train/", "./set/"])
def test_rows_are_those_of_the_unpacked_folder(tmp_path, prefix, streamed, caplog):
    files = {name: content(name) for name in NAMES}
    odd = {
        ".hidden.jpg": b"x",
        "a/.DS_Store": b"x",
        "__MACOSX/a/._2.png": b"x",
        "a/5.heic": b"x",
        "notes.txt": b"x",
    }
    write_zip(tmp_path / "s.zip", {**odd, **files}, prefix, streamed)
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        archive.extractall(tmp_path / "d")
    with caplog.at_level(logging.WARNING):
        source = open_source(str(tmp_path / "s.zip"))
    assert "left out 1 image of kinds that are not read: .heic 1" in caplog.text
    folder = open_source(str(tmp_path / "d" / prefix))
    assert source.classes == folder.classes == ["a", "a b", "b"]
    assert source.labels.tolist() == folder.labels.tolist()
    assert [source.title(r).partition(":")[2] for r in range(4)] == [
        os.path.relpath(p, tmp_path / "d") for p in folder.paths
    ]
    for row in range(4):
        assert source.read(row) == folder.read(row) and source.size(row) == folder.size(row)
    assert source.shards.tolist() == [0] * 4
    # a folder in it
    if prefix:
        inside = open_source(str(tmp_path / "s.zip" / Path(prefix)))
        assert inside.names == source.names and inside.classes == source.classes
    assert len(open_source(str(tmp_path / "s.zip" / Path(prefix) / "a"))) == 2


def test_several_archives_loose_images_and_parts_of_a_set(tmp_path, caplog):
    write_zip(tmp_path / "s/1.zip", {"set/b/1.jpg": b"1", "set/a/2.jpg": b"2"})
    write_zip(tmp_path / "s/2.zip", {"set/a/1.jpg": b"3"})
    for spec in (tmp_path / "s", tmp_path / "s/*.zip"):
        source = open_source(str(spec))
        assert [source.read(r) for r in range(3)] == [b"2", b"1", b"3"] and source.shards.tolist() == [
            0,
            0,
            1,
        ]
        assert source.classes == ["a", "b"] and source.labels.tolist() == [0, 1, 0]
    # next to tar shards, as other files that describe them
    write_tar(tmp_path / "t/1.tar", [("1.jpg", b"1")])
    shutil.copy(tmp_path / "s/1.zip", tmp_path / "t/1.zip")
    (tmp_path / "t/1.parquet").write_bytes(b"PAR1")
    assert open_source(str(tmp_path / "t")).names == [f"{tmp_path}/t/1.tar:1.jpg"]
    write_zip(tmp_path / "flat.zip", {"x/1.jpg": b"1", "x/2.jpg": b"2"})
    assert open_source(str(tmp_path / "flat.zip")).labels is None
    write_zip(tmp_path / "mixed.zip", {"1.jpg": b"1", "x/2.jpg": b"2"})
    with caplog.at_level(logging.WARNING):
        assert open_source(str(tmp_path / "mixed.zip")).labels is None
    assert "1 images next to folders with 1 more" in caplog.text
    both = write_zip(tmp_path / "both.zip", {"d/train/a/1.jpg": b"1", "d/val/a/2.jpg": b"2"})
    fails(both, rf"both\.zip: holds train/, val/, .* did you mean {both}/d/train\?")
    assert open_source(f"{both}/d/val").read(0) == b"2"
    fails(f"{both}/d/dev", "dev: no images")
    fails(write_zip(tmp_path / "none.zip", {"a.txt": b"1", "b.heic": b""}), r"no images; .*\.txt 1, \.heic 1")


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "s.zip"
    files = {"a/1.jpg": b"12345678" * 9, "a/2.jpg": content("2")}
    plain = write_zip(path, files).read_bytes()
    for cut in (0, 10, len(plain) // 2, len(plain) - 5):
        path.write_bytes(plain[:cut])
        fails(path, r"s\.zip: not a zip archive, or a damaged one", DataError)
    # in the table of contents: flags at 8, method at 10 of an entry
    for at, value, words in (
        (8, 1, "1 image of 2 encrypted, first: a/1.jpg; unpack it"),
        (10, 12, "way that is not read"),
    ):
        changed = bytearray(plain)
        changed[plain.index(b"PK\x01\x02") + at] = value
        path.write_bytes(changed)
        fails(path, words, UsageError)
    # of the images themselves: the errors of a row, not of the set; never other bytes
    rows = []
    for at in range(30 + len("a/1.jpg"), plain.index(b"PK\x01\x02"), 3):
        changed = bytearray(plain)
        changed[at] ^= 0x10
        path.write_bytes(changed)
        source = open_source(str(path))
        for row, want in enumerate(files.values()):
            try:
                rows.append(source.read(row) == want)
            except OSError as e:
                assert str(path) in str(e)
    assert False not in rows and len(rows) > 100
    assert sum(rows) < (at - 30) // 3 * 2


def test_damage_is_an_error_whatever_is_said_about_sizes(tmp_path, config):
    path = write_zip(tmp_path / "s.zip", {"a/1.jpg": b"\0" * 100_000, "a/2.jpg": b"x" * 99})
    plain = path.read_bytes()
    (first, second), _ = members(str(path), EXTENSIONS)
    assert (first.size, second.size) == (100_000, 99) and first.crc32 == zlib.crc32(b"\0" * 100_000)
    entry = plain.index(b"PK\x01\x02")
    for size in (10, 99_999, 100_001, 2**31 + 5):
        changed = bytearray(plain)
        changed[entry + 24 : entry + 28] = size.to_bytes(4, "little")
        path.write_bytes(changed)
        source = open_source(str(path))
        with pytest.raises(OSError):
            source.read(0)
        assert str(ImageFiles(source, config()).why_unusable(0)).startswith(
            f"{path}:a/1.jpg: cannot be decoded ("
        )


@pytest.mark.parametrize(("around", "train", "test"), [("", "train", "val"), ("set/", "Train", "TEST")])
def test_training_and_test_images_in_one_archive(tmp_path, around, train, test):
    """As in a folder; capitals do not count."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in (train, test):
            for i in range(2):
                member = f"{around}{name}/c{i}/{i}.png"
                (tmp_path / member).parent.mkdir(parents=True, exist_ok=True)
                image.new("RGB", (8, 8)).save(tmp_path / member)
                archive.write(tmp_path / member, member)
    for root in (f"{tmp_path}/set.zip/{around}", f"{tmp_path}/{around}"):
        spec = f"{tmp_path}/set.zip" if ".zip" in root else root
        assert split_folders(spec) == (f"{root}{train}", f"{root}{test}")
    for found in split_folders(f"{tmp_path}/set.zip"):
        assert open_source(found).classes == ["c0", "c1"]
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
        archive.write(tmp_path / member, "0.png")
    assert split_folders(f"{tmp_path}/flat.zip") == (f"{tmp_path}/flat.zip", "")
