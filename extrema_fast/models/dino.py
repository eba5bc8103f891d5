"""An encoder under the interface of DINOv2 or DINOv3, for code written for those.

    backbone = encoder.as_dino()
    layers = backbone.get_intermediate_layers(images, n=4, reshape=True, return_class_token=True)

The two differ from timm in defaults (norm), types (tuple, dict, int `patch_size`) and in a class token at every
layer. Here the class token is made by the class head from the last layer's tokens alone. Where one is asked for
at an earlier layer, `layer_class='head'` runs the class head on that layer's tokens, which it was never trained
on; 'last' repeats the last layer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .timm_methods import take_indices


class Dino(nn.Module):
    """The adapter: `encoder` is a sub-module, its parameters are shared.

    version      2 or 3: names of the dictionary's keys, arguments of `get_intermediate_layers`
    layer_class  'head' or 'last': the class token of a layer before the last
    raises       UsageError for another version, or an encoder without class head
    """

    num_register_tokens = n_storage_tokens = 0

    def __init__(self, encoder: nn.Module, version: int = 2, layer_class: str = "head") -> None:
        super().__init__()
        if version not in (2, 3):
            raise UsageError(f"as_dino: version: expected 2 or 3, got {version!r}")
        if layer_class not in ("head", "last"):
            raise UsageError(f"as_dino: layer_class: expected 'head' or 'last', got {layer_class!r}")
        if not encoder.num_prefix_tokens:
            raise UsageError("as_dino: this encoder has no class head (global_pool='avg')")
        self.encoder, self.version, self.layer_class = encoder, version, layer_class
        self.head = nn.Identity()
        self.train(encoder.training)

    # ---- attributes of a DINO model --------------------------------------------------------------

    @property
    def patch_size(self) -> int:
        return self.encoder.patch_size

    @property
    def embed_dim(self) -> int:
        return self.encoder.embed_dim

    num_features = embed_dim

    @property
    def num_heads(self) -> int:
        return self.encoder.heads

    @property
    def n_blocks(self) -> int:
        return self.encoder.depth

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.blocks

    @property
    def patch_embed(self) -> nn.Module:
        return self.encoder.patch_embed

    @property
    def norm(self) -> nn.Module:
        return self.encoder.norm

    @property
    def cls_token(self) -> Tensor:
        return self.encoder.cls_token

    # ---- methods of a DINO model -----------------------------------------------------------------

    def forward_features(self, x: Tensor | list[Tensor], masks: Any = None) -> Any:
        """[B, C, H, W] -> dictionary; a list of images gives a list of dictionaries.

        returns  x_norm_clstoken [B, D], x_norm_patchtokens [B, N, D], x_norm_regtokens [B, 0, D] (version 3:
                 x_storage_tokens), x_prenorm [B, 1 + N, D], masks (None)
        raises   UsageError for `masks`: there is no mask token; `encoder.encode(images, keep)` leaves patches out
        """
        if isinstance(x, (list, tuple)):
            masks = masks if masks is not None else [None] * len(x)
            return [self.forward_features(i, m) for i, m in zip(x, masks, strict=True)]
        if masks is not None:
            raise UsageError(
                "masks: this encoder has no mask token; encoder.encode(images, keep) computes kept patches only"
            )
        out = self.encoder.encode(x, norm=False)
        cls, patches = self.norm(out.cls), self.norm(out.patches)
        return {
            "x_norm_clstoken": cls,
            "x_norm_regtokens" if self.version == 2 else "x_storage_tokens": patches[:, :0],
            "x_norm_patchtokens": patches,
            "x_prenorm": torch.cat([out.cls[:, None], out.patches], 1),
            "masks": None,
        }

    def forward(self, x: Tensor | list[Tensor], masks: Any = None, is_training: bool = False) -> Any:
        """Class token after the norm [B, D]; with `is_training` what `forward_features` gives."""
        out = self.forward_features(x, masks)
        if is_training:
            return out
        if isinstance(out, list):
            return [self.head(o["x_norm_clstoken"]) for o in out]
        return self.head(out["x_norm_clstoken"])

    def get_intermediate_layers(self, x: Tensor, *args: Any, **options: Any) -> tuple:
        """Tokens of some layers, as DINO's method of that name.

        version 2    (x, n=1, reshape=False, return_class_token=False, norm=True)
        version 3    the same by keyword only, and return_extra_tokens=False
        n            the last n layers, or a sequence of layers
        returns      tuple, ascending: patches [B, N, D] or, reshaped, [B, D, rows, columns]; with class token
                     pairs (patches, class token [B, D]); with extra tokens these ([B, 0, D]) last
        """
        if self.version == 2:
            return self._layers_v2(x, *args, **options)
        return self._layers(x, *args, **options)

    def _layers_v2(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple:
        return self._layers(x, n=n, reshape=reshape, return_class_token=return_class_token, norm=norm)

    def _layers(
        self,
        x: Tensor,
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple:
        encoder = self.encoder
        take = take_indices(encoder.depth, n, "n")
        whole = return_class_token and self.layer_class == "last"
        rows, columns = encoder._check_images(x)
        tokens, layers = encoder.trunk_layers(encoder.embed(x), take, stop=not whole)
        normed = self.norm if norm else nn.Identity()
        patches = [normed(t) for t in layers]
        if reshape:
            patches = [t.transpose(1, 2).unflatten(2, (rows, columns)).contiguous() for t in patches]
        parts = [patches]
        if return_class_token:
            seen = [tokens] * len(layers) if whole else layers
            parts.append([normed(encoder.pool(t)[0]) for t in seen])
        if return_extra_tokens:
            parts.append([t[:, :0] for t in layers])
        return tuple(patches) if len(parts) == 1 else tuple(zip(*parts, strict=True))
