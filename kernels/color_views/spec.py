"""color_views for the harness: compiled variants, measured cases."""

from __future__ import annotations

import torch

from .._spec import Case, Spec, Variant
from .op import color_views
from .reference import color_params, color_views_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def variants(every: bool = False) -> list[Variant]:
    """224-pixel crops: the sums, and the views as images and as patches."""
    from . import kernel

    sizes = {"PIXELS": 224 * 224, "TILES": 49, "BLOCK": kernel.BLOCK, "COLUMNS": kernel.COLUMNS}
    reads = {"images_ptr": "*u8", "params_ptr": "*fp32", "sums_ptr": "*fp32"}
    plain = {"num_warps": 4, "num_stages": 1}
    numbers = dict.fromkeys(("mean_r", "mean_g", "mean_b", "scale_r", "scale_g", "scale_b"), "fp32")
    found = [
        Variant("sums n50176", kernel.color_sums_kernel, reads | {"stride_b": "i32"}, sizes, **plain,
                aligned=(*reads, "stride_b"), streamed=("pixel_bytes",))
    ]  # fmt: skip
    for t, patch in (("bf16", 0), ("bf16", 16), ("fp32", 0)):
        pointers = reads | {"out_ptr": f"*{t}"}
        found.append(
            Variant(
                f"views {t} n50176 patch{patch}",
                kernel.color_views_kernel,
                pointers | numbers | {"batch": "i32", "stride_b": "i32"},
                sizes | {"WIDTH": 224, "BLOCK_T": 64, "C": 3, "PATCH": patch, "RUN": kernel.run(patch)},
                **plain,
                aligned=(*pointers, "stride_b"),
                streamed=("pixel_bytes", "target"),
            )
        )
    return found


def _case(label: str, batch: int, side: int) -> Case:
    def make(device, dtype, generator):
        images = torch.randint(0, 256, (batch, side, side, 3), device=device, generator=generator)
        index = torch.arange(batch, device=device)
        return images.to(torch.uint8), color_params(index, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, seed=0, epoch=0)

    def run(function):
        return lambda images, params: function(images, params, MEAN, STD)

    return Case(
        label,
        make,
        {
            "ours": run(color_views),
            "reference": run(color_views_reference),
            "compiled": torch.compile(run(color_views_reference), dynamic=False),
        },
        bytes_fwd=batch * side * side * (2 * 3 + 2 * 3 * 4),
        backward=False,
    )


def cases(quick: bool) -> list[Case]:
    """224-pixel crops; quick: what an interpreter can run."""
    return [_case("40 px", 3, 40)] if quick else [_case("224 px", 512, 224)]


SPEC = Spec(
    name="color_views",
    version=1,
    summary="two colour-jittered, normalised versions of uint8 crops in two passes",
    public=("color_views", "color_params"),
    torch_ops=("color_views",),
    variants=variants,
    cases=cases,
    dtypes=(torch.float32,),
)
