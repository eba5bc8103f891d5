"""Self-attention over one view's tokens; maths in README.md."""

from .reference import short_attention_reference

__all__ = ["short_attention_reference"]
