"""The model card of an export: a README.md with Hugging Face metadata, which states only what is known.

What a run knows about its weights (`run_record`) is stored in the description of an export, so that an export of an
export keeps it. A card is a function of `config.json`, which stores its hash: a card that differs was edited, and is
kept (`kept_card`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import FREE_FIELDS, NOT_TUNED, Config, EvalConfig, FinetuneConfig, flatten
from ..errors import printable
from ..files import fits, history, read_json

log = logging.getLogger(__name__)

CARD = "README.md"
UNKNOWN = "not recorded"

_COUNT = {"name?": str, "images?": int, "classes?": int}
_SCORES = {"knn?": float, "probe?": float}
_RESULT = {
    "rows": [{"encoder": str, "feature": str, **_SCORES, "spread?": _SCORES}],
    "counts": {"train": int, "test": int, "classes": int},
    "train?": str,
    "test?": str,
    "k?": int,
    "temperature?": float,
    "crop_pct?": float,
    "interpolation?": str,
    "protocol?": str,
    "labels?": str,
    "labeled?": {"of": int},
    "seed?": int,
    "seeds?": int,
    "which": str,
    "step": int,
}
# k-NN of training itself, at its first evaluation and at these weights
_ONLINE = {"rows": [{"encoder": str, "feature": str, "knn": float}], "test": int, "k": int}
# what an export keeps of a run
_RECORD = {
    "data?": {"train?": _COUNT, "test?": (_COUNT, None)},
    "recipe?": {},
    "results?": [_RESULT],
    "online?": _ONLINE,
    "begun_from?": str,
    "classified?": {"accuracy": float, "images": int},
}
# settings that other tables of a card hold, and folders
_ELSEWHERE = (
    *("data.train", "data.mean", "data.std", "train.seed", "tune.weights", "model.size", "model.img_size"),
    *("model.patch_size", "model.in_chans", "model.width", "model.depth", "model.mlp_ratio"),
)
# of the settings that every card has
_WORDS = {
    "head.loss": "loss",
    "mask.ratio": "share of the patches that a view drops",
    "mask.views": "views per image",
    "data.policy": "augmentation",
    "data.area": "smallest and largest area of a crop",
    "train.epochs": "epochs",
    "train.batch_size": "batch size",
    "optim.name": "optimizer",
    "optim.base_lr": "learning rate for a batch of 256",
    "optim.warmup_epochs": "warm-up epochs",
    "optim.weight_decay": "weight decay",
    "optim.momentum": "teacher momentum",
    "tune.layer_decay": "layer decay",
    "tune.mixup": "mixup",
    "tune.cutmix": "cutmix",
    "tune.smoothing": "label smoothing",
    "tune.rand_augment": "RandAugment",
    "tune.erasing": "random erasing",
    "tune.ema": "average of the weights",
}
_TITLES = {"knn": "k-NN", "probe": "linear probe"}
# of the linear probe of an evaluation -> its title
PROTOCOLS = {"paper": "linear probe", "grid": "linear probe, best rate", "logistic": "logistic regression"}


def rules(result: Mapping[str, Any], crop_pct: float | None = None) -> list[str]:
    """In words by what rules an evaluation was made, where these are not the usual ones: k-NN, resizing, seeds.

    Args:
        result: Of `evaluate` or `segment`, or what a record keeps of it.
        crop_pct: The usual one; None: any is named.
    """
    temperature, crop = result.get("temperature"), result.get("crop_pct")
    seed, seeds = result.get("seed", 0), result.get("seeds", 1)
    words = []
    if temperature not in (None, EvalConfig.temperature):
        words.append(f"temperature {temperature}")
    if crop not in (None, crop_pct):
        words.append(f"crop share {crop}")
    if result.get("interpolation", "bilinear") != "bilinear":
        words.append(result["interpolation"])
    if seeds > 1:
        words.append(f"{seeds} seeds" + (f" from {seed}" if seed else ""))
    elif seed:
        words.append(f"seed {seed}")
    return words


# ---- what a run knows -------------------------------------------------------------------------------


def run_record(weights: Path, meta: Mapping[str, Any], which: str | None) -> dict[str, Any] | None:
    """What the run around some weights has recorded about them; None where there is no such run.

    Args:
        weights: A run folder, or what lies in it.
        meta: The description of the weights; the run's configuration must be theirs.
        which: The network: evaluations of the other one, or of another step, are left out.
    """
    weights = weights.absolute()
    for folder in (weights, *list(weights.parents)[:3]):
        env = read_json(folder / "env.json", {})
        if env and env.get("config_hash") == meta.get("config_hash"):
            break
    else:
        carried = meta.get("record")
        return carried if fits(carried, _RECORD) else None
    cfg = read_json(folder / "config.json", {})
    found = {
        "data": {
            k: _named(v) for k, v in env.get("data", {}).items() if fits(v, _COUNT) and k in ("train", "test")
        },
        "recipe": dict(_recipe(cfg, env)),
        "results": _evaluations(folder, meta, which),
    }
    if which != "student" and (online := _online(folder, cfg, meta.get("step"))):
        found["online"] = online
    if isinstance(begun := env.get("init_from"), dict) and isinstance(begun.get("weights"), str):
        found["begun_from"] = _short(begun["weights"])
    # the test of a fine-tuning, of the network that is loaded by default
    test = read_json(folder / "reports/classification.json", {})
    if fits(test, {"step": int, "accuracy": float, "images": int}) and test["step"] == meta.get("step"):
        if which != "student":
            found["classified"] = {k: test[k] for k in ("accuracy", "images")}
    return found if fits(found, _RECORD) else None


def _online(folder: Path, cfg: Mapping[str, Any], step: Any) -> dict[str, Any] | None:
    """What training itself has measured of a teacher at a step, next to that of its beginning."""
    evals = history(folder / "log.jsonl", "eval", step) if fits(step, int) else []
    if not evals or evals[-1]["step"] != step:
        return None
    names = {"knn_cls": "class token", "knn_mean": "mean of patches"}
    at = {"pretrained": evals[-1]} | ({"at the beginning": evals[0]} if evals[0]["step"] == 0 < step else {})
    rows = [
        {"encoder": encoder, "feature": feature, "knn": found.get(key)}
        for encoder, found in at.items()
        for key, feature in names.items()
    ]
    online = {"rows": rows, "test": evals[-1].get("images"), "k": flatten(cfg).get("eval.k")}
    return online if fits(online, _ONLINE) else None


def _evaluations(folder: Path, meta: Mapping[str, Any], which: str | None) -> list[dict[str, Any]]:
    """The evaluations of these weights, that of `evaluate RUN` first, each once."""
    shape = {**_RESULT, "train": str, "test": str}
    files = sorted(folder.glob("reports/evaluation*.json"), key=lambda p: (p.stem != "evaluation", p.name))
    read = [r for r in (read_json(p, {}) for p in files) if fits(r, shape)]
    found: list[dict[str, Any]] = []
    for r in read:
        if (r["step"], r["which"]) == (meta.get("step"), which) and not any(
            _same(r, other) for other in found
        ):
            found.append(r)
    image = meta.get("input", {})
    # older weights, without `crop_mode`, take images of their size whole
    own = {k: image.get(k) if "crop_mode" in image else None for k in ("crop_pct", "interpolation")}
    names: dict[str, list[str]] = {}
    kept = []
    for r in found:
        out = {k: r[k] for k in map(_bare, _RESULT) if k in r}
        # resized as the table of the model says
        if own == {k: r.get(k) for k in own}:
            out = {k: v for k, v in out.items() if k not in own}
        for k in ("train", "test"):
            # other images may have the same name, since their folders are not told
            of_name = names.setdefault(_short(r[k]), [])
            if (path := r[k].rstrip("/")) not in of_name:
                of_name.append(path)
            n = of_name.index(path)
            out[k] = _short(r[k]) + (f" ({n + 1})" if n else "")
        if "labels" in r:
            out["labels"] = _short(r["labels"])
        if "labeled" in r:
            out["labeled"] = {"of": r["labeled"]["of"]}
        kept.append(out)
    return kept


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two result files hold one result; in older versions its images could have another path in each."""
    measured = [k for k in map(_bare, _RESULT) if k not in ("train", "test")]
    return (
        all(a.get(k) == b.get(k) for k in measured)
        and all(Path(a[k]).name == Path(b[k]).name for k in ("train", "test"))
        and ("images" not in a or "images" not in b or a["images"] == b["images"])
    )


def _bare(key: str) -> str:
    return key.removesuffix("?")


def _short(name: str) -> str:
    """The last two parts of a path: a card is published, the folders of its author are not."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def _named(count: dict[str, Any]) -> dict[str, Any]:
    return {
        k: _short(v) if k == "name" else v for k, v in count.items() if k in ("name", "images", "classes")
    }


def _recipe(cfg: Mapping[str, Any], env: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(words, value) of what makes a recipe, as far as both files hold it; settings without words: by their option."""
    of_run = {
        "preset": ("preset", "name"),
        "precision": ("resolved", "precision"),
        "commit": ("code", "commit"),
        "torch": ("versions", "torch"),
    }
    for words, (section, name) in of_run.items():
        value = env.get(section)
        if isinstance(value, dict) and fits(value.get(name), str):
            yield words, value[name]
    tuned = "tune" in cfg
    found, defaults = flatten(cfg), flatten(FinetuneConfig() if tuned else Config())
    without = (*FREE_FIELDS, *_ELSEWHERE, *(NOT_TUNED if tuned else ()))
    for option in dict.fromkeys([*_WORDS, *found]):
        value = found.get(option)
        if option.startswith(without) or not isinstance(value, (str, int, float, list)):
            continue
        if option in _WORDS or (option in defaults and value != defaults[option]):
            yield _WORDS.get(option, option), value


# ---- the card ---------------------------------------------------------------------------------------

_WITHOUT_HEAD = """This is the trunk with mean-pooled patch tokens, as a stock timm ViT without class token.
It loads without this project, whose class-attention head is left out (an export with the class token needs the package
extrema_fast, from its repository)."""

_WITH_HEAD = """This is the whole encoder with {head}, a model that timm does not know by itself:
install the package extrema_fast from its repository{extra} before loading."""
_HEADS = {"token": "its class-attention head", "avg": "mean-pooled patch tokens"}

_GRAPH = (
    "This is the whole encoder as a graph for one image size and any batch; it needs no code of this project."
)

_USE = {
    "hf": """{registers}from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("path/to/this/folder").eval()
photo = Image.open("photo.jpg"){convert}
images = AutoImageProcessor.from_pretrained("path/to/this/folder")(photo)
features = model(**images)
features.last_hidden_state  # {tokens}
features.pooler_output      # [1, width]: {pooled}""",
    "extrema": """import torch
from extrema_fast import load_encoder

encoder = load_encoder("path/to/this/folder")
images = torch.zeros(1, {size})       # of photographs: encoder.preprocess()(photo)[None]
features = encoder.encode(images)
features.cls, features.patches  # [1, width], [1, patches, width]""",
    "vit": """import timm
import torch

model = timm.create_model("local-dir:path/to/this/folder", pretrained=True).eval()
images = torch.zeros(1, {size})       # prepared as the table below says
features = model(images)               # [1, width]: mean of the patch tokens""",
    "onnx": """import numpy
import onnxruntime

session = onnxruntime.InferenceSession("path/to/this/folder/model.onnx")
images = numpy.zeros((1, {size}), "float32")   # prepared as the table below says
features = session.run(None, {{"images": images}})    # {outputs}""",
    "torch-export": """import torch

program = torch.export.load("path/to/this/folder/model.pt2").module()
images = torch.zeros(1, {size})       # prepared as the table below says
features = program(images)             # {outputs}""",
}

# of a classifier, instead
_CLASSIFY = {
    "hf": """{registers}from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("path/to/this/folder").eval()
photo = Image.open("photo.jpg"){convert}
images = AutoImageProcessor.from_pretrained("path/to/this/folder")(photo)
logits = model(**images).logits        # [1, classes]
name = model.config.id2label[int(logits.argmax())]""",
    "extrema": """import torch
from extrema_fast import load_encoder

classifier = load_encoder("path/to/this/folder")
images = torch.zeros(1, {size})       # of photographs: classifier.preprocess()(photo)[None]
logits = classifier(images)            # [1, classes]
name = classifier.classes[int(logits.argmax())]
features = classifier.encode(images)   # features.cls [1, width], features.patches [1, patches, width]""",
    "vit": """import timm
import torch

model = timm.create_model("local-dir:path/to/this/folder", pretrained=True).eval()
images = torch.zeros(1, {size})       # prepared as the table below says
logits = model(images)                 # [1, classes]
name = model.pretrained_cfg["label_names"][int(logits.argmax())]""",
}

_LIBRARY = {
    "hf": "transformers",
    "vit": "timm",
    "onnx": "onnx",
    "torch-export": "pytorch",
    "extrema": "extrema-fast",
}

_CARD = """---
{head}
---

# Vision transformer of width {width}{how}

{pretraining}

{about}

```python
{use}
```

## Training data

{data}

## Recipe

{recipe}

## Results

{results}

## Intended use

Features of images: search, k-NN and linear classifiers on frozen features, a start for fine-tuning.{classes}

## Limits

The features reflect the training images: kinds of images that were not among them, other sizes and other channels are
encoded less well or not at all. What is not in the tables above was not measured; bias, fairness and robustness were
not examined. Check the features on your own images before you rely on them.

## Model

{rows}

## License

No license is stated: it is that of the weights this was exported from. Who publishes them chooses it, in the head of
this file.
"""


def model_card(config: Mapping[str, Any]) -> str:
    """The README.md of an export, Markdown with a YAML head, from its `config.json`."""
    own = config["extrema_fast"]
    image, model, form = own["input"], own["model"], own["export"]["format"]
    name = config.get("architecture", "")
    whole = not name or name.startswith("extrema_")
    classes = own["encoder"]["num_classes"]
    width = config.get("num_features") or model["width"] or UNKNOWN
    # transformers leaves a gray image gray, whatever the model's channels
    mode = {1: "L", 3: "RGB"}.get(image["input_size"][0])
    # a fine-tuning may have begun from anybody's weights
    ours = bool(own.get("config_hash")) and "finetuned" not in own
    record = own["record"] if fits(own.get("record"), _RECORD) else {}
    size = ", ".join(map(str, image["input_size"]))
    if form in ("onnx", "torch-export"):
        about = _GRAPH
    elif whole:
        about = _WITH_HEAD.format(
            head=_HEADS[own["encoder"]["global_pool"]],
            extra=", with the extra `hf`, and `import extrema_fast.timm`" if form == "hf" else "",
        )
    else:
        about = _WITHOUT_HEAD
    named = bool(own.get("classes"))
    use = (_CLASSIFY if named and form in _CLASSIFY else _USE)[form].format(
        registers="import extrema_fast.timm\n" if whole else "",
        convert=f'.convert("{mode}")' if mode else "",
        tokens="[1, 1 + patches, width]: class token, then patch tokens" if whole else "[1, patches, width]",
        pooled="class token" if whole else "mean of the patch tokens",
        size=size,
        outputs=", ".join(config.get("graph", {}).get("outputs", [])).replace("_", " "),
    )
    return _CARD.format(
        head=_head(form, bool(classes), ours, record),
        width=width,
        how=", pretrained with ExtreMA" if ours else "",
        pretraining="Self-supervised pretraining with extreme masking ([arXiv 2206.04667](https://arxiv.org/abs/2206.04667))."
        if ours
        else _begun(own),
        about=about,
        use=use,
        data=_data(record, bool(classes)),
        recipe=_recipe_table(own, record),
        results=_results(record),
        classes=_told_apart(classes, named),
        rows=_model(config, own, image, model),
    )


def _head(form: str, classifies: bool, ours: bool, record: Mapping[str, Any]) -> str:
    """The YAML of the card; JSON is YAML, and quotes what strangers' files hold."""
    tags = (
        ["timm"] * (form in ("hf", "vit"))
        + ["vision-transformer", "self-supervised-learning"]
        + ["extrema"] * ours
    )
    lines = [
        f"library_name: {_LIBRARY[form]}",
        f"pipeline_tag: {'image-classification' if classifies else 'image-feature-extraction'}",
        f"tags: [{', '.join(tags)}]",
        "# license: the publisher's choice, such as apache-2.0 or cc-by-nc-4.0",
    ]
    if found := record.get("results"):
        lines.append(f"model-index: {json.dumps([{'name': 'encoder', 'results': _index(found)}])}")
    return "\n".join(lines)


def _index(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of `model-index`: under one name of a metric a data set has one value."""
    entries, known = [], dict[tuple[str, str], float]()
    for result in results:
        counts, metrics, data = result["counts"], [], result.get("test", UNKNOWN)
        for row, key in ((r, m) for r in result["rows"] if r["encoder"] == "pretrained" for m in _TITLES):
            if key not in row:
                continue
            title = f"k-NN (k={result['k']})" if key == "knn" and "k" in result else _title(result, key)
            name = ", ".join([title, row["feature"], *_words(result, results, key)])
            value = round(100 * row[key], 2)
            # what names and rules do not tell apart, the numbers of images may
            counted = f"{name}, {counts['train']} training and {counts['test']} test images"
            names = [name, counted, *(f"{counted} ({n})" for n in range(2, len(results) + 1))]
            name = next(n for n in names if known.get((data, n), value) == value)
            if (data, name) not in known:
                metrics.append({"type": "accuracy", "name": name, "value": value})
            known[data, name] = value
        if metrics:
            task = {"type": "image-classification", "name": "frozen features"}
            entries.append({"task": task, "dataset": {"type": data, "name": data}, "metrics": metrics})
    return entries


def _title(result: Mapping[str, Any], metric: str) -> str:
    protocol = result.get("protocol", "paper")
    return PROTOCOLS.get(protocol, protocol) if metric == "probe" else _TITLES[metric]


def _words(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]], metric: str = "") -> list[str]:
    """How a result was made, besides its protocol, where that is not as usual: labels, training images, rules."""
    words = [f"labels {result['labels']}"] if "labels" in result else []
    first = next(r for r in results if r.get("test") == result.get("test"))
    if (train := result.get("train")) != first.get("train"):
        words.append(f"learned from {train}")
    # of k-NN alone
    skipped = "temperature" if metric == "probe" else ""
    return words + rules({k: v for k, v in result.items() if k != skipped})


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_plain(k)} | {_plain(v)} |" for k, v in rows.items())])


def _begun(own: Mapping[str, Any]) -> str:
    """What is known of the training of weights that are not those of a pretraining."""
    begun = own.get("finetuned")
    if not isinstance(begun, dict):
        return "How these weights were trained is not recorded."
    return f"A classifier, fine-tuned by extrema_fast from these weights: {_plain(_short(str(begun.get('weights'))))}."


def _told_apart(classes: int, named: bool) -> str:
    if not classes:
        return " It is no classifier by itself."
    names = "; `label_names` in `config.json` names them in their order" if named else ""
    return f" It tells {classes} classes apart{names}."


def _data(record: Mapping[str, Any], classifies: bool) -> str:
    count = record.get("data", {}).get("train")
    if not count:
        return "Not recorded."
    classes = f" in {count['classes']} classes" if count.get("classes") else ""
    images = f"{count['images']:,} images{classes}" if "images" in count else UNKNOWN
    labels = "used" if classifies else "not used in pretraining"
    return _table({"images": count.get("name", UNKNOWN), "number": images, "labels": labels})


def _recipe_table(own: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    rows = {
        k: ", ".join(map(str, v)) if isinstance(v, list) else "none" if v == "" else v
        for k, v in record.get("recipe", {}).items()
    }
    rows |= {"begun from": record["begun_from"]} if "begun_from" in record else {}
    rows |= {
        "optimizer steps": own.get("step", UNKNOWN),
        "images seen": own.get("images", UNKNOWN),
        "seed": own.get("seed", UNKNOWN),
        "configuration": own.get("config_hash", UNKNOWN),
    }
    return _table(rows)


def _results(record: Mapping[str, Any]) -> str:
    parts = []
    if test := record.get("classified"):
        parts = [
            f"Accuracy as a classifier: {100 * test['accuracy']:.1f} % of {test['images']:,} test images."
        ]
    results, online = record.get("results", []), record.get("online")
    for result in results:
        counts, test = result["counts"], _plain(result.get("test", UNKNOWN))
        neighbors = (
            f" k-NN with {result['k']} neighbors." if "k" in result and "knn" in _metrics(result) else ""
        )
        how = [_title(result, "probe")] if result.get("protocol", "paper") != "paper" else []
        how = [_plain(word) for word in how + _words(result, results)]
        told = f" ({'; '.join(how)})" if how else ""
        of = f" (of {result['labeled']['of']:,})" if "labeled" in result else ""
        spread = " ±: standard deviation over the seeds." if "seeds" in result else ""
        parts += [
            f"Frozen features on {test}{told}: {counts['train']:,} labeled "
            f"training{of} and {counts['test']:,} test images, {counts['classes']} classes.{neighbors}{spread}",
            _scores(result),
        ]
    if online and not results:
        parts += [
            f"k-NN with {online['k']} neighbors, measured while training, of {online['test']:,} test images.",
            _scores(online),
        ]
    return "\n\n".join(parts) or "These weights were not evaluated."


def _metrics(result: Mapping[str, Any]) -> list[str]:
    return [m for m in _TITLES if any(m in row for row in result["rows"])]


def _scores(result: Mapping[str, Any]) -> str:
    """A table of the metrics of each encoder and feature."""
    metrics = _metrics(result)
    lines = ["| encoder | feature | " + " | ".join(f"{_plain(_title(result, m))}, %" for m in metrics) + " |"]
    lines.append("|---|---|" + "---:|" * len(metrics))
    for row in result["rows"]:
        cells = [_plain(row["encoder"]), _plain(row["feature"])]
        spread = row.get("spread", {})
        cells += [
            f"{100 * row[m]:.1f}" + (f" ± {100 * spread[m]:.1f}" if m in spread else "") if m in row else ""
            for m in metrics
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _model(
    config: Mapping[str, Any], own: Mapping[str, Any], image: Mapping[str, Any], model: Mapping[str, Any]
) -> str:
    mean, std = (", ".join(f"{v:g}" for v in image[k]) for k in ("mean", "std"))
    blocks = f", {model['depth']} blocks" if model["depth"] else ""
    width = config.get("num_features") or model["width"]
    parts = [
        config.get("architecture"),
        width and f"width {width}",
        f"mlp ratio {model['mlp_ratio']:g}{blocks}",
    ]
    rows = {
        "architecture": ", ".join(filter(None, parts)),
        "input": f"{' x '.join(map(str, image['input_size']))}, patches of {image['patch_size']} pixels",
        "channels": ", ".join(image["channels"]),
        "values": f"{image['value_range'][0]:g} to {image['value_range'][1]:g}, then mean {mean}, std {std}",
        "resize": f"{image['interpolation']}, crop share {image['crop_pct']:g}",
        "positions": f"{own['encoder']['pos_embed']}, {own['encoder']['pos_coords']} coordinates",
        "classes": own["encoder"]["num_classes"] or "none (features)",
        "network": own.get("which") or UNKNOWN,
        "source": own["source"].get("file", UNKNOWN) if "source" in own else "a run of extrema-fast",
        "written by": own["software"],
    }
    differences = own["export"].get("differences", {})
    rows |= {f"compared: {what}": f"largest difference {d:.1e}" for what, d in differences.items()}
    return _table(rows)


def card_hash(card: bytes) -> str:
    """By which an untouched card is known."""
    return hashlib.sha256(card).hexdigest()


def kept_card(folder: Path) -> bytes | None:
    """The card of an earlier export that its user edited; None where there is none, or it is as it was written."""
    file = folder / CARD
    if not file.is_file():
        return None
    found, config = file.read_bytes(), read_json(folder / "config.json", {})
    described = fits(config, {"extrema_fast": {"export": {"card": str}}})
    if described and card_hash(found) == config["extrema_fast"]["export"]["card"]:
        return None
    log.warning("%s: is not as it was written and stays; remove it for a new one", file)
    return found


def _plain(value: Any) -> str:
    """A value as text of Markdown, on one line: what a stranger's file holds can become no markup, link or HTML."""
    text = printable(" ".join(str(value).split()))[:200]
    text = re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", text)
    # entities where a backslash does not help; bare addresses become links by `:` and `www.`
    return re.sub(r"[&<>@]|:(?=//)|(?<=[wW])\.", lambda m: f"&#{ord(m[0])};", text)
