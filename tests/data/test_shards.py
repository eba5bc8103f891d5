"""Tar shards.

Covers: samples and labels by webdataset's convention, index files, patterns, and every kind of broken tar.
Oracles: Python's tarfile for names and places, DALI's wds2idx for index files.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile

import numpy as np
import pytest

from extrema_fast.data import shards
from extrema_fast.data.shards import Member, expand, index_text, members, parse_index, scan
from extrema_fast.data.sources import open_source
from extrema_fast.errors import DataError

from .conftest import fails
from .tars import samples, special, write_tar


def truth(path):
    with tarfile.open(path, errors="surrogateescape") as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]


# ---- reading --------------------------------------------------------------------------------------


def test_rows_are_the_images_with_their_bytes_and_labels(tmp_path):
    a, b = write_tar(tmp_path / "s/a.tar", samples(7)), write_tar(tmp_path / "s/b.tar", samples(4, first=7))
    source = open_source(str(tmp_path / "s"))
    assert source.paths == [str(a)] * 7 + [str(b)] * 4
    assert source.title(8) == f"{b}:d/0008.jpg" and source.name == str(tmp_path / "s")
    assert source.shards.tolist() == [0] * 7 + [1] * 4 and source.shards.dtype == np.int32
    assert source.labels.tolist() == [i % 3 for i in range(11)] and source.classes == ["0", "1", "2"]
    wanted = [data for p in (a, b) for name, data in truth(p) if name.endswith(".jpg")]
    assert [source.read(r) for r in range(11)] == wanted
    assert source.headers is None and source.parts == ()
    one = open_source(str(b))
    assert len(one) == 4 and one.read(3) == wanted[10]


def test_limit_keeps_spans_names_and_shards(tmp_path):
    write_tar(tmp_path / "a.tar", samples(5))
    write_tar(tmp_path / "b.tar", samples(6, first=5))
    whole, some = open_source(str(tmp_path)), open_source(str(tmp_path), limit=4)
    rows = [whole.names.index(n) for n in some.names]
    assert [some.read(r) for r in range(4)] == [whole.read(r) for r in rows]
    assert some.shards.tolist() == whole.shards[rows].tolist()


@pytest.mark.parametrize(
    ("members_", "images", "labels"),
    [
        # other components are ignored; labels in json
        (
            {
                "x/1.jpeg": b"one",
                "x/1.txt": b"a caption",
                "x/1.json": b'{"label": 12, "other": [1]}',
                "x/1.seg.png": b"mask",
                "x/2.json": b'{"label": "7"}',
                "x/2.WEBP": b"two",
                "README": b"no dot",
            },
            [b"one", b"two"],
            ["12", "7"],
        ),
        # cls before json; names are classes too
        (
            {"1.json": b'{"label": 5}', "1.cls": b"tench", "1.png": b"x", "2.png": b"y", "2.cls": b"hen"},
            [b"x", b"y"],
            ["tench", "hen"],
        ),
        # dots in names
        (
            {
                "my.photo.1.jpg": b"a",
                "my.photo.2.jpg": b"b",
                "v1.0/IMG.depth.png": b"m",
                "v1.0/IMG.jpg": b"c",
            },
            [b"a", b"b", b"c"],
            None,
        ),
        # hidden files
        ({"d/._1.jpg": b"finder", "d/1.jpg": b"a", ".2.jpg": b"b"}, [b"a"], None),
        # absolute and parent paths are only names
        ({"/etc/1.jpg": b"a", "../2.jpg": b"b", "c/../../3.jpg": b"c"}, [b"a", b"b", b"c"], None),
    ],
    ids=["json", "cls", "dots", "hidden", "paths"],
)
def test_samples_and_labels(tmp_path, monkeypatch, members_, images, labels):
    path = write_tar(tmp_path / "a.tar", members_.items())
    source = open_source(str(path))
    assert [source.read(r) for r in range(len(source))] == images
    found = source.labels if labels is None else [source.classes[i] for i in source.labels.tolist()]
    assert found == labels
    assert sorted(os.listdir(tmp_path)) == ["a.idx", "a.tar"]
    # a file that the index leaves out does not make it a wrong one
    no_scan(monkeypatch)
    assert open_source(str(path)).fingerprint == source.fingerprint


@pytest.mark.parametrize(
    "label",
    [
        None,
        (".cls", b" \n"),
        (".cls", b"\xff"),
        (".json", b'{"label": true}'),
        (".json", b'{"label": 1.5}'),
        (".json", b"[" * 100_000),
        (".json", b"{}"),
    ],
)
def test_a_label_that_is_missing_drops_all(tmp_path, caplog, label):
    last = [] if label is None else [("9" + label[0], label[1])]
    path = write_tar(tmp_path / "a.tar", [*samples(3), ("9.jpg", b"x"), *last])
    with caplog.at_level(logging.WARNING):
        source = open_source(str(path))
    assert len(source) == 4 and source.labels is None and source.classes == []
    assert f"1 of 4 images have no label (cls, or label in json), first: {path}:9.jpg" in caplog.text


def test_few_labels_are_read_where_there_are_none(tmp_path, monkeypatch, caplog):
    label, calls = shards._label, []
    monkeypatch.setattr(shards, "_label", lambda fd, member: calls.append(member) or label(fd, member))
    for name, first in (("none", 90), ("late", 80)):
        entries = [
            (f"{i:03d}.{kind}", b"{}" if i < first else b'{"label": 1}')
            for i in range(90)
            for kind in ("jpg", "json")
        ]
        source = open_source(str(write_tar(tmp_path / f"{name}.tar", entries)))
        assert len(source) == 90 and source.labels is None
        assert (len(calls) == 45) == (name == "none"), len(calls)
    # labels that begin late in a shard are not overlooked
    assert "80 of 90 images have no label" in caplog.text and caplog.text.count("no label") == 1


@pytest.mark.parametrize(
    ("images", "hint"), [("a/1 a/2 b/1 b/2", True), ("a/1 a/2", False), ("a/1 b/1", False)]
)
def test_folders_that_may_be_classes_are_named(tmp_path, caplog, images, hint):
    caplog.set_level(logging.INFO)
    path = write_tar(tmp_path / "a.tar", [(f"set/{name}.jpg", b"x") for name in images.split()])
    assert open_source(str(path)).labels is None
    assert (
        "no labels (cls, or label in json), but 2 folders (set/a, set/b); if these" in caplog.text
    ) == hint


def test_classes_txt_names_the_numbers(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.cls", b"2"), ("2.jpg", b"x"), ("2.cls", b"0")])
    (tmp_path / "classes.txt").write_text("ape\nbee\ncat\\tfish\ndog\n")
    source = open_source(str(path))
    assert source.classes == ["ape", "bee", "cat\tfish", "dog"] and source.labels.tolist() == [2, 0]
    for text in ("ape\nbee\n", "ape\nape\nbee\n"):
        (tmp_path / "classes.txt").write_text(text)
        with caplog.at_level(logging.WARNING):
            source = open_source(str(path))
        assert source.classes == ["0", "2"] and source.labels.tolist() == [1, 0]
        assert "2 different names do not name the classes up to 2" in caplog.text
        caplog.clear()


def test_fingerprint_follows_content_not_place(tmp_path):
    first = open_source(str(write_tar(tmp_path / "d/a.tar", samples(3)))).fingerprint
    assert open_source(str(write_tar(tmp_path / "e/a.tar", samples(3)))).fingerprint == first
    other = [
        ("e/b.tar", samples(3)),
        ("f/a.tar", samples(3, label=False)),
        ("g/a.tar", samples(4)),
        ("h/a.tar", [(n, b"1" if n.endswith("cls") else d) for n, d in samples(3)]),
        ("i/a.tar", [(n.replace("d/", "e/"), d) for n, d in samples(3)]),
    ]
    found = {open_source(str(write_tar(tmp_path / p, entries))).fingerprint for p, entries in other}
    assert len(found) == len(other) and first not in found


# ---- scan and index -------------------------------------------------------------------------------

ODD_NAMES = [
    "plain.jpg",
    "dir/with space.jpg",
    "tab\there.jpg",
    "line\nend.jpg",
    "ünïcödé.jpg",
    os.fsdecode(b"latin-\xe9.jpg"),
    "n" * 99 + ".jpg",
    "n" * 100 + ".jpg",
    "d" * 90 + "/" + "n" * 90 + ".jpg",
    "/".join(["deep" * 20] * 5) + "/x.jpg",
    "back\\slash.jpg",
]


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_scan_finds_what_tarfile_extracts(tmp_path, fmt):
    names = ODD_NAMES if fmt != tarfile.USTAR_FORMAT else [n for n in ODD_NAMES if len(n) < 100]
    sizes = [0, 1, 511, 512, 513, 1024, 10_000]
    entries = [(name, os.urandom(sizes[i % len(sizes)])) for i, name in enumerate(names)]
    entries.insert(3, special("dir", tarfile.DIRTYPE))
    path = write_tar(tmp_path / "a.tar", entries, fmt)
    data = path.read_bytes()
    found = scan(str(path))
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in found] == truth(path)
    assert parse_index(index_text(found)) == found
    # once from the scan, then from the index
    assert members(str(path)) == members(str(path)) == found and (tmp_path / "a.idx").exists()


def test_index_is_byte_for_byte_what_dali_makes(tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="wds2idx comes with DALI (extra: dali-cuda13)")
    others = {"d/0009.txt": b"alone", "README": b"x", "d/.hidden.jpg": b"y", "e/1.a.jpg": b"z"}
    path = write_tar(tmp_path / "a.tar", [special("d", tarfile.DIRTYPE), *samples(9), *others.items()])
    open_source(str(path))
    with wds2idx.IndexCreator(str(path), str(tmp_path / "dali.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "dali.idx").read_bytes()


def no_scan(monkeypatch):
    def refuse(path):
        raise AssertionError("scanned again")

    monkeypatch.setattr(shards, "scan", refuse)


@pytest.mark.parametrize("broken", ["older", "garbage", "short", "shifted", "longer", "sizes", "outside"])
def test_an_index_that_does_not_fit_is_made_again(tmp_path, broken, caplog):
    path = write_tar(tmp_path / "a.tar", samples(20))
    index = tmp_path / "a.idx"
    first = open_source(str(path)).fingerprint
    good = index.read_text()
    found = parse_index(good)
    if broken == "older":
        os.utime(index, ns=(0, 0))
    else:
        changed = {
            "garbage": "v1.2 1\njpg x y",
            "short": index_text(found[:-2]),
            "shifted": index_text(m._replace(offset=m.offset + 512) for m in found),
            "longer": index_text([*found, Member("d/9999.jpg", found[-1].offset + 10240, 5)]),
            "sizes": index_text(m._replace(size=m.size + 1) for m in found),
            "outside": index_text([Member("x.jpg", -4, 5), *found]),
        }
        index.write_text(changed[broken])
    with caplog.at_level(logging.INFO):
        assert open_source(str(path)).fingerprint == first
    assert str(index) in caplog.text and "not used" in caplog.text
    assert index.read_text() == good


@pytest.mark.parametrize("kind", ["text", "binary", "empty", "link"])
def test_a_file_of_somebody_else_is_not_replaced(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_tar(tmp_path / "data/a.tar", samples(5))
    own, foreign = tmp_path / "data/a.idx", tmp_path / "foreign"
    content = {"text": b"my notes", "binary": os.urandom(300), "empty": b"", "link": b"v1.2 0\n"}[kind]
    foreign.write_bytes(content)
    if kind == "link":
        own.symlink_to(foreign)
    else:
        own.write_bytes(content)
    first = open_source(str(path)).fingerprint
    assert own.is_symlink() == (kind == "link") and own.read_bytes() == foreign.read_bytes() == content
    # the cache has it instead
    no_scan(monkeypatch)
    assert open_source(str(path)).fingerprint == first


def test_the_index_goes_to_the_cache_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_tar(tmp_path / "data/a.tar", samples(5))
    path.parent.chmod(0o555)
    try:
        first = open_source(str(path))
        assert os.listdir(path.parent) == ["a.tar"]
        assert len(list((tmp_path / "cache/extrema_fast/shards").iterdir())) == 1
        no_scan(monkeypatch)
        assert open_source(str(path)).fingerprint == first.fingerprint
    finally:
        path.parent.chmod(0o755)


def test_no_place_for_the_index_is_no_harm(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "data/a.tar", samples(5))

    def refuse(place, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shards, "write_file", refuse)
    assert len(open_source(str(path))) == 5 and os.listdir(path.parent) == ["a.tar"]


# ---- patterns -------------------------------------------------------------------------------------


def test_patterns(tmp_path, monkeypatch):
    for i in range(12):
        write_tar(tmp_path / f"s/{'ab'[i % 2]}-{i:02d}.tar", samples(1, first=i))
    monkeypatch.chdir(tmp_path)
    assert expand("s/a-{00..00}.tar") == ["s/a-00.tar"]
    assert expand("s/{a,b}-0[01].tar") == ["s/a-00.tar", "s/b-01.tar"]
    assert len(open_source("s/*.tar")) == 12 and len(open_source("**/b-*.tar")) == 6
    write_tar(tmp_path / "n/9.tar", samples(1))
    write_tar(tmp_path / "n/10.tar", samples(1, first=1))
    assert expand("n/{9..10}.tar") == ["n/9.tar", "n/10.tar"] == expand("n/{10..9}.tar")[::-1]
    # a file of that very name is that file
    write_tar(tmp_path / "x[1].tar", samples(3))
    assert len(open_source("x[1].tar")) == 3


def test_bad_patterns(tmp_path):
    for part in ("train-000", "train-001", "val-000"):
        write_tar(tmp_path / f"parts/set-{part}.tar", samples(1))
    fails(tmp_path / "parts", rf"holds files of train, val, .* '{tmp_path}/parts/set-train\*\.tar'\?")
    assert len(open_source(f"{tmp_path}/parts/*.tar")) == 3
    write_tar(tmp_path / "a0.tar", samples(1))
    (tmp_path / "a0.jpg").write_bytes(b"x")
    fails(tmp_path / "a{0..3}.tar", r"3 of 4 do not exist as files, first: .*a1\.tar")
    fails(tmp_path / "b*.tar", r"b\*\.tar: matches no file; expected shards")
    fails(tmp_path / "a*.jpg", r"1 of 1 files are no shards, first: .*a0\.jpg")
    (tmp_path / "a1.zip").write_bytes(b"PK\x03\x04")
    fails(tmp_path / "a{0.tar,1.zip}", "shards of 2 kinds: 1 tar, 1 zip")
    fails(tmp_path / "a{0..9999999}.tar", "names more than 1000000 files")
    fails(tmp_path / "a{0,0}.tar", r"names the shard .*a0\.tar more than once")


# ---- broken tars ----------------------------------------------------------------------------------


def test_empty_shards(tmp_path, caplog):
    empty = write_tar(tmp_path / "e.tar", [])
    fails(empty, r"no images in 1 tar file; looked for members named \*\.bmp, ")
    write_tar(tmp_path / "t.tar", [("a.txt", b"x"), ("a.json", json.dumps({"label": 1}).encode())])
    fails(tmp_path, "no images in 2 tar files")
    write_tar(tmp_path / "u.tar", samples(2))
    with caplog.at_level(logging.WARNING):
        assert len(open_source(str(tmp_path))) == 2
    assert f"no images in 2 of 3 shards, first: {empty}" in caplog.text
    (tmp_path / "v.tar").touch()
    fails(tmp_path, r"v\.tar: an empty file \(0 bytes\), not a tar", DataError)


def test_what_is_no_tar(tmp_path):
    path = tmp_path / "a.tar"
    for content in (os.urandom(5000), b"hello\n"):
        path.write_bytes(content)
        fails(path, r"a\.tar: not a tar file, or cut off before its first image", DataError)
    for mode, command in (("gz", "gzip -d"), ("bz2", "bzip2 -d"), ("xz", "xz -d")):
        with tarfile.open(path, f"w:{mode}") as tar:
            tar.addfile(tarfile.TarInfo("x.jpg"))
        fails(path, rf"a\.tar: a compressed tar; .* \({command}\)", DataError)
        path.rename(tmp_path / f"set.tar.{mode}")
        fails(tmp_path / f"set.tar.{mode}", "a compressed archive: unpack it first")


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_is_noticed(tmp_path, fmt, caplog):
    entries = [("1.jpg", b"x" * 700), ("n" * 120 + ".jpg", b"y" * 512), ("3.jpg", b"z" * 3)]
    whole = write_tar(tmp_path / "whole.tar", entries, fmt)
    data, found = whole.read_bytes(), scan(str(whole))
    ends = [m.offset + -(-m.size // 512) * 512 for m in found]
    for size in sorted(
        {*range(1, ends[-1] + 1000, 256), *ends, *(e - 1 for e in ends), *(e + 1 for e in ends)}
    ):
        path = tmp_path / f"{size}.tar"
        path.write_bytes(data[:size])
        caplog.clear()
        if size in ends or size >= ends[-1] + 512:
            with caplog.at_level(logging.WARNING):
                assert scan(str(path)) == found[: sum(e <= size for e in ends)]
            # cut between two files only the end mark is missing
            assert ("has no end mark" in caplog.text) == (size in ends)
        else:
            with pytest.raises(DataError, match=rf"{size}\.tar: (not a tar|truncated or damaged after)"):
                scan(str(path))


def test_all_damaged_shards_are_named(tmp_path, caplog):
    for i in range(4):
        path = write_tar(tmp_path / f"{i}.tar", samples(9))
        if i % 2:
            path.write_bytes(path.read_bytes()[:5000])
    fails(tmp_path, r"2 of 4 shards cannot be used, first: .*1\.tar: truncated or damaged", DataError)
    assert [f"{i}.tar: truncated" in caplog.text for i in range(4)] == [False, True, False, True]


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(9))
    data = bytearray(path.read_bytes())
    at = scan(str(path))[10].offset - 512
    data[at + 3] ^= 0x40
    path.write_bytes(data)
    (tmp_path / "a.idx").unlink(missing_ok=True)
    fails(path, rf"a\.tar: truncated or damaged after d/0004\.cls .* no valid header at byte {at}", DataError)


def test_flipped_bytes_end_in_a_data_error_or_do_no_harm(tmp_path, seed):
    rng = np.random.default_rng(seed)
    long = ("n" * 150 + ".jpg", b"x" * 600)
    data = write_tar(tmp_path / "whole.tar", [*samples(3), long], tarfile.PAX_FORMAT).read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for i in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 1 + i % 20):
            damaged[at] = rng.integers(256)
        (tmp_path / "d.tar").write_bytes(damaged)
        try:
            found = scan(str(tmp_path / "d.tar"))
            outcomes["read"] += 1
            assert all(0 <= m.offset <= m.offset + m.size <= len(data) + 512 for m in found)
        except DataError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, outcomes


def test_a_size_below_zero_does_not_go_round_for_ever(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("n" * 150 + ".jpg", b"x" * 600)], tarfile.PAX_FORMAT)
    data = path.read_bytes()
    at = data.index(b"path=n") - 4
    end = data.index(b"\n", at) + 1
    record = b"13 size=-600\n"
    path.write_bytes(
        data[:at] + record + b"%d x=" % (end - at - 13) + b"y" * (end - at - 13 - 6 - 1) + b"\n" + data[end:]
    )
    fails(path, "-600 bytes", DataError)


def test_keys_that_come_twice(tmp_path):
    path = write_tar(tmp_path / "a/a.tar", [("1.jpg", b"x"), ("2.jpg", b"y"), ("1.jpg", b"z")])
    fails(path, r"a\.tar: the key 1 comes twice, as 1\.jpg at byte 512 and 1\.jpg at byte 2560", DataError)
    path = write_tar(tmp_path / "b/b.tar", [("1.jpg", b"x"), ("1.png", b"y")])
    fails(path, r"b\.tar: two images of one key, 1\.jpg and 1\.png", DataError)
    # in two shards they are two images
    write_tar(tmp_path / "c/a.tar", samples(3))
    write_tar(tmp_path / "c/b.tar", samples(4, first=1))
    source = open_source(str(tmp_path / "c"))
    assert len(source) == 7 and len(set(source.names)) == 7


def test_links_and_devices_are_left_out(tmp_path, caplog):
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    entries = [special(f"{i}.jpg", kind, "1.jpg") for i, kind in enumerate(kinds, 2)]
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"a"), *entries, ("6.jpg", b"b")])
    with caplog.at_level(logging.WARNING):
        source = open_source(str(path))
    assert [source.read(r) for r in range(2)] == [b"a", b"b"] and len(source) == 2
    assert f"{path}: 4 links, devices or sparse files left out, first: 2.jpg" in caplog.text


def test_members_without_bytes(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"a"), ("2.jpg", b""), ("3.jpg", b"")])
    source = open_source(str(path))
    assert f"2 of 3 images are empty (0 bytes), first: {path}:2.jpg; `extrema-fast index`" in caplog.text
    fails(write_tar(tmp_path / "b.tar", [("1.jpg", b"")]), r"1 of 1 images are empty", DataError)
    assert len(source) == 3 and source.read(1) == b""


def test_a_shard_that_vanishes_or_shrinks_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"a" * 600), ("2.jpg", b"b" * 600)])
    source = open_source(str(path))
    path.write_bytes(path.read_bytes()[:2000])
    assert source.read(0) == b"a" * 600
    with pytest.raises(OSError, match=rf"{path} ends after 2000 bytes, not {512 * 4 + 600}"):
        source.read(1)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        source.read(0)


def test_a_dangling_link_and_a_loop_of_links(tmp_path):
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere.tar")
    (tmp_path / "loop.tar").symlink_to(tmp_path / "loop.tar")
    fails(tmp_path / "loop.tar", "loop.tar: ")
    fails(tmp_path, r"(gone|loop)\.tar: cannot be read")
