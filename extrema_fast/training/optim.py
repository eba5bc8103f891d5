"""Parameter groups, optimizers and schedules; every schedule is a function of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Config, FinetuneConfig
from ..errors import UsageError
from ..models.classifier import layer_of
from ..models.extrema import StudentTeacher
from ..ops import dispatch as ops
from ..ops.optimizers import Lars


@dataclass(frozen=True)
class Schedule:
    """Learning rate and teacher momentum of a run with `steps_per_epoch` optimizer steps per epoch."""

    cfg: Config
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return self.cfg.train.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        return int(self.cfg.optim.warmup_epochs * self.steps_per_epoch)

    def lr(self, step: int) -> float:
        """Linear from 0 at step 0 to `peak_lr` after the warm-up, then a cosine to `optim.min_lr` at the end."""
        peak, minimum, warmup = self.cfg.peak_lr, self.cfg.optim.min_lr, self.warmup_steps
        if step < warmup:
            return peak * step / warmup
        x = (step - warmup) / max(1, self.total_steps - warmup)
        return minimum + (peak - minimum) * (1 + math.cos(math.pi * min(x, 1.0))) / 2

    def trunk_share(self, step: int) -> float:
        """Share of `lr` for a trained trunk beside fresh pooling and heads.

        0 in the first half of the warm-up, in which those alone are trained, then linear to 1 at its end.
        """
        return min(max(2 * step / self.warmup_steps - 1, 0.0), 1.0) if self.warmup_steps else 1.0

    def momentum(self, step: int) -> float:
        """`1 - (1 - m) (1 + cos(pi t / T)) / 2` at step t of T, from m = `optim.momentum` to 1.

        Of fine-tuning `tune.ema`, and less in its first steps, so that the average leaves the initial weights.
        """
        if isinstance(self.cfg, FinetuneConfig):
            return min(self.cfg.tune.ema, (1 + step) / (10 + step))
        base = self.cfg.optim.momentum
        return 1 - (1 - base) * (1 + math.cos(math.pi * min(step / self.total_steps, 1.0))) / 2


def param_groups(named: list[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two groups: decay on matrices and the patch kernel; none on vectors, class token, positions."""
    decay: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, p in named:
        (plain if p.dim() <= 1 or name.endswith(("cls_token", "pos_embed")) else decay).append(p)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def layer_groups(
    named: list[tuple[str, torch.nn.Parameter]],
    weight_decay: float,
    layer_decay: float,
    depth: int,
    *,
    trust: bool = False,
) -> list[dict]:
    """`param_groups` of each layer (`layer_of`), with its factor of the learning rate in `scale` (`set_lr`).

    Args:
        named: names of `Encoder` after `encoder.`.
        trust: steps are scaled by the norm of the weights, unless there is no decay (LAMB, LARS): the classifier, which
            begins next to 0 and would stay there, has none.
        layer_decay: the factor from one layer to the one before it; 1 at the norm after pooling and the classifier.
        depth: trunk blocks.
    """
    layers: dict[int, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, p in named:
        layers.setdefault(layer_of(name.removeprefix("encoder."), depth), []).append((name, p))
    groups = []
    for layer, members in sorted(layers.items()):
        scale = layer_decay ** (depth + 1 - layer)
        decay = 0.0 if trust and layer == depth + 1 else weight_decay
        groups += [g | {"scale": scale} for g in param_groups(members, decay) if g["params"]]
    return groups


# optim.name of each optimizer class, as checkpoints name it; states continue within a family only
FAMILIES = {
    "AdamW": "adamw",
    "ForeachAdamW": "adamw",
    "AdamWEma": "adamw",
    "FusedAdam": "adamw",
    "Lamb": "lamb",
    "FusedLAMB": "lamb",
    "Lars": "lars",
}
# family -> what is kept for each parameter: tensors of its shape, and `step`, one number
KEPT = {
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "lamb": ("step", "exp_avg", "exp_avg_sq"),
    "lars": ("momentum_buffer",),
}


def build_optimizer(method: StudentTeacher, cfg: Config, *, tensor_lr: bool = False) -> torch.optim.Optimizer:
    """The optimizer `optim.name` of the student branch: AdamW, LAMB (implementations: `ops.dispatch`) or LARS.

    A checkpoint continues under another implementation of the same name. LARS takes its momentum from
    `optim.betas[0]`.

    Args:
        tensor_lr: the learning rate is a 0-d fp32 tensor on the device, for steps recorded in a CUDA graph.

    Raises:
        UsageError: LAMB or LARS without weight decay, or apex with a tensor rate.
    """
    o = cfg.optim
    named = method.student_parameters()
    if isinstance(cfg, FinetuneConfig):
        trust = o.name != "adamw"
        groups = layer_groups(named, o.weight_decay, cfg.tune.layer_decay, cfg.model.shape[1], trust=trust)
    else:
        groups = param_groups(named, o.weight_decay)
    lr: float | Tensor = cfg.peak_lr
    if tensor_lr:
        lr = torch.tensor(cfg.peak_lr, dtype=torch.float32, device=named[0][1].device)
        # groups with a scale have one each, which `set_lr` writes; the others share one
        groups = [{**g, "lr": lr.clone()} if "scale" in g else g for g in groups]
    if o.name != "adamw" and not o.weight_decay:
        raise UsageError(
            f"optim.weight_decay: 0 switches the layer-wise rates of optim.name={o.name} off; use a small value, "
            "such as 1e-6, or optim.name=adamw"
        )
    if o.name == "lars":
        return Lars(groups, lr=lr, momentum=o.betas[0])
    if o.name == "lamb":
        return ops.lamb(groups, lr=lr, betas=o.betas, eps=o.eps)
    by_name = {} if method.teacher_branch is None else dict(method.teacher_branch.named_parameters())
    # the predictor has no teacher
    teacher: dict[Tensor, Tensor] = {p: by_name[name] for name, p in named if name in by_name}
    return ops.adamw(groups, teacher, method.shadow_pairs(), lr=lr, betas=o.betas, eps=o.eps)


def gates_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step()` changes nothing when the optimizer's attribute `found_inf` (0-d fp32, on the device) is not 0.

    Where this is false, the caller decides whether to call `step()`, which waits for the device.
    """
    own = getattr(optimizer, "gates_on_device", None)
    # of torch's optimizers only the fused ones read it
    return all(g.get("fused") for g in optimizer.param_groups) if own is None else own


def separate_trunk(optimizer: torch.optim.Optimizer, trunk: list[torch.nn.Parameter]) -> None:
    """Moves parameters to groups with a learning rate of their own, the second of `set_lr`."""
    moved = set(trunk)
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if p in moved]
        group["params"] = [p for p in group["params"] if p not in moved]
        lr = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
        optimizer.add_param_group({**group, "params": mine, "lr": lr, "trunk": True})


def set_lr(
    optimizer: torch.optim.Optimizer, lr: float | Tensor, trunk_lr: float | Tensor | None = None
) -> None:
    """Sets the learning rate of every group, and another one (if given) of those of `separate_trunk`.

    Times the group's `scale`, where it has one (`layer_groups`). A rate that is a tensor is written in place,
    without waiting.
    """
    for group in optimizer.param_groups:
        rate = trunk_lr if group.get("trunk") and trunk_lr is not None else lr
        if "scale" in group:
            rate = rate * group["scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = float(rate)


def check_family(saved: str, optimizer: torch.optim.Optimizer) -> None:
    """Raises UsageError when a checkpoint's optimizer (its class name) is of another family than this one."""
    mine = type(optimizer).__name__
    theirs = FAMILIES.get(saved)
    if theirs != FAMILIES[mine]:
        raise UsageError(
            f"checkpoint: its optimizer is {saved}, this run's is {mine}; they cannot continue from each other's "
            f"state; use {f'--optim.name {theirs}, or ' if theirs else ''}another --out with --init-from for the "
            "weights alone"
        )
