"""patch_gather: registered ops, autograd, the public function (README.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _launch
from .._check import FLOATS, autocast_dtype, check, check_keep, describe
from .reference import gather_patches, patch_gather_reference, pick

NHWC, NCHW, PATCHES = 0, 1, 2

torch.library.define(
    "extrema_fast::patch_gather_fwd",
    "(Tensor images, Tensor? keep, Tensor weight, Tensor bias, Tensor pos, int patch, int layout) -> Tensor",
)
torch.library.define(
    "extrema_fast::patch_pack",
    "(Tensor images, Tensor? keep, int patch, int layout, ScalarType dtype) -> Tensor",
)


def _plain_pack(images: Tensor, keep: Tensor | None, patch: int, layout: int, dtype: torch.dtype) -> Tensor:
    if layout == PATCHES:
        patches = pick(images, keep)
    elif layout == NCHW:
        patches = gather_patches(images, keep, patch)
    else:
        patches = gather_patches(images.permute(0, 3, 1, 2), keep, patch)
        # (c, py, px) -> (py, px, c)
        patches = patches.unflatten(-1, (-1, patch * patch)).transpose(-1, -2).flatten(-2)
        patches = (patches.float() - 128) / 128
    out = patches.flatten(0, 1).to(dtype).contiguous()
    # all patches of the right dtype may still be the input itself
    return out.clone() if out.data_ptr() == images.data_ptr() else out


@torch.library.impl("extrema_fast::patch_pack", "CompositeExplicitAutograd")
def _pack(images: Tensor, keep: Tensor | None, patch: int, layout: int, dtype: torch.dtype) -> Tensor:
    if _launch.use_triton(images):
        from .kernel import pack

        return pack(images, keep, patch, layout, dtype)
    return _plain_pack(images, keep, patch, layout, dtype)


@torch.library.impl("extrema_fast::patch_gather_fwd", "CompositeExplicitAutograd")
def _fwd(
    images: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, pos: Tensor, patch: int, layout: int
) -> Tensor:
    # fp32 and fp64 products take no tensor cores: cuBLAS has the better ones. The interpreter tests all
    runs = weight.dtype.itemsize == 2 or images.device.type == "cpu"
    if runs and _launch.use_triton(images):
        from .kernel import embed

        return embed(images, keep, weight, bias, pos, patch, layout)
    a = torch.ops.extrema_fast.patch_pack.default(images, keep, patch, layout, weight.dtype)
    out = F.linear(a, weight).to(bias.dtype) + bias
    if keep is None:
        batch = images.shape[0]
        return (out + pos.to(bias.dtype).repeat(batch, 1)).to(weight.dtype)
    return (out + pos.to(bias.dtype)[keep.flatten().long()]).to(weight.dtype)


def _rows(images: Tensor, keep: Tensor | None, patch: int, layout: int) -> int:
    if keep is not None:
        return keep.numel()
    if layout == PATCHES:
        return images.shape[0] * images.shape[1]
    height, width = images.shape[1:3] if layout == NHWC else images.shape[2:]
    return images.shape[0] * (height // patch) * (width // patch)


@torch.library.register_fake("extrema_fast::patch_gather_fwd")
def _fake_fwd(images, keep, weight, bias, pos, patch, layout) -> Tensor:
    return weight.new_empty(_rows(images, keep, patch, layout), weight.shape[0])


@torch.library.register_fake("extrema_fast::patch_pack")
def _fake_pack(images, keep, patch, layout, dtype) -> Tensor:
    channels = images.shape[{NHWC: 3, NCHW: 1}[layout]] if layout != PATCHES else 1
    numbers = images.shape[-1] if layout == PATCHES else channels * patch * patch
    return images.new_empty(_rows(images, keep, patch, layout), numbers, dtype=dtype)


class _PatchGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, keep, weight, bias, pos, patch, layout):
        # the gathered patches are made again in the backward pass: the image is smaller
        ctx.save_for_backward(images, *(() if keep is None else (keep,)))
        ctx.patch, ctx.layout, ctx.bias_dtype = patch, layout, bias.dtype
        return torch.ops.extrema_fast.patch_gather_fwd.default(images, keep, weight, bias, pos, patch, layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        images, *keep = ctx.saved_tensors
        dweight = dbias = None
        if ctx.needs_input_grad[2]:
            a = torch.ops.extrema_fast.patch_pack.default(
                images, keep[0] if keep else None, ctx.patch, ctx.layout, dout.dtype
            )
            dweight = dout.t() @ a
        if ctx.needs_input_grad[3]:
            dbias = dout.sum(0, dtype=ctx.bias_dtype)
        return None, None, dweight, dbias, None, None, None


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
    """Embedded tokens of the kept patches of all views, plus bias and positions; dropped ones are not read.

    images   uint8 [B, H, W, C] with `mean` and `std` (normalisation (x / 255 - mean) / std is folded into the
             weight), or normalised float [B, C, H, W], or float patches [B, N, C P P] ordered as the weight
    keep     [V, B, K] int32 (int64 is converted) in [0, N), or None: all patches, one view
    weight   [D, C, P, P];  bias [D] or None;  pos [N, D], fixed
    returns  [V*B, K, D], row v B + b; dtype: autocast's, else that of float images, the weight's for uint8
    raises   TypeError, ValueError naming the argument; indices are checked on a CPU, elsewhere with
             EXTREMA_FAST_CHECK=1
    falls back to the plain definition when float images or `pos` need a gradient
    maths    kernels/patch_gather/README.md
    """
    check("weight", weight, ("D", "C", "P", "P"), FLOATS)
    width, channels, patch = weight.shape[0], weight.shape[1], weight.shape[-1]
    if weight.shape[2] != patch:
        raise ValueError(f"weight: expected square patches, got {describe(weight)}")
    if not isinstance(images, Tensor) or images.dim() not in (3, 4):
        raise ValueError(
            f"images: expected uint8 [B, H, W, C], float [B, C, H, W] or [B, N, F], got {describe(images)}"
        )
    if images.dtype == torch.uint8:
        layout = NHWC
        check("images", images, ("B", "H", "W", channels), like=weight)
        if mean is None or std is None or len(mean) != channels or len(std) != channels:
            raise ValueError(f"mean, std: uint8 images need {channels} numbers each, got {mean} and {std}")
        sides = images.shape[1:3]
    elif images.dim() == 3:
        layout, sides = PATCHES, (patch, patch * images.shape[1])
        check("images", images, ("B", "N", channels * patch**2), FLOATS, weight)
    else:
        layout, sides = NCHW, images.shape[2:]
        check("images", images, ("B", channels, "H", "W"), FLOATS, weight)
    if layout != NHWC and (mean is not None or std is not None):
        raise ValueError("mean, std: only for uint8 images; float images are normalised already")
    if sides[0] % patch or sides[1] % patch:
        raise ValueError(f"images: sides {tuple(sides)} are no multiples of the patch size {patch}")
    batch, n = images.shape[0], (sides[0] // patch) * (sides[1] // patch)
    check("pos", pos, (n, width), FLOATS, weight)
    if bias is not None:
        check("bias", bias, (width,), FLOATS, weight)
    if keep is not None:
        keep = check_keep(keep, batch, n, weight)

    dtype = autocast_dtype(weight if layout == NHWC else images)
    if torch.is_grad_enabled() and (images.requires_grad or pos.requires_grad):
        low = None if bias is None else bias.to(dtype)
        images = images if layout == NHWC else images.to(dtype)
        return patch_gather_reference(images, keep, weight.to(dtype), low, pos, mean=mean, std=std)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast(images.device.type, enabled=False):
        w, b = weight.to(wide), (weight.new_zeros(width) if bias is None else bias).to(wide)
        if layout == NHWC:
            # pixels come as (x - 128) / 128: exact in bf16, small enough for fp16 gradients. Numbers, not a
            # tensor: copying one to a GPU waits, and cannot be captured in a graph
            columns = []
            for c, (m, s) in enumerate(zip(mean, std, strict=True)):
                b = b + w[:, c].sum((1, 2)) * ((128 / 255 - m) / s)
                columns.append(w[:, c] * (128 / (255 * s)))
            w = torch.stack(columns, -1)
        out = _PatchGather.apply(images, keep, w.reshape(width, -1).to(dtype), b, pos, patch, layout)
    views, kept = (1, n) if keep is None else (keep.shape[0], keep.shape[2])
    return out.view(views * batch, kept, width)
