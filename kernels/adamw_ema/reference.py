"""Plain PyTorch definition of adamw_ema: AdamW, then the EMA update of the teacher, over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# the first row of the table of settings; every further row is a group's
INV_SCALE, WEIGHT, FOUND, MAX_NORM = range(4)


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
    outcome: Tensor,
    has_norm: bool,
    has_flag: bool,
) -> None:
    """One step in place, for every tensor, unless the step is bad: then nothing changes, the teacher neither.

    g = factor grad;  p -= lr decay p;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;  t += 1
    p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps);  teacher += weight (p - teacher)
    shadow = p and teacher_shadow = teacher in their own dtype

    Moments m and v, steps t (0-d fp32), teacher (None: has none) and low-precision copies in any dtype are updated;
    group holds each parameter's row of settings. settings [1 + groups, 5] float64: 1 / loss scale, weight, flag,
    max_norm; lr, beta1, beta2, eps, decay. outcome [2] float64 is written: the gradients' norm, if it is needed (then
    it is clipped to max_norm); 1 if the step was bad: by the flag, or with a norm that is not finite.
    """
    factor, norm = settings[0, INV_SCALE], outcome.new_full((), float("nan"))
    if has_norm:
        norm = (
            torch.stack(torch._foreach_norm(grads, 2, dtype=params[0].dtype)).double().norm() * factor.abs()
        )
        factor = factor * (settings[0, MAX_NORM] / (norm + 1e-6)).clamp(max=1.0)
    # without a flag it is 0
    bad = settings[0, FOUND] != 0
    if has_norm:
        bad = bad | ~norm.isfinite()
    outcome[0], outcome[1] = norm, bad

    def put(old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        # a NaN gradient cannot be multiplied away, so the old value is chosen, on the device
        for x, y in zip(old, new):
            x.copy_(torch.where(bad, x, y.to(x.dtype)))

    for k in sorted(set(group)):
        own = [i for i, of in enumerate(group) if of == k]
        p, m, v, ticks = ([x[i] for i in own] for x in (params, exp_avg, exp_avg_sq, steps))
        dtype = p[0].dtype
        lr, beta1, beta2, eps, decay = settings[1 + k].unbind()
        g = torch._foreach_mul([grads[i].to(dtype) for i in own], factor.to(dtype))
        t = torch.stack(ticks).double() + 1
        rate = (lr / (1 - beta1**t)).to(dtype).unbind()
        root = (1 / (1 - beta2**t).sqrt()).to(dtype).unbind()
        fresh = torch._foreach_mul(p, (1 - lr * decay).to(dtype))
        new_m = torch._foreach_mul(torch._foreach_sub(g, m), (1 - beta1).to(dtype))
        torch._foreach_add_(new_m, m)
        new_v = torch._foreach_mul(torch._foreach_mul(g, g), (1 - beta2).to(dtype))
        torch._foreach_add_(new_v, torch._foreach_mul(v, beta2.to(dtype)))
        below = torch._foreach_mul(torch._foreach_sqrt(new_v), root)
        torch._foreach_add_(below, eps.to(dtype))
        torch._foreach_sub_(fresh, torch._foreach_div(torch._foreach_mul(new_m, rate), below))
        for old, new in ((p, fresh), (m, new_m), (v, new_v), (ticks, torch._foreach_add(ticks, 1))):
            put(old, new)
        weight = settings[0, WEIGHT].to(dtype)
        for i in own:
            e, low, e_low = teacher[i], shadow[i], teacher_shadow[i]
            if e is not None:
                put([e], [torch.lerp(e, params[i], weight)])
            if low is not None:
                put([low], [params[i]])
            if e is not None and e_low is not None:
                put([e_low], [e])
