"""Exports for timm and Hugging Face, read back by what they are for.

Covers: timm's `local-dir:` of our own format and of the stock ViT, for every variant of the encoder; an eps that the
stock ViT cannot have; all formats in a process that cannot import this project; the whole encoder through AutoModel;
the model card; pickles and descriptions by strangers.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from extrema_fast.models.encoder import Encoder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.weights import export as export_module
from extrema_fast.weights.export import export
from extrema_fast.weights.folder import save_weights, weights_meta
from extrema_fast.weights.load import import_released, load_encoder
from tests.weights._weights import CFG, ENCODERS, IMAGES, Malicious, perturbed, refused, same, trained

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def method() -> ExtreMA:
    return trained()


@pytest.fixture
def weights(tmp_path, method):
    return save_weights(tmp_path / "w", method, weights_meta(CFG, 7))


def bare(tmp_path, encoder: Encoder):
    torch.save(perturbed(encoder).state_dict(), tmp_path / "bare.pth")
    return tmp_path / "bare.pth"


def local(folder, **options) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def test_timm_loads_our_own_format(weights, method, tmp_path):
    result = export(weights, tmp_path / "out", "timm")
    assert result.differences == {"load_encoder": 0.0, "timm local-dir": 0.0}
    model, wide = local(tmp_path / "out"), torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), method.teacher(IMAGES))
        assert torch.allclose(model(wide), load_encoder(weights, img_size=(24, 40))(wide), atol=1e-6)
    cfg = timm.data.resolve_data_config(model=model)
    assert list(cfg["mean"]) == [0.1, 0.2, 0.3] and cfg["input_size"] == (3, 16, 16)
    assert cfg["crop_pct"] == 0.875 and cfg["interpolation"] == "bilinear"
    tuned = local(tmp_path / "out", num_classes=7, in_chans=1, img_size=(8, 24), global_pool="avg")
    assert tuned(torch.randn(2, 1, 8, 24)).shape == (2, 7)
    assert torch.equal(tuned.blocks[1].mlp.fc1.weight, method.teacher.blocks[1].mlp.fc1.weight)


SHAPES = ENCODERS | {"heads and mlp": lambda: Encoder(replace(CFG.model, mlp_ratio=2.7, heads=4))}


@pytest.mark.parametrize(
    ("shape", "format"),
    # `extrema`: tests/weights/test_export.py; `hf` is a `vit` with a card: two suffice
    [*((s, "vit") for s in SHAPES), ("heads and mlp", "extrema"), ("odd grid", "hf"), ("fine-tuned", "hf")],
)
def test_every_shape(tmp_path, shape, format):
    if format == "hf":
        pytest.importorskip("transformers")
    encoder = SHAPES[shape]()
    file = bare(tmp_path, encoder)
    if "heads" in shape:
        # heads leave no trace in bare weights
        file = import_released(file, tmp_path / "imported", num_heads=4)
    result = export(file, tmp_path / "out", format)
    assert max(result.differences.values()) <= 1e-5
    loaded = load_encoder(tmp_path / "out")
    images = torch.randn(2, encoder.in_chans, *encoder.img_size)
    with torch.no_grad():
        assert torch.allclose(loaded.encode(images).patches, encoder.encode(images).patches, atol=1e-6)
        # a classifier trained on the class token is left out of a mean-pooled export
        if loaded.num_classes:
            assert torch.allclose(loaded(images), encoder(images), atol=1e-6)
    assert loaded.num_classes == (
        0 if format == "vit" and shape in ("classes", "no final norm") else encoder.num_classes
    )


def test_a_fresh_norm_after_pooling(weights, method, tmp_path):
    export(weights, tmp_path / "out", "vit", fc_norm=True, which="student")
    model = local(tmp_path / "out")
    assert isinstance(model.norm, torch.nn.Identity)
    assert bool((model.fc_norm.weight == 1).all()) and bool((model.fc_norm.bias == 0).all())
    with torch.no_grad():
        raw = method.student.encode(IMAGES, norm=False).patches.mean(1)
        assert torch.allclose(model(IMAGES), torch.nn.functional.layer_norm(raw, (64,), eps=1e-6), atol=1e-5)


@pytest.mark.parametrize("format", ["vit", "hf"])
def test_an_eps_that_a_stock_vit_cannot_have(tmp_path, monkeypatch, format):
    if format == "hf":
        pytest.importorskip("transformers")
    folder = import_released(bare(tmp_path, Encoder(CFG.model)), tmp_path / "imported")
    config = json.loads((folder / "config.json").read_text())

    def with_eps(eps: float):
        config["encoder"]["norm_eps"] = eps
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    # Hugging Face's, which changes no feature by more than a comparison accepts
    export(with_eps(1e-12), tmp_path / "out", format)
    if format == "hf":
        export(with_eps(1e-2), tmp_path / "whole", format, class_token=True)
        assert load_encoder(tmp_path / "whole").norm_eps == 1e-2
    # before anything is written
    monkeypatch.setattr(export_module, "new_folder", None)
    words = f"--format {format}", "eps 0.01", "1e-06", "use --format extrema, onnx"
    refused(lambda: export(with_eps(1e-2), tmp_path / "out", format, force=True), *words)


# what a user without this project types; prints a few numbers
USER = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "extrema_fast":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {repository!r})
from tests.torchvision_operators import define_torchvision_operators
define_torchvision_operators()
import timm, torch
from PIL import Image
root = {root!r}
images, out = torch.load(root + "/images.pt", weights_only=True), {{}}
with torch.no_grad():
    model = timm.create_model(f"local-dir:{{root}}/vit", pretrained=True).eval()
    out["class"], out["timm"] = type(model).__module__, model(images).flatten()[:5].tolist()
    program = torch.export.load(root + "/torch-export/model.pt2").module()
    out["program"] = program(images)[0].flatten()[:5].tolist()
    try:
        from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
    except ImportError:
        pass
    else:
        result = AutoModel.from_pretrained(root + "/hf")(pixel_values=images)
        out["hf"] = result.pooler_output.flatten()[:5].tolist()
        out["tokens"] = list(result.last_hidden_state.shape)
        pixels = AutoImageProcessor.from_pretrained(root + "/hf")(Image.open(root + "/photo.png"))["pixel_values"]
        out["pixels"] = [list(pixels.shape), float(pixels.mean())]
        tuned = AutoModelForImageClassification.from_pretrained(root + "/tuned")
        out["logits"] = tuned(pixel_values=images).logits.flatten()[:5].tolist()
print(json.dumps(out))
"""


def test_without_this_project(weights, method, tmp_path, repository):
    image = pytest.importorskip("PIL.Image")
    tuned = ENCODERS["fine-tuned"]()
    for format in ("vit", "torch-export"):
        export(weights, tmp_path / format, format)
    if importlib.util.find_spec("transformers"):
        export(weights, tmp_path / "hf", "hf")
        export(bare(tmp_path, tuned), tmp_path / "tuned", "hf")
    torch.save(IMAGES, tmp_path / "images.pt")
    photo = torch.arange(3600, dtype=torch.uint8).view(40, 30, 3)
    image.fromarray(photo.numpy()).save(tmp_path / "photo.png")
    code = USER.format(repository=str(repository), root=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    encoder = load_encoder(weights, global_pool="avg")

    def numbers(model):
        with torch.no_grad():
            return pytest.approx(model(IMAGES).flatten()[:5].tolist(), abs=1e-5)

    assert out["class"] == "timm.models.vision_transformer" and out["timm"] == numbers(encoder)
    assert out["program"] == numbers(method.teacher)
    if "hf" in out:
        assert out["hf"] == numbers(encoder) and out["tokens"] == [2, 4, 64]
        assert out["logits"] == numbers(tuned)
        mine = encoder.preprocess()(image.open(tmp_path / "photo.png"))
        assert out["pixels"] == [[1, 3, 16, 16], pytest.approx(float(mine.mean()), abs=0.02)]


def test_the_whole_encoder_for_hugging_face(weights, method, tmp_path):
    transformers = pytest.importorskip("transformers")
    export(weights, tmp_path / "out", "hf", class_token=True)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    with torch.no_grad():
        result, wanted = model(pixel_values=IMAGES), method.teacher.encode(IMAGES)
    assert torch.equal(result.pooler_output, wanted.cls)
    assert torch.equal(result.last_hidden_state[:, 1:], wanted.patches)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "import extrema_fast.timm" in card and "class token" in card


def test_the_model_card(weights, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    image = pytest.importorskip("PIL.Image")
    hub = pytest.importorskip("huggingface_hub")
    export(weights, tmp_path / "out", "hf")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    data = hub.ModelCard(card).data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-feature-extraction"
    assert data.tags == ["timm", "vision-transformer", "self-supervised-learning", "extrema"]
    own = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["extrema_fast"]
    for fact in (
        "| optimizer steps | 7 |",
        "| images seen | 112 |",
        "| network | teacher |",
        own["config_hash"],
        "mean 0.1, 0.2, 0.3",
        "3 x 16 x 16",
        "AutoModel",
        "largest difference",
        # what the stock model does not have is said
        "class-attention head is left out",
    ):
        assert fact in card, fact
    # its lines run as they are, also for a gray image
    image.new("L", (40, 30), 77).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code, names = card.split("```python\n")[1].split("```")[0], {}
    assert "extrema_fast" not in code
    exec(code.replace("path/to/this/folder", "out"), names)
    assert names["features"].last_hidden_state.shape == (1, 4, 64)


def test_a_strangers_description_becomes_no_markup(weights, tmp_path):
    pytest.importorskip("transformers")
    evil = "<b>alert</b> ![x](https://evil/x.png) [y](z) `a` | b\n\n# h www.evil.example \x1b[2J"
    file = weights / "config.json"
    meta = json.loads(file.read_text())
    meta |= {"config_hash": evil, "source": {"file": evil}, "software": evil}
    file.write_text(json.dumps(meta))
    export(weights, tmp_path / "out", "hf")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in card.splitlines() if "alert" in line]
    assert len(rows) == 2 and all(r.startswith(("| configuration |", "| source |")) for r in rows)
    for text in rows:
        plain = re.sub(r"\\.|&#[0-9]+;", "", text)
        assert not re.search(r"[<>`!\[\]#]|://|www\.|\x1b", plain) and plain.count("|") == 3, text


def test_pickled_code_next_to_the_weights_does_not_run(weights, method, tmp_path):
    out, target = export(weights, tmp_path / "out").folder, tmp_path / "was_here"
    torch.save({"state_dict": method.teacher.state_dict(), "x": Malicious(target)}, out / "pytorch_model.bin")
    assert same(local(out), method.teacher) and same(load_encoder(out), method.teacher)
    # without ours it is all there is, and timm refuses it as well
    (out / "model.safetensors").unlink()
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        local(out)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_encoder(out)
    assert not target.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "os.system"}, "Unknown model"),
        ({"model_args": {"evil": 1}}, "evil"),
        ({"model_args": {"width": 10**9, "heads": 1}}, "parameters"),
        ({"model_args": {"width": 64, "depth": 3, "heads": 1}}, r"blocks\.2"),
    ],
)
def test_timm_with_a_strangers_description(weights, tmp_path, changes, words):
    file = export(weights, tmp_path / "out").folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model_args"] |= changes.pop("model_args", {})
    file.write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises((RuntimeError, TypeError, ValueError), match=words):
        local(tmp_path / "out")
