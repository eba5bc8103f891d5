"""Our encoders through timm's factory, loaders, optimizers and training scripts.

Covers: registration, and its absence without the import or without timm; `create_model` with every option;
`features_only`; `local-dir:` loading with head, channels, size, patch, pool and positions changed; weights of a run
and of a released checkpoint; what does not fit; `save_for_hf` after changes; what timm's train and validate scripts do.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import Encoder, create_encoder, list_models, model_args, timm_config
from extrema_fast.models.positions import adapt_in_chans, resample_patch_kernel, resample_table
from tests.encoders import close, randomized

timm = pytest.importorskip("timm")
importlib.import_module("extrema_fast.timm")


TINY = "extrema_vit_tiny_patch16_224"
SMALL = {"width": 48, "depth": 3, "heads": 3, "mlp_ratio": 2.0, "patch_size": 8}
SIZE = (16, 40)


def build(**options) -> Encoder:
    """A small encoder, every parameter random, in eval mode."""
    return randomized(create_encoder(TINY, **{"img_size": SIZE, **SMALL, **options}))


def write(folder, encoder: Encoder) -> str:
    """An exported folder, as `timm.create_model` names it."""
    folder.mkdir(exist_ok=True)
    save_file(encoder.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(timm_config(encoder)))
    return f"local-dir:{folder}"


def images(b: int = 2, c: int = 3, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randn(b, c, *size)


# ---- registration ---------------------------------------------------------------------------------


def test_registered_by_the_import_alone(run_cli):
    # a process that has imported this project, and not timm
    codes, out = run_cli(
        "encoders",
        setup="from tests.torchvision_operators import define_torchvision_operators\n"
        "define_torchvision_operators()\n"
        "import sys, extrema_fast\n"
        "encoder = extrema_fast.create_encoder('extrema_vit_tiny_patch16_224', img_size=32)\n"
        "loaded, sys.modules['timm'] = 'timm' in sys.modules, None\n"
        "print(loaded, encoder.feature_info[0]['num_chs'])\n"
        # without timm everything but the registration works
        "try:\n    import extrema_fast.timm\n"
        "except ImportError as error:\n    print(error)\n"
        "del sys.modules['timm']\n"
        "import timm\n"
        "print(len(timm.list_models('extrema*')))\n"
        "import extrema_fast.timm\n"
        "print(*timm.list_models('extrema*'), timm.is_model('extrema_vit_base_patch16_224'))\n",
    )
    assert codes == [0], out
    first, error, before, after = out.splitlines()[:4]
    assert first == "False 192" and before == "0" and after.split() == [*list_models(), "True"]
    assert error.startswith("extrema_fast.timm: timm cannot be imported")
    assert "; pip install 'timm>=" in error
    assert set(timm.list_models(module="timm")) >= set(list_models())


# ---- the factory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shape", "out"),
    [
        ({"num_classes": 7}, (3, 224, 224), (1, 7)),
        ({"in_chans": 5, "img_size": 32, "drop_path_rate": 0.3}, (5, 32, 32), (1, 192)),
        ({"img_size": (16, 48), "global_pool": ""}, (3, 16, 48), (1, 4, 192)),
        ({"img_size": 32, "patch_size": 8, "pos_embed": "learned", "drop_rate": 0.5}, (3, 32, 32), (1, 192)),
    ],
)
def test_create_model(options, shape, out):
    model = timm.create_model(TINY, **options).eval()
    assert type(model) is Encoder and model(torch.randn(1, *shape)).shape == out
    assert model.drop_path_rate == options.get("drop_path_rate", 0.0)
    assert model.head_drop.p == options.get("drop_rate", 0.0)
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == TINY and cfg["interpolation"] == "bilinear" and cfg["crop_pct"] == 0.875
    assert cfg["fixed_input_size"] is (options.get("pos_embed") == "learned")


def test_create_model_in_another_dtype_and_on_the_meta_device():
    model = timm.create_model(TINY, img_size=32, dtype=torch.bfloat16, device="cpu")
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16}
    model = timm.create_model(TINY, img_size=SIZE, device="meta", **SMALL)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    # filled as Hugging Face does: saved tensors put in place
    encoder = build()
    model.load_state_dict(encoder.state_dict(), assign=True)
    model.eval()
    x = images()
    assert torch.equal(model(x), encoder(x))
    y = images(size=(24, 24))
    assert torch.equal(model(y), encoder(y))


def test_unknown_option_is_named():
    # timm's callers expect a TypeError
    with pytest.raises(TypeError):
        timm.create_model(TINY, not_an_argument=1)
    with pytest.raises(UsageError, match=r"unknown option 'pos_embd'.*did you mean 'pos_embed'"):
        timm.create_model(TINY, pos_embd="learned")
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model(TINY, pretrained=True)


def test_every_registered_size():
    for name in list_models():
        model = timm.create_model(name, device="meta", num_classes=3)
        width, depth, heads = model.config.shape
        assert model.num_features == width and len(model.blocks) == depth and width % heads == 0
        assert model.head.weight.shape == (3, width) and model.pretrained_cfg["architecture"] == name


@pytest.mark.parametrize(("out_indices", "layers"), [(2, [1, 2]), ((0, -1), [0, 2]), (None, [0, 1, 2])])
def test_features_only(out_indices, layers):
    options = {} if out_indices is None else {"out_indices": out_indices}
    torch.manual_seed(1)
    model = timm.create_model(TINY, features_only=True, img_size=SIZE, **options, **SMALL).eval()
    assert model.feature_info.channels() == [48] * len(layers)
    assert model.feature_info.reduction() == [8] * len(layers)
    assert model.feature_info.module_name() == [f"blocks.{i}" for i in layers]
    x = images()
    maps = model(x)
    assert [m.shape for m in maps] == [(2, 48, 2, 5)] * len(layers)
    torch.manual_seed(1)
    whole = timm.create_model(TINY, img_size=SIZE, **SMALL).eval()
    wanted = whole.forward_intermediates(x, layers, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, wanted, strict=True))
    sum(m.square().sum() for m in maps).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    # another size, as segmentation and detection code gives
    assert model(images(size=(32, 24)))[0].shape == (2, 48, 4, 3)


# ---- loading --------------------------------------------------------------------------------------


def test_features_by_fx():
    from timm.models import create_feature_extractor

    torch.manual_seed(0)
    model = timm.create_model(
        TINY, img_size=SIZE, features_only=True, feature_cls="fx", out_indices=(0, 2), **SMALL
    )
    torch.manual_seed(0)
    encoder = timm.create_model(TINY, img_size=SIZE, **SMALL).eval()
    x = torch.randn(3, 3, *SIZE)
    wanted = encoder.forward_intermediates(x, [0, 2], output_fmt="NLC", intermediates_only=True)
    assert all(close(a, b) for a, b in zip(model.eval()(x), wanted, strict=True))
    out = create_feature_extractor(encoder, {"blocks.1": "tokens", "head": "pooled"})(x)
    assert close(out["pooled"], encoder(x)) and out["tokens"].shape == (
        3,
        encoder.num_patches,
        encoder.embed_dim,
    )
    larger = torch.randn(2, 3, SIZE[0] * 2, SIZE[1])
    graph = create_feature_extractor(encoder, ["head"])
    assert close(graph(larger)["head"], encoder(larger)) and close(graph(x)["head"], encoder(x))
    with pytest.raises(UsageError, match=r"torch\.fx: .*get_notrace_modules"):
        torch.fx.symbolic_trace(encoder)


def test_a_script_that_has_never_heard_of_these_models(tmp_path, run_cli):
    (tmp_path / "helper.py").write_text("WIDTH = 192\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm, helper\n"
        "if __name__ == '__main__':\n"
        "    import extrema_fast.timm\n"
        "    model = timm.create_model(sys.argv[1], img_size=32)\n"
        "    print(len(timm.list_models('extrema*')), model.num_features == helper.WIDTH)\n"
    )

    def run(script):
        return run_cli(
            "encoders",
            setup="from tests.torchvision_operators import define_torchvision_operators\n"
            "define_torchvision_operators()\n"
            "import runpy, sys\n"
            f"sys.argv[1:] = [{str(script)!r}, {TINY!r}]\n"
            "runpy.run_module('extrema_fast.timm', run_name='__main__', alter_sys=True)\n",
        )

    codes, out = run(script)
    assert codes == [0] and out.splitlines()[0] == "6 True" and "Overwriting" not in out, out
    codes, out = run(tmp_path / "none.py")
    assert codes == [1] and "none.py: no such script" in out


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        encoder = build(num_classes=4)
    return write(tmp_path_factory.mktemp("exported") / "weights", encoder), encoder


def load(source, **options) -> torch.nn.Module:
    return timm.create_model(source, pretrained=True, **options).eval()


def test_local_dir(exported):
    source, encoder = exported
    model, x = load(source), images()
    assert model.num_classes == 4 and torch.equal(model(x), encoder(x))
    assert torch.equal(model.forward_features(x), encoder.forward_features(x))
    other = load(source, num_classes=3)
    assert other(x).shape == (2, 3)
    assert torch.equal(other.forward_features(x), encoder.forward_features(x))
    assert torch.equal(load(source, num_classes=0)(x), encoder.forward_features(x)[:, 0])
    maps = load(source, features_only=True, out_indices=(0, 2))(x)
    wanted = encoder.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, wanted, strict=True))
    # the description says everything that is needed to build it
    args = json.loads(json.dumps(model_args(encoder)))
    assert create_encoder(encoder.architecture, 4, **args).state_dict().keys() == encoder.state_dict().keys()
    assert model_args(model) == model_args(encoder)


def test_local_dir_with_other_channels(exported):
    source, encoder = exported
    for channels in (1, 5):
        model = load(source, in_chans=channels)
        kernel = model.patch_embed.proj.weight
        assert torch.equal(kernel, adapt_in_chans(encoder.patch_embed.proj.weight, channels))
        assert model(images(c=channels)).shape == (2, 4)


def test_local_dir_at_another_size_and_patch(exported):
    source, encoder = exported
    model, x = load(source, img_size=(32, 24)), images(size=(32, 24))
    assert model.img_size == (32, 24) and model.pos_embed.shape == (1, 12, 48)
    assert torch.equal(model(x), encoder(x))
    model, kernel = load(source, patch_size=4), encoder.patch_embed.proj.weight
    assert torch.equal(model.patch_embed.proj.weight, resample_patch_kernel(kernel, 4))
    assert model.grid == (4, 10) and model(images()).shape == (2, 4)


def test_local_dir_rescaled_positions_know_the_grid_they_were_trained_on(exported, tmp_path):
    source, encoder = exported
    model = load(source, pos_coords="rescaled", img_size=(32, 24))
    assert model.sincos.trained == (2, 5)
    wanted = create_encoder(TINY, 4, img_size=SIZE, pos_coords="rescaled", **SMALL)
    wanted.load_state_dict(encoder.state_dict())
    x = images(size=(32, 24))
    assert torch.equal(model(x), wanted.eval()(x))
    assert not torch.equal(model(x), encoder(x))
    # also where a folder written by timm does not say it
    from timm.models import save_for_hf

    plain = timm.create_model(TINY, img_size=SIZE, pos_coords="rescaled", num_classes=4, **SMALL).eval()
    plain.load_state_dict(encoder.state_dict())
    save_for_hf(plain, tmp_path)
    assert "pos_grid" not in (tmp_path / "config.json").read_text()
    assert torch.equal(load(f"local-dir:{tmp_path}", img_size=(32, 24))(x), wanted(x))


@pytest.mark.parametrize("fc_norm", [False, True])
def test_local_dir_with_mean_pooling(exported, fc_norm):
    source, encoder = exported
    model, x = load(source, global_pool="avg", fc_norm=fc_norm), images()
    assert not any(k.startswith(("cls_token", "blocks_token")) for k in model.state_dict())
    features = encoder.encode(x, norm=not fc_norm).patches.mean(1)
    if fc_norm:
        # a fresh norm after the mean
        features = torch.nn.functional.layer_norm(features, (48,), eps=1e-6)
        assert isinstance(model.norm, torch.nn.Identity)
    assert close(model(x), encoder.head(features))


def test_local_dir_with_a_learned_table(exported, tmp_path):
    source, encoder = exported
    model = load(source, pos_embed="learned")
    assert isinstance(model.pos_embed, torch.nn.Parameter) and torch.equal(model.pos_embed, encoder.pos_embed)
    with torch.no_grad():
        model.pos_embed.normal_()
    again = write(tmp_path / "learned", model)
    wanted = resample_table(model.pos_embed.detach(), (2, 5), (4, 3))
    assert torch.equal(load(again).pos_embed, model.pos_embed)
    larger = load(again, img_size=(32, 24))
    assert torch.equal(larger.pos_embed, wanted) and larger(images(size=(32, 24))).shape == (2, 4)
    # the fixed table instead
    fixed = load(again, pos_embed="sincos", img_size=(32, 24))
    assert torch.equal(fixed.pos_embed, load(source, img_size=(32, 24)).pos_embed)


def file_of(tmp_path, state) -> dict:
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    return {"pretrained_cfg_overlay": {"file": str(tmp_path / "w.safetensors"), "input_size": (3, *SIZE)}}


def test_weights_of_a_run(tmp_path):
    encoder, x = build(), images()
    heads = ("head.0.weight", "head.1.bias", "predictor.0.weight")
    state = encoder.state_dict() | {name: torch.zeros(7) for name in heads}
    model = load(TINY, img_size=SIZE, num_classes=3, **SMALL, **file_of(tmp_path, state))
    assert torch.equal(model.forward_features(x), encoder.forward_features(x)) and model(x).shape == (2, 3)


def test_a_released_checkpoint_gives_the_teacher(tmp_path):
    teacher, student, x = build(), build(), images()
    state = {f"module.momentum_encoder.{k}": v for k, v in teacher.state_dict().items()}
    state |= {f"module.base_encoder.{k}": v for k, v in student.state_dict().items()}
    state |= {f"module.{k}.0.weight": torch.zeros(1) for k in ("momentum_encoder.head", "predictor")}
    torch.save({"epoch": 3, "arch": "vit_small", "state_dict": state}, tmp_path / "released.pth")
    overlay = {"file": str(tmp_path / "released.pth"), "input_size": (3, *SIZE)}
    model = load(TINY, img_size=SIZE, pretrained_cfg_overlay=overlay, **SMALL)
    assert torch.equal(model(x), teacher(x)) and not torch.equal(model(x), student(x))


def test_weights_that_do_not_fit(tmp_path):
    state = build().state_dict()
    cases = [
        ({k: v for k, v in state.items() if not k.startswith("blocks.1.mlp")}, "missing: blocks.1.mlp"),
        (state | {"blocks.3.norm1.weight": torch.zeros(48)}, "unknown: blocks.3.norm1.weight"),
        ({"encoder.layer.0.weight": torch.zeros(3)}, r"missing: .* unknown: encoder.layer.0.weight"),
    ]
    # also where timm itself would not look, because the number of classes differs
    for classes, (bad, words) in zip((0, 3, 3), cases, strict=True):
        with pytest.raises(UsageError, match=words):
            load(TINY, img_size=SIZE, num_classes=classes, **SMALL, **file_of(tmp_path, bad))
    overlay = file_of(tmp_path, build(pos_embed="learned").state_dict())
    overlay["pretrained_cfg_overlay"]["input_size"] = (3, 224, 224)
    with pytest.raises(UsageError, match="grid of 10 learned positions"):
        load(TINY, img_size=(32, 24), pos_embed="learned", **SMALL, **overlay)


def test_what_timm_saves_it_builds_again_after_changes(tmp_path):
    from timm.models import save_for_hf

    model = timm.create_model(TINY, img_size=SIZE, num_classes=4, pos_embed="learned", **SMALL).eval()
    model.set_input_size((24, 24))
    model.reset_classifier(2, "avg")
    save_for_hf(model, tmp_path)
    x = images(size=(24, 24))
    again = load(f"local-dir:{tmp_path}")
    assert again.img_size == (24, 24) and again.num_prefix_tokens == 0
    assert close(again(x), model(x))

    model = timm.create_model(TINY, img_size=SIZE, pos_coords="rescaled", **SMALL).eval()
    model.set_input_size((24, 24), patch_size=4)
    save_for_hf(model, tmp_path)
    again = load(f"local-dir:{tmp_path}")
    assert again.patch_size == 4 and again.sincos.trained == (2, 5) and close(again(x), model(x))


def test_arguments_of_timms_vision_transformer():
    model = timm.create_model(
        TINY, img_size=32, dynamic_img_size=True, embed_dim=64, num_heads=2, depth=1, qkv_bias=True
    )
    assert model.config.shape == (64, 1, 2) and model(torch.zeros(1, 3, 48, 32)).shape == (1, 64)
    assert model.dynamic_img_size
    for options, named in (
        ({"dynamic_img_pad": True}, "dynamic_img_pad"),
        ({"init_values": 1e-5}, "init_values"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ({"width": 64, "embed_dim": 64}, "embed_dim"),
    ):
        with pytest.raises(UsageError, match=f"^{named}: "):
            timm.create_model(TINY, **options)


def test_what_the_train_script_does(tmp_path, caplog):
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.models import load_checkpoint, model_parameters, resume_checkpoint, safe_model_name
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

    model = timm.create_model(
        TINY,
        pretrained=False,
        in_chans=3,
        num_classes=5,
        drop_rate=0.0,
        drop_path_rate=0.1,
        drop_block_rate=None,
        global_pool=None,
        bn_momentum=None,
        bn_eps=None,
        scriptable=False,
        checkpoint_path="",
        img_size=SIZE,
        **SMALL,
    )
    model.set_grad_checkpointing(enable=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    ema = ModelEmaV3(model, decay=0.5)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=4, warmup_epochs=1)
    args = argparse.Namespace(model=TINY, opt="adamw")
    folders = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, amp_scaler=None, **folders)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mixup, scaler = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5), NativeScaler(device="cpu")
    for epoch in range(2):
        model.train()
        x, target = mixup(images(4), torch.tensor([0, 4, 2, 2]))
        with torch.autocast("cpu", torch.bfloat16):
            loss = SoftTargetCrossEntropy()(model(x), target)
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=1.0, parameters=model_parameters(model, exclude_head=False))
        ema.update(model)
        scheduler.step(epoch + 1, metric=None)
        saver.save_checkpoint(epoch, metric=float(epoch))
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if not n.endswith("k.bias"))
    assert safe_model_name(TINY) == TINY

    fresh = timm.create_model(TINY, img_size=SIZE, num_classes=5, **SMALL)
    other = create_optimizer_v2(fresh, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    assert resume_checkpoint(fresh, str(tmp_path / "last.pth.tar"), other, log_info=False) == 2
    x = images()
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    load_checkpoint(fresh, str(tmp_path / "model_best.pth.tar"), use_ema=True)
    assert torch.equal(fresh(x), ema.module.eval()(x))
    path = str(tmp_path / "last.pth.tar")
    again = timm.create_model(TINY, img_size=SIZE, num_classes=5, checkpoint_path=path, **SMALL)
    # use_ema is the default there
    assert torch.equal(again.eval()(x), ema.module(x))


def test_what_the_validate_script_does(exported):
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    source, encoder = exported
    model = load(source)
    config = resolve_data_config({"model": source, "crop_pct": None, "img_size": None}, model=model)
    assert tuple(config["input_size"]) == (3, *SIZE)
    assert config["crop_pct"] == 0.875 and config["interpolation"] == "bilinear"
    picture = Image.fromarray((torch.rand(50, 60, 3) * 255).to(torch.uint8).numpy())
    x = create_transform(**config)(picture)[None]
    assert model(x).shape == (1, 4)
    assert float((x[0] - model.preprocess()(picture)).abs().max()) <= 2.01 / 255 / 0.224
    # numbers that a description brings reach the encoder's own preprocessing
    overlay = {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.9}
    changed = timm.create_model(TINY, img_size=32, pretrained_cfg_overlay=overlay).preprocess().metadata
    assert changed["mean"] == (0.1, 0.2, 0.3) and changed["crop_pct"] == 0.9


def test_leaving_the_trained_grid_is_logged_once(caplog):
    encoder = build()
    with caplog.at_level(logging.INFO, "extrema_fast.models.positions"):
        for _ in range(3):
            encoder(images(size=(32, 24)))
        encoder(images())
    assert [r.message for r in caplog.records] == [
        "positions of 4 x 3 patches, trained on 2 x 5: absolute coordinates"
    ]
