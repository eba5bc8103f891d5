"""Self-attention over one view's tokens; maths in README.md."""

from .op import short_attention
from .reference import short_attention_reference

__all__ = ["short_attention", "short_attention_reference"]
