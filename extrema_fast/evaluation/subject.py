"""The subject of an evaluation: an encoder with its run, the images, and the file for the result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..config import Config, DataConfig, from_dict
from ..data.sources import BUILT_IN, is_there, split_folders
from ..errors import StorageError, UsageError
from ..files import no_links, read_json, write_file
from ..models.encoder import Encoder, build_encoder
from ..weights import load as convert

log = logging.getLogger(__name__)

# part of the cache key of a stored result: raised when a number changes its meaning
FORMAT = 1


class Subject(NamedTuple):
    """Weights to evaluate.

    Attributes:
        path: Run folder, weights folder or file.
        cfg: The run's configuration; None: no run folder.
        encoder: In eval mode.
        meta: What the weights folder says.
        data: How images are read and normalized: as the run does, for the values of the weights.
    """

    path: Path
    cfg: Config | None
    encoder: Encoder
    meta: dict[str, Any]
    data: DataConfig

    def initial(self) -> Encoder:
        """The encoder before training, without drop-path, which would draw from a global generator."""
        return build_encoder(self.encoder.config, int(self.meta.get("seed", 0))).eval()


def open_subject(path: str | Path, which: str = "teacher", img_size: Sequence[int] | None = None) -> Subject:
    """Loads weights and what is known about them; errors are those of `load_encoder`."""
    path = Path(path)
    cfg = run_config(path)
    encoder = convert.load_encoder(path, which=which, img_size=img_size)
    released = path.is_file() and path.suffix != ".safetensors"
    meta = {} if released else convert.load_metadata(path)
    data = dataclasses.replace(
        cfg.data if cfg is not None else DataConfig(), mean=encoder.mean, std=encoder.std
    )
    if encoder.value_range:
        data = dataclasses.replace(data, range=encoder.value_range)
    return Subject(path, cfg, encoder, meta, data)


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


# (training images, share held out), (test images, the same)
Images = tuple[tuple[str, float], tuple[str, float]]


def resolve_data(cfg: Config | None, train: str | None, test: str | None) -> Images:
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


def run_data(cfg: Config | None) -> Images | None:
    """The images that a run is evaluated on by itself; None: not a run, or one without test images."""
    try:
        return None if cfg is None else resolve_data(cfg, None, None)
    except UsageError:
        return None


def same_images(a: Images, b: Images) -> bool:
    """Whether both name the same files, in whatever words."""

    def resolved(spec: str) -> str:
        return spec if spec in BUILT_IN else os.path.realpath(os.path.expanduser(spec))

    return all(resolved(x) == resolved(y) and m == n for (x, m), (y, n) in zip(a, b, strict=True))


def weights_hash(encoder: Encoder) -> str:
    """Short hash over names and values of an encoder's tensors, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- the result's file ------------------------------------------------------------------------------


def result_key(settings: dict[str, Any], encoder: Encoder, *images: Any) -> str:
    """Key over weights, images and settings: a stored result with this key is what would be measured."""
    parts = json.dumps([FORMAT, settings, weights_hash(encoder), *images], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def result_file(run: Path, name: str) -> Path:
    """`reports/NAME` of a run folder; UsageError where that leads out of it."""
    no_links(run, ["reports"], str(run))
    return run / "reports" / name


def known_result(
    out: Path, key: str, makes_sense: Callable[[Any], bool], images: dict[str, str]
) -> dict[str, Any] | None:
    """The result that a file holds, if it has this key and these hashes of images.

    Results of older versions have no hashes and get these.
    """
    known = read_json(out, {})
    if known.get("key") != key or not makes_sense(known):
        return None
    if known.get("images", images) != images:
        log.info("%s: is of other images of the same names and sizes, and is measured again", out)
        return None
    what = ", and the bytes of at most 64 of each set" * ("images" in known)
    log.info(
        "%s: unchanged are weights, settings, names, sizes and labels of images%s; nothing to compute",
        *(out, what),
    )
    if "images" not in known:
        known["images"] = images
        with suppress(StorageError):
            keep_result(out, known)
    return known


def keep_result(out: str | Path, result: dict[str, Any]) -> None:
    """Writes a result; StorageError, which has it, where it cannot be written."""
    try:
        write_file(Path(out), json.dumps(result, indent=1) + "\n")
    except OSError as error:
        failed = StorageError(f"{out}: cannot be written ({error.strerror or error}); nothing was kept")
        failed.result = result
        raise failed from None
