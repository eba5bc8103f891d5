"""AdamWEma against torch.optim.AdamW, clip_grad_norm_ and lerp.

Covers: steps in fp32 and fp64, several groups, odd sizes around a chunk, clipping, gradient scale, low-precision
gradients, GradScaler; learning rate and weight as tensors; tensors without gradient, without teacher, with copies, with
separate step counts; a bad step changes nothing, bitwise; state dicts both ways, also of an unfused AdamW; pickling;
new gradient storage; what is sent to the device; version counters; cleared state; unaligned and empty tensors; poisoned
buffers; repeatability; errors.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from extrema_fast.kernels.adamw_ema import AdamWEma, op

from tests.kernels._compare import assert_errors, assert_repeats

SIZES = [(1,), (3,), (4095,), (4096,), (4097,), (100, 101), (2, 3, 5)]
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}


def make(dtype=torch.float32, sizes=SIZES):
    """(parameters, teachers)."""
    params = [torch.nn.Parameter(torch.randn(*s, dtype=dtype)) for s in sizes]
    return params, [p.detach().clone() + 0.1 for p in params]


def pair(sizes=SIZES, lr=1e-3):
    """(our parameters, torch's, our optimizer, torch's, which is not fused) of equal values."""
    a = make(sizes=sizes)[0]
    b = copy.deepcopy(a)
    options = OPTIONS | {"weight_decay": 1e-2}
    torchs = torch.optim.AdamW(b, foreach=True, **options | {"lr": float(lr)})
    return a, b, AdamWEma(a, **options | {"lr": lr}), torchs


def groups(params):
    return [
        {"params": params[:3], "weight_decay": 0.1},
        {"params": params[3:], "weight_decay": 0.0, "lr": 3e-3},
    ]


def set_grads(*lists):
    for row in zip(*lists, strict=True):
        g = torch.randn_like(row[0])
        for p in row:
            p.grad = g.clone()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a, b, tolerance=1e-6):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "max_norm"), [(torch.float32, 1e-6, None), (torch.float64, 1e-13, 1.0)]
)
def test_steps(dtype, tolerance, max_norm, path):
    a, teacher_a = make(dtype)
    b, teacher_b = copy.deepcopy(a), [t.clone() for t in teacher_a]
    # the last two have no teacher
    pairs = dict(list(zip(a, teacher_a, strict=True))[:-2])
    ours, torchs = AdamWEma(groups(a), teacher=pairs, **OPTIONS), torch.optim.AdamW(groups(b), **OPTIONS)
    for step in range(3):
        set_grads(a, b)
        for optimizer in (ours, torchs):
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
        ours.step(momentum_weight=0.05 + step / 100, max_norm=max_norm)
        norm = torch.nn.utils.clip_grad_norm_(b, max_norm or 1e9)
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-6) and float(ours.skipped) == 0
        torchs.step()
        for t, p in zip(teacher_b[:-2], b[:-2], strict=True):
            t.lerp_(p.detach(), 0.05 + step / 100)
    # teachers without a parameter stay, bitwise
    assert equal(teacher_a[-2:], teacher_b[-2:])
    close([*a, *teacher_a], [*b, *teacher_b], tolerance)
    for x, y in zip(a, b, strict=True):
        mine, theirs = ours.state[x], torchs.state[y]
        assert mine["step"] == theirs["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine[key], theirs[key], rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["scaled", torch.float16, torch.bfloat16])
def test_scaled_and_low_precision_gradients(kind, path):
    if kind == torch.bfloat16 and path == "kernel":
        pytest.skip("the interpreter rounds bf16 wrongly")
    a, b, ours, torchs = pair()
    for _ in range(2):
        set_grads(b)
        for x, y in zip(a, b, strict=True):
            if kind == "scaled":
                x.grad = y.grad * 128
            else:
                x.grad_dtype = kind
                x.grad = y.grad.to(kind)
                y.grad = x.grad.float()
        ours.step(grad_scale=torch.tensor(1 / 128 if kind == "scaled" else 1.0), max_norm=1.0)
        norm = torch.nn.utils.clip_grad_norm_(b, 1.0)
        torchs.step()
        # the norm of the true gradients, before clipping
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    close(a, b)


def test_grad_scaler(path):
    a, teacher = make(sizes=[(4097,), (3,)])
    b = copy.deepcopy(a)
    ours = AdamWEma(a, teacher=zip(a, teacher, strict=True), **OPTIONS)
    torchs = torch.optim.AdamW(b, fused=True, weight_decay=1e-2, **OPTIONS)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for bad in (False, True, False):
        set_grads(a, b)
        for params, optimizer, scaler in zip((a, b), (ours, torchs), scalers, strict=True):
            scaler.scale(torch.zeros(()))
            for p in params:
                p.grad *= scaler.get_scale()
            if bad:
                params[0].grad[4000] = float("inf")
            before = [t.clone() for t in teacher]
            weight = {"momentum_weight": 0.1} if optimizer is ours else {}
            scaler.step(optimizer, **weight)
            scaler.update()
            if optimizer is ours:
                assert float(ours.skipped) == bad == torch.equal(before[0], teacher[0])
    close(a, b)
    assert all(ours.state[x]["step"] == torchs.state[y]["step"] == 2 for x, y in zip(a, b, strict=True))


def test_a_learning_rate_on_the_device_is_read_every_step(path):
    rate = torch.tensor(0.0)
    a, b, ours, torchs = pair([(5,)], lr=rate)
    for value in (0.1, 0.01, 0.5):
        set_grads(a, b)
        rate.fill_(value)
        torchs.param_groups[0]["lr"] = value
        ours.step(), torchs.step()
    close(a, b, 1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_bad_step_changes_nothing(path, first):
    a, teacher = make()
    copies = [{p: torch.zeros_like(p, dtype=torch.float16) for p in a} for _ in range(2)]
    low = {"shadow": copies[0], "teacher_shadow": copies[1]}
    ours = AdamWEma(a, teacher=zip(a, teacher, strict=True), **low, **OPTIONS)
    set_grads(a)
    # copies that are not yet the cast of their parameter must not be written either
    ours.step(momentum_weight=0.1, found_inf=torch.tensor(float(first)))
    assert float(ours.skipped) == first and ours.grad_norm is None

    def everything():
        state = [v for p in a for v in ours.state[p].values()]
        both = [c for copy in copies for c in copy.values()]
        return [x.detach().clone() for x in (*a, *teacher, *both, *state)]

    before = everything()
    assert first == all(not c.any() for c in copies[1].values())
    for value in (float("nan"), float("inf")):
        set_grads(a)
        a[3].grad[7] = value
        for flag in (None, torch.tensor(0.0)):
            ours.step(momentum_weight=0.1, max_norm=1.0, found_inf=flag)
            assert float(ours.skipped) == 1 and equal(everything(), before)
    set_grads(a)
    for limit in (None, float("inf")):
        ours.step(momentum_weight=0.1, max_norm=limit, found_inf=torch.tensor(1.0))
        assert equal(everything(), before)
    ours.step(momentum_weight=0.1, found_inf=torch.tensor(0.0))
    assert not torch.equal(a[0], before[0]) and float(ours.skipped) == 0


def test_state_dicts_are_those_of_torch(path):
    a, _ = make()
    b = copy.deepcopy(a)
    ours, torchs = AdamWEma(groups(a), **OPTIONS), torch.optim.AdamW(groups(b), **OPTIONS)
    for _ in range(2):
        set_grads(a, b)
        ours.step(), torchs.step()
    # each continues from the other's
    ours2, torchs2 = AdamWEma(groups(b), **OPTIONS), torch.optim.AdamW(groups(a), **OPTIONS)
    ours2.load_state_dict(copy.deepcopy(torchs.state_dict()))
    torchs2.load_state_dict(copy.deepcopy(ours.state_dict()))
    set_grads(a, b)
    ours2.step(), torchs2.step()
    close(a, b)
    assert all(ours2.state[y]["step"] == torchs2.state[x]["step"] == 3 for x, y in zip(a, b, strict=True))
    # an unfused AdamW keeps its step count on the CPU
    assert all(g["fused"] and not g["foreach"] for g in ours2.param_groups)
    assert all(ours2.state[y]["step"].dtype == torch.float32 for y in b)
    with pytest.raises(ValueError, match="amsgrad=True is not what AdamWEma computes"):
        ours.load_state_dict(torch.optim.AdamW(groups(b), amsgrad=True).state_dict())


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copied_and_pickled(through):
    a, teacher = make(sizes=[(3,), (5,)])
    ours = AdamWEma(a, teacher=zip(a, teacher, strict=True), **OPTIONS)
    set_grads(a)
    ours.step(momentum_weight=0.1)
    b, moved, other = through((a, teacher, ours))
    set_grads(a, b)
    for optimizer in (ours, other):
        optimizer.step(momentum_weight=0.1)
    assert equal([*a, *teacher], [*b, *moved])


@pytest.mark.parametrize(
    ("path", "dtype"),
    [("kernel", torch.float16), ("plain", torch.float16), ("plain", torch.bfloat16)],
    indirect=["path"],
)
def test_copies_are_the_cast_of_the_new_values(path, dtype):
    a, teacher = make()
    low = [{p: torch.full_like(p, 9, dtype=dtype) for p in a} for _ in range(2)]
    ours = AdamWEma(
        a, teacher=dict(zip(a, teacher, strict=True)), shadow=low[0], teacher_shadow=low[1], **OPTIONS
    )
    set_grads(a)
    ours.step(momentum_weight=0.3)
    for p, t in zip(a, teacher, strict=True):
        assert torch.equal(low[0][p], p.detach().to(dtype)) and torch.equal(low[1][p], t.to(dtype))
    before = [t.clone() for t in teacher]
    ours.step()
    assert equal(teacher, before)


@pytest.mark.parametrize("weight", [0.0, 0.4, 0.7, 1.0])
def test_the_ema_update_is_that_of_lerp_for_any_weight(weight, path):
    a, teacher = make(sizes=[(4096,), (7,)])
    old = [t.clone() for t in teacher]
    ours = AdamWEma(a, teacher=zip(a, teacher, strict=True), **OPTIONS)
    set_grads(a)
    ours.step(momentum_weight=torch.tensor(weight, dtype=torch.float64))
    for p, t, before in zip(a, teacher, old, strict=True):
        torch.testing.assert_close(t, torch.lerp(before, p.detach(), weight), rtol=2e-7, atol=1e-7)
        if weight in (0.0, 1.0):
            assert torch.equal(t, p if weight else before)


def test_every_tensor_has_its_own_step_count_and_none_moves_without_gradient(path):
    a, b, ours, torchs = pair([(5,), (4096,)])
    before = a[1].detach().clone()
    for late in (False, True, True):
        set_grads(a, b)
        if not late:
            a[1].grad = b[1].grad = None
        ours.step(), torchs.step()
        assert late or (torch.equal(a[1], before) and a[1] not in ours.state)
    assert [int(ours.state[p]["step"]) for p in a] == [3, 2]
    close(a, b)


def test_little_is_sent_to_the_device(monkeypatch):
    sent, send = [], op._send
    monkeypatch.setattr(op, "_send", lambda *args: sent.append(args[1]) or send(*args))
    op._cache.clear()
    a, _ = make(sizes=[(5000,), (3,)])
    ours = AdamWEma(a, **OPTIONS)
    set_grads(a)
    ours.step(momentum_weight=0.1)
    # scalars, addresses, chunks
    assert sorted(map(str, sent)) == ["torch.float64", "torch.int32", "torch.int64"]
    sent.clear()
    for value in (1.0, 2.0):
        for p in a:
            p.grad.fill_(value)
        ours.step(momentum_weight=0.1)
    assert not sent
    ours.step(momentum_weight=0.2)
    assert sent == [torch.float64]
    sent.clear()
    kept = [p.grad for p in a]
    set_grads(a)
    ours.step(momentum_weight=0.2)
    # gradients in new storage: addresses, but not the chunks
    assert sent == [torch.int64] and kept


def test_empty_tensors(path):
    a = [torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.ones(2))]
    ours = AdamWEma(a, **OPTIONS)
    ours.step()
    assert ours.skipped is None
    for p in a:
        p.grad = torch.ones_like(p)
    ours.step(max_norm=1.0)
    assert ours.state[a[0]]["step"] == 1 and float(a[1].detach().max()) < 1
    AdamWEma(a[:1], **OPTIONS).step()


def test_loaded_state_in_new_storage_is_found(path):
    a, b, ours, _ = pair([(5,), (6,)])
    other = AdamWEma(b, **OPTIONS)
    for optimizer in (ours, other):
        set_grads(a, b)
        optimizer.step()
        other.load_state_dict(copy.deepcopy(ours.state_dict()))
        with torch.no_grad():
            torch._foreach_copy_(b, a)
    set_grads(a, b)
    ours.step(), other.step()
    assert equal(a, b)


def test_a_backward_pass_through_changed_weights_fails_as_after_torchs(path):
    p, e = torch.nn.Parameter(torch.ones(3)), torch.ones(3)
    copies = [torch.ones(3, dtype=torch.float16) for _ in range(2)]
    ours = AdamWEma([p], teacher={p: e}, shadow={p: copies[0]}, teacher_shadow={p: copies[1]}, **OPTIONS)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    ours.step(momentum_weight=0.1)
    changed = [p, e, *copies]
    before = [t._version for t in changed]
    ours.step(momentum_weight=0.1)
    assert all(t._version > v for t, v in zip(changed, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_that_was_cleared_starts_anew(path):
    a, _, ours, _ = pair([(5,), (6,)])
    for _ in range(2):
        set_grads(a)
        ours.step()
    ours.state.clear()
    ours.step()
    assert all(ours.state[p]["step"] == 1 for p in a)


def test_unaligned_tensors_and_strided_gradients():
    base = torch.randn(5001)
    p, q = torch.nn.Parameter(base[1:]), torch.nn.Parameter(base[1:].clone())
    assert p.data_ptr() % 16
    ours, torchs = AdamWEma([p], **OPTIONS), torch.optim.AdamW([q], **OPTIONS)
    for g in (torch.randn(5000, 2)[:, 0], torch.ones(1).expand(5000)):
        p.grad, q.grad = g, g.clone()
        ours.step(), torchs.step()
    close([p], [q])


def test_poisoned_buffers_and_repeats(poisoned):
    def run():
        torch.manual_seed(0)
        a, teacher = make()
        ours = AdamWEma(a, teacher=dict(zip(a, teacher, strict=True)), **OPTIONS)
        for _ in range(3):
            set_grads(a)
            ours.step(momentum_weight=0.1, max_norm=0.5)
        return [*a, *teacher]

    assert_repeats(run)


@pytest.mark.parametrize("change", ["teacher.half", "double", "channels_last"])
def test_a_module_converted_after_its_optimizer_was_made_is_an_error(change):
    student, teacher = (torch.nn.Conv2d(3, 4, (2, 3)) for _ in range(2))
    pairs = zip(student.parameters(), teacher.parameters(), strict=True)
    ours = AdamWEma(student.parameters(), teacher=pairs, **OPTIONS)
    set_grads(list(student.parameters()))
    ours.step(momentum_weight=0.1)
    {
        "teacher.half": teacher.half,
        "double": student.double,
        "channels_last": lambda: student.to(memory_format=torch.channels_last),
    }[change]()
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    before = [p.clone() for p in student.parameters()]
    with pytest.raises(ValueError, match="make the optimizer after that"):
        ours.step(momentum_weight=0.1)
    assert all(map(torch.equal, before, student.parameters()))


def test_a_graph_keeps_the_numbers_it_reads(monkeypatch):
    (p,) = make(sizes=[(5,)])[0]
    ours = AdamWEma([p], **OPTIONS)
    set_grads([p])
    ours.step(max_norm=1.0)
    monkeypatch.setattr(op, "_captured", [])
    with monkeypatch.context() as recording:
        recording.setattr(op, "_capturing", lambda device: True)
        ours.step(max_norm=1.0)
    read = ours._settings
    ours.param_groups[0]["lr"] = 2e-2
    ours.step(max_norm=1.0)
    assert read is not ours._settings and any(read is t for pair in op._captured for t in pair)


def test_errors():
    (p, q), low = make(sizes=[(5,), (5,)])[0], torch.zeros(5, dtype=torch.bfloat16)
    cases = [
        ([torch.nn.Parameter(low)], {}, "params: expected contiguous float32, got bfloat16"),
        ([p], {"teacher": {p: torch.zeros(4)}}, r"teacher: expected float32 \[5\], got float32 \[4\]"),
        ([p], {"teacher": {p: torch.zeros(10)[::2]}}, "teacher: .* is not contiguous"),
        ([p], {"teacher": {p: low}}, r"teacher: expected float32 \[5\], got bfloat16"),
        ([p], {"teacher": {torch.zeros(5): torch.zeros(5)}}, "is no parameter of this optimizer"),
        ([p], {"shadow": {p: torch.zeros(5)}}, r"shadow: expected bfloat16 \| float16"),
        ([p, q], {"shadow": {p: low, q: low.half()}}, "shadow: expected one of bfloat16, float16"),
        ([p], {"teacher_shadow": {p: low}}, r"teacher_shadow: bfloat16 .* without a teacher"),
        ([p, q], {"shadow": {p: low, q: low}}, "shadow: one tensor belongs to two parameters"),
    ]
    assert_errors(AdamWEma, [((params,), options, words) for params, options, words in cases])
    ours = AdamWEma([p])
    with pytest.raises(ValueError, match="params: expected contiguous float32, got float16"):
        ours.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))]})
    assert len(ours.param_groups) == 1
    p.grad = torch.ones(5).to_sparse()
    with pytest.raises(ValueError, match=r"grad of float32 \[5\]: expected dense, got torch.sparse_coo"):
        ours.step()
    mixed = [torch.nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.float64)]
    for x in mixed:
        x.grad = torch.ones_like(x)
    with pytest.raises(ValueError, match="params: expected one device and one dtype"):
        AdamWEma(mixed).step()
