"""`extrema-fast index`: verdicts, odd names, resuming, refusals, and a run that trains on the result.

Covers: every odd image with and without nvImageCodec; class trees, list files, tar shards, manifests as data; files
that are gone, empty, links to themselves, pipes, kinds that no loader reads, too large; what is decoded again
and what is not; stopped, killed, no space left, a decoder that crashes; existing files in --out.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import tarfile
import zlib
from pathlib import Path

import pytest

from extrema_fast.data.manifest import is_manifest, manifest_source, read_manifest
from extrema_fast.data.sources import open_source
from extrema_fast.errors import DataError, Preempted, StorageError, UsageError
from extrema_fast.tools.index import describe, index
from extrema_fast.tools.verify import BATCH
from extrema_fast.tools.work import Work
from tests.data.conftest import picture

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")

OK = 16  # of the odd images


def save(path, height=19, width=39, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, height, width)).save(path, **options)
    return path


def run(data, out, **kw):
    return index(str(data), out, **{"threads": 1, "progress": False, **kw})


def statuses(out):
    table = read_manifest(out)
    return dict(zip(table.path, table.status, strict=True))


@pytest.fixture
def images(tmp_path):
    """Three classes, 40 JPEG and PNG files: three batches."""
    for n in range(40):
        save(tmp_path / "images" / "abc"[n % 3] / f"{n:02d}.{'png' if n % 2 else 'jpg'}", 5 + n, 7 + n, n)
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "m.tsv"


@pytest.fixture(params=["nvimagecodec", "pillow"])
def decoder(request, monkeypatch, tmp_path_factory):
    """Each test that names it runs with both decoders."""
    if request.param == "nvimagecodec":
        pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed (comes with DALI)")
        return "nvImageCodec"
    without(monkeypatch, tmp_path_factory.mktemp("stubs"), "nvidia")
    return "Pillow"


def without(monkeypatch, folder, package):
    """Processes started from now on cannot import a package."""
    (folder / f"{package}.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(folder)


# ---- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_odd_images(odd_images, out, decoder, strict):
    result = run(odd_images, out, strict=strict)
    assert result.decoder.startswith(decoder) and ("Pillow" in result.decoder) == (
        strict or decoder == "Pillow"
    )
    found = statuses(out)
    assert {n for n, s in found.items() if s == "ok"} == {n for n in found if n.startswith("ok_")}
    assert (result.rows, result.good, result.fresh) == (len(found), OK, len(found))
    expected = {
        "bad_zero_bytes.jpg": "empty: 0 bytes",
        "bad_header_only.jpg": "broken header",
        "bad_text.jpg": "not an image: begins with 'this is not an i'",
        "bad_random_bytes.jpg": "not an image: begins with bytes 5f82",
        "bad_truncated.png": "damaged: no end of image: the file is cut",
        "bad_truncated_half.jpg": "cannot be decoded: ",
        # flipped bits of others may pass
        "bad_flipped_bits.jpg": "damaged: " if decoder == "nvImageCodec" else "cannot be decoded: ",
    }
    assert {n: found[n][: len(words)] for n, words in expected.items()} == expected
    assert ("not checked without DALI" in describe(result)) == (decoder == "Pillow")
    table = read_manifest(out)
    for row in table.good().tolist():
        data = (odd_images / table.path[row]).read_bytes()
        im = Image.open(io.BytesIO(data))
        assert (table.width[row], table.height[row]) == im.size
        assert table.orientation[row] == im.getexif().get(0x0112, 1)
        assert (table.bytes[row], table.crc32[row]) == (len(data), zlib.crc32(data))
        assert table.kind[row].split()[0] == im.format.lower().replace("ppm", "pnm")
    assert table.orientation.max() == 6


def test_a_tree_trains_like_its_folder(tree, out):
    result = run(tree, out)
    assert (result.good, result.troubles, result.bare) == (23, [], [])
    folder, table = open_source(str(tree)), open_source(str(out))
    assert table.paths == folder.paths and table.classes == folder.classes
    assert table.labels.tolist() == folder.labels.tolist()
    for path, header in zip(table.paths, table.headers.tolist(), strict=True):
        assert (header[1], header[0]) == Image.open(path).size


def test_everything_that_is_no_image(tmp_path, out):
    root = tmp_path / "d"
    names = [b"t\tab.png", b"n\nl.png", b"\xff\xfe.png", "ünï.png".encode(), b"back\\slash.png", b" .jpg"]
    for name in names:
        save(root / "a" / os.fsdecode(name))
    (root / "b").mkdir()
    save(root / "b/a.ico")
    (root / "b/b.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(30))
    (root / "b/c.jpg").symlink_to("c.jpg")
    (root / "b/d.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "b/e.jpg")
    (root / "b/f.png").touch()
    (root / "b/g.jpg").write_bytes(b"GIF89a in disguise")
    (root / "b/up").symlink_to(root)
    result = run(root, out)
    assert result.good == 6 and result.bare == ["b"]
    found = statuses(out)
    assert {os.path.basename(n): s for n, s in found.items() if s != "ok"} == {
        "a.ico": "kind not read: ico; convert it to JPEG or PNG",
        "b.heic": "kind not read: heic; convert it to JPEG or PNG",
        "c.jpg": "cannot be read: Too many levels of symbolic links",
        "d.jpg": "cannot be read: gone",
        "e.jpg": "cannot be read: not a plain file",
        "f.png": "empty: 0 bytes",
        "g.jpg": "broken header: not recognized",
    }
    source = manifest_source(out)
    assert sorted(os.fsencode(os.path.basename(p)) for p in source.paths) == sorted(names)
    assert all(source.read(row) for row in range(6))
    text = describe(result)
    assert "6 of 13 images are good, 7 are not:" in text and "no good image in 1 classes, first: b" in text
    assert "\n       2  kind not read   " in text and "\n       3  cannot be read  " in text
    text.encode()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_without_permission(tmp_path, out):
    save(tmp_path / "d/a/1.png")
    save(tmp_path / "d/b/2.png").chmod(0)
    assert run(tmp_path / "d", out).good == 1
    assert statuses(out)["b/2.png"] == "cannot be read: Permission denied"
    (tmp_path / "d/b").chmod(0)
    try:
        with pytest.raises(UsageError, match=r"d/b: cannot be read \(Permission denied\)"):
            run(tmp_path / "d", out)
    finally:
        (tmp_path / "d/b").chmod(0o755)


def too_large(path, width, height):
    """A JPEG whose frame says it is larger than it is: decoding it would take long, and fail."""
    data = bytearray(save(path).read_bytes())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    path.write_bytes(data)


def test_the_pixel_limit(tmp_path, out):
    too_large(tmp_path / "d/large.jpg", 20_000, 20_000)
    save(tmp_path / "d/edge.png", 10, 30)
    save(tmp_path / "d/small.png", 9, 33)
    run(tmp_path / "d", out)
    edge, large, small = statuses(out).values()
    assert edge == small == "ok" and large.startswith(
        "too large: 20000 x 20000 = 400000000 pixels, the limit is "
    )
    assert run(tmp_path / "d", out).fresh == 0
    assert manifest_source(out).headers.tolist() == [[10, 30, 1], [9, 33, 1]]
    # another limit: only what it changes is decoded again
    result = run(tmp_path / "d", out, max_pixels=299)
    assert result.fresh == 2 and [s[:9] for s in statuses(out).values()] == ["too large", "too large", "ok"]
    result = run(tmp_path / "d", out, max_pixels=300)
    assert result.fresh == 2 and statuses(out)["edge.png"] == "ok"


def test_list_file_with_windows_line_ends(tmp_path, out):
    one, two = save(tmp_path / "x/1.png"), save(tmp_path / "y/2.png")
    listing = tmp_path / "lists" / "list.txt"
    listing.parent.mkdir()
    listing.write_bytes(f"../x/1.png\tu\r\n{two}\tv\r\n../x/gone.png\tv\r\n".encode())
    result = run(listing, out)
    assert (result.good, result.rows) == (2, 3) and list(statuses(out).values())[2] == "cannot be read: gone"
    source = manifest_source(out)
    assert [os.path.realpath(p) for p in source.paths] == [str(one), str(two)]
    assert source.classes == ["u", "v"] and source.labels.tolist() == [0, 1]
    # labels are those of today, though nothing is decoded
    listing.write_bytes(f"../x/1.png\tv\r\n{two}\tu\r\n".encode())
    assert run(listing, out).fresh == 0 and manifest_source(out).labels.tolist() == [1, 0]


def test_shards(tmp_path, out, images):
    files = sorted(images.rglob("*.*"))[:5]
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for number, path in enumerate(files):
            data = path.read_bytes()
            # one is cut
            data = data[: len(data) // 2] if number == 3 else data
            for name, content in (
                (f"k/{number}{path.suffix}", data),
                (f"k/{number}.cls", b"%d" % (number % 2)),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    result = run(tmp_path / "s.tar", out)
    assert result.good == 4 and [t.title for t in result.troubles] == [
        f"{tmp_path}/s.tar:k/3{files[3].suffix}"
    ]
    shards, table = open_source(str(tmp_path / "s.tar")), manifest_source(out)
    assert [table.read(n) for n in range(4)] == [shards.read(n) for n in (0, 1, 2, 4)]
    assert table.labels.tolist() == [0, 1, 0, 0] and table.shards.tolist() == [0] * 4
    assert [table.title(n) for n in range(4)] == [shards.title(n) for n in (0, 1, 2, 4)]
    assert run(tmp_path / "s.tar", out).fresh == 0
    # one file holds them all: when it changes, all are decoded
    os.utime(tmp_path / "s.tar", ns=(1, 1))
    assert run(tmp_path / "s.tar", out).fresh == 5


def test_a_manifest_checked_again(tmp_path, images, out):
    run(images, out)
    victim = images / "a/00.jpg"
    data = victim.read_bytes()
    # the same size and a good image: only the checksum knows
    other = data.replace(b"JFIF\x00\x01\x01", b"JFIF\x00\x01\x02")
    assert len(other) == len(data) and other != data
    victim.write_bytes(other)
    (images / "b/01.png").unlink()
    again = tmp_path / "again.tsv"
    result = run(out, again)
    found = {n: s for n, s in statuses(again).items() if s != "ok"}
    assert result.rows == 40 and sorted(found) == ["a/00.jpg", "b/01.png"]
    crcs = f"its crc32 is {zlib.crc32(other):08x}, m.tsv has {zlib.crc32(data):08x}"
    assert (found["a/00.jpg"], found["b/01.png"]) == (f"changed: {crcs}", "cannot be read: gone")


# ---- again and again ------------------------------------------------------------------------------


def test_only_changed_files_are_decoded_again(images, out, caplog):
    first = run(images, out)
    assert (first.rows, first.fresh) == (40, 40)
    before = out.read_bytes()
    caplog.set_level("INFO", logger="extrema_fast")
    again = run(images, out)
    assert again.fresh == 0 and "complete, and no file has changed since" in caplog.text
    assert out.read_bytes() == before and "images/s" not in describe(again)
    os.utime(images / "a/00.jpg", ns=(10**18, 10**18))
    (images / "c/05.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (images / "c/08.jpg").unlink()
    save(images / "d/new.png")
    result = run(images, out)
    assert (result.rows, result.fresh, result.good) == (40, 3, 39)
    table = read_manifest(out)
    assert table.classes == ["a", "b", "c", "d"] and "c/08.jpg" not in table.path
    assert statuses(out)["c/05.png"].startswith("broken header")
    (images / "a").rename(images / "z")
    assert run(images, out).fresh == 14
    (images / "0").mkdir()
    assert run(images, out).fresh == 0
    assert read_manifest(out).classes == ["0", "b", "c", "d", "z"]
    assert os.path.dirname(manifest_source(out).paths[0]) == str(images / "b")
    # what could not be read is tried again
    (images / "z/99.jpg").symlink_to(images / "later.txt")
    assert run(images, out).good == 39
    shutil.copy(images / "z/00.jpg", images / "later.txt")
    result = run(images, out)
    assert (result.fresh, result.good) == (1, 40)
    # a closer check is another one, a coarser one is not
    assert run(images, out, strict=True).fresh == 41 and run(images, out).fresh == 0
    assert run(images, out, force=True).fresh == 41


def test_a_built_in_set(tmp_path, out, monkeypatch):
    """Not the folder of its name, here as elsewhere."""
    save(tmp_path / "synthetic/1.png")
    monkeypatch.chdir(tmp_path)
    assert run("synthetic", out).good == len(open_source("synthetic"))
    assert not manifest_source(out).paths[0].startswith(str(tmp_path))
    assert read_manifest(out).path[0][0] != "/" and run("synthetic", out).fresh == 0


# every batch is kept, and the process dies as it keeps the third one, or just after
DIE = """
import os, extrema_fast.tools.index as index
index.KEEP_SECONDS, real = 0, index.Work.finish
def finish(self, number, record):
    if number == 2 and not {late}: os.kill(os.getpid(), 9)
    real(self, number, record)
    if number == 2: os.kill(os.getpid(), 9)
index.Work.finish = finish
"""


@pytest.mark.parametrize(("late", "known"), [(False, 32), (True, 40)])
def test_killed_and_continued(images, out, tmp_path, run_cli, late, known):
    run(images, tmp_path / "whole.tsv")
    args = ["index", images, "--out", out, "--threads", "2"]
    codes, _ = run_cli(*args, setup=DIE.format(late=late))
    assert codes == [-signal.SIGKILL] and not out.exists()
    # as of a death while the manifest was written; another's is not touched
    torn, other = (out.with_name(f".tmp-{name}-99999999") for name in (out.name, "other.tsv"))
    torn.touch()
    other.touch()
    codes, text = run_cli(*args)
    assert not torn.exists() and other.exists()
    assert codes == [0] and (f"decoded {40 - known} images" in text) == (known < 40)
    assert ("32 of 40 images are known" in text) == (known < 40)
    assert out.read_bytes() == (tmp_path / "whole.tsv").read_bytes() and not Path(f"{out}.part").exists()


def test_ctrl_c_keeps_what_is_done(images, out, monkeypatch):
    def interrupt(self, done, note=""):
        if done == 2 * BATCH:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("extrema_fast.tools.index.ImageProgress.reached", interrupt)
        # in Python as in other functions, so that no `except Exception` goes on after Ctrl-C
        with pytest.raises(KeyboardInterrupt):
            run(images, out)
    assert not out.exists() and run(images, out).fresh == 8


def test_damaged_and_changed_records_are_decoded_again(images, out, tmp_path, monkeypatch):
    run(images, out)
    whole = out.read_bytes()
    lines = whole.decode().splitlines(True)
    out.unlink()
    work = Work(tmp_path / "m.tsv.part")
    for number, rows in enumerate((lines[2:12], lines[12:22], [line[:-9] for line in lines[22:32]])):
        work.finish(number, {"lines": lines[:2] + rows})
    (work.folder / "000001.json").write_text('{"lines": [')
    os.utime(images / "a/00.jpg", ns=(10**18, 10**18))
    result = run(images, out)
    # rows of the damaged record, of the damaged lines, none of any record, and one changed file
    assert (result.fresh, result.good) == (10 + 10 + 10 + 1, 40)
    assert not work.folder.exists() and read_manifest(out).path == [line.split("\t")[0] for line in lines[2:]]


def test_no_space_left(images, out, tmp_path, run_cli):
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
    small += "import extrema_fast.tools.index as index; index.KEEP_SECONDS = 0"
    args = ["index", images, "--out", out, "--threads", "1"]
    codes, text = run_cli(*args, setup=small)
    assert codes == [StorageError.exit_code] and not out.exists()
    assert f"{out}.part: cannot be written (File too large); what it holds is kept, and the same" in text
    codes, text = run_cli(*args)
    assert codes == [0] and len(manifest_source(out)) == 40


def test_no_space_left_for_the_manifest(images, out, tmp_path, monkeypatch):
    calls = []

    def full(fd):
        calls.append(fd)
        # the record of all rows is on disk
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("extrema_fast.files.os.fsync", full)
        with pytest.raises(StorageError, match=r"m\.tsv: cannot be written .* kept in .*m\.tsv\.part"):
            run(images, out)
    assert not out.exists()
    assert run(images, out).fresh == 0 and len(manifest_source(out)) == 40


CRASHING = """
import os
__version__ = "0"
Backend = DecodeParams = lambda *a, **k: None
CPU_ONLY = NVIMGCODEC_DEVICE_CPU_ONLY = None
class ColorSpec: SRGB = None
class Decoder:
    def __init__(self, *a, **k): pass
    def decode(self, streams, params): return os.kill(os.getpid(), 11) if b"crash" in streams[0] else [1]
def CodeStream(data): return data
"""


def test_a_decoder_that_crashes(images, out, tmp_path, monkeypatch):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", "crash")
    save(images / "b/07.png", pnginfo=info)
    (tmp_path / "stubs/nvidia").mkdir(parents=True)
    (tmp_path / "stubs/nvidia/__init__.py").touch()
    (tmp_path / "stubs/nvidia/nvimgcodec.py").write_text(CRASHING)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "stubs")
        result = run(images, out, threads=2)
    assert result.good == 39 and statuses(out)["b/07.png"] == "crashes the decoder: its process died"
    # perhaps the memory was short
    result = run(images, out)
    assert (result.fresh, result.good) == (1, 40)


# ---- refusals -------------------------------------------------------------------------------------


def refused(data, out, words, error=UsageError, **kw):
    before = out.read_bytes() if out.is_file() else None
    with pytest.raises(error, match=words) as caught:
        run(data, out, **kw)
    assert "\n" not in str(caught.value)
    assert before is None or out.read_bytes() == before


def test_other_files_in_out(images, out, tmp_path):
    refused(images, tmp_path, "is a folder")
    refused(images, images / "a/00.jpg", "is the name of an image or shard", force=True)
    (tmp_path / "file").touch()
    refused(images, tmp_path / "file/m.tsv", "its folder cannot be made", StorageError)
    out.write_text("my notes\n")
    refused(images, out, r"m\.tsv: exists and is no manifest")
    assert run(images, out, force=True).good == 40
    save(tmp_path / "other/1.png")
    refused(tmp_path / "other", out, r"m\.tsv is of .*/images, not of .*/other")
    assert run(tmp_path / "other", out, force=True).rows == 1
    out.write_text(out.read_text().replace('"data": ', '"from": '))
    refused(tmp_path / "other", out, "m.tsv is of other images")
    run(images, tmp_path / "new/folder/m.tsv")
    assert is_manifest(tmp_path / "new/folder/m.tsv")


def test_another_thing_where_finished_work_goes(images, out, tmp_path):
    part = tmp_path / "m.tsv.part"
    part.write_text("half a download")
    refused(images, out, r"finished work goes to .*m\.tsv\.part, which is something else")
    assert part.read_text() == "half a download" and run(images, out, force=True).good == 40
    part.mkdir()
    (part / "notes").touch()
    for force in (False, True):
        refused(images, out, "which is something else", force=force)
    (part / "notes").unlink()
    with Work(part).locked("here"):
        refused(images, out, f"--out {out}: another job is running here")


def test_wrong_arguments(images, out, tmp_path):
    refused(images, out, "--threads: expected 1 or more, got 0", threads=0)
    refused(images, out, "--max-pixels: expected 1 or more, got 0", max_pixels=0)
    refused(tmp_path / "gone", out, "gone: does not exist")
    (tmp_path / "mixture.toml").write_text('[[source]]\npath = "images"\n')
    refused(tmp_path / "mixture.toml", out, "is a mixture")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", out, "no images")
    (tmp_path / "empty/1.png").touch()
    refused(tmp_path / "empty", out, "none of the 1 images is good, first: .*1.png", DataError)
    assert statuses(out) == {"1.png": "empty: 0 bytes"}
    run(images, out, force=True)
    refused(out, out, "is what is to be indexed", force=True)
    listing = tmp_path / "list.txt"
    listing.write_text("images/a/00.jpg\n")
    refused(listing, listing, "is what is to be indexed", force=True)


def test_without_pillow(images, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(images, out, "needs Pillow: pip install")


# ---- the command ----------------------------------------------------------------------------------


def test_the_command(images, out, run_cli):
    (images / "a/bad.jpg").write_text("no image")
    codes, text = run_cli("index", images, "--out", out, "--threads", "1", "--strict", "--max-pixels", "1000")
    assert codes == [0], text
    assert "too large" in text and "not an image" in text and "images/s" in text
    assert f"extrema-fast pretrain {out}" in text
    codes, text = run_cli("index", images, "--out", out, "--max-pixels", "1000", "--json", "--quiet")
    result = json.loads(text)
    assert codes == [0] and (result["rows"], result["fresh"]) == (41, 0)
    assert result["troubles"][1]["count"] == 1
    codes, text = run_cli("index", images)
    assert codes == [2] and "--out" in text
    codes, text = run_cli("index", images, "--out", out, "--thread", "1")
    assert codes == [2] and "unknown option --thread; did you mean --threads?" in text
    stop = (
        "import extrema_fast.tools.index as index\n"
        "def stop(self, *a, **k):\n"
        "    if self.what == 'decoding': raise KeyboardInterrupt\n"
        "index.ImageProgress.reached = stop\n"
    )
    codes, text = run_cli("index", images, "--out", f"{out}2", "--threads", "1", setup=stop)
    assert codes == [Preempted.exit_code] and f"to continue: extrema-fast index {images} --out {out}2" in text


def test_a_run_reads_the_manifest(images, out, tmp_path, run_cli):
    for n in range(3):
        (images / f"a/broken{n}.jpg").write_bytes(b"\xff\xd8\xff nothing")
    run(images, out)
    args = ["pretrain", "smoke", "--data.train", out, "--data.test", "", "--out", tmp_path / "run"]
    options = ["--train.epochs", "1", "--train.batch-size", "8", "--data.loader", "pil"]
    codes, text = run_cli(*args, *options)
    assert codes == [0], text
    assert f"{out}: 40 images in 3 classes (a, b, c), 1 epoch of 5 steps" in text
    # half of it each epoch: what is said of an epoch is what comes in it
    mixture = tmp_path / "mixture.toml"
    mixture.write_text(f'[[source]]\npath = "{out}"\npasses = 0.5\n')
    args[3], args[7] = mixture, tmp_path / "mixed"
    codes, text = run_cli(*args, *options, "--data.limit", "0")
    assert codes == [0] and f"{mixture}: 20 images in 3 classes (a, b, c), 1 epoch of 2 steps" in text, text
