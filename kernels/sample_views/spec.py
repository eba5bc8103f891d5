"""sample_views for tests, tuning and benchmarks: compiled variants, measured cases."""

from __future__ import annotations

import torch

from .._launch import Launch
from .._spec import Case, Sizes, Spec, launches, meta
from .op import drop_path_factors, sample_views
from .reference import DROP_PATH_STREAM, drop_path_reference, sample_views_reference


def variants() -> dict[str, Launch]:
    """The paper's views of 196 patches, and of 256; small and 64-bit seeds; drop-path of 12 blocks."""
    from . import kernel

    found = {}
    for n, k, mode, seed in (
        (196, 39, "disjoint", 3),
        (196, 39, "independent", 3),
        (256, 51, "disjoint", 1 << 40),
    ):
        args = (meta(torch.int64, 3), n, k, 5, mode == "disjoint", seed, 1)
        (found[f"{mode} N{n} K{k} V5"],) = launches(kernel.sample, *args)
    index, table = meta(torch.int64, 3), meta(torch.float32, 2, 12)
    (found["drop-path L12 V5"],) = launches(kernel.drop_path, index, table, 5, 3, 1, DROP_PATH_STREAM)
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


def _drop_path(label: str, batch: int, depth: int, views: int) -> Case:
    def run(function):
        # rows last: compared whole
        return lambda index: function(index, views, depth, 0.1, seed=3, epoch=1)

    return Case(
        label,
        lambda device, dtype, generator: (torch.arange(batch, device=device),),
        {"ours": run(drop_path_factors), "reference": run(drop_path_reference)},
        bytes_fwd=batch * (8 + 8 * views * depth),
        backward=False,
    )


def cases(quick: bool) -> list[Case]:
    """Five views of 39 of 196, drop-path of 12 blocks; quick: what an interpreter can run."""
    if quick:
        return [_case("3x5 of 19", 2, 19, 5, 3), _drop_path("drop-path 3", 2, 3, 2)]
    return [_case("5x39", 2048, 196, 39, 5), _drop_path("drop-path 12", 2048, 12, 5)]


def step_cases(s: Sizes) -> list[Case]:
    """The views of a micro-batch."""
    return [_case("student", s.images, s.patches, s.kept, s.views)]


SPEC = Spec(
    name="sample_views",
    version=1,
    summary="keyed random keep indices of all views and drop-path factors, made on the device",
    public=("sample_views", "drop_path_factors"),
    torch_ops=("sample_views", "drop_path_factors"),
    variants=variants,
    cases=cases,
    step_cases=step_cases,
    dtypes=(torch.float32,),
)
