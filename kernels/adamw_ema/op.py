"""adamw_ema: tables of addresses on the device, and the optimizer (README.md)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Union

import torch
from torch import Tensor

from .. import _launch
from .._launch import check, describe
from .reference import adamw_ema_reference

LOW = (torch.bfloat16, torch.float16)
# not with `|`: Python 3.9 computes it
Pairs = Union[Mapping[Tensor, Tensor], Iterable[tuple[Tensor, Tensor]]]


# ---- tables on the device -------------------------------------------------------------------------


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    # the current device may be another
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


# what a captured graph reads at its replays must outlive every cache
_captured: list[tuple[Tensor, Tensor]] = []

# pinned memory cannot be had during a capture, where gradients in new storage need a new table: some is kept ready
_ready: list[Tensor] = []
READY = 3


def _stage(values: Tensor, capturing: bool) -> Tensor:
    """A pinned copy of values on the CPU; in memory that earlier calls kept ready when `capturing`."""
    size = values.nbytes
    fit = [x for x in _ready if x.numel() >= size]
    if not capturing:
        new = (torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(READY - len(fit)))
        _ready[:] = [*fit, *new]
        return values.pin_memory()
    if not fit:
        raise RuntimeError("adamw_ema: a CUDA graph can record a step only after one that ran as it is")
    _ready[:] = [x for x in _ready if x is not fit[0]]
    return fit[0][:size].view(values.dtype).view(values.shape).copy_(values)


def _send(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers on the device, without waiting for it; also while a CUDA graph is captured."""
    on_cpu = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return on_cpu.to(device)
    capturing = _capturing(device)
    on_cpu = _stage(on_cpu, capturing)
    sent = on_cpu.to(device, non_blocking=True)
    if capturing:
        _captured.append((on_cpu, sent))
    return sent


_cache: OrderedDict[tuple, Tensor] = OrderedDict()
CACHED = 80


def _cached(make: Callable[..., Tensor], *args: Any) -> Tensor:
    """`make(*args)`, once; what a capture makes is not kept, since it is there only at the graph's replays."""
    key = (make, *args)
    if key in _cache:
        _cache.move_to_end(key)
        return _cache[key]
    made = make(*args)
    if not _capturing(made.device):
        _cache[key] = made
        if len(_cache) > CACHED:
            _cache.popitem(last=False)
    return made


def _chunks(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """[chunks, 2] int32: tensor, chunk of it; by far the larger table, and it seldom changes."""
    counts = (torch.tensor(sizes) + block - 1) // block
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    chunk = torch.arange(len(tensor)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return _send(torch.stack([tensor, chunk], 1), torch.int32, device)


def rows(columns: list[list[int]]) -> Tensor:
    """[tensors, 11] int64 on the CPU (columns: kernel.py), without the gradients' addresses, which come last."""
    made = torch.tensor([columns[0], [0] * len(columns[0]), *columns[1:]], dtype=torch.int64).T
    # whether every address of the row allows 16-byte accesses
    aligned = (made[:, [0, 2, 3, 5, 6, 7]] % 16 == 0).all(1, keepdim=True)
    return torch.cat([made, aligned.long()], 1).contiguous()


def _table(grads: tuple[int, ...], others: Tensor, device: torch.device) -> Tensor:
    """[tensors, 11] int64; its key is every address in it, so gradients in new storage make a new one."""
    table, addresses = others.clone(), torch.tensor(grads, dtype=torch.int64)
    table[:, 1] = addresses
    table[:, 10] *= addresses % 16 == 0
    return _send(table, torch.int64, device)


def tables(
    others: Tensor, grads: tuple[int, ...], sizes: tuple[int, ...], block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(addresses [tensors, 11] int64, chunks of `block` elements [chunks, 2] int32); others: `rows`."""
    made = _cached(_table, grads, others, device), _cached(_chunks, sizes, block, device)
    if _capturing(device) and not any(made[0] is a and made[1] is b for a, b in _captured):
        _captured.append(made)
    return made


# ---- the optimizer --------------------------------------------------------------------------------


@dataclass
class _Plan:
    """Working state of a step for one set of parameters; rebuilt when the set changes."""

    # identity of each parameter with a gradient; parameters of each group
    key: tuple[list[int], list[int]]
    params: list[Tensor]
    group: list[int]
    # each parameter's entry in the optimizer's state
    states: list[dict[str, Tensor]]
    # teacher, shadow, teacher_shadow -> that of each parameter, or None
    others: dict[str, list[Tensor | None]]
    # what the launcher keeps from step to step
    kept: dict[str, Any] = field(default_factory=dict)


class AdamWEma(torch.optim.AdamW):
    """AdamW, the EMA update of the teacher and low-precision copies in one pass (maths: README.md in this folder).

    State dicts have the format of `torch.optim.AdamW`; either loads the other's. Teachers and copies are not in
    them. Nothing is read back by the CPU: `skipped` (0 or 1) and `grad_norm` (before clipping; None where
    it was not needed) are 0-d float64 device tensors of the last step. Without Triton: the same in torch.

    Args:
        params: tensors or groups, as for `torch.optim.AdamW`; fp32 (fp64 for tests), contiguous.
        lr: as there, per group; may be a 0-d device tensor.
        betas: as there, per group.
        eps: as there, per group.
        weight_decay: as there, per group.
        teacher: {parameter: its teacher} or pairs, updated by `step(momentum_weight=w)` towards the new parameter;
            parameters without one (a predictor's) are fine.
        shadow: {parameter: tensor of its shape in bf16 | fp16}, rewritten by every good step.
        teacher_shadow: the same of the teachers, rewritten by good steps that update the teacher.

    Raises:
        ValueError: names the parameter's shape and dtype, for what it cannot update.

    Example::

        pairs = zip(student.parameters(), teacher.parameters())
        optimizer = AdamWEma(student.parameters(), lr=1e-3, teacher=pairs)
        loss.backward()
        optimizer.step(momentum_weight=1 - momentum)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        teacher: Pairs | None = None,
        shadow: Pairs | None = None,
        teacher_shadow: Pairs | None = None,
    ) -> None:
        # torch's fused AdamW keeps its step count in fp32 on the device, as this does
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self._pairs = {
            name: dict(pairs or {})
            for name, pairs in (("teacher", teacher), ("shadow", shadow), ("teacher_shadow", teacher_shadow))
        }
        self._check_pairs()
        self.grad_norm: Tensor | None = None
        self.skipped: Tensor | None = None
        self._forget()

    def _check_pairs(self) -> None:
        own = {p for g in self.param_groups for p in g["params"]}
        low = {t.dtype for name in ("shadow", "teacher_shadow") for t in self._pairs[name].values()}
        if len(low) > 1:
            raise ValueError(
                f"shadow: expected one of bfloat16, float16 for all, got {sorted(map(str, low))}"
            )
        for name, pairs in self._pairs.items():
            if len({id(x) for x in pairs.values()}) < len(pairs):
                raise ValueError(f"{name}: one tensor belongs to two parameters")
            for p, other in pairs.items():
                if p not in own:
                    raise ValueError(f"{name}: {describe(p)} is no parameter of this optimizer")
                full = name == "teacher"
                hint = "keep it in full precision" if full else ""
                check(name, other, p.shape, (p.dtype,) if full else LOW, p, hint)
                if not other.is_contiguous():
                    raise ValueError(f"{name}: {describe(other)} is not contiguous")
                if name == "teacher_shadow" and p not in self._pairs["teacher"]:
                    raise ValueError(f"{name}: {describe(other)} belongs to {describe(p)} without a teacher")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, for contiguous fp32 (or fp64) parameters."""
        super().add_param_group(param_group)
        self._plan: _Plan | None = None
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in (torch.float32, torch.float64) or not p.is_contiguous():
                self.param_groups.pop()
                raise ValueError(
                    f"params: expected contiguous float32, got {describe(p)}; keep master weights"
                )

    def _forget(self) -> None:
        self._written: list[tuple] = []
        self._settings: Tensor | None = None
        self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        # torch's holds what state dicts need, not what subclasses add
        return super().__getstate__() | {"_pairs": self._pairs, "grad_norm": None, "skipped": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for g in state["param_groups"]:
            for name in ("amsgrad", "maximize", "differentiable"):
                if g.get(name):
                    raise ValueError(
                        f"state: {name}=True is not what AdamWEma computes; use torch.optim.AdamW"
                    )
        super().__setstate__(state)
        self._forget()
        for g in self.param_groups:
            # an unfused AdamW kept its step count on the CPU
            g["fused"], g["foreach"] = True, None
            for p in g["params"]:
                own = self.state.get(p)
                if own:
                    own["step"] = torch.as_tensor(own["step"], dtype=torch.float32, device=p.device)
                    for name in ("exp_avg", "exp_avg_sq"):
                        own[name] = own[name].contiguous()

    def _settings_on(self, device: torch.device, first: list[float | Tensor]) -> Tensor:
        """[1 + groups, 5] float64; numbers are sent when one has changed, tensors are copied every step."""
        rows = [first] + [[g["lr"], *g["betas"], g["eps"], g["weight_decay"]] for g in self.param_groups]
        numbers = [tuple(None if isinstance(x, Tensor) else float(x) for x in r) for r in rows]
        settings = self._settings
        if settings is None or settings.device != device or numbers != self._written:
            values = [[0.0 if x is None else x for x in r] for r in numbers]
            settings = _send(values, torch.float64, device)
            if not _capturing(device):
                self._settings, self._written = settings, numbers
        if _capturing(device):
            # the graph keeps reading them after they have been replaced here
            _captured.append((settings, settings))
        for i, row in enumerate(rows):
            for k, x in enumerate(row):
                if isinstance(x, Tensor):
                    settings[i, k].copy_(x.detach().reshape(()), non_blocking=True)
        return settings

    def _planned(self) -> tuple[_Plan, list[Tensor]]:
        """(the plan for the parameters that have a gradient now, the gradients); creates missing state."""
        groups = [g["params"] for g in self.param_groups]
        found = [
            (i, p, grad) for i, params in enumerate(groups) for p in params if (grad := p.grad) is not None
        ]
        params, grads = [p for _, p, _ in found], [grad for _, _, grad in found]
        key = list(map(id, params)), [len(g) for g in groups]
        plan = self._plan
        if plan is not None and plan.key == key and len(plan.states) <= len(self.state):
            return plan, grads
        if len({(p.device, p.dtype) for p in params}) > 1:
            raise ValueError("params: expected one device and one dtype for all of them")
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        others = {name: [pairs.get(p) for p in params] for name, pairs in self._pairs.items()}
        self._plan = _Plan(key, params, [i for i, _, _ in found], [self.state[p] for p in params], others)
        return self._plan, grads

    @torch.no_grad()
    def step(
        self,
        closure: Any = None,
        *,
        momentum_weight: float | Tensor | None = None,
        found_inf: Tensor | None = None,
        grad_scale: float | Tensor = 1.0,
        max_norm: float | None = None,
    ) -> Any:
        """Updates everything that has a gradient.

        `torch.amp.GradScaler` works: the attributes it sets are read where the arguments are not given.

        Args:
            closure: recomputes the loss, as in torch.
            momentum_weight: w = 1 - momentum of `teacher += w (param - teacher)`; None: the teacher stays.
            found_inf: 0-d; not 0: this step is bad (what processes agreed on). So is one whose gradients' norm is not
                finite, unless `found_inf` is given and `max_norm` is not: then nobody needs the norm. A bad step
                changes nothing: weights, moments, step count, teacher, copies.
            grad_scale: multiplies the gradients (1 / loss scale).
            max_norm: clips the global norm (after `grad_scale`), as `clip_grad_norm_`.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: sparse gradients, or parameters of several devices or dtypes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if found_inf is None:
            found_inf = getattr(self, "found_inf", None)
        # the scaler's attribute is the loss scale itself
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            grad_scale = grad_scale / scale
        plan, grads = self._planned()
        params = plan.params
        if not params:
            return loss
        for p, grad in zip(params, grads):
            if grad.layout != torch.strided:
                raise ValueError(f"grad of {describe(p)}: expected dense, got {grad.layout}")
        grads = [grad.contiguous() for grad in grads]
        if len({g.dtype for g in grads}) > 1:
            grads = [g.to(params[0].dtype) for g in grads]
        has_norm, has_flag = max_norm is not None or found_inf is None, found_inf is not None
        weight = 0.0 if momentum_weight is None else momentum_weight
        flag = 0.0 if found_inf is None else found_inf
        limit = float("inf") if max_norm is None else max_norm
        settings = self._settings_on(params[0].device, [grad_scale, weight, flag, limit, 0.0])
        outcome = torch.empty(2, dtype=torch.float64, device=params[0].device)
        state = [[own[name] for own in plan.states] for name in ("exp_avg", "exp_avg_sq", "step")]
        # without a weight the teacher is not touched
        none: list[Tensor | None] = [None] * len(params)
        others = [
            plan.others[name] if momentum_weight is not None or name == "shadow" else none
            for name in plan.others
        ]
        arguments: list[Any] = [params, grads, *state, *others, plan.group, settings, outcome]
        arguments += [has_norm, has_flag]
        if _launch.use_triton(params[0]):
            # imports Triton
            from . import kernel

            kernel.step(*arguments + [plan.kept])
        else:
            adamw_ema_reference(*arguments)
        self.grad_norm, self.skipped = outcome[0] if has_norm else None, outcome[1]
        return loss
