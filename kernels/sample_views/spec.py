"""sample_views for tests, tuning and benchmarks: compiled variants, measured cases."""

from __future__ import annotations

import torch

from .._launch import Launch
from .._spec import Case, Sizes, Spec, launches, meta
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

    def run(function):
        # a view that needs more tokens than there are shares them
        mode = "disjoint" if views * kept <= n else "independent"
        return lambda index: function(index, n, kept, views, mode=mode, seed=3, epoch=1).flatten(0, 1)

    return Case(
        label,
        make,
        {"ours": run(sample_views), "reference": run(sample_views_reference)},
        bytes_fwd=batch * (8 + 4 * views * kept),
        backward=False,
        row_dims={0: 0},
        views=views,
    )


def cases(quick: bool) -> list[Case]:
    """Five views of 39 of 196; quick: what an interpreter can run."""
    return [_case("3x5 of 19", 2, 19, 5, 3)] if quick else [_case("5x39", 2048, 196, 39, 5)]


def step_cases(s: Sizes) -> list[Case]:
    """The views of a micro-batch."""
    return [_case("student", s.images, s.patches, s.kept, s.views)]


SPEC = Spec(
    name="sample_views",
    version=1,
    summary="keyed random keep indices of all views, made on the device",
    public=("sample_views",),
    torch_ops=("sample_views",),
    variants=variants,
    cases=cases,
    step_cases=step_cases,
    dtypes=(torch.float32,),
)
