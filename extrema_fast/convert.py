"""Weights in and out: this project's weights folders, run folders, and released ExtreMA checkpoints.

A weights folder is readable alone:

    config.json           architecture, normalisation, heads, where the weights come from
    teacher.safetensors   encoder keys; projector as head.*
    student.safetensors   the same, plus predictor.*

Nothing here unpickles objects: safetensors, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import Config, ModelConfig, from_dict, to_dict
from .encoder import Encoder, build_encoder, sincos_table, with_img_size
from .errors import UsageError

log = logging.getLogger(__name__)

FORMAT = "extrema-fast-weights"
_WHICH = ("teacher", "student")


# ---- writing --------------------------------------------------------------------------------------


def _tensors(method: Any, which: str) -> dict[str, Tensor]:
    branch = method.student_branch if which == "student" else method.teacher_branch
    tensors = dict(branch.encoder.state_dict())
    tensors |= {f"head.{k}": v for k, v in branch.projector.state_dict().items()}
    if which == "student":
        tensors |= {f"predictor.{k}": v for k, v in branch.predictor.state_dict().items()}
    return tensors


def _write(folder: Path, meta: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for which, state in tensors.items():
        state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
        save_file(state, folder / f"{which}.safetensors", metadata={"format": "pt"})
    text = json.dumps({"format": FORMAT, "version": 1, **meta}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return folder


def save_weights(folder: str | Path, method: Any, meta: dict[str, Any]) -> Path:
    """Writes a weights folder of an `ExtreMA`; `meta` as of `weights_meta` ("model" at least)."""
    return _write(Path(folder), meta, {which: _tensors(method, which) for which in _WHICH})


def weights_meta(cfg: Config, step: int) -> dict[str, Any]:
    """The `config.json` of a weights folder saved at `step` of a run."""
    data = to_dict(cfg)
    return {
        "model": data["model"],
        "data": {"mean": data["data"]["mean"], "std": data["data"]["std"]},
        "head": data["head"],
        "seed": cfg.train.seed,
        "step": step,
        "images": step * cfg.train.batch_size,
    }


# ---- finding --------------------------------------------------------------------------------------


def weights_folder(path: str | Path) -> Path:
    """The weights folder meant by `path`: itself, or the newest one of a run folder.

    raises UsageError saying what was looked for and what was found
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(
            f"{path}: no such file or folder; expected a run folder, a weights folder or a .pth file"
        )
    if path.is_file() and path.suffix == ".safetensors" and (path.parent / "config.json").is_file():
        return path.parent
    if path.is_file():
        raise UsageError(
            f"{path}: not a weights folder; expected a folder with config.json and teacher.safetensors"
        )
    if _complete(path):
        return path
    found = sorted(p for p in (path / "weights").glob("step_*") if _complete(p))
    if found:
        return found[-1]
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    if (path / "log.jsonl").exists():
        raise UsageError(f"{path}: this run has saved no weights yet (found: {inside})")
    raise UsageError(
        f"{path}: neither a run folder (weights/step_*/) nor a weights folder "
        f"(config.json, teacher.safetensors); found: {inside}"
    )


def _complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / f"{w}.safetensors").is_file() for w in _WHICH)


def load_metadata(path: str | Path) -> dict[str, Any]:
    """The `config.json` of a weights folder or of a run's newest weights."""
    folder = weights_folder(path)
    try:
        meta = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _model_config(meta)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / 'config.json'}: not a weights description ({error})") from None
    return meta


def _model_config(meta: dict[str, Any]) -> ModelConfig:
    # one view of all tokens: valid for any grid
    return from_dict({"model": meta["model"], "mask": {"ratio": 0.0, "views": 1}}, Config()).model


def read_tensors(path: str | Path, which: str = "teacher") -> dict[str, Tensor]:
    """All tensors of one network in a weights folder (encoder, head.*, and predictor.* for the student)."""
    if which not in _WHICH:
        raise UsageError(f"which: expected 'teacher' or 'student', got {which!r}")
    file = weights_folder(path) / f"{which}.safetensors"
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UsageError(f"{file.parent}: holds no {which} weights") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file}: damaged or not a safetensors file ({error})") from None


# ---- loading --------------------------------------------------------------------------------------


def load_encoder(
    path: str | Path,
    which: str = "teacher",
    *,
    num_classes: int = 0,
    img_size: int | tuple[int, int] | None = None,
    global_pool: str = "token",
    fc_norm: bool = False,
    pos_embed: str = "sincos",
) -> Encoder:
    """A trained encoder, in eval mode on the CPU.

    path      a run folder (its newest weights), a weights folder, or a released ExtreMA `.pth`
    which     'teacher' (frozen features) or 'student' (start of the paper's fine-tuning)
    img_size  another size than trained: the sin-cos table is computed for the new grid
    others    as `create_encoder`: a new linear head, mean pooling, a learned position table
    raises    UsageError for a missing, damaged or unknown file, naming what was found
    """
    path = Path(path)
    if path.is_file() and path.suffix != ".safetensors":
        parts = _read_released(path)
        meta, tensors = parts["meta"], parts[which] if which in _WHICH else read_tensors(path, which)
    else:
        meta, tensors = load_metadata(path), read_tensors(path, which)
    config = _model_config(meta)
    if img_size is not None:
        config = with_img_size(config, img_size)
    encoder = Encoder(config, num_classes, global_pool=global_pool, fc_norm=fc_norm, pos_embed=pos_embed)
    _fill(encoder, tensors, str(path))
    if "data" in meta:
        encoder.mean, encoder.std = (tuple(meta["data"][k]) for k in ("mean", "std"))
    return encoder.eval()


def _fill(encoder: Encoder, tensors: Mapping[str, Tensor], source: str) -> None:
    """Loads encoder keys strictly; heads and what this variant does not have are left out."""
    own = encoder.state_dict()
    # the projector's `head.*` shares a prefix with the classifier, which is always new here
    state = {k: v for k, v in tensors.items() if not k.startswith(("head.", "predictor."))}
    if encoder.global_pool == "avg":
        state = {k: v for k, v in state.items() if not k.startswith(("cls_token", "blocks_token."))}
    if isinstance(encoder.norm, torch.nn.Identity):
        state = {k: v for k, v in state.items() if not k.startswith("norm.")}
    if state.get("pos_embed") is not None and state["pos_embed"].shape != own["pos_embed"].shape:
        state["pos_embed"] = own["pos_embed"]
    optional = {k for k in own if k.startswith(("head.", "fc_norm."))}
    missing, unknown = sorted(own.keys() - state.keys() - optional), sorted(state.keys() - own.keys())
    wrong = sorted(
        f"{k} {list(state[k].shape)} for {list(own[k].shape)}"
        for k in state.keys() & own.keys()
        if state[k].shape != own[k].shape
    )
    found = {"missing": missing, "unknown": unknown, "shape": wrong}
    if any(found.values()):
        parts = "; ".join(f"{name}: {_first(keys)}" for name, keys in found.items() if keys)
        raise UsageError(f"{source}: the weights do not fit this architecture ({parts})")
    encoder.load_state_dict(state, strict=False)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def random_encoder_like(path: str | Path) -> Encoder:
    """The encoder of `path` with the run's own initial weights (seed from its metadata), in eval mode."""
    meta = load_metadata(path)
    encoder = build_encoder(_model_config(meta), int(meta.get("seed", 0)))
    if "data" in meta:
        encoder.mean, encoder.std = (tuple(meta["data"][k]) for k in ("mean", "std"))
    return encoder.eval()


def load_method_weights(method: Any, path: str | Path, *, source: str = "--init-from") -> None:
    """Fills an `ExtreMA` from a weights folder, a run folder or a released file; strict.

    raises UsageError when the architecture or the heads differ
    """
    path = Path(path)
    released = path.is_file() and path.suffix != ".safetensors"
    parts = _read_released(path) if released else {w: read_tensors(path, w) for w in _WHICH}
    for which in _WHICH:
        tensors = parts[which]
        wanted = _tensors(method, which)
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


# ---- released checkpoints (method.md section 8) -----------------------------------------------------

_BRANCH = {"module.base_encoder.": "student", "module.momentum_encoder.": "teacher"}
# head option -> where its number is the first dimension
_HEADS = {
    "hidden": ("teacher", "head.0.weight"),
    "out": ("teacher", "head.6.weight"),
    "predictor_hidden": ("student", "predictor.0.weight"),
}


def _read_released(file: Path) -> dict[str, Any]:
    try:
        # training scripts pickle their arguments too: this class holds plain values and runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        # damaged bytes fail in many ways, and torch's own text advises an unsafe load
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds code: {refused[1]}"
            if refused
            else f"damaged or not from torch.save: {type(error).__name__}"
        )
        raise UsageError(f"{file}: not a checkpoint that can be read safely ({reason})") from None
    state = data.get("state_dict") if isinstance(data, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        found = ", ".join(map(str, list(data)[:6])) if isinstance(data, dict) else type(data).__name__
        raise UsageError(f"{file}: expected a released ExtreMA checkpoint with `state_dict`, found: {found}")
    parts: dict[str, Any] = {"student": {}, "teacher": {}}
    unknown = []
    for key, value in state.items():
        prefix = next((p for p in _BRANCH if key.startswith(p)), None)
        if prefix:
            parts[_BRANCH[prefix]][key.removeprefix(prefix)] = value
        elif key.startswith("module.predictor."):
            parts["student"][key.removeprefix("module.")] = value
        else:
            unknown.append(key)
    if unknown:
        raise UsageError(f"{file}: unknown keys: {_first(unknown)}")
    if not parts["teacher"] or not parts["student"]:
        raise UsageError(f"{file}: needs `module.base_encoder.*` and `module.momentum_encoder.*` keys")
    model = _infer_model(parts["teacher"], str(file))
    shapes = [parts[w].get(k) for w, k in _HEADS.values()]
    heads = {} if any(s is None for s in shapes) else dict(zip(_HEADS, (len(s) for s in shapes), strict=True))
    epoch = data.get("epoch")
    parts["meta"] = {
        "model": model,
        "data": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "head": heads,
        "source": {
            "file": file.name,
            "arch": str(data.get("arch", "")),
            "epoch": epoch if isinstance(epoch, int) else None,
        },
    }
    return parts


def _infer_model(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The architecture from the shapes; heads = width / 64 as in all released sizes."""

    def count(pattern: str) -> int:
        found = [int(m[1]) for k in state if (m := re.match(pattern, k))]
        return max(found) + 1 if found else 0

    try:
        kernel, table = state["patch_embed.proj.weight"], state["pos_embed"]
        fc1, gamma = state["blocks.0.mlp.fc1.weight"], state["blocks_token.0.gamma_1"]
    except KeyError as error:
        raise UsageError(f"{source}: not an ExtreMA encoder, {error.args[0]} is missing") from None
    if kernel.dim() != 4 or table.dim() != 3 or table.shape[2] != kernel.shape[0]:
        raise UsageError(
            f"{source}: not an ExtreMA encoder, patch_embed.proj.weight is {list(kernel.shape)} "
            f"and pos_embed {list(table.shape)}"
        )
    width, in_chans, patch, _ = kernel.shape
    side = round(table.shape[1] ** 0.5)
    if side * side != table.shape[1]:
        raise UsageError(f"{source}: the position table has {table.shape[1]} rows, expected a square grid")
    if width % 64:
        raise UsageError(f"{source}: width {width} is not a multiple of 64, so the heads cannot be told")
    if (table[0].double() - sincos_table(width, (side, side), torch.float64)).abs().max() > 1e-5:
        raise UsageError(f"{source}: the position table is not the fixed sin-cos table (a fine-tuned file?)")
    model = ModelConfig(
        img_size=(side * patch, side * patch),
        patch_size=patch,
        in_chans=in_chans,
        width=width,
        depth=count(r"blocks\.(\d+)\."),
        heads=width // 64,
        mlp_ratio=fc1.shape[0] / width,
        pool_depth=count(r"blocks_token\.(\d+)\."),
        layer_scale=float(gamma.float().mean()) or 0.1,
    )
    return to_dict(model)


def import_released(file: str | Path, out: str | Path) -> Path:
    """Converts a released ExtreMA checkpoint into a weights folder, student and teacher kept.

    file     `torch.save` of {epoch, arch, state_dict, optimizer, scaler}; read with `weights_only=True`, the
             architecture is told from the shapes, optimizer and scaler are dropped
    returns  the folder `out`
    raises   UsageError for an unreadable or incomplete file, or when `out` exists and is not empty
    """
    file, out = Path(file), Path(out)
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty; choose another folder")
    parts = _read_released(file)
    for which in _WHICH:
        # completeness is checked before anything is written
        _fill(Encoder(_model_config(parts["meta"])), parts[which], f"{file} ({which})")
    _write(out, parts["meta"], {which: parts[which] for which in _WHICH})
    log.info("imported %s: student and teacher; optimizer and scaler state left out", file.name)
    return out
