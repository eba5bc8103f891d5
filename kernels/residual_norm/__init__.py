"""Residual connection, drop-path factor and LayerNorm of a pre-norm block in one pass; maths in README.md."""

from .op import residual_norm
from .reference import residual_norm_reference

__all__ = ["residual_norm", "residual_norm_reference"]
