"""Images of any number of channels and of any format that Pillow reads.

Covers: .npy in either order, TIFF in planes, interleaved, in pages, and RGBA; which axis the channels are; a range per
channel, mean and standard deviation by `index`, kept by `pack`; crops read, held and cut alike; sets of other channels
than the model, files that are no numbers, DALI by name; GIF, AVIF and JPEG 2000, what is left out with a count; tiles.
"""

from __future__ import annotations

import io

import numpy as np
import pytest

from extrema_fast.data.image_files import load_image, measure_statistics, read_as
from extrema_fast.data.loader import EvalLoader, TrainLoader, loader_for
from extrema_fast.data.manifest import read_manifest, value_range
from extrema_fast.data.pixels import Planes, array_channels, open_array, plugins, shown, to_levels
from extrema_fast.data.sources import open_source
from extrema_fast.errors import DataError, UsageError
from extrema_fast.models.encoder import create_encoder
from extrema_fast.tools.index import describe, index
from extrema_fast.tools.pack import pack
from extrema_fast.tools.search import _thumbnail
from extrema_fast.tools.verify import check, pillow
from extrema_fast.weights.folder import data_meta

from .conftest import picture

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")
tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed (extra: train)")

HEIGHT, WIDTH = 34, 40
RANGE = (0.0, 1.0, 0.0, 3000.0, -5.0, -4.0, 0.0, 1.0, 0.0, 2.5)


def stack(seed: int = 0) -> np.ndarray:
    """[HEIGHT, WIDTH, 5] fp32 that fills RANGE: reflectances, meters, a negative channel."""
    x = np.random.default_rng(seed).random((HEIGHT, WIDTH, 5)).astype(np.float32)
    # both ends in every image
    x[0, 0], x[0, 1] = 0, 1
    low, high = np.float32(RANGE[::2]), np.float32(RANGE[1::2])
    return low + x * (high - low)


def npy(values: np.ndarray) -> bytes:
    f = io.BytesIO()
    np.save(f, values)
    return f.getvalue()


def tiff(values: np.ndarray, **options) -> bytes:
    f = io.BytesIO()
    tifffile.imwrite(f, values, photometric="minisblack", **options)
    return f.getvalue()


def pages(values: np.ndarray) -> bytes:
    """Planes written one by one: a series each."""
    f = io.BytesIO()
    with tifffile.TiffWriter(f) as file:
        for plane in values:
            file.write(plane, photometric="minisblack", contiguous=False, metadata=None)
    return f.getvalue()


def first(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(values, -1, 0))


FILES = {
    "hwc.npy": lambda x: npy(x),
    "chw.npy": lambda x: npy(first(x)),
    "fortran.npy": lambda x: npy(np.asfortranarray(x)),
    "doubles.npy": lambda x: npy(x.astype(">f8")),
    "stack.tif": lambda x: tiff(first(x)),
    "planes.tif": lambda x: tiff(first(x), planarconfig="separate"),
    "contig.tif": lambda x: tiff(x, planarconfig="contig"),
    "pages.tif": lambda x: pages(first(x)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of three stacks, as .npy in either order."""
    root = tmp_path_factory.mktemp("stacks")
    for i in range(6):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        x = stack(i)
        (root / "ab"[i % 2] / f"{i}.npy").write_bytes(npy(first(x) if i == 3 else x))
    return root


@pytest.mark.parametrize("name", FILES)
def test_files_of_five_channels(name, tmp_path, config):
    x, wanted = stack(), to_levels(stack(), RANGE)
    (tmp_path / name).write_bytes(FILES[name](x))
    source = read_as(open_source(str(tmp_path)), 5)
    ((images, _),) = EvalLoader(source, config(range=RANGE), (HEIGHT, WIDTH))
    assert (images[0].numpy() == wanted).all()
    box = (3, 2, 30, 20)
    for file in (str(tmp_path / name), io.BytesIO((tmp_path / name).read_bytes())):
        assert (np.asarray(load_image(file, False, box, RANGE, 5)) == wanted[2:20, 3:30]).all()
    # only the set knows which values are white
    with pytest.raises(DataError, match=r"floats from -5 to 3000.*data\.range"):
        list(EvalLoader(source, config(), (HEIGHT, WIDTH)))
    found = check((tmp_path / name).read_bytes(), pillow, 10**6)
    assert found.status == "ok" and (found.height, found.width) == (HEIGHT, WIDTH)
    assert value_range([found.kind]) == pytest.approx(RANGE, abs=1e-6)


def test_channels_of_pillow_images(tmp_path, config):
    x = np.concatenate([picture(0, HEIGHT, WIDTH), picture(1, HEIGHT, WIDTH)], -1)
    Image.fromarray(x[..., :4]).save(tmp_path / "a.png")
    # infrared as a fourth sample that is no opacity
    tifffile.imwrite(tmp_path / "b.tif", x[..., :4], photometric="rgb", extrasamples=["unspecified"])
    source = read_as(open_source(str(tmp_path)), 4)
    ((images, _),) = EvalLoader(source, config(), (HEIGHT, WIDTH))
    assert (images.numpy() == x[..., :4]).all()
    # as RGB the fourth is left out
    ((images, _),) = EvalLoader(open_source(str(tmp_path)), config(loader="pil"), (HEIGHT, WIDTH))
    assert (images.numpy() == x[..., :3]).all()


def test_deep_colors_of_a_tiff_keep_their_range(tmp_path, config):
    levels = picture(0, HEIGHT, WIDTH)
    tifffile.imwrite(tmp_path / "a.tif", levels.astype(np.uint16) * 16, photometric="rgb")
    found = value_range([check((tmp_path / "a.tif").read_bytes(), pillow, 10**6).kind])
    assert found == (0, 4095)
    ((images, _),) = EvalLoader(open_source(str(tmp_path)), config(range=found), (HEIGHT, WIDTH))
    assert np.abs(images[0].numpy().astype(int) - levels).max() <= 1


@pytest.mark.parametrize(
    ("shape", "channels", "sizes"),
    [
        ((40, 50, 5), 5, (40, 50, 5)),
        ((5, 40, 50), 5, (40, 50, 5)),
        ((12, 40, 5), 5, (12, 40, 5)),
        ((40, 50), 3, (40, 50, 1)),
        ((40, 50, 1), 1, (40, 50, 1)),
        ((5, 40, 50), None, (40, 50, 5)),
        ((12, 40, 5), None, "both the first and the last axis"),
        ((5, 40, 5), 5, "both the first and the last axis"),
        ((6, 40, 50), 5, "neither the first nor the last axis.*5 of them"),
        ((2, 5, 40, 50), 5, r"expected \[H, W\]"),
        ((0, 40, 50), 5, r"expected \[H, W\]"),
    ],
)
def test_which_axis_the_channels_are(shape, channels, sizes):
    array = open_array(io.BytesIO(npy(np.zeros(shape, np.uint8))), channels)
    if isinstance(sizes, tuple):
        assert array.sizes(channels) == sizes and array.values(channels).shape == sizes
        return
    with pytest.raises(UsageError, match=sizes):
        array.sizes(channels)


def test_files_that_are_no_numbers(tmp_path, config):
    (tmp_path / "objects.npy").write_bytes(npy(np.array([{}], object)))
    (tmp_path / "text.npy").write_bytes(npy(np.array([["a"]])))
    (tmp_path / "short.npy").write_bytes(npy(stack())[:-1])
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY\x01\0\xff\xff{")
    (tmp_path / "fine.npy").write_bytes(npy(stack()))
    result = index(str(tmp_path), tmp_path / "m.tsv", threads=1)
    found = dict(
        zip(*(getattr(read_manifest(tmp_path / "m.tsv"), c) for c in ("path", "status")), strict=True)
    )
    assert result.good == 1 and found.pop("fine.npy") == "ok"
    assert "expected whole numbers or floats" in found["objects.npy"] and "<U1" in found["text.npy"]
    source = read_as(open_source(str(tmp_path)), 5)
    for row in range(5):
        if not source.title(row).endswith("fine.npy"):
            with pytest.raises(Exception):  # noqa: B017
                load_image(source.paths[row], False, None, RANGE, 5)


def test_index_finds_range_and_statistics(folder, tmp_path, config):
    out = tmp_path / "m.tsv"
    result = index(str(folder), out, threads=1)
    assert result.value_range == pytest.approx(RANGE, abs=1e-6)
    assert "-5 is black and -4 is white" in describe(result) and "--model.in-chans 5" in describe(result)
    source = read_as(open_source(str(out)), 5)
    ((images, _),) = EvalLoader(source, config(), (HEIGHT, WIDTH))
    wanted = images.numpy().reshape(-1, 5) / 255
    assert np.allclose(source.statistics, (wanted.mean(0), wanted.std(0)), atol=2e-6)
    # again, nothing is decoded, and what was measured stays
    again = index(str(folder), out, threads=1)
    assert again.fresh == 0 and again.statistics == result.statistics


def test_pack_keeps_channels(folder, tmp_path, config):
    index(str(folder), tmp_path / "m.tsv", threads=1)
    source = read_as(open_source(str(tmp_path / "m.tsv")), 5)
    for size in (0, HEIGHT):
        pack(str(tmp_path / "m.tsv"), tmp_path / f"p{size}", size=size, threads=1)
        packed = read_as(open_source(str(tmp_path / f"p{size}")), 5)
        assert packed.statistics == source.statistics and packed.value_range == source.value_range
        found, before = (
            sorted(
                im.tobytes()
                for im in EvalLoader(s, config(), (HEIGHT, WIDTH)).__iter__().__next__()[0].numpy()
            )
            for s in (packed, source)
        )
        assert found == before


@pytest.mark.parametrize("policy", ["spatial", "centercrop"])
def test_crops_of_held_images_are_those_of_files(folder, config, policy):
    source = read_as(open_source(str(folder)), 5)
    batches = []
    for place in ("off", "host"):
        cfg = config(range=RANGE, policy=policy)
        with TrainLoader(source, cfg, (16, 16), batch_size=4, seed=3, device="cpu", resident=place) as loader:
            batches.append([next(loader).images for _ in range(2)])
    assert all((a == b).all() and a.shape == (4, 16, 16, 5) for a, b in zip(*batches, strict=True))
    assert not (batches[0][0] == batches[0][1]).all()


def test_planes_are_resized_like_images():
    x = np.concatenate([picture(0, 30, 40), picture(1, 30, 40)], -1)
    small = np.asarray(Planes(x).resize((10, 8), Image.Resampling.BILINEAR, (1.5, 0, 38, 29.25)))
    for half in (slice(0, 3), slice(3, 6)):
        one = Image.fromarray(x[..., half]).resize((10, 8), Image.Resampling.BILINEAR, (1.5, 0, 38, 29.25))
        assert (small[..., half] == np.asarray(one)).all()


def test_a_set_of_other_channels(folder, tree, config):
    source = open_source(str(folder))
    with pytest.raises(UsageError, match=r"5 channels .*npy.* takes 4 .*use --model\.in-chans 5"):
        read_as(source, 4)
    with pytest.raises(UsageError, match=r"5 channels .* takes 3"):
        read_as(source, 3)
    with pytest.raises(UsageError, match=r"3 channels .* takes 5 .*use --model\.in-chans 1 or 3"):
        read_as(open_source(str(tree)), 5)
    with pytest.raises(UsageError, match=r"data\.loader dali.* 5 channels"):
        loader_for(read_as(source, 5), config(loader="dali"))
    assert loader_for(read_as(source, 5), config()) == "pil"


def test_one_odd_image_is_the_loaders_business(folder, tmp_path, config):
    for i in range(4):
        (tmp_path / f"{i}.npy").write_bytes(npy(stack(i)[..., : 4 if i == 2 else 5]))
    source = read_as(open_source(str(tmp_path)), 5)
    with pytest.raises(DataError, match=r"2\.npy: cannot be decoded .*neither the first nor the last"):
        list(EvalLoader(source, config(range=RANGE), (16, 16)))


def test_few_levels_are_warned_of(tmp_path, config, caplog):
    x = stack()
    # a value for "no data" in a channel
    x[5, 5, 1] = 1e9
    (tmp_path / "a.npy").write_bytes(npy(x))
    wide = (*RANGE[:3], 1e9, *RANGE[4:])
    mean, std = measure_statistics(read_as(open_source(str(tmp_path)), 5), config(range=wide))
    assert "channel 1 (1)" in caplog.text and min(std) >= 1 / 255 - 1e-6 and len(mean) == 5


def test_kinds_in_a_manifest():
    kinds = ["npy 0.0..0.5,0.0..2999.5", "npy 0.1..0.9,3.0..3000.0", "jpeg", "npy 5x8bit"]
    assert value_range(kinds) == (0, 1, 0, 3000)
    assert value_range(["npy 0..4000,3..900"]) == (0, 4095, 0, 1023)
    # floats above 1 have no bits; whole numbers 0 and 1 do not mean 65535
    assert value_range(["tiff 0.0..2.5"]) == (0, 2.5) and value_range(["tiff 0..1"]) == (0, 1)
    assert (
        value_range(["tiff 0.0..1.0"]) is value_range(["png 0..65000"]) is value_range(["npy 5x8bit"]) is None
    )
    assert [array_channels(kind) for kind in (*kinds, "tiff 0..9", "npy 0..9")] == [2, 2, 0, 5, 0, 1]


# ---- formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gif", ".avif", ".jp2"])
def test_formats_that_pillow_reads(suffix, kind, tmp_path, config, caplog):
    if suffix not in (".gif", *plugins()):
        pytest.skip(f"this Pillow reads no {suffix}")
    gray = picture(0, HEIGHT, WIDTH)[..., 0]
    options = {"quality": 95} if suffix == ".avif" else {}
    # of several pictures the first
    more = {"save_all": True, "append_images": [Image.new("L", (WIDTH, HEIGHT))]} if suffix == ".gif" else {}
    Image.fromarray(gray).save(tmp_path / f"a{suffix}", **options, **more)
    (tmp_path / "b.svg").write_text("<svg/>")
    (tmp_path / "c.pdf").write_bytes(b"%PDF-1.7")
    source = open_source(str(tmp_path))
    assert "left out 2 images of kinds that are not read: .pdf 1, .svg 1" in caplog.text
    if kind == "dali" and suffix != ".jp2":
        with pytest.raises(UsageError, match=rf"data\.loader dali.*{suffix[1:]} files"):
            loader_for(source, config(loader="dali"))
        kind = "auto"
    ((images, _),) = EvalLoader(source, config(loader=kind), (HEIGHT, WIDTH))
    assert np.abs(images[0, ..., 1].numpy().astype(int) - gray).max() <= (12 if suffix == ".avif" else 0)
    assert check((tmp_path / f"a{suffix}").read_bytes(), pillow, 10**6).status == "ok"


def test_arrays_next_to_images_are_left_out(tree, tmp_path, caplog):
    Image.fromarray(picture(0, 20, 20)).save(tmp_path / "a.png")
    (tmp_path / "a.npy").write_bytes(npy(stack()))
    assert len(open_source(str(tmp_path))) == 1 and "left out 1 .npy file next to images" in caplog.text
    (tmp_path / "list.txt").write_text("a.npy\n")
    assert open_source(str(tmp_path / "list.txt")).paths == [str(tmp_path / "a.npy")]


def test_looking_at_channels():
    x = to_levels(stack(), RANGE)
    assert (shown(x) == x[..., :3]).all() and (shown(x[..., :2]) == x[..., :1]).all()
    tile, gray = (np.asarray(_thumbnail(npy(v), False))[40:100] for v in (stack(), stack()[..., :2]))
    assert (tile[..., 0] != tile[..., 1]).any() and (gray[..., 0] == gray[..., 1]).all()
    assert tile.std() > 20 and gray.std() > 20


def test_preprocess_takes_arrays():
    encoder = create_encoder(
        "extrema_vit_tiny_patch16_224", img_size=32, width=64, depth=1, heads=1, in_chans=5
    )
    encoder.mean, encoder.std, encoder.crop_pct = (0.5,) * 5, (0.25,) * 5, 1.0
    encoder.value_range = tuple(data_meta((), (), RANGE)["range"])
    x = encoder.preprocess()(stack()[:32, :32])
    wanted = (to_levels(stack(), RANGE)[:32, :32] / 255 - 0.5) / 0.25
    assert np.allclose(x.permute(1, 2, 0).numpy(), wanted, atol=1e-6)
    with pytest.raises(UsageError, match=r"takes 5 channels.*\[32, 32, 3\]"):
        encoder.preprocess()(np.zeros((32, 32, 3), np.uint8))
