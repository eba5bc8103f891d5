"""Time per component of a step, read from a Chrome trace of torch's profiler.

A trace holds ranges named `extrema:STEP`, `extrema:student/trunk`, ... (`ops/scope.py`), the ops inside them and, on
a GPU, the kernels that these launched. Each op is assigned to a component of the method:

    forward   the innermost range around the op
    backward  the range of the forward op with the same autograd sequence number
    trunk     split by the kind of op: matmul, attention, or the rest
    compiled  compiled regions outside every range, and replayed CUDA graphs, are separate components

On a CPU the time of an op excludes the ops that it calls, so that components add up to the step; on a GPU it is the
time of its kernels.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import UsageError
from ..ops.scope import PREFIX

STEP = PREFIX + "STEP"
COMPILED, GRAPH = "compiled graph", "CUDA graph"
LINEARS, ATTENTION, REST = "trunk linears", "attention", "norm, GELU, residual, casts"
MATMUL, FUSED = "matmul", "fused elementwise"
ACCUMULATE, OUTSIDE, DATA = "gradient norm, accumulation", "Python and engine", "data"
# in the order a step runs them; what is found beyond these follows. Compiled, pooling and heads are one region
PARTS = ("embed", LINEARS, ATTENTION, REST, "pooling", "heads", "pooling, heads")
ORDER = [
    ("", DATA), ("", "augment"), ("", "masks"), *(("teacher", p) for p in PARTS),
    *(("student", p) for p in PARTS), ("", "loss"),
    *((b, p) for b in (COMPILED, GRAPH) for p in (MATMUL, ATTENTION, FUSED)),
    ("", ACCUMULATE), ("", "optimizer and EMA"), ("", "other"), ("", OUTSIDE),
]  # fmt: skip

# matmuls with known shapes: op -> where its two factors are in the list of arguments
_FACTORS = {"aten::mm": 0, "aten::bmm": 0, "aten::_scaled_mm": 0, "mkldnn::_linear_pointwise": 0}
_FACTORS |= {"aten::addmm": 1, "aten::baddbmm": 1, "aten::_addmm_activation": 1}
_IS_ATTENTION = re.compile(r"attention|flash|fmha|softmax|bmm|^_Matmul", re.IGNORECASE)
_IS_MATMUL = re.compile(
    r"^aten::(mm|addmm|linear|_scaled_mm|_addmm_activation)$|_linear_pointwise|^(Add)?mmBackward"
    r"|gemm|nvjet|cutlass|triton_tem|wgmma",
    re.IGNORECASE,
)
_IS_REGION = re.compile(r"^Torch-Compiled Region|^CompiledFunction|CompiledFxGraph")
_NODE = "autograd::engine::evaluate_function: "
_HOST = {"cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"}
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass
class Event:
    """One thing on a thread or on the device; times in microseconds."""

    name: str
    kind: str
    start: float
    end: float
    thread: Any
    args: dict[str, Any]
    parent: Event | None = None
    children_us: float = 0.0

    @property
    def own_us(self) -> float:
        return max(0.0, self.end - self.start - self.children_us)

    @cached_property
    def up(self) -> list[Event]:
        """The event, then everything around it, outwards."""
        return [self, *(self.parent.up if self.parent else ())]

    @property
    def is_backward(self) -> bool:
        return any(e.name.startswith(_NODE) for e in self.up)

    @cached_property
    def flop(self) -> float:
        """Of a matmul, from its shapes; 0 for any other op."""
        if self.name not in _FACTORS:
            return 0.0
        first = _FACTORS[self.name]
        columns = 0 if self.name.startswith("mkldnn") else -1
        try:
            a, b = self.args["Input Dims"][first : first + 2]
            return 2.0 * math.prod(a) * b[columns]
        except (KeyError, ValueError, IndexError):
            return 0.0

    @property
    def matmul(self) -> Event | None:
        """The outermost matmul that the event is part of."""
        return next((e for e in reversed(self.up) if e.flop), None)


@dataclass
class Row:
    """Time and matmuls of one component over all steps of a trace."""

    branch: str
    component: str
    forward_us: float = 0.0
    backward_us: float = 0.0
    matmul_us: float = 0.0
    flop: float = 0.0

    @property
    def us(self) -> float:
        return self.forward_us + self.backward_us


class Breakdown:
    """Where the time in a list of trace events went; times are sums over `steps`.

    Attributes:
        on_device: times are of kernels on a GPU, not of ops on the CPU.
        wall_us: of the steps: on a GPU from the first kernel to the last one.
        busy_us: of `wall_us`, when an op or a kernel ran.
        ops: (component, op or kernel) -> us.
    """

    def __init__(self, events: list[dict[str, Any]]) -> None:
        host, device = _parse(events)
        _nest(host)
        self.host = host
        self.spans = [e for e in host if e.name == STEP]
        self.steps, self.on_device = len(self.spans), bool(device)
        self.forward = {
            e.args["Sequence number"]: e
            for e in sorted(host, key=lambda e: e.start)
            # of ops in the backward pass, those with a number run a forward op again and have a thread to point to
            if e.args.get("Sequence number", -1) >= 0
            and not e.args.get("Fwd thread id")
            and not e.is_backward
        }
        self.table: dict[tuple[str, str], Row] = {}
        self.ops: dict[tuple[str, str], float] = defaultdict(float)
        if device:
            self._count_kernels(device)
        else:
            self._count_ops()

    @property
    def rows(self) -> list[Row]:
        order = {key: i for i, key in enumerate(ORDER)}
        return [self.table[key] for key in sorted(self.table, key=lambda key: order.get(key, len(order)))]

    def _add(self, place: tuple[str, str, bool], name: str, us: float) -> Row:
        branch, component, backward = place
        row = self.table.setdefault((branch, component), Row(branch, component))
        if backward:
            row.backward_us += us
        else:
            row.forward_us += us
        self.ops[f"{branch} {component}".strip(), name] += us
        return row

    def _in_step(self, event: Event) -> bool:
        return any(s.start <= event.start < s.end for s in self.spans)

    def _count_ops(self) -> None:
        for e in self.host:
            # loader threads run next to the step
            if e.thread != self.spans[0].thread or not self._in_step(e):
                continue
            row = self._add(self._place(e), e.name, e.own_us)
            if e.matmul is not None:
                row.matmul_us += e.own_us
                row.flop += e.flop if e is e.matmul else 0
        self.wall_us = sum(s.end - s.start for s in self.spans)
        self.busy_us = self.wall_us - sum(r.us for r in self.rows if r.component == OUTSIDE)

    def _count_kernels(self, device: list[Event]) -> None:
        launches = {
            e.args["correlation"]: e for e in self.host if "correlation" in e.args and e.kind != "cpu_op"
        }
        method_threads = {e.thread for e in self.host if e.kind == "cpu_op"} | {s.thread for s in self.spans}
        by_id = {
            e.args["External id"]: e for e in self.host if e.kind == "cpu_op" and "External id" in e.args
        }
        counted: set[int] = set()
        first, until = math.inf, 0.0
        self.busy_us = 0.0
        for kernel in sorted(device, key=lambda k: k.start):
            launch = launches.get(kernel.args.get("correlation"))
            if launch is None or not self._in_step(launch):
                continue
            us, what = kernel.end - kernel.start, _kernel_is(kernel)
            # streams overlap
            self.busy_us += max(0.0, kernel.end - max(kernel.start, until))
            first, until = min(first, kernel.start), max(until, kernel.end)
            # a driver may name threads in its own way; the tracer's number of the op remains
            op = by_id.get(kernel.args.get("External id"))
            caller = launch.parent if launch.thread in method_threads else op
            replayed = "GraphLaunch" in launch.name
            if replayed:
                place = GRAPH, {"matmul": MATMUL, "attention": ATTENTION}.get(what, FUSED), False
            elif caller is None and launch.thread not in method_threads:
                # the image reader's own threads
                place = "", DATA, False
            else:
                place = self._place(caller, _what(caller) or what)
                if place[1] in ("other", OUTSIDE):
                    upload = kernel.kind == "gpu_memcpy" and "HtoD" in kernel.name
                    place = "", DATA if upload else "other", False
            row = self._add(place, kernel.name, us)
            inner = launch.parent or op
            matmul = inner.matmul if inner else None
            if matmul is not None or (replayed and what == "matmul"):
                row.matmul_us += us
            if matmul is not None and id(matmul) not in counted:
                counted.add(id(matmul))
                row.flop += matmul.flop
        if not self.table:
            raise UsageError("the trace has kernels, but none launched inside a step")
        self.wall_us = until - first

    def _place(self, event: Event | None, what: str = "") -> tuple[str, str, bool]:
        """(branch, component, backward?) of an op; `what`: known already, e.g. from a kernel's name."""
        if event is None:
            return "", "other", False
        what = what or _what(event)
        in_region = False
        for e in event.up:
            if e.name.startswith(PREFIX) and e.name != STEP:
                branch, _, scope = e.name.removeprefix(PREFIX).rpartition("/")
                if scope == "trunk":
                    scope = {"matmul": LINEARS, "attention": ATTENTION}.get(what, REST)
                return branch, scope, event.is_backward
            if e.name.startswith(_NODE):
                number = e.args.get("Sequence number", -1)
                if number < 0:
                    return "", ACCUMULATE, True
                return *self._place(self.forward.get(number), what)[:2], True
            in_region = in_region or bool(_IS_REGION.search(e.name))
        if in_region:
            return COMPILED, {"matmul": MATMUL, "attention": ATTENTION}.get(what, FUSED), False
        return "", OUTSIDE if event.name == STEP else "other", False


def _parse(events: list[dict[str, Any]]) -> tuple[list[Event], list[Event]]:
    host: list[Event] = []
    device: list[Event] = []
    for e in events:
        kind = e.get("cat")
        if e.get("ph") == "X" and (kind in _HOST or kind in _DEVICE):
            start, thread = float(e["ts"]), (e.get("pid"), e.get("tid"))
            event = Event(e["name"], kind, start, start + float(e["dur"]), thread, e.get("args", {}))
            (host if kind in _HOST else device).append(event)
    return host, device


def _nest(host: list[Event]) -> None:
    """Sets every event's parent: what runs around it on its thread."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for e in host:
        threads[e.thread].append(e)
    for line in threads.values():
        # two that begin and end together: ranges are around ops, and ops around launches
        line.sort(key=lambda e: (e.start, -e.end, e.kind != "user_annotation", e.kind != "cpu_op"))
        stack: list[Event] = []
        for e in line:
            while stack and stack[-1].end <= e.start:
                stack.pop()
            if stack:
                # the file's rounding can let a child end after its parent
                e.parent, e.end = stack[-1], min(e.end, stack[-1].end)
                e.parent.children_us += e.end - e.start
            stack.append(e)


def _what(event: Event | None) -> str:
    """`matmul`, `attention` or "" of an op, by its name or the nearest op around it with a telling one."""
    for e in event.up if event else ():
        if e.name.startswith(PREFIX):
            break
        name, dims = e.name.removeprefix(_NODE), e.args.get("Input Dims", [])
        # a fused kernel carries the names of everything fused into it
        batched = name == "aten::matmul" and len(dims) > 1 and len(dims[1]) > 2
        if batched or _IS_ATTENTION.search(name):
            return "attention"
        if _IS_MATMUL.search(name) and "_fused_" not in name:
            return "matmul"
        if "_fused_" in name or e.name.startswith(_NODE):
            break
    return ""


def _kernel_is(kernel: Event) -> str:
    if _IS_ATTENTION.search(kernel.name):
        return "attention"
    return "matmul" if _IS_MATMUL.search(kernel.name) else ""
