"""FP8 matmuls of the trunk through torchao: optional, off by default.

Not recommended: no record shows yet that feature quality is preserved, or that a step gets faster. Weights stay fp32
parameters under the same names, so optimizer, teacher, checkpoints and exports are the same as without FP8.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UsageError, install

log = logging.getLogger(__name__)

# of a trunk block; pooling, heads and patches keep their format
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
# sm_89: the first NVIDIA generation with FP8 matmuls
CAPABILITY = (8, 9)


def apply_fp8(
    method: Any,
    mode: Literal["off", "teacher", "trunk"],
    device: torch.device | str,
    *,
    emulate: bool = False,
) -> int:
    """Gives trunk layers FP8 matmuls, in place.

    Inputs, weights and gradients are scaled per tensor, from their own largest value, at every matmul. Call it
    before `torch.compile`, which torchao needs to be fast; optimizers may exist already.

    Args:
        method: `ExtreMA`; `student.blocks` and `teacher.blocks` hold the trunks.
        mode: `teacher`: its trunk; `trunk`: both trunks, gradients included.
        device: where the step runs.
        emulate: the same rounding with ordinary matmuls, on any device (for tests: slow).

    Returns:
        How many layers were changed.

    Raises:
        UsageError: without torchao, on a device without FP8, or for widths that are no multiple of 16.
    """
    if mode == "off":
        return 0
    if not emulate:
        _check_device(torch.device(device), mode)
    trunks = [method.teacher] if mode == "teacher" else [method.teacher, method.student]
    layers = [layer for trunk in trunks for layer in _layers(trunk.blocks).values()]
    for name, layer in _layers(method.teacher.blocks).items():
        if layer.in_features % 16 or layer.out_features % 16:
            raise UsageError(
                f"train.fp8={mode}: {name} is {layer.in_features} x {layer.out_features}, FP8 matmuls need multiples "
                "of 16; choose such a model.width and model.mlp_ratio, or train.fp8=off"
            )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UsageError(
            f"train.fp8={mode}: needs torchao ({error}); {install('fp8')}, or use train.fp8=off"
        ) from None
    # padded, because the backward pass sums over rows, which are any number
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    for trunk in trunks:
        convert_to_float8_training(
            trunk.blocks, module_filter_fn=lambda module, _: any(module is x for x in layers), config=config
        )
    log.info("fp8: %d linear layers (train.fp8=%s%s)", len(layers), mode, ", emulated" if emulate else "")
    return len(layers)


def _layers(blocks: nn.ModuleList) -> dict[str, Any]:
    return {
        f"blocks.{i}.{name}": block.get_submodule(name) for i, block in enumerate(blocks) for name in LAYERS
    }


def _check_device(device: torch.device, mode: str) -> None:
    if device.type != "cuda":
        raise UsageError(
            f"train.fp8={mode}: needs an NVIDIA GPU, the device is {device.type}; use train.fp8=off"
        )
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise UsageError(
            f"train.fp8={mode}: {torch.cuda.get_device_name(device)} (sm_{found[0]}{found[1]}) has no FP8 matmuls, "
            f"they begin with sm_{CAPABILITY[0]}{CAPABILITY[1]}; use train.fp8=off"
        )
