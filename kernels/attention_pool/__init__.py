"""One query attending over a row's tokens (class attention); maths in README.md."""

from .reference import attention_pool_absorbed, attention_pool_reference

__all__ = ["attention_pool_absorbed", "attention_pool_reference"]
