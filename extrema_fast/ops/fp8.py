"""FP8 matrix products of the trunk through torchao: optional, off by default.

Not recommended: no record shows yet that the features keep their quality, nor that a step gets faster. Weights
stay fp32 parameters under the same names, so optimizer, teacher, checkpoints and exports are as without FP8.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UsageError

log = logging.getLogger(__name__)

# of a trunk block; pooling, heads and patches keep their format
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
# sm_89: the first NVIDIA generation with FP8 products
CAPABILITY = (8, 9)


def apply_fp8(
    method: Any,
    mode: Literal["off", "teacher", "trunk"],
    device: torch.device | str,
    *,
    emulate: bool = False,
) -> int:
    """Gives trunk layers FP8 products, in place; returns how many layers were changed.

    method    `ExtreMA`: `student.blocks` and `teacher.blocks` hold the trunks
    mode      `teacher`: its trunk; `trunk`: both trunks, gradients included
    emulate   the same rounding with ordinary products, on any device (for tests: slow)

    Inputs, weights and gradients are scaled per tensor, from their own largest value, at every product. Call it
    before `torch.compile`, which torchao needs to be fast; optimizers may exist already.

    raises UsageError without torchao, on a device without FP8, or for widths that are no multiple of 16
    """
    if mode == "off":
        return 0
    if not emulate:
        _check_device(torch.device(device), mode)
    trunks = [method.teacher] if mode == "teacher" else [method.teacher, method.student]
    for name, layer in _layers(trunks[0].blocks).items():
        if layer.in_features % 16 or layer.out_features % 16:
            raise UsageError(
                f"train.fp8={mode}: {name} is {layer.in_features} x {layer.out_features}, FP8 products need multiples "
                "of 16; choose such a model.width and model.mlp_ratio, or train.fp8=off"
            )
    convert, config = _torchao(mode)
    count = 0
    for trunk in trunks:
        chosen = set(map(id, _layers(trunk.blocks).values()))
        convert(
            trunk.blocks,
            module_filter_fn=lambda module, _, chosen=chosen: id(module) in chosen,
            # rows are summed over in the backward pass and are any number
            config=config(emulate=emulate, pad_inner_dim=True),
        )
        count += len(chosen)
    log.info("fp8: %d linear layers (train.fp8=%s%s)", count, mode, ", emulated" if emulate else "")
    return count


def _layers(blocks: nn.ModuleList) -> dict[str, nn.Linear]:
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
            f"train.fp8={mode}: {torch.cuda.get_device_name(device)} (sm_{found[0]}{found[1]}) has no FP8 products, "
            f"they begin with sm_{CAPABILITY[0]}{CAPABILITY[1]}; use train.fp8=off"
        )


def _torchao(mode: str) -> tuple[Any, Any]:
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UsageError(
            f"train.fp8={mode}: needs torchao ({error}); pip install 'extrema-fast[fp8]', or use train.fp8=off"
        ) from None
    return convert_to_float8_training, Float8LinearConfig
