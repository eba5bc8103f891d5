"""The fixtures of this folder are set up and torn down without a device too, where an error in them would show."""

from __future__ import annotations

import torch

from tests.gpu import test_attention, test_data, test_step

# used by every test of this file, as in their own
fresh, clean, images = test_attention.fresh, test_step._clean, test_data.images


def test_whole_fp32_while_a_test_runs():
    assert not torch.backends.cuda.matmul.allow_tf32


def test_images_to_decode(images):
    assert len(list(images.iterdir())) == 23
