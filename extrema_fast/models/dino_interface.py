"""The interface of DINO, DINOv2 or DINOv3 for an encoder, for code written for those models.

    backbone = encoder.as_dino()
    layers = backbone.get_intermediate_layers(images, n=4, reshape=True, return_class_token=True)

DINO differs from timm in defaults (norm), in types (tuple, dict, int `patch_size`), and in having a class token at
every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .timm_interface import resolve_layers, to_map

if TYPE_CHECKING:
    from .encoder import Encoder

# attributes of a DINO model that the encoder has under the same or another name
_SHARED = ("patch_size", "embed_dim", "num_features", "blocks", "patch_embed", "norm", "cls_token")
_RENAMED = {"num_heads": "heads", "n_blocks": "depth"}


class Dino(nn.Module):
    """Adapter to DINO's interface; `encoder` is a submodule, so parameters are shared.

    The encoder computes its class token only from the tokens of the last layer. For an earlier layer,
    `layer_class='head'` runs the class head on that layer's tokens, which it was not trained on, and 'last' repeats
    the class token of the last layer.

    Args:
        encoder: an encoder with a class head.
        version: 1 returns each layer as tokens with the class token first; 2 and 3 differ in the names of dictionary
            keys, and 3 also accepts images of any size, which are cropped at the right and bottom to whole patches, as
            in DINOv3.
        layer_class: 'head' or 'last'.

    Raises:
        UsageError: an unknown version or `layer_class`, or an encoder without a class head.
    """

    num_register_tokens = n_storage_tokens = 0

    def __init__(self, encoder: Encoder, version: int = 2, layer_class: str = "head") -> None:
        super().__init__()
        if version not in (1, 2, 3):
            raise UsageError(f"as_dino: version: expected 1, 2 or 3, got {version!r}")
        if layer_class not in ("head", "last"):
            raise UsageError(f"as_dino: layer_class: expected 'head' or 'last', got {layer_class!r}")
        if not encoder.num_prefix_tokens:
            raise UsageError("as_dino: this encoder has no class head (global_pool='avg')")
        self.encoder, self.version, self.layer_class = encoder, version, layer_class
        self.head = nn.Identity()
        self.train(encoder.training)

    def __getattr__(self, name: str) -> Any:
        if name == "patch_embed" and self.version == 1:
            # whose patch size is a number
            embed = self.encoder.patch_embed
            numbers = {k: getattr(embed, k) for k in ("img_size", "num_patches", "proj")}
            return SimpleNamespace(patch_size=self.encoder.patch_size, **numbers)
        if name in _SHARED or name in _RENAMED:
            return getattr(self.encoder, _RENAMED.get(name, name))
        return super().__getattr__(name)

    def forward_features(self, x: Tensor | list[Tensor], masks: Any = None) -> Any:
        """Class token and patch tokens of [B, C, H, W], or of a list of such batches, as a list.

        Returns:
            Version 1: the class token [B, D]. Else a dictionary: x_norm_clstoken [B, D], x_norm_patchtokens
            [B, N, D], x_norm_regtokens (version 3: x_storage_tokens) [B, 0, D], x_prenorm [B, 1 + N, D], masks (None).

        Raises:
            UsageError: `masks` is given.
        """
        if isinstance(x, (list, tuple)):
            masks = masks if masks is not None else [None] * len(x)
            return [self.forward_features(i, m) for i, m in zip(x, masks, strict=True)]
        if masks is not None:
            raise UsageError(
                "masks: this encoder has no mask token; encoder.encode(images, keep) computes kept patches only"
            )
        out = self.encoder.encode(self._whole_patches(x), norm=False)
        cls, patches = self.norm(out.cls), self.norm(out.patches)
        if self.version == 1:
            return cls
        return {
            "x_norm_clstoken": cls,
            "x_storage_tokens" if self.version == 3 else "x_norm_regtokens": patches[:, :0],
            "x_norm_patchtokens": patches,
            "x_prenorm": torch.cat([out.cls[:, None], out.patches], 1),
            "masks": None,
        }

    def forward(self, x: Tensor | list[Tensor], masks: Any = None, is_training: bool = False) -> Any:
        """Class token after the final norm, [B, D]; with `is_training` the result of `forward_features`."""
        out = self.forward_features(x, masks)
        if is_training or self.version == 1:
            return out
        if isinstance(out, list):
            return [self.head(o["x_norm_clstoken"]) for o in out]
        return self.head(out["x_norm_clstoken"])

    def _whole_patches(self, x: Tensor) -> Tensor:
        patch = self.encoder.patch_size
        if self.version != 3 or x.dim() != 4 or min(x.shape[-2:]) < patch:
            return x
        return x[..., : x.shape[-2] // patch * patch, : x.shape[-1] // patch * patch]

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention of the class token in the last block, [B, H, 1, 1 + N]; column 0 is the class token itself.

        DINO returns a row per token; here patches do not attend to the class token.
        """
        return self.encoder.get_attention(self._whole_patches(x))[:, -1, :, None]

    def init_weights(self) -> None:
        """Reinitializes all parameters; also works on a model from `to_empty`."""
        self.encoder.reset_parameters()

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
        *,
        return_extra_tokens: bool = False,
    ) -> tuple | list:
        """Tokens after selected layers, in ascending order.

        Version 1 accepts only `x` and `n`, and returns a list of [B, 1 + N, D] after the final norm, class token first.

        Args:
            x: [B, C, H, W].
            n: the last n layers, or a sequence of layer numbers.
            reshape: patch tokens as [B, D, rows, columns] instead of [B, N, D].
            return_class_token: return pairs (patch tokens, class token [B, D]).
            norm: apply the final norm.
            return_extra_tokens: append extra tokens, [B, 0, D].
        """
        encoder, x = self.encoder, self._whole_patches(x)
        return_class_token |= self.version == 1
        indices = resolve_layers(encoder.depth, n, "n")
        repeat_last = return_class_token and self.layer_class == "last"
        grid = encoder.check_images(x)
        tokens, layers = encoder.trunk_layers(encoder.embed(x), indices, stop_early=not repeat_last)
        normed = self.norm if norm else nn.Identity()
        columns = [[to_map(normed(t), grid) if reshape else normed(t) for t in layers]]
        if return_class_token:
            sources = [tokens] * len(layers) if repeat_last else layers
            columns.append([normed(encoder.pool(t)[0]) for t in sources])
        if return_extra_tokens:
            columns.append([t[:, :0] for t in layers])
        if self.version == 1:
            return [torch.cat([cls[:, None], patches], 1) for patches, cls in zip(*columns[:2], strict=True)]
        return tuple(columns[0]) if len(columns) == 1 else tuple(zip(*columns, strict=True))
