"""The result of `evaluate`, as returned and stored: its schema, per-class results, and table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import PROTOCOLS, unusual_settings
from ..data.preprocess import CROP_PCT
from ..files import fits

PRETRAINED, RANDOM, PIXELS = "pretrained", "random init", "raw pixels"
CLS, MEAN, BOTH = FEATURES = "class token", "mean of patches", "class and mean"
# of a segmentation
TOKENS = "patch tokens"
# pairs of classes that are taken for each other most often, in a result
CONFUSIONS = 10


def per_class(predicted: dict[str, Tensor], labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy of each class, and which classes are taken for which most often.

    Args:
        predicted: By metric, [m] int64.
        labels: [m] int64, the true classes.
        classes: Their names.

    Returns:
        `names`; `images`: test images of each class; by metric the share that is right (None: no test images) and in
        `confusions` at most 10 [true class, predicted class, images], the most frequent first.
    """
    n = len(classes)
    images = torch.bincount(labels, minlength=n).tolist()
    out: dict[str, Any] = {"names": list(classes), "images": images, "confusions": {}}
    for metric, p in predicted.items():
        right = torch.bincount(labels[p == labels], minlength=n).tolist()
        out[metric] = [r / m if m else None for r, m in zip(right, images, strict=True)]
        pairs, counts = torch.unique(n * labels[p != labels] + p[p != labels], return_counts=True)
        first = counts.argsort(descending=True, stable=True)[:CONFUSIONS]
        found = zip(pairs[first].tolist(), counts[first].tolist(), strict=True)
        out["confusions"][metric] = [[pair // n, pair % n, count] for pair, count in found]
    return out


# of the images of an evaluation (`features.content_hash`); results of older versions have none
_IMAGES = {"train": str, "test": str}
_ACCURACIES = {"knn?": float, "probe?": float}
_ROW = {
    "encoder": str,
    "feature": str,
    **_ACCURACIES,
    "spread?": _ACCURACIES,
    "chosen?": [float],
    "validation?": float,
}
_RESULT = {
    "metrics": [str],
    "rows": [_ROW],
    "gain": {f"{CLS}?": _ACCURACIES, MEAN: _ACCURACIES, f"{BOTH}?": _ACCURACIES},
    "counts": {"train": int, "test": int, "classes": int, "left_out?": int},
    "warnings": [str],
    "which": str,
    "step": (int, None),
    "k": int,
    "temperature?": float,
    "resized?": str,
    "crop_pct?": float,
    "interpolation?": str,
    "train?": str,
    "test?": str,
    "holdout?": float,
    "images?": _IMAGES,
    "protocol?": str,
    "labels?": str,
    "labeled?": {"of": int, "rows": [str]},
    "seed?": int,
    "seeds?": int,
    "per_class?": {
        "feature": str,
        "names": [str],
        "images": [int],
        "knn?": [(float, None)],
        "probe?": [(float, None)],
        "confusions": {"knn?": [[int, int, int]], "probe?": [[int, int, int]]},
    },
}


def is_result(data: Any) -> bool:
    """Whether plain data from a file has the shape of what `evaluate` returns."""
    return (
        fits(data, _RESULT)
        and data["gain"].keys() <= set(FEATURES)
        and data.get("protocol", "paper") in PROTOCOLS
        and all(m in row for row in (*data["rows"], *data["gain"].values()) for m in data["metrics"])
        and all(m in row["spread"] for row in data["rows"] if "spread" in row for m in data["metrics"])
        and ("per_class" not in data or _fits_classes(data["per_class"], data["metrics"]))
    )


_SEGMENTATION = {
    "kind": str,
    "metrics": [str],
    "rows": [_ROW | {"probe": float, "kmeans": float, "spread?": {"probe": float, "kmeans": float}}],
    "gain": {TOKENS: {"probe": float, "kmeans": float}},
    "counts": {"train": int, "test": int, "classes": int},
    "per_class": {"names": [str], "pixels": [int], "probe": [(float, None)], "kmeans": [(float, None)]},
    "warnings": [str],
    "which": str,
    "step": (int, None),
    "data": str,
    "img_size?": [int],
    "images?": _IMAGES,
    "seed?": int,
    "seeds?": int,
}


def is_segmentation(data: Any) -> bool:
    """Whether plain data from a file has the shape of what `segment` returns."""
    return (
        fits(data, _SEGMENTATION)
        and data["kind"] == "segmentation"
        and data["metrics"] == ["probe", "kmeans"]
        and len({len(v) for v in data["per_class"].values() if isinstance(v, list)}) == 1
    )


def _fits_classes(data: dict[str, Any], metrics: list[str]) -> bool:
    n = len(data["names"])
    return all(
        m in data
        and m in data["confusions"]
        and len(data[m]) == n == len(data["images"])
        # the third is a count
        and all(0 <= c < n for pair in data["confusions"][m] for c in pair[:2])
        for m in ("knn", "probe")
        if m in metrics
    )


def titles(result: dict[str, Any]) -> dict[str, str]:
    """The metrics of a result of `evaluate` or `segment`, in the order of its table, with their titles."""
    if "kind" in result:
        return {"probe": "linear probe, mIoU", "kmeans": "k-means, mIoU"}
    known = {"knn": f"k-NN (k={result['k']})", "probe": PROTOCOLS[result.get("protocol", "paper")]}
    return {m: title for m, title in known.items() if m in result["metrics"]}


def best_feature(result: dict[str, Any], encoder: str = PRETRAINED) -> str:
    """The kind of features whose probe was right most often on the validation images; without any the first."""
    rows = [r for r in result["rows"] if r["encoder"] == encoder]
    best = max(rows, key=lambda r: r.get("validation", 0.0), default={"feature": CLS})
    return str(best["feature"])


# of a result: by what rules it was made
_RULES = ["kind", "which", "protocol", "labels", "k", "temperature", "seed", "seeds"]
_RULES += ["crop_pct", "interpolation", "resized"]
# paths that it names
_PATHS = ("train", "test", "data", "labels")


def result_id(result: dict[str, Any]) -> str:
    """Equal for two results alone that are of the same images and by the same rules, of whatever weights."""
    named = [str(result.get(k, "")).rstrip("/") for k in ("train", "test", "data")]
    images = result.get("images", [*named, result.get("holdout")])
    counts = [result["counts"][k] for k in ("train", "test")]
    # only a segmentation chooses its size, the other results have that of the encoder
    size = result.get("img_size") if "kind" in result else None
    return json.dumps([images, counts, size, *(result.get(k) for k in _RULES)], sort_keys=True)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """A result of `evaluate` or `segment` in a line.

    Returns:
        `what`: what was measured, in words; `feature`: of the row; `scores`: by metric `title`, `text` with standard
        deviation over seeds, and `gain` over random init in points.
    """
    feature = best_feature(result)
    row = next(r for r in result["rows"] if (r["encoder"], r["feature"]) == (PRETRAINED, feature))
    scores = {
        m: {"title": title, "text": shown(row, m), "gain": 100 * result["gain"].get(feature, {}).get(m, 0.0)}
        for m, title in titles(result).items()
    }
    return {"what": _what(result), "feature": feature, "scores": scores}


def summaries(results: Sequence[dict[str, Any]], step: int | None = None) -> list[dict[str, Any]]:
    """The `summary` of each; results on different images or by different rules have different words.

    Args:
        results: Of `evaluate` and `segment`, those that one page shows.
        step: Results of other steps say which; None: none does.
    """
    parts = [2] * len(results)
    for longer in range(3, max((_path(r, k).count("/") + 2 for r in results for k in _PATHS), default=0)):
        found = list(zip(results, parts, strict=True))
        parts = [longer if any(_ambiguous(r, other, n, m) for other, m in found) else n for r, n in found]
    texts = [_what(r, n) for r, n in zip(results, parts, strict=True)]
    # other images at the same path
    of: dict[str, set[str]] = {}
    for what, r in zip(texts, results, strict=True):
        of.setdefault(what, set()).add(result_id(r))
    texts = [f"{w}, {_mark(r)}" if len(of[w]) > 1 else w for w, r in zip(texts, results, strict=True)]
    if step is not None:
        late = [r["step"] not in (None, step) for r in results]
        texts = [f"{w}, step {r['step']:,}" if x else w for r, w, x in zip(results, texts, late, strict=True)]
    return [summary(r) | {"what": what} for r, what in zip(results, texts, strict=True)]


def _path(result: dict[str, Any], name: str) -> str:
    return str(result.get(name, "")).rstrip("/")


def _short(path: str, parts: int) -> str:
    return "/".join(path.rstrip("/").split("/")[-parts:])


def _ambiguous(a: dict[str, Any], b: dict[str, Any], parts: int, of_b: int) -> bool:
    """Whether a path of both has the same short name and is another, not known to hold the same images."""
    if "images" in a and a["images"] == b.get("images"):
        return False
    paths = [(_path(a, k), _path(b, k)) for k in _PATHS]
    return any(p != q and _short(p, parts) == _short(q, of_b) for p, q in paths)


def _mark(result: dict[str, Any]) -> str:
    if "images" not in result:
        return "images not recorded"
    return f"images {hashlib.sha256(json.dumps(result['images'], sort_keys=True).encode()).hexdigest()[:8]}"


def _what(result: dict[str, Any], parts: int = 2) -> str:
    """What was measured, with the last `parts` of paths: two tell `set/train` from `set/test`."""
    if "kind" in result:
        words = [f"segmentation of {_short(result['data'], parts)}"]
        words += [f"{' x '.join(map(str, result['img_size']))} pixels"] if "img_size" in result else []
    else:
        places = " / ".join(dict.fromkeys(_short(result[k], parts) for k in ("train", "test") if k in result))
        held = f"{100 * result['holdout']:g} % held out" if "holdout" in result else ""
        words = [places, held, PROTOCOLS[result.get("protocol", "paper")]]
        words += [f"labels {_short(result['labels'], parts)}"] if "labels" in result else []
        words += [f"k = {result['k']}"]
    words += [f"{result['counts']['train']:,} training and {result['counts']['test']:,} test images"]
    words += [result["which"]] if result["which"] != "teacher" else []
    words += unusual_settings(result, CROP_PCT)
    # older weights
    words += ["images of the encoder's size whole"] if "whole" in result.get("resized", "") else []
    return ", ".join(filter(None, words))


def shown(row: dict[str, Any], metric: str) -> str:
    """A row's accuracy in percent, with its standard deviation over seeds; k-NN on all labels has nothing random."""
    spread = row.get("spread", {}).get(metric)
    varies = spread is not None and (spread > 0 or metric != "knn")
    return f"{100 * row[metric]:.1f} " + (f"± {100 * spread:.1f} %" if varies else "%")


def format_table(result: dict[str, Any]) -> str:
    """The result as aligned plain text: one row per encoder and feature, then the gain over random init."""
    named = titles(result)
    width = {m: max([len(t), *(len(shown(r, m)) for r in result["rows"])]) for m, t in named.items()}

    def line(encoder: str, feature: str, *values: str) -> str:
        cells = [f"{v:>{width[m]}}" for m, v in zip(named, values, strict=True)]
        return "  ".join([f"{encoder:<21}", f"{feature:<15}", *cells]).rstrip()

    lines = [line("encoder", "feature", *named.values())]
    lines.append(line("-" * 21, "-" * 15, *("-" * width[m] for m in named)))
    for row in result["rows"]:
        lines.append(line(row["encoder"], row["feature"], *(shown(row, m) for m in named)))
    lines.append("")
    for feature, gain in result["gain"].items():
        lines.append(line("gain over random init", feature, *(f"{100 * gain[m]:+.1f}   " for m in named)))
    counts, step = result["counts"], "" if result["step"] is None else f" of step {result['step']:,}"
    few = result.get("labeled")
    of = f" (of {few['of']:,}, labels {result.get('labels', '')})" if few else ""
    lines += [
        "",
        f"{result['which']} weights{step}; {counts['train']:,} training{of} and {counts['test']:,} "
        f"test images, {counts['classes']} classes",
    ]
    if "seeds" in result:
        lines.append(f"mean and standard deviation of {result['seeds']} seeds")
    if any("validation" in row for row in result["rows"]):
        chosen = "C" if result.get("protocol") == "logistic" else "rate"
        lines.append(
            f"{chosen} chosen on a fifth of the training images; the best feature there: {best_feature(result)}"
        )
    if "resized" in result:
        lines.append(f"images {result['resized']}")
    if counts.get("left_out"):
        lines.append(f"{counts['left_out']} more images cannot be decoded and are left out")
    return "\n".join(lines + [f"WARNING: {text}" for text in result["warnings"]])
