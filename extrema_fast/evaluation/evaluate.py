"""Evaluation of an encoder, always next to a random encoder and raw pixels.

k-NN and the probe read the same features, after the final norm: the paper's probe takes the class token before it and
standardizes each dimension, and the final LayerNorm differs from that by one factor per image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, DataConfig, EvalConfig, from_dict
from ..data.augment import normalize
from ..data.image_files import read_as
from ..data.sources import BUILT_IN, is_there, open_source, split_folders, subset
from ..distributed import pick_device
from ..errors import StorageError, UsageError
from ..files import no_links, read_json, write_file
from ..models.encoder import Encoder, build_encoder
from ..weights import load as convert
from .collapse import collapse_warnings
from .features import Features, extract, labelled, load_batch, overlap, raw_pixels
from .probes import accuracy, attention_entropy, indicators, knn_predictions, probe_predictions
from .result import CLS, MEAN, PIXELS, PRETRAINED, RANDOM, is_result, per_class

log = logging.getLogger(__name__)

# part of the cache key of a stored result: raised when a number changes its meaning
FORMAT = 1
# test images whose attention is measured
VIEW_IMAGES = 256


def run_config(path: str | Path) -> Config | None:
    """The configuration of a run folder, or None when `path` is not one.

    Images that a relative path does not find from here are looked for where the run was started, and beside the run.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        return None
    data = read_json(path / "config.json")
    data = data.get("config", data)
    # a weights folder has a config.json too, of another kind
    if not ("train" in data and "optim" in data):
        return None
    cfg = from_dict(data, recorded=True)
    started = read_json(path / "env.json", {}).get("cwd")
    folders = [Path(started)] if isinstance(started, str) else []
    folders += path.resolve().parents
    train, test = _found(cfg.data.train, folders), _found(cfg.data.test, folders)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, train=train, test=test))


def _found(spec: str, folders: Sequence[Path]) -> str:
    """`spec`, or where its relative path exists below one of the folders."""
    if not spec or spec in BUILT_IN or Path(spec).expanduser().is_absolute() or is_there(spec):
        return spec
    return next((str(f / spec) for f in folders if is_there(str(f / spec))), spec)


def resolve_data(
    cfg: Config | None, train: str | None, test: str | None
) -> tuple[tuple[str, float], tuple[str, float]]:
    """(training images, share held out), (test images, the same) to evaluate on: what was given, else the run's own.

    A folder given as `train` alone may hold both (`train` and `test` or `val`); else the run's share of it is held out.

    Raises:
        UsageError: Says what to add.
    """
    holdout = 0.0 if cfg is None or (train and test) else cfg.data.holdout
    if train is None and cfg is not None:
        train, test = cfg.data.train, test or cfg.data.test or None
    if train is None:
        raise UsageError("no images to evaluate on: these weights are not a run folder; add --data FOLDER")
    if test is None and train not in BUILT_IN:
        below, found = split_folders(train)
        if found:
            return (below, 0.0), (found, 0.0)
        if not holdout:
            raise UsageError(
                f"{train}: no test images; give a folder that holds train/ and test/ (or val/), or both: "
                "--train FOLDER --test FOLDER"
            )
    return (train, holdout), (test or train, 0.0 if test else holdout)


def weights_hash(encoder: Encoder) -> str:
    """Short hash over names and values of an encoder's tensors, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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
    seed: int = 0,
    batch_size: int | None = None,
    crop_pct: float | None = None,
    device: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """k-NN and linear probe of an encoder, of its own random initialization, and of raw pixels.

    Args:
        path: Run folder, weights folder or released `.pth`.
        train: Training images; None: those of the run. One folder that holds train/ and test/ is enough.
        test: Test images; None: those of the run.
        out: Result file (JSON); None: in a run folder `reports/evaluation.json`, or with other images or settings
            than the run's `reports/evaluation-KEY.json`; else none.
        which: `teacher` or `student`.
        metrics: Any of `knn`, `probe`.
        max_train: Training images used (0: all).
        max_test: Test images used (0: all).
        k: Neighbors of k-NN, at most as many as training images; None: the run's.
        temperature: Of k-NN's votes; None: the run's.
        seed: Of the subsets and the probe's order and weights.
        batch_size: Images per forward pass; None: the run's.
        crop_pct: As of `Encoder.preprocess`; None: that of the weights.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        force: Compute although the file holds this result.

    Images that cannot be decoded are left out; `counts` and the log say how many.

    Returns:
        Plain data: rows (encoder, feature, knn and probe as shares), gain over random init, `per_class` of the first
        row, indicators, warnings, counts, and the settings. The file also holds a key over weights, images and
        settings: an unchanged second call returns what it holds.

    Raises:
        UsageError: Missing labels, a single class, classes that do not match, unusable paths.
        NonFiniteError: Diverged weights.
        DataError: None of the images can be read.
        StorageError: `out` cannot be written; its `result` is what would have been returned.
    """
    wrong = [m for m in metrics if m not in ("knn", "probe")]
    if wrong or not metrics:
        raise UsageError(f"metrics: expected some of knn, probe, got {list(metrics)}")
    for name, value, low in (
        ("k", k, 1),
        ("batch_size", batch_size, 1),
        ("max_train", max_train, 0),
        ("max_test", max_test, 0),
    ):
        if value is not None and value < low:
            raise UsageError(f"{name}: expected at least {low}, got {value}")
    if temperature is not None and not temperature > 0:
        raise UsageError(f"temperature: expected a number above 0, got {temperature}")
    where = pick_device(device)
    path = Path(path)
    cfg = run_config(path)
    rule = cfg.eval if cfg is not None else EvalConfig()
    encoder = convert.load_encoder(path, which=which)
    resizing = encoder.resizing(crop_pct)
    released = path.is_file() and path.suffix != ".safetensors"
    meta = {} if released else convert.load_metadata(path)
    data = dataclasses.replace(
        cfg.data if cfg is not None else DataConfig(), mean=encoder.mean, std=encoder.std
    )
    if encoder.value_range:
        data = dataclasses.replace(data, range=encoder.value_range)
    # what evaluation.json of a run holds: the result of `evaluate RUN`
    plain = all(x is None for x in (train, test, k, temperature, crop_pct)) and which == "teacher"
    (train, rest), (test, held) = resolve_data(cfg, train, test)
    try:
        bank = open_source(train, "train", limit=max_train, seed=seed, holdout=rest)
        queries = labelled(bank, open_source(test, "test", limit=max_test, seed=seed, holdout=held))
        bank, queries = (read_as(s, encoder.in_chans) for s in (bank, queries))
    except UsageError as error:
        if plain and "does not exist" in str(error):
            error = UsageError(f"{path} was trained on images that are gone; name them with --data: {error}")
        raise error from None
    plain &= not (0 < max_train <= len(bank) or 0 < max_test <= len(queries))
    if len(bank.classes) < 2:
        raise UsageError(
            f"{bank.name}: all {len(bank)} training images are of one class ({bank.classes[0]}); k-NN and the "
            "linear probe need at least two: give the folder that holds the class folders"
        )
    if k is not None and k > len(bank):
        raise UsageError(
            f"k: {k} neighbors, but there are {len(bank)} training images; use at most {len(bank)}"
        )
    same = overlap(bank, queries, seed)
    settings: dict[str, Any] = {
        "which": which,
        "metrics": sorted(metrics),
        "k": k or rule.k,
        "temperature": temperature or rule.temperature,
        "seed": seed,
        "train": train,
        "test": test,
        "mean": list(data.mean),
        "std": list(data.std),
    }
    if rest or held:
        settings["holdout"] = rest or held
    if not resizing.keep_exact:
        # so that results of older versions keep their key
        settings |= {"crop_pct": resizing.crop_pct, "interpolation": resizing.interpolation}
    if encoder.value_range:
        settings["range"] = list(encoder.value_range)
    images = [bank.fingerprint, queries.fingerprint, list(encoder.img_size)]
    parts = json.dumps([FORMAT, settings, weights_hash(encoder), *images], sort_keys=True)
    key = hashlib.sha256(parts.encode()).hexdigest()[:16]
    if out is None and cfg is not None and len(set(metrics)) == 2:
        no_links(path, ["reports"], str(path))
        out = path / "reports" / ("evaluation.json" if plain else f"evaluation-{key}.json")
        if not plain:
            log.info("other images or settings than the run's: the result goes to %s", out)
    if out is not None and not force:
        known = read_json(Path(out), {})
        # results of older versions have no classes
        if known.get("key") == key and is_result(known) and "per_class" in known:
            log.info("%s: weights, images and settings are unchanged, nothing to compute", out)
            return known

    started = time.monotonic()
    log.debug("images are %s; --crop-pct sets it", resizing)
    # without a class head the pooled feature is the mean of the patches
    fields = {CLS: "cls", MEAN: "mean"} if encoder.num_prefix_tokens else {MEAN: "mean"}
    rows: list[dict[str, Any]] = []
    signs: dict[str, dict[str, float]] = {}
    left_out = 0
    classes: dict[str, Any] = {}
    for name in (PRETRAINED, RANDOM):
        model = encoder if name == PRETRAINED else build_encoder(encoder.config, int(meta.get("seed", 0)))
        # without drop-path, which would draw from a global generator
        model.eval()
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
        bank, queries = subset(bank, a.rows), subset(queries, b.rows)
        assert b.labels is not None
        for feature, field in fields.items():
            found = _predict(a, b, field, settings, where)
            rows.append({"encoder": name, "feature": feature} | _accuracies(found, b))
            if not classes:
                classes = {"feature": feature} | per_class(found, b.labels, bank.classes)
        signs[name] = indicators(b.cls)
        if model.num_prefix_tokens:
            x = load_batch(queries, data, model.img_size, VIEW_IMAGES, strict=False, resizing=resizing)
            x = x.to(where)
            with torch.inference_mode():
                attention = model.get_attention(normalize(x, data.mean, data.std, model.in_chans))
            signs[name]["attention_entropy"] = attention_entropy(attention)
        log.debug("%s: %s", name, ", ".join(f"{m} {rows[-len(fields)][m]:.1%}" for m in settings["metrics"]))
    a, b = (raw_pixels(s, data, encoder.img_size, resizing=resizing) for s in (bank, queries))
    found = _predict(a, b, "cls", settings, where)
    rows.append({"encoder": PIXELS, "feature": "pixels"} | _accuracies(found, b))
    result: dict[str, Any] = {
        "format": FORMAT,
        "key": key,
        "path": str(path),
        "step": meta.get("step"),
        **settings,
        "img_size": list(encoder.img_size),
        "resized": str(resizing),
        "counts": {"train": len(bank), "test": len(queries), "classes": len(bank.classes)}
        | ({"left_out": left_out} if left_out else {}),
        "rows": rows,
        "gain": {
            feature: {m: rows[i][m] - rows[i + len(fields)][m] for m in settings["metrics"]}
            for i, feature in enumerate(fields)
        },
        "per_class": classes,
        "indicators": signs,
        "warnings": same + _result_warnings(rows, signs, len(queries), encoder.embed_dim),
        "seconds": round(time.monotonic() - started, 1),
    }
    for line in result["warnings"]:
        log.warning("%s", line)
    if out is not None:
        try:
            write_file(Path(out), json.dumps(result, indent=1) + "\n")
        except OSError as error:
            failed = StorageError(f"{out}: cannot be written ({error.strerror or error}); nothing was kept")
            failed.result = result
            raise failed from None
    return result


def _predict(
    train: Features, test: Features, field: str, settings: dict[str, Any], device: torch.device
) -> dict[str, Tensor]:
    """The class that each metric gives each test image."""
    assert train.labels is not None and test.labels is not None
    a, b = getattr(train, field).to(device), getattr(test, field).to(device)
    out: dict[str, Tensor] = {}
    if "knn" in settings["metrics"]:
        out["knn"] = knn_predictions(a, train.labels, b, test.labels, settings["k"], settings["temperature"])
    if "probe" in settings["metrics"]:
        out["probe"] = probe_predictions(a, train.labels, b, test.labels, seed=settings["seed"])
    return out


def _accuracies(predicted: dict[str, Tensor], test: Features) -> dict[str, float]:
    assert test.labels is not None
    return {metric: accuracy(p, test.labels) for metric, p in predicted.items()}


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
