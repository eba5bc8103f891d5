"""Our encoders through Hugging Face transformers, from a local folder, without network.

Covers: `AutoModel`, hidden states, pooling, a head; `AutoImageProcessor` and the feature-extraction pipeline;
backbones from a folder and from a name; weights saved by transformers and read back; half precision; a mean-pooled
and a learned-position encoder; gradient checkpointing.
"""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from extrema_fast.models.encoder import create_encoder, timm_config
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.weights.export import export
from extrema_fast.weights.folder import save_weights, weights_meta
from extrema_fast.weights.load import load_encoder
from tests.encoders import close, randomized
from tests.weights._weights import CFG

timm = pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def hf():
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    # read at its import, which timm's has brought about
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    transformers = pytest.importorskip("transformers")
    importlib.import_module("extrema_fast.timm")
    yield transformers
    patch.undo()


def folder_of(path, **options):
    """(exported folder, its encoder in eval mode)."""
    options = {"img_size": (16, 40), "patch_size": 8, "width": 48, "depth": 3, "heads": 3, **options}
    encoder = randomized(create_encoder("extrema_vit_tiny_patch16_224", **options))
    path.mkdir(exist_ok=True)
    save_file(encoder.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(timm_config(encoder)))
    return path, encoder


@pytest.fixture
def exported(tmp_path):
    return folder_of(tmp_path / "weights")


def test_auto_model(hf, exported):
    path, encoder = exported
    model = hf.AutoModel.from_pretrained(path).eval()
    assert type(model).__name__ == "TimmWrapperModel"
    # built on the meta device: the position table is restored like a weight
    assert torch.equal(model.timm_model.pos_embed, encoder.pos_embed)
    x = torch.randn(2, 3, 16, 40)
    out = model(x, output_hidden_states=True)
    assert close(out.last_hidden_state, encoder.forward_features(x))
    assert close(out.pooler_output, encoder(x))
    assert [h.shape for h in out.hidden_states] == [(2, 48, 2, 5)] * 3
    some = model(x, output_hidden_states=[0, -1]).hidden_states
    assert close(some[0], out.hidden_states[0]) and len(some) == 2
    assert model(x, do_pooling=False).pooler_output is None
    y = torch.randn(1, 3, 24, 32)
    assert close(model(y).pooler_output, encoder(y))


@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "avg", "fc_norm": True},
        {"pos_embed": "learned", "in_chans": 1},
        {"img_size": 24, "pos_coords": "rescaled", "pos_grid": (2, 5)},
    ],
)
def test_other_encoders(hf, tmp_path, options):
    path, encoder = folder_of(tmp_path / "weights", **options)
    model = hf.AutoModel.from_pretrained(path).eval()
    x = torch.randn(2, encoder.in_chans, *encoder.img_size)
    assert close(model(x).pooler_output, encoder(x))
    assert close(model(x).last_hidden_state, encoder.forward_features(x))


def test_half_precision(hf, exported):
    path, encoder = exported
    model = hf.AutoModel.from_pretrained(path, dtype=torch.bfloat16).eval()
    assert model.timm_model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    # also at another size, which needs another table
    for x in (torch.randn(2, 3, 16, 40), torch.randn(1, 3, 24, 32)):
        low = model(x).pooler_output
        assert low.dtype == torch.bfloat16 and (low.float() - encoder(x)).abs().max() < 0.3


def test_classification(hf, tmp_path):
    path, encoder = folder_of(tmp_path / "weights", num_classes=4)
    model = hf.AutoModelForImageClassification.from_pretrained(path).eval()
    x = torch.randn(2, 3, 16, 40)
    assert close(model(x).logits, encoder(x))
    fresh = hf.AutoModelForImageClassification.from_pretrained(
        path, num_labels=3, ignore_mismatched_sizes=True
    )
    fresh.gradient_checkpointing_enable()
    assert fresh.timm_model.grad_checkpointing
    out = fresh.train()(x, labels=torch.tensor([0, 2]))
    out.loss.backward()
    assert out.logits.shape == (2, 3)
    assert all(p.grad is not None for n, p in fresh.named_parameters() if p.requires_grad), "no gradient"


def test_saved_by_transformers_and_read_back(hf, exported, tmp_path):
    path, encoder = exported
    hf.AutoModel.from_pretrained(path).save_pretrained(tmp_path / "again")
    x = torch.randn(2, 3, 16, 40)
    again = hf.AutoModel.from_pretrained(tmp_path / "again").eval()
    assert close(again(x).pooler_output, encoder(x))
    # and by timm
    model = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    assert close(model(x), encoder(x))
    keys = load_file(tmp_path / "again" / "model.safetensors").keys()
    assert {k.removeprefix("timm_model.") for k in keys} == encoder.state_dict().keys()


@pytest.mark.parametrize("class_token", [True, False])
def test_fine_tuned_by_transformers_and_read_back(hf, tmp_path, class_token):
    torch.manual_seed(0)
    weights = save_weights(tmp_path / "w", ExtreMA(CFG), weights_meta(CFG, 7))
    export(weights, tmp_path / "out", "hf", class_token=class_token)
    model = hf.AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", num_labels=4, ignore_mismatched_sizes=True
    )
    with torch.no_grad():
        # a position table is a parameter in a stock ViT
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.eval().save_pretrained(tmp_path / "tuned")
    # in several files
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    index = tmp_path / "parts" / "model.safetensors.index.json"
    for source in (tmp_path / "tuned", tmp_path / "tuned" / "model.safetensors", tmp_path / "parts", index):
        encoder = load_encoder(source)
        x = torch.randn(2, 3, *encoder.img_size)
        assert encoder.num_classes == 4 and close(encoder(x), model(x).logits)
        # as the description says, not as is usual of other projects' files
        assert encoder.mean == CFG.data.mean
    features = load_encoder(tmp_path / "tuned", num_classes=0)
    export(tmp_path / "tuned", tmp_path / "again", "extrema")
    assert close(load_encoder(tmp_path / "again")(x), model(x).logits) and features(x).shape == (2, 64)


def test_image_processor_and_pipeline(hf, exported):
    path, encoder = exported
    image = Image.fromarray((torch.rand(33, 57, 3) * 255).to(torch.uint8).numpy())
    pixels = hf.AutoImageProcessor.from_pretrained(path)(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 40)
    torch.testing.assert_close(encoder.preprocess()(image), pixels[0], rtol=0, atol=1e-5)
    small = image.crop((0, 0, 40, 16))
    exact = hf.AutoImageProcessor.from_pretrained(path)(small, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder.preprocess()(small), exact[0], rtol=0, atol=1e-5)
    options = {"model": str(path), "return_tensors": True}
    features = hf.pipeline("image-feature-extraction", **options)
    assert close(features(image), encoder.forward_features(pixels))
    pooled = hf.pipeline("image-feature-extraction", pool=True, **options)
    assert close(pooled(image), encoder(pixels))


def test_backbones(hf, exported):
    path, encoder = exported
    x = torch.randn(2, 3, 16, 40)
    wanted = encoder.forward_intermediates(x, [0, 2], intermediates_only=True)
    config = hf.TimmBackboneConfig(backbone=f"local-dir:{path}", out_indices=(0, 2))
    for model in (
        hf.AutoBackbone.from_config(config, pretrained=True),
        hf.TimmBackbone.from_pretrained(f"local-dir:{path}", out_indices=(0, 2)),
    ):
        maps = model.eval()(x).feature_maps
        assert all(close(a, b) for a, b in zip(maps, wanted, strict=True))
        assert model.channels == [48, 48] and model.out_features == ["blocks.0", "blocks.2"]


def test_backbone_by_name(hf):
    config = hf.TimmBackboneConfig(backbone="extrema_vit_tiny_patch16_224", out_indices=(3, -1))
    model = hf.AutoBackbone.from_config(config).eval()
    out = model(torch.randn(1, 3, 32, 64))
    assert [m.shape for m in out.feature_maps] == [(1, 192, 2, 4)] * 2
    assert model.out_features == ["blocks.3", "blocks.11"]
