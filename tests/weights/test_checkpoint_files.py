"""Checkpoint files of the released code and bare encoder weights, made here in the published layouts.

Covers: import of a pretraining checkpoint, both networks or one; fine-tuning checkpoints (pickled arguments,
learned table, norm after pooling, classifier, layer scale) and linear-probe checkpoints; grids and heads that
shapes do not tell; half precision, missing qkv bias; damage; an existing output folder, `--force` and what it
never replaces.
"""

from __future__ import annotations

import argparse
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from extrema_fast import config as c
from extrema_fast.config import ModelConfig
from extrema_fast.errors import StorageError, UsageError
from extrema_fast.models.encoder import Encoder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.weights import load as convert
from extrema_fast.weights.architecture import _ratio
from tests.weights._weights import CFG, IMAGES, Malicious, refused, released, trained


@pytest.fixture
def method() -> ExtreMA:
    return trained()


@pytest.fixture
def file(tmp_path, method):
    torch.save(released(method), tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def resave(file, change) -> None:
    data = torch.load(file, weights_only=True)
    change(data)
    torch.save(data, file)


def test_import(file, tmp_path, method):
    out = convert.import_released(file, tmp_path / "out")
    assert out == tmp_path / "out"
    meta = convert.load_metadata(out)
    model = c.from_dict({"model": meta["model"]}, CFG).model
    assert model.shape == (64, 2, 1) and model.img_size == (16, 16) and model.patch_size == 8
    assert model.mlp_ratio == 2.0 and model.pool_depth == 2
    assert meta["head"] == {"hidden": 24, "out": 12, "predictor_hidden": 20}
    assert meta["source"] == {"file": "checkpoint.pth", "arch": "vit_base", "epoch": 300}
    assert meta["data"]["mean"] == [0.485, 0.456, 0.406]
    for which in ("student", "teacher"):
        own = getattr(method, which).state_dict()
        for source in (out, file):
            loaded = convert.load_encoder(source, which)
            assert not loaded.training
            assert all(torch.equal(v, own[k]) for k, v in loaded.state_dict().items())
    fresh = ExtreMA(CFG)
    for source in (out, file):
        convert.load_method_weights(fresh, source)
        assert all(torch.equal(v, method.state_dict()[k]) for k, v in fresh.state_dict().items())


def test_import_overwrites_nothing(file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    refused(lambda: convert.import_released(file, out), "out", "not empty")
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    refused(lambda: convert.import_released(file, out / "mine.txt"), "not a folder")
    refused(lambda: convert.import_released(file, out, force=True), "--force", "mine.txt")
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    refused(lambda: convert.import_released(tmp_path, tmp_path / "b"), "not a file", "export")
    refused(lambda: convert.import_released(tmp_path / "none.pth", tmp_path / "b"), "no such file")
    assert not (tmp_path / "b").exists()


def test_files_of_older_torch_and_files_with_plain_arguments(file, tmp_path, method):
    torch.save(released(method), file, _use_new_zipfile_serialization=False)
    assert torch.equal(convert.load_encoder(file).cls_token, method.teacher.cls_token)
    torch.save(released(method, args=argparse.Namespace(lr=0.1, batch=[1, 2])), file)
    assert torch.equal(convert.load_encoder(file).cls_token, method.teacher.cls_token)
    # the allowance ends with the call
    with pytest.raises(Exception, match="Namespace"):
        torch.load(file, weights_only=True)


@pytest.mark.parametrize("place", ["state_dict", "optimizer", "extra"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_does_not_run(tmp_path, method, place, zipped):
    target = tmp_path / "was_here"
    data = released(method) | {place: Malicious(target)}
    file = tmp_path / "bad.pth"
    torch.save(data, file, _use_new_zipfile_serialization=zipped)
    for call in (
        lambda: convert.load_encoder(file),
        lambda: convert.import_released(file, tmp_path / "out"),
        lambda: convert.load_method_weights(method, file),
    ):
        text = refused(call, "bad.pth", "read safely", "mkdir")
        # torch's own text advises to load it anyway
        assert "weights_only" not in text
    assert not target.exists() and not (tmp_path / "out").exists()
    # the test can fail: unsafe loading does run it
    torch.load(file, weights_only=False)
    assert target.exists()


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "zip of something else"])
def test_damaged_released_files(file, tmp_path, damage):
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        # in the pickle, near the front
        file.write_bytes(data[:90] + bytes(255 - b for b in data[90:400]) + data[400:])
    elif damage == "zip of something else":
        (tmp_path / "zipped").mkdir()
        file.unlink()
        shutil.move(shutil.make_archive(str(tmp_path / "z"), "zip", tmp_path / "zipped"), file)
    else:
        file.write_bytes(b"" if damage == "empty" else b"not a checkpoint at all\n" * 9)
    refused(lambda: convert.load_encoder(file), "checkpoint.pth", "read safely")
    refused(lambda: convert.import_released(file, tmp_path / "out"), "read safely")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("state_dict"), ["`state_dict`", "found: epoch, arch"]),
        (lambda d: d.update(state_dict={1: torch.ones(1)}), ["`state_dict`"]),
        (lambda d: d.update(state_dict={"a": 1}), ["`state_dict`"]),
        (lambda d: d["state_dict"].update({"module.queue": torch.ones(1)}), ["unknown keys: module.queue"]),
        (
            lambda d: d["state_dict"].pop("module.momentum_encoder.norm.bias"),
            ["(teacher)", "missing: norm.bias"],
        ),
        (lambda d: d["state_dict"].pop("module.base_encoder.norm.bias"), ["(student)", "missing: norm.bias"]),
        (lambda d: d["state_dict"].pop("module.momentum_encoder.pos_embed"), ["pos_embed is missing"]),
        (
            lambda d: d["state_dict"].update({"module.base_encoder.extra": torch.ones(1)}),
            ["(student)", "unknown: extra"],
        ),
        (
            lambda d: d["state_dict"].update({"module.momentum_encoder.pos_embed": torch.zeros(1, 5, 64)}),
            ["5 rows", "square"],
        ),
        (
            lambda d: d["state_dict"].update({"module.momentum_encoder.pos_embed": torch.zeros(4, 64)}),
            ["pos_embed [4, 64]"],
        ),
        (
            lambda d: d["state_dict"].update({"module.momentum_encoder.pos_embed": torch.zeros(1, 4, 32)}),
            ["pos_embed [1, 4, 32]"],
        ),
        (
            lambda d: d["state_dict"].update(
                {"module.momentum_encoder.patch_embed.proj.weight": torch.zeros(64, 9)}
            ),
            ["patch_embed.proj.weight is [64, 9]"],
        ),
        (
            lambda d: d.update(state_dict={k: v for k, v in d["state_dict"].items() if "momentum" not in k}),
            ["module.momentum_encoder"],
        ),
    ],
)
def test_released_files_that_do_not_fit(file, tmp_path, change, words):
    resave(file, change)
    refused(lambda: convert.import_released(file, tmp_path / "out"), "checkpoint.pth", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("epoch", [None, "300", [1]])
def test_an_odd_epoch_is_no_obstacle(file, tmp_path, epoch):
    resave(file, lambda d: d.update(epoch=epoch))
    out = convert.import_released(file, tmp_path / "out")
    assert convert.load_metadata(out)["source"]["epoch"] is None


def test_a_bare_tensor_or_list(tmp_path):
    for data in (torch.ones(3), [1, 2]):
        torch.save(data, tmp_path / "x.pth")
        refused(lambda: convert.load_encoder(tmp_path / "x.pth"), "x.pth", "found: " + type(data).__name__)


# ---- parts of a checkpoint, and replacing ---------------------------------------------------------


def test_sizes_are_named_where_they_have_a_name(tmp_path):
    for model, name in (
        (ModelConfig("tiny", img_size=(16, 16)), "tiny"),
        (replace(CFG.model, width=192, heads=3), "tiny"),
        (replace(CFG.model, width=448, heads=7), "small"),
    ):
        torch.save(Encoder(model).state_dict(), tmp_path / "bare.pth")
        assert convert.load_metadata(tmp_path / "bare.pth")["model"]["size"] == name
        assert convert.load_encoder(tmp_path / "bare.pth").config.shape == model.shape


def test_files_are_readable_as_the_umask_says(file, tmp_path):
    before = os.umask(0o027)
    try:
        out = convert.import_released(file, tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o640}


def test_importing_one_network(file, tmp_path, method):
    out = convert.import_released(file, tmp_path / "s", which="student")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "student.safetensors"]
    # the folder knows which one it holds
    assert torch.equal(convert.load_encoder(out).cls_token, method.student.cls_token)
    refused(lambda: convert.load_encoder(out, "teacher"), "no teacher weights", "student")
    refused(lambda: convert.load_method_weights(method, out), "holds student, no teacher", "both")
    refused(lambda: convert.import_released(file, tmp_path / "x", which="ema"), "which", "'ema'")
    # and so does a folder made of its file
    again = convert.import_released(out / "student.safetensors", tmp_path / "again")
    assert torch.equal(convert.load_encoder(again).cls_token, method.student.cls_token)
    assert not (tmp_path / "x").exists()


def test_force_replaces_an_import_and_nothing_else(file, tmp_path, method):
    out = convert.import_released(file, tmp_path / "out")
    refused(lambda: convert.import_released(file, out), "not empty", "--force")
    convert.import_released(file, out, which="teacher", force=True)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "teacher.safetensors"]
    # a file of the user's own inside
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    refused(lambda: convert.import_released(file, out, force=True), "--force", "notes.txt")
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"
    # weights of a run look alike and are none of ours to replace
    run = convert.save_weights(tmp_path / "run", method, convert.weights_meta(CFG, 7))
    refused(lambda: convert.import_released(file, run, force=True), "--force", "neither")
    assert convert.load_metadata(run)["step"] == 7
    link = tmp_path / "link"
    link.symlink_to(run)
    refused(lambda: convert.import_released(file, link, force=True), "symbolic link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(lambda: convert.import_released(file, tmp_path / "dangling"), "symbolic link")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def test_a_failing_write_leaves_the_earlier_import(file, tmp_path, monkeypatch):
    out = convert.import_released(file, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("extrema_fast.weights.files.write_json", full)
    with pytest.raises(StorageError, match="No space left") as error:
        convert.import_released(file, out, force=True)
    assert error.value.exit_code == 5
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def test_places_that_may_not_be_looked_at(file, tmp_path, monkeypatch):
    def denied(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    for name in ("is_file", "exists"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, denied)
            refused(lambda: convert.load_encoder(tmp_path / "closed"), "closed", "Permission denied")
            with pytest.raises((UsageError, StorageError), match="Permission denied"):
                convert.import_released(file, tmp_path / "out")


def test_values_that_are_not_finite(file, tmp_path):
    resave(file, lambda d: d["state_dict"]["module.momentum_encoder.norm.bias"].fill_(float("nan")))
    refused(lambda: convert.import_released(file, tmp_path / "out"), "(teacher)", "not finite: norm.bias")
    assert not (tmp_path / "out").exists()


# ---- fine-tuning and linear probe -----------------------------------------------------------------


def fine_tuned(grid=(2, 2), classes=5, **extra) -> tuple[dict, Encoder]:
    """A checkpoint of the official fine-tuning, and the encoder that it stands for."""
    model = replace(CFG.model, img_size=(8 * grid[0], 8 * grid[1]))
    encoder = Encoder(model, classes, global_pool="avg", fc_norm=True, pos_embed="learned").eval()
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    data = {
        # kept by that code, and read by nobody
        "model": {"cls_token": torch.randn(1, 1, 64), **state},
        "optimizer": {"state": {}},
        "epoch": 99,
        "scaler": {"scale": 1.0},
        "args": argparse.Namespace(lr=1e-3, model="vit_base_patch16_224"),
    }
    return data | extra, encoder


def test_a_fine_tuned_checkpoint(tmp_path):
    data, own = fine_tuned()
    file = tmp_path / "checkpoint-99.pth"
    torch.save(data, file)
    out = convert.import_released(file, tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    for source in (file, out, out / "model.safetensors"):
        encoder = convert.load_encoder(source)
        assert encoder.num_classes == 5 and encoder.global_pool == "avg" and encoder.pos_embed.requires_grad
        with torch.no_grad():
            assert torch.equal(encoder(IMAGES), own(IMAGES))
        assert encoder.preprocess().metadata["interpolation"] == "bicubic"
        # neither teacher nor student: taken under any name
        assert torch.equal(convert.load_encoder(source, "student").pos_embed, own.pos_embed)
    features = convert.load_encoder(out, num_classes=0)
    with torch.no_grad():
        assert torch.equal(features(IMAGES), own.forward_head(own.forward_features(IMAGES), pre_logits=True))
    fresh = convert.load_encoder(out, num_classes=7)
    assert fresh(IMAGES).shape == (2, 7) and fresh.head.weight.abs().max() < 1e-3
    # a learned table is resampled
    assert convert.load_encoder(out, img_size=(24, 40))(torch.randn(1, 3, 24, 40)).shape == (1, 5)
    refused(lambda: convert.load_encoder(out, pos_embed="sincos"), "learned")
    refused(lambda: convert.load_encoder(out, global_pool="token"), "no class head")
    refused(lambda: convert.load_encoder(out, fc_norm=False), "norm after pooling")


def test_a_learned_table_that_is_not_square(tmp_path):
    data, own = fine_tuned(grid=(3, 7))
    file = tmp_path / "wide.pth"
    torch.save(data, file)
    refused(lambda: convert.load_encoder(file), "21 rows", "square", "grid=")
    refused(lambda: convert.load_encoder(file, grid=(4, 5)), "4 x 5", "21 rows")
    encoder = convert.load_encoder(file, grid=(3, 7))
    images = torch.randn(1, 3, 24, 56)
    with torch.no_grad():
        assert torch.equal(encoder(images), own(images))
    out = convert.import_released(file, tmp_path / "out", grid=(3, 7))
    assert convert.load_encoder(out).grid == (3, 7)


def test_layer_scale_of_the_trunk_is_folded_in(tmp_path):
    data, own = fine_tuned()
    for i in range(2):
        for name in ("gamma_1", "gamma_2"):
            data["model"][f"blocks.{i}.{name}"] = torch.rand(64) + 0.5
    torch.save(data, tmp_path / "scaled.pth")
    encoder = convert.load_encoder(tmp_path / "scaled.pth")
    hooks = []
    for i, block in enumerate(own.blocks):
        for name, module in (("gamma_1", block.attn.proj), ("gamma_2", block.mlp.fc2)):
            gamma = data["model"][f"blocks.{i}.{name}"]
            with torch.no_grad():
                module.weight.mul_(gamma[:, None])
                module.bias.mul_(gamma)
            hooks.append(gamma)
    assert len(hooks) == 4
    with torch.no_grad():
        assert torch.allclose(encoder(IMAGES), own(IMAGES), atol=1e-6)


def test_a_linear_probe_keeps_the_pretrained_features(tmp_path, method):
    state = {f"module.{k}": v for k, v in method.teacher.state_dict().items()}
    probe = {"module.head.0.running_mean": torch.zeros(64), "module.head.1.weight": torch.ones(9, 64)}
    torch.save({"epoch": 3, "arch": "vit_base", "state_dict": state | probe}, tmp_path / "probe.pth")
    encoder = convert.load_encoder(tmp_path / "probe.pth")
    with torch.no_grad():
        assert torch.equal(encoder(IMAGES), method.teacher.eval()(IMAGES))


# ---- what shapes do not tell ----------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (3, 5), (2, 8), (4, 4), (6, 6)])
def test_the_fixed_table_tells_its_grid(tmp_path, grid):
    model = replace(CFG.model, img_size=(8 * grid[0], 8 * grid[1]))
    encoder = Encoder(model).eval()
    torch.save(encoder.state_dict(), tmp_path / "bare.pth")
    loaded = convert.load_encoder(tmp_path / "bare.pth")
    assert loaded.grid == grid and not isinstance(loaded.pos_embed, torch.nn.Parameter)
    images = torch.randn(1, 3, *model.img_size)
    with torch.no_grad():
        assert torch.equal(loaded(images), encoder(images))


def test_a_released_table_that_is_not_the_formula_is_learned(file):
    resave(file, lambda d: d["state_dict"]["module.momentum_encoder.pos_embed"].add_(2e-5))
    assert isinstance(convert.load_encoder(file).pos_embed, torch.nn.Parameter)
    resave(file, lambda d: d["state_dict"]["module.momentum_encoder.pos_embed"].sub_(1.5e-5))
    assert not isinstance(convert.load_encoder(file).pos_embed, torch.nn.Parameter)


def test_heads_that_are_not_of_64(tmp_path):
    model = replace(CFG.model, width=48, heads=3, mlp_ratio=2.7)
    encoder = Encoder(model).eval()
    torch.save(encoder.state_dict(), tmp_path / "bare.pth")
    refused(lambda: convert.load_encoder(tmp_path / "bare.pth"), "width 48", "64", "num_heads")
    refused(lambda: convert.load_encoder(tmp_path / "bare.pth", num_heads=5), "num_heads 5", "48")
    with torch.no_grad():
        assert torch.equal(convert.load_encoder(tmp_path / "bare.pth", num_heads=3)(IMAGES), encoder(IMAGES))


def test_every_mlp_width_is_told_exactly():
    for width in (48, 64, 192, 388):
        for hidden in range(1, 3 * width, 7):
            assert int(width * _ratio(hidden, width)) == hidden


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(tmp_path, method, dtype):
    state = {k: v.to(dtype) for k, v in method.teacher.state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    encoder = convert.load_encoder(tmp_path / "half.pth")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert not isinstance(encoder.pos_embed, torch.nn.Parameter)
    assert torch.equal(encoder.cls_token, state["cls_token"].float())


def test_without_qkv_bias(tmp_path, method):
    state = {k: v for k, v in method.teacher.state_dict().items() if not k.endswith("qkv.bias")}
    torch.save(state, tmp_path / "bare.pth")
    with torch.no_grad():
        for block in method.teacher.blocks:
            block.attn.qkv.bias.zero_()
        wanted = method.teacher.eval()(IMAGES)
        assert torch.equal(convert.load_encoder(tmp_path / "bare.pth")(IMAGES), wanted)
    # some without it are damage, not an option of training
    state["blocks.0.attn.qkv.bias"] = torch.zeros(192)
    torch.save(state, tmp_path / "bare.pth")
    refused(lambda: convert.load_encoder(tmp_path / "bare.pth"), "missing: blocks.1.attn.qkv.bias")
