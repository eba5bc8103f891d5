"""LAMB and LARS, which scale each layer's step by the norm of its weights; torch's AdamW; NVIDIA apex if available.

For weights x, gradient g, weight decay d and learning rate lr, per parameter tensor:

    LAMB   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2          arXiv 1904.00962, algorithm 2, phi(z) = z
           u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + d x;  x = x - lr |x| / |u| u
    LARS   u = trust |x| / (|g| + d |x|) (g + d x);  b = mu b + u;  x = x - lr b        arXiv 1708.03888

The ratio is 1 in groups without weight decay (biases, norms, class token) and if a norm is 0.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..kernels.adamw_ema import AdamWEma


class _LayerWise(torch.optim.Optimizer):
    """What LAMB and LARS share: the loop over groups, and the checks of parameters and gradients."""

    gates_on_device = True
    # (parameters, gradients, group, gate)
    _update: Callable[[list[Tensor], list[Tensor], dict[str, Any], Tensor | None], None]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, for contiguous fp32 (or fp64) parameters."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in (torch.float32, torch.float64) or not p.is_contiguous():
                self.param_groups.pop()
                raise ValueError(
                    f"params: expected contiguous float32, got {list(p.shape)} {p.dtype} with strides {p.stride()}"
                )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter with a gradient; returns the closure's loss."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            # the fused kernels read fp32, and compare with 1
            found_inf = (found_inf != 0).float()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p.grad.layout != torch.strided:
                    raise ValueError(f"grad of {list(p.shape)}: expected dense, got {p.grad.layout}")
            if params:
                # the fused kernels want the strides of the parameter
                grads = [
                    p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad)
                    for p in params
                ]
                self._update(params, grads, group, found_inf)
        return loss


class Lamb(_LayerWise):
    """LAMB over dense fp32 (fp64 for tests) parameters of one device, by torch's multi-tensor kernels.

    The CPU reads nothing, so a step can be captured in a CUDA graph. A 0-d tensor in the attribute `found_inf` gates
    a step: where it is not 0, weights and state keep their bits, whatever the gradients are. The state of a parameter
    is `step` (0-d fp32), `exp_avg` and `exp_avg_sq`.

    Args:
        params: tensors or groups.
        lr: rate; may be a 0-d tensor on their device.
        betas: of the moments.
        eps: added to the root of the second moment.
        weight_decay: of groups that have none of their own.

    Raises:
        ValueError: for parameters and gradients it cannot update.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
    ) -> None:
        # `capturable` makes torch restore step counts to the parameters' device
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "capturable": True}
        super().__init__(params, defaults)

    def _update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        first, second, steps = (
            [self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        # torch's fused Adam with rate 1 takes zeros to the negated update: one pass over the moments, and where
        # `found_inf` is 1 it leaves everything alone
        updates = _zeros_like(params)
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            updates,
            grads,
            first,
            second,
            [],
            steps,
            amsgrad=False,
            lr=1.0,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
            grad_scale=None,
            found_inf=found_inf,
        )
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
        if decay:
            torch._foreach_add_(updates, params, alpha=-decay)
            x, u = (torch.stack(torch._foreach_norm(t)) for t in (params, updates))
            ratio = torch.where((x > 0) & (u > 0), x / u, 1.0)
            torch._foreach_mul_(updates, list(ratio.unbind()))
        _descend(params, updates, [], momentum=0.0, lr=group["lr"], maximize=True, found_inf=found_inf)


class Lars(_LayerWise):
    """LARS: momentum descent on gradients scaled per tensor; parameters, `lr` and gate as `Lamb`.

    The state of a parameter is `momentum_buffer`.

    Args:
        params: tensors or groups.
        lr: rate.
        momentum: mu, 0 for none.
        weight_decay: of groups that have none of their own.
        trust: the trust coefficient.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust: float = 1e-3,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    def _update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        decay, mu = group["weight_decay"], group["momentum"]
        if decay:
            x, g = (torch.stack(torch._foreach_norm(t)) for t in (params, grads))
            ratio = torch.where((x > 0) & (g > 0), group["trust"] * x / (g + decay * x), 1.0)
            grads = list(torch._foreach_add(grads, params, alpha=decay))
            torch._foreach_mul_(grads, list(ratio.unbind()))
        buffers = []
        for p in params if mu else ():
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        _descend(params, grads, buffers, momentum=mu, lr=group["lr"], maximize=False, found_inf=found_inf)


def _zeros_like(params: list[Tensor]) -> list[Tensor]:
    """Zeros of their shapes in one allocation, each aligned for vector loads."""
    sizes = [-(-p.numel() // 64) * 64 for p in params]
    flat = torch.zeros(sum(sizes), dtype=params[0].dtype, device=params[0].device)
    return [x[: p.numel()].view(p.shape) for x, p in zip(flat.split(sizes), params, strict=True)]


# `buffer = momentum buffer + update; x -= lr buffer`, or `x -= lr update` without buffers; gated
_descend = partial(
    torch._fused_sgd_, weight_decay=0.0, dampening=0.0, nesterov=False, is_first_step=False, grad_scale=None
)


@torch.no_grad()
def ema_(
    teacher: list[Tensor], student: list[Tensor], weight: float | Tensor, skip: Tensor | None = None
) -> None:
    """EMA update in place: `teacher += weight (student - teacher)`.

    Args:
        teacher: tensors of one device and dtype.
        student: those they follow.
        weight: 1 - momentum; a 0-d tensor is read on its device, without waiting on CUDA.
        skip: 0-d fp32, read in the same way; where it is 1 the teacher keeps its bits, whatever the student holds. A
            weight of 0 would not do: 0 times infinity is NaN.
    """
    first = teacher[0]
    weight = torch.as_tensor(weight, dtype=first.dtype, device=first.device)
    if first.device.type != "cuda":
        if skip is None or not skip:
            torch._foreach_lerp_(teacher, student, [weight] * len(teacher))
    else:
        # on a GPU a weight that is a tensor makes `lerp` a launch per tensor
        _descend(
            teacher,
            torch._foreach_sub(teacher, student),
            [],
            momentum=0.0,
            lr=weight,
            maximize=False,
            found_inf=skip,
        )


# ---- NVIDIA apex ----------------------------------------------------------------------------------

# the package of that name on PyPI is an unrelated toolkit, so a name proves nothing: an optimizer counts as present
# if two of its steps on a small tensor are those of the definition
BUILD_APEX = "apex is built from source (github.com/NVIDIA/apex); `pip install apex` is another project"
APEX_DEVICES = ("cuda",)


@functools.cache
def find_apex(name: str, device: str) -> tuple[Callable[..., torch.optim.Optimizer] | None, str]:
    """(apex's `FusedAdam` or `FusedLAMB`, "") where it works on this type of device, else (None, the reason)."""
    if device not in APEX_DEVICES:
        return None, f"apex runs on {', '.join(APEX_DEVICES)}, not on {device}"
    results = []
    try:
        cls = _adapted(getattr(importlib.import_module("apex.optimizers"), name))
        for make in (cls, Lamb if name == "FusedLAMB" else ADAMW["reference"]):
            p = torch.nn.Parameter(torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.3, -0.2]], device=device))
            optimizer = make([{"params": [p], "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
            for sign in (1.0, -3.0):
                p.grad = sign * (p.detach().flip(1) + 0.2)
                optimizer.step()
            results.append(p.detach())
        # rounding of weights near 1 is about 1e-5 of this step
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    # whatever goes wrong inside somebody else's package means that it cannot be used
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return None, f"apex's {name} does not work here ({text[:200]})"
    return cls, ""


def apex_optimizer(name: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """apex's optimizer where `find_apex` finds it, with the state keys of this package's: checkpoints continue.

    It does not read an attribute `found_inf`: the CPU decides whether to step.

    Raises:
        UsageError: for a rate in a tensor.
    """
    if isinstance(options["lr"], Tensor):
        raise UsageError(
            f"backend: apex's {name} reads its rate on the CPU, so it cannot be in a tensor (train.cuda_graph); "
            "choose another implementation (system.backend)"
        )
    cls, _ = find_apex(name, groups[0]["params"][0].device.type)
    assert cls is not None
    return cls(groups, **options)


def _adapted(base: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    class Adapted(base):  # type: ignore[misc, valid-type]
        gates_on_device = False

        def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
            # the clipping of apex's LAMB, on by default, is switched off: the training loop clips
            more = {"max_grad_norm": float("inf")} if base.__name__ == "FusedLAMB" else {}
            super().__init__(groups, adam_w_mode=True, **more, **options)

        def zero_grad(self, set_to_none: bool = True) -> None:
            # apex's takes no argument
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            # apex counts per group; checkpoints hold what each parameter has
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                self.state[p].setdefault("step", torch.zeros((), dtype=torch.float32)).add_(1)
            return loss

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                group.pop("step", None)
                if counts := [int(self.state[p]["step"]) for p in group["params"] if "step" in self.state[p]]:
                    group["step"] = max(counts)

    Adapted.__name__ = Adapted.__qualname__ = base.__name__
    return Adapted


# ---- implementations by name (extrema_fast.ops.dispatch) ------------------------------------------


def _torch_adamw(groups: list[dict], **options: Any) -> torch.optim.AdamW:
    lr = options["lr"]
    capturable = isinstance(lr, Tensor) and lr.device.type != "cpu"
    return torch.optim.AdamW(groups, capturable=capturable, **options)


ADAMW: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fused": partial(_torch_adamw, fused=True),
    "reference": partial(_torch_adamw, foreach=False),
    "triton": AdamWEma,
    "apex": partial(apex_optimizer, "FusedAdam"),
}
LAMB: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "foreach": Lamb,
    "apex": partial(apex_optimizer, "FusedLAMB"),
}
