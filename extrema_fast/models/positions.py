"""The sin-cos position table, computed for any grid."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..errors import UsageError

log = logging.getLogger(__name__)

COORDS = ("absolute", "rescaled")
# an image size that alternates keeps its tables; a size per image does not fill the memory
_KEPT_TABLES = 8


def sincos_table(
    width: int,
    grid: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    trained: tuple[int, int] | None = None,
) -> Tensor:
    """Fixed position table, computed in float64 for any grid (method.md section 1).

    width:   D, a multiple of 4;  grid: (rows, columns)
    trained  None: row a and column b are numbered 0, 1, ...; else a grid whose range the coordinates are
             stretched to, a = (i + 0.5) rows' / rows - 0.5 and b alike, as when a table of it is resized
    returns  [rows * columns, D]: [sin(b w), cos(b w), sin(a w), cos(a w)] for row a, column b,
             w_k = 10000 ** (-k / (D / 4))
    """
    if width % 4:
        raise UsageError(f"width: the sin-cos table needs a multiple of 4, got {width}")
    w = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    sides = [torch.arange(g, dtype=torch.float64) for g in grid]
    if trained is not None:
        sides = [(x + 0.5) * (old / new) - 0.5 for x, old, new in zip(sides, trained, grid, strict=True)]
    a, b = torch.meshgrid(*sides, indexing="ij")
    across, down = b.reshape(-1, 1) * w, a.reshape(-1, 1) * w
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], 1).to(dtype)


class SinCos:
    """Tables of one encoder, by grid; kept per device and dtype.

    coords   'absolute': integer coordinates, exactly what training at that size uses; 'rescaled': stretched to
             the grid trained on, as bicubic resizing of its table does
    trained  (rows, columns) trained on
    """

    def __init__(self, width: int, coords: str, trained: tuple[int, int]) -> None:
        if coords not in COORDS:
            raise UsageError(f"pos_coords: expected 'absolute' or 'rescaled', got {coords!r}")
        self.width, self.coords, self.trained = width, coords, trained
        self._kept: dict[tuple, Tensor] = {}

    def compute(self, grid: tuple[int, int]) -> Tensor:
        """[rows * columns, D] fp32."""
        return sincos_table(self.width, grid, trained=self.trained if self.coords == "rescaled" else None)

    def table(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """[rows * columns, D] with the device and dtype of `like`."""
        # a compiled graph computes it itself: what is kept may not change under it
        if torch.compiler.is_compiling():
            return self.compute(grid).to(like)
        key = (grid, like.device, like.dtype)
        if key not in self._kept:
            if all(key[0] != grid for key in self._kept):
                log.info(
                    "positions of %d x %d patches, trained on %d x %d: %s coordinates",
                    *grid, *self.trained, self.coords,
                )  # fmt: skip
            # a table made under inference_mode could not be used in training afterwards
            with torch.inference_mode(False):
                made = self.compute(grid).to(like)
            # shapes alone are no table (FakeTensor)
            if type(made) is not Tensor:
                return made
            while len(self._kept) >= _KEPT_TABLES:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = made
        return self._kept[key]
