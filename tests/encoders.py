"""What the tests of the encoder share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extrema_fast.models.encoder import Encoder


def randomized(encoder: Encoder) -> Encoder:
    """The encoder in eval mode with every parameter random, so that none can be left out unnoticed."""
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return encoder.eval()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float | None = None) -> bool:
    """Same shape, and equal up to `tolerance` (default: rounding) times the largest value of `b`, at least 1."""
    a, b = a.detach(), b.detach()
    if tolerance is None:
        tolerance = 1e-11 if b.dtype == torch.float64 else 2e-6
    largest = float(b.abs().max()) if b.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance * max(1.0, largest))


class Lora(nn.Module):
    """A layer with a low-rank addition, in the layer's place; no attribute of the layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Doubled(Tensor):
    """A weight whose product is not the plain one, as quantized weights are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return (2 * out).as_subclass(Tensor) if function in (F.linear, F.layer_norm, F.conv2d) else out


def by_modules(encoder: Encoder, x: Tensor, keep: Tensor | None) -> Tensor:
    """[cls; patches] after the norm: all patches embedded, the kept ones gathered, every part called."""

    def attend(q, k, v, heads):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def mlp(part, x):
        return part.fc2(F.gelu(part.fc1(x)))

    x = encoder.patch_embed(x) + encoder.pos_embed
    x = x if keep is None else x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
    for block in encoder.blocks:
        a = block.attn
        x = x + a.proj(attend(*a.qkv(block.norm1(x)).chunk(3, -1), a.heads))
        x = x + mlp(block.mlp, block.norm2(x))
    cls = encoder.cls_token.expand(len(x), -1, -1)
    for block in encoder.blocks_token:
        a, u = block.attn, block.norm1(torch.cat([cls, x], 1))
        cls = cls + block.gamma_1 * a.proj(attend(a.q(u[:, :1]), a.k(u), a.v(u), a.heads))
        cls = cls + block.gamma_2 * mlp(block.mlp, block.norm2(cls))
    return encoder.norm(torch.cat([cls, x], 1))


def encoded(encoder: Encoder, x: Tensor, keep: Tensor | None) -> Tensor:
    """The same, as `encode` computes it."""
    out = encoder.encode(x, keep)
    return torch.cat([out.cls[:, None], out.patches], 1)


def assert_same(encoder: Encoder, keep: Tensor | None) -> None:
    """Outputs and all gradients equal those of module calls."""
    h, w = encoder.img_size
    x = torch.randn(2, 3, h, w, dtype=torch.float64).requires_grad_()
    named = {"images": x} | {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    found = []
    for run in (encoded, by_modules):
        out = run(encoder, x, keep)
        # keys' biases move every score of a row alike: no gradient but rounding
        grads = torch.autograd.grad(out.sin().sum(), list(named.values()), allow_unused=True)
        found.append((out, grads))
    assert close(found[0][0], found[1][0], 1e-10)
    for name, a, b in zip(named, found[0][1], found[1][1], strict=True):
        assert (a is None) == (b is None), name
        assert a is None or close(a, b, 1e-9), name
