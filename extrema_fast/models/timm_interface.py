"""The interface of timm's vision transformers, for timm and code written for it; timm itself is not required.

The trunk has no class token: the class head computes it from the tokens of the last layer, as in timm's `Cait`. If the
class token of another layer is requested, the class head runs on that layer's tokens, which it was not trained for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .positions import SinCos, resample_table

log = logging.getLogger(__name__)

POOLS = ("", "token", "avg")


def resolve_layers(depth: int, indices: int | Sequence[int] | None, name: str = "indices") -> list[int]:
    """Layer numbers, ascending: all for None, the last n for an int n, or those given (negative: from the end)."""
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise UsageError(f"{name}: expected the last 1 to {depth} layers, got {indices}")
        return list(range(depth - indices, depth))
    if not len(indices) or any(not -depth <= i < depth for i in indices):
        raise UsageError(f"{name}: expected layers from {-depth} to {depth - 1}, got {list(indices)}")
    return sorted({i % depth for i in indices})


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens [B, N, D] -> [B, D, rows, columns], contiguous."""
    return tokens.transpose(1, 2).unflatten(2, grid).contiguous()


def check_no_mask(attn_mask: Any, is_causal: bool = False) -> None:
    """Raises UsageError if timm's attention-mask arguments are set."""
    if attn_mask is not None or is_causal:
        raise UsageError(
            f"{'is_causal' if attn_mask is None else 'attn_mask'}: attention here is not masked; "
            "encoder.encode(images, keep) computes kept patches only"
        )


def check_head(num_classes: int, global_pool: str) -> None:
    """Raises UsageError for a negative number of classes or an unknown pooling."""
    if not isinstance(num_classes, int) or num_classes < 0:
        raise UsageError(f"num_classes: expected 0 (features) or more, got {num_classes!r}")
    if global_pool not in POOLS:
        raise UsageError(f"global_pool: expected 'token', 'avg' or '' (no pooling), got {global_pool!r}")


def _as_dict(
    layers: list[Tensor], prefix: list[Tensor] | None, features: Tensor | None = None
) -> dict[str, Any]:
    parts = {
        "image_intermediates": layers,
        "image_intermediates_prefix": prefix,
        "image_features": features,
    }
    return {name: part for name, part in parts.items() if part is not None}


def traced_positions(
    images: Tensor, saved: Tensor, patch: int, own: tuple[int, int], coords: str, trained: tuple[int, int]
) -> Tensor:
    """The position table for `images`, as one torch.fx node: `saved` [1, N, D] for the grid `own`, else computed."""
    grid = images.shape[-2] // patch, images.shape[-1] // patch
    if grid == own or isinstance(saved, nn.Parameter):
        return saved[0]
    return SinCos(saved.shape[-1], coords, trained).table(grid, saved)


torch.fx.wrap("traced_positions")


class TimmInterface(nn.Module):
    """timm's methods and attributes, built on the modules and methods of `Encoder`."""

    # True would promise a class token in every layer
    has_class_token = False

    classes: list[str]

    if TYPE_CHECKING:
        # set by `Encoder`, which also has the methods used here
        config: Any
        blocks: Any
        blocks_token: Any
        cls_token: Any
        pos_embed: Any
        global_pool: str
        norm: Any
        fc_norm: Any
        head: Any
        _model_args: dict[str, Any]
        _traits: dict[str, Any]

        def __getattr__(self, name: str) -> Any: ...

    # ---- attributes ------------------------------------------------------------------------------

    @property
    def img_size(self) -> tuple[int, int]:
        """(height, width) in pixels. With a sin-cos table other sizes work, too."""
        return self.patch_embed.img_size

    @property
    def patch_size(self) -> int:
        """Patch side in pixels."""
        return self.patch_embed.patch_size[0]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at `img_size`."""
        return self.patch_embed.grid_size

    @property
    def num_patches(self) -> int:
        """Number of patches N at `img_size`."""
        return self.patch_embed.num_patches

    @property
    def depth(self) -> int:
        """Number of trunk blocks L."""
        return len(self.blocks)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patch tokens in `forward_features`: 1, or 0 without a class head."""
        return 0 if self.cls_token is None else 1

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each trunk block: `num_chs` (D), `reduction` (pixels per token) and `module` (name)."""
        reduction = self.patch_embed.feat_ratio()
        return [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": reduction}
            for i in range(len(self.blocks))
        ]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The configuration that timm's data and head code reads: set by timm's factory, else `own_cfg`."""
        return self.__dict__.get("_pretrained_cfg") or self.own_cfg()

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg: dict[str, Any]) -> None:
        self.__dict__["_pretrained_cfg"] = cfg
        for name in ("mean", "std", "interpolation", "crop_pct"):
            if value := cfg.get(name):
                setattr(self, name, tuple(value) if name in ("mean", "std") else value)

    # the older name
    default_cfg = pretrained_cfg

    def own_cfg(self) -> dict[str, Any]:
        """Builds a `pretrained_cfg` for timm from the attributes of this encoder."""
        mean, std = tuple(self.mean), tuple(self.std)
        if self.in_chans == 1:
            # one number, which timm asserts; as in `normalize`
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "input_size": (self.in_chans, *self.img_size),
            "fixed_input_size": isinstance(self.pos_embed, nn.Parameter),
            "pool_size": None,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": "center",
            "mean": mean,
            "std": std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }

    # ---- features --------------------------------------------------------------------------------

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, C, H, W] -> tokens after the final norm, [B, 1 + N, D], class token first; [B, N, D] without class head.

        `attn_mask` and `is_causal` exist for compatibility with timm; values other than the defaults are an error.
        """
        if isinstance(x, torch.fx.Proxy):
            return self._fx_features(x)
        check_no_mask(attn_mask, is_causal)
        out = self.encode(x)
        return torch.cat([out.cls[:, None], out.patches], 1) if self.num_prefix_tokens else out.patches

    def _fx_features(self, x: Any) -> Any:
        """`forward_features` for torch.fx, which calls blocks as leaf modules."""
        if not x.tracer.is_leaf_module(self.blocks[0], "blocks.0"):
            raise UsageError(
                "torch.fx: cannot trace into this encoder's blocks; `import extrema_fast.timm`, then timm.models."
                "create_feature_extractor, or a tracer whose leaf modules are timm.layers.get_notrace_modules()"
            )
        sincos = self.sincos
        pos = traced_positions(x, self.pos_embed, self.patch_size, self.grid, sincos.coords, sincos.trained)
        tokens = self.patch_embed(x) + pos
        for block in self.blocks:
            tokens = block(tokens)
        if self.num_prefix_tokens:
            cls = self.cls_token[:, 0].expand(tokens.shape[0], -1)
            for block in self.blocks_token:
                cls = block(cls, tokens)
            tokens = torch.cat([cls[:, None], tokens], 1)
        return self.norm(tokens)

    def __prepare_scriptable__(self) -> Any:
        # called by torch.jit.script, which would fail at the first unsupported line
        raise UsageError(
            "torch.jit.script: this encoder is not scripted; use torch.jit.trace, torch.export or "
            "`extrema-fast export --format torch-export`"
        )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` -> logits, or with `pre_logits` the pooled features before the classifier."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Patch tokens after selected trunk blocks, and the final features.

        Args:
            x: [B, C, H, W].
            indices: None: all blocks; an int n: the last n; a sequence: these blocks, negative ones counted from the
                end.
            return_prefix_tokens: return pairs (patch tokens, class token [B, 1, D]), with the class head run on that
                layer's tokens. Without a class head only patch tokens are returned, as in timm.
            norm: apply the final norm to each layer.
            stop_early: skip the blocks after the last selected one; the features are then computed from its tokens.
            output_fmt: 'NCHW': [B, D, rows, columns]; 'NLC': [B, N, D].
            intermediates_only: return only the list.
            output_dict: return a dictionary with image_intermediates, image_intermediates_prefix (if requested) and
                image_features (unless `intermediates_only`).
            attn_mask: for compatibility with timm; must be None.
            is_causal: for compatibility with timm; must be False.

        Returns:
            (features as from `forward_features`, list of layers in ascending order), or only the list, or the
            dictionary.

        Raises:
            UsageError: an invalid argument.
        """
        check_no_mask(attn_mask, is_causal)
        # timm passes an enumeration of strings
        if not any(output_fmt == f for f in ("NCHW", "NLC")):
            raise UsageError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        indices = resolve_layers(len(self.blocks), indices)
        grid = self.check_images(x)
        tokens, layers = self.trunk_layers(self.embed(x), indices, stop_early=stop_early)
        normed = self.norm if norm else nn.Identity()
        prefix = None
        if return_prefix_tokens and self.num_prefix_tokens:
            prefix = [normed(self.pool(t)[0])[:, None] for t in layers]
        layers = [normed(t) for t in layers]
        if output_fmt == "NCHW":
            layers = [to_map(t, grid) for t in layers]
        pairs = layers if prefix is None else list(zip(layers, prefix, strict=True))
        if intermediates_only:
            return _as_dict(layers, prefix) if output_dict else pairs
        if self.num_prefix_tokens:
            tokens = torch.cat([self.pool(tokens)[0][:, None], tokens], 1)
        tokens = self.norm(tokens)
        return _as_dict(layers, prefix, tokens) if output_dict else (tokens, pairs)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list[Any]:
        """Patch tokens after the last n blocks, or after the blocks listed in n.

        Each is [B, N, D], or [B, D, rows, columns] with `reshape`. Other arguments as in `forward_intermediates`.
        """
        fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt=fmt, intermediates_only=True, attn_mask=attn_mask
        )

    # ---- changes in place ------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes everything that the selected layers do not need.

        Args:
            indices: layers to keep available, as in `forward_intermediates`; later blocks are removed.
            prune_norm: also remove the final norm.
            prune_head: also remove class head, class token and classifier.

        Returns:
            The layer numbers in ascending order; they stay valid.
        """
        kept = resolve_layers(len(self.blocks), indices)
        before, after = len(self.blocks), kept[-1] + 1
        # each block keeps its own drop-path rate
        self.drop_path_rate *= (after - 1) / max(before - 1, 1)
        self.blocks, self.config = self.blocks[:after], replace(self.config, depth=after)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.cls_token, self.blocks_token = None, None
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return kept

    def get_classifier(self) -> nn.Module:
        """The linear head, or an `Identity` without one."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the linear head (0 classes: none) and, if given, the pooling.

        With 'avg' an existing class head stays: it is computed but not used. Build the encoder with
        `global_pool='avg'` to leave it out.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        check_head(num_classes, global_pool)
        if global_pool == "token" and not self.num_prefix_tokens:
            raise UsageError("global_pool: 'token' needs the class head, which this encoder lacks; use 'avg'")
        self.num_classes, self.global_pool, self.classes = num_classes, global_pool, []
        like = next(p for p in self.parameters() if p.is_floating_point())
        self.head = nn.Identity()
        if num_classes:
            head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(head.weight, std=2e-5)
            nn.init.zeros_(head.bias)
            self.head = head
        self.head.train(self.training)

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
        antialias: bool = True,
    ) -> None:
        """Changes the image size or patch size.

        A sin-cos table is recomputed for the new grid; a learned table is resampled.

        Args:
            img_size: pixels, or (height, width); None: unchanged.
            patch_size: pixels; the patch kernel is resampled (`resample_patch_kernel`). None: unchanged.
            antialias: antialias the resampling of a learned table (the released code does not).

        Raises:
            UsageError: the image size is not a multiple of the patch size; nothing is changed.
        """
        old = self.grid
        self.patch_embed.set_input_size(img_size, patch_size)
        self.config = replace(self.config, img_size=self.img_size, patch_size=self.patch_size)
        # timm's factory rebuilds the model from these records, if there are any
        if "_model_args" in self.__dict__:
            own = {"img_size": self.img_size, "patch_size": self.patch_size, "pos_grid": self.sincos.trained}
            self._model_args = {**self._model_args, **own}
        if "_traits" in self.__dict__:
            self._traits = {**self._traits, "img_size": self.img_size}
        if self.grid == old:
            return
        table = self.pos_embed
        if isinstance(table, nn.Parameter):
            log.info("learned positions resampled from %d x %d to %d x %d patches", *old, *self.grid)
            resampled = resample_table(table.detach(), old, self.grid, antialias)
            self.pos_embed = nn.Parameter(resampled, requires_grad=table.requires_grad)
        else:
            self.pos_embed = self.sincos.table(self.grid, table)[None].clone()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns activation checkpointing of the trunk blocks on or off: they are recomputed in the backward pass."""
        self.grad_checkpointing = enable

    # ---- optimizers ------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay (timm itself excludes one-dimensional ones)."""
        return {"cls_token", *(["pos_embed"] if isinstance(self.pos_embed, nn.Parameter) else [])}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for timm's layer-wise learning-rate decay: stem and blocks; the rest is the head.

        Class token, class-attention blocks and final norm belong to the group of the last trunk block, whose tokens
        they read. A norm after pooling is new in fine-tuning and, like the head, gets the full learning rate, as in
        the released code.
        """
        return {
            "stem": r"^(?:patch_embed|pos_embed)",
            # 99999 is timm's "with the group before"; a number captured here would sort among the blocks
            "blocks": [
                (r"^blocks\.(\d+)", None),
                (r"^(?:cls_token|blocks_token\.|norm\.)", (99999,)),
            ],
        }
