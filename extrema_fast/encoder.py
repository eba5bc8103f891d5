"""The encoder: a ViT trunk without class token, and class-attention pooling (paper section 3.2).

Parameter names and shapes are those of the released checkpoints (`vits.py` of microsoft/ExtreMA).
Shape letters: B images, V views, R = V B rows (view-major), K kept tokens, N patches, D width, H heads,
d head_dim, L trunk blocks, P pooling blocks.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops, rng
from .config import SIZES, ModelConfig, did_you_mean
from .errors import UsageError
from .linear import RECOMPUTE, Linear, linear

NORM_EPS = 1e-6


class Encoded(NamedTuple):
    """What `Encoder.encode` returns.

    cls      [B, D], or [B, V, D] with views
    patches  [B, K, D], or [B, V, K, D]; row j belongs to patch keep[..., j]
    keep     [B, K] or [B, V, K] integer
    grid     (rows, columns) of patches in the image
    """

    cls: Tensor
    patches: Tensor
    keep: Tensor
    grid: tuple[int, int]


def sincos_table(width: int, grid: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Fixed position table, computed in float64 for any grid (method.md section 1).

    width:   D, a multiple of 4;  grid: (rows, columns)
    returns  [rows * columns, D]: [sin(b w), cos(b w), sin(a w), cos(a w)] for row a, column b,
             w_k = 10000 ** (-k / (D / 4))
    """
    if width % 4:
        raise UsageError(f"width: the sin-cos table needs a multiple of 4, got {width}")
    w = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    a, b = torch.meshgrid(*(torch.arange(g, dtype=torch.float64) for g in grid), indexing="ij")
    across, down = b.reshape(-1, 1) * w, a.reshape(-1, 1) * w
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], 1).to(dtype)


class PatchEmbed(nn.Module):
    """The patch convolution (stride = kernel), applied to kept patches only."""

    def __init__(self, in_chans: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, patch, patch)


class Attention(nn.Module):
    """Multi-head self-attention; [R, n, D] -> [R, n, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # which implementation (`Encoder.set_attention`); no part of the state
        self.backend = "auto"
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, norm: nn.Module | None = None, again: bool = False) -> Tensor:
        """Of `norm(x)` where a norm is given; again: the backward pass makes the normalised tokens again."""
        r, n, width = x.shape
        qkv = linear(x, self.qkv, norm, again).view(r, n, 3, self.heads, width // self.heads)
        return self.proj(ops.attention(qkv, self.backend).reshape(r, n, width))


class Mlp(nn.Module):
    """D -> hidden -> D with exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(
        self, x: Tensor, norm: nn.Module | None = None, again: frozenset[str] = frozenset()
    ) -> Tensor:
        """Of `norm(x)` where a norm is given; again: `norm`, `gelu`: what the backward pass makes again."""
        return linear(linear(x, self.fc1, norm, "norm" in again), self.fc2, "gelu", "gelu" in again)


class Block(nn.Module):
    """Pre-norm trunk block: `x += s0 SA(LN x)`, `x += s1 MLP(LN x)`, no layer scale."""

    # what the backward pass makes again (`Encoder.set_recompute`)
    again: frozenset[str] = frozenset()

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, path: Sequence[Tensor | Kept] | Tensor | None = None) -> Tensor:
        """x [R, n, D]; path: drop-path of the two branches, [2, R] factors or two `Kept`; None: no drop-path."""
        attend, mix = (None, None) if path is None else path
        x = _add_branch(x, lambda x: self.attn(x, self.norm1, "norm" in self.again), attend)
        return _add_branch(x, lambda x: self.mlp(x, self.norm2, self.again), mix)


class Kept(NamedTuple):
    """Rows that a drop-path branch is computed for (`compact_path`).

    rows    [C] int64, different rows of the batch: every kept one, padded with dropped ones
    weight  [C] fp32: 1 / (1 - rate) for kept rows, 0 for padding
    """

    rows: Tensor
    weight: Tensor


def _add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], path: Tensor | Kept | None) -> Tensor:
    if path is None:
        return x + branch(x)
    if isinstance(path, Tensor):
        return x + path.to(x.dtype)[:, None, None] * branch(x)
    # rows are unique, so the sum has one order
    return x.index_add(
        0, path.rows, path.weight.to(x.dtype)[:, None, None] * branch(x.index_select(0, path.rows))
    )


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
        """cls [R, D], tokens [R, n, D] -> (class token [R, D], attention [R, H, 1 + n] or None, stats).

        stats: LayerNorm statistics of the tokens, which every block shares (`ops.attention_pool`)
        """
        a = self.attn
        weights = ops.PoolWeights(
            self.norm1.weight, self.norm1.bias, a.q.weight, a.q.bias, a.k.weight, a.k.bias,
            a.v.weight, a.v.bias, a.proj.weight, a.proj.bias,
        )  # fmt: skip
        out, attention, stats = ops.attention_pool(
            tokens, cls, weights, self.heads, NORM_EPS, stats=stats, return_weights=return_weights
        )
        cls = cls + self.gamma_1 * out
        return cls + self.gamma_2 * self.mlp(cls, self.norm2), attention, stats


class Encoder(nn.Module):
    """ViT trunk and pooling head.

    Built by `create_encoder`, `load_encoder` or `build_encoder`. `global_pool='avg'` has no class head: the
    pooled feature is the mean of the patch tokens after the final norm (or before `fc_norm` in its place).
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int = 0,
        *,
        global_pool: str = "token",
        fc_norm: bool = False,
        pos_embed: str = "sincos",
        in_chans: int | None = None,
    ) -> None:
        super().__init__()
        if global_pool not in ("token", "avg"):
            raise UsageError(f"global_pool: expected 'token' or 'avg', got {global_pool!r}")
        if pos_embed not in ("sincos", "learned"):
            raise UsageError(f"pos_embed: expected 'sincos' or 'learned', got {pos_embed!r}")
        if fc_norm and global_pool != "avg":
            raise UsageError("fc_norm: only with global_pool='avg'")
        if in_chans is not None and in_chans < 1:
            raise UsageError(f"in_chans: expected at least 1, got {in_chans}")
        if num_classes < 0:
            raise UsageError(f"num_classes: expected 0 (features) or more, got {num_classes}")
        width, depth, heads = config.shape
        self.config = config
        self.embed_dim = self.num_features = width
        self.depth, self.heads = depth, heads
        self.img_size, self.patch_size, self.grid = config.img_size, config.patch_size, config.grid
        self.num_patches = config.num_patches
        self.in_chans = in_chans or config.in_chans
        self.num_classes, self.global_pool = num_classes, global_pool
        self.drop_path_rate = config.drop_path
        self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

        self.patch_embed = PatchEmbed(self.in_chans, width, config.patch_size)
        table = sincos_table(width, self.grid)[None]
        if pos_embed == "learned":
            self.pos_embed = nn.Parameter(table)
        else:
            # a buffer: it has no gradient; persistent: saved with the weights
            self.register_buffer("pos_embed", table)
        self.blocks = nn.ModuleList(Block(width, heads, config.mlp_ratio) for _ in range(depth))
        if global_pool == "token":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.blocks_token = nn.ModuleList(
                PoolBlock(width, heads, config.mlp_ratio, config.layer_scale)
                for _ in range(config.pool_depth)
            )
        self.norm = nn.Identity() if fc_norm else nn.LayerNorm(width, eps=NORM_EPS)
        self.fc_norm = nn.LayerNorm(width, eps=NORM_EPS) if fc_norm else nn.Identity()
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def extra_repr(self) -> str:
        return f"img_size={self.img_size}, patch={self.patch_size}, grid={self.grid}, pool={self.global_pool}"

    def init_weights(self) -> None:
        """Xavier-uniform matrices, zero biases, LayerNorm (1, 0), class token N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        kernel = self.patch_embed.proj.weight
        # the patch bias keeps the convolution's default, as in the release
        nn.init.xavier_uniform_(kernel.data.view(kernel.shape[0], -1))
        if self.global_pool == "token":
            nn.init.normal_(self.cls_token, std=0.02)
        if self.num_classes:
            nn.init.trunc_normal_(self.head.weight, std=2e-5)

    # ---- the pieces, in the order they run -------------------------------------------------------

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """images [B, C, H, W], keep [V, B, K] or None (all) -> tokens with positions [V*B, K, D]."""
        proj = self.patch_embed.proj
        pos, p = self.pos_embed[0], self.patch_size
        grid = images.shape[-2] // p, images.shape[-1] // p
        if grid != self.grid:
            if isinstance(self.pos_embed, nn.Parameter):
                raise UsageError(
                    f"images: {tuple(images.shape[-2:])} is not the size {self.img_size} "
                    "of the learned position table"
                )
            pos = sincos_table(self.embed_dim, grid).to(pos)
        return ops.patch_gather(images, keep, proj.weight, proj.bias, pos)

    def trunk(self, tokens: Tensor, path: Tensor | list[tuple[Kept, Kept]] | None = None) -> Tensor:
        """[R, n, D] -> [R, n, D] before the final norm; path as of `drop_path_scale` or `compact_path`."""
        if path is None and self.training and self.drop_path_rate > 0:
            coins = torch.rand(self.depth, 2, tokens.shape[0], device=tokens.device)
            path = _scale_from_coins(coins, self.drop_path_rate)
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, None if path is None else path[i])
        return tokens

    def set_attention(
        self, backend: str, *, tokens: int | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Backend of the trunk's self-attention: `auto` or a name of `extrema_fast.attention`; weights stay.

        tokens   a sequence length to decide for and check now, on the device where the encoder is
        dtype    of its products then (default: the weights')
        raises   UsageError for an unknown name, or (now with `tokens`, else at the first pass) one that cannot
                 run: what it lacks, and what there is
        """
        ops.check_attention_name(backend)
        weight = self.blocks[0].attn.qkv.weight
        if tokens is not None:
            ops.check_attention(
                backend, weight.device, dtype or weight.dtype, tokens, self.embed_dim // self.heads,
                train=weight.requires_grad,
            )  # fmt: skip
        for block in self.blocks:
            block.attn.backend = backend

    def set_recompute(self, what: str) -> None:
        """What the backward pass of the trunk makes again: `none`, `gelu`, or `norm` (GELU and LayerNorm)."""
        for block in self.blocks:
            block.again = RECOMPUTE[what]

    def pool(self, tokens: Tensor, return_weights: bool = False) -> tuple[Tensor, list[Tensor]]:
        """tokens [R, n, D] -> (class token before the final norm [R, D], attention maps).

        return_weights: the maps are one [R, H, 1 + n] per pooling block; else the list is empty
        """
        cls = self.cls_token[:, 0].expand(tokens.shape[0], -1)
        maps, stats = [], None
        for block in self.blocks_token:
            cls, attention, stats = block(cls, tokens, stats, return_weights)
            if attention is not None:
                maps.append(attention)
        return cls, maps

    # ---- what users call -------------------------------------------------------------------------

    def encode(self, images: Tensor, keep: Tensor | None = None, norm: bool = True) -> Encoded:
        """Class token and patch tokens; only kept patches are read, projected and attended to.

        images:  [B, C, H, W] float, normalised; sides multiples of the patch size (other grids than the
                 model's use the sin-cos table of that grid)
        keep:    None (all), [B, K], or [B, V, K] integer in [0, N); order is kept, repeats are allowed
        norm     apply the final LayerNorm (False: raw tokens, as the paper's linear probe uses)
        returns  Encoded(cls, patches, keep, grid)
        raises   UsageError naming the argument, what it got and what it needs
        """
        grid = self._check_images(images)
        rows, keep = self._check_keep(images, keep, grid)
        tokens = self.trunk(self.embed(images, rows))
        normed = self.norm(tokens) if norm else tokens
        if self.global_pool == "token":
            cls, _ = self.pool(tokens)
            cls = self.norm(cls) if norm else cls
        else:
            cls = normed.mean(1)
        if keep.dim() == 3:
            b, v, k = keep.shape
            cls = cls.view(v, b, -1).transpose(0, 1)
            normed = normed.view(v, b, k, -1).transpose(0, 1)
        return Encoded(cls, normed, keep, grid)

    def get_attention(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Class-query probabilities of every pooling block.

        images, keep: as `encode`
        returns  [B, P, H, 1 + K] fp32 (with views [B, V, P, H, 1 + K]); rows sum to 1, column 0 is the
                 class token
        """
        if self.global_pool != "token":
            raise UsageError("get_attention: this encoder has no class head (global_pool='avg')")
        grid = self._check_images(images)
        rows, keep = self._check_keep(images, keep, grid)
        _, maps = self.pool(self.trunk(self.embed(images, rows)), return_weights=True)
        out = torch.stack(maps, 1).float()
        if keep.dim() == 3:
            b, v, _ = keep.shape
            out = out.view(v, b, *out.shape[1:]).transpose(0, 1)
        return out

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the final norm: [B, 1 + N, D], class token first; [B, N, D] without class head."""
        out = self.encode(images)
        return out.patches if self.global_pool == "avg" else torch.cat([out.cls[:, None], out.patches], 1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> pooled feature [B, D], or logits [B, num_classes]."""
        return self.head(self.fc_norm(self.encode(images).cls))

    def preprocess(self):
        """A callable for these weights: PIL image or uint8 [H, W, 3] -> normalised float32 [C, H, W].

        Resizes the short side to size * 256 / 224 (bilinear, antialiased) and crops the centre; the numbers
        are in the callable's `metadata` (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`).
        """
        from .preprocess import Preprocess

        return Preprocess(self.img_size, self.in_chans, self.mean, self.std)

    # ---- checks ----------------------------------------------------------------------------------

    def _check_images(self, images: Tensor) -> tuple[int, int]:
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise UsageError(
                f"images: expected [B, {self.in_chans}, H, W], got {list(images.shape)}"
                + ("; a single image needs images[None]" if images.dim() == 3 else "")
            )
        if not images.is_floating_point():
            raise UsageError(
                f"images: expected normalised floats, got {images.dtype}; see encoder.preprocess()"
            )
        p = self.patch_size
        for side, pixels in zip(("height", "width"), images.shape[-2:], strict=True):
            if pixels < p or pixels % p:
                low = max(p, pixels // p * p)
                raise UsageError(
                    f"images: {side} {pixels} is not a multiple of the patch size {p}; use {low} or {low + p}"
                )
        return images.shape[-2] // p, images.shape[-1] // p

    def _check_keep(
        self, images: Tensor, keep: Tensor | None, grid: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor]:
        b, n = images.shape[0], grid[0] * grid[1]
        if keep is None:
            return None, torch.arange(n, device=images.device).expand(b, n)
        if keep.is_floating_point() or keep.dtype == torch.bool:
            raise UsageError(f"keep: expected integer indices, got {keep.dtype}; see masking.keep_from_mask")
        if keep.dim() not in (2, 3) or keep.shape[0] != b or keep.shape[-1] < 1:
            raise UsageError(f"keep: expected [{b}, K] or [{b}, V, K] with K >= 1, got {list(keep.shape)}")
        # on a GPU the check would wait for the device (there the gather itself asserts); torch.compile cannot
        # branch on values
        if keep.device.type == "cpu" and keep.numel() and not torch.compiler.is_compiling():
            low, high = int(keep.min()), int(keep.max())
            if low < 0 or high >= n:
                raise UsageError(f"keep: expected indices in [0, {n}), got {low} to {high}")
        return (keep[None] if keep.dim() == 2 else keep.transpose(0, 1)), keep


def _scale_from_coins(coins: Tensor, rate: float) -> Tensor:
    # block i drops with probability rate * i / (L - 1); survivors are divided by what they had to survive
    depth = coins.shape[0]
    drop = torch.linspace(0, rate, depth, device=coins.device)[:, None, None]
    return (coins >= drop).float() / (1 - drop)


def drop_path_scale(
    index: Tensor, views: int, depth: int, rate: float, *, seed: int, epoch: int
) -> Tensor | None:
    """Keyed drop-path factors of the student trunk (method.md section 6): each view is its own sample.

    index:   [B] int64 sample rows
    returns  [L, 2, V*B] fp32: 0, or 1 / (1 - p_l) with p_l = rate * l / (L - 1); None when the rate is 0
    """
    if rate == 0:
        return None
    b = index.shape[0]
    coins = rng.uniform(index, views * depth * 2, seed=seed, epoch=epoch, stream=rng.DROP_PATH)
    coins = coins.view(b, views, depth, 2).permute(2, 3, 1, 0).reshape(depth, 2, views * b)
    return _scale_from_coins(coins, rate)


def compact_path(scale: Tensor, capacity: Sequence[int] | None = None) -> list[tuple[Kept, Kept]] | None:
    """The same coins as rows to compute: dropped rows cost nothing (step.md section 5).

    scale:    [L, 2, R] of `drop_path_scale`
    capacity  rows computed per layer (static shapes), or None: just the kept ones (reads `scale` on the host)
    returns   per layer (attention's, MLP's) `Kept`; None where a layer keeps more rows than its capacity
    """
    kept = scale > 0
    # kept rows first, in order, then dropped ones
    order = torch.argsort((~kept).to(torch.uint8), dim=-1, stable=True)
    most = kept.sum(-1).amax(-1).tolist() if scale.device.type == "cpu" else None
    if capacity is None:
        counts = kept.sum(-1).tolist()
    else:
        if most is not None and any(m > c for m, c in zip(most, capacity, strict=True)):
            return None
        counts = [(c, c) for c in capacity]
    return [
        tuple(Kept(order[i, j, :c], scale[i, j].take(order[i, j, :c])) for j, c in enumerate(pair))
        for i, pair in enumerate(counts)
    ]  # type: ignore[misc]


def compact_capacity(rows: int, depth: int, rate: float, classes: int = 4) -> list[int]:
    """Rows per layer that hold every kept one but for one branch in a thousand million (6 deviations).

    rows     R;  rate: of the last layer
    classes  different sizes over depth at most: each is one more compiled graph of a block
    """
    out = []
    for i in range(depth):
        p = rate * i / max(depth - 1, 1)
        most = rows * (1 - p) + 6 * math.sqrt(rows * p * (1 - p))
        out.append(min(rows, -(-math.ceil(most) // 64) * 64))
    # the layers of a group share the size of its first, the largest
    size = -(-depth // classes)
    return [out[i // size * size] for i in range(depth)]


# ---- building -------------------------------------------------------------------------------------

_PREFIX, _SUFFIX = "extrema_vit_", "_patch16_224"


def list_models(pattern: str = "*") -> list[str]:
    """Sorted model names matching a shell pattern."""
    return sorted(fnmatch.filter([f"{_PREFIX}{size}{_SUFFIX}" for size in SIZES], pattern))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def create_encoder(
    name: str,
    num_classes: int = 0,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    *,
    patch_size: int = 16,
    global_pool: str = "token",
    fc_norm: bool = False,
    pos_embed: str = "sincos",
) -> Encoder:
    """A randomly initialised encoder.

    name         one of `list_models()`
    num_classes  0: features; else a linear head on the pooled feature
    img_size     pixels, or (height, width); multiples of `patch_size`
    global_pool  'token' (class head) or 'avg' (mean of patch tokens, no class head)
    fc_norm      with 'avg': normalise after pooling instead of before (the paper's fine-tuning)
    pos_embed    'sincos' (fixed) or 'learned' (a parameter started from the table)
    raises       UsageError for an unknown name (with the nearest) or a size that does not divide
    """
    if name not in list_models():
        raise UsageError(f"unknown model {name!r}{did_you_mean(name, list_models())}")
    config = ModelConfig(
        size=name.removeprefix(_PREFIX).removesuffix(_SUFFIX),
        img_size=_pair(img_size),
        patch_size=patch_size,
        drop_path=drop_path_rate,
    )
    return Encoder(
        config, num_classes, global_pool=global_pool, fc_norm=fc_norm, pos_embed=pos_embed, in_chans=in_chans
    )


def build_encoder(config: ModelConfig, seed: int | None = None) -> Encoder:
    """The encoder of a configuration; `seed`: the same weights every time, the global generator untouched."""
    if seed is None:
        return Encoder(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(config)


def with_img_size(config: ModelConfig, img_size: int | tuple[int, int]) -> ModelConfig:
    """The same architecture at another image size."""
    return replace(config, img_size=_pair(img_size))


def count_flops(config: ModelConfig, rows: int, n: int) -> float:
    """Forward FLOPs of `rows` sequences of `n` tokens through trunk and absorbed pooling."""
    width, depth, _ = config.shape
    trunk = depth * (24 * width**2 * n + 4 * n**2 * width)
    pool = config.pool_depth * (24 * width**2 + 4 * math.prod((config.shape[2], n + 1, width)))
    return float(rows * (trunk + pool))
