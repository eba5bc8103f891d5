"""attention_pool for tests, tuning and benchmarks: compiled variants, measured cases, settings to try."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._launch import DTYPE_NAMES, Launch
from .._spec import Case, Sizes, Spec, compiled, grid, launches, meta
from .op import attention_pool
from .reference import PoolWeights, attention_pool_absorbed, attention_pool_reference


def variants() -> dict[str, Launch]:
    """Views and whole images of ViT-S, B, L and H, bf16 everywhere, fp16 and fp32 once; tokens alone without a norm."""
    from . import kernel

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found = {}
    for dtype, n, width, heads in (
        (bf16, 39, 384, 6),
        (bf16, 196, 384, 6),
        (bf16, 19, 768, 12),
        (bf16, 39, 768, 12),
        (bf16, 196, 768, 12),
        (bf16, 39, 1024, 16),
        (bf16, 196, 1024, 16),
        (bf16, 256, 1280, 16),
        (fp16, 39, 384, 6),
        (fp32, 39, 384, 6),
    ):
        x, xh0, u = meta(dtype, 2, n, width), meta(dtype, 2, width), meta(dtype, heads, 2, width)
        scores, lse = meta(fp32, 2, heads, n + 1), meta(fp32, 2, heads)
        stats = meta(fp32, 2, n), meta(fp32, 2, n)
        name = f"{DTYPE_NAMES[dtype]} D{width} H{heads} n{n}"
        (found[f"fwd {name}"],) = launches(kernel.forward, x, xh0, u, 1e-6)
        (found[f"bwd {name}"],) = launches(kernel.backward, x, xh0, u, u, scores, lse, *stats)
        if name == "bf16 D768 H12 n39":
            (found[f"fwd_stats {name}"],) = launches(kernel.forward_stats, x, xh0, u, *stats)
        if (dtype, n) == (bf16, 196) or dtype == fp32:
            scores, none = scores[..., :n], meta(fp32, 0)
            (found[f"fwd plain {name}"],) = launches(kernel.forward, x, None, u, None)
            (found[f"bwd plain {name}"],) = launches(kernel.backward, x, None, u, u, scores, lse, none, none)
    return found


def _case(label: str, rows: int, n: int, width: int, heads: int, backward: bool = True) -> Case:
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
            "sdpa compiled": compiled(sdpa),
            "absorbed compiled": compiled(plain(attention_pool_absorbed)),
        },
        bytes_fwd=2 * tiles,
        bytes_bwd=2 * (2 * rows * n * width + 3 * rows * heads * width),
        flops_fwd=projections + streamed,
        flops_bwd=2 * (projections + streamed),
        backward=backward,
        row_dims={0: 0, 1: 0},
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


def step_cases(s: Sizes) -> list[Case]:
    """The student's views with gradients, the teacher's whole images without."""
    return [
        _case("student", s.images * s.views, s.kept, s.width, s.heads),
        _case("teacher", s.images, s.patches, s.width, s.heads, backward=False),
    ]


def space(direction: str, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Launch settings that tuning tries."""
    blocks = [b for b in (32, 64, 128) if sizes["D"] % b == 0]
    return grid(BLOCK_D=blocks, num_warps=(2, 4, 8), num_stages=(1, 2, 3))


SPEC = Spec(
    name="attention_pool",
    version=2,
    summary="LayerNorm, key and value projections and one-query attention over a row; keys are never formed",
    public=("attention_pool", "PoolWeights"),
    torch_ops=("attention_pool_fwd", "attention_pool_fwd_stats", "attention_pool_bwd"),
    variants=variants,
    cases=cases,
    space=space,
    step_cases=step_cases,
    in_block=True,
)
