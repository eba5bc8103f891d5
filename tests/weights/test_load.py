"""Weights folders and what `load_encoder` makes of them.

Covers: save and load of a method's weights, both networks; a run folder's newest complete weights; a single
file with and without its description; every option of loading, the run's own initial encoder; filling a
method; every refusal: missing, empty, damaged, truncated, another architecture, unknown keys, a wrong
`which`, options that the weights cannot give.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from extrema_fast import config as c
from extrema_fast.models.encoder import sincos_table
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.models.resample import adapt_in_chans, resample_patch_kernel
from extrema_fast.weights import load as convert
from tests.weights._weights import CFG, IMAGES, refused, trained


@pytest.fixture
def method() -> ExtreMA:
    return trained()


@pytest.fixture
def folder(tmp_path, method):
    return convert.save_weights(tmp_path / "w", method, convert.weights_meta(CFG, 7))


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


def test_other_channels_and_patches(folder, method):
    own = method.teacher.state_dict()["patch_embed.proj.weight"]
    for chans in (1, 2, 4, 5):
        encoder = convert.load_encoder(folder, in_chans=chans)
        assert torch.equal(encoder.patch_embed.proj.weight, adapt_in_chans(own, chans))
        assert encoder(torch.randn(1, chans, 16, 16)).shape == (1, 64)
        # gray is made from colours
        assert len(encoder.mean) == len(encoder.std) == (3 if chans == 1 else chans)
    small = convert.load_encoder(folder, patch_size=4)
    assert small.patch_size == 4 and small.grid == (4, 4)
    assert torch.equal(small.patch_embed.proj.weight, resample_patch_kernel(own, 4))
    assert torch.equal(small.pos_embed[0], sincos_table(64, (4, 4)))
    # the same grid on a larger image: features hardly change
    large = convert.load_encoder(folder, patch_size=16, img_size=32)
    assert large.grid == (2, 2)
    smooth = torch.nn.functional.interpolate(torch.randn(2, 3, 2, 2), size=16, mode="bicubic")
    wide = torch.nn.functional.interpolate(smooth, size=32, mode="bicubic")
    with torch.no_grad():
        near, far = convert.load_encoder(folder)(smooth), convert.load_encoder(folder)(smooth.flip(0))
        assert (large(wide) - near).norm() < 0.1 * (far - near).norm()
    refused(lambda: convert.load_encoder(folder, in_chans=0), "in_chans", "0")
    refused(lambda: convert.load_encoder(folder, patch_size=5), "patch", "5")


def test_position_coordinates(folder):
    wide = convert.load_encoder(folder, img_size=(24, 32), pos_coords="rescaled")
    table = sincos_table(64, (3, 4), trained=(2, 2))
    assert torch.equal(wide.pos_embed[0], table)
    assert not torch.equal(convert.load_encoder(folder, img_size=(24, 32)).pos_embed[0], table)
    # where it was trained the two are the same
    same = convert.load_encoder(folder, pos_coords="rescaled")
    assert torch.allclose(same.pos_embed[0], sincos_table(64, (2, 2)), atol=1e-6)
    refused(lambda: convert.load_encoder(folder, pos_coords="relative"), "pos_coords", "'relative'")


def test_a_table_saved_at_another_grid_than_trained(folder):
    file = folder / "teacher.safetensors"
    meta = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    meta["encoder"] = {"pos_coords": "rescaled", "pos_grid": [4, 4]}
    (folder / "config.json").write_text(json.dumps(meta), encoding="utf-8")
    refused(lambda: convert.load_encoder(folder), "not the fixed sin-cos table")
    table = sincos_table(64, (2, 2), trained=(4, 4))
    save_file(load_file(file) | {"pos_embed": table[None]}, file)
    assert torch.equal(convert.load_encoder(folder).pos_embed[0], table)
    absolute = convert.load_encoder(folder, pos_coords="absolute")
    assert torch.allclose(absolute.pos_embed[0], sincos_table(64, (2, 2)))
    # back at the grid trained on there is nothing to rescale
    whole = convert.load_encoder(folder, img_size=32)
    assert torch.allclose(whole.pos_embed[0], sincos_table(64, (4, 4)), atol=1e-6)


def test_hints_that_contradict_the_description(folder):
    assert convert.load_encoder(folder, grid=(2, 2), num_heads=4).heads == 4
    refused(lambda: convert.load_encoder(folder, grid=(4, 1)), "grid: 4 x 1", "2 x 2", "img_size")
    refused(lambda: convert.load_encoder(folder, grid=(4,)), "grid", "(rows, columns)")
    refused(lambda: convert.load_encoder(folder, num_heads=5), "num_heads: 5", "64")
    refused(lambda: convert.load_encoder(folder, pos_embed="none"), "pos_embed", "'none'")
    refused(lambda: convert.load_encoder(folder, fc_norm=True), "fc_norm", "avg")
    refused(lambda: convert.load_encoder(folder, global_pool="max"), "global_pool", "'max'")


def test_drop_path_for_fine_tuning(folder):
    assert convert.load_encoder(folder, "student", drop_path_rate=0.25).drop_path_rate == 0.25


# ---- single files ---------------------------------------------------------------------------------


def test_a_file_of_a_folder_is_one_network(folder, method):
    student = folder / "student.safetensors"
    assert torch.equal(convert.load_encoder(student, "student").cls_token, method.student.cls_token)
    # asking for the other one must not read the file beside it
    refused(lambda: convert.load_encoder(student, "teacher"), "holds no teacher weights", "student")
    refused(lambda: convert.load_encoder(student), "holds no teacher weights", "student")


def test_a_bare_file_tells_its_architecture(folder, tmp_path, method):
    bare = tmp_path / "bare" / "any_name.safetensors"
    bare.parent.mkdir()
    bare.write_bytes((folder / "teacher.safetensors").read_bytes())
    encoder = convert.load_encoder(bare)
    assert encoder.heads == 1 and encoder.config.shape == (64, 2, 1) and encoder.img_size == (16, 16)
    with torch.no_grad():
        assert torch.equal(encoder(IMAGES), method.teacher.eval()(IMAGES))
    # a description beside it that is somebody else's changes nothing, neither does the name of a network
    (bare.parent / "config.json").write_text('{"architectures": ["Evil"], "model_type": "evil"}')
    assert torch.equal(convert.load_encoder(bare).cls_token, method.teacher.cls_token)
    bare.rename(bare.parent / "student.safetensors")
    assert torch.equal(
        convert.load_encoder(bare.parent / "student.safetensors").cls_token, method.teacher.cls_token
    )
    assert convert.load_encoder(bare.parent / "student.safetensors", num_heads=2).heads == 2
    refused(
        lambda: convert.load_encoder(bare.parent),
        "config.json",
        "Hugging Face",
        "evil",
        "to read tensors alone give",
        "student.safetensors",
    )


def test_a_run_folders_checkpoint_is_not_its_weights(tmp_path):
    (tmp_path / "COMPLETE").touch()
    refused(lambda: convert.load_encoder(tmp_path), "a checkpoint of a run", "weights/step_*")


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
    refused(
        lambda: convert.load_encoder(tmp_path / "alone.safetensors"),
        "alone.safetensors",
        "not ExtreMA weights",
        "missing: patch_embed.proj.weight",
        "extra: a",
    )
    # tensors without a description say how to read them
    (tmp_path / "log.jsonl").unlink()
    refused(lambda: convert.load_encoder(tmp_path), "config.json is missing", "alone.safetensors")


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
    # nothing is taken in place of what was asked for
    assert convert.load_encoder(folder, "student").cls_token is not None
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
    refused(lambda: convert.load_encoder(folder), "config.json", "description")


def test_an_undecodable_description(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x80")
    refused(lambda: convert.load_metadata(folder), "config.json", "description")


def test_weights_of_another_architecture(folder):
    meta = convert.load_metadata(folder)

    def describe(**changes) -> None:
        (folder / "config.json").write_text(
            json.dumps(meta | {"model": meta["model"] | changes}), encoding="utf-8"
        )

    for change, words in (
        ({"depth": 3}, "depth is 3 in its description, 2 in its tensors"),
        ({"depth": 1}, "depth is 1 in its description, 2"),
        ({"width": 128, "heads": 2}, "width is 128 in its description, 64"),
        ({"pool_depth": 1}, "pool_depth is 1 in its description, 2"),
        ({"mlp_ratio": 3.0}, "hidden is 192 in its description, 128"),
        ({"patch_size": 4}, "patch_size is 4 in its description, 8"),
        ({"in_chans": 1}, "in_chans is 1 in its description, 3"),
        ({"img_size": [24, 16]}, "patches is 6 in its description, 4"),
    ):
        describe(**change)
        refused(lambda: convert.load_encoder(folder), "do not fit", words)
        if change.keys() != {"img_size"}:
            refused(lambda: convert.random_encoder_like(folder), "do not fit", words)
    # heads leave no trace in the shapes: the description is all there is
    describe(heads=2)
    assert convert.load_encoder(folder).heads == 2


def test_keys_too_many_or_too_few(folder):
    file = folder / "teacher.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"extra.weight": torch.ones(1)}, file)
    refused(lambda: convert.load_encoder(folder), "unknown: extra.weight")
    del tensors["norm.bias"]
    save_file(tensors, file)
    refused(lambda: convert.load_encoder(folder), "missing: norm.bias")
    tensors |= {"norm.bias": torch.zeros(64), "blocks.1.norm2.weight": torch.ones(63)}
    save_file(tensors, file)
    refused(lambda: convert.load_encoder(folder), "shape: blocks.1.norm2.weight [63] for [64]")


def test_a_table_that_is_not_the_fixed_one(folder):
    file = folder / "teacher.safetensors"
    save_file(load_file(file) | {"pos_embed": torch.zeros(1, 4, 64)}, file)
    refused(lambda: convert.load_encoder(folder), "not the fixed sin-cos table")


def test_weights_of_a_newer_version(folder):
    meta = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(meta | {"version": 2, "software": "extrema-fast 7"}))
    refused(lambda: convert.load_encoder(folder), "version 2", "extrema-fast 7", "update extrema-fast")


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
