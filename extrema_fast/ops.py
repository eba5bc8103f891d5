"""The one place that decides which implementation of an op runs.

Order: the environment variable EXTREMA_FAST_BACKEND, else the configuration (`set_backend`), else `auto`.
A setting is one name for all ops (`reference`) or a list (`attention=sdpa,attention_pool=reference`).
Each choice is logged once with its reason. An implementation asked for by name that cannot run is an
error, never a silent fallback. State-dict keys never depend on the choice.
"""

from __future__ import annotations

import logging
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import did_you_mean
from .errors import UsageError
from .kernels.attention_pool import PoolWeights, attention_pool_absorbed, attention_pool_reference
from .kernels.patch_gather import patch_gather_reference
from .kernels.short_attention import short_attention_reference

log = logging.getLogger(__name__)


def attention_sdpa(qkv: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention; qkv [R, n, 3, H, d] -> [R, n, H, d]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_by_dtype(qkv: Tensor) -> Tensor:
    """The plain formula for bf16 on a CPU, torch's fused attention elsewhere; as `attention_sdpa`."""
    # torch 2.13's CPU kernel is 2 to 8 times slower than two batched products in bf16 (forward and
    # backward, 12 to 196 tokens) and faster than them in fp32: `python -m benchmarks attention`
    slow = qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16
    return short_attention_reference(qkv) if slow else attention_sdpa(qkv)


# op -> implementation name -> function; the first entry is what `auto` takes, with its reason
IMPLEMENTATIONS = {
    "attention": {
        "by-dtype": attention_by_dtype,
        "sdpa": attention_sdpa,
        "reference": short_attention_reference,
    },
    "attention_pool": {"absorbed": attention_pool_absorbed, "reference": attention_pool_reference},
    "patch_gather": {"reference": patch_gather_reference},
}
_WHY = {
    "attention": "torch's fused attention, the plain formula for bf16 on a CPU",
    "attention_pool": "same result as the reference, fewer multiplications",
    "patch_gather": "the only implementation",
}

_setting = "auto"
_chosen: dict[str, tuple[str, str]] = {}


def set_backend(setting: str) -> None:
    """Sets the configuration's choice (`auto`, a name for all ops, or `op=name,...`); checked at once.

    raises UsageError for an unknown op or implementation
    """
    global _setting
    _parse(setting)
    _setting = setting
    _chosen.clear()


def _parse(setting: str) -> dict[str, str]:
    parts = [p.strip() for p in setting.split(",") if p.strip()] or ["auto"]
    if len(parts) == 1 and "=" not in parts[0]:
        name = parts[0]
        known = {"auto"} | {n for impls in IMPLEMENTATIONS.values() for n in impls}
        if name not in known:
            raise UsageError(f"backend: unknown implementation {name!r}{did_you_mean(name, list(known))}")
        # one name for all: ops that lack it keep their own default
        return {op: name if name in impls else "auto" for op, impls in IMPLEMENTATIONS.items()}
    wanted = {}
    for part in parts:
        op, _, name = part.partition("=")
        if op not in IMPLEMENTATIONS:
            raise UsageError(f"backend: unknown op {op!r}{did_you_mean(op, list(IMPLEMENTATIONS))}")
        if name != "auto" and name not in IMPLEMENTATIONS[op]:
            raise UsageError(f"backend: {op} has no {name!r}{did_you_mean(name, list(IMPLEMENTATIONS[op]))}")
        wanted[op] = name
    return wanted


def choice(op: str) -> tuple[str, str]:
    """(implementation, reason) for `op`, decided once and logged."""
    if op not in _chosen:
        env = os.environ.get("EXTREMA_FAST_BACKEND")
        name = _parse(env or _setting).get(op, "auto")
        if name == "auto":
            name, why = next(iter(IMPLEMENTATIONS[op])), _WHY[op]
        else:
            why = "asked for by EXTREMA_FAST_BACKEND" if env else "asked for by the configuration"
        _chosen[op] = (name, why)
        # a logger call inside torch.compile would break the graph
        if not torch.compiler.is_compiling():
            log.info("op %s: %s (%s)", op, name, why)
    return _chosen[op]


def choices() -> dict[str, dict[str, str]]:
    """`{op: {"implementation": ..., "reason": ...}}` for every op."""
    return {op: dict(zip(("implementation", "reason"), choice(op), strict=True)) for op in IMPLEMENTATIONS}


def attention(qkv: Tensor) -> Tensor:
    """Self-attention per row; qkv [R, n, 3, H, d] -> [R, n, H, d]."""
    return IMPLEMENTATIONS["attention"][choice("attention")[0]](qkv)


def attention_pool(
    tokens: Tensor, cls: Tensor, weights: PoolWeights, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Class attention; tokens [R, n, D], cls [R, D] -> ([R, D], probabilities [R, H, 1 + n])."""
    impl = IMPLEMENTATIONS["attention_pool"][choice("attention_pool")[0]]
    return impl(tokens, cls, weights, heads, eps)


def patch_gather(
    images: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor | None, pos: Tensor
) -> Tensor:
    """Embedded kept patches plus positions; images [B, C, H, W], keep [V, B, K] or None -> [V*B, K, D]."""
    return IMPLEMENTATIONS["patch_gather"][choice("patch_gather")[0]](images, keep, weight, bias, pos)
