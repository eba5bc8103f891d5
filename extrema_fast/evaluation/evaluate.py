"""Evaluation of an encoder, always compared with a random encoder and raw pixels.

k-NN and the probe read the same features, after the final norm. The paper's probe takes the class token before the norm
and standardizes each dimension; the final LayerNorm differs from that by one factor per image.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import PROTOCOLS, EvalConfig
from ..data.augment import normalize
from ..data.image_files import read_as
from ..data.sources import ImageSource, open_source, subset
from ..distributed import pick_device
from ..errors import UsageError, counted
from .collapse import collapse_warnings
from .features import Features, content_hash, extract, labeled, load_batch, overlap, raw_pixels
from .probes import accuracy, attention_entropy, indicators, knn_predictions
from .protocols import Probed, few_labels, probe
from .result import (
    BOTH,
    CLS,
    FEATURES,
    MEAN,
    PIXELS,
    PRETRAINED,
    RANDOM,
    is_result,
    per_class,
)
from .subject import (
    FORMAT,
    keep_result,
    known_result,
    open_subject,
    resolve_data,
    result_file,
    result_key,
    run_data,
    same_images,
)

log = logging.getLogger(__name__)

# test images whose attention is measured
VIEW_IMAGES = 256


def evaluate(
    path: str | Path,
    train: str | None = None,
    test: str | None = None,
    *,
    out: str | Path | None = None,
    which: str = "teacher",
    metrics: Sequence[str] = ("knn", "probe"),
    max_train: int = 0,
    max_test: int = 0,
    k: int | None = None,
    temperature: float | None = None,
    protocol: str = "paper",
    labels: float | str | None = None,
    seed: int = 0,
    seeds: int = 1,
    batch_size: int | None = None,
    crop_pct: float | None = None,
    device: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Runs k-NN and a linear probe on an encoder, on its random initialization, and on raw pixels.

    Images that cannot be decoded are left out; `counts` and the log say how many.

    Args:
        path: Run folder, weights folder or released `.pth`.
        train: Training images; None: the run's. A folder that holds both train/ and test/ (or val/) is enough.
        test: Test images; None: the run's.
        out: Result file (JSON). None: for a run folder `reports/evaluation.json`, or `reports/evaluation-KEY.json` if
            images, settings or seeds differ from the run's; otherwise no file.
        which: `teacher` or `student`.
        metrics: One or both of `knn` and `probe`.
        max_train: Maximum number of training images (0: all).
        max_test: Maximum number of test images (0: all).
        k: Neighbors for k-NN, at most the number of training images; None: the run's.
        temperature: Temperature of the k-NN vote weights; None: the run's.
        protocol: Linear-probe protocol: `paper`; `grid`, a sweep over learning rates; or `logistic`, L2-regularized
            logistic regression. The latter two also use class token and mean patch token concatenated, and select
            on a fifth of the training images.
        labels: Use only this fraction of each class, or only the training images that a text file lists; None: all.
        seed: Random seed of the subsets, the labels, and the probe's order, weights and validation images.
        seeds: Number of consecutive seeds, starting at `seed`, to average over; `spread` has the standard deviation.
        batch_size: Images per forward pass; None: the run's.
        crop_pct: As in `Encoder.preprocess`; None: the weights' own.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        force: Compute the result even if the file already holds it.

    Returns:
        A dict of plain data: `rows` (encoder, feature, and the accuracies `knn` and `probe` from 0 to 1), `gain` over
        random initialization, `per_class` of the first row and seed, `indicators`, `warnings`, `counts`, and the
        settings. With `grid` and `logistic` also the learning rate or C `chosen` for each seed, and its accuracy on the
        validation images (`validation`). With `labels` also the rows used (`labeled`). The file holds the same dict,
        with a key over weights, images and settings: the same call returns it again without computing anything.

    Raises:
        UsageError: Labels are missing, there is only one class, classes do not match, there are fewer images than
            `k`, or a path is unusable.
        NonFiniteError: The weights have diverged.
        DataError: None of the images can be read.
        StorageError: `out` cannot be written; the error's `result` holds the result.
    """
    wrong = [m for m in metrics if m not in ("knn", "probe")]
    if wrong or not metrics:
        raise UsageError(f"metrics: expected some of knn, probe, got {list(metrics)}")
    for name, value, low in (
        ("k", k, 1),
        ("batch_size", batch_size, 1),
        ("max_train", max_train, 0),
        ("max_test", max_test, 0),
        ("seeds", seeds, 1),
    ):
        if value is not None and value < low:
            raise UsageError(f"{name}: expected at least {low}, got {value}")
    if temperature is not None and not temperature > 0:
        raise UsageError(f"temperature: expected a number above 0, got {temperature}")
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    where = pick_device(device)
    subject = open_subject(path, which)
    path, cfg, encoder, meta, data = subject
    rule = cfg.eval if cfg is not None else EvalConfig()
    # what is named and equal to the run's own is the run's own, so that its result has the same key
    own_resizing, given = encoder.resizing(), encoder.resizing(crop_pct)
    resizing = own_resizing if given == own_resizing else given
    temperature = rule.temperature if temperature in (None, rule.temperature) else temperature
    own, images, unnamed = run_data(cfg), resolve_data(cfg, train, test), train is None and test is None
    own_images = own is not None and (unnamed or same_images(own, images))
    (train, rest), (test, held) = own if own is not None and own_images else images
    # what evaluation.json of a run holds: the result of `evaluate RUN`
    plain = own_images and k in (None, rule.k) and temperature == rule.temperature and labels is None
    plain &= resizing == own_resizing and (which, protocol, seed, seeds) == ("teacher", "paper", 0, 1)
    try:
        bank = open_source(train, "train", limit=max_train, seed=seed, holdout=rest)
        queries = open_source(test, "test", limit=max_test, seed=seed, holdout=held)
        lacking = _classes_without(queries, bank)
        queries = labeled(bank, queries)
        bank, queries = (read_as(s, encoder.in_chans) for s in (bank, queries))
    except UsageError as error:
        if unnamed and "does not exist" in str(error):
            error = UsageError(f"{path} was trained on images that are gone; name them with --data: {error}")
        raise error from None
    plain &= not (0 < max_train <= len(bank) or 0 < max_test <= len(queries))
    if len(bank.classes) < 2:
        raise UsageError(
            f"{bank.name}: all {len(bank)} training images are of one class ({bank.classes[0]}); k-NN and the "
            "linear probe need at least two: give the folder that holds the class folders"
        )
    same = overlap(bank, queries, seed) + lacking
    each, available = range(seed, seed + seeds), len(bank)
    # of the training images which are used, and of these which by each seed
    used, taken = torch.arange(available), list[Tensor]()
    if labels is not None:
        taken = few_labels(bank, str(labels), each)
        used = torch.cat(taken).unique()
        bank = subset(bank, used)
    fewest = min(map(len, taken), default=len(bank))
    if k is not None and k > fewest:
        raise UsageError(f"k: {k} neighbors, but there are {fewest} training images; use at most {fewest}")
    if k is None and rule.k > fewest and "knn" in metrics:
        same.append(f"k-NN: {fewest} training images, fewer than k = {rule.k}: all of them vote")
    settings: dict[str, Any] = {
        "which": which,
        "metrics": sorted(metrics),
        "k": k or rule.k,
        "temperature": temperature,
        "seed": seed,
        "train": train,
        "test": test,
        "mean": list(data.mean),
        "std": list(data.std),
    }
    if rest or held:
        settings["holdout"] = rest or held
    # only where it is not the default, so that results of older versions keep their key
    if protocol != "paper":
        settings["protocol"] = protocol
    if labels is not None:
        settings["labels"] = str(labels)
    if seeds > 1:
        settings["seeds"] = seeds
    if not resizing.keep_exact:
        settings |= {"crop_pct": resizing.crop_pct, "interpolation": resizing.interpolation}
    if encoder.value_range:
        settings["range"] = list(encoder.value_range)
    key = result_key(settings, encoder, bank.fingerprint, queries.fingerprint, list(encoder.img_size))
    hashes = {"train": content_hash(bank), "test": content_hash(queries)}
    if out is None and cfg is not None and len(set(metrics)) == 2:
        out = result_file(path, "evaluation.json" if plain else f"evaluation-{key}.json")
        if not plain:
            log.info("other images, settings or seeds than the run's: the result goes to %s", out)
    # results of older versions have no classes
    if out is not None and not force:
        if known := known_result(Path(out), key, lambda d: is_result(d) and "per_class" in d, hashes):
            return known

    started = time.monotonic()
    log.debug("images are %s; --crop-pct sets it", resizing)
    # without a class head the pooled feature is the mean of the patches
    kinds = [*FEATURES[: 2 if protocol == "paper" else 3]] if encoder.num_prefix_tokens else [MEAN]
    rows: list[dict[str, Any]] = []
    signs: dict[str, dict[str, float]] = {}
    left_out = 0
    classes: dict[str, Any] = {}

    def measure(name: str, a: Features, b: Features, kinds: Sequence[str]) -> dict[str, Tensor]:
        assert a.labels is not None and b.labels is not None
        known = [torch.isin(used, t).nonzero()[:, 0] for t in taken] or [torch.arange(len(used))] * seeds
        found = [
            _predict(_kinds(a, kinds, where), a.labels, _kinds(b, kinds, where), b.labels, settings, s, use)
            for s, use in zip(each, known, strict=True)
        ]
        rows.extend(
            {"encoder": name, "feature": kind} | _row([f[kind] for f in found], b.labels) for kind in kinds
        )
        return {metric: p.predicted for metric, p in found[0][kinds[0]].items()}

    for name in (PRETRAINED, RANDOM):
        model = encoder if name == PRETRAINED else subject.initial()
        a, b = (
            extract(
                model,
                s,
                data,
                batch_size=batch_size or rule.batch_size,
                device=where,
                strict=False,
                resizing=resizing,
            )
            for s in (bank, queries)
        )
        # what cannot be read is left out once, for all rows of the table alike
        left_out += len(bank) + len(queries) - len(a.rows) - len(b.rows)
        bank, queries, used = subset(bank, a.rows), subset(queries, b.rows), used[a.rows]
        assert b.labels is not None
        found = measure(name, a, b, kinds)
        if not classes:
            classes = {"feature": kinds[0]} | per_class(found, b.labels, bank.classes)
        signs[name] = indicators(b.cls)
        if model.num_prefix_tokens:
            x = load_batch(queries, data, model.img_size, VIEW_IMAGES, strict=False, resizing=resizing)
            x = x.to(where)
            with torch.inference_mode():
                attention = model.get_attention(normalize(x, data.mean, data.std, model.in_chans))
            signs[name]["attention_entropy"] = attention_entropy(attention)
        log.debug("%s: %s", name, ", ".join(f"{m} {rows[-len(kinds)][m]:.1%}" for m in settings["metrics"]))
    a, b = (raw_pixels(s, data, encoder.img_size, resizing=resizing) for s in (bank, queries))
    used = used[a.rows]
    measure(PIXELS, a, b, ["pixels"])
    left = [t[torch.isin(t, used)] for t in taken]
    fewest_left = min(map(len, left), default=len(bank))
    result: dict[str, Any] = {
        "format": FORMAT,
        "key": key,
        "path": str(path),
        "step": meta.get("step"),
        **settings,
        "images": hashes,
        "img_size": list(encoder.img_size),
        "resized": str(resizing),
        "counts": {"train": fewest_left, "test": len(queries), "classes": len(bank.classes)}
        | ({"left_out": left_out} if left_out else {}),
        "rows": rows,
        "gain": {
            feature: {m: rows[i][m] - rows[i + len(kinds)][m] for m in settings["metrics"]}
            for i, feature in enumerate(kinds)
        },
        "per_class": classes,
        **(
            {"labeled": {"of": available, "rows": [" ".join(map(str, t.tolist())) for t in left]}}
            if taken
            else {}
        ),
        "indicators": signs,
        "warnings": same + _result_warnings(rows, signs, len(queries), encoder.embed_dim),
        "seconds": round(time.monotonic() - started, 1),
    }
    for line in result["warnings"]:
        log.warning("%s", line)
    if out is not None:
        keep_result(out, result)
    return result


def _classes_without(test: ImageSource, train: ImageSource) -> list[str]:
    """A warning (or none) that training images have classes which no test image has."""
    lacking = [c for c in train.classes if c not in set(test.classes)] if test.labels is not None else []
    if not lacking or len(lacking) == len(train.classes):
        return []
    names = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
    return [
        f"{test.name}: no test images of {counted(len(lacking), 'class')} of {len(train.classes)} in {train.name}: "
        f"{names}; accuracies are of the others"
    ]


def _kinds(features: Features, kinds: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """The feature matrices of each kind; raw pixels are all in `cls`."""
    cls, mean = features.cls.to(device), features.mean.to(device)
    return {k: mean if k == MEAN else torch.cat([cls, mean], 1) if k == BOTH else cls for k in kinds}


def _predict(
    train: Mapping[str, Tensor],
    train_y: Tensor,
    test: Mapping[str, Tensor],
    test_y: Tensor,
    settings: dict[str, Any],
    seed: int,
    rows: Tensor,
) -> dict[str, dict[str, Probed]]:
    """For each kind of features what each metric says of the test images, learned from these rows."""
    out: dict[str, dict[str, Probed]] = {kind: {} for kind in train}
    if len(rows) < len(train_y):
        train, train_y = {kind: x[rows.to(x.device)] for kind, x in train.items()}, train_y[rows]
    if "knn" in settings["metrics"]:
        for kind, x in train.items():
            found = knn_predictions(x, train_y, test[kind], test_y, settings["k"], settings["temperature"])
            out[kind]["knn"] = Probed(found)
    if "probe" in settings["metrics"]:
        protocol = settings.get("protocol", "paper")
        for kind, probed in probe(protocol, train, train_y, test, test_y, seed).items():
            out[kind]["probe"] = probed
    return out


def _row(found: Sequence[Mapping[str, Probed]], truth: Tensor) -> dict[str, Any]:
    """Accuracies of one kind of features, `found` for each seed."""
    values = {m: [accuracy(f[m].predicted, truth) for f in found] for m in found[0]}
    row: dict[str, Any] = {m: statistics.fmean(v) for m, v in values.items()}
    if len(found) > 1:
        row["spread"] = {m: statistics.stdev(v) for m, v in values.items()}
    probed = [f["probe"] for f in found if "probe" in f]
    if probed and probed[0].chosen is not None:
        row["chosen"] = [p.chosen for p in probed]
        if all(p.validation is not None for p in probed):
            row["validation"] = statistics.fmean(p.validation for p in probed if p.validation is not None)
    return row


def _result_warnings(
    rows: list[dict[str, Any]], signs: dict[str, dict[str, float]], images: int, dim: int
) -> list[str]:
    # the online rules, with the random encoder in the place of step 0
    history = []
    for name in (RANDOM, PRETRAINED):
        record: dict[str, Any] = {f"teacher_{n}": signs[name][n] for n in ("std", "rank", "cosine")}
        record |= {"images": images, "dim": dim, "attention_entropy": signs[name].get("attention_entropy")}
        knn_of = {row["feature"]: row.get("knn") for row in rows if row["encoder"] == name}
        record |= {"knn_cls": knn_of.get(CLS), "knn_mean": knn_of[MEAN]}
        history.append(record)
    return collapse_warnings(history)
