"""Checkpoint files without a description: identifies them and infers the encoder architecture from their tensors.

    pretraining   {epoch, arch, state_dict: module.base_encoder.*, module.momentum_encoder.*,
                  module.predictor.*, optimizer, scaler}; projector as `head.*` of each encoder
    fine-tuning   {model: patch_embed.*, pos_embed (learned), blocks.*, fc_norm.*, head.*, args, ...}
    linear probe  {state_dict: module.* of one encoder without norm, module.head.0.* BatchNorm, module.head.1.*}
    bare          the tensors of one encoder, from `torch.save` or safetensors, possibly with the prefixes of a wrapper
                  (torch.compile, DDP, Lightning, `teacher.`, ...)

    others        ViTs of timm, MAE, DINO, DINOv2, MoCo v3, torchvision, Hugging Face: only the trunk (`foreign`)

The released ExtreMA code saves the first three. Nothing larger than the tensors is allocated.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import IMAGENET, SIZES, ModelConfig, to_dict
from ..errors import UsageError
from ..files import fits, read_json
from ..models.layers import NORM_EPS
from ..models.positions import sincos_table
from .folder import (
    GRAPHS,
    INDEX,
    NOT_WEIGHTS,
    SINGLE,
    check_tensors,
    data_meta,
    input_meta,
    looks_like,
    read_safetensors,
    read_torch,
    without_counters,
)
from .foreign import (
    HEADS,
    Described,
    Trunk,
    below_root,
    convert,
    has_kernel,
    network_name,
    prefix_rows,
)

log = logging.getLogger(__name__)

STATS = data_meta(*IMAGENET)
HEAD_DIM = 64
# a position table this close to the formula is the fixed one (fp32 in the released files)
SINCOS_TOLERANCE = 1e-5

_BRANCHES = {"base_encoder": "student", "momentum_encoder": "teacher"}
# tensors that an encoder must have, and all that it may have
_NEEDED = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
_KNOWN = re.compile(
    r"(patch_embed\.proj|norm|fc_norm|head|predictor)\.|(pos_embed|cls_token)$"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\."
    r"|blocks_token\.\d+\.(gamma_[12]$|(norm[12]|attn\.(q|k|v|proj)|mlp\.fc[12])\.)"
)

Networks = dict[str, dict[str, Tensor]]
Shapes = Mapping[str, tuple[int, ...]]


def read_checkpoint(
    file: Path,
    grid: tuple[int, int] | None = None,
    num_heads: int | None = None,
    described: Described | None = None,
    assumed: Described | None = None,
    which: str | None = None,
    registers: bool = False,
) -> tuple[dict[str, Any], Networks, Networks]:
    """The description and the networks (student and teacher, or one `model`) of a file without a description.

    Also returns class tokens and other prefix tokens that were left out (`foreign.Trunk.prefix`), by network.

    Args:
        file: From `torch.save` or safetensors.
        grid: Rows and columns of a learned position table that is not square.
        num_heads: Heads of the trunk, if not width / 64.
        described: The description in the folder of another project.
        assumed: Number of heads and, for another project's file, mean and standard deviation to use if unknown.
        which: The one of another project's two networks to read; None: the teacher.
        registers: Accept a trunk with register tokens, which are left out.

    Raises:
        UsageError: The file cannot be read safely, is incomplete, or is another project's.
    """
    in_folder = described is not None
    described, assumed = described or Described(), assumed or Described()
    data, state = _read(file, which)
    found = _networks(state, file, grid or described.grid, which)
    networks = {name: trunk.tensors for name, trunk in found.items()}
    prefixes = {name: trunk.prefix for name, trunk in found.items() if trunk.prefix}
    if not registers and any("reg_token" in prefix for prefix in prefixes.values()):
        raise UsageError(
            f"{file}: this ViT has register tokens, which this encoder's trunk cannot represent; `accelerate` and "
            "`load_vit` load it as a timm ViT"
        )
    left_out = next(reversed(found.values())).left_out
    main = networks.get("teacher", next(iter(networks.values())))
    epoch, arch = data.get("epoch"), data.get("arch")
    width, known = len(main.get("patch_embed.proj.weight", ())), None
    if described.width not in (None, width):
        raise UsageError(
            f"{file}: its tensors have width {width}, config.json in its folder says {described.width}; correct that"
        )
    stats = described.data or (left_out and assumed.data) or STATS
    if not any(k.startswith("blocks_token.") for k in main):
        # the small model of MoCo v3 has 12
        known = 12 if SINGLE not in networks and (arch, width) == ("vit_small", 384) else HEADS.get(width)
    taken = assumed.heads if assumed.heads and width % assumed.heads == 0 else None
    num_heads = next((n for n in (num_heads, described.heads, known, taken) if n is not None), None)
    model, options = _infer_architecture(main, str(file), grid or described.grid, num_heads)
    shape = model["width"], model["depth"], model["heads"]
    # the folder of an unknown model that should name its heads
    if num_heads is None and (in_folder or shape not in SIZES.values()):
        log.warning(
            "%s: the number of heads is not recorded; assuming %d, or give num_heads (in a command --model.heads)",
            file,
            shape[2],
        )
    if described.norm_eps != NORM_EPS:
        options["norm_eps"] = described.norm_eps
    if options["fc_norm"] and "norm.weight" in main:
        raise UsageError(f"{file}: has both a final norm and a norm after pooling; an encoder has only one")
    # the resizing of the official recipes
    interpolation = described.interpolation or ("bicubic" if options["fc_norm"] else "bilinear")
    size = (options["in_chans"], *model["img_size"])
    meta: dict[str, Any] = {
        "model": model,
        "encoder": options,
        "data": stats,
        "input": input_meta(size, stats["mean"], stats["std"], interpolation, described.crop_pct),
        "source": {
            "file": file.name,
            "arch": arch[:80] if isinstance(arch, str) else "",
            "epoch": epoch if isinstance(epoch, int) else None,
            **({"left_out": left_out} if left_out else {}),
        },
    }
    if len(networks) == 1 and SINGLE not in networks:
        meta["which"] = next(iter(networks))
    return meta, networks, prefixes


# ---- the state dict -------------------------------------------------------------------------------


# what training scripts save next to each other: DINO, I-JEPA
_NESTED = {"teacher": "teacher", "target_encoder": "teacher", "student": "student", "encoder": "student"}
# of timm and DeiT, next to `state_dict` or `model`
_EMA = ("state_dict_ema", "model_ema")


def _read(file: Path, which: str | None) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """Everything in the file, and its state dict; if it has two, that of `which`."""
    if file.suffix in GRAPHS:
        raise UsageError(f"{file}: an exported graph, {NOT_WEIGHTS}")
    if file.name.endswith(INDEX):
        return {}, read_shards(file)
    with open(file, "rb") as f:
        if f.read(9)[8:] == b"{":
            return {}, read_safetensors(file)
    data = read_torch(file)
    found, nested = type(data).__name__, []
    if isinstance(data, dict):
        # nested ones first, since the top level also has epoch, optimizer and arguments
        wanted = sorted(_NESTED, key=lambda key: _NESTED[key] != (which or "teacher"))
        others = [k for k, v in data.items() if isinstance(v, dict) and _are_tensors(v) and has_kernel(v)]
        averaged = _EMA if which != "student" else ()
        for key in (*averaged, "state_dict", "model", *wanted, None, *others):
            state = data if key is None else data.get(key)
            if isinstance(state, dict) and state and _are_tensors(state):
                if key in _EMA and len(others) > 1:
                    log.warning(
                        "%s: takes the EMA of the weights (%s); which='student' takes the others", file, key
                    )
                state = without_counters(state)
                check_tensors(state, file)
                return data, {f"{_NESTED[key]}.{k}": v for k, v in state.items()} if key in _NESTED else state
        found = first(data, 6) or "nothing"
        nested = [str(k) for value in data.values() if isinstance(value, dict) for k in value]
    raise UsageError(
        f"{file}: expected the tensors of a network, alone or as `state_dict`, found: {found}{looks_like(nested)}"
    )


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index of transformers names; they must be in its folder."""
    table = read_json(index).get("weight_map")
    names = set(table.values()) if isinstance(table, dict) and fits([*table.values()], [str]) else ()
    state: dict[str, Tensor] = {}
    for name in sorted(names):
        if Path(name).name != name or name.endswith(INDEX):
            raise UsageError(f"{index}: names {name[:80]!r}, which is not a file in its folder")
        if not (index.parent / name).is_file():
            raise UsageError(f"{index}: {name} is missing")
        state |= _read(index.parent / name, None)[1]
    if not state:
        raise UsageError(f"{index}: names no files (`weight_map`)")
    return state


def _are_tensors(state: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


def _networks(
    state: Mapping[str, Tensor], file: Path, grid: tuple[int, int] | None, which: str | None
) -> dict[str, Trunk]:
    state, root = below_root(state, _BRANCHES, which)
    if root.strip("."):
        log.info("%s: reads %s*", file.name, root)
    if not any(k.partition(".")[0] in _BRANCHES for k in state):
        return {network_name(root) or SINGLE: _one_encoder(state, file, grid)}
    networks: Networks = {"student": {}, "teacher": {}}
    for key, value in state.items():
        branch, _, name = key.partition(".")
        if branch in _BRANCHES:
            networks[_BRANCHES[branch]][name] = value
        elif branch == "predictor":
            networks["student"][key] = value
        else:
            raise UsageError(f"{file}: unknown key: {key}{looks_like(state)}")
    if not networks["teacher"] or not networks["student"]:
        raise UsageError(f"{file}: needs `module.base_encoder.*` and `module.momentum_encoder.*` keys")
    if any("blocks_token." in k for k in state):
        return {name: Trunk(_complete_bias(tensors), [], {}) for name, tensors in networks.items()}
    # MoCo v3
    for tensors in networks.values():
        for key in [k for k in tensors if is_projector(k)]:
            del tensors[key]
    found = {name: _one_encoder(tensors, file, grid) for name, tensors in networks.items()}
    return {name: trunk._replace(left_out=[*trunk.left_out, "heads"]) for name, trunk in found.items()}


def _one_encoder(given: Mapping[str, Tensor], file: Path, grid: tuple[int, int] | None) -> Trunk:
    """The tensors of one encoder; without a class head its class token is unused."""
    state = _fold_layer_scale(own_names(given))
    has_head = any(k.startswith("blocks_token.") for k in state)
    has_class_row = prefix_rows(state, grid)
    if not has_head and "fc_norm.weight" in state and "norm.weight" not in state and not has_class_row:
        # the official fine-tuning keeps the parameter but never reads it
        state.pop("cls_token", None)
    state = _fold_batch_norm(state, file)
    known = all(_KNOWN.match(k) for k in state)
    if known and not has_head and {"cls_token", "norm.weight", "head.weight"} <= state.keys():
        if has_class_row == 0:
            raise UsageError(
                f"{file}: looks fine-tuned by the released code with --use_cls, which classifies by the first patch "
                "token; this encoder pools by class attention or the mean: fine-tune without --use_cls, or load the "
                "pretrained checkpoint"
            )
    if not has_head and ("cls_token" in state or not known):
        trunk = convert(given, str(file), grid, _fold_layer_scale)
        known = all(_KNOWN.match(k) for k in trunk.tensors)
    else:
        trunk = Trunk(state, [], {})
    state = trunk.tensors
    if not known or not any(k.startswith("blocks.0.") for k in state):
        raise _not_extrema(state, file, looks_like(given))
    return trunk._replace(tensors=_complete_bias(state))


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names; also converts those that an older version exported for timm's Cait."""
    return {k.replace("blocks_token_only.", "blocks_token."): v for k, v in state.items()}


def _fold_layer_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Folds layer scale of trunk blocks (an option of the official fine-tuning) into the projections before it."""
    for key in [k for k in state if re.match(r"blocks\.\d+\.gamma_[12]$", k)]:
        block, _, which = key.rpartition(".")
        target = f"{block}.{'attn.proj' if which == 'gamma_1' else 'mlp.fc2'}"
        weight, bias = (state.get(f"{target}.{name}") for name in ("weight", "bias"))
        if weight is not None and bias is not None and weight.shape[:1] == bias.shape == state[key].shape:
            gamma = state.pop(key).float()
            state[f"{target}.weight"] = weight.float() * gamma.view(-1, *[1] * (weight.dim() - 1))
            state[f"{target}.bias"] = bias.float() * gamma
    return state


def _fold_batch_norm(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Folds the linear probe's BatchNorm (`main_lincls.py`; not affine, eps 1e-5) into the classifier after it."""
    names = ("head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias")
    if not any(k.startswith("head.0.running_") for k in state):
        return state
    mean, var, weight, bias = (state.get(name) for name in names)
    rest = {k: v for k, v in state.items() if not k.startswith("head.")}
    if mean is None or var is None or weight is None or bias is None or weight.dim() != 2:
        log.info("%s: the linear probe's head is incomplete and is left out", file.name)
        return rest
    if not mean.shape == var.shape == weight.shape[1:] or bias.shape != weight.shape[:1]:
        raise UsageError(f"{file}: the shapes of head.0 and head.1 do not match")
    folded = weight.double() * (var.double() + 1e-5).rsqrt()
    return rest | {"head.weight": folded.float(), "head.bias": (bias - folded @ mean.double()).float()}


def _complete_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds a zero qkv bias to an encoder trained without one."""
    names = [k for k in state if k.endswith("attn.qkv.weight")]
    if not any(k.endswith("attn.qkv.bias") for k in state):
        state |= {k.removesuffix("weight") + "bias": torch.zeros(state[k].shape[0]) for k in names}
    return state


def _not_extrema(state: Mapping[str, Tensor], file: Path, whose: str) -> UsageError:
    missing, extra = [k for k in _NEEDED if k not in state], [k for k in state if not _KNOWN.match(k)]
    found = {"missing": missing, "extra": extra}
    parts = "; ".join(f"{what}: {first(keys)}" for what, keys in found.items() if keys)
    return UsageError(
        f"{file}: neither ExtreMA weights nor the trunk of a ViT ({parts or 'no encoder'}){whose}"
    )


# ---- the architecture -----------------------------------------------------------------------------


def first(names: Iterable[Any], count: int = 3) -> str:
    """The first few names, for a message."""
    names = [str(name)[:80] for name in names]
    return ", ".join(names[:count]) + (" ..." if len(names) > count else "")


def is_projector(key: str) -> bool:
    """Whether a key is of a training head: `head.` and a number (a classifier has `head.weight`, `head.bias`)."""
    return bool(re.match(r"head\.\d", key)) or key.startswith("predictor.")


def _count_blocks(keys: Iterable[str], prefix: str) -> int:
    """1 + the largest N in `prefix.N.`; 0 if there is none."""
    return max((int(m[1]) + 1 for k in keys if (m := re.match(rf"{prefix}\.(\d{{1,6}})\.", k))), default=0)


def _dimensions(shapes: Shapes, source: str) -> dict[str, int]:
    """The dimensions of an encoder, from the shapes of its tensors."""
    try:
        kernel, table, fc1 = (
            shapes[k] for k in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
        )
    except KeyError as error:
        raise UsageError(f"{source}: not an ExtreMA encoder, {error.args[0]} is missing") from None
    if len(kernel) != 4 or kernel[2] != kernel[3] or len(table) != 3 or table[::2] != (1, kernel[0]):
        raise UsageError(
            f"{source}: not an ExtreMA encoder, patch_embed.proj.weight is {list(kernel)} "
            f"and pos_embed {list(table)}"
        )
    if not all((*kernel, *table, *fc1)):
        raise UsageError(f"{source}: not an ExtreMA encoder, it has empty tensors")
    return {
        "width": kernel[0],
        "depth": _count_blocks(shapes, "blocks"),
        "pool_depth": _count_blocks(shapes, "blocks_token"),
        "patch_size": kernel[2],
        "in_chans": kernel[1],
        "hidden": fc1[0],
        "patches": table[1],
    }


def check_architecture(model: ModelConfig, options: Mapping[str, Any], shapes: Shapes, source: str) -> None:
    """Raises UsageError if a description claims another architecture than its tensors have."""
    found = _dimensions(shapes, source)
    width, depth, _ = model.shape
    claimed = {
        "width": width,
        "depth": depth,
        "pool_depth": model.pool_depth if options["global_pool"] != "avg" else found["pool_depth"],
        "patch_size": model.patch_size,
        "in_chans": options["in_chans"] or model.in_chans,
        "hidden": int(width * model.mlp_ratio),
        "patches": model.num_patches,
    }
    misfit = f"{source}: the weights do not fit this architecture"
    for name, value in claimed.items():
        if value != found[name]:
            raise UsageError(f"{misfit}: {name} is {value} in its description, {found[name]} in its tensors")
    classes = options["num_classes"]
    if classes and shapes.get("head.weight") != (classes, width):
        head = list(shapes["head.weight"]) if "head.weight" in shapes else "missing"
        raise UsageError(f"{misfit}: {classes} classes in its description, head.weight is {head}")
    # otherwise a few small tensors with the right names could request an encoder of any depth
    needed = (depth + found["pool_depth"]) * width * (4 * width + 2 * found["hidden"])
    held = sum(math.prod(shape) for shape in shapes.values())
    if needed > 2 * held + 1_000_000:
        raise UsageError(
            f"{source}: not an ExtreMA encoder, {depth} blocks of width {width} have {needed} parameters, "
            f"the file has {held}"
        )


def is_sincos(table: Tensor, grid: tuple[int, int], trained: tuple[int, int] | None = None) -> bool:
    """Whether a position table [1, N, D] is the fixed one of `grid`, scaled to the grid `trained` if given."""
    wanted = sincos_table(table.shape[2], grid, torch.float64, trained)
    # in half precision it is rounded, values below 1 by at most a quarter of eps
    tolerance = SINCOS_TOLERANCE + torch.finfo(table.dtype).eps / 4
    return bool((table[0].double() - wanted).abs().max() <= tolerance)


def _find_grid(table: Tensor, grid: tuple[int, int] | None, source: str) -> tuple[tuple[int, int], bool]:
    """(rows, columns) of a position table [1, N, D], and whether it is the fixed sin-cos table.

    The grid of a fixed table follows from its values; a learned one is assumed square unless `grid` is given.
    """
    n, width = table.shape[1:]
    if grid is not None and grid[0] * grid[1] != n:
        raise UsageError(f"{source}: grid {grid[0]} x {grid[1]} for a position table of {n} rows")
    side = math.isqrt(n)
    # the square first, since nearly all tables are square
    grids = sorted(((r, n // r) for r in range(1, n + 1) if n % r == 0), key=lambda g: abs(g[0] - side))
    for candidate in [grid] if grid else grids:
        if width % 4 == 0 and is_sincos(table, candidate):
            return candidate, True
    if grid is None and side * side != n:
        raise UsageError(
            f"{source}: the position table has {n} rows, expected a square grid; give it as grid=(rows, columns)"
        )
    return grid or (side, side), False


def _infer_architecture(
    state: Mapping[str, Tensor], source: str, grid: tuple[int, int] | None, num_heads: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model and encoder options of a description, from the tensors of one encoder under our names."""
    found = _dimensions({k: tuple(v.shape) for k, v in state.items()}, source)
    width, depth, patch, chans = (found[k] for k in ("width", "depth", "patch_size", "in_chans"))
    if num_heads is None:
        # tensors do not show it; a named size implies it
        num_heads = next((shape[2] for shape in SIZES.values() if shape[:2] == (width, depth)), None)
    if num_heads is None and width % HEAD_DIM:
        raise UsageError(
            f"{source}: the number of heads is unknown, since width {width} is not a multiple of {HEAD_DIM}; give "
            "num_heads"
        )
    heads = width // HEAD_DIM if num_heads is None else num_heads
    if heads < 1 or width % heads:
        raise UsageError(f"{source}: num_heads {num_heads} does not divide the width {width}")
    grid, fixed = _find_grid(state["pos_embed"], grid, source)
    # the size of this shape, or the closest in width
    size: Any = min(
        SIZES, key=lambda name: (SIZES[name] != (width, depth, heads), abs(SIZES[name][0] - width))
    )
    try:
        model = ModelConfig(
            size=size,
            img_size=(grid[0] * patch, grid[1] * patch),
            patch_size=patch,
            in_chans=chans if chans in (1, 3) else 3,
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio(found["hidden"], width),
            pool_depth=found["pool_depth"] or 2,
        )
    except UsageError as error:
        raise UsageError(f"{source}: not an ExtreMA encoder, {error}") from None
    options = {
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "in_chans": chans,
        "global_pool": "token" if found["pool_depth"] else "avg",
        "fc_norm": "fc_norm.weight" in state,
        "pos_embed": "sincos" if fixed else "learned",
        # the linear probe saves no norm; other files without one are incomplete
        "final_norm": "head.weight" not in state or any(k.startswith(("norm.", "fc_norm.")) for k in state),
    }
    return to_dict(model), options


def mlp_ratio(hidden: int, width: int) -> float:
    """A ratio for which int(width * ratio) is exactly `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
