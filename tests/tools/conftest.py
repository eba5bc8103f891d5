"""The tools read the same small image trees as the data tests."""

from tests.data.conftest import config, kind, odd_images, tree

__all__ = ["config", "kind", "odd_images", "tree"]
