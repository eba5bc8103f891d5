"""What every op tells about itself, read by the contract test, the compiler check, tuning and benchmarks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

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

    name        direction, dtype and shape, e.g. `bwd bf16 D768 H12 n39`; unique within the op
    kernel      the @triton.jit function
    signature   argument -> Triton type (`*bf16`, `i64`, `fp32`) of everything that is no constexpr
    constexprs  argument -> value
    aligned     arguments that are multiples of 16 at run time (pointers in bytes, strides in elements)
    streamed    operands that make up the traffic, by the names under which `tl.load` and `tl.store` of the
                kernel's file address them: each must move 16 bytes per thread and access
    narrow      streamed operand -> (bytes that it moves at least, why not 16)
    fp64        whether blocks of fp64 are meant
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    streamed: tuple[str, ...] = ()
    narrow: dict[str, tuple[int, str]] = field(default_factory=dict)
    fp64: bool = False


@dataclass(frozen=True)
class Case:
    """One measured shape of an op.

    label      short, unique within the op: `student-B n39`
    make       (device, dtype, generator) -> tuple of arguments; leaves that need gradients say so
    providers  name -> function of these arguments, returning a tensor or a tuple of tensors; `ours` and
               `reference` always, further entries are strong baselines (`sdpa`, `compiled`)
    sizes      of each launch that can be tuned: direction -> sizes, as in the keys of configuration files
    bytes_fwd, bytes_bwd  bytes that must move (README's budget) with elements of `itemsize` bytes
    flops_fwd, flops_bwd  useful floating-point operations
    """

    label: str
    make: Callable[..., tuple]
    providers: dict[str, Callable[..., Any]]
    bytes_fwd: int
    bytes_bwd: int = 0
    flops_fwd: int = 0
    flops_bwd: int = 0
    backward: bool = True
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """An op: what it is called, what it registers, its compiled variants, its measured cases.

    version    raised when results or saved tensors change
    public     names exported by `extrema_fast.kernels.<name>` and documented in its README
    torch_ops  registered ops, without the namespace `extrema_fast::`
    variants   (every=False) -> list of Variant; imports Triton, so called only where it is installed. `every`:
               beside the shipped shapes each kind of block that the launchers can choose
    cases      (quick) -> list of Case; `quick` takes sizes an interpreter can run in seconds
    space      (direction, dtype, sizes) -> list of launch settings for tuning to try; empty: nothing to tune
    dtypes     what the kernels take, besides fp64 in the interpreter
    """

    name: str
    version: int
    summary: str
    public: tuple[str, ...]
    torch_ops: tuple[str, ...]
    variants: Callable[..., list[Variant]]
    cases: Callable[[bool], list[Case]]
    space: Callable[..., list[dict[str, int]]] = field(default=lambda *_: [])
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)


def spec(name: str) -> Spec:
    """The `SPEC` of kernels/<name>/spec.py."""
    return importlib.import_module(f"{__package__}.{name}.spec").SPEC


def specs() -> list[Spec]:
    """Every op's specification, in the order of `OPS`."""
    return [spec(name) for name in OPS]
