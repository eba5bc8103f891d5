"""Initial weights: those of a run with its heads, or the trunk of any vision transformer.

Reports part by part what was kept, adapted, freshly initialized or left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SIZES
from ..errors import UsageError
from ..models.encoder import Encoder
from ..models.positions import sincos_table
from .folder import WHICH, method_tensors, model_config, on_cpu
from .foreign import Described
from .load import Weights, load_encoder, open_weights
from .released import SINCOS_TOLERANCE, is_projector

Parts = dict[str, str]
KEPT, FRESH = "kept", "fresh"


def load_method_weights(method: Any, path: str | Path) -> Parts:
    """Fills an `ExtreMA` from `path`.

    Of a run, and of a pretraining checkpoint of the released code, both networks and their heads, which must fit; of
    one with other channels, another patch size or grid, and of anything else that `load_encoder` reads, its trunk, and
    the pooling and heads that it has and that fit.

    Returns:
        What was done, by part.

    Raises:
        UsageError: the architecture of the trunk, or of a whole run, differs.
    """
    weights, option = open_weights(path, assumed=_assumed(method.student)), f"--init-from {path}"
    networks = {which: weights.read(which) for which in WHICH if which in weights.networks}
    whole = len(networks) == 2 and all(any(map(is_projector, tensors)) for tensors in networks.values())
    whole = whole and model_config(weights.meta).in_chans == method.student.in_chans
    if whole and _copy_whole(method, networks, option):
        return {"student and teacher": f"{KEPT}, with their heads"}
    found: list[Parts] = []
    for which, branch in (("student", method.student_branch), ("teacher", method.teacher_branch)):
        # of one network alone both begin
        own = which if len(networks) != 1 else next(iter(networks))
        parts = fill_trunk(branch.encoder, weights, own, option=option)
        tensors = weights.read(weights.choose(own))
        heads = {"projector": ("head.", branch.projector)}
        if which == "student":
            heads["predictor"] = ("predictor.", branch.predictor)
        for head, (prefix, module) in heads.items():
            inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            parts[head] = _fill_whole(module, inside)
        found.append(parts)
    # pooling and heads that are fresh are the same in both networks, as they were made
    left_out = found[0].pop("left out", None)
    return found[0] | ({"left out": left_out} if left_out else {})


# of other shapes with another patch size or grid, to which they are adapted
_ADAPTED = ("patch_embed.proj.weight", "pos_embed")


def _copy_whole(method: Any, networks: Mapping[str, Mapping[str, Tensor]], option: str) -> bool:
    """Whether both networks were copied; not where they have to be adapted."""
    pairs = [(networks[which], method_tensors(method.state_dict(), which)) for which in WHICH]
    for tensors, wanted in pairs:
        found, expected = ({k: list(v.shape) for k, v in d.items()} for d in (tensors, wanted))
        if bad := sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)):
            if all(k in _ADAPTED for k in bad):
                return False
            k = next((k for k in bad if k not in _ADAPTED), bad[0])
            raise UsageError(
                f"{option}: another architecture: {k} is {found.get(k, 'nothing')} there, "
                f"{expected.get(k, 'nothing')} in this configuration"
                + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else "")
            )
    with torch.no_grad():
        for tensors, wanted in pairs:
            for k, v in wanted.items():
                v.copy_(tensors[k])
    return True


def load_trunk(encoder: Encoder, path: str | Path, which: str | None = None) -> Parts:
    """Loads an encoder's trunk in place from a run or from another project's vision transformer.

    Patch kernel and position table are resampled to this encoder's patch size, grid and channels. If the file records
    the mean and standard deviation of its RGB images, the kernel is adapted to this encoder's; otherwise they are
    assumed to be the same, as is the number of heads. A position table that differs from the fixed sin-cos one is kept
    as a parameter, without gradient if this encoder's table is fixed. The pooling head is loaded if the file has one of
    the same shape; otherwise it is left unchanged.

    Args:
        encoder: an encoder made by `create_encoder`.
        path: anything that `load_encoder` reads.
        which: 'teacher' or 'student', as in `load_encoder`.

    Returns:
        What was done to each of "patch embedding", "positions", "trunk", "final norm", "pooling" and "left out".

    Raises:
        UsageError: the trunk has another shape; nothing is changed.
    """
    parts = fill_trunk(encoder, path, which)
    if parts["positions"].startswith(KEPT) and not isinstance(encoder.pos_embed, nn.Parameter):
        # a buffer would be computed again for other image sizes
        encoder.pos_embed = nn.Parameter(encoder.pos_embed, requires_grad=False)
    return parts


@on_cpu
@torch.no_grad()
def fill_trunk(
    encoder: Encoder, path: str | Path | Weights, which: str | None = None, *, option: str = ""
) -> Parts:
    """`load_trunk` that leaves the table a buffer where it is one; `option`: what asked for it, for messages."""
    if not isinstance(path, Weights):
        path = open_weights(path, assumed=_assumed(encoder), which=which)
    weights: Weights = path
    where = option or str(weights.path)
    theirs_config = model_config(weights.meta)
    _check_trunk(encoder, theirs_config, where)
    theirs = load_encoder(
        weights,
        which,
        num_classes=0,
        in_chans=encoder.in_chans,
        img_size=encoder.img_size,
        patch_size=encoder.patch_size,
    )
    parts: Parts = {"patch embedding": _fill_patch_embed(encoder, theirs, theirs_config)}
    parts["positions"] = _fill_positions(encoder, theirs, theirs_config.grid)
    encoder.blocks.load_state_dict(theirs.blocks.state_dict())
    width, depth, heads = theirs_config.shape
    parts["trunk"] = f"{KEPT}: {depth} blocks, width {width}, heads {heads}"
    if theirs.norm_eps != encoder.norm_eps:
        parts["trunk"] += f"; eps of its norms {encoder.norm_eps:g} in place of {theirs.norm_eps:g}"
    parts["final norm"] = _fill_whole(encoder.norm, theirs.norm.state_dict())
    parts["pooling"] = FRESH
    if encoder.blocks_token is not None and theirs.blocks_token is not None:
        parts["pooling"] = _fill_whole(encoder.blocks_token, theirs.blocks_token.state_dict())
        if parts["pooling"] == KEPT:
            encoder.cls_token.copy_(theirs.cls_token)
    if left_out := weights.meta.get("source", {}).get("left_out"):
        parts["left out"] = ", ".join(left_out)
    return parts


def _assumed(encoder: Encoder) -> Described:
    return Described(heads=encoder.heads, data={"mean": list(encoder.mean), "std": list(encoder.std)})


def _check_trunk(encoder: Encoder, theirs: Any, where: str) -> None:
    names = ("width", "depth", "heads")
    own, other = (
        dict(zip(names, encoder.config.shape, strict=True)),
        dict(zip(names, theirs.shape, strict=True)),
    )
    own["MLP"], other["MLP"] = (int(c.shape[0] * c.mlp_ratio) for c in (encoder.config, theirs))
    if own == other:
        return
    differs = ", ".join(f"{k} {other[k]} (here {own[k]})" for k in own if own[k] != other[k])
    size = next((name for name, shape in SIZES.items() if shape == theirs.shape), "")
    if size and theirs.mlp_ratio == encoder.config.mlp_ratio and not encoder.config.width:
        fix = f"--model.size {size}"
    else:
        flags = {k: other[k] for k in names if own[k] != other[k]}
        if own["MLP"] != other["MLP"]:
            flags["mlp_ratio"] = theirs.mlp_ratio
        fix = " ".join(f"--model.{k} {v:g}" for k, v in flags.items())
    raise UsageError(f"{where}: its trunk is another architecture: {differs}; use {fix}")


def _fill_patch_embed(encoder: Encoder, theirs: Encoder, config: Any) -> str:
    ours, proj = encoder.patch_embed.proj, theirs.patch_embed.proj
    assert ours.bias is not None and proj.bias is not None
    kernel, bias = proj.weight.double(), proj.bias.double()
    done = []
    if config.patch_size != encoder.patch_size:
        done.append(f"resampled from {config.patch_size} to {encoder.patch_size} pixels")
    chans = config.in_chans
    if chans != encoder.in_chans:
        done.append(f"adapted from {chans} to {encoder.in_chans} channels")
    elif chans == 3 and (theirs.mean, theirs.std) != (encoder.mean, encoder.std):
        # the same tokens of the same image
        mean, std, new_mean, new_std = (
            torch.tensor(v, dtype=torch.float64).view(3, 1, 1)
            for v in (theirs.mean, theirs.std, encoder.mean, encoder.std)
        )
        bias = bias + (kernel * ((new_mean - mean) / std)).sum((1, 2, 3))
        kernel = kernel * (new_std / std)
        done.append("for this mean and std")
    ours.weight.copy_(kernel)
    ours.bias.copy_(bias)
    return ", ".join([KEPT, *done])


def _fill_positions(encoder: Encoder, theirs: Encoder, grid: tuple[int, int]) -> str:
    (rows, columns), width = encoder.grid, encoder.embed_dim
    table = theirs.pos_embed.detach()
    fixed = sincos_table(width, encoder.grid)[None]
    if (table - fixed).abs().max() <= SINCOS_TOLERANCE:
        return f"fixed table of {rows} x {columns} patches"
    encoder.pos_embed.copy_(table)
    if grid == encoder.grid:
        return KEPT
    return f"{KEPT}, resampled from {grid[0]} x {grid[1]} to {rows} x {columns} patches"


def _fill_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Fills a module from tensors by its names; says `FRESH` where they are others or of other shapes."""
    own = module.state_dict()
    if not own or own.keys() != tensors.keys() or any(tensors[k].shape != v.shape for k, v in own.items()):
        return FRESH
    with torch.no_grad():
        for k, v in own.items():
            v.copy_(tensors[k])
    return KEPT
