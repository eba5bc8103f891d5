"""Weights folders: written, found, described and read.

A weights folder is readable alone:

    config.json           architecture, normalisation, heads, where the weights come from
    teacher.safetensors   encoder keys; projector as head.*
    student.safetensors   the same, plus predictor.*

A folder of one network (an export, an imported fine-tuning) has `model.safetensors` in their place. Where
`config.json` is also somebody else's (timm's, Hugging Face's), ours stands in it under `extrema_fast`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..config import Config, ModelConfig, config_hash, did_you_mean, from_dict, to_dict
from ..errors import UsageError
from ..files import read_json
from .safe_files import read_safetensors

FORMAT = "extrema-fast-weights"
VERSION = 1
WHICH = ("teacher", "student")
# of a network that is not said to be either
SINGLE = "model"


# ---- writing --------------------------------------------------------------------------------------


def method_tensors(method: Any, which: str) -> dict[str, Tensor]:
    """All tensors of one network of an `ExtreMA`, by the names of a weights file (no copies)."""
    branch = method.student_branch if which == "student" else method.teacher_branch
    tensors = dict(branch.encoder.state_dict())
    tensors |= {f"head.{k}": v for k, v in branch.projector.state_dict().items()}
    if which == "student":
        tensors |= {f"predictor.{k}": v for k, v in branch.predictor.state_dict().items()}
    return tensors


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of `tensors`, each in memory of its own."""
    file.touch()
    mode = file.stat().st_mode
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})
    # safetensors makes files that their owner alone may read, whatever the umask says
    file.chmod(mode)


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def described(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` with the marks by which a description of weights is known."""
    return {"format": FORMAT, "version": VERSION, "software": f"extrema-fast {__version__}", **meta}


def write_folder(folder: Path, meta: Mapping[str, Any], networks: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Writes the tensors of each network, then `config.json`: a folder without it is not complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in networks.items():
        write_tensors(folder / f"{name}.safetensors", tensors)
    write_json(folder / "config.json", described(meta))
    return folder


def save_weights(folder: str | Path, method: Any, meta: dict[str, Any]) -> Path:
    """Writes a weights folder of an `ExtreMA`; `meta` as of `weights_meta` ("model" at least)."""
    return write_folder(Path(folder), meta, {which: method_tensors(method, which) for which in WHICH})


def weights_meta(cfg: Config, step: int) -> dict[str, Any]:
    """The `config.json` of a weights folder saved at `step` of a run."""
    data = to_dict(cfg)
    model, mean, std = data["model"], data["data"]["mean"], data["data"]["std"]
    return {
        "model": model,
        "data": {"mean": mean, "std": std},
        "input": input_meta((model["in_chans"], *model["img_size"]), mean, std),
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
    """What an image must look like to the encoder: size (C, H, W), range and statistics, channel names."""
    names = {1: ["gray"], 3: ["red", "green", "blue"]}
    chans = int(input_size[0])
    return {
        "input_size": list(input_size),
        "channels": names.get(chans, [f"channel {i}" for i in range(chans)]),
        "value_range": [0.0, 1.0],
        "mean": list(mean),
        "std": list(std),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
    }


# ---- finding --------------------------------------------------------------------------------------


def weights_folder(path: str | Path) -> Path:
    """The weights folder meant by `path`: itself, or the newest one of a run folder.

    raises UsageError saying what was looked for and what was found
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(
            f"{path}: no such file or folder; expected a run folder, a weights folder or file, an exported "
            "folder or a released .pth"
        )
    if path.is_file() and path.suffix == ".safetensors" and (path.parent / "config.json").is_file():
        return path.parent
    if path.is_file():
        raise UsageError(
            f"{path}: not a weights folder; expected a folder with config.json and teacher.safetensors"
        )
    if not path.is_dir():
        raise UsageError(f"{path}: neither a file nor a folder")
    if networks_in(path):
        return path
    found = sorted(p for p in (path / "weights").glob("step_*") if networks_in(p))
    if found:
        return found[-1]
    raise UsageError(_nothing_there(path))


def networks_in(folder: Path) -> list[str]:
    """The networks of a complete weights folder: teacher and student, or one; [] for any other folder."""
    if not (folder / "config.json").is_file():
        return []
    return [name for name in (*WHICH, SINGLE) if (folder / f"{name}.safetensors").is_file()]


def _nothing_there(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    inside = ", ".join(names[:6]) or "nothing"
    if "log.jsonl" in names:
        return f"{path}: this run has saved no weights yet (found: {inside})"
    if "COMPLETE" in names or "state.safetensors" in names:
        return f"{path}: a checkpoint of a run, whose weights are in the run folder's weights/step_*"
    graph = next((n for n in ("model.onnx", "model.pt2", "model.ts") if n in names), None)
    if graph:
        return (
            f"{path}: an exported graph ({graph}), which runs without this project; "
            "give the weights it was exported from"
        )
    weights = [n for n in names if n.endswith((".safetensors", ".pth", ".pt", ".bin"))]
    if weights:
        return (
            f"{path}: no weights folder (config.json is missing); to read one file give {path / weights[0]}"
        )
    return (
        f"{path}: neither a run folder (weights/step_*/) nor a weights folder "
        f"(config.json, teacher.safetensors); found: {inside}"
    )


# ---- reading --------------------------------------------------------------------------------------


def read_description(folder: Path) -> dict[str, Any]:
    """The checked description of a weights folder; raises UsageError for another one's config.json."""
    file = folder / "config.json"
    data = read_json(file)
    meta = own_part(data)
    if meta.get("format") != FORMAT:
        alone = "".join(
            f"; to read tensors alone give {folder / n}.safetensors" for n in networks_in(folder)[:1]
        )
        raise UsageError(f"{file}: not a weights description ({_whose(data)}){alone}")
    version = meta.get("version")
    if type(version) is not int or version > VERSION:
        raise UsageError(
            f"{file}: not a weights description of version {VERSION} (version {str(version)[:20]}, "
            f"{str(meta.get('software', 'a newer extrema-fast'))[:60]}); update extrema-fast"
        )
    try:
        model_config(meta)
        _check_input(meta)
    except (ValueError, KeyError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise UsageError(f"{file}: not a weights description ({' '.join(str(error).split())})") from None
    return meta


def own_part(data: dict[str, Any]) -> dict[str, Any]:
    own = data.get("extrema_fast")
    return own if isinstance(own, dict) else data


def is_described(folder: Path) -> bool:
    """Whether the folder's config.json is ours, whole or in part (it may still make no sense)."""
    try:
        return own_part(read_json(folder / "config.json")).get("format") == FORMAT
    except UsageError:
        return False


def _whose(data: Mapping[str, Any]) -> str:
    for key, owner in (
        ("model_type", "Hugging Face"), ("architectures", "Hugging Face"), ("architecture", "timm"),
    ):  # fmt: skip
        if key in data:
            return f"one of {owner}'s, of {str(data[key])[:80]}; nothing named there is loaded"
    return f"`format` is not {FORMAT}"


def model_config(meta: Mapping[str, Any]) -> ModelConfig:
    """The architecture in a description; nothing of that size is allocated."""
    # one view of all tokens: valid for any grid
    return from_dict({"model": meta["model"], "mask": {"ratio": 0.0, "views": 1}}, Config()).model


# options of the encoder that a description may hold, with what they are when it does not
ENCODER_OPTIONS: dict[str, Any] = {
    "num_classes": 0,
    "in_chans": None,
    "global_pool": "token",
    "fc_norm": False,
    "pos_embed": "sincos",
    "pos_coords": "absolute",
    "pos_grid": None,
}


def encoder_options(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the encoder in a description; raises UsageError for unknown ones and wrong types."""
    given = meta.get("encoder", {})
    if not isinstance(given, dict):
        raise UsageError(f"encoder: expected a table of options, got {str(given)[:40]}")
    for key, value in given.items():
        if key not in ENCODER_OPTIONS:
            raise UsageError(f"unknown option encoder.{key}{did_you_mean(key, list(ENCODER_OPTIONS))}")
        ok = {
            "num_classes": type(value) is int and value >= 0,
            "in_chans": value is None or (type(value) is int and value >= 1),
            "fc_norm": type(value) is bool,
            "pos_grid": value is None or _positive_pair(value),
        }.get(key, isinstance(value, str))
        if not ok:
            raise UsageError(f"encoder.{key}: {str(value)[:40]} makes no sense")
    return {**ENCODER_OPTIONS, **given}


def _positive_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int and v > 0 for v in value)


def _check_input(meta: Mapping[str, Any]) -> None:
    encoder_options(meta)
    for name in ("data", "input"):
        if not isinstance(meta.get(name, {}), dict):
            raise UsageError(f"{name}: expected a table, got {str(meta[name])[:40]}")
    for name in ("mean", "std"):
        values = meta["data"][name] if "data" in meta else [0.5]
        if not isinstance(values, list) or not values or not all(_is_number(v) for v in values):
            raise UsageError(f"data.{name}: expected numbers, got {str(values)[:40]}")
        if name == "std" and min(values) <= 0:
            raise UsageError(f"data.std: expected positive numbers, got {str(values)[:40]}")
    for key, kind in (("interpolation", str), ("crop_pct", float)):
        value = meta.get("input", {}).get(key, kind())
        if type(value) is not kind or (kind is float and not 0 <= value <= 1):
            raise UsageError(f"input.{key}: {str(value)[:40]} makes no sense")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def which_of(name: str, meta: Mapping[str, Any]) -> str:
    """`teacher`, `student` or `model` (not said) for a network of a folder."""
    said = meta.get("which")
    return said if name == SINGLE and said in WHICH else name


def choose(names: Sequence[str], which: str | None, source: str | Path, meta: Mapping[str, Any]) -> str:
    """The network meant by `which` among those there are; None: the one `meta` names, else the teacher.

    A network not said to be either (a bare file, a fine-tuned one) is taken under any name.
    raises  UsageError for another word, or a network that is not there
    """
    if which is not None and which not in WHICH:
        raise UsageError(f"which: expected 'teacher' or 'student', got {which!r}")
    meant = which or (meta.get("which") if meta.get("which") in WHICH else "teacher")
    for name in (meant, SINGLE):
        if name in names:
            return name
    raise UsageError(f"{source}: holds no {meant} weights; it holds: {', '.join(names)}")


def read_tensors(path: str | Path, which: str = "teacher") -> dict[str, Tensor]:
    """All tensors of one network in a weights folder (encoder, head.*, and predictor.* for the student)."""
    folder = weights_folder(path)
    meta = read_description(folder)
    names = {which_of(name, meta): name for name in networks_in(folder)}
    return read_safetensors(folder / f"{names[choose(list(names), which, folder, meta)]}.safetensors")
