"""Recomputes one step of a run, to find the module that makes it NaN or infinite, and the images that cause it.

The step number and the seed determine the batch, its crops, masks and jitter. The weights come from the capture of a
skipped step (`training/capture.py`), or from the nearest earlier checkpoint, from which the run is repeated up to the
step. The batch is split as among the run's processes, and computed on one device: once as in the run, and once with
plain PyTorch instead of kernels, checking the inputs and outputs of every module.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, config_hash
from ..data.bad_images import BAD_ROWS
from ..data.loader import Batch
from ..distributed import World, double, pick_device
from ..errors import UsageError, counted
from ..evaluation.subject import run_config
from ..files import read_json
from ..ops import dispatch as ops
from ..progress import ImageProgress
from ..train import task_of, train_step
from ..training.capture import STATE, Capture, bad_gradients, captured, read
from ..training.checkpoint import Checkpoint, damage, other_format, step_folders
from ..training.run import Run, go_on, open_loader, prepare_torch
from ..training.step import gradients, wrap
from ..weights.folder import check_name

log = logging.getLogger(__name__)

# images and parameters named
NAMED = 4


def replay(
    path: str | Path, step: int | None = None, *, rank: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """Computes a step of a run again and looks for values that are not finite; writes nothing.

    Args:
        path: run folder, or one of its `debug/step_*`.
        step: counted from 1, as in the log; None: the last one that the run has kept.
        rank: only the images of this process of the run; None: all.
        device: as `system.device`; None: the run's.

    Returns:
        step, begins ("capture", or the folder of a checkpoint, or "step 0"), images, same_rows (whether the batch is
        that of the capture; None without), `as_run` and `reference`, each with loss, grad_norm and bad_gradients
        (how many parameters; the first names), `first`: where the first value that is not finite comes from, or None.

    Raises:
        UsageError: no such run, step or rank, or images that are gone.
    """
    folder, kept = _find(Path(path), step)
    cfg = run_config(folder)
    if cfg is None:
        raise UsageError(f"{folder}: not a run folder (no config.json of a run in it)")
    if step is None and kept is None:
        raise UsageError(
            f"{folder}: no step of it was skipped and kept (debug/step_*); name one with --step N"
        )
    step = kept.state["step"] if kept else step
    assert step is not None
    env = read_json(folder / "env.json", {})
    if kept and kept.state["config_hash"] != config_hash(cfg):
        log.warning("%s: the run's settings have changed since; they are those of now", kept.path)
    cfg, parts = _on_one_device(cfg, kept.state["world_size"] if kept else env.get("world_size", 1), device)
    begun = env.get("init_from")
    task = task_of(cfg, begun.get("weights") if isinstance(begun, dict) else None)
    prepare_torch(cfg.system)
    world = World(pick_device(cfg.system.device))
    source = task.open_train(cfg)
    weights = kept.weights() if kept else None
    begins = "capture"
    if weights is None:
        run = task.build(cfg, world, source, continued=True)
        total = run.schedule.total_steps
        if not 1 <= step <= total:
            raise UsageError(f"--step: expected 1 to {total}, the steps of {folder}, got {step}")
        begins = _repeat(run, task, folder, step)
        weights = {name: t.clone() for name, t in run.method.state_dict().items()}
        del run
    # one step: nothing is compiled, recorded, or recomputed
    plain = replace(cfg.train, compile="none", cuda_graph="off", recompute="none")
    run = task.build(replace(cfg, train=plain), world, source, continued=True)
    run.method.load_state_dict(weights)
    run.method.sync_shadow_weights()
    run.step = step - 1
    batch, same = _batch(run, task, folder, kept)
    micro_batches = list(batch.micro_batches)
    first_row, size = 0, len(micro_batches[0].images)
    if rank is not None:
        if cfg.head.at_once or (cfg.head.whole_batch and parts > 1):
            what = cfg.head.at_once or f"loss {cfg.head.loss} with these targets"
            raise UsageError(f"--rank: head.{what} needs the whole batch; leave --rank out")
        if not 0 <= rank < parts:
            raise UsageError(f"--rank: expected 0 to {parts - 1} (processes of the run: {parts}), got {rank}")
        count = len(micro_batches) // parts
        micro_batches, first_row = micro_batches[rank * count :][:count], rank * count * size
    images = [int(i) for i in batch.index[first_row:][: size * len(micro_batches)]]
    as_run, _ = _compute(run, micro_batches)
    before = cfg.system.backend
    try:
        ops.set_backend("reference")
        for encoder in (run.method.student, run.method.teacher):
            encoder.set_attention("math")
        with _watching(run, size) as look:
            reference, loss = _compute(run, micro_batches)
    finally:
        ops.set_backend(before)
    first = look.first
    if first is None or (first["pass"] == "backward" and reference["loss"] is None):
        first = _of_the_whole(run, loss, reference)
    if first:
        places = first.pop("places", [])
        named = [{"row": images[i], "name": source.title(images[i])} for i in places if i < len(images)]
        first |= {"images": named[:NAMED], "images_count": len(named)}
    return {
        "run": str(folder),
        "step": step,
        "begins": begins,
        "images": len(images),
        "same_rows": same,
        "device": str(world.device),
        "precision": run.resolved.precision,
        "as_run": as_run,
        "reference": reference,
        "first": first,
    }


# ---- the step ---------------------------------------------------------------------------------------


def _find(path: Path, step: int | None) -> tuple[Path, Capture | None]:
    """The run folder, and what it has kept of the step."""
    check_name(path)
    if (path / STATE).is_file():
        return path.resolve().parents[1], read(path)
    kept = captured(path)
    number = max(kept, default=None) if step is None else step
    return path, read(kept[number]) if number in kept else None


def _on_one_device(cfg: Config, processes: Any, device: str | None) -> tuple[Config, int]:
    """The configuration that cuts a batch into the parts that each process had, on one device; how many had one."""
    parts = processes if isinstance(processes, int) and processes > 0 else 1
    if cfg.train.batch_size % (parts * cfg.train.accumulation) or cfg.head.at_once:
        parts = 1
    train = replace(cfg.train, accumulation=cfg.train.accumulation * parts)
    system = cfg.system if device is None else replace(cfg.system, device=device)
    # held and decoded crops may differ by rounding, but a step reads few of the images
    return replace(cfg, train=train, system=system, data=replace(cfg.data, resident="off")), parts


def _repeat(run: Run, task: Any, folder: Path, step: int) -> str:
    """Takes the steps before `step`, from the nearest checkpoint that can be read; says where they begin."""
    begins = "step 0"
    for number, path in reversed(step_folders(folder / "checkpoints").items()):
        if number < step and not damage(path) and not other_format(path):
            go_on(run, Checkpoint(path, read_json(path / "state.json")))
            begins = str(path)
            break
    else:
        task.begin(run, True)
    wrap(run)
    count = step - 1 - run.step
    with _open(run, folder) as loader, ImageProgress("steps before", count, unit="steps") as bar:
        batches = task.batches(run, loader)
        for _ in range(count):
            train_step(run, next(batches))
            run.step += 1
            bar.advance(1)
    return begins


@contextmanager
def _open(run: Run, folder: Path) -> Iterator[Any]:
    """The loader at the run's step, which leaves out what the run has left out."""
    with open_loader(run) as loader:
        loader.bad.read(folder / BAD_ROWS, run.cfg.data)
        yield loader


def _batch(run: Run, task: Any, folder: Path, kept: Capture | None) -> tuple[Batch, bool | None]:
    """The batch of the run's step, and whether it is that of the capture."""
    with _open(run, folder) as loader, closing(task.batches(run, loader)) as batches:
        batch = next(batches)
    same = None if kept is None else batch.index.tolist() == kept.state["rows"]
    if same is False:
        log.warning("%s: the images have changed since: other rows take their places", folder)
    return batch, same


def _compute(run: Run, micro_batches: list[Any]) -> tuple[dict[str, Any], Tensor]:
    """Loss and gradients of a step; nothing moves."""
    for p in run.trained:
        p.grad = None
    loss = (run.gradients or gradients)(run, micro_batches)
    names = bad_gradients(run)
    grads = [double(p.grad) for p in run.trained if p.grad is not None]
    # in double precision squares do not overflow
    norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))) if grads else 0.0
    value = float(loss)
    return {
        "loss": value if math.isfinite(value) else None,
        "grad_norm": norm if math.isfinite(norm) else None,
        "bad_gradients": len(names),
        "first_gradients": names[:NAMED],
    }, loss


# ---- the first value that is not finite -------------------------------------------------------------


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x] if x.is_floating_point() else []
    if isinstance(x, (tuple, list)):
        return [t for item in x for t in _tensors(item)]
    return []


def _bad(x: Any) -> Tensor | None:
    """The first of nested tensors with a value that is not finite."""
    return next((t for t in _tensors(x) if not bool(t.isfinite().all())), None)


def _range(x: Any) -> dict[str, Any] | None:
    """Smallest and largest finite value of nested tensors, and how many values are not finite."""
    flat = [t.detach().flatten() for t in _tensors(x)]
    if not flat:
        return None
    values = torch.cat([double(t) for t in flat])
    finite = values[values.isfinite()]
    ends = (float(finite.min()), float(finite.max())) if len(finite) else (None, None)
    return {"low": ends[0], "high": ends[1], "not_finite": len(values) - len(finite), "of": len(values)}


class _Look:
    """What the hooks have seen; `first` is where the first value that is not finite comes from.

    Modules nest: of those that a pass is in, with finite values so far, the innermost one is it.
    """

    def __init__(self, names: Mapping[nn.Module, str], size: int) -> None:
        self.names, self.size = names, size
        self.first: dict[str, Any] | None = None
        # modules that a pass is in, the innermost last; of forward and backward
        self.inside: dict[str, list[nn.Module]] = {"forward": [], "backward": []}
        self.calls = {"student_branch": 0, "teacher_branch": 0}
        self.inputs: dict[nn.Module, Any] = {}

    def enter(self, direction: str, module: nn.Module, values: Any) -> None:
        if self.first is not None:
            return
        name = self.names[module]
        if direction == "forward" and name in self.calls:
            self.calls[name] += 1
        if (bad := _bad(values)) is not None:
            inside = self.inside[direction]
            self._found(
                direction, inside[-1] if inside else None, bad, "within" if inside else "before", module
            )
            return
        self.inside[direction].append(module)
        self.inputs[module] = values

    def leave(self, direction: str, module: nn.Module, values: Any) -> None:
        if self.first is not None:
            return
        if (bad := _bad(values)) is not None:
            self._found(direction, module, bad, "out")
            return
        inside = self.inside[direction]
        if module in inside:
            # a module whose inputs need no gradient is never left
            del inside[inside.index(module) :]

    def weight(self, module: nn.Module, name: str, grad: Tensor) -> None:
        if self.first is None and (bad := _bad(grad)) is not None:
            self._found("backward", module, bad, f"gradient of its {name}")

    def _found(
        self, direction: str, module: nn.Module | None, bad: Tensor, how: str, reader: nn.Module | None = None
    ) -> None:
        name = self.names[module] if module is not None else ""
        branch = (name or (self.names[reader] if reader is not None else "")).partition(".")[0]
        self.first = {
            "pass": direction,
            "module": name or ("the images" if direction == "forward" else "the loss"),
            "class": type(module).__name__ if module is not None else "",
            "where": how,
            "read_by": self.names[reader] if reader is not None else "",
            "input": _range(self.inputs.get(module)) if module is not None else None,
            "values": _range(bad),
            "weights": _range(list(module.parameters())) if module is not None else None,
            "places": [] if how.startswith("gradient") else self._places(bad, branch),
        }

    def _places(self, bad: Tensor, branch: str) -> list[int]:
        """Places in the batch of the images whose rows of a tensor are not finite, where its rows are of images."""
        rows = len(bad) if bad.dim() else 0
        if not rows or rows % self.size:
            return []
        hit = (~bad.detach().isfinite()).flatten(1).any(1) if bad.dim() > 1 else ~bad.detach().isfinite()
        # [views, images, rows of one]: a teacher's tensor has one view
        views = self.views if branch == "student_branch" and not rows % (self.size * self.views) else 1
        of_image = hit.view(views, self.size, -1).any(-1).any(0)
        first = (max(self.calls.get(branch, 0), 1) - 1) * self.size
        return [first + int(i) for i in of_image.nonzero().flatten()]

    views = 1


@contextmanager
def _watching(run: Run, size: int) -> Iterator[_Look]:
    """Context in which every module of both networks is looked at; `size`: images of a micro-batch."""
    names = {module: name for name, module in run.method.named_modules() if name}
    look = _Look(names, size)
    look.views = run.cfg.mask.views if run.gradients is None else 1
    handles: list[Any] = []

    def of_weight(module: nn.Module, name: str) -> Callable[[Tensor], None]:
        return lambda p: look.weight(module, name, p.grad)  # type: ignore[arg-type]

    for module in names:
        handles += [
            module.register_forward_pre_hook(lambda m, x: look.enter("forward", m, x)),
            module.register_forward_hook(lambda m, x, y: look.leave("forward", m, y)),
            module.register_full_backward_pre_hook(lambda m, dy: look.enter("backward", m, dy)),
            module.register_full_backward_hook(lambda m, dx, dy: look.leave("backward", m, dx)),
        ]
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                handles.append(p.register_post_accumulate_grad_hook(of_weight(module, name)))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield look
    finally:
        for handle in handles:
            handle.remove()


def _of_the_whole(run: Run, loss: Tensor, found: dict[str, Any]) -> dict[str, Any] | None:
    """Where the modules are finite and the step is not: the loss, or the norm over all gradients."""
    base = {"class": "", "where": "out", "read_by": "", "weights": None}
    if found["loss"] is None:
        named = {
            "pass": "forward",
            "module": "the loss",
            "input": _range(run.outputs),
            "values": _range(loss),
        }
        return base | named
    grads = [(n, p.grad) for n, p in run.method.student_parameters() if p.grad is not None]
    # as a step has it: squares are summed in the precision of the gradients
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for _, g in grads]))
    if bool(norm.isfinite()):
        return None
    name, grad = max(grads, key=lambda pair: float(pair[1].abs().max()))
    module = f"the norm of all gradients, the largest of {name}"
    return base | {"pass": "backward", "module": module, "input": _range(grad), "values": _range(norm)}


# ---- what is told -----------------------------------------------------------------------------------


def describe(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    begins = {"capture": "weights kept by the run", "step 0": "repeated from the first step"}
    how = begins.get(result["begins"], f"repeated from {result['begins']}")
    lines = [
        f"step {result['step']} of {result['run']}: {counted(result['images'], 'image')}, {how}, "
        f"{result['precision']} on {result['device']}"
    ]
    for key, title in (("as_run", "as the run computes it"), ("reference", "in plain PyTorch")):
        lines.append(f"  {title}: {_describe_step(result[key])}")
    first = result["first"]
    if first is None:
        bad = result["as_run"]
        finite = bad["loss"] is not None and not bad["bad_gradients"]
        lines.append(
            "  all values are finite"
            if finite
            else "  plain PyTorch is finite: an implementation of an op is not right here; train with "
            "--system.backend reference, and report it with `extrema-fast kernels`"
        )
        return "\n".join(lines)
    kind = f" ({first['class']})" if first["class"] else ""
    lines.append(f"first not finite, in the {first['pass']} pass: {first['module']}{kind}{_where(first)}")
    for key, title in (("input", "goes in"), ("values", "not finite"), ("weights", "weights")):
        if first.get(key):
            lines.append(f"  {title}: {_describe_range(first[key])}")
    if first["images_count"]:
        names = ", ".join(f"{i['name']} (row {i['row']})" for i in first["images"])
        more = first["images_count"] - len(first["images"])
        of = f"{first['images_count']} of {counted(result['images'], 'image')}"
        lines.append(f"  {of}: {names}{f', and {more} more' if more else ''}")
    return "\n".join(lines)


def _where(first: dict[str, Any]) -> str:
    if first["where"] == "within":
        return f", before {first['read_by']}"
    if first["where"] == "before":
        return f", as {first['read_by']} gets {'it' if first['pass'] == 'forward' else 'its gradient'}"
    return f", {first['where']}" if first["where"].startswith("gradient") else ""


def _describe_step(found: dict[str, Any]) -> str:
    loss, norm = found["loss"], found["grad_norm"]
    text = f"loss {'not finite' if loss is None else f'{loss:.6g}'}"
    if not found["bad_gradients"]:
        return f"{text}, gradient norm {'not finite' if norm is None else f'{norm:.6g}'}"
    names = ", ".join(found["first_gradients"][:3])
    return f"{text}, {counted(found['bad_gradients'], 'gradient')} not finite ({names} ...)"


def _describe_range(r: dict[str, Any]) -> str:
    ends = "no finite value" if r["low"] is None else f"{r['low']:.6g} to {r['high']:.6g}"
    return f"{ends}, {r['not_finite']} of {r['of']} values not finite" if r["not_finite"] else ends
