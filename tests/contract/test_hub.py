"""`torch.hub.load` of this repository.

Covers: the listed entries; both interfaces; options; weights by path, of this size and of another; a
checkout that is not installed, with its kernels.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import extrema_fast
from extrema_fast.config import ModelConfig, to_dict
from extrema_fast.errors import UsageError
from extrema_fast.models.dino_interface import Dino
from extrema_fast.models.encoder import create_encoder, list_models

TINY = "extrema_vit_tiny_patch16_224"


def load(repository, name: str = TINY, **options):
    return torch.hub.load(str(repository), name, source="local", **options)


@pytest.fixture
def weights(tmp_path):
    encoder = create_encoder(TINY, img_size=32)
    with torch.no_grad():
        encoder.cls_token.normal_()
    save_file(encoder.state_dict(), tmp_path / "teacher.safetensors")
    model = to_dict(ModelConfig(img_size=(32, 32), size="tiny"))
    meta = {"format": "extrema-fast-weights", "version": 1, "model": model}
    (tmp_path / "config.json").write_text(json.dumps(meta))
    return tmp_path, encoder.eval()


def test_one_entry_per_model_and_nothing_else(repository):
    spec = importlib.util.spec_from_file_location("hubconf_under_test", repository / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # what torch.hub.list shows
    entries = [n for n in dir(module) if callable(getattr(module, n)) and not n.startswith("_")]
    assert sorted(entries) == list_models() and module.dependencies == ["torch"]
    assert all(n in getattr(module, n).__doc__ for n in entries)


def test_interfaces(repository):
    x = torch.randn(1, 3, 32, 32)
    encoder = load(repository, img_size=32, num_classes=3)
    assert isinstance(encoder, extrema_fast.Encoder) and not encoder.training
    assert encoder(x).shape == (1, 3) and encoder.encode(x).patches.shape == (1, 4, 192)
    model = load(repository, dino=3, img_size=32)
    assert isinstance(model, Dino) and model.version == 3 and not model.training
    assert model(x).shape == (1, 192)
    with pytest.raises(UsageError, match="version: expected 1, 2 or 3, got 4"):
        load(repository, dino=4)


def test_weights(repository, weights):
    path, encoder = weights
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load(repository, weights=path)(x), encoder(x))
    assert torch.equal(load(repository, weights=path, dino=2)(x), encoder(x))
    with pytest.raises(UsageError, match=r"\(192, 12, 3\) there, \(384, 12, 6\) in extrema_vit_small"):
        load(repository, TINY.replace("tiny", "small"), weights=path)


def test_a_checkout_that_is_not_installed(repository, tmp_path):
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("extrema_fast", "kernels"):
        shutil.copytree(repository / name, tmp_path / "copy" / name, ignore=ignore)
    shutil.copy(repository / "hubconf.py", tmp_path / "copy")
    code = (
        "import sys, torch\n"
        # the finder of the editable install
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "sys.path = [p for p in sys.path if 'editable' not in p.lower()]\n"
        f"model = torch.hub.load({str(tmp_path / 'copy')!r}, {TINY!r}, source='local', img_size=32)\n"
        "import extrema_fast.kernels\n"
        "keep = torch.tensor([[0, 3]])\n"
        "print(extrema_fast.__file__, extrema_fast.kernels.__file__)\n"
        "print(*model.encode(torch.randn(1, 3, 32, 32), keep).patches.shape, file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(p.startswith(str(tmp_path)) for p in done.stdout.split()), done.stdout
    assert done.stderr.split()[-3:] == ["1", "2", "192"]
