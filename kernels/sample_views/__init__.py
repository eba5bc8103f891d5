"""Keyed keep indices of all views, on the device; maths in README.md."""

from .op import sample_views
from .reference import sample_views_reference

__all__ = ["sample_views", "sample_views_reference"]
