"""The one place that decides which implementation of an op runs.

Order: the environment variable EXTREMA_FAST_BACKEND, else the configuration (`set_backend`), else `auto`.
A setting is one name for all ops (`reference`, `triton`) or a list (`attention=sdpa,attention_pool=triton`).
Each choice is logged once with its reason. An implementation asked for by name that cannot run is an
error, never a silent fallback. State-dict keys never depend on the choice.

`auto` takes a Triton kernel only where a committed record shows that it wins; there is none yet. For LAMB it
takes NVIDIA apex where that is found to work (`extrema_fast.nvidia_apex`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels, nvidia_apex
from .config import did_you_mean
from .errors import UsageError
from .kernels.adamw_ema import AdamWEma
from .kernels.attention_pool import (
    PoolWeights,
    attention_pool_absorbed,
    attention_pool_reference,
)
from .kernels.attention_pool import attention_pool as attention_pool_triton
from .kernels.color_views import color_views as color_views_triton
from .kernels.color_views import color_views_reference
from .kernels.patch_gather import patch_gather as patch_gather_triton
from .kernels.patch_gather import patch_gather_reference
from .kernels.sample_views import sample_views as sample_views_triton
from .kernels.sample_views import sample_views_reference
from .kernels.short_attention import short_attention, short_attention_reference
from .lamb import ForeachAdamW, Lamb

log = logging.getLogger(__name__)

SHORT_HEAD_DIMS = (32, 64, 80)
SHORT_TOKENS = 64


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


def attention_short(qkv: Tensor) -> Tensor:
    """The short-sequence kernel to 64 tokens at its head dims, `attention_by_dtype` for other shapes."""
    fits = qkv.shape[1] <= SHORT_TOKENS and qkv.shape[-1] in SHORT_HEAD_DIMS
    return short_attention(qkv) if fits else attention_by_dtype(qkv)


def _without_stats(pool: Callable) -> Callable:
    # the plain forms normalise the tokens themselves, so they neither take nor give statistics
    def run(tokens, cls, weights, heads, eps, *, stats=None, return_weights=False):
        out, p = pool(tokens, cls, weights, heads, eps)
        return out, p if return_weights else None, None

    return run


# apex's class for an op
APEX = {"adamw_ema": "FusedAdam", "lamb": "FusedLAMB"}


def _adamw_fused(groups: list[dict], teacher: dict[Tensor, Tensor], **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, fused=True, capturable=_on_device(options["lr"]), **options)


def _adamw_foreach(groups: list[dict], teacher: dict[Tensor, Tensor], **options: Any) -> ForeachAdamW:
    return ForeachAdamW(groups, **options)


def _adamw_plain(groups: list[dict], teacher: dict[Tensor, Tensor], **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, foreach=False, capturable=_on_device(options["lr"]), **options)


def _adamw_apex(groups: list[dict], teacher: dict[Tensor, Tensor], **options: Any) -> torch.optim.Optimizer:
    return nvidia_apex.build(APEX["adamw_ema"], groups, **options)


def _on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


# op -> implementation name -> function; the first entry is what `auto` takes, with its reason
IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    "attention": {
        "by-dtype": attention_by_dtype,
        "sdpa": attention_sdpa,
        "reference": short_attention_reference,
        "triton": attention_short,
    },
    "attention_pool": {
        "absorbed": _without_stats(attention_pool_absorbed),
        "reference": _without_stats(attention_pool_reference),
        "triton": attention_pool_triton,
    },
    "patch_gather": {"reference": patch_gather_reference, "triton": patch_gather_triton},
    "color_views": {"reference": color_views_reference, "triton": color_views_triton},
    "sample_views": {"reference": sample_views_reference, "triton": sample_views_triton},
    "adamw_ema": {
        "fused": _adamw_fused,
        "foreach": _adamw_foreach,
        "reference": _adamw_plain,
        "triton": AdamWEma,
        "apex": _adamw_apex,
    },
    "lamb": {
        "foreach": Lamb,
        "reference": partial(Lamb, foreach=False),
        "apex": partial(nvidia_apex.build, APEX["lamb"]),
    },
}
_WHY = {
    "attention": "torch's fused attention, the plain formula for bf16 on a CPU",
    "attention_pool": "same result as the reference, fewer multiplications",
    "patch_gather": "plain torch",
    "color_views": "plain torch",
    "sample_views": "plain torch",
    "adamw_ema": "torch's fused AdamW, then the teacher's move",
    "lamb": "torch's fused Adam update, then one scale per tensor",
}
_WHY_APEX = "apex's FusedLAMB was found to work here"

_setting = "auto"
_chosen: dict[tuple[str, str], tuple[str, str]] = {}


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


def choice(op: str, device: torch.device | str = "cpu") -> tuple[str, str]:
    """(implementation, reason) for `op` on tensors of `device`, decided once and logged.

    raises UsageError when Triton or apex is asked for by name and cannot run there
    """
    kind = torch.device(device).type
    if (op, kind) not in _chosen:
        env = os.environ.get("EXTREMA_FAST_BACKEND")
        name = _parse(env or _setting).get(op, "auto")
        if name == "auto":
            name, why = next(iter(IMPLEMENTATIONS[op])), _WHY[op]
            if op == "lamb":
                found, because = nvidia_apex.find(APEX[op], kind)
                if found is not None:
                    name, why = "apex", _WHY_APEX
                elif kind in nvidia_apex.DEVICES:
                    why += f"; {because}"
            elif kind == "cuda" and kernels.can_run(kind)[0]:
                why += "; no record shows that the Triton kernel is faster on this GPU"
        else:
            asker = "EXTREMA_FAST_BACKEND" if env else "the configuration"
            why = f"asked for by {asker}"
            if name == "apex":
                found, because = nvidia_apex.find(APEX[op], kind)
                if found is None:
                    raise UsageError(
                        f"backend: {asker} asks for {op}=apex, but {because}; use `auto`. {nvidia_apex.BUILD}"
                    )
            runs, because = kernels.can_run(kind)
            if name == "triton" and not runs:
                raise UsageError(
                    f"backend: {asker} asks for {op}=triton, but {because}; use `auto`, a CUDA device, or "
                    "TRITON_INTERPRET=1 to run kernels in Triton's interpreter (for tests: very slow)"
                )
        _chosen[op, kind] = (name, why)
        # a logger call inside torch.compile would break the graph
        if not torch.compiler.is_compiling():
            log.info("op %s: %s (%s)", op, name, why)
    return _chosen[op, kind]


def choices(device: torch.device | str = "cpu") -> dict[str, dict[str, str]]:
    """`{op: {"implementation": ..., "reason": ...}}` for every op."""
    return {
        op: dict(zip(("implementation", "reason"), choice(op, device), strict=True)) for op in IMPLEMENTATIONS
    }


def _chosen_for(op: str, x: Tensor) -> Callable:
    return IMPLEMENTATIONS[op][choice(op, x.device)[0]]


def attention(qkv: Tensor) -> Tensor:
    """Self-attention per row; qkv [R, n, 3, H, d] -> [R, n, H, d]."""
    return _chosen_for("attention", qkv)(qkv)


def attention_pool(
    tokens: Tensor,
    cls: Tensor,
    weights: PoolWeights,
    heads: int,
    eps: float,
    *,
    stats: tuple[Tensor, Tensor] | None = None,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Class attention; tokens [R, n, D], cls [R, D].

    stats    (mean, 1 / deviation) of the tokens [R, n] from an earlier call on the same tokens
    returns  ([R, D], probabilities [R, H, 1 + n] when `return_weights`, statistics or None)
    """
    return _chosen_for("attention_pool", tokens)(
        tokens, cls, weights, heads, eps, stats=stats, return_weights=return_weights
    )


def patch_gather(
    images: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor | None, pos: Tensor
) -> Tensor:
    """Embedded kept patches plus positions; images [B, C, H, W], keep [V, B, K] or None -> [V*B, K, D]."""
    return _chosen_for("patch_gather", images)(images, keep, weight, bias, pos)


def color_views(images: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Two colour versions of uint8 crops [B, H, W, 3]; arguments as `kernels.color_views`."""
    return _chosen_for("color_views", images)(images, *args, **options)


def sample_views(index: Tensor, *args: Any, **options: Any) -> Tensor:
    """Kept tokens of every view [V, B, K] int32; arguments as `kernels.sample_views`."""
    return _chosen_for("sample_views", index)(index, *args, **options)


def adamw(groups: list[dict], teacher: dict[Tensor, Tensor], **options: Any) -> torch.optim.Optimizer:
    """AdamW over parameter groups; `triton` also moves `teacher` (student parameter -> teacher's)."""
    return _chosen_for("adamw_ema", groups[0]["params"][0])(groups, teacher=teacher, **options)


def lamb(groups: list[dict], **options: Any) -> torch.optim.Optimizer:
    """LAMB over parameter groups; options `lr`, `betas`, `eps`."""
    p = groups[0]["params"][0]
    if choice("lamb", p.device) == ("apex", _WHY_APEX) and isinstance(options["lr"], Tensor):
        # nobody asked for apex, which cannot read a rate from the device
        _chosen["lamb", p.device.type] = "foreach", _WHY["lamb"] + "; apex's takes no rate on the device"
        log.info("op lamb: %s (%s)", *_chosen["lamb", p.device.type])
    return _chosen_for("lamb", p)(groups, **options)
