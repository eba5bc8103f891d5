"""token_gather for tests, tuning and benchmarks: compiled variants, measured cases, settings to try."""

from __future__ import annotations

import torch

from .._launch import DTYPE_NAMES, Launch
from .._spec import Case, Spec, compiled, grid, launches, meta
from .op import token_gather
from .reference import token_gather_reference


def variants() -> dict[str, Launch]:
    """Forward with positions, backward for disjoint and for five overlapping views; strided keep indices."""
    from . import kernel

    found = {}
    keep = meta(torch.int32, 5, 3, 78)[..., ::2]
    for dtype, width in ((torch.bfloat16, 384), (torch.bfloat16, 768), (torch.float32, 768)):
        name = f"{DTYPE_NAMES[dtype]} D{width} K39"
        tokens, pos, dout = (
            meta(t, *s, width) for t, s in ((dtype, (3, 196)), (torch.float32, (196,)), (dtype, (15, 39)))
        )
        (found[f"fwd {name}"],) = launches(kernel.forward, tokens, keep, pos)
        for tables in (1, 5):
            (found[f"bwd {name} tables{tables}"],) = launches(kernel.backward, dout, keep, 196, tables == 1)
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
            "index_select compiled": compiled(flat),
        },
        bytes_fwd=batch * views * kept * (4 * width + 4),
        bytes_bwd=2 * width * batch * (views * kept + n),
        row_dims={0: 0, 1: 1},
        views=views,
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


def space(direction: str, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Launch settings that tuning tries."""
    blocks = [b for b in (64, 128, 256) if sizes["D"] % b == 0]
    return grid(BLOCK_D=blocks, num_warps=(2, 4, 8), num_stages=(1, 2))


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
