"""Linear layers with fp32 weights and low-precision matmuls, with explicit forward and backward passes.

`y = W f(x) + b`, where f is the identity, LayerNorm or GELU: the three cases in a transformer block. Unlike autocast,
this keeps no low-precision weight between forward and backward (or reads the bf16 shadow weight that is synced after
every optimizer step), computes weight gradients in their final layout, adds the bias inside the matmul on a CPU, and
lets the caller choose what the backward pass recomputes (`train.recompute`). In fp32 and fp64 the plain formula runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels._autograd import first_order, transforming
from ..kernels.mlp.op import weight_gradient
from .stock import is_stock

# what the backward pass recomputes instead of keeping it, by `train.recompute`
RECOMPUTE = {"none": frozenset(), "gelu": frozenset({"gelu"}), "norm": frozenset({"gelu", "norm"})}


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's type inside autocast, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if autocasts(kind) else x.dtype


def autocasts(kind: str) -> bool:
    """Whether autocast is on for this type of device."""
    # torch raises for devices that have none
    return kind != "meta" and torch.is_autocast_enabled(kind)


class Linear(nn.Linear):
    """`nn.Linear` whose own call has the low-precision matmuls of this module, for layers in a `Sequential`.

    The encoder's layers are plain `nn.Linear`, which other tools know, and their parts call `linear`. Both may hold
    copies in low precision of their weight, `shadow`, and of their bias, `bias_shadow`, synced after every optimizer
    step (`ExtreMA.sync_shadow_weights`).
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype computed in."""
        return affine(x, self.weight, self.bias, shadows=shadows(self))


def shadows(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The copies in low precision of a layer's weight and bias, where it has them."""
    own = layer.__dict__
    return own.get("shadow"), own.get("bias_shadow")


def linear(
    x: Tensor,
    layer: Any,
    before: nn.Module | str | None = None,
    recompute: bool = False,
    check: Callable[[nn.Module, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """`layer(f(x))`.

    Args:
        x: [..., in].
        layer: a stock `nn.Linear`, of which the weights are read; any other module (an adapter, an FP8 layer, a layer
            with hooks) is called.
        before: f: a stock LayerNorm over the last axis, "gelu" (exact), or None; a module of another class is called.
        recompute: the backward pass recomputes f(x) from x; otherwise it is kept.
        check: called with a layer that was called, x, and its result.

    Returns:
        [..., out] in autocast's dtype, else that of x.
    """
    if is_stock(layer, nn.Linear, Linear):
        # `layer.weight` takes as long as the check
        own = layer._parameters
        return affine(x, own["weight"], own["bias"], before, recompute, shadows(layer))
    out = layer(_prologue(x, before))
    if check is not None:
        check(layer, x, out)
    return out


def affine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: nn.Module | str | None = None,
    recompute: bool = False,
    shadows: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """As `linear`, of parameters that may be any module's; `shadows`: both in low precision, or None.

    A weight that is no plain parameter (computed from others, quantized, distributed, of torch.func) is left to torch.
    """
    dtype = compute_dtype(x)
    norm = before if isinstance(before, nn.LayerNorm) and before.weight is not None else None
    # another module: an Identity stands where a norm has been taken out
    if (
        dtype not in (torch.bfloat16, torch.float16)
        or (isinstance(before, nn.Module) and norm is None)
        or type(weight) is not nn.Parameter
    ):
        return F.linear(_prologue(x, before), weight, bias)
    kind = before if norm is None else "norm"
    gain, shift, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    if transforming() or not torch.is_grad_enabled():
        return _forward(x, weight, bias, gain, shift, eps, *shadows, kind, dtype)[0]
    return _Linear.apply(x, weight, bias, gain, shift, eps, *shadows, kind, recompute, dtype)


def _prologue(x: Tensor, before: nn.Module | str | None) -> Tensor:
    if isinstance(before, nn.Module):
        return before(x)
    return F.gelu(x) if before == "gelu" else x


_NOTHING = contextlib.nullcontext()


def _without_autocast(x: Tensor) -> Any:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else _NOTHING


def _eager_bf16_on_cpu(x: Tensor) -> bool:
    traced = torch.compiler.is_compiling() or transforming()
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not traced


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # oneDNN adds the bias while it writes; addmm writes the bias first and reads it back
    if _HAS_ONEDNN and _eager_bf16_on_cpu(x):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


# whether oneDNN multiplies bf16 on this processor
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


def _norm(
    x: Tensor, gain: Tensor, shift: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    # statistics in fp32 either way; a CPU takes mixed types, a GPU does not
    if not (_eager_bf16_on_cpu(x) and gain.dtype == torch.float32):
        x = x.to(gain.dtype)
    u, mean, rstd = torch.ops.aten.native_layer_norm.default(x, (x.shape[-1],), gain, shift, eps)
    return u.to(dtype), mean, rstd


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    shadow: Tensor | None,
    bias_shadow: Tensor | None,
    kind: Any,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(y, f(x), the norm's mean and 1 / standard deviation)."""
    with _without_autocast(x):
        w = weight.to(dtype) if shadow is None else shadow
        mean = rstd = None
        if gain is not None:
            u, mean, rstd = _norm(x, gain, shift, eps, dtype)
        elif kind == "gelu":
            u = F.gelu(x).to(dtype)
        else:
            u = x.to(dtype)
        if bias is not None:
            bias = bias.to(dtype) if bias_shadow is None else bias_shadow
        return _matmul(u, w, bias), u, mean, rstd


class _Linear(torch.autograd.Function):
    """One prologue and one matmul; gradients of x, weight, bias, and the norm's gain and shift."""

    @staticmethod
    def forward(ctx, x, weight, bias, gain, shift, eps, shadow, bias_shadow, kind, recompute, dtype):
        ctx.kind, ctx.eps, ctx.dtype, ctx.wide = kind, eps, dtype, weight.dtype
        y, u, mean, rstd = _forward(x, weight, bias, gain, shift, eps, shadow, bias_shadow, kind, dtype)
        # the gradient of a prologue needs x itself
        first = x if kind else None
        kept = None if recompute and kind else u
        # a weight is cast once more rather than kept in both types
        ctx.save_for_backward(first, kept, weight if shadow is None else shadow, gain, shift, mean, rstd)
        ctx.x_dtype, ctx.has_bias = x.dtype, bias is not None
        return y

    @staticmethod
    @first_order("linear layer in 16 bits", "fp32")
    def backward(ctx, dy):
        x, u, w, gain, shift, mean, rstd = ctx.saved_tensors
        needs, dtype = ctx.needs_input_grad, ctx.dtype
        dx = dweight = dbias = dgain = dshift = None
        with _without_autocast(dy):
            dy = dy.to(dtype)
            flat = dy.reshape(-1, dy.shape[-1])
            if needs[1]:
                if u is None:
                    gelu = ctx.kind == "gelu"
                    u = F.gelu(x).to(dtype) if gelu else _norm(x, gain, shift, ctx.eps, dtype)[0]
                # [out, in], in the weight's own layout
                dweight = weight_gradient(flat, u, ctx.wide)
            if ctx.has_bias and needs[2]:
                dbias = flat.sum(0).to(ctx.wide)
            if needs[0] or needs[3] or needs[4]:
                du = dy @ w.to(dtype)
                if ctx.kind == "gelu":
                    dx = torch.ops.aten.gelu_backward.default(du.to(x.dtype), x)
                elif ctx.kind == "norm":
                    dx, dgain, dshift = _norm_backward(du, x, mean, rstd, gain, shift)
                else:
                    dx = du
                dx = dx.to(ctx.x_dtype)
        return dx, dweight, dbias, dgain, dshift, *(None,) * 6


def _norm_backward(
    du: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not (_eager_bf16_on_cpu(x) and gain.dtype == torch.float32):
        du, x = du.to(gain.dtype), x.to(gain.dtype)
    return torch.ops.aten.native_layer_norm_backward.default(
        du, x, (x.shape[-1],), mean, rstd, gain, shift, [True, True, shift is not None]
    )
