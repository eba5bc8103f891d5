"""The benchmark of the training step, at a tiny size.

Covers: released and strong formulations have our loss and gradients, with drop-path and color jitter; a wrong one is
caught and nothing is concluded about it; which attention kernel the strong baseline takes; the interface of a checkout
of the released code, by a stand-in, with given masks and drop-path factors; a whole measurement in processes, with one
provider that fails, and its page; selection of providers; options as text; memory per image and growth.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch

from benchmarks import baselines, harness, processes, step
from benchmarks.processes import Rates
from benchmarks.step import PROVIDERS, Job, chosen, compare, configuration, given, one_step, random_images
from extrema_fast.errors import UsageError

CPU = torch.device("cpu")
BY_NAME = {p.name: p for p in PROVIDERS}
SHAPE = {"img_size": [112, 112], "patch_size": 8, "width": 64, "depth": 2, "heads": 2}
HEAD = {"hidden": 48, "out": 24, "predictor_hidden": 48}


def tiny(**more):
    model = SHAPE | more.pop("model", {})
    return configuration("tiny", batch=2, drop_path=0.4, model=model, head=HEAD, **more)


@pytest.fixture(scope="module")
def truth():
    cfg = tiny(color=True)
    ours = BY_NAME["ours"].eager().make(cfg, CPU, "fp32")
    weights = {n: p.detach().clone() for n, p in ours.student.items()}
    inputs = given(random_images(cfg, 1, CPU)[0], cfg, CPU)
    assert inputs.scale is not None and (inputs.scale == 0).any()
    return cfg, inputs, weights, one_step(ours, inputs)


def found(stepper, inputs, weights):
    with torch.no_grad():
        for parameters in (stepper.student, stepper.teacher):
            for name in parameters.keys() & weights.keys():
                parameters[name].copy_(weights[name])
    return one_step(stepper, inputs)


@pytest.mark.parametrize("name", ["released", "strong-eager", "strong-eager-plain-attention"])
def test_baselines_have_our_loss_and_gradients(name, truth):
    cfg, inputs, weights, wanted = truth
    got = found(BY_NAME[name].eager().make(cfg, CPU, "fp32"), inputs, weights)
    check = compare(name, got, wanted)
    assert check["passed"], check
    # one wrong gradient among many, one that is missing, a wrong loss, NaN
    key = "encoder.blocks.0.mlp.fc1.weight"
    wrong = [(got[0], got[1] | {key: factor * got[1][key]}) for factor in (1.01, torch.nan)]
    wrong += [(got[0], {k: g for k, g in got[1].items() if k != key}), (1.001 * got[0], got[1])]
    assert not any(compare(name, w, wanted)["passed"] for w in wrong)
    # where nothing is computed
    zeros = (wanted[0], {k: torch.zeros_like(g) for k, g in wanted[1].items()})
    assert compare(name, zeros, zeros)["passed"] and not compare(name, got, zeros)["passed"]


@pytest.mark.parametrize("name", ["released", "strong-eager", "ours"])
def test_steps_change_student_and_teacher(name, truth):
    cfg, inputs, _, _ = truth
    stepper = BY_NAME[name].eager().make(cfg, CPU, "fp32")
    groups = (stepper.student, stepper.teacher)
    before = [{n: p.detach().clone() for n, p in group.items()} for group in groups]
    for _ in range(2):
        stepper.step(replace(inputs, keep=None, scale=None))
    for old, new in zip(before, groups, strict=True):
        assert any((old[n] != p).any() for n, p in new.items())


@pytest.mark.parametrize(
    ("device", "tokens", "cannot", "name"),
    [
        ("cuda", 39, (), "efficient"),
        ("cuda", 64, (), "efficient"),
        ("cuda", 65, (), "cudnn"),
        ("cuda", 196, ("cudnn",), "flash"),
        ("cuda", 196, ("cudnn", "flash"), "efficient"),
        ("cuda", 39, ("cudnn", "flash", "efficient"), "sdpa"),
        ("cpu", 39, (), "sdpa"),
    ],
)
def test_the_attention_kernel_of_the_strong_baseline(device, tokens, cannot, name, monkeypatch):
    monkeypatch.setattr(baselines.attentions, "unsupported", lambda x, *_: "no" * (x in cannot))
    monkeypatch.setattr(baselines.attentions, "settle_sdpa_order", lambda _: None)
    assert baselines.fastest_attention(torch.device(device), torch.bfloat16, tokens, 64, True) == name


def test_student_and_teacher_of_the_strong_baseline_run_on_the_kernels_it_names(truth, monkeypatch):
    cfg, inputs, weights, wanted = truth
    lengths = {"student": cfg.num_keep, "teacher": cfg.model.num_patches}
    called = []

    def kernel(name, qkv):
        called.append((name, qkv.shape[1], qkv.requires_grad))
        return baselines.formula(qkv)

    named = {n: branch for branch, n in lengths.items()}
    monkeypatch.setattr(baselines, "fastest_attention", lambda device, dtype, n, d, train: named[n])
    monkeypatch.setattr(baselines.attentions, "BACKENDS", {n: partial(kernel, n) for n in lengths})
    strong = BY_NAME["strong-eager"].make(cfg, CPU, "fp32")
    assert compare("strong", found(strong, inputs, weights), wanted)["passed"]
    depth = cfg.model.shape[1]
    assert strong.attention == ("student", "teacher") and called == [
        *[("teacher", lengths["teacher"], False)] * depth,
        *[("student", lengths["student"], True)] * depth,
    ]


@pytest.mark.parametrize(
    ("name", "matmul"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", True),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>", True),
        (
            "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)",
            False,
        ),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1", False),
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, cutlass::bfloat16_t>",
            False,
        ),
        ("short_attention_fwd_kernel", False),
    ],
)
def test_fused_attention_is_no_matmul_of_a_profile(name, matmul):
    assert bool(processes._MATMUL_KERNEL.search(name)) == matmul


# ---- a checkout of the released code ----------------------------------------------------------------

VITS = """
import torch
from torch import nn
from extrema_fast.config import ModelConfig
from extrema_fast.models.encoder import Encoder

class Vit(Encoder):
    def __init__(self, num_classes, init_values, class_attention_layers, drop_path_rate=0.0):
        super().__init__(ModelConfig(img_size=(112, 112), patch_size=8, width=64, depth=2, heads=2,
                                     layer_scale=init_values, pool_depth=class_attention_layers))
        for block in self.blocks:
            block.drop_path = nn.Dropout(drop_path_rate)

    def forward(self, x, masks=None):
        x = self.patch_embed(x) + self.pos_embed
        if masks is not None:
            x = torch.cat([x.gather(1, m[..., None].expand(-1, -1, x.shape[2])) for m in masks])
        for b in self.blocks:
            x = x + b.drop_path(b.attn(b.norm1(x)))
            x = x + b.drop_path(b.mlp(b.norm2(x)))
        return self.head(self.norm(self.pool(x)[0]))

vit_small = Vit
"""
BUILDER = """
import numpy, torch
import torch.nn.functional as F
from torch import nn
from torch._six import inf
from extrema_fast.models.extrema import mlp_head

class ExtreMA(nn.Module):
    def __init__(self, base, ema, out, hidden, T, ratio, views, disjoint):
        super().__init__()
        assert numpy.float is float and inf > 0 and disjoint
        self.base_encoder, self.momentum_encoder = base(num_classes=hidden), ema(num_classes=hidden)
        self.ratio, self.views = ratio, views
        for encoder in (self.base_encoder, self.momentum_encoder):
            encoder.head = mlp_head(encoder.embed_dim, hidden, hidden, out)
        self.momentum_encoder.requires_grad_(False)
        self.predictor = mlp_head(out, hidden, out)

    def generate_mask(self, x, count, ratio=0.0):
        order = torch.rand(x.size(0), 196, device=x.get_device()).argsort(1)
        size = int(196 * (1 - ratio))
        return [order[:, i * size : (i + 1) * size] for i in range(count)] if ratio > 0 else None

    def forward(self, x, m, loss):
        q = self.predictor(self.base_encoder(x[0], self.generate_mask(x[0], self.views, self.ratio)))
        with torch.no_grad():
            for a, b in zip(self.base_encoder.parameters(), self.momentum_encoder.parameters()):
                b.data = b.data * m + a.data * (1 - m)
            k = F.normalize(self.momentum_encoder(x[1], self.generate_mask(x[0], 1, 0.0)), dim=1)
        return sum((F.normalize(v, dim=1) - k).square().sum(1).mean() for v in q.chunk(self.views)) / self.views
"""
MISC = """
class NativeScalerWithGradNormCount:
    def __call__(self, loss, optimizer, clip_grad=None, parameters=None):
        self._scaler.scale(loss).backward()
        self._scaler.step(optimizer)
        self._scaler.update()
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    for file, text in {"vits": VITS, "lib/__init__": "", "lib/builder": BUILDER, "lib/misc": MISC}.items():
        (tmp_path / f"{file}.py").write_text(text)
    monkeypatch.setattr(baselines, "MODELS", {64: "vit_small"})
    # what importing it changes is undone
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(np, "float", float, raising=False)
    with monkeypatch.context() as patch:
        for name in ("vits", "lib", "lib.builder", "lib.misc", "torch._six"):
            patch.delitem(sys.modules, name, raising=False)
        yield tmp_path
        for name in ("vits", "lib", "lib.builder", "lib.misc", "torch._six"):
            sys.modules.pop(name, None)


def test_released_code_takes_our_masks_and_drop_path(checkout, truth):
    cfg, inputs, weights, wanted = truth
    (provider,), _ = chosen(["released-fp32"], "cpu", released_code=str(checkout))
    assert provider.name == "released-code-fp32" and provider.family == "released"
    baselines.check_checkout(checkout, cfg)
    stepper = provider.make(cfg, CPU, "fp32")
    check = compare("released-code", found(stepper, inputs, weights), wanted)
    assert check["passed"], check
    # its own random ones while it is timed
    stepper.step(replace(inputs, keep=None, scale=None))
    assert stepper.loss() > 0 and stepper.taken == 2


def test_what_the_released_code_cannot_step_is_refused_before_anything_is_built(checkout):
    with pytest.raises(UsageError, match="--model small"):
        baselines.check_checkout(checkout, configuration("tiny"))
    (checkout / "vits.py").unlink()
    with pytest.raises(UsageError, match=r"vits\.py"):
        baselines.check_checkout(checkout, tiny())


# ---- a measurement ----------------------------------------------------------------------------------


class SmallRates(Rates):
    """At sizes that take no second."""

    sizes: ClassVar = {"cpu": (256, 2**20)}


class Here(nullcontext):
    """A worker without a process."""

    def __init__(self, factory, *args):
        super().__init__(self)
        self.object = factory(*args)
        self.built = getattr(self.object, "built", {})

    def __call__(self, method, *args):
        return getattr(self.object, method)(*args)


def test_a_measurement_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "Rates", SmallRates)
    # the comparison and the rates here, the steps in processes
    monkeypatch.setattr(step, "Worker", Here)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    options = "--rounds 5 --device cpu --threads 1 --batch 2 --out"
    args = step.options([*options.split(), str(tmp_path)])
    cfg = tiny(train={"precision": "fp32"})
    names = ("strong-eager", "ours")
    jobs = [Job(n, replace(BY_NAME[n], precision="fp32"), cfg, "cpu", 1) for n in names]
    begun = harness.new_record("w", "step", [], not_run={"x": "why"})
    kept = []

    def save(found, unfinished):
        file = harness.save_record(begun | found, args, unfinished) / "record.json"
        kept.append(harness.read_record(file))

    record = begun | step.measure([jobs], args, save)
    # after the checks, after each start, before each round
    assert len(kept) == 1 + 2 + 5 and all(r["unfinished"] for r in kept)
    assert [len([r for r in k["rows"] if "images_per_s" in r]) for k in kept[:4]] == [0, 1, 2, 0]
    assert len(kept[0]["gates"]) == 2 and len(kept[-1]["rows"][0]["samples_ms"]) == 4 * args.steps
    assert [c["passed"] for c in record["gates"]] == [True] * 4, record["gates"]
    record |= step.conclusions(record)
    folder = harness.write_record(record, step.page(record), args)
    text = (folder / "README.md").read_text()
    assert "unfinished" not in harness.read_record(folder)
    for row in record["rows"]:
        assert len(row["samples_ms"]) == 5 and row["peak_mb"] > 50 and 0 < row["products"]["share"] <= 1.5
        assert f"| {row['key']} |" in text
    assert {r["other"] for r in record["ratios"]} == {"strong-eager"}
    assert record["rows"][0]["attention"] == {"student": "sdpa", "teacher": "sdpa"}
    assert "* x: why" in text and record["rates"]["copy_gb_per_s"] > 0


def rows_of():
    samples = {"released": 200.0, "strong": 120.0, "strong-plain-attention": 110.0, "ours": 100.0}
    common = {"about": "", "precision": "bf16", "peak_mb": 10.0, "products": {"ms": 80.0}}
    return [
        common | {"key": n, "provider": n, "family": n.split("-")[0], "samples_ms": [ms] * 5, "p50_ms": ms}
        for n, ms in samples.items()
    ]


def test_what_a_provider_needs(monkeypatch):
    for name in ("ours-triton", "ours-quack"):
        assert "CUDA" in BY_NAME[name].missing("cpu")
        for reason in ("", "not here"):
            monkeypatch.setattr(step.dispatch, "unsupported", lambda *asked, why=reason: why)
            assert BY_NAME[name].missing("cuda") == reason
    assert BY_NAME["ours-cuda-graph"].missing("cuda") == "" == BY_NAME["ours"].missing("cpu")


@pytest.mark.parametrize("bad", ["", "ours", "strong-plain-attention"])
def test_nothing_is_concluded_about_a_provider_whose_check_failed(bad):
    gates = [{"name": r["provider"], "passed": r["provider"] != bad} for r in rows_of()]
    ratios = {r["other"]: r for r in step.ratios({"rows": rows_of(), "gates": gates})}
    assert set(ratios) == {"released", "strong-plain-attention"}
    for other, r in ratios.items():
        assert ("refused" in r) == (bad in ("ours", other)) and ("ratio" in r) != ("refused" in r)
    if not bad:
        assert ratios["released"]["ratio"] == 2 and ratios["released"]["limit"] == 2.5


def test_memory_per_image_and_growth():
    rows = [{"provider": "ours", "batch": b, "peak_mb": 500.0 + 30 * b} for b in (2, 4, 8)]
    assert step.per_image(rows) == {"ours": pytest.approx(30)} and step.per_image(rows[:1]) == {}
    rows = [{"axis": "batch", "batch": b, "p50_ms": 5.0 * b} for b in (2, 4, 8)]
    assert step.growth(rows) == {"batch": pytest.approx(1)}


def test_rows_come_in_the_order_asked_for_and_names_are_not_groups():
    able, unable = chosen(["ours", "strong", "main"], "cpu")
    assert [p.name for p in able][:3] == ["ours", "strong", "released"] and len(able) + len(unable) == 7
    assert not {p.name for p in PROVIDERS} & {g for p in PROVIDERS for g in p.groups}
    assert (
        step.options(["--device", "cpu"]).color and not step.options(["--no-color", "--device", "cpu"]).color
    )


def test_ours_and_the_strong_baselines_have_the_same_memory_settings():
    keeps = {p.name: p.keeps_memory for p in PROVIDERS}
    assert keeps["ours"] and keeps["strong"] and keeps["strong-eager"] and not keeps["released"]
    assert not keeps["ours-system-allocator"] and not keeps["strong-system-allocator"]
    assert BY_NAME["strong"].environment == BY_NAME["ours"].environment


@pytest.mark.parametrize("form", ["--memory", "--scaling"])
def test_plans(form):
    args = step.options([form, "--quick", "--device", "cpu"])
    able, _ = chosen(args.providers, "cpu")
    groups, what = step.plan(args, able)
    keys = [job.key for group in groups for job in group]
    assert len(set(keys)) == len(keys) > 4 and what
    assert (max(map(len, groups)) > 1) == (form == "--scaling")


def test_settings_as_text():
    text = "train.compile=step,train.accumulation=2,system.backend=lamb=foreach,adamw_ema=fused,train.cuda_graph=on"
    wanted = {"train.compile": "step", "train.accumulation": 2, "train.cuda_graph": "on"}
    assert step.parse_settings(text) == wanted | {"system.backend": "lamb=foreach,adamw_ema=fused"}
    able, _ = chosen(["ours"], "cpu", extra=["train.recompute=gelu"])
    assert able[-1].name == "ours train.recompute=gelu" and able[-1].family == "ours"
    assert able[-1].make(tiny(), CPU, "fp32").run.cfg.train.recompute == "gelu"
