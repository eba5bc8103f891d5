"""The configuration.

Covers: every preset; the paper's numbers; round trips; unknown keys with suggestions; wrong types
(a bool is no number); every check on one field and between fields, whose message names value and remedy, and whose
remedy works; what may change in a resumed run; the batch per process.
"""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from extrema_fast import config as c
from extrema_fast.errors import UsageError

SMOKE = c.smoke()


def refused(data: dict, *words: str) -> str:
    with pytest.raises(UsageError) as error:
        c.from_dict(data, SMOKE)
    text = str(error.value)
    assert error.value.exit_code == 2 and "\n" not in text
    assert all(word in text for word in words), text
    return text


# ---- presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(c.PRESETS))
def test_every_preset_is_valid_named_and_survives_plain_data(name):
    cfg = c.preset(name)
    assert cfg.num_keep >= 1 and cfg.peak_lr > 0
    assert cfg.out == f"runs/{name}" and c.preset(name.replace("_", "-")) == cfg
    plain = json.loads(json.dumps(c.to_dict(cfg)))
    # over a base that differs in everything
    again = c.from_dict(plain, c.preset("paper_large_90x8" if name != "paper_large_90x8" else "smoke"))
    assert again == cfg and c.config_hash(again) == c.config_hash(cfg)
    # types survive, too: lists come back as tuples
    assert isinstance(again.data.area, tuple) and hash(again) == hash(cfg)
    assert c.changed_maths(plain, c.to_dict(again)) == []


def test_presets_that_the_readme_names():
    names = {f"paper_{size}_{m}" for size in ("small", "base", "large") for m in ("80x5", "90x8")}
    assert set(c.PRESETS) == names | {"own", "photos", "cifar10", "smoke"}


def test_the_papers_recipe():
    cfg = c.preset("paper_base_80x5")
    assert (cfg.num_keep, cfg.mask.views, cfg.mask.mode) == (39, 5, "disjoint")
    assert cfg.model.shape == (768, 12, 12) and cfg.model.grid == (14, 14)
    assert cfg.peak_lr == pytest.approx(1.2e-3, rel=1e-12)
    o, t, h = cfg.optim, cfg.train, cfg.head
    assert (o.betas, o.eps, o.weight_decay, o.momentum) == ((0.9, 0.95), 1e-8, 0.1, 0.996)
    assert (o.warmup_epochs, o.min_lr, o.clip_grad, t.epochs, t.batch_size) == (40, 0, 0, 300, 2048)
    assert (h.loss, h.hidden, h.out, h.predictor_hidden) == ("byol", 4096, 256, 4096)
    assert (cfg.model.drop_path, cfg.model.layer_scale, cfg.model.pool_depth) == (0.1, 0.1, 2)
    d = cfg.data
    assert (d.policy, d.area, d.ratio, d.flip) == ("spatial+color", (0.2, 1.0), (0.75, 4 / 3), 0.5)
    assert (d.jitter, d.jitter_prob, d.gray_prob) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
    assert (d.mean, d.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    other, small, large = map(c.preset, ("paper_base_90x8", "paper_small_80x5", "paper_large_80x5"))
    assert (other.num_keep, other.mask.views) == (19, 8)
    assert small.model.shape == (384, 12, 6) and large.model.shape == (1024, 24, 16)
    assert large.model.layer_scale == 1e-5


# ---- plain data -----------------------------------------------------------------------------------


def test_only_the_named_options_change():
    cfg = c.from_dict({"mask": {"views": 3}, "out": "x"}, SMOKE)
    assert cfg == dataclasses.replace(SMOKE, out="x", mask=dataclasses.replace(SMOKE.mask, views=3))
    assert c.from_dict({}, SMOKE) == SMOKE and c.from_dict({}) == c.photos()
    # what a run has not recorded was not there yet
    assert c.from_dict({}, recorded=True) == c.Config()
    # dashes as on the command line
    assert c.from_dict({"train": {"batch-size": 32}}, SMOKE).train.batch_size == 32


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"mask": {"rato": 0.5}}, ["mask.rato", "did you mean 'mask.ratio'"]),
        ({"maks": {}}, ["unknown option maks", "did you mean 'mask'"]),
        ({"optim": {"xyzzy": 1}}, ["optim.xyzzy", "known:", "base_lr"]),
        ({"data": {"policy": "spatial+colour"}}, ["data.policy", "did you mean 'spatial+color'"]),
        ({"train": {"precision": ["bf16"]}}, ["train.precision", "['bf16']"]),
        ({"mask": None}, ["mask", "table of options", "None"]),
        ({"train": {"epochs": 2.5}}, ["train.epochs", "int", "2.5"]),
        ({"train": {"epochs": True}}, ["train.epochs", "int", "True"]),
        ({"train": {"epochs": None}}, ["train.epochs", "int", "None"]),
        ({"optim": {"base_lr": True}}, ["optim.base_lr", "float", "True"]),
        ({"optim": {"base_lr": "1e-3"}}, ["optim.base_lr", "float", "'1e-3'"]),
        ({"optim": {"base_lr": float("nan")}}, ["optim.base_lr", "nan"]),
        ({"optim": {"base_lr": float("inf")}}, ["optim.base_lr", "inf"]),
        ({"optim": {"base_lr": 10**400}}, ["optim.base_lr", "float"]),
        ({"data": {"exif": 1}}, ["data.exif", "bool", "1"]),
        ({"data": {"train": 3}}, ["data.train", "str", "3"]),
        ({"data": {"area": [0.1, 0.2, 0.3]}}, ["data.area", "2 values"]),
        ({"data": {"area": [0.1, "1"]}}, ["data.area", "float", "'1'"]),
        ({"data": {"area": "01"}}, ["data.area", "2 values"]),
        ({"model": {"img_size": 32}}, ["model.img_size", "2 values"]),
        # between fields
        ({"mask": {"keep": 17, "views": 1}}, ["mask.keep", "17", "16"]),
        ({"mask": {"views": 17, "keep": 1}}, ["17 disjoint views", "use mask.views <= 16, or"]),
        ({"model": {"img_size": [32, 30]}}, ["model.img_size", "width 30", "patch size 8", "24 or 32"]),
        ({"model": {"img_size": [4, 32]}}, ["height 4", "nearest: 8"]),
        ({"model": {"width": 100, "heads": 3}}, ["model.width", "100", "heads (3)"]),
        ({"model": {"width": 6, "heads": 1}}, ["model.width", "6", "of 4"]),
        ({"train": {"accumulation": 3}}, ["train.batch_size", "16", "3 micro-batches", "15 or 18"]),
        ({"train": {"accumulation": 32}}, ["16", "32 micro-batches", "nearest: 32"]),
        ({"optim": {"warmup_epochs": 2}}, ["optim.warmup_epochs", "2", "train.epochs"]),
    ],
)
def test_wrong_keys_types_and_combinations(data, words):
    refused(data, *words)


def test_whole_numbers_are_fine_where_floats_are_wanted():
    base = SMOKE
    cfg = c.from_dict({"optim": {"warmup_epochs": 1}, "data": {"area": [1, 1], "jitter": [0, 0, 0, 0]}}, base)
    assert cfg.data.area == (1.0, 1.0) and type(cfg.data.area[0]) is float
    assert type(cfg.optim.warmup_epochs) is float
    # and do not narrow what a later file may say
    assert c.from_dict({"data": {"jitter": [0.4, 0.4, 0.2, 0.1]}}, cfg).data.jitter[0] == 0.4
    # 1 and 1.0 are the same configuration
    by_hand = dataclasses.replace(base, data=dataclasses.replace(base.data, area=(1, 1)))
    assert c.config_hash(by_hand) == c.config_hash(c.from_dict({"data": {"area": [1.0, 1.0]}}, base))


# ---- values ---------------------------------------------------------------------------------------


BAD: dict[str, list] = {
    "data.area": [[0.0, 1.0], [0.5, 0.2], [0.5, 1.5]],
    "data.ratio": [[0.0, 1.0], [2.0, 1.0]],
    "data.flip": [1.5],
    "data.jitter_prob": [-0.1],
    "data.gray_prob": [2],
    "data.jitter": [[-0.1, 0, 0, 0], [0, 0, 0, 0.6]],
    "data.std": [[0.2, 0.0, 0.2]],
    "data.threads": [-1, 2**31],
    "data.hw_decoder_load": [1.5],
    "data.order": ["reader"],
    "data.window": [0],
    "data.max_pixels": [0],
    "data.bad_budget": [-0.1],
    "data.limit": [-1],
    "mask.ratio": [1.0, -0.1],
    "mask.views": [0],
    "mask.keep": [-1],
    "model.width": [-1],
    "model.depth": [-1],
    "model.heads": [-2],
    "model.patch_size": [0],
    "model.in_chans": [0, 17],
    "model.drop_path": [1.0],
    "model.pool_depth": [0],
    "model.layer_scale": [0.0],
    "model.mlp_ratio": [0.0],
    "head.temperature": [0.0],
    "head.hidden": [0, 2**31],
    "head.out": [0, 2**62],
    "head.predictor_hidden": [0, 2**31],
    "optim.base_lr": [0.0],
    "optim.min_lr": [-0.001],
    "optim.warmup_epochs": [-1],
    "optim.weight_decay": [-0.1],
    "optim.momentum": [1.1],
    "optim.clip_grad": [-1],
    "optim.eps": [0.0],
    "optim.betas": [[0.9, 1.0]],
    "train.epochs": [0],
    "train.batch_size": [0],
    "train.accumulation": [0],
    "train.seed": [-1, 9223372036854775808],
    "train.max_nonfinite": [0],
    "ckpt.retain": [1],
    "ckpt.every_steps": [-1],
    "ckpt.every_epochs": [-1],
    "ckpt.milestone_epochs": [-1],
    "eval.every_epochs": [-1],
    "eval.k": [0],
    "eval.batch_size": [0],
    "eval.temperature": [0.0],
    "log.every_steps": [0],
    "system.threads": [-3, 2**31],
}


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in BAD.items() for v in values])
def test_one_field(option, value):
    """The message names the option and shows the value."""
    section, _, name = option.partition(".")
    text = refused({section: {name: value}}, option)
    for number in value if isinstance(value, list) else [value]:
        assert str(number) in text or f"{number:g}" in text


def test_losses_that_compare_images():
    whitened = {"targets": "whitened"}
    assert c.from_dict({"head": whitened}, SMOKE).head.whole_batch and not SMOKE.head.whole_batch
    refused({"head": whitened | {"loss": "infonce"}}, "head.targets")
    refused({"head": {"queue": 8}}, "head.queue")
    for head in (whitened, {"loss": "infonce"}, {"norm": "batch"}):
        refused({"head": head, "train": {"batch_size": 1}}, "train.batch_size")
    for head in ({"decorrelation": 0.1}, {"norm": "batch"}):
        refused({"head": head, "train": {"accumulation": 2}}, f"head.{next(iter(head))}")


def test_separate_crops_are_random_ones():
    refused({"data": {"crop": "separate", "policy": "centercrop"}}, "data.crop")
    assert c.from_dict({"data": {"crop": "separate", "policy": "spatial"}}, SMOKE).data.crop == "separate"


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 100, 196, 10000, 20001])
def test_the_largest_ratio_named_keeps_a_token(n):
    model = c.ModelConfig(img_size=(1, n), patch_size=1)
    with pytest.raises(
        UsageError, match=f"mask.ratio: .* keeps 0 of {n} tokens; .* or set mask.keep"
    ) as error:
        c.Config(model=model, mask=c.MaskConfig(ratio=0.999999, views=1))
    works = float(re.search(r"at most ([\d.]+)", str(error.value))[1])
    assert c.MaskConfig(ratio=works).num_keep(n) >= 1
    # and is no counsel of despair
    assert works > (n - 1) / n - 2.1e-4 or n == 1


@pytest.mark.parametrize(("n", "views"), [(16, 5), (49, 3), (196, 11), (7, 7)])
def test_remedies_for_too_many_disjoint_views_work(n, views):
    model = c.ModelConfig(img_size=(1, n), patch_size=1)
    with pytest.raises(UsageError) as error:
        c.Config(model=model, mask=c.MaskConfig(ratio=0.1, views=views))
    text = str(error.value)
    k = c.keep_count(n, 0.1)
    assert f"{views} disjoint views of {k} tokens need {views * k}, the image has {n}" in text
    ratio = float(re.search(r"mask.ratio >= ([\d.]+)", text)[1])
    fewer = int(re.search(r"mask.views <= (\d+)", text)[1])
    c.Config(model=model, mask=c.MaskConfig(ratio=ratio, views=views))
    c.Config(model=model, mask=c.MaskConfig(ratio=0.1, views=fewer))
    c.Config(model=model, mask=c.MaskConfig(ratio=0.1, views=views, mode="independent"))
    # with the count set directly, another ratio would change nothing
    with pytest.raises(UsageError) as error:
        c.Config(model=model, mask=c.MaskConfig(keep=k, views=views))
    assert "mask.ratio" not in str(error.value)
    keep = int(re.search(r"mask.keep <= (\d+)", str(error.value))[1])
    c.Config(model=model, mask=c.MaskConfig(keep=keep, views=views))


def test_exactly_all_tokens_are_enough():
    assert c.from_dict({"mask": {"views": 4, "keep": 4}}, SMOKE).num_keep == 4


def test_shapes():
    assert c.ModelConfig(width=128).shape == (128, 12, 2)
    assert c.ModelConfig(width=32).shape == (32, 12, 1)
    assert c.ModelConfig(width=128, heads=4, depth=3).shape == (128, 3, 4)
    model = c.ModelConfig(img_size=(224, 160))
    assert model.grid == (14, 10) and model.num_patches == 140


def test_local_batch():
    cfg = c.from_dict({"train": {"accumulation": 2}}, SMOKE)
    assert c.local_batch(cfg, 1) == 8 and c.local_batch(cfg, 4) == 2
    with pytest.raises(UsageError, match=r"batch_size: 16 .* 3 processes x 2 .*; nearest: 12 or 18"):
        c.local_batch(cfg, 3)
    with pytest.raises(UsageError, match=r"nearest: 32$"):
        c.local_batch(cfg, 16)


# ---- resuming -------------------------------------------------------------------------------------


def test_what_may_change_in_a_resumed_run():
    free = {
        "out": "elsewhere",
        "log": {"every_steps": 7, "tracker": "wandb", "project": "mine"},
        "ckpt": {"retain": 5, "every_steps": 1},
        "eval": {"k": 3},
        "system": {"threads": 3, "deterministic": True, "backend": "reference", "attention": "sdpa"},
        "data": {"loader": "pil", "threads": 7, "test": "elsewhere"},
        "train": {"compile": "block", "cuda_graph": "on", "recompute": "gelu"},
    }
    cfg = c.from_dict(free, SMOKE)
    assert c.changed_maths(c.to_dict(SMOKE), c.to_dict(cfg)) == []
    assert c.config_hash(cfg) == c.config_hash(SMOKE)


def test_options_of_older_versions():
    old = c.to_dict(SMOKE)
    old["train"]["compact"] = old["log"]["tensorboard"] = False
    assert c.from_dict(old) == SMOKE and c.changed_maths(old, c.to_dict(SMOKE)) == []
    old["train"] |= {"compact": True, "compile": "loss", "cuda_graph": False}
    old["log"]["tensorboard"] = True
    renamed = c.from_dict({"train": {"compile": "step", "cuda_graph": "off"}}, SMOKE)
    assert c.from_dict(old, recorded=True) == renamed and c.changed_maths(old, c.to_dict(SMOKE)) == []
    for change, words in (
        ({"compact": True}, "train.compact"),
        ({"compile": "loss"}, "'loss' is called 'step'"),
        ({"cuda_graph": True}, "True is called 'on'"),
    ):
        refused({"train": change}, words)
    refused({"log": {"tensorboard": True}}, "use log.tracker tensorboard")


def test_every_other_field_is_reported_with_both_values():
    base = c.smoke()
    flat = c.flatten(base)
    assert flat["mask.views"] == 2 and flat["data.area"] == [0.2, 1.0]
    other = {
        "data.train": "photos",
        "data.policy": "spatial",
        "data.area": [0.5, 1.0],
        "data.ratio": [1.0, 1.0],
        "data.range": [0.0, 4095.0],
        "data.holdout": 0.1,
        "data.flip": 0.1,
        "data.jitter": [0.1] * 4,
        "data.jitter_prob": 0.1,
        "data.gray_prob": 0.1,
        "data.mean": [0.5] * 3,
        "data.std": [0.5] * 3,
        "data.exif": True,
        "data.limit": 32,
        "data.order": "shards",
        "data.window": 2,
        "data.max_pixels": 10**6,
        "data.crop": "separate",
        "mask.ratio": 0.8,
        "mask.views": 1,
        "mask.mode": "independent",
        "mask.keep": 2,
        "model.size": "small",
        "model.img_size": [64, 32],
        "model.patch_size": 4,
        "model.in_chans": 1,
        "model.width": 32,
        "model.depth": 3,
        "model.heads": 2,
        "model.mlp_ratio": 2.0,
        "model.pool_depth": 1,
        "model.layer_scale": 0.2,
        "model.patch_init": "whitened",
        "model.drop_path": 0.2,
        "head.loss": "infonce",
        "head.temperature": 0.3,
        "head.targets": "whitened",
        "head.decorrelation": 0.1,
        "head.norm": "batch",
        "head.queue": 8,
        "head.hidden": 8,
        "head.out": 8,
        "head.predictor_hidden": 8,
        "optim.name": "lamb",
        "optim.base_lr": 1e-3,
        "optim.min_lr": 1e-6,
        "optim.warmup_epochs": 1.0,
        "optim.weight_decay": 0.2,
        "optim.betas": [0.9, 0.99],
        "optim.eps": 1e-6,
        "optim.clip_grad": 1.0,
        "optim.momentum": 0.9,
        "train.epochs": 3,
        "train.batch_size": 8,
        "train.accumulation": 2,
        "train.precision": "bf16",
        "train.seed": 1,
        "train.max_nonfinite": 4,
        "train.fp8": "teacher",
    }
    maths = {k for k in flat if not k.startswith(c.FREE_FIELDS)}
    # a new option must be placed on one side
    assert set(other) == maths
    hashes = {c.config_hash(base)}
    for name, value in other.items():
        part, _, key = name.partition(".")
        # the queue is InfoNCE's
        start = c.from_dict({"head": {"loss": "infonce"}}, base) if name == "head.queue" else base
        cfg = c.from_dict({part: {key: value}}, start)
        assert c.changed_maths(c.to_dict(start), c.to_dict(cfg)) == [f"{name}: {flat[name]!r} -> {value!r}"]
        hashes.add(c.config_hash(cfg))
    assert len(hashes) == len(other) + 1


def test_fields_that_one_version_lacks():
    old = c.to_dict(SMOKE)
    del old["mask"]["mode"]
    assert c.changed_maths(old, c.to_dict(SMOKE)) == [], "what was done then is the default"
    changed = c.to_dict(c.from_dict({"mask": {"mode": "independent"}}, SMOKE))
    assert c.changed_maths(old, changed) == ["mask.mode: 'disjoint' -> 'independent'"]
    assert c.changed_maths(old | {"gone": 1}, c.to_dict(SMOKE)) == ["gone: 1 -> None"]


def test_warmup_scales_where_the_epochs_leave_it_no_room(caplog):
    base = c.preset("paper_small_80x5")
    assert (base.optim.warmup_epochs, base.train.epochs) == (40, 300)
    short = c.from_dict({"train": {"epochs": 30}}, base)
    assert short.optim.warmup_epochs == pytest.approx(4) and "optim.warmup_epochs" in caplog.text
    assert c.from_dict({"train": {"epochs": 60}}, base).optim.warmup_epochs == 40
    with pytest.raises(UsageError, match=r"optim\.warmup_epochs"):
        c.from_dict({"train": {"epochs": 30}, "optim": {"warmup_epochs": 40}}, base)
