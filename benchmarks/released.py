"""*released*: the step as the paper's released code formulates it, written anew from its description.

Eager throughout. All N patches are embedded, then each view is gathered with an index expanded over the width
and the views are concatenated; attention forms q k^T, softmax and the product with v; the class token is
concatenated in front of the tokens and pooling projects keys and values of all n + 1 rows; the teacher moves
parameter by parameter into new storage; the loss is read by the host each step; AdamW is torch's default
(foreach). fp16 autocast with a loss scaler on a GPU, bf16 autocast on a CPU, or fp32.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extrema_fast.config import Config

from . import weights
from .stepper import Inputs, Stepper, decayed


def attention(layer: nn.Module, x: Tensor, heads: int) -> Tensor:
    """Self-attention by its formula; x [R, n, D]."""
    rows, n, width = x.shape
    qkv = layer.qkv(x).reshape(rows, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = torch.matmul(qkv[0], qkv[1].transpose(-1, -2)) * (width // heads) ** -0.5
    mixed = torch.matmul(scores.softmax(-1), qkv[2])
    return layer.proj(mixed.transpose(1, 2).reshape(rows, n, width))


def perceptron(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.fc2(F.gelu(layer.fc1(x)))


def dropped(branch: Tensor, rate: float, factor: Tensor | None) -> Tensor:
    """A residual branch under drop-path; factor [R]: given coins (0 or 1 / (1 - rate)), None: its own."""
    if factor is not None:
        return branch * factor.to(branch.dtype)[:, None, None]
    if rate == 0:
        return branch
    coins = torch.rand(branch.shape[0], 1, 1, dtype=branch.dtype, device=branch.device)
    return branch.div(1 - rate) * (coins + (1 - rate)).floor()


def pooled(block: nn.Module, cls: Tensor, tokens: Tensor, heads: int) -> Tensor:
    """Class attention over [cls; tokens] with projected keys and values; cls [R, 1, D]."""
    joined = block.norm1(torch.cat([cls, tokens], 1))
    rows, n, width = joined.shape
    shape = (rows, -1, heads, width // heads)
    q = block.attn.q(joined[:, :1]).reshape(shape).transpose(1, 2) * (width // heads) ** -0.5
    k = block.attn.k(joined).reshape(shape).transpose(1, 2)
    v = block.attn.v(joined).reshape(shape).transpose(1, 2)
    mixed = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).softmax(-1), v)
    cls = cls + block.gamma_1 * block.attn.proj(mixed.transpose(1, 2).reshape(rows, 1, width))
    return cls + block.gamma_2 * perceptron(block.mlp, block.norm2(cls))


def encode(
    net: nn.Module,
    images: Tensor,
    heads: int,
    keep: Tensor | None = None,
    rates: list[float] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Class token after the final norm.

    images [B, C, H, W];  keep [V, B, K] or None (all);  rates: drop-path rate per block, or scale [L, 2, R]
    returns [V*B, D]
    """
    x = net.patch_embed.proj(images).flatten(2).transpose(1, 2) + net.pos_embed
    if keep is not None:
        views = [torch.gather(x, 1, view.long()[:, :, None].repeat(1, 1, x.shape[2])) for view in keep]
        x = torch.cat(views)
    for i, block in enumerate(net.blocks):
        rate, given = rates[i] if rates else 0.0, (None, None) if scale is None else scale[i]
        x = x + dropped(attention(block.attn, block.norm1(x), heads), rate, given[0])
        x = x + dropped(perceptron(block.mlp, block.norm2(x)), rate, given[1])
    cls = net.cls_token.expand(x.shape[0], -1, -1)
    for block in net.blocks_token:
        cls = pooled(block, cls, x, heads)
    return net.norm(torch.cat([cls, x], 1))[:, 0]


class Released(Stepper):
    """The released formulation on one device."""

    def __init__(self, cfg: Config, device: torch.device, precision: str) -> None:
        super().__init__(cfg, device, precision)
        self.net = weights.student(cfg.model, cfg.head).to(device)
        self.follower = copy.deepcopy(weights.group(encoder=self.net.encoder, projector=self.net.projector))
        self.follower.requires_grad_(False)
        depth = cfg.model.shape[1]
        self.rates = [cfg.model.drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.optimizer = torch.optim.AdamW(
            decayed(self.student(), cfg.optim.weight_decay), lr=1.0, betas=cfg.optim.betas, eps=cfg.optim.eps
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def student(self) -> dict[str, nn.Parameter]:
        return dict(self.net.named_parameters())

    def teacher(self) -> dict[str, Tensor]:
        return dict(self.follower.named_parameters())

    def masks(self, batch: int) -> Tensor:
        """[V, B, K]: disjoint parts of one random permutation per image."""
        v, k, n = self.cfg.mask.views, self.cfg.num_keep, self.cfg.model.num_patches
        order = torch.argsort(torch.rand(batch, n, device=self.device), dim=1)
        return torch.stack([order[:, i * k : (i + 1) * k] for i in range(v)])

    @torch.no_grad()
    def move_teacher(self, momentum: float) -> None:
        student = self.student()
        for name, p in self.follower.named_parameters():
            p.data = p.data * momentum + student[name].data * (1 - momentum)

    def objective(self, inputs: Inputs) -> Tensor:
        """The loss, after moving the teacher."""
        x, y = self.pictures(inputs)
        heads = self.cfg.model.shape[2]
        keep = self.masks(len(x)) if inputs.keep is None else inputs.keep
        prediction = self.net.predictor(
            self.net.projector(encode(self.net.encoder, x, heads, keep, self.rates, inputs.scale))
        )
        with torch.no_grad():
            self.move_teacher(self.schedule.momentum(self.taken))
            target = F.normalize(self.follower.projector(encode(self.follower.encoder, y, heads)), dim=1)
        per_view = [
            (F.normalize(view, dim=1) - target).square().sum(1).mean()
            for view in prediction.chunk(self.cfg.mask.views)
        ]
        return sum(per_view) / len(per_view)

    def step(self, inputs: Inputs) -> None:
        with self.autocast():
            loss = self.objective(inputs)
        # the host waits for the device here, as the released loop does
        self.last_loss = loss.item()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norms = [p.grad.norm() for p in self.net.parameters() if p.grad is not None]
        self.grad_norm = torch.stack(norms).norm()
        for g in self.optimizer.param_groups:
            g["lr"] = self.schedule.lr(self.taken)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.taken += 1
