"""Two color-jittered, normalized versions of uint8 crops; maths in README.md."""

from .op import color_params, color_views
from .reference import color_params_reference, color_views_by_image, color_views_plain, color_views_reference

__all__ = [
    "color_params",
    "color_params_reference",
    "color_views",
    "color_views_by_image",
    "color_views_plain",
    "color_views_reference",
]
