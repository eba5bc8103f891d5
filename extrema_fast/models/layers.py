"""The layers of the encoder: patch embedding, trunk block, class-attention block; checks of image arguments.

Fast paths read the weights of submodules directly. A submodule that is not stock (`ops.stock`) is called as a module
instead, on the input it would have in the plain model, and its output is checked.

Parameter names and shapes match the released checkpoints (`vits.py` of microsoft/ExtreMA).
Shape letters as in `encoder.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops import dispatch as ops
from ..ops import trunk
from ..ops.linear import autocasts, linear
from ..ops.stock import PLAIN, is_stock, reason
from .positions import resample_patch_kernel

NORM_EPS = 1e-6


def pair(size: int | Sequence[int], name: str = "img_size") -> tuple[int, int]:
    """(height, width) of a square side or of a pair; raises UsageError naming `name`."""
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(s, int) for s in sides):
        raise UsageError(f"{name}: expected pixels or (height, width), got {size!r}")
    return sides


def square_patch(size: int | Sequence[int]) -> int:
    """The side of a patch given as pixels or as a pair; raises UsageError if it is not square."""
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
    # compiled code cannot tell whether a tuple contains a dynamic size
    if images.dim() != 4 or (chans is not None and images.shape[1] != chans):
        raise UsageError(
            f"images: expected [B, {chans or 'C'}, H, W], got {list(images.shape)}"
            + ("; a single image needs images[None]" if images.dim() == 3 else "")
        )
    if not images.is_floating_point():
        raise UsageError(f"images: expected normalized floats, got {images.dtype}; see encoder.preprocess()")
    if dtype not in (None, images.dtype) and not autocasts(images.device.type):
        raise UsageError(
            f"images: expected {dtype}, the dtype of the weights, got {images.dtype}; or use autocast"
        )


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


def whiten_kernel(kernel: Tensor) -> Tensor:
    """Whitens a patch kernel: the principal directions of natural image patches get about equal variance.

    Neighboring pixels are nearly equal, so tokens of a random kernel differ mostly by brightness, and edges and colors
    must be learned before they matter. The kernel is multiplied by (C + s I)^-1/2, where s is a thousandth of the
    largest eigenvalue of C, an assumed covariance of images: pixels at a distance of a quarter of the patch side have
    correlation exp(-1/10), channels 0.9. No image is read, so the initial weights depend on the seed only.

    Args:
        kernel: [D, C, P, P].

    Returns:
        [D, C, P, P], same dtype and device; under C the mean variance of the outputs is unchanged.
    """
    _, chans, p, _ = kernel.shape
    at = torch.arange(p, dtype=torch.float64, device="cpu")
    at = torch.cartesian_prod(at, at)
    pixels = torch.exp(-torch.cdist(at, at) / (2.5 * p))
    channels = torch.full((chans, chans), 0.9, dtype=torch.float64, device="cpu").fill_diagonal_(1)
    covariance = torch.kron(channels, pixels)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * (values + 1e-3 * values.max()).rsqrt()) @ vectors.T
    old = kernel.detach().to("cpu", torch.float64).flatten(1)
    new = old @ root
    before, after = (torch.einsum("di,ij,dj->", k, covariance, k) for k in (old, new))
    return (new * (before / after).sqrt()).view_as(kernel).to(kernel)


class PatchEmbed(nn.Module):
    """The patch convolution (stride = kernel) and its input size, with the attributes of timm's class.

    The encoder applies `proj` to kept patches only (`embed_patches`).
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
        """Changes the image size or patch size (the kernel is resampled); an error changes nothing.

        `Encoder.set_input_size` calls this and also sets the positions.
        """
        size = self.img_size if img_size is None else pair(img_size)
        patch = self.patch_size if patch_size is None else (square_patch(patch_size),) * 2
        check_sides(size, patch[0], "img_size")
        if patch != self.patch_size:
            old = self.proj
            if why := reason(old, nn.Conv2d):
                raise UsageError(f"patch_size: the kernel of patch_embed.proj cannot be resampled: {why}")
            kernel = resample_patch_kernel(old.weight.detach(), patch[0])
            old.weight = nn.Parameter(kernel, requires_grad=old.weight.requires_grad)
            old.kernel_size = old.stride = patch
        self.img_size, self.patch_size = size, patch

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, D], without positions."""
        return self.proj(images).flatten(2).transpose(1, 2)


def fit(out: Any, shape: Sequence[int], name: str) -> Tensor:
    """Checks the output of a module that is not stock; raises UsageError naming it for any other shape."""
    if not isinstance(out, Tensor):
        raise UsageError(f"{name}: expected to return a tensor {list(shape)}, got {type(out).__name__}")
    if out.shape != torch.Size(shape):
        raise UsageError(f"{name}: expected to return {list(shape)}, got {list(out.shape)}")
    return out


def embed_patches(embed: Any, images: Tensor, keep: Tensor | None, pos: Tensor) -> Tensor:
    """`ops.patch_gather` with the weights of a patch embedding, or the module itself if it is not stock.

    Args:
        embed: A `PatchEmbed` or its replacement.
        images: [B, C, H, W], or the kept patches [V*B, K, C P P].
        keep: [V, B, K] integer, or None (all).
        pos: [N, D].

    Returns:
        [V*B, K, D].

    Raises:
        UsageError: The module returns another shape, or it needs whole images and only kept patches are given.
    """
    n, width = pos.shape
    if is_stock(embed, PatchEmbed) and is_stock(embed.proj, nn.Conv2d):
        weight = embed.proj.weight
        if weight.shape[0] != width:
            raise UsageError(
                f"patch_embed.proj: tokens have width {weight.shape[0]}, positions {width}; to prune the "
                "width, build the encoder with pos_embed='learned'"
            )
        return ops.patch_gather(images, keep, weight, embed.proj.bias, pos)
    picked = images.dim() == 3
    if picked or keep is not None:
        if _embeds_one_by_one(embed):
            p = embed.patch_size[0]
            patches = images if picked else ops.gather_patches(images, keep, p)
            rows, kept, _ = patches.shape
            tokens = embed(patches.reshape(rows * kept, -1, p, p))
            tokens = fit(tokens, (rows * kept, 1, width), "patch_embed").view(rows, kept, width)
            pos = pos.to(tokens.dtype)
            return tokens + (pos if keep is None else pos[keep.flatten(0, 1).long()])
        if picked:
            raise UsageError("patch_embed: it needs whole images, but only kept patches are given")
    tokens = fit(embed(images), (images.shape[0], n, width), "patch_embed")
    pos = pos.to(tokens.dtype)
    return tokens + pos if keep is None else ops.token_gather(tokens, keep, pos)


def _embeds_one_by_one(embed: Any) -> bool:
    """Whether each token is known to depend on the pixels of its own patch only."""
    if not isinstance(embed, PatchEmbed) or type(embed).forward is not PatchEmbed.forward:
        return False
    # adapters of peft have the layer as `base_layer`
    conv, side = getattr(embed.proj, "base_layer", embed.proj), embed.patch_size
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == conv.stride == side
        and conv.padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


def reads(layer: Any) -> int | None:
    """The input width of a linear layer or its wrapper; None if unknown, as for a distributed one."""
    width = getattr(layer, "in_features", None)
    plain = type(getattr(layer, "weight", None)) in PLAIN
    return width if plain and isinstance(width, int) else None


class _Part(nn.Module):
    """A module made of linear layers.

    Attributes:
        label: Its name within the encoder, for errors.
        width: D.
    """

    label = ""
    # the layers that read and write tokens, and how many vectors the output of the others has per token
    first, last, times = "fc1", "fc2", 1

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def inner(self) -> int | None:
        """The width between the layers if that of the last one is unknown."""
        return None

    def _linear(
        self, name: str, x: Tensor, before: nn.Module | str | None = None, recompute: bool = False
    ) -> Tensor:
        return linear(x, self._modules[name], before, recompute, self._check)

    def _check(self, layer: nn.Module, x: Tensor, out: Tensor) -> None:
        """Checks the output of a layer that was called as a module."""
        name = next(name for name, module in self._modules.items() if module is layer)
        if name == self.last:
            width = reads(self._modules[self.first]) or self.width
        else:
            width = self.times * (reads(self._modules[self.last]) or self.inner() or 0)
        fit(out, (*x.shape[:-1], width or out.shape[-1]), f"{self.label}.{name}")


class Attention(_Part):
    """Multi-head self-attention; `backend` names its implementation (`Encoder.set_attention`).

    `heads` may be reduced, of `head_dim` each, if `qkv` returns those of one process.
    """

    first, last, times = "qkv", "proj", 3

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width)
        self.heads, self.head_dim = heads, width // heads
        self.backend = "auto"
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def inner(self) -> int:
        """Of all heads."""
        return self.heads * self.head_dim

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None, recompute_norm: bool = False) -> Tensor:
        """Attention of `norm(x)`: [R, n, D] -> [R, n, D]; the backward pass may recompute `norm(x)`."""
        return self._linear("proj", self.core(self._linear("qkv", x, norm, recompute_norm)))

    def core(self, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention between the projections: [R, n, 3 D] -> [R, n, D]; `bias` as of `ops.attention`."""
        r, n, width = qkv.shape
        if width % (3 * self.heads):
            raise UsageError(
                f"{self.label}.qkv: its output width {width} is not a multiple of 3 x {self.heads} heads"
            )
        qkv = qkv.view(r, n, 3, self.heads, width // (3 * self.heads))
        return ops.attention(qkv, self.backend, bias).reshape(r, n, width // 3)


class Mlp(_Part):
    """D -> hidden -> D with exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm | None = None, recompute: frozenset[str] = frozenset()
    ) -> Tensor:
        """MLP of `norm(x)`: [..., D] -> [..., D]; `recompute` as of `Block`."""
        hidden = self._linear("fc1", x, norm, "norm" in recompute)
        return self._linear("fc2", hidden, "gelu", "gelu" in recompute)


def _branch(block: Any, x: Tensor, norm: str, part: str, *recompute: Any) -> Tensor:
    """`part(norm(x))` of a block; if both are stock, the norm is computed by the first layer of `part`."""
    f, g = block._modules[norm], block._modules[part]
    if is_stock(f, nn.LayerNorm) and is_stock(g, Attention, Mlp):
        return g(x, f, *recompute)
    u = fit(f(x), x.shape, f"{block.label}.{norm}")
    return fit(g(u), x.shape, f"{block.label}.{part}")


class Block(nn.Module):
    """Pre-norm trunk block: `x += s0 SA(LN x)`, `x += s1 MLP(LN x)`, no layer scale.

    `recompute` names what the backward pass recomputes, of "norm" and "gelu" (`Encoder.set_recompute`); `label` is the
    block's name within the encoder.
    """

    recompute: frozenset[str] = frozenset()
    label = ""

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
        x = x + _scaled(_branch(self, x, "norm1", "attn", "norm" in self.recompute), s0)
        return x + _scaled(_branch(self, x, "norm2", "mlp", self.recompute), s1)

    def _fused(self, x: Tensor, path: Tensor | None) -> Tensor:
        """`forward` with each residual and the following norm in one pass (`ops.trunk`)."""
        s0, s1 = (None, None) if path is None else path.unbind()
        attn, fc1, fc2, recompute = self.attn, self.mlp.fc1, self.mlp.fc2, "norm" in self.recompute
        x, u, source = trunk.residual_norm(x, self.norm1, recompute=recompute)
        # the gradient of the qkv bias comes from the attention
        qkv = trunk.project(u, attn.qkv, source, attn.qkv.bias.detach())
        out = attn.core(qkv, attn.qkv.bias)
        branch = trunk.project(out, attn.proj, (), None)
        x, u, source = trunk.residual_norm(x, self.norm2, branch, attn.proj.bias, s0, recompute)
        branch = trunk.mlp(u, fc1, fc2, source, "gelu" in self.recompute)
        return trunk.residual(x, branch, fc2.bias, s1)

    def _is_stock(self) -> bool:
        """Whether all modules are stock and have all parameters."""
        attn, mlp = self.attn, self.mlp
        return (
            is_stock(attn, Attention)
            and is_stock(mlp, Mlp)
            and _are_whole((self.norm1, self.norm2), (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
        )


def _are_whole(norms: Sequence[nn.Module], layers: Sequence[nn.Module]) -> bool:
    """Whether these are stock, with weights and biases."""
    return all(
        is_stock(m, nn.LayerNorm) and m.weight is not None and m.bias is not None for m in norms
    ) and all(is_stock(m, nn.Linear) and m.bias is not None for m in layers)


def _scaled(branch: Tensor, factor: Tensor | None) -> Tensor:
    return branch if factor is None else factor * branch


class PoolAttention(_Part):
    """Attention of the first token to all; `PoolBlock` calls it if a layer is not stock or is pruned."""

    first, last = "q", "proj"

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width)
        self.heads, self.head_dim = heads, width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def inner(self) -> int:
        """Of all heads."""
        return self.heads * self.head_dim

    def forward(self, u: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """u [R, 1 + n, D], normalized, class token first -> [R, D], and optionally the attention [R, H, 1 + n]."""
        q, k, v = self._linear("q", u[:, :1]), self._linear("k", u), self._linear("v", u)
        if q.shape[-1] % self.heads:
            raise UsageError(
                f"{self.label}.q: its output width {q.shape[-1]} is not a multiple of {self.heads} heads"
            )
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        p = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        out = self._linear("proj", (p @ v).transpose(1, 2).flatten(1))
        return (out, p.squeeze(2)) if return_weights else out


class PoolBlock(nn.Module):
    """Class-attention block: `c += g1 Wo att([c; x])`, `c += g2 MLP(LN c)`; the tokens are not changed.

    `label` is its name within the encoder.
    """

    label = ""

    def __init__(self, width: int, heads: int, mlp_ratio: float, layer_scale: float) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale))
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = PoolAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(
        self, cls: Tensor, tokens: Tensor, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """cls [R, D], tokens [R, n, D] -> class token [R, D], and optionally its attention [R, H, 1 + n]."""
        cls, attention, _ = self.run(cls, tokens, return_weights=return_weights)
        return cls if attention is None else (cls, attention)

    def run(
        self,
        cls: Tensor,
        tokens: Tensor,
        stats: tuple[Tensor, Tensor] | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """`forward` with LayerNorm statistics of the tokens, `stats`, which are the same for every block.

        Returns:
            (class token [R, D], attention [R, H, 1 + n] or None, `stats`).
        """
        norm, a = self.norm1, self.attn
        # the op requires square projections; pruning may have removed channels of single heads
        whole = is_stock(a, PoolAttention) and _are_whole((norm,), (a.q, a.k, a.v, a.proj))
        if whole and a.proj.in_features == cls.shape[-1]:
            parts = norm, a.q, a.k, a.v, a.proj
            weights = ops.PoolWeights(*[p for part in parts for p in (part.weight, part.bias)])
            out, attention, stats = ops.attention_pool(
                tokens, cls, weights, a.heads, norm.eps, stats=stats, return_weights=return_weights
            )
        else:
            x = torch.cat([cls[:, None], tokens], 1)
            u = fit(norm(x), x.shape, f"{self.label}.norm1")
            out, attention = a(u, True) if return_weights else (a(u), None)
            fit(out, cls.shape, f"{self.label}.attn")
        cls = cls + self.gamma_1 * out
        return cls + self.gamma_2 * _branch(self, cls, "norm2", "mlp"), attention, stats
