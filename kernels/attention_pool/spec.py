"""attention_pool for the harness: compiled variants, measured cases, settings to try."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._spec import Case, Spec, Variant
from .op import attention_pool, fits
from .reference import PoolWeights, attention_pool_absorbed, attention_pool_reference

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _variant(direction: str, dtype: torch.dtype, n: int, width: int, heads: int) -> Variant:
    import triton
    import triton.language as tl

    from . import kernel

    t, chosen = TYPES[dtype], kernel.heuristic(direction[:3], n, width, dtype.itemsize)
    warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
    constexprs = {
        "n": n, "D": width, "H": heads, "BLOCK_N": triton.next_power_of_2(max(n, 16)),
        "BLOCK_H": kernel.HEADS, "CENTRE": dtype.itemsize > 2, "ACC": tl.float32,
    }  # fmt: skip
    rows = ("x_ptr", "xh0_ptr", "u_ptr")
    rows += ("dz_ptr", "dx_ptr", "du_ptr", "dxh0_ptr") if direction == "bwd" else ("z_ptr",)
    pointers = dict.fromkeys(rows, f"*{t}")
    pointers |= dict.fromkeys(("scores_ptr", "lse_ptr", "mu_ptr", "rstd_ptr"), "*fp32")
    if direction != "bwd":
        constexprs |= {"EPS": 1e-6, "HAS_STATS": direction == "fwd_stats"}
    strides = ("stride_xr", "stride_xn", "stride_cr", "stride_uh", "stride_ur", "stride_zh")
    streamed = {"x_tile": constexprs["BLOCK_N"], "u_tile": kernel.HEADS}
    if direction == "bwd":
        streamed |= {"dz_ptr": kernel.HEADS, "du_ptr": kernel.HEADS, "dx_tile": constexprs["BLOCK_N"]}
    else:
        streamed |= {"z_tile": kernel.HEADS}
    # a block of 16 heads holds less than 16 bytes for each of 256 threads; whole rows of it still lie side by side
    held = {k: rows * chosen["BLOCK_D"] * dtype.itemsize // (32 * warps) for k, rows in streamed.items()}
    return Variant(
        f"{direction} {t} D{width} H{heads} n{n}",
        getattr(kernel, f"attention_pool_{direction.removesuffix('_stats')}_kernel"),
        pointers | dict.fromkeys(strides, "i32"),
        constexprs | chosen,
        warps,
        stages,
        aligned=(*pointers, *strides),
        streamed=tuple(streamed),
        narrow={k: (size, "a small block") for k, size in held.items() if size < 16},
    )


def variants(every: bool = False) -> list[Variant]:
    """Views and whole images of ViT-S, B and L; bf16 everywhere, fp16 and fp32 once."""
    bf16, fp16, fp32 = TYPES
    shapes = [
        (bf16, 39, 384, 6), (bf16, 196, 384, 6), (bf16, 19, 768, 12), (bf16, 39, 768, 12),
        (bf16, 196, 768, 12), (bf16, 39, 1024, 16), (fp16, 39, 384, 6), (fp32, 39, 384, 6),
    ]  # fmt: skip
    both = ("fwd", "bwd")
    found = [_variant(d, *shape) for shape in shapes for d in both]
    found.append(_variant("fwd_stats", bf16, 39, 768, 12))
    if every:
        # every BLOCK_N, BLOCK_D; full and partly empty blocks
        blocks = [
            (dtype, n, width, heads)
            for dtype in TYPES
            for n in (7, 16, 19, 32, 49, 64, 100, 128, 197, 256)
            for width, heads in ((48, 3), (96, 3), (768, 12))
            if fits(dtype, n)
        ]
        found += [_variant(d, *block) for block in blocks for d in (*both, "fwd_stats")]
    return list({v.name: v for v in found}.values())


def _case(label: str, rows: int, n: int, width: int, heads: int) -> Case:
    def make(device, dtype, generator):
        def rand(*shape):
            return torch.randn(*shape, device=device, generator=generator)

        shapes = [(width,), (width,)] + [(width, width), (width,)] * 4
        weights = [(rand(*s) * width**-0.5).to(dtype).requires_grad_() for s in shapes]
        tokens = rand(rows, n, width).to(dtype).requires_grad_()
        return tokens, rand(rows, width).to(dtype).requires_grad_(), *weights

    def sdpa(tokens, cls, *weights):
        """LayerNorm, the key and value projections, one-query scaled_dot_product_attention."""
        w, d = PoolWeights(*weights), width // heads
        u = F.layer_norm(torch.cat([cls[:, None], tokens], 1), (width,), w.norm_weight, w.norm_bias, 1e-6)
        q = F.linear(u[:, :1], w.wq, w.bq).view(rows, 1, heads, d).transpose(1, 2)
        k = F.linear(u, w.wk, w.bk).view(rows, n + 1, heads, d).transpose(1, 2)
        v = F.linear(u, w.wv, w.bv).view(rows, n + 1, heads, d).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, width)
        return F.linear(out, w.wo, w.bo)

    def plain(pool):
        return lambda tokens, cls, *w: pool(tokens, cls, PoolWeights(*w), heads)[0]

    tiles = rows * (n * width + 2 * heads * width)
    projections = 2 * rows * 4 * width**2
    streamed = 2 * rows * 2 * heads * (n + 1) * width
    return Case(
        label,
        make,
        {
            "ours": plain(attention_pool),
            "reference": plain(attention_pool_reference),
            "sdpa": sdpa,
            "absorbed": plain(attention_pool_absorbed),
            "sdpa compiled": torch.compile(sdpa, dynamic=False),
            "absorbed compiled": torch.compile(plain(attention_pool_absorbed), dynamic=False),
        },
        bytes_fwd=2 * tiles,
        bytes_bwd=2 * (2 * rows * n * width + 3 * rows * heads * width),
        flops_fwd=projections + streamed,
        flops_bwd=2 * (projections + streamed),
        sizes={d: {"D": width, "H": heads, "n": 1 << (max(n, 16) - 1).bit_length()} for d in ("fwd", "bwd")},
    )


def cases(quick: bool) -> list[Case]:
    """Student views and whole images of ViT-S and ViT-B; quick: what an interpreter can run."""
    if quick:
        return [_case("n7", 2, 7, 32, 2), _case("n39", 2, 39, 64, 2)]
    return [
        _case("S n39", 5120, 39, 384, 6),
        _case("S n196", 1024, 196, 384, 6),
        _case("B n19", 8192, 19, 768, 12),
        _case("B n39", 5120, 39, 768, 12),
        _case("B n196", 1024, 196, 768, 12),
    ]


def space(direction: str, dtype: torch.dtype, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Launch settings that tuning tries."""
    blocks = [b for b in (32, 64, 128) if sizes["D"] % b == 0]
    return [
        {"BLOCK_D": b, "num_warps": w, "num_stages": s} for b in blocks for w in (2, 4, 8) for s in (1, 2, 3)
    ]


SPEC = Spec(
    name="attention_pool",
    version=2,
    summary="LayerNorm, key and value projections and one-query attention over a row; keys are never formed",
    public=("attention_pool", "PoolWeights"),
    torch_ops=("attention_pool_fwd", "attention_pool_fwd_stats", "attention_pool_bwd"),
    variants=variants,
    cases=cases,
    space=space,
)
