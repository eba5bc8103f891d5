"""Loads vision transformers of other projects, class token included, as timm models, and accelerates them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError, cannot_import, one_line
from ..models.accelerate import Accelerated
from .folder import encoder_options, model_config, on_cpu
from .load import load_encoder, open_weights


def accelerate(vit: nn.Module | str | Path, *, attention: str = "auto", strict: bool = False) -> Accelerated:
    """Fast masked and dense encoding with the weights of `vit`, which is not modified.

        fast = extrema_fast.accelerate(vit)
        latent = fast.encode(images, keep).tokens            # class token and kept patches
        loss = decoder(latent, keep)

    Args:
        vit: a timm VisionTransformer, a subclass that keeps its `forward_features` and `_pos_embed`, or a path, which
            is loaded by `load_vit`.
        attention: self-attention backend, as in `Encoder.set_attention`.
        strict: raise an error for a part that cannot be replaced, here and at every pass, instead of calling it as it
            is.

    Returns:
        An object with `encode(images, keep)`, which encodes like `Encoder.encode`, and `report()`, which says what is
        replaced and why the rest is not.

    Raises:
        UsageError: an unsupported model or an unknown backend; the message says what is possible.
    """
    return Accelerated(load_vit(vit) if isinstance(vit, (str, Path)) else vit, attention, strict)


@on_cpu
def load_vit(
    path: str | Path,
    which: str | None = None,
    *,
    grid: Sequence[int] | None = None,
    num_heads: int | None = None,
) -> Any:
    """Loads the trunk, class token and registers of a file or folder into a timm VisionTransformer, in eval mode.

    Its tokens equal those of the original model. Heads are left out, and layer scale is folded into the weights.

    Args:
        path: a ViT of timm, MAE, DINO, DINOv2, MoCo v3, torchvision or Hugging Face.
        which: 'teacher' or 'student', if the file has both.
        grid: as in `load_encoder`.
        num_heads: as in `load_encoder`.

    Raises:
        UsageError: as in `load_encoder`; also for ExtreMA weights, for a model with a distillation token, or if timm is
            missing.
    """
    try:
        from timm.models.vision_transformer import VisionTransformer
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"load_vit: {cannot_import('timm', error, 'timm')}") from error
    weights = open_weights(path, grid, num_heads, which=which, registers=True)
    name = weights.choose(which)
    # checks the weights, and infers options from the tensors
    encoder = load_encoder(weights, which, num_classes=0)
    prefix = weights.prefixes.get(name, {})
    if encoder.blocks_token is not None:
        raise UsageError(
            f"{path}: ExtreMA weights, whose class token is not in the trunk; load_encoder(path).encode(images, keep) "
            "encodes kept patches"
        )
    if "dist_token" in prefix:
        raise UsageError(f"{path}: has a distillation token, which timm's VisionTransformer does not support")
    config, options = model_config(weights.meta), encoder_options(weights.meta)
    width, depth, heads = config.shape
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("head.")}
    rows = prefix.get("pos_embed", encoder.pos_embed[:, :0]).float()
    state |= {k: v.float() for k, v in prefix.items() if k != "pos_embed"}
    registers = prefix["reg_token"].shape[1] if "reg_token" in prefix else 0
    if registers and rows.shape[1] == 1:
        # DINOv2 has a position for the class token only; timm's table has one for every prefix token, or none
        state["cls_token"], rows = state["cls_token"] + rows, rows[:, :0]
    state["pos_embed"] = torch.cat([rows, encoder.pos_embed.detach()], 1)
    vit = VisionTransformer(
        img_size=encoder.img_size,
        patch_size=encoder.patch_size,
        in_chans=encoder.in_chans,
        num_classes=0,
        global_pool="avg" if options["fc_norm"] or "cls_token" not in prefix else "token",
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=config.mlp_ratio,
        class_token="cls_token" in prefix,
        no_embed_class=rows.shape[1] == 0,
        reg_tokens=registers,
        fc_norm=options["fc_norm"],
        norm_layer=partial(nn.LayerNorm, eps=encoder.norm_eps),
    )
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"{path}: {one_line(error, 300)}") from None
    return vit.eval()
