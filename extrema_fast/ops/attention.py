"""Self-attention backends: what each needs, its launch limits, and the committed timings `auto` follows.

| name | what runs | needs |
| --- | --- | --- |
| `sdpa` | torch's scaled_dot_product_attention: the first kernel of `ORDER` that can run | nothing |
| `flash`, `efficient`, `cudnn` | exactly that kernel of it | CUDA; flash and cudnn: bf16 or fp16 |
| `fa3` | FlashAttention-3 in the place of torch's flash kernel | Hopper, a flash_attn_3 wheel; bf16 or fp16 |
| `xformers` | memory-efficient attention on [R, n, H, d] views; block-diagonal for packed sequences | CUDA, xformers |
| `short` | this project's kernel (`kernels/short_attention`) | Triton, at most 64 tokens |
| `products` | two batched products and a written-out backward pass (`extrema_fast.ops.products`) | nothing |
| `reference` | the plain formula | nothing |

All take qkv [R, n, 3, H, d], as the projection leaves it, and return [R, n, H, d]; the packed ones take qkv
[T, 3, H, d] and a `Packing`. Which one runs is decided in `extrema_fast.ops.dispatch`, from what this module knows.

`auto` reads attention_table.json, which `python -m benchmarks attention --write-table` makes of committed records:
per device, dtype, head_dim, n and mode (training: forward and backward; inference: forward) the timings of every
backend that could run and was right. Between two measured n the nearer one by ratio counts, and none counts
further than a factor of two away. Where the table's fastest cannot run, the next one does. Without a row: `sdpa`,
on a CPU in bf16 `products`; a row that did not measure these beside the others counts for nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import kernels
from ..errors import UsageError
from ..kernels.short_attention import short_attention, short_attention_reference
from ..kernels.short_attention.op import HEAD_DIMS, MAX_TOKENS, fits
from .products import attention_products

# torch's own default has changed between versions; the plain formula comes last
ORDER = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]
HALF = (torch.bfloat16, torch.float16)
DTYPES = {
    "xformers": (*HALF, torch.float32),
    "flash": HALF,
    "efficient": (*HALF, torch.float32),
    "cudnn": HALF,
    "fa3": HALF,
}
ANY = sys.maxsize

# launch limits of the stock kernels, beyond which rows are run in parts:
# the grid's second and third axis (pytorch#142228, xformers#845, flash-attention#1786)
MAX_SEQUENCES = 65_535
# FlashAttention-2's backward pass, in padded elements; equality passes (PriorLabs/TabPFN#1184)
MAX_PADDED = 2**31
STOCK = ("xformers", "sdpa", "flash", "efficient", "cudnn", "fa3")
FLASH_BACKWARD = ("xformers", "sdpa", "flash", "fa3")

# (most tokens, backend), ascending; the last entry has no bound, and no name where longer sequences are refused
Plan = tuple[tuple[int, str], ...]


# ---- sequences of one length ----------------------------------------------------------------------


def _sdpa(order: list[SDPBackend]) -> Callable[[Tensor], Tensor]:
    def run(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # a CPU has one fused kernel and no order; the block would take longer than a small product
        if order is ORDER and qkv.device.type == "cpu":
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        # the backward pass needs no such block: autograd and compiled graphs hold the chosen kernel's own node,
        # and a recomputed forward pass comes through here again
        with sdpa_kernel(order, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


def _xformers(qkv: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    # views [R, n, H, d]: xformers reads any strides with a dense last axis
    return memory_efficient_attention(*qkv.unbind(2))


@contextlib.contextmanager
def fa3_active() -> Iterator[None]:
    """Inside, torch's flash kernel is FlashAttention-3; afterwards what it was before."""
    from torch.nn import attention

    before = attention.current_flash_attention_impl()
    if before == "FA3":
        yield
        return
    attention.activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()
        if before is not None:
            attention.activate_flash_attention_impl(before)


# The activation is the process's, so it lasts for one call only (60 us): a teacher on FlashAttention-2, or another
# model, finds torch as it was. An op of its own, because a compiled graph would hold torch's flash op and run what
# is active by then, and because the backward pass needs the activation, too.
@torch.library.custom_op("extrema_fast::fa3", mutates_args=())
def _fa3_op(qkv: Tensor) -> tuple[Tensor, Tensor]:
    with fa3_active():
        out, lse = _flash_forward(qkv)
    return out.transpose(1, 2).contiguous(), lse


@torch.library.custom_op("extrema_fast::fa3_backward", mutates_args=())
def _fa3_backward_op(qkv: Tensor, out: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    with fa3_active():
        grads = _flash_backward(grad.transpose(1, 2), qkv, out.transpose(1, 2), lse)
    return torch.stack([g.transpose(1, 2) for g in grads], 2)


@_fa3_op.register_fake
def _fa3_fake(qkv: Tensor) -> tuple[Tensor, Tensor]:
    rows, n, _, heads, d = qkv.shape
    return qkv.new_empty(rows, n, heads, d), qkv.new_empty(rows, heads, n, dtype=torch.float32)


@_fa3_backward_op.register_fake
def _fa3_backward_fake(qkv: Tensor, out: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _fa3_setup(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _fa3_grad(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
    return _fa3_backward_op(*ctx.saved_tensors, grad)


_fa3_op.register_autograd(_fa3_grad, setup_context=_fa3_setup)


def _flash_forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _flash_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    n = q.shape[2]
    # sequences of one length, without dropout: neither offsets nor random state
    unused, state = q.new_empty(0, dtype=torch.int32), q.new_zeros(2, dtype=torch.uint64)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, unused, unused, n, n, 0.0, False, state, state[0]
    )


def _fa3(qkv: Tensor) -> Tensor:
    return _fa3_op(qkv)[0]


BACKENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "xformers": _xformers,
    "sdpa": _sdpa(ORDER),
    "flash": _sdpa([SDPBackend.FLASH_ATTENTION]),
    "efficient": _sdpa([SDPBackend.EFFICIENT_ATTENTION]),
    "cudnn": _sdpa([SDPBackend.CUDNN_ATTENTION]),
    "fa3": _fa3,
    "short": short_attention,
    "products": attention_products,
    "reference": short_attention_reference,
}


def rows_per_call(name: str, n: int, heads: int, d: int, train: bool) -> int:
    """Most sequences that one launch of a backend takes (ANY: no limit known)."""
    if name not in STOCK:
        return ANY
    if train and name in FLASH_BACKWARD:
        return max(1, min(MAX_SEQUENCES, MAX_PADDED // (heads * _up(n, 128) * _up(d, 32))))
    return MAX_SEQUENCES


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def run(name: str, function: Callable[[Tensor], Tensor], qkv: Tensor, train: bool) -> Tensor:
    """`function`, the backend `name`, on qkv [R, n, 3, H, d]; in equal parts where R is more than one launch takes."""
    rows, n, _, heads, d = qkv.shape
    most = rows_per_call(name, n, heads, d, train)
    if rows <= most:
        return function(qkv)
    parts = -(-rows // most)
    return torch.cat([function(part) for part in qkv.split(-(-rows // parts))])


# ---- sequences of different lengths, end to end ---------------------------------------------------


class Packing:
    """Where sequences laid end to end begin: what `ops.attention_packed` needs beside qkv [T, 3, H, d].

    lengths  tokens of each sequence, in order: `[39] * 1280 + [196] * 256`
    device   of the tokens
    raises   UsageError for no sequence, or one without tokens

    Build it once per set of lengths, outside compiled code: it holds offsets and mask on the device.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(int(n) for n in lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise UsageError(
                f"lengths: expected one or more sequences of at least one token, got {list(self.lengths)[:8]}"
            )
        self.device = torch.device(device)
        self.total, self.longest = sum(self.lengths), max(self.lengths)
        # [count, n] of neighbours of equal length
        self.runs: list[list[int]] = []
        for n in self.lengths:
            if self.runs and self.runs[-1][1] == n:
                self.runs[-1][0] += 1
            else:
                self.runs.append([1, n])
        self.offsets = torch.tensor([0, *self.lengths]).cumsum(0).int().to(self.device)
        self._mask: Any = None
        self._parts: dict[tuple[int, int], list[Packing]] = {}

    def __repr__(self) -> str:
        return f"Packing({len(self.lengths)} sequences, {self.total} tokens, {self.device})"

    @property
    def mask(self) -> Any:
        """xformers' BlockDiagonalMask, built at the first use."""
        if self._mask is None:
            from xformers.ops.fmha import BlockDiagonalMask

            self._mask = BlockDiagonalMask.from_seqlens(list(self.lengths), device=self.device)
        return self._mask

    def parts(self, most: int, most_padded: int) -> list[Packing]:
        """The same sequences in packings of at most `most` sequences and, if several, `most_padded` padded tokens.

        A sequence counts as its length plus 128, the largest tile.
        """
        key = most, most_padded
        if key not in self._parts:
            groups: list[list[int]] = [[]]
            padded = 0
            for n in self.lengths:
                if groups[-1] and (len(groups[-1]) == most or padded + n + 128 > most_padded):
                    groups.append([])
                    padded = 0
                groups[-1].append(n)
                padded += n + 128
            self._parts[key] = [self] if len(groups) == 1 else [Packing(g, self.device) for g in groups]
        return self._parts[key]


def _xformers_packed(qkv: Tensor, packing: Packing) -> Tensor:
    from xformers.ops import memory_efficient_attention

    # one batch of all tokens, views [1, T, H, d]
    return memory_efficient_attention(*qkv[None].unbind(2), attn_bias=packing.mask)[0]


def _varlen(qkv: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, most = packing.offsets, packing.longest
    return varlen_attn(*qkv.unbind(1), starts, starts, most, most)


# one launch for all lengths; the other backends take one per run of equal lengths
PACKED: dict[str, Callable[[Tensor, Packing], Tensor]] = {"xformers": _xformers_packed, "flash": _varlen}


def run_packed(name: str, qkv: Tensor, packing: Packing, train: bool) -> Tensor:
    """The packed backend `name` on qkv [T, 3, H, d] -> [T, H, d]; in parts beyond the launch limits."""
    _, _, heads, d = qkv.shape
    most_padded = MAX_PADDED // (heads * _up(d, 32)) if train else ANY
    parts = packing.parts(MAX_SEQUENCES, most_padded)
    if len(parts) == 1:
        return PACKED[name](qkv, packing)
    tokens = qkv.split([p.total for p in parts])
    return torch.cat([PACKED[name](x, p) for x, p in zip(tokens, parts, strict=True)])


# ---- what can run ---------------------------------------------------------------------------------


@functools.cache
def why_not(name: str, device: torch.device, dtype: torch.dtype, n: int, d: int, train: bool) -> str:
    """Why a backend cannot run sequences of `n` tokens at head_dim `d`; empty when it can.

    On a GPU a backend that nothing speaks against is tried on a few tokens, with the backward pass if `train`.
    """
    return missing(name, device, dtype, n, d, train) or _failure(name, device, dtype, n, d, train)


def longest(name: str, device: torch.device, dtype: torch.dtype, d: int) -> int:
    """Most tokens of a sequence that a backend takes (ANY: no limit)."""
    if name != "short":
        return ANY
    if device.type != "cuda":
        return MAX_TOKENS
    # beyond, the op would run plain torch
    return max((n for n in range(1, MAX_TOKENS + 1) if fits(dtype, n, d)), default=0)


def missing(name: str, device: torch.device, dtype: torch.dtype, n: int, d: int, train: bool) -> str:
    """The part of `why_not` that is known without running anything."""
    if name in ANYWHERE:
        return ""
    if name == "short":
        runs, why = kernels.can_run(device)
        if not runs:
            hint = " (TRITON_INTERPRET=1 runs kernels in Triton's interpreter: for tests, very slow)"
            return why + (hint if device.type == "cpu" and kernels._launch.HAS_TRITON else "")
        if d not in HEAD_DIMS:
            return f"it takes head_dim {', '.join(map(str, HEAD_DIMS))}, got {d}"
        most = longest(name, device, dtype, d)
        return (
            ""
            if n <= most
            else (
                f"it takes at most {most} tokens of {_name(dtype)}, got {n} (a teacher's backend is "
                "system.attention_teacher; `triton` takes it where it fits)"
            )
        )
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    if not torch.cuda.is_available():
        return "this PyTorch sees no CUDA device"
    if name == "xformers" and not _installed("xformers"):
        return "xformers is not installed (pip install 'extrema-fast[xformers]')"
    if name == "fa3":
        why = _fa3_missing(device)
        if why:
            return why
    if dtype not in DTYPES[name]:
        return f"it takes {', '.join(_name(t) for t in DTYPES[name])}, got {_name(dtype)}"
    return ""


def _fa3_missing(device: torch.device) -> str:
    from torch.nn import attention

    if "FA3" not in getattr(attention, "list_flash_attention_impls", list)():
        return f"torch {torch.__version__} cannot exchange its flash kernel (2.11 can)"
    if not _installed("flash_attn_interface"):
        return "no flash_attn_3 wheel is installed (module flash_attn_interface)"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) == (9, 0) else f"it needs a GPU of capability 9.0, got {major}.{minor}"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        # an import hook may refuse it; a module put into sys.modules by hand has no spec
        return module in sys.modules


def _failure(name: str, device: torch.device, dtype: torch.dtype, n: int, d: int, train: bool) -> str:
    if device.type != "cuda" or name in ANYWHERE:
        return ""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            qkv = torch.zeros(2, n, 3, 2, d, device=device, dtype=dtype, requires_grad=train)
            out = BACKENDS[name](qkv)
            if train:
                out.backward(torch.zeros_like(out))
            torch.cuda.synchronize(device)
    except Exception as error:
        # whatever a library raises for what it cannot do; its first line says it
        return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
    return ""


def available(device: torch.device, dtype: torch.dtype, n: int, d: int, train: bool) -> list[str]:
    """The backends that can run such sequences here."""
    return [name for name in BACKENDS if not why_not(name, device, dtype, n, d, train)]


def refusal(
    name: str, asker: str, device: torch.device, dtype: torch.dtype, n: int | None, d: int, train: bool
) -> UsageError:
    """The error for a backend asked for by name that cannot run: what is missing, and what there is.

    n  None: whatever the length
    """
    shortest = 16 if n is None else n
    can = ", ".join(available(device, dtype, shortest, d, train))
    where = describe(device, dtype, d, train) + ("" if n is None else f", {n} tokens")
    return UsageError(
        f"attention: {asker} asks for {name}, but {why_not(name, device, dtype, shortest, d, train)}; "
        f"available here ({where}): auto, {can}"
    )


def describe(device: torch.device, dtype: torch.dtype, d: int, train: bool) -> str:
    """`cpu, bfloat16, head_dim 64, training`."""
    return f"{device_name(device)}, {_name(dtype)}, head_dim {d}, {'training' if train else 'inference'}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def device_name(device: torch.device) -> str:
    """The table's name of a device: `cpu`, or the GPU's (`NVIDIA H200`)."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return device.type


# ---- the table ------------------------------------------------------------------------------------

# backends in plain torch: any device, dtype, length and head_dim
ANYWHERE = ("sdpa", "products", "reference")
TABLE = Path(__file__).with_name("attention_table.json")
HOW_TO_MEASURE = "`python -m benchmarks attention --write-table` measures them"
# a backend takes the place of the one without a table where it needs less than this share of its time
WIN = 0.97


def fallback(kind: str, dtype: torch.dtype) -> str:
    """What runs where nothing was measured; kind: the device's type."""
    # torch 2.13's CPU kernel takes 2 to 8 times as long in bf16 as two batched products (see the table)
    return "products" if kind == "cpu" and dtype == torch.bfloat16 else "sdpa"


@functools.cache
def table() -> list[dict[str, Any]]:
    """The rows of attention_table.json."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["rows"]


def ranking(shapes: Sequence[dict[str, Any]], default: str) -> list[str]:
    """Backends from fastest to slowest by their mean time relative to the shape's fastest.

    shapes   [{"rows": ..., "heads": ..., "ms": {backend: milliseconds}}]; a backend counts if it ran in all
    default  stays first unless another one is faster by more than noise (`WIN`)
    """
    names = [name for name in shapes[0]["ms"] if all(name in s["ms"] for s in shapes)]
    logs = {
        name: sum(math.log(s["ms"][name] / min(s["ms"].values())) for s in shapes) / len(shapes)
        for name in names
    }
    order = sorted(names, key=logs.__getitem__)
    if default in logs and logs[order[0]] - logs[default] > math.log(WIN):
        order.remove(default)
        order.insert(0, default)
    return order


def plan(device: torch.device, dtype: torch.dtype, d: int, train: bool) -> tuple[Plan, str]:
    """(what `auto` takes up to how many tokens, the reason in words)."""
    default, mode = fallback(device.type, dtype), "train" if train else "inference"
    key = (device_name(device), _name(dtype), d, mode)
    rows = [r for r in table() if (r["device"], r["dtype"], r["head_dim"], r["mode"]) == key]
    # what has not been measured beside the default has not been shown to be faster
    rows = sorted((r for r in rows if all(default in s["ms"] for s in r["shapes"])), key=lambda r: r["n"])
    if not rows:
        return ((ANY, default),), f"no timings of these beside it; {HOW_TO_MEASURE}"
    steps: list[tuple[int, str]] = []
    skipped: dict[str, str] = {}
    reached = 0
    for i, row in enumerate(rows):
        n, before, after = (
            row["n"],
            rows[i - 1]["n"] if i else 0,
            rows[i + 1]["n"] if i + 1 < len(rows) else ANY,
        )
        # halfway to its neighbours by ratio, and at most a factor of two
        low = max(-(-n // 2), math.isqrt(before * n) + 1)
        high = min(2 * n, math.isqrt(n * after))
        if low > reached + 1:
            steps.append((low - 1, default))
        reached = low - 1
        for name in [*ranking(row["shapes"], default), default]:
            end = min(high, longest(name, device, dtype, d))
            if end <= reached:
                continue
            why = why_not(name, device, dtype, min(n, end), d, train)
            if why:
                skipped[name] = why
                continue
            steps.append((end, name))
            reached = end
    steps.append((ANY, default))
    why = "the fastest measured: " + ", ".join(sorted({r["record"] for r in rows}))
    if skipped:
        why += "; left out: " + "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    return _merged(steps), why


def _merged(steps: list[tuple[int, str]]) -> Plan:
    # neighbours that agree are one step: fewer comparisons, and no guard on n where all agree
    out: list[tuple[int, str]] = []
    for end, name in steps:
        if out and out[-1][1] == name:
            out.pop()
        out.append((end, name))
    return tuple(out)


def in_words(steps: Plan) -> str:
    """`short to 64 tokens, then sdpa`."""
    told = [f"{name} to {end} tokens" if end < ANY else name for end, name in steps if name]
    return ", then ".join(told)
