"""Triton kernels of ExtreMA's operations, each with its plain PyTorch definition; see each folder's README.md.

This folder is installed as `extrema_fast.kernels` and imports nothing of the rest of `extrema_fast`. Its import needs
neither Triton nor a GPU: where a kernel cannot run, the public functions compute the same in plain PyTorch.
"""

# a build for the Hub has its own name (package.py)
if __name__ != "kernels":
    from ._launch import can_run
    from .adamw_ema import AdamWEma
    from .attention_pool import PoolWeights, attention_pool
    from .color_views import color_views
    from .crop_resize import crop_resize
    from .mlp import mlp
    from .patch_gather import patch_gather
    from .residual_norm import residual_norm
    from .sample_views import sample_views
    from .short_attention import short_attention
    from .token_gather import token_gather

    __all__ = [
        "AdamWEma",
        "PoolWeights",
        "attention_pool",
        "can_run",
        "color_views",
        "crop_resize",
        "mlp",
        "patch_gather",
        "residual_norm",
        "sample_views",
        "short_attention",
        "token_gather",
    ]
else:
    # `kernels` on PyPI is another package, which transformers imports where it is installed. If that import finds
    # this folder instead, it must be empty and not fail: under a second name every op would be registered twice.
    __path__ = []

    def __getattr__(name: str):
        text = (
            f"this folder was imported as {__name__!r}: use `import extrema_fast.kernels` "
            "(installed by `pip install -e .` in the repository root)"
        )
        raise (AttributeError if name.startswith("__") else ImportError)(text)
