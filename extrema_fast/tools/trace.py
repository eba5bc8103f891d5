"""Where the time of a step goes, read from a Chrome trace of torch's profiler.

A trace holds ranges named `extrema:STEP`, `extrema:student/trunk`, ... (`profile.py` opens them), the ops inside
them and, on a GPU, the kernels these launched. Here each op is given to a component of the method:

    forward   the innermost range around the op
    backward  the range of the forward op with the same autograd sequence number
    trunk     split by what the op is: matmul, attention, or the rest
    compiled  a compiled region outside every range, and a replayed CUDA graph, are components of their own

On a CPU the time of an op is its own time without the ops it calls, so that components add up to the step;
on a GPU it is the time of its kernels.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..ops.scope import PREFIX

STEP = PREFIX + "STEP"
COMPILED, GRAPH = "compiled graph", "CUDA graph"
LINEARS, ATTENTION, REST = "trunk linears", "attention", "norm, GELU, residual, casts"
MATMUL, FUSED = "matmul", "fused elementwise"
ACCUMULATE, OUTSIDE, DATA = "gradient norm, accumulation", "Python and engine", "data"
# in the order a step runs them; what is found beyond these follows
PARTS = ("embed", LINEARS, ATTENTION, REST, "pooling", "heads")
ORDER = [
    ("", DATA), ("", "augment"), ("", "masks"), *(("teacher", p) for p in PARTS),
    *(("student", p) for p in PARTS), ("", "loss"),
    *((b, p) for b in (COMPILED, GRAPH) for p in (MATMUL, ATTENTION, FUSED)),
    ("", ACCUMULATE), ("", "optimizer and EMA"), ("", "other"), ("", OUTSIDE),
]  # fmt: skip

# multiplications: op -> its two factors in the list of arguments, and the axis of the second with the columns
_FACTORS = {
    "aten::mm": (0, 1, -1),
    "aten::bmm": (0, 1, -1),
    "aten::addmm": (1, 2, -1),
    "aten::baddbmm": (1, 2, -1),
    "aten::_addmm_activation": (1, 2, -1),
    "aten::_scaled_mm": (0, 1, -1),
    "mkldnn::_linear_pointwise": (0, 1, 0),
}
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
    thread: Any = None
    sequence: int = -1
    dims: list = field(default_factory=list)
    correlation: int = -1
    external: int = -1
    parent: Event | None = None
    children_us: float = 0.0

    @property
    def own_us(self) -> float:
        return max(0.0, self.end - self.start - self.children_us)

    def up(self) -> Iterator[Event]:
        """The event, then everything around it, outwards."""
        event: Event | None = self
        while event is not None:
            yield event
            event = event.parent

    @cached_property
    def flop(self) -> float:
        """Of a matmul, from its shapes; 0 for any other op."""
        if self.name not in _FACTORS:
            return 0.0
        first, second, axis = _FACTORS[self.name]
        try:
            return 2.0 * math.prod(self.dims[first]) * self.dims[second][axis]
        except (IndexError, TypeError):
            return 0.0


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


@dataclass
class Breakdown:
    """What `read` returns; times are sums over `steps`."""

    steps: int
    on_device: bool
    """times are of kernels on a GPU, not of ops on the CPU"""
    wall_us: float
    """of the steps: on a GPU from the first kernel to the last one"""
    busy_us: float
    """of `wall_us`, when an op or a kernel ran"""
    rows: list[Row]
    ops: list[tuple[str, str, float]]
    """(component, op or kernel, us), longest first"""


def load(path: str | Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, `.json` or `.json.gz`; raises UsageError when it is none."""
    path = Path(path)
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a Chrome trace ({type(error).__name__}: {error})") from None


def read(events: list[dict[str, Any]]) -> Breakdown:
    """The time of every component; raises UsageError for a trace without a step range."""
    host, device = _parse(events)
    _nest(host)
    steps = sorted((e for e in host if e.name == STEP), key=lambda e: e.start)
    if not steps:
        raise UsageError(f"the trace has no range {STEP!r}; make it with `extrema-fast profile`")
    forward = {e.sequence: e for e in sorted(host, key=lambda e: e.start) if _is_forward(e)}
    table: dict[tuple[str, str], Row] = {}
    ops: dict[tuple[str, str], float] = defaultdict(float)

    def add(place: tuple[str, str, bool], name: str, us: float) -> Row:
        branch, component, backward = place
        row = table.setdefault((branch, component), Row(branch, component))
        if backward:
            row.backward_us += us
        else:
            row.forward_us += us
        ops[f"{branch} {component}".strip(), name] += us
        return row

    if device:
        wall, busy = _count_kernels(device, host, steps, forward, add)
    else:
        wall = _count_ops(host, steps, forward, add)
        busy = wall - sum(r.us for r in table.values() if r.component == OUTSIDE)
    order = {key: i for i, key in enumerate(ORDER)}
    rows = sorted(table.values(), key=lambda r: order.get((r.branch, r.component), len(order)))
    longest = [(*key, us) for key, us in sorted(ops.items(), key=lambda item: -item[1]) if us > 0]
    return Breakdown(len(steps), bool(device), wall, busy, rows, longest)


def _parse(events: list[dict[str, Any]]) -> tuple[list[Event], list[Event]]:
    host: list[Event] = []
    device: list[Event] = []
    for e in events:
        kind = e.get("cat")
        if e.get("ph") != "X" or (kind not in _HOST and kind not in _DEVICE):
            continue
        args, start = e.get("args", {}), float(e["ts"])
        event = Event(
            e["name"],
            kind,
            start,
            start + float(e["dur"]),
            (e.get("pid"), e.get("tid")),
            # the forward op has no thread to point back to
            args.get("Sequence number", -1) if not args.get("Fwd thread id") else -1,
            args.get("Input Dims") or [],
            args.get("correlation", -1),
            args.get("External id", -1),
        )
        if e["name"].startswith(_NODE):
            event.sequence = args.get("Sequence number", -1)
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


def _is_forward(e: Event) -> bool:
    return e.sequence >= 0 and not any(x.name.startswith(_NODE) for x in e.up())


def _what(event: Event) -> str:
    """`matmul`, `attention` or "" of an op, by its name or the nearest op around it with a telling one."""
    for e in event.up():
        if e.name.startswith(PREFIX):
            break
        name = e.name.removeprefix(_NODE)
        # a fused kernel carries the names of everything fused into it
        batched = name == "aten::matmul" and len(e.dims) > 1 and len(e.dims[1]) > 2
        if batched or _IS_ATTENTION.search(name):
            return "attention"
        if _IS_MATMUL.search(name) and "_fused_" not in name:
            return "matmul"
        if "_fused_" in name or e.name.startswith(_NODE):
            break
    return ""


def _place(event: Event | None, forward: dict[int, Event], what: str = "") -> tuple[str, str, bool]:
    """(branch, component, backward?) of an op; `what`: known already, e.g. from a kernel's name."""
    if event is None:
        return "", "other", False
    what = what or _what(event)
    in_region = False
    for e in event.up():
        if e.name.startswith(PREFIX) and e.name != STEP:
            branch, _, scope = e.name.removeprefix(PREFIX).rpartition("/")
            if scope == "trunk":
                scope = {"matmul": LINEARS, "attention": ATTENTION}.get(what, REST)
            return branch, scope, any(x.name.startswith(_NODE) for x in e.up())
        if e.name.startswith(_NODE):
            if e.sequence < 0:
                return "", ACCUMULATE, True
            begun = forward.get(e.sequence)
            branch, component, _ = _place(begun, forward, what)
            return branch, component, True
        in_region = in_region or bool(_IS_REGION.search(e.name))
    if in_region:
        return COMPILED, {"matmul": MATMUL, "attention": ATTENTION}.get(what, FUSED), False
    return "", OUTSIDE if event.name == STEP else "other", False


def _outermost_matmul(event: Event | None) -> Event | None:
    found = None
    for e in event.up() if event is not None else ():
        found = e if e.flop else found
    return found


def _count_ops(host: list[Event], steps: list[Event], forward: dict[int, Event], add: Any) -> float:
    inside = _inside(steps)
    for e in host:
        # loader threads run beside the step
        if e.thread != steps[0].thread or not inside(e.start):
            continue
        row = add(_place(e, forward), e.name, e.own_us)
        matmul = _outermost_matmul(e)
        if matmul is not None:
            row.matmul_us += e.own_us
            row.flop += e.flop if e is matmul else 0
    return sum(s.end - s.start for s in steps)


def _count_kernels(
    device: list[Event], host: list[Event], steps: list[Event], forward: dict[int, Event], add: Any
) -> tuple[float, float]:
    launches = {e.correlation: e for e in host if e.correlation >= 0 and e.kind.startswith("cuda")}
    method_threads = {e.thread for e in host if e.kind == "cpu_op"} | {s.thread for s in steps}
    by_id = {e.external: e for e in host if e.kind == "cpu_op" and e.external >= 0}
    inside, seen, counted = _inside(steps), [], set()
    for kernel in device:
        launch = launches.get(kernel.correlation)
        if launch is None or not inside(launch.start):
            continue
        seen.append(kernel)
        what = _kernel_is(kernel)
        if "GraphLaunch" in launch.name:
            component = {"matmul": MATMUL, "attention": ATTENTION}.get(what, FUSED)
            place = GRAPH, component, False
        elif launch.thread not in method_threads and kernel.external not in by_id:
            # the image reader's own threads
            place = "", DATA, False
        else:
            # a driver may name threads in its own way; the tracer's number of the op remains
            caller = launch.parent if launch.thread in method_threads else by_id[kernel.external]
            place = _place(caller, forward, _what(caller) or what if caller is not None else what)
            if place[1] in ("other", OUTSIDE):
                upload = kernel.kind == "gpu_memcpy" and "HtoD" in kernel.name
                place = "", DATA if upload else "other", False
        row = add(place, kernel.name, kernel.end - kernel.start)
        matmul = _outermost_matmul(launch.parent or by_id.get(kernel.external))
        if matmul is not None or (place[0] == GRAPH and what == "matmul"):
            row.matmul_us += kernel.end - kernel.start
        if matmul is not None and id(matmul) not in counted:
            counted.add(id(matmul))
            row.flop += matmul.flop
    if not seen:
        raise UsageError("the trace has kernels, but none launched inside a step")
    busy, until = 0.0, 0.0
    for kernel in sorted(seen, key=lambda k: k.start):
        # streams overlap
        busy += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return until - min(k.start for k in seen), busy


def _kernel_is(kernel: Event) -> str:
    if _IS_ATTENTION.search(kernel.name):
        return "attention"
    return "matmul" if _IS_MATMUL.search(kernel.name) else ""


def _inside(steps: list[Event]) -> Any:
    starts = [s.start for s in steps]

    def inside(time: float) -> bool:
        i = bisect_right(starts, time) - 1
        return i >= 0 and time < steps[i].end

    return inside
