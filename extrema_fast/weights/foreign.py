"""Loads the trunk of other projects' vision transformers under our names.

Supported are the state dicts of timm's VisionTransformer, MAE, DINO, DINOv2, MoCo v3, torchvision and Hugging Face
(ViT, DeiT, MAE, MSN, DINOv2). Our trunk has no class token, so theirs is left out with its row of the position
table, and so are their heads. Trunks with layers that ours lacks are rejected with the name of the layer.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import MODELS, SIZES
from ..errors import UsageError, cannot_import, one_line
from ..files import fits, read_json
from ..models.layers import NORM_EPS
from .folder import INDEX

log = logging.getLogger(__name__)

# every layout has a patch kernel; the prefix of its name is that of the network's wrappers
_KERNELS = r"patch_embed\.proj|embeddings\.patch_embeddings(\.projection)?|conv_proj"
_ROOT = re.compile(rf"^(?P<root>(.*\.)?)(?P<name>{_KERNELS})\.weight$")
# wrappers that may be anywhere in a name
_INSIDE = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# priority among several networks
_FIRST = ("teacher", "ema", "momentum", "target", "student")

_LAYER = r"^(?:encoder\.)?layers?\.(\d+)\."
_TV_LAYER = r"^encoder\.layers\.encoder_layer_(\d+)\."
# (theirs, ours), applied in turn to the names below the root
_RENAMES = (
    # DINOv2 saved in chunks: blocks.<chunk>.<block>
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    # Hugging Face
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^(?:embeddings\.)?(?:register|storage)_tokens$", "reg_token"),
    (r"^embeddings\.(\w+)$", r"\1"),
    (rf"{_LAYER}attention\.(?:attention\.query|q_proj)\.", r"blocks.\1.attn.q."),
    (rf"{_LAYER}attention\.(?:attention\.key|k_proj)\.", r"blocks.\1.attn.k."),
    (rf"{_LAYER}attention\.(?:attention\.value|v_proj)\.", r"blocks.\1.attn.v."),
    (rf"{_LAYER}attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (rf"{_LAYER}layernorm_before\.", r"blocks.\1.norm1."),
    (rf"{_LAYER}layernorm_after\.", r"blocks.\1.norm2."),
    (rf"{_LAYER}intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (rf"{_LAYER}output\.dense\.", r"blocks.\1.mlp.fc2."),
    (rf"{_LAYER}layer_scale([12])\.lambda1$", r"blocks.\1.gamma_\2"),
    (_LAYER, r"blocks.\1."),
    (r"^layernorm\.", "norm."),
    # torchvision
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (rf"{_TV_LAYER}ln_([12])\.", r"blocks.\1.norm\2."),
    (rf"{_TV_LAYER}self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (rf"{_TV_LAYER}self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (rf"{_TV_LAYER}mlp\.(?:linear_1|0)\.", r"blocks.\1.mlp.fc1."),
    (rf"{_TV_LAYER}mlp\.(?:linear_2|3)\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)

# parts of a trunk that ours cannot compute, under our names; `load_vit` supports the first
_REGISTERS = "register tokens"
_REFUSED = {
    _REGISTERS: r"^reg_token$",
    "SwiGLU": r"\.mlp\.(w12|w[123]|weights_in|weights_out|fc1_[gx]|gate_proj)\.",
    "rotary positions (RoPE)": r"(^|\.)(rope|rope_embed|rope_embeddings|rotary)(\.|$)",
    "relative positions": r"relative_position|rel_pos",
    "norms of queries and keys": r"\.attn\.[qk]_(norm|layernorm)\.",
    "a norm before the trunk": r"^(norm_pre|ln_pre|pre_layrnorm|patch_embed\.norm)\.",
    "norms after attention or MLP": r"^blocks\.\d+\.(attn|mlp)\.norm\.",
    "separate biases of queries and values": r"\.attn\.[qv]_bias$",
}
# parts that are left out of the trunk
_LEFT_OUT = {
    _REGISTERS: _REFUSED[_REGISTERS],
    "class token": r"^cls_token$",
    "distillation token": r"^dist_token$",
    "mask token": r"^mask_token$",
    "decoder": r"^decoder",
    "pooling": r"^(pooler|attn_pool)\.",
    "classifier or projector": r"^(head|head_dist|heads|classifier|cls_classifier|distillation_classifier|fc)\.",
}


# number of heads of other projects' widths whose head_dim is not 64
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


# what transformers and timm write next to `config.json`: one file, or the index of several
FILES = ("model.safetensors", "pytorch_model.bin", f"model.safetensors{INDEX}", f"pytorch_model.bin{INDEX}")


class Described(NamedTuple):
    """What the folder of another project records about its weights."""

    heads: int | None = None
    grid: tuple[int, int] | None = None
    data: dict[str, list[float]] | None = None
    """mean and standard deviation of the images"""
    interpolation: str | None = None
    crop_pct: float = 0.875
    norm_eps: float = NORM_EPS
    width: int | None = None


def read_folder(folder: Path) -> Described | None:
    """Reads `config.json` and `preprocessor_config.json` of transformers or timm; None for any other folder.

    Raises:
        UsageError: our trunk cannot compute this one.
    """
    config = read_json(folder / "config.json", {})
    # flat before timm 0.9; missing if transformers saved a model of timm
    timm = config.get("pretrained_cfg") or (config if isinstance(config.get("architecture"), str) else None)
    if not (fits(config, {"model_type": str, "hidden_size": int}) or isinstance(timm, dict)):
        return None
    prep = read_json(folder / "preprocessor_config.json", {})
    # checked below
    mean: Any = prep.get("image_mean")
    std: Any = prep.get("image_std")
    crop: Any = None
    interpolation = {2: "bilinear", 3: "bicubic"}.get(
        prep["resample"] if fits(prep, {"resample": int}) else 0
    )
    if prep:
        cropped = fits(prep, {"size": {"shortest_edge": int}, "crop_size": {"height": int}})
        cropped = cropped and prep.get("do_center_crop", True)
        crop = prep["crop_size"]["height"] / max(prep["size"]["shortest_edge"], 1) if cropped else 1.0
    if isinstance(timm, dict):
        mean, std, interpolation, crop = (timm.get(k) for k in ("mean", "std", "interpolation", "crop_pct"))
        config = _by_timm(config, folder)
    if (act := config.get("hidden_act", "gelu")) != "gelu":
        raise UsageError(
            f"{folder}: its MLP has the activation {str(act)[:40]!r}, which this encoder's trunk cannot represent"
        )
    image, patch = (_pair(config.get(name)) for name in ("image_size", "patch_size"))
    heads, width = (config.get(name) for name in ("num_attention_heads", "hidden_size"))
    eps = config.get("layer_norm_eps", NORM_EPS)
    known = all(fits(v, [float]) and v for v in (mean, std)) and min(std) > 0
    return Described(
        heads if fits(heads, int) else None,
        (image[0] // patch[0], image[1] // patch[1]) if image and patch else None,
        {"mean": mean, "std": std} if known else None,
        interpolation if fits(interpolation, str) else None,
        crop if fits(crop, float) and 0 < crop <= 1 else 0.875,
        eps if fits(eps, float) and 0 < eps < 1 else NORM_EPS,
        width if fits(width, int) else None,
    )


# timm models with the number of heads of their size; similar names may differ (`gap`: 16 instead of 12)
_PLAIN = re.compile(r"(?:vit|deit3?)_(tiny|small|base|large|huge)_patch\d+_\d+")


def _by_timm(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What `architecture` and `model_args` imply, under the names of transformers; builds the model without weights.

    Raises:
        UsageError: the blocks differ from ours.
    """
    name, args = (config.get(k) for k in ("architecture", "model_args"))
    name, args = name if isinstance(name, str) else "", args if isinstance(args, dict) else {}
    said: dict[str, Any] = {
        "num_attention_heads": args.get("num_heads", args.get("heads")),
        "hidden_size": args.get("embed_dim", args.get("width")),
        "image_size": args.get("img_size"),
        "patch_size": args.get("patch_size"),
        "layer_norm_eps": args.get("norm_eps"),
        "hidden_act": args.get("act_layer"),
    }
    said = {k: v for k, v in said.items() if v is not None}
    # ours need no timm
    if name in MODELS:
        width, _, heads = SIZES[MODELS[name]]
        if fits(given := said.get("hidden_size", 0), int) and given:
            heads = max(1, given // 64)
        patch = 14 if "_patch14_" in name else 16
        return {"num_attention_heads": heads, "hidden_size": width, "patch_size": patch} | said
    try:
        return said | _built(name, args, folder)
    except (ImportError, RuntimeError) as error:
        log.info(
            "%s: the number of heads is not read from timm (%s)", folder, cannot_import("timm", error, "timm")
        )
    if plain := _PLAIN.fullmatch(name):
        size: Any = plain[1]
        said.setdefault("num_attention_heads", SIZES[size][2])
    return said


# timm's blocks and layers that compute the same as ours
_STOCK = ("Block", "EvaBlock", "Attention", "EvaAttention", "Mlp")


def _built(name: str, args: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`_by_timm` from one block of timm's model; {} if timm cannot build it."""
    from timm.models import is_model, model_entrypoint
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if not is_model(name):
        return {}
    # other arguments could name files to read; one block, whatever depth the file claims
    known = {p for kind in (VisionTransformer, Eva) for p in inspect.signature(kind).parameters}
    try:
        with torch.device("meta"):
            vit = model_entrypoint(name)(**{**{k: v for k, v in args.items() if k in known}, "depth": 1})
    except Exception as error:
        log.info("%s: timm cannot build %s (%s)", folder, name, one_line(error))
        return {}
    if not isinstance(vit, (VisionTransformer, Eva)):
        return {}
    block: Any = vit.blocks[0]
    parts = (block, getattr(block, "attn", None), getattr(block, "mlp", None))
    others = [type(p).__name__ for p in parts if p is not None and type(p).__name__ not in _STOCK]
    if getattr(vit, "rope", None) is not None:
        # its angles are not among the tensors
        others.append("rotary positions (RoPE)")
    if others:
        raise UsageError(
            f"{folder}: timm's {name} has {', '.join(others)}, which this encoder's trunk cannot represent"
        )
    act = block.mlp.act
    exact = type(act).__name__ == "GELU" and getattr(act, "approximate", "none") == "none"
    return {
        "num_attention_heads": block.attn.num_heads,
        "hidden_size": vit.embed_dim,
        "patch_size": list(vit.patch_embed.patch_size),
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": "gelu" if exact else type(act).__name__,
    }


def _pair(value: Any) -> tuple[int, int] | None:
    """(height, width) of a positive side or pair in a description."""
    sides = [value, value] if fits(value, int) else value
    return (sides[0], sides[1]) if fits(sides, [int, int]) and min(sides) > 0 else None


# tokens before the patch tokens, under timm's names
PREFIX = ("cls_token", "dist_token", "reg_token")


class Trunk(NamedTuple):
    """A trunk under our names, and what was left out of it.

    Attributes:
        tensors: Of the trunk.
        left_out: Names of the parts that are left out.
        prefix: Class token, distillation token and registers under timm's names, and their rows of the position table.
    """

    tensors: dict[str, Tensor]
    left_out: list[str]
    prefix: dict[str, Tensor]


def plain_name(name: str) -> str:
    """A tensor's name without the prefixes of torch.compile, FSDP and activation checkpointing."""
    return _INSIDE.sub("", name)


def below_root(
    state: Mapping[str, Tensor], branches: Mapping[str, str], which: str | None = None
) -> tuple[dict[str, Tensor], str]:
    """The tensors of a network without the prefix of its wrappers, and that prefix.

    Args:
        branches: Names of the two networks of a method, which are not removed.
        which: `teacher` or `student`, if there are both; None: the teacher.
    """
    names = {plain_name(k): v for k, v in state.items()}
    roots = {m["root"] for k in names if (m := _ROOT.match(k))}
    if not roots:
        return names, ""
    both = re.compile(rf"(^|(?<=\.))({'|'.join(branches)})\.$")
    outer = {both.sub("", root) for root in roots}
    # without a network's name the outermost is taken: deeper ones are parts of it
    order = {r: (which and network_name(r) != which, _rank(r) if r else 0, r.count("."), r) for r in outer}
    root = min(outer, key=order.__getitem__)
    return {k.removeprefix(root): v for k, v in names.items() if k.startswith(root)}, root


def _rank(root: str) -> int:
    """Priority of a network: the lowest is taken."""
    parts = root.split(".")
    return next((i for i, w in enumerate(_FIRST) if any(p.startswith(w) for p in parts)), len(_FIRST))


def network_name(root: str) -> str:
    """`teacher` or `student` if the prefix of a network says so; else empty."""
    rank = _rank(root)
    return "" if rank == len(_FIRST) else "student" if _FIRST[rank] == "student" else "teacher"


def has_kernel(names: Iterable[str]) -> bool:
    """Whether one of these names is that of a patch kernel, which every network has."""
    return any(_ROOT.match(plain_name(name)) for name in names)


def convert(
    state: Mapping[str, Tensor],
    source: str,
    grid: tuple[int, int] | None,
    fold: Callable[[dict[str, Tensor]], Any],
) -> Trunk:
    """Converts another project's vision transformer to our names.

    Args:
        state: Its tensors, without the prefix of wrappers.
        source: The file, for messages.
        grid: (rows, columns) of the position table, if it is not square.
        fold: Folds layer scale into the weights before it.

    Raises:
        UsageError: The trunk has layers that ours cannot compute, or no position table.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for theirs, ours in _RENAMES:
            key = re.sub(theirs, ours, key)
        renamed[key] = value
    found = {
        what: keys[0]
        for what, name in _REFUSED.items()
        if (keys := [k for k in renamed if re.search(name, k)])
    }
    if "pos_embed" not in renamed and any(k.startswith("blocks.0.") for k in renamed):
        found["no table of absolute positions"] = "pos_embed is missing"
    if found.keys() - {_REGISTERS}:
        named = ", ".join(f"{what} ({key})" for what, key in found.items())
        raise UsageError(f"{source}: this ViT has {named}, which this encoder's trunk cannot represent")
    prefix: dict[str, Tensor] = {k: renamed[k] for k in PREFIX if k in renamed}
    table = renamed.get("pos_embed")
    if table is not None and table.dim() == 3:
        rows = prefix_rows(renamed, grid)
        # the usual number, if the grid is not square
        rows = len(prefix.keys() - {"reg_token"}) if rows is None else rows
        prefix["pos_embed"], renamed["pos_embed"] = table[:, :rows], table[:, rows:]
    left_out = {what: [k for k in renamed if re.search(keys, k)] for what, keys in _LEFT_OUT.items()}
    heads = {k for k in renamed if k.startswith("head.")}
    if not left_out["class token"] and heads == {"head.weight", "head.bias"}:
        # a classifier on the mean of the patches
        left_out["classifier or projector"] = []
    dropped = {k for keys in left_out.values() for k in keys}
    trunk = _join_qkv({k: v for k, v in renamed.items() if k not in dropped})
    scaled = any(re.search(r"\.gamma_[12]$", k) for k in trunk)
    fold(trunk)
    said = [what for what, keys in left_out.items() if keys]
    return Trunk(trunk, said + ["layer scale (folded into the weights)"] * scaled, prefix)


def prefix_rows(state: Mapping[str, Tensor], grid: tuple[int, int] | None) -> int | None:
    """Rows of class and distillation token, or of these and registers, in the position table [1, rows, D].

    0 with timm's no_embed_class, where they have no position; None if the tensors do not show it.
    """
    table = state.get("pos_embed")
    rows = table.shape[1] if table is not None and table.dim() == 3 else 0
    tokens = sum(k in state for k in ("cls_token", "dist_token"))
    registers = state.get("reg_token")
    counts = (0, tokens, tokens + (0 if registers is None else registers.shape[1]))
    fits = [n for n in counts if rows - n == grid[0] * grid[1]] if grid else []
    fits = fits or [n for n in counts if rows > n and math.isqrt(rows - n) ** 2 == rows - n]
    return fits[0] if fits else None


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joins query, key and value into one matrix; a missing bias is 0. Incomplete triples are left unchanged."""
    parts = ("q", "k", "v")
    for block in {m[1] for k in state if (m := re.match(r"(blocks\.\d+\.attn)\.q\.weight$", k))}:
        weights = [state[k] for p in parts if (k := f"{block}.{p}.weight") in state]
        if len(weights) < 3 or len({w.shape for w in weights}) > 1:
            continue
        state[f"{block}.qkv.weight"] = torch.cat(weights)
        if any(f"{block}.{p}.bias" in state for p in parts):
            zeros = weights[0].new_zeros(len(weights[0]))
            state[f"{block}.qkv.bias"] = torch.cat([state.get(f"{block}.{p}.bias", zeros) for p in parts])
        for p in parts:
            for name in ("weight", "bias"):
                state.pop(f"{block}.{p}.{name}", None)
    return state
