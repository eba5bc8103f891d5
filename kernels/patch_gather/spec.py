"""patch_gather for tests, tuning and benchmarks: compiled variants, measured cases, settings to try."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._launch import DTYPE_NAMES, Launch
from .._spec import Case, Sizes, Spec, compiled, grid, launches, meta
from .op import patch_gather
from .reference import gather_patches, patch_gather_reference


def variants() -> dict[str, Launch]:
    """The gather from every layout, patches of 16 and 14 pixels, kept ones and all; the positions."""
    from . import kernel

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    images = {"nhwc": meta(torch.uint8, 2, 224, 224, 3), "nchw": meta(fp32, 2, 3, 224, 224)}
    # strided
    kept = meta(torch.int32, 5, 2, 78)[..., ::2]
    found = {}
    for dtype, layout, patch, keep in (
        (bf16, "nhwc", 16, kept),
        (bf16, "nchw", 16, kept),
        (fp16, "nchw", 16, kept),
        (bf16, "nhwc", 14, kept),
        (bf16, "nchw", 16, None),
        (fp32, "nchw", 16, kept),
    ):
        name = f"pack {DTYPE_NAMES[dtype]} {layout} P{patch}{' all' if keep is None else ''}"
        (found[name],) = launches(kernel.pack, images[layout], keep, patch, dtype)
    for dtype, width, keep in ((bf16, 768, kept), (bf16, 384, None), (fp32, 768, kept)):
        args = (meta(dtype, 390, width), keep, meta(fp32, width), meta(fp32, 196, width))
        name = f"positions {DTYPE_NAMES[dtype]} D{width}{' all' if keep is None else ''}"
        (found[name],) = launches(kernel.add_positions, *args)
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
    picked: bool = False,
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
        if picked:
            images = gather_patches(images, keep, patch).unflatten(0, (views, batch))
        return images, keep, weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_(), pos

    def run(function):
        return lambda x, *args: function(x.flatten(0, 1) if picked else x, *args)

    def convolution(images, keep, weight, bias, pos):
        """The released order: embed every patch, add positions, gather per view."""
        tokens = F.conv2d(images, weight, bias, stride=patch).flatten(2).transpose(1, 2)
        tokens = tokens + pos.to(images.dtype)
        parts = [tokens.gather(1, k.long()[..., None].expand(-1, -1, width)) for k in keep]
        return torch.cat(parts)

    tokens = batch * views * kept
    baselines = {} if picked else {"convolution": convolution, "convolution compiled": compiled(convolution)}
    return Case(
        label,
        make,
        {
            "ours": run(patch_gather),
            "reference": run(patch_gather_reference),
            **baselines,
        },
        bytes_fwd=2 * tokens * ((1 if picked else 3) * chans * patch**2 + 3 * width),
        bytes_bwd=2 * tokens * (chans * patch**2 + width),
        flops_fwd=2 * tokens * chans * patch**2 * width,
        flops_bwd=2 * tokens * chans * patch**2 * width,
        backward=backward,
        row_dims={0: 1 if picked else 0, 1: 1},
        views=views,
    )


def cases(quick: bool) -> list[Case]:
    """Five views of 39 and eight of 19 out of 196, and their patches alone; quick: what an interpreter can run."""
    if quick:
        small = (2, (16, 16), 4, 2, 3, 32)
        return [_case("2x3 of 16", *small), _case("2x3 picked", *small, picked=True)]
    return [
        _case("B 5x39 picked", 512, (224, 224), 16, 5, 39, 768, picked=True),
        _case("S 5x39", 512, (224, 224), 16, 5, 39, 384),
        _case("B 5x39", 512, (224, 224), 16, 5, 39, 768),
        _case("B 1x39", 512, (224, 224), 16, 1, 39, 768),
        _case("B 8x19", 512, (224, 224), 16, 8, 19, 768),
    ]


def step_cases(s: Sizes) -> list[Case]:
    """Patches that color_views has picked: the kept ones with gradients, all without."""
    sides = s.height, s.width_px
    return [
        _case("student", s.images, sides, s.patch, s.views, s.kept, s.width, s.chans, True, True),
        _case("teacher", s.images, sides, s.patch, 1, s.patches, s.width, s.chans, False, True),
    ]


def space(direction: str, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Launch settings that tuning tries."""
    columns = "BLOCK_F" if direction == "pack" else "BLOCK_D"
    return grid(**{columns: (64, 128, 256)}, BLOCK_M=(8, 16, 32), num_warps=(4, 8))


SPEC = Spec(
    name="patch_gather",
    version=2,
    summary="normalization, gather of kept patches, embedding, bias and position; the rest is not read",
    public=("patch_gather",),
    torch_ops=("patch_pack", "add_positions"),
    variants=variants,
    cases=cases,
    space=space,
    step_cases=step_cases,
)
