"""crop_resize for tests, tuning and benchmarks: compiled variants, measured cases."""

from __future__ import annotations

import torch

from .._launch import Launch
from .._spec import Case, Spec, launches, meta
from .op import crop_resize
from .reference import COLUMNS, crop_resize_reference


def variants() -> dict[str, Launch]:
    """Crops of 224 and of 32 pixels."""
    from . import kernel

    found = {}
    for side in (224, 32):
        args = (meta(torch.uint8, 1 << 20), meta(torch.float64, 3, len(COLUMNS)), side, side)
        (found[f"crop u8 {side}x{side}"],) = launches(kernel.resize, *args)
    return found


def _case(label: str, batch: int, side: int, out: int) -> Case:
    size = (out, out)

    def make(device, dtype, generator):
        pixels = torch.randint(0, 256, (batch * side * side * 3,), device=device, generator=generator)
        # the middle three fifths of an image's area
        edge = round(side * 0.6**0.5)
        from_edge = (side - edge) // 2 * 3 * (side + 1)
        crops = [
            [i * side * side * 3 + from_edge, 3 * side, edge, edge, 0, 0, edge, edge, i % 2]
            for i in range(batch)
        ]
        return pixels.to(torch.uint8), torch.tensor(crops, dtype=torch.float64, device=device)

    return Case(
        label,
        make,
        {
            "ours": lambda pixels, crops: crop_resize(pixels, crops, size),
            "reference": lambda pixels, crops: crop_resize_reference(pixels, crops, size),
        },
        bytes_fwd=batch * 3 * (round(0.6 * side * side) + out * out),
        backward=False,
        row_dims={1: 0},
    )


def cases(quick: bool) -> list[Case]:
    """224-pixel crops of 256-pixel images, and CIFAR's; quick: what an interpreter can run."""
    return (
        [_case("19 to 24 px", 2, 19, 24)]
        if quick
        else [_case("256 to 224 px", 512, 256, 224), _case("32 px", 2048, 32, 32)]
    )


SPEC = Spec(
    name="crop_resize",
    version=1,
    summary="crop, antialiased resize and flip of images held decoded, byte for byte as Pillow's",
    public=("crop_resize",),
    torch_ops=("crop_resize",),
    variants=variants,
    cases=cases,
    dtypes=(torch.float32,),
)
