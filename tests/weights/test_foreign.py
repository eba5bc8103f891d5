"""Trunks of other projects' vision transformers, in files of their layouts with random weights.

Covers: timm, MAE, DINO, DINOv2, MoCo v3, torchvision, Hugging Face; the reference is their own modules, run without
class token; what wraps them; folders of transformers and timm, in several files too, and what they say of heads, eps
and activation; registers; what stands next to the weights; heads
that nothing says; the whole ViT as timm's; what is refused by name; damaged files; tables without a class row, not
square.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import extrema_fast
from extrema_fast.models.encoder import Encoder
from extrema_fast.weights.export import export
from extrema_fast.weights.initial import load_trunk
from extrema_fast.weights.load import import_released, load_encoder, load_metadata
from tests.encoders import close
from tests.torchvision_operators import define_torchvision_operators
from tests.weights._weights import CFG, Malicious, perturbed, refused, same

define_torchvision_operators()
pytest.importorskip("timm")
SHAPE = {"img_size": 24, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
IMAGENET = (0.485, 0.456, 0.406)
IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def timm_vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return perturbed(VisionTransformer(**{**SHAPE, "num_classes": 5} | options))


def trunk_of(vit, prefix: int = 1):
    """Patch tokens of timm's own modules, run without class token."""
    pos = vit.pos_embed[:, prefix:]
    return vit.norm(vit.blocks(vit.patch_embed(IMAGES) + pos))


def mae():
    """`mae_pretrain_*.pth` with its decoder; the table is fixed, its class row 0."""
    from extrema_fast.models.positions import sincos_table

    vit = timm_vit(num_classes=0)
    vit.pos_embed.data = torch.cat([torch.zeros(1, 1, 128), sincos_table(128, (3, 3))[None]], 1)
    extra = ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight")
    return vit, {"model": vit.state_dict() | {k: torch.ones(1, 1, 4) for k in extra}, "epoch": 1}


def dino():
    """A full checkpoint of DINO: both networks wrapped, each with its head."""
    vit, head = timm_vit(num_classes=0), {"head.mlp.0.weight": torch.ones(4, 4)}
    teacher = {f"backbone.{k}": v for k, v in vit.state_dict().items()} | head
    student = {f"module.{k}": v + 1 for k, v in teacher.items()}
    return vit, {"student": student, "teacher": teacher, "epoch": 1, "dino_loss": {"center": torch.ones(1)}}


def dinov2():
    """Blocks in chunks, layer scale, a mask token."""
    vit = timm_vit(num_classes=0, init_values=0.3)
    state = {f"backbone.{k.replace('blocks.', 'blocks.0.')}": v for k, v in vit.state_dict().items()}
    return vit, {"teacher": state | {"backbone.mask_token": torch.ones(1, 128)}}


def moco():
    """Both networks and the predictor below `module`, a projector of linear layers and BatchNorm.

    The table is fixed, its class row 0, and numbers rows where ours numbers columns: `torch.meshgrid`'s own order.
    """
    vit = timm_vit(num_classes=0)
    w = 10000 ** (-torch.arange(32) / 32)
    row, column = (x.reshape(-1, 1) * w for x in torch.meshgrid(*[torch.arange(3.0)] * 2, indexing="ij"))
    table = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 1)
    vit.pos_embed.data = torch.cat([torch.zeros(1, 1, 128), table[None]], 1)
    own = vit.state_dict() | {
        "head.0.weight": torch.ones(8, 8),
        "head.1.num_batches_tracked": torch.tensor(3),
    }
    state = {f"module.momentum_encoder.{k}": v for k, v in own.items()}
    state |= {f"module.base_encoder.{k}": v + 1 for k, v in own.items()}
    return vit, {"arch": "vit_base", "state_dict": state | {"module.predictor.0.weight": torch.ones(8, 8)}}


def timm_file(wrapper: str = "", **options):
    vit = timm_vit(**options)
    return vit, {"state_dict": {f"{wrapper}{k}": v for k, v in vit.state_dict().items()}}


LAYOUTS = {
    "timm": timm_file,
    "timm, layer scale": lambda: timm_file(init_values=0.3),
    "timm, no qkv bias": lambda: timm_file(qkv_bias=False),
    "Lightning": lambda: timm_file("net.vit._orig_mod."),
    "MAE": mae,
    "DINO": dino,
    "DINOv2": dinov2,
    "MoCo v3": moco,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_trunk_of_a_file(tmp_path, caplog, layout):
    vit, data = LAYOUTS[layout]()
    torch.save(data, tmp_path / "vit.pth")
    encoder = load_encoder(tmp_path / "vit.pth")
    assert "without: class token" in caplog.text
    assert encoder.global_pool == "avg" and encoder.num_classes == 0
    assert isinstance(encoder.pos_embed, torch.nn.Parameter) == (layout != "MAE")
    assert close(encoder.encode(IMAGES).patches, trunk_of(vit), 1e-5)
    assert "class token" in load_metadata(tmp_path / "vit.pth")["source"]["left_out"]
    # imported, it reads as any other weights folder
    again = load_encoder(import_released(tmp_path / "vit.pth", tmp_path / "out"))
    assert torch.equal(again.encode(IMAGES).patches, encoder.encode(IMAGES).patches)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_whole_of_it_accelerated(tmp_path, layout):
    vit, data = LAYOUTS[layout]()
    torch.save(data, tmp_path / "vit.pth")
    out = extrema_fast.accelerate(tmp_path / "vit.pth").encode(IMAGES)
    assert close(out.tokens, vit.forward_features(IMAGES), 1e-5)


@torch.no_grad()
def test_a_whole_vit_of_other_kinds(tmp_path):
    for options in (
        {"no_embed_class": True, "init_values": 0.1},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg"},
    ):
        vit = timm_vit(**options)
        torch.save(vit.state_dict(), tmp_path / "vit.pth")
        loaded = extrema_fast.load_vit(tmp_path / "vit.pth")
        assert close(loaded.forward_features(IMAGES), vit.forward_features(IMAGES), 1e-5)
        assert close(loaded.fc_norm(IMAGES.new_ones(2, 128)), vit.fc_norm(IMAGES.new_ones(2, 128)), 1e-5)
    own = tmp_path / "own.pth"
    torch.save(Encoder(CFG.model).state_dict(), own)
    refused(lambda: extrema_fast.accelerate(own), "own.pth", "load_encoder")
    hf_model("DeiTModel").save_pretrained(tmp_path / "deit")
    refused(lambda: extrema_fast.load_vit(tmp_path / "deit"), "distillation token")


@torch.no_grad()
def test_which_network(tmp_path, caplog):
    file = tmp_path / "vit.pth"
    torch.save(moco()[1], file)
    teacher, student = (load_encoder(file, which) for which in ("teacher", "student"))
    assert torch.equal(teacher.norm.bias + 1, student.norm.bias)
    # of DINO's two, and I-JEPA's, the teacher is read where nothing else is asked for
    vit, data = dino()
    own = vit.state_dict()
    jepa = {
        name: {f"module.{k}": v + i for k, v in own.items()}
        for i, name in enumerate(("target_encoder", "encoder"))
    }
    jepa |= {"predictor": {"module.predictor_embed.weight": torch.ones(2, 2)}, "opt": {}, "epoch": 3}
    flat = {f"{outer}.{k}": v for outer in ("student", "teacher") for k, v in data[outer].items()}
    for saved in (data, jepa, {"state_dict": flat}):
        torch.save(saved, file)
        for which, more in ((None, 0), ("teacher", 0), ("student", 1)):
            assert torch.equal(load_encoder(file, which).norm.bias, vit.norm.bias + more)
            assert torch.equal(extrema_fast.load_vit(file, which).norm.bias, vit.norm.bias + more)
        assert import_released(file, tmp_path / "out", which="student", force=True)
        assert torch.equal(load_encoder(tmp_path / "out").norm.bias, vit.norm.bias + 1)
        load_trunk(encoder := load_encoder(file), file, "student")
        assert torch.equal(encoder.norm.bias, vit.norm.bias + 1)
    torch.save({"teacher": data["teacher"]}, file)
    refused(lambda: load_encoder(file, "student"), "no student weights", "teacher")
    state = {f"student_net.{k}": v + 1 for k, v in vit.state_dict().items()}
    torch.save({"state_dict": state}, file)
    assert torch.equal(load_encoder(file).norm.bias, vit.norm.bias + 1)
    refused(lambda: load_encoder(file, "teacher"), "no teacher weights")
    torch.save({"state_dict": state | {f"ema.{k}": v for k, v in vit.state_dict().items()}}, file)
    assert torch.equal(load_encoder(file).norm.bias, vit.norm.bias)
    # of timm, which takes the EMA too, and of DeiT
    own, others = vit.state_dict(), {k: v + 1 for k, v in vit.state_dict().items()}
    for name in ("state_dict", "model"):
        torch.save({name: others, f"{name}_ema": own}, file)
        for which, more in ((None, 0), ("teacher", 0), ("student", 1)):
            caplog.clear()
            assert torch.equal(load_encoder(file, which).norm.bias, vit.norm.bias + more)
            assert caplog.text.count(f"EMA of the weights ({name}_ema)") == 1 - more
        torch.save({name: others, f"{name}_ema": None}, file)
        assert torch.equal(load_encoder(file).norm.bias, vit.norm.bias + 1)


@torch.no_grad()
def test_torchvision(tmp_path):
    tv = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    vit = perturbed(tv.VisionTransformer(24, 8, 2, 2, 128, 256, num_classes=5))
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    tokens = vit.conv_proj(IMAGES).flatten(2).transpose(1, 2) + vit.encoder.pos_embedding[:, 1:]
    expected = vit.encoder.ln(vit.encoder.layers(tokens))
    assert close(load_encoder(tmp_path / "vit.pth").encode(IMAGES).patches, expected, 1e-5)


HF = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "image_size": 24,
    "patch_size": 8,
}  # fmt: skip


def hf_model(name: str, **options):
    transformers = pytest.importorskip("transformers")
    config = name.removesuffix("Model").removesuffix("ForImageClassification").removesuffix("ForPreTraining")
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{config}Config")(**{**HF, **options}))
    return perturbed(model)


@pytest.mark.parametrize(
    ("name", "eps"),
    [
        ("ViTModel", 1e-12),
        ("ViTForImageClassification", 1e-6),
        ("DeiTModel", 1e-2),
        ("ViTMSNModel", 1e-6),
        ("Dinov2Model", 1e-6),
    ],
)
@torch.no_grad()
def test_hugging_face(tmp_path, name, eps):
    model = hf_model(name, layer_norm_eps=eps)
    model.save_pretrained(tmp_path)
    prep = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(prep))
    encoder = load_encoder(tmp_path)
    assert encoder.heads == 4 and encoder.mean == (0.5, 0.4, 0.3) and encoder.std == (0.1, 0.2, 0.3)
    assert encoder.interpolation == "bicubic"
    body = getattr(model, "vit", model)
    prefix = 2 if name == "DeiTModel" else 1
    tokens = body.embeddings.patch_embeddings(IMAGES) + body.embeddings.position_embeddings[:, prefix:]
    for layer in body.encoder.layer if name == "Dinov2Model" else body.layers:
        tokens = layer(tokens)
    assert close(encoder.encode(IMAGES).patches, body.layernorm(tokens), 1e-5)
    # a run has its own eps, and says so
    said = load_trunk(Encoder(encoder.config), tmp_path)["trunk"]
    assert ("eps of its norms 1e-06 in place of" in said) == (eps != 1e-6)
    # nor is the eps lost where it is exported
    export(tmp_path, tmp_path / "out", "extrema")
    again = load_encoder(tmp_path / "out")
    assert torch.equal(again.encode(IMAGES).patches, encoder.encode(IMAGES).patches)
    # one of its files is read with what the folder says
    assert same(load_encoder(tmp_path / "model.safetensors"), encoder)
    assert load_encoder(tmp_path / "model.safetensors").norm_eps == encoder.norm_eps == eps
    # files alone do not say how many heads there are, nor the eps; those of torch.save have newer names
    torch.save(model.state_dict(), tmp_path / "model.pth")
    (tmp_path / "model.safetensors").rename(tmp_path / "alone.safetensors")
    for file in ("alone.safetensors", "model.pth"):
        alone = load_encoder(tmp_path / file, num_heads=4)
        assert torch.equal(alone.encode(IMAGES).patches, encoder.encode(IMAGES).patches) == (eps == 1e-6)
        assert close(alone.encode(IMAGES).patches, encoder.encode(IMAGES).patches, 1e-5) == (eps < 1e-2)


@torch.no_grad()
def test_a_folder_with_pytorch_model_bin(tmp_path):
    model = hf_model("ViTModel", layer_norm_eps=1e-3)
    model.save_pretrained(tmp_path)
    expected = load_encoder(tmp_path).encode(IMAGES).patches
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        encoder = load_encoder(path)
        assert (encoder.heads, encoder.norm_eps) == (4, 1e-3)
        assert torch.equal(encoder.encode(IMAGES).patches, expected)
    torch.save({"model": Malicious(tmp_path / "made")}, tmp_path / "pytorch_model.bin")
    refused(lambda: load_encoder(tmp_path), "pytorch_model.bin", "it contains code")
    assert not (tmp_path / "made").exists()
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "other.bin")
    assert "config.json is missing" not in refused(lambda: load_encoder(tmp_path), "other.bin")


@torch.no_grad()
def test_a_folder_of_several_files(tmp_path):
    model = hf_model("ViTModel", layer_norm_eps=1e-3)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    model.save_pretrained(tmp_path / "whole")
    index = tmp_path / "model.safetensors.index.json"
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for path in (tmp_path, index):
        encoder = load_encoder(path)
        assert same(encoder, load_encoder(tmp_path / "whole")) and encoder.norm_eps == 1e-3
        imported = load_encoder(import_released(path, tmp_path / "imported", force=True))
        assert same(imported, encoder) and imported.norm_eps == 1e-3
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    refused(lambda: load_encoder(tmp_path), "config.json is missing", str(index))
    table = json.loads(index.read_text())
    first = sorted(table["weight_map"].values())[0]
    for names, words in (
        (
            {"a": "../whole/model.safetensors"},
            "'../whole/model.safetensors', which is not a file in its folder",
        ),
        ({"a": index.name}, "not a file in its folder"),
        ({"a": 3}, "names no files"),
        ({}, "names no files"),
        (table["weight_map"], f"{first} is missing"),
    ):
        index.write_text(json.dumps({"weight_map": names}))
        (tmp_path / first).unlink(missing_ok=True)
        refused(lambda: load_encoder(index), index.name, words)


@pytest.mark.parametrize("source", ["Hugging Face", "timm", "timm, no class token"])
@torch.no_grad()
def test_registers(tmp_path, source):
    if source == "Hugging Face":
        model = hf_model("Dinov2WithRegistersModel")
        model.save_pretrained(tmp_path)
        expected = model(IMAGES).last_hidden_state
    else:
        plain = {"class_token": False, "global_pool": "avg"} if "no" in source else {}
        model = timm_vit(reg_tokens=3, no_embed_class=source != "timm", num_classes=0, **plain)
        torch.save(model.state_dict(), tmp_path / "model.pth")
        expected = model.forward_features(IMAGES)
    path = tmp_path if source == "Hugging Face" else tmp_path / "model.pth"
    fast = extrema_fast.accelerate(path)
    assert close(fast.encode(IMAGES).tokens, expected, 1e-5)
    assert fast.vit.num_reg_tokens == (4 if source == "Hugging Face" else 3)
    refused(lambda: load_encoder(path), "register tokens", "`load_vit`")


def timm_folder(folder, name: str, **args):
    """A folder as timm writes it, and its model."""
    import timm

    torch.manual_seed(0)
    vit = perturbed(timm.create_model(name, num_classes=0, **args))
    # older versions record no arguments by themselves
    timm.models.save_for_hf(vit, folder, model_args=args, safe_serialization=True)
    return vit


@torch.no_grad()
def test_a_folder_of_timm(tmp_path):
    vit = timm_folder(tmp_path, "vit_tiny_patch16_224", **SHAPE)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.4] * 3, "std": [0.5] * 3, "crop_pct": 0.8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = load_encoder(tmp_path)
    assert encoder.mean == (0.4,) * 3 and encoder.crop_pct == 0.8
    assert close(encoder.encode(IMAGES).patches, trunk_of(vit), 1e-5)
    # as timm wrote it before 0.9, and as transformers writes one of timm's models
    flat = {k: v for k, v in config.items() if k != "pretrained_cfg"}
    for more, mean in ((config["pretrained_cfg"], (0.4,) * 3), ({"model_type": "timm_wrapper"}, IMAGENET)):
        (tmp_path / "config.json").write_text(json.dumps(flat | more))
        again = load_encoder(tmp_path)
        assert same(again, encoder) and again.heads == 2 and again.mean == mean
    config["model_args"]["embed_dim"] = 192
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(lambda: load_encoder(tmp_path), "width 128", "says 192")


@pytest.mark.parametrize(
    ("name", "args", "heads"),
    [
        ("vit_small_patch16_224", {"num_heads": 12}, 12),
        ("vit_tiny_patch16_224", {"img_size": (16, 64), "patch_size": 8}, 3),
        ("vit_base_patch16_gap_224", {"embed_dim": 128}, 16),
        ("test_vit", {"patch_size": 8, "dynamic_img_size": False}, 2),
        ("deit_tiny_distilled_patch16_224", {"num_heads": 6}, 6),
    ],
)
@torch.no_grad()
def test_arguments_of_a_folder_of_timm(tmp_path, caplog, name, args, heads):
    vit = timm_folder(tmp_path, name, **{"img_size": 32, "depth": 2, **args})
    encoder = load_encoder(tmp_path)
    assert (encoder.heads, encoder.grid) == (heads, vit.patch_embed.grid_size)
    images = torch.randn(2, 3, *encoder.img_size)
    positions = vit.pos_embed[:, -encoder.num_patches :]
    expected = vit.norm(vit.blocks(vit.patch_embed(images) + positions))
    assert close(encoder.encode(images).patches, expected, 1e-5)
    assert "heads" not in caplog.text


@pytest.mark.parametrize(
    ("name", "args", "word"),
    [
        ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}, "activation 'QuickGELU'"),
        ("vit_base_patch32_siglip_256", {"embed_dim": 192, "img_size": 64}, "activation 'GELUTanh'"),
        ("vit_base_patch16_rpn_224", {"embed_dim": 192}, "ResPostBlock"),
        ("vit_small_patch16_rope_ape_224", {}, "rotary positions"),
    ],
)
def test_a_folder_of_timm_that_the_trunk_cannot_compute(tmp_path, name, args, word):
    timm_folder(tmp_path, name, **{"img_size": 32, "depth": 1, **args})
    refused(lambda: load_encoder(tmp_path), str(tmp_path), word)


@torch.no_grad()
def test_a_folder_of_timm_with_our_model(tmp_path):
    import extrema_fast.timm  # noqa: F401

    args = {
        "img_size": (16, 48),
        "depth": 2,
        "width": 128,
        "heads": 4,
        "norm_eps": 1e-3,
        "pos_embed": "learned",
    }
    model = timm_folder(tmp_path, "extrema_vit_tiny_patch16_224", **args)
    images = torch.randn(2, 3, 16, 48)
    encoder = load_encoder(tmp_path)
    assert (encoder.heads, encoder.norm_eps, encoder.grid) == (4, 1e-3, (1, 3))
    assert torch.equal(encoder(images), model(images))


def test_a_folder_of_timm_without_timm(tmp_path, caplog, monkeypatch):
    shape = {"img_size": 32, "depth": 1, "embed_dim": 192}
    timm_folder(tmp_path / "gap", "vit_base_patch16_gap_224", **shape)
    timm_folder(tmp_path / "plain", "vit_base_patch16_224", **shape)
    timm_folder(tmp_path / "said", "vit_tiny_patch16_224", **shape, num_heads=6)
    timm_folder(tmp_path / "act", "vit_tiny_patch16_224", **shape, act_layer="quick_gelu")
    monkeypatch.setitem(sys.modules, "timm.models", None)
    assert load_encoder(tmp_path / "plain").heads == 12
    assert load_encoder(tmp_path / "said").heads == 6
    refused(lambda: load_encoder(tmp_path / "act"), "quick_gelu")
    assert "num_heads" not in caplog.text
    assert load_encoder(tmp_path / "gap").heads == 3
    assert caplog.text.count("assuming 3, or give num_heads") == 1


def test_a_folder_of_timm_asks_for_nothing_else(tmp_path):
    """Arguments by strangers: nothing is read, downloaded or allocated for them."""
    timm_folder(tmp_path, "vit_tiny_patch16_224", img_size=32, depth=1)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] |= {"depth": 10**9, "pretrained": True, "pretrained_cfg": {"file": "/dev/zero"}}
    config["model_args"] |= {"num_classes": 10**12, "num_heads": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_encoder(tmp_path).heads == 6


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"qk_norm": True}, "norms of queries and keys"),
        ({"pre_norm": True}, "a norm before the trunk"),
        ({"pos_embed": "none"}, "no table of absolute positions"),
        ({"scale_attn_norm": True}, "norms after attention or MLP"),
    ],
)
def test_what_the_trunk_cannot_compute(tmp_path, options, word):
    torch.save(timm_vit(**options).state_dict(), tmp_path / "vit.pth")
    refused(lambda: load_encoder(tmp_path / "vit.pth"), "vit.pth", word)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Dinov2Model", {"use_swiglu_ffn": True}, ["SwiGLU"]),
        ("DINOv3ViTModel", {}, ["register tokens", "no table of absolute positions"]),
        ("ViTModel", {"hidden_act": "quick_gelu"}, ["quick_gelu"]),
        ("BeitModel", {"use_relative_position_bias": True}, ["relative positions"]),
    ],
)
def test_what_the_trunk_cannot_compute_of_hugging_face(tmp_path, name, options, words):
    hf_model(name, **options).save_pretrained(tmp_path)
    refused(lambda: load_encoder(tmp_path), str(tmp_path), *words)


@torch.no_grad()
def test_tables_without_class_row_and_not_square(tmp_path):
    for options, images, grid in (
        ({"no_embed_class": True, "init_values": 0.1}, (24, 24), None),
        ({"img_size": (16, 24)}, (16, 24), (2, 3)),
        ({"img_size": (16, 24), "no_embed_class": True, "init_values": 0.1}, (16, 24), (2, 3)),
    ):
        vit = timm_vit(**options)
        torch.save(vit.state_dict(), tmp_path / "vit.pth")
        encoder = load_encoder(tmp_path / "vit.pth", grid=grid)
        x = IMAGES[..., : images[0], : images[1]]
        pos = vit.pos_embed[:, -vit.patch_embed.num_patches :]
        assert close(encoder.encode(x).patches, vit.norm(vit.blocks(vit.patch_embed(x) + pos)), 1e-5)
    refused(lambda: load_encoder(tmp_path / "vit.pth"), "grid=")


def test_under_other_names_next_to_other_values(tmp_path):
    """What training scripts save: counters, metrics of numpy, arguments; the network by any name."""
    state = timm_vit(num_classes=0).state_dict() | {"head.1.num_batches_tracked": torch.tensor(3)}
    save_file(state, tmp_path / "vit.safetensors")
    expected = load_encoder(tmp_path / "vit.safetensors")
    args = argparse.Namespace(lr=np.float64(0.1), steps=np.int64(3), amp=np.bool_(True))
    for name in ("model_state_dict", "net", "ema"):
        torch.save({"args": args, "best": np.float32(0.5), "first": {}, name: state}, tmp_path / "vit.pth")
        assert same(load_encoder(tmp_path / "vit.pth"), expected)


def test_heads_by_width_and_by_name(tmp_path):
    from extrema_fast.weights.foreign import HEADS

    assert HEADS[1280] == 16
    vit = timm_vit(embed_dim=384, num_heads=12, depth=1, num_classes=0)
    state = {f"module.{e}_encoder.{k}": v for e in ("base", "momentum") for k, v in vit.state_dict().items()}
    torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "moco.pth")
    assert load_encoder(tmp_path / "moco.pth").heads == 12
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    assert load_encoder(tmp_path / "vit.pth").heads == 6
    # I-JEPA's have no class token, so that nothing is left out
    for width in (1280, 1408):
        plain = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
        vit = timm_vit(embed_dim=width, num_heads=16, depth=1, mlp_ratio=0.1, **plain)
        torch.save(vit.state_dict(), tmp_path / "vit.pth")
        assert load_encoder(tmp_path / "vit.pth").heads == 16


def test_heads_that_nothing_says(tmp_path, caplog):
    guess = "or give num_heads"
    own = extrema_fast.create_encoder(
        "extrema_vit_tiny_patch16_224", width=128, depth=1, heads=4, img_size=32
    )
    files = {"own": own.state_dict(), "vit": timm_vit(num_heads=4).state_dict()}
    for name, state in files.items():
        caplog.clear()
        torch.save(state, tmp_path / f"{name}.pth")
        assert load_encoder(tmp_path / f"{name}.pth").heads == 2
        assert caplog.text.count(f"assuming 2, {guess}") == 1
    caplog.clear()
    assert load_encoder(tmp_path / "own.pth", num_heads=4).heads == 4
    import_released(tmp_path / "own.pth", tmp_path / "imported", num_heads=4)
    # a description says it, and shapes that have a name are the usual ones
    assert (
        load_encoder(tmp_path / "imported").heads
        == load_encoder(tmp_path / "imported/model.safetensors").heads
        == 4
    )
    torch.save(timm_vit(embed_dim=192, depth=12, num_heads=3).state_dict(), tmp_path / "tiny.pth")
    assert load_encoder(tmp_path / "tiny.pth").heads == 3
    # of weights to start from they are those of the run
    load_trunk(own, tmp_path / "own.pth")
    assert guess not in caplog.text


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def changed(**tensors):
    def change(file) -> None:
        state = torch.load(file, weights_only=True)
        torch.save({k: v for k, v in (state | tensors).items() if v is not None}, file)

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, ["read safely"]),
        (changed(**{"blocks.1.attn.qkv.weight": None}), ["missing: blocks.1.attn.qkv.weight"]),
        (changed(**{"blocks.1.attn.qkv.weight": torch.ones(3, 128)}), ["blocks.1.attn.qkv.weight [3, 128]"]),
        (changed(**{"blocks.0.ls1.gamma": torch.ones(3)}), ["extra: blocks.0.gamma_1"]),
        (changed(pos_embed=torch.ones(1, 7, 128)), ["6 rows", "grid="]),
        (changed(pos_embed=torch.ones(10, 128)), ["pos_embed [10, 128]"]),
        (changed(**{"blocks.9000.norm1.weight": torch.ones(128)}), ["9003 blocks"]),
        (changed(**{"patch_embed.proj.weight": torch.ones(1).expand(128, 3, 800, 800)}), ["claim"]),
        (changed(surprise=torch.ones(3)), ["extra: surprise"]),
    ],
)
def test_damaged_files(tmp_path, damage, words):
    torch.save(timm_vit().state_dict(), tmp_path / "vit.pth")
    damage(tmp_path / "vit.pth")
    refused(lambda: load_encoder(tmp_path / "vit.pth"), "vit.pth", *words)
