"""residual_norm against its plain definition (what holds for every op: test_contract.py).

Covers: outputs and all gradients in fp64, fp32, fp16 with and without branch, bias, scale, norm and shift, from 1 to
196 tokens and widths up to 1280, more tokens than the backward pass has programs; u in another dtype; dropped rows; u
recomputed from statistics with the same bits; an unused norm; the plain path; errors.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels.residual_norm import residual_norm, residual_norm_reference
from extrema_fast.kernels.residual_norm.op import norm_again, residual_norm_stats

from tests.kernels._compare import DTYPES, assert_as_good, assert_errors, normal

NAMES = ("x", "branch", "bias", "gain", "shift")


def make(rows, n, width, dtype=torch.float64):
    """x, branch, bias, gain, shift; and drop-path factors."""
    drawn = [normal(rows, n, width, dtype=dtype) for _ in range(2)] + [
        normal(width, dtype=dtype) for _ in range(3)
    ]
    return drawn, (torch.arange(rows) % 3 > 0).float() / 0.9


def results(f, args, scale, use, upstream):
    x, branch, bias, gain, shift = args
    options = {
        "branch": branch if "branch" in use else None,
        "bias": bias if "bias" in use else None,
        "scale": scale if "scale" in use else None,
    }
    norm = (gain if "norm" in use else None, shift if "shift" in use else None)
    outs = [t for t in f(x, *norm, **options) if t is not None]
    loss = sum((t.double() * w).sum() for t, w in zip(outs, upstream, strict=False))
    grads = torch.autograd.grad(loss, args, allow_unused=True)
    return dict(zip(("out", "u")[: len(outs)], outs, strict=True)) | dict(zip(NAMES, grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "width", "use"),
    [
        (1, 1, 96, "branch bias scale norm shift"),
        (3, 19, 100, "branch bias scale norm shift"),
        (2, 39, 384, "branch bias norm shift"),
        (1, 49, 48, "branch norm"),
        (2, 7, 1280, "norm shift"),
        (1, 196, 32, "branch bias scale"),
        (3, 5, 20, "branch scale"),
        (3, 5, 20, "branch bias"),
        (2, 3, 16, "branch"),
    ],
)
def test_outputs_and_gradients(rows, n, width, use, dtype, poisoned):
    args, scale = make(rows, n, width, dtype)
    upstream = [torch.randn(rows, n, width, dtype=torch.float64) for _ in range(2)]
    exact_args = [t.detach().double().requires_grad_() for t in args]
    exact = results(residual_norm_reference, exact_args, scale.double(), use, upstream)
    same = results(residual_norm_reference, args, scale, use, upstream)
    for name, ours in results(residual_norm, args, scale, use, upstream).items():
        if exact[name] is None:
            assert ours is None, name
        else:
            assert_as_good(ours, same[name], exact[name], max(rows * n, width), name)


def test_u_in_another_dtype_and_dropped_rows(path):
    (x, branch, bias, gain, shift), scale = make(3, 7, 32, torch.float32)
    out, u = residual_norm(x, gain, shift, branch=branch, bias=bias, scale=scale, dtype=torch.float16)
    assert out.dtype == torch.float32 and u.dtype == torch.float16
    # row 0 is dropped
    assert torch.equal(out[0], x[0]) and not torch.equal(out[1], x[1])
    grads = torch.autograd.grad(u.float().square().sum() + out.sum(), (branch, x))
    assert not grads[0][0].any() and grads[0][1].any() and grads[1][0].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_u_is_recomputed_with_the_same_bits(dtype):
    (x, branch, bias, gain, shift), _ = make(3, 19, 48, dtype)
    for vector in (shift, None):
        out, u, mean, rstd = residual_norm_stats(x, gain, vector, branch=branch, bias=bias)
        assert torch.equal(norm_again(out, mean, rstd, gain, vector, dtype), u)
        torch.testing.assert_close(mean, out.to(mean.dtype).mean(-1), rtol=1e-3, atol=1e-6)


def test_a_norm_that_nothing_uses(path):
    (x, branch, bias, gain, shift), scale = make(2, 5, 16)
    out, _ = residual_norm(x, gain, shift, branch=branch, bias=bias, scale=scale)
    dx, dbranch, dbias = torch.autograd.grad(out.sum(), (x, branch, bias))
    assert torch.equal(dx, torch.ones_like(x))
    torch.testing.assert_close(dbranch, scale.double()[:, None, None].expand_as(branch))
    torch.testing.assert_close(dbias, (5 * scale.double().sum()).expand(16))


def test_errors():
    (x, branch, bias, gain, shift), scale = make(2, 5, 16)
    cases = [
        ((x[0], gain), {}, r"x: expected .*\[R, n, D <= 4096\], got float64 \[5, 16\]"),
        ((torch.zeros(1, 1, 4097), None), {}, "x: expected at most 4096 columns, got 4097"),
        ((x, gain[:8]), {}, r"gain: expected .*\[16\]"),
        ((x, gain, shift[:8]), {}, r"shift: expected .*\[16\]"),
        ((x, gain), {"branch": branch[:1]}, r"branch: expected .*\[2, 5, 16\]"),
        ((x, gain), {"branch": branch, "bias": bias[:3]}, r"bias: expected .*\[16\]"),
        ((x, gain), {"branch": branch, "scale": scale[:1]}, r"scale: expected .*\[2\]"),
        ((x, gain), {"scale": scale}, "branch: expected .* beside bias or scale"),
        ((x,), {}, "gain: expected .* without a branch"),
    ]
    assert_errors(residual_norm, cases)
    with pytest.raises(TypeError, match=r"x: expected a tensor"):
        residual_norm([1.0], gain)
