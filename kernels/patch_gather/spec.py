"""patch_gather for the harness: compiled variants, measured cases, settings to try."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .._spec import Case, Spec, Variant
from .op import patch_gather
from .reference import patch_gather_reference

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _variant(
    direction: str, dtype: torch.dtype, layout: int, patch: int, width: int, kept: int | None = 39
) -> Variant:
    import triton.language as tl

    from . import kernel

    t, chosen = TYPES[dtype], kernel.heuristic(direction, dtype.itemsize, patch)
    warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
    strides = ("stride_b", "stride_c", "stride_h", "stride_kv", "stride_kb", "stride_kk")
    source = {kernel.NHWC: "*u8", kernel.NCHW: "*fp32", kernel.PATCHES: f"*{t}"}[layout]
    pointers = {"image_ptr": source, "keep_ptr": "*i32", "out_ptr": f"*{t}"}
    constexprs = {
        "GW": 224 // patch,
        "P": patch,
        "C": 3,
        "K": kept or (224 // patch) ** 2,
        "F": 3 * patch**2,
        "LAYOUT": layout,
        "HAS_KEEP": kept is not None,
    }
    if direction == "fwd":
        pointers |= {"weight_ptr": f"*{t}", "bias_ptr": "*fp32", "pos_ptr": "*fp32"}
        constexprs |= {"D": width, "ACC": tl.float32}
    # what lies side by side: a row of a patch, a row of the weight, of the result
    size, row = dtype.itemsize, 3 * patch**2
    runs = {
        "image_ptr": {kernel.NHWC: 3 * patch, kernel.NCHW: 4 * patch, kernel.PATCHES: row * size}[layout],
        "out_ptr": (width if direction == "fwd" else row) * size,
    }
    if direction == "fwd":
        runs["weight_ptr"] = row * size
    narrow = {k: (math.gcd(run, 16), "rows of a patch start there") for k, run in runs.items() if run % 16}
    if row % chosen["BLOCK_F"]:
        narrow["image_ptr"] = ({"*u8": 1, "*fp32": 4}.get(source, size), "columns of a last block")
    elif direction == "fwd" and layout == kernel.NHWC:
        least = min(8, math.gcd(3 * patch, 16))
        narrow["image_ptr"] = (least, "sm_90 and newer copy bytes for a 16-bit product 8 at a time")
    name = {kernel.NHWC: "nhwc", kernel.NCHW: "nchw", kernel.PATCHES: "patches"}[layout]
    return Variant(
        f"{direction} {t} {name} P{patch} D{width}" + ("" if kept else " all"),
        kernel.patch_gather_kernel if direction == "fwd" else kernel.patch_pack_kernel,
        pointers | {"rows": "i32", "batch": "i32"} | dict.fromkeys(strides, "i32"),
        constexprs | chosen,
        warps,
        stages,
        aligned=(*pointers, "stride_b", "stride_c", "stride_h"),
        streamed=tuple(runs),
        narrow=narrow,
    )


def variants(every: bool = False) -> list[Variant]:
    """The embedding from every layout, and the gather alone, patches of 16 and 14 pixels; kept ones and all."""
    from . import kernel

    bf16, fp16, fp32 = TYPES
    both, layouts = ("fwd", "pack"), (kernel.NHWC, kernel.NCHW, kernel.PATCHES)
    shapes = [
        (bf16, kernel.NHWC, 16, 768), (bf16, kernel.NCHW, 16, 384), (bf16, kernel.PATCHES, 16, 768),
        (fp16, kernel.NHWC, 16, 1024), (bf16, kernel.NHWC, 14, 384),
    ]  # fmt: skip
    found = [_variant(d, *shape) for shape in shapes for d in both]
    found.append(_variant("fwd", bf16, kernel.NCHW, 16, 384, None))
    found.append(_variant("pack", fp32, kernel.NCHW, 16, 384))
    if every:
        found += [
            _variant(d, dtype, layout, patch, width, kept)
            for dtype in TYPES
            for layout in layouts
            for patch, width in ((4, 96), (8, 384), (14, 384), (16, 192), (16, 1024), (32, 768))
            for kept in (39, None)
            for d in both
            # fp32 is left to cuBLAS
            if d == "pack" or dtype.itemsize == 2
        ]
    return list({v.name: v for v in found}.values())


def _case(label: str, batch: int, side: int, patch: int, views: int, kept: int, width: int) -> Case:
    n = (side // patch) ** 2

    def make(device, dtype, generator):
        images = torch.randn(batch, 3, side, side, device=device, generator=generator).to(dtype)
        order = torch.rand(batch, n, device=device, generator=generator).argsort(-1)[:, : views * kept]
        keep = order.view(batch, views, kept).transpose(0, 1).int().contiguous()
        weight = torch.randn(width, 3, patch, patch, device=device, generator=generator) * 0.03
        bias = torch.randn(width, device=device, generator=generator)
        pos = torch.randn(n, width, device=device, generator=generator)
        return images, keep, weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_(), pos

    def pack_linear(images, keep, weight, bias, pos):
        """The gather alone, then torch's linear layer."""
        a = torch.ops.extrema_fast.patch_pack(images, keep, patch, 1, weight.dtype)
        out = F.linear(a, weight.flatten(1), bias) + pos.to(weight.dtype)[keep.flatten().long()]
        return out.view(views * batch, kept, width)

    def convolution(images, keep, weight, bias, pos):
        """The released order: embed every patch, add positions, gather per view."""
        tokens = F.conv2d(images, weight, bias, stride=patch).flatten(2).transpose(1, 2) + pos.to(
            images.dtype
        )
        parts = [tokens.gather(1, k.long()[..., None].expand(-1, -1, width)) for k in keep]
        return torch.cat(parts)

    tokens = batch * views * kept
    return Case(
        label,
        make,
        {
            "ours": patch_gather,
            "reference": patch_gather_reference,
            "pack + linear": pack_linear,
            "convolution": convolution,
            "convolution compiled": torch.compile(convolution, dynamic=False),
        },
        bytes_fwd=2 * tokens * (3 * patch**2 + width),
        bytes_bwd=2 * tokens * (2 * 3 * patch**2 + width),
        flops_fwd=2 * tokens * 3 * patch**2 * width,
        flops_bwd=2 * tokens * 3 * patch**2 * width,
        sizes={"fwd": {"D": width, "P": patch}, "pack": {"D": 3 * patch**2, "P": patch}},
    )


def cases(quick: bool) -> list[Case]:
    """Five views of 39 and eight of 19 out of 196; quick: what an interpreter can run."""
    if quick:
        return [_case("2x3 of 16", 2, 16, 4, 2, 3, 32)]
    return [
        _case("S 5x39", 512, 224, 16, 5, 39, 384),
        _case("B 5x39", 512, 224, 16, 5, 39, 768),
        _case("B 1x39", 512, 224, 16, 1, 39, 768),
        _case("B 8x19", 512, 224, 16, 8, 19, 768),
    ]


def space(direction: str, dtype: torch.dtype, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Launch settings that tuning tries."""
    if direction == "pack":
        return [
            {"BLOCK_M": m, "BLOCK_F": f, "num_warps": w}
            for m in (8, 16, 32)
            for f in (64, 128, 256)
            for w in (4, 8)
        ]
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_F": f, "num_warps": w, "num_stages": s}
        for m in (64, 128) for n in (64, 128, 256) for f in (32, 64) for w in (4, 8) for s in (2, 3, 4)
    ]  # fmt: skip


SPEC = Spec(
    name="patch_gather",
    version=1,
    summary="normalisation, gather of kept patches, embedding, bias and position; the rest is not read",
    public=("patch_gather",),
    torch_ops=("patch_gather_fwd", "patch_pack"),
    variants=variants,
    cases=cases,
    space=space,
)
