"""extrema_fast: fast self-supervised ViT pretraining with extreme masking (ExtreMA, arXiv 2206.04667).

Public names are imported on first use, so that importing the package is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import Config, FinetuneConfig, list_models, preset
    from .errors import UsageError
    from .evaluation.evaluate import evaluate
    from .evaluation.segmentation import segment
    from .models.encoder import Encoded, Encoder, create_encoder
    from .models.extrema import ExtreMA
    from .models.masking import keep_from_mask, mae_mask, sample_views
    from .reporting.report import report
    from .tools.embed import embed
    from .tools.embeddings import Embeddings, load_embeddings
    from .tools.search import search
    from .tools.visualize import visualize
    from .train import finetune, pretrain
    from .weights.export import export
    from .weights.initial import load_trunk
    from .weights.load import import_released, load_encoder
    from .weights.vit import accelerate, load_vit

_HOME = {
    "Config": "config",
    "Embeddings": "tools.embeddings",
    "Encoded": "models.encoder",
    "Encoder": "models.encoder",
    "ExtreMA": "models.extrema",
    "FinetuneConfig": "config",
    "UsageError": "errors",
    "accelerate": "weights.vit",
    "create_encoder": "models.encoder",
    "embed": "tools.embed",
    "evaluate": "evaluation.evaluate",
    "export": "weights.export",
    "finetune": "train",
    "import_released": "weights.load",
    "keep_from_mask": "models.masking",
    "list_models": "config",
    "load_embeddings": "tools.embeddings",
    "load_encoder": "weights.load",
    "load_trunk": "weights.initial",
    "load_vit": "weights.vit",
    "mae_mask": "models.masking",
    "preset": "config",
    "pretrain": "train",
    "report": "reporting.report",
    "sample_views": "models.masking",
    "search": "tools.search",
    "segment": "evaluation.segmentation",
    "visualize": "tools.visualize",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
