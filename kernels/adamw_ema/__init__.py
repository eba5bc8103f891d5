"""AdamW, skip of bad steps, EMA teacher and low-precision copies in one pass; maths in README.md."""

from .op import AdamWEma
from .reference import adamw_ema_reference

__all__ = ["AdamWEma", "adamw_ema_reference"]
