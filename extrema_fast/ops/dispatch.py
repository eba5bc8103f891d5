"""The only place that decides which implementation of an op runs.

Order of precedence: the environment variable EXTREMA_FAST_BACKEND, the configuration (`set_backend`), `auto`. A setting
is one name for all ops that have it (`reference`, `triton`) or a list (`attention=sdpa,attention_pool=triton`). Each
choice is made once, and logged once with its reason. An implementation requested by name that cannot run is an error,
never a silent fallback. State-dict keys never depend on the choice.

On a CPU `auto` follows a fixed rule. On a GPU it uses measurements: those made before the run (`use`), else those in
the cache (`extrema_fast.ops.measure`), else the fixed rule for GPUs. `fixed` is that rule without measurements; `auto`
is the same if torch's deterministic algorithms are requested.

The choice of self-attention depends on dtype, head_dim and sequence length, so it is a plan
(`extrema_fast.ops.attention`). It can also be set by `Encoder.set_attention` (`system.attention`), which overrides
`set_backend` and is overridden by EXTREMA_FAST_BACKEND if that names attention.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import did_you_mean
from ..distributed import is_sharded
from ..errors import UsageError, is_out_of_memory, one_line
from ..kernels import can_run
from ..kernels._autograd import transforming as transforming
from ..kernels._launch import KernelError, compiler_missing
from ..kernels._spec import Sizes, spec
from ..kernels.adamw_ema import AdamWEma
from ..kernels.attention_pool import PoolWeights, attention_pool_absorbed, attention_pool_reference
from ..kernels.attention_pool import attention_pool as attention_pool_triton
from ..kernels.color_views import color_params as color_params_triton
from ..kernels.color_views import color_params_reference, color_views_plain, color_views_reference
from ..kernels.color_views import color_views as color_views_triton
from ..kernels.crop_resize import crop_resize as crop_resize_triton
from ..kernels.crop_resize import crop_resize_reference
from ..kernels.mlp import mlp, mlp_reference, quack
from ..kernels.patch_gather import patch_gather as patch_gather_triton
from ..kernels.patch_gather import patch_gather_reference
from ..kernels.patch_gather.reference import gather_patches as gather_patches
from ..kernels.residual_norm import residual_norm_reference
from ..kernels.residual_norm.op import residual_norm_stats
from ..kernels.sample_views import drop_path_factors as drop_path_triton
from ..kernels.sample_views import drop_path_from_uniform as drop_path_from_uniform
from ..kernels.sample_views import drop_path_reference, sample_views_reference
from ..kernels.sample_views import sample_views as sample_views_triton
from ..kernels.short_attention.op import contains_bias, short_attention
from ..kernels.token_gather import token_gather as token_gather_triton
from ..kernels.token_gather import token_gather_reference
from ..kernels.tune import DTYPES
from . import attention as backends
from . import measure, optimizers

log = logging.getLogger(__name__)


def _without_stats(pool: Callable) -> Callable:
    # the plain forms normalize the tokens themselves, so they neither take nor give statistics
    def run(tokens, cls, weights, heads, eps, *, stats=None, return_weights=False):
        out, p = pool(tokens, cls, weights, heads, eps)
        return out, p if return_weights else None, None

    return run


def _compiled(function: Callable, plain: Callable) -> Callable:
    """A function under torch.compile, or what runs in its place where that fails, which is said once."""
    # made at the first call: torch.compile imports the compiler
    made: list[Callable] = []

    def run(*args, **options):
        if torch.compiler.is_compiling():
            return function(*args, **options)
        if not made:
            made.append(torch.compile(function, dynamic=False))
        try:
            return made[0](*args, **options)
        except Exception as error:
            if is_out_of_memory(error) or made[0] is plain:
                raise
            log.warning(
                "op %s: cannot be compiled here (%s), so it is slow", function.__name__, one_line(error)
            )
            made[0] = plain
        return plain(*args, **options)

    return run


def _residual_norm_plain(*args, **options):
    return *residual_norm_reference(*args, **options), None, None


# op -> implementation name -> function; the first entry is the fixed rule for a CPU
IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    "attention": {
        "auto": lambda qkv: attention(qkv),
        **backends.BACKENDS,
        # `short` where it fits, elsewhere as `auto`
        "triton": lambda qkv: attention(qkv, "triton"),
    },
    "attention_pool": {
        "absorbed": _without_stats(attention_pool_absorbed),
        "reference": _without_stats(attention_pool_reference),
        "triton": attention_pool_triton,
    },
    "residual_norm": {"reference": _residual_norm_plain, "triton": residual_norm_stats},
    # `split`: the library's matmuls, GELU in passes of its own
    "mlp": {
        "reference": mlp_reference,
        "split": partial(mlp, by="split"),
        "triton": mlp,
        "quack": partial(mlp, by="quack"),
    },
    "patch_gather": {"reference": patch_gather_reference, "triton": patch_gather_triton},
    "token_gather": {"reference": token_gather_reference, "triton": token_gather_triton},
    "color_views": {
        "plain": color_views_plain,
        "compiled": _compiled(color_views_reference, color_views_plain),
        "reference": color_views_reference,
        "triton": color_views_triton,
    },
    "color_params": {"reference": color_params_reference, "triton": color_params_triton},
    "sample_views": {"reference": sample_views_reference, "triton": sample_views_triton},
    "drop_path": {"reference": drop_path_reference, "triton": drop_path_triton},
    "crop_resize": {"reference": crop_resize_reference, "triton": crop_resize_triton},
    "adamw_ema": optimizers.ADAMW,
    "lamb": optimizers.LAMB,
}
# the fixed rule for a GPU: the first of these that can run; those whose folder of kernels has `step_cases` are measured
# there. An op that is not here takes the first of its implementations, attention its own rule
GPU_RULE: dict[str, tuple[str, ...]] = {
    "attention_pool": ("triton", "absorbed"),
    "patch_gather": ("triton", "reference"),
    "color_views": ("triton", "compiled", "plain"),
    "residual_norm": ("triton", "reference"),
    "mlp": ("triton", "split", "reference"),
    "sample_views": ("triton", "reference"),
    "crop_resize": ("triton", "reference"),
    "color_params": ("triton", "reference"),
    "drop_path": ("triton", "reference"),
    "adamw_ema": ("triton", "fused"),
}
# measured there as well, never taken by the rule: optional packages
ALSO_MEASURED: dict[str, tuple[str, ...]] = {"mlp": ("quack",)}
# types of devices whose cache and rule these are
MEASURED_ON = ("cuda",)
# apex's class for an op
APEX = {"adamw_ema": "FusedAdam", "lamb": "FusedLAMB"}

T = TypeVar("T")

_setting = "auto"
_fallback_allowed = False
# (op, device type) -> (implementation, reason); ("attention", setting, ...) -> (plan, reason)
_chosen: dict[tuple, tuple] = {}
# what has been logged of these
_logged: dict[tuple, tuple] = {}
# (op, implementation, device type) -> why its kernels cannot run there, found by running them
_broken: dict[tuple[str, str, str], str] = {}
# what was measured for this run: op -> choice; (dtype, head_dim, with a backward pass, tokens) -> attention's
_measured: dict[Any, measure.Choice] = {}


# ---- the setting ----------------------------------------------------------------------------------


def set_backend(setting: str) -> None:
    """Sets the configuration's choice and forgets earlier ones; raises UsageError for an unknown op or name."""
    global _setting
    _parse(setting)
    _setting = setting
    _chosen.clear()
    _measured.clear()


def _parse(setting: str) -> dict[str, str]:
    """Op -> implementation asked for."""
    words = [p.strip() for p in setting.split(",") if p.strip()] or ["auto"]
    if len(words) == 1 and "=" not in words[0]:
        name = words[0]
        known = {"auto", "fixed"} | {n for names in IMPLEMENTATIONS.values() for n in names}
        if name not in known:
            raise UsageError(f"backend: unknown implementation {name!r}{did_you_mean(name, list(known))}")
        # ops that lack it keep their default
        ops = IMPLEMENTATIONS.items() if name != "auto" else ()
        return {op: name for op, names in ops if name in names or name == "fixed"}
    wanted = {}
    for word in words:
        op, _, name = word.partition("=")
        if op not in IMPLEMENTATIONS:
            raise UsageError(f"backend: unknown op {op!r}{did_you_mean(op, list(IMPLEMENTATIONS))}")
        if name not in ("auto", "fixed", *IMPLEMENTATIONS[op]):
            raise UsageError(f"backend: {op} has no {name!r}{did_you_mean(name, list(IMPLEMENTATIONS[op]))}")
        wanted[op] = name
    return wanted


def _requested(op: str, own: str = "auto") -> tuple[str, str]:
    """(implementation asked for, who asks for it); `own` is an encoder's setting of its attention."""
    env = os.environ.get("EXTREMA_FAST_BACKEND")
    named = _parse(env) if env else {}
    if op in named:
        return named[op], "EXTREMA_FAST_BACKEND"
    return own if own != "auto" or env else _parse(_setting).get(op, "auto"), "the configuration"


@contextlib.contextmanager
def allow_fallback() -> Iterator[None]:
    """Inside, an attention backend asked for by name that cannot run falls back to `auto`, and the log says so.

    For evaluations while training, whose whole images in fp32 are not what the setting is about.
    """
    global _fallback_allowed
    before, _fallback_allowed = _fallback_allowed, True
    try:
        yield
    finally:
        _fallback_allowed = before


# ---- choices --------------------------------------------------------------------------------------


def unsupported(op: str, name: str, device: torch.device | str) -> str:
    """Why an implementation of an op cannot run on a device; empty when it can."""
    device = torch.device(device)
    if (op, name, device.type) in _broken:
        return _broken[op, name, device.type]
    # `split` is of kernels too
    if name in ("triton", "split"):
        runs, reason = can_run(device)
        return "" if runs else reason
    if name == "compiled" and device.type == "cuda":
        return (compiler_missing(device) or _cache_unwritable()) if torch.cuda.is_available() else ""
    if name == "apex":
        return optimizers.find_apex(APEX[op], device.type)[1]
    if name == "quack":
        return quack.missing(device)
    if op == "attention" and name not in ("auto", "fixed"):
        # whatever dtype and length will be
        return backends.missing(name, device, torch.bfloat16, 1, 64)
    return ""


def _cache_unwritable() -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        with tempfile.TemporaryFile(dir=cache_dir()):
            return ""
    except OSError as error:
        return f"torch.compile cannot write its cache ({error}); set TORCHINDUCTOR_CACHE_DIR to a folder of yours"


def choice(op: str, device: torch.device | str = "cpu", *, say: bool = True) -> tuple[str, str]:
    """(implementation of an op on tensors of `device`, reason), decided once and logged if `say`.

    Raises:
        UsageError: when one asked for by name cannot run there.
    """
    kind = torch.device(device).type
    if (op, kind) not in _chosen:
        name, requested_by = _requested(op)
        if name in ("auto", "fixed"):
            name, why = _auto(op, kind, name == "fixed")
        elif reason := unsupported(op, name, kind):
            raise _error(op, name, requested_by, kind, reason)
        else:
            why = f"asked for by {requested_by}"
        _chosen[op, kind] = (name, why)
    # a logger call inside torch.compile would break the graph
    if say and not torch.compiler.is_compiling() and _logged.get((op, kind)) != _chosen[op, kind]:
        _logged[op, kind] = _chosen[op, kind]
        log.debug("op %s: %s (%s)", op, *_chosen[op, kind])
    return _chosen[op, kind]


def _auto(op: str, kind: str, fixed: bool) -> tuple[str, str]:
    measured = None if fixed else _measured.get(op) or _known(op, kind)
    if measured and measured.implementation and not unsupported(op, measured.implementation, kind):
        return measured.implementation, measured.reason
    if op == "lamb" and kind in optimizers.APEX_DEVICES:
        reason = unsupported(op, "apex", kind)
        return ("foreach", reason) if reason else ("apex", "apex's FusedLAMB was found to work here")
    skipped: list[str] = []
    for name in GPU_RULE.get(op, ()) if kind in MEASURED_ON else ():
        reason = (measured.out.get(name, "") if measured else "") or unsupported(op, name, kind)
        if not reason:
            return name, "; ".join(["the fixed rule for a GPU", *skipped])
        skipped.append(f"not {name}: {reason}")
    # it is not known whether torch's fused AdamW leaves a skipped step out there
    first = "reference" if (op, kind) == ("adamw_ema", "mps") else next(iter(IMPLEMENTATIONS[op]))
    return first, "; ".join([f"the fixed rule for {kind}", *skipped])


def _measures(kind: str) -> bool:
    """Whether measurements count on this type of device."""
    there = kind in MEASURED_ON and (kind != "cuda" or torch.cuda.is_available())
    return there and not torch.are_deterministic_algorithms_enabled()


def _current(kind: str) -> str:
    return f"{kind}:{torch.cuda.current_device() if kind == 'cuda' else 0}"


def _known(op: str, kind: str) -> measure.Choice | None:
    """What the cache holds of an op, if all measurements agree."""
    there = _measures(kind) and op in GPU_RULE and measure.has_cases(op)
    found = [c for _, c in measure.known(op, _current(kind)) if c.implementation] if there else []
    names = {c.implementation for c in found}
    return measure.Choice(names.pop(), "measured here before") if len(names) == 1 else None


# traced like the plans of attention below
_auto._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ---- measuring ------------------------------------------------------------------------------------


def problems(
    device: torch.device,
    sizes: Sizes,
    dtype: str,
    *,
    compiled: bool,
    attention: tuple[str, str] = ("auto", "auto"),
    unused: Collection[str] = (),
) -> list[measure.Problem]:
    """What `auto` has to choose for a training step on a GPU.

    Args:
        sizes: of the step.
        dtype: `bf16` or `fp32`, of the matmuls.
        compiled: blocks or the step are compiled.
        attention: settings of the student's and the teacher's encoder.
        unused: ops that the step does not have.
    """
    if not _measures(device.type):
        return []
    found = []
    for label, setting in zip(("student", "teacher"), attention, strict=True):
        if _requested("attention", setting)[0] == "auto":
            p = measure.Problem("attention", label, "", (), sizes, dtype)
            able = backends.candidates(device, DTYPES[dtype], *p.shape)
            found.append(replace(p, default=able[0], candidates=able))
    for op, names in GPU_RULE.items():
        able = tuple(n for n in (*names, *ALSO_MEASURED.get(op, ())) if not unsupported(op, n, device))
        if able and op not in unused and _requested(op)[0] == "auto" and measure.has_cases(op):
            in_block = compiled and spec(op).in_block
            found.append(measure.Problem(op, "", able[0], able, sizes, dtype, in_block))
    # what takes long to compile comes last: time may run out
    return sorted(found, key=lambda p: p.compiled)


def use(problems: list[measure.Problem], choices: measure.Choices) -> None:
    """Makes `auto` take these choices (by the problems' names) in this process until `set_backend`."""
    _chosen.clear()
    backends.unsupported.cache_clear()
    for p in problems:
        if not (choice := choices.get(p.name)):
            continue
        if p.op != "attention":
            _measured[p.op] = choice
            continue
        n, d = p.shape
        _measured[DTYPES[p.dtype], d, p.train, n] = choice
        backends.left_out.update(
            {(name, DTYPES[p.dtype], d, p.train): why for name, why in choice.out.items()}
        )


def _attention_choices(kind: str, dtype: torch.dtype, d: int, train: bool) -> dict[int, measure.Choice]:
    """Tokens -> what was measured, for this run or before."""
    found: dict[int, measure.Choice] = {}
    unsure: set[int] = set()
    for p, choice in measure.known("attention", _current(kind)) if _measures(kind) else ():
        n, width = p.shape
        if choice.implementation and (DTYPES[p.dtype], width, p.train) == (dtype, d, train):
            unsure.update({n} if found.setdefault(n, choice).implementation != choice.implementation else ())
    found = {n: choice for n, choice in found.items() if n not in unsure}
    run = {
        key[3]: c for key, c in _measured.items() if isinstance(key, tuple) and key[:3] == (dtype, d, train)
    }
    return found | run


def _error(op: str, name: str, requested_by: str, kind: str, reason: str) -> UsageError:
    if name == "triton":
        remedy = (
            "use `auto`, a CUDA device, or TRITON_INTERPRET=1 (Triton's interpreter, for tests: very slow)"
        )
    elif name == "apex":
        remedy = f"use `auto`. {optimizers.BUILD_APEX}"
    elif op != "attention":
        remedy = "use `auto`"
    else:
        can = [n for n in backends.BACKENDS if not unsupported(op, n, kind)]
        remedy = f"available on {kind}: auto, {', '.join(can)}"
    return UsageError(f"backend: {requested_by} asks for {op}={name}, but {reason}; {remedy}")


def give_up(op: str, name: str, device: torch.device, reason: str) -> None:
    """Leaves an implementation whose kernels fail on a device out of `auto`'s choice in this process, with one line.

    Raises:
        UsageError: it was asked for by name.
    """
    _broken[op, name, device.type] = reason
    _chosen.pop((op, device.type), None)
    log.warning(
        "op %s: %s is left out: %s; %s runs in its place; please report it with what `extrema-fast kernels` prints",
        op,
        name,
        reason,
        choice(op, device, say=False)[0],
    )


def probe(device: torch.device, sizes: Sizes, dtype: str, unused: Collection[str] = ()) -> None:
    """Runs the kernels that nothing was measured of, at one image of a training step, before anything is compiled.

    Where one needs more than the GPU has, its launch settings are leaner from then on; an op whose kernels fail all the
    same runs what the rule takes next. Attention is tried when its plan is made. Arguments as of `problems`.

    Raises:
        UsageError: kernels asked for by name fail.
    """
    if device.type not in MEASURED_ON:
        return
    # what a kernel needs does not depend on the number of images or blocks
    small = replace(sizes, images=1, depth=1)
    for op in GPU_RULE:
        measured = op in _measured and _measured[op].implementation
        if op in unused or measured or not measure.has_cases(op):
            continue
        while (name := choice(op, device, say=False)[0]) in measure.OURS:
            why = measure.failure(measure.Problem(op, "", name, (name,), small, dtype), device)
            if not why:
                break
            give_up(op, name, device, why)


def choices(device: torch.device | str = "cpu") -> dict[str, dict[str, Any]]:
    """Decides every op on a device now.

    Returns:
        `{op: {"implementation": ..., "reason": ...}}`; for attention also `decided`, the plans made so far.
    """
    found: dict[str, dict[str, Any]] = {}
    for op in IMPLEMENTATIONS:
        # optimizers are logged where they are built, attention with its plans
        name, why = choice(op, device, say=op not in ("adamw_ema", "lamb", "attention"))
        found[op] = {"implementation": name, "reason": why}
    found["attention"]["decided"] = [why for key, (_, why) in _chosen.items() if len(key) > 2]
    return found


def implementation(op: str, x: Tensor) -> str:
    """The name of what runs an op on `x`."""
    return _name(op, x.device.type, _setting)


def _name(op: str, kind: str, setting: str) -> str:
    # `setting` makes compiled graphs notice a new one
    return choice(op, kind)[0]


# graphs hold the name and guard on no cache, see `_attention_plan`
_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(op: str, x: Tensor, call: Callable[[str], T]) -> T:
    """`call(name)` with the name of what runs an op on `x`; where its kernel fails, with what the rule takes next.

    Raises:
        UsageError: a kernel asked for by name fails.
    """
    name = implementation(op, x)
    if torch.compiler.is_compiling():
        return call(name)
    try:
        return call(name)
    except KernelError as error:
        give_up(op, name, x.device, error.reason)
    return run(op, x, call)


def _run(op: str, x: Tensor, *args: Any, **options: Any) -> Any:
    if op in DRAWS and x.device.type == "mps":
        # words of 64 bits: drawn as on a CPU, so that they are the same
        return _run(op, x.cpu(), *args, **options).to(x.device)
    return run(op, x, lambda name: IMPLEMENTATIONS[op][name](x, *args, **options))


# random parameters, keyed by row
DRAWS = ("color_params", "sample_views", "drop_path")


# ---- attention ------------------------------------------------------------------------------------


def check_attention_name(backend: str) -> None:
    """Raises UsageError, with the nearest name, for one that is no attention backend."""
    known = list(IMPLEMENTATIONS["attention"])
    if backend not in known:
        raise UsageError(f"attention: unknown backend {backend!r}{did_you_mean(backend, known)}")


def _attention_plan(
    backend: str,
    setting: str,
    allow_fallback: bool,
    device: torch.device,
    dtype: torch.dtype,
    d: int,
    train: bool,
) -> backends.Plan:
    """What runs up to how many tokens, decided and logged once; `setting` makes compiled graphs notice a new one."""
    key = ("attention", backend, setting, allow_fallback, device, dtype, d, train)
    if key not in _chosen:
        check_attention_name(backend)
        name, requested_by = _requested("attention", backend)
        if name == "triton" and (reason := unsupported("attention", name, device)):
            raise _error("attention", name, requested_by, device.type, reason)
        if name in ("auto", "fixed"):
            backends.settle_sdpa_order(device)
            plan, why = backends.auto_plan(device, dtype, d, train)
            measured = _attention_choices(device.type, dtype, d, train) if name == "auto" else {}
            for n, choice in sorted(measured.items()):
                name = choice.implementation
                if name and not backends.unsupported(name, device, dtype, n, d, train):
                    plan, why = backends.with_choice(plan, n, name), f"{why}; at {n} tokens {choice.reason}"
        else:
            backends.settle_sdpa_order(device)
            plan, why = backends.named_plan(name, device, dtype, d, train, allow_fallback)
            why = f"{requested_by} asks for {name}{why}"
        why = f"{backends.in_words(plan)} ({backends.describe(device, dtype, d, train)}: {why})"
        _chosen[key] = plan, why
        if plan:
            log.debug("op attention: %s", why)
    return _chosen[key][0]


def _attention_error(
    backend: str, device: torch.device, dtype: torch.dtype, n: int, d: int, train: bool
) -> None:
    name, requested_by = _requested("attention", backend)
    can = [b for b in backends.BACKENDS if not backends.unsupported(b, device, dtype, n, d, train)]
    raise UsageError(
        f"attention: {requested_by} asks for {name}, but {backends.unsupported(name, device, dtype, n, d, train)}; "
        f"available here ({backends.describe(device, dtype, d, train)}, {n} tokens): auto, {', '.join(can)}"
    )


# what torch.compiler.assume_constant_result sets, without its import of torch._dynamo: graphs hold the plan, and
# neither trace how it is made nor guard on the caches behind it
_attention_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]
_attention_error._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_attention(
    backend: str, device: torch.device, dtype: torch.dtype, n: int, d: int, train: bool
) -> str:
    """The backend that sequences of `n` tokens at head_dim `d` will run on, decided and logged now.

    Args:
        backend: `auto` or a name of `extrema_fast.ops.attention`.
        device: where the tokens will be.
        dtype: of their matmuls.
        n: tokens of a sequence.
        d: head_dim.
        train: with a backward pass.

    Raises:
        UsageError: as `attention`.
    """
    name = backends.at(_attention_plan(backend, _setting, _fallback_allowed, device, dtype, d, train), n)
    # `auto` has left out what cannot run
    named = _requested("attention", backend)[0] in backends.BACKENDS
    if not name or (named and backends.unsupported(name, device, dtype, n, d, train)):
        _attention_error(backend, device, dtype, n, d, train)
    return name


def attention(qkv: Tensor, backend: str = "auto", bias: Tensor | None = None) -> Tensor:
    """Self-attention per row.

    Args:
        qkv: [R, n, 3, H, d], as the projection leaves it.
        backend: `auto` or a name of `extrema_fast.ops.attention`; EXTREMA_FAST_BACKEND overrides it.
        bias: [3 H d]: what was added to `qkv` as a constant, or None; its gradient is made here, often for free.

    Returns:
        [R, n, H, d].

    Raises:
        UsageError: when one asked for by name cannot run: what it lacks, and what is available.
    """
    # `index`: a constant of the graph where shapes are dynamic
    n, d = qkv.shape[1], operator.index(qkv.shape[-1])
    train = torch.is_grad_enabled() and qkv.requires_grad
    plan = _attention_plan(backend, _setting, _fallback_allowed, qkv.device, qkv.dtype, d, train)
    name = backends.at(plan, n)
    if not name:
        _attention_error(backend, qkv.device, qkv.dtype, n, d, train)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        if name == "short":
            return short_attention(qkv, bias)
        qkv = contains_bias(qkv, bias)
    return backends.run(name, IMPLEMENTATIONS["attention"][name], qkv, train)


# ---- the other ops --------------------------------------------------------------------------------


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
    """Class attention of one query per row over its tokens (CaiT block; maths: kernels/attention_pool/README.md).

    Args:
        tokens: [R, n, D].
        cls: [R, D].
        weights: of the attention and its norm.
        heads: H.
        eps: of the norm.
        stats: (mean, 1 / standard deviation) of the tokens, [R, n] each, from an earlier call on the same tokens.
        return_weights: also give the attention probabilities.

    Returns:
        ([R, D], probabilities [R, H, 1 + n] or None, statistics or None).
    """
    return _run(
        "attention_pool", tokens, cls, weights, heads, eps, stats=stats, return_weights=return_weights
    )


def residual_norm(x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Any, Tensor | None, Tensor | None]:
    """Residual connection and LayerNorm of [R, n, D]; arguments and results as `kernels.residual_norm_stats`."""
    return _run("residual_norm", x, *args, **options)


def patch_gather(
    images: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor | None, pos: Tensor
) -> Tensor:
    """Embedded kept patches plus positions; images [B, C, H, W], keep [V, B, K] or None -> [V*B, K, D]."""
    return _run("patch_gather", images, keep, weight, bias, pos)


def token_gather(tokens: Tensor, keep: Tensor, pos: Tensor | None = None) -> Tensor:
    """Kept rows of embedded tokens plus positions; tokens [B, N, D], keep [V, B, K], pos [N, D] -> [V*B, K, D].

    The kernel's backward pass expects no index twice within a view, which a user's may have: with gradients `auto`
    takes the plain definition. No training step of this project calls this.
    """
    trains = torch.is_grad_enabled() and (tokens.requires_grad or (pos is not None and pos.requires_grad))
    if trains and _requested("token_gather")[0] == "auto":
        return token_gather_reference(tokens, keep, pos)
    return _run("token_gather", tokens, keep, pos)


def color_params(index: Tensor, *args: Any, **options: Any) -> Tensor:
    """Random parameters of the color jitter [B, 2, 10]; arguments as `kernels.color_views.color_params`."""
    return _run("color_params", index, *args, **options)


def color_views(images: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Two color-jittered versions of uint8 crops [B, H, W, 3]; arguments as `kernels.color_views`."""
    return _run("color_views", images, *args, **options)


def sample_views(index: Tensor, *args: Any, **options: Any) -> Tensor:
    """Kept tokens of every view [V, B, K] int32; arguments as `kernels.sample_views`."""
    return _run("sample_views", index, *args, **options)


def drop_path(index: Tensor, *args: Any, **options: Any) -> Tensor:
    """Drop-path factors [L, 2, V B] fp32; arguments as `kernels.sample_views.drop_path_factors`."""
    return _run("drop_path", index, *args, **options)


def crop_resize(pixels: Tensor, crops: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops [B, height, width, 3] uint8 of images held decoded; arguments as `kernels.crop_resize`."""
    return _run("crop_resize", pixels, crops, size)


def adamw(
    groups: list[dict],
    teacher: dict[Tensor, Tensor],
    copies: tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]] = ({}, {}),
    **options: Any,
) -> torch.optim.Optimizer:
    """AdamW over parameter groups; torch's for sharded parameters.

    Args:
        groups: as torch's.
        teacher: student parameter -> the teacher's; `triton` also makes the EMA update of these.
        copies: student parameter -> bf16 shadow weight of its own, and of its teacher's; `triton` also syncs these.
        options: `lr`, `betas`, `eps`.
    """
    first = groups[0]["params"][0]
    name = implementation("adamw_ema", first)
    if is_sharded(first) and name not in ("fused", "reference"):
        if _requested("adamw_ema")[0] == name:
            raise UsageError(
                f"backend: adamw_ema={name} updates whole tensors, not those of system.parallel fsdp; use fused"
            )
        _chosen["adamw_ema", first.device.type] = "fused", "weights are sharded"
        name = "fused"
    build = IMPLEMENTATIONS["adamw_ema"][name]
    if build is AdamWEma:
        options |= {"teacher": teacher, "shadow": copies[0], "teacher_shadow": copies[1]}
    return build(groups, **options)


def lamb(groups: list[dict], **options: Any) -> torch.optim.Optimizer:
    """LAMB over parameter groups; options `lr`, `betas`, `eps`."""
    kind = groups[0]["params"][0].device.type
    name, _ = choice("lamb", kind)
    if name == "apex" and isinstance(options["lr"], Tensor) and _requested("lamb")[0] == "auto":
        # apex cannot read a rate from the device, and nobody asked for apex
        _chosen["lamb", kind] = "foreach", "apex's takes no rate on the device"
        log.debug("op lamb: %s (%s)", *_chosen["lamb", kind])
    return IMPLEMENTATIONS["lamb"][choice("lamb", kind)[0]](groups, **options)
