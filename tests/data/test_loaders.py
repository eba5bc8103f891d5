"""The loaders: order, epochs, worlds, resume, DALI against PIL, policies, separate crops, EXIF, evaluation (also
beside `preprocess`), shutdown; tar, zip, Arrow and Parquet files read like the folder."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch

from extrema_fast import rng
from extrema_fast.data import loader as data
from extrema_fast.data.loader import EvalLoader, TrainLoader
from extrema_fast.data.preprocess import KEEP_EXACT, Resizing, resize_crop
from extrema_fast.data.sources import open_source
from extrema_fast.errors import UsageError
from extrema_fast.tools.index import index

from .conftest import assert_same, write_table

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")

SIZE = (24, 32)


def batches(source, cfg, count, size=SIZE, **kw):
    kw = {"batch_size": 6, "seed": 3, **kw}
    with TrainLoader(source, cfg, size, **kw) as loader:
        return list(itertools.islice(loader, count))


def test_every_epoch_has_each_row_once(tree, config, kind):
    source = open_source(str(tree))
    seen = batches(source, config(loader=kind), 12, batch_size=5, seed=2)
    for batch in seen:
        assert batch.images.shape == (5, *SIZE, 3) and batch.images.dtype == torch.uint8
        # an image, not a constant or an empty buffer
        assert batch.index.dtype == torch.int64 and batch.images.float().std() > 20
    assert [b.epoch for b in seen] == [0] * 4 + [1] * 4 + [2] * 4
    assert [b.step for b in seen] == list(range(12))
    orders = [torch.cat([b.index for b in seen if b.epoch == e]) for e in range(3)]
    for order in orders:
        # 20 of 23: the incomplete last batch is dropped
        assert len(order.unique()) == 20 and order.max() < 23
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    # what one epoch leaves out, another has (seed 3 leaves row 17 out three times, by chance)
    left_out = [set(range(23)) - set(order.tolist()) for order in orders]
    assert not set.intersection(*left_out)


@pytest.fixture(params=["files", "separate crops", "shards"])
def setup(request, tree, shards, config, kind):
    """(source, settings): files in the global order, and tar shards in the order by shards."""
    if request.param != "shards":
        crop = "separate" if request.param == "separate crops" else "shared"
        return open_source(str(tree)), config(loader=kind, crop=crop)
    return open_source(str(shards)), config(loader=kind, order="shards", window=2)


def test_worlds_see_the_same_global_batches(setup):
    alone = batches(*setup, 5)
    for world in (2, 3):
        parts = [batches(*setup, 5, rank=r, world=world) for r in range(world)]
        for step, whole in enumerate(alone):
            assert torch.equal(torch.cat([p[step].index for p in parts]), whole.index)
            assert torch.equal(torch.cat([p[step].images for p in parts]), whole.images)


def test_restart_at_any_step_is_exact(setup):
    straight = batches(*setup, 8)
    # 3 steps per epoch: the restarts lie before, on and after an epoch's end
    for start in (1, 3, 7):
        assert_same(straight[start:], batches(*setup, 8 - start, start_step=start))


@pytest.mark.parametrize("packed", ["tar", "zip", "arrow", "parquet"])
def test_packed_images_are_read_like_a_folder(tree, shards, config, kind, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec, files = tmp_path / f"t.{packed}", sorted(p for p in tree.rglob("*") if p.is_file())
    if packed == "tar":
        spec = shards
    elif packed == "zip":
        with zipfile.ZipFile(spec, "w") as archive:
            for i, p in enumerate(files):
                method = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
                archive.write(p, f"tree/{p.relative_to(tree)}", method)
    else:
        pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra: parquet)")
        labels = [p.relative_to(tree).parts[0] for p in files]
        data = pa.table({"image": [{"bytes": p.read_bytes()} for p in files], "label": labels})
        write_table(spec, data, rows=7)
    cfg = config(loader=kind)
    straight, source = batches(open_source(str(tree)), cfg, 7), open_source(str(spec))
    assert_same(straight, batches(source, cfg, 7))
    assert_same(straight[4:], batches(source, cfg, 3, start_step=4))
    evaluated = (EvalLoader(s, cfg, SIZE) for s in (open_source(str(tree)), source))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*evaluated, strict=True))
    if kind == "pil":
        # with either loader the same
        result = index(str(spec), tmp_path / "m.tsv", progress=False, threads=1)
        manifest = open_source(str(tmp_path / "m.tsv"))
        assert (result.rows, result.good) == (23, 23) and manifest.names == source.names
        assert manifest.classes == source.classes == ([] if packed == "tar" else ["ape", "bee", "cat"])
        assert_same(straight, batches(manifest, cfg, 7))


def test_threads_and_seed(tree, config, kind):
    source = open_source(str(tree))
    one, three = (batches(source, config(loader=kind, threads=n), 3) for n in (1, 3))
    assert all(torch.equal(a.images, b.images) for a, b in zip(one, three, strict=True))
    assert not torch.equal(one[0].index, batches(source, config(loader=kind), 1, seed=4)[0].index)


@pytest.mark.parametrize("policy", ["spatial", "centercrop"])
def test_dali_and_pil_give_the_same_pictures(tree, config, policy):
    pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    source = open_source(str(tree))
    pil, dali = (batches(source, config(loader=k, policy=policy), 3) for k in ("pil", "dali"))
    for a, b in zip(pil, dali, strict=True):
        assert torch.equal(a.index, b.index)
        gap = (a.images.int() - b.images.int()).abs().float()
        # noisy pictures enlarged from few pixels: the filters differ most at the border of a crop
        assert gap.mean() <= 2 and gap.max() <= 16, (gap.mean(), gap.max())
        shifted = (a.images.int() - b.images.roll(1, 2).int()).abs().float()
        assert shifted.mean() > 3 * gap.mean(), "the test cannot tell a shift of one pixel"


@pytest.mark.parametrize("crop", ["shared", "separate"])
def test_crops_and_flips_are_those_of_the_plan(tree, config, kind, crop):
    """Each image against PIL by hand: its box, its flip, its row; the teacher's crop too, where it has its own."""
    source, cfg = open_source(str(tree)), config(loader=kind, crop=crop)
    flipped, same = 0, 0
    # 3 steps per epoch: two epochs, since a row's crop changes with the epoch
    for batch in batches(source, cfg, 5):
        rows = batch.index.numpy()
        opened = [Image.open(source.paths[r]).convert("RGB") for r in rows]
        sizes = np.array([im.size[::-1] for im in opened])
        keys, before = {"seed": 3, "epoch": batch.epoch}, None
        crops = batch.images.unbind(1) if crop == "separate" else [batch.images]
        for images, stream in zip(crops, (rng.CROP, rng.CROP_TEACHER), strict=False):
            boxes, flips = data.random_boxes(sizes, rows, cfg, **keys, stream=stream)
            for im, (top, left, bottom, right), flip, got in zip(opened, boxes, flips, images, strict=True):
                want = im.crop((left, top, right, bottom)).resize(SIZE[::-1], Image.Resampling.BILINEAR)
                want = np.asarray(want)[:, ::-1] if flip else np.asarray(want)
                assert np.abs(want.astype(int) - got.numpy()).mean() < 2
                flipped += flip
            same += 0 if before is None else int((before == boxes).all(1).sum())
            before = boxes
    assert 0 < flipped < 30 * len(crops) and same == 0


def test_centercrop_is_never_random(tree, config, kind):
    source = open_source(str(tree))
    seen = batches(source, config(loader=kind, policy="centercrop", flip=1.0), 6, batch_size=11)
    first = {int(r): im for b in seen[:2] for r, im in zip(b.index, b.images, strict=True)}
    evaluated = dict(enumerate(torch.cat([im for im, _ in EvalLoader(source, config(loader=kind), SIZE)])))
    for batch in seen:
        for row, image in zip(batch.index.tolist(), batch.images, strict=True):
            assert torch.equal(image, first.get(row, image))
            assert torch.equal(image, evaluated[row])


@pytest.mark.parametrize("batch_size", [23, 5, 1, 100])
def test_eval_loader_gives_each_image_once_in_order(tree, config, kind, batch_size):
    source = open_source(str(tree))
    loader = EvalLoader(source, config(loader=kind), SIZE, batch_size=batch_size)
    assert len(loader) == 23
    # twice: a loader can be iterated again
    for _ in range(2):
        seen = list(loader)
        assert torch.equal(torch.cat([index for _, index in seen]), torch.arange(23))
        assert all(len(images) == len(index) <= batch_size for images, index in seen)
    whole = torch.cat([images for images, _ in seen])
    assert torch.equal(whole, next(iter(EvalLoader(source, config(loader=kind), SIZE)))[0])


@pytest.mark.parametrize(
    ("size", "resizing"),
    [
        ((32, 32), Resizing()),
        ((384, 384), Resizing()),
        ((40, 96), Resizing()),
        ((40, 96), KEEP_EXACT),
        ((32, 32), Resizing(1.0)),
        ((48, 32), Resizing(0.7, "bicubic")),
    ],
)
def test_eval_gives_the_pictures_of_preprocess(tmp_path, config, kind, size, resizing):
    shapes = [(90, 121), (300, 197), (33, 410), (37, 36), size]
    for number, (h, w) in enumerate(shapes):
        y, x = np.mgrid[0:h, 0:w]
        # waves short enough that a pixel of scale shows, long enough that the decoders' filters agree
        pixels = np.stack([np.sin(y / h * 40), np.sin(x / w * 40), np.cos((y / h + x / w) * 30)], -1)
        Image.fromarray((127 + 120 * pixels).astype(np.uint8)).save(tmp_path / f"{number}.png")
    source = open_source(str(tmp_path))
    ((images, _),) = EvalLoader(source, config(loader=kind), size, resizing=resizing)
    for path, got in zip(source.paths, images, strict=True):
        image = torch.from_numpy(np.array(Image.open(path)))
        want = resize_crop(image, size, resizing.interpolation, resizing.crop_pct)
        if resizing.keep_exact and image.shape[:2] == size:
            want = image
        assert (got.int() - want.int()).abs().float().mean() < 1, path
    # the last has the size itself
    assert torch.equal(got, image) == (resizing.keep_exact or resizing.crop_pct == 1)


@pytest.mark.parametrize("exif", [False, True])
def test_exif_rotation_in_both_loaders(tmp_path, config, kind, exif):
    # left half black, right half white; stored on its side, to be turned a quarter clockwise
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 40:] = 255
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=tag, quality=95)
    cfg = config(loader=kind, exif=exif, area=(1.0, 1.0), ratio=(0.5, 0.5) if exif else (2.0, 2.0), flip=0.0)
    ((evaluated, _),) = EvalLoader(open_source(str(tmp_path)), cfg, (40, 40))
    (batch,) = batches(open_source(str(tmp_path)), cfg, 1, (40, 40), batch_size=1)
    for images in (evaluated, batch.images):
        top, left = images[0, :12].float().mean(), images[0, :, :12].float().mean()
        dark, gray = (top, left) if exif else (left, top)
        assert dark < 20 and 100 < gray < 155


def test_a_batch_that_cannot_be_divided(tree, config):
    source, cfg = open_source(str(tree)), config(loader="pil")
    with pytest.raises(UsageError, match=r"train\.batch_size: 10 is not a multiple of the 4 processes"):
        TrainLoader(source, cfg, SIZE, batch_size=10, seed=0, world=4)
    assert TrainLoader(source, cfg, SIZE, batch_size=5, seed=0).steps_per_epoch == 4


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_leaves_no_thread(tree, config, kind, taken):
    before = set(threading.enumerate())
    loader = TrainLoader(open_source(str(tree)), config(loader=kind, threads=2), SIZE, batch_size=6, seed=0)
    for _ in range(taken):
        next(loader)
    loader.close()
    loader.close()
    assert set(threading.enumerate()) <= before
    # an evaluation that is left early cleans up as well
    for _ in EvalLoader(open_source(str(tree)), config(loader=kind), SIZE, batch_size=2):
        break
    assert set(threading.enumerate()) <= before


def test_auto_falls_back_to_pil_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    data._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "extrema_fast"):
        assert data.choose_loader("auto") == "pil"
        assert data.choose_loader("auto") == "pil"
    assert len(caplog.records) == 1 and "decoded by PIL: DALI cannot be loaded" in caplog.text
    with pytest.raises(UsageError, match=r"data\.loader: DALI cannot be loaded .*dali-cuda130.*loader pil"):
        data.choose_loader("dali")


def test_no_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UsageError, match=r"needs Pillow: pip install .pillow"):
        data.choose_loader("pil")
