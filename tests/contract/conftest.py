"""Lets timm be imported where torchvision's compiled operators do not load."""

from __future__ import annotations

from tests.torchvision_operators import define_torchvision_operators

define_torchvision_operators()
