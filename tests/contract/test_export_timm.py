"""Exports for timm and Hugging Face, read back by what they are for.

Covers: `timm.create_model("local-dir:DIR", pretrained=True)` of our own format after `import extrema_fast.timm`,
with another head, size and channels; the stock ViT strictly loaded, with timm, transformers' AutoModel, its
image processor and classification, and both graphs of torch, in a process that cannot import this project; the
whole encoder through AutoModel; `cait`; the model card; a pickle beside the weights that must not run;
descriptions by strangers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from extrema_fast.models.encoder import Encoder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.weights import load as convert
from extrema_fast.weights.export import export
from tests.weights._weights import CFG, IMAGES, Malicious, trained

timm = pytest.importorskip("timm")


@pytest.fixture
def method() -> ExtreMA:
    return trained()


@pytest.fixture
def weights(tmp_path, method):
    return convert.save_weights(tmp_path / "w", method, convert.weights_meta(CFG, 7))


def bare(tmp_path, encoder: Encoder):
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    torch.save(encoder.state_dict(), tmp_path / "bare.pth")
    return tmp_path / "bare.pth"


def local(folder, **options) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def test_timm_loads_our_own_format(weights, method, tmp_path):
    result = export(weights, tmp_path / "out", "timm")
    assert result.differences == {"load_encoder": 0.0, "timm local-dir": 0.0}
    model = local(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(IMAGES), method.teacher.eval()(IMAGES))
        wide = torch.randn(1, 3, 24, 40)
        assert torch.allclose(model(wide), convert.load_encoder(weights, img_size=(24, 40))(wide), atol=1e-6)
    cfg = timm.data.resolve_data_config(model=model)
    assert (
        list(cfg["mean"]) == [0.1, 0.2, 0.3]
        and cfg["crop_pct"] == 0.875
        and cfg["interpolation"] == "bilinear"
    )
    assert cfg["input_size"] == (3, 16, 16)
    tuned = local(tmp_path / "out", num_classes=7, in_chans=1, img_size=(8, 24), global_pool="avg")
    assert tuned(torch.randn(2, 1, 8, 24)).shape == (2, 7)
    assert torch.equal(tuned.blocks[1].mlp.fc1.weight, method.teacher.blocks[1].mlp.fc1.weight)


SHAPES = {
    "odd grid": lambda: Encoder(replace(CFG.model, img_size=(24, 56))),
    "one patch": lambda: Encoder(replace(CFG.model, img_size=(8, 8))),
    "gray": lambda: Encoder(replace(CFG.model, in_chans=1)),
    "five channels": lambda: Encoder(CFG.model, in_chans=5),
    "heads and mlp": lambda: Encoder(replace(CFG.model, mlp_ratio=2.7, heads=4)),
    "mean pool, classes": lambda: Encoder(CFG.model, 5, global_pool="avg"),
    "fine-tuned": lambda: Encoder(CFG.model, 5, global_pool="avg", fc_norm=True, pos_embed="learned"),
}


@pytest.mark.parametrize("format", ["extrema", "vit", "cait", "hf"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(tmp_path, shape, format):
    if format == "hf":
        pytest.importorskip("transformers")
        if shape not in ("odd grid", "fine-tuned"):
            # a `vit` with a card; what differs is its own
            return
    encoder = SHAPES[shape]().eval()
    file = bare(tmp_path, encoder)
    if "heads" in shape:
        # heads leave no trace in bare weights
        file = convert.import_released(file, tmp_path / "imported", num_heads=4)
    if format == "cait" and encoder.blocks_token is None:
        return
    result = export(file, tmp_path / "out", format)
    assert max(result.differences.values()) <= 1e-5
    # all of them come back, too
    loaded = convert.load_encoder(tmp_path / "out")
    images = torch.randn(2, encoder.in_chans, *encoder.img_size)
    with torch.no_grad():
        wanted = encoder.encode(images).patches
        assert torch.allclose(loaded.encode(images).patches, wanted, atol=1e-6)
        if encoder.num_classes and format != "cait":
            assert torch.allclose(loaded(images), encoder(images), atol=1e-6)


def test_a_fresh_norm_after_pooling(weights, method, tmp_path):
    export(weights, tmp_path / "out", "vit", fc_norm=True, which="student")
    model = local(tmp_path / "out")
    assert isinstance(model.norm, torch.nn.Identity)
    assert bool((model.fc_norm.weight == 1).all()) and bool((model.fc_norm.bias == 0).all())
    raw = method.student.eval().encode(IMAGES, norm=False).patches.mean(1)
    with torch.no_grad():
        wanted = torch.nn.functional.layer_norm(raw, (64,), eps=1e-6)
        assert torch.allclose(model(IMAGES), wanted, atol=1e-5)


# what a user without this project types; prints a few numbers
USER = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "extrema_fast":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {repository!r})
from benchmarks.with_timm import mend_torchvision
mend_torchvision()
import timm, torch
from PIL import Image
images = torch.load({root!r} + "/images.pt")
out = {{}}
with torch.no_grad():
    model = timm.create_model("local-dir:" + {root!r} + "/vit", pretrained=True).eval()
    out["class"] = type(model).__module__
    out["timm"] = model(images).flatten()[:5].tolist()
    out["parameters"] = sum(1 for _ in model.state_dict())
    for name, run in (
        ("torchscript", torch.jit.load({root!r} + "/torchscript/model.ts")),
        ("torch-export", torch.export.load({root!r} + "/torch-export/model.pt2").module()),
    ):
        out[name] = run(images)[0].flatten()[:5].tolist()
    try:
        from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
    except ImportError:
        pass
    else:
        result = AutoModel.from_pretrained({root!r} + "/hf")(pixel_values=images)
        out["hf"] = result.pooler_output.flatten()[:5].tolist()
        out["tokens"] = list(result.last_hidden_state.shape)
        processor = AutoImageProcessor.from_pretrained({root!r} + "/hf")
        picture = processor(Image.open({root!r} + "/photo.png"))["pixel_values"]
        out["pixels"] = [list(picture.shape), float(picture.mean())]
        tuned = AutoModelForImageClassification.from_pretrained({root!r} + "/tuned")
        out["logits"] = tuned(pixel_values=images).logits.flatten()[:5].tolist()
print(json.dumps(out))
"""


def test_without_this_project(weights, method, tmp_path, repository):
    image = pytest.importorskip("PIL.Image")
    for format in ("vit", "torchscript", "torch-export"):
        export(weights, tmp_path / format, format)
    tuned = SHAPES["fine-tuned"]().eval()
    try:
        import transformers  # noqa: F401
    except ImportError:
        pass
    else:
        export(weights, tmp_path / "hf", "hf")
        export(bare(tmp_path, tuned), tmp_path / "tuned", "hf")
    torch.save(IMAGES, tmp_path / "images.pt")
    pixels = torch.arange(40 * 30 * 3, dtype=torch.uint8).view(40, 30, 3)
    image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    code = USER.format(repository=str(repository), root=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    encoder = convert.load_encoder(weights, global_pool="avg")
    with torch.no_grad():
        wanted = encoder(IMAGES).flatten()[:5].tolist()
        logits = tuned(IMAGES).flatten()[:5].tolist()
    assert out["class"] == "timm.models.vision_transformer"
    assert out["timm"] == pytest.approx(wanted, abs=1e-5)
    with torch.no_grad():
        token = method.teacher.eval()(IMAGES).flatten()[:5].tolist()
    assert out["torchscript"] == out["torch-export"] == pytest.approx(token, abs=1e-5)
    assert out["parameters"] == len(encoder.state_dict())
    if "hf" in out:
        assert out["hf"] == pytest.approx(wanted, abs=1e-5) and out["tokens"] == [2, 4, 64]
        assert out["logits"] == pytest.approx(logits, abs=1e-5)
        mine = encoder.preprocess()(image.open(tmp_path / "photo.png"))
        assert out["pixels"] == [[1, 3, 16, 16], pytest.approx(float(mine.mean()), abs=0.02)]


def test_the_whole_encoder_for_hugging_face(weights, method, tmp_path):
    transformers = pytest.importorskip("transformers")
    export(weights, tmp_path / "out", "hf", class_token=True)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    with torch.no_grad():
        result = model(pixel_values=IMAGES)
        wanted = method.teacher.eval().encode(IMAGES)
    assert torch.equal(result.pooler_output, wanted.cls)
    assert torch.equal(result.last_hidden_state[:, 1:], wanted.patches)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "import extrema_fast.timm" in card and "class token" in card


def test_the_model_card(weights, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    image = pytest.importorskip("PIL.Image")
    export(weights, tmp_path / "out", "hf")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert "library_name: transformers" in head and "pipeline_tag: image-feature-extraction" in head
    own = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["extrema_fast"]
    for fact in (
        "| optimizer steps | 7 |", "| images seen | 112 |", "| network | teacher |", own["config_hash"],
        "mean 0.1, 0.2, 0.3", "3 x 16 x 16", "AutoModel", "largest difference",
    ):  # fmt: skip
        assert fact in body, fact
    # what the stock model does not have is said
    assert "class-attention head is left out" in body and "import extrema_fast" not in body
    # its lines run as they are, also for a grey picture
    image.new("L", (40, 30), 77).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code, names = body.split("```python\n")[1].split("```")[0], {}
    exec(code.replace("path/to/this/folder", "out"), names)
    assert names["features"].last_hidden_state.shape == (1, 4, 64)
    try:
        from huggingface_hub import ModelCard
    except ImportError:
        return
    assert ModelCard(card).data.tags == ["timm", "vision-transformer", "self-supervised-learning", "extrema"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_pickled_code_beside_the_weights_does_not_run(weights, method, tmp_path, name):
    export(weights, tmp_path / "out")
    target = tmp_path / "was_here"
    torch.save({"state_dict": method.teacher.state_dict(), "x": Malicious(target)}, tmp_path / "out" / name)
    with torch.no_grad():
        assert torch.equal(local(tmp_path / "out")(IMAGES), method.teacher.eval()(IMAGES))
        assert torch.equal(convert.load_encoder(tmp_path / "out")(IMAGES), method.teacher(IMAGES))
    # without ours it is all there is, and is refused by timm as well
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        local(tmp_path / "out")
    with pytest.raises(ValueError, match=r"neither a run folder|config.json"):
        convert.load_encoder(tmp_path / "out")
    assert not target.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "os.system"}, "Unknown model"),
        ({"model_args": {"evil": 1}}, "evil"),
        ({"model_args": {"width": 10**9, "heads": 1}}, "parameters"),
        ({"model_args": {"depth": 10**9}}, "blocks"),
        ({"model_args": {"img_size": [16 * 10**8, 16 * 10**8]}}, "patches"),
        ({"model_args": {"width": 64, "depth": 3, "heads": 1}}, "missing: blocks.2|do not fit|size mismatch"),
    ],
)
def test_timm_with_a_strangers_description(weights, tmp_path, changes, words):
    export(weights, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model_args"] |= changes.pop("model_args", {})
    file.write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises((RuntimeError, TypeError, ValueError), match=words):
        local(tmp_path / "out")


def test_timm_with_a_damaged_file(weights, tmp_path):
    export(weights, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match="deserializing header"):
        local(tmp_path / "out")
