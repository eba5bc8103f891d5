"""Exports as ONNX, checked with onnxruntime.

Covers: names and shapes of inputs and outputs, any batch, all outputs within 1e-4, logits; an image of another size;
standard operators only; the description inside the model; operator sets; weights in a separate file.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch

from extrema_fast.config import from_dict
from extrema_fast.models.encoder import Encoder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.weights import export as export_module
from extrema_fast.weights.export import export
from extrema_fast.weights.folder import save_weights, weights_meta
from extrema_fast.weights.load import load_encoder
from tests.weights._weights import CFG, ENCODERS, perturbed, refused

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def session(folder):
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    return onnxruntime.InferenceSession(
        str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"]
    )


def opset(model) -> int:
    return {o.domain: o.version for o in model.opset_import}[""]


def test_an_encoder_in_onnxruntime(tmp_path):
    small = from_dict({"model": {"depth": 1, "pool_depth": 1}}, CFG)
    weights = save_weights(tmp_path / "w", perturbed(ExtreMA(small)), weights_meta(small, 7))
    result = export(weights, tmp_path / "out", "onnx", img_size=(24, 40))
    assert max(result.differences.values()) <= 1e-4
    run = session(tmp_path / "out")
    (images,), outputs = run.get_inputs(), run.get_outputs()
    assert images.name == "images" and images.shape[1:] == [3, 24, 40] and isinstance(images.shape[0], str)
    assert [(o.name, o.shape[1:]) for o in outputs] == [("class_token", [64]), ("patch_tokens", [15, 64])]
    encoder = load_encoder(weights, img_size=(24, 40))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 24, 40)
        cls, patches = run.run(None, {"images": x.numpy()})
        with torch.no_grad():
            wanted = encoder.encode(x)
        assert torch.allclose(torch.from_numpy(cls), wanted.cls, atol=1e-4)
        assert torch.allclose(torch.from_numpy(patches), wanted.patches, atol=1e-4)
    # as many patches in another arrangement, and another number
    for size in ((40, 24), (16, 16)):
        with pytest.raises(Exception, match="invalid dimensions for input: images"):
            run.run(None, {"images": torch.zeros(1, 3, *size).numpy()})

    # the lines of the card
    code, names = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("```")[1], {}
    exec(code.removeprefix("python").replace("path/to/this/folder", str(tmp_path / "out")), names)
    assert names["class_token"].shape == (1, 64)

    model = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert {node.domain for node in model.graph.node} == {""} and not model.functions and opset(model) == 18
    own = json.loads({p.key: p.value for p in model.metadata_props}["extrema_fast"])
    assert own["step"] == 7 and own["input"]["input_size"] == [3, 24, 40]
    refused(lambda: load_encoder(tmp_path / "out"), "an exported graph (model.onnx)")
    refused(lambda: export(weights, tmp_path / "low", "onnx", opset=11), "--opset", "18", "11")
    refused(lambda: export(weights, tmp_path / "high", "onnx", opset=99), "--opset 99", "18")
    assert not (tmp_path / "low").exists() and not (tmp_path / "high").exists()


def test_a_classifier_a_newer_operator_set_and_a_separate_file(tmp_path, monkeypatch):
    encoder = perturbed(ENCODERS["fine-tuned"]())
    torch.save(encoder.state_dict(), tmp_path / "bare.pth")
    # weights of more than 2 GiB go into a separate file
    monkeypatch.setattr(export_module, "_ONNX_IN_ONE_FILE", 0)
    result = export(tmp_path / "bare.pth", tmp_path / "out", "onnx", opset=20)
    assert result.files == ["README.md", "config.json", "model.onnx", "model.onnx.data"]
    run = session(tmp_path / "out")
    assert [o.name for o in run.get_outputs()] == ["pooled", "patch_tokens", "logits"]
    x = torch.randn(3, 3, 16, 16)
    logits = torch.from_numpy(run.run(["logits"], {"images": x.numpy()})[0])
    with torch.no_grad():
        assert torch.allclose(logits, encoder(x), atol=1e-4)
    assert opset(onnx.load(str(tmp_path / "out" / "model.onnx"))) == 20
    # --force replaces this kind of folder, too
    export(tmp_path / "bare.pth", tmp_path / "out", force=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("dynamo", [False, True])
def test_by_torchs_own_exporters(tmp_path, dynamo):
    """Any batch and image size; by the older exporter any batch."""
    config = replace(CFG.model, width=16, depth=1, heads=1, pool_depth=1)
    encoder, x = perturbed(Encoder(config, 5)), torch.randn(2, 3, 16, 16)
    if dynamo:
        height, width = (torch.export.Dim(name, min=1, max=64) for name in ("rows", "columns"))
        shapes = {"images": {0: torch.export.Dim("batch", max=1024), 2: 8 * height, 3: 8 * width}}
        options = {"dynamic_shapes": shapes, "verbose": False}
    else:
        options = {"dynamic_axes": {"images": {0: "batch"}}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder, (x,), tmp_path / "model.onnx", dynamo=dynamo, input_names=["images"], **options
        )
    run = session(tmp_path)
    # that of the weights, which would be a constant of the graph, among them
    for size in (
        ((1, 3, 16, 16), (3, 3, 24, 40), (2, 3, 56, 8)) if dynamo else ((1, 3, 16, 16), (5, 3, 16, 16))
    ):
        y = torch.randn(*size)
        with torch.no_grad():
            logits = torch.from_numpy(run.run(None, {"images": y.numpy()})[0])
            assert torch.allclose(logits, encoder(y), atol=1e-4)
