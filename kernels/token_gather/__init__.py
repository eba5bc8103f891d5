"""Kept rows of embedded tokens plus positions; maths in README.md."""

from .op import token_gather
from .reference import token_gather_reference

__all__ = ["token_gather", "token_gather_reference"]
