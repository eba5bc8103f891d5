"""One trained method per module, in the forms that weights come in."""

from __future__ import annotations

import pytest
import torch

from extrema_fast.models.extrema import ExtreMA
from extrema_fast.weights.folder import save_weights, weights_meta
from tests.weights._weights import CFG, released, trained


@pytest.fixture(scope="module")
def method() -> ExtreMA:
    torch.manual_seed(0)
    return trained()


@pytest.fixture
def folder(tmp_path, method):
    """A weights folder, as a run saves it."""
    return save_weights(tmp_path / "w", method, weights_meta(CFG, 7))


@pytest.fixture
def file(tmp_path, method):
    """A pretraining checkpoint, as the released code saves it."""
    torch.save(released(method), tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"
