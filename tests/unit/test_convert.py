"""Weights in and out.

Covers: save and load of a method's weights, both networks; a run folder's newest complete weights; options
of `load_encoder`; the run's own initial encoder; filling a method; released files made here in the
published layout; every refusal: missing, empty, damaged, truncated, other architecture, unknown keys,
pickled code that must not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from extrema_fast import config as c
from extrema_fast import convert
from extrema_fast.errors import UsageError
from extrema_fast.method import ExtreMA

CFG = c.from_dict(
    {
        "model": {
            "img_size": [16, 16],
            "patch_size": 8,
            "width": 64,
            "depth": 2,
            "heads": 1,
            "mlp_ratio": 2.0,
        },
        "head": {"hidden": 24, "out": 12, "predictor_hidden": 20},
        "data": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        "mask": {"views": 1, "keep": 2},
        "train": {"seed": 3},
    },
    c.smoke(),
)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def trained() -> ExtreMA:
    """A method whose two networks differ from each other and from their start."""
    method = ExtreMA(CFG)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return method


@pytest.fixture
def method() -> ExtreMA:
    return trained()


@pytest.fixture
def folder(tmp_path, method):
    return convert.save_weights(tmp_path / "w", method, convert.weights_meta(CFG, 7))


def refused(call, *words: str) -> str:
    with pytest.raises(UsageError) as error:
        call()
    text = str(error.value)
    assert error.value.exit_code == 2 and "\n" not in text
    for word in words:
        assert word in text, text
    return text


# ---- save and load --------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_round_trip(folder, method, which):
    encoder = convert.load_encoder(folder, which)
    own = getattr(method, which)
    assert not encoder.training
    assert encoder.state_dict().keys() == own.state_dict().keys()
    assert all(torch.equal(v, own.state_dict()[k]) for k, v in encoder.state_dict().items())
    with torch.no_grad():
        assert torch.equal(encoder(IMAGES), own.eval()(IMAGES))
    assert encoder.mean == (0.1, 0.2, 0.3) and encoder.std == (0.4, 0.5, 0.6)
    assert encoder.preprocess().metadata["mean"] == (0.1, 0.2, 0.3)
    # the file itself is as good as its folder
    assert torch.equal(convert.load_encoder(folder / f"{which}.safetensors", which).cls_token, own.cls_token)


def test_what_a_weights_folder_holds(folder, method):
    assert {p.name for p in folder.iterdir()} == {"config.json", "student.safetensors", "teacher.safetensors"}
    student, teacher = (load_file(folder / f"{w}.safetensors") for w in ("student", "teacher"))
    heads = {f"head.{i}.{x}" for i in (0, 1, 3, 4, 6) for x in ("weight", "bias")}
    predictor = {f"predictor.{i}.{x}" for i in (0, 1, 3) for x in ("weight", "bias")}
    assert set(teacher) == set(method.teacher.state_dict()) | heads
    assert set(student) == set(teacher) | predictor
    assert torch.equal(student["head.6.weight"], method.projector[6].weight)
    assert torch.equal(teacher["head.6.weight"], method.teacher_projector[6].weight)
    meta = convert.load_metadata(folder)
    assert (meta["step"], meta["images"], meta["seed"]) == (7, 7 * 16, 3)
    assert meta["model"] == c.to_dict(CFG.model) and meta["head"] == c.to_dict(CFG.head)


def test_the_teacher_is_the_default(folder, method):
    assert torch.equal(convert.load_encoder(folder).cls_token, method.teacher.cls_token)


def test_options_of_loading(folder):
    plain = convert.load_encoder(folder)
    # another size: another table, the same weights
    wide = convert.load_encoder(folder, img_size=(24, 40))
    assert wide.grid == (3, 5) and wide.pos_embed.shape == (1, 15, 64)
    other = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        assert torch.allclose(wide(other), plain(other), atol=1e-6)
    assert convert.load_encoder(folder, img_size=32).img_size == (32, 32)
    mean = convert.load_encoder(folder, global_pool="avg")
    with torch.no_grad():
        assert torch.allclose(mean(IMAGES), plain.encode(IMAGES).patches.mean(1), atol=1e-6)
    tuned = convert.load_encoder(
        folder, "student", num_classes=5, global_pool="avg", fc_norm=True, pos_embed="learned"
    )
    assert tuned(IMAGES).shape == (2, 5) and tuned.pos_embed.requires_grad
    # a new norm and a new head, not the projector
    assert bool((tuned.fc_norm.weight == 1).all()) and tuned.head.weight.abs().max() < 1e-3
    assert torch.equal(
        tuned.blocks[1].mlp.fc1.weight, convert.load_encoder(folder, "student").blocks[1].mlp.fc1.weight
    )
    refused(lambda: convert.load_encoder(folder, img_size=20), "20", "patch size 8", "16 or 24")


def test_the_runs_own_start(folder):
    start = convert.random_encoder_like(folder)
    assert not start.training and start.mean == (0.1, 0.2, 0.3)
    wanted = ExtreMA(CFG).student.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in start.state_dict().items())


# ---- run folders ----------------------------------------------------------------------------------


def test_a_run_folder_means_its_newest_complete_weights(tmp_path):
    methods = {step: trained() for step in (5, 40, 300)}
    for step, method in methods.items():
        convert.save_weights(
            tmp_path / "weights" / f"step_{step:08d}", method, convert.weights_meta(CFG, step)
        )
    assert convert.load_metadata(tmp_path)["step"] == 300
    assert torch.equal(convert.load_encoder(tmp_path).cls_token, methods[300].teacher.cls_token)
    # cut off while it was written: the description comes last
    (tmp_path / "weights" / "step_00000300" / "config.json").unlink()
    assert convert.load_metadata(tmp_path)["step"] == 40
    assert torch.equal(convert.load_encoder(tmp_path).cls_token, methods[40].teacher.cls_token)
    (tmp_path / "weights" / "step_00009999").mkdir()
    assert convert.weights_folder(tmp_path).name == "step_00000040"


def test_folders_without_weights(tmp_path):
    refused(lambda: convert.load_encoder(tmp_path / "none"), "none", "no such file or folder")
    refused(lambda: convert.load_encoder(tmp_path), "neither a run folder", "found: nothing")
    (tmp_path / "photo.jpg").touch()
    refused(lambda: convert.load_encoder(tmp_path), "neither", "found: photo.jpg")
    (tmp_path / "log.jsonl").touch()
    refused(lambda: convert.load_encoder(tmp_path), "saved no weights yet")
    save_file({"a": torch.ones(1)}, tmp_path / "alone.safetensors")
    refused(lambda: convert.load_encoder(tmp_path / "alone.safetensors"), "alone.safetensors", "config.json")


# ---- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder, keep):
    file = folder / "teacher.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    refused(lambda: convert.load_encoder(folder), "teacher.safetensors", "damaged")
    # the student's file is whole
    convert.load_encoder(folder, "student")


def test_weights_that_are_something_else(folder):
    (folder / "teacher.safetensors").write_bytes(os.urandom(500))
    refused(lambda: convert.load_encoder(folder), "teacher.safetensors", "damaged")
    (folder / "teacher.safetensors").unlink()
    refused(lambda: convert.load_encoder(folder), "no teacher weights")
    refused(lambda: convert.load_encoder(folder, "momentum"), "'teacher' or 'student'", "'momentum'")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "3",
        "null",
        "{}",
        '{"model": 5}',
        '{"model": {"wdth": 64}}',
        '{"model": {"width": "64"}}',
    ],
)
def test_a_description_that_makes_no_sense(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8")
    refused(lambda: convert.load_encoder(folder), "config.json", "not a weights description")


def test_an_undecodable_description(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x80")
    refused(lambda: convert.load_metadata(folder), "config.json", "not a weights description")


def test_weights_of_another_architecture(folder):
    meta = convert.load_metadata(folder)

    def describe(**changes) -> None:
        (folder / "config.json").write_text(
            json.dumps(meta | {"model": meta["model"] | changes}), encoding="utf-8"
        )

    describe(depth=3)
    refused(lambda: convert.load_encoder(folder), "do not fit", "missing: blocks.2.")
    describe(depth=1)
    refused(lambda: convert.load_encoder(folder), "do not fit", "unknown: blocks.1.")
    describe(width=128, heads=2)
    refused(lambda: convert.load_encoder(folder), "do not fit", "shape:", "[64", "[128")
    describe(pool_depth=1)
    refused(lambda: convert.load_encoder(folder), "unknown: blocks_token.1.")


def test_keys_too_many_or_too_few(folder):
    file = folder / "teacher.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"extra.weight": torch.ones(1)}, file)
    refused(lambda: convert.load_encoder(folder), "unknown: extra.weight")
    del tensors["norm.bias"]
    save_file(tensors, file)
    refused(lambda: convert.load_encoder(folder), "missing: norm.bias")


# ---- filling a method -----------------------------------------------------------------------------


def test_initialise_a_method_from_weights(folder, method):
    fresh = ExtreMA(CFG)
    convert.load_method_weights(fresh, folder)
    assert all(torch.equal(v, method.state_dict()[k]) for k, v in fresh.state_dict().items())
    # heads count, too
    other = ExtreMA(c.from_dict({"head": {"out": 16}}, CFG))
    before = {k: v.clone() for k, v in other.state_dict().items()}
    refused(
        lambda: convert.load_method_weights(other, folder),
        "--init-from",
        "another architecture",
        "head.6",
        "12",
        "16",
    )
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    deeper = ExtreMA(c.from_dict({"model": {"depth": 3}}, CFG))
    refused(lambda: convert.load_method_weights(deeper, folder), "blocks.2", "nothing")


# ---- released files -------------------------------------------------------------------------------


def released(method: ExtreMA, **extra) -> dict:
    """What the release's training script saved: wrapped modules, projector as `head`, optimizer, scaler."""
    state = {}
    for old, encoder, projector in (
        ("base_encoder", method.student, method.projector),
        ("momentum_encoder", method.teacher, method.teacher_projector),
    ):
        state |= {f"module.{old}.{k}": v.clone() for k, v in encoder.state_dict().items()}
        state |= {f"module.{old}.head.{k}": v.clone() for k, v in projector.state_dict().items()}
    state |= {f"module.predictor.{k}": v.clone() for k, v in method.predictor.state_dict().items()}
    optimizer = torch.optim.AdamW(method.student_branch.parameters())
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0},
    } | extra


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
    refused(lambda: convert.import_released(file, out / "mine.txt"), "not empty")
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


class Malicious:
    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


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
    refused(
        lambda: convert.load_encoder(file), "checkpoint.pth", "cannot be read" if False else "read safely"
    )
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
            lambda d: d["state_dict"].update({"module.momentum_encoder.pos_embed": torch.zeros(1, 4, 64)}),
            ["not the fixed sin-cos table"],
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
