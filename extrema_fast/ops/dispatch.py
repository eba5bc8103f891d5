"""The one place that decides which implementation of an op runs.

Order: the environment variable EXTREMA_FAST_BACKEND, else the configuration (`set_backend`), else `auto`.
A setting is one name for all ops (`reference`, `triton`) or a list (`attention=sdpa,attention_pool=triton`).
Each choice is logged once with its reason. An implementation asked for by name that cannot run is an
error, never a silent fallback. State-dict keys never depend on the choice.

`auto` takes a Triton kernel only where a committed record shows that it wins; there is none yet. For LAMB it
takes NVIDIA apex where that is found to work (`extrema_fast.ops.nvidia_apex`). Self-attention
has a plan instead of one implementation: `auto` follows a table of timings per device, dtype, head_dim and tokens
(`extrema_fast.ops.attention`). Its setting may also come from `Encoder.set_attention` (`system.attention`), which
EXTREMA_FAST_BACKEND overrides where it names attention, and which overrides `set_backend`.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..config import did_you_mean
from ..errors import UsageError
from ..kernels.adamw_ema import AdamWEma
from ..kernels.attention_pool import (
    PoolWeights,
    attention_pool_absorbed,
    attention_pool_reference,
)
from ..kernels.attention_pool import attention_pool as attention_pool_triton
from ..kernels.color_views import color_views as color_views_triton
from ..kernels.color_views import color_views_plain, color_views_reference
from ..kernels.patch_gather import patch_gather as patch_gather_triton
from ..kernels.patch_gather import patch_gather_reference
from ..kernels.sample_views import sample_views as sample_views_triton
from ..kernels.sample_views import sample_views_reference
from ..kernels.token_gather import token_gather as token_gather_triton
from ..kernels.token_gather import token_gather_reference
from . import attention as backends
from . import nvidia_apex
from .attention import Packing
from .lamb import ForeachAdamW, Lamb

log = logging.getLogger(__name__)


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
        "auto": lambda qkv: attention(qkv),
        **backends.BACKENDS,
        # `short` where it fits, the others by the table
        "triton": lambda qkv: attention(qkv, "triton"),
    },
    "attention_pool": {
        "absorbed": _without_stats(attention_pool_absorbed),
        "reference": _without_stats(attention_pool_reference),
        "triton": attention_pool_triton,
    },
    "patch_gather": {"reference": patch_gather_reference, "triton": patch_gather_triton},
    "token_gather": {"reference": token_gather_reference, "triton": token_gather_triton},
    "color_views": {
        "plain": color_views_plain,
        "reference": color_views_reference,
        "triton": color_views_triton,
    },
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
    "attention": "the fastest measured one per dtype, head_dim and tokens, else torch's fused attention",
    "attention_pool": "same result as the reference, fewer multiplications",
    "patch_gather": "plain torch",
    "token_gather": "plain torch",
    "color_views": "plain torch, image by image on a CPU",
    "sample_views": "plain torch",
    "adamw_ema": "torch's fused AdamW, then the teacher's move",
    "lamb": "torch's fused Adam update, then one scale per tensor",
}
_WHY_APEX = "apex's FusedLAMB was found to work here"

_setting = "auto"
_lenient = False
# (op, device type) -> (implementation, reason); ("attention", setting, ...) -> (plan, reason)
_chosen: dict[tuple, tuple] = {}


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
        return {op: name for op, impls in IMPLEMENTATIONS.items() if name in impls and name != "auto"}
    wanted = {}
    for part in parts:
        op, _, name = part.partition("=")
        if op not in IMPLEMENTATIONS:
            raise UsageError(f"backend: unknown op {op!r}{did_you_mean(op, list(IMPLEMENTATIONS))}")
        if name != "auto" and name not in IMPLEMENTATIONS[op]:
            raise UsageError(f"backend: {op} has no {name!r}{did_you_mean(name, list(IMPLEMENTATIONS[op]))}")
        wanted[op] = name
    return wanted


def choice(op: str, device: torch.device | str = "cpu", *, say: bool = True) -> tuple[str, str]:
    """(implementation, reason) for `op` on tensors of `device`, decided once and logged (unless not `say`).

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
            elif op != "attention" and kind == "cuda" and kernels.can_run(kind)[0]:
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
            if name == "triton":
                _require_triton(op, asker, kind)
            elif op == "attention" and backends.missing(
                name, torch.device(kind), torch.bfloat16, 1, 64, False
            ):
                raise backends.refusal(name, asker, torch.device(kind), torch.bfloat16, None, 64, False)
        _chosen[op, kind] = (name, why)
        # a logger call inside torch.compile would break the graph
        if say and not torch.compiler.is_compiling():
            log.info("op %s: %s (%s)", op, name, why)
    return _chosen[op, kind]


def _require_triton(op: str, asker: str, device: torch.device | str) -> None:
    runs, because = kernels.can_run(device)
    if not runs:
        raise UsageError(
            f"backend: {asker} asks for {op}=triton, but {because}; use `auto`, a CUDA device, or "
            "TRITON_INTERPRET=1 to run kernels in Triton's interpreter (for tests: very slow)"
        )


def choices(device: torch.device | str = "cpu") -> dict[str, dict[str, Any]]:
    """`{op: {"implementation": ..., "reason": ...}}` for every op; for attention also the plans `decided` so far."""
    # optimizers are logged where they are built, attention with its plans
    found: dict[str, dict[str, Any]] = {
        op: dict(
            zip(
                ("implementation", "reason"),
                choice(op, device, say=op not in ("adamw_ema", "lamb", "attention")),
                strict=True,
            )
        )
        for op in IMPLEMENTATIONS
    }
    found["attention"]["decided"] = [why for key, (_, why) in _chosen.items() if len(key) > 2]
    return found


def _chosen_for(op: str, x: Tensor) -> Callable:
    return IMPLEMENTATIONS[op][choice(op, x.device)[0]]


def check_attention_name(backend: str) -> None:
    """raises UsageError, with the nearest name, for one that is no attention backend."""
    known = list(IMPLEMENTATIONS["attention"])
    if backend not in known:
        raise UsageError(f"attention: unknown backend {backend!r}{did_you_mean(backend, known)}")


def _attention_asked(backend: str) -> tuple[str, str]:
    """(name, who asks for it)."""
    check_attention_name(backend)
    env = os.environ.get("EXTREMA_FAST_BACKEND")
    named = _parse(env).get("attention") if env else None
    if named is not None:
        return named, "EXTREMA_FAST_BACKEND"
    if backend == "auto" and not env:
        backend = _parse(_setting).get("attention", "auto")
    return backend, "the configuration"


def _attention_plan(
    backend: str, setting: str, lenient: bool, device: torch.device, dtype: torch.dtype, d: int, train: bool
) -> backends.Plan:
    """What runs up to how many tokens, decided once and logged; `setting` makes graphs notice a new one."""
    key = ("attention", backend, setting, lenient, device, dtype, d, train)
    if key not in _chosen:
        name, asker = _attention_asked(backend)
        steps, why = _plan_of(name, asker, lenient, device, dtype, d, train)
        why = f"{backends.in_words(steps)} ({backends.describe(device, dtype, d, train)}: {why})"
        _chosen[key] = steps, why
        log.info("op attention: %s", why)
    return _chosen[key][0]


# what torch.compiler.assume_constant_result sets, without its import of torch._dynamo: graphs hold the plan, and
# neither trace its making nor guard on the caches behind it
_attention_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _plan_of(
    name: str, asker: str, lenient: bool, device: torch.device, dtype: torch.dtype, d: int, train: bool
) -> tuple[backends.Plan, str]:
    if name == "auto":
        return backends.plan(device, dtype, d, train)
    if name == "triton":
        _require_triton("attention", asker, device)
    backend = "short" if name == "triton" else name
    most = backends.longest(backend, device, dtype, d)
    why = backends.why_not(backend, device, dtype, max(1, min(16, most)), d, train)
    if why and not lenient and name != "triton":
        raise backends.refusal(name, asker, device, dtype, None, d, train)
    steps: backends.Plan = ((most, backend), (backends.ANY, ""))[: 1 if most == backends.ANY else 2]
    reason = f"{asker} asks for {name}"
    if why or (most < backends.ANY and (lenient or name == "triton")):
        others, table = backends.plan(device, dtype, d, train)
        steps = others if why else (*steps[:1], *others)
        reason += f", but {why}; {table}" if why else f"; beyond: {table}"
    return steps, reason


def _at(steps: backends.Plan, n: int) -> str:
    for most, name in steps[:-1]:
        if n <= most:
            return name
    return steps[-1][1]


def _refuse_attention(
    backend: str, device: torch.device, dtype: torch.dtype, n: int, d: int, train: bool
) -> None:
    name, asker = _attention_asked(backend)
    raise backends.refusal(name, asker, device, dtype, n, d, train)


_refuse_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_attention(
    backend: str, device: torch.device, dtype: torch.dtype, n: int, d: int, train: bool
) -> str:
    """The backend that sequences of `n` tokens at head_dim `d` will run on; decided and logged now.

    train    with a backward pass
    raises   UsageError when one asked for by name cannot run: what it lacks, and what there is
    """
    name = _at(_attention_plan(backend, _setting, _lenient, device, dtype, d, train), n)
    if not name or backends.why_not(name, device, dtype, n, d, train):
        _refuse_attention(backend, device, dtype, n, d, train)
    return name


@contextlib.contextmanager
def lenient_attention() -> Iterator[None]:
    """Inside, an attention backend asked for by name that cannot run gives way to `auto`, and the log says so.

    For evaluations while training, whose whole images in fp32 are not what the setting is about.
    """
    global _lenient
    before, _lenient = _lenient, True
    try:
        yield
    finally:
        _lenient = before


def attention(qkv: Tensor, backend: str = "auto") -> Tensor:
    """Self-attention per row; qkv [R, n, 3, H, d] -> [R, n, H, d].

    backend  `auto` or a name of `extrema_fast.ops.attention`; EXTREMA_FAST_BACKEND wins
    raises   UsageError when one asked for by name cannot run: what it lacks, and what there is
    """
    # `index`: a constant of the graph where shapes are dynamic
    n, d = qkv.shape[1], operator.index(qkv.shape[-1])
    train = torch.is_grad_enabled() and qkv.requires_grad
    name = _at(_attention_plan(backend, _setting, _lenient, qkv.device, qkv.dtype, d, train), n)
    if not name:
        _refuse_attention(backend, qkv.device, qkv.dtype, n, d, train)
    return backends.run(name, IMPLEMENTATIONS["attention"][name], qkv, train)


# more launches than this, and `auto` prefers a packed form (not measured)
FEW_RUNS = 8


def attention_packed(qkv: Tensor, packing: Packing | Sequence[int], backend: str = "auto") -> Tensor:
    """Self-attention within sequences of different lengths laid end to end; qkv [T, 3, H, d] -> [T, H, d].

    packing  the sequences' lengths, sum T; a `Packing` made once, where the lengths repeat or code is compiled
    backend  `xformers`: one call with a BlockDiagonalMask; `flash`: one call of torch's varlen_attn; any other:
             one call of it per run of equal lengths. `auto`: the last with each run's own choice, or, where there
             are many runs, the first of these that can run
    raises   UsageError when T is not the sum, and as `attention`

        packing = Packing([39] * 5 * images + [196] * images, qkv.device)    # student views, then teacher rows
        out = ops.attention_packed(qkv, packing)
    """
    if not isinstance(packing, Packing):
        packing = Packing(packing, qkv.device)
    tokens, _, heads, d = qkv.shape
    if tokens != packing.total:
        raise UsageError(f"packing: the lengths sum to {packing.total}, qkv has {tokens} tokens")
    train = torch.is_grad_enabled() and qkv.requires_grad
    many = len(packing.runs) > FEW_RUNS
    name = _packed_backend(backend, _setting, _lenient, many, qkv.device, qkv.dtype, operator.index(d), train)
    if name in backends.PACKED:
        return backends.run_packed(name, qkv, packing, train)
    parts = qkv.split([count * n for count, n in packing.runs])
    outs = [
        attention(part.view(count, n, 3, heads, d), backend).reshape(count * n, heads, d)
        for part, (count, n) in zip(parts, packing.runs, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _packed_backend(
    backend: str, setting: str, lenient: bool, many: bool, device: torch.device, dtype: torch.dtype, d: int,
    train: bool,
) -> str:  # fmt: skip
    """A name of `attention.PACKED`, or `runs`."""
    name, _ = _attention_asked(backend)
    if name in backends.PACKED:
        steps = _attention_plan(backend, setting, lenient, device, dtype, d, train)
        return name if steps == ((backends.ANY, name),) else "runs"
    if name == "auto" and many:
        return next(
            (p for p in backends.PACKED if not backends.why_not(p, device, dtype, 16, d, train)), "runs"
        )
    return "runs"


_packed_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


def token_gather(tokens: Tensor, keep: Tensor, pos: Tensor | None = None) -> Tensor:
    """Kept rows of embedded tokens plus positions; tokens [B, N, D], keep [V, B, K], pos [N, D] -> [V*B, K, D].

    `triton`: an index that is twice within a view gets one of its gradients only
    """
    return _chosen_for("token_gather", tokens)(tokens, keep, pos)


def color_views(images: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Two colour versions of uint8 crops [B, H, W, 3]; arguments as `kernels.color_views`."""
    return _chosen_for("color_views", images)(images, *args, **options)


def sample_views(index: Tensor, *args: Any, **options: Any) -> Tensor:
    """Kept tokens of every view [V, B, K] int32; arguments as `kernels.sample_views`."""
    return _chosen_for("sample_views", index)(index, *args, **options)


def adamw(
    groups: list[dict],
    teacher: dict[Tensor, Tensor],
    copies: tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]] = ({}, {}),
    **options: Any,
) -> torch.optim.Optimizer:
    """AdamW over parameter groups.

    `triton` also moves `teacher` (student parameter -> teacher's) and renews the low-precision `copies` of both
    (student parameter -> copy of its own value, of its teacher's).
    """
    build = _chosen_for("adamw_ema", groups[0]["params"][0])
    if build is AdamWEma:
        options |= {"shadow": copies[0], "teacher_shadow": copies[1]}
    return build(groups, teacher=teacher, **options)


def lamb(groups: list[dict], **options: Any) -> torch.optim.Optimizer:
    """LAMB over parameter groups; options `lr`, `betas`, `eps`."""
    p = groups[0]["params"][0]
    if choice("lamb", p.device) == ("apex", _WHY_APEX) and isinstance(options["lr"], Tensor):
        # nobody asked for apex, which cannot read a rate from the device
        _chosen["lamb", p.device.type] = "foreach", _WHY["lamb"] + "; apex's takes no rate on the device"
        log.info("op lamb: %s (%s)", *_chosen["lamb", p.device.type])
    return _chosen_for("lamb", p)(groups, **options)
