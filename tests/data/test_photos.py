"""The built-in sets.

Covers: layout, grayscale, disjoint halves, variation, determinism; the cache: written once, interrupted or killed
writes, two writers, a damaged folder, a folder that cannot be written; missing packages.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest

from extrema_fast.data import photos, sources
from extrema_fast.data.photos import PHOTOS_RECIPE, SYNTHETIC_RECIPE, TEXTURES, write_photos, write_synthetic
from extrema_fast.data.sources import open_source
from extrema_fast.errors import StorageError, UsageError

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")
SMALL = SYNTHETIC_RECIPE | {"size": 8, "counts": {"train": 1, "test": 1}}


@pytest.fixture(scope="module")
def need_skimage():
    pytest.importorskip("skimage", reason="scikit-image is not installed (extra: train)")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/extrema_fast"


def recipe(train, test, **changes):
    return PHOTOS_RECIPE | {"counts": {"train": train, "test": test}} | changes


def pixels(folder):
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)) for p in sorted(folder.rglob("*.png"))}


def test_layout_gray_and_counts(need_skimage):
    root = write_photos(recipe(3, 2, size=20))
    names = sorted(n.split(".")[0] for n in PHOTOS_RECIPE["photos"])
    for split, count in (("train", 3), ("test", 2)):
        assert sorted(p.name for p in (root / split).iterdir()) == names
        for folder in (root / split).iterdir():
            assert sorted(p.name for p in folder.iterdir()) == [f"{i:04d}.png" for i in range(count)]
    for p in root.rglob("*.png"):
        with Image.open(p) as im:
            # no color profile: it would belong to the original, and libpng warns at each read
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
    monkeypatch.setattr(photos, "_photo_files", lambda _: [tmp_path / n for n in names])
    root = write_photos(recipe(40, 40, scale=[0.5, 1.0], brightness=0.0))
    for split, level in (("train", 40), ("test", 200)):
        found = np.stack(list(pixels(root / split).values()))
        assert len(found) == 80 and (found == level).all(), split


def test_place_scale_flip_and_brightness_vary(tmp_path, monkeypatch):
    y, x = np.mgrid[0:100, 0:200]
    Image.fromarray((50 + y + (x % 100) // 2).astype(np.uint8)).save(tmp_path / "ramp.png")
    monkeypatch.setattr(photos, "_photo_files", lambda _: [tmp_path / "ramp.png"])
    crops = np.stack(list(pixels(write_photos(recipe(200, 1)) / "train").values())).astype(float)
    slope = np.diff(crops, axis=2).mean((1, 2))
    assert 0.35 < (slope > 0).mean() < 0.65, "flips"
    assert crops.mean((1, 2)).std() > 15, "place and brightness"
    plain = write_photos(recipe(200, 1, size=32, scale=[0.25, 0.6], brightness=0.0)) / "train"
    rise = np.diff(np.stack(list(pixels(plain).values())).astype(float), axis=1).mean((1, 2))
    # the side of a crop over 32 stored pixels: 0.25 and 0.6 of the short half side, 100
    assert 25 / 32 - 0.1 < rise.min() < 0.95 and 1.7 < rise.max() < 60 / 32 + 0.1


def test_recipe_and_seed_decide_the_pixels(cache, need_skimage):
    few = {"size": 8, "photos": ["camera.png", "coins.png", "moon.png"]}
    a, other, more = (
        pixels(write_photos(recipe(n, 1, seed=seed, **few))) for n, seed in ((9, 0), (9, 1), (12, 0))
    )
    assert np.mean([(a[k] != other[k]).any() for k in a]) > 0.9
    # more crops per photograph leave the first ones as they were
    assert all((a[k] == more[k]).all() for k in a)


def test_the_sets_of_earlier_versions_are_found_again(cache):
    # the folder names are hashes of the recipes: other names would mean other data sets
    roots = [photos._write_once(r, lambda root: None).name for r in (PHOTOS_RECIPE, SYNTHETIC_RECIPE)]
    assert roots == ["photos-46ef6e6dfee2", "synthetic-7cad96cbba35"]


def test_second_call_does_not_write(cache, need_skimage, monkeypatch):
    one = recipe(1, 1, size=8, photos=["camera.png"])
    root = write_photos(one)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    # not even scikit-image is needed then
    monkeypatch.setattr(photos, "_photo_files", lambda _: pytest.fail("looked for the photographs again"))
    assert write_photos(one) == root
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    assert [p.name for p in cache.iterdir()] == [root.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(cache, monkeypatch, error):
    real, count = photos._texture, iter(range(100))

    def stop(*args):
        if next(count) == 5:
            raise error
        return real(*args)

    monkeypatch.setattr(photos, "_texture", stop)
    with pytest.raises(error):
        write_synthetic(SMALL)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(photos, "_texture", real)
    assert len(list(write_synthetic(SMALL).rglob("*.jpg"))) == 8


def test_a_folder_left_by_a_killed_write_is_not_used(cache):
    root = write_synthetic(SMALL)
    # no process has this number
    left = cache / f".tmp-{root.name}-99999999"
    root.rename(left)
    (left / photos.MARKER).unlink()
    assert write_synthetic(SMALL) == root and len(list(root.rglob("*.jpg"))) == 8
    assert not left.exists()


def test_two_writers_at_once(cache, monkeypatch):
    root, real = write_synthetic(SMALL), photos._texture
    other = root.rename(cache / "other")

    def other_is_faster(*args):
        if other.exists():
            other.rename(root)
        return real(*args)

    monkeypatch.setattr(photos, "_texture", other_is_faster)
    marker = other / photos.MARKER
    written = marker.stat().st_ino
    assert write_synthetic(SMALL) == root and (root / photos.MARKER).stat().st_ino == written
    assert list(cache.iterdir()) == [root]


def test_a_damaged_folder_is_an_error(cache):
    root = write_synthetic(SMALL)
    next(root.rglob("*.jpg")).unlink()
    with pytest.raises(UsageError, match="holds 7 files instead of 8; delete it"):
        write_synthetic(SMALL)
    (root / photos.MARKER).write_text("{")
    with pytest.raises(UsageError, match="holds 7 files instead of those of the set; delete it"):
        write_synthetic(SMALL)


def test_missing_packages_and_photographs(cache, monkeypatch, need_skimage):
    with pytest.raises(UsageError, match=r"1 of 2 photographs are not in .*, first: unicorn\.png; .*pip"):
        write_photos(recipe(1, 1, photos=["astronaut.png", "unicorn.png"]))
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"scikit-image, which is not installed; pip install .*scikit-image"):
        write_photos()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"need Pillow: pip install .pillow"):
        write_synthetic()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"synthetic: .* cannot be written .*; set XDG_CACHE_HOME"):
        write_synthetic()


def test_synthetic_is_a_labeled_color_set(cache):
    train, test = open_source("synthetic"), open_source("synthetic", "test")
    assert train.classes == test.classes == list(TEXTURES)
    assert train.labels.bincount().tolist() == [24] * 4 and test.labels.bincount().tolist() == [12] * 4
    images = [np.asarray(Image.open(p)).astype(int) for p in train.paths]
    assert all(im.shape == (48, 48, 3) and im.std() > 3 for im in images)
    assert max(np.abs(im[..., 0] - im[..., 2]).max() for im in images) > 50


def test_photos_source(cache, need_skimage, monkeypatch):
    monkeypatch.setitem(sources.BUILT_IN, "photos", lambda: write_photos(recipe(2, 1, size=8)))
    train, test = open_source("photos"), open_source("photos", "test")
    assert len(train.classes) == 18 and train.classes == test.classes
    assert len(train) == 18 * 2 and len(test) == 18
    assert not set(train.paths) & set(test.paths)
