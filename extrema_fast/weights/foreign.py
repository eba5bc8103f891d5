"""Names for checkpoints of other projects, told by their keys, so that an error can say what a file is."""

from __future__ import annotations

import re
from collections.abc import Collection

# (name, patterns of which each must match some key, patterns none of which may), the telling ones first
_FORMATS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("a DINOv3 ViT", (r"storage_tokens$|rope_embed\.",), ()),
    ("a DINOv2 ViT", (r"mask_token$", r"blocks\.\d+\.(\d+\.)?ls1\.gamma"), ()),
    ("an I-JEPA checkpoint", (r"predictor_blocks\.|predictor_embed\.",), ()),
    ("an MAE checkpoint", (r"decoder_blocks\.|decoder_embed\.|decoder_pos_embed",), ()),
    ("an OpenCLIP model", (r"visual\.transformer\.resblocks|visual\.trunk\.",), ()),
    ("a Hugging Face ViT", (r"embeddings\.patch_embeddings|attention\.attention\.query",), ()),
    ("a torchvision ViT", (r"encoder\.layers\.encoder_layer_0", r"conv_proj\."), ()),
    ("a BEiT model", (r"attn\.q_bias$|relative_position_bias_table",), (r"layers\.\d",)),
    ("a Swin transformer", (r"layers\.\d+\.blocks\.\d+\.attn",), ()),
    ("a MoCo v3 checkpoint", (r"base_encoder\.", r"momentum_encoder\."), (r"blocks_token\.",)),
    ("a CaiT model", (r"blocks_token_only\.",), ()),
    ("a ResNet", (r"layer1\.0\.conv1",), ()),
    ("a DINO checkpoint", (r"backbone\.blocks\.\d+\.attn\.qkv",), ()),
    ("a ViT of timm, with a class token among the patches", (r"cls_token$", r"blocks\.\d+\.attn\.qkv"), ()),
    ("a ViT of timm", (r"blocks\.\d+\.attn\.qkv",), ()),
)


def name_of(keys: Collection[str]) -> str | None:
    """`a DINOv2 ViT` and the like: the format these keys are most probably from, or None."""
    for name, needed, excluded in _FORMATS:
        has = [any(re.search(p, k) for k in keys) for p in needed]
        if all(has) and not any(re.search(p, k) for p in excluded for k in keys):
            return name
    return None
