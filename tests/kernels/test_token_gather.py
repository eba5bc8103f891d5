"""token_gather against its plain definition.

Covers: output and gradients of tokens and positions, disjoint and overlapping views, fp64, fp32, fp16, odd
sizes; gradcheck; opcheck; one graph; layouts; poisoned outputs; repeatability; empty batches; nothing kept;
every error.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels import _launch
from extrema_fast.kernels.token_gather import token_gather, token_gather_reference

OPS = torch.ops.extrema_fast


def make(batch, n, views, kept, width, dtype=torch.float64, disjoint=True):
    tokens = torch.randn(batch, n, width, dtype=dtype, requires_grad=True)
    if disjoint:
        keep = torch.stack([torch.randperm(n)[: views * kept].view(views, kept) for _ in range(batch)], 1)
    else:
        keep = torch.stack([torch.randperm(n)[:kept] for _ in range(views * batch)]).view(views, batch, kept)
    return tokens, keep.int(), torch.randn(n, width, dtype=dtype, requires_grad=True)


@pytest.fixture(params=["kernel", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(_launch, "INTERPRET", False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("batch", "n", "views", "kept", "width", "disjoint"),
    [
        (1, 1, 1, 1, 96, True), (3, 19, 2, 7, 96, True), (2, 49, 3, 16, 192, False),
        (1, 196, 5, 39, 384, True), (1, 197, 8, 19, 64, False), (2, 7, 3, 7, 100, False),
    ],
)  # fmt: skip
def test_output_and_gradients(batch, n, views, kept, width, disjoint, dtype, path):
    tokens, keep, pos = make(batch, n, views, kept, width, dtype, disjoint)
    out, expected = (
        token_gather(tokens, keep, pos, disjoint=disjoint),
        token_gather_reference(tokens, keep, pos),
    )
    assert torch.equal(out, expected) and out.is_contiguous()
    upstream = torch.randn_like(out)
    a = torch.autograd.grad(out, (tokens, pos), upstream)
    exact = torch.autograd.grad(expected, (tokens, pos), upstream)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-2}[dtype]
    for x, y in zip(a, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * views)


def test_without_positions(path):
    tokens, keep, _ = make(2, 19, 2, 7, 96)
    assert torch.equal(token_gather(tokens, keep.long()), token_gather_reference(tokens, keep))


@pytest.mark.parametrize("disjoint", [True, False])
def test_gradcheck(disjoint, path):
    tokens, keep, pos = make(2, 5, 2, 2, 4, disjoint=disjoint)
    assert torch.autograd.gradcheck(lambda t, p: token_gather(t, keep, p, disjoint=disjoint), (tokens, pos))


def test_opcheck():
    tokens, keep, pos = make(2, 7, 2, 3, 16, torch.float32)
    tokens, pos = tokens.detach(), pos.detach()
    for x in (tokens, tokens.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.library.opcheck(OPS.token_gather_fwd.default, (x, keep, pos))
        torch.library.opcheck(OPS.token_gather_fwd.default, (x, keep, None))
    torch.library.opcheck(OPS.token_gather_bwd.default, (torch.randn(4, 3, 16), keep, 7, True))


def test_one_graph():
    def loss(tokens, keep, pos):
        return (token_gather(tokens, keep, pos) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    for kept in (3, 5):
        args = make(2, 19, 2, kept, 16)
        a, b = compiled(*args), loss(*args)
        torch.testing.assert_close(a, b)
        for x, y in zip(*(torch.autograd.grad(v, (args[0], args[2])) for v in (a, b)), strict=True):
            torch.testing.assert_close(x, y)


def test_layouts_and_expanded_gradients():
    tokens, keep, pos = make(2, 7, 2, 3, 16, torch.float32)
    expected = token_gather(tokens, keep, pos)
    wide = torch.cat([tokens, tokens], -1)[..., :16]
    swapped = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    strided = torch.stack([keep, keep], -1)[..., 0]
    for x in (wide, swapped):
        out = token_gather(x, strided, pos)
        assert torch.equal(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), tokens),
            torch.autograd.grad(expected.sum(), tokens, retain_graph=True),
        )
    one = tokens[:1].expand(2, -1, -1)
    assert torch.equal(token_gather(one, keep, pos), token_gather_reference(one, keep, pos))


def test_every_element_is_written_and_runs_repeat_bitwise(poisoned):
    tokens, keep, pos = make(3, 19, 2, 7, 100, torch.float32, disjoint=False)
    runs = []
    for _ in range(2):
        out = token_gather(tokens, keep, pos)
        runs.append((out, *torch.autograd.grad((out * out).sum(), (tokens, pos))))
    for a, b in zip(*runs, strict=True):
        assert not a.isnan().any() and torch.equal(a, b)


def test_nothing_kept(path):
    tokens, keep, _ = make(2, 7, 2, 3, 16)
    token_gather(tokens, keep[..., :0]).sum().backward()
    assert tokens.grad.shape == tokens.shape and not tokens.grad.any()


def test_an_empty_batch():
    tokens = torch.randn(0, 7, 16, requires_grad=True)
    out = token_gather(tokens, torch.zeros(2, 0, 3, dtype=torch.int32))
    out.sum().backward()
    assert out.shape == (0, 3, 16) and tokens.grad.shape == (0, 7, 16)


def test_errors(poisoned):
    tokens, keep, pos = make(2, 7, 2, 3, 16)
    for args, words in [
        ((tokens[0], keep), r"tokens: expected .*\[B, N, D\], got float64 \[7, 16\]"),
        ((tokens, keep[0]), r"keep: expected int32 \| int64 \[V, 2, K\], got int32 \[2, 3\]"),
        ((tokens, keep.float()), "keep: .* got float32"),
        ((tokens, keep + 7), r"keep: expected indices in \[0, 7\), got"),
        ((tokens, keep - 7), r"keep: expected indices in \[0, 7\), got"),
        ((tokens, keep[..., :1].expand(-1, -1, 3)), "keep: an index is twice within one view"),
        ((tokens, keep, pos[:3]), r"pos: expected .*\[7, 16\]"),
        ((tokens, keep.to("meta")), "keep: expected on cpu"),
    ]:
        with pytest.raises(ValueError, match=words):
            token_gather(*args)
    with pytest.raises(ValueError, match="twice within one image"):
        token_gather(tokens, keep[:1].expand(2, -1, -1), disjoint=True)
