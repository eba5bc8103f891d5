"""Kernels that need more than the GPU has, compiled for real (a smaller GPU is a smaller limit).

Covers: compiled code takes settings that fit, before anything is compiled around a kernel; one whose kernel fits with
no settings is replaced at a run's start.
"""

from __future__ import annotations

import logging

import pytest
import torch
from extrema_fast.kernels import _launch, mlp
from extrema_fast.kernels._spec import Sizes

from extrema_fast.ops import dispatch as ops

compiler = pytest.importorskip("triton.compiler.compiler")
# several steps through K, so that stages count
WIDTH = 256


@pytest.fixture
def shared_memory(monkeypatch):
    """Sets the shared memory of a block."""
    monkeypatch.setattr(_launch, "_leaner", {})
    monkeypatch.setattr(_launch, "_compiled", {})
    monkeypatch.setattr(ops, "_broken", {})
    return lambda limit: monkeypatch.setattr(compiler, "max_shared_mem", lambda device: limit)


def test_compiled_code_takes_settings_that_fit(shared_memory, caplog):
    shared_memory(60_000)
    shapes = (4, 39, WIDTH), (4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH)
    args = [torch.zeros(s, dtype=torch.bfloat16, device="cuda", requires_grad=True) for s in shapes]
    torch.compile(mlp, fullgraph=True, dynamic=False)(*args).sum().backward()
    assert _launch._leaner == {"mlp": 2} and caplog.text.count("one stage") == 1


def test_what_fits_with_no_settings_is_replaced_before_a_run(shared_memory, caplog):
    caplog.set_level(logging.WARNING)
    shared_memory(20_000)
    ops.set_backend("fixed")
    sizes = Sizes(8, 2, 39, 64, WIDTH, 1, 12, 4 * WIDTH, patch=4, height=32, width_px=32, chans=3)
    device = torch.device("cuda:0")
    ops.probe(device, sizes, "bf16", unused={"color_views", "adamw_ema"})
    assert ops.choice("mlp", device)[0] == "split"
    assert "mlp: triton is left out: mlp: the kernel does not fit" in caplog.text
