"""Decides whether a module may be replaced by the formula of its class; used by the encoder and by `accelerate`.

Code that reads a module's weights directly would ignore what others have attached to it: hooks, adapters, pruning,
parametrizations, quantized or distributed weights. So it checks first, at every pass, since these come and go.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

# types of parameters without a meaning of their own; the last one while a graph is exported
PLAIN = frozenset({nn.Parameter, Tensor, type(None), FakeTensor})


def reason(module: nn.Module, *kinds: type) -> str:
    """Why calling the module could do more than the formula of its class, one of `kinds`; empty when it could not."""
    cls, own = type(module), module.__dict__
    if cls not in kinds:
        return f"{cls.__name__} is not {kinds[0].__name__}"
    if "forward" in own or cls.forward.__module__ != cls.__module__:
        return f"the forward method of this {cls.__name__} is replaced"
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "it has hooks"
    if (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return "hooks are registered for all modules"
    if own.get("_compiled_call_impl") is not None:
        return "it is compiled by itself"
    for p in own["_parameters"].values():
        if type(p) not in PLAIN:
            return f"it has a {type(p).__name__} for a parameter"
    if "weight" in own or "bias" in own or own["_buffers"]:
        # flattened, or computed by a hook that is gone
        return "its weight or bias is no parameter"
    return ""


def is_stock(module: nn.Module, *kinds: type) -> bool:
    """Whether `reason` finds none."""
    return not reason(module, *kinds)
