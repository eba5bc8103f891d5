"""The layers of the encoder: patch embedding, trunk block, class-attention block; checks of image arguments.

Parameter names and shapes are those of the released checkpoints (`vits.py` of microsoft/ExtreMA).
Shape letters as in `encoder.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops import dispatch as ops
from ..ops import trunk
from ..ops.linear import Linear, autocasts, linear
from .positions import resample_patch_kernel

NORM_EPS = 1e-6


def pair(size: int | Sequence[int], name: str = "img_size") -> tuple[int, int]:
    """(height, width) of a square side or of a pair; raises UsageError naming `name`."""
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(s, int) for s in sides):
        raise UsageError(f"{name}: expected pixels or (height, width), got {size!r}")
    return sides


def square_patch(size: int | Sequence[int]) -> int:
    """The side of a patch given as pixels or as a pair; raises UsageError where it is not square."""
    height, width = pair(size, "patch_size")
    if height != width or height < 1:
        raise UsageError(f"patch_size: patches are square, got {height} x {width}")
    return height


def check_images(images: Tensor, chans: int | None = None, dtype: torch.dtype | None = None) -> None:
    """Raises UsageError unless `images` is [B, C, H, W] of `chans` channels, in `dtype` except under autocast."""
    if not isinstance(images, Tensor):
        raise UsageError(
            f"images: expected a tensor [B, C, H, W], got {type(images).__name__}; use torch.as_tensor(images)"
        )
    if images.dim() != 4 or chans not in (None, images.shape[1]):
        raise UsageError(
            f"images: expected [B, {chans or 'C'}, H, W], got {list(images.shape)}"
            + ("; a single image needs images[None]" if images.dim() == 3 else "")
        )
    if not images.is_floating_point():
        raise UsageError(f"images: expected normalized floats, got {images.dtype}; see encoder.preprocess()")
    if dtype not in (None, images.dtype) and not autocasts(images.device.type):
        raise UsageError(f"images: expected {dtype} as the weights, got {images.dtype}; or use autocast")


def check_sides(size: Sequence[int], patch: int, name: str = "images") -> tuple[int, int]:
    """The grid of an image of (height, width); raises UsageError, with the nearest sizes, for indivisible sides."""
    for side, pixels in zip(("height", "width"), size, strict=True):
        if pixels < patch or pixels % patch:
            below = max(patch, pixels // patch * patch)
            raise UsageError(
                f"{name}: {side} {pixels} is not a multiple of the patch size {patch}; "
                f"use {below} or {below + patch}"
            )
    return size[0] // patch, size[1] // patch


class PatchEmbed(nn.Module):
    """The patch convolution (stride = kernel), and the input size it is meant for, with the attributes of timm's class.

    The encoder reads `proj` and applies it to kept patches only.
    """

    def __init__(self, in_chans: int, width: int, patch: int, img_size: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size, self.img_size = (patch, patch), img_size
        self.proj = nn.Conv2d(in_chans, width, patch, patch)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.dynamic_feat_size(self.img_size)

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of an image of (height, width)."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
    ) -> None:
        """Sets another image size or patch size (the kernel is resampled); after an error nothing is changed.

        `Encoder.set_input_size` calls this and also sets the positions.
        """
        size = self.img_size if img_size is None else pair(img_size)
        patch = self.patch_size if patch_size is None else (square_patch(patch_size),) * 2
        check_sides(size, patch[0], "img_size")
        if patch != self.patch_size:
            old = self.proj
            kernel = resample_patch_kernel(old.weight.detach(), patch[0])
            old.weight = nn.Parameter(kernel, requires_grad=old.weight.requires_grad)
            old.kernel_size = old.stride = patch
        self.img_size, self.patch_size = size, patch

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, D], without positions."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; `backend` names its implementation (`Encoder.set_attention`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.backend = "auto"
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None, recompute_norm: bool = False) -> Tensor:
        """Attention of `norm(x)`: [R, n, D] -> [R, n, D]; the backward pass may recompute `norm(x)`."""
        return self.proj(self.core(linear(x, self.qkv, norm, recompute_norm)))

    def core(self, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention between the projections: [R, n, 3 D] -> [R, n, D]; `bias` as of `ops.attention`."""
        r, n, width = qkv.shape
        qkv = qkv.view(r, n, 3, self.heads, width // (3 * self.heads))
        return ops.attention(qkv, self.backend, bias).reshape(r, n, width // 3)


class Mlp(nn.Module):
    """D -> hidden -> D with exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm | None = None, recompute: frozenset[str] = frozenset()
    ) -> Tensor:
        """MLP of `norm(x)`: [..., D] -> [..., D]; `recompute` as of `Block`."""
        hidden = linear(x, self.fc1, norm, "norm" in recompute)
        return linear(hidden, self.fc2, "gelu", "gelu" in recompute)


class Block(nn.Module):
    """Pre-norm trunk block: `x += s0 SA(LN x)`, `x += s1 MLP(LN x)`, no layer scale.

    `recompute` names what the backward pass recomputes, of "norm" and "gelu" (`Encoder.set_recompute`).
    """

    recompute: frozenset[str] = frozenset()

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, path: Tensor | None = None) -> Tensor:
        """x [R, n, D]; path [2, R]: drop-path factors s0, s1 of each row, or None."""
        if trunk.fuses(x) and self._is_stock():
            return self._fused(x, path)
        s0, s1 = (None, None) if path is None else path.to(x.dtype)[:, :, None, None]
        x = x + _scaled(self.attn(x, self.norm1, "norm" in self.recompute), s0)
        return x + _scaled(self.mlp(x, self.norm2, self.recompute), s1)

    def _fused(self, x: Tensor, path: Tensor | None) -> Tensor:
        """The same with each residual and the norm behind it in one pass (`ops.trunk`)."""
        s0, s1 = (None, None) if path is None else path.unbind()
        attn, fc1, fc2, recompute = self.attn, self.mlp.fc1, self.mlp.fc2, "norm" in self.recompute
        x, u, source = trunk.residual_norm(x, self.norm1, recompute=recompute)
        # the bias of q, k, v gets its gradient from the attention
        qkv = trunk.project(u, attn.qkv, source, attn.qkv.bias.detach())
        out = attn.core(qkv, attn.qkv.bias)
        branch = trunk.project(out, attn.proj, (), None)
        x, u, source = trunk.residual_norm(x, self.norm2, branch, attn.proj.bias, s0, recompute)
        branch = trunk.mlp(u, fc1, fc2, source, "gelu" in self.recompute)
        return trunk.residual(x, branch, fc2.bias, s1)

    def _is_stock(self) -> bool:
        """Whether calling each part would do no more than the formula of its class, with all of its parameters."""
        attn, mlp = self.attn, self.mlp
        if not (type(attn) is Attention and type(mlp) is Mlp):
            return False
        norms, layers = (self.norm1, self.norm2), (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        return (
            all(type(m) is nn.LayerNorm and m.weight is not None and m.bias is not None for m in norms)
            and all(type(m) is Linear and m.bias is not None for m in layers)
            and not any(_is_changed(m) for m in (attn, mlp, *norms, *layers))
        )


def _is_changed(module: nn.Module) -> bool:
    own = module.__dict__
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in own or any(own[name] for name in hooks)


def _scaled(branch: Tensor, factor: Tensor | None) -> Tensor:
    return branch if factor is None else factor * branch


class PoolAttention(nn.Module):
    """The projections of a class-attention block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = Linear(width, width)
        self.k = Linear(width, width)
        self.v = Linear(width, width)
        self.proj = Linear(width, width)


class PoolBlock(nn.Module):
    """Class-attention block: `c += g1 Wo att([c; x])`, `c += g2 MLP(LN c)`; the tokens stay as they are."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, layer_scale: float) -> None:
        super().__init__()
        self.heads = heads
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale))
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = PoolAttention(width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(
        self,
        cls: Tensor,
        tokens: Tensor,
        stats: tuple[Tensor, Tensor] | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """cls [R, D], tokens [R, n, D] -> (class token [R, D], attention [R, H, 1 + n] or None, `stats`).

        `stats`: LayerNorm statistics of the tokens, which are the same for every block.
        """
        a = self.attn
        weights = ops.PoolWeights(
            self.norm1.weight,
            self.norm1.bias,
            a.q.weight,
            a.q.bias,
            a.k.weight,
            a.k.bias,
            a.v.weight,
            a.v.bias,
            a.proj.weight,
            a.proj.bias,
        )
        out, attention, stats = ops.attention_pool(
            tokens, cls, weights, self.heads, NORM_EPS, stats=stats, return_weights=return_weights
        )
        cls = cls + self.gamma_1 * out
        return cls + self.gamma_2 * self.mlp(cls, self.norm2), attention, stats
