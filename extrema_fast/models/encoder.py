"""The encoder: a ViT trunk without class token, followed by class-attention pooling (arXiv 2206.04667, section 3.2).

Parameter names and shapes match the released checkpoints (`vits.py` of microsoft/ExtreMA).
Shape letters: B images, V views, R = V B rows (view-major), K kept tokens, N patches, D width, H heads,
d head_dim, L trunk blocks, P pooling blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import IMAGENET, MODELS, ModelConfig, did_you_mean, list_models, model_name
from ..errors import UnknownArgumentError, UsageError
from ..ops import dispatch as ops
from ..ops.linear import RECOMPUTE
from ..ops.stock import is_stock
from .dino_interface import Dino
from .layers import (
    NORM_EPS,
    Block,
    PatchEmbed,
    PoolBlock,
    check_images,
    check_sides,
    embed_patches,
    fit,
    pair,
    square_patch,
    whiten_kernel,
)
from .masking import check_keep, image_major
from .positions import SinCos, are_equal, check_chans, resample_table
from .timm_interface import TimmInterface, check_head

if TYPE_CHECKING:
    from ..data.preprocess import Preprocess, Resizing


class Encoded(NamedTuple):
    """The result of `Encoder.encode`.

    Attributes:
        cls: class token, [B, D], or [B, V, D] with views.
        patches: patch tokens, [B, K, D], or [B, V, K, D] with views; token j belongs to patch keep[..., j].
        keep: keep indices, [B, K] or [B, V, K] integer.
        grid: (rows, columns) of patches in the image.
    """

    cls: Tensor
    patches: Tensor
    keep: Tensor
    grid: tuple[int, int]


def call_block(block: Any, name: str, tokens: Tensor, factors: Tensor | None, recompute: bool) -> Tensor:
    """Runs a trunk block or its replacement, [R, n, D] -> [R, n, D]; `recompute`: recompute it in the backward pass."""
    if recompute and torch.is_grad_enabled():
        # the factors are given: no block draws a random number
        out = checkpoint(block, tokens, factors, use_reentrant=False, preserve_rng_state=False)
    else:
        out = block(tokens, factors)
    return out if is_stock(block, Block) else fit(out, tokens.shape, name)


class Encoder(TimmInterface):
    """ViT trunk and pooling head, with the interface of timm's vision transformers (`TimmInterface`).

    Create one with `create_encoder`, where the arguments are documented, or load one with `load_encoder`.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int = 0,
        *,
        global_pool: str = "token",
        fc_norm: bool | None = False,
        pos_embed: str = "sincos",
        pos_coords: str = "absolute",
        pos_grid: Sequence[int] | None = None,
        final_norm: bool = True,
        norm_eps: float = NORM_EPS,
        in_chans: int | None = None,
        drop_rate: float = 0.0,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        check_head(num_classes, global_pool)
        if pos_embed not in ("sincos", "learned"):
            raise UsageError(f"pos_embed: expected 'sincos' or 'learned', got {pos_embed!r}")
        fc_norm = global_pool == "avg" if fc_norm is None else fc_norm
        if fc_norm and global_pool != "avg":
            raise UsageError("fc_norm: only with global_pool='avg'")
        in_chans = config.in_chans if in_chans is None else in_chans
        check_chans(in_chans)
        if not 0 <= drop_rate < 1:
            raise UsageError(f"drop_rate: expected from 0 to below 1, got {drop_rate}")
        if not 0 < norm_eps < math.inf:
            raise UsageError(f"norm_eps: expected more than 0, got {norm_eps}")
        trained = pair(config.grid if pos_grid is None else pos_grid, "pos_grid")
        if min(trained) < 1:
            raise UsageError(f"pos_grid: expected rows and columns, got {pos_grid}")
        width, depth, heads = config.shape
        self.config = config
        self.embed_dim = self.num_features = self.head_hidden_size = width
        self.heads = heads
        # of other sizes than the name says, see `model_args`
        self.architecture = model_name(config.size)
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.dynamic_img_size = dynamic_img_size
        self.drop_path_rate, self.grad_checkpointing = config.drop_path, False
        self.mean: tuple[float, ...] = IMAGENET[0]
        self.std: tuple[float, ...] = IMAGENET[1]
        self.interpolation, self.crop_pct, self.keep_exact = "bilinear", 0.875, False
        # of images of more than 8 bits (`data.pixels.Range`)
        self.value_range: tuple[float, ...] | None = None
        # names of what the head tells apart, where known
        self.classes: list[str] = []

        self.patch_embed = PatchEmbed(self.in_chans, width, config.patch_size, config.img_size)
        self.sincos = SinCos(width, pos_coords, trained)
        table = self.sincos.compute(self.grid)[None]
        if pos_embed == "learned":
            self.pos_embed = nn.Parameter(table)
        else:
            # a buffer: it has no gradient; persistent: saved with the weights
            self.register_buffer("pos_embed", table)
        self.blocks = nn.ModuleList(Block(width, heads, config.mlp_ratio) for _ in range(depth))
        self.cls_token = self.blocks_token = None
        if global_pool != "avg":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.blocks_token = nn.ModuleList(
                PoolBlock(width, heads, config.mlp_ratio, config.layer_scale)
                for _ in range(config.pool_depth)
            )
        self.norm = nn.LayerNorm(width) if final_norm and not fc_norm else nn.Identity()
        self.fc_norm = nn.LayerNorm(width) if fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.norm_eps = norm_eps
        for name, module in self.named_modules():
            if hasattr(module, "label"):
                module.label = name
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
        self.init_weights()

    def extra_repr(self) -> str:
        return f"img_size={self.img_size}, patch={self.patch_size}, grid={self.grid}, pool={self.global_pool}"

    def init_weights(self) -> None:
        """Initializes weights: Xavier-uniform matrices, zero biases, class token with standard deviation 0.02.

        With `patch_init` `whitened` the patch kernel goes through `whiten_kernel`; a linear head has standard
        deviation 2e-5.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        kernel = self.patch_embed.proj.weight
        # the patch bias keeps the convolution's default, as in the release
        nn.init.xavier_uniform_(kernel.data.view(kernel.shape[0], -1))
        if self.config.patch_init == "whitened" and not kernel.is_meta:
            kernel.data.copy_(whiten_kernel(kernel))
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def reset_parameters(self) -> None:
        """Reinitializes all parameters and position tables; also works on a model from `to_empty`."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.reset_parameters()
                if isinstance(module, PoolBlock):
                    for gamma in (module.gamma_1, module.gamma_2):
                        gamma.fill_(self.config.layer_scale)
            self.patch_embed.proj.reset_parameters()
            self.pos_embed.copy_(self.sincos.compute(self.grid))
            self.init_weights()

    # ---- the pieces, in the order they run -------------------------------------------------------

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Embeds patches and adds positions: images [B, C, H, W], keep [V, B, K] or None (all) -> [V*B, K, D].

        Instead of images it also accepts their kept patches, [V*B, K, C*P*P] with patch side P, cut at the encoder's
        own image size (`color_views`).
        """
        p, picked = self.patch_size, images.dim() == 3
        pos = self.positions(self.grid if picked else (images.shape[-2] // p, images.shape[-1] // p))
        return embed_patches(self.patch_embed, images, keep, pos)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table of a grid, [N, D]: the stored one for the encoder's own grid, else computed and cached.

        A compiled graph recomputes the table of another grid at every call, as does a graph for images of any size;
        `set_input_size` makes a grid the encoder's own.
        """
        learned = isinstance(self.pos_embed, nn.Parameter)
        # a patch size set on `patch_embed` alone shows in the number of rows
        own = (*self.grid, self.pos_embed.shape[1])
        if are_equal((*grid, grid[0] * grid[1]), own, guess=not learned):
            return self.pos_embed[0]
        if learned and self.dynamic_img_size:
            return resample_table(self.pos_embed[0], self.grid, grid)
        if learned:
            size = tuple(g * self.patch_size for g in grid)
            raise UsageError(
                f"images: {size} is not the size {self.img_size} of the learned position table; "
                f"encoder.set_input_size({size}) resamples it once, encoder.dynamic_img_size = True at every call"
            )
        return self.sincos.table(grid, self.pos_embed)

    def trunk(self, tokens: Tensor, path: Tensor | None = None) -> Tensor:
        """Trunk blocks: [R, n, D] -> [R, n, D], before the final norm.

        `path` [L, 2, R]: drop-path factors as returned by `drop_path.drop_path_scale`; None: see `factors`.
        """
        return self.trunk_layers(tokens, path=path)[0]

    def trunk_layers(
        self,
        tokens: Tensor,
        indices: Sequence[int] = (),
        path: Tensor | None = None,
        stop_early: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Like `trunk`, and also returns the tokens after the blocks `indices` (ascending).

        With `stop_early` no block after the last of them runs.
        """
        path = self.factors(tokens, path)
        layers = []
        for i, block in enumerate(self.blocks):
            tokens = call_block(
                block, f"blocks.{i}", tokens, None if path is None else path[i], self.grad_checkpointing
            )
            if i in indices:
                layers.append(tokens)
                if stop_early and i == indices[-1]:
                    break
        return tokens, layers

    def factors(self, tokens: Tensor, path: Tensor | None) -> Tensor | None:
        """The drop-path factors [L, 2, R]: `path` if given, random in training, None without drop-path."""
        if path is None and self.training and self.drop_path_rate > 0:
            uniform = torch.rand(self.depth, 2, tokens.shape[0], device=tokens.device)
            path = ops.drop_path_from_uniform(uniform, self.drop_path_rate)
        return path

    def set_attention(self, backend: str) -> None:
        """Selects the trunk's self-attention backend: `auto` or a name from `extrema_fast.ops.attention`.

        Weights and state-dict keys do not change.

        Raises:
            UsageError: unknown name. A backend that cannot run here raises at the first forward pass and says why.
        """
        ops.check_attention_name(backend)
        for block in self.blocks:
            block.attn.backend = backend

    def set_recompute(self, what: str) -> None:
        """Sets what the trunk's backward pass recomputes: `none`, `gelu`, or `norm` (GELU and LayerNorm)."""
        for block in self.blocks:
            block.recompute = RECOMPUTE[what]

    def pool(self, tokens: Tensor, return_weights: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Class-attention pooling: tokens [R, n, D] -> (class token [R, D] before the final norm, attention maps).

        The maps, one [R, H, 1 + n] per pooling block, are computed only with `return_weights`.
        """
        assert self.cls_token is not None and self.blocks_token is not None
        # even under no_grad a view of a parameter has requires_grad, which misleads FLOP counters; a trace is the same
        # either way
        plain = torch.is_grad_enabled() or torch.jit.is_tracing()
        token = self.cls_token if plain else self.cls_token.detach()
        cls = token[:, 0].expand(tokens.shape[0], -1)
        maps, stats = [], None
        for i, block in enumerate(self.blocks_token):
            attention = None
            if is_stock(block, PoolBlock):
                cls, attention, stats = block.run(cls, tokens, stats, return_weights)
            else:
                out = block(cls, tokens, True) if return_weights else block(cls, tokens)
                out, attention = out if return_weights else (out, None)
                cls = fit(out, cls.shape, f"blocks_token.{i}")
            if attention is not None:
                maps.append(attention)
        return cls, maps

    # ---- what users call -------------------------------------------------------------------------

    def encode(self, images: Tensor, keep: Tensor | None = None, norm: bool = True) -> Encoded:
        """Encodes images into a class token and patch tokens; only kept patches are read, projected and attended to.

        Args:
            images: [B, C, H, W] float, normalized. Height and width are multiples of the patch size; for a grid other
                than the model's the sin-cos table of that grid is used.
            keep: keep indices, [B, K] or [B, V, K] integer in [0, N), or None to keep all patches. Their order is
                preserved and repeats are allowed. Their range is checked only on a CPU and outside compiled code.
            norm: whether to apply the final LayerNorm. The paper's linear probe uses tokens without it.

        Returns:
            Encoded(cls, patches, keep, grid). Without a class head `cls` is the mean of the patch tokens.

        Raises:
            UsageError: an invalid argument; the message says what was expected and what was given.
        """
        tokens, keep, grid = self._tokens(images, keep)
        if not self.num_prefix_tokens:
            patches = fit(self.norm(tokens), tokens.shape, "norm") if norm else tokens
            cls = patches.mean(1)
        elif norm and not is_stock(self.norm, nn.LayerNorm):
            # a replaced norm is called once, on both
            both = torch.cat([self.pool(tokens)[0][:, None], tokens], 1)
            both = fit(self.norm(both), both.shape, "norm")
            cls, patches = both[:, 0], both[:, 1:]
        else:
            cls, patches = self.pool(tokens)[0], tokens
            cls, patches = (self.norm(cls), self.norm(patches)) if norm else (cls, patches)
        # on a CPU autocast leaves the normalized patch tokens in 16 bits
        return Encoded(image_major(cls, keep), image_major(patches, keep).to(cls.dtype), keep, grid)

    def get_attention(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Attention weights of the class token in each of the P pooling blocks.

        Args:
            images: as in `encode`.
            keep: as in `encode`.

        Returns:
            [B, P, H, 1 + K] fp32 probabilities, or [B, V, P, H, 1 + K] with views; column 0 is the class token itself.

        Raises:
            UsageError: as in `encode`, or the encoder has no class head.
        """
        if not self.num_prefix_tokens:
            raise UsageError("get_attention: this encoder has no class head (global_pool='avg')")
        tokens, keep, _ = self._tokens(images, keep)
        _, maps = self.pool(tokens, return_weights=True)
        return image_major(torch.stack(maps, 1).float(), keep)

    def _tokens(self, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Returns (trunk tokens [V*B, K, D], view-major; keep, or the indices of all patches; grid)."""
        grid = self.check_images(images)
        b, n = images.shape[0], grid[0] * grid[1]
        rows = None if keep is None else check_keep(keep, b, n, images.device)
        tokens = self.trunk(self.embed(images, rows))
        return tokens, torch.arange(n, device=images.device).expand(b, n) if keep is None else keep, grid

    def check_images(self, images: Tensor) -> tuple[int, int]:
        """Returns the grid of images [B, C, H, W]; raises UsageError if shape, dtype or size are invalid."""
        # a replacement of the convolution may have no weight, or one that is not a float tensor
        weight = getattr(self.patch_embed.proj, "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None
        check_images(images, self.in_chans, dtype)
        return check_sides(images.shape[-2:], self.patch_size)

    def forward(self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, C, H, W] -> pooled features [B, D], or logits [B, num_classes]; other arguments: `forward_features`."""
        return self.forward_head(self.forward_features(images, attn_mask, is_causal))

    def as_dino(self, version: int = 2, layer_class: str = "head") -> Dino:
        """Returns a view of this encoder with the interface of DINO, DINOv2 or DINOv3.

        Parameters are shared; see `dino_interface.Dino` for the arguments.
        """
        return Dino(self, version, layer_class)

    def preprocess(
        self, value_range: tuple[float, ...] | None = None, crop_pct: float | None = None
    ) -> Preprocess:
        """The image transform for these weights: PIL image or uint8 [H, W, 3] -> normalized float32 [C, H, W].

        It resizes the short side to size / crop_pct (by default size * 256 / 224, antialiased) and crops the center,
        like timm's transform and the image processor of exported models. The transform's `metadata` holds `input_size`,
        `mean`, `std`, `interpolation` and `crop_pct`.

        Args:
            value_range: (black, white) of images with more than 8 bits, as in `data.range`; None: the weights' own.
            crop_pct: crop size as a fraction of the resized short side; 1 for images that are already cropped; None:
                the weights' own.
        """
        from ..data.preprocess import Preprocess

        return Preprocess(
            self.img_size,
            self.in_chans,
            self.mean,
            self.std,
            self.interpolation,
            self.crop_pct if crop_pct is None else crop_pct,
            self.value_range if value_range is None else value_range,
        )

    def resizing(self, crop_pct: float | None = None) -> Resizing:
        """How k-NN, the linear probe, `embed` and `search` resize images: the same as `preprocess`, for whole batches.

        Weights of older versions (`keep_exact`) keep their old behavior unless `crop_pct` is given.
        """
        from ..data.preprocess import Resizing, check_crop_pct

        if crop_pct is None:
            return Resizing(self.crop_pct, self.interpolation, self.keep_exact)
        return Resizing(check_crop_pct(crop_pct), self.interpolation)


# ---- building -------------------------------------------------------------------------------------

# keywords that `create_encoder` passes on to the configuration
_SHAPE = ("width", "depth", "heads", "mlp_ratio", "pool_depth", "layer_scale")


# arguments of timm's VisionTransformer: those with another name here, and the values supported for the others
_TIMM_NAMES = {"embed_dim": "width", "num_heads": "heads"}
_TIMM_VALUES: dict[str, tuple[Any, ...]] = {
    "dynamic_img_pad": (False,),
    "class_token": (True,),
    "reg_tokens": (0,),
    "qkv_bias": (True,),
    "proj_bias": (True,),
    "qk_norm": (False,),
    "pre_norm": (False,),
    "init_values": (None,),
    "no_embed_class": (True, False),
    "pos_drop_rate": (0,),
    "patch_drop_rate": (0,),
    "proj_drop_rate": (0,),
    "attn_drop_rate": (0,),
    "weight_init": ("",),
}


def _without_timms(options: dict[str, Any]) -> dict[str, Any]:
    """Renames timm's options to the names used here, and drops those that change nothing."""
    ours = {}
    for name, value in options.items():
        if name in _TIMM_VALUES:
            if value not in _TIMM_VALUES[name]:
                only = " or ".join(map(repr, _TIMM_VALUES[name]))
                raise UsageError(f"{name}: this encoder has only {only}, got {value!r}")
            continue
        known = _TIMM_NAMES.get(name, name)
        if known in ours or (known != name and known in options):
            raise UsageError(f"{name}: names the same as {known}; give one")
        ours[known] = value
    return ours


def create_encoder(
    name: str,
    num_classes: int = 0,
    img_size: int | Sequence[int] = 224,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    *,
    patch_size: int | Sequence[int] | None = None,
    global_pool: str = "token",
    fc_norm: bool | None = False,
    pos_embed: str = "sincos",
    pos_coords: str = "absolute",
    pos_grid: Sequence[int] | None = None,
    final_norm: bool = True,
    norm_eps: float = NORM_EPS,
    dynamic_img_size: bool = False,
    drop_rate: float = 0.0,
    **shape: Any,
) -> Encoder:
    """Creates a randomly initialized encoder.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of a linear head on the pooled feature; 0: no head, the model returns features.
        img_size: pixels, or (height, width); multiples of `patch_size`.
        in_chans: number of image channels.
        drop_path_rate: drop-path rate of the last trunk block; rises linearly from 0 at the first.
        patch_size: pixels; None: as in the name.
        global_pool: 'token' (class head), 'avg' (mean of the patch tokens, no class head), or '' (class head; `forward`
            returns all tokens).
        fc_norm: with 'avg', whether to normalize after pooling instead of before, as in the paper's fine-tuning; None:
            True with 'avg', as in timm.
        pos_embed: 'sincos' (fixed) or 'learned' (a parameter initialized from the sin-cos table).
        pos_coords: 'absolute' or 'rescaled' coordinates for grids other than `pos_grid` (`positions.SinCos`).
        pos_grid: (rows, columns) of the training grid; None: the grid of `img_size`.
        final_norm: False leaves out the final LayerNorm, as in the released code's linear probe.
        norm_eps: epsilon of every LayerNorm (Hugging Face's ViT: 1e-12).
        dynamic_img_size: resample a learned position table at every call for images of another size than `img_size`,
            as timm does. A sin-cos table handles any size without it.
        drop_rate: dropout rate before the linear head.
        **shape: width, depth, heads, mlp_ratio, pool_depth and layer_scale override those of `name`. timm's `embed_dim`
            and `num_heads` are accepted, as are its other VisionTransformer arguments at the values supported here.

    Raises:
        UsageError: an unknown name or keyword (the message suggests a similar one), or a size that is not a multiple of
            the patch size.
    """
    if name not in list_models():
        raise UsageError(f"unknown model {name!r}{did_you_mean(str(name), list_models())}")
    shape = _without_timms(shape)
    if unknown := sorted(shape.keys() - set(_SHAPE)):
        known = [*_SHAPE, "drop_path_rate", *(create_encoder.__kwdefaults__ or ())]
        raise UnknownArgumentError(
            f"create_encoder: unknown option {unknown[0]!r}{did_you_mean(unknown[0], known)}"
        )
    for option, value in shape.items():
        number = (int, float) if option in ("mlp_ratio", "layer_scale") else int
        if isinstance(value, bool) or not isinstance(value, number):
            raise UsageError(f"{option}: expected a {'whole ' * (number is int)}number, got {value!r}")
    size = MODELS[name]
    patch_size = (14 if "_patch14_" in name else 16) if patch_size is None else patch_size
    config = ModelConfig(size, pair(img_size), square_patch(patch_size), drop_path=drop_path_rate, **shape)
    return Encoder(
        config,
        num_classes,
        global_pool=global_pool,
        fc_norm=fc_norm,
        pos_embed=pos_embed,
        pos_coords=pos_coords,
        pos_grid=pos_grid,
        final_norm=final_norm,
        norm_eps=norm_eps,
        in_chans=in_chans,
        drop_rate=drop_rate,
        dynamic_img_size=dynamic_img_size,
    )


def model_args(encoder: Encoder) -> dict[str, Any]:
    """The arguments, as plain JSON, with which `create_encoder(encoder.architecture, ...)` rebuilds the encoder.

    They leave out the number of classes, drop rates and `dynamic_img_size`.
    """
    config, plain = encoder.config, ModelConfig(size=encoder.config.size)
    args: dict[str, Any] = {
        "img_size": list(encoder.img_size),
        "patch_size": encoder.patch_size,
        "in_chans": encoder.in_chans,
        # pruned, it has no class head to build and no pooling
        "global_pool": encoder.global_pool if encoder.num_prefix_tokens else "avg",
        "fc_norm": isinstance(encoder.fc_norm, nn.LayerNorm),
        "pos_embed": "learned" if isinstance(encoder.pos_embed, nn.Parameter) else "sincos",
        "pos_coords": encoder.sincos.coords,
        "pos_grid": list(encoder.sincos.trained),
    }
    if isinstance(encoder.norm, nn.Identity) and not args["fc_norm"]:
        args["final_norm"] = False
    if encoder.norm_eps != NORM_EPS:
        args["norm_eps"] = encoder.norm_eps
    if config.shape != plain.shape:
        args |= dict(zip(("width", "depth", "heads"), config.shape, strict=True))
    for name in ("mlp_ratio", "pool_depth", "layer_scale"):
        if getattr(config, name) != getattr(plain, name):
            args[name] = getattr(config, name)
    return args


def timm_config(encoder: Encoder) -> dict[str, Any]:
    """The `config.json` that timm's `local-dir:` and Hugging Face's timm wrapper read next to `model.safetensors`."""
    cfg = {k: v for k, v in encoder.own_cfg().items() if k != "architecture"}
    return {
        "architecture": encoder.architecture,
        "num_classes": encoder.num_classes,
        "num_features": encoder.num_features,
        "global_pool": encoder.global_pool,
        "model_args": model_args(encoder),
        "pretrained_cfg": cfg,
    }


def build_encoder(config: ModelConfig, seed: int | None = None) -> Encoder:
    """Builds the encoder of a configuration; `seed` fixes its weights and leaves the global generator untouched."""
    if seed is None:
        return Encoder(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(config)
