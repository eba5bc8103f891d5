"""Bytes that a training step's trunk moves outside matmuls and attention, counted while it runs; no speed.

Every launch is counted by what it must read and write: inductor's kernels and torch's own ops by the sizes of their
arguments and results, this project's ops likewise. Matmuls and attention count only what they move beyond a plain
matmul or attention (an epilogue's second input or output). Needs a CUDA device, or the null GPU (tests/nullgpu).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from extrema_fast.config import Config

from .baselines import Ours

# whose arguments and results count as a matmul's or attention's own
MATMULS = re.compile(r"^aten::(mm|addmm|bmm|baddbmm|_addmm_activation)$")
ATTENTION = re.compile(r"attention")
# allocate, or change no more than how memory is read
FREE = re.compile(r"^aten::(empty|new_empty|detach|_?to_copy_meta|resize_|set_|record_stream)")


class Traffic(TorchDispatchMode):
    """Bytes by op; `rows` may be read when the block has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def add(self, name: str, count: int) -> None:
        """Counts one call."""
        self.rows[name] += count
        self.calls[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        inputs, outputs = (_tensors(x) for x in ((args, kwargs), out))
        if name.startswith("extrema_fast::"):
            self.add(name.removeprefix("extrema_fast::"), own_bytes(name, inputs, outputs))
        elif not (MATMULS.match(name) or ATTENTION.search(name) or FREE.match(name) or _is_view(func)):
            self.add(name, _bytes(inputs + outputs))
        return out


def own_bytes(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """What an op of this project moves outside matmuls and attention: every argument and result once, and its partial
    sums once each way."""
    if ATTENTION.search(name):
        return 0
    if name.endswith("linear_gelu"):
        # beyond x, weight and g: h
        return _bytes(outputs[1:])
    if name.endswith("linear_dgelu"):
        # beyond dy, weight and dh: h, and one row of sums per 128 tokens
        dy, _, h = inputs
        return _bytes([h]) + 2 * -(-dy.numel() // dy.shape[-1] // 128) * _bytes(outputs[1:])
    sums = 0
    if name.endswith(("residual_norm_bwd", "gelu_bwd")):
        import importlib

        from extrema_fast.kernels import mlp, residual_norm  # noqa: F401

        op = "mlp" if name.endswith("gelu_bwd") else "residual_norm"
        kernel = importlib.import_module(f"extrema_fast.kernels.{op}.kernel")
        partial = outputs[-1]
        count = kernel.programs(partial.device)
        if op == "mlp":
            count = max(1, count // -(-partial.numel() // 256))
        sums = 2 * count * _bytes([partial])
    return _bytes(inputs + outputs) + sums


def _tensors(tree: Any) -> list[Tensor]:
    # the same memory twice is read once
    found = {
        (t.data_ptr(), t.shape): t
        for t in pytree.tree_leaves(tree)
        if isinstance(t, Tensor) and t.device.type == "cuda" and t.numel()
    }
    return list(found.values())


def _bytes(tensors: list[Tensor]) -> int:
    total = 0
    for t in tensors:
        # an expanded axis is read once
        sizes = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride]
        total += torch.Size(sizes).numel() * t.element_size()
    return total


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts what graphs that inductor compiled before the block do inside it."""
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    traffic, call, run = Traffic(), CompiledFxGraph.__call__, CachingAutotuner.run

    def counted_call(self: Any, inputs: Any) -> Any:
        # no graph is found again under a dispatch mode, so it is entered inside
        with traffic:
            return call(self, inputs)

    def counted_run(self: Any, *args: Any, **options: Any) -> Any:
        pairs = zip(self.fn.arg_names, args, strict=False)
        tensors = [(name, x) for name, x in pairs if isinstance(x, Tensor)]
        written_too = [x for name, x in tensors if name.startswith("in_out")]
        traffic.add(f"inductor {self.fn.__name__}", _bytes([x for _, x in tensors] + written_too))
        return run(self, *args, **options)

    with mock.patch.object(CompiledFxGraph, "__call__", counted_call):
        with mock.patch.object(CachingAutotuner, "run", counted_run):
            yield traffic


def traffic(cfg: Config, device: str = "cuda", **settings: Any) -> dict[str, Any]:
    """Counts one forward and backward pass of the student's trunk and one forward pass of the teacher's.

    Args:
        cfg: of the step.
        device: where it runs.
        settings: dotted options, as of `baselines.Ours`.

    Returns:
        `student_D`, `teacher_D`: bytes per token, width and block; `rows`: the same by op, with calls per block.
    """
    run = Ours(cfg, torch.device(device), "bf16", **settings).run
    method, model = run.method, cfg.model
    images, views = cfg.train.batch_size, cfg.mask.views
    width, depth, _ = model.shape
    rows = images * views
    path = (torch.rand(depth, 2, rows, device=device) > 0.1).float() if model.drop_path else None
    found: dict[str, Any] = {"rows": []}

    def student() -> None:
        tokens = torch.zeros(
            rows, cfg.num_keep, width, device=device, dtype=torch.bfloat16, requires_grad=True
        )
        with run.resolved.autocast():
            out = method.student.trunk(tokens, path)
        out.backward(upstream)

    def teacher() -> None:
        tokens = torch.zeros(images, model.num_patches, width, device=device, dtype=torch.bfloat16)
        with torch.no_grad(), run.resolved.autocast():
            method.teacher.trunk(tokens)

    upstream = torch.zeros(rows, cfg.num_keep, width, device=device, dtype=torch.bfloat16)
    for name, step, tokens in (
        ("student", student, rows * cfg.num_keep),
        ("teacher", teacher, images * model.num_patches),
    ):
        for _ in range(2):
            method.zero_grad()
            step()
        method.zero_grad()
        with counting() as counted:
            step()
        unit = tokens * width * depth
        for op, count in counted.rows.most_common():
            found["rows"].append(
                {"network": name, "op": op, "D": round(count / unit, 3), "calls": counted.calls[op] / depth}
            )
        found[f"{name}_D"] = round(sum(counted.rows.values()) / unit, 2)
    return found
