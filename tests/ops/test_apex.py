"""NVIDIA apex is used where it works, and never because of its name.

Covers: no apex; the unrelated package of that name; apex without its compiled module, without kernels, without
the class, with a class that raises at construction or at its step, with one that computes something else; a
working one: taken by `auto` for LAMB alone, by name for both, logged once, its steps used, its state
interchangeable with ours, whole runs; asked for and absent; rates in tensors.
"""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch

from extrema_fast import train
from extrema_fast.config import from_dict, smoke
from extrema_fast.errors import UsageError
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.ops import dispatch as ops
from extrema_fast.ops import nvidia_apex
from extrema_fast.training.checkpoint import collect, restore
from extrema_fast.training.metrics import Counters, history
from extrema_fast.training.optim import build_optimizer, gates_on_device, set_lr

TINY = {"model": {"width": 16, "depth": 1}, "head": {"hidden": 8, "out": 8, "predictor_hidden": 8}}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setattr(ops, "_setting", "auto")
    # these apexes run on a CPU
    monkeypatch.setattr(nvidia_apex, "DEVICES", ("cpu",))
    for name in [n for n in sys.modules if n.partition(".")[0] in ("apex", "amp_C")]:
        monkeypatch.delitem(sys.modules, name)
    nvidia_apex.find.cache_clear()
    yield
    nvidia_apex.find.cache_clear()


class Fake(torch.optim.Optimizer):
    """What apex's two classes have in common: their arguments, the count in the group, the bare `zero_grad`."""

    calls = 0
    wrong = 1.0

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 adam_w_mode=True, **more):  # fmt: skip
        assert bias_correction and adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self, closure=None):
        type(self).calls += 1
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (b1, b2), t, decay = group["betas"], group["step"], group["weight_decay"]
            for p in group["params"]:
                state, g = self.state[p], p.grad.data
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.data), torch.zeros_like(p.data)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(b1).add_(g, alpha=1 - b1)
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                u = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"]) + decay * p.data
                # apex's LAMB leaves its update there
                g.copy_(u)
                p.data.sub_(self.rate(p.data, u, decay) * group["lr"] * self.wrong * u)

    def rate(self, p, u, decay):
        return 1.0


class FusedAdam(Fake):
    pass


class FusedLAMB(Fake):
    def __init__(self, params, *, max_grad_norm=1.0, **options):
        assert max_grad_norm == float("inf")
        super().__init__(params, **options)

    def rate(self, p, u, decay):
        return float(p.norm() / u.norm()) if decay and p.norm() and u.norm() else 1.0


def install(
    monkeypatch, *, amp_c=True, available=True, lamb=FusedLAMB, adam=FusedAdam, package="apex"
) -> None:
    """Puts modules of these names where an import finds them."""
    modules = {package: types.ModuleType(package)}
    if amp_c:
        modules["amp_C"] = types.ModuleType("amp_C")
    apply = modules[f"{package}.multi_tensor_apply"] = types.ModuleType("multi_tensor_apply")
    apply.multi_tensor_applier = types.SimpleNamespace(available=available)
    optimizers = modules[f"{package}.optimizers"] = types.ModuleType("optimizers")
    for name, cls in (("FusedLAMB", lamb), ("FusedAdam", adam)):
        if cls is not None:
            setattr(optimizers, name, type(name, (cls,), {"calls": 0}))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def why(name: str = "FusedLAMB") -> str:
    found, because = nvidia_apex.find(name, "cpu")
    assert found is None
    return because


def test_no_apex():
    assert "amp_C does not load (ModuleNotFoundError: No module named 'amp_C')" in why()
    assert ops.choice("lamb", "cpu") == ("foreach", ops._WHY["lamb"] + "; " + why())


def test_devices_it_has_no_kernels_for(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(nvidia_apex, "DEVICES", ("cuda",))
    assert why() == "apex runs on cuda, not on cpu"
    assert ops.choice("lamb", "cpu") == ("foreach", ops._WHY["lamb"])


@pytest.mark.parametrize("amp_c", [False, True])
def test_the_unrelated_package_of_that_name(amp_c, tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text('"""Toolkit for web applications."""\n')
    if amp_c:
        (tmp_path / "amp_C.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert ("No module named 'apex.multi_tensor_apply'" if amp_c else "No module named 'amp_C'") in why()
    assert ops.choice("lamb", "cpu")[0] == "foreach"


def test_a_compiled_module_that_does_not_load(tmp_path, monkeypatch):
    install(monkeypatch, amp_c=False)
    (tmp_path / "amp_C.py").write_text("raise OSError('libcudart.so.99: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "amp_C does not load (OSError: libcudart.so.99: no such file)" in why()


class Refuses(Fake):
    def __init__(self, *args, **options):
        raise RuntimeError("requires cuda extensions")


class Breaks(FusedLAMB):
    def step(self, closure=None):
        raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"available": False}, "built without its CUDA extension"),
        ({"lamb": None}, "has no attribute 'FusedLAMB'"),
        ({"lamb": Refuses}, r"FusedLAMB does not work here (RuntimeError: requires cuda extensions)"),
        ({"lamb": Breaks}, "RuntimeError: no kernel image is available"),
        ({"lamb": type("Off", (FusedLAMB,), {"wrong": 1.01})}, "differs from its definition by "),
        ({"lamb": type("Off", (FusedLAMB,), {"wrong": float("nan")})}, "differs from its definition by nan"),
        # AdamW under LAMB's name
        ({"lamb": type("Off", (FusedLAMB,), {"rate": Fake.rate})}, "differs from its definition by "),
    ],
)
def test_one_that_does_not_work(parts, words, monkeypatch):
    install(monkeypatch, **parts)
    assert words in why()
    assert ops.choice("lamb", "cpu")[0] == "foreach" and words in ops.choice("lamb", "cpu")[1]


@pytest.mark.parametrize(("op", "optimizer"), [("lamb", "lamb"), ("adamw_ema", "adamw")])
def test_asked_for_and_absent(op, optimizer):
    ops.set_backend(f"{op}=apex")
    cfg = from_dict({"optim": {"name": optimizer}}, from_dict(TINY, smoke()))
    with pytest.raises(UsageError) as error:
        build_optimizer(ExtreMA(cfg), cfg)
    text = str(error.value)
    assert f"asks for {op}=apex, but apex's compiled module amp_C does not load" in text
    assert "`pip install apex` is another project" in text


# ---- one that works --------------------------------------------------------------------------------


def built(name: str, backend: str = "auto", **options):
    cfg = from_dict({"optim": {"name": name, "base_lr": 0.1, "eps": 1e-3}}, from_dict(TINY, smoke()))
    ops.set_backend(backend)
    method = ExtreMA(cfg)
    return method, build_optimizer(method, cfg, **options)


def take_steps(method, optimizer, start: int, end: int) -> None:
    for t in range(start, end):
        torch.manual_seed(t)
        optimizer.zero_grad(set_to_none=True)
        for _, p in method.student_parameters():
            p.grad = torch.randn_like(p)
        set_lr(optimizer, 0.01 * (t + 1))
        optimizer.step()


def saved(method, optimizer) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in collect(method, optimizer, Counters().tensor).items()}


def test_auto_takes_it_for_lamb_alone(monkeypatch, caplog):
    install(monkeypatch)
    caplog.set_level(logging.INFO, "extrema_fast.ops.dispatch")
    for _ in range(2):
        assert type(built("lamb")[1]).__name__ == "FusedLAMB"
        ops.choices()
    assert type(built("adamw")[1]) is torch.optim.AdamW
    lines = [r.getMessage() for r in caplog.records if "FusedLAMB" in r.getMessage()]
    # once for each time a backend was set
    assert lines == ["op lamb: apex (apex's FusedLAMB was found to work here)"] * 2


@pytest.mark.parametrize(("name", "op"), [("lamb", "lamb"), ("adamw", "adamw_ema")])
def test_its_steps_are_used_and_are_ours(name, op, monkeypatch):
    install(monkeypatch)
    theirs, ours = built(name, f"{op}=apex"), built(name, f"{op}=reference")
    cls = type(theirs[1])
    assert issubclass(cls, Fake) and not gates_on_device(theirs[1])
    before = cls.calls
    for pair in (theirs, ours):
        take_steps(*pair, 0, 3)
    assert cls.calls == before + 3
    a, b = saved(*theirs), saved(*ours)
    assert a.keys() == b.keys() and any(n.endswith(".step") for n in a)
    for n in a:
        torch.testing.assert_close(a[n], b[n], rtol=1e-5, atol=1e-6, msg=n)


@pytest.mark.parametrize(("name", "op"), [("lamb", "lamb"), ("adamw", "adamw_ema")])
@pytest.mark.parametrize("order", [("apex", "reference"), ("reference", "apex"), ("apex", "apex")])
def test_checkpoints_continue(name, op, order, monkeypatch):
    install(monkeypatch)
    straight = built(name, f"{op}=reference")
    take_steps(*straight, 0, 5)
    one, two = (built(name, f"{op}={which}") for which in order)
    take_steps(*one, 0, 3)
    # another run's steps must leave no trace
    take_steps(*two, 8, 9)
    restore(saved(*one), *two, Counters().tensor, type(one[1]).__name__)
    take_steps(*two, 3, 5)
    a, b = saved(*straight), saved(*two)
    assert a.keys() == b.keys()
    for n in a:
        torch.testing.assert_close(a[n], b[n], rtol=1e-5, atol=1e-6, msg=n)


def test_a_rate_in_a_tensor(monkeypatch, caplog):
    install(monkeypatch)
    caplog.set_level(logging.INFO, "extrema_fast.ops.dispatch")
    # nobody asked for apex: ours, which can
    assert type(built("lamb", tensor_lr=True)[1]).__name__ == "Lamb"
    assert ops.choice("lamb", "cpu")[0] == "foreach" and "no rate on the device" in caplog.text
    for name, op in (("lamb", "lamb"), ("adamw", "adamw_ema")):
        with pytest.raises(UsageError, match="reads its rate on the host"):
            built(name, f"{op}=apex", tensor_lr=True)


def test_a_whole_run(tmp_path, monkeypatch):
    install(monkeypatch)
    losses = []
    for backend in ("auto", "lamb=reference"):
        cfg = from_dict({"optim": {"name": "lamb", "base_lr": 0.1}}, from_dict(TINY, smoke()))
        change = {"out": str(tmp_path / backend), "system": {"backend": backend}, "eval": {"every_epochs": 0}}
        run = train.pretrain(from_dict(change, cfg), progress=False)
        losses.append([r["loss"] for r in history(run / "log.jsonl", "train", 8)])
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]
