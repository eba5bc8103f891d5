"""Patch embedding of kept patches only; maths in README.md."""

from .reference import gather_patches, patch_gather_reference

__all__ = ["gather_patches", "patch_gather_reference"]
