"""token_gather against its plain definition (what holds for every op: test_contract.py).

Covers: output and gradients of tokens and positions in fp64, fp32, fp16, disjoint and overlapping views, from 1 to 197
tokens; without positions; nothing kept; strided indices; errors.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels.token_gather import token_gather, token_gather_reference

from tests.kernels._compare import DTYPES, assert_errors, draw_keep, normal, with_gradients


def make(batch, n, views, kept, width, dtype=torch.float64, disjoint=True):
    return (
        normal(batch, n, width, dtype=dtype),
        draw_keep(batch, n, views, kept, disjoint),
        normal(n, width, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "n", "views", "kept", "width", "disjoint"),
    [
        (1, 1, 1, 1, 96, True),
        (2, 7, 3, 7, 100, False),
        (3, 19, 2, 7, 96, True),
        (1, 39, 5, 7, 384, True),
        (1, 197, 8, 19, 64, False),
    ],
)
def test_output_and_gradients(batch, n, views, kept, width, disjoint, dtype, poisoned):
    tokens, keep, pos = make(batch, n, views, kept, width, dtype, disjoint)
    upstream = torch.randn(views * batch, kept, width)
    ours = with_gradients(lambda t, p: token_gather(t, keep, p, disjoint=disjoint), (tokens, pos), upstream)
    exact = with_gradients(lambda t, p: token_gather_reference(t, keep, p), (tokens, pos), upstream)
    assert torch.equal(ours[0], exact[0]) and ours[0].is_contiguous()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-2}[dtype]
    for x, y in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * views)


def test_without_positions_and_nothing_kept(path):
    tokens, keep, _ = make(2, 19, 2, 7, 96)
    for indices in (keep.long(), torch.stack([keep, keep], -1)[..., 0]):
        out, exact = token_gather(tokens, indices), token_gather_reference(tokens, keep)
        assert torch.equal(out, exact) and out.is_contiguous()
        upstream = torch.randn_like(out)
        a, b = (torch.autograd.grad(y, tokens, upstream)[0] for y in (out, exact))
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    out = token_gather(tokens, keep[..., :0])
    out.sum().backward()
    assert out.shape == (4, 0, 96) and not tokens.grad.any()


def test_errors(poisoned):
    tokens, keep, pos = make(2, 7, 2, 3, 16)
    cases = [
        ((tokens[0], keep), r"tokens: expected .*\[B, N, D\], got float64 \[7, 16\]"),
        ((tokens, keep[0]), r"keep: expected .*\[V, 2, K\], got int32 \[2, 3\]"),
        ((tokens, keep + 7), r"keep: expected indices in \[0, 7\)"),
        ((tokens, keep - 7), r"keep: expected indices in \[0, 7\)"),
        ((tokens, keep[..., :1].expand(-1, -1, 3)), "keep: an index is twice within one view"),
        ((tokens, keep, pos[:3]), r"pos: expected .*\[7, 16\]"),
    ]
    assert_errors(token_gather, [(args, {}, words) for args, words in cases])
    assert_errors(
        token_gather, [((tokens, keep[:1].expand(2, -1, -1)), {"disjoint": True}, "twice within one image")]
    )
