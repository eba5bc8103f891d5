"""Exports that need the core installation alone, and the rules that all formats share.

Covers: our own format and torch.export for every variant of the encoder; encoders in memory, inside other modules too;
metadata; folders of older versions; unknown formats and options, missing packages; `--force`; a comparison that fails,
a full disk, an interrupt; the command line.
"""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from extrema_fast.__main__ import main
from extrema_fast.config import config_hash
from extrema_fast.errors import ExtremaError, NonFiniteError, StorageError, cannot_import, install
from extrema_fast.models.encoder import Encoder
from extrema_fast.weights import export as export_module
from extrema_fast.weights.export import FORMATS, export
from extrema_fast.weights.load import load_encoder
from tests.weights._weights import CFG, ENCODERS, perturbed, refused, same


def names(folder) -> list[str]:
    """What is in a folder, temporary folders included."""
    return sorted(p.name for p in folder.iterdir())


def read(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# ---- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_round_trip(folder, method, tmp_path, which):
    result = export(folder, tmp_path / "out", which=which)
    assert result.files == ["README.md", "config.json", "model.safetensors"] == names(tmp_path / "out")
    assert result.differences["load_encoder"] == 0
    # no training heads inside
    assert load_file(result.folder / "model.safetensors").keys() == getattr(method, which).state_dict().keys()
    for source in (result.folder, result.folder / "model.safetensors"):
        assert same(load_encoder(source), getattr(method, which))
    other = "student" if which == "teacher" else "teacher"
    refused(lambda: load_encoder(result.folder, other), f"no {other} weights", which)


@torch.no_grad()
def test_an_encoder_in_memory(tmp_path):
    model = replace(CFG.model, img_size=(16, 24), heads=2, pool_depth=1)
    encoder = perturbed(Encoder(model, norm_eps=1e-3, pos_coords="rescaled")).train()
    encoder.set_input_size((24, 40))
    encoder.mean, encoder.std, encoder.value_range = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (0.0, 4095.0)
    encoder.interpolation, encoder.crop_pct = "bicubic", 0.9
    export(encoder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "How these weights were trained is not recorded." in card and "an encoder in memory" in card
    assert encoder.training and all(p.requires_grad for p in encoder.parameters())
    loaded = load_encoder(tmp_path / "out")
    for name in ("heads", "norm_eps", "grid", "mean", "std", "value_range", "interpolation", "crop_pct"):
        assert getattr(loaded, name) == getattr(encoder, name)
    for size in ((24, 40), (32, 16)):
        images = torch.randn(2, 3, *size)
        assert torch.equal(loaded(images), encoder.eval()(images))
    encoder.blocks[0].mlp.extra = torch.nn.Linear(2, 2)
    refused(
        lambda: export(encoder, tmp_path / "other"), "an encoder in memory", "unknown: blocks.0.mlp.extra"
    )


@pytest.mark.parametrize("options", [{"prune_head": False}, {"prune_norm": True}])
@torch.no_grad()
def test_an_encoder_without_pooling_and_pruned(tmp_path, options):
    encoder = perturbed(Encoder(CFG.model, global_pool=""))
    assert same(load_encoder(export(encoder, tmp_path / "whole").folder), encoder)
    encoder.prune_intermediate_layers([0], **options)
    loaded = load_encoder(export(encoder, tmp_path / "out").folder)
    assert same(loaded, encoder) and loaded.config.shape == encoder.config.shape == (64, 1, 1)


def test_an_encoder_inside_other_modules(tmp_path, monkeypatch):
    encoder = perturbed(Encoder(CFG.model))
    parts = deepcopy(encoder)
    for i, block in enumerate(parts.blocks):
        parts.blocks[i] = torch.compile(block, backend="eager")
    compiled = torch.compile(encoder, backend="eager")
    for i, model in enumerate((compiled, torch.nn.DataParallel(compiled), encoder.as_dino(), parts)):
        assert same(load_encoder(export(model, tmp_path / str(i)).folder), encoder)
    monkeypatch.setattr(export_module, "is_sharded", lambda tensor: True)
    refused(lambda: export(encoder, tmp_path / "other"), "sharded over processes", "full_state_dict")
    for model in (torch.nn.Linear(2, 2), None):
        refused(lambda m=model: export(m, tmp_path / "other"), "an encoder, got a", type(model).__name__)


@pytest.mark.parametrize("variant", ENCODERS)
@torch.no_grad()
def test_every_encoder_in_memory(tmp_path, variant):
    encoder = perturbed(ENCODERS[variant]())
    encoder.classes = [f"class {i}" for i in range(encoder.num_classes)]
    export(encoder, tmp_path / "out")
    loaded = load_encoder(tmp_path / "out")
    assert same(loaded, encoder) and loaded.classes == encoder.classes


def test_half_precision(tmp_path):
    """The rounded table is still the fixed one, in a file and in memory."""
    encoder = Encoder(CFG.model).bfloat16()
    torch.save(encoder.state_dict(), tmp_path / "half.pth")
    for i, source in enumerate((encoder, tmp_path / "half.pth")):
        loaded = load_encoder(export(source, tmp_path / str(i)).folder)
        assert torch.equal(loaded.pos_embed, Encoder(CFG.model).pos_embed)
        assert torch.equal(loaded.blocks[1].mlp.fc1.weight.bfloat16(), encoder.blocks[1].mlp.fc1.weight)


def test_metadata_and_an_exported_size(folder, tmp_path):
    wanted = load_encoder(folder, img_size=(24, 40))
    export(folder, tmp_path / "out", img_size=(24, 40))
    config = read(tmp_path / "out")
    assert config["architecture"] == "extrema_vit_tiny_patch16_224"
    assert config["num_classes"] == 0 and config["num_features"] == 64
    assert config["pretrained_cfg"]["input_size"] == [3, 24, 40]
    own = config["extrema_fast"]
    assert own["input"] == {
        "input_size": [3, 24, 40],
        "channels": ["red", "green", "blue"],
        "value_range": [0.0, 1.0],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "patch_size": 8,
    }
    assert own["encoder"]["pos_coords"] == "absolute" and own["encoder"]["pos_grid"] == [2, 2]
    assert (own["which"], own["step"], own["images"], own["seed"]) == ("teacher", 7, 112, 3)
    assert own["config_hash"] == config_hash(CFG) and own["software"].startswith("extrema-fast ")
    assert own["export"]["format"] == "extrema" and own["export"]["differences"]["load_encoder"] == 0
    # an export of an export is the same again
    export(tmp_path / "out", tmp_path / "again")
    assert read(tmp_path / "again")["extrema_fast"]["step"] == 7
    for path in ("out", "again"):
        encoder = load_encoder(tmp_path / path)
        assert encoder.img_size == (24, 40) and encoder.sincos.trained == (2, 2) and same(encoder, wanted)


@pytest.mark.parametrize("variant", ENCODERS)
def test_every_variant_of_the_encoder(tmp_path, variant):
    encoder = perturbed(ENCODERS[variant]())
    torch.save(encoder.state_dict(), tmp_path / "bare.pth")
    export(tmp_path / "bare.pth", tmp_path / "extrema")
    loaded = load_encoder(tmp_path / "extrema")
    given = [torch.randn(batch, encoder.in_chans, *encoder.img_size) for batch in (1, 5)]
    for images in given:
        assert torch.allclose(loaded(images), encoder(images), atol=1e-6)
    # the others differ from these in sizes, or by a module more or less
    if variant not in ("one patch", "classes", "fine-tuned"):
        return
    result = export(tmp_path / "bare.pth", tmp_path / "program", "torch-export")
    assert max(result.differences.values()) <= 1e-5
    run = torch.export.load(tmp_path / "program" / "model.pt2").module()
    for images in given:
        with torch.no_grad():
            out, wanted = run(images), encoder(images)
            patches = encoder.encode(images).patches
        assert torch.allclose(out[-1 if encoder.num_classes else 0], wanted, atol=1e-6)
        assert torch.allclose(out[1], patches, atol=1e-5)


def test_an_exported_program(folder, tmp_path):
    export(folder, tmp_path / "out", "torch-export", img_size=(24, 16))
    run = torch.export.load(tmp_path / "out" / "model.pt2").module()
    # also the same number of patches in another arrangement
    for other in ((16, 24), (24, 24)):
        with pytest.raises(AssertionError, match="images"):
            run(torch.randn(1, 3, *other))
    assert read(tmp_path / "out")["graph"]["outputs"] == ["class_token", "patch_tokens"]
    assert read(tmp_path / "out")["extrema_fast"]["input"]["mean"] == [0.1, 0.2, 0.3]
    for path in (tmp_path / "out", tmp_path / "out" / "model.pt2"):
        refused(lambda p=path: load_encoder(p), path.name, "an exported graph")


def test_folders_of_older_versions(folder, method, tmp_path):
    # `cait` had timm's names for the class head, `torchscript` wrote model.ts
    out = export(folder, tmp_path / "out").folder
    state = load_file(out / "model.safetensors")
    old = {k.replace("blocks_token.", "blocks_token_only."): v for k, v in state.items()}
    save_file(old, out / "model.safetensors")
    assert same(load_encoder(out), method.teacher)
    (out / "model.safetensors").unlink()
    (out / "model.ts").touch()
    for path in (out, out / "model.ts"):
        refused(lambda p=path: load_encoder(p), path.name, "an exported graph")
    export(folder, out, force=True)
    assert names(out) == ["README.md", "config.json", "model.safetensors"]


# ---- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options", "words"),
    [
        ("onxx", {}, ["'onxx'", "did you mean 'onnx'"]),
        ("torchscript", {}, ["'torchscript'", "onnx or torch-export"]),
        ("cait", {}, ["'cait'", "extrema"]),
        ("extrema", {"opset": 18}, ["--opset", "onnx"]),
        ("extrema", {"fc_norm": True}, ["--fc-norm", "vit and hf"]),
        ("vit", {"class_token": True}, ["--class-token", "hf"]),
        ("hf", {"class_token": True, "fc_norm": True}, ["--fc-norm", "--class-token"]),
        ("extrema", {"which": "ema"}, ["which", "'ema'"]),
        ("torch-export", {"img_size": (24, 20)}, ["20", "patch size 8"]),
    ],
)
def test_options_that_do_not_fit(folder, tmp_path, format, options, words):
    refused(lambda: export(folder, tmp_path / "out", format, **options), *words)
    assert names(tmp_path) == ["w"]


@pytest.mark.parametrize("format", ["vit", "hf", "onnx"])
def test_a_missing_package_names_the_extra(folder, tmp_path, monkeypatch, format):
    package = FORMATS[format].packages[-1]
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    # what comes before it may be broken here; only the last one is looked for
    monkeypatch.setitem(FORMATS, format, FORMATS[format]._replace(packages=(package,)))
    refused(lambda: export(folder, tmp_path / "out", format), package, install(FORMATS[format].extra))
    custom = cannot_import(package, RuntimeError("Couldn't load custom C++ ops"), "hf")
    assert custom.endswith("install both from the same index")
    long = cannot_import(package, RuntimeError(300 * "x"), "hf")
    assert f"({197 * 'x'}...)" in long
    broken = cannot_import(package, RuntimeError("operator torchvision::nms does not exist"), "hf")
    assert broken.endswith("torchvision was built for another torch; install both from the same index")
    assert names(tmp_path) == ["w"]


def test_force_replaces_an_export_and_nothing_else(folder, method, tmp_path):
    out = export(folder, tmp_path / "out", "torch-export").folder
    # the lines of its card
    code, found = (out / "README.md").read_text(encoding="utf-8").split("```")[1], {}
    exec(code.removeprefix("python").replace("path/to/this/folder", str(out)), found)
    assert found["class_token"].shape == (1, 64)
    refused(lambda: export(folder, out), "not empty", "--force")
    export(folder, out, force=True)
    assert names(out) == ["README.md", "config.json", "model.safetensors"]
    # exporting an export over itself reads it first
    export(out, out, force=True)
    assert same(load_encoder(out), method.teacher)
    (out / "README.md").unlink()
    (out / "README.md").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to(out)
    for target, words in (
        # the weights themselves, a folder that holds them, and a file of the user's own
        (folder, ["--force", "neither"]),
        (tmp_path, ["--force", "dangling"]),
        (out, ["--force", "README.md"]),
        (tmp_path / "dangling", ["dangling", "symbolic link"]),
        (tmp_path / "link", ["link", "symbolic link"]),
    ):
        refused(lambda t=target: export(folder, t, force=True), *words)
    # a folder like an export, of another program's weights
    (out / "README.md").rmdir()
    (out / "config.json").write_text('{"architecture": "vit_small_patch16_224"}')
    refused(lambda: export(folder, out, force=True), "--force", "neither")
    assert names(tmp_path) == ["dangling", "link", "out", "w"]


def test_a_comparison_that_fails_keeps_nothing(folder, tmp_path, monkeypatch):
    export(folder, tmp_path / "earlier")
    before = (tmp_path / "earlier" / "model.safetensors").read_bytes()
    write = export_module.write_tensors

    def change(factor: float) -> None:
        def wrong(file, tensors):
            write(file, {k: v * factor if k == "norm.weight" else v for k, v in tensors.items()})

        monkeypatch.setattr(export_module, "write_tensors", wrong)

    for factor, difference in ((1.001, r"\d"), (float("nan"), "nan")):
        change(factor)
        for out in ("new", "earlier"):
            with pytest.raises(ExtremaError, match=f"load_encoder differs by {difference}") as error:
                export(folder, tmp_path / out, force=True)
            assert error.value.exit_code == 1
    # what cannot be read back at all
    monkeypatch.setattr(torch.export, "save", lambda *_, **__: None)
    with pytest.raises(ExtremaError, match="cannot be read back"):
        export(folder, tmp_path / "new", "torch-export")
    assert names(tmp_path) == ["earlier", "w"]
    assert (tmp_path / "earlier" / "model.safetensors").read_bytes() == before


def test_weights_that_have_diverged_are_no_export(folder, tmp_path):
    file = folder / "teacher.safetensors"
    tensors = load_file(file)
    save_file({k: v * float("nan") if k == "norm.weight" else v for k, v in tensors.items()}, file)
    with pytest.raises(NonFiniteError, match="features are not finite"):
        export(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "raised", "expected"),
    [
        ("write_json", OSError(28, "No space left on device"), StorageError),
        ("largest_difference", KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_full_disk_or_an_interrupt_keeps_what_was_there(
    folder, tmp_path, monkeypatch, name, raised, expected
):
    out = export(folder, tmp_path / "out").folder
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def stop(*_):
        raise raised

    monkeypatch.setattr(export_module, name, stop)
    for path in ("new", "out"):
        with pytest.raises(expected) as error:
            export(folder, tmp_path / path, force=True)
    assert getattr(error.value, "exit_code", 5) == 5
    assert names(tmp_path) == ["out", "w"] and {p.name: p.read_bytes() for p in out.iterdir()} == before


# ---- command line ---------------------------------------------------------------------------------


def test_commands(tmp_path, file, capsys):
    args = ["import", str(file), str(tmp_path / "weights")]
    assert main([*args, "--which", "student", "--num-heads", "2"]) == 0
    assert main(args) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*args, "--force"]) == 0
    args = ["export", str(tmp_path / "weights"), str(tmp_path / "out"), "--which", "student"]
    assert main([*args, "--img-size", "24", "16"]) == 0
    printed = capsys.readouterr().out
    assert "config.json, model.safetensors" in printed and "largest difference" in printed
    own = read(tmp_path / "out")["extrema_fast"]
    assert own["which"] == "student" and own["input"]["input_size"] == [3, 24, 16]
    assert own["source"]["file"] == "checkpoint.pth"
    assert main([*args, "--img-size", "24", "--force"]) == 0
    for wrong in ([], ["--img-size", "24", "16", "8", "--force"], ["--format", "tflite", "--force"]):
        assert main([*args, *wrong]) == 2
    err = capsys.readouterr().err
    assert "--img-size" in err and "'tflite'" in err
    assert names(tmp_path) == ["checkpoint.pth", "out", "weights"]
