"""attention_pool for the harness: compiled variants, measured cases, settings to try."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._spec import Case, Spec, Variant
from .op import attention_pool
from .reference import PoolWeights, attention_pool_absorbed, attention_pool_reference

SHAPES = ((384, 6, 39), (384, 6, 196), (768, 12, 19), (768, 12, 39), (768, 12, 196), (1024, 16, 39))
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def variants() -> list[Variant]:
    """Forward (with and without given statistics) and backward; bf16 everywhere, fp16 and fp32 once."""
    import triton
    import triton.language as tl

    from . import kernel

    found = []
    shapes = [(torch.bfloat16, *s) for s in SHAPES]
    shapes += [(torch.float16, 384, 6, 39), (torch.float32, 384, 6, 39)]
    for dtype, width, heads, n in shapes:
        t = TYPES[dtype]
        sizes = {
            "n": n, "D": width, "H": heads, "BLOCK_N": triton.next_power_of_2(max(n, 16)),
            "BLOCK_H": kernel.HEADS, "ACC": tl.float32,
        }  # fmt: skip
        strides = ("stride_xr", "stride_xn", "stride_cr", "stride_uh", "stride_ur", "stride_zh")
        for direction in ("fwd", "fwd_stats", "bwd"):
            if direction == "fwd_stats" and (width, n, dtype) != (768, 39, torch.bfloat16):
                continue
            chosen = kernel.heuristic(direction, n, width, dtype.itemsize)
            warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
            low = ("x_ptr", "xh0_ptr", "u_ptr")
            if direction == "bwd":
                fn, constexprs = kernel.attention_pool_bwd_kernel, sizes | chosen
                pointers = dict.fromkeys((*low, "dz_ptr", "dx_ptr", "du_ptr", "dxh0_ptr"), f"*{t}")
                pointers |= dict.fromkeys(("scores_ptr", "lse_ptr", "mu_ptr", "rstd_ptr"), "*fp32")
                scalars = {}
            else:
                fn = kernel.attention_pool_fwd_kernel
                constexprs = sizes | chosen | {"HAS_STATS": direction == "fwd_stats"}
                pointers = dict.fromkeys((*low, "z_ptr"), f"*{t}")
                pointers |= dict.fromkeys(("scores_ptr", "lse_ptr", "mu_ptr", "rstd_ptr"), "*fp32")
                scalars = {"eps": "fp32"}
            found.append(
                Variant(
                    f"{direction} {t} D{width} H{heads} n{n}",
                    fn,
                    pointers | dict.fromkeys(strides, "i32") | scalars,
                    constexprs,
                    warps,
                    stages,
                    aligned=(*pointers, *strides),
                    # the tokens are streamed: read by both, written by the backward pass
                    wide_stores=direction == "bwd",
                )
            )
    return found


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
    version=1,
    summary="LayerNorm, key and value projections and one-query attention over a row; keys are never formed",
    public=("attention_pool", "PoolWeights"),
    torch_ops=("attention_pool_fwd", "attention_pool_fwd_stats", "attention_pool_bwd"),
    variants=variants,
    cases=cases,
    space=space,
)
