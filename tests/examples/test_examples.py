"""Every script in `examples/` runs on little data and ends in its number and its picture.

Covers: the encoder made when no weights are given, and found again; each script with --quick, its number against
what guessing gives, its picture; a second run over the first one's files; a folder of one's own; the README lists
every script, and every script says how it is called.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import extrema_fast

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")
pytest.importorskip("skimage", reason="the photographs come with scikit-image (extra: train)")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem != "demo_weights")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """What an example pretrains when it is given no weights."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(EXAMPLES)
        demo_weights = importlib.import_module("demo_weights").demo_weights
        run = demo_weights(None, quick=True)
        saved = sorted(Path(run).rglob("*.safetensors"))
        assert demo_weights(None, quick=True) == run and demo_weights("other", quick=True) == "other"
        assert saved == sorted(Path(run).rglob("*.safetensors"))
        return str(folder / run)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(name, *args)`: the number that an example returns, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name, *args: importlib.import_module(name).main(["--quick", *map(str, args)])


def picture(path: str) -> np.ndarray:
    with Image.open(path) as im:
        return np.asarray(im.convert("RGB"))


def test_the_readme_lists_every_example():
    text = (EXAMPLES / "README.md").read_text()
    assert len(SCRIPTS) == 5 and all(f"({name}.py)" in text for name in SCRIPTS)
    for name in SCRIPTS:
        assert f"python examples/{name}.py" in (EXAMPLES / f"{name}.py").read_text().split('"""')[1], name


def test_retrieval(run, weights, capsys):
    first = run("retrieval", "--weights", weights, "--k", 4)
    assert 0 <= first <= 1 and "of the 36 images found" in capsys.readouterr().out
    sheet = picture("runs/retrieval/found.png")
    assert sheet.shape[0] > 9 * 144 and len(np.unique(sheet)) > 100
    # the features are there already
    part = Path("runs/retrieval/features/features/00000.npy")
    made = part.stat().st_mtime_ns
    assert run("retrieval", "--weights", weights, "--k", 4) == first and part.stat().st_mtime_ns == made


def test_linear_probe(run, weights):
    # 18 classes: guessing gives 5.6 %
    assert run("linear_probe", "--weights", weights) > 0.15


def test_linear_probe_on_a_folder(run, weights, tmp_path):
    grays, noise = (30, 90, 160, 220), np.random.default_rng(0)
    for i, gray in enumerate(grays * 20):
        target = tmp_path / "mine" / str(gray) / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = (gray + noise.integers(-20, 20, (40, 40, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(target)
    # four classes, every fifth image held out
    assert run("linear_probe", "--weights", weights, "--train", tmp_path / "mine") > 0.9


def test_finetune_timm(run, weights):
    pytest.importorskip("timm", reason="timm is not installed (extra: timm)")
    assert 0 <= run("finetune_timm", "--weights", weights) <= 1
    tuned = torch.load("runs/finetune_timm/finetuned.pth", weights_only=True)
    start = extrema_fast.load_encoder(weights, "student").state_dict()
    assert tuned["head.weight"].shape == (18, 96) and not any(k.startswith("cls_token") for k in tuned)
    first, last = (
        (tuned[k] - start[k]).abs().mean() for k in ("patch_embed.proj.weight", "blocks.1.mlp.fc1.weight")
    )
    # lower layers learn more slowly
    assert 0 < first < 0.7 * last


def test_segmentation(run, weights):
    # one class everywhere would give about a thirty-sixth
    assert run("segmentation", "--weights", weights, "--out", "s.png") > 0.05
    sheet = picture("s.png")
    assert sheet.shape == (6 * 48 * 3, 3 * 48 * 3, 3)
    truth = {tuple(c) for c in sheet[:, 48 * 3 : 96 * 3].reshape(-1, 3)}
    assert truth <= {tuple(c) for c in importlib.import_module("segmentation").COLORS} and len(truth) > 2


def test_masked_mae(run):
    pytest.importorskip("timm", reason="timm is not installed (extra: timm)")
    assert run("masked_mae", "--out", "m.png") < 0.3
    assert extrema_fast.load_encoder("m.pth", num_heads=3).grid == (8, 8)
    sheet = picture("m.png").reshape(8, 128, 3, 128, 3)
    image, seen, filled = (sheet[:, :, i] for i in range(3))
    hidden = (seen == 128).all(-1)
    assert 0.7 < hidden.mean() < 0.8
    # what was seen is as it was; what was hidden is filled in
    assert np.array_equal(filled[~hidden], image[~hidden]) and (filled[hidden] != 128).any()
