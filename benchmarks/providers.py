"""The registry of training steps: what `python -m benchmarks step` can put side by side."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from extrema_fast import kernels
from extrema_fast.config import Config, did_you_mean, from_dict
from extrema_fast.errors import UsageError
from extrema_fast.ops import dispatch as ops
from extrema_fast.ops import optimizers
from extrema_fast.training.memory import HUGE_PAGES, ask_for_huge_pages, keep_freed_memory
from extrema_fast.training.plan import precision as of_config

from .ours import with_settings
from .stepper import Stepper


@dataclass(frozen=True)
class Provider:
    """One way to make a training step.

    name       unique; a row of the table
    family     `released`, `strong`, `ours` or `yardstick`: which ratios it takes part in
    build      `module:Class` of a `Stepper`
    about      one line
    precision  `auto`: the configuration's; `amp`: fp16 with a loss scaler on a GPU, else as `auto`; `fp32`
    options    keyword arguments of the class (dotted configuration options for `ours`)
    groups     names under which it can be asked for together with others
    allocator  memory settings of its process on a CPU: `ours` (huge pages, freed memory is kept: what the command
               line sets), `system`, `auto`: `ours` for this project, `system` for the others
    needs      `cuda`, `triton` (that can run), `apex` (that works), or a package
    """

    name: str
    family: str
    build: str
    about: str
    precision: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    allocator: str = "auto"

    def resolved(self, device: str) -> str:
        """The precision it runs in on that device: fp32, bf16 or fp16."""
        if self.precision == "amp" and device.startswith("cuda"):
            return "fp16"
        return (
            self.precision
            if self.precision not in ("auto", "amp")
            else of_config(Config(), device[:4].rstrip(":"))
        )

    def missing(self, device: str) -> str:
        """Why it cannot run there; empty when it can."""
        for need in self.needs:
            if need == "cuda" and not device.startswith("cuda"):
                return "needs a CUDA device"
            if need == "triton" and not kernels.can_run(device)[0]:
                return kernels.can_run(device)[1]
            if need == "apex" and optimizers.find_apex("FusedAdam", device.partition(":")[0])[0] is None:
                return optimizers.find_apex("FusedAdam", device.partition(":")[0])[1]
            if need not in ("cuda", "triton", "apex") and importlib.util.find_spec(need) is None:
                return f"{need} is not installed"
        return ""

    @property
    def environment(self) -> dict[str, str]:
        """Variables of its process: ours is run as the command line runs it."""
        found: dict[str, str] = {}
        if self.allocator == "ours" or (self.allocator == "auto" and self.family == "ours"):
            ask_for_huge_pages(found)
        elif self.family == "ours":
            # a setting of the user's, here glibc's own default, keeps the product from changing any
            found |= {HUGE_PAGES: "0", "MALLOC_TOP_PAD_": "131072"}
        return found

    def eager(self) -> Provider:
        """The same arithmetic without compilation or graph capture, for comparisons."""
        if self.family == "ours":
            off = {"train.compile": "none", "train.cuda_graph": False}
            return replace(self, options=self.options | off)
        return replace(self, options={k: v for k, v in self.options.items() if k != "compile"} | self._eager)

    @property
    def _eager(self) -> dict[str, Any]:
        return {"compile": False} if self.family in ("strong", "yardstick") else {}

    def make(self, cfg: Config, device: torch.device, precision: str = "") -> Stepper:
        """Builds it (`precision`: another one than its own)."""
        if self.allocator == "ours":
            keep_freed_memory()
        module, _, name = self.build.partition(":")
        kind = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        return kind(cfg, device, precision or self.resolved(device.type), **self.options)


def _ours(
    name: str, about: str, groups: tuple[str, ...], needs: tuple[str, ...] = (), **more: Any
) -> Provider:
    return Provider(name, "ours", "ours:Ours", about, groups=groups, needs=needs, **more)


def _without_kernels() -> list[Provider]:
    # every op that has a Triton kernel: all on, then each off in turn
    named = [op for op, known in ops.IMPLEMENTATIONS.items() if "triton" in known]
    triton = {op: "triton" for op in named}

    def setting(choice: dict[str, str]) -> dict[str, str]:
        return {"system.backend": ",".join(f"{op}={name}" for op, name in choice.items())}

    found = [
        _ours(
            "ours-kernels",
            "every Triton kernel on",
            ("kernels",),
            ("cuda", "triton"),
            options=setting(triton),
        )
    ]
    for op in named:
        found.append(
            _ours(
                f"ours-kernels-without-{op}", f"every Triton kernel but {op}", ("kernels",), ("cuda", "triton"),
                options=setting(triton | {op: "auto"}),
            )
        )  # fmt: skip
    return found


PROVIDERS: tuple[Provider, ...] = (
    Provider(
        "released", "released", "released:Released", "the released formulation, eager, autocast", "amp",
        groups=("main",),
    ),
    Provider(
        "released-fp32", "released", "released:Released", "the released formulation, eager, fp32", "fp32",
        groups=("main",),
    ),
    Provider(
        "strong", "strong", "strong:Strong", "same maths: full-graph compile, SDPA, fused AdamW, foreach EMA",
        options={"compile": True}, groups=("main", "strong"),
    ),
    Provider(
        "strong-plain-attention", "strong", "strong:Strong", "strong with the attention formula instead of SDPA",
        options={"compile": True, "plain_attention": True}, groups=("main", "strong"),
    ),
    Provider(
        "strong-eager", "strong", "strong:Strong", "strong without compilation",
        options={"compile": False}, groups=("main", "strong"),
    ),
    Provider(
        "strong-eager-plain-attention", "strong", "strong:Strong", "strong, neither compilation nor SDPA",
        options={"compile": False, "plain_attention": True}, groups=("main", "strong"),
    ),
    Provider(
        "strong-fp32", "strong", "strong:Strong", "strong in fp32", "fp32",
        options={"compile": True}, groups=("fp32",),
    ),
    _ours("ours", "this project, default settings", ("main",)),
    _ours("ours-fp32", "this project in fp32", ("fp32",), precision="fp32"),
    *(
        _ours(f"ours-compile-{mode}", f"train.compile {mode}", ("modes",), options={"train.compile": mode})
        for mode in ("none", "block", "loss", "step")
    ),
    _ours("ours-cuda-graph", "train.cuda_graph", ("modes",), ("cuda",), options={"train.cuda_graph": True}),
    *(
        _ours(
            f"ours-recompute-{what}", f"train.recompute {what}", ("memory",),
            options={"train.recompute": what},
        )
        for what in ("none", "gelu", "norm")
    ),
    # how much of a ratio on a CPU is the allocator's
    _ours("ours-system-allocator", "this project, memory as the system gives it", ("allocator",), allocator="system"),
    *(
        Provider(
            f"{name}-our-allocator", "strong", "strong:Strong", f"{name} with our memory settings",
            options={"compile": compile, "plain_attention": True}, groups=("allocator",), allocator="ours",
        )
        for name, compile in (("strong-plain-attention", True), ("strong-eager-plain-attention", False))
    ),
    *_without_kernels(),
    _ours(
        "ours-xformers", "xformers' memory-efficient attention", ("libraries",), ("cuda", "xformers"),
        options={"system.attention": "xformers"},
    ),
    _ours(
        "ours-apex-adam", "NVIDIA apex's FusedAdam", ("libraries",), ("cuda", "apex"),
        options={"system.backend": "adamw_ema=apex"},
    ),
    Provider("mae", "yardstick", "yardsticks:Mae", "MAE 75 %, decoder of 8 blocks, width 512", groups=("yardsticks",)),
    Provider("supervised", "yardstick", "yardsticks:Supervised", "ViT classification", groups=("yardsticks",)),
    Provider(
        "supervised-timm", "yardstick", "yardsticks:Supervised", "ViT classification, timm's model",
        options={"library": "timm"}, groups=("yardsticks",), needs=("timm",),
    ),
)  # fmt: skip


def chosen(
    names: list[str], device: str, *, released_code: str = "", extra: list[str] | None = None
) -> tuple[list[Provider], dict[str, str]]:
    """The providers asked for by name or group, in the registry's order.

    released_code  path of a checkout: it takes the place of the re-stated formulation
    extra          `ours` with options: `train.compile=loss,train.recompute=gelu`
    returns        (those that can run and differ, {name: reason} of those that cannot)
    raises         UsageError for an unknown name
    """
    groups = {g for p in PROVIDERS for g in p.groups} | {"all"}
    for name in names:
        if name not in groups | {p.name for p in PROVIDERS}:
            known = sorted(groups) + [p.name for p in PROVIDERS]
            raise UsageError(f"--providers: unknown {name!r}{did_you_mean(name, known)}")
    wanted = [p for p in PROVIDERS if {p.name, *p.groups, "all"} & set(names)]
    if released_code:
        wanted = [
            replace(
                p,
                name=p.name.replace("released", "released-code"),
                build="released_code:ReleasedCode",
                about=p.about.replace("formulation", "code, the given checkout"),
                options={"path": released_code},
                needs=("timm",),
            )
            if p.family == "released"
            else p
            for p in wanted
        ]
    for text in extra or []:
        options = parse_settings(text)
        with_settings(Config(), options)
        wanted.append(_ours(f"ours {text}", f"this project with {text}", (), options=options))
    able: list[Provider] = []
    unable: dict[str, str] = {}
    for p in wanted:
        why = p.missing(device)
        same = next((q for q in able if _identity(q, device) == _identity(p, device)), None)
        if why or same:
            unable[p.name] = why or f"the same as {same.name} here"
        else:
            able.append(p)
    return able, unable


def _identity(p: Provider, device: str) -> tuple:
    return p.build, p.resolved(device), sorted(p.options.items()), p.environment


def parse_settings(text: str) -> dict[str, Any]:
    """`train.compile=loss,train.recompute=norm` as dotted options; raises UsageError."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or "." not in name:
            raise UsageError(f"--ours: expected section.option=value, got {part!r}; e.g. train.compile=loss")
        found[name] = {"true": True, "false": False}.get(value, value)
        for number in (int, float):
            try:
                found[name] = number(value)
                break
            except ValueError:
                continue
    return found


def configuration(
    size: str = "small",
    ratio: float = 0.8,
    views: int = 5,
    batch: int = 16,
    *,
    color: bool = False,
    drop_path: float = 0.1,
    model: dict[str, Any] | None = None,
    head: dict[str, Any] | None = None,
) -> Config:
    """The paper's recipe at a size, batch and masks, everything else at its default.

    No warm-up epochs, so that the first steps move the weights; that changes no time.
    """
    return from_dict(
        {
            "data": {"policy": "spatial+color" if color else "spatial"},
            "mask": {"ratio": float(ratio), "views": views},
            "model": {"size": size, "drop_path": drop_path} | (model or {}),
            "head": head or {},
            "optim": {"warmup_epochs": 0.0},
            "train": {"batch_size": batch},
        },
        Config(),
    )
