"""What every op tells about itself, read by tests, the compiler check (aot.py), tuning and benchmarks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _launch

# folder = op name; the order of the README's table
OPS = (
    "attention_pool",
    "patch_gather",
    "token_gather",
    "short_attention",
    "adamw_ema",
    "color_views",
    "sample_views",
)


@dataclass(frozen=True)
class Variant:
    """One kernel with one shipped configuration, compiled ahead of time for every architecture.

    Attributes:
        name: direction, dtype and shape, e.g. `bwd bf16 D768 H12 n39`; unique within the op.
        launch: a recorded launch of that shape (`launches`).
    """

    name: str
    launch: _launch.Launch


def launches(launcher: Callable, *args: Any) -> list[_launch.Launch]:
    """What a launcher of an op's `kernel.py` launches for these arguments, without running it.

    Tensors among them are on the device `meta`.
    """
    with _launch.recording(run=False) as recorded:
        launcher(*args)
    return recorded.launches


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without memory, for `launches`."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Case:
    """One measured shape of an op.

    Attributes:
        label: short, unique within the op: `student-B n39`.
        make: (device, dtype, generator) -> tuple of arguments; leaves that need gradients say so.
        providers: name -> function of these arguments that returns a tensor or a tuple of tensors; `ours` and
            `reference` always, others are strong baselines (`sdpa`, `compiled`).
        bytes_fwd: bytes that the forward pass must move (README's budget) in 16-bit types.
        bytes_bwd: the same of the backward pass.
        flops_fwd: useful floating-point operations of the forward pass.
        flops_bwd: the same of the backward pass.
        backward: whether there is a backward pass.
    """

    label: str
    make: Callable[..., tuple]
    providers: dict[str, Callable[..., Any]]
    bytes_fwd: int
    bytes_bwd: int = 0
    flops_fwd: int = 0
    flops_bwd: int = 0
    backward: bool = True


@dataclass(frozen=True)
class Spec:
    """An op: its name, what it registers, its compiled variants, its measured cases.

    Attributes:
        name: the op's folder.
        version: raised when results or saved tensors change.
        summary: one line for `extrema-fast kernels`.
        public: names exported by `extrema_fast.kernels.<name>` and documented in its README.
        torch_ops: registered ops, without the namespace `extrema_fast::`.
        variants: () -> list of Variant; imports Triton, so called only where it is installed.
        cases: (quick) -> list of Case; `quick` takes sizes that an interpreter runs in seconds.
        space: (direction, sizes) -> launch settings for tuning to try; None: nothing to tune.
        dtypes: what the kernels take, besides fp64 in the interpreter.
    """

    name: str
    version: int
    summary: str
    public: tuple[str, ...]
    torch_ops: tuple[str, ...]
    variants: Callable[[], list[Variant]]
    cases: Callable[[bool], list[Case]]
    space: Callable[[str, dict[str, int]], list[dict[str, int]]] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)


def grid(**choices: Any) -> list[dict[str, int]]:
    """Every combination of these settings: `grid(num_warps=(4, 8), num_stages=(1, 2))`."""
    found: list[dict[str, int]] = [{}]
    for name, values in choices.items():
        found = [settings | {name: value} for settings in found for value in values]
    return found


def spec(name: str) -> Spec:
    """The `SPEC` of kernels/<name>/spec.py."""
    return importlib.import_module(f"{__package__}.{name}.spec").SPEC


def specs() -> list[Spec]:
    """Every op's specification, in the order of `OPS`."""
    return [spec(name) for name in OPS]
