"""The training steps that `python -m benchmarks step` can put side by side."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from extrema_fast import kernels
from extrema_fast.config import Config, did_you_mean, from_dict
from extrema_fast.errors import UsageError
from extrema_fast.training.resolve import precision as precision_of
from extrema_fast.training.run import keep_freed_memory

from .baselines import Stepper, with_settings

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
CLASSES = {"released": "baselines:Released", "strong": "baselines:Strong", "ours": "baselines:Ours"}


@dataclass(frozen=True)
class Provider:
    """One way to make a training step.

    Attributes:
        name: unique; a row of the table.
        about: one line.
        groups: names under which it can be asked for together with others.
        precision: auto (the configuration's), amp (fp16 with a loss scaler on a GPU, else auto), or fp32.
        options: keyword arguments of its class; for ours dotted options of the configuration.
        needs: cuda, or triton (that can run).
        allocator: `ours` (huge pages, freed memory is kept, as the command line sets it), `system`, or auto.
        build: `module:Class` of a `Stepper`; by default that of the family.
    """

    name: str
    about: str
    groups: tuple[str, ...] = ()
    precision: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    allocator: str = "auto"
    build: str = ""

    @property
    def family(self) -> str:
        """Returns released, strong or ours: which ratios it takes part in."""
        return self.name.partition("-")[0].partition(" ")[0]

    def resolved(self, device: str) -> str:
        """Returns the precision it runs in on that device: fp32, bf16 or fp16."""
        kind = device.partition(":")[0]
        if self.precision == "amp" and kind == "cuda":
            return "fp16"
        return "fp32" if self.precision == "fp32" else precision_of("auto", kind)

    def missing(self, device: str) -> str:
        """Returns why it cannot run there; empty when it can."""
        if "cuda" in self.needs and not device.startswith("cuda"):
            return "needs a CUDA device"
        able, why = kernels.can_run(device)
        return "" if able or "triton" not in self.needs else why

    @property
    def environment(self) -> dict[str, str]:
        """Returns the variables of its process."""
        if self.allocator == "ours" or (self.allocator == "auto" and self.family == "ours"):
            return {HUGE_PAGES: "1"}
        # glibc's default, set explicitly, keeps our step from changing it
        return {HUGE_PAGES: "0", "MALLOC_TOP_PAD_": "131072"} if self.family == "ours" else {}

    def eager(self) -> Provider:
        """Returns the same arithmetic without compilation or graph capture."""
        off = {"ours": {"train.compile": "none", "train.cuda_graph": False}, "strong": {"compile": False}}
        return replace(self, options=self.options | off.get(self.family, {}))

    def make(self, cfg: Config, device: torch.device, precision: str) -> Stepper:
        """Builds it."""
        if self.environment.get(HUGE_PAGES) == "1" and device.type == "cpu":
            keep_freed_memory()
        module, _, name = (self.build or CLASSES[self.family]).partition(":")
        step = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        return step(cfg, device, precision, **self.options)


FORMULA = {"plain_attention": True}
PROVIDERS: tuple[Provider, ...] = (
    Provider("released", "the released formulation, eager, autocast", ("main",), "amp"),
    Provider("released-fp32", "the released formulation, eager, fp32", ("main",), "fp32"),
    Provider("strong", "same maths: full-graph compile, SDPA, fused AdamW, foreach EMA", ("main", "strong")),
    Provider(
        "strong-plain-attention", "strong with the attention formula", ("main", "strong"), options=FORMULA
    ),
    Provider("strong-eager", "strong, not compiled", ("main", "strong"), options={"compile": False}),
    Provider(
        "strong-eager-plain-attention", "neither", ("main", "strong"), options={"compile": False} | FORMULA
    ),
    Provider("strong-fp32", "strong in fp32", ("fp32",), "fp32"),
    Provider("ours", "this project, default settings", ("main",)),
    Provider("ours-fp32", "this project in fp32", ("fp32",), "fp32"),
    *(
        Provider(f"ours-compile-{mode}", f"train.compile {mode}", ("modes",), options={"train.compile": mode})
        for mode in ("none", "block", "step")
    ),
    Provider(
        "ours-cuda-graph",
        "the whole step recorded",
        ("modes",),
        options={"train.cuda_graph": True},
        needs=("cuda",),
    ),
    Provider(
        "ours-triton",
        "every Triton kernel",
        ("modes",),
        options={"system.backend": "triton"},
        needs=("cuda", "triton"),
    ),
    *(
        Provider(f"ours-recompute-{x}", f"train.recompute {x}", ("memory",), options={"train.recompute": x})
        for x in ("none", "gelu", "norm")
    ),
    # how much of a ratio on a CPU comes from the allocator
    Provider("ours-system-allocator", "the system's memory settings", ("allocator",), allocator="system"),
    Provider(
        "strong-our-allocator",
        "the attention formula and our memory settings",
        ("allocator",),
        options=FORMULA,
        allocator="ours",
    ),
)


def chosen(
    names: list[str], device: str, *, released_code: str = "", extra: list[str] | None = None
) -> tuple[list[Provider], dict[str, str]]:
    """Selects providers by name or group.

    Args:
        names: names or groups of `PROVIDERS`, or `all`.
        device: where they are to run.
        released_code: path of a checkout, which takes the place of the released formulation.
        extra: more rows of ours with options, such as `train.compile=step,train.recompute=gelu`.

    Returns:
        Those that can run and differ from each other, and {name: reason} of the rest.

    Raises:
        UsageError: an unknown name or option.
    """
    known = sorted({g for p in PROVIDERS for g in p.groups}) + ["all"] + [p.name for p in PROVIDERS]
    for name in names:
        if name not in known:
            raise UsageError(f"--providers: unknown {name!r}{did_you_mean(name, known)}")
    wanted = [p for p in PROVIDERS if {p.name, *p.groups, "all"} & set(names)]
    if released_code:
        checkout = {"options": {"path": str(Path(released_code))}, "build": "released_code:ReleasedCode"}
        wanted = [
            replace(
                p, name=p.name.replace("released", "released-code"), about="the given checkout", **checkout
            )
            if p.family == "released"
            else p
            for p in wanted
        ]
    for text in extra or []:
        options = parse_settings(text)
        with_settings(Config(), options)
        wanted.append(Provider(f"ours {text}", f"this project with {text}", options=options))
    able: dict[str, Provider] = {}
    unable: dict[str, str] = {}
    for p in wanted:
        identity = str((p.build, p.family, p.resolved(device), sorted(p.options.items()), p.environment))
        if why := p.missing(device):
            unable[p.name] = why
        elif identity in able:
            unable[p.name] = f"the same as {able[identity].name} here"
        else:
            able[identity] = p
    return list(able.values()), unable


def parse_settings(text: str) -> dict[str, Any]:
    """Reads `train.compile=step,system.backend=lamb=foreach,adamw_ema=fused` as dotted options."""
    found: dict[str, Any] = {}
    # a comma that no section.option follows belongs to the value
    for setting in re.split(r",(?=\w+\.\w+=)", text):
        name, equals, value = setting.partition("=")
        if not equals or "." not in name:
            raise UsageError(
                f"--ours: expected section.option=value, got {setting!r}; e.g. train.compile=step"
            )
        found[name] = {"true": True, "false": False}.get(value, value)
        for kind in (float, int):
            try:
                found[name] = kind(value)
            except ValueError:
                break
    return found


def configuration(
    size: str = "small",
    ratio: float = 0.8,
    views: int = 5,
    batch: int = 16,
    *,
    color: bool = False,
    drop_path: float = 0.1,
    **sections: dict[str, Any],
) -> Config:
    """Returns the paper's recipe at a size, batch and masks; `sections` replace further options.

    Without warm-up epochs, so that the first steps change the weights; that changes no time.
    """
    recipe = {
        "data": {"policy": "spatial+color" if color else "spatial"},
        "mask": {"ratio": float(ratio), "views": views},
        "model": {"size": size, "drop_path": drop_path},
        "optim": {"warmup_epochs": 0.0},
        "train": {"batch_size": batch},
    }
    return from_dict(sections, from_dict(recipe, Config()))
