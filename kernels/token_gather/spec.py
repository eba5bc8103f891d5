"""token_gather for the harness: compiled variants, measured cases, settings to try."""

from __future__ import annotations

import torch

from .._spec import Case, Spec, Variant
from .op import token_gather
from .reference import token_gather_reference

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def variants(every: bool = False) -> list[Variant]:
    """Forward with positions, backward for disjoint and for five overlapping views."""
    import triton.language as tl

    from . import kernel

    found = []
    for dtype, width, kept, views in (
        (torch.bfloat16, 384, 39, 5),
        (torch.bfloat16, 768, 39, 5),
        (torch.float32, 768, 39, 5),
    ):
        t, chosen = TYPES[dtype], kernel.heuristic(width)
        warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
        pointers = {"tokens_ptr": f"*{t}", "keep_ptr": "*i32", "pos_ptr": "*fp32", "out_ptr": f"*{t}"}
        strides = dict.fromkeys(("stride_tb", "stride_tn", "stride_kv", "stride_kb", "stride_kk"), "i32")
        found.append(
            Variant(
                f"fwd {t} D{width} K{kept}",
                kernel.token_gather_fwd_kernel,
                pointers | {"batch": "i32"} | strides,
                chosen | {"K": kept, "D": width, "HAS_POS": True, "BLOCK_K": 16, "ACC": tl.float32},
                warps,
                stages,
                aligned=(*pointers, "stride_tb", "stride_tn"),
                streamed=("source", "target", "pos_ptr"),
            )
        )
        pointers = {"dout_ptr": f"*{t}", "inverse_ptr": "*i32", "dtokens_ptr": f"*{t}"}
        for tables in (1, views):
            found.append(
                Variant(
                    f"bwd {t} D{width} K{kept} tables{tables}",
                    kernel.token_gather_bwd_kernel,
                    pointers | {"batch": "i32"},
                    chosen
                    | {"N": 196, "K": kept, "D": width, "TABLES": tables, "BLOCK_N": 16, "ACC": tl.float32},
                    warps,
                    stages,
                    aligned=tuple(pointers),
                    streamed=("source", "target"),
                )
            )
    return found


def _case(label: str, batch: int, n: int, views: int, kept: int, width: int) -> Case:
    def make(device, dtype, generator):
        tokens = torch.randn(batch, n, width, device=device, generator=generator).to(dtype).requires_grad_()
        order = torch.rand(batch, n, device=device, generator=generator).argsort(-1)[:, : views * kept]
        keep = order.view(batch, views, kept).transpose(0, 1).int().contiguous()
        return tokens, keep, torch.randn(n, width, device=device, generator=generator)

    def flat(tokens, keep, pos):
        """One index_select over flat rows."""
        rows = (keep.long() + n * torch.arange(batch, device=keep.device)[:, None]).flatten()
        picked = tokens.flatten(0, 1).index_select(0, rows).view(views * batch, kept, width)
        return picked + pos.to(tokens.dtype)[keep.flatten(0, 1).long()]

    return Case(
        label,
        make,
        {
            "ours": lambda t, k, p: token_gather(t, k, p, disjoint=True),
            "reference": token_gather_reference,
            "index_select": flat,
            "index_select compiled": torch.compile(flat, dynamic=False),
        },
        bytes_fwd=batch * views * kept * (4 * width + 4),
        bytes_bwd=2 * width * batch * (views * kept + n),
        sizes={d: {"D": width} for d in ("fwd", "bwd")},
    )


def cases(quick: bool) -> list[Case]:
    """Five views of 39 and eight of 19 out of 196; quick: what an interpreter can run."""
    if quick:
        return [_case("2x7 of 19", 2, 19, 2, 7, 96)]
    return [
        _case("S 5x39", 512, 196, 5, 39, 384),
        _case("B 5x39", 512, 196, 5, 39, 768),
        _case("B 8x19", 512, 196, 8, 19, 768),
    ]


def space(direction: str, dtype: torch.dtype, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Launch settings that tuning tries."""
    blocks = [b for b in (64, 128, 256) if sizes["D"] % b == 0]
    return [
        {"BLOCK_D": b, "num_warps": w, "num_stages": s} for b in blocks for w in (2, 4, 8) for s in (1, 2)
    ]


SPEC = Spec(
    name="token_gather",
    version=1,
    summary="kept rows of embedded tokens plus positions, with a backward pass without atomics",
    public=("token_gather",),
    torch_ops=("token_gather_fwd", "token_gather_bwd"),
    variants=variants,
    cases=cases,
    space=space,
)
