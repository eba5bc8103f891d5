"""Fine-tuning.

Covers: weights, head and classes that `load_encoder` reads and that give the accuracy of the result; mean and class
pooling, compiled blocks, student and teacher, a foreign ViT, random weights; groups of layer decay as timm's; the
average; killed and continued bit for bit; two processes equal one; a report; errors in a line, with nothing written.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from extrema_fast import finetune, load_encoder, train
from extrema_fast.cli import main
from extrema_fast.config import FinetuneConfig, config_hash, from_dict, to_dict
from extrema_fast.data.sources import open_source
from extrema_fast.errors import NonFiniteError, UsageError
from extrema_fast.files import history
from extrema_fast.models.classifier import Classifier
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.reporting.report import report
from extrema_fast.training import step
from extrema_fast.training.optim import build_optimizer, set_lr
from extrema_fast.training.tuning import RESULT, begin_config
from extrema_fast.weights.folder import save_weights, weights_meta
from tests.training.conftest import final_hash, tiny
from tests.weights._weights import foreign_vit

STEPS = 6
CHANGES = {
    "data": {"train": "synthetic", "limit": 24, "threads": 1, "loader": "pil"},
    "optim": {"base_lr": 0.02, "warmup_epochs": 0.5, "eps": 1e-2},
    # a CPU with bf16 products takes them by default: steps that are compared differ by their rounding
    "train": {"epochs": 2, "batch_size": 8, "precision": "fp32"},
    "model": {"drop_path": 0.2},
    "tune": {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.5, "ema": 0.5},
    "eval": {"every_epochs": 2, "max_test": 8},
    "ckpt": {"every_epochs": 0, "every_steps": 2},
    "log": {"every_steps": 1, "report": False},
}
CLASSES = 4


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """Weights of a pretraining at step 1, student and teacher different."""
    cfg = tiny()
    method = ExtreMA(cfg)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.mul_(1.1)
    return save_weights(tmp_path_factory.mktemp("weights") / "w", method, weights_meta(cfg, 1))


@pytest.fixture
def config(pretrained, tmp_path):
    """`config(name, change, weights=...)`: a tiny fine-tuning in a folder of that name."""

    def make(name: str = "run", *changes: dict, weights: object = pretrained) -> FinetuneConfig:
        cfg = from_dict(CHANGES | {"out": str(tmp_path / name)}, begin_config(str(weights), heads=1))
        for change in changes:
            cfg = from_dict(change, cfg)
        return cfg

    return make


def run(cfg: FinetuneConfig, **options) -> Path:
    return finetune(cfg=cfg, progress=False, **options)


def accuracy(folder: Path, which: str | None = None) -> float:
    """Of the weights in a run folder on the test images, one by one, as a user classifies."""
    classifier, source = load_encoder(folder, which), open_source("synthetic", "test")
    assert classifier.classes == source.classes and classifier.num_classes == CLASSES
    transform, right = classifier.preprocess(), 0
    with torch.inference_mode():
        for row in range(len(source)):
            logits = classifier(transform(Image.open(io.BytesIO(source.read(row))))[None])
            right += int(logits.argmax() == source.labels[row])
    return right / len(source)


def test_the_classifier_that_is_saved(config):
    out = run(config())
    result = json.loads((out / RESULT).read_text())
    assert accuracy(out) == pytest.approx(result["accuracy"])
    assert [sum(row) for row in result["confusion"]] == result["per_class"]["images"] == [12] * CLASSES
    right = sum(row[i] for i, row in enumerate(result["confusion"]))
    assert right / 48 == pytest.approx(result["accuracy"])
    evals = history(out / "log.jsonl", "eval", STEPS)
    assert [(e["step"], e["images"]) for e in evals] == [(0, 8), (STEPS, 48)]
    # the average is what is loaded and tested; what is trained lies beside it
    student, teacher = (
        load_file(out / f"weights/step_{STEPS:08d}/{w}.safetensors") for w in ("student", "teacher")
    )
    assert student.keys() == teacher.keys() and not student["head.weight"].equal(teacher["head.weight"])
    assert not load_encoder(out, num_classes=CLASSES).classes
    # the same call has nothing to do
    assert run(config()) == out
    text = report(out).read_text()
    for part in (
        f"{100 * result['accuracy']:.1f} %",
        "Accuracy on test images",
        "What its images are taken for",
    ):
        assert part.lower() in text.lower(), part
    assert "Is it collapsing?" not in text and "begun from" in text


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_what_is_begun_with(config, pretrained, which, pool):
    cfg = config("begun", {"tune": {"which": which, "pool": pool, "ema": 0.0}, "eval": {"every_epochs": 0}})
    held = {}

    def stop(run, batch):
        held.update({k: v.clone() for k, v in run.method.student.state_dict().items()})
        raise UsageError("seen")

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "train_step", stop)
        with pytest.raises(UsageError, match="seen"):
            run(cfg)
    theirs = load_file(pretrained / f"{which}.safetensors")
    shared = [k for k in held if k in theirs and not k.startswith("head.")]
    assert all(torch.equal(held[k], theirs[k]) for k in shared)
    assert ("cls_token" in shared, "fc_norm.weight" in held) == (
        (True, False) if pool == "class" else (False, True)
    )
    assert held["head.weight"].shape[0] == CLASSES and held["head.weight"].std() < 1e-3
    method = Classifier(cfg, ["a", "b"])
    trained = {n for n, _ in method.student_parameters()}
    assert "encoder.pos_embed" in trained and len(trained) == len(list(method.student.parameters()))


def test_from_a_foreign_vit_and_from_none(config, tmp_path):
    torch.save(foreign_vit(tiny().model), tmp_path / "vit.pth")
    off = {"eval": {"every_epochs": 0}, "train": {"epochs": 1}, "tune": {"ema": 0.0}}
    out = run(config("foreign", off, weights=tmp_path / "vit.pth"))
    begun = json.loads((out / "env.json").read_text())["init_from"]
    assert begun["trunk"].startswith("kept") and begun["positions"] == "kept" and "4 classes" in begun["head"]
    assert (out / "weights" / "step_00000003" / "model.safetensors").is_file()
    # a run goes on without the weights that it was begun with
    (tmp_path / "vit.pth").unlink()
    again = begin_config(tmp_path / "vit.pth", out=out).model
    assert (again.shape, again.grid) == (tiny().model.shape, tiny().model.grid)
    model = {"model": {k: v for k, v in to_dict(tiny().model).items() if k != "drop_path"}}
    out = run(config("none", model, off, weights="none"))
    assert json.loads((out / "env.json").read_text())["init_from"]["trunk"] == "fresh"
    assert load_encoder(out).classes


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_layer_decay_is_timms(config, tensor_lr):
    timm_optim = pytest.importorskip("timm.optim", exc_type=ImportError)
    for pool in ("mean", "class"):
        cfg = config("groups", {"tune": {"pool": pool}, "system": {"backend": "reference"}})
        method = Classifier(cfg, ["a", "b", "c"])
        optimizer = build_optimizer(method, cfg, tensor_lr=tensor_lr)
        set_lr(optimizer, 1.0)
        ours = {p: (float(g["lr"]), g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        encoder = method.student
        groups = timm_optim.param_groups_layer_decay(
            encoder, cfg.optim.weight_decay, encoder.no_weight_decay(), layer_decay=cfg.tune.layer_decay
        )
        theirs = {p: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
        assert ours.keys() == theirs.keys()
        for name, p in encoder.named_parameters():
            assert ours[p] == pytest.approx(theirs[p]), name


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars"])
def test_the_classifier_learns_with_every_optimizer(config, name):
    """It begins next to 0, and trust ratios are of its norm."""
    change = {"optim": {"name": name, "weight_decay": 0.05, "base_lr": 1.0 if name == "lars" else 0.02}}
    out = run(config("learns", change, {"tune": {"ema": 0.0}, "eval": {"every_epochs": 0}}, weights="none"))
    assert load_encoder(out).head.weight.norm() > 0.01


def test_the_average_has_the_last_step(config):
    out = run(config("average", {"eval": {"every_epochs": 0}, "ckpt": {"every_steps": 1, "retain": STEPS}}))
    before, last = (
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in sorted((out / "checkpoints").glob("step_*"))[-2:]
    )
    name = "method.teacher_branch.encoder.head.weight"
    old, new, student = before[name], last[name], last[name.replace("teacher", "student", 1)]
    decay = min(0.5, (1 + STEPS) / (10 + STEPS))
    torch.testing.assert_close(new, old + (1 - decay) * (student - old))


def test_killed_and_continued_is_bit_equal(config, run_cli, tmp_path, pretrained):
    straight, cfg = run(config("straight")), config("killed")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(cfg)))
    command = ("finetune", pretrained, "--config", file, "--quiet")
    for fault in ("renamed:1", "evaluated:1"):
        codes, text = run_cli(*command, env={"EXTREMA_FAULT": fault})
        assert codes == [-9], text
    codes, text = run_cli(*command)
    assert codes == [0], text
    assert final_hash(tmp_path / "killed", STEPS) == final_hash(straight, STEPS)
    assert (tmp_path / "killed" / RESULT).read_text() == (straight / RESULT).read_text()
    losses = [
        [r["loss"] for r in history(p / "log.jsonl", "train", STEPS)] for p in (straight, tmp_path / "killed")
    ]
    assert losses[0] == losses[1] and len(set(losses[0])) == STEPS


def test_compiled_blocks_are_whole_graphs_of_the_same_step(config, monkeypatch):
    # graphs without code generation
    monkeypatch.setattr(step, "BACKEND", "aot_eager")
    change = {"train": {"epochs": 1}, "tune": {"pool": "class"}, "eval": {"every_epochs": 0}}
    plain = run(config("plain", change, {"train": {"compile": "none"}}))
    compiled = run(config("compiled", change, {"train": {"compile": "block"}}))
    assert final_hash(plain, 3) == final_hash(compiled, 3)


def test_two_processes_equal_one(config, run_cli, tmp_path, pretrained):
    folders = []
    for processes, accumulation in ((1, 1), (2, 2)):
        cfg = config(f"on{processes}", {"train": {"accumulation": accumulation}, "eval": {"every_epochs": 0}})
        file = tmp_path / "config.json"
        file.write_text(json.dumps(to_dict(cfg)))
        codes, text = run_cli("finetune", pretrained, "--config", file, "--quiet", processes=processes)
        assert codes == [0] * processes, text
        folders.append(Path(cfg.out))
    one, two = (load_file(p / "checkpoints" / f"step_{STEPS:08d}" / "state.safetensors") for p in folders)
    assert one.keys() == two.keys()
    for name in one:
        if not name.startswith("counters"):
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6, msg=name)
    losses = [[r["loss"] for r in history(p / "log.jsonl", "train", STEPS)] for p in folders]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def tree(root: Path, names: list[str]) -> str:
    """A folder of class folders with textures of the built-in set."""
    source = open_source("synthetic", "train")
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(4):
            (root / name / f"{i}.jpg").write_bytes(source.read(number * 24 + i))
    return str(root)


@pytest.mark.parametrize(
    ("train_classes", "test_classes", "change", "says"),
    [
        (["a", "b"], ["a", "c"], {}, "data.test .*only in .*: b; only in .*: c"),
        (["a", "b"], ["a"], {}, "data.test .*only in .*: b"),
        (["a"], ["a"], {}, "data.train .* of one class"),
        (["a", "b"], None, {"data": {"train": ""}}, "data.train: no images"),
        (["a", "b"], ["flat"], {}, "data.test .*without labels"),
        (["flat"], ["a"], {}, "data.train .*without labels"),
        (["a", "b"], ["a", "b"], {"train": {"batch_size": 3}}, "train.batch_size: .* pair"),
        (["a", "b"], ["a", "b"], {"model": {"width": 32}}, "width"),
    ],
)
def test_errors_are_told_before_anything_is_written(
    config, tmp_path, train_classes, test_classes, change, says
):
    def folder(name: str, classes: list[str]) -> str:
        root = tree(tmp_path / name, classes)
        return str(tmp_path / name / "flat") if classes == ["flat"] else root

    data = {
        "train": folder("train", train_classes),
        "test": (test_classes and folder("test", test_classes)) or "",
    }
    cfg = config("wrong", {"data": data, "train": {"batch_size": 4}}, change)
    with pytest.raises(UsageError, match=says):
        run(cfg)
    assert not [
        p for p in (tmp_path / "wrong").rglob("*") if p.is_file() and p.name not in (".extrema-fast-run",)
    ]


def test_color_augmentation_of_four_channels_is_told_before_anything_is_written(config, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(4):
            np.save(tmp_path / "set" / name / f"{i}.npy", np.full((16, 16, 4), i, np.uint8))
    change = {"model": {"in_chans": 4}, "tune": {"rand_augment": "rand-m9"}, "train": {"batch_size": 4}}
    cfg = config("four", change, {"data": {"train": str(tmp_path / "set"), "holdout": 0.25}}, weights="none")
    with pytest.raises(UsageError, match=r"tune.rand_augment: .* 4 channels"):
        run(cfg)
    assert not (tmp_path / "four" / "config.json").exists()


def test_other_peoples_folders_and_weights(config, tmp_path, capsys, pretrained):
    cfg = config("run", {"eval": {"every_epochs": 0}, "train": {"epochs": 1}})
    run(cfg)
    kept = final_hash(tmp_path / "run", 3)
    with pytest.raises(UsageError, match="holds a fine-tuning, not a pretraining"):
        train.pretrain(tiny(tmp_path / "run"), progress=False)
    with pytest.raises(UsageError, match=r"other settings \(tune.layer_decay: 0.75 -> 0.5\)"):
        run(from_dict({"tune": {"layer_decay": 0.5}}, cfg))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("kept")
    with pytest.raises(UsageError, match="not a run; nothing was touched"):
        run(from_dict({"out": str(tmp_path / "mine")}, cfg))
    with pytest.raises(UsageError, match=r"weights: other\.pth, but tune.weights of cfg is "):
        finetune("other.pth", cfg, progress=False)
    assert final_hash(tmp_path / "run", 3) == kept and [p.name for p in (tmp_path / "mine").iterdir()] == [
        "text"
    ]
    file = tmp_path / "notes.pth"
    torch.save({"a": torch.zeros(2)}, file)
    for words, says in (
        ((file, "--data.train", "synthetic"), "notes.pth"),
        ((tmp_path / "absent", "--data.train", "synthetic"), "no such file"),
        ((pretrained, "--mask.ratio", "0.5"), "unknown option --mask.ratio"),
        ((pretrained, "--preset", "papr"), "papr"),
    ):
        assert main(["finetune", *map(str, words)]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"mask\.ratio: means nothing"):
        from_dict({"mask": {"ratio": 0.5}}, cfg)


def test_print_config_is_a_file_that_makes_the_same_run(pretrained, tmp_path, capsys):
    words = ["finetune", str(pretrained), "--data", str(tmp_path), "--preset", "paper", "--tune.mixup", "0.5"]
    assert main([*words, "--print-config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["model"]["width"] == 16 and shown["config"]["tune"]["mixup"] == 0.5
    (tmp_path / "c.json").write_text(json.dumps(shown))
    assert main(["finetune", str(pretrained), "--config", str(tmp_path / "c.json"), "--print-config"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == shown
    assert config_hash(from_dict(again["config"])) == config_hash(from_dict(shown["config"]))


def test_weights_that_diverge_are_told(config, monkeypatch):
    cfg = config("nan", {"train": {"max_nonfinite": 1}})
    original = train.train_step

    def spoiled(run, batch):
        run.method.student.head.weight.data.fill_(float("nan"))
        return original(run, batch)

    monkeypatch.setattr(train, "train_step", spoiled)
    with pytest.raises(NonFiniteError):
        run(cfg)
