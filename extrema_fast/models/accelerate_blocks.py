"""timm's transformer blocks on this project's products and attention, for as long as they are stock.

A part is written out here only where calling it could do nothing else: its class is exactly timm's (or torch's),
it has no hook, no replaced `forward`, no parametrisation, no parameter of a special tensor type. Looked up at every
pass, since hooks, adapters and quantised layers come and go. Everything else is called as the owner left it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..ops import dispatch as ops
from ..ops.linear import affine

_NONE: frozenset[str] = frozenset()


class Part(NamedTuple):
    """One row of a report: a part of the model, and why its owner's module is called (empty: it is replaced)."""

    name: str
    why: str


class Timm(NamedTuple):
    """timm's classes, under the names used here; `known` holds the submodules each may have."""

    vit: type
    block: type
    attention: type
    mlp: type
    glu: type
    swiglu: type
    patch_embed: type
    patch_drop: type
    norms: tuple[type, ...]
    gelus: tuple[type, ...]
    known: dict[type, frozenset[str]]


def timm_classes() -> Timm:
    """raises ImportError without timm."""
    import timm.layers as layers
    from timm.models import vision_transformer as vit

    norms = (nn.LayerNorm, layers.LayerNorm)
    gelus = (nn.GELU, layers.GELU)
    hidden = frozenset({"act", "drop1", "norm", "fc2", "drop2"})
    known = {
        vit.Block: frozenset(
            {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
        ),
        vit.Attention: frozenset(
            {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
        ),
        layers.Mlp: hidden | {"fc1"},
        layers.GluMlp: hidden | {"fc1"},
        layers.SwiGLU: hidden | {"fc1_g", "fc1_x"},
        layers.PatchEmbed: frozenset({"proj", "norm"}),
        **dict.fromkeys((nn.Linear, nn.Conv2d, nn.Identity, nn.Dropout, *norms, *gelus), _NONE),
    }  # fmt: skip
    return Timm(
        vit.VisionTransformer, vit.Block, vit.Attention, layers.Mlp, layers.GluMlp, layers.SwiGLU,
        layers.PatchEmbed, layers.PatchDropout, norms, gelus, known,
    )  # fmt: skip


def why_called(module: nn.Module, known: dict[type, frozenset[str]]) -> str:
    """Why calling the module could do more than its class's formula; empty when it could not."""
    cls, own = type(module), module.__dict__
    if cls not in known:
        return f"{cls.__name__} is not stock"
    if "forward" in own or cls.forward.__module__ != cls.__module__:
        return f"the forward method of this {cls.__name__} is replaced"
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "it has hooks"
    if own.get("_compiled_call_impl") is not None:
        return "it is compiled by itself"
    for name, p in own["_parameters"].items():
        if p is not None and type(p) is not nn.Parameter and type(p) is not Tensor:
            return f"its {name} is a {type(p).__name__}"
    if not own["_modules"].keys() <= known[cls]:
        extra = ", ".join(sorted(own["_modules"].keys() - known[cls]))
        return f"it has a part that stock lacks: {extra}"
    return ""


def any_global_hook() -> bool:
    """Whether hooks are registered for every module of the process."""
    return torch_module._has_any_global_hook()


class Blocks:
    """Runs timm's blocks, each part written out or called.

    timm     its classes
    backend  of self-attention, as `Encoder.set_attention`
    """

    def __init__(self, timm: Timm, backend: str) -> None:
        self.timm, self.known, self.backend = timm, timm.known, backend

    # ---- what is replaced ------------------------------------------------------------------------

    def why_attention(self, attn: nn.Module) -> str:
        """Why `attn` is called; empty when its formula is written out."""
        why = why_called(attn, self.known)
        if why:
            return why
        if type(attn) is not self.timm.attention:
            return f"{type(attn).__name__} is no attention that is known"
        if why_called(attn.attn_drop, self.known):
            return f"attn_drop: {why_called(attn.attn_drop, self.known)}"
        if attn.training and attn.attn_drop.p > 0:
            return "attention dropout is active"
        # fused attention has this factor built in
        if not attn.fused_attn and attn.scale != attn.head_dim**-0.5:
            return f"its scale is {attn.scale}, not head_dim ** -0.5"
        return ""

    def why_mlp(self, mlp: nn.Module) -> str:
        """Why `mlp` is called; empty when its formula is written out."""
        why = why_called(mlp, self.known)
        if why:
            return why
        if type(mlp) not in (self.timm.mlp, self.timm.glu, self.timm.swiglu):
            return f"{type(mlp).__name__} is no MLP that is known"
        return "it is a convolution" if getattr(mlp, "chunk_dim", -1) != -1 else ""

    def why_block(self, block: nn.Module) -> str:
        """Why the whole block is called; empty when its two branches are run one by one."""
        why = why_called(block, self.known)
        return why or ("" if type(block) is self.timm.block else f"{type(block).__name__} is no Block")

    def why_norm(self, norm: nn.Module) -> str:
        """Why `norm` is called; empty when it runs inside the product that follows."""
        if type(norm) not in self.timm.norms:
            return f"{type(norm).__name__} is not LayerNorm"
        if norm.weight is None or norm.bias is None:
            return "it has no weight or no bias"
        if getattr(norm, "_fast_norm", False):
            return "timm's fast norm is on"
        return why_called(norm, self.known)

    def why_linear(self, layer: nn.Module) -> str:
        """Why `layer` is called; empty when its product is written out."""
        return (
            why_called(layer, self.known)
            if type(layer) is nn.Linear
            else f"{type(layer).__name__} is not Linear"
        )

    def is_gelu(self, act: nn.Module) -> bool:
        """Whether `act` is the exact GELU, which runs inside the product that follows."""
        exact = type(act) in self.timm.gelus and getattr(act, "approximate", "none") == "none"
        return exact and not why_called(act, self.known)

    def is_idle(self, module: nn.Module) -> bool:
        """Whether calling `module` would return its input."""
        idle = type(module) is nn.Identity or (
            type(module) is nn.Dropout and not (module.training and module.p > 0)
        )
        return idle and not why_called(module, self.known)

    def parts(self, name: str, block: nn.Module) -> Iterator[Part]:
        """The report's rows of one block."""
        why = self.why_block(block)
        if why:
            yield Part(name, why)
            return
        for norm, branch in (("norm1", "attn"), ("norm2", "mlp")):
            yield Part(f"{name}.{norm}", self.why_norm(getattr(block, norm)))
            module = getattr(block, branch)
            why = self.why_attention(module) if branch == "attn" else self.why_mlp(module)
            yield Part(f"{name}.{branch}", why)
            if why:
                continue
            for key, part in module.named_children():
                if key in ("qkv", "proj", "gate", "fc1", "fc1_g", "fc1_x", "fc2"):
                    yield Part(f"{name}.{branch}.{key}", self.why_linear(part))

    # ---- running ---------------------------------------------------------------------------------

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        """As `block(x)`; x [R, n, D]."""
        if any_global_hook() or self.why_block(block):
            return block(x)
        x = x + self._last(block, "1", self.attend(block.attn, x, block.norm1))
        return x + self._last(block, "2", self.mix(block.mlp, x, block.norm2))

    def _last(self, block: nn.Module, which: str, y: Tensor) -> Tensor:
        return self.maybe(getattr(block, "drop_path" + which), self.maybe(getattr(block, "ls" + which), y))

    def maybe(self, module: nn.Module, x: Tensor) -> Tensor:
        """`module(x)`, without the call where it would return x."""
        return x if self.is_idle(module) else module(x)

    def linear(self, layer: nn.Module, x: Tensor, before: nn.Module | str | None = None) -> Tensor:
        """`layer(before(x))`; before: a norm, "gelu" or None."""
        if isinstance(before, nn.Module) and self.why_norm(before):
            x, before = self.maybe(before, x), None
        if self.why_linear(layer):
            if before is not None:
                x = nn.functional.gelu(x) if before == "gelu" else before(x)
            return layer(x)
        return affine(x, layer.weight, layer.bias, before)

    def attend(self, attn: Any, x: Tensor, norm: nn.Module) -> Tensor:
        """`attn(norm(x))`; x [R, n, D]."""
        if self.why_attention(attn):
            return attn(norm(x))
        gate = getattr(attn, "gate", None)
        if gate is not None:
            x, norm = self.maybe(norm, x), None
            gate = self.linear(gate, x).sigmoid()
        r, n, _ = x.shape
        qkv = self.linear(attn.qkv, x, norm).view(r, n, 3, attn.num_heads, attn.head_dim)
        if not (self.is_idle(attn.q_norm) and self.is_idle(attn.k_norm)):
            q, k, v = qkv.unbind(2)
            # autocast may have the norms return fp32
            qkv = torch.stack([attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype), v], 2)
        x = ops.attention(qkv, self.backend).flatten(2)
        inner = getattr(attn, "norm", None)
        if gate is not None:
            x = (x if inner is None else self.maybe(inner, x)) * gate
            inner = None
        if inner is not None and self.is_idle(inner):
            inner = None
        return self.maybe(attn.proj_drop, self.linear(attn.proj, x, inner))

    def mix(self, mlp: Any, x: Tensor, norm: nn.Module) -> Tensor:
        """`mlp(norm(x))`; x [R, n, D]."""
        if self.why_mlp(mlp):
            return mlp(norm(x))
        before = None
        if type(mlp) is self.timm.swiglu:
            x = self.maybe(norm, x)
            x = mlp.act(self.linear(mlp.fc1_g, x)) * self.linear(mlp.fc1_x, x)
        elif type(mlp) is self.timm.glu:
            a, b = self.linear(mlp.fc1, x, norm).chunk(2, -1)
            x = a * mlp.act(b) if mlp.gate_last else mlp.act(a) * b
        else:
            x = self.linear(mlp.fc1, x, norm)
            if self.is_gelu(mlp.act) and self.is_idle(mlp.drop1) and self.is_idle(mlp.norm):
                before = "gelu"
            else:
                x = mlp.act(x)
        if before is None:
            x = self.maybe(mlp.drop1, x)
            before = None if self.is_idle(mlp.norm) else mlp.norm
        return self.maybe(mlp.drop2, self.linear(mlp.fc2, x, before))
