"""*strong*: the same maths as the product in plain PyTorch, as well as plain PyTorch can, written independently.

bf16 autocast or fp32; kept patches are gathered before they are embedded; pooling with absorbed key and value
projections; torch's fused attention or the explicit formula; student, teacher and loss compiled as one full
graph; fused AdamW; the teacher moves by one foreach operation; the host never waits. No gradient norm, no
check for bad steps: less work than the product does.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extrema_fast.config import Config

from . import weights
from .stepper import Inputs, Stepper, decayed


def self_attention(layer: nn.Module, x: Tensor, heads: int, plain: bool) -> Tensor:
    """x [R, n, D]; plain: explicit formula instead of scaled_dot_product_attention."""
    r, n, width = x.shape
    q, k, v = layer.qkv(x).view(r, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    if plain:
        scores = (q * (width // heads) ** -0.5) @ k.mT
        out = scores.float().softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return layer.proj(out.transpose(1, 2).reshape(r, n, width))


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.fc2(F.gelu(layer.fc1(x)))


def trunk(blocks: nn.ModuleList, x: Tensor, heads: int, plain: bool, scale: Tensor | None = None) -> Tensor:
    """x [R, n, D]; scale [L, 2, R] drop-path factors or None."""
    if scale is not None:
        scale = scale.to(x.dtype)[..., None, None]
    for i, block in enumerate(blocks):
        branch = self_attention(block.attn, block.norm1(x), heads, plain)
        x = x + (branch if scale is None else scale[i, 0] * branch)
        branch = feed_forward(block.mlp, block.norm2(x))
        x = x + (branch if scale is None else scale[i, 1] * branch)
    return x


def pool(net: nn.Module, tokens: Tensor, heads: int) -> Tensor:
    """Class token before the final norm [R, D]; neither keys nor values of the tokens are formed.

    The key bias adds the same number to all scores of a head, so it is left out: its gradient is None here.
    """
    r, _, width = tokens.shape
    d = width // heads
    cls = net.cls_token[0].expand(r, -1)
    for block in net.blocks_token:
        a = block.attn
        u, own = block.norm1(tokens), block.norm1(cls)
        q = (a.q(own) * d**-0.5).view(r, heads, d)
        # the key projection moves to the query: [R, H, D]
        asked = torch.einsum("rhd,hdc->rhc", q, a.k.weight.view(heads, d, width).to(q.dtype))
        scores = torch.cat([asked @ own[:, :, None].to(asked.dtype), asked @ u.mT.to(asked.dtype)], -1)
        p = scores.float().softmax(-1).to(u.dtype)
        mixed = p[..., :1] * own[:, None].to(p.dtype) + p[..., 1:] @ u
        value = torch.einsum("rhc,hdc->rhd", mixed, a.v.weight.view(heads, d, width).to(mixed.dtype))
        out = a.proj(value.reshape(r, width) + a.v.bias.to(value.dtype))
        cls = cls + block.gamma_1 * out
        cls = cls + block.gamma_2 * feed_forward(block.mlp, block.norm2(cls))
    return cls


def embed(net: nn.Module, images: Tensor, keep: Tensor | None) -> Tensor:
    """images [B, C, H, W], keep [V, B, K] or None -> tokens with positions [V*B, K, D]."""
    kernel = net.patch_embed.proj
    b, c, height, width = images.shape
    side = kernel.weight.shape[-1]
    patches = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
    patches = patches.reshape(b, (height // side) * (width // side), c * side * side)
    position = net.pos_embed[0]
    if keep is not None:
        keep = keep.long()
        patches = patches[torch.arange(b, device=images.device)[None, :, None], keep].flatten(0, 1)
        position = position[keep.flatten(0, 1)]
    tokens = F.linear(patches, kernel.weight.flatten(1), kernel.bias)
    return tokens + position.to(tokens.dtype)


class Strong(Stepper):
    """The best plain PyTorch does.

    compile          student, teacher and loss as one graph
    plain_attention  the explicit formula instead of torch's fused attention
    """

    def __init__(
        self,
        cfg: Config,
        device: torch.device,
        precision: str,
        compile: bool = True,
        plain_attention: bool = False,
    ) -> None:
        super().__init__(cfg, device, precision)
        self.plain = plain_attention
        self.net = weights.student(cfg.model, cfg.head).to(device)
        self.follower = copy.deepcopy(weights.group(encoder=self.net.encoder, projector=self.net.projector))
        self.follower.requires_grad_(False)
        student = self.student()
        self.pairs = [(t, student[name]) for name, t in self.teacher().items()]
        self.optimizer = torch.optim.AdamW(
            decayed(student, cfg.optim.weight_decay),
            lr=1.0,
            betas=cfg.optim.betas,
            eps=cfg.optim.eps,
            fused=True,
        )
        self.objective = (
            torch.compile(self.loss_of, fullgraph=True, dynamic=False) if compile else self.loss_of
        )

    def student(self) -> dict[str, nn.Parameter]:
        return dict(self.net.named_parameters())

    def teacher(self) -> dict[str, Tensor]:
        return dict(self.follower.named_parameters())

    def loss_of(self, x: Tensor, y: Tensor, keep: Tensor, scale: Tensor | None) -> Tensor:
        """Mean of |q - k|^2 over views and images; x, y [B, C, H, W] normalised."""
        heads, plain = self.cfg.model.shape[2], self.plain
        with self.autocast():
            with torch.no_grad():
                net = self.follower
                seen = trunk(net.encoder.blocks, embed(net.encoder, y, None), heads, plain)
                target = net.projector(net.encoder.norm(pool(net.encoder, seen, heads)))
            net = self.net
            seen = trunk(net.encoder.blocks, embed(net.encoder, x, keep), heads, plain, scale)
            q = net.predictor(net.projector(net.encoder.norm(pool(net.encoder, seen, heads))))
        q = F.normalize(q.float(), dim=-1).view(keep.shape[0], x.shape[0], -1)
        return (q - F.normalize(target.float(), dim=-1)).square().sum(-1).mean()

    def coins(self, batch: int) -> tuple[Tensor, Tensor | None]:
        """Own masks [V, B, K] and drop-path factors [L, 2, V*B] (None without drop-path)."""
        mask, model, k = self.cfg.mask, self.cfg.model, self.cfg.num_keep
        order = torch.rand(batch, model.num_patches, device=self.device).argsort(1)[:, : mask.views * k]
        keep = order.view(batch, mask.views, k).transpose(0, 1)
        if not model.drop_path:
            return keep, None
        depth = model.shape[1]
        kept = 1 - torch.linspace(0, model.drop_path, depth, device=self.device)[:, None, None]
        return keep, (torch.rand(depth, 2, mask.views * batch, device=self.device) < kept) / kept

    def step(self, inputs: Inputs) -> None:
        x, y = self.pictures(inputs)
        own = self.coins(len(x)) if inputs.keep is None else (inputs.keep, inputs.scale)
        with torch.no_grad():
            teachers, students = zip(*self.pairs, strict=True)
            torch._foreach_lerp_(teachers, students, 1 - self.schedule.momentum(self.taken))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective(x, y, *own)
        loss.backward()
        for g in self.optimizer.param_groups:
            g["lr"] = self.schedule.lr(self.taken)
        self.optimizer.step()
        self.last_loss = loss.detach()
        self.taken += 1
