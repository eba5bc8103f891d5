"""BYOL and InfoNCE losses over views (method.md section 4), in fp32 (or fp64) whatever the inputs."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """`mean_{v,i} |q_vi - k_i|^2` of L2-normalised vectors, = mean(2 - 2 cos).

    prediction: [V*b, d] view-major;  target: [b, d], no gradient
    returns     scalar
    """
    b, d = target.shape
    q = _unit(prediction).view(-1, b, d)
    return (q - _unit(target.detach())).square().sum(-1).mean()


def infonce_loss(
    prediction: Tensor, targets: Tensor, temperature: float, images: int, offset: int = 0
) -> Tensor:
    """`mean_{v,i} -2T log softmax_j(q_vi . k_j / T)[offset + i]` over the targets of all images of the step.

    prediction: [V*b, d] view-major, b = `images`
    targets:    [M, d], all images of the step on all processes (`gather_targets`), no gradient
    offset      row of this part's first image in `targets`
    returns     scalar
    """
    q = _unit(prediction)
    # autocast would turn this product, the softmax's input, into bf16
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ _unit(targets.detach()).T / temperature
    label = torch.arange(images, device=q.device) + offset
    return 2 * temperature * F.cross_entropy(logits, label.repeat(q.shape[0] // images))


def gather_targets(target: Tensor) -> tuple[Tensor, int]:
    """Targets of all processes, without gradient.

    target:  [b, d], the same b everywhere
    returns  ([world * b, d] in rank order, row of this process's first image)
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return target, 0
    out = [torch.empty_like(target) for _ in range(dist.get_world_size())]
    dist.all_gather(out, target.detach().contiguous())
    return torch.cat(out), dist.get_rank() * target.shape[0]
