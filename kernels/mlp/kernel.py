"""Device code of mlp: GELU behind fc1's matmul, its derivative behind the matmul with fc2's weight (README.md).

T tokens; fc1 is [N, K], fc2 is [K, N], both row-major. Also GELU and its derivative alone, beside other matmuls.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch


@triton.jit
def _upper_tail(a, ACC: tl.constexpr):
    """1 - Phi(a) of the standard normal distribution, for a >= 0."""
    if ACC == tl.float64:
        q = 0.5 - 0.5 * tl.erf(a * 0.7071067811865476)
    else:
        # 2^(a P(a) - 1): absolute error 6.4e-8 in fp32, falling to 0 beyond the fitted range (README.md)
        p = -1.8030438180015794e-06 * a + 2.775916055314635e-05
        p = p * a - 0.00013490072717669562
        p = p * a - 0.00025009944914415
        p = p * a + 0.007195286072368827
        p = p * a - 0.05257472654675063
        p = p * a - 0.4591871198702854
        p = p * a - 1.1511070123201446
        q = tl.exp2(p * a - 1.0)
    return q


@triton.jit
def _gelu(h, ACC: tl.constexpr):
    # h Phi(h), where Phi(h) = 1 - q for h >= 0, else q
    return tl.maximum(h, 0.0) - tl.abs(h) * _upper_tail(tl.abs(h), ACC)


@triton.jit
def _dgelu(h, ACC: tl.constexpr):
    """GELU's derivative, Phi(h) + h phi(h)."""
    q = _upper_tail(tl.abs(h), ACC)
    density = tl.exp2(h * h * -0.7213475204444817) * 0.3989422804014327
    return tl.where(h >= 0, 1.0 - q, q) + h * density


@triton.jit
def _matmul(
    a_ptr,
    b_ptr,
    mask_m,
    offs_n,
    mask_n,
    stride_bk,
    stride_bn,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """a [BLOCK_M, K] b [K, N]: a tile [BLOCK_M, BLOCK_N]."""
    offs_k = tl.arange(0, BLOCK_K)
    a = a_ptr + tl.arange(0, BLOCK_M)[:, None] * K + offs_k[None, :]
    b = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        x = tl.load(a, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(b, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=ACC)
        a += BLOCK_K
        b += BLOCK_K * stride_bk
    return acc


@triton.jit(do_not_specialize=["tokens"])
def linear_gelu_kernel(
    # x [T, K], weight [N, K], bias [N] -> h [T, N] if kept, g [T, N]
    x_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    g_ptr,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    # tiles of the same tokens run together: x is read once, the weight stays in L2
    tile = tl.program_id(0).to(tl.int64)
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = (tile // across) * BLOCK_M
    # within a tile 32 bits are enough, and half the registers
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = (tile % across).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < tokens - first, offs_n < N
    x_ptr += first * K
    h = _matmul(x_ptr, weight_ptr, mask_m, offs_n, mask_n, 1, K, K, BLOCK_M, BLOCK_N, BLOCK_K, ACC)
    if HAS_BIAS:
        h += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    at = offs_m[:, None] * N + offs_n[None, :]
    low = g_ptr.dtype.element_ty
    if KEEP:
        tl.store(h_ptr + first * N + at, h.to(low), mask=mask)
    tl.store(g_ptr + first * N + at, _gelu(h, ACC).to(low), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def linear_dgelu_kernel(
    # dy [T, K], weight [K, N], h [T, N] -> dh [T, N], sums [tiles of tokens, N]
    dy_ptr,
    weight_ptr,
    h_ptr,
    dh_ptr,
    sums_ptr,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = (tile // across) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = (tile % across).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < tokens - first, offs_n < N
    dy_ptr += first * K
    dg = _matmul(dy_ptr, weight_ptr, mask_m, offs_n, mask_n, N, 1, K, BLOCK_M, BLOCK_N, BLOCK_K, ACC)
    # a quarter at a time: a whole tile of h does not fit into the registers beside the sum
    part: tl.constexpr = BLOCK_N // 4
    left, right = tl.split(tl.permute(tl.reshape(dg, (BLOCK_M, 2, 2 * part)), (0, 2, 1)))
    for i in tl.static_range(4):
        half = left if i < 2 else right
        one, two = tl.split(tl.permute(tl.reshape(half, (BLOCK_M, 2, part)), (0, 2, 1)))
        dh = one if i % 2 == 0 else two
        offs_n = (tile % across).to(tl.int32) * BLOCK_N + i * part + tl.arange(0, part)
        mask_n = offs_n < N
        mask = mask_m[:, None] & mask_n[None, :]
        at = offs_m[:, None] * N + offs_n[None, :]
        dh *= _dgelu(tl.load(h_ptr + first * N + at, mask=mask, other=0.0).to(ACC), ACC)
        tl.store(dh_ptr + first * N + at, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        # padding has dy = 0
        tl.store(sums_ptr + (tile // across) * N + offs_n, tl.sum(dh, 0), mask=mask_n)


@triton.jit
def gelu_fwd_kernel(
    # h, g, dense, `size` elements
    h_ptr,
    g_ptr,
    size,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    h = tl.load(h_ptr + offs, mask=mask, other=0.0).to(ACC)
    tl.store(g_ptr + offs, _gelu(h, ACC).to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def gelu_bwd_kernel(
    # dg, h [T, N] -> dh, sums [ROWS, N]
    dg_ptr,
    h_ptr,
    dh_ptr,
    sums_ptr,
    tokens,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    # a program owns BLOCK_N columns of every ROWS-th tile of tokens
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    # summed over a tile's rows once, at the end: threads of other warps hold them
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    low = dh_ptr.dtype.element_ty
    for start in tl.range(row * BLOCK_M, tokens, ROWS * BLOCK_M, num_stages=STAGES):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = (offs_m < tokens)[:, None] & mask_n[None, :]
        at = offs_m[:, None] * N + offs_n[None, :]
        slope = _dgelu(tl.load(h_ptr + at, mask=mask, other=0.0).to(ACC), ACC)
        dh = tl.load(dg_ptr + at, mask=mask, other=0.0).to(ACC) * slope
        tl.store(dh_ptr + at, dh.to(low), mask=mask)
        total += dh
    tl.store(sums_ptr + row * N + offs_n, tl.sum(total, 0), mask=mask_n)


# ---- launchers ------------------------------------------------------------------------------------


def heuristic(direction: str, itemsize: int, large: bool = False) -> dict[str, int]:
    """Settings where nothing was measured; matmuls: two programs per multiprocessor, one computes, one writes.

    large: the device has the shared memory for longer steps through K.
    """
    if direction == "gelu":
        return {"BLOCK": 1024, "num_warps": 4}
    if direction == "dgelu":
        return {"BLOCK_M": 16, "BLOCK_N": 512 // itemsize, "STAGES": 3, "num_warps": 4}
    steps = {"BLOCK_K": 64, "num_stages": 3} if large else {"BLOCK_K": 32, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8} | steps


def _options(direction: str, x: Tensor, **sizes: int) -> dict:
    key = _launch.config_key(direction, x.dtype, **sizes)
    # sm_90 and sm_100: twice 96 KB
    large = x.device.type == "cuda" and _properties(x.device).major in (9, 10)
    chosen = _launch.settings("mlp", key, x.device, heuristic(direction, x.element_size(), large))
    return sizes | {"ACC": _launch.accumulator(x.dtype)} | chosen


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def _ready(x: Tensor) -> Tensor:
    return _launch.rows_ready(x.contiguous())


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """(GELU(h) [..., N], h = x weight^T + bias, or empty) of x [..., K], weight [N, K]."""
    x, weight = _ready(x), _ready(weight)
    (width, inner), tokens = weight.shape, x.numel() // max(x.shape[-1], 1)
    g = _launch.empty((*x.shape[:-1], width), x)
    h = _launch.empty(g.shape, x) if keep else x.new_empty(0)
    options = _options("fc1", x, N=width, K=inner) | {"HAS_BIAS": bias is not None, "KEEP": keep}
    grid = (triton.cdiv(tokens, options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"]),)
    pointers = (x, weight, x if bias is None else bias.contiguous(), h, g)
    _launch.launch(linear_gelu_kernel, grid, x, *pointers, tokens, **options)
    return g, h


def linear_dgelu(dy: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(dh = (dy weight) GELU'(h), its column sums [N]) of dy [..., K], weight [K, N]."""
    dy, weight, h = _ready(dy), _ready(weight), _ready(h)
    (inner, width), tokens = weight.shape, dy.numel() // max(dy.shape[-1], 1)
    dh = _launch.empty(h.shape, h)
    options = _options("fc2", h, N=width, K=inner)
    tiles = triton.cdiv(tokens, options["BLOCK_M"])
    sums = _launch.empty((tiles, width), h, _launch.wide(h.dtype))
    grid = (tiles * triton.cdiv(width, options["BLOCK_N"]),)
    _launch.launch(linear_dgelu_kernel, grid, h, dy, weight, h, dh, sums, tokens, **options)
    # one sum over the tiles in their order: the same bits in every run
    return dh, sums.sum(0)


def gelu(h: Tensor) -> Tensor:
    """GELU(h), any shape."""
    h = _ready(h)
    g = _launch.empty(h.shape, h)
    options = _options("gelu", h)
    grid = (triton.cdiv(h.numel(), options["BLOCK"]),)
    _launch.launch(gelu_fwd_kernel, grid, h, h, g, h.numel(), **options)
    return g


def dgelu(dg: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(dh = dg GELU'(h), its column sums [N]) of dg and h [..., N]."""
    dg, h = _ready(dg), _ready(h)
    width = h.shape[-1]
    tokens = h.numel() // max(width, 1)
    dh = _launch.empty(h.shape, h)
    options = _options("dgelu", h, N=width)
    across = triton.cdiv(width, options["BLOCK_N"])
    rows = min(max(1, programs(h.device) // across), triton.cdiv(tokens, options["BLOCK_M"]))
    sums = _launch.empty((rows, width), h, _launch.wide(h.dtype))
    _launch.launch(gelu_bwd_kernel, (rows, across), h, dg, h, dh, sums, tokens, ROWS=rows, **options)
    return dh, sums.sum(0)


def programs(device: torch.device) -> int:
    """Programs of GELU's backward pass: eight per multiprocessor of a GPU."""
    return 8 * _properties(device).multi_processor_count if device.type == "cuda" else 8
