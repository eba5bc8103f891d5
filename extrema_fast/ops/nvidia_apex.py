"""NVIDIA apex's fused optimizers, used where they are found to work on this machine.

apex (github.com/NVIDIA/apex) is built from source; the package of that name on PyPI is an unrelated toolkit.
So a name proves nothing here: an optimizer counts as present if apex's compiled module loads, its kernels are
available, and two steps on a small tensor give what the definition gives.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from ..errors import UsageError
from .lamb import Lamb

# where apex has kernels
DEVICES = ("cuda",)
BUILD = "apex is built from source (github.com/NVIDIA/apex); `pip install apex` is another project"


@functools.cache
def find(name: str, device: str) -> tuple[type[torch.optim.Optimizer] | None, str]:
    """(class, "") for a working `FusedAdam` or `FusedLAMB` on a device type, else (None, why not); cached."""
    if device not in DEVICES:
        return None, f"apex runs on {', '.join(DEVICES)}, not on {device}"
    # whatever goes wrong inside somebody else's package means that it cannot be used
    try:
        importlib.import_module("amp_C")
    except Exception as error:
        return None, f"apex's compiled module amp_C does not load ({_line(error)})"
    try:
        if not importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier.available:
            return None, "this apex was built without its CUDA extension"
        cls = _adapted(getattr(importlib.import_module("apex.optimizers"), name))
        error = _deviation(name, cls, device)
    except Exception as error:
        return None, f"apex's {name} does not work here ({_line(error)})"
    # rounding of weights near 1 is about 1e-5 of this step
    if not error < 1e-3:
        return None, f"apex's {name} differs from its definition by {error:.1e} of a step"
    return cls, ""


def build(name: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """apex's optimizer over parameter groups; options `lr` (a number), `betas`, `eps`.

    Its state has the keys of this package's optimizers, so either continues the other's checkpoints. The host
    decides whether to step: an attribute `found_inf` is not read.

    raises UsageError when `find` does not find it, or for a rate in a tensor
    """
    device = groups[0]["params"][0].device.type
    cls, why = find(name, device)
    if cls is None:
        raise UsageError(f"backend: {why}; {BUILD}")
    if isinstance(options["lr"], torch.Tensor):
        raise UsageError(
            f"backend: apex's {name} reads its rate on the host, so it cannot be in a tensor (train.cuda_graph); "
            "choose another implementation (system.backend)"
        )
    return _build(name, cls, groups, **options)


def _build(name: str, cls: type, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    # its own clipping, on by default, is switched off: the training loop clips
    more = {"max_grad_norm": float("inf")} if name == "FusedLAMB" else {}
    return cls(groups, adam_w_mode=True, **more, **options)


def _adapted(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    class Adapted(base):  # type: ignore[misc, valid-type]
        gates_on_device = False

        def zero_grad(self, set_to_none: bool = True) -> None:
            # apex's takes no argument
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            # apex counts per group; checkpoints hold what each parameter has
            used = [self.state[p] for g in self.param_groups for p in g["params"] if p.grad is not None]
            for state in used:
                state.setdefault("step", torch.zeros((), dtype=torch.float32))
            torch._foreach_add_([state["step"] for state in used], 1)
            return loss

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                counts = {int(self.state[p]["step"]) for p in group["params"] if "step" in self.state[p]}
                group.pop("step", None)
                if counts:
                    group["step"] = max(counts)

    Adapted.__name__ = Adapted.__qualname__ = base.__name__
    return Adapted


def _deviation(name: str, cls: type, device: str) -> float:
    """Largest difference of two steps from the definition's, as a share of the rate."""
    results = []
    for ours in (False, True):
        p = torch.nn.Parameter(torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.3, -0.2]], device=device))
        options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
        groups = [{"params": [p], "weight_decay": 0.1}]
        if not ours:
            optimizer = _build(name, cls, groups, **options)
        elif name == "FusedLAMB":
            optimizer = Lamb(groups, foreach=False, **options)
        else:
            optimizer = torch.optim.AdamW(groups, foreach=False, **options)
        for sign in (1.0, -3.0):
            p.grad = sign * (p.detach().flip(1) + 0.2)
            optimizer.step()
        results.append(p.detach())
    return float((results[0] - results[1]).abs().max()) / 0.01


def _line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 200 else text[:200] + " ..."
