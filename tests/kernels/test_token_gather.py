"""token_gather against its plain definition.

Covers: output and gradients of tokens and positions in fp64, fp32, fp16, disjoint and overlapping views, every number
of tokens; gradcheck; opcheck; one graph; layouts; poisoned outputs; repeatability; empty batches; nothing kept; errors.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels.token_gather import token_gather, token_gather_reference

from tests.kernels._compare import (
    DTYPES,
    LAYOUTS,
    assert_errors,
    assert_one_graph,
    assert_repeats,
    draw_keep,
    normal,
    with_gradients,
)

OPS = torch.ops.extrema_fast


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
        (1, 39, 5, 7, 768, True),
        (2, 49, 3, 16, 192, False),
        (1, 196, 5, 39, 384, True),
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


def test_without_positions(path):
    tokens, keep, _ = make(2, 19, 2, 7, 96)
    out = token_gather(tokens, keep.long())
    assert torch.equal(out, token_gather_reference(tokens, keep)) and out.is_contiguous()


@pytest.mark.parametrize("disjoint", [True, False])
def test_gradcheck(disjoint):
    tokens, keep, pos = make(2, 5, 2, 2, 4, disjoint=disjoint)
    f = lambda t, p: token_gather(t, keep, p, disjoint=disjoint)  # noqa: E731
    assert torch.autograd.gradcheck(f, (tokens, pos), fast_mode=True)


def test_opcheck():
    tokens, keep, pos = (t.detach() for t in make(2, 7, 2, 3, 16, torch.float32))
    torch.library.opcheck(OPS.token_gather_fwd.default, (LAYOUTS["transposed"](tokens), keep, pos))
    torch.library.opcheck(OPS.token_gather_fwd.default, (tokens, keep, None))
    torch.library.opcheck(OPS.token_gather_bwd.default, (torch.randn(4, 3, 16), keep, 7, True))


def test_one_graph():
    def loss(tokens, keep, pos):
        return (token_gather(tokens, keep, pos) ** 2).sum()

    assert_one_graph(loss, make(2, 19, 2, 3, 16), make(2, 19, 2, 5, 16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    tokens, keep, pos = make(2, 7, 2, 3, 16, torch.float32)
    strided = torch.stack([keep, keep], -1)[..., 0]
    # a sum sends a gradient of stride 0
    ours = with_gradients(lambda t: token_gather(LAYOUTS[layout](t), strided, pos), (tokens,))
    for a, b in zip(ours, with_gradients(lambda t: token_gather(t, keep, pos), (tokens,)), strict=True):
        assert torch.equal(a, b)
    one = tokens[:1].expand(2, -1, -1)
    assert torch.equal(token_gather(one, keep, pos), token_gather_reference(one, keep, pos))


def test_every_element_is_written_and_runs_repeat_bitwise(poisoned):
    tokens, keep, pos = make(3, 19, 2, 7, 100, torch.float32, disjoint=False)
    assert_repeats(lambda: with_gradients(lambda t, p: token_gather(t, keep, p) ** 2, (tokens, pos)))


@pytest.mark.parametrize(("batch", "kept"), [(2, 0), (0, 3)])
def test_nothing_kept_and_an_empty_batch(batch, kept):
    tokens = normal(batch, 7, 16)
    out = token_gather(tokens, torch.zeros(2, batch, kept, dtype=torch.int32))
    out.sum().backward()
    assert out.shape == (2 * batch, kept, 16) and tokens.grad.shape == tokens.shape and not tokens.grad.any()


def test_errors(poisoned):
    tokens, keep, pos = make(2, 7, 2, 3, 16)
    cases = [
        ((tokens[0], keep), r"tokens: expected .*\[B, N, D\], got float64 \[7, 16\]"),
        ((tokens, keep[0]), r"keep: expected .*\[V, 2, K\], got int32 \[2, 3\]"),
        ((tokens, keep.float()), "keep: .* got float32"),
        ((tokens, keep + 7), r"keep: expected indices in \[0, 7\)"),
        ((tokens, keep - 7), r"keep: expected indices in \[0, 7\)"),
        ((tokens, keep[..., :1].expand(-1, -1, 3)), "keep: an index is twice within one view"),
        ((tokens, keep, pos[:3]), r"pos: expected .*\[7, 16\]"),
        ((tokens, keep.to("meta")), "keep: expected on cpu"),
    ]
    assert_errors(token_gather, [(args, {}, words) for args, words in cases])
    assert_errors(
        token_gather, [((tokens, keep[:1].expand(2, -1, -1)), {"disjoint": True}, "twice within one image")]
    )
