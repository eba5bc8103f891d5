"""An encoder under the interfaces of DINO, DINOv2 and DINOv3.

Covers: types, shapes, keys and defaults of both; the class token of the last layer and of earlier ones; layers
against `forward_intermediates`; lists of images; shared parameters, gradients, modes; attributes; errors; one
compiled graph.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from extrema_fast.config import ModelConfig
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import Encoder
from tests.encoders import close, randomized

CONFIG = ModelConfig(
    img_size=(12, 20), patch_size=4, width=48, depth=4, heads=3, mlp_ratio=2.0, drop_path=0.0
)
N = 15


@pytest.fixture
def encoder() -> Encoder:
    return randomized(Encoder(CONFIG).double())


def images(b: int = 2, h: int = 12, w: int = 20) -> torch.Tensor:
    return torch.randn(b, 3, h, w, dtype=torch.float64)


@pytest.mark.parametrize("version", [2, 3])
def test_dictionary(encoder, version):
    model, x = encoder.as_dino(version), images()
    out = model.forward_features(x)
    extra = {2: "x_norm_regtokens", 3: "x_storage_tokens"}[version]
    assert set(out) == {"x_norm_clstoken", "x_norm_patchtokens", extra, "x_prenorm", "masks"}
    features, raw = encoder.forward_features(x), encoder.encode(x, norm=False)
    assert close(out["x_norm_clstoken"], features[:, 0]) and close(out["x_norm_patchtokens"], features[:, 1:])
    assert out[extra].shape == (2, 0, 48) and out["masks"] is None
    assert close(model(x), encoder(x)) and set(model(x, is_training=True)) == set(out)
    assert close(out["x_prenorm"][:, 0], raw.cls) and close(out["x_prenorm"][:, 1:], raw.patches)


def test_list_of_crops(encoder):
    model, crops = encoder.as_dino(), [images(), images(3, 8, 8)]
    out = model.forward_features(crops)
    assert isinstance(out, list) and [o["x_norm_patchtokens"].shape[:2] for o in out] == [(2, N), (3, 4)]
    assert close(out[1]["x_norm_clstoken"], encoder(crops[1]))
    assert close(model(crops)[0], encoder(crops[0]))
    assert model(crops, [None, None], is_training=True)[1]["masks"] is None
    with pytest.raises(UsageError, match="mask token"):
        model(crops, [None, torch.zeros(3, 4, dtype=torch.bool)])


def test_layers_of_version_2(encoder):
    model, x = encoder.as_dino(), images()
    layers = model.get_intermediate_layers(x)
    assert isinstance(layers, tuple) and len(layers) == 1
    # the norm is on by default, unlike timm's
    assert close(layers[0], encoder.get_intermediate_layers(x, 1, norm=True)[0])
    for n, reshape, norm in ((3, False, True), ([0, 2], True, False), ((-1, 1), True, True)):
        ours = model.get_intermediate_layers(x, n, reshape, False, norm)
        wanted = encoder.get_intermediate_layers(x, n, reshape=reshape, norm=norm)
        assert isinstance(ours, tuple) and all(close(a, b) for a, b in zip(ours, wanted, strict=True))
    assert ours[0].shape == (2, 48, 3, 5)
    pairs = model.get_intermediate_layers(x, 2, return_class_token=True)
    assert [[t.shape for t in pair] for pair in pairs] == [[(2, N, 48), (2, 48)]] * 2
    assert all(isinstance(pair, tuple) for pair in pairs)


def test_layers_of_version_3(encoder):
    model, x = encoder.as_dino(3), images()
    (alone,) = model.get_intermediate_layers(x)
    assert close(alone, encoder.forward_features(x)[:, 1:])
    out = model.get_intermediate_layers(
        x, n=2, reshape=True, return_class_token=True, return_extra_tokens=True
    )
    assert [[t.shape for t in parts] for parts in out] == [[(2, 48, 3, 5), (2, 48), (2, 0, 48)]] * 2
    out = model.get_intermediate_layers(x, n=1, return_extra_tokens=True)
    assert [t.shape for t in out[0]] == [(2, N, 48), (2, 0, 48)]


def test_version_1(encoder):
    model, x = encoder.as_dino(1), images()
    assert close(model(x), encoder(x)) and close(model([x, x])[1], encoder(x))
    # the features of its linear probe and of its video segmentation
    layers = model.get_intermediate_layers(x, 2)
    assert isinstance(layers, list) and [t.shape for t in layers] == [(2, 1 + N, 48)] * 2
    assert close(layers[1], encoder.forward_features(x))
    (pair,) = encoder.as_dino().get_intermediate_layers(x, [2], return_class_token=True)
    assert close(layers[0], torch.cat([pair[1][:, None], pair[0]], 1))
    assert x.shape[-1] // model.patch_embed.patch_size == 5 and model.patch_embed.num_patches == N
    # its attention maps: heads of the first row, without the class token
    attention = model.get_last_selfattention(x)
    assert attention.shape == (2, 3, 1, 1 + N)
    assert close(attention.sum(-1), torch.ones(2, 3, 1, dtype=attention.dtype))
    assert close(attention[:, :, 0], encoder.get_attention(x)[:, -1])
    assert attention[0, :, 0, 1:].reshape(3, -1).shape == (3, N)


def test_version_3_cuts_any_size(encoder):
    model, x = encoder.as_dino(3), images(2, 15, 21)
    assert close(model(x), encoder(x[..., :12, :20]))
    (layer,) = model.get_intermediate_layers(x, reshape=True)
    assert layer.shape == (2, 48, 3, 5) and model.get_last_selfattention(x).shape == (2, 3, 1, 1 + N)
    for other in (encoder.as_dino(), encoder.as_dino(1)):
        with pytest.raises(UsageError, match="multiple of the patch size 4"):
            other(x)
    with pytest.raises(UsageError, match="multiple of the patch size 4"):
        model(images(1, 3, 20))


def test_weights_of_a_model_made_on_no_device():
    with torch.device("meta"):
        model = Encoder(CONFIG).as_dino(3)
    model = model.to_empty(device="cpu")
    for p in (*model.parameters(), *model.buffers()):
        p.data.fill_(float("nan"))
    torch.manual_seed(5)
    model.init_weights()
    torch.manual_seed(5)
    fresh = Encoder(CONFIG)
    torch.manual_seed(5)
    fresh.reset_parameters()
    ours, wanted = model.encoder.state_dict(), Encoder(CONFIG).state_dict()
    for name, value in fresh.state_dict().items():
        assert torch.equal(ours[name], value), name
        # of the same distribution: the same constants, spreads alike
        assert close(value.std(), wanted[name].std(), 0.3 * float(wanted[name].std()) + 1e-12), name


@pytest.mark.parametrize("norm", [False, True])
def test_class_token_of_a_layer(encoder, norm):
    x = images()
    head, last = encoder.as_dino(), encoder.as_dino(3, layer_class="last")
    layers = {"n": [1, 3], "return_class_token": True, "norm": norm}
    ours, repeated = head.get_intermediate_layers(x, **layers), last.get_intermediate_layers(x, **layers)
    true = encoder.encode(x, norm=norm).cls
    # exact at the last layer
    assert close(ours[1][1], true) and close(repeated[1][1], true) and close(repeated[0][1], true)
    # before it, the class head on that layer's tokens: what an encoder of so many blocks computes
    short = copy.deepcopy(encoder)
    short.prune_intermediate_layers([1], prune_head=False)
    assert close(ours[0][1], short.encode(x, norm=norm).cls) and not close(ours[0][1], true)
    assert all(close(a[0], b[0]) for a, b in zip(ours, repeated, strict=True))
    # also where the last layer is not asked for
    (pair,) = last.get_intermediate_layers(x, n=[1], return_class_token=True, norm=norm)
    assert close(pair[1], true)


def test_attributes(encoder):
    model = encoder.as_dino()
    assert model.patch_size == 4 and isinstance(model.patch_size, int)
    assert (model.embed_dim, model.num_features, model.num_heads, model.n_blocks) == (48, 48, 3, 4)
    assert model.num_register_tokens == model.n_storage_tokens == 0
    assert isinstance(model.head, torch.nn.Identity) and model.norm is encoder.norm
    assert model.cls_token is encoder.cls_token
    # Depth-Anything asks a block for the width
    assert model.blocks[0].attn.qkv.in_features == 48 and model.patch_embed.patch_size == (4, 4)


def test_parameters_are_shared(encoder):
    model, x = encoder.as_dino(), images()
    assert {id(p) for p in model.parameters()} == {id(p) for p in encoder.parameters()}
    assert not model.training and not model.encoder.training
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    with torch.no_grad():
        encoder.cls_token.add_(1)
    assert close(model(x), encoder(x))
    assert encoder.train().as_dino().training and model.train().encoder.training
    model.float()
    assert encoder.cls_token.dtype == torch.float32


def test_errors(encoder):
    model, x = encoder.as_dino(), images()
    with pytest.raises(UsageError, match=r"no mask token; encoder\.encode"):
        model.forward_features(x, torch.zeros(2, N, dtype=torch.bool))
    with pytest.raises(UsageError, match="n: expected the last 1 to 4 layers, got 5"):
        model.get_intermediate_layers(x, 5)
    with pytest.raises(UsageError, match="multiple of the patch size 4"):
        model.get_intermediate_layers(images(1, 13, 20))
    with pytest.raises(UsageError, match="no class head"):
        Encoder(CONFIG, global_pool="avg").as_dino()
    for options in ({"version": 4}, {"layer_class": "first"}):
        with pytest.raises(UsageError, match=next(iter(options))):
            encoder.as_dino(**options)


def test_compiles_into_one_graph():
    small = replace(CONFIG, depth=2, pool_depth=1)
    model, x = randomized(Encoder(small).double()).as_dino(), images()
    wanted = model.get_intermediate_layers(x, n=2, return_class_token=True)
    try:
        layers = torch.compile(model.get_intermediate_layers, backend="eager", fullgraph=True)
        for ours, theirs in zip(layers(x, n=2, return_class_token=True), wanted, strict=True):
            assert close(ours[0], theirs[0]) and close(ours[1], theirs[1])
    finally:
        torch.compiler.reset()
