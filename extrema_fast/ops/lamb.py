"""LAMB and LARS, which scale each layer's step by the norm of its weights; AdamW over lists of tensors.

For weights x, gradient g, weight decay d and rate lr, per parameter tensor:

    LAMB   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2          arXiv 1904.00962, algorithm 2, phi(z) = z
           u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + d x;  x = x - lr |x| / |u| u
    LARS   u = trust |x| / (|g| + d |x|) (g + d x);  b = mu b + u;  x = x - lr b        arXiv 1708.03888

The ratio is 1 in groups without weight decay (biases, norms, class token) and where a norm is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """LAMB over dense fp32 (fp64 for tests) parameters of one device.

    params   tensors or groups; `lr` may be a 0-d tensor on their device
    foreach  torch's multi-tensor kernels; False: the formula, one tensor at a time

    State: `step` (0-d fp32), `exp_avg`, `exp_avg_sq`. The host reads nothing, so a step can be recorded in a
    CUDA graph. A 0-d tensor in the attribute `found_inf` gates a step: where it is not 0, weights and state
    keep their bits, whatever the gradients are.

    raises ValueError for parameters and gradients it cannot update
    """

    gates_on_device = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        foreach: bool = True,
    ) -> None:
        # `capturable` makes torch restore step counts to the parameters' device
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "capturable": True}
        super().__init__(params, defaults)
        self.foreach = foreach

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, for contiguous fp32 (or fp64) parameters."""
        super().add_param_group(param_group)
        _check(self)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter with a gradient; returns the closure's loss."""
        loss = _loss(closure)
        for group in self.param_groups:
            params, grads = _with_grad(group)
            if not params:
                continue
            for p in params:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            moments = [[self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step")]
            update = _lamb_foreach if self.foreach else _lamb_plain
            update(params, grads, *moments, group, _flag(self))
        return loss


class Lars(torch.optim.Optimizer):
    """LARS: momentum descent on gradients scaled per tensor; parameters, `lr` and gate as `Lamb`.

    momentum  mu, 0 for none;  trust: the trust coefficient
    State: `momentum_buffer`
    """

    gates_on_device = True

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, for contiguous fp32 (or fp64) parameters."""
        super().add_param_group(param_group)
        _check(self)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter with a gradient; returns the closure's loss."""
        loss = _loss(closure)
        for group in self.param_groups:
            params, updates = _with_grad(group)
            if not params:
                continue
            decay, mu = group["weight_decay"], group["momentum"]
            if decay:
                x, g = (torch.stack(torch._foreach_norm(t)) for t in (params, updates))
                ratio = torch.where((x > 0) & (g > 0), group["trust"] * x / (g + decay * x), 1.0)
                updates = torch._foreach_add(updates, params, alpha=decay)
                torch._foreach_mul_(updates, list(ratio.unbind()))
            buffers = []
            for p in params if mu else ():
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffers.append(state["momentum_buffer"])
            _descend(params, updates, buffers, mu, group["lr"], _flag(self))
        return loss


class ForeachAdamW(torch.optim.AdamW):
    """torch's AdamW over lists of tensors, without a fused kernel; the host decides whether to step."""

    gates_on_device = False

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, **options: Any) -> None:
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        start = lr if on_device else float(lr)
        super().__init__(params, start, foreach=True, capturable=on_device, **options)
        for group in self.param_groups:
            group["lr"] = lr

    def step(self, closure: Any = None) -> Any:
        """As torch's."""
        # here torch wants a number on a CPU, where reading a tensor costs nothing
        rates = [(g, g["lr"]) for g in self.param_groups if not g["capturable"]]
        for group, lr in rates:
            group["lr"] = float(lr)
        try:
            return super().step(closure)
        finally:
            for group, lr in rates:
                group["lr"] = lr


# ---- parts ----------------------------------------------------------------------------------------


def _check(optimizer: torch.optim.Optimizer) -> None:
    for p in optimizer.param_groups[-1]["params"]:
        if p.dtype not in (torch.float32, torch.float64) or not p.is_contiguous():
            optimizer.param_groups.pop()
            raise ValueError(
                f"params: expected contiguous float32, got {list(p.shape)} {p.dtype} with strides {p.stride()}"
            )


def _loss(closure: Any) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _flag(optimizer: torch.optim.Optimizer) -> Tensor | None:
    found = getattr(optimizer, "found_inf", None)
    # the kernels read fp32, and compare with 1
    return None if found is None else (found != 0).float()


def _with_grad(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    params = [p for p in group["params"] if p.grad is not None]
    for p in params:
        if p.grad.layout != torch.strided:
            raise ValueError(f"grad of {list(p.shape)}: expected dense, got {p.grad.layout}")
    # the kernels want the strides of the parameter
    grads = [
        g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p in params for g in (p.grad,)
    ]
    return params, grads


def _zeros_like(params: list[Tensor]) -> list[Tensor]:
    """Zeros of their shapes in one allocation, each aligned for vector loads."""
    sizes = [-(-p.numel() // 64) * 64 for p in params]
    flat = torch.zeros(sum(sizes), dtype=params[0].dtype, device=params[0].device)
    parts = flat.split(sizes)
    return [part[: p.numel()].view(p.shape) for part, p in zip(parts, params, strict=True)]


def _descend(
    params: list[Tensor],
    updates: list[Tensor],
    buffers: list[Tensor],
    mu: float,
    lr: float | Tensor,
    found_inf: Tensor | None,
    *,
    negated: bool = False,
) -> None:
    """`buffer = mu buffer + update; x -= lr buffer`, or `x -= lr update` without buffers; gated.

    negated: the updates have the other sign
    """
    torch._fused_sgd_(
        params, updates, buffers, weight_decay=0.0, momentum=mu, lr=lr, dampening=0.0, nesterov=False,
        maximize=negated, is_first_step=False, grad_scale=None, found_inf=found_inf,
    )  # fmt: skip


def _lamb_foreach(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
    found_inf: Tensor | None,
) -> None:
    beta1, beta2 = group["betas"]
    # torch's fused Adam with rate 1 takes zeros to the negated update: one pass over the moments, and where
    # `found_inf` is 1 it leaves everything alone
    updates = _zeros_like(params)
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        updates, grads, exp_avg, exp_avg_sq, [], steps, amsgrad=False, lr=1.0, beta1=beta1, beta2=beta2,
        weight_decay=0.0, eps=group["eps"], maximize=False, grad_scale=None, found_inf=found_inf,
    )  # fmt: skip
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))
    if group["weight_decay"]:
        torch._foreach_add_(updates, params, alpha=-group["weight_decay"])
        x, u = (torch.stack(torch._foreach_norm(t)) for t in (params, updates))
        torch._foreach_mul_(updates, list(_ratio(x, u).unbind()))
    _descend(params, updates, [], 0.0, group["lr"], found_inf, negated=True)


def _lamb_plain(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
    found_inf: Tensor | None,
) -> None:
    (beta1, beta2), decay = group["betas"], group["weight_decay"]
    for p, g, m, v, t in zip(params, grads, exp_avg, exp_avg_sq, steps, strict=True):
        new_t = t + 1
        new_m = beta1 * m + (1 - beta1) * g
        new_v = beta2 * v + (1 - beta2) * g.square()
        # in fp64: 1 - beta2^t loses half of its digits in fp32
        first, second = (1 - beta ** new_t.double() for beta in (beta1, beta2))
        update = new_m / first / ((new_v / second).sqrt() + group["eps"])
        if decay:
            update = update + decay * p
            update = _ratio(p.norm(), update.norm()) * update
        for old, new in ((p, p - group["lr"] * update), (m, new_m), (v, new_v), (t, new_t)):
            old.copy_(new if found_inf is None else torch.where(found_inf > 0, old, new))


def _ratio(x: Tensor, update: Tensor) -> Tensor:
    return torch.where((x > 0) & (update > 0), x / update, 1.0)
