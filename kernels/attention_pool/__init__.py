"""One query attending over a row's tokens (class attention); maths in README.md."""

from .op import attention_pool
from .reference import PoolWeights, attention_pool_absorbed, attention_pool_reference

__all__ = ["PoolWeights", "attention_pool", "attention_pool_absorbed", "attention_pool_reference"]
