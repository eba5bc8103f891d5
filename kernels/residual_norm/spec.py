"""residual_norm for tests, tuning and benchmarks: compiled variants, measured cases, settings to try."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._launch import DTYPE_NAMES, Launch
from .._spec import Case, Sizes, Spec, compiled, grid, launches, meta
from .op import residual_norm
from .reference import residual_norm_reference


def variants() -> dict[str, Launch]:
    """The three uses in a trunk block (norm, branch and norm, branch) and u once more; other widths; fp32."""
    from . import kernel

    found: dict[str, Launch] = {}
    for dtype, width in (
        (torch.bfloat16, 768),
        (torch.bfloat16, 192),
        (torch.bfloat16, 384),
        (torch.bfloat16, 1280),
        (torch.float32, 768),
    ):
        name = f"{DTYPE_NAMES[dtype]} D{width}"
        x = meta(dtype, 5, 39, width)
        vector, scale, stats = meta(torch.float32, width), meta(torch.float32, 5), meta(torch.float32, 5, 39)
        uses: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {"branch+norm": (x, vector)}
        if not found:
            uses |= {"norm": (None, vector), "branch": (x, None)}
            (found[f"again {name}"],) = launches(kernel.again, x, stats, stats, vector, vector, dtype)
        for use, (branch, gain) in uses.items():
            bias, factor = (None, None) if branch is None else (vector, scale)
            (found[f"fwd {name} {use}"],) = launches(
                kernel.forward, x, branch, bias, factor, gain, gain, 1e-6, dtype
            )
            saved = (None,) * 4 if gain is None else (x, stats, stats, gain)
            du = None if gain is None else x
            (found[f"bwd {name} {use}"],) = launches(
                kernel.backward, du, x, *saved, factor, bias is not None, dtype, dtype
            )
    return found


def _case(label: str, rows: int, n: int, width: int, backward: bool = True) -> Case:
    def make(device, dtype, generator):
        def normal(*shape, scale=1.0, shift=0.0):
            return torch.randn(*shape, device=device, generator=generator) * scale + shift

        x, branch = (normal(rows, n, width).to(dtype).requires_grad_() for _ in range(2))
        vectors = (normal(width, scale=0.2, shift=s).requires_grad_() for s in (0.0, 1.0, 0.0))
        scale = (torch.rand(rows, device=device, generator=generator) > 0.1).float() / 0.9
        return x, branch, scale, *vectors

    def fused(x, branch, scale, bias, gain, shift):
        return residual_norm(x, gain, shift, branch=branch, bias=bias, scale=scale)

    def reference(x, branch, scale, bias, gain, shift):
        return residual_norm_reference(x, gain, shift, branch=branch, bias=bias, scale=scale)

    def plain(x, branch, scale, bias, gain, shift):
        out = x + scale.to(x.dtype)[:, None, None] * (branch + bias.to(x.dtype))
        u = F.layer_norm(out.float(), (width,), gain, shift, 1e-6)
        return out, u.to(x.dtype)

    return Case(
        label,
        make,
        {
            "ours": fused,
            "reference": reference,
            "compiled": compiled(plain),
        },
        # x, branch, out, u; du, dout, out, dx, dbranch
        bytes_fwd=2 * 4 * rows * n * width,
        bytes_bwd=2 * 5 * rows * n * width,
        backward=backward,
        row_dims={0: 0, 1: 0, 2: 0},
    )


def cases(quick: bool) -> list[Case]:
    """Student views and whole images; quick: what an interpreter can run."""
    if quick:
        return [_case("3x7", 3, 7, 96)]
    return [
        _case("S n39", 1280, 39, 384),
        _case("B n39", 1280, 39, 768),
        _case("B n196", 256, 196, 768),
        _case("L n39", 640, 39, 1024),
    ]


def step_cases(s: Sizes) -> list[Case]:
    """The student's views with gradients, the teacher's whole images without."""
    return [
        _case("student", s.images * s.views, s.kept, s.width),
        _case("teacher", s.images, s.patches, s.width, backward=False),
    ]


def space(direction: str, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Launch settings that tuning tries."""
    stages = {"STAGES": (1, 2, 3)} if direction == "bwd" else {}
    return grid(BLOCK_R=(1, 2, 4, 8), num_warps=(2, 4, 8), **stages)


SPEC = Spec(
    name="residual_norm",
    version=1,
    summary="residual connection, drop-path factor and LayerNorm in one pass, with the branch's bias gradient",
    public=("residual_norm",),
    torch_ops=("residual_norm_fwd", "residual_norm_again", "residual_norm_bwd"),
    variants=variants,
    cases=cases,
    space=space,
    step_cases=step_cases,
    in_block=True,
)
