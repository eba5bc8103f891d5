"""Unusual files load in both loaders; broken ones end in a DataError that names the file (each kind of damage:
test_recovery.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from extrema_fast.data.image_files import load_image
from extrema_fast.data.loader import EvalLoader, TrainLoader, center_boxes
from extrema_fast.data.sources import open_source
from extrema_fast.errors import DataError

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")
ImageOps = pytest.importorskip("PIL.ImageOps")


def eval_batch(source, cfg, size=(32, 32)):
    return torch.cat([images for images, _ in EvalLoader(source, cfg, size)])


@pytest.mark.parametrize("exif", [False, True])
def test_odd_images_load(odd_images, tmp_path, config, kind, exif):
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{path}\n" for path in sorted(odd_images.glob("ok_*"))))
    source = open_source(str(listing))
    cfg = config(loader=kind, exif=exif)
    with TrainLoader(source, cfg, (32, 32), batch_size=len(source), seed=0) as loader:
        assert next(loader).images.shape == (16, 32, 32, 3)
    # the same pictures as PIL's, not only something of the right shape
    for row, got in enumerate(eval_batch(source, cfg)):
        im = Image.open(source.paths[row])
        im = load_image(source.paths[row], exif) if im.mode.startswith("I") else im
        im = (ImageOps.exif_transpose(im) if exif else im).convert("RGB")
        ((top, left, bottom, right),) = center_boxes(np.array([im.size[::-1]]), (32, 32))
        want = im.resize((32, 32), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        assert np.abs(np.asarray(want).astype(int) - got.numpy()).mean() < 1, source.paths[row]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path, config, kind):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    ((images, _),) = EvalLoader(open_source(str(tmp_path)), config(loader=kind), (32, 32))
    want = np.rint(ramp / 257).astype(int)[..., None]
    assert np.abs(images[0].numpy() - want).max() <= 1


@pytest.mark.parametrize("damage", ["no header", "cut"])
def test_good_batches_before_a_bad_one_are_delivered(tmp_path, config, kind, damage):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for i in range(10):
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    broken = tmp_path / "7.png"
    broken.write_bytes(b"no image at all" if damage == "no header" else broken.read_bytes()[:3000])
    seen = []
    with pytest.raises(DataError, match=r"7\.png: cannot be decoded \(.*bytes\); .*index DATA") as error:
        for _, index in EvalLoader(open_source(str(tmp_path)), config(loader=kind), (32, 32), batch_size=1):
            seen += index.tolist()
    assert seen == list(range(7)) and "\n" not in str(error.value)


def test_a_kind_that_only_pil_reads_is_named(tmp_path, config):
    pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    Image.new("P", (40, 40)).save(tmp_path / "b.gif")
    (tmp_path / "b.gif").rename(tmp_path / "b.png")
    source = open_source(str(tmp_path))
    assert len(eval_batch(source, config(loader="pil"))) == 2
    with pytest.raises(DataError, match=r"b\.png: .*\(by DALI, nvImage.*; PIL can: --data\.loader pil"):
        eval_batch(source, config(loader="dali"))
