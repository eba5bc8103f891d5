"""sample_views for the harness: compiled variants, measured cases."""

from __future__ import annotations

import torch

from .._spec import Case, Spec, Variant
from .op import sample_views
from .reference import STREAM, sample_views_reference


def variants(every: bool = False) -> list[Variant]:
    """The paper's views of 196 patches, and of 256; small and 64-bit seeds."""
    from . import kernel

    shapes = [(196, 39, 5, True, "i32"), (196, 39, 5, False, "i32"), (256, 51, 5, True, "i64")]
    if every:
        shapes += [(n, 1, 1, True, "i64") for n in (1, 19, 49, 1024, 4096)]
    found = []
    for n, k, v, disjoint, seed in shapes:
        chosen = kernel.heuristic(n)
        warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
        found.append(
            Variant(
                f"{'disjoint' if disjoint else 'independent'} N{n} K{k} V{v}",
                kernel.sample_views_kernel,
                {"index_ptr": "*i64", "keep_ptr": "*i32", "batch": "i32", "seed": seed, "epoch": "i32"},
                {"N": n, "K": k, "V": v, "DISJOINT": disjoint, "STREAM": STREAM, "BLOCK_J": 32} | chosen,
                # one number in, scattered numbers out: nothing is streamed
                warps,
                stages,
                aligned=("index_ptr", "keep_ptr"),
            )
        )
    return found


def _case(label: str, batch: int, n: int, kept: int, views: int) -> Case:
    def make(device, dtype, generator):
        return (torch.arange(batch, device=device),)

    return Case(
        label,
        make,
        {
            "ours": lambda index: sample_views(index, n, kept, views, seed=3, epoch=1),
            "reference": lambda index: sample_views_reference(index, n, kept, views, seed=3, epoch=1),
        },
        bytes_fwd=batch * (8 + 4 * views * kept),
        backward=False,
    )


def cases(quick: bool) -> list[Case]:
    """Five views of 39 of 196; quick: what an interpreter can run."""
    return [_case("3x5 of 19", 2, 19, 5, 3)] if quick else [_case("5x39", 2048, 196, 39, 5)]


SPEC = Spec(
    name="sample_views",
    version=1,
    summary="keyed random keep indices of all views on the device, nothing is waited for",
    public=("sample_views",),
    torch_ops=("sample_views",),
    variants=variants,
    cases=cases,
    dtypes=(torch.float32,),
)
