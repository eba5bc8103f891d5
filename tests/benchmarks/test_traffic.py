"""Counted bytes: what a pass, a matmul, a view, an expanded tensor and this project's ops count."""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels import _launch

from benchmarks.traffic import Traffic, backend


def test_what_counts():
    x, w = torch.randn(4, 8, dtype=torch.float16), torch.randn(8, 16, dtype=torch.float16)
    with Traffic() as traffic:
        y = x @ w
        y = (y + y)[:, None].expand(-1, 3, -1)
        y.sum(0)
    # + reads y once and writes; the sum reads the expanded axis once
    assert dict(traffic.bytes) == {"aten::add": 2 * 2 * 64, "aten::sum": 2 * 64 + 2 * 48}
    assert traffic.calls == {"aten::add": 1, "aten::sum": 1}


@pytest.mark.skipif(not _launch.can_run("cpu")[0], reason="needs Triton's interpreter")
def test_epilogues_and_partial_sums():
    x, w = torch.randn(3, 5, 16), torch.randn(32, 16)
    with Traffic() as traffic:
        _, h = torch.ops.extrema_fast.linear_gelu(x, w, None, True)
        torch.ops.extrema_fast.linear_gelu(x, w, None, False)
        torch.ops.extrema_fast.linear_dgelu(x, w.t().contiguous(), h)
        torch.ops.extrema_fast.gelu_bwd(h, h)
        torch.ops.extrema_fast.residual_norm_bwd(
            None, x, None, None, None, None, torch.ones(3), True, torch.float32, torch.float32
        )
    hidden, tokens = 4 * 15 * 32, 4 * 15 * 16
    got = {name.partition("::")[2]: n for name, n in traffic.bytes.items() if name.startswith("extrema")}
    assert got["linear_gelu"] == hidden
    assert got["linear_dgelu"] == hidden + 2 * 4 * 32
    # the same tensor twice is read once; h, dh, sums, 8 partial rows
    assert got["gelu_bwd"] == 2 * hidden + 4 * 32 + 2 * 8 * 4 * 32
    assert got["residual_norm_bwd"] == 2 * tokens + 12 + 4 * 16 + 2 * 8 * 4 * 16


def test_no_op_is_left_to_measuring():
    setting = dict(word.split("=") for word in backend(mlp="reference").split(","))
    assert (
        setting["mlp"] == "reference"
        and setting["residual_norm"] == "triton"
        and "auto" not in setting.values()
    )
