"""Every op that works on tokens, over every size the project promises, through the kernels.

Covers: 1, 7, 19, 39, 49, 196 and 197 tokens; widths 96, 192, 384, 768; batches of 1 and odd ones; fp64, fp32, fp16:
outputs and gradients against the float64 definition. short_attention: its lengths, head_dim 32, 64 and 80.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from extrema_fast.kernels import PoolWeights, attention_pool, patch_gather, short_attention, token_gather
from extrema_fast.kernels.attention_pool import attention_pool_reference
from extrema_fast.kernels.patch_gather import patch_gather_reference
from extrema_fast.kernels.short_attention import short_attention_reference
from extrema_fast.kernels.token_gather import token_gather_reference
from torch import Tensor

from tests.kernels._compare import assert_as_good

TOKENS = (1, 7, 19, 39, 49, 196, 197)
WIDTHS = (96, 192, 384, 768)
# every number of tokens at a narrow and a wide width, every width at many and few tokens
PAIRS = [(n, WIDTHS[i % 2]) for i, n in enumerate(TOKENS)] + [
    (n, WIDTHS[2 + i % 2]) for i, n in enumerate(TOKENS)
]
DTYPES = (torch.float64, torch.float32, torch.float16)


def compare(ours: Callable, definition: Callable, inputs: list[Tensor], length: int) -> None:
    """Outputs and gradients of `inputs` against float64, by the rule of all kernels."""
    results = []
    upstream = None
    for f, wide in ((ours, False), (definition, False), (definition, True)):
        args = [x.detach().to(torch.float64 if wide else x.dtype).requires_grad_() for x in inputs]
        out = f(*args)
        upstream = torch.randn(out.shape, dtype=torch.float64) if upstream is None else upstream
        results.append((out, *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), args)))
    for i, (a, b, c) in enumerate(zip(*results, strict=True)):
        if a.dtype == torch.float64:
            # the pooling's small gradients are differences of larger terms
            torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-11)
        else:
            assert_as_good(a, b, c, length, "out" if i == 0 else f"gradient {i}")


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width"), PAIRS)
def test_attention_pool(n, width, dtype, poisoned):
    rows, heads = 1 + 2 * (n < 49), width // 32
    shapes = [(width,), (width,)] + [(width, width), (width,)] * 4
    weights = [normal(*s, dtype=dtype, scale=width**-0.5) for s in shapes]
    inputs = [normal(rows, n, width, dtype=dtype), normal(rows, width, dtype=dtype), *weights]
    # the key bias has no gradient: exactly zero here, noise in the definition
    compare(
        lambda t, c, *w: attention_pool(t, c, PoolWeights(*w[:5], weights[5], *w[5:]), heads)[0],
        lambda t, c, *w: attention_pool_reference(t, c, PoolWeights(*w[:5], weights[5].to(t), *w[5:]), heads)[
            0
        ],
        inputs[:7] + inputs[8:],
        rows * (n + 1),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width"), PAIRS)
def test_patch_gather(n, width, dtype, poisoned):
    batch, patch = 1 + 2 * (n < 49), 4
    images = normal(batch, 3, patch, n * patch, dtype=dtype)
    keep = (
        torch.stack([torch.randperm(n)[: max(1, n // 2)] for _ in range(2 * batch)]).view(2, batch, -1).int()
    )
    pos = normal(n, width, dtype=dtype)
    inputs = [normal(width, 3, patch, patch, dtype=dtype, scale=0.1), normal(width, dtype=dtype)]
    compare(
        lambda w, b: patch_gather(images, keep, w, b, pos),
        lambda w, b: patch_gather_reference(images.to(w), keep, w, b, pos.to(w)),
        inputs,
        keep.numel() + 3 * patch**2,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width"), PAIRS)
def test_token_gather(n, width, dtype, poisoned):
    batch = 1 + 2 * (n < 49)
    keep = (
        torch.stack([torch.randperm(n)[: max(1, n // 2)] for _ in range(2 * batch)]).view(2, batch, -1).int()
    )
    compare(
        lambda t, p: token_gather(t, keep, p),
        lambda t, p: token_gather_reference(t, keep, p),
        [normal(batch, n, width, dtype=dtype), normal(n, width, dtype=dtype)],
        2 * batch,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [32, 64, 80])
@pytest.mark.parametrize("n", [n for n in TOKENS if n <= 64])
def test_short_attention(n, d, dtype, poisoned):
    rows = 1 + 2 * (n < 39)
    compare(short_attention, short_attention_reference, [normal(rows, n, 3, 2, d, dtype=dtype)], max(n, d))
