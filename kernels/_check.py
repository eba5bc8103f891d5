"""Argument checks shared by all ops: the error names the argument, what came and what is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _launch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(x: object) -> str:
    """`int64 [5, 8, 39]` for a tensor, the type's name for anything else."""
    return f"{_name(x.dtype)} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What an op computes in: autocast's dtype where it is on, else that of `x`; fp64 is left alone as in torch."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def check(
    name: str,
    x: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] | None = None,
    like: Tensor | None = None,
    hint: str = "",
) -> None:
    """Checks one tensor argument; sizes given as text (`"D"`) are free and only shown.

    dtypes: allowed element types (None: any);  like: a tensor whose device it must share
    raises  TypeError for what is no tensor, ValueError for shape, dtype and device
    """
    wanted = f"{' | '.join(_name(d) for d in dtypes) + ' ' if dtypes else ''}[{', '.join(map(str, shape))}]"
    hint = f"; {hint}" if hint else ""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {wanted}, got {describe(x)}{hint}")
    fits = x.dim() == len(shape) and all(
        isinstance(w, str) or w == s for w, s in zip(shape, x.shape, strict=True)
    )
    if not fits or (dtypes is not None and x.dtype not in dtypes):
        raise ValueError(f"{name}: expected {wanted}, got {describe(x)}{hint}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} like the other arguments, got {x.device}{hint}")


def check_keep(keep: Tensor, batch: int, num_tokens: int, like: Tensor, unique: str = "") -> Tensor:
    """Checks keep indices [V, B, K] and returns them as int32.

    unique: `view` (no index twice within a view) or `image` (within all views of an image)
    values are looked at on a CPU, and elsewhere when EXTREMA_FAST_CHECK=1, since that waits for the device
    """
    check("keep", keep, ("V", batch, "K"), (torch.int32, torch.int64), like, "integer indices, view-major")
    if torch.compiler.is_compiling() or keep.numel() == 0:
        return keep.int()
    if _launch.checking() or keep.device.type == "cpu":
        low, high = int(keep.min()), int(keep.max())
        if low < 0 or high >= num_tokens:
            raise ValueError(f"keep: expected indices in [0, {num_tokens}), got {low} to {high}")
    if _launch.checking() and unique:
        rows = keep.transpose(0, 1).flatten(1) if unique == "image" else keep.flatten(0, 1)
        ordered = rows.sort(-1).values
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError(f"keep: an index is twice within one {unique}")
    return keep.int()
