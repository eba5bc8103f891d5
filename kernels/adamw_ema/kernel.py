"""Device code of adamw_ema: one program updates 2,048 elements of one tensor (README.md).

A table holds addresses, so any number of tensors is one launch. Its columns, [tensors, COLUMNS] int64: param,
grad, exp_avg, exp_avg_sq, step, teacher, shadow, teacher shadow (0: none), elements, group, aligned.
Order: norm (per chunk), prepare (one program), update (per chunk), their launcher.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch
from .op import LOW, rows, tables

BLOCK = 2048
COLUMNS = 11
# of each tensor: 1 - lr decay, 1 - beta1, beta2, 1 - beta2, eps, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), -
DERIVED = 8


@triton.jit
def adamw_ema_norm_kernel(
    # [tensors, COLUMNS]; [chunks, 2] tensor, chunk; [chunks]
    table_ptr,
    chunks_ptr,
    partials_ptr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + pid * 2).to(tl.int64)
    start = tl.load(chunks_ptr + pid * 2 + 1).to(tl.int64) * BLOCK
    row = table_ptr + tensor * COLUMNS
    size = tl.load(row + 8)
    offs = tl.arange(0, BLOCK)
    g_ptr = tl.load(row + 1).to(tl.pointer_type(GRAD)) + start
    if (start + BLOCK <= size) & (tl.load(row + 10) != 0):
        # [BLOCK]
        full_ptr = tl.multiple_of(g_ptr, 16)
        g = tl.load(full_ptr + offs).to(ACC)
    else:
        g = tl.load(g_ptr + offs, mask=offs < size - start, other=0.0).to(ACC)
    tl.store(partials_ptr + pid, tl.sum(g * g, 0))


@triton.jit(do_not_specialize=["tensors", "chunks"])
def adamw_ema_prepare_kernel(
    # [tensors, COLUMNS]; [1 + groups, 5] float64; [chunks]
    table_ptr,
    settings_ptr,
    partials_ptr,
    # [tensors, DERIVED]; [2] factor on the gradient, teacher's weight; [2] float64 norm, skipped
    derived_ptr,
    common_ptr,
    outcome_ptr,
    tensors,
    chunks,
    COLUMNS: tl.constexpr,
    DERIVED: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_FLAG: tl.constexpr,
    ACC: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    factor = tl.load(settings_ptr)
    # of a step that needs none
    norm = factor * float("nan")
    if HAS_NORM:
        # always in the same order; many at once, since one program waits for each load
        places = tl.arange(0, SUMS)
        total = tl.zeros([SUMS], tl.float64)
        for first in range(0, chunks, SUMS):
            part = tl.load(partials_ptr + first + places, mask=places < chunks - first, other=0.0)
            total += part.to(tl.float64)
        norm = tl.sqrt(tl.sum(total, 0)) * tl.abs(factor)
        clip = tl.load(settings_ptr + 3) / (norm + 1e-6)
        # a norm that is not a number stays one
        factor = tl.where(clip < 1.0, factor * clip, factor)
    if HAS_NORM:
        skip = (norm != norm) | (tl.abs(norm) == float("inf"))
        if HAS_FLAG:
            skip |= tl.load(settings_ptr + 2) != 0.0
    else:
        skip = tl.load(settings_ptr + 2) != 0.0
    tl.store(outcome_ptr, norm)
    tl.store(outcome_ptr + 1, tl.where(skip, 1.0, 0.0).to(tl.float64))
    tl.store(common_ptr, factor.to(ACC))
    tl.store(common_ptr + 1, tl.load(settings_ptr + 1).to(ACC))
    for first in range(0, tensors, BLOCK):
        # [BLOCK] tensors
        tensor = (first + offs).to(tl.int64)
        mask = tensor < tensors
        row = table_ptr + tensor * COLUMNS
        group = settings_ptr + 5 + tl.load(row + 9, mask=mask, other=0) * 5
        lr = tl.load(group, mask=mask, other=0.0)
        beta1 = tl.load(group + 1, mask=mask, other=0.5)
        beta2 = tl.load(group + 2, mask=mask, other=0.5)
        eps = tl.load(group + 3, mask=mask, other=0.0)
        decay = tl.load(group + 4, mask=mask, other=0.0)
        t_ptr = tl.load(row + 4, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        before = tl.load(t_ptr, mask=mask, other=0.0)
        tl.store(t_ptr, before + 1.0, mask=mask & (skip == 0))
        t = before.to(tl.float64) + 1.0
        # the powers in fp64, as torch computes them on the CPU; 0^t is 0
        power1 = tl.where(beta1 > 0.0, tl.exp2(t * tl.log2(tl.where(beta1 > 0.0, beta1, 1.0))), 0.0)
        power2 = tl.where(beta2 > 0.0, tl.exp2(t * tl.log2(tl.where(beta2 > 0.0, beta2, 1.0))), 0.0)
        out = derived_ptr + tensor * DERIVED
        tl.store(out, (1.0 - lr * decay).to(ACC), mask=mask)
        tl.store(out + 1, (1.0 - beta1).to(ACC), mask=mask)
        tl.store(out + 2, beta2.to(ACC), mask=mask)
        tl.store(out + 3, (1.0 - beta2).to(ACC), mask=mask)
        tl.store(out + 4, eps.to(ACC), mask=mask)
        tl.store(out + 5, (lr / (1.0 - power1)).to(ACC), mask=mask)
        tl.store(out + 6, (1.0 / tl.sqrt(1.0 - power2)).to(ACC), mask=mask)


@triton.jit
def _pointer(address, start, TYPE: tl.constexpr, FULL: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE)) + start
    # wide accesses need both: this hint, and no mask. Four elements at once in every type (16 bytes in fp32): eight of
    # a 16-bit type would give threads eight of the others, and these would be exchanged before they are stored
    if FULL:
        pointer = tl.multiple_of(pointer, 8 if TYPE.primitive_bitwidth == 16 else 16)
    return pointer


@triton.jit
def _update(
    row, derived, common_ptr, start, left,
    BLOCK: tl.constexpr, FULL: tl.constexpr, GRAD: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    mask = None if FULL else offs < left
    other = None if FULL else 0.0
    p_ptr = _pointer(tl.load(row), start, ACC, FULL) + offs
    g_ptr = _pointer(tl.load(row + 1), start, GRAD, FULL) + offs
    m_ptr = _pointer(tl.load(row + 2), start, ACC, FULL) + offs
    v_ptr = _pointer(tl.load(row + 3), start, ACC, FULL) + offs
    e_address = tl.load(row + 5)
    e_ptr = _pointer(e_address, start, ACC, FULL) + offs
    # [BLOCK]
    p = tl.load(p_ptr, mask=mask, other=other)
    g = tl.load(g_ptr, mask=mask, other=other).to(ACC)
    m = tl.load(m_ptr, mask=mask, other=other)
    v = tl.load(v_ptr, mask=mask, other=other)
    e = tl.zeros([BLOCK], ACC)
    # loaded with the others, although needed last
    if e_address != 0:
        e = tl.load(e_ptr, mask=mask, other=other)
    g = g * tl.load(common_ptr)
    p = p * tl.load(derived)
    m = m + tl.load(derived + 1) * (g - m)
    v = tl.load(derived + 2) * v + tl.load(derived + 3) * (g * g)
    p = p - tl.load(derived + 5) * m / (tl.sqrt(v) * tl.load(derived + 6) + tl.load(derived + 4))
    tl.store(p_ptr, p, mask=mask)
    tl.store(m_ptr, m, mask=mask)
    tl.store(v_ptr, v, mask=mask)
    s_address = tl.load(row + 6)
    if s_address != 0:
        tl.store(_pointer(s_address, start, LOW, FULL) + offs, p.to(LOW), mask=mask)
    if e_address != 0:
        # as torch.lerp: a weight of 1 gives p itself
        weight = tl.load(common_ptr + 1)
        e = tl.where(weight < 0.5, e + weight * (p - e), p - (p - e) * (1.0 - weight))
        tl.store(e_ptr, e, mask=mask)
        t_address = tl.load(row + 7)
        if t_address != 0:
            tl.store(_pointer(t_address, start, LOW, FULL) + offs, e.to(LOW), mask=mask)


@triton.jit
def adamw_ema_kernel(
    # [tensors, COLUMNS]; [chunks, 2] tensor, chunk; [tensors, DERIVED]; [2]; [2] float64
    table_ptr,
    chunks_ptr,
    derived_ptr,
    common_ptr,
    outcome_ptr,
    COLUMNS: tl.constexpr,
    DERIVED: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
    LOW: tl.constexpr,
    ACC: tl.constexpr,
):
    # a bad step changes nothing, the teacher neither
    if tl.load(outcome_ptr + 1) == 0.0:
        pid = tl.program_id(0).to(tl.int64)
        tensor = tl.load(chunks_ptr + pid * 2).to(tl.int64)
        start = tl.load(chunks_ptr + pid * 2 + 1).to(tl.int64) * BLOCK
        row = table_ptr + tensor * COLUMNS
        derived = derived_ptr + tensor * DERIVED
        left = tl.load(row + 8) - start
        if (left >= BLOCK) & (tl.load(row + 10) != 0):
            _update(row, derived, common_ptr, start, left, BLOCK, True, GRAD, LOW, ACC)
        else:
            _update(row, derived, common_ptr, start, left, BLOCK, False, GRAD, LOW, ACC)


# ---- launcher -------------------------------------------------------------------------------------


def update(
    table: Tensor,
    chunks: Tensor,
    settings: Tensor,
    outcome: Tensor,
    has_norm: bool,
    has_flag: bool,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
) -> None:
    """Norm, prepare and update over the tensors whose addresses `table` holds; `outcome` is written.

    table: [tensors, COLUMNS] int64;  chunks: [chunks, 2] int32;  settings: [1 + groups, 5] float64
    dtypes: of parameters, gradients, low-precision copies
    """
    tensors, count = table.shape[0], chunks.shape[0]
    dtype, grad, low = dtypes
    partials = _launch.empty((count if has_norm else 0,), table, dtype)
    derived = _launch.empty((tensors, DERIVED), table, dtype)
    common = _launch.empty((2,), table, dtype)

    def run(key: str, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        # 8 elements per thread and tensor: 16 take 152 registers, and one program fills a multiprocessor
        default = {"num_warps": 8, "num_stages": 1}
        options = {"COLUMNS": COLUMNS, "BLOCK": BLOCK, "ACC": _launch.triton_dtype(dtype)} | constants
        options |= _launch.settings("adamw_ema", key, table.device, default)
        _launch.launch(kernel, (programs,), table, *args, **options)

    if has_norm:
        run("norm", adamw_ema_norm_kernel, count, table, chunks, partials, GRAD=_launch.triton_dtype(grad))
    results = (derived, common, outcome)
    flags = {"DERIVED": DERIVED, "BLOCK": 256, "SUMS": 8192, "HAS_NORM": has_norm, "HAS_FLAG": has_flag}
    args = (table, settings, partials, *results, tensors, count)
    run("prepare", adamw_ema_prepare_kernel, 1, *args, **flags)
    types = {"DERIVED": DERIVED, "GRAD": _launch.triton_dtype(grad), "LOW": _launch.triton_dtype(low)}
    run("update", adamw_ema_kernel, count, table, chunks, *results, **types)


_NAMES = ("params", "exp_avg", "exp_avg_sq", "step", "teacher", "shadow", "teacher_shadow")


def _check(params: list[Tensor], columns: Sequence[Sequence[Tensor | None]]) -> None:
    """ValueError for a tensor that no longer is what the kernels take: they know addresses alone."""
    first = params[0]
    for name, column in zip(_NAMES, columns):
        for p, t in zip(params, column):
            if t is None:
                continue
            dtypes = LOW if "shadow" in name else (torch.float32,) if name == "step" else (first.dtype,)
            fits = t.numel() == 1 if name == "step" else t.shape == p.shape
            if not fits or t.dtype not in dtypes or t.device != first.device or not t.is_contiguous():
                raise ValueError(
                    f"{name}: {_launch.describe(t)} on {t.device} belongs to {_launch.describe(p)} on {p.device}, and "
                    "was converted, moved or laid out anew since; make the optimizer after that"
                )


def step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    teacher: list[Tensor | None],
    shadow: list[Tensor | None],
    teacher_shadow: list[Tensor | None],
    group: list[int],
    settings: Tensor,
    outcome: Tensor,
    has_norm: bool,
    has_flag: bool,
    kept: dict[str, Any],
) -> None:
    """One optimizer step, in place; arguments as `adamw_ema_reference`, and what is kept for the next one."""
    changed = (params, exp_avg, exp_avg_sq, steps, teacher, shadow, teacher_shadow)
    tensors = [t for column in changed for t in column]
    # of those that others may give new storage, of another type too; the rest is this optimizer's, or was made for it
    addresses = [0 if t is None else (t.data_ptr(), t.dtype) for t in (*params, *teacher)]
    if kept.get("addresses") != addresses or not all(map(operator.is_, tensors, kept["tensors"])):
        _check(params, changed)
        columns = [[0 if t is None else t.data_ptr() for t in column] for column in changed]
        kept["sizes"] = tuple(p.numel() for p in params)
        kept["rows"] = rows([*columns, list(kept["sizes"]), group])
        kept["tensors"], kept["addresses"] = tensors, addresses
        # what a backward pass may have saved
        kept["read"] = [t for column in (params, *changed[4:]) for t in column if t is not None]
    low = next((t.dtype for t in (*shadow, *teacher_shadow) if t is not None), torch.bfloat16)
    pointers = tuple(g.data_ptr() for g in grads)
    table, chunks = tables(kept["rows"], pointers, kept["sizes"], BLOCK, params[0].device)
    update(table, chunks, settings, outcome, has_norm, has_flag, (params[0].dtype, grads[0].dtype, low))
    # the kernel writes behind autograd's back: a backward pass through the old values must fail, as after torch's own
    torch.autograd.graph.increment_version(kept["read"])
