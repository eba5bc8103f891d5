"""LAMB and LARS take the steps of timm's.

Covers: four steps in float64 with a changing rate, groups with and without weight decay, odd shapes.
"""

from __future__ import annotations

import pytest
import torch

from extrema_fast.ops.optimizers import Lamb, Lars

timm_optim = pytest.importorskip("timm.optim")

OURS = {
    "lamb": lambda groups: Lamb(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8),
    "lars": lambda groups: Lars(groups, lr=0.0, momentum=0.9),
}
THEIRS = {
    # without its clipping
    "lamb": lambda groups: timm_optim.Lamb(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, max_grad_norm=None),
    "lars": lambda groups: timm_optim.Lars(groups, lr=0.0, momentum=0.9, trust_coeff=1e-3),
}


@pytest.mark.parametrize("name", OURS)
def test_same_steps_as_timm(name):
    results = []
    for make in (OURS[name], THEIRS[name]):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s).double()) for s in ((49, 39), (1, 19), (7,), (1, 1, 5))]
        optimizer = make(
            [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]
        )
        for lr in (0.01, 0.3, 0.2, 0.05):
            for p in params:
                p.grad = torch.randn(p.shape).double() + p.detach()
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        # timm adds 1e-8 to the denominator of LARS
        torch.testing.assert_close(a, b, rtol=1e-7 if name == "lars" else 1e-12, atol=1e-12)
