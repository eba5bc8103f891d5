"""Exports that timm and Hugging Face read: our own encoder, a stock ViT, Cait, a Hugging Face folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..models.encoder import NORM_EPS, Encoder, timm_config
from .files import write_json, write_tensors
from .load import load_encoder
from .model_card import model_card

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
_SIZES = {"tiny", "small", "base", "large"}


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest absolute difference, relative to the largest value where that is above 1; nan for other shapes."""
    found = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return float("nan")
        found = max(found, float((a - b).abs().max()) / max(1.0, float(a.abs().max())))
    return found


def add_differences(folder: Path, differences: Mapping[str, float]) -> None:
    """Writes what was measured into the folder's config.json and model card."""
    file = folder / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    own = data["extrema_fast"]
    own["export"]["differences"] = dict(differences)
    write_json(file, data)
    if own["export"]["format"] == "hf":
        (folder / "README.md").write_text(model_card(data), encoding="utf-8")


# ---- our own encoder ------------------------------------------------------------------------------


def write_extrema(encoder: Encoder, folder: Path, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    write_tensors(folder / WEIGHTS, encoder.state_dict())
    write_json(folder / "config.json", {**timm_config(encoder), "extrema_fast": own})


def compare_extrema(
    encoder: Encoder, folder: Path, images: Sequence[Tensor], options: Mapping[str, Any]
) -> dict[str, float]:
    loaded = load_encoder(folder)
    found = {"load_encoder": _outputs_differ(encoder, loaded, images)}
    try:
        import timm

        from .. import timm as _registered  # noqa: F401
    except (ImportError, RuntimeError) as error:
        log.info("not read back with timm, which cannot be imported (%s)", str(error).splitlines()[0])
        return found
    model = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True).eval()
    return {**found, "timm local-dir": _outputs_differ(encoder, model, images)}


def _outputs_differ(encoder: Encoder, model: nn.Module, images: Sequence[Tensor]) -> float:
    return max(
        largest_difference([encoder.forward_features(x), encoder(x)], [model.forward_features(x), model(x)])
        for x in images
    )


# ---- stock ViT ------------------------------------------------------------------------------------


def vit_config(encoder: Encoder) -> dict[str, Any]:
    """`config.json` of the mean-pooled trunk as a stock timm ViT (no class token)."""
    width, depth, heads = encoder.config.shape
    ours = timm_config(encoder)
    args = {
        "img_size": list(encoder.img_size),
        "patch_size": encoder.patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": encoder.config.mlp_ratio,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": isinstance(encoder.fc_norm, nn.LayerNorm),
    }
    if encoder.in_chans != 3:
        args["in_chans"] = encoder.in_chans
    return {
        **ours,
        "architecture": f"vit_{encoder.config.size}_patch16_224",
        "global_pool": "avg",
        "model_args": args,
        # timm resamples the table when it is asked for another size
        "pretrained_cfg": {**ours["pretrained_cfg"], "fixed_input_size": True},
    }


def write_vit(encoder: Encoder, folder: Path, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    write_tensors(folder / WEIGHTS, encoder.state_dict())
    write_json(folder / "config.json", {**vit_config(encoder), "extrema_fast": own})


def compare_vit(
    encoder: Encoder, folder: Path, images: Sequence[Tensor], options: Mapping[str, Any]
) -> dict[str, float]:
    import timm

    model = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True).eval()
    return {"timm local-dir, tokens and pooled": _outputs_differ(encoder, model, images)}


# ---- Cait -----------------------------------------------------------------------------------------


def plain_cait(encoder: Encoder) -> nn.Module:
    """timm's `Cait` with stock ViT blocks as trunk: the architecture of this encoder, random weights.

    `load_state_dict` of an export as `cait` fills it; needs timm.
    """
    from timm.models.cait import Cait
    from timm.models.vision_transformer import Block

    class PlainBlock(Block):
        # Cait passes options of its own blocks that a plain block does not know
        def __init__(self, **options: Any) -> None:
            known = ("dim", "num_heads", "mlp_ratio", "qkv_bias", "norm_layer")
            super().__init__(**{k: v for k, v in options.items() if k in known})

    width, depth, heads = encoder.config.shape
    return Cait(
        img_size=encoder.img_size,
        patch_size=encoder.patch_size,
        in_chans=encoder.in_chans,
        num_classes=encoder.num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=encoder.config.mlp_ratio,
        mlp_ratio_token_only=encoder.config.mlp_ratio,
        depth_token_only=encoder.config.pool_depth,
        block_layers=PlainBlock,
        norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
    ).eval()


def write_cait(encoder: Encoder, folder: Path, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    state = {k.replace("blocks_token.", "blocks_token_only."): v for k, v in encoder.state_dict().items()}
    write_tensors(folder / WEIGHTS, state)
    # no registered name of timm's builds it, so nothing here says that one does
    write_json(folder / "config.json", {"extrema_fast": own})


def compare_cait(
    encoder: Encoder, folder: Path, images: Sequence[Tensor], options: Mapping[str, Any]
) -> dict[str, float]:
    from safetensors.torch import load_file

    model = plain_cait(encoder)
    model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    return {"timm Cait, tokens and class token": _outputs_differ(encoder, model, images)}


# ---- Hugging Face ---------------------------------------------------------------------------------


def write_hf(encoder: Encoder, folder: Path, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    config = timm_config(encoder) if options["class_token"] else vit_config(encoder)
    config |= {"model_type": "timm_wrapper", "extrema_fast": own}
    write_tensors(folder / WEIGHTS, encoder.state_dict())
    write_json(folder / "config.json", config)
    processor = {"image_processor_type": "TimmWrapperImageProcessor"}
    processor |= {k: config[k] for k in ("architecture", "pretrained_cfg")}
    write_json(folder / "preprocessor_config.json", processor)
    (folder / "README.md").write_text(model_card(config), encoding="utf-8")


def compare_hf(
    encoder: Encoder, folder: Path, images: Sequence[Tensor], options: Mapping[str, Any]
) -> dict[str, float]:
    from transformers import AutoModel, AutoModelForImageClassification
    from transformers.utils import logging as noise

    if options["class_token"]:
        from .. import timm as _registered  # noqa: F401
    bar, _ = noise.is_progress_bar_enabled(), noise.disable_progress_bar()
    try:
        models = [AutoModel.from_pretrained(folder, local_files_only=True).eval()]
        if encoder.num_classes:
            models.append(
                AutoModelForImageClassification.from_pretrained(folder, local_files_only=True).eval()
            )
    finally:
        if bar:
            noise.enable_progress_bar()
    worst = 0.0
    for x in images:
        ours, theirs = encoder.forward_features(x), models[0](pixel_values=x)
        pooled = encoder.forward_head(ours, pre_logits=True)
        worst = max(
            worst, largest_difference([ours, pooled], [theirs.last_hidden_state, theirs.pooler_output])
        )
    found = {"AutoModel, tokens and pooled": worst}
    for classifier in models[1:]:
        found["AutoModelForImageClassification, logits"] = max(
            largest_difference([encoder(x)], [classifier(pixel_values=x).logits]) for x in images
        )
    return found
