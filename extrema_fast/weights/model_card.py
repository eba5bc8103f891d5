"""The README.md of a Hugging Face folder: what it holds, how to load it, where it comes from; facts only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WITHOUT = """This is the trunk with mean-pooled patch tokens, as a stock timm ViT without class token. It loads with
`transformers` and `timm` alone; this project's class-attention head is left out (an export with the class
token needs `pip install extrema-fast`)."""

_WITH = """This is the whole encoder with its class-attention head, a model that timm does not know by itself:
`pip install "extrema-fast[hf]"`, and `import extrema_fast.timm` before loading. (An export without
`--class-token` loads with `transformers` and `timm` alone.)"""


def model_card(config: Mapping[str, Any]) -> str:
    """Markdown with a YAML head, from the `config.json` of a Hugging Face export."""
    whole = config["architecture"].startswith("extrema_")
    classes = config["num_classes"]
    head = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification" if classes else "image-feature-extraction",
        "tags": ["timm", "vision-transformer", "self-supervised-learning", "extrema"],
    }
    first = "features.last_hidden_state  # " + (
        "[1, 1 + patches, width]: class token, then patch tokens" if whole else "[1, patches, width]"
    )
    lines = [
        "---",
        *(f"{k}: {v}" if isinstance(v, str) else f"{k}: [{', '.join(v)}]" for k, v in head.items()),
        "---",
        "",
        f"# Vision transformer of width {config['num_features']}, pretrained with ExtreMA",
        "",
        "Self-supervised pretraining with extreme masking ([arXiv 2206.04667](https://arxiv.org/abs/2206.04667)).",
        "",
        _WITH if whole else _WITHOUT,
        "",
        "```python",
        *(["import extrema_fast.timm"] if whole else []),
        "from PIL import Image",
        "from transformers import AutoImageProcessor, AutoModel",
        "",
        'model = AutoModel.from_pretrained("path/to/this/folder").eval()',
        f'photo = Image.open("photo.jpg"){_mode(config)}',
        'images = AutoImageProcessor.from_pretrained("path/to/this/folder")(photo)',
        "features = model(**images)",
        first,
        f"features.pooler_output      # [1, width]: {'class token' if whole else 'mean of the patch tokens'}",
        "```",
        "",
        *_table(config),
        "",
        "No licence is stated: it is that of the weights this was exported from.",
    ]
    return "\n".join(lines) + "\n"


def _mode(config: Mapping[str, Any]) -> str:
    # transformers leaves a grey picture grey, whatever the model's channels
    mode = {1: "L", 3: "RGB"}.get(config["extrema_fast"]["input"]["input_size"][0])
    return f'.convert("{mode}")' if mode else ""


def _table(config: Mapping[str, Any]) -> list[str]:
    own = config["extrema_fast"]
    args, image = config["model_args"], own["input"]
    rows = {
        "architecture": f"`{config['architecture']}`, width {config['num_features']}, {_depth(own)}",
        "input": f"{' x '.join(map(str, image['input_size']))}, patches of {args['patch_size']} pixels",
        "channels": ", ".join(image["channels"]),
        "values": f"{image['value_range'][0]:g} to {image['value_range'][1]:g}, "
        f"then mean {_numbers(image['mean'])}, std {_numbers(image['std'])}",
        "resize": f"{image['interpolation']}, crop share {image['crop_pct']:g}",
        "positions": own["encoder"]["pos_embed"] + f", {own['encoder']['pos_coords']} coordinates",
        "classes": str(config["num_classes"] or "none (features)"),
        "network": own.get("which", "not recorded"),
        "optimizer steps": own.get("step", "not recorded"),
        "images seen": own.get("images", "not recorded"),
        "configuration": f"`{own['config_hash']}`" if "config_hash" in own else "not recorded",
        "source": f"`{own['source']['file']}`" if "source" in own else "a run of extrema-fast",
        "written by": own["software"],
    }
    checks = own["export"].get("differences", {})
    rows |= {f"compared: {what}": f"largest difference {d:.1e}" for what, d in checks.items()}
    return ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]


def _depth(own: Mapping[str, Any]) -> str:
    model = own["model"]
    return f"mlp ratio {model['mlp_ratio']:g}" + (f", {model['depth']} blocks" if model["depth"] else "")


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)
