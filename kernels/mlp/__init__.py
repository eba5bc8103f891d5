"""The MLP of a transformer block with its GELU inside the matmuls; maths in README.md."""

from .op import mlp
from .reference import mlp_reference

__all__ = ["mlp", "mlp_reference"]
