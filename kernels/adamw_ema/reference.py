"""Plain PyTorch definition of adamw_ema: AdamW, then the teacher's move, over lists of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

# columns of a group's row in the table of settings
LR, BETA1, BETA2, EPS, DECAY = range(5)


def adamw_ema_reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    teacher: list[Tensor | None],
    shadow: list[Tensor | None],
    teacher_shadow: list[Tensor | None],
    group: list[int],
    settings: Tensor,
    factor: Tensor,
    skip: Tensor,
    weight: Tensor,
) -> None:
    """In place, for every tensor i, unless `skip` is 1 (then nothing changes, the teacher neither):

    g = factor grad;  p -= lr decay p;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;  t += 1
    p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps);  teacher += weight (p - teacher)
    shadow = p and teacher_shadow = teacher in their own dtype

    settings: [groups, 5] float64: lr, beta1, beta2, eps, weight decay;  factor, skip, weight: 0-d
    """
    go = 1 - skip.double()
    for i, p in enumerate(params):
        lr, beta1, beta2, eps, decay = settings[group[i]]
        # where the step is skipped, gradients may be NaN, which no factor of 0 removes
        keep = go.bool()
        g = grads[i].to(p.dtype) * factor.to(p.dtype)
        t = steps[i] + 1
        fresh = p - (lr * decay).to(p) * p
        m = exp_avg[i] + (1 - beta1).to(p) * (g - exp_avg[i])
        v = beta2.to(p) * exp_avg_sq[i] + (1 - beta2).to(p) * g * g
        rate = (lr / (1 - beta1 ** t.double())).to(p)
        second = (1 - beta2 ** t.double()).to(p)
        fresh = fresh - rate * m / ((v / second).sqrt() + eps.to(p))
        p.copy_(torch.where(keep, fresh, p))
        exp_avg[i].copy_(torch.where(keep, m, exp_avg[i]))
        exp_avg_sq[i].copy_(torch.where(keep, v, exp_avg_sq[i]))
        steps[i].add_(go.to(steps[i].dtype))
        e = teacher[i]
        if e is not None:
            e.copy_(torch.where(keep, e + weight.to(e) * (p - e), e))
            if teacher_shadow[i] is not None:
                teacher_shadow[i].copy_(e)
        if shadow[i] is not None:
            shadow[i].copy_(p)
