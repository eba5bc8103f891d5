"""Other image sizes, patch sizes and channel counts.

Covers: rescaled coordinates against their formula and against bicubic resizing; any grid, also non-square, equal
to an encoder built at that size; what is kept per grid, device and dtype; `set_input_size` with fixed and learned
positions; patch kernels against their definition and against timm; channels by timm's rule; learned tables against
timm; position coordinates told on; one compiled graph at another size; refused sizes, which change nothing.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from extrema_fast.config import ModelConfig
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import Encoder, create_encoder, model_args
from extrema_fast.models.positions import adapt_in_chans, resample_patch_kernel, resample_table, sincos_table
from tests.encoders import randomized

CONFIG = ModelConfig(
    img_size=(24, 40), patch_size=8, width=32, depth=2, heads=2, mlp_ratio=2.0, drop_path=0.0
)
GRIDS = [(1, 1), (7, 2), (3, 5), (6, 10)]


def make(config: ModelConfig = CONFIG, **options) -> Encoder:
    return randomized(Encoder(config, **options))


def images(grid: tuple[int, int], patch: int = 8, b: int = 2) -> torch.Tensor:
    return torch.randn(b, 3, grid[0] * patch, grid[1] * patch)


def at(grid: tuple[int, int]) -> ModelConfig:
    return replace(CONFIG, img_size=(grid[0] * 8, grid[1] * 8))


# ---- the sin-cos table ----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_rescaled_coordinates(grid):
    table = sincos_table(32, grid, torch.float64, trained=(3, 5))
    for p in (0, len(table) // 2, len(table) - 1):
        row, column = divmod(p, grid[1])
        row, column = (row + 0.5) * 3 / grid[0] - 0.5, (column + 0.5) * 5 / grid[1] - 0.5
        w = 10000 ** (-np.arange(8) / 8)
        wanted = np.concatenate([np.sin(column * w), np.cos(column * w), np.sin(row * w), np.cos(row * w)])
        assert np.abs(table[p].numpy() - wanted).max() < 1e-12


def test_rescaled_is_near_bicubic_resizing():
    grid = (28, 20)
    old = sincos_table(384, (14, 14))
    resized = resample_table(old[None], (14, 14), grid, antialias=False)[0]
    off = (resized - sincos_table(384, grid, trained=(14, 14))).abs()
    # they part at the border alone, where resizing repeats the outermost rows
    assert off.mean() < 0.004 and off.view(*grid, -1)[4:-4, 4:-4].max() < 0.06
    assert (resized - sincos_table(384, grid)).abs().mean() > 0.1


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("coords", ["absolute", "rescaled"])
def test_another_grid_equals_an_encoder_built_there(grid, coords):
    encoder = make(pos_coords=coords)
    there = Encoder(at(grid), pos_coords=coords, pos_grid=(3, 5)).eval()
    there.load_state_dict({k: v for k, v in encoder.state_dict().items() if k != "pos_embed"}, strict=False)
    x = images(grid)
    assert torch.equal(encoder.positions(grid), there.pos_embed[0])
    assert torch.equal(encoder.forward_features(x), there.forward_features(x))
    assert encoder.encode(x).grid == grid


def test_tables_are_kept_per_grid_device_and_dtype():
    encoder = make()
    assert encoder.positions((3, 5)).data_ptr() == encoder.pos_embed.data_ptr()
    table = encoder.positions((4, 4))
    assert encoder.positions((4, 4)) is table and table.dtype == torch.float32
    low = encoder.to(torch.bfloat16).positions((4, 4))
    assert low.dtype == torch.bfloat16 and torch.equal(low, table.bfloat16())
    assert encoder.to(torch.float32).positions((4, 4)) is table
    assert encoder.to("meta").positions((4, 4)).device.type == "meta"
    # sizes without end do not fill the memory
    for n in range(1, 40):
        encoder.positions((1, n))
    assert len(encoder.sincos._cache) <= 8


def test_tables_made_in_inference_mode_or_while_shapes_are_propagated():
    from torch._subclasses import FakeTensorMode

    encoder, x = make(), images((4, 4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder.positions((4, 4))
    with torch.inference_mode():
        encoder(x)
    assert torch.equal(encoder.positions((4, 4)), sincos_table(32, (4, 4)))
    encoder(x).sum().backward()
    assert encoder.cls_token.grad is not None


def test_coordinates_are_told_on():
    encoder = make(pos_coords="rescaled")
    encoder.set_input_size((48, 80))
    args = model_args(encoder)
    assert args["pos_coords"] == "rescaled" and args["pos_grid"] == [3, 5]
    again = create_encoder(encoder.architecture, **args)
    assert torch.equal(again.pos_embed, encoder.pos_embed)


# ---- set_input_size -------------------------------------------------------------------------------


def test_set_input_size():
    encoder, x = make(), images((6, 7))
    wanted = encoder.forward_features(x)
    encoder.set_input_size((48, 56))
    assert encoder.img_size == (48, 56) and encoder.grid == (6, 7) and encoder.num_patches == 42
    assert encoder.config.img_size == (48, 56) and encoder.patch_embed.img_size == (48, 56)
    assert encoder.pos_embed.shape == (1, 42, 32) and "pos_embed" in dict(encoder.named_buffers())
    assert torch.equal(encoder.forward_features(x), wanted)
    assert encoder.preprocess().metadata["input_size"] == (3, 48, 56)
    encoder.set_input_size(32)
    assert encoder.img_size == (32, 32) and torch.equal(encoder.pos_embed[0], sincos_table(32, (4, 4)))
    # what it was built with stays reachable
    x = images((3, 5))
    assert torch.equal(encoder.positions((3, 5)), sincos_table(32, (3, 5))) and encoder(x).shape == (2, 32)


@pytest.mark.parametrize("antialias", [True, False])
def test_set_input_size_resamples_a_learned_table(antialias):
    encoder = make(pos_embed="learned")
    encoder.pos_embed.requires_grad_(False)
    old = encoder.pos_embed.detach().clone()
    encoder.set_input_size((16, 24), antialias=antialias)
    picture = old.view(1, 3, 5, 32).permute(0, 3, 1, 2)
    wanted = F.interpolate(picture, size=(2, 3), mode="bicubic", antialias=antialias)
    assert isinstance(encoder.pos_embed, torch.nn.Parameter) and not encoder.pos_embed.requires_grad
    assert torch.allclose(encoder.pos_embed[0], wanted[0].flatten(1).T, atol=1e-6)
    assert encoder(images((2, 3))).shape == (2, 32)
    with pytest.raises(UsageError, match=r"\(24, 40\) is not the size .*set_input_size\(\(24, 40\)\)"):
        encoder(images((3, 5)))


def test_set_patch_size():
    encoder, x = make(), images((3, 5))
    kernel = encoder.patch_embed.proj.weight.detach().clone()
    small = encoder(x)
    encoder.set_input_size((48, 80), patch_size=(16, 16))
    assert encoder.patch_size == 16 and encoder.patch_embed.patch_size == (16, 16) and encoder.grid == (3, 5)
    assert encoder.config.patch_size == 16 and encoder.feature_info[0]["reduction"] == 16
    assert torch.equal(encoder.patch_embed.proj.weight, resample_patch_kernel(kernel, 16))
    # every patch enlarged by itself is seen as it was
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 1, 8, 8)
    large = F.interpolate(patches, scale_factor=2, mode="bicubic", antialias=True)
    large = large.view(2, 3, 3, 5, 16, 16).transpose(3, 4).reshape(2, 3, 48, 80)
    assert torch.allclose(encoder(large), small, atol=2e-5)
    encoder.set_input_size(patch_size=4)
    x = images((12, 20), 4)
    assert encoder.grid == (12, 20) and encoder(x).shape == (2, 32)
    assert torch.allclose(encoder.patch_embed(x) + encoder.pos_embed, encoder.embed(x), atol=1e-5)
    assert {p.requires_grad for p in encoder.patch_embed.parameters()} == {True}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"img_size": (24, 41)}, "img_size: width 41 .* use 40 or 48"),
        ({"img_size": (4, 40)}, "img_size: height 4"),
        ({"patch_size": 7}, "img_size: height 24 .*patch size 7"),
        ({"patch_size": (8, 4)}, "patch_size: .*8 x 4"),
        ({"patch_size": 0}, "patch_size: .*0 x 0"),
        ({"img_size": "large"}, "img_size: .*'large'"),
    ],
)
def test_refused_sizes_change_nothing(args, words):
    for encoder in (make(), make(pos_embed="learned")):
        x = images((3, 5))
        before = encoder(x)
        with pytest.raises(UsageError, match=words):
            encoder.set_input_size(**args)
        assert torch.equal(encoder(x), before) and encoder.img_size == (24, 40) and encoder.patch_size == 8


def test_patch_size_set_below_the_encoder_is_noticed():
    # as code does that knows timm's PatchEmbed alone
    encoder, x = make(), images((6, 10), 4)
    encoder.patch_embed.set_input_size(patch_size=4)
    assert encoder.grid == (6, 10) and torch.equal(encoder.positions((6, 10)), sincos_table(32, (6, 10)))
    assert encoder(x).shape == (2, 32)


def test_compiles_at_another_size():
    encoder, x = make(replace(CONFIG, depth=1, pool_depth=1)), images((4, 6))
    wanted = encoder.forward_features(x)
    try:
        compiled = torch.compile(encoder.forward_features, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), wanted, atol=1e-6)
        # one graph for images of any size, that of the weights among them
        graphs = []
        whole = torch.compile(
            encoder, dynamic=True, fullgraph=True, backend=lambda g, _: graphs.append(g) or g
        )
        for grid in (encoder.grid, (4, 6), (7, 2)):
            x = images(grid)
            assert torch.allclose(whole(x), encoder(x), atol=1e-6)
        assert len(graphs) == 1
    finally:
        torch.compiler.reset()


def test_exports_for_any_size():
    config = ModelConfig(img_size=(8, 8), patch_size=4, width=16, depth=1, heads=1, pool_depth=1)
    encoder = make(config)
    rows, columns = (torch.export.Dim(name, min=1, max=64) for name in ("rows", "columns"))
    shapes = {"images": {0: torch.export.Dim("batch", max=1024), 2: 4 * rows, 3: 4 * columns}}
    # traced at its own size, whose table is saved with the weights
    with torch.no_grad():
        program = torch.export.export(encoder, (images((2, 2), 4),), dynamic_shapes=shapes, strict=False)
        run = program.module()
        for grid in ((2, 2), (2, 9), (7, 3)):
            x = images(grid, 4, b=3)
            assert torch.allclose(run(x), encoder(x), atol=1e-6)


# ---- patch kernels --------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [1, 7, 9, 32])
def test_patch_kernel_is_the_least_squares_answer(new):
    kernel = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    ours = resample_patch_kernel(kernel, new)
    assert ours.shape == (5, 3, new, new) and ours.dtype == torch.float64
    # <kernel, x> = <ours, resize(x)> for every picture x, in the least-squares sense
    x = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    resized = F.interpolate(x, size=(new, new), mode="bicubic", antialias=True).flatten(1)
    wanted = torch.linalg.lstsq(resized, kernel.view(15, 64).T, driver="gelsd").solution
    assert torch.allclose(ours.view(15, -1), wanted.T, atol=1e-9)
    if new >= 8:
        # nothing is lost where the patch grows
        assert torch.allclose(ours.flatten(2) @ resized.T, kernel.flatten(2), atol=1e-9)


def test_patch_kernel_keeps_its_type_and_itself():
    kernel = torch.randn(4, 3, 8, 8)
    assert resample_patch_kernel(kernel, 8) is kernel
    low = resample_patch_kernel(kernel.bfloat16(), 12)
    assert low.dtype == torch.bfloat16
    assert (low.float() - resample_patch_kernel(kernel, 12)).abs().max() < 0.05
    with pytest.raises(UsageError, match="patch kernel: "):
        resample_patch_kernel(kernel[..., :6], 8)


# ---- channels and learned tables ------------------------------------------------------------------


@pytest.mark.parametrize(("have", "want"), [(1, 3), (3, 1), (3, 2), (3, 3), (3, 7), (4, 5)])
def test_channels(have, want):
    kernel = torch.randn(6, have, 4, 4, dtype=torch.float64)
    ours = adapt_in_chans(kernel, want)
    assert ours.shape == (6, want, 4, 4) and ours.dtype == kernel.dtype
    if want == have:
        assert ours is kernel
    elif want == 1:
        assert torch.allclose(ours[:, 0], kernel.sum(1))
    else:
        for c in range(want):
            assert torch.allclose(ours[:, c], kernel[:, c % have] * have / want)
    with pytest.raises(UsageError, match="at least 1, got 0"):
        adapt_in_chans(kernel, 0)


@pytest.mark.parametrize("new", [(6, 10), (2, 3)])
def test_learned_table_is_timms(new):
    layers = pytest.importorskip("timm.layers")
    table = torch.randn(1, 15, 32)
    theirs = layers.resample_abs_pos_embed(table, new, (3, 5), num_prefix_tokens=0)
    assert torch.allclose(resample_table(table, (3, 5), new), theirs, atol=1e-6)
    assert torch.equal(resample_table(table[0], (3, 5), new), resample_table(table, (3, 5), new)[0])

    with pytest.raises(UsageError, match="15 rows do not make a grid of 4 x 4"):
        resample_table(table, (4, 4), new)
