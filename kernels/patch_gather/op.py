"""patch_gather: registered ops, autograd, the public function (README.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _launch
from .._autograd import first_order
from .._launch import FLOATS, autocast_dtype, check, check_keep, describe
from .reference import patch_gather_reference


def image_size(images: Tensor) -> tuple[int, int, int, int]:
    """(B, C, H, W) of uint8 [B, H, W, C] or float [B, C, H, W]."""
    b, x, y, z = images.shape
    return (b, z, x, y) if images.dtype == torch.uint8 else (b, x, y, z)


def _rows(images: Tensor, keep: Tensor | None, patch: int) -> int:
    batch, _, height, width = image_size(images)
    return batch * (height // patch) * (width // patch) if keep is None else keep.numel()


@_launch.op("patch_pack(Tensor images, Tensor? keep, int patch, ScalarType dtype) -> Tensor", "pack")
def _pack(images, keep, patch, dtype):
    return images.new_empty(_rows(images, keep, patch), image_size(images)[1] * patch**2, dtype=dtype)


@_launch.op("add_positions(Tensor tokens, Tensor? keep, Tensor? bias, Tensor pos) -> Tensor", "add_positions")
def _add_positions(tokens, keep, bias, pos):
    return tokens.new_empty(tokens.shape)


class _Embed(torch.autograd.Function):
    """patches [M, F] in the dtype of the matmul, weight [D, F] and bias [D] in theirs -> tokens [M, D]."""

    @staticmethod
    def forward(ctx, patches, keep, weight, bias, pos):
        ctx.save_for_backward(*([patches] if ctx.needs_input_grad[2] else []))
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        low = weight.to(patches.dtype)
        if pos is None:
            return F.linear(patches, low, None if bias is None else bias.to(patches.dtype))
        return _add_positions(F.linear(patches, low), keep, bias, pos)

    @staticmethod
    @first_order("patch_gather")
    def backward(ctx, dout):
        weight, bias = ctx.dtypes
        dweight = dbias = None
        if ctx.needs_input_grad[2]:
            (patches,) = ctx.saved_tensors
            # of 16-bit operands in fp32, where torch can: no rounded copy in between
            wide = dout.is_cuda and dout.dtype.itemsize == 2 and weight == torch.float32
            dweight = torch.mm(dout.t(), patches, **({"out_dtype": weight} if wide else {})).to(weight)
        if ctx.needs_input_grad[3]:
            dbias = dout.sum(0, dtype=bias)
        return None, None, dweight, dbias, None


def patch_gather(
    images: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Tensor:
    """Embedded tokens of the kept patches of all views, plus bias and positions, if any; dropped patches are not read.

    Maths: README.md in this folder. Runs the plain PyTorch definition where Triton cannot run and when float images
    or `pos` need a gradient.

    Args:
        images: uint8 [B, H, W, C] with `mean` and `std` (the normalization (x / 255 - mean) / std is folded into the
            weight), or normalized float [B, C, H, W], or only their kept patches, [V*B, K, C P P] (`color_views`).
        keep: [V, B, K] int32 (int64 is converted) in [0, N), or None: all patches, one view. Indices are checked on a
            CPU, elsewhere with EXTREMA_FAST_CHECK=1.
        weight: [D, C, P, P], of the patch convolution.
        bias: [D] or None.
        pos: [N, D], fixed; None: none are added.
        mean: C numbers, for uint8 images only.
        std: C numbers, for uint8 images only.

    Returns:
        [V*B, K, D], row v B + b, in the dtype of autocast, else that of float images, the weight's for uint8.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    check("weight", weight, ("D", "C", "P", "P"), FLOATS)
    width, channels, patch = weight.shape[0], weight.shape[1], weight.shape[-1]
    if weight.shape[2] != patch:
        raise ValueError(f"weight: expected square patches, got {describe(weight)}")
    if pos is not None:
        check("pos", pos, ("N", width), FLOATS, weight)
    if bias is not None:
        check("bias", bias, (width,), FLOATS, weight)
    pixels = isinstance(images, Tensor) and images.dtype == torch.uint8
    picked = isinstance(images, Tensor) and images.dim() == 3
    if pixels:
        check("images", images, ("B", "H", "W", channels), like=weight)
        if mean is None or std is None or len(mean) != channels or len(std) != channels:
            raise ValueError(f"mean, std: uint8 images need {channels} numbers each, got {mean} and {std}")
    elif mean is not None or std is not None:
        raise ValueError("mean, std: only for uint8 images; floats are normalized already")
    elif not picked:
        check("images", images, ("B", channels, "H", "W"), FLOATS, weight, "or uint8 [B, H, W, C]")
    if keep is not None:
        check(
            "keep", keep, ("V", "B", "K"), (torch.int32, torch.int64), weight, "integer indices, view-major"
        )
    n: int | None = None if pos is None else pos.shape[0]
    if picked:
        batch, kept = (len(images), "K" if n is None else n) if keep is None else keep.shape[1:]
        rows = "B" if keep is None else len(keep) * batch
        check("images", images, (rows, kept, channels * patch**2), FLOATS, weight, "kept patches")
        kept = images.shape[1]
    else:
        batch, _, *sides = image_size(images)
        if sides[0] % patch or sides[1] % patch:
            raise ValueError(f"images: sides {tuple(sides)} are no multiples of the patch size {patch}")
        n = (sides[0] // patch) * (sides[1] // patch)
        if pos is not None:
            check("pos", pos, (n, width), FLOATS, weight)
        kept = n if keep is None else keep.shape[2]
    # of patches alone without positions nothing is looked up
    if keep is not None and n is not None:
        keep = check_keep(keep, batch, n, weight)

    dtype = autocast_dtype(weight if pixels else images)
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (images, pos))
    if needed or not _launch.use_triton(images):
        low = None if bias is None else bias.to(dtype)
        images = images if pixels else images.to(dtype)
        return patch_gather_reference(images, keep, weight.to(dtype), low, pos, mean=mean, std=std)

    with torch.autocast(images.device.type, enabled=False):
        if mean is not None and std is not None:
            weight, bias = _fold(weight, bias, mean, std, _launch.wide(dtype))
        if picked:
            patches = images.to(dtype).flatten(0, 1)
        else:
            patches = _pack(images, keep, patch, dtype)
        out = _Embed.apply(patches, keep, weight.reshape(width, -1), bias, pos)
    return out.view((1 if keep is None else keep.shape[0]) * batch, kept, width)


def _fold(
    weight: Tensor, bias: Tensor | None, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weight [D, P, P, C] and bias [D] of pixels that come as (x - 128) / 128; README.md, "Normalization"."""
    weight = weight.to(dtype)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(dtype)
    columns = []
    # numbers, not a tensor: copying one to a GPU waits, and cannot be captured in a graph
    for c, (m, s) in enumerate(zip(mean, std)):
        bias = bias + weight[:, c].sum((1, 2)) * ((128 / 255 - m) / s)
        columns.append(weight[:, c] * (128 / (255 * s)))
    return torch.stack(columns, -1), bias
