"""Features of image sets: what `embed` writes, how it goes on, what it refuses.

Covers: class token, mean and patch tokens, raw and normed, equal to `Encoder.encode` in every file format and
type; rows.tsv, labels, odd file names; parts and batches; a share of the patches keyed by image; killed after
every kind of write and continued to the same bytes without computing a part again; two processes, the same
bytes; broken images listed and left out, or an error with --strict; none left; a full disk; damaged parts; a
second job; other settings, weights or images, foreign folders; diverged weights, numbers beyond fp16; memory
holds a few parts only; the command line.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import extrema_fast
from extrema_fast.config import DataConfig
from extrema_fast.data.augment import normalize
from extrema_fast.data.loader import EvalLoader
from extrema_fast.data.sources import open_source
from extrema_fast.errors import DataError, NonFiniteError, StorageError, UsageError
from extrema_fast.tools.embed import describe, embed
from extrema_fast.tools.embeddings import load_embeddings
from extrema_fast.tools.work import Work
from extrema_fast.weights.load import load_encoder
from tests.tools.conftest import SMALL

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")


SIZES = ["--batch-size", 3, "--part-images", 6, "--loader", "pil"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def expected(weights: Path, images: Path, which="teacher", norm=True):
    encoder = load_encoder(weights, which)
    loader = EvalLoader(open_source(str(images)), DataConfig(loader="pil"), encoder.img_size, batch_size=64)
    pixels = torch.cat([x for x, _ in loader])
    with torch.no_grad():
        return encoder.encode(normalize(pixels, encoder.mean, encoder.std), norm=norm)


def test_images_of_exactly_the_size(tmp_path, weights):
    """As `preprocess` makes them; whole with crop_pct 1, and where an older version began."""
    (tmp_path / "images").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    images, encoder = str(tmp_path / "images"), load_encoder(weights)
    got = {
        c: embed(images, tmp_path / f"f{c}", weights, crop_pct=c, **SMALL).features()
        for c in (None, 0.875, 1)
    }
    for crop_pct, features in got.items():
        transform = encoder.preprocess(crop_pct=crop_pct)
        x = torch.stack([transform(Image.open(p)) for p in open_source(images).paths])
        with torch.no_grad():
            torch.testing.assert_close(features, encoder(x), rtol=0, atol=0.05)
    assert torch.equal(got[None], got[0.875]) and not torch.allclose(got[None], got[1], atol=0.05)
    with pytest.raises(UsageError, match="crop_pct"):
        embed(images, tmp_path / "fNone", weights, crop_pct=1, **SMALL)
    config = json.loads((tmp_path / "f1" / "config.json").read_text())
    for name in ("crop_pct", "interpolation", "range"):
        del config["settings"][name]
    (tmp_path / "f1" / "config.json").write_text(json.dumps(config))
    (tmp_path / "f1" / "features" / "00000.npy").unlink()
    assert torch.equal(embed(images, tmp_path / "f1", weights, **SMALL).features(), got[1])


# ---- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_format", "tokens", "norm", "which"),
    [
        ("npy", "class", True, "teacher"),
        ("npy", "patch", True, "teacher"),
        ("safetensors", "mean", False, "student"),
        ("parquet", "patch", True, "teacher"),
    ],
)
def test_features_are_the_encoders(tmp_path, weights, images, file_format, tokens, norm, which):
    if file_format == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra: parquet)")
    options = dict(tokens=tokens, norm=norm, which=which, format=file_format)
    got = embed(str(images), tmp_path / "f", weights, **options, **SMALL)
    out = expected(weights, images, which, norm)
    want = {"class": out.cls, "mean": out.patches.mean(1), "patch": out.patches}[tokens]
    assert got.shape == want.shape[1:] and len(got) == 19 and got.broken == 0
    torch.testing.assert_close(got.features(), want, rtol=1e-5, atol=1e-6)
    assert want.std(0).min() > 1e-3
    # each format is readable without this project
    part = tmp_path / "f" / "features" / f"00001.{file_format}"
    if file_format == "npy":
        alone = torch.from_numpy(np.load(part))
    elif file_format == "safetensors":
        alone = load_file(part)["features"]
        assert load_file(part)["rows"].tolist() == list(range(6, 12))
    else:
        import pyarrow.parquet as pq

        table = pq.read_table(tmp_path / "f" / "features")
        assert table["row"].to_pylist() == list(range(19))
        assert table["path"].to_pylist() == open_source(str(images)).paths
        assert table["label"].to_pylist() == ["ape"] * 10 + ["bee"] * 9
        alone = torch.tensor(pq.read_table(part)["features"].to_pylist()).reshape(6, *got.shape)
    assert torch.equal(alone, got.features()[6:12])


def test_rows_say_which_image_is_where(tmp_path, weights, images):
    got = embed(str(images), tmp_path / "f", weights, **SMALL)
    source = open_source(str(images))
    lines = (tmp_path / "f" / "rows.tsv").read_text().splitlines()
    assert lines[0] == "row\tpath\tlabel" and lines[11] == f"10\t{source.paths[10]}\tbee"
    assert [tuple(r) for r in got.rows()] == [
        (i, p, source.classes[source.labels[i]]) for i, p in enumerate(source.paths)
    ]
    assert "19 images\nclass token of the teacher, [16] fp32 each, in 4 npy files" in describe(got)
    # a part is the same whatever is beside it
    few = embed(str(images), tmp_path / "g", weights, **{**SMALL, "part_images": 3})
    assert torch.equal(few.features(), got.features()) and len(list((tmp_path / "g/features").iterdir())) == 7


@pytest.mark.parametrize(
    ("dtype", "file_format"), [("fp16", "npy"), ("fp16", "parquet"), ("bf16", "safetensors")]
)
def test_short_types(tmp_path, weights, images, dtype, file_format):
    if file_format == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra: parquet)")
    options = dict(dtype=dtype, format=file_format, tokens="patch")
    got = embed(str(images), tmp_path / "f", weights, **options, **SMALL).features()
    assert got.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    # computed with bf16 products where the processor has them: 8 bits through a few layers
    torch.testing.assert_close(got.float(), expected(weights, images).patches, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("package", "option", "words"),
    [
        ("PIL", {"loader": "pil"}, "needs Pillow: pip install .pillow"),
        ("PIL", {"loader": "dali"}, "needs Pillow: pip install .pillow"),
        ("pyarrow", {"format": "parquet"}, "needs? pyarrow, .*pip install .pyarrow"),
    ],
)
def test_missing_packages(tmp_path, weights, images, monkeypatch, package, option, words):
    if option.get("loader") == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    for name in [package, *(n for n in sys.modules if n.partition(".")[0] == package)]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=words):
        embed(images, tmp_path / "out", weights, **SMALL | option)


def test_part_of_the_patches(tmp_path, weights, images):
    half = {**SMALL, "keep_ratio": 0.5}
    a = embed(str(images), tmp_path / "a", weights, **half).features()
    b = embed(str(images), tmp_path / "b", weights, **{**half, "batch_size": 2}).features()
    # which patches follows from the image, not from the batch
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (a - expected(weights, images).cls).abs().max() > 1e-2


def test_odd_file_names(tmp_path, weights, images):
    folder = tmp_path / "i"
    folder.mkdir()
    names = ["a\tb.png", "c\nd.png", os.fsdecode(b"\xff.png"), "e\\t.png"]
    for name in names:
        shutil.copy(images / "ape" / "00.png", folder / name)
    got = embed(str(folder), tmp_path / "f", weights, **SMALL)
    assert [r.path for r in got.rows()] == open_source(str(folder)).paths
    assert {Path(r.path).name for r in got.rows()} == set(names)


# ---- going on -------------------------------------------------------------------------------------

# dies before or after the n-th file has come into place
DIE = """
import os, signal
real, left, late = os.replace, [{}], {}
def replace(a, b):
    left[0] -= 1
    if left[0] or late:
        real(a, b)
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
"""


def test_killed_and_continued(tmp_path, weights, images, run_cli):
    args = ["embed", images, tmp_path / "f", "--weights", weights, *SIZES]
    args += ["--format", "safetensors"]
    whole = embed(str(images), tmp_path / "whole", weights, format="safetensors", **SMALL)
    first = tmp_path / "f" / "features" / "00000.safetensors"
    # settings not in place; a part; without its record; with it; all parts; rows.tsv
    for after, late, done in ((1, 0, 0), (2, 0, 0), (2, 1, 1), (3, 1, 1), (7, 1, 4), (2, 1, 4)):
        codes, text = run_cli(*args, setup=DIE.format(after, late))
        assert codes == [-9], text
        assert len(list((tmp_path / "f" / "features").glob("0*"))) == done
        with pytest.raises(UsageError, match="not finished" if after > 1 else "no folder of features"):
            load_embeddings(tmp_path / "f")
        if after == 3:
            made = first.stat().st_mtime_ns
    codes, text = run_cli(*args)
    assert codes == [0] and "continues, 4 of 4 parts are finished" in text and "19 images" in text
    assert files(tmp_path / "f") == files(tmp_path / "whole")
    assert first.stat().st_mtime_ns == made
    codes, text = run_cli(*args)
    assert codes == [0] and "nothing to compute" in text
    assert len(whole) == 19


def test_two_processes(tmp_path, weights, images, run_cli):
    embed(str(images), tmp_path / "one", weights, **SMALL)
    args = ["embed", images, tmp_path / "two", "--weights", weights, *SIZES]
    codes, text = run_cli(*args, processes=2)
    assert codes == [0, 0] and text.count("19 images\n") == 1, text
    assert files(tmp_path / "one") == files(tmp_path / "two")
    codes, text = run_cli(*args, "--dtype", "fp16", processes=2)
    assert codes == [2, 2] and "dtype: fp32 -> fp16" in text


def test_share_without_a_good_image(tmp_path, weights, images, run_cli):
    shutil.copytree(images, tmp_path / "i")
    for path in open_source(str(tmp_path / "i")).paths[:12]:
        Path(path).write_text("no image")
    args = ["embed", tmp_path / "i", tmp_path / "f", "--weights", weights, *SIZES, "--format", "safetensors"]
    # the error of one process ends both
    codes, text = run_cli(*args, "--strict", processes=2)
    assert codes == [4, 4] and "00.png" in text and "another process has stopped" in text
    codes, text = run_cli(*args, processes=2)
    assert codes == [0, 0] and "7 images; 12 more could not be read" in text, text
    assert [len(part) for _, part in load_embeddings(tmp_path / "f").parts()] == [0, 0, 6, 1]


def test_full_disk(tmp_path, weights, images, monkeypatch):
    calls = []

    def full(fd):
        calls.append(fd)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            embed(str(images), tmp_path / "f", weights, **SMALL)
    assert not list((tmp_path / "f").rglob(".tmp*"))
    embed(str(images), tmp_path / "f", weights, **SMALL)
    embed(str(images), tmp_path / "g", weights, **SMALL)
    assert files(tmp_path / "f") == files(tmp_path / "g")


def test_damaged_part_is_made_again(tmp_path, weights, images):
    want = embed(str(images), tmp_path / "f", weights, **SMALL).features()
    part, other = (tmp_path / "f" / "features" / f"0000{n}.npy" for n in (1, 2))
    made = other.stat().st_mtime_ns
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(UsageError, match=r"not finished \(3 of 4 parts\)"):
        load_embeddings(tmp_path / "f")
    again = embed(str(images), tmp_path / "f", weights, **SMALL)
    assert torch.equal(again.features(), want) and other.stat().st_mtime_ns == made
    # same size, other bytes
    part.write_bytes(b"x" * part.stat().st_size)
    with pytest.raises(UsageError, match=r"00001\.npy: damaged"):
        load_embeddings(tmp_path / "f").features()


def test_another_batch_size_continues(tmp_path, weights, images):
    options = {**SMALL, "batch_size": None, "part_images": None}
    want = embed(str(images), tmp_path / "f", weights, **options).features()
    # begun with parts of 6; no batch size asked for, and one that divides a part
    small = embed(str(images), tmp_path / "g", weights, **SMALL)
    for batch in (None, 2):
        (tmp_path / "g" / "features" / "00002.npy").unlink()
        again = embed(str(images), tmp_path / "g", weights, **{**options, "batch_size": batch})
        assert again.config["part_count"] == small.config["part_count"] == 4
        torch.testing.assert_close(again.features(), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="part_images: 6 -> "):
        embed(str(images), tmp_path / "g", weights, **{**options, "batch_size": 4})


def test_damaged_config(tmp_path, weights, images):
    embed(str(images), tmp_path / "f", weights, **SMALL)
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    unsafe = {"format": "../x", "dtype": "fp32"}
    settings = [None, unsafe, config["settings"] | {"crop_pct": 5}, config["settings"] | {"crop": 1}]
    for key, value in (*(("settings", s) for s in settings), ("parts", [1]), ("shape", 5)):
        (tmp_path / "f" / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UsageError, match=r"config\.json: damaged"):
            load_embeddings(tmp_path / "f")
    with pytest.raises(UsageError, match=r"config\.json: damaged"):
        embed(str(images), tmp_path / "f", weights)


# ---- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": "mean"}, "tokens: class -> mean"),
        ({"dtype": "fp16"}, "dtype: fp32 -> fp16"),
        ({"which": "student"}, "weights which: teacher -> student; weights hash: "),
        ({"img_size": 32}, r"img_size: \[24, 24\] -> \[32, 32\]"),
        ({"limit": 5}, "data images: 19 -> 5"),
        ({"part_images": 9}, "part_images: 6 -> 9"),
    ],
)
def test_other_settings_are_refused(tmp_path, weights, images, change, named):
    embed(str(images), tmp_path / "f", weights, **SMALL)
    before = files(tmp_path / "f")
    with pytest.raises(UsageError, match=f"{named}.*--force"):
        embed(str(images), tmp_path / "f", weights, **{**SMALL, **change})
    assert files(tmp_path / "f") == before
    (tmp_path / "f" / "notes.txt").write_text("mine")
    again = embed(str(images), tmp_path / "f", weights, **{**SMALL, **change}, force=True)
    assert len(again) == change.get("limit", 19)
    fresh = embed(str(images), tmp_path / "g", weights, **{**SMALL, **change})
    assert torch.equal(again.features(), fresh.features())
    assert (tmp_path / "f" / "notes.txt").read_text() == "mine"


def test_changed_images_and_a_second_job_are_refused(tmp_path, weights, images):
    shutil.copytree(images, tmp_path / "i")
    embed(str(tmp_path / "i"), tmp_path / "f", weights, **SMALL)
    with Work(tmp_path / "f" / ".parts").locked("here"):
        with pytest.raises(UsageError, match="f: another job is running here"):
            embed(str(tmp_path / "i"), tmp_path / "f", weights, **SMALL)
    Image.new("RGB", (60, 60), (1, 2, 3)).save(tmp_path / "i" / "ape" / "00.png")
    with pytest.raises(UsageError, match="data fingerprint: "):
        embed(str(tmp_path / "i"), tmp_path / "f", weights, **SMALL)


def test_images_that_were_overwritten_by_others_of_their_size_are_refused(tmp_path, weights, caplog):
    for i in range(5):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i}.bmp")
    spec, out = str(tmp_path), tmp_path / "f"
    caplog.set_level("INFO")
    first = embed(spec, out, weights, **SMALL).features()
    embed(spec, out, weights, **SMALL)
    assert "names, sizes and labels of images, and the bytes of 5 images; nothing to compute" in caplog.text
    Image.new("RGB", (40, 40), (200, 9, 9)).save(tmp_path / "3.bmp")
    before = files(out)
    with pytest.raises(UsageError, match=r"the bytes of 1 of 5 images that were compared, first: .*3\.bmp"):
        embed(spec, out, weights, **SMALL)
    assert files(out) == before
    # an older version compared no bytes
    config = json.loads((out / "config.json").read_text())
    del config["data"]["sample"]
    (out / "config.json").write_text(json.dumps(config))
    caplog.clear()
    assert torch.equal(embed(spec, out, weights, **SMALL).features(), first)
    assert "names, sizes and labels of images; nothing to compute" in caplog.text
    again = embed(spec, out, weights, force=True, **SMALL).features()
    assert torch.equal(again, first)
    # with a hash the change is found, and --force makes them again
    (out / "config.json").write_bytes(before["config.json"])
    again = embed(spec, out, weights, force=True, **SMALL).features()
    assert [torch.equal(a, b) for a, b in zip(first, again, strict=True)] == [True, True, True, False, True]


def test_foreign_folders_are_left_alone(tmp_path, weights, images):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "config.json").write_text('{"format": "another"}')
    (tmp_path / "file").write_text("text")
    for force in (False, True):
        with pytest.raises(UsageError, match="holds other files; nothing was touched"):
            embed(str(images), tmp_path / "f", weights, force=force, **SMALL)
        with pytest.raises(UsageError, match="is a file"):
            embed(str(images), tmp_path / "file", weights, force=force, **SMALL)
    assert files(tmp_path) == {"f/config.json": b'{"format": "another"}', "file": b"text"}


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"tokens": "cls"}, "--tokens: .*got 'cls'"),
        ({"dtype": "fp64"}, "--dtype: .*got 'fp64'"),
        ({"dtype": "bf16"}, "--dtype bf16: npy files have no such type"),
        ({"format": "csv"}, "--format: .*got 'csv'"),
        ({"keep_ratio": 0.0}, "--keep-ratio: "),
        ({"keep_ratio": 0.5, "tokens": "patch"}, "--keep-ratio: patch tokens"),
        ({"batch_size": 0}, "--batch-size: .*got 0"),
        ({"part_images": 7}, "--part-images: 7 is not a multiple of the 3 images"),
        ({"which": "both"}, "which"),
        ({"img_size": 25}, "25"),
        ({"limit": -1}, "limit"),
    ],
)
def test_bad_options(tmp_path, weights, images, option, named):
    with pytest.raises(UsageError, match=named):
        embed(str(images), tmp_path / "f", weights, **{**SMALL, **option})
    assert not (tmp_path / "f").exists()


def test_diverged_weights(tmp_path, weights, images):
    bad = tmp_path / "w"
    shutil.copytree(weights, bad)
    from safetensors.torch import save_file

    tensors = load_file(bad / "teacher.safetensors")
    large = {**tensors, "norm.weight": tensors["norm.weight"] * 1e6}
    save_file(large, bad / "teacher.safetensors")
    with pytest.raises(UsageError, match="does not fit --dtype fp16"):
        embed(str(images), tmp_path / "f", bad, dtype="fp16", **SMALL)
    save_file({**tensors, "norm.bias": tensors["norm.bias"] * float("nan")}, bad / "teacher.safetensors")
    with pytest.raises(NonFiniteError, match=r"00\.png: its features are not finite"):
        embed(str(images), tmp_path / "g", bad, **SMALL)


# ---- broken images --------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["pil", "dali"])
def test_broken_images_are_left_out_and_listed(tmp_path, weights, images, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed (extra: dali-cuda13)")
    shutil.copytree(images, tmp_path / "i")
    whole = (tmp_path / "i" / "ape" / "04.png").read_bytes()
    bad = {"ape/04.png": whole[: len(whole) // 2], "ape/06.png": b"", "bee/17.png": b"no image"}
    for name, content in bad.items():
        (tmp_path / "i" / name).write_bytes(content)
    options = {**SMALL, "loader": loader}
    good = embed(str(images), tmp_path / "good", weights, **options)
    got = embed(str(tmp_path / "i"), tmp_path / "f", weights, **options)
    assert (len(got), got.broken) == (16, 3)
    rows = [2, 3, 18]
    kept = [i for i in range(19) if i not in rows]
    assert [r.row for r in got.rows()] == kept
    torch.testing.assert_close(got.features(), good.features()[kept], rtol=1e-5, atol=1e-6)
    lines = [line.split("\t") for line in (tmp_path / "f" / "broken.tsv").read_text().splitlines()]
    assert lines[0] == ["row", "path", "reason"] and [int(line[0]) for line in lines[1:]] == rows
    assert [line[1] for line in lines[1:]] == [str(tmp_path / "i" / name) for name in bad]
    assert all(line[2] and "remove it" not in line[2] for line in lines[1:])
    assert "3 more could not be read, listed in broken.tsv" in describe(got)
    with pytest.raises(DataError, match=r"04\.png"):
        embed(str(tmp_path / "i"), tmp_path / "strict", weights, strict=True, **options)


def test_no_image_left(tmp_path, weights):
    (tmp_path / "i").mkdir()
    for i in range(7):
        (tmp_path / "i" / f"{i}.png").write_text("no image")
    for _ in range(2):
        with pytest.raises(DataError, match=r"none of the 7 images can be read, first: .*0\.png \("):
            embed(str(tmp_path / "i"), tmp_path / "f", weights, **SMALL)


def test_memory_holds_a_few_parts(tmp_path, weights, images, monkeypatch):
    module = importlib.import_module("extrema_fast.tools.embed")
    from extrema_fast.tools.embeddings import write_part as write

    encode = module.encode_batch
    encoded, ahead = [0], []

    def count(job, batch, rows):
        encoded[0] += len(batch)
        return encode(job, batch, rows)

    def written(folder, number, *rest):
        ahead.append(encoded[0] - 3 * (number + 1))
        write(folder, number, *rest)

    monkeypatch.setattr(module, "encode_batch", count)
    monkeypatch.setattr(module, "write_part", written)
    embed(str(images), tmp_path / "f", weights, **{**SMALL, "part_images": 3})
    # the one being written, and the one being computed
    assert len(ahead) == 7 and max(ahead) <= 6


# ---- the command line -----------------------------------------------------------------------------


def test_command(tmp_path, weights, images, capsys):
    from extrema_fast.cli import main

    args = ["embed", str(images), str(tmp_path / "f"), "--weights", str(weights), "--tokens", "patch"]
    args += ["--img-size", "16", "40", "--no-norm", "--loader", "pil", "--batch-size", "4", "--limit", "5"]
    assert main(args) == 0
    printed = capsys.readouterr()
    assert "5 images\npatch tokens of the teacher, [10, 16] fp32 each, in 1 npy file;" in printed.out
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert config["complete"] and config["settings"]["norm"] is False
    assert main([*args, "--img-size", "1", "2", "3"]) == 2
    assert main(["embed", "/nowhere", str(tmp_path / "g"), "--weights", str(weights)]) == 2
    assert main(["embed", str(images), str(tmp_path / "g")]) == 2
    assert not (tmp_path / "g").exists()
    assert extrema_fast.load_embeddings(tmp_path / "f").shape == (10, 16)
