"""extrema_fast: fast self-supervised ViT pretraining with extreme masking (ExtreMA, arXiv 2206.04667).

Nothing heavy is imported here; names load on first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .accelerate import accelerate
    from .config import Config, preset
    from .convert import import_released, load_encoder
    from .embed import embed
    from .embeddings import Embeddings, load_embeddings
    from .encoder import Encoded, Encoder, create_encoder, list_models
    from .evals import evaluate
    from .export import export
    from .masking import keep_from_mask, sample_views
    from .method import ExtreMA
    from .report import report
    from .search import search
    from .train import pretrain

_HOME = {
    "Config": "config",
    "Embeddings": "embeddings",
    "Encoded": "encoder",
    "Encoder": "encoder",
    "ExtreMA": "method",
    "accelerate": "accelerate",
    "create_encoder": "encoder",
    "embed": "embed",
    "evaluate": "evals",
    "export": "export",
    "import_released": "convert",
    "keep_from_mask": "masking",
    "list_models": "encoder",
    "load_embeddings": "embeddings",
    "load_encoder": "convert",
    "preset": "config",
    "pretrain": "train",
    "report": "report",
    "sample_views": "masking",
    "search": "search",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # an import of `extrema_fast.report` would put that module in the place of the function of its name
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
