"""color_views for tests, tuning and benchmarks: compiled variants, measured cases."""

from __future__ import annotations

import torch

from .._launch import Launch
from .._spec import Case, Sizes, Spec, launches, meta
from .op import color_views
from .reference import color_params, color_views_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def variants() -> dict[str, Launch]:
    """224-pixel crops: the sums, and the views in bf16 and fp32."""
    from . import kernel

    images, params = meta(torch.uint8, 3, 224, 224, 3), meta(torch.float32, 3, 2, 10)
    sums, low = launches(kernel.render, images, params, MEAN, STD, 3, torch.bfloat16)
    _, full = launches(kernel.render, images, params, MEAN, STD, 3, torch.float32)
    return {"sums n50176": sums, "views bf16 n50176": low, "views fp32 n50176": full}


def _case(label: str, batch: int, height: int, width: int) -> Case:
    def make(device, dtype, generator):
        images = torch.randint(0, 256, (batch, height, width, 3), device=device, generator=generator)
        index = torch.arange(batch, device=device)
        return images.to(torch.uint8), color_params(index, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, seed=0, epoch=0)

    def run(function, **options):
        return lambda images, params: function(images, params, MEAN, STD, **options)

    return Case(
        label,
        make,
        {
            "ours": run(color_views),
            "reference": run(color_views_reference),
            "compiled": torch.compile(run(color_views_reference), dynamic=False),
        },
        bytes_fwd=batch * height * width * (2 * 3 + 2 * 3 * 4),
        backward=False,
        row_dims={0: 0, 1: 0},
        exact=run(color_views_reference, dtype=torch.float64),
    )


def cases(quick: bool) -> list[Case]:
    """224-pixel crops; quick: what an interpreter can run."""
    return [_case("40 px", 3, 40, 40)] if quick else [_case("224 px", 512, 224, 224)]


def step_cases(s: Sizes) -> list[Case]:
    """Both views of a micro-batch."""
    return [_case("both", s.images, s.height, s.width_px)]


SPEC = Spec(
    name="color_views",
    version=1,
    summary="two color-jittered, normalized versions of uint8 crops in two passes",
    public=("color_views", "color_params"),
    torch_ops=("color_views",),
    variants=variants,
    cases=cases,
    step_cases=step_cases,
    dtypes=(torch.float32,),
)
