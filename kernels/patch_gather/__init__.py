"""Patch embedding of kept patches only; maths in README.md."""

from .op import patch_gather
from .reference import gather_patches, patch_gather_reference

__all__ = ["gather_patches", "patch_gather", "patch_gather_reference"]
