"""Manifests: text and back, as an image source, and every way one can be wrong, with its line.

Covers: escapes of odd names; good rows only; labels, spans, headers, shards, names; relative roots after a move;
the fingerprint; rows taken out by hand and Windows line ends; damaged lines; files that changed.
"""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from extrema_fast.data import manifest
from extrema_fast.data.manifest import (
    Row,
    escape,
    header_lines,
    is_manifest,
    manifest_source,
    read_manifest,
    row_line,
    unescape,
    write_lines,
)
from extrema_fast.data.sources import open_source
from extrema_fast.errors import DataError, StorageError, UsageError


@pytest.mark.parametrize(
    "name",
    ["a\tb", "two\nlines\r", "back\\slash", "\\t", "\\x41", os.fsdecode(b"\xff\xe9x"), "ünï", "# %s'\"", " "],
)
def test_names_survive(name):
    text = escape(name)
    assert unescape(text) == name
    assert not set("\t\n\r") & set(text) and text.encode()
    # a name of no bytes, from Windows
    assert escape("\ud83d.png") == "?.png"


ROWS = [
    Row("a/1.jpg", bytes=5, crc32=0xCAFE, kind="jpeg", width=7, height=4, label="a", status="ok"),
    Row("a/2.jpg", bytes=9, kind="jpeg", label="a", status="damaged: cut"),
    Row("b/3\t.png", bytes=3, kind="png", width=39, height=19, orientation=6, label="b\tc", status="ok"),
]


def write(path, rows=ROWS, root=".", classes=("a", "empty", "b\tc")):
    path.parent.mkdir(exist_ok=True)
    write_lines(path, header_lines(root, list(classes)), map(row_line, rows))
    for row in rows:
        file = path.parent / root / row.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(row.bytes))
    return path


def test_table_and_source(tmp_path):
    table = read_manifest(write(tmp_path / "m.tsv"))
    assert table.root == "." and table.classes == ["a", "empty", "b\tc"] and len(table) == 3
    assert table.path == [r.path for r in ROWS] and table.status == ["ok", "damaged: cut", "ok"]
    assert table.label.tolist() == [0, 0, 2] and table.crc32.tolist() == [0xCAFE, 0, 0]
    assert table.good().tolist() == [0, 2] and table.width.dtype == np.int32
    assert table.offset.tolist() == [-1] * 3 and table.mtime_ns.dtype == np.int64
    source = open_source(str(tmp_path / "m.tsv"))
    assert source.paths == [f"{tmp_path}/a/1.jpg", f"{tmp_path}/b/3\t.png"]
    assert source.classes == ["a", "empty", "b\tc"] and source.labels.tolist() == [0, 2]
    assert source.headers.tolist() == [[4, 7, 1], [19, 39, 6]]
    assert source.spans is None and source.names is None and source.shards is None
    assert source.read(1) == bytes(3) and len(open_source(str(tmp_path / "m.tsv"), limit=1)) == 1


def test_shards(tmp_path):
    rows = [
        Row(path, f"{n}.jpg", 512 * n, 2, width=1, height=1)
        for n, path in enumerate(["x.tar", "x.tar", "y.tar"])
    ]
    write(tmp_path / "m.tsv", rows, classes=())
    for name in ("x.tar", "y.tar"):
        (tmp_path / name).write_bytes(np.arange(2048, dtype=np.uint16).tobytes())
    source = manifest_source(tmp_path / "m.tsv")
    assert source.spans.tolist() == [[0, 2], [512, 2], [1024, 2]] and source.shards.tolist() == [0, 0, 1]
    assert source.title(1) == f"{tmp_path}/x.tar:1.jpg"
    assert source.read(1) == (256).to_bytes(2, "little")
    # a shard that comes again after another: no order by shards
    write_lines(tmp_path / "m.tsv", header_lines(".", []), map(row_line, [rows[0], rows[2], rows[1]]))
    assert manifest_source(tmp_path / "m.tsv").shards is None
    # files beside shards
    mixed = [rows[0], Row("1.jpg", bytes=3, width=1, height=1)]
    (tmp_path / "1.jpg").write_bytes(b"abc")
    write_lines(tmp_path / "m.tsv", header_lines(".", []), map(row_line, mixed))
    source = manifest_source(tmp_path / "m.tsv")
    assert source.spans.tolist() == [[0, 2], [0, -1]] and source.shards is None
    assert source.read(1) == b"abc" and source.title(1) == f"{tmp_path}/1.jpg"


def test_moved_linked_and_copied(tmp_path, monkeypatch):
    first = manifest_source(write(tmp_path / "one/m.tsv", root="images")).fingerprint
    shutil.move(tmp_path / "one", tmp_path / "two")
    source = manifest_source(tmp_path / "two/m.tsv")
    assert source.fingerprint == first and source.paths[0] == f"{tmp_path}/two/images/a/1.jpg"
    (tmp_path / "link.tsv").symlink_to(tmp_path / "two/m.tsv")
    assert manifest_source(tmp_path / "link.tsv").paths == source.paths
    monkeypatch.chdir(tmp_path / "two")
    assert manifest_source("m.tsv").paths == source.paths


def test_fingerprint_follows_good_rows(tmp_path):
    def fingerprint(*rows, classes=("a", "empty", "b\tc")):
        return manifest_source(write(tmp_path / "m.tsv", rows, classes=classes)).fingerprint

    same, bad, other = ROWS
    first = fingerprint(*ROWS)
    assert fingerprint(same, other) == first == fingerprint(*ROWS, classes=("b\tc", "a"))
    assert fingerprint(other, same) != first
    for change in ({"crc32": 1}, {"path": "a/9.jpg"}, {"label": "empty"}, {"bytes": 6}):
        assert fingerprint(same._replace(**change), other) != first


def test_rows_taken_out_and_windows_line_ends(tmp_path):
    path = write(tmp_path / "m.tsv")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\r\n".join([*lines[:2], lines[4]]))
    source = manifest_source(path)
    assert source.paths == [f"{tmp_path}/b/3\t.png"] and source.labels.tolist() == [2]


def test_many_rows_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_CHUNK", 2)
    for count in (1, 2, 3, 4, 7):
        rows = [Row(f"{n}.jpg", bytes=n + 1, width=1, height=1) for n in range(count)]
        assert read_manifest(write(tmp_path / "m.tsv", rows, classes=())).bytes.tolist() == [
            n + 1 for n in range(count)
        ]
    with open(tmp_path / "m.tsv", "a") as f:
        f.write("x\n")
    with pytest.raises(UsageError, match=r"m\.tsv: line 10: expected 12 fields separated by tabs, got 1"):
        read_manifest(tmp_path / "m.tsv")


# ---- errors ---------------------------------------------------------------------------------------


def fails(path, words, error=UsageError):
    with pytest.raises(error, match=words) as caught:
        manifest_source(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("path", "", "the path is empty"),
        ("offset", "-2", "offset: expected a whole number from -1 to"),
        ("offset", "", "offset: expected a whole number .*, got ''"),
        ("bytes", "many", "bytes: .* got 'many'"),
        ("bytes", "0", "status is ok with 0 bytes"),
        ("bytes", "1" + "0" * 30, "bytes: expected"),
        ("crc32", "xyz", "crc32: expected 8 hexadecimal digits, got 'xyz'"),
        ("crc32", "1" * 9, "crc32: expected"),
        ("height", "0", "status is ok with 3 bytes, width 39, height 0"),
        ("height", str(2**31), "height: expected .* to 2147483647"),
        ("orientation", "9", "orientation: .* from 1 to 8, got '9'"),
        ("label", "d", "label 'd' is none of the 3 classes in line 1"),
        ("label", "", "no label, though line 1 names classes"),
        ("status", "ok\tmore", "expected 12 fields separated by tabs, got 13"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, column, value, words):
    path = write(tmp_path / "m.tsv")
    lines = path.read_text().split("\n")
    fields = lines[4].split("\t")
    fields[manifest.COLUMNS.index(column)] = value
    path.write_text("\n".join([*lines[:4], "\t".join(fields), ""]))
    fails(path, rf"m\.tsv: line 5: {words}")


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ("# extrema-fast manifest 2\t{}", "a manifest of version '2', this program reads 1"),
        ("# extrema-fast manifest 1", "line 1: expected a JSON object"),
        ("# extrema-fast manifest 1\t[]", "line 1: expected a JSON object"),
        ('# extrema-fast manifest 1\t{"root": "."}', "line 1: expected a JSON object"),
        ('# extrema-fast manifest 1\t{"root": ".", "classes": ["a", "a"]}', "list of different names"),
        ('# extrema-fast manifest 1\t{"root": ".", "classes": "ab"}', "list of different names"),
    ],
)
def test_a_wrong_first_line(tmp_path, first, words):
    path = write(tmp_path / "m.tsv")
    path.write_text("\n".join([first, *path.read_text().split("\n")[1:]]))
    assert is_manifest(path)
    fails(path, words)


def test_wrong_files(tmp_path):
    path = write(tmp_path / "m.tsv")
    text = path.read_text()
    path.write_text(text.replace("crc32", "md5", 1))
    fails(path, "line 2: expected the columns path member")
    path.write_bytes(text.encode() + b"\xff\xfe\n")
    fails(path, "not UTF-8")
    path.write_text("a.jpg\n")
    assert not is_manifest(path)
    fails(path, "line 1: not a manifest")
    assert not is_manifest(tmp_path) and not is_manifest(tmp_path / "gone")
    with pytest.raises(UsageError, match="gone: cannot be read"):
        read_manifest(tmp_path / "gone")


def test_nothing_good(tmp_path):
    fails(write(tmp_path / "m.tsv", [ROWS[1]]), "none of its 1 rows has status ok", DataError)
    fails(write(tmp_path / "m.tsv", []), "none of its 0 rows", DataError)


def test_images_that_are_elsewhere_or_changed(tmp_path):
    path = write(tmp_path / "m.tsv", root="images")
    (tmp_path / "images/a/1.jpg").write_bytes(bytes(6))
    fails(path, r"1 of 2 files checked are gone or have another size, first: .*images/a/1\.jpg; run")
    (tmp_path / "images/a/1.jpg").unlink()
    fails(path, r"1 of 2 files checked are gone")
    assert len(manifest_source(path, check=False)) == 2
    shutil.rmtree(tmp_path / "images")
    fails(path, rf'should be in {tmp_path}/images, which does not exist; set "root" in its first line')
    shards = [Row("x.tar", "1.jpg", 512, 100, width=1, height=1)]
    write(path, shards, classes=())
    (tmp_path / "x.tar").write_bytes(bytes(600))
    fails(path, "1 of 1 files checked are gone or have another size")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write(tmp_path / "m.tsv")
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("extrema_fast.data.manifest.os.fsync", full)
    with pytest.raises(StorageError, match=r"m\.tsv: cannot be written \(No space left on device\)"):
        write_lines(path, header_lines(".", []), [])
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "m.tsv"]
