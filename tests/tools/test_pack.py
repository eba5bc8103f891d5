"""pack: what is in the shards, bytes kept and made, resuming to equal bytes, refusals, no space, bad images, readers.

Resuming: stopped before every write of a small pack in turn, in the process and by kill -9.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch

from extrema_fast import cli, files
from extrema_fast.data import shards
from extrema_fast.data.image_files import load_image
from extrema_fast.data.manifest import read_manifest
from extrema_fast.data.sources import open_source
from extrema_fast.errors import DataError, StorageError, UsageError
from extrema_fast.tools import pack as pack_module
from extrema_fast.tools import shard_writer, work
from extrema_fast.tools.pack import describe, pack
from extrema_fast.tools.shard_writer import pack_image
from tests.data.conftest import picture
from tests.data.tars import write_tar

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")
ImageOps = pytest.importorskip("PIL.ImageOps")

QUIET = {"measure": False, "progress": False, "threads": 2}
SMALL = {**QUIET, "size": 32, "shard_mb": 0.012}


def contents(folder):
    """Every file below a folder with its bytes, pack.json left out."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "pack.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def encoded(pixels, fmt="JPEG", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, fmt, **options)
    return out.getvalue()


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def packed(tree, tmp_path_factory):
    """The tree of 23 images in several shards."""
    out = tmp_path_factory.mktemp("packed") / "set"
    return out, pack(str(tree), out, **SMALL, seed=3)


# ---- what is written ------------------------------------------------------------------------------


def test_every_image_is_there_once_with_its_label(tree, packed):
    out, result = packed
    source, back = open_source(str(tree)), open_source(str(out))
    assert result["images"] == len(back) == 23 and result["shards"] == len(list(out.glob("*.tar"))) > 2
    assert back.classes == source.classes
    rows = []
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar}
        for key in sorted({name.split(".")[0] for name in files}):
            assert {n for n in files if n.startswith(key)} == {f"{key}.jpg", f"{key}.cls", f"{key}.idx"}
            (row,) = struct.unpack("<q", files[f"{key}.idx"])
            assert files[f"{key}.cls"] == b"%d" % source.labels[row]
            assert back.read(len(rows)) == files[f"{key}.jpg"]
            assert back.labels[len(rows)] == source.labels[row]
            with Image.open(source.paths[row]) as im:
                wanted = im.resize([round(n * 32 / min(im.size)) for n in im.size], Image.Resampling.BICUBIC)
            got = decoded(files[f"{key}.jpg"])
            assert got.shape == np.asarray(wanted).shape and min(got.shape[:2]) == 32
            assert abs(got - np.asarray(wanted).astype(int)).mean() < 9
            rows.append(row)
    assert sorted(rows) == list(range(23)) and rows != sorted(rows)


def test_checksums_manifest_and_classes(packed):
    out, result = packed
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed == {p.name for p in out.iterdir()} - {"SHA256SUMS", "pack.json"}
    manifest = read_manifest(out / "manifest.tsv")
    data = {p.name: p.read_bytes() for p in out.glob("*.tar")}
    for i in range(23):
        start = int(manifest.offset[i])
        image = data[manifest.path[i]][start : start + int(manifest.bytes[i])]
        assert Image.open(io.BytesIO(image)).size == (manifest.width[i], manifest.height[i])
    assert (out / "classes.txt").read_text() == "ape\nbee\ncat\n"
    sizes = [len(data[name]) for name in sorted(data)]
    assert result["bytes"] == sum(sizes) and result["left_out"] == 0 and max(sizes) <= 12_000
    # the next image would not have fitted
    first = [m for m in shards.scan(str(out / "shard-000001.tar")) if m.name.startswith("0")][:3]
    assert sizes[0] + sum(512 + -(-m.size // 512) * 512 for m in first) > 12_000
    assert not (out / ".pack").exists() and json.loads((out / "pack.json").read_text())["complete"]


def test_the_folder_is_read_by_its_manifest_or_by_its_shards(packed, tmp_path, caplog):
    out, _ = packed
    by_manifest, by_shards = open_source(str(out)), open_source(str(out / "shard-*.tar"))
    assert by_manifest.headers is not None and by_shards.headers is None
    for source in (by_manifest, by_shards):
        assert source.shards.max() + 1 == len(list(out.glob("*.tar")))
    assert by_manifest.spans.tolist() == by_shards.spans.tolist()
    assert by_manifest.labels.tolist() == by_shards.labels.tolist()
    assert by_manifest.classes == by_shards.classes
    copy = shutil.copytree(out, tmp_path / "copy")
    assert open_source(str(copy)).fingerprint == by_manifest.fingerprint
    write_tar(copy / "more.tar", [("x.jpg", b"x"), ("x.cls", b"0")])
    with caplog.at_level(logging.WARNING):
        assert len(open_source(str(copy))) == 24
    assert "names other shards" in caplog.text


def test_dali_reads_the_shards(tree, packed):
    fn = pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed (extra: dali-cuda13)")
    from nvidia.dali import pipeline_def, types

    out, _ = packed
    shards = sorted(map(str, out.glob("*.tar")))

    @pipeline_def(batch_size=23, num_threads=1, device_id=None)
    def pipeline():
        images, labels, rows = fn.readers.webdataset(
            paths=shards,
            index_paths=[s.replace(".tar", ".idx") for s in shards],
            ext=["jpg", "cls", "idx"],
            dtypes=[types.UINT8, types.UINT8, types.INT64],
            missing_component_behavior="error",
        )
        return images, labels, rows

    pipe = pipeline()
    pipe.build()
    images, labels, rows = (list(map(np.array, out)) for out in pipe.run())
    back, source = open_source(str(out)), open_source(str(tree))
    assert [i.tobytes() for i in images] == [back.read(r) for r in range(23)]
    assert [int(v.tobytes()) for v in labels] == back.labels.tolist()
    assert back.labels.tolist() == source.labels[torch.tensor(np.concatenate(rows))].tolist()


# ---- one image ------------------------------------------------------------------------------------


def test_small_jpegs_keep_their_bytes(tmp_path):
    data = encoded(picture(0, 40, 50), quality=77)
    for size, side in ((40, "short"), (50, "long"), (0, "short")):
        assert pack_image(data, size, side, 90) == (data, "jpeg", 50, 40, 1)
    assert pack_image(data, 39, "short", 90)[2:] == (49, 39, 1)
    assert pack_image(data, 49, "long", 90)[2:] == (49, 39, 1)
    # very long images keep a pixel
    wide = encoded(picture(0, 2, 600))
    assert pack_image(wide, 100, "long", 90)[2:4] == (100, 1)
    assert pack_image(wide, 1, "short", 90)[2:4] == (300, 1)
    png = encoded(picture(0, 40, 50), "PNG")
    assert pack_image(png, 0, "short", 90) == (png, "png", 50, 40, 1)
    small = pack_image(png, 256, "short", 90)
    assert small.kind == "jpeg" and (small.width, small.height) == (50, 40)
    assert abs(decoded(small.data) - picture(0, 40, 50)).mean() < 12


def test_odd_images_are_packed_as_the_loaders_see_them(odd_images):
    good = sorted(odd_images.glob("ok_*"))
    assert len(good) > 10
    for path in good:
        for exif in (False, True):
            # larger than any: small JPEGs stay, the others are written at full size
            image = pack_image(path.read_bytes(), 10_000, "short", 100)
            wanted = np.asarray(load_image(str(path), exif)).astype(int)
            with Image.open(io.BytesIO(image.data)) as im:
                got = np.asarray((ImageOps.exif_transpose(im) if exif else im).convert("RGB")).astype(int)
            assert got.shape == wanted.shape, path.name
            # a dithered palette has colors that JPEG halves the resolution of
            assert abs(got - wanted).mean() < (20 if "palette" in path.name else 2), path.name


def test_broken_images_say_why(odd_images):
    bad = [p for p in sorted(odd_images.glob("bad_*")) if "flipped" not in p.name]
    assert len(bad) > 5
    for path in bad:
        reason = pack_image(path.read_bytes(), 256, "short", 90)
        assert isinstance(reason, str) and "0x" not in reason and "\n" not in reason, path.name


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_is_kept_for_training_to_follow_or_not(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a maker whose name nobody needs"
    image = pack_image(encoded(picture(1, 60, 90), exif=exif), 30, "short", 95)
    assert (image.width, image.height, image.orientation) == (45, 30, orientation)
    with Image.open(io.BytesIO(image.data)) as im:
        assert im.size == (45, 30) and dict(im.getexif()) == (
            {} if orientation == 1 else {0x0112: orientation}
        )


def test_gray_stays_gray_and_the_rest_becomes_rgb():
    rgb = picture(2, 40, 40)
    modes = {
        "L": encoded(rgb[..., 0], "PNG"),
        "I;16": encoded(rgb[..., 0].astype(np.uint16) * 257, "PNG"),
        "LA": encoded(rgb[..., :2], "PNG"),
        "RGBA": encoded(np.dstack([rgb, rgb[..., :1]]), "PNG"),
    }
    for mode, data in modes.items():
        image = pack_image(data, 20, "short", 95)
        with Image.open(io.BytesIO(image.data)) as im:
            assert im.mode == ("RGB" if mode == "RGBA" else "L")
        wanted = Image.fromarray(rgb[..., 0] if mode != "RGBA" else rgb).resize(
            (20, 20), Image.Resampling.BICUBIC
        )
        assert abs(decoded(image.data) - np.asarray(wanted.convert("RGB")).astype(int)).mean() < 9, mode
    assert pack_image(b"8BPS", 20, "short", 95).startswith("kind not read: psd")


# ---- equal bytes, however it goes -------------------------------------------------------------------


def test_bytes_depend_on_settings_alone(tree, packed, tmp_path):
    wanted = contents(packed[0])
    pack(str(tree), tmp_path / "b", **{**SMALL, "threads": 5}, seed=3)
    assert contents(tmp_path / "b") == wanted
    pack(str(tree), tmp_path / "c", **SMALL, seed=4)
    assert contents(tmp_path / "c")["shard-000000.tar"] != wanted["shard-000000.tar"]


class Stop(BaseException):
    """Ends a pack as a signal would."""


def stop_before(monkeypatch, count):
    """The `count`-th write to disk (of shard bytes or a small file) or renaming raises."""
    left = itertools.count(count, -1)

    def counted(real):
        def call(*args, **kw):
            if next(left) == 0:
                raise Stop
            return real(*args, **kw)

        return call

    for module in (pack_module, shard_writer, work):
        monkeypatch.setattr(module, "write_file", counted(files.write_file))
    monkeypatch.setattr(shard_writer.ShardWriter, "_write", counted(shard_writer.ShardWriter._write))
    monkeypatch.setattr(shard_writer.os, "fsync", counted(os.fsync))


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(tree, packed, tmp_path, monkeypatch):
    wanted, out = contents(packed[0]), tmp_path / "set"
    stops = 0
    for count in itertools.count(0, 6):
        with monkeypatch.context() as patch:
            stop_before(patch, count)
            try:
                pack(str(tree), out, **SMALL, seed=3)
                break
            except Stop:
                stops += 1
        # what has its final name is final
        for name, data in contents(out).items():
            if name.endswith(".tar") and "/" not in name:
                assert data == wanted[name]
        assert not list(out.glob(".pack/*.tar"))
    assert stops > 6 and contents(out) == wanted
    assert threading.active_count() < 20


# dies before the n-th write to a shard, or the n-th file comes into place
KILLED = """
import os, signal
from extrema_fast.tools import shard_writer
def dies(call):
    left = [{}]
    def counted(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args)
    return counted
{place} = dies({place})
"""


def test_killed_it_goes_on_to_the_same_bytes(tree, packed, tmp_path, run_cli):
    out = tmp_path / "set"
    command = ["pack", tree, out, "--size", 32, "--shard-mb", 0.012, "--seed", 3, "--no-measure"]
    # the settings; the index of the second shard; the third shard
    for place, number in (("os.replace", 1), ("os.replace", 6), ("shard_writer.ShardWriter._write", 40)):
        (code,), printed = run_cli(*command, setup=KILLED.format(number, place=place))
        assert code == -9, printed
        assert list(out.glob(".tmp-*")) or list(out.glob(".pack/*.tar"))
    assert list(out.glob("*.tar"))
    (code,), printed = run_cli(*command)
    assert code == 0 and "goes on after" in printed
    assert contents(out) == contents(packed[0])


def test_a_finished_shard_that_was_cut_is_made_again(tree, packed, tmp_path, monkeypatch):
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        stop_before(patch, 60)
        with pytest.raises(Stop):
            pack(str(tree), out, **SMALL, seed=3)
    first = out / "shard-000000.tar"
    first.write_bytes(first.read_bytes()[:-512])
    pack(str(tree), out, **SMALL, seed=3)
    assert contents(out) == contents(packed[0])


def test_finished_it_does_nothing(tree, packed, monkeypatch):
    out, result = packed
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    monkeypatch.setattr(pack_module, "pack_image", None)
    again = pack(str(tree), out, **SMALL, seed=3)
    assert again == {**result, "finished_before": True} and "was finished already" in describe(again)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before


# ---- refusals and trouble --------------------------------------------------------------------------


def fails(pattern, *args, error=UsageError, **kw):
    with pytest.raises(error, match=pattern) as caught:
        pack(*map(str, args), **{**SMALL, **kw})
    assert "\n" not in str(caught.value)


def test_other_settings_or_images_are_refused(tree, tmp_path, monkeypatch):
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        stop_before(patch, 20)
        with pytest.raises(Stop):
            pack(str(tree), out, **SMALL)
    before = contents(out)
    fails(r"\(unfinished\) that differs: quality: 90 -> 80; .*--force", tree, out, quality=80)
    changed = {"size": 48, "side": "long", "seed": 1}
    fails("differs: size: 32 -> 48; side: short -> long; seed: 0 -> 1;", tree, out, **changed)
    image = tmp_path / "few" / "a" / "1.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(encoded(picture(0, 9, 9), "PNG"))
    fails(r"differs: images: 23 -> 1; the images \(names, sizes or labels\)", tmp_path / "few", out)
    assert contents(out) == before
    pack(str(tmp_path / "few"), out, **SMALL, force=True)
    assert len(open_source(str(out))) == 1 and (tmp_path / "set.before" / "pack.json").exists()
    fails("differs: quality: 90 -> 80", tmp_path / "few", out, quality=80)
    pack(str(tmp_path / "few"), out, **{**SMALL, "quality": 80}, force=True)
    assert (tmp_path / "set.before2" / "pack.json").exists()


def test_images_that_were_overwritten_by_others_of_their_size_are_refused(tmp_path, monkeypatch, caplog):
    for i in range(30):
        np.save(tmp_path / f"{i:02d}.npy", np.full((24, 20, 5), i, np.uint8))
    done, begun = tmp_path / "done", tmp_path / "begun"
    pack(str(tmp_path), done, **SMALL)
    with monkeypatch.context() as patch:
        stop_before(patch, 20)
        with pytest.raises(Stop):
            pack(str(tmp_path), begun, **SMALL)
    with caplog.at_level("INFO"):
        assert pack(str(tmp_path), done, **SMALL)["finished_before"]
    assert "names, sizes and labels of images, and the bytes of 30 images; nothing to pack" in caplog.text
    np.save(tmp_path / "07.npy", np.full((24, 20, 5), 99, np.uint8))
    words = r"differs: the bytes of 1 of 30 images that were compared, first: .*07\.npy;"
    fails(rf"\(finished\) that {words}", tmp_path, done)
    fails(rf"\(unfinished\) that {words}", tmp_path, begun)
    # an older version compared no bytes
    about = json.loads((done / "pack.json").read_text())
    del about["sample"]
    (done / "pack.json").write_text(json.dumps(about))
    assert pack(str(tmp_path), done, **SMALL)["finished_before"]


def test_other_folders_are_left_alone(tree, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    fails(r"mine: holds other files; .*--force to move them to mine\.before", tree, tmp_path / "mine")
    fails(r"thesis\.txt: is a file", tree, tmp_path / "mine/thesis.txt")
    fails("cannot be written", tree, tmp_path / "mine/thesis.txt/set", error=(StorageError, UsageError))
    pack(str(tree), tmp_path / "mine", **SMALL, force=True)
    assert (tmp_path / "mine.before/thesis.txt").read_text() == "x"
    for source_folder in (tree, tree.parent):
        fails("the images are in there", tree, source_folder, force=True)
    assert len(open_source(str(tree))) == 23


def test_one_process_at_a_time_and_a_finished_set_with_a_file_gone(tree, tmp_path):
    out = tmp_path / "set"
    with work.Work(out / ".pack").locked("here"):
        fails(f"{out}: another job is running here", tree, out)
    assert pack(str(tree), out, **SMALL)["images"] == 23
    (out / "shard-000001.idx").unlink()
    fails(r"1 of its files are gone or changed, first: shard-000001\.idx; --force", tree, out)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"size": -1}, "--size: .*got -1"),
        ({"side": "wide"}, "--side: .*got 'wide'"),
        ({"quality": 101}, "--quality: .*got 101"),
        ({"shard_mb": float("nan")}, "--shard-mb: "),
        ({"seed": -1}, "--seed: "),
        ({"threads": -1}, "--threads: "),
        ({"max_bad": 2}, "--max-bad: .*got 2"),
    ],
)
def test_bad_settings(tree, tmp_path, option, words):
    fails(words, tree, tmp_path / "set", **option)
    assert not (tmp_path / "set").exists()


def test_without_pillow(tree, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    fails("pack needs Pillow", tree, tmp_path / "set")


def test_a_mixture_with_parts_is_refused(tree, tmp_path):
    (tmp_path / "m.toml").write_text(f"[[source]]\npath = '{tree}'\npasses = 0.5\n")
    fails("a mixture with parts of an epoch", tmp_path / "m.toml", tmp_path / "set")


def test_no_space_keeps_what_is_finished(tree, packed, tmp_path, monkeypatch):
    out, real, written = tmp_path / "set", shard_writer.ShardWriter._write, [0]

    def write(self, data):
        written[0] += len(data)
        if written[0] > 30_000:
            raise OSError(errno.ENOSPC, "No space left")
        real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.ShardWriter, "_write", write)
        fails("3 finished shards stay.*once there is space", tree, out, seed=3, error=StorageError)
    assert len(list(out.glob("*.tar"))) == 3 and not list(out.glob(".pack/*.tar"))
    pack(str(tree), out, **SMALL, seed=3)
    assert contents(out) == contents(packed[0])


def test_a_real_limit_on_file_size(tree, tmp_path, run_cli):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    (code,), printed = run_cli("pack", tree, tmp_path / "set", "--size", 32, "--quiet", setup=limit)
    assert code == 5 and "cannot be written (File too large); 0 finished shards stay" in printed
    assert printed.count("\n") == 1


@pytest.fixture
def some_bad(tmp_path):
    """12 images of which rows 3 and 7 are broken."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for i in range(12):
        data = encoded(picture(i, 40, 40))
        (folder / f"{i:02d}.jpg").write_bytes(data if i not in (3, 7) else data[: len(data) // 2])
    return folder


def test_bad_images_are_left_out_and_listed(some_bad, tmp_path):
    out = tmp_path / "set"
    last = r"2 of 12 images cannot be packed, more .* allows, last: .*0[37]\.jpg \((damaged|broken header): "
    fails(last, some_bad, out, error=DataError)
    # with a larger budget it goes on
    result = pack(str(some_bad), out, **SMALL, max_bad=0.2)
    assert result["images"] == 10 and result["left_out"] == 2
    assert f"left out, since unreadable: 2 images, listed in {out}/left_out.tsv" in describe(result)
    lines = [line.split("\t") for line in (out / "left_out.tsv").read_text().splitlines()]
    assert lines[0] == ["row", "image", "reason"]
    assert {(int(r), n) for r, n, _ in lines[1:]} == {(i, str(some_bad / f"{i:02d}.jpg")) for i in (3, 7)}
    assert len(open_source(str(out))) == 10 and open_source(str(out)).labels is None
    assert not (out / "classes.txt").exists()
    pack(str(some_bad), tmp_path / "once", **SMALL, max_bad=0.2)
    assert contents(out) == contents(tmp_path / "once")


def test_nothing_but_bad_images(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/1.jpg").write_bytes(b"hello")
    words = r"none of its 1 images can be packed, first: .*1\.jpg \(not an image"
    fails(words, tmp_path / "bad", tmp_path / "set", error=DataError)


def test_an_image_that_vanishes_is_left_out(some_bad, tmp_path, monkeypatch):
    for i in (3, 7):
        (some_bad / f"{i:02d}.jpg").unlink()
    real = pack_module.open_source

    def open_and_remove(spec):
        source = real(spec)
        (some_bad / "05.jpg").unlink()
        return source

    monkeypatch.setattr(pack_module, "open_source", open_and_remove)
    assert pack(str(some_bad), tmp_path / "set", **SMALL)["left_out"] == 1
    assert "cannot be read: No such file" in (tmp_path / "set/left_out.tsv").read_text()


def test_sources_of_every_kind_are_packed(tree, packed, tmp_path):
    again = pack(str(packed[0]), tmp_path / "again", **{**QUIET, "size": 0}, seed=1)
    assert again["images"] == 23 and again["shards"] == 1
    first, second = open_source(str(packed[0])), open_source(str(tmp_path / "again"))
    hashes = [sorted(hashlib.sha256(s.read(r)).digest() for r in range(23)) for s in (first, second)]
    assert hashes[0] == hashes[1] and second.classes == first.classes


def test_command(tree, tmp_path, capsys):
    out = str(tmp_path / "set")
    assert cli.main(["pack", str(tree), out, "--size", "32", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    assert f"{out}: 23 images in 1 shard," in printed.out and "kB/image" in printed.out
    assert "images/s, decode and crop to 224, measured now over" in printed.out
    assert f"(extrema-fast index {tree}" in printed.err
    assert cli.main(["pack", str(tree), out, "--size", "32", "--json", "--no-measure", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["finished_before"] is True
    assert cli.main(["pack", str(tree), out, "--size", "33"]) == 2
    assert "differs: size: 32 -> 33" in capsys.readouterr().err
