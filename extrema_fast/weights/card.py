"""The model card of an export: a README.md with Hugging Face metadata, which states only what is known.

What a run has recorded about its weights (`run_record`) is stored in the description of an export, so that an export
of an export keeps it. A card is a function of `config.json`, which stores its hash: a card with another hash was
edited, and is kept (`kept_card`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import FREE_FIELDS, NOT_TUNED, PROTOCOLS, Config, FinetuneConfig, flatten, unusual_settings
from ..errors import counted, printable
from ..files import fits, history, read_json
from .folder import model_config

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
    "holdout?": float,
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
_KEPT = [k.removesuffix("?") for k in _RESULT]
# k-NN measured by training itself, at its first evaluation and at these weights
_ONLINE = {"rows": [{"encoder": str, "feature": str, "knn": float}], "test": int, "k": int}
# what an export keeps of a run
_RECORD = {
    "img_size?": [int],
    "data?": {"train?": _COUNT, "test?": (_COUNT, None)},
    "recipe?": {},
    "results?": [_RESULT],
    "online?": _ONLINE,
    "begun_from?": str,
    "classified?": {"accuracy": float, "images": int},
}
# settings that other tables of a card show, and folders
_ELSEWHERE = (
    *("data.train", "data.mean", "data.std", "train.seed", "train.precision", "tune.weights"),
    *("model.size", "model.img_size", "model.patch_size", "model.in_chans"),
    *("model.width", "model.depth", "model.heads", "model.mlp_ratio"),
)
# settings that every card has
_WORDS = {
    "head.loss": "loss",
    "mask.ratio": "mask ratio (patches that a view drops)",
    "mask.views": "views per image",
    "data.policy": "augmentation",
    "data.area": "minimum and maximum crop area",
    "train.epochs": "epochs",
    "train.batch_size": "batch size",
    "optim.name": "optimizer",
    "optim.base_lr": "learning rate per 256 images",
    "optim.warmup_epochs": "warm-up epochs",
    "optim.weight_decay": "weight decay",
    "optim.momentum": "teacher momentum",
    "tune.layer_decay": "layer decay",
    "tune.mixup": "mixup",
    "tune.cutmix": "cutmix",
    "tune.smoothing": "label smoothing",
    "tune.rand_augment": "RandAugment",
    "tune.erasing": "random erasing",
    "tune.ema": "EMA of the weights",
}
_TITLES = {"knn": "k-NN", "probe": "linear probe"}
# features of an evaluation (`evaluation.result`) that need no class-attention head
_HEADLESS = ("mean of patches", "pixels")


# ---- what a run knows -------------------------------------------------------------------------------


def run_record(weights: Path, meta: Mapping[str, Any], which: str | None) -> dict[str, Any] | None:
    """What the run around some weights has recorded about them; None where there is no such run.

    Args:
        weights: A run folder, or a file or folder in it.
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
    counts = {k: v for k, v in env.get("data", {}).items() if k in ("train", "test") and fits(v, _COUNT)}
    found = {
        "img_size": list(model_config(meta).img_size),
        "data": {
            split: {k: short_path(v) if k == "name" else v for k, v in c.items() if f"{k}?" in _COUNT}
            for split, c in counts.items()
        },
        "recipe": dict(_recipe(cfg, env)),
        "results": _evaluations(folder, meta, which),
    }
    if which != "student" and (online := _online(folder, cfg, meta.get("step"))):
        found["online"] = online
    if isinstance(begun := env.get("init_from"), dict) and isinstance(begun.get("weights"), str):
        found["begun_from"] = short_path(begun["weights"])
    # the test after fine-tuning, of the network that is loaded by default
    test = read_json(folder / "reports/classification.json", {})
    if fits(test, {"step": int, "accuracy": float, "images": int}) and test["step"] == meta.get("step"):
        if which != "student":
            found["classified"] = {k: test[k] for k in ("accuracy", "images")}
    return found if fits(found, _RECORD) else None


def _online(folder: Path, cfg: Mapping[str, Any], step: Any) -> dict[str, Any] | None:
    """k-NN of the teacher as measured by training, at a step and at the beginning."""
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
    found: dict[str, dict[str, Any]] = {}
    for r in (read_json(p, {}) for p in files):
        if fits(r, shape) and (r["step"], r["which"]) == (meta.get("step"), which):
            # older versions wrote a result again where its images were named by another path
            names = {k: Path(r[k]).name for k in ("train", "test")}
            found.setdefault(json.dumps({k: r.get(k) for k in _KEPT} | names), r)
    image = meta.get("input", {})
    # older weights, without `crop_mode`, take images of their size whole
    own = {k: image.get(k) if "crop_mode" in image else None for k in ("crop_pct", "interpolation")}
    names_of: dict[str, list[str]] = {}
    kept = []
    for r in found.values():
        out = {k: r[k] for k in _KEPT if k in r}
        # resized as the table of the model says
        if own == {k: r.get(k) for k in own}:
            out = {k: v for k, v in out.items() if k not in own}
        for k in ("train", "test"):
            # other images may have the same short name
            paths = names_of.setdefault(short_path(r[k]), [])
            if (path := r[k].rstrip("/")) not in paths:
                paths.append(path)
            n = paths.index(path)
            out[k] = short_path(r[k]) + (f" ({n + 1})" if n else "")
        if "labels" in r:
            out["labels"] = short_path(r["labels"])
        if "labeled" in r:
            out["labeled"] = {"of": r["labeled"]["of"]}
        kept.append(out)
    return kept


def short_path(name: str) -> str:
    """The last two names of a path, without home folders: a card is published, the folders of its author are not."""
    parts = [p for p in Path(name).parts if p not in ("/", "..")]
    if name.startswith("/") and parts:
        parts = parts[{"home": 2, "Users": 2, "root": 1}.get(parts[0], 0) :]
    return "/".join(parts[-2:]) or UNKNOWN


def _recipe(cfg: Mapping[str, Any], env: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(words, value) of the settings in these files; those not in `_WORDS` only where they are not the default."""
    of_run = {
        "preset": ("preset", "name"),
        "precision": ("resolved", "precision"),
        "commit": ("code", "commit"),
        "torch": ("versions", "torch"),
    }
    for words, (section, name) in of_run.items():
        value = env.get(section)
        if isinstance(value, dict) and fits(value.get(name), str):
            # of a checkout with changes that no commit has
            yield words, value[name] + ", changed" * (value.get("changed") is True)
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

# what an export is, and how its lines of code load it
_TRUNK = "This is the trunk as a stock timm ViT with mean-pooled patch tokens; it loads without extrema_fast."
_HEAD_LEFT_OUT = """
The class-attention head is left out; an export with the class token needs the package extrema_fast."""
_NEW_NORM = """
A new norm after pooling replaces the final norm: fine-tune this model, its features are not those of pretraining."""
_ENCODER = """This is the whole encoder with {head}, which timm does not know:
install the package extrema_fast from its repository{extra} before loading."""
_GRAPH = (
    "This is the whole encoder as a graph for one image size and any batch size; it needs no extrema_fast."
)

_LOAD = {
    "hf": """{registers}from PIL import Image
from transformers import AutoImageProcessor, {auto}

model = {auto}.from_pretrained("path/to/this/folder").eval()
photo = Image.open("photo.jpg").convert("{mode}")
images = AutoImageProcessor.from_pretrained("path/to/this/folder")(photo)
""",
    # of channels that no photograph has
    "hf, other channels": """{registers}import torch
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder").eval()
images = {{"pixel_values": torch.zeros(1, {size})}}  # prepared as the table below says
""",
    "extrema": """import torch
from extrema_fast import load_encoder

encoder = load_encoder("path/to/this/folder")
images = torch.zeros(1, {size})  # of an image: encoder.preprocess()(image)[None]
""",
    "vit": """import timm
import torch

model = timm.create_model("local-dir:path/to/this/folder", pretrained=True).eval()
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
images = torch.zeros(1, {size})  # of an image: prepare(image)[None]
""",
    "onnx": """import numpy
import onnxruntime

session = onnxruntime.InferenceSession("path/to/this/folder/model.onnx")
images = numpy.zeros((1, {size}), "float32")  # prepared as the table below says
{outputs} = session.run(None, {{"images": images}})
""",
    "torch-export": """import torch

program = torch.export.load("path/to/this/folder/model.pt2").module()
images = torch.zeros(1, {size})  # prepared as the table below says
{outputs} = program(images)
""",
}
_FEATURES = {
    "hf": """features = model(**images)
features.last_hidden_state  # {tokens}
features.pooler_output  # [1, width]: {pooled}
""",
    "extrema": """features = encoder.encode(images)  # features.cls [1, width], features.patches [1, patches, width]
""",
    "vit": """features = model(images)  # [1, width]: mean of the patch tokens
""",
}
# logits, and names of classes
_CLASSIFY = {
    "hf": ("model(**images).logits", "model.config.id2label"),
    "extrema": ("encoder(images)", "encoder.classes"),
    "vit": ("model(images)", 'model.pretrained_cfg["label_names"]'),
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
{code}```

## Training data

{data}

## Recipe

{recipe}

## Results

{results}

## Intended use

{use}

## Limits

The features reflect the training images. Kinds of images that were not among them, other image sizes and other channels
give worse features or none. What the tables above do not show was not measured; bias, fairness and robustness were not
examined. Evaluate the model on your own images before you rely on it.

## Model

{rows}

## License

No license is stated. The license of the weights that were exported applies; whoever publishes them sets `license` at
the top of this file.
"""


def model_card(config: Mapping[str, Any]) -> str:
    """The README.md of an export, Markdown with YAML metadata, from its `config.json`."""
    own = config["extrema_fast"]
    # a fine-tuning may have started from anybody's weights
    ours = bool(own.get("config_hash")) and "finetuned" not in own
    record, classes = _record(own), own["encoder"]["num_classes"]
    return _CARD.format(
        head=_head(own, ours, record),
        width=model_config(own).shape[0],
        how=", pretrained with ExtreMA" if ours else "",
        pretraining="Self-supervised pretraining with extreme masking ([arXiv 2206.04667](https://arxiv.org/abs/2206.04667))."
        if ours
        else _begun(own),
        about=_about(config, ours),
        code=_code(config),
        data=_data(record, bool(classes)),
        recipe=_recipe_table(own, record),
        results=_results(record),
        use=_use(own),
        rows=_model(config),
    )


def _record(own: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the run, with the results of the features that the export has."""
    record = dict(own["record"]) if fits(own.get("record"), _RECORD) else {}
    size = record.pop("img_size", None)
    of_size = {"img_size": size} if size and size != own["input"]["input_size"][1:] else {}
    headless = own["encoder"]["global_pool"] == "avg"

    def given(result: Mapping[str, Any]) -> dict[str, Any]:
        rows = [row for row in result["rows"] if not headless or row["feature"] in _HEADLESS]
        return {**result, "rows": rows, **of_size}

    results, online = record.pop("results", []), record.pop("online", None)
    if not _has_new_norm(own):
        record["results"] = [given(result) for result in results]
        record |= {"online": given(online)} if online else {}
    if "classified" in record:
        record["classified"] = record["classified"] | of_size
    return record


def _has_new_norm(own: Mapping[str, Any]) -> bool:
    # with a classifier it was trained
    return bool(own["export"].get("fc_norm")) and not own["encoder"]["num_classes"]


def _is_whole(config: Mapping[str, Any]) -> bool:
    """Whether an export is an encoder of this project, no stock ViT."""
    name = config.get("architecture", "")
    return not name or name.startswith("extrema_")


def _about(config: Mapping[str, Any], ours: bool) -> str:
    own = config["extrema_fast"]
    form = own["export"]["format"]
    if form in ("onnx", "torch-export"):
        return _GRAPH
    if _is_whole(config):
        extra = ", with the extra `hf`, and `import extrema_fast.timm`" if form == "hf" else ""
        pool = own["encoder"]["global_pool"]
        return _ENCODER.format(
            head="mean pooling" if pool == "avg" else "its class-attention head", extra=extra
        )
    return _TRUNK + _HEAD_LEFT_OUT * ours + _NEW_NORM * _has_new_norm(own)


def _code(config: Mapping[str, Any]) -> str:
    """Lines of Python that load the export and compute its outputs, which run as they are."""
    own = config["extrema_fast"]
    size, classes, form = own["input"]["input_size"], own["encoder"]["num_classes"], own["export"]["format"]
    # transformers leaves a gray image gray, whatever the model's channels
    mode, whole = {1: "L", 3: "RGB"}.get(size[0]), _is_whole(config)
    code = _LOAD[form if mode or form != "hf" else "hf, other channels"]
    if classes and form in _CLASSIFY:
        logits, names = _CLASSIFY[form]
        code += f"logits = {logits}  # [1, classes]\n"
        code += f"name = {names}[int(logits.argmax())]\n" if own.get("classes") else ""
    if not classes or form == "extrema":
        code += _FEATURES.get(form, "")
    return code.format(
        registers="import extrema_fast.timm\n" if whole else "",
        auto="AutoModelForImageClassification" if classes else "AutoModel",
        mode=mode,
        size=", ".join(map(str, size)),
        outputs=", ".join(config.get("graph", {}).get("outputs", [])),
        tokens="[1, 1 + patches, width]: class token, then patch tokens" if whole else "[1, patches, width]",
        pooled="class token" if whole else "mean of the patch tokens",
    )


def _head(own: Mapping[str, Any], ours: bool, record: Mapping[str, Any]) -> str:
    """The YAML of the card; JSON is YAML, and quotes what strangers' files hold."""
    form, classes = own["export"]["format"], own["encoder"]["num_classes"]
    tags = ["timm"] * (form in ("hf", "vit")) + ["vision-transformer"]
    tags += ["self-supervised-learning", "extrema"] * ours
    lines = [
        f"library_name: {_LIBRARY[form]}",
        f"pipeline_tag: {'image-classification' if classes else 'image-feature-extraction'}",
        f"tags: [{', '.join(tags)}]",
        "# license: the publisher's choice, such as apache-2.0 or cc-by-nc-4.0",
    ]
    if found := _index(record):
        lines.append(f"model-index: {json.dumps([{'name': 'encoder', 'results': found}])}")
    return "\n".join(lines)


def _index(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of `model-index`: a data set has one value for each name of a metric."""
    entries, known = [], dict[tuple[str, str], float]()

    def add(task: str, data: str, metrics: Sequence[Mapping[str, Any]]) -> None:
        task_of = {"type": "image-classification", "name": task}
        entries.append({"task": task_of, "dataset": {"type": data, "name": data}, "metrics": metrics})

    if test := record.get("classified"):
        value = round(100 * test["accuracy"], 2)
        name = ", ".join(["accuracy", *_pixels(test)])
        add("classification", _test_name(record), [{"type": "accuracy", "name": name, "value": value}])
    results = record.get("results", [])
    for result in results:
        counts, metrics, data = result["counts"], [], result.get("test", UNKNOWN)
        for row, key in ((r, m) for r in result["rows"] if r["encoder"] == "pretrained" for m in _TITLES):
            if key not in row:
                continue
            title = f"k-NN (k={result['k']})" if key == "knn" and "k" in result else _title(result, key)
            name = ", ".join([title, row["feature"], *_words(result, results, key)])
            value = round(100 * row[key], 2)
            # what names and settings do not tell apart, the numbers of images may
            sized = f"{name}, {counts['train']} training and {counts['test']} test images"
            names = [name, sized, *(f"{sized} ({n})" for n in range(2, len(results) + 1))]
            name = next(n for n in names if known.get((data, n), value) == value)
            if (data, name) not in known:
                metrics.append({"type": "accuracy", "name": name, "value": value})
            known[data, name] = value
        if metrics:
            add("frozen features", data, metrics)
    return entries


def _test_name(record: Mapping[str, Any]) -> str:
    return str((record.get("data", {}).get("test") or {}).get("name", UNKNOWN))


def _title(result: Mapping[str, Any], metric: str) -> str:
    protocol = result.get("protocol", "paper")
    return PROTOCOLS.get(protocol, protocol) if metric == "probe" else _TITLES[metric]


def _words(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]], metric: str = "") -> list[str]:
    """Settings of a result, besides its protocol, that are not the defaults: labels, images, k-NN, resizing, seeds."""
    words = [f"labels {result['labels']}"] if "labels" in result else []
    words += [f"{100 * result['holdout']:g} % held out"] if "holdout" in result else []
    first = next(r for r in results if r.get("test") == result.get("test"))
    if (train := result.get("train")) != first.get("train"):
        words.append(f"trained on {train}")
    words += _pixels(result)
    # of k-NN alone
    skipped = "temperature" if metric == "probe" else ""
    return words + unusual_settings({k: v for k, v in result.items() if k != skipped})


def _pixels(result: Mapping[str, Any]) -> list[str]:
    return [f"{' x '.join(map(str, result['img_size']))} pixels"] if "img_size" in result else []


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_plain(k)} | {_plain(v)} |" for k, v in rows.items())])


def _begun(own: Mapping[str, Any]) -> str:
    """What is known of the training of weights that are not those of a pretraining."""
    begun = own.get("finetuned")
    if not isinstance(begun, dict):
        return "How these weights were trained is not recorded."
    if begun.get("weights") == "none":
        return "A classifier, trained by extrema_fast from random weights."
    return (
        f"A classifier, fine-tuned by extrema_fast from the weights {_plain(begun.get('weights', UNKNOWN))}."
    )


def _use(own: Mapping[str, Any]) -> str:
    classes = own["encoder"]["num_classes"]
    if not classes:
        return "Image features for search, k-NN and linear classifiers, or fine-tuning. The model has no classifier."
    names = "; `label_names` in `config.json` has their names in order" if own.get("classes") else ""
    return f"Classification of images into {classes} classes{names}. The features also serve search and fine-tuning."


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
    rows |= {"initialized from": record["begun_from"]} if "begun_from" in record else {}
    for words, key in (("optimizer steps", "step"), ("images seen", "images")):
        rows |= {words: f"{own[key]:,}"} if key in own else {}
    rows |= {words: own[k] for words, k in (("seed", "seed"), ("configuration", "config_hash")) if k in own}
    return _table(rows) if rows else "Not recorded."


def _results(record: Mapping[str, Any]) -> str:
    parts = []
    if test := record.get("classified"):
        parts = [
            f"Accuracy as a classifier: {100 * test['accuracy']:.1f} % of {test['images']:,} test images "
            f"({'; '.join([_plain(_test_name(record)), *_pixels(test)])})."
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
            f"k-NN with {online['k']} neighbors on {online['test']:,} test images, "
            f"{', '.join(['measured during training', *_pixels(online)])}.",
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


def _model(config: Mapping[str, Any]) -> str:
    own = config["extrema_fast"]
    image, options = own["input"], own["encoder"]
    mean, std = (", ".join(f"{v:g}" for v in image[k]) for k in ("mean", "std"))
    deep = own.get("data", {}).get("range")
    levels = ", ".join(f"{a:g} to {b:g}" for a, b in zip(deep[::2], deep[1::2], strict=True)) if deep else ""
    width, depth, heads = model_config(own).shape
    rows = {
        "architecture": f"{config.get('architecture', 'ViT')} of width {width}, {counted(depth, 'block')}, "
        f"{counted(heads, 'head')}, MLP ratio {own['model']['mlp_ratio']:g}",
        "input": f"{' x '.join(map(str, image['input_size']))}, patches of {image['patch_size']} pixels",
        "channels": ", ".join(image["channels"]),
        "values": f"0 to 1{levels and f' (more than 8 bits: from {levels})'}, then mean {mean}, std {std}",
        "resize": f"{image['interpolation']}, crop fraction {image['crop_pct']:g}",
        "positions": f"{options['pos_embed']}, {options['pos_coords']} coordinates",
        "classes": options["num_classes"] or "none (features)",
        "network": own.get("which"),
        "source": own["source"].get("file", UNKNOWN) if "source" in own else "a run of extrema-fast",
        "left out of the source": ", ".join(own.get("source", {}).get("left_out", [])) or None,
        "written by": own["software"],
    }
    differences = own["export"].get("differences", {})
    rows |= {f"verified: {what}": f"largest difference {d:.1e}" for what, d in differences.items()}
    return _table({k: v for k, v in rows.items() if v is not None})


def card_hash(card: bytes) -> str:
    """The hash that identifies a card nobody has edited."""
    return hashlib.sha256(card).hexdigest()


def kept_card(folder: Path) -> bytes | None:
    """The card of an earlier export if its user has edited it; else None."""
    file = folder / CARD
    if not file.is_file():
        return None
    found, config = file.read_bytes(), read_json(folder / "config.json", {})
    described = fits(config, {"extrema_fast": {"export": {"card": str}}})
    if described and card_hash(found) == config["extrema_fast"]["export"]["card"]:
        return None
    log.warning("%s: was edited and is kept; remove it to get a new one", file)
    return found


def _plain(value: Any) -> str:
    """A value as text of Markdown, on one line: what a stranger's file holds can become no markup, link or HTML."""
    text = printable(" ".join(str(value).split()))[:200]
    text = re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", text)
    # entities where a backslash does not help; bare addresses become links by `:` and `www.`
    return re.sub(r"[&<>@]|:(?=//)|(?<=[wW])\.", lambda m: f"&#{ord(m[0])};", text)
