"""Bytes that the trunk of a training step moves outside matmuls and attention, counted while it runs; no speed.

Every launch counts what it must read and write, each argument and result once: inductor's kernels by their
arguments, torch's own ops and this project's likewise, partial sums once each way. A matmul counts what it moves beyond
a plain one (an epilogue's second input or output), attention nothing. Used by `python -m benchmarks step_bytes`.
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
from extrema_fast.ops.dispatch import GPU_RULE

from .baselines import Ours

# matmuls and attention, and ops that move nothing
FREE = re.compile(r"aten::(mm|addmm|bmm|baddbmm|empty.*|new_empty.*|detach|resize_)$|.*attention")

# kernels that are matmuls -> the arguments that a plain one lacks
BEYOND_MATMUL = {"linear_gelu_kernel": ("h_ptr",), "linear_dgelu_kernel": ("h_ptr", "sums_ptr")}


class Traffic(TorchDispatchMode):
    """Bytes and calls by op, of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def add(self, name: str, count: int) -> None:
        """Counts one call."""
        self.bytes[name] += count
        self.calls[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not (is_view or FREE.match(name)):
            inputs, outputs = _tensors((args, kwargs)), _tensors(out)
            own = _own_bytes(name.partition("::")[2], inputs, outputs)
            self.add(name, _bytes(inputs + outputs) if own is None else own)
        return out


def _own_bytes(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int | None:
    """Of this project's ops that are matmuls or have partial sums; None for all others."""
    if name == "linear_gelu":
        # beyond x, weight and g: h, where it is kept
        return _bytes(outputs[1:])
    if name == "linear_dgelu":
        # beyond dy, weight and dh: h, and a partial row for each 128 tokens
        dy, _, h = inputs
        return _bytes([h]) + 2 * -(-dy[..., 0].numel() // 128) * _bytes(outputs[1:])
    if name not in ("residual_norm_bwd", "gelu_bwd"):
        return None
    sums = outputs[-1]
    if name == "residual_norm_bwd":
        from extrema_fast.kernels.residual_norm import kernel

        x = next(t for t in inputs if t.dim() > 2)
        settings = kernel.heuristic("bwd", x.shape[-1], x.element_size())
        rows = kernel.programs(sums.device, settings["num_warps"])
    else:
        from extrema_fast.kernels.mlp.kernel import programs

        rows = programs(sums.device) // -(-sums.numel() // 256)
    return _bytes(inputs + outputs) + 2 * max(rows, 1) * _bytes([sums])


def _tensors(tree: Any) -> list[Tensor]:
    # one tensor in two places is read once
    found = [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]
    return list({(t.data_ptr(), t.shape): t for t in found if t.numel()}.values())


def _bytes(tensors: list[Tensor]) -> int:
    total = 0
    for t in tensors:
        # an expanded axis is read once
        sizes = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride]
        total += torch.Size(sizes).numel() * t.element_size()
    return total


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts what graphs that inductor compiled earlier do inside."""
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    traffic, call, run = Traffic(), CompiledFxGraph.__call__, CachingAutotuner.run

    def counted_call(self: Any, inputs: Any) -> Any:
        # torch.compile finds no earlier graph under a dispatch mode, so it is entered here
        with traffic:
            return call(self, inputs)

    def counted_run(self: Any, *args: Any, **options: Any) -> Any:
        # this project's kernels are launched by compiled code, too
        name = self.fn.__name__
        given = {n: x for n, x in zip(self.fn.arg_names, args, strict=False) if isinstance(x, Tensor)}
        if "attention" not in name:
            beyond = BEYOND_MATMUL.get(name, given)
            # read and written
            both = [x for n, x in given.items() if n.startswith("in_out")]
            traffic.add(f"kernel::{name}", _bytes(_tensors([given[n] for n in beyond]) + both))
        return run(self, *args, **options)

    with (
        mock.patch.object(CompiledFxGraph, "__call__", counted_call),
        mock.patch.object(CachingAutotuner, "run", counted_run),
    ):
        yield traffic


def backend(**named: str) -> str:
    """`system.backend`: the fixed rule for a GPU with these ops by name, so that nothing is measured."""
    if not named:
        return "fixed"
    # attention's rule is not in the table: `triton` is the kernel where it fits
    rule = {"attention": "triton"} | {op: names[0] for op, names in GPU_RULE.items()} | named
    return ",".join(f"{op}={name}" for op, name in rule.items())


def traffic(cfg: Config, device: str = "cuda", **named: str) -> dict[str, Any]:
    """Counts one forward and backward pass of the student's trunk and one forward pass of the teacher's.

    Args:
        cfg: of the step.
        device: where it runs.
        named: implementations of ops, in place of the fixed rule's.

    Returns:
        `student_D`, `teacher_D`: bytes per token, unit of width and block (reading or writing one 16-bit activation
        is 2); `passes`: the same by op, with calls per block.
    """
    run = Ours(cfg, torch.device(device), "bf16", **{"system.backend": backend(**named)}).run
    method, model, images = run.method, cfg.model, cfg.train.batch_size
    rows, kept = images * cfg.mask.views, cfg.num_keep
    width, depth, _ = model.shape
    path = torch.ones(depth, 2, rows, device=device) if model.drop_path else None
    upstream = torch.zeros(rows, kept, width, device=device, dtype=torch.bfloat16)
    whole = torch.zeros(images, model.num_patches, width, device=device, dtype=torch.bfloat16)

    def student() -> None:
        tokens = torch.zeros_like(upstream, requires_grad=True)
        with run.resolved.autocast():
            out = method.student_branch.trunk(tokens, path)
        out.backward(upstream)

    def teacher() -> None:
        with torch.no_grad(), run.resolved.autocast():
            method.teacher_branch.trunk(whole)

    found: dict[str, Any] = {"passes": []}
    for name, step, tokens in (("student", student, upstream), ("teacher", teacher, whole)):
        for _ in range(2):
            method.zero_grad()
            step()
        method.zero_grad()
        with counting() as counted:
            step()
        unit = tokens.numel() * depth
        found[f"{name}_D"] = round(counted.bytes.total() / unit, 2)
        found["passes"] += [
            {"network": name, "op": op, "D": round(n / unit, 3), "calls": counted.calls[op] / depth}
            for op, n in counted.bytes.most_common()
        ]
    return found
