"""Self-attention backends: what each one is, what it requires, and the fixed rule behind `auto`.

Every backend takes packed projections qkv [R, n, 3, H, d] and returns [R, n, H, d]. `extrema_fast.ops.dispatch` decides
which one runs, based on this module.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import install
from ..kernels import can_run, tune
from ..kernels._autograd import first_order, transforming
from ..kernels._spec import Case
from ..kernels.short_attention import short_attention, short_attention_reference
from ..kernels.short_attention.op import HEAD_DIMS, MAX_TOKENS, fits

log = logging.getLogger(__name__)

# a fixed order, because torch's own default has changed between versions
SDPA_ORDER = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]
HALF = (torch.bfloat16, torch.float16)
# dtypes of the backends that need CUDA
DTYPES = {
    "flash": HALF,
    "efficient": (*HALF, torch.float32),
    "cudnn": HALF,
    "xformers": (*HALF, torch.float32),
}
# these run on any device, for any dtype, length and head_dim
ANYWHERE = ("sdpa", "math", "matmul", "reference")
ANY = sys.maxsize

# a plan: (most tokens, backend), ascending; sequences longer than the last are an error
Plan = tuple[tuple[int, str], ...]


# ---- backends -------------------------------------------------------------------------------------


def _sdpa(order: list[SDPBackend]) -> Callable[[Tensor], Tensor]:
    def run(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # a CPU has one fused kernel and no order; entering the context would cost more than a small matmul
        if order is SDPA_ORDER and qkv.device.type == "cpu":
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        # the backward pass needs no context: autograd and compiled graphs hold the chosen kernel's own node
        with sdpa_kernel(order, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


def _xformers(qkv: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    # views [R, n, H, d]: xformers reads any strides with a dense last axis
    return memory_efficient_attention(*qkv.unbind(2))


@functools.cache
def settle_sdpa_order(device: torch.device) -> None:
    """Has torch set its own order of SDPA kernels, which it does at its first choice.

    If that were inside `sdpa_kernel`, it would replace the order asked for there, and stay.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        x = torch.zeros(1, 1, 8, 64, device=device, dtype=torch.float16)
        torch._fused_sdp_choice(x, x, x)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor) -> Tensor:
        rows, n, _, heads, d = qkv.shape
        # [3, R * H, n, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().view(3, rows * heads, n, d).unbind(0)
        # scaled inside the matmul; the softmax is fp32 inside
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=d**-0.5)
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.shape = qkv.shape
        return torch.bmm(p, v).view(rows, heads, n, d).transpose(1, 2).contiguous()

    @staticmethod
    @first_order("attention=matmul", "EXTREMA_FAST_BACKEND=attention=math")
    def backward(ctx, dout: Tensor) -> Tensor:
        q, k, v, p = ctx.saved_tensors
        rows, n, _, heads, d = ctx.shape
        do = dout.transpose(1, 2).reshape(rows * heads, n, d)
        grads = q.new_empty(3, rows * heads, n, d)
        torch.bmm(p.mT, do, out=grads[2])
        dp = torch.bmm(do, v.mT)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        torch.baddbmm(grads[0], ds, k, beta=0, alpha=d**-0.5, out=grads[0])
        torch.baddbmm(grads[1], ds.mT, q, beta=0, alpha=d**-0.5, out=grads[1])
        return grads.view(3, rows, heads, n, d).permute(1, 3, 0, 2, 4).contiguous()


def matmul_attention(qkv: Tensor) -> Tensor:
    """Self-attention as batched matmuls with a written-out backward pass; contiguous.

    torch's fused CPU kernel is slower than this in bf16, and the plain formula under autograd copies q, k and v
    more often. Here they are made contiguous once, and so are their gradients.
    """
    return short_attention_reference(qkv) if transforming() else _Matmul.apply(qkv)


BACKENDS: dict[str, Callable[[Tensor], Tensor]] = {
    # torch's scaled_dot_product_attention: the first kernel of SDPA_ORDER that can run, or exactly one of them
    "sdpa": _sdpa(SDPA_ORDER),
    "flash": _sdpa([SDPBackend.FLASH_ATTENTION]),
    "efficient": _sdpa([SDPBackend.EFFICIENT_ATTENTION]),
    "cudnn": _sdpa([SDPBackend.CUDNN_ATTENTION]),
    "math": _sdpa([SDPBackend.MATH]),
    # memory_efficient_attention, which dispatches to its own or to FlashAttention-2 and -3 kernels
    "xformers": _xformers,
    # this project's kernel (kernels/short_attention)
    "short": short_attention,
    "matmul": matmul_attention,
    # the plain formula
    "reference": short_attention_reference,
}


# ---- launch limits --------------------------------------------------------------------------------

# the grid's second and third axis (pytorch#142228, xformers#845, flash-attention#1786)
MAX_SEQUENCES = 65_535
# FlashAttention-2's backward pass, in padded elements; equality passes (PriorLabs/TabPFN#1184)
MAX_PADDED = 2**31


def rows_per_call(name: str, n: int, heads: int, d: int, train: bool) -> int:
    """Most sequences that one launch of a backend takes (ANY: no limit known)."""
    if name not in ("sdpa", *DTYPES):
        return ANY
    if train and name in ("sdpa", "flash", "xformers"):
        padded = heads * -(-n // 128) * 128 * -(-d // 32) * 32
        return max(1, min(MAX_SEQUENCES, MAX_PADDED // padded))
    return MAX_SEQUENCES


def run(name: str, function: Callable[[Tensor], Tensor], qkv: Tensor, train: bool) -> Tensor:
    """Runs `function`, the backend `name`, in equal chunks of rows where one launch does not take them all."""
    rows, n, _, heads, d = qkv.shape
    most = rows_per_call(name, n, heads, d, train)
    if rows <= most:
        return function(qkv)
    chunks = -(-rows // most)
    return torch.cat([function(chunk) for chunk in qkv.split(-(-rows // chunks))])


def longest(name: str, device: torch.device, dtype: torch.dtype, d: int) -> int:
    """Most tokens of a sequence that a backend takes (ANY: no limit)."""
    if name != "short":
        return ANY
    if device.type != "cuda":
        return MAX_TOKENS
    # beyond these the op would run plain torch
    return max((n for n in range(1, MAX_TOKENS + 1) if fits(dtype, n, d)), default=0)


# ---- what can run ---------------------------------------------------------------------------------


# (name, dtype, head_dim, with a backward pass) -> what `measure` found; none of these is tried in this process
left_out: dict[tuple[str, torch.dtype, int, bool], str] = {}


@functools.cache
def unsupported(name: str, device: torch.device, dtype: torch.dtype, n: int, d: int, train: bool) -> str:
    """Why a backend cannot run sequences of `n` tokens at head_dim `d` here; empty when it can.

    On a GPU a backend without a known reason is tried on a few tokens, so this may take a moment.
    """
    if name in ANYWHERE:
        return ""
    if reason := left_out.get((name, dtype, d, train), "") or missing(name, device, dtype, n, d):
        return reason
    if device.type != "cuda":
        return ""
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(2, n, 3, 2, d, device=device, generator=generator).to(dtype)
    return trial(BACKENDS[name], qkv, train)


def trial(backend: Callable[[Tensor], Tensor], qkv: Tensor, train: bool) -> str:
    """Why a backend cannot be used, found on these values by the rule of `kernels.tune.fault`; empty when it can."""
    case = Case(
        "",
        lambda *_: (qkv.detach().clone().requires_grad_(train),),
        {"reference": short_attention_reference},
        bytes_fwd=0,
        backward=train,
        row_dims={0: 0},
    )
    try:
        # a clone is no inference tensor
        with torch.inference_mode(False), torch.autocast(qkv.device.type, enabled=False):
            return tune.fault(case, case.make, qkv.dtype, backend)
    except Exception as error:
        # whatever a library raises for what it cannot do
        return f"{type(error).__name__}: {_first_line(error)}"


def missing(name: str, device: torch.device, dtype: torch.dtype, n: int, d: int) -> str:
    """What `unsupported` knows without running anything."""
    if name in ANYWHERE:
        return ""
    if name == "short":
        runs, reason = can_run(device)
        most = longest("short", device, dtype, d)
        if not runs:
            hint = " (TRITON_INTERPRET=1 runs kernels in Triton's interpreter: for tests, very slow)"
            return reason + (hint if device.type == "cpu" else "")
        if d not in HEAD_DIMS:
            return f"it takes head_dim {', '.join(map(str, HEAD_DIMS))}, got {d}"
        if n > most:
            return (
                f"it takes at most {most} tokens of {_dtype_name(dtype)}, got {n} (a teacher's backend is "
                "system.attention_teacher; `triton` takes it where it fits)"
            )
        return ""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    if not torch.cuda.is_available():
        return "this PyTorch sees no CUDA device"
    if name == "xformers" and (reason := _xformers_missing()):
        return reason
    if dtype not in DTYPES[name]:
        return f"it takes {', '.join(map(_dtype_name, DTYPES[name]))}, got {_dtype_name(dtype)}"
    return ""


@functools.cache
def _xformers_missing() -> str:
    """Imports xformers; why its attention cannot be used, empty when trying it decides."""
    if importlib.util.find_spec("xformers") is None:
        return f"xformers is not installed ({install('xformers')})"
    # its words about a library that does not load take five lines; ours below take one
    words = logging.getLogger("xformers")
    level = words.level
    words.setLevel(logging.ERROR)
    try:
        lib = importlib.import_module("xformers._cpp_lib")
    except Exception:
        # another version's layout
        lib = None
    finally:
        words.setLevel(level)
    error = getattr(lib, "_cpp_library_load_exception", None)
    cause = f"its C++ library does not load with this PyTorch ({_first_line(error)})"
    if error is not None and hasattr(lib, "_built_with_cuda"):
        # then every operator is refused, although those that run here are torch's own; the flag is copied at the
        # import of xformers.ops, which somebody may have done
        for module in (lib, sys.modules.get("xformers.ops.fmha.common")):
            if module is not None:
                module._built_with_cuda = True  # type: ignore[attr-defined]
        log.info("xformers: %s; torch's kernels run in its place", cause)
        error = None
    try:
        importlib.import_module("xformers.ops")
    except Exception as problem:
        return f"xformers.ops cannot be imported ({_first_line(problem)})"
    return f"xformers refuses every operator: {cause}" if error else ""


def _first_line(error: object) -> str:
    return (str(error).strip() or "?").splitlines()[0]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(device: torch.device, dtype: torch.dtype, d: int, train: bool) -> str:
    """`cpu, bfloat16, head_dim 64, training`; a GPU is named."""
    where = device.type
    if where == "cuda" and torch.cuda.is_available():
        where = torch.cuda.get_device_name(device)
    return f"{where}, {_dtype_name(dtype)}, head_dim {d}, {'training' if train else 'inference'}"


# ---- what `auto` takes ----------------------------------------------------------------------------

# the fastest of two CPUs' timings (benchmarks/records/2026-11-24_cpu2_attention) at head_dim 64, by
# (dtype, with a backward pass); a change here changes the rounding of training on a CPU
CPU_RULE: dict[tuple[torch.dtype, bool], Plan] = {
    (torch.float32, True): (
        (5, "sdpa"), (15, "reference"), (112, "sdpa"), (392, "matmul"), (ANY, "sdpa")
    ),
    (torch.float32, False): (
        (27, "sdpa"), (43, "reference"), (56, "sdpa"), (112, "reference"), (ANY, "sdpa")
    ),
    (torch.bfloat16, True): (
        (9, "matmul"), (27, "reference"), (56, "matmul"), (112, "reference"), (ANY, "matmul")
    ),
    (torch.bfloat16, False): ((9, "matmul"), (112, "reference"), (ANY, "matmul")),
}  # fmt: skip
# in order of preference, each up to so many tokens: flash pads short sequences to 128-wide tiles
CUDA_RULE: Plan = ((MAX_TOKENS, "short"), (MAX_TOKENS, "efficient"), (ANY, "xformers"), (ANY, "sdpa"))


def auto_plan(device: torch.device, dtype: torch.dtype, d: int, train: bool) -> tuple[Plan, str]:
    """What `auto` takes where nothing was measured: (plan, reason in words)."""
    if device.type == "cpu" and d == 64 and (dtype, train) in CPU_RULE:
        return CPU_RULE[dtype, train], "the fastest measured on a CPU"
    if device.type != "cuda":
        name = "matmul" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"
        return ((ANY, name),), f"the default for {_dtype_name(dtype)} on {device.type}"
    steps: list[tuple[int, str]] = []
    skipped = []
    reached = 0
    for most, name in CUDA_RULE:
        most = min(most, longest(name, device, dtype, d))
        if most <= reached:
            continue
        if reason := unsupported(name, device, dtype, _tried(most), d, train):
            skipped.append(f"{name}: {reason}")
            continue
        steps.append((most, name))
        reached = most
    return tuple(steps), "the fixed rule for a GPU" + (f"; left out: {'; '.join(skipped)}" if skipped else "")


def _tried(most: int) -> int:
    """Tokens with which a backend for up to `most` is tried: as many as its kernel's tile holds, if it has one."""
    return max(1, most) if most < ANY else 16


def candidates(device: torch.device, dtype: torch.dtype, n: int, d: int) -> tuple[str, ...]:
    """Backends that may run `n` tokens on a GPU, as far as can be said without trying; what the rule takes first."""
    rule = [name for most, name in CUDA_RULE if n <= most]
    others = [name for name in BACKENDS if name not in ("math", "reference")]
    return tuple(x for x in dict.fromkeys(rule + others) if not missing(x, device, dtype, n, d))


def with_choice(plan: Plan, n: int, name: str) -> Plan:
    """The plan with another backend at exactly `n` tokens."""
    if at(plan, n) == name:
        return plan
    below = tuple(step for step in plan if step[0] < n - 1) + (((n - 1, at(plan, n - 1)),) if n > 1 else ())
    return (*below, (n, name), *(step for step in plan if step[0] > n))


def named_plan(
    name: str, device: torch.device, dtype: torch.dtype, d: int, train: bool, allow_fallback: bool
) -> tuple[Plan, str]:
    """The plan for a backend asked for by name, and what is to be said of it.

    `triton` is `short` where it fits and `auto` elsewhere, and so is any name under `allow_fallback`. Otherwise the
    plan ends with the longest sequence that the backend takes.
    """
    backend = "short" if name == "triton" else name
    most = longest(backend, device, dtype, d)
    reason = unsupported(backend, device, dtype, _tried(most), d, train)
    plan: Plan = () if reason else ((most, backend),)
    if not allow_fallback and name != "triton":
        return plan, ""
    others, rule = auto_plan(device, dtype, d, train)
    why = f", but {reason}; {rule}" if reason else f"; beyond: {rule}" if most < ANY else ""
    return plan + tuple(step for step in others if reason or step[0] > most), why


def at(plan: Plan, n: int) -> str:
    """The backend of a plan for sequences of `n` tokens; empty beyond its end."""
    for most, name in plan:
        if n <= most:
            return name
    return ""


def in_words(plan: Plan) -> str:
    """`short to 64 tokens, then sdpa`."""
    return ", then ".join(f"{name} to {most} tokens" if most < ANY else name for most, name in plan)
