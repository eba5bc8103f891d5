"""A run on Apple's GPU (MPS), without one.

Tensors say that they are on MPS and compute on the CPU. One of float64 or complex numbers, or an operation between MPS
and a tensor of the CPU, is an error, as it is there. What this shows: what is on the device, and of which type. It
cannot show that MPS has a kernel for each operation.

Covers: training, evaluation, checkpoint and continuation; the results are those of a CPU; which device is taken;
settings that MPS does not have.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from extrema_fast.distributed import double, pick_device, wide
from extrema_fast.errors import UsageError
from extrema_fast.files import read_log
from extrema_fast.models.positions import resample_patch_kernel
from extrema_fast.ops import stock
from extrema_fast.train import pretrain
from extrema_fast.training.checkpoint import newest
from extrema_fast.training.resolve import precision, resolve
from tests.training.conftest import tiny

CPU, MPS = torch.device("cpu"), torch.device("mps", 0)
WIDE = (torch.float64, torch.complex64, torch.complex128)


class OnMps(Tensor):
    """A tensor that is on MPS for Python, and on no device with kernels (meta) for C++; `inner` holds its values."""

    inner: Tensor
    # without it results would be turned into this class
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: MPS)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnMps:
        if inner.dtype in WIDE:
            raise TypeError(f"MPS has no {inner.dtype}")
        options: dict[str, Any] = {"strides": inner.stride(), "dtype": inner.dtype, "device": "meta"}
        found = Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Mps(TorchDispatchMode):
    """New tensors on MPS, and copies to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


# between devices, or with an index on the CPU
BETWEEN = (
    "aten::copy_",
    "aten::_to_copy",
    "aten::index.Tensor",
    "aten::index_put_",
    "aten::_index_put_impl_",
)


def compute(func, args, kwargs) -> Any:
    if torch.is_inference_mode_enabled():
        # a view of a tensor of another mode cannot be a subclass
        with torch.inference_mode(False), torch.no_grad():
            return compute(func, args, kwargs)
    flat, spec = pytree.tree_flatten((args, kwargs))
    ours = {id(x.inner): x for x in flat if isinstance(x, OnMps)}
    given = kwargs.get("device")
    to = MPS if given is not None and torch.device(given).type in ("mps", "meta") else given
    if ours and not func.name().startswith(BETWEEN):
        others = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnMps)]
        if any(x.dim() for x in others):
            raise RuntimeError(f"{func.name()}: a tensor is on MPS, another one on the CPU")
    # `copy_` and the like give back what they have written to
    there = to == MPS if to is not None else bool(ours)
    flat = [x.inner if isinstance(x, OnMps) else x for x in flat]
    flat = [CPU if isinstance(x, torch.device) else x for x in flat]
    args, kwargs = pytree.tree_unflatten(flat, spec)
    found = func(*args, **kwargs)
    if func.name().startswith("aten::copy_"):
        there = id(found) in ours

    def on_device(x: Any) -> Any:
        if not isinstance(x, Tensor) or not there:
            return x
        return ours[id(x)] if id(x) in ours else OnMps(x)

    return pytree.tree_map(on_device, found)


@pytest.fixture
def mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 << 30)
    monkeypatch.setattr(stock, "PLAIN", stock.PLAIN | {OnMps})
    with Mps():
        yield


def test_the_stand_in_fails_where_mps_does(mps):
    x = torch.ones(3, device=MPS)
    assert isinstance(x, OnMps) and x.device == MPS and (x + 1).sum().item() == 6
    assert isinstance(torch.zeros_like(x), OnMps) and type(x.cpu()) is Tensor
    with pytest.raises(TypeError, match="float64"):
        x.double()
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(2, dtype=torch.float64, device=MPS)
    with pytest.raises(RuntimeError, match="another one on the CPU"):
        x + torch.ones(3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": {"loss": "infonce"}, "train": {"accumulation": 2}, "optim": {"clip_grad": 0.1}}
        | {"data": {"policy": "spatial"}, "model": {"in_chans": 1}, "mask": {"mode": "independent"}},
    ],
)
def test_a_run_is_that_of_a_cpu_and_continues(mps, tmp_path, changes):
    common = {"train": {"epochs": 1}, "eval": {"every_epochs": 1}, "ckpt": {"every_steps": 2}}
    ends, logs = [], []
    for device in ("auto", "auto", "cpu"):
        run = pretrain(tiny(tmp_path / device, common, changes, system={"device": device}), progress=False)
        last = newest(run)
        assert last is not None and last.step == 3 and last.tensors()["counters"].dtype == torch.float64
        ends.append(last.tensors())
        logs.append(read_log(run / "log.jsonl"))
        if len(ends) == 1:
            assert any(r.get("memory_gb") == (3 << 30) / 1e9 for r in logs[0])
            shutil.rmtree(last.path)
            (run / "status.json").unlink()
    for name, tensor in ends[0].items():
        # the second run continued from step 2
        assert torch.equal(tensor, ends[1][name]), name
        if name.endswith("weight"):
            assert (tensor - ends[2][name]).norm() <= 1e-3 * tensor.norm(), name
    for a, b in zip(logs[0], logs[2], strict=True):
        assert a["kind"] == b["kind"] and a["step"] == b["step"]
        for key in ("loss", "grad_norm", "knn_cls", "teacher_rank", "teacher_std", "view_cosine"):
            assert (a.get(key) is None) == (b.get(key) is None)
            assert a.get(key) is None or a[key] == pytest.approx(b[key], rel=1e-3), key


def test_float64_is_left_to_the_cpu(mps):
    x = torch.ones(2, 3, 4, 4, device=MPS)
    assert double(x).dtype == torch.float64 and double(x).device == CPU
    assert isinstance(resample_patch_kernel(x, 8), OnMps)


def test_which_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    with pytest.raises(UsageError, match=r"system\.device"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("mps") == MPS and pick_device("cpu") == CPU
    # processes exchange gradients on a CPU
    assert pick_device("auto", processes=2) == CPU
    with pytest.raises(UsageError, match="one process"):
        pick_device("mps", processes=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto").type == "cuda"
    assert [wide(d) for d in ("cpu", "cuda", "mps")] == [torch.float64, torch.float64, torch.float32]


def test_settings():
    settled = resolve(tiny(), MPS)
    assert (settled.device, settled.precision, settled.compile) == ("mps", "fp32", "none")
    assert not settled.shadow_weights and settled.ops["adamw_ema"] == "reference"
    assert settled.attention == "sdpa" and precision("bf16", "mps") == "bf16"
    for changes, word in (
        ({"train": {"cuda_graph": "on"}}, "cuda_graph"),
        ({"optim": {"name": "lamb"}}, "optim.name"),
        ({"system": {"backend": "token_gather=triton"}}, "token_gather"),
    ):
        with pytest.raises(UsageError, match=word):
            resolve(tiny("unused", changes), MPS)
