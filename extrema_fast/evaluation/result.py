"""What `evaluate` returns and a result file holds: its shape, its parts per class, its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..files import fits

PRETRAINED, RANDOM, PIXELS = "pretrained", "random init", "raw pixels"
CLS, MEAN = "class token", "mean of patches"
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


_ROW = {"encoder": str, "feature": str, "knn?": float, "probe?": float}
_RESULT = {
    "metrics": [str],
    "rows": [_ROW],
    "gain": {f"{CLS}?": {"knn?": float, "probe?": float}, MEAN: {"knn?": float, "probe?": float}},
    "counts": {"train": int, "test": int, "classes": int, "left_out?": int},
    "warnings": [str],
    "which": str,
    "step": (int, None),
    "k": int,
    "resized?": str,
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
        and data["gain"].keys() <= {CLS, MEAN}
        and all(m in row for row in (*data["rows"], *data["gain"].values()) for m in data["metrics"])
        and ("per_class" not in data or _fits_classes(data["per_class"], data["metrics"]))
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


def format_table(result: dict[str, Any]) -> str:
    """The result as aligned plain text: one row per encoder and feature, then the gain over random init."""
    titles = {"knn": f"k-NN (k={result['k']})", "probe": "linear probe"}
    metrics = [m for m in titles if m in result["metrics"]]

    def line(encoder: str, feature: str, *values: str) -> str:
        cells = [f"{v:>{len(titles[m])}}" for m, v in zip(metrics, values, strict=True)]
        return "  ".join([f"{encoder:<21}", f"{feature:<15}", *cells]).rstrip()

    lines = [line("encoder", "feature", *(titles[m] for m in metrics))]
    lines.append(line("-" * 21, "-" * 15, *("-" * len(titles[m]) for m in metrics)))
    for row in result["rows"]:
        lines.append(line(row["encoder"], row["feature"], *(f"{100 * row[m]:.1f} %" for m in metrics)))
    lines.append("")
    for feature, gain in result["gain"].items():
        lines.append(line("gain over random init", feature, *(f"{100 * gain[m]:+.1f}   " for m in metrics)))
    counts, step = result["counts"], "" if result["step"] is None else f" of step {result['step']}"
    lines += [
        "",
        f"{result['which']} weights{step}; {counts['train']} training and {counts['test']} "
        f"test images, {counts['classes']} classes",
    ]
    if "resized" in result:
        lines.append(f"images {result['resized']}")
    if counts.get("left_out"):
        lines.append(f"{counts['left_out']} more images cannot be decoded and are left out")
    return "\n".join(lines + [f"WARNING: {text}" for text in result["warnings"]])
