"""patch_gather for tests, tuning and benchmarks: compiled variants, measured cases, settings to try."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._launch import DTYPE_NAMES, Launch
from .._spec import Case, Sizes, Spec, grid, launches, meta
from .op import pack_linear, patch_gather
from .reference import patch_gather_reference


def variants() -> dict[str, Launch]:
    """The embedding from every layout, and the gather alone, patches of 16 and 14 pixels; kept ones and all."""
    from . import kernel

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    images = {"nhwc": meta(torch.uint8, 2, 224, 224, 3), "nchw": meta(fp32, 2, 3, 224, 224)}
    # strided
    kept = meta(torch.int32, 5, 2, 78)[..., ::2]
    found = {}

    def add(direction, dtype, layout, patch, width, keep=kept):
        weight, bias = meta(dtype, width, 3 * patch**2), meta(fp32, width)
        pos = meta(fp32, (224 // patch) ** 2, width)
        if direction == "fwd":
            launched = launches(kernel.embed, images[layout], keep, weight, bias, pos, patch)
        else:
            launched = launches(kernel.pack, images[layout], keep, patch, dtype)
        name = f"{direction} {DTYPE_NAMES[dtype]} {layout} P{patch} D{width}"
        (found[name + (" all" if keep is None else "")],) = launched

    for shape in (
        (bf16, "nhwc", 16, 768),
        (bf16, "nchw", 16, 384),
        (fp16, "nhwc", 16, 1024),
        (bf16, "nhwc", 14, 384),
    ):
        add("fwd", *shape)
        add("pack", *shape)
    add("fwd", bf16, "nchw", 16, 384, None)
    add("pack", fp32, "nchw", 16, 384)
    return found


def _case(
    label: str,
    batch: int,
    sides: tuple[int, int],
    patch: int,
    views: int,
    kept: int,
    width: int,
    chans: int = 3,
    backward: bool = True,
) -> Case:
    n = (sides[0] // patch) * (sides[1] // patch)

    def make(device, dtype, generator):
        images = torch.randn(batch, chans, *sides, device=device, generator=generator).to(dtype)
        # views share no patch where there are enough
        draws = 1 if views * kept <= n else views
        order = torch.rand(batch, draws, n, device=device, generator=generator).argsort(-1)
        keep = (
            order[..., : views * kept // draws].reshape(batch, views, kept).transpose(0, 1).int().contiguous()
        )
        weight = torch.randn(width, chans, patch, patch, device=device, generator=generator) * 0.03
        bias = torch.randn(width, device=device, generator=generator)
        pos = torch.randn(n, width, device=device, generator=generator)
        return images, keep, weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_(), pos

    def convolution(images, keep, weight, bias, pos):
        """The released order: embed every patch, add positions, gather per view."""
        tokens = F.conv2d(images, weight, bias, stride=patch).flatten(2).transpose(1, 2)
        tokens = tokens + pos.to(images.dtype)
        parts = [tokens.gather(1, k.long()[..., None].expand(-1, -1, width)) for k in keep]
        return torch.cat(parts)

    tokens = batch * views * kept
    return Case(
        label,
        make,
        {
            "ours": patch_gather,
            "reference": patch_gather_reference,
            "pack + linear": lambda x, keep, w, b, pos: pack_linear(
                x, keep, w.flatten(1), b, pos, patch
            ).view(views * batch, kept, width),
            "convolution": convolution,
            "convolution compiled": torch.compile(convolution, dynamic=False),
        },
        bytes_fwd=2 * tokens * (chans * patch**2 + width),
        bytes_bwd=2 * tokens * (2 * chans * patch**2 + width),
        flops_fwd=2 * tokens * chans * patch**2 * width,
        flops_bwd=2 * tokens * chans * patch**2 * width,
        backward=backward,
        row_dims={0: 0, 1: 1},
        views=views,
    )


def cases(quick: bool) -> list[Case]:
    """Five views of 39 and eight of 19 out of 196; quick: what an interpreter can run."""
    if quick:
        return [_case("2x3 of 16", 2, (16, 16), 4, 2, 3, 32)]
    return [
        _case("S 5x39", 512, (224, 224), 16, 5, 39, 384),
        _case("B 5x39", 512, (224, 224), 16, 5, 39, 768),
        _case("B 1x39", 512, (224, 224), 16, 1, 39, 768),
        _case("B 8x19", 512, (224, 224), 16, 8, 19, 768),
    ]


def step_cases(s: Sizes) -> list[Case]:
    """The kept patches with gradients, all patches without."""
    sides = s.height, s.width_px
    return [
        _case("student", s.images, sides, s.patch, s.views, s.kept, s.width, s.chans),
        _case("teacher", s.images, sides, s.patch, 1, s.patches, s.width, s.chans, backward=False),
    ]


def space(direction: str, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Launch settings that tuning tries."""
    if direction == "pack":
        return grid(BLOCK_M=(8, 16, 32), BLOCK_F=(64, 128, 256), num_warps=(4, 8))
    return grid(
        BLOCK_M=(64, 128), BLOCK_N=(64, 128, 256), BLOCK_F=(32, 64), num_warps=(4, 8), num_stages=(2, 3, 4)
    )


SPEC = Spec(
    name="patch_gather",
    version=1,
    summary="normalization, gather of kept patches, embedding, bias and position; the rest is not read",
    public=("patch_gather",),
    torch_ops=("patch_gather_fwd", "patch_pack"),
    variants=variants,
    cases=cases,
    space=space,
    step_cases=step_cases,
)
