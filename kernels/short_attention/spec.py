"""short_attention for tests, tuning and benchmarks: compiled variants, measured cases, settings to try."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import _launch
from .._spec import Case, Sizes, Spec, grid, launches, meta
from .op import short_attention
from .reference import short_attention_reference


def variants() -> dict[str, _launch.Launch]:
    """n 19 to 64 at head_dim 64; 32 and 80; bf16, one fp16, some fp32; without a bias once."""
    from . import kernel

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found = {}
    for dtype, n, heads, d in (
        (bf16, 19, 12, 64),
        (bf16, 27, 12, 64),
        (bf16, 39, 12, 64),
        (bf16, 64, 6, 64),
        (bf16, 39, 3, 32),
        (bf16, 19, 16, 80),
        (bf16, 39, 16, 80),
        (fp16, 39, 12, 64),
        (fp32, 19, 6, 64),
        (fp32, 39, 12, 32),
    ):
        qkv, dout = meta(dtype, 8, n, 3, heads, d), meta(dtype, 8, n, heads, d)
        name = f"{_launch.DTYPE_NAMES[dtype]} n{n} H{heads} d{d}"
        (found[f"fwd {name}"],) = launches(kernel.forward, qkv)
        (found[f"bwd {name} bias"],) = launches(kernel.backward_bias, qkv, dout)
        if name == "bf16 n39 H12 d64":
            (found[f"bwd {name}"],) = launches(kernel.backward, qkv, dout)
    return found


def sdpa(qkv):
    """torch's scaled_dot_product_attention on strided views of the packed tensor."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _case(label: str, rows: int, n: int, heads: int, d: int, backward: bool = True) -> Case:
    def make(device, dtype, generator):
        qkv = torch.randn(rows, n, 3, heads, d, device=device, generator=generator)
        return (qkv.to(dtype).requires_grad_(),)

    tokens = rows * n * heads * d
    return Case(
        label,
        make,
        {"ours": short_attention, "reference": short_attention_reference, "sdpa": sdpa},
        bytes_fwd=2 * 4 * tokens,
        bytes_bwd=2 * 7 * tokens,
        flops_fwd=4 * tokens * n,
        flops_bwd=10 * tokens * n,
        backward=backward,
        row_dims={0: 0},
    )


def cases(quick: bool) -> list[Case]:
    """The student's views at ViT-S and ViT-B; quick: what an interpreter can run."""
    if quick:
        return [_case("n7", 2, 7, 2, 16), _case("n39", 2, 39, 2, 32)]
    return [
        _case("S n39", 5120, 39, 6, 64),
        _case("B n19", 8192, 19, 12, 64),
        _case("B n39", 5120, 39, 12, 64),
        _case("B n49", 4096, 49, 12, 64),
        _case("B n64", 4096, 64, 12, 64),
    ]


def step_cases(s: Sizes) -> list[Case]:
    """The student's views with gradients, the teacher's whole images without."""
    d = s.width // s.heads
    return [
        _case("student", s.images * s.views, s.kept, s.heads, d),
        _case("teacher", s.images, s.patches, s.heads, d, backward=False),
    ]


def space(direction: str, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Launch settings that tuning tries."""
    return grid(PACK=sorted({1, max(1, 64 // sizes["n"])}), num_warps=(2, 4, 8))


SPEC = Spec(
    name="short_attention",
    version=3,
    summary="self-attention of up to 64 tokens on packed q, k, v; saves nothing but them",
    public=("short_attention",),
    torch_ops=("short_attention_fwd", "short_attention_bwd", "short_attention_bwd_bias"),
    variants=variants,
    cases=cases,
    space=space,
    step_cases=step_cases,
)
