"""Checkpoint files of the released code and bare encoder weights, made here in the published layouts.

Covers: import of a pretraining checkpoint, both networks or one; fine-tuning and linear-probe checkpoints; grids, heads
and sizes that shapes do not tell; other precisions; incomplete files; `--force` and what it never replaces.
"""

from __future__ import annotations

import argparse
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from extrema_fast import config as c
from extrema_fast.config import ModelConfig
from extrema_fast.errors import StorageError, UsageError
from extrema_fast.models.encoder import Encoder
from extrema_fast.weights.load import import_released, load_encoder, load_metadata
from extrema_fast.weights.released import mlp_ratio
from tests.weights._weights import CFG, IMAGES, fine_tuned, perturbed, refused, released, same


def resave(file, change) -> None:
    data = torch.load(file, weights_only=True)
    change(data)
    torch.save(data, file)


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def saved(tmp_path, encoder: Encoder) -> Path:
    torch.save(encoder.state_dict(), tmp_path / "bare.pth")
    return tmp_path / "bare.pth"


# ---- pretraining ----------------------------------------------------------------------------------


def test_import(file, tmp_path, method):
    out = import_released(file, tmp_path / "out")
    assert out == tmp_path / "out"
    meta = load_metadata(out)
    model = c.from_dict({"model": meta["model"]}, CFG).model
    assert model.shape == (64, 2, 1) and model.img_size == (16, 16) and model.patch_size == 8
    assert model.mlp_ratio == 2.0 and model.pool_depth == 2
    assert meta["source"] == {"file": "checkpoint.pth", "arch": "vit_base", "epoch": 300}
    assert meta["data"]["mean"] == [0.485, 0.456, 0.406]
    for which in ("student", "teacher"):
        for source in (out, file):
            assert same(load_encoder(source, which), getattr(method, which))


def test_importing_one_network(file, tmp_path, method):
    out = import_released(file, tmp_path / "s", which="student")
    assert names(out) == ["config.json", "student.safetensors"]
    # the folder knows which one it holds, and so does a folder made of its file
    again = import_released(out / "student.safetensors", tmp_path / "again")
    for folder in (out, again):
        assert same(load_encoder(folder), method.student)
    refused(lambda: load_encoder(out, "teacher"), "no teacher weights", "student")
    refused(lambda: import_released(file, tmp_path / "x", which="ema"), "which", "'ema'")
    assert not (tmp_path / "x").exists()


def test_files_of_older_torch_and_files_with_plain_arguments(file, method):
    torch.save(released(method), file, _use_new_zipfile_serialization=False)
    assert same(load_encoder(file), method.teacher)
    torch.save(released(method, epoch="300", args=argparse.Namespace(lr=0.1, batch=[1, 2])), file)
    assert same(load_encoder(file), method.teacher) and load_metadata(file)["source"]["epoch"] is None
    # the allowance ends with the call
    with pytest.raises(Exception, match="Namespace"):
        torch.load(file, weights_only=True)


def momentum(name: str, value):
    return lambda d: d["state_dict"].update({f"module.momentum_encoder.{name}": value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("state_dict"), ["`state_dict`", "found: epoch, arch"]),
        (lambda d: d.update(state_dict={"a": 1}), ["`state_dict`"]),
        (lambda d: d["state_dict"].update({"module.queue": torch.ones(1)}), ["unknown", "queue"]),
        (lambda d: d["state_dict"].pop("module.momentum_encoder.norm.bias"), ["(teacher)", "norm.bias"]),
        (lambda d: d["state_dict"].pop("module.momentum_encoder.pos_embed"), ["pos_embed is missing"]),
        (momentum("extra", torch.ones(1)), ["(teacher)", "unknown: extra"]),
        (momentum("norm.bias", torch.full((64,), float("nan"))), ["(teacher)", "not finite: norm.bias"]),
        (momentum("pos_embed", torch.zeros(1, 5, 64)), ["5 rows", "grid="]),
        (momentum("pos_embed", torch.zeros(1, 4, 32)), ["pos_embed [1, 4, 32]"]),
        (momentum("patch_embed.proj.weight", torch.zeros(64, 9)), ["patch_embed.proj.weight is [64, 9]"]),
        (
            lambda d: d.update(state_dict={k: v for k, v in d["state_dict"].items() if "momentum" not in k}),
            ["module.momentum_encoder"],
        ),
    ],
)
def test_incomplete_files(file, tmp_path, change, words):
    resave(file, change)
    refused(lambda: import_released(file, tmp_path / "out"), "checkpoint.pth", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("shift", "learned"), [(2e-5, True), (5e-6, False)])
def test_a_table_that_is_not_the_formula_is_learned(file, shift, learned):
    resave(file, lambda d: d["state_dict"]["module.momentum_encoder.pos_embed"].add_(shift))
    assert isinstance(load_encoder(file).pos_embed, torch.nn.Parameter) == learned


# ---- the folder that is written -------------------------------------------------------------------


def test_force_replaces_an_import_and_nothing_else(file, folder, tmp_path):
    out = import_released(file, tmp_path / "out")
    refused(lambda: import_released(file, out), "not empty", "--force")
    import_released(file, out, which="teacher", force=True)
    assert names(out) == ["config.json", "teacher.safetensors"]
    # a file of the user's own inside
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    refused(lambda: import_released(file, out, force=True), "--force", "notes.txt")
    # weights of a run look alike and are not replaced
    refused(lambda: import_released(file, folder, force=True), "--force", "neither")
    refused(lambda: import_released(file, file), "not a folder")
    refused(lambda: import_released(folder, tmp_path / "b"), "needs no import", "export")
    refused(lambda: import_released(tmp_path / "none.pth", tmp_path / "b"), "no such file")
    assert names(out)[1:] == ["notes.txt", "teacher.safetensors"] and load_metadata(folder)["step"] == 7
    assert names(tmp_path) == ["checkpoint.pth", "out", "w"]


def test_files_are_readable_as_the_umask_says(file, tmp_path):
    before = os.umask(0o027)
    try:
        out = import_released(file, tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o640}


@pytest.mark.parametrize("name", ["is_file", "exists"])
def test_places_that_may_not_be_read(file, tmp_path, monkeypatch, name):
    def denied(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, name, denied)
    refused(lambda: load_encoder(tmp_path / "closed"), "closed", "Permission denied")
    with pytest.raises((UsageError, StorageError), match="Permission denied"):
        import_released(file, tmp_path / "out")


# ---- fine-tuning and linear probe -----------------------------------------------------------------


def test_a_fine_tuned_checkpoint(tmp_path):
    data, own = fine_tuned()
    file = tmp_path / "checkpoint-99.pth"
    torch.save(data, file)
    out = import_released(file, tmp_path / "out")
    assert names(out) == ["config.json", "model.safetensors"]
    for source in (file, out, out / "model.safetensors"):
        encoder = load_encoder(source)
        assert encoder.num_classes == 5 and encoder.global_pool == "avg" and encoder.pos_embed.requires_grad
        assert encoder.preprocess().metadata["interpolation"] == "bicubic"
        # neither teacher nor student: answers to any name
        assert same(encoder, own) and same(load_encoder(source, "student"), own)
    features, fresh = load_encoder(out, num_classes=0), load_encoder(out, num_classes=7)
    with torch.no_grad():
        assert torch.equal(features(IMAGES), own.forward_head(own.forward_features(IMAGES), pre_logits=True))
    assert fresh(IMAGES).shape == (2, 7) and fresh.head.weight.abs().max() < 1e-3
    # a learned table is resampled
    assert load_encoder(out, img_size=(24, 40))(torch.randn(1, 3, 24, 40)).shape == (1, 5)
    refused(lambda: load_encoder(out, pos_embed="sincos"), "pos_embed", "learned")
    refused(lambda: load_encoder(out, global_pool="token"), "global_pool", "no class head")
    refused(lambda: load_encoder(out, fc_norm=False), "fc_norm")


def test_layer_scale_of_the_trunk_is_folded_in(tmp_path):
    data, own = fine_tuned()
    for i, block in enumerate(own.blocks):
        for name, module in (("gamma_1", block.attn.proj), ("gamma_2", block.mlp.fc2)):
            gamma = data["model"][f"blocks.{i}.{name}"] = torch.rand(64) + 0.5
            with torch.no_grad():
                module.weight.mul_(gamma[:, None])
                module.bias.mul_(gamma)
    torch.save(data, tmp_path / "scaled.pth")
    with torch.no_grad():
        assert torch.allclose(load_encoder(tmp_path / "scaled.pth")(IMAGES), own(IMAGES), atol=1e-6)


def test_a_linear_probe_keeps_the_pretrained_features(tmp_path, method):
    state = {f"module.{k}": v for k, v in method.teacher.state_dict().items()}
    probe = {"module.head.0.running_mean": torch.zeros(64), "module.head.1.weight": torch.ones(9, 64)}
    torch.save({"epoch": 3, "arch": "vit_base", "state_dict": state | probe}, tmp_path / "probe.pth")
    assert same(load_encoder(tmp_path / "probe.pth"), method.teacher)


def test_a_linear_probe_with_its_head(tmp_path):
    # as main_lincls.py makes it: no norm, BatchNorm without weights and with a counter before the classifier
    own = perturbed(Encoder(CFG.model, final_norm=False))
    own.head = torch.nn.Sequential(torch.nn.BatchNorm1d(64, affine=False), torch.nn.Linear(64, 9))
    with torch.no_grad():
        own.head.train()(torch.randn(50, 64) * 3 + 1)
        own.eval()
        wanted, features = own(IMAGES), own.encode(IMAGES).cls
    state = {f"module.{k}": v for k, v in own.state_dict().items()}
    assert state["module.head.0.num_batches_tracked"].dtype == torch.int64
    file = tmp_path / "probe.pth"
    torch.save({"epoch": 9, "arch": "vit_base", "state_dict": state, "best_acc1": torch.tensor(7.0)}, file)
    for source in (file, import_released(file, tmp_path / "out")):
        encoder = load_encoder(source)
        with torch.no_grad():
            assert encoder.num_classes == 9 and torch.equal(encoder.encode(IMAGES).cls, features)
            torch.testing.assert_close(encoder(IMAGES), wanted)
            assert torch.equal(load_encoder(source, num_classes=0)(IMAGES), features)
    state["module.head.1.weight"] = torch.zeros(9, 32)
    torch.save({"state_dict": state}, file)
    refused(lambda: load_encoder(file), "probe.pth", "head.0 and head.1")


def test_fine_tuned_with_the_first_patch_token(tmp_path):
    data, own = fine_tuned()
    state = {k.replace("fc_norm.", "norm."): v for k, v in data["model"].items()}
    torch.save({"model": state | {"cls_token": torch.zeros(1, 1, 64)}}, tmp_path / "use_cls.pth")
    text = refused(lambda: load_encoder(tmp_path / "use_cls.pth"), "use_cls.pth", "--use_cls")
    assert "timm" not in text


# ---- what shapes do not tell ----------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (3, 5), (2, 8), (4, 4)])
def test_the_fixed_table_tells_its_grid(tmp_path, grid):
    encoder = perturbed(Encoder(replace(CFG.model, img_size=(8 * grid[0], 8 * grid[1]))))
    loaded = load_encoder(saved(tmp_path, encoder))
    assert loaded.grid == grid and not isinstance(loaded.pos_embed, torch.nn.Parameter)
    assert same(loaded, encoder)


def test_a_learned_table_that_is_not_square(tmp_path):
    data, own = fine_tuned(grid=(3, 7))
    file = tmp_path / "wide.pth"
    torch.save(data, file)
    refused(lambda: load_encoder(file), "21 rows", "grid=")
    refused(lambda: load_encoder(file, grid=(4, 4)), "4 x 4", "21 rows")
    out = import_released(file, tmp_path / "out", grid=(3, 7))
    for loaded in (load_encoder(file, grid=(3, 7)), load_encoder(out)):
        assert loaded.grid == (3, 7) and same(loaded, own)


def test_heads_that_are_not_of_64(tmp_path):
    encoder = perturbed(Encoder(replace(CFG.model, width=48, heads=3, mlp_ratio=2.7)))
    file = saved(tmp_path, encoder)
    refused(lambda: load_encoder(file), "width 48", "num_heads")
    refused(lambda: load_encoder(file, num_heads=5), "num_heads 5", "48")
    with torch.no_grad():
        assert torch.equal(load_encoder(file, num_heads=3)(IMAGES), encoder(IMAGES))


def test_every_mlp_width_is_found_exactly():
    for width in (48, 64, 192, 388):
        for hidden in range(1, 3 * width, 7):
            assert int(width * mlp_ratio(hidden, width)) == hidden


def test_sizes_are_named_where_they_have_a_name(tmp_path):
    for model, name in (
        (ModelConfig("tiny", img_size=(16, 16)), "tiny"),
        (replace(CFG.model, width=192, heads=3), "tiny"),
        (replace(CFG.model, width=448, heads=7), "small"),
    ):
        file = saved(tmp_path, Encoder(model))
        assert load_metadata(file)["model"]["size"] == name
        assert load_encoder(file).config.shape == model.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(tmp_path, method, dtype):
    state = {k: v.to(dtype) for k, v in method.teacher.state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    encoder = load_encoder(tmp_path / "half.pth")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert not isinstance(encoder.pos_embed, torch.nn.Parameter)
    assert torch.equal(encoder.cls_token, state["cls_token"].float())


def test_without_qkv_bias(tmp_path):
    encoder = perturbed(Encoder(CFG.model))
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.bias.zero_()
    state = {k: v for k, v in encoder.state_dict().items() if not k.endswith("qkv.bias")}
    torch.save(state, tmp_path / "bare.pth")
    assert same(load_encoder(tmp_path / "bare.pth"), encoder)
    # some without it are damage, not an option of training
    torch.save(state | {"blocks.0.attn.qkv.bias": torch.zeros(192)}, tmp_path / "bare.pth")
    refused(lambda: load_encoder(tmp_path / "bare.pth"), "missing: blocks.1.attn.qkv.bias")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
        lambda state: {f"encoder._orig_mod.{k}": v for k, v in state.items()},
        lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()} | {"probe.weight": torch.zeros(2)}},
        lambda state: {"model": {f"student.backbone.{k}": v for k, v in state.items()}},
        lambda state: {"student": {}, "teacher": {f"module.backbone.{k}": v for k, v in state.items()}},
        lambda state: {f"student.{k}": v + 1 for k, v in state.items()} | {f"teacher.{k}": v for k, v in state.items()},
    ],
    ids=["compile", "DDP of compile", "compile inside", "Lightning", "student", "DINO", "two networks"],
)  # fmt: skip
def test_weights_inside_wrappers(tmp_path, method, wrap):
    state = method.teacher.state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")
    loaded = load_encoder(tmp_path / "w.pth", img_size=method.teacher.img_size)
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
