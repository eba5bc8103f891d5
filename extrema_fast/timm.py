"""Registers the encoders with timm: `import extrema_fast.timm`, then `timm.create_model("extrema_vit_...")`.

    python -m extrema_fast.timm SCRIPT ...      runs an unmodified timm script with these models registered

Hugging Face's `AutoModel` and `AutoBackbone` build timm models through the same registry, so they also know these
models after this import. `import extrema_fast` alone never imports timm.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import list_models
from .errors import UsageError, cannot_import
from .models.encoder import Encoder, create_encoder
from .models.layers import Block, PatchEmbed, PoolBlock
from .models.positions import resample_patch_kernel, resample_table

# keys of saved weights next to the encoder's own: projector, predictor
_TRAINING_HEADS = re.compile(r"(?:head\.\d+|predictor)\.")
_CLASS_HEAD = ("cls_token", "blocks_token.")
# a released checkpoint holds both networks; frozen features are the teacher's
_TEACHER, _STUDENT = "momentum_encoder.", "base_encoder."


def checkpoint_filter_fn(state: Mapping[str, Any], model: Encoder) -> dict[str, Tensor]:
    """Adapts saved weights to `model`, which may have another head, pool, image size or patch size.

    `state` has encoder keys, also of this project's `teacher.safetensors`, or is of a released checkpoint (its
    teacher). Projector and predictor are dropped, and the class head where the model has none; a fresh `fc_norm` takes
    the place of `norm`; a sin-cos table of another grid is replaced, a learned one resampled; the patch kernel is
    resampled. Channels and classifier are timm's to adapt.
    """
    state = dict(state)
    for prefix in ("module.", _TEACHER):
        found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = found or state
    state = {k: v for k, v in state.items() if not _TRAINING_HEADS.match(k) and not k.startswith(_STUDENT)}
    own = model.state_dict()
    if not model.num_prefix_tokens:
        state = {k: v for k, v in state.items() if not k.startswith(_CLASS_HEAD)}
    for norm in ("norm", "fc_norm"):
        if isinstance(getattr(model, norm), nn.Identity):
            state = {k: v for k, v in state.items() if not k.startswith(f"{norm}.")}
    fresh = {k: v for k, v in own.items() if k.startswith("fc_norm.") and k not in state}
    state |= {
        k: torch.ones_like(v) if k.endswith("weight") else torch.zeros_like(v) for k, v in fresh.items()
    }
    _check_keys(state, own)
    state["pos_embed"] = _fit_table(state["pos_embed"], state["patch_embed.proj.weight"], model)
    state["patch_embed.proj.weight"] = resample_patch_kernel(
        state["patch_embed.proj.weight"], model.patch_size
    )
    return state


def _check_keys(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    # the linear head may differ
    saved, wanted = ({k for k in keys if not k.startswith("head.")} for keys in (state, own))
    found = {"missing": sorted(wanted - saved), "unknown": sorted(saved - wanted)}
    if wrong := [f"{what}: {key}" for what, keys in found.items() for key in keys[:3]]:
        raise UsageError(f"the weights do not fit this architecture (among others {', '.join(wrong)})")


def _fit_table(table: Tensor, kernel: Tensor, model: Encoder) -> Tensor:
    """The saved position table [1, N, D] for the grid of `model`."""
    grid = _saved_grid(table.shape[1], kernel.shape[-1], model)
    if isinstance(model.pos_embed, nn.Parameter):
        if grid is None:
            raise UsageError(
                f"pos_embed: cannot tell the grid of {table.shape[1]} learned positions; "
                "write img_size into model_args of config.json"
            )
        return resample_table(table, grid, model.grid)
    saved = getattr(model, "pretrained_model_args", {})
    if grid is not None and "pos_grid" not in saved and model.sincos.trained == model.grid:
        # no record of the grid trained on: take the one they were saved at
        model.sincos.trained = grid
    if grid == model.grid:
        return table
    return model.sincos.compute(model.grid)[None].to(model.pos_embed)


def _saved_grid(count: int, patch: int, model: Encoder) -> tuple[int, int] | None:
    """(rows, columns) of `count` saved positions: by the saved image size, else a square."""
    size = getattr(model, "pretrained_model_args", {}).get("img_size")
    size = size or (model.pretrained_cfg.get("input_size") or (3, 0, 0))[-2:]
    rows, columns = (s // patch for s in ((size, size) if isinstance(size, int) else size))
    if rows * columns == count:
        return rows, columns
    side = round(count**0.5)
    return (side, side) if side * side == count else None


def _build(name: str, device: Any = None, dtype: Any = None, **options: Any) -> Encoder:
    """`create_encoder` with the two arguments that timm's factory takes for every model."""
    with nullcontext() if device is None else torch.device(device):
        encoder = create_encoder(name, **options)
    return encoder if dtype is None else encoder.to(dtype=dtype)


def _default_cfgs() -> Any:
    from timm.layers import register_notrace_module
    from timm.models import generate_default_cfgs

    # what torch.fx calls as a whole
    for part in (PatchEmbed, Block, PoolBlock):
        register_notrace_module(part)
    # the numbers of the released weights; features, no classifier
    cfg = {
        "num_classes": 0,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return generate_default_cfgs({name: dict(cfg) for name in list_models()})


def _register(name: str) -> None:
    from timm.models import build_model_with_cfg, register_model

    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        if options.get("pos_embed") == "learned":
            overlay = options.pop("pretrained_cfg_overlay", None) or {}
            options["pretrained_cfg_overlay"] = {"fixed_input_size": True, **overlay}
        return build_model_with_cfg(
            partial(_build, name),
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
            **options,
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name}; options as of `extrema_fast.create_encoder`."
    globals()[name] = register_model(entry)


def _run(arguments: list[str]) -> None:
    """Runs a Python script, as `python` does, in this process."""
    if not arguments:
        sys.exit("usage: python -m extrema_fast.timm SCRIPT [ARGUMENTS]")
    if not os.path.isfile(arguments[0]):
        sys.exit(f"{arguments[0]}: no such script")
    sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    # under its own name, so that a script that imports it does not register twice
    import extrema_fast.timm  # noqa: F401

    _run(sys.argv[1:])
else:
    try:
        # under this name timm's registry looks for them
        default_cfgs = _default_cfgs()
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"extrema_fast.timm: {cannot_import('timm', error, 'timm')}") from error
    for _name in list_models():
        _register(_name)
