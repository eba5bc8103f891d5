"""Encoders from files: run folders, weights folders, single files, exports, released ExtreMA checkpoints.

What a path holds is told by its content. Nothing is unpickled: safetensors, or
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import UsageError
from ..models.encoder import Encoder, build_encoder
from ..models.resample import adapt_in_chans
from .architecture import check_agrees, first, is_projector, is_sincos
from .files import (
    WHICH,
    choose,
    encoder_options,
    is_described,
    method_tensors,
    model_config,
    networks_in,
    read_description,
    read_tensors,
    save_weights,
    weights_folder,
    weights_meta,
    which_of,
    write_folder,
)
from .new_folder import check_free, new_folder
from .released import own_names, read_checkpoint
from .safe_files import read_safetensors, safetensors_shapes

__all__ = [
    "Opened", "import_released", "load_encoder", "load_metadata", "load_method_weights", "open_weights",
    "random_encoder_like", "read_tensors", "save_weights", "weights_folder", "weights_meta",
]  # fmt: skip

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """A description, the networks there are (`teacher`, `student`, or `model`), and a function that reads one."""

    meta: dict[str, Any]
    names: list[str]
    read: Callable[[str], dict[str, Tensor]]


def open_weights(path: str | Path, grid: Sequence[int] | None = None, num_heads: int | None = None) -> Opened:
    """Finds out what `path` holds; grid and num_heads help where tensors alone do not tell them.

    raises  UsageError for a missing, damaged or unknown file, naming what was found
    """
    path = Path(path)
    grid = None if grid is None else _grid(grid)
    try:
        described = path.is_file() and _described_file(path)
        if path.is_file() and not described:
            meta, networks = read_checkpoint(path, grid, num_heads)
            return Opened(meta, list(networks), networks.__getitem__)
        folder = path.parent if described else weights_folder(path)
        meta = read_description(folder)
        names = [path.stem] if described else networks_in(folder)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    files = {which_of(name, meta): folder / f"{name}.safetensors" for name in names}
    _check_hints(model_config(meta), grid, num_heads, folder)
    if num_heads is not None:
        meta = {**meta, "model": {**meta["model"], "heads": num_heads}}
    return Opened(meta, list(files), lambda name: own_names(read_safetensors(files[name])))


def _grid(grid: Sequence[int]) -> tuple[int, int]:
    if len(grid) != 2 or not all(isinstance(g, int) and g > 0 for g in grid):
        raise UsageError(f"grid: expected (rows, columns) of patches, got {grid!r}")
    return tuple(grid)


def _described_file(path: Path) -> bool:
    return (
        path.suffix == ".safetensors" and path.stem in networks_in(path.parent) and is_described(path.parent)
    )


def _check_hints(
    model: ModelConfig, grid: tuple[int, int] | None, num_heads: int | None, folder: Path
) -> None:
    if grid is not None and grid != model.grid:
        raise UsageError(
            f"grid: {grid[0]} x {grid[1]} patches, but {folder} says {model.grid[0]} x {model.grid[1]}; "
            "for another image size give img_size"
        )
    if num_heads is not None and (num_heads < 1 or model.shape[0] % num_heads):
        raise UsageError(f"num_heads: {num_heads} does not divide the width {model.shape[0]}")


def load_metadata(path: str | Path) -> dict[str, Any]:
    """The description of what `path` holds, as `load_encoder` reads it: `model` (the architecture) at least."""
    return open_weights(path).meta


# ---- encoders -------------------------------------------------------------------------------------


def load_encoder(
    path: str | Path,
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
    """A trained encoder, in eval mode on the CPU.

    path         a run folder (its newest weights), a weights folder or one file of it, an exported folder, bare
                 encoder weights, or a released ExtreMA `.pth` (pretraining or fine-tuning)
    which        'teacher' (frozen features) or 'student' (start of the paper's fine-tuning); default: the
                 teacher, or the one that was kept
    num_classes  a new linear head; default: the file's, where pooling stays as it is there
    img_size     another size than trained: the sin-cos table is computed for the new grid, a learned one is
                 resampled
    in_chans     the patch kernel for other channels, by timm's rule
    patch_size   the patch kernel resampled (FlexiViT)
    global_pool, fc_norm, pos_embed, pos_coords, drop_path_rate
                 as `create_encoder`; default: the file's
    grid         (rows, columns) of the patches of a learned table that is not square
    num_heads    where it is not width / 64, in files that do not say
    raises       UsageError for a missing, damaged or unknown file, naming what was found, and for options that
                 do not fit it
    """
    return encoder_from(
        open_weights(path, grid, num_heads), path, which, img_size=img_size, patch_size=patch_size,
        drop_path_rate=drop_path_rate, num_classes=num_classes, in_chans=in_chans, global_pool=global_pool,
        fc_norm=fc_norm, pos_embed=pos_embed, pos_coords=pos_coords,
    )  # fmt: skip


def encoder_from(
    opened: Opened,
    source: str | Path,
    which: str | None = None,
    *,
    img_size: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    drop_path_rate: float | None = None,
    **asked: Any,
) -> Encoder:
    """`load_encoder` from what is open already; `source` is its name in messages."""
    tensors = opened.read(choose(opened.names, which, source, opened.meta))
    config, own = model_config(opened.meta), encoder_options(opened.meta)
    if drop_path_rate is not None:
        config = replace(config, drop_path=drop_path_rate)
    encoder = _build(config, own, _options(own, str(source), **asked), tensors, str(source))
    _set_input(encoder, opened.meta)
    if img_size is not None or patch_size is not None:
        encoder.set_input_size(img_size, patch_size)
    return encoder.eval()


def _options(own: Mapping[str, Any], source: str, **asked: Any) -> dict[str, Any]:
    """The encoder's options: those asked for over the file's own; checked where the file cannot give them."""
    asked = {k: v for k, v in asked.items() if v is not None}
    wanted = {**own, **asked}
    if wanted["global_pool"] == "token" and own["global_pool"] == "avg":
        raise UsageError(f"global_pool: {source} has no class head; use 'avg'")
    if "fc_norm" not in asked and wanted["global_pool"] != "avg":
        wanted["fc_norm"] = False
    if own["fc_norm"] and not wanted["fc_norm"]:
        raise UsageError(f"fc_norm: {source} was trained with a norm after pooling and has no other")
    if own["pos_embed"] == "learned" and wanted["pos_embed"] == "sincos":
        raise UsageError(f"pos_embed: {source} was trained with a learned table; 'sincos' would lose it")
    if "num_classes" not in asked and not _same_pool(own, wanted):
        wanted["num_classes"] = 0
    return wanted


def _same_pool(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return (a["global_pool"], a["fc_norm"]) == (b["global_pool"], b["fc_norm"])


def _build(
    config: ModelConfig,
    own: Mapping[str, Any],
    wanted: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
) -> Encoder:
    """An encoder with options `wanted`, filled from tensors that were saved with options `own`."""
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    # before anything of the claimed size is allocated
    check_agrees(config, own, shapes, source)
    trained = tuple(own["pos_grid"] or config.grid)
    state = {k: v for k, v in tensors.items() if not is_projector(k)}
    rescaled = trained if own["pos_coords"] == "rescaled" else None
    if own["pos_embed"] == "sincos" and not is_sincos(state["pos_embed"], config.grid, rescaled):
        raise UsageError(f"{source}: the position table is not the fixed sin-cos table it is said to be")
    if own["num_classes"] and (own["num_classes"] != wanted["num_classes"] or not _same_pool(own, wanted)):
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
    state["patch_embed.proj.weight"] = adapt_in_chans(
        state["patch_embed.proj.weight"].float(), wanted["in_chans"] or config.in_chans
    )
    encoder = Encoder(config, **{**wanted, "pos_grid": trained})
    if wanted["pos_coords"] != own["pos_coords"]:
        state["pos_embed"] = encoder.pos_embed.detach()
    _fill(encoder, state, source)
    return encoder


def _fill(encoder: Encoder, state: Mapping[str, Tensor], source: str) -> None:
    """Loads encoder keys strictly; what this variant does not have is left out, a new head or norm stays."""
    own = encoder.state_dict()
    left = ("norm.",) if isinstance(encoder.norm, torch.nn.Identity) else ()
    left += ("cls_token", "blocks_token.") if encoder.blocks_token is None else ()
    state = {k: v for k, v in state.items() if not k.startswith(left)}
    optional = {k for k in own if k.startswith(("head.", "fc_norm."))}
    missing, unknown = sorted(own.keys() - state.keys() - optional), sorted(state.keys() - own.keys())
    wrong = sorted(
        f"{k} {list(state[k].shape)} for {list(own[k].shape)}"
        for k in state.keys() & own.keys()
        if state[k].shape != own[k].shape
    )
    found = {"missing": missing, "unknown": unknown, "shape": wrong}
    if any(found.values()):
        parts = "; ".join(f"{name}: {first(keys)}" for name, keys in found.items() if keys)
        raise UsageError(f"{source}: the weights do not fit this architecture ({parts})")
    encoder.load_state_dict(state, strict=False)


def _set_input(encoder: Encoder, meta: Mapping[str, Any]) -> None:
    """How images are made for these weights."""
    if "data" in meta:
        for name in ("mean", "std"):
            values = meta["data"][name]
            if encoder.in_chans not in (1, len(values)):
                # repeated, as the patch kernel is; gray is made from colours
                values = (values * encoder.in_chans)[: encoder.in_chans]
            setattr(encoder, name, tuple(values))
    for name in ("interpolation", "crop_pct"):
        if name in meta.get("input", {}):
            setattr(encoder, name, meta["input"][name])


def random_encoder_like(path: str | Path) -> Encoder:
    """The encoder of `path` with the run's own initial weights (seed from its metadata), in eval mode."""
    folder = weights_folder(path)
    meta = read_description(folder)
    config, options = model_config(meta), encoder_options(meta)
    file = folder / f"{networks_in(folder)[0]}.safetensors"
    check_agrees(config, options, safetensors_shapes(file), str(folder))
    seed = meta.get("seed", 0)
    encoder = build_encoder(config, seed if type(seed) is int and 0 <= seed < 2**63 else 0)
    _set_input(encoder, meta)
    return encoder.eval()


# ---- whole methods, and folders -------------------------------------------------------------------


def load_method_weights(method: Any, path: str | Path, *, source: str = "--init-from") -> None:
    """Fills an `ExtreMA` from a weights folder, a run folder or a released file; strict.

    raises UsageError when the architecture or the heads differ, or a network is missing
    """
    opened = open_weights(path)
    if missing := [w for w in WHICH if w not in opened.names]:
        raise UsageError(
            f"{source} {path}: holds {' and '.join(opened.names)}, no {' and no '.join(missing)}; "
            "training starts from both with their heads"
        )
    for which in WHICH:
        tensors = opened.read(which)
        wanted = method_tensors(method, which)
        bad = sorted(
            k for k in wanted.keys() | tensors.keys()
            if k not in tensors or k not in wanted or tensors[k].shape != wanted[k].shape
        )  # fmt: skip
        if bad:
            k = bad[0]
            got, want = (list(d[k].shape) if k in d else "nothing" for d in (tensors, wanted))
            raise UsageError(
                f"{source} {path}: another architecture: {k} is {got} there, {want} in this configuration"
                + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else "")
            )
        with torch.no_grad():
            for k, v in wanted.items():
                v.copy_(tensors[k])


def import_released(
    file: str | Path,
    out: str | Path,
    *,
    which: str | None = None,
    grid: Sequence[int] | None = None,
    num_heads: int | None = None,
    force: bool = False,
) -> Path:
    """Converts a released ExtreMA checkpoint, or bare encoder weights, into a weights folder.

    file     pretraining or fine-tuning checkpoint, read with `weights_only=True`; the architecture is told from
             the shapes, optimizer and scaler are dropped
    which    keep `teacher` or `student` only; default: all there are, with their training heads
    grid, num_heads   where shapes do not tell them, as `load_encoder`
    force    replace an earlier import or export at `out`
    returns  the folder `out`
    raises   UsageError for an unreadable, incomplete or foreign file, or when `out` exists; nothing is written
    """
    file, out = Path(file), Path(out)
    check_free(out, force)
    try:
        if file.exists() and not file.is_file():
            raise UsageError(f"{file}: not a file; a run or weights folder needs no import, see `export`")
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error})") from None
    opened = open_weights(file, grid, num_heads)
    names = opened.names if which is None else [choose(opened.names, which, file, opened.meta)]
    networks = {name: opened.read(name) for name in names}
    config, own = model_config(opened.meta), encoder_options(opened.meta)
    for name, tensors in networks.items():
        # completeness is checked before anything is written
        _build(config, own, own, tensors, f"{file} ({name})")
        if bad := [k for k, v in tensors.items() if not torch.isfinite(v).all()]:
            raise UsageError(f"{file} ({name}): values that are not finite: {first(bad)}")
    meta = {"source": {"file": file.name}, **opened.meta}
    if len(names) == 1 and names[0] in WHICH:
        meta["which"] = names[0]
    with new_folder(out, force) as folder:
        write_folder(folder, meta, networks)
    log.info("imported %s: %s; optimizer and scaler state, if any, left out", file.name, " and ".join(names))
    return out
