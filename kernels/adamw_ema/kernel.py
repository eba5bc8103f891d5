"""Device code of adamw_ema: one program updates 4,096 elements of one tensor (README.md).

The table holds addresses, so any number of tensors is one launch. Columns of `table` [tensors, COLUMNS] int64:
param, grad, exp_avg, exp_avg_sq, step, teacher, shadow, teacher shadow (0: none), elements, group, aligned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch

BLOCK = 4096
COLUMNS = 11


@triton.jit
def _update(
    p_addr, g_addr, m_addr, v_addr, e_addr, s_addr, t_addr, offs, mask,
    shrink, rest1, beta2, rest2, eps, rate, second, factor, weight,
    FULL: tl.constexpr, GRAD: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    p_ptr = p_addr.to(tl.pointer_type(ACC))
    g_ptr = g_addr.to(tl.pointer_type(GRAD))
    m_ptr = m_addr.to(tl.pointer_type(ACC))
    v_ptr = v_addr.to(tl.pointer_type(ACC))
    if FULL:
        # both are needed for 16-byte accesses: the hint, and no mask
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
        v_ptr = tl.multiple_of(v_ptr, 16)
        p = tl.load(p_ptr + offs)
        g = tl.load(g_ptr + offs).to(ACC)
        m = tl.load(m_ptr + offs)
        v = tl.load(v_ptr + offs)
    else:
        p = tl.load(p_ptr + offs, mask=mask, other=0.0)
        g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(ACC)
        m = tl.load(m_ptr + offs, mask=mask, other=0.0)
        v = tl.load(v_ptr + offs, mask=mask, other=0.0)
    g = g * factor
    p = p - shrink * p
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    p = p - rate * m / (tl.sqrt(v / second) + eps)
    if FULL:
        tl.store(p_ptr + offs, p)
        tl.store(m_ptr + offs, m)
        tl.store(v_ptr + offs, v)
    else:
        tl.store(p_ptr + offs, p, mask=mask)
        tl.store(m_ptr + offs, m, mask=mask)
        tl.store(v_ptr + offs, v, mask=mask)
    if s_addr != 0:
        s_ptr = s_addr.to(tl.pointer_type(LOW))
        if FULL:
            s_ptr = tl.multiple_of(s_ptr, 16)
            tl.store(s_ptr + offs, p.to(LOW))
        else:
            tl.store(s_ptr + offs, p.to(LOW), mask=mask)
    if e_addr != 0:
        e_ptr = e_addr.to(tl.pointer_type(ACC))
        if FULL:
            e_ptr = tl.multiple_of(e_ptr, 16)
            e = tl.load(e_ptr + offs)
            e = e + weight * (p - e)
            tl.store(e_ptr + offs, e)
        else:
            e = tl.load(e_ptr + offs, mask=mask, other=0.0)
            e = e + weight * (p - e)
            tl.store(e_ptr + offs, e, mask=mask)
        if t_addr != 0:
            t_ptr = t_addr.to(tl.pointer_type(LOW))
            if FULL:
                t_ptr = tl.multiple_of(t_ptr, 16)
                tl.store(t_ptr + offs, e.to(LOW))
            else:
                tl.store(t_ptr + offs, e.to(LOW), mask=mask)


@triton.jit
def adamw_ema_kernel(
    # [tensors, COLUMNS] int64; [chunks, 2] int32: tensor, chunk; [groups, 5] float64
    table_ptr,
    chunks_ptr,
    settings_ptr,
    # 0-d float64: factor on the gradient, skip, teacher's weight
    factor_ptr,
    skip_ptr,
    weight_ptr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
    LOW: tl.constexpr,
    ACC: tl.constexpr,
):
    # nothing is touched on a bad step, the teacher neither
    if tl.load(skip_ptr) == 0.0:
        pid = tl.program_id(0).to(tl.int64)
        tensor = tl.load(chunks_ptr + pid * 2).to(tl.int64)
        start = tl.load(chunks_ptr + pid * 2 + 1).to(tl.int64) * BLOCK
        row = table_ptr + tensor * COLUMNS
        size = tl.load(row + 8)
        group = settings_ptr + tl.load(row + 9) * 5
        lr = tl.load(group)
        beta1 = tl.load(group + 1)
        beta2 = tl.load(group + 2)
        # counted before this launch
        t = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32))).to(tl.float64)
        # powers and bias corrections in fp64, as torch does on the host
        rate = (lr / (1.0 - tl.exp2(t * tl.log2(beta1)))).to(ACC)
        second = (1.0 - tl.exp2(t * tl.log2(beta2))).to(ACC)
        eps = tl.load(group + 3).to(ACC)
        shrink = (lr * tl.load(group + 4)).to(ACC)
        rest1 = (1.0 - beta1).to(ACC)
        rest2 = (1.0 - beta2).to(ACC)
        factor = tl.load(factor_ptr).to(ACC)
        weight = tl.load(weight_ptr).to(ACC)
        p, g, m = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        v, e = tl.load(row + 3), tl.load(row + 5)
        s, ts = tl.load(row + 6), tl.load(row + 7)
        beta2 = beta2.to(ACC)
        offs = start + tl.arange(0, BLOCK)
        mask = offs < size
        if (start + BLOCK <= size) & (tl.load(row + 10) != 0):
            _update(p, g, m, v, e, s, ts, offs, mask, shrink, rest1, beta2, rest2, eps, rate, second, factor,
                    weight, True, GRAD, LOW, ACC)  # fmt: skip
        else:
            _update(p, g, m, v, e, s, ts, offs, mask, shrink, rest1, beta2, rest2, eps, rate, second, factor,
                    weight, False, GRAD, LOW, ACC)  # fmt: skip


# ---- launcher -------------------------------------------------------------------------------------

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def update(
    table: Tensor, chunks: Tensor, settings: Tensor, factor: Tensor, skip: Tensor, weight: Tensor,
    dtype: torch.dtype, grad_dtype: torch.dtype, shadow_dtype: torch.dtype,
) -> None:  # fmt: skip
    """One launch over all chunks; the tensors are those whose addresses the table holds."""
    config = _launch.settings("adamw_ema", "update", table.device, lambda: {"num_warps": 8, "num_stages": 1})
    _launch.launch(
        adamw_ema_kernel, (chunks.shape[0],), table, table, chunks, settings, factor, skip, weight,
        COLUMNS=COLUMNS, BLOCK=BLOCK, GRAD=_TYPES[grad_dtype], LOW=_TYPES[shadow_dtype], ACC=_TYPES[dtype],
        **config,
    )  # fmt: skip
