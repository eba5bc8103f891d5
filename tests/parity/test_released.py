"""The method against numbers of the paper's released implementation, in float64.

Covers, for every vector found: keep indices and position table, features, projections, prediction,
target, trunk tokens, loss, every gradient, the EMA update and the AdamW step; relative error <= 1e-9.
And the published checkpoint format through `extrema-fast import`, and its exports (torch.export, stock timm ViT,
ONNX) against the same numbers.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from extrema_fast.config import from_dict, photos
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.ops import dispatch as ops
from extrema_fast.training.optim import param_groups
from extrema_fast.weights.load import load_encoder, load_metadata
from tests.torchvision_operators import define_torchvision_operators

FOLDER = Path(os.environ.get("EXTREMA_FAST_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
RELEASED = FOLDER / "released_format.pth"
# complete steps, not the expected outputs of a checkpoint file
VECTORS = sorted(p for p in FOLDER.glob("*.safetensors") if ".expected" not in p.name)


def read(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(configuration, tensors in float64 where floating)."""
    with safe_open(file, "pt") as f:
        config = json.loads(f.metadata()["config"])
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    return config, {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


def own_name(key: str) -> str:
    """Released state-dict name -> name inside `ExtreMA`."""
    for old, new in (
        ("base_encoder.head.", "student_branch.projector."),
        ("momentum_encoder.head.", "teacher_branch.projector."),
        ("base_encoder.", "student_branch.encoder."),
        ("momentum_encoder.", "teacher_branch.encoder."),
        ("predictor.", "student_branch.predictor."),
    ):
        if key.startswith(old):
            return new + key.removeprefix(old)
    raise KeyError(key)


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors below `prefix/`, under this project's names."""
    return {own_name(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}


TOLERANCE = 1e-9


def error(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((ours - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))


def method_like(config: dict) -> ExtreMA:
    c = config
    model = {
        "img_size": [c["img_size"]] * 2,
        "patch_size": c["patch_size"],
        "width": c["embed_dim"],
        "depth": c["depth"],
        "heads": c["num_heads"],
        "mlp_ratio": 4.0,
        "layer_scale": c["layer_scale_init"],
        "pool_depth": c["class_attention_layers"],
        "drop_path": 0.0,
    }
    hidden, out = c["mlp_dim"], c["proj_dim"]
    head = {"loss": "byol", "hidden": hidden, "out": out, "predictor_hidden": hidden}
    mask = {"ratio": c["mask_ratio"], "views": c["num_masks"]}
    cfg = from_dict({"model": model, "head": head, "mask": mask}, photos())
    assert cfg.num_keep == c["kept_tokens"] and cfg.model.num_patches == c["tokens"]
    return ExtreMA(cfg).double()


@pytest.mark.parametrize("pool", ["absorbed", "reference"])
@pytest.mark.parametrize("file", VECTORS, ids=lambda p: p.stem)
def test_one_step_equals_the_released_code(file, pool, monkeypatch):
    monkeypatch.setenv("EXTREMA_FAST_BACKEND", f"attention_pool={pool}")
    monkeypatch.setattr(ops, "_chosen", {})
    config, t = read(file)
    method = method_like(config)
    before, own = part(t, "before/"), method.state_dict()
    # the released table is a parameter computed in fp64 and kept in fp32; ours must be the same numbers
    table = "student_branch.encoder.pos_embed"
    assert own.keys() == before.keys() and error(own[table], before[table]) == 0
    method.load_state_dict(before)
    named = dict(method.student_parameters())
    groups = param_groups(list(named.items()), config["weight_decay"])
    adam = torch.optim.AdamW(groups, lr=config["lr"], betas=tuple(config["betas"]), eps=1e-8)

    # the released order: move the teacher towards the student of before the step, then both passes
    method.ema_update(1 - config["ema_momentum"])
    after_ema = part(t, "after_ema/")
    state = method.state_dict()
    assert after_ema
    for name, wanted in after_ema.items():
        assert error(state[name], wanted) <= TOLERANCE, name

    keep = t["input/keep"]
    projections = []
    hook = method.projector.register_forward_hook(lambda _m, _i, out: projections.append(out))
    out = method(t["input/student_images"], t["input/teacher_images"], keep)
    hook.remove()
    for name, ours in (
        ("loss", out.loss),
        ("prediction", out.prediction),
        ("target", out.target),
        ("student_features", out.student_features),
        ("teacher_features", out.teacher_features),
        ("student_projection", projections[0]),
        ("teacher_tokens", method.teacher.encode(t["input/teacher_images"], norm=False).patches),
    ):
        assert ours.shape == t[f"out/{name}"].shape, name
        assert error(ours.detach(), t[f"out/{name}"]) <= TOLERANCE, name

    out.loss.backward()
    gradients = part(t, "grad/")
    assert gradients.keys() == {f"student_branch.{n}" for n in named}
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, wanted in gradients.items():
        ours = named[name.removeprefix("student_branch.")].grad
        if name.endswith(("attn.k.bias", "attn.qkv.bias")):
            # of the key exactly zero in real arithmetic: rounding noise on both sides
            assert float((ours - wanted).abs().max()) <= 1e-12 * largest, name
        if name.endswith("attn.qkv.bias"):
            (query, _, value), (wanted_query, _, wanted_value) = ours.chunk(3), wanted.chunk(3)
            ours, wanted = torch.cat([query, value]), torch.cat([wanted_query, wanted_value])
        if not name.endswith("attn.k.bias"):
            assert error(ours, wanted) <= TOLERANCE, name

    adam.step()
    for name, wanted in part(t, "after_step/").items():
        if not name.endswith("pos_embed"):
            assert error(named[name.removeprefix("student_branch.")].detach(), wanted) <= TOLERANCE, name


released = pytest.mark.skipif(not RELEASED.is_file(), reason=f"no {RELEASED}; set EXTREMA_FAST_PARITY")


@released
def test_import_of_the_released_format(tmp_path, capsys):
    from extrema_fast.__main__ import main

    out = tmp_path / "imported"
    assert main(["import", str(RELEASED), str(out)]) == 0
    expected = load_file(FOLDER / "released_format.expected.safetensors")
    model = load_metadata(out)["model"]
    assert (model["width"], model["depth"], model["heads"], model["patch_size"]) == (128, 3, 2, 16)
    assert model["img_size"] == [224, 224]
    for which in ("student", "teacher"):
        for source in (out, RELEASED):
            encoder = load_encoder(source, which=which)
            with torch.no_grad():
                after, before = (encoder.encode(expected["input/images"], norm=n) for n in (True, False))
            assert error(after.cls, expected[f"out/{which}_features"]) <= 1e-5
            assert error(before.cls, expected[f"out/{which}_features_before_norm"]) <= 1e-5
            assert error(before.patches, expected[f"out/{which}_tokens_before_norm"]) <= 1e-5
    # the two networks differ, so keeping only one of them would have been seen
    assert (load_encoder(out, "student").cls_token - load_encoder(out, "teacher").cls_token).abs().max() > 0
    student = load_file(out / "student.safetensors")
    assert {"head.6.weight", "predictor.3.weight"} <= student.keys()
    assert json.loads((out / "config.json").read_text())["source"]["arch"] == "vit_base"
    # a second import must not overwrite the first
    assert main(["import", str(RELEASED), str(out)]) == 2
    assert "not empty" in capsys.readouterr().err


@released
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_exports_of_the_released_format(tmp_path, which):
    from extrema_fast.weights.export import export

    expected = load_file(FOLDER / "released_format.expected.safetensors")
    images = expected["input/images"]
    features = expected[f"out/{which}_features"]
    raw = expected[f"out/{which}_tokens_before_norm"]
    norm = load_encoder(RELEASED, which).norm
    with torch.no_grad():
        tokens = norm(raw)

    define_torchvision_operators()
    if importlib.util.find_spec("timm"):
        import timm

        export(RELEASED, tmp_path / "vit", "vit", which=which)
        model = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
        with torch.no_grad():
            assert error(model.forward_features(images), tokens) <= 1e-5
            assert error(model.get_intermediate_layers(images, n=1, norm=False)[0], raw) <= 1e-5
            assert error(model(images), tokens.mean(1)) <= 1e-5

    # graphs are slow to write, and once is enough
    if which == "student":
        return
    export(RELEASED, tmp_path / "program", "torch-export", which=which)
    with torch.no_grad():
        out = torch.export.load(tmp_path / "program" / "model.pt2").module()(images)
    assert error(out[0], features) <= 1e-5 and error(out[1], tokens) <= 1e-5

    if all(importlib.util.find_spec(p) for p in ("onnx", "onnxruntime", "onnxscript")):
        import onnxruntime

        export(RELEASED, tmp_path / "onnx", "onnx", which=which)
        session = onnxruntime.InferenceSession(
            str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        found = [torch.from_numpy(y) for y in session.run(None, {"images": images.numpy()})]
        assert error(found[0], features) <= 1e-4 and error(found[1], tokens) <= 1e-4
