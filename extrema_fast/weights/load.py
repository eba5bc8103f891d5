"""Loads encoders from run folders, weights folders, single files, exports and released ExtreMA checkpoints.

The content of a path decides what it is, not its name. Nothing is unpickled: files are read as safetensors, or with
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import UsageError
from ..files import new_folder
from ..models.encoder import Encoder, build_encoder
from ..models.positions import adapt_in_chans
from .folder import (
    INDEX,
    SINGLE,
    WHICH,
    check_replaceable,
    encoder_options,
    is_of_another_program,
    is_own,
    model_config,
    networks_in,
    on_cpu,
    own_description,
    read_description,
    read_safetensors,
    weights_folder,
    write_folder,
)
from .foreign import FILES, Described, read_folder
from .released import (
    check_architecture,
    first,
    is_projector,
    is_sincos,
    own_names,
    read_checkpoint,
    read_shards,
)

log = logging.getLogger(__name__)


class Weights(NamedTuple):
    """The content of a path: its description, and the file or tensors of each network."""

    path: Path
    meta: dict[str, Any]
    networks: Mapping[str, Path | dict[str, Tensor]]
    prefixes: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({})
    """class token and other prefix tokens of another project's networks, which are left out (`foreign.Trunk`)"""

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a network, under our names."""
        found = self.networks[name]
        return own_names(_read_file(found)) if isinstance(found, Path) else found

    def choose(self, which: str | None) -> str:
        """The name of the network for `which`; None: the one that the description names, else the teacher.

        A network not known to be either (a bare file, a fine-tuned one) is returned for any name.
        """
        if which is not None and which not in WHICH:
            raise UsageError(f"which: expected 'teacher' or 'student', got {which!r}")
        described = self.meta.get("which")
        meant = which or (described if described in WHICH else "teacher")
        for name in (meant, SINGLE):
            if name in self.networks:
                return name
        raise UsageError(f"{self.path}: has no {meant} weights; it has: {', '.join(self.networks)}")


@on_cpu
def open_weights(
    path: str | Path,
    grid: Sequence[int] | None = None,
    num_heads: int | None = None,
    assumed: Described | None = None,
    which: str | None = None,
    registers: bool = False,
) -> Weights:
    """Reads what `path` contains; arguments and errors as in `load_encoder`, `assumed` as in `read_checkpoint`.

    With `which`, only that one of another project's two networks is read. With `registers`, a trunk may have register
    tokens, which are returned in `prefixes`.
    """
    path = Path(path)
    if grid is not None:
        if len(grid) != 2 or not all(isinstance(g, int) and g > 0 for g in grid):
            raise UsageError(f"grid: expected (rows, columns) of patches, got {grid!r}")
        grid = (grid[0], grid[1])
    read = partial(
        read_checkpoint, grid=grid, num_heads=num_heads, assumed=assumed, which=which, registers=registers
    )
    try:
        if path.is_file():
            folder = path.parent
            networks = {name: file for name, file in networks_in(folder).items() if file.name == path.name}
            if not networks or not is_own(own_description(folder, {})):
                theirs = read_folder(folder) if path.name in FILES else None
                return Weights(path, *read(path, described=theirs))
        else:
            file = next((path / name for name in FILES if (path / name).is_file()), None)
            if file and not is_own(own_description(path, {})) and (theirs := read_folder(path)):
                return Weights(path, *read(file, described=theirs))
            folder = weights_folder(path)
            networks = networks_in(folder)
        meta = read_description(folder)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    model = model_config(meta)
    if grid is not None and grid != model.grid:
        raise UsageError(
            f"grid: {grid[0]} x {grid[1]} patches, but {folder} has {model.grid[0]} x {model.grid[1]}; "
            "for another image size give img_size"
        )
    if num_heads is not None:
        if num_heads < 1 or model.shape[0] % num_heads:
            raise UsageError(f"num_heads: {num_heads} does not divide the width {model.shape[0]}")
        meta = {**meta, "model": {**meta["model"], "heads": num_heads}}
    said = meta.get("which")
    files = {said if n not in WHICH and said in WHICH else n: file for n, file in networks.items()}
    if len(files) == 1 and is_of_another_program(folder):
        name, file = next(iter(files.items()))
        tensors = {k.removeprefix("timm_model."): v for k, v in _read_file(file).items()}
        return Weights(path, {**meta, "encoder": _as_trained_on(meta, tensors)}, {name: own_names(tensors)})
    return Weights(path, meta, files)


def _read_file(file: Path) -> dict[str, Tensor]:
    return read_shards(file) if file.name.endswith(INDEX) else read_safetensors(file)


def _as_trained_on(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The encoder options of an export that timm or Hugging Face may have trained further.

    They may have replaced the classifier; in a stock ViT the position table is a parameter.
    """
    options, model = encoder_options(meta), model_config(meta)
    head, table = tensors.get("head.weight"), tensors.get("pos_embed")
    options["num_classes"] = 0 if head is None else head.shape[0]
    stock = meta.get("export", {}).get("format") in ("vit", "hf") and options["global_pool"] == "avg"
    stock &= options["pos_embed"] == "sincos"
    if stock and table is not None and table.shape == (1, model.num_patches, model.shape[0]):
        trained = tuple(options["pos_grid"] or model.grid) if options["pos_coords"] == "rescaled" else None
        if not is_sincos(table, model.grid, trained):
            options["pos_embed"] = "learned"
    return options


def load_metadata(path: str | Path) -> dict[str, Any]:
    """The description of the weights at `path`, as `load_encoder` reads it; has at least `model`, the architecture."""
    return open_weights(path).meta


# ---- encoders -------------------------------------------------------------------------------------


@on_cpu
def load_encoder(
    path: str | Path | Weights,
    which: str | None = None,
    *,
    num_classes: int | None = None,
    img_size: int | Sequence[int] | None = None,
    in_chans: int | None = None,
    patch_size: int | None = None,
    global_pool: str | None = None,
    fc_norm: bool | None = None,
    pos_embed: str | None = None,
    pos_coords: str | None = None,
    grid: Sequence[int] | None = None,
    num_heads: int | None = None,
    drop_path_rate: float | None = None,
) -> Encoder:
    """Loads a trained encoder, in eval mode on the CPU.

    Args:
        path: A run folder (its newest weights), a weights folder or one of its files, an exported folder, bare encoder
            weights, a released ExtreMA `.pth` (pretraining or fine-tuning), a file or folder of another project's ViT,
            of which the trunk is loaded (`foreign`), or the result of `open_weights`.
        which: 'teacher' (frozen features; of a timm checkpoint the EMA) or 'student' (the start of the paper's
            fine-tuning); default: the teacher, or the only network in the file.
        num_classes: Classes of a new linear head; default: the file's head, unless the pooling changes. The class names
            of a fine-tuned head are in `classes`.
        img_size: Change the image size: a sin-cos table is computed for the new grid, a learned one is resampled.
        in_chans: Change the number of channels: the patch kernel is adapted by timm's rule.
        patch_size: Change the patch side: the patch kernel is resampled (FlexiViT).
        global_pool: As in `create_encoder`; default: the file's.
        fc_norm: As in `create_encoder`; default: the file's.
        pos_embed: As in `create_encoder`; default: the file's.
        pos_coords: As in `create_encoder`; default: the file's.
        grid: (rows, columns) of a learned position table that is not square.
        num_heads: Heads of the trunk, if the file does not say and it is not width / 64.
        drop_path_rate: As in `create_encoder`; default: the file's.

    Raises:
        UsageError: The file is missing, damaged, or not a ViT with a supported trunk (the message says what was found),
            or an option does not fit it.
    """
    weights = path if isinstance(path, Weights) else open_weights(path, grid, num_heads, which=which)
    if weights is not path:
        warn_left_out(weights)
    tensors, source = weights.read(weights.choose(which)), str(weights.path)
    config, saved = model_config(weights.meta), encoder_options(weights.meta)
    if drop_path_rate is not None:
        config = replace(config, drop_path=drop_path_rate)
    requested = {
        "num_classes": num_classes,
        "in_chans": in_chans,
        "global_pool": global_pool,
        "fc_norm": fc_norm,
        "pos_embed": pos_embed,
        "pos_coords": pos_coords,
    }
    options = _options(saved, {k: v for k, v in requested.items() if v is not None}, source)
    encoder = _build(config, saved, options, tensors, source)
    _set_input(encoder, weights.meta)
    names = weights.meta.get("classes", [])
    if num_classes is None and len(names) == encoder.num_classes:
        encoder.classes = list(names)
    if img_size is not None or patch_size is not None:
        encoder.set_input_size(img_size, patch_size)
    return encoder.eval()


def warn_left_out(weights: Weights) -> None:
    """Warns if the features are not those of the original model, since parts of it are left out."""
    if left_out := weights.meta.get("source", {}).get("left_out"):
        log.warning(
            "%s: loads the trunk of another project's ViT without: %s", weights.path, ", ".join(left_out)
        )


def _options(saved: Mapping[str, Any], requested: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The encoder's options: the saved ones, overridden by the requested ones if the weights allow it."""
    options = {**saved, **requested}
    if options["global_pool"] == "token" and saved["global_pool"] == "avg":
        raise UsageError(f"global_pool: {source} has no class head; use 'avg'")
    if "fc_norm" not in requested and options["global_pool"] != "avg":
        options["fc_norm"] = False
    if saved["fc_norm"] and not options["fc_norm"]:
        raise UsageError(f"fc_norm: {source} was trained with a norm after pooling and has no final norm")
    if saved["pos_embed"] == "learned" and options["pos_embed"] == "sincos":
        raise UsageError(f"pos_embed: {source} was trained with a learned table; 'sincos' would discard it")
    if "num_classes" not in requested and not _same_pool(saved, options):
        options["num_classes"] = 0
    return options


def _same_pool(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return (a["global_pool"], a["fc_norm"]) == (b["global_pool"], b["fc_norm"])


def _build(
    config: ModelConfig,
    saved: Mapping[str, Any],
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
) -> Encoder:
    """Builds an encoder with `options` from tensors that were saved with options `saved`."""
    # before allocating anything of the claimed size
    check_architecture(config, saved, {k: tuple(v.shape) for k, v in tensors.items()}, source)
    trained = tuple(saved["pos_grid"] or config.grid)
    state = {k: v for k, v in tensors.items() if not is_projector(k)}
    rescaled = trained if saved["pos_coords"] == "rescaled" else None
    if saved["pos_embed"] == "sincos" and not is_sincos(state["pos_embed"], config.grid, rescaled):
        raise UsageError(
            f"{source}: the position table is not the fixed sin-cos table its description claims"
        )
    kernel = "patch_embed.proj.weight"
    state[kernel] = adapt_in_chans(state[kernel].float(), options["in_chans"] or config.in_chans)
    encoder = Encoder(config, **{**options, "pos_grid": trained})
    # rounded in half precision
    exact = options["pos_coords"] == saved["pos_coords"] and state["pos_embed"].element_size() > 2
    if saved["pos_embed"] == "sincos" and not exact:
        state["pos_embed"] = encoder.pos_embed.detach()
    # leave out what this variant does not have
    unused = {
        "head.": saved["num_classes"]
        and not (saved["num_classes"] == options["num_classes"] and _same_pool(saved, options)),
        "norm.": isinstance(encoder.norm, torch.nn.Identity),
        "cls_token": encoder.cls_token is None,
        "blocks_token.": encoder.blocks_token is None,
    }
    prefixes = tuple(prefix for prefix, is_unused in unused.items() if is_unused)
    _fill(encoder, {k: v for k, v in state.items() if not k.startswith(prefixes)}, source)
    return encoder


def _fill(encoder: Encoder, state: Mapping[str, Tensor], source: str) -> None:
    """Loads encoder keys strictly; only a new head or norm may keep its initial values."""
    own = encoder.state_dict()
    both = sorted(state.keys() & own.keys())
    found = {
        "missing": [k for k in own if k not in state and not k.startswith(("head.", "fc_norm."))],
        "unknown": [k for k in state if k not in own],
        "shape": [
            f"{k} {list(state[k].shape)} for {list(own[k].shape)}"
            for k in both
            if state[k].shape != own[k].shape
        ],
    }
    if wrong := "; ".join(f"{name}: {first(keys)}" for name, keys in found.items() if keys):
        raise UsageError(f"{source}: the weights do not fit this architecture ({wrong})")
    encoder.load_state_dict(state, strict=False)


def _set_input(encoder: Encoder, meta: Mapping[str, Any]) -> None:
    """Sets how images are prepared for these weights."""
    if "data" in meta:
        for name in ("mean", "std"):
            values = meta["data"][name]
            if encoder.in_chans not in (1, len(values)):
                # repeated like the patch kernel; gray is computed from colors
                values = (values * encoder.in_chans)[: encoder.in_chans]
            setattr(encoder, name, tuple(values))
        if found := meta["data"].get("range"):
            encoder.value_range = tuple(found)
    for name in ("interpolation", "crop_pct"):
        if name in meta.get("input", {}):
            setattr(encoder, name, meta["input"][name])
    # weights of older versions are evaluated as those versions did
    encoder.keep_exact = is_own(meta) and "crop_mode" not in meta.get("input", {})


@on_cpu
def random_encoder_like(path: str | Path) -> Encoder:
    """The encoder of `path` with the run's own initial weights (seed from its description), in eval mode."""
    weights = open_weights(path)
    config, meta = model_config(weights.meta), weights.meta
    shapes = {k: tuple(v.shape) for k, v in weights.read(next(iter(weights.networks))).items()}
    check_architecture(config, encoder_options(meta), shapes, str(path))
    seed = meta.get("seed", 0)
    encoder = build_encoder(config, seed if type(seed) is int and 0 <= seed < 2**63 else 0)
    _set_input(encoder, meta)
    return encoder.eval()


# ---- folders ----------------------------------------------------------------------------------------


@on_cpu
def import_released(
    file: str | Path,
    out: str | Path,
    *,
    which: str | None = None,
    grid: Sequence[int] | None = None,
    num_heads: int | None = None,
    force: bool = False,
) -> Path:
    """Converts a released ExtreMA checkpoint, bare encoder weights, or another project's trunk into a weights folder.

    Args:
        file: As in `load_encoder`, such as a pretraining or fine-tuning checkpoint or a Hugging Face folder. The
            architecture is inferred from the tensors; optimizer and scaler are dropped.
        out: The new folder.
        which: Keep only `teacher` or `student`; default: all networks in the file, with their training heads.
        grid: As in `load_encoder`, if the tensors do not show it.
        num_heads: As in `load_encoder`, if the tensors do not show it.
        force: Replace an earlier import or export at `out`.

    Returns:
        The folder `out`.

    Raises:
        UsageError: The file is unreadable, incomplete or unsupported, or `out` exists; nothing is written.
        StorageError: `out` cannot be written.
    """
    file, out = Path(file), Path(out)
    check_replaceable(out, force)
    weights = open_weights(file, grid, num_heads, which=which)
    warn_left_out(weights)
    if not file.is_file() and is_own(weights.meta):
        raise UsageError(f"{file}: a run or weights folder needs no import; use `export`")
    names = list(weights.networks) if which is None else [weights.choose(which)]
    networks = {name: weights.read(name) for name in names}
    config, saved = model_config(weights.meta), encoder_options(weights.meta)
    for name, tensors in networks.items():
        # check completeness before writing
        _build(config, saved, saved, tensors, f"{file} ({name})")
        if bad := [k for k, v in tensors.items() if not torch.isfinite(v).all()]:
            raise UsageError(f"{file} ({name}): values that are not finite: {first(bad)}")
    meta = {"source": {"file": file.name}, **weights.meta}
    if len(names) == 1 and names[0] in WHICH:
        meta["which"] = names[0]
    with new_folder(out, partial(check_replaceable, force=force)) as folder:
        write_folder(folder, meta, networks)
    log.info("imported %s: %s; optimizer and scaler state, if any, left out", file.name, " and ".join(names))
    return out
