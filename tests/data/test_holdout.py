"""data.holdout: which images are kept as test images, that both halves hold every image once, and its errors."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata

import pytest

from extrema_fast.config import DataConfig
from extrema_fast.data.manifest import Row, header_lines, row_line, write_lines
from extrema_fast.data.sources import open_source
from extrema_fast.data.zips import members
from extrema_fast.errors import UsageError

from .conftest import fails
from .tars import write_tar
from .test_mixture import mixture
from .test_zips import write_zip

NAMES = [f"{c}/{i:03d}.png" for c in "abc" for i in range(100)]


def make(root, names=NAMES):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def halves(spec, share=0.1):
    """(names, labels) of the training and of the test half; a name is the bytes of the file."""
    both = [open_source(str(spec), split, holdout=share) for split in ("train", "test")]
    assert both[0].fingerprint != both[1].fingerprint and both[0].classes == both[1].classes
    return [[s.read(row).decode() for row in range(len(s))] for s in both], both


def test_a_share_of_every_class_wherever_the_set_lies(tmp_path, monkeypatch):
    root = make(tmp_path / "d")
    (train, test), (_, source) = halves(root)
    assert sorted(train + test) == NAMES and train == sorted(train) and test == sorted(test)
    counts = [sum(name[0] == c for name in test) for c in "abc"]
    assert all(3 <= n <= 20 for n in counts) and sum(counts) == len(test)
    assert [source.classes[i] for i in source.labels.tolist()] == [name[0] for name in test]
    # whatever the place and the order, and by list or manifest
    monkeypatch.chdir(tmp_path)
    root.rename("moved")
    (tmp_path / "moved/list.txt").write_text("".join(f"{n}\t{n[0]}\n" for n in reversed(NAMES)))
    (tmp_path / "moved/absolute.txt").write_text("".join(f"{tmp_path}/moved/{n}\t{n[0]}\n" for n in NAMES))
    rows = [Row(n, bytes=len(n), width=1, height=1, label=n[0]) for n in NAMES]
    write_lines("m.tsv", header_lines("moved", list("abc")), map(row_line, rows))
    for spec in ("moved", tmp_path / "moved", "moved/list.txt", "moved/absolute.txt", "m.tsv"):
        assert sorted(halves(spec)[0][1]) == test
    # a larger share holds the smaller one
    assert set(test) < set(halves("moved", 0.5)[0][1])


def test_images_that_are_added_or_removed_move_no_other(tmp_path):
    before = set(halves(make(tmp_path / "d"))[0][1])
    for name in NAMES[5:100:7]:
        os.remove(tmp_path / "d" / name)
    make(tmp_path / "d", [f"{c}/new{i}.png" for c in "az" for i in range(200)])
    (train, test), _ = halves(tmp_path / "d")
    assert before & set(train) == set() and set(test) & set(NAMES) == before - set(NAMES[5:100:7])


def test_shards_mixtures_and_the_two_unicode_forms(tmp_path):
    make(tmp_path / "d")
    write_tar(tmp_path / "s/0.tar", [(n.replace("/", "_"), n.encode()) for n in NAMES])
    (train, test), (source, _) = halves(tmp_path / "s")
    assert sorted(train + test) == NAMES and source.shards is not None and len(source.shards) == len(source)
    spec = mixture(
        tmp_path / "m.toml", {"path": "d", "passes": 2.5}, {"path": "s", "passes": 0.5, "label": "x"}
    )
    (mixed, held), (source, _) = halves(spec)
    assert set(held) == set(test) | set(halves(tmp_path / "d")[0][1]) and source.parts
    # the test images come once, however often the training images do
    assert len(held) == len(test) + len(halves(tmp_path / "d")[0][1])
    assert mixed.count(halves(tmp_path / "d")[0][0][0]) >= 3
    for form in ("NFC", "NFD"):
        make(tmp_path / form, [unicodedata.normalize(form, f"é/ü{i}.png") for i in range(40)])
    composed, separate = (halves(tmp_path / form)[0][1] for form in ("NFC", "NFD"))
    assert [unicodedata.normalize("NFC", n) for n in separate] == composed


def test_sources_of_a_mixture_train_on_no_test_image_of_another(tmp_path, caplog):
    root = make(tmp_path / "d")
    (tmp_path / "link").symlink_to(root / "b")
    write_zip(tmp_path / "z/a.zip", {n: n.encode() for n in NAMES})
    write_zip(tmp_path / "z/b.zip", {"b/new.png": b"new"})
    sources = [
        {"path": "d"},
        {"path": "d/a", "passes": 2.5, "label": "a"},
        {"path": "link", "label": "b"},
        {"path": "z/a.zip"},
        # other keys, since it has two archives
        {"path": "z"},
    ]
    spec = mixture(tmp_path / "m.toml", *sources)
    source, tests = (open_source(str(spec), split, holdout=0.2) for split in ("train", "test"))

    def places(source):
        return {(os.path.realpath(source.paths[r]), int(source.spans[r, 0])) for r in range(len(source))}

    assert not places(source) & places(tests)
    assert places(source) | places(tests) == places(open_source(str(spec)))
    left_out = [r.getMessage() for r in caplog.records if "hold" in r.getMessage()]
    alone = [len(open_source(str(tmp_path / e["path"]), holdout=0.2)) for e in sources]
    kept = len(source) - 2 * (source.parts[1][1] - source.parts[1][0])
    assert len(left_out) == 1 and f"left out {sum(alone) - kept} images" in left_out[0]
    # apart from each other, all is as it was
    caplog.clear()
    mixed = open_source(str(mixture(tmp_path / "n.toml", {"path": "d/a"}, {"path": "d/b"})), holdout=0.2)
    parts = [open_source(str(root / c), holdout=0.2) for c in "ab"]
    assert mixed.paths == [path for part in parts for path in part.paths] and not caplog.records
    digest = hashlib.sha256("".join(f"{part.fingerprint}\t1.0\n" for part in parts).encode())
    assert mixed.fingerprint == digest.hexdigest()
    # nothing is left of a source
    make(tmp_path / "e", ["1.png", "2.png"])
    held = open_source(str(tmp_path / "e"), "test", holdout=0.5).paths[0]
    (tmp_path / "f").mkdir()
    for name in ("3.png", "4.png"):
        os.symlink(held, tmp_path / "f" / name)
    spec = mixture(tmp_path / "o.toml", {"path": "e"}, {"path": "f"})
    fails(spec, "source 2: every image of .* is held out", holdout=0.5)


@pytest.mark.parametrize("prefix", ["", "d/", "around/d/"])
def test_a_zip_archive_is_split_like_its_folder(tmp_path, prefix):
    names = [unicodedata.normalize("NFD", f"{n[0]}é{n[1:]}") for n in NAMES]
    (_, test), _ = halves(make(tmp_path / "d", names))
    path = write_zip(tmp_path / "other.zip", {f"{prefix}{n}": n.encode() for n in names})
    specs = [path, path / prefix.rstrip("/")] if prefix else [path]
    found = {m.name: m for m in members(str(path), (".png",))[0]}
    rows = [
        Row(path.name, m, offset=f.offset, bytes=f.size, width=1, height=1, label=m.split("/")[-2])
        for m, f in found.items()
    ]
    classes = sorted({row.label for row in rows})
    write_lines(tmp_path / "z.tsv", header_lines(".", classes), map(row_line, rows))
    assert all(halves(spec)[0][1] == test for spec in [*specs, tmp_path / "z.tsv"])


def test_every_class_of_two_is_on_both_sides(tmp_path, caplog):
    names = [f"{c:02d}/{i}.png" for c in range(20) for i in range(2)]
    root = make(tmp_path / "d", [*names, "one/1.png"])
    for share in (0.001, 0.1, 0.9, 0.999):
        with caplog.at_level(logging.WARNING):
            (train, test), _ = halves(root, share)
        assert {n[:2] for n in train} == {*(f"{c:02d}" for c in range(20)), "on"} and len(test) == 20
        assert "1 class with one image, which is not held out, first: one" in caplog.text
        caplog.clear()
    # without labels all images are one class
    (train, test), (source, _) = halves(make(tmp_path / "flat", ["1.png", "2.png", "3.png"]), 0.001)
    assert (len(train), len(test)) == (2, 1) and source.labels is None
    # `limit` counts what is left
    assert len(open_source(str(root), holdout=0.1, limit=7)) == 7


def test_errors(tmp_path):
    fails(make(tmp_path / "d", ["a/1.png", "b/1.png"]), "data.holdout: .*one image", holdout=0.5)
    fails("photos", "data.holdout: photos has test images of its own", holdout=0.5)
    for change in ({"holdout": 1.0}, {"holdout": -0.1}, {"holdout": 0.1, "test": "x"}):
        with pytest.raises(UsageError, match=r"data\.holdout"):
            DataConfig(**change)
