"""Exports that need the core installation alone, and the rules that all formats share.

Covers: our own format back through `load_encoder` with its metadata, other sizes, channels, heads and pools;
torch.export and TorchScript reloaded, dynamic batch, images of another size; unknown formats, options of other
formats, missing packages; an output folder that exists; `--force`; a comparison that fails, a full disk, an
interrupt, a killed process: nothing is left, or what was there before; the command line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from extrema_fast.__main__ import main
from extrema_fast.config import config_hash
from extrema_fast.errors import ExtremaError, StorageError, cannot_import
from extrema_fast.models.encoder import Encoder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.weights import export_graph, export_timm
from extrema_fast.weights import load as convert
from extrema_fast.weights.export import FORMATS, export
from tests.weights._weights import CFG, IMAGES, refused, released, trained

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")


@pytest.fixture
def method() -> ExtreMA:
    return trained()


@pytest.fixture
def weights(tmp_path, method):
    return convert.save_weights(tmp_path / "w", method, convert.weights_meta(CFG, 7))


def left(folder) -> list[str]:
    """What lies in a folder, temporary folders included."""
    return sorted(p.name for p in folder.iterdir())


# ---- our own format -------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_round_trip(weights, method, tmp_path, which):
    result = export(weights, tmp_path / "out", which=which)
    assert result.files == ["config.json", "model.safetensors"] == left(tmp_path / "out")
    assert result.differences["load_encoder"] == 0
    own = getattr(method, which).eval()
    # no training heads inside
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == own.state_dict().keys()
    for source in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        encoder = convert.load_encoder(source)
        with torch.no_grad():
            assert torch.equal(encoder(IMAGES), own(IMAGES))
    other = "student" if which == "teacher" else "teacher"
    refused(lambda: convert.load_encoder(tmp_path / "out", other), f"no {other} weights", which)


def test_metadata(weights, tmp_path):
    export(weights, tmp_path / "out", img_size=(24, 40))
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
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
        "patch_size": 8,
    }
    assert own["encoder"]["pos_coords"] == "absolute" and own["encoder"]["pos_grid"] == [2, 2]
    assert (own["which"], own["step"], own["images"], own["seed"]) == ("teacher", 7, 112, 3)
    assert own["config_hash"] == config_hash(CFG) and own["software"].startswith("extrema-fast ")
    assert own["export"]["format"] == "extrema" and own["export"]["differences"]["load_encoder"] == 0


def test_an_exported_size_stays(weights, tmp_path):
    export(weights, tmp_path / "out", img_size=(24, 40))
    encoder = convert.load_encoder(tmp_path / "out")
    wanted = convert.load_encoder(weights, img_size=(24, 40))
    assert encoder.img_size == (24, 40) and encoder.sincos.trained == (2, 2)
    images = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        assert torch.equal(encoder(images), wanted(images))
    # and an export of an export is the same again
    export(tmp_path / "out", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["extrema_fast"]["step"] == 7
    with torch.no_grad():
        assert torch.equal(convert.load_encoder(tmp_path / "again")(images), wanted(images))


def saved(tmp_path, encoder: Encoder):
    """A file of bare weights of an encoder whose parameters are all away from their start."""
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    torch.save(encoder.state_dict(), tmp_path / "bare.pth")
    return tmp_path / "bare.pth"


VARIANTS = {
    "gray": lambda: Encoder(replace(CFG.model, in_chans=1)),
    "five channels": lambda: Encoder(CFG.model, in_chans=5),
    "wide, one row": lambda: Encoder(replace(CFG.model, img_size=(8, 56))),
    "classes": lambda: Encoder(CFG.model, 5),
    "mean pool, classes": lambda: Encoder(CFG.model, 5, global_pool="avg"),
    "fine-tuned": lambda: Encoder(CFG.model, 5, global_pool="avg", fc_norm=True, pos_embed="learned"),
    "three pooling blocks": lambda: Encoder(replace(CFG.model, pool_depth=3)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_encoder(tmp_path, variant):
    encoder = VARIANTS[variant]().eval()
    file = saved(tmp_path, encoder)
    images = torch.randn(3, encoder.in_chans, *encoder.img_size)
    with torch.no_grad():
        for format, read in (("extrema", convert.load_encoder), ("torchscript", load_script)):
            export(file, tmp_path / format, format)
            out = read(tmp_path / format)(images)
            out = out[-1 if encoder.num_classes else 0] if isinstance(out, tuple) else out
            assert torch.allclose(out, encoder(images), atol=1e-6), format


# ---- graphs ---------------------------------------------------------------------------------------


def load_script(folder):
    return torch.jit.load(str(folder / "model.ts"))


def load_program(folder):
    return torch.export.load(folder / "model.pt2").module()


GRAPHS = {"torchscript": load_script, "torch-export": load_program}


@pytest.mark.parametrize("format", GRAPHS)
def test_graphs(weights, method, tmp_path, format):
    result = export(weights, tmp_path / "out", format, img_size=(24, 16))
    assert max(result.differences.values()) <= 1e-5
    run = GRAPHS[format](tmp_path / "out")
    encoder = convert.load_encoder(weights, img_size=(24, 16))
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 24, 16)
        with torch.no_grad():
            cls, patches = run(images)
            wanted = encoder.encode(images)
        assert torch.allclose(cls, wanted.cls, atol=1e-5)
        assert torch.allclose(patches, wanted.patches, atol=1e-5)
    # also the same number of patches in another arrangement
    for other in ((16, 24), (24, 24), (8, 8)):
        with pytest.raises((torch.jit.Error, AssertionError), match="images"):
            run(torch.randn(1, 3, *other))
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["graph"]["outputs"] == ["class_token", "patch_tokens"]
    assert config["extrema_fast"]["input"]["mean"] == [0.1, 0.2, 0.3]
    refused(lambda: convert.load_encoder(tmp_path / "out"), "an exported graph", "exported from")
    file = next(p for p in (tmp_path / "out").iterdir() if p.name.startswith("model."))
    refused(lambda: convert.load_encoder(file), file.name, "an exported graph")


# ---- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options", "words"),
    [
        ("onxx", {}, ["'onxx'", "did you mean 'onnx'"]),
        ("extrema", {"opset": 18}, ["--opset", "onnx"]),
        ("extrema", {"fc_norm": True}, ["--fc-norm", "vit and hf"]),
        ("vit", {"class_token": True}, ["--class-token", "hf"]),
        ("hf", {"class_token": True, "fc_norm": True}, ["--fc-norm", "--class-token"]),
        ("extrema", {"which": "ema"}, ["which", "'ema'"]),
        ("extrema", {"img_size": 20}, ["20", "patch size 8"]),
        ("torchscript", {"img_size": (24, 20)}, ["20", "patch size 8"]),
    ],
)
def test_options_that_do_not_fit(weights, tmp_path, monkeypatch, format, options, words):
    # neither package is looked for before options are checked, nor anything written
    refused(lambda: export(weights, tmp_path / "out", format, **options), *words)
    assert left(tmp_path) == ["w"]


@pytest.mark.parametrize("format", ["vit", "hf", "onnx"])
def test_a_missing_package_names_the_extra(weights, tmp_path, monkeypatch, format):
    package = FORMATS[format].packages[-1]
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    # what comes before it may be broken here; only the last one is looked for
    monkeypatch.setitem(FORMATS, format, FORMATS[format]._replace(packages=(package,)))
    refused(
        lambda: export(weights, tmp_path / "out", format), package, f"extrema-fast[{FORMATS[format].extra}]"
    )
    assert left(tmp_path) == ["w"]


def test_weights_that_cannot_be_exported(tmp_path):
    refused(lambda: export(tmp_path / "none", tmp_path / "out"), "none", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(lambda: export(tmp_path / "empty", tmp_path / "out"), "neither a run folder")
    assert left(tmp_path) == ["empty"]


def test_an_output_that_exists(weights, method, tmp_path):
    out = tmp_path / "out"
    export(weights, out, "torchscript")
    refused(lambda: export(weights, out), "not empty", "--force")
    assert left(out) == ["config.json", "model.ts"]
    export(weights, out, force=True)
    assert left(out) == ["config.json", "model.safetensors"]
    # the weights themselves, and a run that holds them
    refused(lambda: export(weights, weights, force=True), "--force", "neither")
    refused(lambda: export(weights, tmp_path, force=True), "--force", "out")
    (out / "readme.txt").touch()
    refused(lambda: export(weights, out, force=True), "--force", "readme.txt")
    (out / "readme.txt").unlink()
    (out / "README.md").mkdir()
    refused(lambda: export(weights, out, force=True), "--force", "README.md")
    (out / "README.md").rmdir()
    # a folder like an export, of somebody else's weights
    (out / "config.json").write_text('{"architecture": "vit_small_patch16_224"}')
    refused(lambda: export(weights, out, force=True), "--force", "neither")
    assert left(tmp_path) == ["out", "w"]
    # exporting an export over itself reads it first
    other = tmp_path / "other"
    export(weights, other)
    export(other, other, force=True)
    assert torch.equal(convert.load_encoder(other).cls_token, method.teacher.cls_token)


def test_a_comparison_that_fails_keeps_nothing(weights, tmp_path, monkeypatch):
    export(weights, tmp_path / "earlier")
    before = (tmp_path / "earlier" / "model.safetensors").read_bytes()
    write = export_timm.write_tensors

    def wrong(file, tensors):
        write(file, {k: v * 1.001 if k == "norm.weight" else v for k, v in tensors.items()})

    monkeypatch.setattr(export_timm, "write_tensors", wrong)
    for out in ("new", "earlier"):
        with pytest.raises(ExtremaError, match=r"load_encoder differs by .* nothing was kept") as error:
            export(weights, tmp_path / out, force=True)
        assert error.value.exit_code == 1
    assert left(tmp_path) == ["earlier", "w"]
    assert (tmp_path / "earlier" / "model.safetensors").read_bytes() == before
    # not-a-number is no small difference
    monkeypatch.setattr(
        export_timm, "write_tensors", lambda f, t: write(f, {k: v * float("nan") for k, v in t.items()})
    )
    with pytest.raises((ExtremaError, ValueError)):
        export(weights, tmp_path / "new")
    # what cannot be read back at all
    monkeypatch.setattr(export_graph, "_example", lambda e: torch.zeros(2, 3, 16, 16))
    monkeypatch.setattr(torch.jit, "save", lambda *a, **k: (tmp_path / "x").touch())
    with pytest.raises(ExtremaError, match="cannot be read back"):
        export(weights, tmp_path / "new", "torchscript")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_keeps_nothing(weights, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_timm, "write_json", full)
    with pytest.raises(StorageError, match="No space left"):
        export(weights, tmp_path / "out")
    assert left(tmp_path) == ["w"]


def test_an_interrupt_keeps_nothing(weights, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_timm, "load_encoder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(weights, tmp_path / "out")
    assert left(tmp_path) == ["w"]


def test_what_a_killed_process_left(weights, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    out = tmp_path / "out"
    export(weights, out)
    # killed while writing, and between moving the old folder aside and the new one in
    (tmp_path / f".tmp-out-{dead.pid}").mkdir()
    (tmp_path / f".tmp-out-{dead.pid}" / "model.safetensors").touch()
    out.rename(tmp_path / f".replaced-out-{dead.pid}")
    # of a process that is still at it, and of another folder
    running = [f".tmp-out-{os.getppid()}", f".tmp-out2-{dead.pid}"]
    for name in running:
        (tmp_path / name).mkdir()
    refused(lambda: export(weights, out, "torchscript"), "not empty", "--force")
    assert left(tmp_path) == sorted([*running, "out", "w"])
    assert left(out) == ["config.json", "model.safetensors"]
    export(weights, out, "torchscript", force=True)
    assert left(out) == ["config.json", "model.ts"]


def test_a_run_killed_while_it_writes(weights, tmp_path):
    code = f"""
import os
from extrema_fast.weights import export_timm
from extrema_fast.weights.export import export
export_timm.load_encoder = lambda *_: os.kill(os.getpid(), 9)
export({str(weights)!r}, {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120)
    assert done.returncode == -9
    assert not (tmp_path / "out").exists() and len(left(tmp_path)) == 2
    export(weights, tmp_path / "out")
    assert left(tmp_path) == ["out", "w"]


# ---- command line ---------------------------------------------------------------------------------


def test_commands(tmp_path, method, capsys):
    torch.save(released(method), tmp_path / "checkpoint.pth")
    args = ["import", str(tmp_path / "checkpoint.pth"), str(tmp_path / "weights")]
    assert main([*args, "--which", "student", "--num-heads", "2"]) == 0
    assert main(args) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*args, "--force"]) == 0
    out = str(tmp_path / "out")
    args = ["export", str(tmp_path / "weights"), out, "--format", "torchscript", "--which", "student"]
    assert main([*args, "--img-size", "24", "16"]) == 0
    printed = capsys.readouterr().out
    assert "config.json, model.ts" in printed and "largest difference" in printed
    own = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["extrema_fast"]
    assert own["which"] == "student" and own["input"]["input_size"] == [3, 24, 16]
    assert own["source"]["file"] == "checkpoint.pth"
    assert main(args) == 2
    assert main([*args, "--img-size", "24", "--force"]) == 0
    assert main([*args, "--img-size", "24", "16", "8", "--force"]) == 2
    assert main(["export", str(tmp_path / "weights"), str(tmp_path / "b"), "--format", "tflite"]) == 2
    err = capsys.readouterr().err
    assert "--img-size" in err and "'tflite'" in err
    assert left(tmp_path) == ["checkpoint.pth", "out", "weights"]


def test_what_helps_when_a_package_cannot_be_imported():
    gone = cannot_import("timm", ModuleNotFoundError("No module named 'timm'"), "hf")
    assert gone == """timm cannot be imported (No module named 'timm'); pip install "extrema-fast[hf]\""""
    other = cannot_import("timm", RuntimeError("operator torchvision::nms does not exist"), "hf")
    assert other.endswith("torchvision was built for another torch; install both from the same index")
