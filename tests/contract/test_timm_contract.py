"""The methods and attributes that timm, and code written for timm's vision transformers, asks of a model.

Covers: every row of the method table, against timm's stock `VisionTransformer` on the same weights where there is one;
preprocessing; gradients, checkpointing, layer groups; what other packages touch; errors. `test_timm_registry.py` has
timm's factory, `test_resolution.py` sizes and positions.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from extrema_fast.config import ModelConfig
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import Encoder
from tests.encoders import close, randomized

timm = pytest.importorskip("timm")

CONFIG = ModelConfig(
    img_size=(12, 20), patch_size=4, width=48, depth=4, heads=3, mlp_ratio=2.0, drop_path=0.0
)
N = 15


def make(**options) -> Encoder:
    """A float64 encoder whose every parameter is random."""
    return randomized(Encoder(CONFIG, **options).double())


def images(b: int = 2) -> torch.Tensor:
    return torch.randn(b, 3, 12, 20, dtype=torch.float64)


def stock(encoder: Encoder) -> torch.nn.Module:
    """timm's own ViT with the trunk's weights."""
    from functools import partial

    from timm.models.vision_transformer import VisionTransformer

    model = (
        VisionTransformer(
            img_size=CONFIG.img_size,
            patch_size=4,
            embed_dim=48,
            depth=4,
            num_heads=3,
            mlp_ratio=2.0,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            num_classes=0,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        )
        .double()
        .eval()
    )
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith(("cls_token", "blocks_token"))}
    model.load_state_dict(state)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: p.grad for n, p in model.named_parameters()}


# ---- attributes -----------------------------------------------------------------------------------


def test_attributes():
    encoder = Encoder(CONFIG, 7)
    assert encoder.num_classes == 7 and encoder.in_chans == 3 and encoder.global_pool == "token"
    assert encoder.num_features == encoder.head_hidden_size == encoder.embed_dim == 48
    assert encoder.num_prefix_tokens == 1 and encoder.has_class_token is False
    assert encoder.get_classifier() is encoder.head and encoder.head.out_features == 7
    layer = {"num_chs": 48, "reduction": 4}
    assert encoder.feature_info == [{"module": f"blocks.{i}", **layer} for i in range(4)]
    assert Encoder(CONFIG, global_pool="avg").num_prefix_tokens == 0
    assert Encoder(CONFIG, global_pool="").num_prefix_tokens == 1


def test_no_weight_decay_names_parameters():
    assert Encoder(CONFIG).no_weight_decay() == {"cls_token"}
    assert Encoder(CONFIG, pos_embed="learned").no_weight_decay() == {"cls_token", "pos_embed"}


def test_patch_embedding():
    encoder, x = make(), images()
    embed = encoder.patch_embed
    assert embed.patch_size == (4, 4) and embed.grid_size == (3, 5) and embed.num_patches == N
    assert embed.img_size == (12, 20) and isinstance(embed.proj, torch.nn.Conv2d)
    assert embed.feat_ratio() == 4 and embed.feat_ratio(as_scalar=False) == (4, 4)
    assert embed.dynamic_feat_size((16, 40)) == (4, 10)
    assert close(embed(x) + encoder.pos_embed, encoder.embed(x))
    assert encoder.patch_size == 4 and encoder.grid == (3, 5) and encoder.num_patches == N


def test_pretrained_cfg_is_what_timm_resolves_and_preprocess_does():
    from timm.data import resolve_data_config

    encoder = Encoder(CONFIG, 3)
    encoder.mean, encoder.std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
    cfg = encoder.pretrained_cfg
    assert cfg == encoder.default_cfg and cfg["pool_size"] is None and cfg["num_classes"] == 3
    assert cfg["first_conv"] == "patch_embed.proj" and cfg["classifier"] == "head"
    assert cfg["fixed_input_size"] is False
    assert Encoder(CONFIG, pos_embed="learned").pretrained_cfg["fixed_input_size"] is True
    resolved, own = resolve_data_config(model=encoder), encoder.preprocess().metadata
    del resolved["crop_mode"]
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in resolved.items()} == own


@pytest.mark.parametrize(
    ("size", "picture", "interpolation"),
    [
        ((224, 224), (431, 300), "bilinear"),
        ((32, 96), (173, 399), "bicubic"),
        # (width, height) of exactly the input
        ((224, 224), (224, 224), "bilinear"),
        ((32, 96), (96, 32), "bicubic"),
    ],
)
def test_preprocess_gives_the_pixels_of_timms_transform(size, picture, interpolation):
    pytest.importorskip("torchvision")
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    encoder = Encoder(ModelConfig(size="tiny", img_size=size, depth=1))
    encoder.interpolation = interpolation
    pixels = (torch.rand(19, 23, 3) * 255).to(torch.uint8).numpy()
    image = Image.fromarray(pixels).resize(picture, Image.Resampling.BICUBIC)
    theirs = create_transform(**resolve_data_config(model=encoder), is_training=False)(image)
    ours = encoder.preprocess()
    # the same bytes of Pillow, normalized in another order
    torch.testing.assert_close(ours(image), theirs, rtol=0, atol=1e-5)
    # torch's resize of a tensor rounds once, Pillow's after each direction
    tensor = ours(torch.from_numpy(np.array(image)))
    assert float((tensor - theirs).abs().max()) <= 4.01 / 255 / 0.224


def test_copies():
    encoder, x = make(num_classes=3), images()
    encoder(torch.randn(1, 3, 16, 16, dtype=torch.float64))  # another grid, kept
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(twin(x), encoder(x))
        assert twin.cls_token.data_ptr() != encoder.cls_token.data_ptr()


# ---- features and head ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": True}, {"global_pool": ""}]
)
@pytest.mark.parametrize("classes", [0, 5])
def test_forward_is_head_of_features(options, classes):
    encoder, x = make(num_classes=classes, **options), images()
    features = encoder.forward_features(x)
    assert features.shape == (2, encoder.num_prefix_tokens + N, 48)
    logits, before = encoder.forward_head(features), encoder.forward_head(features, pre_logits=True)
    assert close(encoder(x), logits) and before.shape[-1] == encoder.head_hidden_size
    assert close(logits, encoder.head(before)) and logits.shape[-1] == (classes or 48)
    wanted = {"token": features[:, 0], "avg": features.mean(1), "": features}[encoder.global_pool]
    assert close(before, encoder.fc_norm(wanted))


def test_reset_classifier():
    encoder, x = make(num_classes=5), images()
    features = encoder.forward_features(x)
    encoder.reset_classifier(0)
    assert isinstance(encoder.head, torch.nn.Identity) and encoder.num_classes == 0
    assert close(encoder(x), features[:, 0]) and encoder.global_pool == "token"
    encoder.reset_classifier(9, "avg")
    assert encoder(x).shape == (2, 9) and encoder.head.weight.dtype == torch.float64
    assert not encoder.head.bias.any() and 0 < encoder.head.weight.abs().max() < 2e-4
    assert close(encoder.forward_head(features, pre_logits=True), features[:, 1:].mean(1))
    encoder.reset_classifier(0, "")
    assert close(encoder(x), features)
    encoder.train().reset_classifier(2, "token")
    assert encoder.head.training and encoder(x).shape == (2, 2)
    # encode gives the class token whatever the pool
    assert close(encoder.eval().encode(x).cls, features[:, 0])


@pytest.mark.parametrize(
    ("options", "args", "words"),
    [
        ({"global_pool": "avg"}, (3, "token"), "needs the class head"),
        ({}, (3, "max"), "'token', 'avg' or '' .*got 'max'"),
        ({}, (-1,), "num_classes"),
    ],
)
def test_reset_classifier_refuses(options, args, words):
    encoder = make(num_classes=2, **options)
    with pytest.raises(UsageError, match=words):
        encoder.reset_classifier(*args)
    assert encoder.num_classes == 2 and encoder.head.out_features == 2


# ---- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "layers", "norm", "output_fmt"),
    [
        (None, [0, 1, 2, 3], False, "NCHW"),
        (1, [3], True, "NCHW"),
        (3, [1, 2, 3], False, "NLC"),
        ((-1, 0), [0, 3], True, "NLC"),
        ([2, -2, 1], [1, 2], False, timm.layers.Format.NCHW),
    ],
)
def test_forward_intermediates(indices, layers, norm, output_fmt):
    encoder, x = make(), images()
    final, taken = encoder.forward_intermediates(x, indices, norm=norm, output_fmt=output_fmt)
    assert close(final, encoder.forward_features(x)) and isinstance(taken, list)
    oracle = stock(encoder).forward_intermediates(
        x, layers, norm=norm, output_fmt=output_fmt, intermediates_only=True
    )
    assert len(taken) == len(layers)
    for a, b in zip(taken, oracle, strict=True):
        assert a.shape == ((2, 48, 3, 5) if output_fmt != "NLC" else (2, N, 48)) and close(a, b)
    alone = encoder.forward_intermediates(
        x, indices, norm=norm, output_fmt=output_fmt, intermediates_only=True, stop_early=True
    )
    assert all(torch.equal(a, b) for a, b in zip(taken, alone, strict=True))


def test_stop_early_runs_no_later_block():
    encoder, ran = make(), []
    for i, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    encoder.forward_intermediates(images(), [1], stop_early=True, intermediates_only=True)
    assert ran == [0, 1]


def test_get_intermediate_layers():
    encoder, x = make(), images()
    oracle = stock(encoder)
    for options in ({}, {"n": 3}, {"n": [0, 2], "reshape": True}, {"n": 2, "norm": True}):
        ours, theirs = (m.get_intermediate_layers(x, **options) for m in (encoder, oracle))
        assert isinstance(ours, list) and all(close(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"indices": 5}, "last 1 to 4 layers, got 5"),
        ({"indices": 0}, "last 1 to 4"),
        ({"indices": [4]}, r"-4 to 3, got \[4\]"),
        ({"indices": []}, r"got \[\]"),
        ({"output_fmt": "NHWC"}, "'NCHW' or 'NLC', got 'NHWC'"),
        ({"attn_mask": torch.ones(2, 2)}, r"attn_mask: .*encode\(images, keep\)"),
        ({"is_causal": True}, "is_causal"),
    ],
)
def test_layers_refuse(options, words):
    with pytest.raises(UsageError, match=words):
        make().forward_intermediates(images(), **options)
    with pytest.raises(UsageError, match="multiple of the patch size 4"):
        make().forward_intermediates(torch.zeros(1, 3, 10, 20, dtype=torch.float64))
    for call in (make(), make().forward_features, make().get_intermediate_layers):
        with pytest.raises(UsageError, match="attn_mask"):
            call(images(), attn_mask=torch.ones(2, 2))


@pytest.mark.parametrize("norm", [False, True])
def test_class_token_with_each_layer(norm):
    # pairs as of timm, whose class token at the last layer is that of the features
    encoder, x = make(), images()
    plain = encoder.forward_intermediates(x, [1, 3], norm=norm, intermediates_only=True)
    pairs = encoder.forward_intermediates(
        x, [1, 3], return_prefix_tokens=True, norm=norm, intermediates_only=True
    )
    dino = encoder.as_dino().get_intermediate_layers(x, [1, 3], return_class_token=True, norm=norm)
    for patches, (ours, prefix), (_, cls) in zip(plain, pairs, dino, strict=True):
        assert close(ours, patches) and prefix.shape == (2, 1, 48) and close(prefix[:, 0], cls)
    assert close(pairs[1][1][:, 0], encoder.encode(x, norm=norm).cls)
    _, again = encoder.forward_intermediates(x, [1, 3], return_prefix_tokens=True, norm=norm)
    assert close(again[0][1], pairs[0][1])
    layers = encoder.get_intermediate_layers(x, 1, return_prefix_tokens=True, norm=norm)
    assert layers[0][0].shape == (2, N, 48) and close(layers[0][1], pairs[1][1])
    # without class head there is none, as in timm
    headless = make(global_pool="avg").forward_intermediates(
        x, [1], return_prefix_tokens=True, intermediates_only=True
    )
    assert isinstance(headless[0], torch.Tensor)


def test_layers_in_a_dictionary():
    encoder, x = make(), images()
    features, layers = encoder.forward_intermediates(x, 2)
    out = encoder.forward_intermediates(x, 2, output_dict=True)
    assert set(out) == {"image_features", "image_intermediates"} and close(out["image_features"], features)
    assert all(close(a, b) for a, b in zip(out["image_intermediates"], layers, strict=True))
    out = encoder.forward_intermediates(
        x, 2, output_dict=True, return_prefix_tokens=True, intermediates_only=True
    )
    assert set(out) == {"image_intermediates", "image_intermediates_prefix"}


def test_scripting_is_refused_in_words():
    for model in (make(), torch.nn.Sequential(make())):
        with pytest.raises(UsageError, match=r"torch\.jit\.script: .*torch\.export"):
            torch.jit.script(model)


@pytest.mark.parametrize("prune_norm", [False, True])
def test_prune_leaves_nothing_unused(prune_norm):
    encoder, x = make(num_classes=5), images()
    before = encoder.forward_intermediates(x, [0, -2], norm=not prune_norm, intermediates_only=True)
    assert encoder.prune_intermediate_layers([-2, 0], prune_norm=prune_norm) == [0, 2]
    assert len(encoder.blocks) == encoder.depth == 3 and encoder.num_prefix_tokens == 0
    assert encoder.cls_token is None and encoder.blocks_token is None and encoder.num_classes == 0
    after = encoder.forward_intermediates(x, [0, 2], norm=not prune_norm, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    sum(a.square().sum() for a in after).backward()
    assert all(g is not None and g.abs().max() > 0 for g in gradients(encoder).values())
    assert not any(k.startswith(("head", "cls", "blocks_token", "blocks.3")) for k in encoder.state_dict())
    assert encoder(x).shape == (2, N, 48) and close(encoder.encode(x).cls, encoder(x).mean(1))
    with pytest.raises(UsageError, match="no class head"):
        encoder.get_attention(x)
    # each block keeps its own drop-path rate: of 4 blocks the second has a third of the last one's
    encoder = Encoder(CONFIG)
    encoder.drop_path_rate = 0.6
    encoder.prune_intermediate_layers([1])
    assert encoder.drop_path_rate == pytest.approx(0.2)


# ---- training -------------------------------------------------------------------------------------


def test_checkpointing_changes_neither_outputs_nor_gradients():
    encoder, x = make(num_classes=5), images(4)
    encoder.drop_path_rate = 0.5
    encoder.train()
    results, calls = [], []
    encoder.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        assert encoder.grad_checkpointing is enable
        encoder.zero_grad()
        torch.manual_seed(3)
        out = encoder(x)
        out.square().sum().backward()
        results.append({"out": out.detach(), **gradients(encoder)})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    # once plainly; with checkpointing forwards, and again backwards
    assert len(calls) == 3
    with torch.no_grad():
        encoder(x)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "options", [{}, {"global_pool": "avg", "fc_norm": True}, {"pos_embed": "learned"}, {"global_pool": ""}]
)
def test_every_parameter_gets_a_gradient(options):
    encoder = make(num_classes=3, **options)
    encoder(images(3)).square().sum().backward()
    for name, g in gradients(encoder).items():
        # timm's backward test; a key bias cancels in the softmax
        assert g is not None and g.isfinite().all(), name
        assert g.abs().max() > 0 or name.endswith("attn.k.bias"), name


def test_mean_pooling_over_a_class_head_gives_it_zero_gradients():
    encoder = make()
    encoder.reset_classifier(3, "avg")
    encoder(images(3)).square().sum().backward()
    for name, g in gradients(encoder).items():
        unused = name.startswith(("cls_token", "blocks_token"))
        assert g is not None and bool(g.any()) is not unused, name


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("options", [{"pos_embed": "learned"}, {"global_pool": "avg", "fc_norm": True}])
def test_layer_groups(options, coarse):
    from timm.models import group_parameters

    encoder = make(num_classes=3, **options)
    groups = group_parameters(encoder, encoder.group_matcher(coarse=coarse), reverse=True)
    assert set(groups) == {n for n, _ in encoder.named_parameters()}
    for name, layer in groups.items():
        first, second = (name.split(".") + [""])[:2]
        wanted = {"patch_embed": 0, "pos_embed": 0, "cls_token": 4, "blocks_token": 4, "norm": 4}
        # as the released fine-tuning: at the full rate
        wanted |= {"fc_norm": 5, "head": 5}
        assert layer == (1 + int(second) if first == "blocks" else wanted[first]), name


# ---- other packages -------------------------------------------------------------------------------


def test_what_open_clip_and_segmentation_models_touch():
    from timm.models import group_modules, group_parameters

    # open_clip's TimmModel: head off, features projected by its own layer; locking by groups
    model, x = make(num_classes=3), images()
    assert model.default_cfg.get("pool_size", None) is None
    model.reset_classifier(0, global_pool="token")
    assert model(x).shape == (2, model.num_features)
    matcher = model.group_matcher()
    frozen = [n for i, group in group_parameters(model, matcher).items() if i <= 2 for n in group]
    assert sorted({n.split(".")[0] for n in frozen}) == ["blocks", "patch_embed"]
    assert group_modules(model, matcher, reverse=True)
    # segmentation_models.pytorch, encoders/timm_vit.py
    model.reset_classifier(0, "")
    assert not model.pretrained_cfg.get("fixed_input_size", False)
    assert model.pretrained_cfg["input_size"] == (3, 12, 20)
    features = model.forward_intermediates(
        x, indices=[1, 3], return_prefix_tokens=False, norm=False, intermediates_only=True
    )
    for i, feature in zip((1, 3), features, strict=True):
        channels, stride = model.feature_info[i]["num_chs"], model.feature_info[i]["reduction"]
        assert feature.shape == (2, channels, 12 // stride, 20 // stride)


def test_compiles_into_one_graph():
    small = replace(CONFIG, depth=2, pool_depth=1)
    encoder, x = randomized(Encoder(small).double()), images()
    encoder.forward_intermediates(x)  # decides which implementations run

    def layers(images):
        return encoder.forward_intermediates(images, [0, -1], intermediates_only=True)

    try:
        whole = torch.compile(layers, backend="eager", fullgraph=True)
        for size in ((12, 20), (8, 28)):
            y = torch.randn(1, 3, *size, dtype=torch.float64)
            assert all(close(a, b) for a, b in zip(whole(y), layers(y), strict=True))
    finally:
        torch.compiler.reset()
