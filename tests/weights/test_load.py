"""Weights folders and what `load_encoder` makes of them.

Covers: both networks; run folders; single files with and without their description; every option of loading; the run's
own initial encoder; filling a method; another default device; places without weights. (Damage and files by strangers:
test_untrusted.py.)
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from extrema_fast import config as c
from extrema_fast.models.encoder import Encoder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.models.positions import adapt_in_chans, resample_patch_kernel, sincos_table
from extrema_fast.weights.export import export
from extrema_fast.weights.folder import save_weights, weights_meta
from extrema_fast.weights.initial import load_method_weights, load_trunk
from extrema_fast.weights.load import import_released, load_encoder, load_metadata, random_encoder_like
from tests.weights._weights import CFG, IMAGES, foreign_vit, refused, same, trained


def test_what_a_weights_folder_holds(folder, method):
    assert {p.name for p in folder.iterdir()} == {"config.json", "student.safetensors", "teacher.safetensors"}
    student, teacher = (load_file(folder / f"{w}.safetensors") for w in ("student", "teacher"))
    heads = {f"head.{i}.{x}" for i in (0, 1, 3, 4, 6) for x in ("weight", "bias")}
    predictor = {f"predictor.{i}.{x}" for i in (0, 1, 3) for x in ("weight", "bias")}
    assert set(teacher) == set(method.teacher.state_dict()) | heads
    assert set(student) == set(teacher) | predictor
    assert torch.equal(student["head.6.weight"], method.projector[6].weight)
    assert torch.equal(teacher["head.6.weight"], method.teacher_projector[6].weight)
    meta = load_metadata(folder)
    assert (meta["step"], meta["images"], meta["seed"]) == (7, 7 * 16, 3)
    assert meta["model"] == c.to_dict(CFG.model) and meta["head"] == c.to_dict(CFG.head)
    for which in ("teacher", "student"):
        for path in (folder, folder / f"{which}.safetensors"):
            encoder = load_encoder(path, which)
            assert not encoder.training and same(encoder, getattr(method, which))
    assert encoder.preprocess().metadata["mean"] == encoder.mean == (0.1, 0.2, 0.3)
    assert encoder.std == (0.4, 0.5, 0.6)


# ---- options --------------------------------------------------------------------------------------


def test_size_pool_and_head(folder):
    plain = load_encoder(folder)
    # another size: another table, the same weights
    wide, other = load_encoder(folder, img_size=(24, 40)), torch.randn(1, 3, 24, 40)
    assert wide.grid == (3, 5) and wide.pos_embed.shape == (1, 15, 64)
    mean = load_encoder(folder, global_pool="avg")
    with torch.no_grad():
        assert torch.allclose(wide(other), plain(other), atol=1e-6)
        assert torch.allclose(mean(IMAGES), plain.encode(IMAGES).patches.mean(1), atol=1e-6)
    tuned = load_encoder(
        folder,
        "student",
        num_classes=5,
        global_pool="avg",
        fc_norm=True,
        pos_embed="learned",
        drop_path_rate=0.25,
    )
    assert tuned(IMAGES).shape == (2, 5) and tuned.pos_embed.requires_grad and tuned.drop_path_rate == 0.25
    # a new norm and a new head, not the projector
    assert bool((tuned.fc_norm.weight == 1).all()) and tuned.head.weight.abs().max() < 1e-3
    assert torch.equal(
        tuned.blocks[1].mlp.fc1.weight, load_encoder(folder, "student").blocks[1].mlp.fc1.weight
    )


def test_other_channels_and_patches(folder, method):
    own = method.teacher.state_dict()["patch_embed.proj.weight"]
    for chans in (1, 2, 4, 5):
        encoder = load_encoder(folder, in_chans=chans)
        assert torch.equal(encoder.patch_embed.proj.weight, adapt_in_chans(own, chans))
        assert encoder(torch.randn(1, chans, 16, 16)).shape == (1, 64)
        # gray is computed from colors
        assert len(encoder.mean) == len(encoder.std) == (3 if chans == 1 else chans)
    small = load_encoder(folder, patch_size=4)
    assert small.patch_size == 4 and small.grid == (4, 4)
    assert torch.equal(small.patch_embed.proj.weight, resample_patch_kernel(own, 4))
    assert torch.equal(small.pos_embed[0], sincos_table(64, (4, 4)))


def test_a_table_saved_at_another_grid_than_trained(folder):
    file = folder / "teacher.safetensors"
    meta = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    meta["encoder"] = {"pos_coords": "rescaled", "pos_grid": [4, 4]}
    (folder / "config.json").write_text(json.dumps(meta), encoding="utf-8")
    refused(lambda: load_encoder(folder), "sin-cos table")
    table = sincos_table(64, (2, 2), trained=(4, 4))
    save_file(load_file(file) | {"pos_embed": table[None]}, file)
    assert torch.equal(load_encoder(folder).pos_embed[0], table)
    absolute = load_encoder(folder, pos_coords="absolute")
    assert torch.allclose(absolute.pos_embed[0], sincos_table(64, (2, 2)))
    rescaled = load_encoder(folder, img_size=(24, 32))
    assert torch.equal(rescaled.pos_embed[0], sincos_table(64, (3, 4), trained=(4, 4)))
    # back at the grid trained on there is nothing to rescale
    whole = load_encoder(folder, img_size=32)
    assert torch.allclose(whole.pos_embed[0], sincos_table(64, (4, 4)), atol=1e-6)


def test_coordinates_do_not_replace_a_learned_table(folder):
    meta = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(meta | {"encoder": {"pos_embed": "learned"}}))
    table = torch.randn(1, 4, 64)
    save_file(
        load_file(folder / "teacher.safetensors") | {"pos_embed": table}, folder / "teacher.safetensors"
    )
    assert torch.equal(load_encoder(folder, pos_coords="rescaled").pos_embed, table)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"which": "momentum"}, ["which", "'momentum'"]),
        ({"img_size": 20}, ["20", "patch size 8"]),
        ({"in_chans": 0}, ["in_chans", "0"]),
        ({"patch_size": 5}, ["patch", "5"]),
        ({"grid": (4, 1)}, ["grid: 4 x 1", "2 x 2", "img_size"]),
        ({"grid": (4,)}, ["grid", "(rows, columns)"]),
        ({"num_heads": 5}, ["num_heads: 5", "64"]),
        ({"fc_norm": True}, ["fc_norm", "avg"]),
    ],
)
def test_options_that_do_not_fit(folder, options, words):
    refused(lambda: load_encoder(folder, **options), *words)
    assert load_encoder(folder, grid=(2, 2), num_heads=4).heads == 4


# ---- single files ---------------------------------------------------------------------------------


def test_a_file_of_a_folder_is_one_network(folder):
    # another network must not be read from the file next to it
    for which in ("teacher", None):
        refused(
            lambda w=which: load_encoder(folder / "student.safetensors", w), "no teacher weights", "student"
        )
    (folder / "teacher.safetensors").unlink()
    refused(lambda: load_encoder(folder), "no teacher weights")
    assert load_encoder(folder, "student").cls_token is not None


def test_a_bare_file_tells_its_architecture(folder, tmp_path, method):
    bare = tmp_path / "bare" / "any_name.safetensors"
    bare.parent.mkdir()
    bare.write_bytes((folder / "teacher.safetensors").read_bytes())
    encoder = load_encoder(bare)
    assert encoder.heads == 1 and encoder.config.shape == (64, 2, 1) and encoder.img_size == (16, 16)
    assert same(encoder, method.teacher)
    # another program's description next to it changes nothing, neither does the name of a network
    (bare.parent / "config.json").write_text('{"architectures": ["Evil"], "model_type": "evil"}')
    assert same(load_encoder(bare), method.teacher)
    bare = bare.rename(bare.parent / "student.safetensors")
    assert same(load_encoder(bare), method.teacher) and load_encoder(bare, num_heads=2).heads == 2
    refused(lambda: load_encoder(bare.parent), "found: architectures, model_type", "student.safetensors")


# ---- run folders ----------------------------------------------------------------------------------


def test_a_run_folder_means_its_newest_complete_weights(tmp_path):
    folders = {step: tmp_path / "weights" / f"step_{step:08d}" for step in (5, 40, 300)}
    methods = {step: trained() for step in folders}
    for step, folder in folders.items():
        save_weights(folder, methods[step], weights_meta(CFG, step))
    (tmp_path / "weights" / "step_00009999").mkdir()
    # the description is written last: without it the folder was cut off
    for step in (300, 40):
        assert load_metadata(tmp_path)["step"] == step
        assert same(load_encoder(tmp_path), methods[step].teacher)
        (folders[step] / "config.json").unlink()


def test_another_default_device(folder, tmp_path, method):
    """As `torch.set_default_device("cuda")` in somebody's program."""
    vit = foreign_vit(CFG.model)
    torch.save(vit, tmp_path / "vit.pth")
    encoder = Encoder(CFG.model)
    with torch.device("meta"):
        assert same(load_encoder(folder), method.teacher)
        assert load_encoder(folder, img_size=32).pos_embed.shape == (1, 16, 64)
        assert same(load_encoder(export(folder, tmp_path / "out", "extrema").folder), method.teacher)
        load_trunk(encoder, tmp_path / "vit.pth")
        imported = load_encoder(import_released(tmp_path / "vit.pth", tmp_path / "imported"))
    assert torch.equal(encoder.pos_embed, vit["pos_embed"][:, 1:]) and same(encoder.blocks, imported.blocks)


def test_places_without_weights(tmp_path):
    refused(lambda: load_encoder(tmp_path / "none"), "none", "no such file or folder")
    refused(
        lambda: load_encoder("facebook/dinov2-base"), "no such", "`hf download facebook/dinov2-base --local"
    )
    refused(lambda: load_encoder(tmp_path), "run folder", "found: nothing")
    save_file({"a": torch.ones(1)}, tmp_path / "alone.safetensors")
    # tensors without a description say how to read them
    refused(lambda: load_encoder(tmp_path), "config.json is missing", "alone.safetensors")
    for name, words in (("COMPLETE", "a checkpoint of a run"), ("log.jsonl", "not saved weights yet")):
        (tmp_path / name).touch()
        refused(lambda: load_encoder(tmp_path), words)


# ---- methods --------------------------------------------------------------------------------------


def test_initial_encoder_of_the_run(folder):
    start = random_encoder_like(folder)
    assert not start.training and start.mean == (0.1, 0.2, 0.3)
    assert same(start, ExtreMA(CFG).student)


def test_filling_a_method(folder, file, method):
    for source in (folder, file):
        fresh = ExtreMA(CFG)
        load_method_weights(fresh, source)
        assert same(fresh, method)
    # heads count, too
    other = ExtreMA(c.from_dict({"head": {"out": 16}}, CFG))
    before = {k: v.clone() for k, v in other.state_dict().items()}
    refused(lambda: load_method_weights(other, folder), "--init-from", "head.6", "12", "16")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    deeper = ExtreMA(c.from_dict({"model": {"depth": 3}}, CFG))
    refused(lambda: load_method_weights(deeper, folder), "blocks.2", "nothing")
    # of one network alone both begin
    (folder / "teacher.safetensors").unlink()
    parts = load_method_weights(fresh, folder)
    assert parts["pooling"] == parts["projector"] == parts["predictor"] == "kept"
    assert same(fresh.student_branch, method.student_branch) and same(fresh.teacher, method.student)
