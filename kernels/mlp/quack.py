"""QuACK's matmuls with GELU in them, for GPUs from H100 on: an optional package in place of this folder's kernels.

`quack-kernels` (Apache-2.0, github.com/Dao-AILab/quack) is imported at the first call and only where it is asked for.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _launch

# exact GELU; QuACK's other ones are approximations
ACTIVATION = "gelu_erf"


def missing(device: torch.device) -> str:
    """Why it cannot be used on a device; empty when it can."""
    return _missing(device)


# a traced graph holds the answer (as `can_run` of _launch.py)
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _missing(device: torch.device) -> str:
    if importlib.util.find_spec("quack") is None:
        return "QuACK is not installed (pip install quack-kernels)"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"QuACK needs a CUDA device, got {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"QuACK is used from compute capability 9.0 (H100) on, this GPU has {major}.{minor}"
    try:
        functions()
    except Exception as error:
        # whatever one of the packages below it lacks
        return f"QuACK cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return ""


@functools.cache
def functions() -> tuple[Callable, Callable]:
    """(matmul, bias, GELU; matmul, GELU's derivative and the column sums of that)."""
    from quack.epilogue.library import dact_dbias_mod
    from quack.gemm_interface import gemm_act

    return gemm_act, dact_dbias_mod(ACTIVATION)


def _rows(x: Tensor) -> Tensor:
    return _launch.rows_ready(x.reshape(-1, x.shape[-1]).contiguous())


# QuACK's own search for settings (`tuned`) would take minutes, and later runs might find others


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """As `kernel.linear_gelu`."""
    rows, weight = _rows(x), _launch.rows_ready(weight)
    g = _launch.empty((len(rows), len(weight)), rows)
    h = _launch.empty(g.shape, g) if keep else None
    matmul, _ = functions()
    matmul(
        rows,
        weight.t(),
        bias=None if bias is None else bias.contiguous(),
        activation=ACTIVATION,
        preact_out=h,
        postact_out=g,
        store_preact=keep,
        tuned=False,
    )
    shape = (*x.shape[:-1], len(weight))
    return g.view(shape), x.new_empty(0) if h is None else h.view(shape)


def linear_dgelu(dy: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernel.linear_dgelu`."""
    rows, hidden = _rows(dy), _rows(h)
    dh = _launch.empty(hidden.shape, hidden)
    if not dh.numel():
        return dh.view(h.shape), h.new_zeros(h.shape[-1], dtype=_launch.wide(h.dtype))
    _, matmul = functions()
    found = matmul(rows, _launch.rows_ready(weight), hidden, out={"D": dh}, tuned=False)
    return dh.view(h.shape), found["dwb"]
