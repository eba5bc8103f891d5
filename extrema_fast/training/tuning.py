"""The state of a fine-tuning run: configuration from weights, images, random parameters, gradients, test and weights.

The loop, checkpoints, log and processes are those of pretraining (`train.py`).
"""

from __future__ import annotations

import json
import logging
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import FINETUNE_PRESETS, Config, FinetuneConfig, did_you_mean, from_dict, local_batch
from ..data.augment import normalize
from ..data.image_files import deep_range
from ..data.image_source import match_classes
from ..data.loader import Batch
from ..data.order import epoch_length
from ..data.prefetch import prefetch
from ..data.regularize import augmented, load_rand_augment, mix, mix_params, soft_labels
from ..data.sources import ImageSource
from ..distributed import World
from ..errors import UsageError, counted
from ..evaluation.classification import classify, describe, format_classes
from ..evaluation.features import cap
from ..files import read_json, write_file
from ..models.classifier import Classifier
from ..models.drop_path import drop_path_scale
from ..ops.scope import scope
from ..weights.folder import SINGLE, WHICH, method_tensors, model_config, weights_meta, write_folder
from ..weights.initial import FRESH, KEPT, fill_trunk
from ..weights.load import open_weights
from . import resolve
from . import run as runs
from .checkpoint import not_finite, step_folders, weights_of
from .run import Run

log = logging.getLogger(__name__)

# random weights in the place of a path
NONE = "none"
# in a run folder
RESULT = Path("reports/classification.json")


# ---- configuration and images ---------------------------------------------------------------------


def begin_config(
    weights: str | Path, preset: str = "small", out: str | Path | None = None, heads: int | None = None
) -> FinetuneConfig:
    """The preset with architecture, channels, mean and standard deviation of `weights`; `none`: the preset's own.

    Args:
        weights: anything that `load_encoder` reads.
        preset: name in `config.FINETUNE_PRESETS`.
        out: run folder; weights that are gone are those that the run in it was begun with.
        heads: as `num_heads` of `load_encoder`.

    Raises:
        UsageError: no such preset, or nothing that can be read as weights.
    """
    name = str(preset)
    if name not in FINETUNE_PRESETS:
        raise UsageError(f"unknown preset {name!r}{did_you_mean(name, list(FINETUNE_PRESETS))}")
    base = FINETUNE_PRESETS[name]()
    path = str(weights)
    if path == NONE:
        return replace(base, tune=replace(base.tune, weights=NONE))
    recorded = read_json(Path(out or base.out) / "config.json", {})
    begun = recorded.get("tune")
    if not Path(path).exists() and isinstance(begun, dict) and begun.get("weights") == path:
        cfg = from_dict(recorded, base, recorded=True)
        assert isinstance(cfg, FinetuneConfig)
        model, data = cfg.model, {k: getattr(cfg.data, k) for k in ("mean", "std", "range")}
    else:
        meta = open_weights(path, num_heads=heads).meta
        model = model_config(meta)
        data = {k: tuple(v) for k, v in meta.get("data", {}).items() if k in ("mean", "std", "range") and v}
    model = replace(model, drop_path=base.model.drop_path, layer_scale=model.layer_scale or 0.1)
    return replace(base, model=model, data=replace(base.data, **data), tune=replace(base.tune, weights=path))


def open_train(cfg: Config) -> ImageSource:
    """The training images.

    Raises:
        UsageError: none are named, they have no labels, or all the same; or a batch that cannot be mixed.
    """
    cfg = cast(FinetuneConfig, cfg)
    if not cfg.data.train:
        raise UsageError("data.train: no images; give --data FOLDER (with train/ and test/), or --data.train")
    source = runs.open_train(cfg)
    if source.labels is None:
        raise UsageError(
            f"data.train {source.name}: images without labels, which fine-tuning needs; give a folder with one "
            "sub-folder per class, or a list file with 'path<tab>label' lines"
        )
    if len(source.labels.unique()) < 2:
        raise UsageError(
            f"data.train {source.name}: all {len(source)} images are of one class "
            f"({source.classes[int(source.labels[0])]}); give the folder that holds the class folders"
        )
    if cfg.tune.rand_augment:
        # what cannot be is told before anything is written
        if cfg.model.read_chans != 3:
            raise UsageError(
                f"tune.rand_augment: is made for RGB, these images have {cfg.model.read_chans} channels; "
                "--tune.rand-augment ''"
            )
        load_rand_augment(cfg.tune.rand_augment, cfg.data.mean, cfg.model.img_size)
    return source


def check_pairs(cfg: FinetuneConfig, processes: int) -> None:
    """Raises UsageError where mixup or cutmix leaves an image of a micro-batch without a partner."""
    images = local_batch(cfg, processes)
    if (cfg.tune.mixup or cfg.tune.cutmix) and images % 2:
        raise UsageError(
            f"train.batch_size: mixup and cutmix pair the images of a micro-batch, which has {images}; use an even "
            "number, or --tune.mixup 0 --tune.cutmix 0"
        )


def open_test(cfg: Config, train: ImageSource) -> ImageSource | None:
    """The test images, labels numbered as in `train`; None: there are none, or evaluations are switched off.

    Raises:
        UsageError: images without labels, or other classes than those of `train`, by name.
    """
    source = runs.open_test(cfg, train)
    if source is None:
        if cfg.eval.every_epochs:
            log.warning("no test images (data.test, data.holdout): the accuracy is not measured")
        return None
    if source.labels is None:
        raise UsageError(
            f"data.test {source.name}: images without labels, which the test needs; give a folder with one sub-folder "
            "per class, a list file with labels, or --data.test '' for no test"
        )
    # one name in two Unicode forms is one class
    own, other = ({unicodedata.normalize("NFC", c) for c in x.classes} for x in (train, source))
    # a class of one image has none to hold out
    missing = set() if cfg.data.holdout else own - other
    differ = [
        f"only in {where}: {', '.join(sorted(names)[:5])}{' ...' * (len(names) > 5)}"
        for where, names in ((train.name, missing), (source.name, other - own))
        if names
    ]
    if differ:
        raise UsageError(
            f"data.test {source.name}: its classes are not those of data.train ({'; '.join(differ)}); give both the "
            "same classes"
        )
    return match_classes(source, train)


# ---- the run --------------------------------------------------------------------------------------


def build(cfg: Config, world: World, source: ImageSource, *, continued: bool = False) -> Run:
    """A fine-tuning at step 0, with random weights (`begin`); arguments and errors as of `run.build`."""
    tuned = cast(FinetuneConfig, cfg)
    check_pairs(tuned, world.size)
    run = runs.build(cfg, world, source, continued=continued, make=lambda c: Classifier(c, source.classes))
    run.gradients, run.export = gradients, export
    return run


def begin(run: Run, overwrite: bool) -> None:
    """Fills the trunk from `tune.weights`, at step 0; nothing where the run has a checkpoint."""
    cfg, method = cast(FinetuneConfig, run.cfg), cast(Classifier, run.method)
    if not overwrite and step_folders(Path(cfg.out) / "checkpoints"):
        return
    path = cfg.tune.weights
    head = f"{FRESH}: {counted(len(run.source.classes), 'class')}"
    if path == NONE:
        run.began_from = {"weights": "random weights", "trunk": FRESH, "head": head}
        return
    parts = fill_trunk(method.student, path, cfg.tune.which, option=path)
    if cfg.tune.pool == "mean":
        # an Identity has nothing to keep
        parts = {k: v for k, v in parts.items() if k not in ("final norm", "pooling")}
    elif parts["pooling"] != KEPT:
        parts["pooling"] = "random weights"
    run.began_from = {"weights": path, **parts, "head": head}
    if name := not_finite(method.state_dict()):
        raise UsageError(f"{path}: {name} is not finite; use weights of an earlier step")
    method.follow()


class Labeled(NamedTuple):
    """Images of one forward and backward pass, with labels and random parameters, all on the device."""

    images: Tensor
    """[b, H, W, C] uint8"""
    labels: Tensor
    """[b] int64"""
    mixing: Tensor | None
    """[b, 6] as of `mix_params`"""
    drop_path: Tensor | None
    """[L, 2, b] drop-path factors; None without"""


def draw(cfg: FinetuneConfig, known: Tensor, images: Tensor, index: Tensor, epoch: int) -> list[Labeled]:
    """The micro-batches of one process's images, as `draw.draw` makes them; known: [n] labels of all rows."""
    keys = {"seed": cfg.train.seed, "epoch": epoch}
    size = len(index) // cfg.train.accumulation
    rows, labels = (x.to(images.device, non_blocking=images.is_cuda) for x in (index, known[index]))
    parts = (x.split(size) for x in (images, rows, labels))
    return [
        Labeled(
            some_images,
            some_labels,
            mix_params(some, cfg.tune.mixup, cfg.tune.cutmix, cfg.model.img_size, **keys),
            drop_path_scale(some, 1, cfg.model.shape[1], cfg.model.drop_path, **keys),
        )
        for some_images, some, some_labels in zip(*parts, strict=True)
    ]


def batches(run: Run, loader: Iterable[Batch]) -> Iterator[Batch]:
    """As `step.batches`."""
    cfg, labels = cast(FinetuneConfig, run.cfg), run.source.labels
    assert labels is not None
    return prefetch(augmented(loader, cfg), partial(draw, cfg, labels), run.world.device)


def gradients(run: Run, micro_batches: list[Labeled]) -> Tensor:
    """Adds the gradients of all micro-batches; returns the loss, a detached scalar."""
    cfg, count = cast(FinetuneConfig, run.cfg), len(micro_batches)
    data, classes = cfg.data, len(run.source.classes)
    total = torch.zeros((), device=run.world.device)
    for i, m in enumerate(micro_batches):
        with scope("augment"):
            images = mix(normalize(m.images, data.mean, data.std, cfg.model.in_chans), m.mixing)
            targets = soft_labels(m.labels, classes, cfg.tune.smoothing, m.mixing)
        with run.world.no_sync_unless(i + 1 == count, run.student):
            with run.resolved.autocast():
                logits = run.student(images, m.drop_path)
            with scope("loss"):
                loss = F.cross_entropy(logits.float(), targets) / count
            loss.backward()
        total += loss.detach()
    return total


def evaluate(run: Run, method: Any, test: ImageSource | None) -> dict[str, float | int]:
    """Accuracy and loss on test images: at most `eval.max_test` of them, at the end all; then a file has the rest."""
    cfg, encoder = run.cfg, method.teacher
    if test is None:
        return {}
    source = test if run.last else cap(test, cfg.eval.max_test, cfg.train.seed)
    options: dict[str, Any] = {
        "batch_size": cfg.eval.batch_size,
        "device": run.world.device,
        "told": run.told,
    }
    found = classify(encoder, source, cfg.data, **options)
    if run.last:
        result = describe(found, run.source.classes, run.step)
        write_file(Path(cfg.out) / RESULT, json.dumps(result, indent=1) + "\n")
    return {"accuracy": found.accuracy, "test_loss": found.loss, "images": len(found.labels)}


def export(run: Run, step: int, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Writes the encoder with its head; with an average that as the teacher, beside what is trained."""
    cfg, encoder, weights = run.cfg, run.method.teacher, weights_of(tensors)
    meta = weights_meta(cfg, step, encoder.crop_pct, deep_range(run.source, cfg.data))
    del meta["head"]
    meta["encoder"] = {
        "num_classes": encoder.num_classes,
        "global_pool": encoder.global_pool,
        "fc_norm": encoder.global_pool == "avg",
        "pos_embed": "learned",
    }
    meta["classes"] = encoder.classes
    meta["finetuned"] = {"weights": cast(FinetuneConfig, cfg).tune.weights}
    networks = {which: method_tensors(weights, which) for which in WHICH}
    if not networks["teacher"]:
        networks = {SINGLE: networks["student"]}
    return write_folder(folder, meta, networks)


# ---- what is told ---------------------------------------------------------------------------------


def headline(run: Run) -> str:
    """What is trained, on what, and how, in three lines."""
    cfg, images = cast(FinetuneConfig, run.cfg), epoch_length(run.source)
    t = cfg.tune
    pooled = "mean of the patch tokens" if t.pool == "mean" else "class token"
    extras = {
        "mixup": t.mixup,
        "cutmix": t.cutmix,
        "smoothing": t.smoothing,
        "erasing": t.erasing,
        "drop-path": cfg.model.drop_path,
        "average": t.ema,
    }
    what = ", ".join([*filter(None, [t.rand_augment]), *(f"{k} {v:g}" for k, v in extras.items() if v)])
    what = f"{pooled} of {cfg.model.num_patches}, layer decay {t.layer_decay:g}; {what or 'crops and flips alone'}"
    return resolve.headline(cfg, run.resolved, run.world.size, images, run.source.classes, what)


def next_command(cfg: Config) -> str:
    """What to do with a complete fine-tuning, and what came out of it."""
    result = read_json(Path(cfg.out) / RESULT, {})
    table = f"{format_classes(result)}\n" if result else ""
    return (
        f"{table}next, in Python: classifier = extrema_fast.load_encoder({str(cfg.out)!r}); logits = "
        f"classifier(images); on the command line: extrema-fast report {shlex.quote(str(cfg.out))}"
    )
