"""Arrow and Parquet files, as Hugging Face's library writes them: columns, labels, bytes in place, copies, damage."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from extrema_fast.data.loader import loader_for
from extrema_fast.data.sources import open_source
from extrema_fast.errors import DataError, StorageError, UsageError
from extrema_fast.tools.index import index

from .conftest import fails
from .conftest import write_table as write

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra: parquet)")
pq = pytest.importorskip("pyarrow.parquet")

BYTES = [b"first", b"second" * 50, b"third", b"4"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def images(data=BYTES, kind=IMAGE, paths=None):
    if not pa.types.is_struct(kind):
        return pa.array(data, kind)
    paths = paths or [f"{i}.jpg" for i in range(len(data))]
    return pa.array([{"bytes": b, "path": p} for b, p in zip(data, paths, strict=True)], kind)


def table(features=None, **columns):
    made = pa.table({"image": images(), **columns})
    info = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if features else {}
    return made.replace_schema_metadata(info)


def read(source):
    return [source.read(row) for row in range(len(source))]


@pytest.mark.parametrize("name", ["t.arrow", "t.file.arrow", "t.parquet"])
@pytest.mark.parametrize("kind", [IMAGE, pa.binary(), pa.large_binary()], ids=str)
def test_bytes_are_read_in_place(tmp_path, name, kind):
    data = pa.table({"id": [7, 8, 9, 10], "image": images(kind=kind), "label": [1, 0, 1, 11]})
    path = write(tmp_path / name, data)
    source = open_source(str(path))
    assert read(source) == BYTES and [source.size(row) for row in range(4)] == list(map(len, BYTES))
    assert source.classes == ["0", "1", "11"] and source.labels.tolist() == [1, 0, 1, 2]
    titles = [source.title(row).rpartition(":")[2] for row in range(4)]
    assert titles == ([f"{i}.jpg" for i in range(4)] if kind is IMAGE else list("0123"))
    # the whole file is not read
    assert len(set(source.paths)) == 1 and source.spans.shape == (4, 2) and source.shards.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("features", "labels", "classes", "numbers"),
    [
        (FEATURES, [0, 1, 1, 0], ["dog", "cat"], [0, 1, 1, 0]),
        (FEATURES, [0, 1, -1, 0], [], None),
        (FEATURES, [0, 1, 2, 0], [], None),
        (None, ["b", "a", "b", " c "], ["a", "b", "c"], [1, 0, 1, 2]),
        (None, pa.array([5, 7, 5, 5]).dictionary_encode(), ["5", "7"], [0, 1, 0, 0]),
        (None, pa.array(list("baba"), pa.string_view()), ["a", "b"], [1, 0, 1, 0]),
        (None, [True, False, True, False], ["False", "True"], [1, 0, 1, 0]),
        (None, ["b", None, "b", "c"], [], None),
        (None, [0.5, 1.0, 2.0, 3.0], [], None),
    ],
)
def test_labels(tmp_path, features, labels, classes, numbers, caplog):
    for name in ("t.arrow", "t.parquet"):
        source = open_source(str(write(tmp_path / name, table(features, label=labels))))
        assert source.classes == classes
        assert (source.labels is None) if numbers is None else source.labels.tolist() == numbers
    why = "no labels in column 'label' (double)" if labels[0] == 0.5 else "used without labels"
    assert (why in caplog.text) == (numbers is None)


def test_classes_of_several_tables_are_those_of_the_same_name(tmp_path):
    others = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    write(tmp_path / "1.arrow", table(FEATURES, label=[0, 1, 1, 0]))
    write(tmp_path / "2.arrow", table(others, label=[0, 1, 1, 0]))
    write(tmp_path / "3.arrow", table(None, label=["cat", "cow", "ape", "dog"]))
    source = open_source(str(tmp_path))
    assert source.classes == ["dog", "cat", "ape", "cow"]
    assert source.labels.tolist() == [0, 1, 1, 0, 1, 0, 0, 1, 1, 3, 2, 0]
    # without names of their own, numbers are those of the table before
    write(tmp_path / "3.arrow", table(None, label=[0, 1, 1, 0]))
    assert open_source(str(tmp_path)).labels.tolist() == [0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1]
    write(tmp_path / "1.arrow", table(None, label=[0, 1, 1, 0]))
    fails(tmp_path, r"2\.arrow: labels in 'label' are names, those of the table before it numbers")
    write(tmp_path / "2.arrow", table(None, label=[0.5, 1.0, 1.0, 0.5]))
    fails(tmp_path, r"2\.arrow: no labels in column 'label', as in the table before .* label \(double\)")


def test_columns_by_what_is_written_about_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    features = {"picture_b": {"_type": "Image"}, "coarse": {"_type": "ClassLabel", "names": ["x", "y"]}}
    data = table(features, picture_b=images(BYTES[::-1]), coarse=[0, 1, 1, 1], text=list("abcd"))
    source = open_source(str(write(tmp_path / "a.arrow", data)))
    assert read(source) == BYTES[::-1] and source.classes == ["x", "y"]
    assert "images in column 'picture_b', labels in 'coarse'" in caplog.text
    # as strings of few values are often kept
    data = table(None, category=pa.array(list("abab")).dictionary_encode())
    assert open_source(str(write(tmp_path / "d.parquet", data))).classes == ["a", "b"]
    two = pa.table({"left": images(), "right": images(), "n": [1, 2, 3, 4]})
    fails(
        write(tmp_path / "two.arrow", two),
        r"more than one column .* left \(struct\), right \(struct\), n \(int64\)",
    )
    fails(
        write(tmp_path / "no.parquet", two.select(["n"])),
        r"no column of images .*; its columns are n \(int64\)",
    )
    write(tmp_path / "s/1.arrow", table(None, label=[1, 2, 3, 4]))
    write(tmp_path / "s/2.arrow", two)
    fails(
        tmp_path / "s",
        r"2\.arrow: no images in column 'image', as in the table before it; its columns are left",
    )
    twice = pa.Table.from_arrays([images(), images()], names=["image", "image"])
    fails(write(tmp_path / "twice.parquet", twice), "more than one column 'image'; its columns are image")


def test_a_data_set_saved_by_the_library(tmp_path):
    folder = tmp_path / "set/train"
    for number in range(2):
        write(folder / f"data-0000{number}-of-00002.arrow", table(None, label=[0, 1, 1, 0]))
    # of its caches
    write(folder / "cache-1234.arrow", table(None, label=[0, 0, 0, 0]))
    files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    source = open_source(str(folder))
    assert (
        read(source) == BYTES * 2
        and source.classes == ["dog", "cat"]
        and source.shards.tolist() == [0] * 4 + [1] * 4
    )
    # with its other part, and as downloaded
    shutil.copytree(folder, tmp_path / "set/test")
    fails(tmp_path / "set", rf"did you mean {tmp_path}/set/train\?")
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(tmp_path / f"hub/data/{name}.parquet", table(FEATURES, label=[0, 1, 1, 0]))
    fails(
        tmp_path / "hub/data",
        rf"files of test, train.* did you mean '{tmp_path}/hub/data/train\*\.parquet'\?",
    )
    # in the cache of the library
    for name in ("my_set-train-00000-of-00002", "my_set-train-00001-of-00002", "my_set-test"):
        write(tmp_path / f"cached/{name}.arrow", table(FEATURES, label=[0, 1, 1, 0]))
    fails(tmp_path / "cached", rf"files of test, train.* '{tmp_path}/cached/my_set-train\*\.arrow'\?")
    fails(
        tmp_path / "cached",
        rf"files of test, train.* '{tmp_path}/cached/my_set-test\*\.arrow'\?",
        split="test",
    )
    fails(tmp_path / "hub", rf"no images; .*did you mean {tmp_path}/hub/data\?")
    assert len(open_source(f"{tmp_path}/hub/data/train*.parquet")) == 8


def test_rows_without_bytes(tmp_path, caplog):
    data = pa.table({"image": images([b"1", None, b"3", b""], paths=["1", "2", "3", "4"])})
    source = open_source(str(write(tmp_path / "t.arrow", data)))
    assert read(source) == [b"1", b"", b"3", b""]
    assert f"2 of 4 images are empty (0 bytes), first: {tmp_path}/t.arrow:2" in caplog.text
    # the struct itself is null
    fields = [pa.array(BYTES), pa.array(list("abcd"))]
    masked = pa.StructArray.from_arrays(fields, ["bytes", "path"], mask=pa.array([False, True, False, False]))
    source = open_source(str(write(tmp_path / "masked.arrow", pa.table({"image": masked}))))
    assert read(source) == [BYTES[0], b"", *BYTES[2:]]
    paths = ["a/1.jpg", "b/1.jpg"]
    for name, column, kind in (
        ("t.arrow", "image", images([None] * 2, paths=paths)),
        ("t.parquet", "image", images([None] * 2, paths=paths)),
        ("t.arrow", "file_name", paths),
        ("t.parquet", "path", pa.array(paths).dictionary_encode()),
    ):
        path = write(tmp_path / "by_path" / name, pa.table({column: kind, "label": ["x", "y"]}))
        fails(path, r"2 of 2 files do not exist, first: .*by_path/a/1\.jpg")
        for folder in "ab":
            (path.parent / folder).mkdir()
            (path.parent / folder / "1.jpg").write_bytes(folder.encode())
        source = open_source(str(path))
        assert read(source) == [b"a", b"b"] and source.classes == ["x", "y"] and source.spans is None
        shutil.rmtree(path.parent)


def test_a_parquet_file_is_copied_once_and_again_when_it_changed(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "d/t.parquet", table(FEATURES, label=[0, 1, 1, 0], text=["long" * 1000] * 4))
    with ThreadPoolExecutor(4) as pool:
        first, *_ = pool.map(open_source, [str(path)] * 4)
    copy = first.paths[0]
    assert copy.startswith(str(tmp_path / "cache")) and os.path.getsize(copy) < 8000
    about = os.stat(copy)
    assert open_source(str(path)).fingerprint == first.fingerprint and os.stat(copy) == about
    assert caplog.text.count("copied once to") == 1
    # a run that goes on elsewhere, with another cache
    (tmp_path / "d").rename(tmp_path / "moved")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    moved = open_source(str(tmp_path / "moved/t.parquet"))
    assert moved.fingerprint == first.fingerprint and moved.paths != first.paths
    halves = [open_source(str(tmp_path / "moved/t.parquet"), s, holdout=0.5) for s in ("train", "test")]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "moved").rename(tmp_path / "d")
    for half, s in zip(halves, ("train", "test"), strict=True):
        assert read(open_source(str(path), s, holdout=0.5)) == read(half)
    # a copy that was killed, and one that is being written
    os.remove(copy)
    dead, alive = (os.path.join(os.path.dirname(copy), f".tmp-t.arrow-{n}") for n in (1, 2))
    for left in (dead, alive):
        open(left, "w").close()
    os.utime(dead, (0, 0))
    assert read(open_source(str(path))) == BYTES and not os.path.exists(dead) and os.path.exists(alive)
    write(path, table(FEATURES, label=[0, 1, 1, 1]))
    assert open_source(str(path)).labels.tolist() == [0, 1, 1, 1]
    # a run that reads the old copy must not get bytes from the new one
    with pytest.raises(FileNotFoundError):
        first.read(0)
    (tmp_path / "cache2").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache2"))
    fails(path, "the copy of .* cannot be written .*; XDG_CACHE_HOME names another place", StorageError)


def test_a_copy_holds_plain_columns(tmp_path):
    for data in (pa.array(BYTES, pa.binary_view()), pa.array(BYTES).dictionary_encode()):
        for column in (data, pa.StructArray.from_arrays([data, pa.array(list("abcd"))], ["bytes", "path"])):
            path = write(tmp_path / "t.parquet", pa.table({"image": column}), rows=4)
            assert read(open_source(str(path))) == BYTES
            path.unlink()
            shutil.rmtree(tmp_path / "cache")


def test_a_large_row_group_is_copied_in_pieces(tmp_path, monkeypatch):
    total, size = 20_000_000, 2_000
    noise = os.urandom(total)
    data = pa.table({"image": [noise[at : at + size] for at in range(0, total, size)]})
    pq.write_table(data, tmp_path / "t.parquet", use_dictionary=False)
    before, held, new_stream = pa.total_allocated_bytes(), [], pa.ipc.new_stream

    @contextmanager
    def watched(out, schema):
        with new_stream(out, schema) as writer:

            def write_batch(batch):
                held.append(pa.total_allocated_bytes() - before)
                writer.write_batch(batch)

            yield SimpleNamespace(write_batch=write_batch)

    monkeypatch.setattr(pa.ipc, "new_stream", watched)
    assert len(open_source(str(tmp_path / "t.parquet"))) == total // size
    assert size < max(held) < total / 2


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, caplog):
    squeezed = pa.ipc.IpcWriteOptions(compression="zstd")
    fails(write(tmp_path / "z.arrow", table(), squeezed), "z.arrow: a compressed Arrow file")
    for name in ("t.arrow", "t.parquet"):
        path = write(tmp_path / name, table())
        whole = path.read_bytes()
        for cut in (0, 3, 30, len(whole) // 2):
            path.write_bytes(whole[:cut])
            fails(path, r"t\.\w+: not a table, or a damaged one", DataError)
    # cut between two batches
    path = write(tmp_path / "cut.arrow", table())
    path.write_bytes(path.read_bytes()[:-8])
    assert len(open_source(str(path))) == 4 and "cut.arrow: has no end mark" in caplog.text
    fails(write(tmp_path / "none.arrow", table().slice(0, 0)), "no rows in 1 table")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(
        tmp_path / "t.arrow", r"tables need pyarrow, which is not installed; pip install 'pyarrow", UsageError
    )


# not of Parquet: some flips end the process in pyarrow itself
@pytest.mark.parametrize("name", ["t.arrow", "t.file.arrow"])
def test_flipped_bytes_end_in_an_error_or_do_no_harm(tmp_path, name):
    path = write(tmp_path / name, table(FEATURES, label=[0, 1, 1, 0]))
    whole = path.read_bytes()
    for at in range(3, len(whole), max(7, len(whole) // 60)):
        changed = bytearray(whole)
        changed[at] ^= 0x41
        path.write_bytes(changed)
        try:
            source = open_source(str(path))
            assert all(len(data) == source.size(row) for row, data in enumerate(read(source)))
        except (DataError, UsageError) as e:
            assert str(path) in str(e)


def test_a_manifest_whose_copied_images_were_cleared(tmp_path, tree):
    files = sorted(p for p in tree.rglob("*") if p.is_file())
    data = pa.table({"image": images([p.read_bytes() for p in files])})
    parquet, manifest = write(tmp_path / "t.parquet", data), tmp_path / "m.tsv"
    result = index(str(parquet), manifest, progress=False, threads=1)
    assert (result.rows, result.good) == (23, 23)
    # its rows lie in a copy, which is made again
    shutil.rmtree(tmp_path / "cache")
    source = open_source(str(manifest))
    assert [source.read(row) for row in range(23)] == [p.read_bytes() for p in files]
    shutil.rmtree(tmp_path / "cache")
    write(parquet, data.slice(1))
    fails(manifest, "which has been cleared, from .*t.parquet, which has changed; run .*index")
    shutil.rmtree(tmp_path / "cache")
    parquet.unlink()
    fails(manifest, "which has been cleared, from .*t.parquet: does not exist")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "npy"])
def test_images_without_names_are_known_by_their_bytes(tmp_path, config, kind, caplog):
    caplog.set_level(logging.INFO)
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")
    file, pixels = io.BytesIO(), np.zeros((8, 9, 3), np.uint8)
    if kind == "npy":
        np.save(file, pixels)
    else:
        image.fromarray(pixels).save(file, kind)
    source = open_source(str(write(tmp_path / "t.arrow", pa.table({"image": [file.getvalue()] * 5}))))
    assert (
        loader_for(source, config()) == "pil" and f"{kind.lower()} files are decoded" in caplog.text.lower()
    )
    if kind != "TIFF":
        with pytest.raises(UsageError, match=f"{kind.lower()} files, which Pillow alone reads"):
            loader_for(source, config(loader="dali"))
