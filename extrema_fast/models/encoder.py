"""The encoder: a ViT trunk without class token, and class-attention pooling (arXiv 2206.04667, section 3.2).

Parameter names and shapes are those of the released checkpoints (`vits.py` of microsoft/ExtreMA).
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
    """What `Encoder.encode` returns.

    Attributes:
        cls: [B, D], or [B, V, D] with views.
        patches: [B, K, D], or [B, V, K, D]; row j belongs to patch keep[..., j].
        keep: [B, K] or [B, V, K] integer.
        grid: (rows, columns) of patches in the image.
    """

    cls: Tensor
    patches: Tensor
    keep: Tensor
    grid: tuple[int, int]


def call_block(block: Any, name: str, tokens: Tensor, factors: Tensor | None, recompute: bool) -> Tensor:
    """A trunk block, or what stands in its place: [R, n, D] -> [R, n, D]; recompute: in the backward pass."""
    if recompute and torch.is_grad_enabled():
        # the factors are given: no block draws a random number
        out = checkpoint(block, tokens, factors, use_reentrant=False, preserve_rng_state=False)
    else:
        out = block(tokens, factors)
    return out if is_stock(block, Block) else fit(out, tokens.shape, name)


class Encoder(TimmInterface):
    """ViT trunk and pooling head, with the methods that timm and its users call (`TimmInterface`).

    Built by `create_encoder`, which describes the arguments, `load_encoder` or `build_encoder`.
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
        """Xavier-uniform matrices, zero biases, class token N(0, 0.02); `patch_init whitened`: `whiten_kernel`."""
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
        """All parameters and tables as in a new encoder, with new random numbers; also of a model from `to_empty`."""
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
        """images [B, C, H, W], keep [V, B, K] or None (all) -> tokens with positions [V*B, K, D].

        In place of images also their kept patches [V*B, K, C P P] at the encoder's own size (`color_views`).
        """
        p, picked = self.patch_size, images.dim() == 3
        pos = self.positions(self.grid if picked else (images.shape[-2] // p, images.shape[-1] // p))
        return embed_patches(self.patch_embed, images, keep, pos)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table of a grid, [N, D]: the saved one at its own grid, else computed and cached.

        A compiled graph computes it at every call, as one for images of any size does; `set_input_size` makes the grid
        its own.
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
        """[R, n, D] -> [R, n, D] before the final norm; path [L, 2, R] as of `drop_path.drop_path_scale`, or None."""
        return self.trunk_layers(tokens, path=path)[0]

    def trunk_layers(
        self,
        tokens: Tensor,
        indices: Sequence[int] = (),
        path: Tensor | None = None,
        stop_early: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """`trunk`, and the tokens after the blocks `indices` (ascending); stop_early: nothing runs after the last."""
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
        """`path`, or in training without one random factors, [L, 2, R]; None where there is no drop-path."""
        if path is None and self.training and self.drop_path_rate > 0:
            uniform = torch.rand(self.depth, 2, tokens.shape[0], device=tokens.device)
            path = ops.drop_path_from_uniform(uniform, self.drop_path_rate)
        return path

    def set_attention(self, backend: str) -> None:
        """Sets the trunk's self-attention: `auto` or a name of `extrema_fast.ops.attention`; weights stay.

        Raises:
            UsageError: an unknown name; at the first pass also one that cannot run here, with what it lacks.
        """
        ops.check_attention_name(backend)
        for block in self.blocks:
            block.attn.backend = backend

    def set_recompute(self, what: str) -> None:
        """What the trunk's backward pass recomputes: `none`, `gelu`, or `norm` (GELU and LayerNorm)."""
        for block in self.blocks:
            block.recompute = RECOMPUTE[what]

    def pool(self, tokens: Tensor, return_weights: bool = False) -> tuple[Tensor, list[Tensor]]:
        """tokens [R, n, D] -> (class token before the final norm [R, D], [R, H, 1 + n] per block if asked for)."""
        assert self.cls_token is not None and self.blocks_token is not None
        # without gradients a view of a parameter still says that it has one, which counters of FLOPs believe; a trace
        # is the same with and without
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
        """Class token and patch tokens; only kept patches are read, projected and attended to.

        Args:
            images: [B, C, H, W] float, normalized; sides multiples of the patch size (other grids than the model's
                use the sin-cos table of that grid).
            keep: None (all), [B, K], or [B, V, K] integer in [0, N); order is kept, repeats are allowed. Compiled code
                does not check it.
            norm: apply the final LayerNorm (False: raw tokens, as the paper's linear probe uses).

        Returns:
            Encoded(cls, patches, keep, grid); without class head `cls` is the mean of the patch tokens.

        Raises:
            UsageError: names the argument, what it got and what it needs.
        """
        tokens, keep, grid = self._tokens(images, keep)
        if not self.num_prefix_tokens:
            patches = fit(self.norm(tokens), tokens.shape, "norm") if norm else tokens
            cls = patches.mean(1)
        elif norm and not is_stock(self.norm, nn.LayerNorm):
            # called once, on both
            both = torch.cat([self.pool(tokens)[0][:, None], tokens], 1)
            both = fit(self.norm(both), both.shape, "norm")
            cls, patches = both[:, 0], both[:, 1:]
        else:
            cls, patches = self.pool(tokens)[0], tokens
            cls, patches = (self.norm(cls), self.norm(patches)) if norm else (cls, patches)
        # a CPU's autocast leaves the norm of 16-bit tokens in 16 bits
        return Encoded(image_major(cls, keep), image_major(patches, keep).to(cls.dtype), keep, grid)

    def get_attention(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Attention of the class token in each of the P pooling blocks; arguments as of `encode`.

        Returns:
            [B, P, H, 1 + K] fp32 probabilities (with views [B, V, P, H, 1 + K]); column 0 is the class token.

        Raises:
            UsageError: as `encode`, and for an encoder without class head.
        """
        if not self.num_prefix_tokens:
            raise UsageError("get_attention: this encoder has no class head (global_pool='avg')")
        tokens, keep, _ = self._tokens(images, keep)
        _, maps = self.pool(tokens, return_weights=True)
        return image_major(torch.stack(maps, 1).float(), keep)

    def _tokens(self, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """(trunk tokens of the view-major rows [V*B, K, D], keep as given or all, grid)."""
        grid = self.check_images(images)
        b, n = images.shape[0], grid[0] * grid[1]
        rows = None if keep is None else check_keep(keep, b, n, images.device)
        tokens = self.trunk(self.embed(images, rows))
        return tokens, torch.arange(n, device=images.device).expand(b, n) if keep is None else keep, grid

    def check_images(self, images: Tensor) -> tuple[int, int]:
        """The grid of images [B, C, H, W]; raises UsageError for another shape, dtype or size."""
        # what stands in the place of the convolution may have no weight, or no plain one
        weight = getattr(self.patch_embed.proj, "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None
        check_images(images, self.in_chans, dtype)
        return check_sides(images.shape[-2:], self.patch_size)

    def forward(self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, C, H, W] -> pooled feature [B, D], or logits [B, num_classes]; other arguments as `forward_features`."""
        return self.forward_head(self.forward_features(images, attn_mask, is_causal))

    def as_dino(self, version: int = 2, layer_class: str = "head") -> Dino:
        """The interface of DINO 1, 2 or 3 (`version`) on the same parameters (`dino_interface.Dino`)."""
        return Dino(self, version, layer_class)

    def preprocess(
        self, value_range: tuple[float, ...] | None = None, crop_pct: float | None = None
    ) -> Preprocess:
        """The transform of these weights: PIL image or uint8 [H, W, 3] -> normalized float32 [C, H, W].

        Resizes the short side to size / crop_pct (size * 256 / 224, antialiased) and crops the center, as timm's
        transform and the exports' image processor do; the numbers are in the transform's `metadata` (`input_size`,
        `mean`, `std`, `interpolation`, `crop_pct`).

        Args:
            value_range: (black, white) of images of more than 8 bits, as `data.range`; None: that of the weights.
            crop_pct: in place of that of the weights; 1 for images that are already cropped.
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
        """How k-NN, probe, `embed` and `search` resize images: as `preprocess`, which makes single ones.

        Weights of older versions (`keep_exact`) are used as they were then, unless `crop_pct` is given.
        """
        from ..data.preprocess import Resizing, check_crop_pct

        if crop_pct is None:
            return Resizing(self.crop_pct, self.interpolation, self.keep_exact)
        return Resizing(check_crop_pct(crop_pct), self.interpolation)


# ---- building -------------------------------------------------------------------------------------

# what `create_encoder` passes on to the configuration
_SHAPE = ("width", "depth", "heads", "mlp_ratio", "pool_depth", "layer_scale")


# arguments of timm's VisionTransformer: those of other names here, and those with the values that hold here
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
    """Options under the names used here, without those of timm's that change nothing."""
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
    """A randomly initialized encoder.

    Args:
        name: one of `list_models()`.
        num_classes: 0: features; else a linear head on the pooled feature.
        img_size: pixels, or (height, width); multiples of `patch_size`.
        in_chans: channels of the images.
        drop_path_rate: of the last trunk block.
        patch_size: pixels; None: those of the name.
        global_pool: 'token' (class head), 'avg' (mean of patch tokens, no class head), or '' (class head; `forward`
            gives all tokens).
        fc_norm: with 'avg': normalize after pooling instead of before (the paper's fine-tuning); None, as timm: with
            'avg' True.
        pos_embed: 'sincos' (fixed) or 'learned' (a parameter that starts from the table).
        pos_coords: 'absolute' or 'rescaled': coordinates of grids other than `pos_grid` (`positions.SinCos`).
        pos_grid: (rows, columns) trained on; default: that of `img_size`.
        final_norm: False: tokens are not normalized at the end (the released code's linear probe).
        norm_eps: added to the variance by every LayerNorm (Hugging Face's ViT: 1e-12).
        dynamic_img_size: images of other sizes than `img_size` resample a learned table at every call, as timm does; a
            sin-cos table takes any size.
        drop_rate: dropout before the linear head.
        **shape: width, depth, heads, mlp_ratio, pool_depth, layer_scale in place of those of the name. Of timm's
            VisionTransformer: `embed_dim`, `num_heads`; others at the value that holds here.

    Raises:
        UsageError: an unknown name or keyword (with the nearest), or a size that does not divide.
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
    """The arguments, plain JSON, with which `create_encoder(encoder.architecture, ...)` builds it again.

    Without number of classes, drop rates, `dynamic_img_size` and pruning.
    """
    config, plain = encoder.config, ModelConfig(size=encoder.config.size)
    args: dict[str, Any] = {
        "img_size": list(encoder.img_size),
        "patch_size": encoder.patch_size,
        "in_chans": encoder.in_chans,
        "global_pool": encoder.global_pool,
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
    """`config.json` next to `model.safetensors`, as timm's `local-dir:` and Hugging Face's timm wrapper read it."""
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
    """The encoder of a configuration; `seed`: the same weights every time, the global generator untouched."""
    if seed is None:
        return Encoder(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(config)
