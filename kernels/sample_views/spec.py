"""sample_views for tests, tuning and benchmarks: compiled variants, measured cases."""

from __future__ import annotations

import torch

from .._launch import Launch
from .._spec import Case, Spec, launches, meta
from .op import sample_views
from .reference import sample_views_reference


def variants() -> dict[str, Launch]:
    """The paper's views of 196 patches, and of 256; small and 64-bit seeds."""
    from . import kernel

    found = {}
    for n, k, mode, seed in (
        (196, 39, "disjoint", 3),
        (196, 39, "independent", 3),
        (256, 51, "disjoint", 1 << 40),
    ):
        args = (meta(torch.int64, 3), n, k, 5, mode == "disjoint", seed, 1)
        (found[f"{mode} N{n} K{k} V5"],) = launches(kernel.sample, *args)
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
    summary="keyed random keep indices of all views, made on the device",
    public=("sample_views",),
    torch_ops=("sample_views",),
    variants=variants,
    cases=cases,
    dtypes=(torch.float32,),
)
