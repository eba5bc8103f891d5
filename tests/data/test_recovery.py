"""A file that cannot be decoded does not end a run, and disturbs nothing but its own place.

Covers: one bad file of each kind and moment (never an image, cut, gone, emptied, a shard cut short); all other samples
identical; the same substitutes whether a row was known, found, or found by another process, after restarts and for
any world; images of another size than planned; every good row as itself exactly once per epoch over all broken files,
at several batch sizes, and over their manifest; the pixel limit; the budget; the list in a file; a process that cannot
go on; errors that are no file's fault; failures of DALI itself; evaluation; memory.
"""

from __future__ import annotations

import errno
import itertools
import logging
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from extrema_fast.config import DataConfig
from extrema_fast.data import decode as data_decode
from extrema_fast.data.bad_images import BAD_ROWS, BadRows
from extrema_fast.data.image_files import ImageFiles, hash_sample, replaced
from extrema_fast.data.loader import EvalLoader, TrainLoader
from extrema_fast.data.order import epoch_length
from extrema_fast.data.sources import open_source
from extrema_fast.distributed import World
from extrema_fast.errors import DataError
from extrema_fast.tools.index import index

from .conftest import assert_same, pack_files, picture

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")

SIZE = (24, 32)


def batches(source, cfg, count, **kw):
    with TrainLoader(source, cfg, SIZE, **{"batch_size": 5, "seed": 3, **kw}) as loader:
        return list(itertools.islice(loader, count)), loader.bad


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A folder with 23 images in `images`, and their manifest."""
    root = tmp_path_factory.mktemp("indexed")
    (root / "images").mkdir()
    for i in range(23):
        pixels = picture(i, 40 + 7 * i % 60, 44 + 11 * i % 70)
        Image.fromarray(pixels).save(root / "images" / f"{i:02d}.{'jpg' if i % 2 else 'png'}", quality=92)
    index(str(root / "images"), root / "m.tsv", threads=1, progress=False)
    return root


@pytest.fixture
def images(indexed, tmp_path):
    """The folder of 23 images, fresh for each test, and next to it the manifest."""
    shutil.copytree(indexed, tmp_path, dirs_exist_ok=True)
    return tmp_path / "images"


def spoil(path, how):
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"text": b"no image at all", "empty": b"", "cut": data[: len(data) // 2]}[how])


def assert_only(places, clean, replaced):
    """The same batches but for the images of some rows, which are others."""
    changed = 0
    for a, b in zip(clean, replaced, strict=True):
        same = torch.tensor([row not in places for row in a.index.tolist()])
        assert torch.equal(a.index[same], b.index[same]) and torch.equal(a.images[same], b.images[same])
        assert not set(b.index.tolist()) & set(places)
        changed += int((~same).sum())
    return changed


@pytest.mark.parametrize(
    ("how", "crop"),
    [("text", "shared"), ("cut", "shared"), ("cut", "separate"), ("empty", "shared"), ("gone", "shared")],
)
def test_all_other_samples_are_undisturbed(images, config, kind, how, crop, caplog):
    # a JPEG and a PNG file
    bad = [7, 12]
    source, cfg = open_source(str(images)), config(loader=kind, bad_budget=0.1, crop=crop)
    clean, _ = batches(source, cfg, 12)
    for row in bad:
        spoil(images / source.paths[row], how)
    with caplog.at_level(logging.WARNING, "extrema_fast"):
        replaced, found = batches(source, cfg, 12)
    drawn = sum(row in bad for b in clean for row in b.index.tolist())
    assert assert_only(bad, clean, replaced) == drawn >= 2
    assert sorted(found.reasons) == bad
    # each is named once, with what is wrong
    told = [r.getMessage() for r in caplog.records if "left out from now on" in r.getMessage()]
    assert len(told) == len(bad)
    assert all(source.paths[row] in text for row, text in zip(bad, sorted(told), strict=True))


@pytest.mark.parametrize(("how", "crop"), [("text", "shared"), ("cut", "separate")])
def test_it_makes_no_difference_who_finds_it_and_when(images, config, kind, how, crop):
    """Known from the start, found by someone else, another start, another world; by its header or in decoding."""
    source, cfg = open_source(str(images)), config(loader=kind, bad_budget=0.1, crop=crop)
    for row in (7, 12):
        spoil(images / source.paths[row], how)
    replaced, found = batches(source, cfg, 12)
    assert sorted(found.reasons) == [7, 12]
    again, _ = batches(source, cfg, 12, bad=found)
    assert_same(replaced, again)
    later, _ = batches(source, cfg, 5, start_step=7)
    assert_same(replaced[7:], later)
    parts = [batches(source, cfg, 12, rank=r, world=5)[0] for r in range(5)]
    for step, whole in enumerate(replaced):
        assert torch.equal(torch.cat([p[step].index for p in parts]), whole.index)
        assert torch.equal(torch.cat([p[step].images for p in parts]), whole.images)


@pytest.mark.parametrize(
    ("size", "policy", "listed"),
    [
        ((9, 11), "spatial+color", False),
        ((9, 11), "centercrop", False),
        ((300, 200), "spatial+color", True),
        ((300, 200), "centercrop", False),
        ((44, 40), "spatial+color", False),
        ((44, 40), "centercrop", True),
    ],
)
def test_an_image_of_another_size_than_planned(images, config, kind, size, policy, listed):
    """Of DALI a box outside of the image ends the process; Pillow pads it with black."""
    data = images.with_name("m.tsv") if listed else images
    source, bad = open_source(str(data)), [7, 12]
    cfg = config(loader=kind, bad_budget=0.1, policy=policy)
    clean, _ = batches(source, cfg, 12)
    with TrainLoader(source, cfg, SIZE, batch_size=5, seed=3) as loader:
        # headers are known by now
        loader._files.read_headers(np.arange(23))
        for row in bad:
            Image.fromarray(picture(row, *size)).save(source.paths[row])
        replaced = list(itertools.islice(loader, 12))
    assert assert_only(bad, clean, replaced) >= 2
    assert sorted(loader.bad.reasons) == bad
    when = "as the manifest says; index again" if listed else "as when its header was read"
    assert all(
        f"{size[1]} x {size[0]} pixels, not" in text and when in text and "PIL can" not in text
        for text in loader.bad.reasons.values()
    )


def test_an_image_of_another_size_is_another_image(images, config):
    sources = [open_source(str(data)) for data in (images, images.with_name("m.tsv"))]
    before = hash_sample(ImageFiles(sources[0], config()))
    spoil(images / "03.jpg", "cut")
    Image.fromarray(picture(7, 300, 200)).save(images / "07.jpg")
    assert [replaced(ImageFiles(source, config()), before) for source in sources] == [[7], [7]]


def test_a_cut_jpeg_is_found_whatever_the_crop(images, config, kind):
    """DALI decodes the rows of a crop only: a small one at the top does not come to the damage."""
    path = images / "07.jpg"
    Image.fromarray(picture(7, 300, 200)).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:-3000])
    cfg = config(loader=kind, area=(0.05, 0.06))
    seen, found = batches(open_source(str(images)), cfg, 20)
    assert list(found.reasons) == [7] and not any(7 in b.index for b in seen)
    # bytes behind the end are no damage
    Image.fromarray(picture(7, 300, 200)).save(path, quality=95)
    path.write_bytes(path.read_bytes() + b"\0" * 1000)
    seen, found = batches(open_source(str(images)), cfg, 20)
    assert not found and any(7 in b.index for b in seen)


def test_a_file_that_breaks_while_training(images, config, kind):
    """Its header is known and its batch may be on its way; it is found wherever it is drawn next."""
    source, cfg = open_source(str(images)), config(loader=kind)
    clean, _ = batches(source, cfg, 12)
    with TrainLoader(source, cfg, SIZE, batch_size=5, seed=3) as loader:
        replaced = [next(loader) for _ in range(8)]
        row = int(clean[11].index[2])
        spoil(images / source.paths[row], "gone")
        replaced += [next(loader) for _ in range(4)]
    assert_same(clean[:8], replaced[:8])
    assert assert_only([row], clean[8:], replaced[8:]) == 1
    assert "gone" in loader.bad.reasons[row]


def test_a_shard_that_is_cut_short(tree, tmp_path, config, kind):
    pack_files(tmp_path, [Path(p) for p in open_source(str(tree)).paths], (11, 11))
    source = open_source(str(tmp_path))
    cfg = config(loader=kind, bad_budget=0.2)
    clean, _ = batches(source, cfg, 8)
    with open(tmp_path / "1.tar", "r+b") as f:
        f.truncate(int(source.spans[19, 0]) + 100)
    replaced, found = batches(source, cfg, 8)
    assert sorted(found.reasons) == [19, 20, 21]
    assert assert_only([19, 20, 21], clean, replaced) >= 3
    assert all("ends after" in reason and "1.tar" in reason for reason in found.reasons.values())


# ---- all broken files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(odd_images, tmp_path_factory):
    """241 small images and all 23 odd ones, the empty one emptied after listing: 264 rows."""
    folder = tmp_path_factory.mktemp("everything")
    for i in range(241):
        Image.fromarray(picture(i, 30 + i % 17, 30 + i % 23)).save(folder / f"{i:03d}.jpg")
    for path in odd_images.iterdir():
        shutil.copy(path, folder)
    empty = folder / "bad_zero_bytes.jpg"
    empty.write_bytes(b"x")
    source = open_source(str(folder))
    empty.write_bytes(b"")
    assert len(source) == 264
    return source


@pytest.fixture(scope="module")
def all_good(everything, tmp_path_factory):
    """Those in a manifest."""
    manifest = tmp_path_factory.mktemp("manifest") / "m.tsv"
    index(everything.name, manifest, threads=1, progress=False)
    return open_source(str(manifest))


@pytest.mark.parametrize(("batch", "world"), [(33, 1), (24, 2), (264, 2)])
def test_every_good_row_once_per_epoch(everything, config, kind, batch, world):
    source, steps = everything, 264 // batch
    cfg = config(loader=kind, bad_budget=0.1)
    parts = [batches(source, cfg, 3 * steps, batch_size=batch, rank=r, world=world) for r in range(world)]
    unusable = {i for i, p in enumerate(source.paths) if "/bad_" in p}
    if kind == "dali":
        # flipped bits inside the scan, which its decoder does not notice
        unusable -= {i for i, p in enumerate(source.paths) if "flipped_bits" in p}
    assert len(unusable) == (7 if kind == "pil" else 6)
    for epoch in range(3):
        rows = np.concatenate(
            [b.index for seen, _ in parts for b in seen[epoch * steps : (epoch + 1) * steps]]
        )
        counts = np.bincount(rows, minlength=264)
        assert all(counts[row] == 0 for row in unusable)
        # once as itself; the places of the unusable hold substitutes, which are then there once more
        assert (np.delete(counts, list(unusable)) >= 1).all() and counts.sum() == 264
    assert set().union(*(bad.reasons for _, bad in parts)) == unusable


@pytest.mark.parametrize(("batch", "world"), [(1, 1), (257, 1), (64, 2)])
def test_over_a_manifest_every_good_row_exactly_once(all_good, config, batch, world):
    source, steps = all_good, 257 // batch
    assert len(source) == 257 and not any("/bad_" in p for p in source.paths)
    parts = [
        batches(source, config(loader="pil", bad_budget=0), 2 * steps, batch_size=batch, rank=r, world=world)
        for r in range(world)
    ]
    for epoch in range(2):
        rows = np.concatenate([b.index for seen, _ in parts for b in seen[epoch * steps :][:steps]])
        assert len(rows) == steps * batch == len(set(rows.tolist()))
    assert not any(len(bad) for _, bad in parts)


# ---- limits -----------------------------------------------------------------------------------------


def huge_png(path, side):
    """A PNG file that says it has side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_a_picture_of_20000_x_20000(images, config, kind):
    huge_png(images / "08.png", 20_000)
    source = open_source(str(images))
    _, found = batches(source, config(loader=kind), 8)
    assert list(found.reasons) == [8]
    assert "400000000 pixels are more than data.max_pixels 178956970" in found.reasons[8]
    with pytest.raises(DataError, match=r"08\.png.*pixels are more than data\.max_pixels"):
        list(EvalLoader(source, config(loader=kind), SIZE))
    # a limit of one's own
    limit = max(w * h for w, h in (Image.open(p).size for p in source.paths if not p.endswith("08.png"))) - 1
    _, found = batches(source, config(loader=kind, max_pixels=limit, bad_budget=0.1), 8)
    (row,) = set(found.reasons) - {8}
    width, height = Image.open(source.paths[row]).size
    assert f"{width} x {height} pixels are more than data.max_pixels {limit}" in found.reasons[row]


@pytest.mark.parametrize("budget", [1e-4, 0.0])
def test_over_the_budget(images, config, kind, budget):
    for i in (3, 8, 13):
        spoil(images / f"{i:02d}.{'jpg' if i % 2 else 'png'}", "text")
    source = open_source(str(images))
    # decoding threads may find another before the first of them stops
    count, allowed = ("[23]", 1) if budget else ("[123]", 0)
    said = rf"{images}: {count} of 23 images cannot be used, data\.bad_budget allows {allowed}"
    with (
        pytest.raises(
            DataError, match=said + r"; first: .*extrema-fast index .* --data\.train M\.tsv"
        ) as error,
        TrainLoader(source, config(loader=kind, bad_budget=budget), SIZE, batch_size=5, seed=3) as loader,
    ):
        list(itertools.islice(loader, 12))
    assert error.value.exit_code == 4
    # once over, always over
    with pytest.raises(DataError, match="cannot be used"):
        next(loader)


def test_everything_gone(images, config, kind):
    source, cfg = open_source(str(images)), config(loader=kind, bad_budget=1.0)
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"2\d images cannot be used"):
        batches(source, cfg, 5)


@pytest.mark.parametrize("crop", ["shared", "separate"])
def test_one_process_of_several_waits_for_the_others(images, config, kind, crop):
    """It yields empty images; `agree` is where all learn of it."""
    source = open_source(str(images))
    for path in images.iterdir():
        path.unlink()
    cfg, crops = config(loader=kind, crop=crop), (2,) if crop == "separate" else ()
    with TrainLoader(source, cfg, SIZE, batch_size=6, seed=3, rank=1, world=2) as loader:
        for step in range(3):
            batch = next(loader)
            assert batch.step == step and batch.images.shape == (3, *crops, *SIZE, 3)
            assert len(batch.index) == 3 and not batch.images.any()
        with pytest.raises(DataError, match=r"\d+ of 23 images cannot be used"):
            loader.agree(World(torch.device("cpu")))


def test_the_list_in_a_file(images, config, tmp_path, caplog):
    for i in (3, 8):
        spoil(images / f"{i:02d}.{'jpg' if i % 2 else 'png'}", "text")
    source, cfg, file = open_source(str(images)), config(loader="pil", bad_budget=0.1), tmp_path / BAD_ROWS
    bad = BadRows(source, 0.1)
    bad.keep_in(file)
    batches(source, cfg, 8, bad=bad)
    head, names, *rows = file.read_text().splitlines()
    assert source.fingerprint in head and names == "row\tname\treason" and len(rows) == 2
    assert rows[0].startswith(f"3\t{images}/03.jpg\t") and "cannot be decoded" in rows[0]

    def read(source, share=0.1):
        again = BadRows(source, share)
        again.read(file, cfg)
        return sorted(again.reasons)

    assert read(source) == [3, 8]
    with pytest.raises(DataError, match="2 of 23 images cannot be used"):
        read(source, 1e-4)
    # what has been repaired is used again
    Image.new("RGB", (40, 40)).save(images / "03.jpg")
    assert read(source) == [8]
    # another data set, a damaged file, none
    assert read(open_source(str(images), limit=22)) == []
    file.write_bytes(b"\xff\xfe\0")
    assert read(source) == []
    file.unlink()
    assert read(source) == []


def test_a_full_disk_is_no_reason_to_stop(images, config, caplog):
    spoil(images / "03.jpg", "text")
    source = open_source(str(images))
    bad = BadRows(source, 0.1)
    bad.keep_in(images / "03.jpg" / BAD_ROWS)
    batches(source, config(loader="pil"), 8, bad=bad)
    assert list(bad.reasons) == [3] and "training continues" in caplog.text


# ---- DALI itself, evaluation, memory ------------------------------------------------------------------


def test_dali_loses_batches_without_a_file_to_blame(images, config, monkeypatch):
    pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    source, cfg, decoder = open_source(str(images)), config(loader="dali"), data_decode.DaliDecoder
    clean, _ = batches(source, cfg, 12)
    real, runs = decoder._pipeline, itertools.count()
    monkeypatch.setattr(decoder, "_find_failed", lambda *args: {})
    # the third batch, and the one that replaces it
    monkeypatch.setattr(decoder, "_pipeline", losing(real, lambda _: next(runs) in (2, 4)))
    seen, found = batches(source, cfg, 12)
    assert_same(clean, seen)
    assert not found
    # every batch is lost, and only decoding it once more helps: slow for ever, so it ends
    runs, delivered = itertools.count(), 0
    monkeypatch.setattr(decoder, "_pipeline", losing(real, lambda _: next(runs) % 2 == 0))
    with (
        pytest.raises(DataError, match="not because of a file: lost again"),
        TrainLoader(source, cfg, SIZE, batch_size=5, seed=3) as loader,
    ):
        for want in clean:
            assert torch.equal(next(loader).images, want.images)
            delivered += 1
    assert delivered == 3
    monkeypatch.setattr(decoder, "_pipeline", losing(real, lambda count: count > 1))
    with pytest.raises(DataError, match=r"not because of a file: lost again; try --data\.loader pil"):
        batches(source, cfg, 12)


def test_sound_images_are_not_blamed_for_dali(images, config, monkeypatch):
    """Whatever it cannot decode here, it is not these files."""
    pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    source, cfg, decoder = open_source(str(images)), config(loader="dali"), data_decode.DaliDecoder
    real, made = decoder._pipeline, []
    monkeypatch.setattr(decoder, "_pipeline", losing(real, lambda n: made.append(n) or True, "failure: '#8'"))
    loader = TrainLoader(source, cfg, SIZE, batch_size=16, seed=3)
    with pytest.raises(DataError, match=r"not because of a file: failure: '#8'; try --data\.loader pil"):
        next(loader)
    assert not loader.bad and len(made) == 11


def losing(real, lost, message="lost again"):
    """`real`, whose pipelines raise as DALI does where `lost(number of images)` says so."""

    class Pipeline:
        def __init__(self, *args):
            self.pipe = real(*args)

        def run(self):
            out = self.pipe.run()
            if lost(len(out[0])):
                raise RuntimeError(f"Critical error\nencountered:\n{message}\nCurrent pipeline is gone")
            return out

    return lambda *args: Pipeline(*args)


@pytest.mark.parametrize("message", ["CUDA runtime API error cudaErrorIllegalAddress (700)", "out of memory"])
def test_a_device_error_of_dali_is_no_damaged_file(images, config, monkeypatch, message):
    pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    source, cfg, decoder = open_source(str(images)), config(loader="dali"), data_decode.DaliDecoder
    # as when images are large: again whenever one of these is decoded
    monkeypatch.setattr(decoder, "_pipeline", losing(decoder._pipeline, lambda _: True, message))
    for loader in (
        TrainLoader(source, cfg, SIZE, batch_size=5, seed=3),
        EvalLoader(source, cfg, SIZE, batch_size=5, bad=BadRows(source, 1.0)),
    ):
        with pytest.raises(RuntimeError, match=message.split("(")[0]):
            list(loader)
        assert not loader.bad


# ---- errors that are no file's fault -------------------------------------------------------------------

INJECTED = [
    RuntimeError("injected"),
    OSError(errno.EIO, "injected"),
    StopIteration(),
]


def until_it_fails(loader, error):
    """The batches before the injected error."""
    seen = []
    # Python itself makes a RuntimeError of a StopIteration in a generator
    expected = RuntimeError if isinstance(error, StopIteration) else type(error)
    with pytest.raises(expected, match=r"injected|StopIteration"):
        for batch in itertools.islice(loader, 12):
            seen.append(batch)
    return seen


@pytest.mark.parametrize("where", ["_plan", "_arguments"])
@pytest.mark.parametrize("error", INJECTED, ids=lambda e: type(e).__name__)
def test_an_error_in_a_plan_ends_the_iteration(images, config, kind, monkeypatch, error, where):
    """Once, at step 0 or 4, while an image of step 3 or 2 is being replaced: no step is left out."""
    if (kind, where) == ("pil", "_arguments"):
        pytest.skip("only DALI is fed")
    source, cfg = open_source(str(images)), config(loader=kind, bad_budget=0.1)
    clean, _ = batches(source, cfg, 12)
    # PNG files, whose headers are sound
    broken = next(row for row in clean[3].index.tolist() if row % 2 == 0)
    spoil(images / source.paths[broken], "cut")
    spoil(images / source.paths[10], "cut")
    owner = TrainLoader if where == "_plan" else data_decode.DaliDecoder
    real = getattr(owner, where)
    for at in (0, 4):
        waiting = [error]

        def inject(self, plan, at=at, waiting=waiting):
            if waiting and at == (plan if where == "_plan" else plan.step):
                raise waiting.pop()
            return real(self, plan)

        for cls in (TrainLoader, EvalLoader) if where == "_plan" else (data_decode.DaliDecoder,):
            monkeypatch.setattr(cls, where, inject)
        with TrainLoader(source, cfg, SIZE, batch_size=5, seed=3) as loader:
            seen = until_it_fails(loader, error)
            assert len(seen) == at and [b.step for b in seen] == list(range(at))
            replaced = assert_only([broken, 10], clean[:at], seen)
            assert replaced >= bool(at) and (broken in loader.bad.reasons) == bool(at)
            # for good
            assert not until_it_fails(loader, error)
        waiting.append(error)
        bad = BadRows(source, 1.0, warn=False)
        seen = until_it_fails(EvalLoader(source, cfg, SIZE, batch_size=5, bad=bad), error)
        rows = [row for _, index in seen for row in index.tolist()]
        assert rows == [row for row in range(5 * at) if row not in (broken, 10)]


@pytest.mark.parametrize(
    "error", [MemoryError("injected"), OSError(errno.EMFILE, "injected")], ids=["memory", "open files"]
)
def test_what_the_machine_lacks_is_no_damaged_file(images, config, kind, monkeypatch, error):
    def lacking(*args, **kw):
        raise error

    source = open_source(str(images))
    monkeypatch.setattr(Image, "open", lacking)
    with TrainLoader(source, config(loader=kind), SIZE, batch_size=5, seed=3) as loader:
        assert not until_it_fails(loader, error)
        assert not loader.bad


def test_a_decoder_that_leaves_out_a_batch(images, config, kind, monkeypatch):
    source, cfg = open_source(str(images)), config(loader=kind)
    decoder = data_decode.PilDecoder if kind == "pil" else data_decode.DaliDecoder
    real = decoder.stream

    def given(first, end):
        stream = lambda self, plans: itertools.islice(real(self, plans), first, end)  # noqa: E731
        monkeypatch.setattr(decoder, "stream", stream)
        return EvalLoader(source, cfg, SIZE, batch_size=5)

    with pytest.raises(RuntimeError, match="decoded step 1 where 0 was due"):
        list(given(1, None))
    with pytest.raises(RuntimeError, match="ended where step 4 was due"):
        list(given(0, 4))
    assert len(list(given(0, None))) == 5


@pytest.mark.parametrize("batch", [1, 4, 23])
def test_evaluation_leaves_out_what_it_is_allowed_to(images, config, kind, batch):
    for i in (0, 3, 22):
        spoil(images / f"{i:02d}.{'jpg' if i % 2 else 'png'}", "cut")
    source, cfg = open_source(str(images)), config(loader=kind)
    with pytest.raises(DataError, match=r"0[03]\.(png|jpg): cannot be decoded .*extrema-fast index"):
        list(EvalLoader(source, cfg, SIZE, batch_size=batch))
    bad = BadRows(source, 1.0, warn=False)
    seen = list(EvalLoader(source, cfg, SIZE, batch_size=batch, bad=bad))
    rows = torch.cat([index for _, index in seen]).tolist()
    assert rows == [r for r in range(23) if r not in (0, 3, 22)] and sorted(bad.reasons) == [0, 3, 22]
    assert all(len(a) == len(b) > 0 for a, b in seen)
    for path in images.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="nor can any other of 23"):
        list(EvalLoader(source, cfg, SIZE, batch_size=batch, bad=BadRows(source, 1.0, warn=False)))


def test_memory_stays_flat(tree, kind):
    source, used = open_source(str(tree)), []
    with TrainLoader(source, DataConfig(loader=kind, threads=1), SIZE, batch_size=11, seed=0) as loader:
        for _ in range(2 * 50):
            next(loader)
            used.append(resident())
    assert epoch_length(source) == 23
    # 40 epochs after the tenth: their crops alone, if kept, would be 2 MB, their pixels 13 MB
    assert used[-1] - used[20] < 8e6


def resident() -> int:
    """Bytes of memory of this process."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096
    except OSError:
        pytest.skip("no /proc here")
