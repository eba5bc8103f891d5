"""Crop, antialiased resize and flip of images held decoded in one buffer; maths in README.md."""

from .op import crop_resize
from .reference import COLUMNS, crop_resize_reference

__all__ = ["COLUMNS", "crop_resize", "crop_resize_reference"]
