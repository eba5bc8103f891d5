"""What every op tells about itself, read by tests, the compiler check (aot.py), tuning and benchmarks."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
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
    "residual_norm",
    "mlp",
    "adamw_ema",
    "color_views",
    "sample_views",
    "crop_resize",
)


def launches(launcher: Callable, *args: Any) -> list[_launch.Launch]:
    """What a launcher of an op's `kernel.py` launches for these arguments (tensors: `meta`), without running it."""
    with _launch.recording(run=False) as recorded:
        launcher(*args)
    return recorded.launches


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without memory, for `launches`."""
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function under torch.compile, set up at the first call: the import takes seconds and may fail."""
    made: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        if not made:
            made.append(torch.compile(function, dynamic=False))
        return made[0](*args)

    return run


@dataclass(frozen=True)
class Sizes:
    """What one process computes in one forward and backward pass of a training step."""

    images: int
    # of each image: views, kept tokens of each, all patches
    views: int
    kept: int
    patches: int
    width: int
    heads: int
    depth: int
    # of the trunk's MLP
    hidden: int
    # pixels: side of a patch, of an image; channels
    patch: int
    height: int
    width_px: int
    chans: int


@dataclass(frozen=True)
class Case:
    """One measured shape of an op; its label is unique within the op."""

    label: str
    # (device, dtype, generator) -> arguments; leaves that need gradients say so
    make: Callable[..., tuple]
    # function of these arguments -> one or more tensors; `ours` and `reference` always, others are strong baselines
    providers: dict[str, Callable[..., Any]]
    # bytes that must move (README's budget) in 16-bit types, and useful operations
    bytes_fwd: int
    bytes_bwd: int = 0
    flops_fwd: int = 0
    flops_bwd: int = 0
    # with gradients
    backward: bool = True
    # argument -> its axis that counts rows (images), none of which touches another; empty: compared whole
    row_dims: dict[int, int] = field(default_factory=dict)
    # row b of the arguments makes rows b, B + b, ... of each result, so many
    views: int = 1
    # the definition in fp64, where `reference` of fp64 arguments is not that
    exact: Callable[..., Any] | None = None
    # calls change what later calls with the same arguments return (an optimizer)
    stateful: bool = False


@dataclass(frozen=True)
class Spec:
    """An op: its folder's name, what it registers, its compiled variants, its measured cases."""

    name: str
    # raised when results or saved tensors change
    version: int
    summary: str
    # names exported by `extrema_fast.kernels.<name>` and documented in its README
    public: tuple[str, ...]
    # registered ops, without the namespace `extrema_fast::`
    torch_ops: tuple[str, ...]
    # direction, dtype and shape (`bwd bf16 D768 H12 n39`) -> a launch that is compiled ahead of time; needs Triton
    variants: Callable[[], dict[str, _launch.Launch]]
    # (quick) -> measured cases; `quick`: sizes that an interpreter runs in seconds
    cases: Callable[[bool], list[Case]]
    # (direction, sizes) -> launch settings for tuning to try; None: nothing to tune
    space: Callable[[str, dict[str, int]], list[dict[str, int]]] | None = None
    # sizes of a training step -> the op as that step calls it, labeled student or teacher; None: it does not
    step_cases: Callable[[Sizes], list[Case]] | None = None
    # `train.compile block` compiles it together with what is around it
    in_block: bool = False
    # dtypes the kernels support, besides fp64 in the interpreter
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)


def grid(**choices: Any) -> list[dict[str, int]]:
    """Every combination of these settings: `grid(num_warps=(4, 8), num_stages=(1, 2))`."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def spec(name: str) -> Spec:
    """The `SPEC` of kernels/<name>/spec.py."""
    return importlib.import_module(f"{__package__}.{name}.spec").SPEC
