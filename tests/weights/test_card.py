"""The card of an export: what the run has recorded, and nothing else.

Covers: data, recipe and results of the run around the weights, without folders of its author; evaluations of another
step or network, runs of another configuration, and results of features that the export lacks, are left out;
evaluations with different settings are told apart; an export of an export still has them; what is unknown is said; the
head as Hugging Face reads it; the lines of code run, for any channels, of a classifier with the names of its classes;
a card that its user edited stays.
"""

from __future__ import annotations

import json

import pytest
import torch

from extrema_fast.config import FinetuneConfig, config_hash, from_dict, nested, to_dict
from extrema_fast.weights.card import card_hash, short_path
from extrema_fast.weights.export import export
from extrema_fast.weights.folder import save_weights, weights_meta
from extrema_fast.weights.load import import_released, load_encoder
from tests.weights._weights import CFG, ENCODERS, foreign_vit, perturbed

ROWS = [
    {"encoder": "pretrained", "feature": "class token", "knn": 0.625, "probe": 0.75},
    {"encoder": "random init", "feature": "class token", "knn": 0.25, "probe": 0.375},
]
RESULT = {
    "counts": {"train": 90, "test": 40, "classes": 3},
    "rows": ROWS,
    "k": 20,
    "which": "teacher",
    "step": 7,
}


@pytest.fixture
def run(tmp_path, method):
    """A run folder, as far as a card reads it."""
    run = tmp_path / "home" / "run"
    save_weights(run / "weights" / "step_00000007", method, weights_meta(CFG, 7))
    (run / "reports").mkdir()
    counts = {"train": {"name": "/home/ann/birds/train", "images": 1234, "classes": 3}, "test": None}
    env = {"config_hash": config_hash(CFG), "data": counts, "preset": {"name": "smoke", "changes": {}}}
    env |= {"init_from": {"weights": "/home/ann/mae.pth"}, "code": {"commit": "abc", "changed": True}}
    files = {"config": to_dict(CFG), "env": env}
    for name, change in (
        ("", {}),
        ("-other-step", {"step": 6, "rows": [{**ROWS[0], "knn": 0.111}]}),
        ("-student", {"which": "student", "rows": [{**ROWS[0], "knn": 0.222}]}),
        ("-damaged", {"rows": "none"}),
    ):
        places = {"train": "/home/ann/birds/train", "test": "/home/ann/birds/test"}
        files[f"reports/evaluation{name}"] = RESULT | places | change
    for name, content in files.items():
        (run / f"{name}.json").write_text(json.dumps(content))
    return run


def card(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_what_the_run_has_recorded(run, tmp_path):
    for weights in (run, run / "weights" / "step_00000007"):
        export(weights, tmp_path / "out", force=True)
        for fact in (
            "| images | birds/train |",
            "| number | 1,234 images in 3 classes |",
            "| preset | smoke |",
            f"| loss | {CFG.head.loss} |",
            f"| batch size | {CFG.train.batch_size} |",
            "| initialized from | mae.pth |",
            "| commit | abc, changed |",
            "| optimizer steps | 7 |",
            "Frozen features on birds/test: 90 labeled training and 40 test images, 3 classes. k-NN with 20 neighbors.",
            "| pretrained | class token | 62.5 | 75.0 |",
            "| random init | class token | 25.0 | 37.5 |",
            "## Intended use",
            "## Limits",
            "No license is stated",
        ):
            assert fact in card(tmp_path / "out"), fact
        assert not any(text in card(tmp_path / "out") for text in ("11.1", "22.2", "/home"))
    export(run, tmp_path / "student", which="student")
    assert "22.2" in card(tmp_path / "student") and "62.5" not in card(tmp_path / "student")
    # an export of an export
    export(tmp_path / "out", tmp_path / "again", img_size=24)
    assert "birds/train" in card(tmp_path / "again") and "| 62.5 | 75.0 |" in card(tmp_path / "again")


@pytest.mark.parametrize(
    ("base", "options", "rows", "absent"),
    [
        (
            CFG,
            {"head.loss": "infonce", "head.queue": 512, "model.patch_init": "whitened"},
            ("loss | infonce", "head.queue | 512", r"model.patch\_init | whitened"),
            ("head.targets", "mixup", "model.width"),
        ),
        (
            FinetuneConfig(),
            {
                "tune.weights": "/home/ann/mae.pth",
                "tune.erasing": 0.0,
                "tune.rand_augment": "",
                "data.flip": 0.0,
            },
            ("random erasing | 0.0", "mixup | 0.8", "RandAugment | none", "data.flip | 0.0"),
            # what pretraining alone has
            ("loss", "views", "momentum", "data.policy"),
        ),
    ],
    ids=["pretraining", "fine-tuning"],
)
def test_the_recipe_has_every_setting_that_is_not_the_default(run, tmp_path, base, options, rows, absent):
    (run / "config.json").write_text(json.dumps(to_dict(from_dict(nested(options), base))))
    export(run, tmp_path / "out")
    recipe = card(tmp_path / "out").split("## Recipe")[1].split("## Results")[0]
    assert [row for row in rows if f"| {row} |" not in recipe] == []
    assert [word for word in (*absent, "/home", "system.") if word in recipe] == []


def test_what_training_has_measured_stands_where_nothing_else_was(run, tmp_path):
    lines = [
        {"kind": "eval", "step": step, "attempt": 1, "knn_cls": knn, "knn_mean": knn / 2, "images": 300}
        for step, knn in ((0, 0.25), (5, 0.375), (7, 0.5), (9, 0.875))
    ]
    log = run / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)) + "\n{")
    export(run, tmp_path / "both")
    assert "62.5" in card(tmp_path / "both") and "during training" not in card(tmp_path / "both")
    for file in run.glob("reports/evaluation*"):
        file.unlink()
    said = f"k-NN with {CFG.eval.k} neighbors on 300 test images, measured during training."
    for out in ("online", "again"):
        export(run if out == "online" else tmp_path / "online", tmp_path / out)
        text = card(tmp_path / out)
        assert said in text and "not evaluated" not in text
        assert [
            row for row in text.splitlines() if "| class token |" in row or "| mean of patches |" in row
        ] == [
            "| pretrained | class token | 50.0 |",
            "| pretrained | mean of patches | 25.0 |",
            "| at the beginning | class token | 25.0 |",
            "| at the beginning | mean of patches | 12.5 |",
        ]
    export(run, tmp_path / "larger", img_size=24)
    assert said.replace("training.", "training, 16 x 16 pixels.") in card(tmp_path / "larger")
    # of the student, and of this step, nothing was measured
    export(run, tmp_path / "student", which="student")
    log.write_text("\n".join(json.dumps(line) for line in lines if line["step"] != 7))
    export(run, tmp_path / "other")
    for out in ("student", "other"):
        assert "These weights were not evaluated." in card(tmp_path / out)


def test_what_is_unknown_is_said(run, folder, file, tmp_path, caplog):
    export(folder, tmp_path / "out")
    assert "Not recorded." in card(tmp_path / "out") and "were not evaluated" in card(tmp_path / "out")
    # the run around them was another one
    env = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(env | {"config_hash": "another"}))
    export(run, tmp_path / "other")
    assert "birds" not in card(tmp_path / "other")
    export(import_released(file, tmp_path / "imported"), tmp_path / "released")
    text = card(tmp_path / "released")
    assert "How these weights were trained is not recorded." in text and "pretrained with ExtreMA" not in text
    assert f"| source | {file.name} |" in text
    # of another project, whose file is named, not the folder that is read back
    torch.save(foreign_vit(CFG.model), tmp_path / "foreign.pth")
    caplog.clear()
    export(tmp_path / "foreign.pth", tmp_path / "foreign")
    text = card(tmp_path / "foreign")
    assert "| left out of the source | class token, classifier or projector |" in text
    assert "## Recipe\n\nNot recorded." in text and "self-supervised" not in text
    warnings = [r.getMessage() for r in caplog.records if "without: class token" in r.getMessage()]
    assert [w.split(": ")[0] for w in warnings] == [str(tmp_path / "foreign.pth")]


def test_the_head_as_hugging_face_reads_it(run, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    export(run, tmp_path / "out")
    data = hub.ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.library_name == "extrema-fast" and data.pipeline_tag == "image-feature-extraction"
    assert data.license is None and "extrema" in data.tags
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    assert found == {
        ("birds/test", "k-NN (k=20), class token"): 62.5,
        ("birds/test", "linear probe, class token"): 75.0,
    }


def kept(run, name: str, knn: float, **changes: object) -> None:
    """An evaluation of these weights, in a file of its own."""
    rows = [{"encoder": "pretrained", "feature": "class token", "knn": knn, "probe": knn + 0.1}]
    result = RESULT | {"train": "/home/ann/birds/train", "test": "/home/ann/birds/test", "rows": rows}
    (run / "reports" / f"evaluation{name}.json").write_text(json.dumps(result | changes))


def test_evaluations_by_different_rules_are_told_apart(run, tmp_path):
    own = json.loads((run / "reports" / "evaluation.json").read_text())
    seeds = {"rows": [own["rows"][0] | {"spread": {"knn": 0.01, "probe": 0.02}}], "seeds": 3}
    few = {"labels": "0.1", "labeled": {"of": 900, "rows": ["1 2", "3 4"]}}
    image = {"crop_pct": 0.875, "interpolation": "bilinear"}
    for name, knn, change in (
        ("-0", 0.1, {"protocol": "grid"} | image),
        ("-1", 0.2, few | {"protocol": "logistic"} | seeds),
        ("-2", 0.3, {"temperature": 1.0, "k": 7}),
        ("-3", 0.4, {"crop_pct": 1.0, "interpolation": "bilinear", "seed": 5}),
        ("-4", 0.5, {"test": "/mnt/other/birds/test"}),
        ("-5", 0.6, {"train": "/home/ann/more/train"}),
        # the first again, as older versions kept it where its images were named
        ("-6", 0.0, own | {"train": "birds/train"}),
    ):
        kept(run, name, knn, **change)
    export(run, tmp_path / "out")
    text = card(tmp_path / "out")
    counted = "90 labeled training and 40 test images, 3 classes."
    assert [line for line in text.splitlines() if line.startswith("Frozen")] == [
        f"Frozen features on birds/test: {counted} k-NN with 20 neighbors.",
        f"Frozen features on birds/test (linear probe, best learning rate): {counted} k-NN with 20 neighbors.",
        "Frozen features on birds/test (logistic regression; labels 0.1; 3 seeds): 90 labeled training (of 900) and 40 "
        "test images, 3 classes. k-NN with 20 neighbors. ±: standard deviation over the seeds.",
        f"Frozen features on birds/test (temperature 1.0): {counted} k-NN with 7 neighbors.",
        f"Frozen features on birds/test (crop fraction 1.0; seed 5): {counted} k-NN with 20 neighbors.",
        f"Frozen features on birds/test (2): {counted} k-NN with 20 neighbors.",
        f"Frozen features on birds/test (trained on more/train): {counted} k-NN with 20 neighbors.",
    ]
    assert "| encoder | feature | k-NN, % | logistic regression, % |" in text
    assert "| pretrained | class token | 62.5 ± 1.0 | 75.0 ± 2.0 |" in text
    assert "/home" not in text and "/mnt" not in text and "1 2" not in text
    index = json.loads(text.split("model-index: ")[1].splitlines()[0])[0]["results"]
    names = [(entry["dataset"]["name"], m["name"]) for entry in index for m in entry["metrics"]]
    assert len(set(names)) == len(names)
    for name in (
        "k-NN (k=20), class token",
        "linear probe, best learning rate, class token",
        "logistic regression, class token, labels 0.1, 3 seeds",
        "k-NN (k=7), class token, temperature 1.0",
        "linear probe, class token, crop fraction 1.0, seed 5",
        "k-NN (k=20), class token, trained on more/train",
    ):
        assert ("birds/test", name) in names
    # what neither names nor rules tell apart: here both probes by the paper's rule, of other neighbors
    again = "linear probe, class token, 90 training and 40 test images"
    assert ("birds/test", again) in names and ("birds/test (2)", "linear probe, class token") in names


def test_results_are_of_what_the_export_computes(run, tmp_path):
    pytest.importorskip("timm")
    mean = [{"encoder": e, "feature": "mean of patches", "knn": 0.5} for e in ("pretrained", "random init")]
    kept(run, "", 0.0, rows=ROWS + mean, holdout=0.3)
    said = "Frozen features on birds/test (30 % held out"
    for out, options, has in (
        ("whole", {}, ("62.5", "50.0", f"{said}):")),
        # without class-attention head there is no class token
        ("trunk", {"format": "vit"}, ("50.0", f"{said}):")),
        ("fresh", {"format": "vit", "fc_norm": True}, ("not evaluated", "fine-tune this model")),
        ("larger", {"img_size": 24}, ("62.5", "50.0", f"{said}; 16 x 16 pixels):")),
    ):
        export(run, tmp_path / out, **options)
        text = card(tmp_path / out)
        for fact in ("62.5", "50.0", f"{said}):", "not evaluated", "fine-tune this model"):
            assert (fact in text) == (fact in has), (out, fact)
        assert ("class-attention head is left out" in text) == ("format" in options) and has[-1] in text


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("/home/ann/birds", "birds"),
        ("/mnt/a/b/birds/train/", "birds/train"),
        ("../../ann/work/birds", "work/birds"),
        ("/birds", "birds"),
        ("/home/ann", "not recorded"),
        ("synthetic", "synthetic"),
    ],
)
def test_paths_are_short(name, wanted):
    assert short_path(name) == wanted


@pytest.mark.parametrize("name", ["odd grid", "gray", "five channels", "mean pool, classes"])
@pytest.mark.parametrize("format", ["extrema", "vit", "hf"])
def test_its_code_runs(tmp_path, monkeypatch, name, format):
    for package in {"vit": ("timm",), "hf": ("timm", "transformers")}.get(format, ()):
        pytest.importorskip(package)
    encoder = perturbed(ENCODERS[name]())
    encoder.value_range = (0.0, 4095.0)
    export(encoder, tmp_path / "out", format)
    assert "| 0 to 1 (more than 8 bits: from 0 to 4095), then mean" in card(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("PIL.Image").new("RGB", (60, 70)).save("photo.jpg")
    code = card(tmp_path / "out").split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(code.replace("path/to/this/folder", "out"), found)
    images = found["images"]["pixel_values"] if format == "hf" else found["images"]
    assert images.shape == (1, encoder.in_chans, *encoder.img_size)
    if encoder.num_classes:
        torch.testing.assert_close(found["logits"], encoder(images), rtol=0, atol=1e-5)
        assert "name" not in found and "left out" not in card(tmp_path / "out")
    else:
        assert found["features"][0].shape[-1] == 64


def test_a_card_that_was_edited_stays(folder, tmp_path, caplog):
    # whatever a test before has set
    caplog.set_level("WARNING", "extrema_fast")
    out = export(folder, tmp_path / "out").folder
    written = card(out)
    export(folder, out, force=True)
    assert card(out) == written and not caplog.text
    # that of another version, which has other words
    (out / "README.md").write_text(written.replace("Limits", "Borders"))
    config = json.loads((out / "config.json").read_text())
    config["extrema_fast"]["export"]["card"] = card_hash((out / "README.md").read_bytes())
    (out / "config.json").write_text(json.dumps(config))
    export(folder, out, force=True)
    assert card(out) == written and not caplog.text
    edited = written.replace("# license: the publisher's choice", "license: mit  #").encode() + b"\xff"
    (out / "README.md").write_bytes(edited)
    export(folder, out, img_size=24, force=True)
    assert (out / "README.md").read_bytes() == edited and "README.md" in caplog.text
    (out / "README.md").unlink()
    export(folder, out, force=True)
    assert card(out) == written


def test_a_classifier(run, tmp_path):
    # as `finetune` describes what it writes
    file = run / "weights" / "step_00000007" / "config.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"finetuned": {"weights": "/home/ann/mae.pth"}}))
    env = json.loads((run / "env.json").read_text())
    env["data"]["test"] = {"name": "/home/ann/birds/test", "images": 40}
    (run / "env.json").write_text(json.dumps(env))
    (run / "reports/classification.json").write_text(json.dumps({"step": 7, "accuracy": 0.875, "images": 40}))
    export(run, tmp_path / "out")
    text = card(tmp_path / "out")
    assert "fine-tuned by extrema_fast from the weights mae.pth." in text and "with ExtreMA" not in text
    assert "Accuracy as a classifier: 87.5 % of 40 test images (birds/test)." in text
    assert "/home" not in text + (tmp_path / "out" / "config.json").read_text()
    entry = json.loads(text.split("model-index: ")[1].splitlines()[0])[0]["results"][0]
    assert entry["dataset"] == {"type": "birds/test", "name": "birds/test"}
    assert entry["metrics"] == [{"type": "accuracy", "name": "accuracy", "value": 87.5}]
    export(tmp_path / "out", tmp_path / "larger", img_size=24)
    assert "40 test images (birds/test; 16 x 16 pixels)." in card(tmp_path / "larger")
    export(run, tmp_path / "student", which="student")
    assert "87.5" not in card(tmp_path / "student")


@pytest.mark.parametrize("format", ["extrema", "vit", "hf"])
def test_a_classifier_names_its_classes(tmp_path, format, capsys):
    for package in {"vit": ("timm",), "hf": ("timm", "transformers")}.get(format, ()):
        pytest.importorskip(package)
    encoder, names = perturbed(ENCODERS["fine-tuned"]()), ["ant", "bee", "cat", "dog", "eel"]
    torch.save(encoder.state_dict(), tmp_path / "bare.pth")
    weights = import_released(tmp_path / "bare.pth", tmp_path / "weights")
    meta = json.loads((weights / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps(meta | {"classes": names}))
    out = tmp_path / "out"
    # an export of an export, too
    export(weights, tmp_path / "first")
    export(tmp_path / "first", out, format)
    assert "UNEXPECTED" not in capsys.readouterr().err
    assert load_encoder(out).classes == json.loads((out / "config.json").read_text())["label_names"] == names
    assert "with its class-attention head" not in card(out) and "`label_names` in `config.json`" in card(out)
    # the image that the code of the card is about
    numpy = pytest.importorskip("numpy")
    Image = pytest.importorskip("PIL.Image")
    Image.fromarray(numpy.full((16, 16, 3), 200, "uint8")).save(tmp_path / "photo.png")
    code = card(out).split("```python\n")[1].split("```")[0]
    for name, value in (("path/to/this/folder", out), ("photo.jpg", tmp_path / "photo.png")):
        code = code.replace(name, str(value))
    found: dict = {}
    exec(code, found)
    wanted = encoder(found["images"]["pixel_values"] if format == "hf" else found["images"])
    torch.testing.assert_close(found["logits"], wanted, rtol=0, atol=1e-5)
    assert found["name"] == names[int(wanted.argmax())]
