"""Checkpoints of other projects are named, with what they lack and what they have too much.

Covers: keys of timm's ViTs, DINO, DINOv2, DINOv3, MAE, Hugging Face, OpenCLIP, MoCo v3 and a ResNet; unknown keys;
networks nested as DINO saves them; an encoder with parts that it has no place for.
"""

from __future__ import annotations

import pytest
import torch

from extrema_fast.weights import load as convert
from tests.weights._weights import refused, trained

VIT = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"]


@pytest.mark.parametrize(
    ("keys", "name", "missing"),
    [
        (VIT, "a ViT of timm, with a class token", "blocks_token.0"),
        ([*VIT, "mask_token", "blocks.0.ls1.gamma"], "a DINOv2 ViT", "blocks_token.0"),
        ([*VIT, "storage_tokens", "blocks.0.ls1.gamma"], "a DINOv3 ViT", "blocks_token.0"),
        ([*VIT, "mask_token", "decoder_blocks.0.attn.qkv.weight"], "an MAE checkpoint", "blocks_token.0"),
        (
            ["vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.projection.weight"],
            "a Hugging Face ViT",
            "patch_embed.proj.weight",
        ),
        (["visual.transformer.resblocks.0.ln_1.weight"], "an OpenCLIP model", "patch_embed"),
        (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "a ResNet", "patch_embed"),
        (
            [f"module.{e}_encoder.{k}" for e in ("base", "momentum") for k in VIT],
            "a MoCo v3 checkpoint",
            "blocks_token.0",
        ),
        (["backbone.blocks.0.attn.qkv.weight", "backbone.cls_token"], "a DINO checkpoint", "patch_embed"),
        (["encoder.weight", "decoder.weight"], None, "patch_embed"),
    ],
)
def test_checkpoints_of_others_are_named(tmp_path, keys, name, missing):
    state = {k: torch.ones(2) for k in keys}
    torch.save({"model": state}, tmp_path / "other.pth")
    words = ["not ExtreMA weights", "missing:", missing] + ([f"this looks like {name}"] if name else [])
    for call in (
        lambda: convert.load_encoder(tmp_path / "other.pth"),
        lambda: convert.import_released(tmp_path / "other.pth", tmp_path / "out"),
    ):
        text = refused(call, "other.pth", *words)
        assert ("looks like" in text) == (name is not None)
    assert not (tmp_path / "out").exists()


def test_networks_nested_as_dino_saves_them(tmp_path):
    torch.save({"teacher": {f"backbone.{k}": torch.ones(1) for k in VIT}}, tmp_path / "dino.pth")
    refused(lambda: convert.load_encoder(tmp_path / "dino.pth"), "found: teacher", "a DINO checkpoint")


def test_parts_that_an_encoder_has_no_place_for(tmp_path):
    state = trained().teacher.state_dict() | {"register_tokens": torch.ones(1, 4, 64)}
    torch.save(state, tmp_path / "more.pth")
    refused(lambda: convert.load_encoder(tmp_path / "more.pth"), "extra: register_tokens")


def test_counters_among_the_weights_do_not_hide_whose_they_are(tmp_path):
    state = {"layer1.0.conv1.weight": torch.ones(2), "bn1.num_batches_tracked": torch.tensor(3)}
    torch.save(state, tmp_path / "resnet.pth")
    refused(
        lambda: convert.load_encoder(tmp_path / "resnet.pth"),
        "num_batches_tracked is torch.int64",
        "a ResNet",
    )
