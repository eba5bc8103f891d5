"""Checkpoint files: what the released code saved in pretraining and fine-tuning, and bare encoder weights.

    pretraining   {epoch, arch, state_dict: module.base_encoder.*, module.momentum_encoder.*,
                  module.predictor.*, optimizer, scaler}; projector as `head.*` of each encoder
    fine-tuning   {model: patch_embed.*, pos_embed (learned), blocks.*, fc_norm.*, head.*, args, ...}
    bare          the tensors of one encoder, from `torch.save` or safetensors

Told apart by their keys; anything else is named where it is known, and refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .architecture import first, tell
from .files import SINGLE, input_meta
from .foreign import name_of
from .safe_files import check_tensors, kind_of, read_safetensors, read_torch

log = logging.getLogger(__name__)

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

_BRANCH = {"base_encoder.": "student", "momentum_encoder.": "teacher"}
# head option -> where its number is the first dimension
_HEADS = {
    "hidden": ("teacher", "head.0.weight"),
    "out": ("teacher", "head.6.weight"),
    "predictor_hidden": ("student", "predictor.0.weight"),
}
# what an encoder has at least, and all it can have
_NEEDED = (
    "patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks_token.0.attn.q.weight",
    "blocks_token.0.gamma_1", "cls_token", "blocks.0.mlp.fc1.weight", "norm.weight", "norm.bias",
    "patch_embed.proj.bias",
)  # fmt: skip
_KNOWN = re.compile(
    r"(patch_embed\.proj|norm|fc_norm|head|predictor)\.|(pos_embed|cls_token)$"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\."
    r"|blocks_token\.\d+\.(gamma_[12]$|(norm[12]|attn\.(q|k|v|proj)|mlp\.fc[12])\.)"
)

Networks = dict[str, dict[str, Tensor]]


def read_checkpoint(
    file: Path, grid: tuple[int, int] | None = None, num_heads: int | None = None
) -> tuple[dict[str, Any], Networks]:
    """(description, tensors by network) of a checkpoint file.

    networks   student and teacher, or one `model` that is not said to be either
    grid       rows and columns of a learned position table that is not square
    num_heads  where it is not width / 64
    raises     UsageError for what cannot be read safely, is incomplete, or is another project's
    """
    data, state = _read(file)
    networks = _networks(state, file)
    main = networks.get("teacher", networks.get(SINGLE, {}))
    model, options = tell(main, str(file), grid, num_heads)
    if options["fc_norm"] and "norm.weight" in main:
        raise UsageError(f"{file}: has both a final norm and a norm after pooling; an encoder has one")
    # as the official recipes read images
    interpolation = "bicubic" if options["fc_norm"] else "bilinear"
    size = (options["in_chans"], *model["img_size"])
    meta = {
        "model": model,
        "encoder": options,
        "data": IMAGENET,
        "input": input_meta(size, **IMAGENET, interpolation=interpolation),
        "head": _head_options(networks),
        "source": _source(data, file),
    }
    return meta, networks


def _read(file: Path) -> tuple[Any, dict[str, Tensor]]:
    """(everything in the file, its state dict)."""
    kind = kind_of(file)
    if kind == "safetensors":
        return {}, read_safetensors(file)
    if kind in ("torchscript", "torch-export", "onnx"):
        raise UsageError(
            f"{file}: an exported graph ({kind}), which runs without this project; "
            "give the weights it was exported from"
        )
    data = read_torch(file)
    state = _state_dict(data, file)
    check_tensors(state, file)
    return data, state


def _state_dict(data: Any, file: Path) -> dict[str, Tensor]:
    if isinstance(data, dict):
        # nested ones first: beside them stand epoch, optimizer, arguments
        for found in (data.get("state_dict"), data.get("model"), data):
            if _is_state(found):
                return dict(found)
        keys = [k for k in data if isinstance(k, str)]
        nested = [k for part in data.values() if isinstance(part, dict) for k in part if isinstance(k, str)]
        closest = name_of(nested)
        found = ", ".join(keys[:6]) or "nothing"
    else:
        closest, found = None, type(data).__name__
    raise UsageError(
        f"{file}: expected a released ExtreMA checkpoint with `state_dict`, found: {found}"
        + (f"; this looks like {closest}" if closest else "")
    )


def _is_state(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and len(part) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in part.items())
    )


def _networks(state: Mapping[str, Tensor], file: Path) -> Networks:
    if any(
        k.startswith(tuple(f"module.{p}" for p in _BRANCH)) or k.startswith(tuple(_BRANCH)) for k in state
    ):
        return _pretraining(state, file)
    # data-parallel training wraps the model
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return {SINGLE: _single(state, file)}


def _pretraining(state: Mapping[str, Tensor], file: Path) -> Networks:
    networks: Networks = {"student": {}, "teacher": {}}
    unknown = []
    for key, value in state.items():
        name = key.removeprefix("module.")
        prefix = next((p for p in _BRANCH if name.startswith(p)), None)
        if prefix:
            networks[_BRANCH[prefix]][name.removeprefix(prefix)] = value
        elif name.startswith("predictor."):
            networks["student"][name] = value
        else:
            unknown.append(key)
    if not any("blocks_token." in k for k in state):
        raise _foreign(networks["student"] or networks["teacher"], file, name_of(state))
    if unknown:
        raise UsageError(f"{file}: unknown keys: {first(unknown)}")
    if not networks["teacher"] or not networks["student"]:
        raise UsageError(f"{file}: needs `module.base_encoder.*` and `module.momentum_encoder.*` keys")
    return {name: _complete_bias(tensors) for name, tensors in networks.items()}


def _single(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors of one encoder; without class head its class token is not used."""
    state = _fold_layer_scale(own_names(state))
    has_head = any(k.startswith("blocks_token.") for k in state)
    fine_tuned = "fc_norm.weight" in state and "norm.weight" not in state
    if not has_head and fine_tuned:
        # the official fine-tuning keeps the parameter and never reads it
        state.pop("cls_token", None)
    if not any(k.startswith("blocks.0.") for k in state) or (not has_head and "cls_token" in state):
        raise _foreign(state, file, name_of(state))
    if strange := [k for k in state if not _KNOWN.match(k)]:
        # complete, and with parts that an encoder has no place for
        raise _foreign(state, file, name_of(state), strange)
    if any(k.startswith("head.0.running_") for k in state):
        log.info("%s: the linear probe's head is left out; features are as pretrained", file.name)
    return _complete_bias(state)


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names, also of an export as timm's Cait."""
    return {k.replace("blocks_token_only.", "blocks_token."): v for k, v in state.items()}


def _fold_layer_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer scale of trunk blocks (an option of the official fine-tuning) put into the projections before it."""
    for key in [k for k in state if re.match(r"blocks\.\d+\.gamma_[12]$", k)]:
        block, _, which = key.rpartition(".")
        target = f"{block}.{'attn.proj' if which == 'gamma_1' else 'mlp.fc2'}"
        parts = [state.get(f"{target}.{part}") for part in ("weight", "bias")]
        if all(p is not None and p.shape[:1] == state[key].shape for p in parts):
            gamma = state.pop(key).float()
            for part, value in zip(("weight", "bias"), parts, strict=True):
                state[f"{target}.{part}"] = value.float() * gamma.view(-1, *[1] * (value.dim() - 1))
    return state


def _complete_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoders trained without qkv bias: a bias of zeros is the same."""
    names = [k for k in state if k.endswith("attn.qkv.weight")]
    if names and not any(k.endswith("attn.qkv.bias") for k in state):
        for k in names:
            state[k.removesuffix("weight") + "bias"] = torch.zeros(state[k].shape[0])
    return state


def _foreign(
    state: Mapping[str, Tensor], file: Path, closest: str | None, extra: list[str] | None = None
) -> UsageError:
    missing = [k for k in _NEEDED if k not in state]
    extra = extra or [k for k in state if not _KNOWN.match(k)]
    parts = [f"missing: {first(missing)}"] if missing else []
    parts += [f"extra: {first(extra)}"] if extra else []
    looks = f"; this looks like {closest}" if closest else ""
    hint = "; timm loads it, and extrema_fast.accelerate encodes masked images with it" if (
        closest and "ViT of timm" in closest
    ) else ""  # fmt: skip
    return UsageError(f"{file}: not ExtreMA weights ({'; '.join(parts) or 'no encoder in it'}){looks}{hint}")


def _head_options(networks: Networks) -> dict[str, int]:
    shapes = [networks.get(w, {}).get(k) for w, k in _HEADS.values()]
    if any(s is None for s in shapes):
        return {}
    return dict(zip(_HEADS, (len(s) for s in shapes), strict=True))


def _source(data: Any, file: Path) -> dict[str, Any]:
    epoch, arch = (data.get(k) if isinstance(data, dict) else None for k in ("epoch", "arch"))
    return {
        "file": file.name,
        "arch": arch[:80] if isinstance(arch, str) else "",
        "epoch": epoch if isinstance(epoch, int) else None,
    }
