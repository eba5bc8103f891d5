"""Keyed random parameters of views on the device: keep indices and drop-path factors; maths in README.md."""

from .op import drop_path_factors, sample_views
from .reference import drop_path_from_uniform, drop_path_reference, sample_views_reference

__all__ = [
    "drop_path_factors",
    "drop_path_from_uniform",
    "drop_path_reference",
    "sample_views",
    "sample_views_reference",
]
