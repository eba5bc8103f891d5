"""mlp for tests, tuning and benchmarks: compiled variants, measured cases, settings to try."""

from __future__ import annotations

from functools import partial

import torch

from .. import _launch
from .._launch import DTYPE_NAMES, Launch
from .._spec import Case, Sizes, Spec, compiled, grid, launches, meta
from .op import mlp
from .reference import mlp_reference


def variants() -> dict[str, Launch]:
    """Both matmuls, the first with and without what backward needs; GELU and its derivative alone."""
    from . import kernel

    found = {}
    for width in (384, 768):
        x, h = meta(torch.bfloat16, 5, 39, width), meta(torch.bfloat16, 5, 39, 4 * width)
        w1, w2 = meta(torch.bfloat16, 4 * width, width), meta(torch.bfloat16, width, 4 * width)
        for large in (False, True)[: 1 + (width >= 768)]:
            name = f"bf16 D{width}{' large' if large else ''}"
            with _launch.forced("mlp", kernel.heuristic("fc1", 2, large)):
                for keep, use in ((True, "train"), (False, "infer")):
                    arguments = (x, w1, meta(torch.float32, 4 * width), keep)
                    (found[f"fc1 {name} {use}"],) = launches(kernel.linear_gelu, *arguments)
                (found[f"fc2 {name}"],) = launches(kernel.linear_dgelu, x, w2, h)
    for dtype in (torch.bfloat16, torch.float32):
        h = meta(dtype, 5, 39, 3072)
        (found[f"gelu {DTYPE_NAMES[dtype]}"],) = launches(kernel.gelu, h)
        (found[f"dgelu {DTYPE_NAMES[dtype]} N3072"],) = launches(kernel.dgelu, h, h)
    return found


def _case(label: str, rows: int, n: int, width: int, inner: int, backward: bool = True) -> Case:
    def make(device, dtype, generator):
        def normal(*shape, scale=1.0):
            return torch.randn(*shape, device=device, generator=generator) * scale

        x = normal(rows, n, width).to(dtype).requires_grad_()
        weights = ((inner, width, width**-0.5), (inner, 1), (width, inner, inner**-0.5), (width, 1))
        drawn = (normal(*shape, scale=scale) for *shape, scale in weights)
        return x, *(w.to(dtype).requires_grad_() for w in drawn)

    return Case(
        label,
        make,
        {
            "ours": mlp,
            "split": partial(mlp, by="split"),
            "quack": partial(mlp, by="quack"),
            "reference": mlp_reference,
            "compiled": compiled(mlp_reference),
        },
        # x, h, g, g, y; dy, h, dh, dh, dx and both weight gradients' inputs
        bytes_fwd=2 * rows * n * (2 * width + 3 * inner),
        bytes_bwd=2 * rows * n * (4 * width + 5 * inner),
        flops_fwd=4 * rows * n * width * inner,
        flops_bwd=8 * rows * n * width * inner,
        backward=backward,
        row_dims={0: 0},
    )


def cases(quick: bool) -> list[Case]:
    """Student views and whole images; quick: what an interpreter can run."""
    if quick:
        return [_case("3x7", 3, 7, 48, 192)]
    return [
        _case("S n39", 1280, 39, 384, 1536),
        _case("B n39", 1280, 39, 768, 3072),
        _case("B n196", 256, 196, 768, 3072),
        _case("L n39", 640, 39, 1024, 4096),
    ]


def step_cases(s: Sizes) -> list[Case]:
    """The student's views with gradients, the teacher's whole images without."""
    return [
        _case("student", s.images * s.views, s.kept, s.width, s.hidden),
        _case("teacher", s.images, s.patches, s.width, s.hidden, backward=False),
    ]


def space(direction: str, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Launch settings that tuning tries."""
    if direction == "gelu":
        return grid(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8))
    if direction == "dgelu":
        return grid(BLOCK_M=(4, 8, 16), BLOCK_N=(128, 256), STAGES=(1, 2, 3), num_warps=(4, 8))
    # 128 rows in four warps spill beside h (255 registers, 64 bytes on sm_90)
    rows = (64,) if direction == "fc1" else (64, 128)
    small = grid(BLOCK_M=rows, BLOCK_N=(128,), BLOCK_K=(32, 64), num_warps=(4,), num_stages=(3, 4))
    large = grid(BLOCK_M=(128,), BLOCK_N=(128, 256), BLOCK_K=(64,), num_warps=(8,), num_stages=(3, 4))
    return small + large


SPEC = Spec(
    name="mlp",
    version=1,
    summary="MLP with GELU behind its first matmul, its derivative and fc1's bias gradient behind a backward one",
    public=("mlp",),
    torch_ops=(
        "linear_gelu",
        "linear_dgelu",
        "gelu_fwd",
        "gelu_bwd",
        "quack_linear_gelu",
        "quack_linear_dgelu",
    ),
    variants=variants,
    cases=cases,
    space=space,
    step_cases=step_cases,
    in_block=True,
)
