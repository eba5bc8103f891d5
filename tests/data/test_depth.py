"""Images of more than 8 bits give the picture of 8 bits, wherever images are read.

Covers: 16 and 12 bits in 16-bit PNG and TIFF, floats from 0 to 1 and in another unit; both loaders, the encoder's
preprocessing, packing and the tiles of search; the range of a set by `index` and by data.range; what cannot be known is
warned of or refused by name; damaged TIFF files are found; the orientation of TIFF files of 8 bits and more.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest

from extrema_fast.data import image_files, loader, pixels
from extrema_fast.data.loader import EvalLoader, loader_for
from extrema_fast.data.manifest import read_manifest
from extrema_fast.data.pixels import natural_range, to_8_bit
from extrema_fast.data.sources import open_source
from extrema_fast.errors import DataError, UsageError
from extrema_fast.models.encoder import create_encoder
from extrema_fast.tools.index import describe, index
from extrema_fast.tools.search import _thumbnail
from extrema_fast.tools.shard_writer import pack_image

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")

SIZE = 32
# values of 8 bits in steps of one and more, with black and white
GRAY = (np.add.outer(np.arange(SIZE), np.arange(SIZE)) * 255 // (2 * SIZE - 2)).astype(np.uint8)
# file -> (its values, black, white)
DEEP = {
    "full.png": (GRAY * np.uint16(257), 0, 65535),
    "bits12.png": (np.rint(GRAY * (4095 / 255)).astype(np.uint16), 0, 4095),
    "bits12.tiff": (np.rint(GRAY * (4095 / 255)).astype(np.uint16), 0, 4095),
    "unit.tiff": ((GRAY / 255).astype(np.float32), 0, 1),
    "hounsfield.tiff": ((GRAY * (3000 / 255) - 1000).astype(np.float32), -1000, 2000),
}


@pytest.fixture(params=DEEP)
def deep(request, tmp_path):
    """(folder with the one image, its file, black, white)."""
    values, black, white = DEEP[request.param]
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(values).save(folder / request.param)
    return folder, folder / request.param, black, white


def read(spec, cfg) -> np.ndarray:
    """[SIZE, SIZE] int: the one image of a source as training reads it."""
    ((images, _),) = EvalLoader(open_source(str(spec)), cfg, (SIZE, SIZE))
    assert (images[0, ..., 0] == images[0, ..., 2]).all()
    return images[0, ..., 0].numpy().astype(int)


def test_with_the_range_of_the_set_it_is_the_picture_of_8_bits(deep, config, tmp_path):
    folder, file, black, white = deep
    given = read(folder, config(range=(float(black), float(white))))
    result = index(folder, tmp_path / "m.tsv", threads=1)
    usual = (black, white) in pixels.USUAL
    assert result.value_range == (None if usual else (black, white))
    assert (f"{white:g} is white" in describe(result)) == (not usual)
    found = read(tmp_path / "m.tsv", config())
    assert np.abs(given - GRAY).max() <= 1 and (found == given).all()
    data = file.read_bytes()
    packed = pack_image(data, SIZE, "short", 100, (black, white))
    assert np.abs(np.asarray(Image.open(io.BytesIO(packed.data))).astype(int) - GRAY).max() <= 4
    encoder = create_encoder("extrema_vit_tiny_patch16_224", img_size=SIZE, width=64, depth=1, heads=1)
    plain, ranged = encoder.preprocess(), encoder.preprocess((black, white))
    assert (ranged(Image.open(file)) - plain(Image.fromarray(GRAY))).abs().max() < 1.01 / 255 / 0.22
    tile = np.asarray(_thumbnail(data, False)).astype(int)
    eight = io.BytesIO()
    Image.fromarray(GRAY).save(eight, "PNG")
    assert np.abs(tile - np.asarray(_thumbnail(eight.getvalue(), False))).max() <= 2


def test_without_a_range(deep, config, kind, caplog, monkeypatch):
    folder, file, _, white = deep
    monkeypatch.setattr(pixels, "_warned", False)
    monkeypatch.setattr(image_files, "_checked", set())
    if file.name == "hounsfield.tiff":
        with pytest.raises(DataError, match=r"floats from -1000 to 2000.*data\.range"):
            read(folder, config(loader=kind))
        assert "floats from" in pack_image(file.read_bytes(), SIZE, "short", 90)
        return
    values = read(folder, config(loader=kind))
    if file.name in ("full.png", "unit.tiff"):
        assert np.abs(values - GRAY).max() <= 1 and not caplog.text
    else:
        assert values.max() < 17 and f"data.range 0 {white}" in caplog.text


@pytest.mark.parametrize("bits", [12, 16])
def test_colors_of_16_bits_in_png(bits, caplog, monkeypatch):
    monkeypatch.setattr(pixels, "_warned", False)
    # Pillow does not write them
    values = np.repeat(GRAY[..., None].astype(np.uint32) * (2**bits - 1) // 255, 3, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*chunks, (b"IEND", b"")]
    )
    im = np.asarray(image_files.load_image(io.BytesIO(png), exif=False)).astype(int)
    if bits == 16:
        assert np.abs(im - GRAY[..., None]).max() <= 1 and not caplog.text
    else:
        assert im.max() < 16 and "nearly black" in caplog.text


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_colors_of_16_bits_in_tiff(compression, tmp_path, config, kind, caplog, monkeypatch):
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed (extra: train)")
    monkeypatch.setattr(pixels, "_warned", False)
    monkeypatch.setattr(image_files, "_checked", set())
    values = np.repeat(GRAY[..., None].astype(np.uint32) * 4095 // 255, 3, axis=2).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", compression=compression)
    assert read(tmp_path, config(loader=kind)).max() <= 16
    assert (
        "nearly black" in caplog.text and "data.range 0 4095" in caplog.text and "as TIFF" not in caplog.text
    )
    assert np.abs(read(tmp_path, config(range=(0.0, 4095.0))) - GRAY).max() <= 1


# how a picture is stored that the orientation shows as it is
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[:, ::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_the_orientation_of_tiff_is_followed_everywhere(bits, tmp_path, config):
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed (extra: train)")
    picture = np.stack([GRAY[:20], GRAY[12:], GRAY[:20, ::-1]], -1)
    folder, manifest = tmp_path / "images", tmp_path / "m.tsv"
    folder.mkdir()
    for orientation, store in STORED.items():
        stored = store(picture)
        # Pillow reads the first two, the second without a range alone
        stored = {8: stored, 16: stored * np.uint16(257), 32: (stored / 255).astype(np.float32)}[bits]
        tag = [(274, "H", 1, orientation, True)]
        file = folder / f"{orientation}.tif"
        tifffile.imwrite(file, np.ascontiguousarray(stored), photometric="rgb", extratags=tag)
    index(folder, manifest, threads=1)
    table = read_manifest(manifest)
    assert len(table) == 8 and (table.height == 20).all() and (table.width == SIZE).all()
    assert (table.orientation == 1).all()
    # as versions before wrote it
    old, (*head, _) = tmp_path / "old.tsv", manifest.read_text().split("\n")
    for i, orientation in enumerate(STORED, 2):
        head[i] = head[i].replace(f"\t{SIZE}\t20\t1\t", f"\t{SIZE}\t20\t{orientation}\t")
    old.write_text("\n".join(head) + "\n")
    assert read_manifest(old).orientation.tolist() == [*STORED]
    for data in (folder, manifest, old):
        for exif in (False, True):
            for value_range in [(0.0, 0.0)] + [(0.0, 65535.0)] * (bits == 16):
                cfg = config(exif=exif, range=value_range)
                ((images, _),) = EvalLoader(open_source(str(data)), cfg, (20, SIZE))
                gaps = np.abs(images.numpy().astype(int) - picture).max((1, 2, 3))
                assert len(gaps) == 8 and gaps.max() <= 1, (data.name, exif, value_range, gaps)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("what", ["rotated", "floats"])
def test_dali_refuses_tiff_that_it_would_read_otherwise(what, listed, tmp_path, config, monkeypatch):
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed (extra: train)")
    pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    monkeypatch.setattr(image_files, "_checked", set())
    colors = np.stack([GRAY] * 3, -1)
    values, orientation = (colors, 3) if what == "rotated" else ((colors / 255).astype(np.float32), 1)
    folder, data = tmp_path / "images", tmp_path / "m.tsv"
    folder.mkdir()
    tag = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(folder / "a.tif", values, photometric="rgb", extratags=tag)
    if listed:
        index(folder, data, threads=1)
    source, cfg = open_source(str(data if listed else folder)), config(loader="dali")
    with pytest.raises(DataError, match=r"a\.tif: .*DALI does not .*--data\.loader pil"):
        loader_for(source, cfg)
    if not listed:
        # of many files a few are looked at before
        monkeypatch.setattr(loader, "check_depth", lambda *args: None)
        with pytest.raises(DataError, match=r"a\.tif: .*DALI does not .*--data\.loader pil"):
            read(folder, cfg)


def test_dali_by_name_and_a_range_is_an_error(tmp_path, config):
    Image.fromarray(GRAY).save(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    with pytest.raises(UsageError, match=r"data\.loader dali"):
        loader_for(source, config(loader="dali", range=(0.0, 9.0)))
    assert loader_for(source, config(range=(0.0, 9.0))) == "pil"


def test_damaged_tiff_is_not_read_as_black(tmp_path, config):
    Image.fromarray(np.stack([GRAY] * 3, -1)).save(tmp_path / "a.tiff", compression="tiff_adobe_deflate")
    data = bytearray((tmp_path / "a.tiff").read_bytes())
    at = len(data) // 4
    data[at : at + 64] = b"\xff" * 64
    (tmp_path / "a.tiff").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tiff: cannot be decoded"):
        read(tmp_path, config())
    with pytest.raises(DataError, match="none of the 1 images is good"):
        index(tmp_path, tmp_path.parent / "m.tsv", threads=1)


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0, 4095, (0, 4095)),
        (17, 4096, (0, 16383)),
        (0, 255, (0, 255)),
        (0, 0.7, (0, 1)),
        (-5, 0.5, (-5, 0.5)),
        (3, 3e6, (3, 3e6)),
        (-7, -7, (-7, -6)),
    ],
)
def test_natural_range(low, high, want):
    assert natural_range(low, high) == want


def test_not_a_number_and_values_outside_the_range():
    im = Image.fromarray(np.array([[np.nan, -9, 0, 0.5, 7, np.inf]], np.float32))
    assert np.asarray(to_8_bit(im, (0.0, 1.0))).tolist() == [[0, 0, 0, 128, 255, 255]]
    eight = Image.fromarray(GRAY)
    assert to_8_bit(eight, (0.0, 1.0)) is eight
