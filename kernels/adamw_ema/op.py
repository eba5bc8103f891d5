"""adamw_ema: the registered in-place op and the optimizer (README.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _launch
from .._check import describe
from .reference import adamw_ema_reference

torch.library.define(
    "extrema_fast::adamw_ema",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] steps,"
    " Tensor(e!)[] teacher, Tensor(f!)[] shadow, Tensor(g!)[] teacher_shadow, int[] teacher_of, int[] shadow_of,"
    " int[] teacher_shadow_of, int[] group, Tensor settings, Tensor factor, Tensor skip, Tensor weight) -> ()",
)

# one table per set of tensors: its key is every address in it
_tables: dict[tuple, tuple[Tensor, Tensor]] = {}


def _table(key: tuple, columns: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    from .kernel import BLOCK

    if key not in _tables:
        if len(_tables) >= 8:
            # fresh gradients every step would make a new table each time
            _tables.pop(next(iter(_tables)))
        # [tensors, 10], then whether all addresses of the row allow 16-byte accesses
        rows = torch.tensor(list(zip(*columns, strict=True)), dtype=torch.int64)
        aligned = (rows[:, [0, 1, 2, 3, 5, 6, 7]] % 16 == 0).all(1, keepdim=True)
        counts = (rows[:, 8] + BLOCK - 1) // BLOCK
        tensor = torch.repeat_interleave(torch.arange(len(rows)), counts)
        chunk = torch.arange(len(tensor)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        chunks = torch.stack([tensor, chunk], 1).int()
        _tables[key] = torch.cat([rows, aligned.long()], 1).to(device), chunks.to(device)
    return _tables[key]


def _picked(tensors: list[Tensor], of: list[int]) -> list[Tensor | None]:
    return [tensors[i] if i >= 0 else None for i in of]


@torch.library.impl("extrema_fast::adamw_ema", "CompositeExplicitAutograd")
def _adamw_ema(
    params, grads, exp_avg, exp_avg_sq, steps, teacher, shadow, teacher_shadow,
    teacher_of, shadow_of, teacher_shadow_of, group, settings, factor, skip, weight,
) -> None:  # fmt: skip
    if not params:
        return
    extra = [
        _picked(t, of)
        for t, of in ((teacher, teacher_of), (shadow, shadow_of), (teacher_shadow, teacher_shadow_of))
    ]
    if not _launch.use_triton(params[0]):
        adamw_ema_reference(
            params, grads, exp_avg, exp_avg_sq, steps, *extra, group, settings, factor, skip, weight
        )
        return
    from .kernel import update

    torch._foreach_add_(steps, (1 - skip).to(steps[0].dtype))
    lists = [params, grads, exp_avg, exp_avg_sq, steps]
    columns = [[t.data_ptr() for t in tensors] for tensors in lists]
    columns += [[0 if t is None else t.data_ptr() for t in tensors] for tensors in extra]
    columns += [[p.numel() for p in params], list(group)]
    table, chunks = _table(tuple(map(tuple, columns)), columns, params[0].device)
    low = next((t.dtype for t in (*shadow, *teacher_shadow)), torch.bfloat16)
    update(table, chunks, settings, factor, skip, weight, params[0].dtype, grads[0].dtype, low)


@torch.library.register_fake("extrema_fast::adamw_ema")
def _fake(*_) -> None:
    return None


class AdamWEma(torch.optim.AdamW):
    """AdamW, the EMA teacher and low-precision copies in one pass over the parameters.

    params          tensors or groups, as for `torch.optim.AdamW`; fp32 (fp64 for tests), dense
    lr, betas, eps, weight_decay  as there, per group; `lr` may be a 0-d device tensor
    teacher         {parameter: its teacher}: moved by `step(momentum_weight=w)` towards the new parameter
    shadow, teacher_shadow  {parameter: tensor of the same shape in bf16 | fp16}: rewritten by every step

    State dicts are those of `torch.optim.AdamW`; either continues the other's. Nothing is read back by the
    host: `grad_norm` and `skipped` are 0-d device tensors of the last step.

    raises ValueError, TypeError for what it cannot update, naming the parameter's shape and dtype

    Example::

        optimizer = AdamWEma(student.parameters(), lr=1e-3, teacher=dict(zip(student.parameters(),
                             teacher.parameters())))
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
        teacher: Mapping[Tensor, Tensor] | None = None,
        shadow: Mapping[Tensor, Tensor] | None = None,
        teacher_shadow: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self._moved, self._shadow = dict(teacher or {}), dict(shadow or {})
        self._moved_shadow = dict(teacher_shadow or {})
        self.grad_norm: Tensor | None = None
        self.skipped: Tensor | None = None
        self._written: list[tuple] = []
        self._settings: Tensor | None = None
        own = {p for g in self.param_groups for p in g["params"]}
        for p in own:
            if p.dtype not in (torch.float32, torch.float64) or not p.is_contiguous():
                raise ValueError(
                    f"params: expected contiguous float32, got {describe(p)}; keep master weights"
                )
        for what, pairs in (("teacher", self._moved), ("shadow", self._shadow)):
            for p, other in pairs.items():
                if p not in own:
                    raise ValueError(f"{what}: {describe(p)} is no parameter of this optimizer")
                if other.shape != p.shape or other.device != p.device or not other.is_contiguous():
                    raise ValueError(f"{what}: expected contiguous {list(p.shape)}, got {describe(other)}")
                if what == "teacher" and other.dtype != p.dtype:
                    raise ValueError(
                        f"teacher: expected {p.dtype}, got {other.dtype}; keep it in full precision"
                    )
        for p, other in self._moved_shadow.items():
            if p not in self._moved or other.shape != p.shape or not other.is_contiguous():
                raise ValueError(
                    f"teacher_shadow: {describe(other)} does not belong to a teacher {describe(p)}"
                )
        low = {t.dtype for t in (*self._shadow.values(), *self._moved_shadow.values())}
        if len(low) > 1 or not low <= {torch.bfloat16, torch.float16}:
            raise ValueError(
                f"shadow: expected one of bfloat16, float16 for all, got {sorted(map(str, low))}"
            )

    def _settings_on(self, device: torch.device) -> Tensor:
        rows = [
            (None if isinstance(g["lr"], Tensor) else g["lr"], *g["betas"], g["eps"], g["weight_decay"])
            for g in self.param_groups
        ]
        if rows != self._written or self._settings is None or self._settings.device != device:
            values = torch.tensor([[0.0 if x is None else x for x in r] for r in rows], dtype=torch.float64)
            self._settings, self._written = values.to(device, non_blocking=True), rows
        for i, g in enumerate(self.param_groups):
            if isinstance(g["lr"], Tensor):
                self._settings[i, 0].copy_(g["lr"])
        return self._settings

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
        """One update of everything that has a gradient.

        momentum_weight  w = 1 - momentum of `teacher += w (param - teacher)`; None: the teacher stays
        found_inf        0-d, 1 (or any non-zero): this step is bad. None: bad when the gradients' norm is not
                         finite. A bad step changes nothing: weights, moments, step count, teacher, copies
        grad_scale       multiplies the gradients (1 / loss scale)
        max_norm         clips the global norm (after `grad_scale`), as `clip_grad_norm_`
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, grads, group = [], [], []
        for i, g in enumerate(self.param_groups):
            for p in g["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError(f"grad of {describe(p)} is sparse; use torch.optim.SparseAdam")
                params.append(p)
                grads.append(p.grad.contiguous())
                group.append(i)
                if not self.state[p]:
                    self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        if not params:
            return loss
        device = params[0].device
        if len({x.device for x in params}) > 1 or len({x.dtype for x in params}) > 1:
            raise ValueError("params: expected one device and one dtype for all of them")
        if len({x.dtype for x in grads}) > 1:
            grads = [x.to(params[0].dtype) for x in grads]

        def scalar(x: float | Tensor) -> Tensor:
            return torch.as_tensor(x, dtype=torch.float64, device=device).reshape(())

        factor = scalar(grad_scale)
        if max_norm is not None or found_inf is None:
            self.grad_norm = torch.nn.utils.get_total_norm(grads).double() * factor
            if max_norm is not None:
                factor = factor * (max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        skip = (scalar(found_inf) != 0) if found_inf is not None else ~self.grad_norm.isfinite()
        self.skipped = skip.double()
        # without a weight the teacher is not even touched
        moved = self._moved if momentum_weight is not None else {}
        lists, of = [], []
        for pairs in (moved, self._shadow, self._moved_shadow if moved else {}):
            place = {id(p): i for i, p in enumerate(pairs)}
            lists.append(list(pairs.values()))
            of.append([place.get(id(p), -1) for p in params])
        state = [self.state[p] for p in params]
        torch.ops.extrema_fast.adamw_ema.default(
            params, grads, [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state],
            [s["step"] for s in state], *lists, *of, group, self._settings_on(device), factor, self.skipped,
            scalar(0.0 if momentum_weight is None else momentum_weight),
        )  # fmt: skip
        return loss
