"""Lets timm be imported where torchvision's compiled operators do not load."""

from __future__ import annotations

from benchmarks.with_timm import mend_torchvision

mend_torchvision()
