"""residual_norm: registered ops, autograd, the public function (README.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _launch
from .._autograd import first_order
from .._launch import FLOATS, check
from .reference import residual_norm_reference

MAX_WIDTH = 4096


@_launch.op(
    "residual_norm_fwd(Tensor x, Tensor? branch, Tensor? bias, Tensor? scale, Tensor? gain, Tensor? shift, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    "forward",
)
def _fwd(x, branch, bias, scale, gain, shift, eps, dtype):
    out = x.new_empty(0) if branch is None else x.new_empty(x.shape)
    if gain is None:
        return out, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    statistics = (x.new_empty(x.shape[:2], dtype=_launch.wide(x.dtype)) for _ in range(2))
    return out, x.new_empty(x.shape, dtype=dtype), *statistics


@_launch.op(
    "residual_norm_again(Tensor out, Tensor mean, Tensor rstd, Tensor gain, Tensor? shift, ScalarType dtype) -> Tensor",
    "again",
)
def norm_again(out, mean, rstd, gain, shift, dtype):
    return out.new_empty(out.shape, dtype=dtype)


@_launch.op(
    "residual_norm_bwd(Tensor? du, Tensor? dout, Tensor? out, Tensor? mean, Tensor? rstd, Tensor? gain, Tensor? scale,"
    " bool bias, ScalarType dtype, ScalarType branch_dtype) -> (Tensor, Tensor, Tensor)",
    "backward",
)
def _bwd(du, dout, out, mean, rstd, gain, scale, bias, dtype, branch_dtype):
    norm = gain is not None
    like = du if norm else dout
    dx = like.new_empty(like.shape, dtype=dtype) if norm else like.new_empty(0)
    dbranch = like.new_empty(0) if scale is None else like.new_empty(like.shape, dtype=branch_dtype)
    return dx, dbranch, like.new_empty(2 * norm + bias, like.shape[-1], dtype=_launch.wide(like.dtype))


class _ResidualNorm(torch.autograd.Function):
    """(out, u, mean, rstd)."""

    @staticmethod
    def forward(ctx, x, branch, bias, scale, gain, shift, eps, dtype):
        out, u, mean, rstd = _fwd(x, branch, bias, scale, gain, shift, eps, dtype)
        # an output must not be an input
        out = x.view_as(x) if branch is None else out
        ctx.save_for_backward(out, mean, rstd, gain, scale)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, bias, gain, shift)]
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return out, u, mean, rstd

    @staticmethod
    @first_order("residual_norm")
    def backward(ctx, dout, du, *_):
        out, mean, rstd, gain, scale = ctx.saved_tensors
        x_dtype, branch_dtype, bias_dtype, gain_dtype, shift_dtype = ctx.dtypes
        if du is None:
            # the norm's result is not used
            dx, dbranch, dbias = _branch_gradients(dout, scale, *ctx.dtypes[1:3])
            return dx, dbranch, dbias, *(None,) * 5
        bias = bias_dtype is not None
        dx, dbranch, sums = _bwd(
            du, dout, out, mean, rstd, gain, scale, bias, x_dtype, branch_dtype or x_dtype
        )
        if branch_dtype is None:
            dbranch = None
        elif scale is None:
            dbranch = dx.to(branch_dtype)
        dshift = None if shift_dtype is None else sums[1].to(shift_dtype)
        return (
            dx,
            dbranch,
            sums[2].to(bias_dtype) if bias else None,
            None,
            sums[0].to(gain_dtype),
            dshift,
            None,
            None,
        )


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, bias, scale):
        ctx.save_for_backward(scale)
        ctx.dtypes = branch.dtype, None if bias is None else bias.dtype
        return _fwd(x, branch, bias, scale, None, None, 0.0, x.dtype)[0]

    @staticmethod
    @first_order("residual_norm")
    def backward(ctx, dout):
        (scale,) = ctx.saved_tensors
        return *_branch_gradients(dout, scale, *ctx.dtypes), None


def _branch_gradients(dout, scale, branch_dtype, bias_dtype):
    """(dx, dbranch, dbias) without a norm: one pass, or none."""
    if dout is None or branch_dtype is None:
        return dout, None, None
    if scale is None and bias_dtype is None:
        return dout, dout.to(branch_dtype), None
    bias = bias_dtype is not None
    _, dbranch, sums = _bwd(None, dout, None, None, None, None, scale, bias, dout.dtype, branch_dtype)
    return dout, dout.to(branch_dtype) if scale is None else dbranch, sums[0].to(bias_dtype) if bias else None


def residual_norm(
    x: Tensor,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    *,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`out = x + scale (branch + bias)` and `u = LN(out)` in one pass (maths: README.md in this folder).

    Runs the plain PyTorch definition where Triton cannot run.

    Args:
        x: [R, n, D] bf16 | fp16 | fp32 | fp64: the residual stream.
        gain: [D] of the norm; None: no norm, `u` is None.
        shift: [D] of the norm, or None.
        eps: of the norm.
        branch: [R, n, D]: what is added, without the bias of the linear layer that made it; None: `out` is `x`.
        bias: [D], or None; its gradient costs no pass over the tokens.
        scale: [R]: drop-path factor of each row, without gradient; None: 1.
        dtype: of `u`; that of `x` by default.

    Returns:
        (out [R, n, D] in the dtype of `x`, u [R, n, D] in `dtype` or None).

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: names the argument, what it got and what it expects.
    """
    out, u, _, _ = residual_norm_stats(
        x, gain, shift, eps, branch=branch, bias=bias, scale=scale, dtype=dtype
    )
    return out, u


def residual_norm_stats(
    x: Tensor,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    *,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `residual_norm`; also mean and 1 / standard deviation [R, n], from which `norm_again` recomputes u.

    They are None where there is no norm, or where Triton cannot run.
    """
    check("x", x, ("R", "n", f"D <= {MAX_WIDTH}"), FLOATS)
    rows, n, width = x.shape
    if width > MAX_WIDTH:
        raise ValueError(f"x: expected at most {MAX_WIDTH} columns, got {width}; use torch's layer_norm")
    for name, vector in (("gain", gain), ("shift", shift), ("bias", bias)):
        if vector is not None:
            check(name, vector, (width,), FLOATS, x)
    if branch is not None:
        check("branch", branch, (rows, n, width), FLOATS, x)
    elif bias is not None or scale is not None:
        raise ValueError("branch: expected [R, n, D] beside bias or scale, got None")
    if gain is None and (shift is not None or branch is None):
        raise ValueError("gain: expected [D] beside shift or without a branch, got None")
    if scale is not None:
        check("scale", scale, (rows,), FLOATS, x)
    # there is no fp64 on a GPU
    if not _launch.use_triton(x) or (x.dtype == torch.float64 and x.device.type != "cpu"):
        found = residual_norm_reference(
            x, gain, shift, eps, branch=branch, bias=bias, scale=scale, dtype=dtype
        )
        return *found, None, None
    if gain is None:
        return _Residual.apply(x, branch, bias, scale), None, None, None
    return _ResidualNorm.apply(x, branch, bias, scale, gain, shift, eps, dtype or x.dtype)
