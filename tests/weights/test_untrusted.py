"""Damaged files, files of other projects, files by strangers: nothing runs, nothing large is allocated.

Covers, for `load_encoder`, `import` and `export`: damage x format; keys too many or too few; pickled code; compressed
archives; tensors and headers that claim more than they hold; checkpoints and descriptions of other programs; absurd
sizes and types; links, loops, devices, pipes. (timm's own loader: tests/contract/test_export_timm.py.)
"""

from __future__ import annotations

import json
import os
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from extrema_fast.__main__ import main
from extrema_fast.errors import StorageError, UsageError
from extrema_fast.weights import load
from extrema_fast.weights.export import export
from extrema_fast.weights.initial import load_method_weights
from extrema_fast.weights.load import import_released, load_encoder, random_encoder_like
from tests.weights._weights import Malicious, refused, released, same, trained


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Fails the test if an encoder is made: what a description claims must be refused before."""

    def built(*_, **__):
        raise AssertionError("an encoder was built")

    for name in ("Encoder", "build_encoder"):
        monkeypatch.setattr(load, name, built)


def all_refuse(path, tmp_path, *words: str) -> None:
    """Every way in refuses `path`, and nothing is written."""
    before = sorted(p.name for p in tmp_path.iterdir())
    refused(lambda: load_encoder(path), *words)
    refused(lambda: export(path, tmp_path / "exported"), *words)
    if path.is_file():
        refused(lambda: import_released(path, tmp_path / "imported"), *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# ---- damage ---------------------------------------------------------------------------------------

DAMAGE = {
    "empty": lambda data: b"",
    "text": lambda data: b"not a checkpoint at all\n" * 9,
    "cut in the header": lambda data: data[:100],
    "last byte missing": lambda data: data[:-1],
    # in the pickle or the header, near the front
    "flipped": lambda data: data[:90] + bytes(255 - b for b in data[90:400]) + data[400:],
    "another zip": lambda data: b"PK\5\6" + bytes(18),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("format", ["weights folder", "bare safetensors", "released"])
def test_damage(folder, file, tmp_path, nothing_is_built, format, damage):
    path = broken = file
    if format == "weights folder":
        path, broken = folder, folder / "teacher.safetensors"
    elif format == "bare safetensors":
        path = broken = (folder / "teacher.safetensors").rename(tmp_path / "bare.safetensors")
    broken.write_bytes(DAMAGE[damage](broken.read_bytes()))
    all_refuse(path, tmp_path, broken.name)


def test_one_damaged_network_leaves_the_other(folder, method):
    (folder / "teacher.safetensors").write_bytes(b"")
    assert same(load_encoder(folder, "student"), method.student)


def test_keys_too_many_or_too_few(folder):
    file = folder / "teacher.safetensors"
    tensors = load_file(file)
    for change, words in (
        ({"extra.weight": torch.ones(1)}, "unknown: extra.weight"),
        ({"blocks.1.norm2.weight": torch.ones(63)}, "shape: blocks.1.norm2.weight [63] for [64]"),
        ({"norm.bias": None}, "missing: norm.bias"),
        ({"pos_embed": torch.zeros(1, 4, 64)}, "not the fixed sin-cos table"),
    ):
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, file)
        refused(lambda: load_encoder(folder), words)


# ---- other projects -------------------------------------------------------------------------------

VIT = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"]
MOCO = [f"module.{e}_encoder.{k}" for e in ("base", "momentum") for k in VIT]


def model(*keys: str) -> dict:
    return {"model": {k: torch.ones(2) for k in keys}}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        # not whole
        (model(*VIT), ["blocks.0.mlp.fc1.weight is missing"]),
        (model(*VIT, "decoder_blocks.0.norm1.weight"), ["blocks.0.mlp.fc1.weight is missing"]),
        (model(*MOCO), ["blocks.0.mlp.fc1.weight is missing"]),
        (model("embeddings.cls_token"), ["missing: patch_embed", "Hugging Face"]),
        (model("encoder.weight"), ["missing: patch_embed", "extra: encoder.weight)"]),
        # networks nested as DINO saves them
        ({"teacher": model("backbone.cls_token")["model"]}, ["extra: teacher.backbone", "a DINO checkpoint"]),
        (torch.ones(3), ["found: Tensor"]),
        # counters among the weights do not hide whose they are
        ({"layer1.0.conv1.weight": torch.ones(2), "bn1.count": torch.tensor(3)}, ["torch.int64", "a ResNet"]),
        # complete, and with parts that an encoder has no place for
        (trained().teacher.state_dict() | {"register_tokens": torch.ones(1)}, ["extra: register_tokens"]),
    ],
)
def test_checkpoints_of_others(tmp_path, data, words):
    torch.save(data, tmp_path / "other.pth")
    all_refuse(tmp_path / "other.pth", tmp_path, "other.pth", *words)


# ---- code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("name", "place"),
    [("checkpoint.pth", "state_dict"), ("no_extension", "optimizer"), ("model.safetensors", "extra")],
)
def test_pickled_code_does_not_run(tmp_path, method, capsys, name, place, zipped):
    target, file = tmp_path / "was_here", tmp_path / name
    torch.save(released(method) | {place: Malicious(target)}, file, _use_new_zipfile_serialization=zipped)
    # torch reads an archive by the name of safetensors as such
    word = "damaged" if zipped and name.endswith(".safetensors") else "mkdir"
    all_refuse(file, tmp_path, name, "read safely", word)
    # torch's own text advises to load it anyway
    assert "weights_only" not in refused(lambda: load_method_weights(method, file), name)
    for command in ("import", "export"):
        assert main([command, str(file), str(tmp_path / "out")]) == 2
        assert word in capsys.readouterr().err
    assert not target.exists() and not (tmp_path / "out").exists()
    # the test can fail: unsafe loading does run it
    with open(file, "rb") as f:
        torch.load(f, weights_only=False)
    assert target.exists()


@pytest.mark.parametrize("name", ["teacher.safetensors", "config.json"])
def test_pickled_code_in_a_weights_folder(tmp_path, folder, name):
    torch.save({"x": Malicious(tmp_path / "was_here")}, folder / name)
    all_refuse(folder, tmp_path, name)
    assert not (tmp_path / "was_here").exists()


# ---- archives and tensors -------------------------------------------------------------------------


def test_a_compressed_archive(tmp_path, file):
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    all_refuse(bomb, tmp_path, "bomb.pth", "read safely")


HUGE = (10**6, 3, 10**3, 10**3)
TENSORS = {
    # four bytes that claim petabytes
    "expanded": (lambda: torch.zeros(1, 1, 1, 1).expand(HUGE), "its tensors claim"),
    "sparse": (
        lambda: torch.sparse_coo_tensor(torch.zeros(4, 1, dtype=torch.long), [1.0], HUGE),
        "sparse_coo",
    ),
    "integer": (lambda: torch.zeros(64, 3, 8, 8, dtype=torch.int8), "torch.int8"),
    "complex": (lambda: torch.zeros(64, 3, 8, 8, dtype=torch.complex64), "torch.complex64"),
    "without values": (lambda: torch.empty(HUGE, device="meta"), "device meta"),
    "scalar": (lambda: torch.tensor(1.0), "shape []"),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_what_they_claim(tmp_path, method, nothing_is_built, kind):
    make, words = TENSORS[kind]
    data = released(method)
    data["state_dict"]["module.momentum_encoder.patch_embed.proj.weight"] = make()
    torch.save(data, tmp_path / "data.pth")
    all_refuse(tmp_path / "data.pth", tmp_path, "data.pth", words)


def safetensors_file(path, header: dict | bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0\0\0\0")


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "longer than the file": ({}, 2**40),
    "overflowing shape": ({"pos_embed": entry([2**40, 2**40], 0, 4)}, None),
    "shape beyond its bytes": ({"pos_embed": entry([10**12], 0, 4)}, None),
    "overlapping": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, None),
    "nested": (b"{" + b'"a":{' * 50_000, None),
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers(tmp_path, folder, nothing_is_built, case):
    header, length = HEADERS[case]
    for path, file in (
        (folder, folder / "teacher.safetensors"),
        (tmp_path / "bare.safetensors", tmp_path / "bare.safetensors"),
    ):
        safetensors_file(file, header, length)
        all_refuse(path, tmp_path, file.name)
    refused(lambda: random_encoder_like(folder), "w")


def test_tensors_that_claim_more_than_the_file_has(tmp_path, nothing_is_built):
    bare = tmp_path / "bare.safetensors"
    empty = {"patch_embed.proj.weight": [0, 10**9, 4, 4], "pos_embed": [1, 10**9, 0]}
    header = {k: entry(v, 0, 0) for k, v in (empty | {"blocks.0.mlp.fc1.weight": [0, 0]}).items()}
    safetensors_file(bare, header | {"blocks_token.0.gamma_1": entry([1], 0, 4)})
    all_refuse(bare, tmp_path, "empty tensors")
    shapes = {
        "patch_embed.proj.weight": (1024, 1, 1, 1),
        "pos_embed": (1, 1, 1024),
        "cls_token": (1, 1, 1),
        "blocks.0.mlp.fc1.weight": (4096, 1),
        "blocks.3999.norm1.weight": (1,),
        "blocks_token.0.gamma_1": (1,),
    }
    save_file({k: torch.zeros(v) for k, v in shapes.items()}, bare)
    all_refuse(bare, tmp_path, "4000 blocks of width 1024", "the file has")


# ---- descriptions ---------------------------------------------------------------------------------


def describe(folder, **changes) -> None:
    meta = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(meta | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 3}, ["depth is 3 in its description, 2 in its tensors"]),
        ({"depth": 10**9}, ["blocks"]),
        ({"width": 128, "heads": 2}, ["width is 128 in its description, 64"]),
        ({"width": 10**9, "heads": 1}, ["model", "parameters"]),
        ({"width": -64}, ["model.width", "-64"]),
        ({"width": True}, ["model.width", "True"]),
        ({"pool_depth": 1}, ["pool_depth is 1 in its description, 2"]),
        ({"mlp_ratio": 3.0}, ["hidden is 192 in its description, 128"]),
        ({"mlp_ratio": 1e300}, ["config.json"]),
        ({"patch_size": 0}, ["patch_size"]),
        ({"in_chans": 1}, ["in_chans is 1 in its description, 3"]),
        ({"img_size": [24, 16]}, ["patches is 6 in its description, 4"]),
        ({"img_size": [8 * 10**8, 8 * 10**8]}, ["patches"]),
        ({"layer_scale": float("nan")}, ["layer_scale"]),
        ({"size": "evil.Model"}, ["model.size", "evil.Model"]),
        ({"evil": 1}, ["unknown option model.evil"]),
    ],
)
def test_architectures_that_do_not_fit(tmp_path, folder, nothing_is_built, changes, words):
    meta = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    describe(folder, model=meta["model"] | changes)
    all_refuse(folder, tmp_path, "w", *words)
    refused(lambda: random_encoder_like(folder), *words)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"encoder": {"evil": 1}}, "unknown option encoder.evil"),
        ({"encoder": [1]}, "encoder: expected a table"),
        ({"encoder": {"num_classes": 10**12}}, "1000000000000 classes"),
        ({"encoder": {"in_chans": "3"}}, "encoder.in_chans"),
        ({"encoder": {"fc_norm": 1}}, "encoder.fc_norm"),
        ({"encoder": {"pos_grid": [0, 2]}}, "encoder.pos_grid"),
        ({"encoder": {"pos_grid": [1.0, 2]}}, "encoder.pos_grid"),
        ({"encoder": {"global_pool": "os.system"}}, "encoder.global_pool"),
        ({"encoder": {"pos_coords": ["absolute"]}}, "encoder.pos_coords"),
        ({"encoder": {"pos_embed": "evil"}}, "encoder.pos_embed"),
        ({"data": {"mean": [0.1], "std": [0.0]}}, "data.std"),
        ({"data": {"mean": [], "std": [1]}}, "data.mean"),
        ({"data": {"mean": [float("nan")], "std": [1]}}, "data.mean"),
        ({"data": {"std": [1]}}, "data.mean"),
        ({"input": {"crop_pct": 10**9}}, "input.crop_pct"),
        ({"input": {"interpolation": 7}}, "input.interpolation"),
        ({"model": 5}, "config.json"),
        ({"version": "1"}, "version"),
        ({"version": 2, "software": "extrema-fast 7"}, "extrema-fast 7); update extrema-fast"),
        ({"format": "pickle"}, "`format` is not extrema-fast-weights"),
        ({"extrema_fast": {"model": {}}}, "found: model"),
    ],
)
def test_descriptions_that_make_no_sense(tmp_path, folder, changes, word):
    describe(folder, **changes)
    all_refuse(folder, tmp_path, "w", word)


# class names, modules and remote code of other programs are never looked up
FOREIGN = '{"architectures": ["os.system"], "auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"}'


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", "{}", b"\xff\xfe\x80", FOREIGN, "[" * 10**5, '{"format": ' + "9" * 10**5 + "}"],
    ids=range(9),
)
def test_other_descriptions(tmp_path, folder, method, text):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    words = ["found: architectures, auto_map", "nothing named there is loaded"] if text == FOREIGN else []
    all_refuse(folder, tmp_path, "config.json", "description", *words)
    # a file next to it is bare then, and tells its architecture itself
    assert same(load_encoder(folder / "student.safetensors"), method.student)


def test_a_description_of_gigabytes(tmp_path, folder):
    with open(folder / "config.json", "r+b") as f:
        f.truncate(1 << 40)
    all_refuse(folder, tmp_path, "config.json", str(1 << 40))


# ---- links, devices, pipes ------------------------------------------------------------------------


def test_links(tmp_path, folder, method):
    # as in a cache of downloads: links to files elsewhere are read
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("config.json", "teacher.safetensors"):
        (linked / name).symlink_to(folder / name)
    (tmp_path / "whole").symlink_to(folder)
    for path in (linked, tmp_path / "whole"):
        assert same(load_encoder(path), method.teacher)
    # loops and links to nowhere end
    for name, target in (("config.json", "config.json"), ("teacher.safetensors", "/nowhere/at/all")):
        (linked / name).unlink()
        (linked / name).symlink_to(target)
        refused(lambda: load_encoder(linked), "linked")
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: load_encoder(tmp_path / "loop"), "loop")
    with pytest.raises(StorageError, match="loop"):
        export(folder, tmp_path / "loop" / "out")


def test_devices_and_pipes_do_not_hang(tmp_path, folder):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", "/dev/null", tmp_path / "pipe"):
        for call in (
            load_encoder,
            lambda p: import_released(p, tmp_path / "o"),
            lambda p: export(p, tmp_path / "o"),
        ):
            refused(lambda c=call, p=path: c(p), "neither a file nor a folder")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(lambda: load_encoder(folder), "config.json is missing")
    assert not (tmp_path / "o").exists()


def test_names_that_are_no_paths(tmp_path):
    for path in ("", "\0", "x" * 5000, tmp_path / "a" / ".." / "b"):
        with pytest.raises(UsageError):
            load_encoder(path)
