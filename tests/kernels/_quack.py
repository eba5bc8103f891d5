"""What is called of the optional package `quack-kernels` (0.6.5), with its signatures, computed by plain torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def gemm_act(
    A: Tensor,
    B: Tensor,
    C: Any = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    alpha: float = 1.0,
    preact_out: Tensor | None = None,
    postact_out: Tensor | None = None,
    out_dtype: Any = None,
    postact_dtype: Any = None,
    cu_seqlens_m: Any = None,
    A_idx: Any = None,
    store_preact: bool = True,
    dynamic_scheduler: bool = False,
    tuned: bool = True,
    config: Any = None,
    concat_layout: Any = None,
    split_k: int | None = 1,
    split_k_mode: int = 0,
) -> tuple[Tensor | None, Tensor]:
    """act(A B + bias), for [M, K] and [K, N]; also what comes before the activation."""
    assert activation == "gelu_erf" and postact_out is not None and not tuned
    assert bias is None or bias.is_contiguous()
    h = torch.addmm(bias.to(A.dtype), A, B) if bias is not None else A @ B
    if store_preact:
        assert preact_out is not None
        preact_out.copy_(h)
    postact_out.copy_(torch.nn.functional.gelu(h))
    return preact_out, postact_out


class Mod:
    """An epilogue; here only that of `dact_dbias_mod`."""

    def __call__(
        self,
        A: Tensor,
        B: Tensor,
        C: Any = None,
        *,
        out: Any = None,
        out_dtype: Any = None,
        store_d: bool = True,
        config: Any = None,
        tuned: bool = True,
        dynamic_scheduler: bool = False,
        cu_seqlens_m: Any = None,
        A_idx: Any = None,
        SFA: Any = None,
        SFB: Any = None,
        bs_format_a: Any = None,
        bs_format_b: Any = None,
        rounding_mode: Any = 0,
        epi_key_overrides: Any = None,
        concat_layout: Any = None,
        transform_a: Any = None,
        transform_sf: Any = None,
        transform_operands: Any = None,
        add_to_output: bool = False,
        **operands: Any,
    ) -> dict[str, Tensor]:
        """(A B) GELU'(C), into `out["D"]`, and its column sums."""
        assert not operands and not tuned
        dh = torch.ops.aten.gelu_backward(A @ B, C)
        out["D"].copy_(dh)
        wide = torch.float64 if dh.dtype == torch.float64 else torch.float32
        return {"D": out["D"], "dwb": dh.sum(0, dtype=wide)}


def dact_dbias_mod(activation: str) -> Mod:
    """The epilogue of a matmul whose result is the gradient of an activation's result."""
    assert activation == "gelu_erf"
    return Mod()


# module -> what is taken from it, and what else has a signature
STANDS_FOR: dict[str, dict[str, Callable]] = {
    "quack.gemm_interface": {"gemm_act": gemm_act},
    "quack.epilogue.library": {"dact_dbias_mod": dact_dbias_mod},
    "quack.epilogue.frontend": {"EpiMod.__call__": Mod.__call__},
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `import quack` find these functions."""
    for name in ("quack", "quack.epilogue", *STANDS_FOR):
        module = ModuleType(name)
        for key, function in STANDS_FOR.get(name, {}).items():
            setattr(module, key, function)
        monkeypatch.setitem(sys.modules, name, module)
