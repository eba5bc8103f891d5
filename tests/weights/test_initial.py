"""Starting from the trunk of another project's vision transformer, or from parts of our own weights.

Covers: what is kept, resampled, adapted and fresh, and what is said of it; the same tokens of an image normalized in
another way; runs of other crops; trunks that do not fit. (In a run: tests/training/test_init_from.py.)
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from extrema_fast import config as c
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import Encoder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.models.positions import resample_table
from extrema_fast.weights.export import export
from extrema_fast.weights.folder import save_weights, weights_meta
from extrema_fast.weights.initial import load_method_weights, load_trunk
from extrema_fast.weights.load import import_released, load_encoder
from extrema_fast.weights.released import STATS
from tests.encoders import close
from tests.weights._weights import CFG, IMAGES, foreign_vit, refused, same

PARTS = [
    "patch embedding",
    "positions",
    "trunk",
    "final norm",
    "pooling",
    "projector",
    "predictor",
    "left out",
]


def saved(tmp_path, state):
    torch.save(state, tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


@torch.no_grad()
def test_a_method_from_a_trunk(tmp_path):
    file = saved(tmp_path, foreign_vit(CFG.model))
    method, random = ExtreMA(CFG), ExtreMA(CFG)
    parts = load_method_weights(method, file)
    assert list(parts) == PARTS
    assert parts["patch embedding"] == parts["positions"] == "kept"
    assert parts["final norm"] == "kept" and parts["left out"] == "class token, classifier or projector"
    assert parts["pooling"] == parts["projector"] == parts["predictor"] == "fresh"
    state = foreign_vit(CFG.model)
    for encoder in (method.student, method.teacher):
        assert all(torch.equal(v, state[f"blocks.{k}"]) for k, v in encoder.blocks.state_dict().items())
        assert torch.equal(encoder.pos_embed, state["pos_embed"][:, 1:])
        assert not isinstance(encoder.pos_embed, torch.nn.Parameter)
        assert same(encoder.blocks_token, random.student.blocks_token)
    assert same(method.projector, random.projector) and same(method.predictor, random.predictor)


@torch.no_grad()
def test_images_normalized_in_another_way(tmp_path):
    save_file(foreign_vit(CFG.model), tmp_path / "model.safetensors")
    stats = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": stats}))
    pixels = IMAGES.sigmoid()

    def tokens(encoder):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.mean, encoder.std))
        return encoder.encode((pixels - mean) / std).patches

    mine, theirs = Encoder(CFG.model).eval(), load_encoder(tmp_path)
    mine.mean, mine.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    assert load_trunk(mine, tmp_path)["patch embedding"] == "kept, for this mean and std"
    assert theirs.mean == (0.5, 0.4, 0.3) and close(tokens(mine), tokens(theirs), 1e-5)
    # a file alone does not say
    (tmp_path / "model.safetensors").rename(tmp_path / "alone.safetensors")
    assert load_trunk(mine, tmp_path / "alone.safetensors")["patch embedding"] == "kept"


@torch.no_grad()
def test_another_patch_grid_and_channels(tmp_path):
    model = replace(CFG.model, img_size=(24, 24))
    state = foreign_vit(model)
    file = saved(tmp_path, state)
    encoder = Encoder(replace(CFG.model, img_size=(32, 16), patch_size=4, in_chans=1))
    parts = load_trunk(encoder, file)
    assert parts["patch embedding"] == "kept, resampled from 8 to 4 pixels, adapted from 3 to 1 channels"
    assert parts["positions"] == "kept, resampled from 3 x 3 to 8 x 4 patches"
    assert torch.equal(encoder.pos_embed, resample_table(state["pos_embed"][:, 1:], (3, 3), (8, 4)))
    # a learned table is not replaced by the formula at other sizes either
    assert isinstance(encoder.pos_embed, torch.nn.Parameter) and not encoder.pos_embed.requires_grad
    refused(lambda: encoder(torch.zeros(1, 1, 16, 16)), "learned position table", "set_input_size")
    assert same(load_encoder(export(encoder, tmp_path / "out").folder), encoder)
    encoder.set_input_size((16, 16))
    resampled = resample_table(resample_table(state["pos_embed"][:, 1:], (3, 3), (8, 4)), (8, 4), (4, 4))
    assert torch.equal(encoder.pos_embed, resampled)
    encoder.set_input_size((32, 16))
    # a fixed table is made for the grid
    fixed = Encoder(model).state_dict()["pos_embed"]
    file = saved(tmp_path, {**state, "pos_embed": torch.cat([torch.zeros(1, 1, 64), fixed], 1)})
    before = encoder.state_dict()["pos_embed"].clone()
    encoder = Encoder(encoder.config)
    assert load_trunk(encoder, file)["positions"] == "fixed table of 8 x 4 patches"
    assert torch.equal(encoder.pos_embed, Encoder(encoder.config).pos_embed)
    assert not torch.equal(encoder.pos_embed, before)


@torch.no_grad()
def test_a_run_of_another_patch_size_and_grid(tmp_path, method):
    run = save_weights(tmp_path / "run", method, weights_meta(CFG, 7))
    cfg = c.from_dict({"model": {"img_size": [24, 16], "patch_size": 4}, "mask": {"keep": 2}}, CFG)
    found = ExtreMA(cfg)
    parts = load_method_weights(found, run)
    assert list(parts) == PARTS[:-1] and parts["patch embedding"] == "kept, resampled from 8 to 4 pixels"
    assert parts["positions"] == "fixed table of 6 x 4 patches"
    assert {parts[p] for p in ("final norm", "pooling", "projector", "predictor")} == {"kept"}
    own, theirs = found.state_dict(), method.state_dict()
    changed = {k for k in own if own[k].shape != theirs[k].shape or not torch.equal(own[k], theirs[k])}
    assert {k.partition(".encoder.")[2] for k in changed} == {"patch_embed.proj.weight", "pos_embed"}
    for which in ("student", "teacher"):
        wanted = load_encoder(run, which, img_size=(24, 16), patch_size=4)
        assert same(getattr(found, which), wanted)
    # heads of other sizes are still no run to go on with
    with pytest.raises(UsageError, match=r"another architecture: head\.0\.bias is .* \(and \d+ more\)"):
        load_method_weights(ExtreMA(c.from_dict({"head": {"hidden": 32}}, cfg)), run)


def test_pooling_of_our_own_without_heads(tmp_path, method):
    file = saved(tmp_path, method.teacher.state_dict())
    fresh = ExtreMA(CFG)
    parts = load_method_weights(fresh, file)
    assert parts["pooling"] == "kept" and parts["projector"] == "fresh" and "left out" not in parts
    assert torch.equal(fresh.student.cls_token, method.teacher.cls_token)
    assert same(fresh.student.blocks_token, method.teacher.blocks_token)
    # other pooling blocks than here
    other = ExtreMA(c.from_dict({"model": {"pool_depth": 1}}, CFG))
    assert load_method_weights(other, file)["pooling"] == "fresh"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 3}, ["depth 2 (here 3)", "use --model.depth 2"]),
        ({"width": 128}, ["width 64 (here 128)", "--model.width 64"]),
        ({"mlp_ratio": 3.0}, ["MLP 128 (here 192)", "--model.mlp_ratio 2"]),
        ({"size": "small", "width": 0, "depth": 0, "heads": 0}, ["width 64 (here 384)", "depth 2 (here 12)"]),
    ],
)
def test_trunks_that_do_not_fit(tmp_path, change, words):
    file = saved(tmp_path, foreign_vit(CFG.model))
    encoder = Encoder(c.from_dict({"model": change}, CFG).model)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    text = refused(lambda: load_trunk(encoder, file), "vit.pth", *words)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    # the advice helps
    flags = text.rpartition("use ")[2].split()
    advice = {k.removeprefix("--model."): float(v) for k, v in zip(flags[::2], flags[1::2], strict=True)}
    advice = {k: v if k == "mlp_ratio" else int(v) for k, v in advice.items()}
    load_trunk(Encoder(c.from_dict({"model": change | advice}, CFG).model), file)


@torch.no_grad()
def test_heads_that_the_file_does_not_tell(tmp_path):
    file = saved(tmp_path, foreign_vit(CFG.model))
    for heads in (1, 2):
        encoder = Encoder(replace(CFG.model, heads=heads)).eval()
        load_trunk(encoder, file)
        expected = load_encoder(file, num_heads=heads).encode(IMAGES).patches
        assert torch.equal(encoder.encode(IMAGES).patches, expected)
    # an imported one does
    out = import_released(file, tmp_path / "out")
    refused(lambda: load_trunk(encoder, out), "heads 1 (here 2)", "--model.heads 1")


def test_an_imported_trunk_says_the_same(tmp_path):
    file = saved(tmp_path, foreign_vit(CFG.model))
    out = import_released(file, tmp_path / "out")
    # what an import takes them to be
    cfg = c.from_dict({"data": STATS}, CFG)
    a, b = ExtreMA(cfg), ExtreMA(cfg)
    assert load_method_weights(a, file) == load_method_weights(b, out)
    assert same(a, b)
