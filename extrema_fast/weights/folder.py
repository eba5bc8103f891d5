"""Weights folders and weight files: writing, finding and describing them, and reading them without executing code.

A weights folder is readable without its run:

    config.json           architecture, normalization, heads, origin of the weights
    teacher.safetensors   encoder keys; projector as head.*
    student.safetensors   the same, plus predictor.*

A folder with a single network (an export, an imported fine-tuning) has `model.safetensors` instead. A `config.json` of
timm or Hugging Face holds the description under `extrema_fast`.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import __version__
from ..config import Config, ModelConfig, config_hash, did_you_mean, from_dict, to_dict
from ..errors import StorageError, UsageError, one_line
from ..files import fits, read_json
from ..models.layers import NORM_EPS
from ..models.positions import COORDS
from ..models.timm_interface import POOLS

FORMAT = "extrema-fast-weights"
VERSION = 1
WHICH = ("teacher", "student")
# name of a network that is not known to be either
SINGLE = "model"
GRAPHS = (".onnx", ".pt2", ".ts")
# suffix of the index of weights in several files
INDEX = ".index.json"
NOT_WEIGHTS = "which runs without this project; give the weights it came from"

# what `import` and `export` write, also in older versions; `--force` replaces only folders of such files
OWN_FILES = (
    "config.json", "README.md", "preprocessor_config.json", "teacher.safetensors", "student.safetensors",
    "model.safetensors", "model.onnx", "model.onnx.data", "model.pt2", "model.ts",
)  # fmt: skip


P = ParamSpec("P")
R = TypeVar("R")


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the function creates tensors on the CPU, whatever `torch.set_default_device` says."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return inner


# ---- writing --------------------------------------------------------------------------------------


class Renamed(Mapping[str, Tensor]):
    """Some tensors of a mapping under other names, looked up on access, since they may be in a file.

    Args:
        names: new name -> name in `tensors`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def method_tensors(state: Mapping[str, Tensor], which: str) -> Renamed:
    """One network's tensors under the names of a weights file, not copied; `state`: `state_dict()` of an `ExtreMA`."""
    names = {"encoder.": "", "projector.": "head.", "predictor.": "predictor."}
    return Renamed(
        state,
        {
            new + name.removeprefix(old): name
            for part, new in names.items()
            for name in state
            if name.startswith(old := f"{which}_branch.{part}")
        },
    )


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file; tensors that share memory are stored separately."""
    file.touch()
    mode = file.stat().st_mode
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})
    # safetensors ignores the umask: only the owner could read its files
    file.chmod(mode)


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Writes an indented JSON file."""
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def described(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` with the entries that identify a description of weights."""
    return {"format": FORMAT, "version": VERSION, "software": f"extrema-fast {__version__}", **meta}


def write_folder(folder: Path, meta: Mapping[str, Any], networks: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Writes the tensors of each network, then `config.json`: a folder without it is not complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in networks.items():
        write_tensors(folder / f"{name}.safetensors", tensors)
    write_json(folder / "config.json", described(meta))
    return folder


def save_weights(folder: str | Path, method: Any, meta: Mapping[str, Any]) -> Path:
    """Writes both networks of an `ExtreMA`, described by `meta` (as of `weights_meta`; `model` at least)."""
    return write_folder(
        Path(folder), meta, {which: method_tensors(method.state_dict(), which) for which in WHICH}
    )


def data_meta(
    mean: Sequence[float], std: Sequence[float], value_range: Sequence[float] | None = None
) -> dict[str, Any]:
    """Mean and standard deviation of pixels, and the value range of images with more than 8 bits, if given."""
    found = {"mean": list(mean), "std": list(std)}
    return found | {"range": list(value_range)} if value_range else found


def weights_meta(
    cfg: Config, step: int, crop_pct: float = 0.875, value_range: Sequence[float] | None = None
) -> dict[str, Any]:
    """The description of weights saved at `step` of a run with configuration `cfg`.

    `crop_pct` as of `Resizing`, `value_range` of its images of more than 8 bits.
    """
    data = to_dict(cfg)
    model, mean, std = data["model"], data["data"]["mean"], data["data"]["std"]
    return {
        "model": model,
        "data": data_meta(mean, std, value_range),
        "input": input_meta((model["in_chans"], *model["img_size"]), mean, std, crop_pct=crop_pct),
        "head": data["head"],
        "seed": cfg.train.seed,
        "step": step,
        "images": step * cfg.train.batch_size,
        "config_hash": config_hash(cfg),
    }


def input_meta(
    input_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
    crop_pct: float = 0.875,
) -> dict[str, Any]:
    """The input of an encoder: size [C, H, W], channel names, value range, mean and standard deviation, resizing."""
    chans = input_size[0]
    names = {1: ["gray"], 3: ["red", "green", "blue"]}
    return {
        "input_size": list(input_size),
        "channels": names.get(chans, [f"channel {i}" for i in range(chans)]),
        "value_range": [0.0, 1.0],
        "mean": list(mean),
        "std": list(std),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        # missing in older versions, whose evaluation did not crop images of exactly this size
        "crop_mode": "center",
    }


# ---- finding --------------------------------------------------------------------------------------


def check_name(path: str | Path) -> None:
    """UsageError with the similar name of a run or weights, where nothing is at `path` but next to it or in runs/."""
    path = Path(path)
    if path.exists():
        return
    there = {p.name: p for folder in (Path("runs"), path.parent) for p in folder.glob("*")}
    if near := difflib.get_close_matches(path.name, there, n=1):
        raise UsageError(f"{path}: no such file or folder; did you mean {there[near[0]]}?")


def weights_folder(path: Path) -> Path:
    """The weights folder at `path`: itself, or the newest one of a run folder."""
    check_name(path)
    if not path.exists():
        is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists()
        fix = (
            f"; for a repository of the Hugging Face Hub run `hf download {path} --local-dir FOLDER` first"
            if is_name
            else ""
        )
        raise UsageError(
            f"{path}: no such file or folder; expected a run folder, a weights folder or file, an exported "
            f"folder or a released .pth{fix}"
        )
    if not path.is_dir():
        raise UsageError(f"{path}: neither a file nor a folder")
    found = [p for p in (path, *sorted(path.glob("weights/step_*"), reverse=True)) if networks_in(p)]
    if not found:
        raise UsageError(f"{path}: {_found_instead(path)}")
    return found[0]


def networks_in(folder: Path) -> dict[str, Path]:
    """The networks of a complete weights folder and their files: teacher and student, or one; {} for another folder."""
    if not (folder / "config.json").is_file():
        return {}
    files = {name: folder / f"{name}.safetensors" for name in (*WHICH, SINGLE)}
    # as transformers saves an export in several files
    if not files[SINGLE].exists():
        files[SINGLE] = folder / f"{SINGLE}.safetensors{INDEX}"
    return {name: file for name, file in files.items() if file.is_file()}


def _found_instead(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    inside = ", ".join(names[:6]) or "nothing"
    if "log.jsonl" in names:
        return f"this run has not saved weights yet (found: {inside})"
    if {"COMPLETE", "state.safetensors"} & set(names):
        return "a checkpoint of a run; its weights are in the run folder's weights/step_*"
    for name in sorted(names, key=lambda name: not name.endswith(INDEX)):
        if name.startswith("model.") and name.endswith(GRAPHS):
            return f"an exported graph ({name}), {NOT_WEIGHTS}"
        if name.endswith((INDEX, ".safetensors", ".pth", ".pt", ".bin")):
            described = (path / "config.json").is_file()
            lacks = "none that config.json describes" if described else "config.json is missing"
            return f"no weights folder ({lacks}); to read one file give {path / name}"
    wanted = "neither a run folder (weights/step_*/) nor a weights folder (config.json, teacher.safetensors)"
    return f"{wanted}; found: {inside}"


def check_replaceable(out: Path, force: bool = False) -> None:
    """Raises UsageError unless `out` is missing, empty, or an earlier import or export that `force` may replace."""
    only = f"{out}: --force replaces only what `import` or `export` wrote;"
    try:
        if out.is_symlink():
            raise UsageError(f"{out}: is a symbolic link; give the folder itself or another one")
        if not out.exists():
            return
        if not out.is_dir():
            raise UsageError(f"{out}: exists and is not a folder; choose another one")
        inside = sorted(p.name for p in out.iterdir())
        if inside and not force:
            raise UsageError(
                f"{out}: exists and is not empty; choose another folder, or --force to replace it"
            )
        for name in inside:
            if name not in OWN_FILES or not (out / name).is_file():
                raise UsageError(f"{only} this folder contains {name}")
        if inside and not {"source", "export"} & own_description(out, {}).keys():
            raise UsageError(f"{only} neither wrote this folder")
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error})") from None


# ---- descriptions ---------------------------------------------------------------------------------


def read_description(folder: Path) -> dict[str, Any]:
    """Reads and checks the description of a weights folder, without allocating anything of the size it claims.

    Raises:
        UsageError: `config.json` is damaged, invalid, another program's, or of a newer version.
    """
    file = folder / "config.json"
    meta = own_description(folder)
    if not is_own(meta):
        alone = "".join(
            f"; to read tensors alone give {file}" for file in list(networks_in(folder).values())[:1]
        )
        raise UsageError(
            f"{file}: not a weights description (`format` is not {FORMAT}; found: "
            f"{', '.join(list(meta)[:6])[:200] or 'nothing'}); nothing named there is loaded{alone}"
        )
    version = meta.get("version")
    if type(version) is not int or version > VERSION:
        raise UsageError(
            f"{file}: not a weights description of version {VERSION} (version {str(version)[:20]}, "
            f"{str(meta.get('software', 'a newer extrema-fast'))[:60]}); update extrema-fast"
        )
    if not fits(meta, _ORIGIN):
        raise UsageError(
            f"{file}: not a weights description (one of {', '.join(k[:-1] for k in _ORIGIN)} is invalid)"
        )
    try:
        model_config(meta)
        _check_tables(meta)
    except (ValueError, KeyError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise UsageError(f"{file}: not a weights description ({one_line(error)})") from None
    return meta


_ORIGIN = {
    "seed?": int,
    "step?": (int, None),
    "images?": (int, None),
    "config_hash?": str,
    "source?": {"file?": str, "left_out?": [str]},
    # of a fine-tuned head, in order of its outputs
    "classes?": [str],
    "software?": str,
}


def own_description(folder: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of a folder's `config.json` under `extrema_fast`, or all of it; not checked."""
    data = read_json(folder / "config.json", default)
    own = data.get("extrema_fast")
    return own if isinstance(own, dict) else data


def is_of_another_program(folder: Path) -> bool:
    """Whether `config.json` is timm's or Hugging Face's with our description inside: that may have trained it."""
    return isinstance(read_json(folder / "config.json", {}).get("extrema_fast"), dict)


def is_own(meta: Mapping[str, Any]) -> bool:
    """Whether a description is of this project (it may still be invalid)."""
    return meta.get("format") == FORMAT


def model_config(meta: Mapping[str, Any]) -> ModelConfig:
    """The architecture in a description; allocates nothing of that size."""
    # one view of all tokens: valid for any grid
    return from_dict({"model": meta["model"], "mask": {"ratio": 0.0, "views": 1}}, Config()).model


# encoder options of a description, with their defaults
ENCODER_OPTIONS: dict[str, Any] = {
    "num_classes": 0,
    "in_chans": None,
    "global_pool": "token",
    "fc_norm": False,
    "pos_embed": "sincos",
    "pos_coords": "absolute",
    "pos_grid": None,
    "final_norm": True,
    "norm_eps": NORM_EPS,
}


def encoder_options(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the encoder in a checked description."""
    return {**ENCODER_OPTIONS, **meta.get("encoder", {})}


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _numbers(value: Any, above: float = -math.inf) -> bool:
    return isinstance(value, list) and all(type(v) in (int, float) and above < v < math.inf for v in value)


def _ascend(value_range: list[float]) -> bool:
    return all(black < white for black, white in zip(value_range[::2], value_range[1::2], strict=True))


# checks of the values in a description
_CHECKS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "encoder": {
        "num_classes": lambda v: _whole(v, 0),
        "in_chans": lambda v: v is None or _whole(v, 1),
        "global_pool": lambda v: v in POOLS,
        "fc_norm": lambda v: type(v) is bool,
        "pos_embed": lambda v: v in ("sincos", "learned"),
        "pos_coords": lambda v: v in COORDS,
        "final_norm": lambda v: type(v) is bool,
        "norm_eps": lambda v: _numbers([v], 0),
        "pos_grid": lambda v: v is None or (_numbers(v, 0) and list(map(type, v)) == [int, int]),
    },
    "data": {
        "mean": lambda v: v and _numbers(v),
        "std": lambda v: v and _numbers(v, 0),
        "range": lambda v: v is None or (_numbers(v) and len(v) % 2 == 0 and _ascend(v)),
    },
    "input": {
        "interpolation": lambda v: type(v) is str,
        "crop_pct": lambda v: _numbers([v]) and 0 <= v <= 1,
        "crop_mode": lambda v: v == "center",
    },
}


def _check_tables(meta: Mapping[str, Any]) -> None:
    for name, checks in _CHECKS.items():
        table = meta.get(name, {})
        if not isinstance(table, dict):
            raise UsageError(f"{name}: expected a table, got {str(table)[:40]}")
        if name == "encoder" and (unknown := [key for key in table if key not in checks]):
            raise UsageError(f"unknown option encoder.{unknown[0]}{did_you_mean(unknown[0], list(checks))}")
        for key, check in checks.items():
            # mean and std have no default
            if (key in table or (name == "data" and name in meta)) and not check(table.get(key)):
                raise UsageError(f"{name}.{key}: {str(table.get(key))[:40]} is invalid")


# ---- reading untrusted files ----------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file; its tensors are checked by `check_tensors`."""
    try:
        state = without_counters(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path}: damaged or not a safetensors file ({one_line(error)})") from None
    check_tensors(state, path)
    return state


class _Bounded(io.BufferedReader):
    """A file whose `read` allocates at most the size of the file, whatever size a pickle claims."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size >= 0:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


# plain values that training scripts save with weights: arguments, and numpy scalars under both module paths
_SCALAR = np.float64().__reduce__()[0]
_PLAIN_VALUES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_torch(path: Path) -> Any:
    """Reads a file of `torch.save` that has only tensors and plain data; tensors may be memory-mapped."""
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as z:
                # torch does not compress, and compressed entries could expand to any size
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in z.infolist()):
                    raise ValueError("compressed entries")
        with torch.serialization.safe_globals(_PLAIN_VALUES):
            if zipped:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with _Bounded(open(path, "rb", buffering=0)) as f:
                return torch.load(f, map_location="cpu", weights_only=True)
    except Exception as error:
        # damaged files raise many kinds of errors, and torch's text recommends an unsafe load
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it contains code: {code[1]}"
            if code
            else f"damaged or not from torch.save: {type(error).__name__}"
        )
        raise UsageError(f"{path}: not a checkpoint that can be read safely ({reason})") from None


def without_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops BatchNorm's batch counters, which are integers and not needed."""
    return {k: v for k, v in state.items() if not k.endswith(".num_batches_tracked")}


def check_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises UsageError unless all are plain, dense, floating-point tensors that are not larger than the file.

    A view can claim any shape over a few bytes; copying it would fill memory.
    """
    for name, value in state.items():
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
        if not (plain and value.is_floating_point() and value.device.type == "cpu" and value.dim()):
            raise UsageError(
                f"{path}: {name}: expected a dense floating-point tensor of at least one dimension, got "
                f"{value.dtype}, {value.layout}, shape {list(value.shape)}, device {value.device}{looks_like(state)}"
            )
    claimed, size = sum(v.numel() * v.element_size() for v in state.values()), path.stat().st_size
    # tied tensors are counted twice
    if claimed > 2 * size:
        raise UsageError(f"{path}: its tensors claim {claimed} bytes, but the file has {size}")


# prefix of a key -> the kind of checkpoint; the most specific first
_OTHERS = {
    "decoder_blocks.": "an MAE checkpoint",
    "base_encoder.": "a MoCo v3 checkpoint",
    "backbone.": "a DINO checkpoint",
    "visual.": "an OpenCLIP model",
    "vit.": "a Hugging Face ViT",
    "embeddings.": "a Hugging Face ViT",
    "encoder.layers.": "a torchvision ViT",
    "layer1.": "a ResNet",
    "blocks.": "a ViT of timm or DINO",
}


def looks_like(keys: Collection[str]) -> str:
    """The end of an error message that names the kind of checkpoint with such keys, or nothing."""
    if not any("blocks_token." in k for k in keys):
        for prefix, name in _OTHERS.items():
            if any(re.match(rf"((module|teacher|student)\.)*{re.escape(prefix)}", k) for k in keys):
                return f"; this looks like {name}"
    return ""
