"""LAMB, LARS, the implementations of AdamW, and NVIDIA apex where it works.

Covers: LAMB and LARS against the papers' formulas in float64, with a changing rate, odd shapes, zero norms, rates in
tensors; steps gated on the device, bit for bit, the teacher too; nothing read by the CPU; what is an error; every
optimizer of a configuration: its options, its gate, checkpoints that continue under another implementation, other
families; an apex that is absent, wrong, broken or works; whole runs, stopped and continued bit for bit.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

from extrema_fast import config as c
from extrema_fast import train
from extrema_fast.errors import Preempted, UsageError
from extrema_fast.files import history
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.ops import dispatch as ops
from extrema_fast.ops import optimizers
from extrema_fast.ops.optimizers import Lamb, Lars, ema_
from extrema_fast.training.checkpoint import collect, restore
from extrema_fast.training.counters import Counters
from extrema_fast.training.optim import FAMILIES, build_optimizer, gates_on_device, set_lr
from tests.training.conftest import final_hash, stop_at

# ---- LAMB and LARS ---------------------------------------------------------------------------------

SHAPES = [(49, 39), (1, 19), (7,), (3, 2, 5), (1,)]
DECAY = [0.1, 0.0, 0.02]
BETAS, EPS = (0.9, 0.95), 1e-8
MAKE = {
    "lamb": lambda groups, lr: Lamb(groups, lr=lr, betas=BETAS, eps=EPS),
    "lars": lambda groups, lr: Lars(groups, lr=lr, momentum=0.9, trust=0.02),
}
RATES = [0.01, 0.03, 0.02, 0.005]


def parameters(dtype: torch.dtype) -> list[dict]:
    """A group per decay with every shape, some of them all zeros."""
    torch.manual_seed(1)
    groups = []
    for decay in DECAY:
        params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in SHAPES]
        with torch.no_grad():
            params[1].zero_()
        groups.append({"params": params, "weight_decay": decay})
    return groups


def every(groups: list[dict]) -> list[torch.nn.Parameter]:
    return [p for g in groups for p in g["params"]]


def give_gradients(groups: list[dict], step: int) -> None:
    torch.manual_seed(100 + step)
    for i, p in enumerate(every(groups)):
        g = torch.randn(p.shape, dtype=torch.float64).to(p)
        # a tensor that never has a gradient other than 0
        p.grad = torch.zeros_like(p) if i % len(SHAPES) == 3 else g


def run_steps(optimizer: torch.optim.Optimizer, groups: list[dict]) -> None:
    for t, lr in enumerate(RATES, start=1):
        give_gradients(groups, t)
        set_lr(optimizer, lr)
        optimizer.step()


def formula(name: str, groups: list[dict], mu: float) -> list[Tensor]:
    """The module's formulas in float64, one tensor after the other."""
    first, second = ({id(p): 0.0 for p in every(groups)} for _ in range(2))
    x = {id(p): p.detach().double() for p in every(groups)}
    for t, lr in enumerate(RATES, start=1):
        give_gradients(groups, t)
        for d, p in ((group["weight_decay"], p) for group in groups for p in group["params"]):
            k, g = id(p), p.grad.double()
            if name == "lamb":
                first[k] = BETAS[0] * first[k] + (1 - BETAS[0]) * g
                second[k] = BETAS[1] * second[k] + (1 - BETAS[1]) * g**2
                m, v = first[k] / (1 - BETAS[0] ** t), second[k] / (1 - BETAS[1] ** t)
                u = m / (v.sqrt() + EPS) + d * x[k]
                ratio, bottom = x[k].norm(), u.norm()
                x[k] = x[k] - lr * u * (ratio / bottom if d and ratio and bottom else 1.0)
            else:
                top, bottom = x[k].norm(), g.norm()
                ratio = 0.02 * top / (bottom + d * top) if d and top and bottom else 1.0
                first[k] = mu * first[k] + ratio * (g + d * x[k])
                x[k] = x[k] - lr * first[k]
    return list(x.values())


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("name", "mu"), [("lamb", 0.0), ("lars", 0.9), ("lars", 0.0)])
def test_follows_the_formula(name, mu, dtype, limit, tensor):
    groups, before = parameters(dtype), parameters(dtype)
    wanted = formula(name, parameters(dtype), mu)
    optimizer = MAKE[name](groups, torch.tensor(0.0) if tensor else 0.0)
    if name == "lars":
        for group in optimizer.param_groups:
            group["momentum"] = mu
    run_steps(optimizer, groups)
    # a rate in a tensor has fp32's digits
    limit = max(limit, 1e-8) if tensor else limit
    for p, x in zip(every(groups), wanted, strict=True):
        assert float((p.detach() - x).abs().max()) <= limit * max(1.0, float(x.abs().max())), p.shape
    moved = [not torch.equal(p, q) for p, q in zip(every(groups), every(before), strict=True)]
    assert sum(moved) >= len(moved) - len(DECAY)
    assert any(optimizer.state.values()) == (name == "lamb" or mu > 0)


def bits(groups: list[dict], optimizer: torch.optim.Optimizer) -> list[bytes]:
    found = [p.detach() for p in every(groups)]
    found += [v for p in every(groups) for _, v in sorted(optimizer.state.get(p, {}).items())]
    return [t.numpy().tobytes() for t in found]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_a_gated_step_changes_no_bit(name, first):
    """Not those of -0.0 either, whatever the gradients are, and the steps after it are as without it."""
    (groups, optimizer), (others, other) = (
        (g, MAKE[name](g, 0.0)) for g in (parameters(torch.float32), parameters(torch.float32))
    )
    for g, o in ((groups, optimizer), (others, other)):
        with torch.no_grad():
            every(g)[0][0, :3] = -0.0
        if not first:
            run_steps(o, g)
            for key, value in o.state[every(g)[0]].items():
                if key != "step":
                    value[1, :3] = -0.0
    before = bits(groups, optimizer)
    for bad in (float("nan"), float("inf"), 1.0):
        for p in every(groups):
            p.grad = torch.full_like(p, bad)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        if not first:
            assert bits(groups, optimizer) == before
    optimizer.found_inf = torch.zeros(())
    run_steps(optimizer, groups)
    run_steps(other, others)
    assert bits(groups, optimizer) == bits(others, other)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_skipped_ema_update_reads_no_student(weight):
    student = [torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])]
    teacher = [torch.tensor([1.0, -0.0, 2.0, 3.0])]
    before = teacher[0].clone()
    ema_(teacher, student, torch.tensor(weight), torch.ones(()))
    assert torch.equal(teacher[0], before) and torch.equal(teacher[0].signbit(), before.signbit())
    student = [torch.tensor([2.0, 1.0, -3.0, 0.5])]
    ema_(teacher, student, torch.tensor(weight), torch.zeros(()))
    assert torch.equal(teacher[0], before.lerp(student[0], weight))


@pytest.mark.parametrize("name", MAKE)
def test_the_cpu_reads_nothing(name):
    """On tensors without values every read raises."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with torch.library._scoped_library("aten", "IMPL") as library, FakeTensorMode():
        # torch describes every op used here but this one
        library.impl("_fused_sgd_.tensor_lr", lambda *_, **__: None, "Meta")
        lr = torch.empty(())
        with pytest.raises(DataDependentOutputException):
            bool(lr > 0)
        params = [torch.nn.Parameter(torch.empty(s)) for s in SHAPES]
        groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]
        optimizer = MAKE[name](groups, lr)
        optimizer.found_inf = torch.empty(())
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()


@pytest.mark.parametrize("name", MAKE)
def test_what_it_is_given(name):
    """Gradients with other strides, none at all, a closure; parameters and gradients that it does not take."""
    results = []
    for turned in (False, True):
        p = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        optimizer = MAKE[name]([{"params": [p], "weight_decay": 0.1}], 0.1)
        g = torch.linspace(-1, 2, 12).view(3, 4)
        p.grad = g.t().contiguous().t() if turned else g
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)
    groups = parameters(torch.float32)
    optimizer = MAKE[name](groups, 0.1)
    before = bits(groups, optimizer)
    optimizer.step()
    assert bits(groups, optimizer) == before

    def closure() -> Tensor:
        loss = every(groups)[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad and bits(groups, optimizer) != before
    for q in (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, 3).t()):
        with pytest.raises(ValueError, match="expected contiguous float32"):
            MAKE[name]([{"params": [torch.nn.Parameter(q)]}], 0.1)
    every(groups)[0].grad = torch.ones(49, 39).to_sparse()
    with pytest.raises(ValueError, match=r"grad of \[49, 39\]: expected dense"):
        optimizer.step()


# ---- every optimizer of a configuration --------------------------------------------------------------

# (optim.name, system.backend): class, gates on the device
OPTIMIZERS = {
    ("adamw", "auto"): ("AdamW", True),
    ("adamw", "adamw_ema=fused"): ("AdamW", True),
    ("adamw", "adamw_ema=reference"): ("AdamW", False),
    ("adamw", "adamw_ema=triton"): ("AdamWEma", True),
    ("lamb", "auto"): ("Lamb", True),
    ("lars", "auto"): ("Lars", True),
}
TINY = {
    "model": {"width": 16, "depth": 1},
    "head": {"hidden": 8, "out": 8, "predictor_hidden": 8},
    "optim": {"betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.3, "base_lr": 0.1},
}


def built(name: str, backend: str = "auto", **options) -> tuple[ExtreMA, torch.optim.Optimizer]:
    cfg = c.from_dict({"optim": {"name": name}}, c.from_dict(TINY, c.smoke()))
    ops.set_backend(backend)
    method = ExtreMA(cfg)
    return method, build_optimizer(method, cfg, **options)


def take_steps(method: ExtreMA, optimizer: torch.optim.Optimizer, start: int, end: int) -> None:
    for t in range(start, end):
        torch.manual_seed(t)
        optimizer.zero_grad(set_to_none=True)
        for _, p in method.student_parameters():
            p.grad = torch.randn_like(p)
        set_lr(optimizer, 0.01 * (t + 1))
        optimizer.step()


def saved(method: ExtreMA, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in collect(method, optimizer, Counters().tensor).items()}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], rtol: float) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=rtol, atol=rtol, msg=name)


@pytest.mark.parametrize(("name", "backend"), OPTIMIZERS)
def test_the_optimizer_of_a_configuration(name, backend):
    method, optimizer = built(name, backend)
    wanted, on_device = OPTIMIZERS[name, backend]
    assert type(optimizer).__name__ == wanted and gates_on_device(optimizer) is on_device
    assert FAMILIES[wanted] == name
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in method.student_branch.parameters()}
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert group["weight_decay"] == decay and group["lr"] == pytest.approx(0.1 * 16 / 256)
        if name == "lars":
            assert (group["momentum"], group["trust"]) == (0.8, 1e-3)
        else:
            assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-3)


@pytest.mark.parametrize(("name", "backend"), OPTIMIZERS)
def test_a_rate_in_a_tensor(name, backend):
    one, two = built(name, backend), built(name, backend, tensor_lr=True)
    rates = [g["lr"] for g in two[1].param_groups]
    assert rates[0] is rates[1] and (rates[0].dtype, rates[0].dim()) == (torch.float32, 0)
    for method, optimizer in (one, two):
        take_steps(method, optimizer, 0, 2)
    assert float(rates[0]) == pytest.approx(0.02)
    assert_same(saved(*one), saved(*two), 1e-6)
    # a rate that is a tensor sets either kind
    for _, optimizer in (one, two):
        set_lr(optimizer, torch.tensor(0.25))
        assert [float(g["lr"]) for g in optimizer.param_groups] == [0.25, 0.25]
    assert type(one[1].param_groups[0]["lr"]) is float
    # and the tensor is still that one after a checkpoint has been read
    restore(saved(*one), two[0], two[1], Counters().tensor)
    assert all(g["lr"] is rates[0] for g in two[1].param_groups)


def continued(name: str, first: str, second: str, start: int = 2, end: int = 4) -> dict[str, torch.Tensor]:
    """`start` steps with one implementation, its checkpoint, and the rest with another."""
    one, two = built(name, first), built(name, second)
    take_steps(*one, 0, start)
    # another run's state must leave no trace
    take_steps(*two, 7, 8)
    restore(saved(*one), *two, Counters().tensor, type(one[1]).__name__)
    assert_same(saved(*one), saved(*two), 0)
    take_steps(*two, start, end)
    return saved(*two)


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars"])
def test_implementations_continue_each_others_checkpoints(name):
    backends = [b for n, b in OPTIMIZERS if n == name and (b != "auto" or n != "adamw")]
    straight = built(name, backends[0])
    take_steps(*straight, 0, 4)
    for first, second in zip(backends, backends[1:] + backends[:1], strict=True):
        assert_same(saved(*straight), continued(name, first, second), 1e-5)
    if name == "adamw":
        # as checkpoints of older versions call it
        restore(saved(*straight), *built(name), Counters().tensor, "ForeachAdamW")


@pytest.mark.parametrize(
    ("old", "new"), [("AdamW", "lamb"), ("FusedLAMB", "adamw"), ("Lars", "lamb"), ("Adafactor", "adamw")]
)
def test_another_optimizers_checkpoint_is_an_error(old, new):
    one, two = built(FAMILIES.get(old, "adamw")), built(new)
    take_steps(*one, 0, 1)
    before = saved(*two)
    with pytest.raises(UsageError, match=f"is {old}, this run's is {type(two[1]).__name__}") as error:
        restore(saved(*one), *two, Counters().tensor, old)
    assert (f"--optim.name {FAMILIES.get(old)}" in str(error.value)) == (old in FAMILIES)
    assert "another --out with --init-from" in str(error.value)
    assert_same(before, saved(*two), 0)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_layer_wise_rates_without_decay_are_an_error(name):
    cfg = c.from_dict({"optim": {"name": name, "weight_decay": 0.0}}, c.smoke())
    with pytest.raises(UsageError, match=r"optim.weight_decay: 0 .*use a small value"):
        build_optimizer(ExtreMA(cfg), cfg)


# ---- NVIDIA apex -------------------------------------------------------------------------------------


@pytest.fixture
def apex(monkeypatch):
    """Puts a module of apex's name where an import finds it; its optimizers run on a CPU."""
    monkeypatch.setattr(optimizers, "APEX_DEVICES", ("cpu",))
    optimizers.find_apex.cache_clear()

    def install(lamb) -> None:
        module = types.ModuleType("apex.optimizers")
        for name, cls in (("FusedLAMB", lamb), ("FusedAdam", FakeApex)):
            setattr(module, name, type(name, (cls,), {"calls": 0}))
        monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
        monkeypatch.setitem(sys.modules, "apex.optimizers", module)

    yield install
    optimizers.find_apex.cache_clear()
    # one that a test imported from a folder
    for name in [n for n in sys.modules if n.partition(".")[0] == "apex"]:
        del sys.modules[name]


class FakeApex(torch.optim.Optimizer):
    """What apex's two classes have in common: their arguments, the count in the group, the bare `zero_grad`."""

    calls = 0
    wrong = 1.0

    def __init__(self, params, lr, betas, eps, *, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.01})

    def zero_grad(self):
        for p in every(self.param_groups):
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


class FusedLAMB(FakeApex):
    def __init__(self, params, *, max_grad_norm, **options):
        assert max_grad_norm == float("inf")
        super().__init__(params, **options)

    def rate(self, p, u, decay):
        return float(p.norm() / u.norm()) if decay and p.norm() and u.norm() else 1.0


class Breaks(FusedLAMB):
    def step(self, closure=None):
        raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("lamb", "words"),
    [
        (None, "No module named 'apex.optimizers'"),
        (Breaks, "apex's FusedLAMB does not work here (RuntimeError: no kernel image is available)"),
        (type("Off", (FusedLAMB,), {"wrong": 1.01}), "not close"),
        (type("Off", (FusedLAMB,), {"wrong": float("nan")}), "not close"),
        # AdamW under LAMB's name
        (type("Off", (FusedLAMB,), {"rate": FakeApex.rate}), "not close"),
    ],
)
def test_an_apex_that_does_not_work(lamb, words, apex, tmp_path, monkeypatch):
    if lamb is None:
        # the unrelated package of that name
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex" / "__init__.py").touch()
        for name in [n for n in sys.modules if n.partition(".")[0] == "apex"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)
    else:
        apex(lamb)
    name, why = ops.choice("lamb", "cpu")
    assert name == "foreach" and words in why
    # by name it is an error
    with pytest.raises(UsageError, match=r"lamb=apex, but apex's FusedLAMB .* is another project"):
        built("lamb", "lamb=apex")


def test_auto_takes_apex_for_lamb_alone(apex, monkeypatch):
    apex(FusedLAMB)
    assert type(built("lamb")[1]).__name__ == "FusedLAMB" and type(built("adamw")[1]) is torch.optim.AdamW
    # it takes no rate in a tensor: ours, unless apex is asked for by name
    assert type(built("lamb", tensor_lr=True)[1]) is Lamb
    assert "no rate on the device" in ops.choice("lamb", "cpu")[1]
    with pytest.raises(UsageError, match="reads its rate on the CPU"):
        built("adamw", "adamw_ema=apex", tensor_lr=True)
    # nor does it run on other devices
    monkeypatch.setattr(optimizers, "APEX_DEVICES", ("cuda",))
    assert type(built("lamb")[1]) is Lamb


@pytest.mark.parametrize(
    ("name", "op", "ours"), [("lamb", "lamb", "foreach"), ("adamw", "adamw_ema", "fused")]
)
def test_an_apex_that_works(name, op, ours, apex):
    apex(FusedLAMB)
    theirs, straight = built(name, f"{op}=apex"), built(name, f"{op}={ours}")
    cls = type(theirs[1])
    assert issubclass(cls, FakeApex) and not gates_on_device(theirs[1])
    before = cls.calls
    for pair in (theirs, straight):
        take_steps(*pair, 0, 4)
    assert cls.calls == before + 4
    assert_same(saved(*theirs), saved(*straight), 1e-5)
    for first, second in (("apex", ours), (ours, "apex"), ("apex", "apex")):
        assert_same(continued(name, f"{op}={first}", f"{op}={second}"), saved(*straight), 1e-5)


# ---- whole runs --------------------------------------------------------------------------------------

STEPS = 8


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_run_learns_and_continues_bit_for_bit(name, tmp_path, monkeypatch):
    def config(out):
        rate = {"lamb": 0.1, "lars": 20.0}[name]
        change = {"optim": {"name": name, "base_lr": rate}, "eval": {"every_epochs": 0}, "out": str(out)}
        small = {"model": {"width": 16, "depth": 1}, "head": {"hidden": 16, "out": 8, "predictor_hidden": 16}}
        return c.from_dict(small | change, c.smoke())

    train.pretrain(config(tmp_path / "straight"), progress=False)
    loss = [r["loss"] for r in history(tmp_path / "straight" / "log.jsonl", "train", STEPS)]
    assert len(loss) == STEPS and loss[-1] < loss[0]
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(Preempted):
            train.pretrain(config(tmp_path / "stopped"), progress=False)
    train.pretrain(config(tmp_path / "stopped"), progress=False)
    assert final_hash(tmp_path / "stopped", STEPS) == final_hash(tmp_path / "straight", STEPS)
