"""What patch tokens say, as arrays and as overlays.

Covers: tokens and attention against `encode` and `get_attention`; principal components against NumPy's SVD; fixed
signs; foreground; similarity of two textures; cosines of compressed tokens; the columns of a table.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from extrema_fast.models.encoder import create_encoder
from extrema_fast.reporting import patches as module
from extrema_fast.reporting.figures import marked, patch_table
from extrema_fast.reporting.patches import (
    Patches,
    compress,
    foreground,
    pca_colors,
    principal_components,
    read_patches,
    salient,
    similarity,
    split_like,
    token_colors,
)
from tests.encoders import randomized


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return randomized(
        create_encoder("extrema_vit_tiny_patch16_224", img_size=32, patch_size=8, width=32, depth=2, heads=2)
    )


def test_patches_are_those_of_encode(encoder):
    x = torch.randn(2, 3, 24, 40)
    found = read_patches(encoder, x)
    assert [p.grid for p in found] == [(3, 5)] * 2
    with torch.inference_mode():
        tokens, maps = encoder.encode(x).patches, encoder.get_attention(x)[..., 1:]
    assert torch.allclose(torch.stack([p.tokens for p in found]).flatten(1, 2), tokens, atol=1e-5)
    shares = torch.stack([p.attention for p in found])
    assert shares.shape == (2, 2, 2, 3, 5)
    assert torch.allclose(shares.mean((-1, -2)), torch.ones(2, 2, 2), atol=1e-5)
    assert torch.allclose(shares.flatten(-2) / 15, F.normalize(maps, p=1, dim=-1), atol=1e-6)
    pooled = create_encoder("extrema_vit_tiny_patch16_224", img_size=32, patch_size=8, global_pool="avg")
    assert read_patches(pooled.eval(), x)[0].attention is None


@pytest.mark.parametrize(("n", "width", "count"), [(39, 19, 3), (5, 19, 3), (49, 2, 3)])
def test_principal_components_are_those_of_the_svd(n, width, count):
    x = torch.randn(n, width) * torch.arange(1, width + 1) + 7
    y, shares = principal_components(x, count)
    centered = x.double().numpy() - x.double().numpy().mean(0)
    u, s, v = np.linalg.svd(centered, full_matrices=False)
    known = min(count, width)
    assert np.allclose(np.abs(y[:, :known].numpy()), np.abs(u[:, :known] * s[:known]), atol=1e-7)
    assert np.allclose(shares[:known], (s**2 / (s**2).sum())[:known], atol=1e-9)
    assert (y[:, known:] == 0).all() and shares[known:] == [0.0] * (count - known)
    # each axis points to its largest entry
    for k in range(known):
        largest = np.abs(v[k]).argmax()
        assert np.allclose(y[:, k].numpy(), centered @ v[k] * np.sign(v[k, largest]), atol=1e-7)


def test_token_colors_share_one_basis_with_fixed_signs():
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    out = token_colors(x)
    assert out.shape == (2, 9, 3) and out.dtype == np.uint8 and out.min() == 0 and out.max() == 255
    assert np.array_equal(token_colors(x.flip(0)), out[::-1])
    assert token_colors(x[..., :2]).shape == (2, 9, 3)


def blob(rows: int, columns: int, direction: torch.Tensor) -> tuple[Patches, np.ndarray]:
    """Tokens of two kinds, one of them in the middle of the grid."""
    inside = np.zeros((rows, columns), bool)
    inside[2:-1, 1:-2] = True
    tokens = torch.from_numpy(inside)[..., None] * direction + 0.05 * torch.randn(
        rows, columns, len(direction)
    )
    return Patches(tokens, None), inside


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_side_away_from_the_borders(sign):
    direction = sign * torch.tensor([1.0, 2.0, -1.0, 0.5])
    (a, in_a), (b, in_b) = blob(7, 9, direction), blob(6, 5, direction)
    front = split_like(foreground([a, b]), [a, b])
    assert np.array_equal(front[0], in_a) and np.array_equal(front[1], in_b)
    colors, objects = pca_colors([a, b])
    assert colors[1].shape == objects[1].shape == (6, 5, 3)
    assert (objects[0][~in_a] == 0).all() and objects[0][in_a].any()
    # one basis: the same token has the same color in both images
    twice = Patches(torch.cat([a.tokens[:, :5], b.tokens[:1]]), None)
    assert np.array_equal(pca_colors([twice, twice])[0][0], pca_colors([twice, twice])[0][1])
    # one patch, and equal ones
    assert pca_colors([Patches(torch.ones(1, 1, 4), None)])[1][0].shape == (1, 1, 3)
    assert not pca_colors([Patches(torch.ones(3, 3, 4), None)])[1][0].any()


def test_similarity_separates_two_textures(encoder):
    # stripes left, checks right, with a period of a patch
    y, x = np.mgrid[0:64, 0:64]
    left, right = 255 * (x % 4 < 2), 255 * ((x // 4 + y // 4) % 2)
    image = torch.from_numpy(np.where(x < 32, left, right)).float()[None].expand(3, -1, -1) / 128 - 1
    (found,) = read_patches(encoder, image[None])
    values = similarity(found, found.tokens[3, 1])
    assert values.shape == (8, 8) and values[3, 1] == pytest.approx(1, abs=1e-5)
    assert values[:, :4].min() > values[:, 4:].max()
    assert (
        similarity(found, found.tokens[3, 6])[:, 4:].min()
        > similarity(found, found.tokens[3, 6])[:, :4].max()
    )


def test_salient_patch():
    attention = torch.zeros(2, 3, 4, 5)
    attention[0, 0, 0, 0], attention[1, :, 2, 3] = 9, 2
    assert salient(Patches(torch.zeros(4, 5, 2), attention)) == (2, 3)
    assert salient(Patches(torch.zeros(4, 5, 2), None)) == (2, 2)


@pytest.mark.parametrize("rank", [3, 96])
def test_compressed_tokens_have_the_cosines(rank):
    x = torch.randn(200, rank) @ torch.randn(rank, 96)
    small = compress(x)
    y = torch.from_numpy(small.codes.astype(np.float32))
    exact = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
    error = float(((y * torch.from_numpy(small.weights)) @ y.T - exact).abs().max())
    assert error == pytest.approx(small.error, abs=1e-5) and error <= module.TOLERANCE
    assert small.codes.dtype == np.int8 and small.codes.shape[1] == (16 if rank == 3 else 96)


def test_table_of_patches(encoder):
    found = read_patches(encoder, torch.randn(2, 3, 32, 24))
    table = patch_table(found)
    heads = [f"block {p}, head {h}" for p in (1, 2) for h in (1, 2)]
    assert table.titles == ["image", *heads, "patch", "similar to it", "patch PCA", "foreground PCA"]
    assert all(len(row) == len(table.titles) for row in table.rows) and table.rows[0][0] is None
    # the frame lies on the most attended patch; the map is brightest there
    row, column = salient(found[0])
    mark, near = table.rows[0][5], table.rows[0][6]
    assert np.array_equal(mark, marked((4, 3), (row, column)))
    assert (
        mark[10 * row : 10 * row + 2, 10 * column : 10 * column + 10, 3].all()
        and mark[..., 3].mean() < 0.2 * 255
    )
    brightest = near.reshape(-1, 4)[near.reshape(-1, 4)[:, :3].sum(1).argmax()]
    assert np.array_equal(near[row, column], brightest)
    # in a fine grid the frame lies around the patch
    fine = marked((32, 20), (0, 19))[..., 3] > 0
    assert not fine[:10, 190:].any() and fine[11:20, 180:].all() and fine[:20, 180:189].all()
    assert not fine[20:].any() and not fine[:, :175].any()
    # to a patch of the first image: no other has a frame
    table = patch_table(found, ["similarity"], at=(3, 2))
    assert table.titles == ["image", "patch", "similar to it"] and table.top is None
    assert not table.rows[1][1].any() and table.rows[0][1][30:40, 20:30].any()
    # nearly equal tokens look equal
    same = Patches(torch.ones(4, 3, 8) + 1e-3 * torch.randn(4, 3, 8), None)
    assert patch_table([same], ["similarity"]).low == 0.9
    assert patch_table([same], ["attention", "pca"]).titles == ["image", "patch PCA", "foreground PCA"]
