"""Sin-cos position tables for any grid, and the adaptation of weights to other grids, patch sizes and channels."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import double
from ..errors import UsageError

log = logging.getLogger(__name__)

COORDS = ("absolute", "rescaled")
# enough for image sizes that alternate; a size per image must not fill the memory
_MAX_CACHED_TABLES = 8


def sincos_table(
    width: int,
    grid: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    trained: tuple[int, int] | None = None,
) -> Tensor:
    """The fixed position table of a grid, computed in float64 (as the released checkpoints store it).

    Args:
        width: D, a multiple of 4.
        grid: (rows, columns) of patches.
        dtype: of the result.
        trained: None: row a and column b are numbered 0, 1, ...; else the grid whose range the coordinates are
            stretched to, a = (i + 0.5) trained_rows / rows - 0.5 and b alike, as in resizing its table.

    Returns:
        [rows * columns, D]: [sin(b w), cos(b w), sin(a w), cos(a w)], w_k = 10000 ** (-k / (D / 4)).

    Raises:
        UsageError: D is not a multiple of 4.
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


def are_equal(sizes: Sequence[int], own: Sequence[int], guess: bool = True) -> bool:
    """Whether sizes are equal; with `guess`, sizes that a graph leaves open are not, so that the graph serves any."""
    if not (guess and torch.compiler.is_compiling()):
        return tuple(sizes) == tuple(own)
    # its import takes a while
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(a == b) for a, b in zip(sizes, own, strict=True))


class SinCos:
    """Position tables of one encoder, cached by grid, device and dtype.

    `coords` 'absolute': integer coordinates, exactly what training at that size uses; 'rescaled': stretched to the
    grid `trained` on, (rows, columns), like bicubic resizing of its table.
    """

    def __init__(self, width: int, coords: str, trained: tuple[int, int]) -> None:
        if coords not in COORDS:
            raise UsageError(f"pos_coords: expected 'absolute' or 'rescaled', got {coords!r}")
        self.width, self.coords, self.trained = width, coords, trained
        self._cache: dict[tuple, Tensor] = {}

    def compute(self, grid: tuple[int, int]) -> Tensor:
        """[rows * columns, D] fp32 of a grid."""
        return sincos_table(self.width, grid, trained=self.trained if self.coords == "rescaled" else None)

    def table(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """[rows * columns, D] of a grid, on the device and in the dtype of `like`."""
        # a compiled or traced graph computes the table itself: the cache may not change under it
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.compute(grid).to(like)
        key = (grid, like.device, like.dtype)
        if key not in self._cache:
            sizes = (*grid, *self.trained)
            log.info("positions of %d x %d patches, trained on %d x %d: %s coordinates", *sizes, self.coords)
            # a table made under inference_mode could not be used in training afterwards
            with torch.inference_mode(False):
                table = self.compute(grid).to(like)
            # a FakeTensor has a shape and no values
            if type(table) is not Tensor:
                return table
            while len(self._cache) >= _MAX_CACHED_TABLES:
                del self._cache[next(iter(self._cache))]
            self._cache[key] = table
        return self._cache[key]


# ---- weights for another input ----------------------------------------------------------------------


def check_chans(in_chans: int) -> None:
    """Raises UsageError unless `in_chans` is a whole number, at least 1."""
    if not isinstance(in_chans, int) or in_chans < 1:
        raise UsageError(f"in_chans: expected a whole number, at least 1, got {in_chans!r}")


def adapt_in_chans(weight: Tensor, in_chans: int) -> Tensor:
    """A patch kernel [D, C, p, p] for another number of channels, by timm's rule.

    One channel: the sum over the channels; else the channels repeated, cut to `in_chans` and scaled by C / in_chans, so
    that an image of equal channels gives the same tokens where C divides `in_chans`.
    """
    check_chans(in_chans)
    have = weight.shape[1]
    if in_chans == have:
        return weight
    wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    if in_chans == 1:
        return wide.sum(1, keepdim=True).to(weight.dtype)
    tiled = wide.repeat(1, -(-in_chans // have), 1, 1)[:, :in_chans]
    return (tiled * (have / in_chans)).to(weight.dtype)


def resample_patch_kernel(weight: Tensor, new_patch: int) -> Tensor:
    """A patch kernel [D, C, p, p] for another patch size, by the pseudo-inverse of resizing (FlexiViT, 2212.08013).

    Of all kernels it is the one whose tokens of a resized image are nearest to the tokens of the image itself;
    they are equal where the patch grows. Computed in float64.
    """
    p = weight.shape[-1]
    if weight.dim() != 4 or weight.shape[-2] != p:
        raise UsageError(f"patch kernel: expected [D, C, p, p], got {list(weight.shape)}")
    if new_patch == p:
        return weight
    wide = double(weight)
    unit = torch.eye(p * p, dtype=torch.float64, device=wide.device).view(p * p, 1, p, p)
    # row i: the image that is 1 at pixel i alone, resized
    resize = F.interpolate(unit, size=(new_patch, new_patch), mode="bicubic", antialias=True).flatten(1)
    kernel = wide.flatten(2) @ torch.linalg.pinv(resize).T
    return kernel.view(*weight.shape[:2], new_patch, new_patch).to(weight)


def resample_table(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool = True
) -> Tensor:
    """A learned position table [..., N, D] for another grid (rows, columns), bicubic in fp32.

    `antialias`: True as timm does, False as the released code does.
    """
    rows, columns = old_grid
    if table.shape[-2] != rows * columns:
        raise UsageError(
            f"position table: {table.shape[-2]} rows do not make a grid of {rows} x {columns} patches"
        )
    if tuple(old_grid) == tuple(new_grid):
        return table
    maps = table.float().view(1, rows, columns, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(maps, size=tuple(new_grid), mode="bicubic", antialias=antialias)
    return resized.flatten(2).transpose(1, 2).to(table.dtype).view(*table.shape[:-2], -1, table.shape[-1])
