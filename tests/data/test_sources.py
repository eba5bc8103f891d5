"""open_source: class trees, flat folders, lists, built-in sets, limits, and every error message."""

from __future__ import annotations

import logging
import os
import shutil
import unicodedata
from functools import partial

import pytest
import torch

from extrema_fast.data import sources
from extrema_fast.data.image_source import among, left_out
from extrema_fast.data.sources import match_classes, open_source
from extrema_fast.errors import DataError, UsageError

from .conftest import fails
from .tars import write_tar

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")


def image(path, color=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (color, 0, 0)).save(path)


def test_class_folders(tree):
    source = open_source(str(tree))
    assert len(source) == 23 and source.classes == ["ape", "bee", "cat"]
    for path, label in zip(source.paths, source.labels.tolist(), strict=True):
        assert f"/{source.classes[label]}/" in path
    assert source.paths == sorted(source.paths)
    assert source.labels.dtype == torch.int64 and source.name == str(tree)


def test_hidden_files_other_files_links_and_upper_case(tmp_path):
    image(tmp_path / "root/a/1.JPG")
    image(tmp_path / "root/a/.hidden.jpg")
    image(tmp_path / "root/.cache/2.jpg")
    image(tmp_path / "elsewhere/3.png")
    (tmp_path / "root/a/notes.txt").write_text("x")
    (tmp_path / "root/b").symlink_to(tmp_path / "elsewhere")
    source = open_source(str(tmp_path / "root"))
    assert [os.path.basename(p) for p in source.paths] == ["1.JPG", "3.png"]
    assert source.classes == ["a", "b"] and source.labels.tolist() == [0, 1]


def test_a_link_to_a_folder_above_ends(tmp_path, caplog):
    image(tmp_path / "a/1.png")
    (tmp_path / "a/up").symlink_to(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(open_source(str(tmp_path))) == 1
    assert "a link to a folder above it" in caplog.text


def test_images_beside_folders_are_used_without_labels(tmp_path, caplog):
    image(tmp_path / "1.png")
    source = open_source(str(tmp_path))
    assert source.paths == [str(tmp_path / "1.png")] and source.labels is None and source.classes == []
    image(tmp_path / "a/2.png")
    with caplog.at_level(logging.WARNING):
        source = open_source(str(tmp_path))
    assert len(source) == 2 and source.labels is None
    assert "1 images next to folders with 1 more" in caplog.text


def test_an_empty_class_folder_keeps_its_number(tmp_path, caplog):
    image(tmp_path / "a/1.png")
    image(tmp_path / "c/2.png")
    (tmp_path / "b").mkdir()
    with caplog.at_level(logging.WARNING):
        source = open_source(str(tmp_path))
    assert source.classes == ["a", "b", "c"] and source.labels.tolist() == [0, 2]
    assert "no images in 1 of 3 class folders: ['b']" in caplog.text


def test_list_file(tmp_path):
    image(tmp_path / "x/one two.png")
    image(tmp_path / "ünï.png")
    absolute = tmp_path / "x/one two.png"
    listing = tmp_path / "list.tsv"
    listing.write_text(f"ünï.png\t10\n\n{absolute}\t9\r\nx/one two.png\t10\n", encoding="utf-8")
    source = open_source(str(listing))
    assert source.paths == [str(tmp_path / "ünï.png"), str(absolute), str(absolute)]
    # numbers in numeric order
    assert source.classes == ["9", "10"] and source.labels.tolist() == [1, 0, 1]
    listing.write_text("ünï.png\nx/one two.png\n", encoding="utf-8")
    assert open_source(str(listing)).labels is None


def test_unusual_names_reach_both_decoders(tmp_path, config, kind):
    from extrema_fast.data.loader import EvalLoader

    image(tmp_path / "ünï cödé #1 %d.png", 200)
    image(tmp_path / "b\ttab.png", 100)
    ((images, _),) = EvalLoader(open_source(str(tmp_path)), config(loader=kind), (8, 8))
    assert images[:, 0, 0, 0].tolist() == [100, 200]


def test_a_built_in_set_beside_a_folder_of_its_name(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.WARNING, "extrema_fast")
    assert len(open_source("synthetic")) > 1 and not caplog.text
    image(tmp_path / "synthetic/1.png")
    assert len(open_source("./synthetic")) == 1 and not caplog.text
    assert len(open_source("synthetic")) > 1
    assert "synthetic: the built-in images, not what is here under that name" in caplog.text


def test_limit_is_a_keyed_sample_with_its_labels(tree):
    whole = open_source(str(tree))
    some = open_source(str(tree), limit=7, seed=1)
    assert len(some) == 7 and some.classes == whole.classes
    rows = [whole.paths.index(p) for p in some.paths]
    assert rows == sorted(rows) and some.labels.tolist() == whole.labels[rows].tolist()
    assert some.paths == open_source(str(tree), limit=7, seed=1).paths
    assert some.paths != open_source(str(tree), limit=7, seed=2).paths
    assert set(some.paths) <= set(open_source(str(tree), limit=8, seed=1).paths)
    assert open_source(str(tree), limit=23).fingerprint == whole.fingerprint != some.fingerprint
    assert len(open_source(str(tree), limit=1000)) == 23


def test_fingerprint_follows_content_not_place(tmp_path):
    image(tmp_path / "d/a/1.png")
    image(tmp_path / "d/b/2.png")
    first = open_source(str(tmp_path / "d")).fingerprint
    shutil.copytree(tmp_path / "d", tmp_path / "moved")
    assert open_source(str(tmp_path / "moved")).fingerprint == first
    with open(tmp_path / "moved/a/1.png", "ab") as f:
        f.write(b"x")
    assert open_source(str(tmp_path / "moved")).fingerprint != first
    (tmp_path / "d/a/1.png").rename(tmp_path / "d/a/3.png")
    assert open_source(str(tmp_path / "d")).fingerprint != first


def test_match_classes(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "test/b/1.png", "test/c/1.png"):
        image(tmp_path / name)
    train, test = open_source(str(tmp_path / "train")), open_source(str(tmp_path / "test"))
    assert test.labels.tolist() == [0, 1]
    matched = match_classes(test, train)
    assert matched.labels.tolist() == [1, 2] and matched.classes == train.classes
    assert match_classes(train, train) is train
    with pytest.raises(UsageError, match=r"1 of 3 classes are not in .*test, first: 'a'"):
        match_classes(train, test)


# ---- errors ---------------------------------------------------------------------------------------


def test_missing(tmp_path):
    (tmp_path / "images").mkdir()
    fails(tmp_path / "imagse", r"imagse: does not exist; did you mean 'images'\?; expected photos, synthetic")
    fails(tmp_path / "x/y/z", rf"does not exist \({tmp_path}/x/y neither; {tmp_path} does\)")
    fails("", "no train images given; expected photos")
    fails("photo", "did you mean 'photos'")


def test_nothing_inside(tmp_path):
    fails(tmp_path, r"no images; looked for \.bmp, \.gif, \.jpeg, .*\.npy .* the folder is empty")
    (tmp_path / "a/b").mkdir(parents=True)
    fails(tmp_path, "no images; .*found 1 folders without files")
    for name in ("a/1.txt", "a/b/2.txt", "3.csv"):
        (tmp_path / name).write_text("x")
    fails(tmp_path, r"no images; looked for .*\.webp.*; found 3 files, of: \.txt 2, \.csv 1$")


def test_unreadable(tmp_path, monkeypatch):
    image(tmp_path / "a/1.png")
    real = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(sources.os, "scandir", refuse)
    fails(tmp_path, r"/a: cannot be read \(Permission denied\); check its permissions")


def test_the_folder_above_the_splits(tmp_path):
    image(tmp_path / "train/a/1.png")
    image(tmp_path / "val/a/1.png")
    fails(tmp_path, rf"holds train/, val/, which look like the parts .* did you mean {tmp_path}/train\?")
    fails(tmp_path, rf"did you mean {tmp_path}/val\?", split="test")
    image(tmp_path / "annotations/1.png")
    fails(tmp_path, "did you mean")
    # one class of that name among others is a class
    shutil.rmtree(tmp_path / "val")
    assert open_source(str(tmp_path)).classes == ["annotations", "train"]


def test_bad_lists(tmp_path):
    image(tmp_path / "a.png")
    listing = tmp_path / "list.txt"
    listing.write_text("a.png\nb.png\nc.png\n")
    fails(listing, rf"2 of 3 files do not exist, first: {tmp_path}/b\.png$")
    listing.write_text("import this\n")
    fails(listing, r"no file that it lists exists .*'import this'")
    listing.write_text("a.png\tx\n\na.png\n")
    fails(listing, r"line 3: expected a path and a label as in line 1, got 1 fields")
    listing.write_text("a.png\na.png\tx\n")
    fails(listing, "line 2: expected a path as in line 1")
    listing.write_text("a.png\t\n")
    fails(listing, "line 1: expected a path and a label")
    listing.write_text("\n \n")
    fails(listing, "the list is empty")
    listing.write_bytes(b"\xff\xfe\x00")
    fails(listing, "list.txt: not a text file; expected")
    archive = tmp_path / "set.7z"
    archive.write_bytes(b"7z\xbc\xaf\xff\xfe\x00")
    fails(archive, r"set\.7z: a compressed archive: unpack it first, or decompress it to a \.tar; expected")
    fails(tmp_path / "a.png", "is one image; expected")
    (tmp_path / "a.psd").write_bytes(b"8BPS\xff")
    fails(tmp_path / "a.psd", "a kind that is not read; read are .bmp, .* convert it")


def test_broken_links_and_empty_files(tmp_path, caplog):
    image(tmp_path / "a/1.png")
    (tmp_path / "a/2.png").symlink_to(tmp_path / "gone.png")
    fails(tmp_path, r"1 of 2 files do not exist, first: .*a/2\.png$")
    (tmp_path / "a/2.png").unlink()
    (tmp_path / "a/2.png").touch()
    assert len(open_source(str(tmp_path))) == 2
    assert (
        f"1 of 2 images are empty (0 bytes), first: {tmp_path}/a/2.png; `extrema-fast index`" in caplog.text
    )
    (tmp_path / "a/1.png").write_bytes(b"")
    fails(tmp_path, r"2 of 2 images are empty \(0 bytes\), first: .*a/1\.png$", DataError)


def test_bad_arguments(tree):
    fails(tree, "split: expected 'train' or 'test', got 'dev'", split="dev")
    fails(tree, r"data\.limit: expected 0 \(all\) or more, got -1", limit=-1)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("a b.png\nc.png\n", []),
        ("a b.png\tdog\nc.png\tcat\n", ["cat", "dog"]),
        ("a b.png 1\r\nc.png 0\r\n", ["0", "1"]),
        ('"a b.png",dog\nc.png,cat\n', ["cat", "dog"]),
        ("path,label\na b.png,dog\nc.png,cat\n", ["cat", "dog"]),
        ("filename;class\r\na b.png;1\r\nc.png;0\r\n", ["0", "1"]),
        ("path\tlabel\na b.png\tdog\nc.png\tcat\n", ["cat", "dog"]),
        ('"a b.png"\n"c.png"\n', []),
        ("label,path\ndog,a b.png\ncat,c.png\n", ["cat", "dog"]),
        (
            "\ufefffile_name; Class ;width\r\n'a b.png';dog;8\r\nc.png;cat;8\r\n".replace("'", '"'),
            ["cat", "dog"],
        ),
        ('image,mask,target\n"a b.png",c.png,1\nc.png,c.png,0\n', ["0", "1"]),
        # most files are gone
        ("a b.png 1\n" + "gone.png 2\n" * 60 + "c.png 0\n", None),
    ],
)
def test_common_list_formats(tmp_path, text, classes):
    for name in ("a b.png", "c.png"):
        image(tmp_path / name)
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    if classes is None:
        fails(tmp_path / "list.txt", r"60 of 62 files do not exist, first: .*gone\.png$")
        return
    source = open_source(str(tmp_path / "list.txt"))
    assert [os.path.basename(p) for p in source.paths] == ["a b.png", "c.png"] and source.classes == classes
    assert source.labels is None or source.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.png|dog\nb.png|cat\n", r"'a\.png\|dog'.*one path per line"),
        # whole lines and first words are files
        ("a b\n", r"more than one way .*'a b'.*one path per line"),
        ("a.png,c.png\n", "more than one way"),
        ("a.png,8,8\n", r"line 1: 3 fields, and no header that names one of them label: 'a\.png,8,8'"),
        ("image,w,h\na.png,8,8\n", r"line 1: 3 fields, .*'image,w,h'"),
        (
            ",path\n0,a.png\n1,c.png\n",
            r"line 1: 2 fields, .*names one of them label: ',path'; leave out .*index=False",
        ),
        (
            "file,width\na.png,8\nc.png,9\n",
            r"line 1: 2 fields, .*'file,width'; rename 'width' if it holds the labels",
        ),
        ("caption;file\nb d;a.png\nd;c.png\n", "line 1: 2 fields, .*; rename 'caption' if it holds"),
        ("list\ndog,a.png\ncat,c.png\n", "line 1: expected a path as in line 1, got 1 fields: 'list'"),
        ("a.png,dog\nc.png,cat,8\n", "line 2: expected a path and a label as in line 1, got 3 fields"),
        ("a.png,dog\nc.png," + "x" * 200_000, "line 2: field larger than"),
        ("https://x.org/1.jpg 1\n", r"list\.txt: https://x\.org/1\.jpg: images are read from a disk.*wget"),
        ("url,label\ns3://b/1.jpg,dog\n", "s3://b/1.jpg: .*aws s3 sync"),
    ],
)
def test_a_list_that_cannot_be_read_shows_the_line_and_the_formats(tmp_path, text, words):
    for name in ("a.png", "c.png", "a", "a b"):
        image(tmp_path / "x.png")
        shutil.copy(tmp_path / "x.png", tmp_path / name)
    (tmp_path / "list.txt").write_text(text)
    fails(tmp_path / "list.txt", words)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_unicode_form(tmp_path, forms):
    written, kept = (partial(unicodedata.normalize, form) for form in forms)
    root = tmp_path / "Köln"
    image(root / kept("é") / kept("café.png"))
    image(root / "ü.png")
    (root / "list.txt").write_text(f"ü.png\t0\n{written('é')}/{written('café.png')}\t1\n", encoding="utf-8")
    source = open_source(str(root / "list.txt"))
    assert len(source.read(1)) > 0 and source.labels.tolist() == [0, 1]
    # neither gone, nor in another form
    (root / "list.txt").write_text("ü.png\ncafé.png\n", encoding="utf-8")
    fails(root / "list.txt", r"1 of 2 files do not exist, first: .*café\.png$")
    # and so are the names of classes
    image(tmp_path / "train" / kept("café") / "1.png")
    image(tmp_path / "test" / written("café") / "1.png")
    train, test = open_source(str(tmp_path / "train")), open_source(str(tmp_path / "test"))
    assert train.classes != test.classes and match_classes(test, train).classes == train.classes


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://x.org/set.zip", r"wget http://x\.org/set\.zip"),
        ("S3://bucket/train", "not from s3://; aws s3 sync S3://bucket/train DIR"),
        ("gs://bucket/train", "gcloud storage rsync -r gs://bucket/train DIR"),
        ("hf://datasets/ylecun/mnist@main/x.parquet", "hf download --repo-type dataset ylecun/mnist --local"),
        ("https://huggingface.co/datasets/a/b/tree/main", "hf download --repo-type dataset a/b --local-dir"),
        ("abfs://x/y", "download or mount them"),
        ("file:///data/x", "give /data/x$"),
    ],
)
def test_addresses_are_refused_with_what_to_do(tmp_path, url, words):
    fails(url, words)
    (tmp_path / "m.toml").write_text(f'[[source]]\npath = "{url}"\n')
    fails(tmp_path / "m.toml", f"source 1: .*{words}")


def test_kinds_left_out_are_counted(tmp_path, caplog):
    files = ["a/1.png", "a/4.png", "a/3.heic", "a/notes.txt", "a/.hidden.svg", "b/2.png", "b/deep/README"]
    for name in files:
        image(tmp_path / "d" / "x.png")
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d/x.png").rename(tmp_path / "d" / name)
    source = open_source(str(tmp_path / "d"))
    assert "left out 1 image of kinds that are not read: .heic 1" in caplog.text and "txt" not in caplog.text
    assert left_out(source) == left_out(open_source(str(tmp_path / "d"), "test", holdout=0.5)) != ""
    assert source.left_out == {".heic": 1, ".txt": 1, "no extension": 1}
    assert left_out(source).startswith("left out 3 files: ")
    assert open_source(str(tmp_path / "d"), check=False).left_out == {".txt": 1, "no extension": 1}
    # and of a tar only images, since other members belong to samples
    write_tar(tmp_path / "t.tar", [(f.replace("/", "_"), b"x") for f in files if "hidden" not in f])
    tar = open_source(str(tmp_path / "t.tar"))
    assert tar.left_out == {".heic": 1} and "t.tar: left out 1 image of" in caplog.text
    (tmp_path / "m.toml").write_text('[[source]]\npath = "d"\npasses = 2\n[[source]]\npath = "t.tar"\n')
    assert open_source(str(tmp_path / "m.toml")).left_out == {".heic": 2, ".txt": 1, "no extension": 1}
    assert among(source.classes) == " in 2 classes (a, b)" and among([]) == ""
    assert among(list("abcdef")) == " in 6 classes (a, b, c, ...)"


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (["imgs/a/1.png", "imgs/b/2.png"], "imgs"),
        (["imgs/a/1.png", "imgs/b/2.png", "annotations/1.xml"], "imgs"),
        (["x/y/z/a/1.png", "x/y/z/b/deep/1.png"], "x/y/z"),
        # a class, with more of its images in folders; and one alone
        (["ape/1.png", "ape/young/1.png", "ape/old/1.png"], ""),
        (["ape/1.png"], ""),
        (["ape/zoo/1.png"], ""),
    ],
)
def test_a_folder_around_the_class_folders_is_noticed(tmp_path, names, meant, caplog):
    for name in names:
        image(tmp_path / "x.png")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x.png").rename(tmp_path / name)
    source = open_source(str(tmp_path))
    assert len(set(source.labels.tolist())) == 1
    said = f"all images are of one class; the 2 folders in {tmp_path / meant} (a, b) look like the classes"
    assert ("all images are of one class" in caplog.text) == bool(meant)
    assert not meant or (said in caplog.text and f"did you mean {tmp_path / meant}?" in caplog.text)
