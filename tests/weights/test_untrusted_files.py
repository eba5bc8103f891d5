"""Weights from strangers: nothing in a file runs, and no file takes more memory than it has bytes.

Covers, for `load_encoder`, `import` and `export`: pickled code in checkpoints, under the names of a weights
folder, and as its description; compressed archives; tensors that claim more than they hold, sparse, integer,
without values; safetensors headers with huge, overlapping, negative or missing offsets; descriptions with
foreign class names, unknown keys, absurd sizes, numbers of other types, deep nesting, gigabytes; links, loops,
devices and pipes. (timm's own loader: tests/contract/test_export_timm.py.)
"""

from __future__ import annotations

import json
import os
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from extrema_fast.__main__ import main
from extrema_fast.errors import StorageError, UsageError
from extrema_fast.files import MAX_JSON
from extrema_fast.weights import files as weights
from extrema_fast.weights import load as convert
from extrema_fast.weights.export import export
from tests.weights._weights import CFG, Malicious, refused, released, trained


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return trained()


@pytest.fixture
def folder(tmp_path, method):
    return convert.save_weights(tmp_path / "w", method, convert.weights_meta(CFG, 7))


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Fails the test if an encoder is made: what a description claims must be refused before."""

    def built(*_, **__):
        raise AssertionError("an encoder was built")

    for name in ("Encoder", "build_encoder"):
        monkeypatch.setattr(convert, name, built)


def all_refuse(path, tmp_path, *words: str) -> None:
    """Every way in refuses `path`, and nothing is written."""
    before = sorted(p.name for p in tmp_path.iterdir())
    refused(lambda: convert.load_encoder(path), *words)
    refused(lambda: export(path, tmp_path / "exported"), *words)
    if path.is_file():
        refused(lambda: convert.import_released(path, tmp_path / "imported"), *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# ---- code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["checkpoint.pth", "model.safetensors", "weights.bin", "no_extension"])
def test_pickled_code_in_a_file(tmp_path, method, capsys, name, zipped):
    target, file = tmp_path / "was_here", tmp_path / name
    torch.save(released(method) | {"x": Malicious(target)}, file, _use_new_zipfile_serialization=zipped)
    # torch takes a name that ends so for a promise, and does not look inside
    word = "damaged" if name.endswith(".safetensors") else "mkdir"
    all_refuse(file, tmp_path, name, "read safely", word)
    for command in ("import", "export"):
        assert main([command, str(file), str(tmp_path / "out")]) == 2
    assert word in capsys.readouterr().err
    assert not target.exists() and not (tmp_path / "out").exists()
    # the test can fail: an unsafe load does run it
    with open(file, "rb") as f:
        torch.load(f, weights_only=False)
    assert target.exists()


@pytest.mark.parametrize("name", ["teacher.safetensors", "config.json"])
def test_pickled_code_in_a_weights_folder(tmp_path, folder, method, name):
    target = tmp_path / "was_here"
    torch.save({"x": Malicious(target)}, folder / name)
    all_refuse(folder, tmp_path, name)
    assert not target.exists()
    with open(folder / name, "rb") as f:
        torch.load(f, weights_only=False)
    assert target.exists()


def test_a_description_names_no_code(tmp_path, folder, nothing_is_built):
    """Class names, modules and remote code of other formats are never looked up."""
    foreign = {
        "architectures": ["os.system"],
        "auto_map": {"AutoModel": "evil.Model"},
        "model_type": "evil",
        "_target_": "subprocess.call",
    }
    (folder / "config.json").write_text(json.dumps(foreign))
    all_refuse(folder, tmp_path, "config.json", "Hugging Face", "evil", "nothing named there is loaded")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_evil", "num_classes": 0}))
    all_refuse(folder, tmp_path, "config.json", "timm", "vit_evil")
    # in a description of ours they are unknown options
    meta = weights.described({"model": {"size": "evil.Model"}})
    (folder / "config.json").write_text(json.dumps(meta))
    all_refuse(folder, tmp_path, "config.json", "model.size", "evil.Model")


# ---- archives and tensors -------------------------------------------------------------------------


def test_a_compressed_archive(tmp_path, method):
    torch.save(released(method), tmp_path / "plain.pth")
    bomb = tmp_path / "bomb.pth"
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as old,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    all_refuse(bomb, tmp_path, "bomb.pth", "read safely")


def views(value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        # four bytes that claim petabytes
        "expanded": value.new_zeros(1, 1, 1, 1).expand(10**9, 3, 1000, 1000),
        "sparse": torch.sparse_coo_tensor(
            torch.zeros(4, 1, dtype=torch.long), [1.0], (10**6, 3, 10**3, 10**3)
        ),
        "integer": value.to(torch.int8),
        "complex": value.to(torch.complex64),
        "without values": torch.empty(10**6, 3, 10**3, 10**3, device="meta"),
    }


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("kind", ["expanded", "sparse", "integer", "complex", "without values"])
def test_tensors_that_are_not_what_they_claim(tmp_path, method, nothing_is_built, kind):
    data = released(method)
    key = "module.momentum_encoder.patch_embed.proj.weight"
    data["state_dict"][key] = views(data["state_dict"][key])[kind]
    torch.save(data, tmp_path / "data.pth")
    word = {"expanded": "its tensors claim", "sparse": "dense", "without values": "no values"}.get(
        kind, "floating-point"
    )
    all_refuse(tmp_path / "data.pth", tmp_path, "data.pth", word)


def safetensors_file(
    path, header: dict | bytes, data: bytes = b"\0\0\0\0", length: int | None = None
) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "longer than the file": ({}, 2**40),
    "longest number": ({}, 2**64 - 1),
    "overflowing shape": ({"pos_embed": entry([2**40, 2**40], 0, 4)}, None),
    "shape beyond its bytes": ({"pos_embed": entry([10**12], 0, 4)}, None),
    "offsets beyond the file": ({"pos_embed": entry([10**9], 0, 4 * 10**9)}, None),
    "overlapping": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, None),
    "backwards": ({"a": entry([1], 4, 0)}, None),
    "negative": ({"a": entry([-1], 0, 4)}, None),
    "unknown type": ({"a": entry([1], 0, 4, "PICKLE")}, None),
    "nested": (b"{" + b'"a":{' * 50_000, None),
    "not an object": (b"[1]      ", None),
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers(tmp_path, folder, nothing_is_built, case):
    header, length = HEADERS[case]
    safetensors_file(folder / "teacher.safetensors", header, length=length)
    all_refuse(folder, tmp_path, "teacher.safetensors", "damaged")
    safetensors_file(tmp_path / "bare.safetensors", header, length=length)
    all_refuse(tmp_path / "bare.safetensors", tmp_path, "bare.safetensors")
    refused(lambda: convert.random_encoder_like(folder), "w")


def test_tensors_without_values(tmp_path, nothing_is_built):
    header = {
        "patch_embed.proj.weight": entry([0, 10**9, 4, 4], 0, 0),
        "pos_embed": entry([1, 10**9, 0], 0, 0),
        "blocks.0.mlp.fc1.weight": entry([0, 0], 0, 0),
        "blocks_token.0.gamma_1": entry([1], 0, 4),
    }
    safetensors_file(tmp_path / "bare.safetensors", header)
    all_refuse(tmp_path / "bare.safetensors", tmp_path, "without values")


def test_few_numbers_that_claim_many_blocks(tmp_path, nothing_is_built):
    state = {
        "patch_embed.proj.weight": torch.zeros(1024, 1, 1, 1),
        "pos_embed": torch.zeros(1, 1, 1024),
        "cls_token": torch.zeros(1, 1, 1),
        "blocks.0.mlp.fc1.weight": torch.zeros(4096, 1),
        "blocks.3999.norm1.weight": torch.zeros(1),
        "blocks_token.0.gamma_1": torch.zeros(1),
    }
    torch.save(state, tmp_path / "bare.pth")
    all_refuse(tmp_path / "bare.pth", tmp_path, "4000 blocks of width 1024", "the file holds")


# ---- descriptions ---------------------------------------------------------------------------------


def describe(folder, **changes) -> None:
    meta = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(meta | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"width": 10**9, "heads": 1}, ["model", "parameters"]),
        ({"width": 65536, "heads": 1024, "depth": 24}, ["parameters"]),
        ({"width": 20000, "heads": 4}, ["width is 20000 in its description, 64 in its tensors"]),
        ({"depth": 10**9}, ["blocks"]),
        ({"depth": 4000}, ["depth is 4000", "2 in its tensors"]),
        ({"pool_depth": 10**9}, ["blocks"]),
        ({"mlp_ratio": 1e300}, ["config.json"]),
        ({"mlp_ratio": 1e6}, ["hidden is 64000000"]),
        ({"patch_size": 10**6, "img_size": [10**6, 10**6]}, ["parameters"]),
        ({"img_size": [8 * 10**8, 8 * 10**8]}, ["patches"]),
        ({"img_size": [8 * 10**3, 8 * 10**2]}, ["patches is 100000", "4 in its tensors"]),
        ({"width": -64}, ["model.width", "-64"]),
        ({"heads": 0, "width": 0}, ["width is 192"]),
        ({"heads": 3}, ["heads"]),
        ({"patch_size": 0}, ["patch_size"]),
        ({"img_size": [0, 16]}, ["img_size"]),
        ({"width": True}, ["model.width", "True"]),
        ({"width": 64.0}, ["model.width", "64.0"]),
        ({"layer_scale": float("nan")}, ["layer_scale"]),
        ({"drop_path": float("inf")}, ["drop_path"]),
        ({"img_size": 16}, ["img_size"]),
        ({"evil": 1}, ["unknown option model.evil"]),
    ],
)
def test_absurd_architectures(tmp_path, folder, nothing_is_built, model, words):
    meta = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    describe(folder, model=meta["model"] | model)
    all_refuse(folder, tmp_path, "w", *words)
    # the run's own start has no tensors to contradict the number of patches
    if "img_size" not in model:
        refused(lambda: convert.random_encoder_like(folder), *words)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"encoder": {"evil": 1}}, "unknown option encoder.evil"),
        ({"encoder": [1]}, "encoder"),
        ({"encoder": {"num_classes": 10**12}}, "1000000000000 classes"),
        ({"encoder": {"num_classes": -1}}, "num_classes"),
        ({"encoder": {"num_classes": True}}, "num_classes"),
        ({"encoder": {"in_chans": 10**9}}, "in_chans is 1000000000"),
        ({"encoder": {"in_chans": "3"}}, "in_chans"),
        ({"encoder": {"pos_grid": [10**9]}}, "pos_grid"),
        ({"encoder": {"pos_grid": [0, 2]}}, "pos_grid"),
        ({"encoder": {"global_pool": "os.system"}}, "global_pool"),
        ({"encoder": {"pos_coords": "evil"}}, "pos_coords"),
        ({"encoder": {"pos_embed": "evil"}}, "pos_embed"),
        ({"data": {"mean": [0.1], "std": [0.0]}}, "std"),
        ({"data": {"mean": ["0"], "std": [1]}}, "mean"),
        ({"data": {"mean": [], "std": [1]}}, "mean"),
        ({"data": 5}, "config.json"),
        ({"input": {"crop_pct": 10**9}}, "crop_pct"),
        ({"input": {"interpolation": 7}}, "interpolation"),
        ({"input": 3}, "config.json"),
        ({"version": "1"}, "version"),
        ({"version": 10**9}, "update extrema-fast"),
        ({"format": "pickle"}, "not a weights description"),
        ({"extrema_fast": {"model": {}}}, "not a weights description"),
    ],
)
def test_descriptions_that_make_no_sense(tmp_path, folder, changes, word):
    describe(folder, **changes)
    all_refuse(folder, tmp_path, word)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, '{"format": ' + "9" * 10**5 + "}"])
def test_json_bombs(tmp_path, folder, text):
    (folder / "config.json").write_text(text)
    all_refuse(folder, tmp_path, "config.json", "description")
    # a file beside it is bare then, and tells its architecture itself
    assert convert.load_encoder(folder / "student.safetensors").config.shape == (64, 2, 1)


def test_a_description_of_gigabytes(tmp_path, folder):
    with open(folder / "config.json", "r+b") as f:
        f.truncate(1 << 40)
    all_refuse(folder, tmp_path, "config.json", "description", str(MAX_JSON))


# ---- links, devices, pipes ------------------------------------------------------------------------


def test_links(tmp_path, folder, method):
    # as in a cache of downloads: links to files elsewhere are read
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("config.json", "teacher.safetensors"):
        (linked / name).symlink_to(folder / name)
    (tmp_path / "whole").symlink_to(folder)
    for path in (linked, tmp_path / "whole"):
        assert torch.equal(convert.load_encoder(path).cls_token, method.teacher.cls_token)
    # loops and links to nowhere end
    for name, target in (("config.json", "config.json"), ("teacher.safetensors", "/nowhere/at/all")):
        (linked / name).unlink()
        (linked / name).symlink_to(target)
        refused(lambda: convert.load_encoder(linked), "linked")
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: convert.load_encoder(tmp_path / "loop"), "loop")
    with pytest.raises(StorageError, match="loop"):
        export(folder, tmp_path / "loop" / "out")
    # a link is never replaced, and nothing is written through it
    for name, target in (("out", "elsewhere"), ("out2", str(folder))):
        (tmp_path / name).symlink_to(target)
        refused(lambda n=name: export(folder, tmp_path / n, force=True), name, "symbolic link")
        refused(lambda n=name: convert.import_released(folder / "teacher.safetensors", tmp_path / n), name)
    assert not (tmp_path / "elsewhere").exists()
    assert load_file(folder / "teacher.safetensors").keys() >= {"cls_token"}


def test_devices_and_pipes_do_not_hang(tmp_path, folder):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", "/dev/null", tmp_path / "pipe"):
        refused(lambda p=path: convert.load_encoder(p), "neither a file nor a folder")
        refused(lambda p=path: convert.import_released(p, tmp_path / "out"), "not a file")
        refused(lambda p=path: export(p, tmp_path / "out"), "neither a file nor a folder")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(lambda: convert.load_encoder(folder), "config.json is missing")
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_paths(tmp_path):
    for path in ("", "\0", "x" * 5000, tmp_path / "a" / ".." / "b"):
        with pytest.raises(UsageError):
            convert.load_encoder(path)
