"""adamw_ema for the harness: compiled variants, measured cases."""

from __future__ import annotations

import torch

from .._spec import Case, Spec, Variant
from .op import AdamWEma


def variants(every: bool = False) -> list[Variant]:
    """The three kernels with fp32 state; fp32 and bf16 gradients."""
    import triton.language as tl

    from . import kernel

    columns, acc = {"COLUMNS": kernel.COLUMNS}, {"ACC": tl.float32}
    derived, block = {"DERIVED": kernel.DERIVED}, {"BLOCK": kernel.BLOCK}
    table = {"table_ptr": "*i64", "chunks_ptr": "*i32"}
    results = {"derived_ptr": "*fp32", "common_ptr": "*fp32", "outcome_ptr": "*fp64"}

    def variant(
        name: str, function, pointers: dict, numbers: dict, constants: dict, streamed: tuple
    ) -> Variant:
        chosen = kernel.heuristic(name.split()[0])
        return Variant(
            name, function, pointers | numbers, columns | acc | constants, **chosen,
            aligned=tuple(pointers), streamed=streamed, fp64=name.startswith("prepare"),
        )  # fmt: skip

    prepare = {"table_ptr": "*i64", "settings_ptr": "*fp64", "partials_ptr": "*fp32"} | results
    found = [
        variant(
            f"prepare norm{norm:d} flag{flag:d}", kernel.adamw_ema_prepare_kernel, prepare,
            {"tensors": "i32", "chunks": "i32"},
            derived | {"BLOCK": 1024, "HAS_NORM": norm, "HAS_FLAG": flag}, (),
        )
        for norm, flag in ((True, False), (True, True), (False, True))
    ]  # fmt: skip
    for name, dtype in (("fp32", tl.float32), ("bf16", tl.bfloat16)):
        grad = block | {"GRAD": dtype}
        found.append(
            variant(f"norm grad {name}", kernel.adamw_ema_norm_kernel, table | {"partials_ptr": "*fp32"}, {},
                    grad, ("full_ptr",))
        )  # fmt: skip
        found.append(
            variant(f"update grad {name}", kernel.adamw_ema_kernel, table | results, {},
                    grad | derived | {"LOW": tl.bfloat16},
                    ("p_ptr", "g_ptr", "m_ptr", "v_ptr", "e_ptr", "s_address", "t_address"))
        )  # fmt: skip
    return found


def _case(label: str, shapes: list[tuple[int, ...]]) -> Case:
    def make(device, dtype, generator):
        # the state is fp32 whatever the activations' type
        return tuple(torch.randn(*s, device=device, generator=generator) * 0.02 for s in shapes)

    kept: dict = {}

    def setup(name, values, build):
        if name not in kept or kept[name][1][0].data_ptr() != values[0].data_ptr():
            params = [torch.nn.Parameter(v.clone()) for v in values]
            teacher = [v.clone() for v in values]
            for p, v in zip(params, values, strict=True):
                p.grad = v * 0.1
            kept[name] = (params, values, teacher, build(params, teacher))
        return kept[name][0], kept[name][2], kept[name][3]

    def ours(*values):
        def build(params, teacher):
            return AdamWEma(params, teacher=dict(zip(params, teacher, strict=True)))

        params, teacher, optimizer = setup("ours", values, build)
        optimizer.step(momentum_weight=0.004, max_norm=1.0)
        return params[0].detach(), teacher[0]

    def reference(*values):
        params, teacher, optimizer = setup("reference", values, lambda p, _: torch.optim.AdamW(p, fused=True))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        torch._foreach_lerp_(teacher, [p.detach() for p in params], 0.004)
        return params[0].detach(), teacher[0]

    count = sum(torch.Size(s).numel() for s in shapes)
    return Case(
        label,
        make,
        {"ours": ours, "reference": reference},
        bytes_fwd=40 * count,
        flops_fwd=20 * count,
        backward=False,
    )


def cases(quick: bool) -> list[Case]:
    """The tensors of a ViT-S and a ViT-B trunk; quick: what an interpreter can run."""
    if quick:
        return [_case("tiny", [(33, 130), (7,), (1, 1, 5)])]

    def trunk(width, depth):
        block = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,),
                 (width, 4 * width), (width,), (width,), (width,), (width,), (width,)]  # fmt: skip
        return block * depth

    return [_case("S", trunk(384, 12)), _case("B", trunk(768, 12))]


SPEC = Spec(
    name="adamw_ema",
    version=1,
    summary="clip factor, skip of bad steps, AdamW, EMA teacher and low-precision copies in one pass",
    public=("AdamWEma",),
    torch_ops=("adamw_ema",),
    variants=variants,
    cases=cases,
    dtypes=(torch.float32,),
)
