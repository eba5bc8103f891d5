"""What every op needs around its kernel: checks of arguments, registration, buffers, launches, launch settings."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from ._autograd import transforming
from ._ops import NAMESPACE

log = logging.getLogger(__name__)

# Triton decides at its import whether kernels are interpreted, so later changes of the variable are ignored
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


try:
    HAS_TRITON = importlib.util.find_spec("triton") is not None
except ImportError:
    # an import hook may block it
    HAS_TRITON = False

NO_TRITON = "Triton is not installed (pip install triton)"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


# ---- where kernels run ----------------------------------------------------------------------------


@functools.cache
def _too_old(device: torch.device) -> str:
    # 8.0 is the oldest architecture that the kernels are compiled and checked for (aot.py)
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return ""
    return f"this GPU has compute capability {major}.{minor}; the kernels need one of 8.0 (A100, RTX 30) or later"


@functools.cache
def compiler_missing(device: torch.device) -> str:
    """Why Triton, and so torch.compile, cannot compile and start a kernel on a GPU; empty when it can."""
    if not HAS_TRITON:
        return NO_TRITON
    try:
        from . import _probe

        _probe.run(device)
    except Exception as error:
        # whatever the compiler, its own C compiler or the driver says
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    else:
        return ""
    with contextlib.suppress(Exception):
        # torch 2.13 has Triton kernels for some of its own operators, which would fail in the first backward pass
        importlib.import_module("torch._native.triton_utils").deregister_op_overrides()
    return (
        f"Triton cannot compile a kernel here ({reason}); it needs a C compiler (gcc), a driver that fits, and a cache "
        "folder that it can write (TRITON_CACHE_DIR)"
    )


def can_run(device: torch.device | str) -> tuple[bool, str]:
    """Whether Triton kernels run on tensors of a device.

    Args:
        device: a device or its name.

    Returns:
        (yes or no, the reason in words).
    """
    if not HAS_TRITON:
        return False, NO_TRITON
    device = torch.device(device)
    if device.type == "cuda":
        reason = (_too_old(device) or compiler_missing(device)) if torch.cuda.is_available() else ""
        return not reason, reason or "Triton on a CUDA device"
    if device.type == "cpu" and INTERPRET:
        return True, "Triton's interpreter (TRITON_INTERPRET=1)"
    return False, f"no Triton kernels on {device.type}"


# what torch.compiler.assume_constant_result sets, without its import of torch._dynamo: a traced graph holds the answer
can_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


def use_triton(x: Tensor) -> bool:
    """Whether an op launches its kernel for `x`; else it runs its plain PyTorch definition."""
    return can_run(x.device)[0] and not transforming()


def checking() -> bool:
    """EXTREMA_FAST_CHECK=1: indices are checked (which waits for a GPU) and outputs start as NaN."""
    return os.environ.get("EXTREMA_FAST_CHECK", "0") not in ("", "0")


# ---- arguments ------------------------------------------------------------------------------------


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(x: object) -> str:
    """`int64 [5, 8, 39]` for a tensor, the type's name for anything else."""
    return f"{_name(x.dtype)} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def triton_dtype(dtype: torch.dtype) -> Any:
    """`tl.float32` for `torch.float32`."""
    import triton.language as tl

    return getattr(tl, _name(dtype))


def accumulator(dtype: torch.dtype) -> Any:
    """Triton's type of the sums of a kernel."""
    return triton_dtype(wide(dtype))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype an op computes in: autocast's where it is on, else that of `x`; as in torch, fp64 stays fp64."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def check(
    name: str,
    x: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] | None = None,
    like: Tensor | None = None,
    hint: str = "",
) -> None:
    """Checks one tensor argument; sizes given as text (`"D"`) may have any value and are only shown."""
    kind = isinstance(x, Tensor)
    fits = (
        kind
        and x.dim() == len(shape)
        and all(isinstance(w, str) or w == s for w, s in zip(shape, x.shape))
        and (dtypes is None or x.dtype in dtypes)
    )
    if fits and (like is None or x.device == like.device):
        return
    # in words only now: compiled code with sizes that vary cannot print them
    hint = f"; {hint}" if hint else ""
    if fits and like is not None:
        raise ValueError(f"{name}: expected on {like.device} like the other arguments, got {x.device}{hint}")
    wanted = f"{' | '.join(_name(d) for d in dtypes) + ' ' if dtypes else ''}[{', '.join(map(str, shape))}]"
    if not kind:
        raise TypeError(f"{name}: expected a tensor {wanted}, got {describe(x)}{hint}")
    raise ValueError(f"{name}: expected {wanted}, got {describe(x)}{hint}")


def check_keep(keep: Tensor, batch: int, num_tokens: int, like: Tensor, unique: str = "") -> Tensor:
    """Keep indices [V, B, K] as int32, checked; their values on a CPU, and elsewhere when EXTREMA_FAST_CHECK=1.

    That variable also has checked that no index is twice within a `view`, or within all views of an `image`.
    """
    check("keep", keep, ("V", batch, "K"), (torch.int32, torch.int64), like, "integer indices, view-major")
    if torch.compiler.is_compiling() or transforming() or keep.numel() == 0:
        return keep.int()
    if checking() or keep.device.type == "cpu":
        low, high = int(keep.min()), int(keep.max())
        if low < 0 or high >= num_tokens:
            raise ValueError(f"keep: expected indices in [0, {num_tokens}), got {low} to {high}")
    if checking() and unique:
        rows = keep.transpose(0, 1).flatten(1) if unique == "image" else keep.flatten(0, 1)
        ordered = rows.sort(-1).values
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError(f"keep: an index is twice within one {unique}")
    return keep.int()


# ---- registration and launches --------------------------------------------------------------------


def op(schema: str, launcher: str, opaque: bool = False) -> Callable[[Callable], Any]:
    """Defines a torch op, for every device, without autograd, that calls a launcher of the package's `kernel.py`.

    The decorated function makes empty results, for tracing. The first call imports `kernel.py`, and so Triton; a
    launcher named `module.function` is in another module of the package.

    On a GPU compiled code holds the launcher's allocations and launches themselves, as of `torch.library.triton_op`:
    they cost the CPU a fraction of a call of the op, and what the launcher does beside them is fused. Not so with
    `opaque`, of ops that change their arguments, where sizes vary, and in exported programs.
    """

    def define(fake: Callable) -> Callable:
        name, _, arguments = schema.partition("(")
        package = fake.__module__.rpartition(".")[0]
        module, _, function_name = launcher.rpartition(".")

        def run(*args: Any) -> Any:
            function = getattr(importlib.import_module(f"{package}.{module or 'kernel'}"), function_name)
            return fitting(package.rpartition(".")[2], function, *args)

        closed = opaque or "!" in arguments

        def trace(mode: Any, called: Any, types: Any, args: tuple, options: Any = None) -> Any:
            if closed or not holds_launches(args) or torch.compiler.is_exporting():
                return mode.__torch_dispatch__(called, types, args, options or {})
            with mode:
                return run(*args)

        full = f"{NAMESPACE}::{name}"
        torch.library.define(full, f"({arguments}")
        torch.library.impl(full, "CompositeExplicitAutograd")(run)
        torch.library.register_fake(full)(fake)
        torch.library.register_torch_dispatch(full, FunctionalTensorMode, trace)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return define


def holds_launches(args: Sequence[Any]) -> bool:
    """Whether compiled code can contain the launches of an op: on a GPU, with static sizes."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    sizes = [*args, *(n for x in tensors for n in x.shape)]
    # a kernel is compiled for most of its sizes
    return any(x.device.type == "cuda" for x in tensors) and not any(
        isinstance(n, torch.SymInt) for n in sizes
    )


def empty(shape: tuple[int, ...] | torch.Size, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output buffer, contiguous, on the device of `like`; filled with NaN when `checking()`."""
    out = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if checking():
        out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)
    return out


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """These numbers on a device; filled there, since a copy from the CPU waits and no CUDA graph holds one."""
    if torch.device(device).type == "cpu":
        return torch.tensor(values, dtype=dtype, device="cpu")
    return torch.cat([torch.full((1,), v, dtype=dtype, device=device) for v in values])


def rows_ready(x: Tensor) -> Tensor:
    """`x`, copied unless its last axis is dense, no axis is expanded and its address is a multiple of 16.

    Gradients of sums arrive with stride 0, slices with odd addresses; kernels see neither.
    """
    expanded = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape))
    dense = x.stride(-1) == 1 or x.shape[-1] == 1
    # compiled code aligns what it is given
    ready = dense and not expanded and (isinstance(x, FunctionalTensor) or x.data_ptr() % 16 == 0)
    return x if ready else x.clone(memory_format=torch.contiguous_format)


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is not below `size` and `least`."""
    return 1 << (max(size, least) - 1).bit_length()


class KernelError(RuntimeError):
    """A kernel cannot be compiled here, or no settings of it fit this GPU; nothing was computed."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; EXTREMA_FAST_BACKEND=reference runs the plain definition of every op")
        self.reason = reason


# op (folder) -> 1: its tuned settings did not fit this GPU; 2: nor did the default ones with several stages
_leaner: dict[str, int] = {}
# ops (folders) that took tuned settings
_takes_tuned: set[str] = set()


def fitting(op: str, launcher: Callable[..., Any], *args: Any) -> Any:
    """`launcher(*args)`; where its kernel takes more than the GPU has, again with the default settings, then one stage.

    Each step is said once and kept for the process. Tracing does the same before anything is compiled (`launch`).

    Raises:
        KernelError: with one stage it does not fit either.
    """
    while True:
        try:
            return launcher(*args)
        except Exception as error:
            # `forced` settings are being tried: whoever tries them wants to know
            if type(error).__name__ != "OutOfResources" or _forced:
                raise
            level = max(_leaner.get(op, 0) + 1, 1 if op in _takes_tuned else 2)
            what = f"the kernel does not fit this GPU ({' '.join(str(error).split())})"
            if level > 2:
                raise KernelError(f"{op}: {what}") from error
            _leaner[op] = level
            log.warning(
                "op %s: %s; it runs with %s", op, what, "the default settings" if level == 1 else "one stage"
            )


@dataclass
class Launch:
    """One launch: kernel, arguments in order, constants and compile options; what Triton compiled for it."""

    kernel: Any
    args: tuple
    options: dict[str, Any]
    compiled: Any = None


@dataclass
class Recording:
    """Launches, and the settings that were read: (op, key, settings)."""

    run: bool
    launches: list[Launch] = field(default_factory=list)
    keys: list[tuple[str, str, dict[str, int]]] = field(default_factory=list)


_recording: Recording | None = None


@contextlib.contextmanager
def recording(run: bool = True) -> Iterator[Recording]:
    """Inside, launches are recorded; with `run=False` they are not run, so tensors may be on the device `meta`."""
    global _recording
    before, _recording = _recording, Recording(run)
    try:
        yield _recording
    finally:
        _recording = before


# (kernel, device, options, specialization) -> what Triton compiled, its constants in order
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def _specialized(x: Any) -> Any:
    """What Triton specializes a kernel on: types, addresses that are multiples of 16, ones and multiples of 16."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if type(x) is int:
        return x == 1, x % 16 == 0, -(2**31) <= x < 2**31, x < 2**63
    return x if x is None or isinstance(x, bool) else type(x)


def _load(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: dict[str, Any]) -> Any:
    """What Triton compiles for the current GPU, loaded there.

    Raises:
        OutOfResources: Triton's; the GPU lacks the shared memory or the registers for these settings.
        KernelError: it cannot be compiled or loaded.
    """
    try:
        compiled = kernel.warmup(*args, grid=grid, **options)
        # loads it; the limits of the GPU are checked there
        compiled[(*grid, 1, 1)[:3]]
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in text
        if no_memory or type(error).__name__ == "OutOfResources":
            raise
        name = kernel.fn.__name__
        raise KernelError(f"{name} cannot be compiled or loaded here ({text[:160]})") from error
    return compiled


def _load_traced(kernel: Any, device: torch.device, args: tuple, options: dict[str, Any]) -> None:
    """`_load` for a launch that is traced: compiled code would end at its first call where a kernel does not fit."""
    if INTERPRET or not torch.cuda.is_available():
        return

    values = [x.dtype if isinstance(x, Tensor) else x for x in args]
    with torch.cuda.device(device):
        _load(kernel, (1,), values, options)


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any) -> None:
    """Runs `kernel[grid]` on the device of `like`; an empty grid is no launch.

    The long axis comes first in the grid: the second and third are limited to 65,535 programs. Positional arguments
    come first in the kernel's signature, then constants. A launch like an earlier one leaves out what Triton's own
    look-up costs on the CPU, more than the launch itself.
    """
    if 0 in grid:
        return
    # a default that Triton is about to change
    fused = {"enable_fp_fusion": True, **options}
    if isinstance(like, FunctionalTensor):
        # traced (`op`)
        _load_traced(kernel, like.device, args, fused)
        torch.library.wrap_triton(kernel)[grid](*args, **options)
        return
    device, compiled = like.device, None
    if _recording is None or _recording.run:
        options = fused
        if device.type != "cuda":
            compiled = kernel[grid](*args, **options)
        else:
            key = kernel.fn, device.index, *options.items(), *map(_specialized, args)
            other = device.index != torch.cuda.current_device()
            with torch.cuda.device(device) if other else contextlib.nullcontext():
                if not (found := _compiled.get(key)):
                    constants = tuple(options.get(p.name, p.default) for p in kernel.params[len(args) :])
                    found = _compiled[key] = _load(kernel, grid, args, options), constants
                compiled, constants = found
                compiled[(*grid, 1, 1)[:3]](*args, *constants)
    if _recording is not None:
        _recording.launches.append(Launch(kernel, args, options, compiled))


# ---- launch settings ------------------------------------------------------------------------------


@functools.cache
def tuned(op: str, device: str) -> dict[str, dict[str, int]]:
    """The settings that `extrema-fast tune` kept of an op for a GPU (`cuda:0`) and these versions, by `config_key`."""
    # it reads the version of the op, whose spec imports this module
    from . import _cache

    found = [(k.get("launch"), v.get("config")) for k, v in _cache.entries(device, op)]
    return {k: c for k, c in found if isinstance(k, str) and isinstance(c, dict)}


_forced: list[tuple[str, str, dict[str, int]]] = []


@contextlib.contextmanager
def forced(op: str, config: dict[str, int], key: str = "") -> Iterator[None]:
    """Inside, launches of `op` (under `key`, if one is given) take these settings, for tuning and tests."""
    _forced.append((op, key, config))
    try:
        yield
    finally:
        _forced.pop()


def settings(op: str, key: str, device: torch.device, default: dict[str, int]) -> dict[str, int]:
    """Blocks, warps and stages of one shape (`config_key`): on a GPU what tuning found there, else the default.

    Other settings sum in another order: with torch's deterministic algorithms it is the default, tuned or not.
    """
    leaner, chosen = _leaner.get(op, 0), default
    tunes = device.type == "cuda" and not leaner and not torch.are_deterministic_algorithms_enabled()
    if tunes and key in (found := tuned(op, str(device))):
        _takes_tuned.add(op)
        chosen = default | {name: value for name, value in found[key].items() if name in default}
    if leaner > 1:
        # of the launch, and those of a loop
        chosen = chosen | {name: 1 for name in ("num_stages", *({"STAGES"} & chosen.keys()))}
    for name, wanted, config in _forced:
        if name == op and wanted in ("", key):
            chosen = chosen | config
    if _recording is not None:
        _recording.keys.append((op, key, chosen))
    return chosen


@functools.cache
def config_key(direction: str, dtype: torch.dtype, **sizes: int) -> str:
    """`bwd|bf16|D768|H12|n64`: the name of the settings of a shape."""
    return "|".join([direction, DTYPE_NAMES[dtype], *(f"{k}{v}" for k, v in sizes.items())])
