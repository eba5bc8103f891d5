"""color_views for tests, tuning and benchmarks: compiled variants, measured cases."""

from __future__ import annotations

import torch

from .._launch import Launch
from .._spec import Case, Sizes, Spec, compiled, launches, meta
from .op import color_params, color_views
from .reference import STREAMS, color_params_reference, color_views_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRENGTH = (0.4, 0.4, 0.2, 0.1)


def variants() -> dict[str, Launch]:
    """224-pixel crops, one or two of each image: sums; patches of 16 pixels in bf16, five views of 39, and of 14; fp32
    images; parameters."""
    from . import kernel

    bf16, fp32 = torch.bfloat16, torch.float32
    images, params = meta(torch.uint8, 3, 224, 224, 3), meta(fp32, 3, 2, 10)
    crops = meta(torch.uint8, 3, 2, 224, 224, 3)

    def views(kept, patch, dtype, params=params, images=images):
        keep = meta(torch.int32, 5, 3, kept) if kept else None
        return launches(kernel.render, images, params, keep, MEAN, STD, 3, patch, dtype)

    sums, patches = views(39, 16, bf16)
    two_sums, two_crops = views(39, 16, bf16, images=crops)
    (index,) = launches(kernel.draw_params, meta(torch.int64, 3), STRENGTH, 0.8, 0.2, 3, 1, STREAMS)
    return {
        "sums n50176": sums,
        "views bf16 P16 K39": patches,
        "sums n50176 two crops": two_sums,
        "views bf16 P16 K39 two crops": two_crops,
        "views bf16 P16 K39 plain": views(39, 16, bf16, None)[0],
        "views bf16 P14 K51": views(51, 14, bf16)[1],
        "views fp32 n50176": views(0, 0, fp32)[1],
        "params": index,
    }


def _case(
    label: str, batch: int, sides: tuple[int, int], patch: int, views: int, kept: int, chans: int = 3
) -> Case:
    def make(device, dtype, generator):
        images = torch.randint(0, 256, (batch, *sides, 3), device=device, generator=generator)
        n = sides[0] * sides[1] // patch**2
        keep = torch.rand(views, batch, n, device=device, generator=generator).argsort(-1)[..., :kept].int()
        index = torch.arange(batch, device=device)
        return images.to(torch.uint8), color_params(index, STRENGTH, 0.8, 0.2, seed=0, epoch=0), keep, dtype

    def run(function, exact=False):
        def both(images, params, keep, dtype):
            student, teacher = function(
                images,
                params,
                MEAN,
                STD,
                channels=chans,
                patch=patch,
                keep=keep.contiguous(),
                dtype=torch.float64 if exact else dtype,
            )
            # image by image
            return student.unflatten(0, (views, -1)).transpose(0, 1), teacher

        return both

    return Case(
        label,
        make,
        {
            "ours": run(color_views),
            "reference": run(color_views_reference),
            "compiled": compiled(run(color_views_reference)),
        },
        bytes_fwd=batch
        * (2 * 3 * sides[0] * sides[1] + 2 * chans * (sides[0] * sides[1] + views * kept * patch**2)),
        backward=False,
        row_dims={0: 0, 1: 0, 2: 1},
        exact=run(color_views_reference, exact=True),
    )


def _params(label: str, batch: int) -> Case:
    def run(function):
        return lambda index: function(index, STRENGTH, 0.8, 0.2, seed=0, epoch=0)

    return Case(
        label,
        lambda device, dtype, generator: (torch.arange(batch, device=device),),
        {"ours": run(color_params), "reference": run(color_params_reference)},
        bytes_fwd=batch * (8 + 80),
        backward=False,
    )


def cases(quick: bool) -> list[Case]:
    """224-pixel crops, five views of 39 patches; their parameters. Quick: what an interpreter can run."""
    if quick:
        return [_case("40 px 2x3", 3, (40, 40), 8, 2, 3), _params("parameters 3", 3)]
    return [_case("224 px 5x39", 512, (224, 224), 16, 5, 39), _params("parameters 512", 512)]


def step_cases(s: Sizes) -> list[Case]:
    """Both views of a micro-batch; none where no kernel runs."""
    if s.chans not in (1, 3):
        return []
    return [_case("both", s.images, (s.height, s.width_px), s.patch, s.views, s.kept, s.chans)]


SPEC = Spec(
    name="color_views",
    version=2,
    summary="two color-jittered, normalized versions of uint8 crops in two passes, as images or kept patches",
    public=("color_views", "color_params"),
    torch_ops=("color_views", "color_params"),
    variants=variants,
    cases=cases,
    step_cases=step_cases,
)
