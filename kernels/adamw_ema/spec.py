"""adamw_ema for tests, tuning and benchmarks: compiled variants, measured cases."""

from __future__ import annotations

import functools

import torch

from .._launch import DTYPE_NAMES, Launch
from .._spec import Case, Sizes, Spec, launches, meta
from .op import AdamWEma


def variants() -> dict[str, Launch]:
    """The three kernels with fp32 state; fp32 and bf16 gradients."""
    from . import kernel

    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    tables = meta(torch.int64, 3, kernel.COLUMNS), meta(torch.int32, 3, 2), meta(fp64, 2, 5), meta(fp64, 2)
    found = {}
    for norm, flag in ((True, False), (True, True), (False, True)):
        launched = launches(kernel.update, *tables, norm, flag, (fp32, fp32, bf16))
        found[f"prepare norm{norm:d} flag{flag:d}"] = launched[-2]
    for grad in (fp32, bf16):
        launched = launches(kernel.update, *tables, True, False, (fp32, grad, bf16))
        found[f"norm grad {DTYPE_NAMES[grad]}"], _, found[f"update grad {DTYPE_NAMES[grad]}"] = launched
    return found


def _case(label: str, shapes: list[tuple[int, ...]]) -> Case:
    def make(device, dtype, generator):
        # the state is fp32 whatever the activations' type
        return tuple(torch.randn(*s, device=device, generator=generator) * 0.02 for s in shapes)

    @functools.lru_cache(6)
    def setup(name, *values):
        """(parameters, teacher, optimizer), which later calls with the same tensors continue."""
        params = [torch.nn.Parameter(v.clone()) for v in values]
        teacher = [v.clone() for v in values]
        for p, v in zip(params, values):
            p.grad = v * 0.1
        if name == "ours":
            return params, teacher, AdamWEma(params, teacher=zip(params, teacher))
        # capturable: a step can be recorded in a CUDA graph
        options = {"capturable": values[0].device.type == "cuda", name: True}
        return params, teacher, torch.optim.AdamW(params, **options)

    def ours(*values):
        params, teacher, optimizer = setup("ours", *values)
        optimizer.step(momentum_weight=0.004, max_norm=1.0)
        return (*(p.detach() for p in params), *teacher)

    def torchs(name, *values):
        params, teacher, optimizer = setup(name, *values)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        torch._foreach_lerp_(teacher, [p.detach() for p in params], 0.004)
        return (*(p.detach() for p in params), *teacher)

    count = sum(torch.Size(s).numel() for s in shapes)
    return Case(
        label,
        make,
        {
            "ours": ours,
            "reference": functools.partial(torchs, "foreach"),
            "fused": functools.partial(torchs, "fused"),
        },
        bytes_fwd=40 * count,
        flops_fwd=20 * count,
        backward=False,
        stateful=True,
    )


def cases(quick: bool) -> list[Case]:
    """The tensors of a ViT-S and a ViT-B trunk; quick: what an interpreter can run."""
    if quick:
        return [_case("tiny", [(33, 130), (7,), (1, 1, 5)])]

    return [_case("S", _trunk(384, 1536, 12)), _case("B", _trunk(768, 3072, 12))]


def step_cases(s: Sizes) -> list[Case]:
    """The tensors of up to four blocks: more take as much longer, and memory that a large model does not leave."""
    return [_case("student", _trunk(s.width, s.hidden, min(s.depth, 4)))]


def _trunk(width: int, hidden: int, depth: int) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(width,)] * 6 + [(3 * width, width), (3 * width,), (width, width)]
    return (shapes + [(hidden, width), (hidden,), (width, hidden)]) * depth


SPEC = Spec(
    name="adamw_ema",
    version=2,
    summary="clip factor, skip of bad steps, AdamW, EMA teacher and low-precision copies in one pass",
    public=("AdamWEma",),
    torch_ops=(),
    variants=variants,
    cases=cases,
    step_cases=step_cases,
    dtypes=(torch.float32,),
)
