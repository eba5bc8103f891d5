"""What timm, and code written for timm's vision transformers, asks of a model; timm itself is not needed.

Patch tokens come without a class token from every layer but the last: the trunk has none, the class head
makes it from the last layer's tokens (as timm's `Cait`). `Encoder.as_dino` gives one per layer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .resample import resample_table

log = logging.getLogger(__name__)

POOLS = ("", "token", "avg")
FORMATS = ("NCHW", "NLC")


def take_indices(depth: int, indices: int | Sequence[int] | None, name: str = "indices") -> list[int]:
    """Ascending layer numbers: None all, n the last n, a sequence these (negative ones from the end).

    raises  UsageError for a layer there is not, or none at all
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise UsageError(f"{name}: expected the last 1 to {depth} layers, got {indices}")
        return list(range(depth - indices, depth))
    bad = [i for i in indices if not -depth <= i < depth]
    if bad or not len(indices):
        raise UsageError(f"{name}: expected layers from {-depth} to {depth - 1}, got {list(indices)}")
    return sorted({i % depth for i in indices})


def check_classes(num_classes: int) -> None:
    """raises UsageError unless it is a number of classes."""
    if not isinstance(num_classes, int) or num_classes < 0:
        raise UsageError(f"num_classes: expected 0 (features) or more, got {num_classes!r}")


class TimmMethods(nn.Module):
    """The methods of timm's contract, on an `Encoder` (which has the modules and `encode`)."""

    # True would promise a class token from every layer
    has_class_token = False

    # ---- attributes ------------------------------------------------------------------------------

    @property
    def num_prefix_tokens(self) -> int:
        """Rows of `forward_features` before the patch tokens: 1, or 0 without class head."""
        return 0 if self.cls_token is None else 1

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Per trunk block: num_chs D, reduction in pixels, module name."""
        reduction = self.patch_embed.feat_ratio()
        return [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": reduction}
            for i in range(len(self.blocks))
        ]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm's data and head code reads: what timm's factory set, else told from this encoder."""
        return self.__dict__.get("_pretrained_cfg") or self.own_cfg()

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg: dict[str, Any]) -> None:
        self.__dict__["_pretrained_cfg"] = cfg
        for name in ("mean", "std"):
            if cfg.get(name):
                setattr(self, name, tuple(cfg[name]))
        for name in ("interpolation", "crop_pct"):
            if cfg.get(name):
                setattr(self, name, cfg[name])

    # the name that older code uses
    default_cfg = pretrained_cfg

    def own_cfg(self) -> dict[str, Any]:
        """The numbers of this encoder as a `pretrained_cfg` of timm's."""
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "input_size": (self.in_chans, *self.img_size),
            "fixed_input_size": isinstance(self.pos_embed, nn.Parameter),
            "pool_size": None,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": "center",
            "mean": tuple(self.mean),
            "std": tuple(self.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }

    def _note(self, **args: Any) -> None:
        """Tells timm's factory record, where there is one, how to build this model anew."""
        if "_model_args" in self.__dict__:
            self._model_args = {**self._model_args, **args}
        if "img_size" in args and "_traits" in self.__dict__:
            self._traits = {**self._traits, "img_size": args["img_size"]}

    # ---- features --------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> tokens after the final norm, [B, 1 + N, D] class token first; [B, N, D] without one."""
        out = self.encode(x)
        return torch.cat([out.cls[:, None], out.patches], 1) if self.num_prefix_tokens else out.patches

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` -> logits, or the pooled feature before the classifier.

        Pools the class token ('token'), the mean of patch tokens ('avg'), or nothing (''); then `fc_norm`,
        dropout and `head`.
        """
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
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Patch tokens after chosen trunk blocks, in ascending order, and the final features.

        x            [B, C, H, W]
        indices      None: all blocks; n: the last n; a sequence: these, negative ones from the end
        norm         the final norm over each
        stop_early   nothing runs after the last chosen block; final features are then made from its tokens
        output_fmt   'NCHW': [B, D, rows, columns]; 'NLC': [B, N, D]
        returns      (features as `forward_features`, list), or the list alone with `intermediates_only`
        raises       UsageError for `return_prefix_tokens=True`: there is no class token before the last block
        """
        if return_prefix_tokens:
            raise UsageError(
                "return_prefix_tokens: the trunk has no class token; encoder.as_dino() makes one per layer"
            )
        # timm gives an enumeration of strings
        if not any(output_fmt == f for f in FORMATS):
            raise UsageError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        take = take_indices(len(self.blocks), indices)
        rows, columns = self._check_images(x)
        tokens, taken = self.trunk_layers(self.embed(x), take, stop=stop_early)
        taken = [self.norm(t) if norm else t for t in taken]
        if output_fmt == "NCHW":
            taken = [t.transpose(1, 2).unflatten(2, (rows, columns)).contiguous() for t in taken]
        return taken if intermediates_only else (self._features(tokens), taken)

    def _features(self, tokens: Tensor) -> Tensor:
        """Trunk tokens [B, N, D] -> features as of `forward_features`."""
        if self.num_prefix_tokens:
            tokens = torch.cat([self.pool(tokens)[0][:, None], tokens], 1)
        return self.norm(tokens)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Tensor]:
        """Patch tokens of the last n blocks, or of those named: [B, N, D], reshaped [B, D, rows, columns]."""
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm,
            output_fmt="NCHW" if reshape else "NLC", intermediates_only=True,
        )  # fmt: skip

    # ---- changes in place ------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what these layers do not need: later blocks; the norm; class head, class token, classifier.

        returns  the layers, ascending; the numbers stay valid
        """
        take = take_indices(len(self.blocks), indices)
        before, after = len(self.blocks), take[-1] + 1
        # each block keeps its own drop-path rate
        self.drop_path_rate *= (after - 1) / max(before - 1, 1)
        self.blocks = self.blocks[:after]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.cls_token, self.blocks_token = None, None
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The linear head, or an Identity."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear head (0: none); another pool: 'token', 'avg', '' (tokens as they are), None keeps it.

        With 'avg' a class head that exists stays, computed and without use: build with `global_pool='avg'`
        where it is not wanted.
        raises  UsageError for 'token' without class head
        """
        check_classes(num_classes)
        if global_pool is not None:
            if global_pool not in POOLS:
                raise UsageError(f"global_pool: expected 'token', 'avg' or '', got {global_pool!r}")
            if global_pool == "token" and not self.num_prefix_tokens:
                raise UsageError(
                    "global_pool: 'token' needs the class head, which this encoder lacks; use 'avg'"
                )
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.patch_embed.proj.weight
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)
        self.head.train(self.training)

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
        antialias: bool = True,
    ) -> None:
        """Another image size, or patch size (the kernel is resampled, `resample_patch_kernel`).

        The sin-cos table is computed for the new grid; a learned one is resampled in place of the old.
        antialias  of that resampling (the released code has none)
        raises     UsageError, with nothing changed, where the patch does not divide the image
        """
        old = self.grid
        self.patch_embed.set_input_size(img_size, patch_size)
        self.config = replace(self.config, img_size=self.img_size, patch_size=self.patch_size)
        self._note(img_size=self.img_size, patch_size=self.patch_size, pos_grid=tuple(self.sincos.trained))
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
        """Runs each trunk block anew in the backward pass instead of keeping what it made."""
        self.grad_checkpointing = enable

    # ---- optimizers ------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay (timm leaves out one-dimensional ones itself)."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise learning rates: stem, blocks, (head).

        Class token, class blocks and norms count to the last block: they read its tokens.
        """
        return {
            "stem": r"^(?:patch_embed|pos_embed)",
            # 99999 is timm's "with the group before"; a number captured here would sort among the blocks
            "blocks": [
                (r"^blocks\.(\d+)", None),
                (r"^(?:cls_token|blocks_token\.|norm\.|fc_norm\.)", (99999,)),
            ],
        }
