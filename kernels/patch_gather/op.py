"""patch_gather: registered ops, autograd, the public function (README.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _launch
from .._launch import FLOATS, autocast_dtype, check, check_keep, describe
from .reference import patch_gather_reference


def image_size(images: Tensor) -> tuple[int, int, int, int]:
    """(B, C, H, W) of uint8 [B, H, W, C] or float [B, C, H, W]."""
    b, x, y, z = images.shape
    return (b, z, x, y) if images.dtype == torch.uint8 else (b, x, y, z)


def _rows(images: Tensor, keep: Tensor | None, patch: int) -> int:
    batch, _, height, width = image_size(images)
    return batch * (height // patch) * (width // patch) if keep is None else keep.numel()


@_launch.op(
    "patch_gather_fwd(Tensor images, Tensor? keep, Tensor weight, Tensor bias, Tensor pos, int patch) -> Tensor",
    "embed",
)
def _fwd(images, keep, weight, bias, pos, patch):
    return weight.new_empty(_rows(images, keep, patch), weight.shape[0])


@_launch.op("patch_pack(Tensor images, Tensor? keep, int patch, ScalarType dtype) -> Tensor", "pack")
def _pack(images, keep, patch, dtype):
    return images.new_empty(_rows(images, keep, patch), image_size(images)[1] * patch**2, dtype=dtype)


def pack_linear(
    images: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, pos: Tensor, patch: int
) -> Tensor:
    """As the op `patch_gather_fwd`, by the gather alone and torch's matmul; [M, D]."""
    out = F.linear(_pack(images, keep, patch, weight.dtype), weight).to(bias.dtype) + bias
    at = pos.repeat(len(images), 1) if keep is None else pos[keep.flatten().long()]
    return (out + at.to(bias.dtype)).to(weight.dtype)


class _PatchGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, keep, weight, bias, pos, patch):
        # the backward pass gathers the patches again: the image is smaller
        ctx.save_for_backward(images, *(() if keep is None else (keep,)))
        ctx.patch, ctx.bias_dtype = patch, bias.dtype
        # fp32 and fp64 matmuls use no tensor cores: cuBLAS has better ones. The interpreter tests all
        fused = weight.dtype.itemsize == 2 or images.device.type == "cpu"
        return (_fwd if fused else pack_linear)(images, keep, weight, bias, pos, patch)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        images, *keep = ctx.saved_tensors
        dweight = dbias = None
        if ctx.needs_input_grad[2]:
            patches = _pack(images, keep[0] if keep else None, ctx.patch, dout.dtype)
            dweight = dout.t() @ patches
        if ctx.needs_input_grad[3]:
            dbias = dout.sum(0, dtype=ctx.bias_dtype)
        return None, None, dweight, dbias, None, None


def patch_gather(
    images: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Tensor:
    """Embedded tokens of the kept patches of all views, plus bias and positions; dropped patches are not read.

    Maths: README.md in this folder. Runs the plain PyTorch definition where Triton cannot run and when float images
    or `pos` need a gradient.

    Args:
        images: uint8 [B, H, W, C] with `mean` and `std` (the normalization (x / 255 - mean) / std is folded into the
            weight), or normalized float [B, C, H, W].
        keep: [V, B, K] int32 (int64 is converted) in [0, N), or None: all patches, one view. Indices are checked on a
            CPU, elsewhere with EXTREMA_FAST_CHECK=1.
        weight: [D, C, P, P], of the patch convolution.
        bias: [D] or None.
        pos: [N, D], fixed.
        mean: C numbers, for uint8 images only.
        std: C numbers, for uint8 images only.

    Returns:
        [V*B, K, D], row v B + b; dtype: autocast's, else that of float images, the weight's for uint8.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    check("weight", weight, ("D", "C", "P", "P"), FLOATS)
    width, channels, patch = weight.shape[0], weight.shape[1], weight.shape[-1]
    if weight.shape[2] != patch:
        raise ValueError(f"weight: expected square patches, got {describe(weight)}")
    pixels = isinstance(images, Tensor) and images.dtype == torch.uint8
    if pixels:
        check("images", images, ("B", "H", "W", channels), like=weight)
        if mean is None or std is None or len(mean) != channels or len(std) != channels:
            raise ValueError(f"mean, std: uint8 images need {channels} numbers each, got {mean} and {std}")
    else:
        check("images", images, ("B", channels, "H", "W"), FLOATS, weight, "or uint8 [B, H, W, C]")
        if mean is not None or std is not None:
            raise ValueError("mean, std: only for uint8 images; float images are normalized already")
    batch, _, *sides = image_size(images)
    if sides[0] % patch or sides[1] % patch:
        raise ValueError(f"images: sides {tuple(sides)} are no multiples of the patch size {patch}")
    n = (sides[0] // patch) * (sides[1] // patch)
    check("pos", pos, (n, width), FLOATS, weight)
    if bias is not None:
        check("bias", bias, (width,), FLOATS, weight)
    if keep is not None:
        keep = check_keep(keep, batch, n, weight)

    dtype = autocast_dtype(weight if pixels else images)
    needed = torch.is_grad_enabled() and (images.requires_grad or pos.requires_grad)
    if needed or not _launch.use_triton(images):
        low = None if bias is None else bias.to(dtype)
        images = images if pixels else images.to(dtype)
        return patch_gather_reference(images, keep, weight.to(dtype), low, pos, mean=mean, std=std)

    wide = _launch.wide(dtype)
    with torch.autocast(images.device.type, enabled=False):
        w, b = weight.to(wide), (weight.new_zeros(width) if bias is None else bias).to(wide)
        if mean is not None and std is not None:
            # pixels come as (x - 128) / 128: exact in bf16, small enough for fp16 gradients. Numbers, not a
            # tensor: copying one to a GPU waits, and cannot be captured in a graph
            columns = []
            for c, (m, s) in enumerate(zip(mean, std, strict=True)):
                b = b + w[:, c].sum((1, 2)) * ((128 / 255 - m) / s)
                columns.append(w[:, c] * (128 / (255 * s)))
            w = torch.stack(columns, -1)
        out = _PatchGather.apply(images, keep, w.reshape(width, -1).to(dtype), b, pos, patch)
    views, kept = (1, n) if keep is None else (keep.shape[0], keep.shape[2])
    return out.view(views * batch, kept, width)
