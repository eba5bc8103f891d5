"""The architecture behind tensors: told from their shapes, or compared with a description.

Nothing is allocated here that is larger than the tensors themselves, so a description that claims an absurd
size is refused before an encoder of that size is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import SIZES, ModelConfig, to_dict
from ..errors import UsageError
from ..models.encoder import sincos_table

# a table this near to the formula is the fixed one (the released files hold it in fp32)
SINCOS_TOLERANCE = 1e-5

HEAD_DIM = 64


def first(names: Iterable[str], count: int = 3) -> str:
    """The first few names, for a message."""
    names = list(names)
    return ", ".join(names[:count]) + (" ..." if len(names) > count else "")


def is_projector(key: str) -> bool:
    """Keys of the training heads: `head.` followed by a number (a classifier is `head.weight`, `head.bias`)."""
    return bool(re.match(r"head\.\d", key)) or key.startswith("predictor.")


def count_blocks(keys: Iterable[str], prefix: str) -> int:
    """1 + the largest N of `prefix.N.`; 0 without any."""
    found = [int(m[1]) for k in keys if (m := re.match(rf"{re.escape(prefix)}\.(\d{{1,6}})\.", k))]
    return max(found) + 1 if found else 0


def told_shape(shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, int]:
    """width, depth, pool_depth, patch_size, in_chans, hidden and patches of an encoder's tensors.

    raises  UsageError naming a tensor that is missing or has no such shape
    """
    try:
        kernel, table = shapes["patch_embed.proj.weight"], shapes["pos_embed"]
        fc1 = shapes["blocks.0.mlp.fc1.weight"]
    except KeyError as error:
        raise UsageError(f"{source}: not an ExtreMA encoder, {error.args[0]} is missing") from None
    if len(kernel) != 4 or kernel[2] != kernel[3] or len(table) != 3 or table[::2] != (1, kernel[0]):
        raise UsageError(
            f"{source}: not an ExtreMA encoder, patch_embed.proj.weight is {list(kernel)} "
            f"and pos_embed {list(table)}"
        )
    if not all(kernel) or not all(table) or not all(fc1):
        raise UsageError(f"{source}: not an ExtreMA encoder, it has tensors without values")
    return {
        "width": kernel[0],
        "depth": count_blocks(shapes, "blocks"),
        "pool_depth": count_blocks(shapes, "blocks_token"),
        "patch_size": kernel[2],
        "in_chans": kernel[1],
        "hidden": fc1[0],
        "patches": table[1],
    }


def check_agrees(
    model: ModelConfig, options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """raises UsageError where a description claims another architecture than its tensors have."""
    told = told_shape(shapes, source)
    width, depth, _ = model.shape
    claimed = {
        "width": width,
        "depth": depth,
        "pool_depth": model.pool_depth if options["global_pool"] != "avg" else told["pool_depth"],
        "patch_size": model.patch_size,
        "in_chans": options["in_chans"] or model.in_chans,
        "hidden": int(width * model.mlp_ratio),
        "patches": model.num_patches,
    }
    for name, value in claimed.items():
        if value != told[name]:
            raise UsageError(
                f"{source}: the weights do not fit this architecture: {name} is {value} in its description, "
                f"{told[name]} in its tensors"
            )
    classes = options["num_classes"]
    if classes and shapes.get("head.weight") != (classes, width):
        found = list(shapes["head.weight"]) if "head.weight" in shapes else "missing"
        raise UsageError(
            f"{source}: the weights do not fit this architecture: {classes} classes in its description, "
            f"head.weight is {found}"
        )
    _check_numbers(told, shapes, source)


def _check_numbers(told: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    # a few small tensors with the right names could else ask for an encoder of any depth
    width, hidden = told["width"], told["hidden"]
    needed = (told["depth"] + told["pool_depth"]) * width * (4 * width + 2 * hidden)
    held = sum(math.prod(shape) for shape in shapes.values())
    if needed > 2 * held + 1_000_000:
        raise UsageError(
            f"{source}: not an ExtreMA encoder, {told['depth']} blocks of width {width} have {needed} numbers, "
            f"the file holds {held}"
        )


def find_grid(table: Tensor, grid: tuple[int, int] | None, source: str) -> tuple[tuple[int, int], bool]:
    """(rows, columns) of a position table [1, N, D], and whether it is the fixed sin-cos table.

    The fixed table tells its grid; a learned one is taken as square unless `grid` is given.
    raises  UsageError for a grid of another size, or a learned table whose grid cannot be told
    """
    n, width = table.shape[1:]
    if grid is not None and grid[0] * grid[1] != n:
        raise UsageError(f"{source}: grid {grid[0]} x {grid[1]} for a position table of {n} rows")
    square = math.isqrt(n)
    sides = [(r, n // r) for r in range(1, n + 1) if n % r == 0]
    # the square first: nearly all tables are
    for candidate in [grid] if grid else sorted(sides, key=lambda s: abs(s[0] - square)):
        if width % 4 == 0 and is_sincos(table, candidate):
            return candidate, True
    if grid is None and square * square != n:
        raise UsageError(
            f"{source}: the position table has {n} rows, expected a square grid; give it as grid=(rows, columns)"
        )
    return grid or (square, square), False


def is_sincos(table: Tensor, grid: tuple[int, int], trained: tuple[int, int] | None = None) -> bool:
    """Whether a table [1, N, D] is the fixed one of `grid`."""
    if trained is None:
        wanted = sincos_table(table.shape[2], grid, torch.float64)
    else:
        wanted = sincos_table(table.shape[2], grid, torch.float64, trained)
    # files of half precision hold it rounded, values below 1 by a quarter of eps at most
    tolerance = SINCOS_TOLERANCE + torch.finfo(table.dtype).eps / 4
    return bool((table[0].double() - wanted).abs().max() <= tolerance)


def tell(
    state: Mapping[str, Tensor],
    source: str,
    grid: tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model, encoder options) of a description, told from the tensors of one encoder.

    grid       rows and columns of the patches, where the position table does not tell
    num_heads  of the trunk; shapes do not tell it. Default: width / 64, as in all released sizes
    raises     UsageError naming what is missing, contradictory, or cannot be told
    """
    told = told_shape({k: tuple(v.shape) for k, v in state.items()}, source)
    width, patch, chans = told["width"], told["patch_size"], told["in_chans"]
    if num_heads is None and width % HEAD_DIM:
        raise UsageError(
            f"{source}: width {width} is not a multiple of {HEAD_DIM}, so the heads cannot be told; "
            "give num_heads"
        )
    heads = num_heads or width // HEAD_DIM
    if heads < 1 or width % heads:
        raise UsageError(f"{source}: num_heads {num_heads} does not divide the width {width}")
    grid, fixed = find_grid(state["pos_embed"], grid, source)
    gamma = state.get("blocks_token.0.gamma_1")
    # trained values differ by channel; only a new encoder would start from their mean
    scale = 0.1 if gamma is None else float(gamma.float().mean())
    try:
        model = ModelConfig(
            size=_size(width, told["depth"], heads),
            img_size=(grid[0] * patch, grid[1] * patch),
            patch_size=patch,
            in_chans=chans if chans in (1, 3) else 3,
            width=width,
            depth=told["depth"],
            heads=heads,
            mlp_ratio=_ratio(told["hidden"], width),
            pool_depth=told["pool_depth"] or 2,
            layer_scale=scale if math.isfinite(scale) and scale else 0.1,
        )
    except UsageError as error:
        raise UsageError(f"{source}: not an ExtreMA encoder, {error}") from None
    options = {
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "in_chans": chans,
        "global_pool": "token" if told["pool_depth"] else "avg",
        "fc_norm": "fc_norm.weight" in state,
        "pos_embed": "sincos" if fixed else "learned",
    }
    return to_dict(model), options


def _size(width: int, depth: int, heads: int) -> str:
    """The name of this shape, or of the one nearest in width."""
    named = [name for name, shape in SIZES.items() if shape == (width, depth, heads)]
    return named[0] if named else min(SIZES, key=lambda name: abs(SIZES[name][0] - width))


def _ratio(hidden: int, width: int) -> float:
    """A ratio whose product with the width, cut to an integer, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
