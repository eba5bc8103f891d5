"""The built-in sets: layout, grayscale, disjoint halves, determinism, the cache and its accidents."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from extrema_fast.data import photos
from extrema_fast.data.photos import PHOTOS, TEXTURES, write_photos, write_synthetic
from extrema_fast.data.sources import open_source
from extrema_fast.errors import StorageError, UsageError

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")


@pytest.fixture(scope="module")
def need_skimage():
    pytest.importorskip("skimage", reason="scikit-image is not installed (extra: train)")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/extrema_fast"


def pixels(folder):
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)) for p in sorted(folder.rglob("*.png"))}


def test_layout_gray_and_counts(tmp_path, need_skimage):
    root = write_photos(tmp_path / "p", size=20, train_per_photo=3, test_per_photo=2)
    assert root == tmp_path / "p"
    for split, count in (("train", 3), ("test", 2)):
        assert sorted(p.name for p in (root / split).iterdir()) == sorted(n.split(".")[0] for n in PHOTOS)
        for folder in (root / split).iterdir():
            assert sorted(p.name for p in folder.iterdir()) == [f"{i:04d}.png" for i in range(count)]
    for p in root.rglob("*.png"):
        with Image.open(p) as im:
            # no colour profile: it would belong to the original, and libpng warns at each read
            assert im.mode == "L" and im.size == (20, 20) and not im.info
    # crops of a class differ from each other
    images = pixels(root)
    for name in (n for n in images if n.endswith("0000.png")):
        assert (images[name] != images[name.replace("0000", "0001")]).any()


def test_no_training_pixel_comes_from_the_right_half(tmp_path, monkeypatch):
    """A photograph that is dark on the left and bright on the right: every crop keeps to its side."""
    names = ("odd.png", "even.png")
    for name, width in zip(names, (101, 100), strict=True):
        wide = np.full((60, width), 40, np.uint8)
        wide[:, (width + 1) // 2 :] = 200
        # the middle column of an odd width belongs to neither half
        wide[:, width // 2 : (width + 1) // 2] = 255
        Image.fromarray(wide).save(tmp_path / name)
    monkeypatch.setattr(photos, "PHOTOS", names)
    monkeypatch.setattr(photos, "photo_files", lambda: [tmp_path / n for n in names])
    kw = dict(train_per_photo=40, test_per_photo=40, scale=(0.5, 1.0), brightness=0.0)
    root = write_photos(tmp_path / "p", **kw)
    for split, level in (("train", 40), ("test", 200)):
        found = np.stack(list(pixels(root / split).values()))
        assert len(found) == 80 and (found == level).all(), split


def test_place_scale_flip_and_brightness_vary(tmp_path, monkeypatch):
    y, x = np.mgrid[0:100, 0:200]
    Image.fromarray((50 + y + (x % 100) // 2).astype(np.uint8)).save(tmp_path / "ramp.png")
    monkeypatch.setattr(photos, "PHOTOS", ("ramp.png",))
    monkeypatch.setattr(photos, "photo_files", lambda: [tmp_path / "ramp.png"])
    crops = np.stack(list(pixels(write_photos(tmp_path / "a", train_per_photo=200) / "train").values()))
    crops = crops.astype(float)
    slope = np.diff(crops, axis=2).mean((1, 2))
    assert 0.35 < (slope > 0).mean() < 0.65, "flips"
    assert crops.mean((1, 2)).std() > 15, "place and brightness"
    recipe = {"size": 32, "scale": (0.25, 0.6), "brightness": 0.0}
    plain = write_photos(tmp_path / "b", train_per_photo=200, **recipe) / "train"
    rise = np.diff(np.stack(list(pixels(plain).values())).astype(float), axis=1).mean((1, 2))
    # the side of a crop over 32 stored pixels: 0.25 and 0.6 of the short half side, 100
    assert 25 / 32 - 0.1 < rise.min() < 0.95 and 1.7 < rise.max() < 60 / 32 + 0.1


def test_parameters_and_seed_decide_the_pixels(tmp_path, need_skimage):
    kw = dict(size=8, train_per_photo=2, test_per_photo=1)
    a, b = (pixels(write_photos(tmp_path / n, **kw)) for n in "ab")
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    other = pixels(write_photos(tmp_path / "c", seed=1, **kw))
    assert np.mean([(a[k] != other[k]).any() for k in a]) > 0.9
    # more crops per photograph leave the first ones as they were
    more = pixels(write_photos(tmp_path / "d", **{**kw, "train_per_photo": 4}))
    assert all((a[k] == more[k]).all() for k in a)


def test_second_call_does_not_write(cache, need_skimage, monkeypatch):
    kw = dict(size=8, train_per_photo=1, test_per_photo=1)
    root = write_photos(**kw)
    assert root.parent == cache and root.name.startswith("photos-")
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    # not even scikit-image is needed then
    monkeypatch.setattr(photos, "photo_files", lambda: pytest.fail("looked for the photographs again"))
    assert write_photos(**kw) == root
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    assert [p.name for p in cache.iterdir()] == [root.name]


def test_other_parameters_other_folder(cache):
    roots = {write_synthetic(size=8, train_per_class=n, test_per_class=1) for n in (1, 2)}
    assert len(roots) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(cache, monkeypatch, error):
    real, count = photos._texture, iter(range(100))

    def stop(*args):
        if next(count) == 5:
            raise error
        return real(*args)

    monkeypatch.setattr(photos, "_texture", stop)
    kw = dict(size=8, train_per_class=2, test_per_class=1)
    with pytest.raises(error):
        write_synthetic(**kw)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(photos, "_texture", real)
    assert len(list(write_synthetic(**kw).rglob("*.jpg"))) == 12


def test_what_a_killed_write_left_is_not_used_and_goes_when_old(cache, monkeypatch):
    kw = dict(size=8, train_per_class=1, test_per_class=1)
    root = write_synthetic(**kw)
    left = cache / f".{root.name}.abc.tmp"
    root.rename(left)
    (left / photos.MARKER).unlink()
    assert write_synthetic(**kw) == root and len(list(root.rglob("*.jpg"))) == 8
    # young: another process may be writing it
    assert left.exists()
    root.rename(cache / "away")
    monkeypatch.setattr(photos, "_STALE_SECONDS", -1)
    write_synthetic(**kw)
    assert not left.exists()


def test_two_writers_at_once(cache, monkeypatch):
    kw = dict(size=8, train_per_class=1, test_per_class=1)
    real = photos._texture
    inner = []

    def other_is_faster(*args):
        if not inner:
            inner.append(True)
            inner.append(write_synthetic(**kw))
        return real(*args)

    monkeypatch.setattr(photos, "_texture", other_is_faster)
    assert write_synthetic(**kw) == inner[1]
    assert [p.name for p in cache.iterdir()] == [inner[1].name]


def test_a_damaged_or_foreign_folder_is_refused(tmp_path):
    kw = dict(size=8, train_per_class=1, test_per_class=1)
    root = write_synthetic(tmp_path / "s", **kw)
    with pytest.raises(UsageError, match="exists and holds something else; delete it or choose another"):
        write_synthetic(root, **{**kw, "size": 9})
    next(root.rglob("*.jpg")).unlink()
    with pytest.raises(UsageError, match="holds 7 files instead of 8; delete it"):
        write_synthetic(root, **kw)
    (root / photos.MARKER).write_text("{")
    with pytest.raises(UsageError, match="holds something else"):
        write_synthetic(root, **kw)
    # an empty folder is fine
    (tmp_path / "empty").mkdir()
    assert json.loads((write_synthetic(tmp_path / "empty", **kw) / photos.MARKER).read_text())["files"] == 8


def test_missing_photographs(monkeypatch, tmp_path, need_skimage):
    monkeypatch.setattr(photos, "PHOTOS", ("astronaut.png", "unicorn.png"))
    with pytest.raises(UsageError, match=r"1 of 2 photographs are not in .*, first: unicorn\.png; .*pip"):
        write_photos(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_without_scikit_image(monkeypatch, tmp_path):
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"scikit-image, which is not installed; .*extrema-fast\[train\]"):
        write_photos(tmp_path / "p")


def test_without_pillow(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"need Pillow: pip install \"extrema-fast\[train\]\""):
        write_synthetic(tmp_path / "p")


def test_values_out_of_range(tmp_path):
    for kw, what in (
        (dict(size=0), "size: expected at least 1, got 0"),
        (dict(train_per_photo=0), "train_per_photo: expected at least 1"),
        (dict(scale=(0.0, 0.5)), r"scale: expected 0 < low <= high <= 1, got \(0\.0, 0\.5\)"),
        (dict(brightness=1.0), r"brightness: expected \[0, 1\), got 1\.0"),
    ):
        with pytest.raises(UsageError, match=what):
            write_photos(tmp_path / "p", **kw)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"synthetic: cannot write .*; set XDG_CACHE_HOME"):
        write_synthetic()


def test_default_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert photos.cache_root() == tmp_path / ".cache/extrema_fast"


def test_synthetic_is_a_labelled_colour_set(cache):
    train, test = open_source("synthetic"), open_source("synthetic", "test")
    assert train.classes == test.classes == list(TEXTURES)
    assert train.labels.bincount().tolist() == [24] * 4 and test.labels.bincount().tolist() == [12] * 4
    images = [np.asarray(Image.open(p)).astype(int) for p in train.paths]
    assert all(im.shape == (48, 48, 3) and im.std() > 3 for im in images)
    assert max(np.abs(im[..., 0] - im[..., 2]).max() for im in images) > 50


def test_photos_source(cache, need_skimage):
    train, test = open_source("photos"), open_source("photos", "test")
    assert len(train.classes) == 18 and train.classes == test.classes
    assert len(train) == 18 * 120 and len(test) == 18 * 60
    assert not set(train.paths) & set(test.paths)
