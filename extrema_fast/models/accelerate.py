"""Masked encoding with an existing timm VisionTransformer.

`accelerate(vit)` holds a reference and no weights, so the owner's `state_dict`, optimizer, EMA and
DistributedDataParallel are not affected. Only kept patches are embedded, and only they and the prefix tokens (class
token, registers) run through the blocks. Outputs and gradients equal those of the plain way: patch_embed, positions,
gathering the kept patches, norm_pre, blocks and norm, all timm's own.

Shape letters: B images, V views, R = V B rows (view-major), K kept patches, N patches, P prefix tokens, D width.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UsageError, cannot_import
from ..ops import dispatch as ops
from ..ops.linear import affine, compute_dtype
from ..ops.stock import reason
from .layers import check_images, fit, reads
from .masking import check_keep, image_major

log = logging.getLogger(__name__)


class EncodedViT(NamedTuple):
    """The result of `Accelerated.encode`; with views, [B, V, ...] instead of [B, ...].

    Attributes:
        cls: [B, D], or None without a class token.
        patches: [B, K, D]; token j belongs to patch keep[..., j].
        keep: [B, K] integer.
        grid: (rows, columns) of patches in the image.
        prefix: [B, P, D] class token, then registers, or None if there are neither.
        tokens: [B, P + K, D] prefix and patches in one tensor; `cls`, `prefix` and `patches` are views of it.
    """

    cls: Tensor | None
    patches: Tensor
    keep: Tensor
    grid: tuple[int, int]
    prefix: Tensor | None
    tokens: Tensor


class Report(dict[str, str]):
    """The parts of a model, each with the reason why the owner's module is called; empty: the part is replaced."""

    @property
    def replaced(self) -> list[str]:
        """Names of the parts that run on this project's code."""
        return [name for name, reason in self.items() if not reason]

    @property
    def called(self) -> dict[str, str]:
        """Names of the parts that are not replaced, with the reasons."""
        return {name: reason for name, reason in self.items() if reason}

    def __str__(self) -> str:
        lines = [f"{name}: called as it is ({reason})" for name, reason in self.called.items()]
        return "\n".join([f"{len(self.replaced)} of {len(self)} parts replaced", *lines])


class Accelerated:
    """The result of `accelerate` (`weights.vit`).

    It is not a Module, so a model that stores it does not register the weights twice.
    """

    def __init__(self, vit: nn.Module, attention: str = "auto", strict: bool = False) -> None:
        ops.check_attention_name(attention)
        try:
            self.stock = _Stock()
        except (ImportError, RuntimeError) as error:
            raise UsageError(f"accelerate: {cannot_import('timm', error, 'timm')}") from error
        self.stock.check_model(vit)
        # Any: attributes of timm's classes, which are not installed everywhere
        self.vit: Any = vit
        self.attention, self.strict = attention, strict
        report = self.report()
        self._check_strict(report)
        log.info("accelerate %s: %s", type(vit).__name__, report)

    def report(self) -> Report:
        """What the next pass replaces, part by part, and why other parts are not replaced."""
        report = Report(patch_embed=self.stock.patch_embed_reason(self.vit.patch_embed))
        if reason := self.stock.reason(self.vit.blocks, nn.Sequential):
            return Report(report, blocks=reason)
        for i, block in enumerate(self.vit.blocks):
            report.update(self.stock.report(f"blocks.{i}", block))
        return report

    def encode(self, images: Tensor, keep: Tensor | None = None, norm: bool = True) -> EncodedViT:
        """Encodes prefix tokens and kept patches; no other patch is embedded or attended to.

        Double backward works in fp32 and fp64 only, since 16-bit matmuls have a custom backward pass.

        Args:
            images: [B, C, H, W] float, normalized, of a size that `vit` accepts.
            keep: keep indices, [B, K] or [B, V, K] integer in [0, N), counting patches only, or None to keep all
                patches. Their order is preserved.
            norm: whether to apply the model's final norm. Its `fc_norm` belongs to the head and is not applied.

        Returns:
            EncodedViT(cls, patches, keep, grid, prefix, tokens).

        Raises:
            UsageError: an invalid argument; the message says what was expected and what was given. In training mode
                also for a model with patch dropout.
        """
        check_images(images)
        self.stock.check_options(self.vit)
        if self.strict and not torch.compiler.is_compiling():
            self._check_strict(self.report())
        vit = self.vit
        if keep is None:
            embedded, grid = self._embed_all(images)
            n = grid[0] * grid[1]
            keep = torch.arange(n, device=images.device).expand(images.shape[0], n)
            x = vit._pos_embed(embedded)
        else:
            x, grid = self._embed_kept(images, keep)
        x = self._trunk(vit.norm_pre(x))
        x = image_major(self._fit(vit.norm(x), x, vit.norm) if norm else x, keep)
        p = vit.num_prefix_tokens
        cls = None if vit.cls_token is None else x[..., 0, :]
        return EncodedViT(cls, x[..., p:, :], keep, grid, x[..., :p, :] if p else None, x)

    def forward_features(
        self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As `vit.forward_features(images)`: [B, P + N, D] after the final norm.

        Raises:
            UsageError: an attention mask is given; they are not supported.
        """
        if attn_mask is not None or is_causal:
            raise UsageError(
                "attn_mask, is_causal: accelerate attends to all tokens; use vit.forward_features, or `keep` of "
                "encode to leave patches out"
            )
        return self.encode(images).tokens

    def _check_strict(self, report: Report) -> None:
        if self.strict and report.called:
            raise UsageError(f"accelerate: strict, but {report}")

    # ---- embedding -------------------------------------------------------------------------------

    def _embed_all(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """All patches as the owner's module returns them, [B, N, D] or [B, rows, columns, D]; and the grid."""
        embed = self.vit.patch_embed
        if self._embeds_kept_only():
            self._stock_grid(images)
        x = embed(images)
        if not isinstance(x, Tensor) or x.dim() not in (3, 4) or x.shape[0] != images.shape[0]:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UsageError(
                f"vit.patch_embed: expected [B, N, D] or [B, rows, columns, D], it returned {shape}"
            )
        if x.dim() == 4:
            return x, (x.shape[1], x.shape[2])
        n = x.shape[1]
        grid = getattr(embed, "grid_size", None) or _square_grid(n, *images.shape[-2:])
        if grid[0] * grid[1] != n:
            raise UsageError(f"vit.patch_embed: returned {n} patches, its grid is {grid[0]} x {grid[1]}")
        return x, tuple(grid)

    def _embed_kept(self, images: Tensor, keep: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Prefix and kept patches with positions, [R, P + K, D]; and the grid."""
        vit, b = self.vit, images.shape[0]
        embedded = None
        if self._embeds_kept_only():
            grid = self._stock_grid(images)
        else:
            embedded, grid = self._embed_all(images)
        rows = check_keep(keep, b, grid[0] * grid[1], images.device)
        pos = self._positions(grid)
        shared = 0 if vit.no_embed_class else vit.num_prefix_tokens
        patch_pos = None if pos is None else pos[shared:]
        if embedded is None:
            x = self._gather_patches(images, rows, grid, patch_pos)
        elif patch_pos is not None and patch_pos.dtype == embedded.dtype:
            x = ops.token_gather(embedded.flatten(1, -2), rows, patch_pos)
        else:
            x = _add_positions(ops.token_gather(embedded.flatten(1, -2), rows), rows, patch_pos)
        prefix = [t[0] for t in (vit.cls_token, vit.reg_token) if t is not None]
        if prefix:
            # [P, D], the same for every row
            first = torch.cat(prefix)
            first = first if pos is None or not shared else first + pos[:shared]
            # as under autocast, the widest type wins
            dtype = torch.promote_types(first.dtype, x.dtype)
            x = torch.cat([first.to(dtype).expand(x.shape[0], -1, -1), x.to(dtype)], 1)
        # timm drops positions only where there are any
        return x if pos is None else vit.pos_drop(x), grid

    def _gather_patches(
        self, images: Tensor, keep: Tensor, grid: tuple[int, int], pos: Tensor | None
    ) -> Tensor:
        """Reads and embeds the kept patches only; [R, K, D] with positions."""
        embed = self.vit.patch_embed
        proj, p = embed.proj, embed.patch_size[0]
        # a convolution leaves out the pixels that fill no patch
        images = images[..., : grid[0] * p, : grid[1] * p]
        has_norm = not self.stock.is_idle(embed.norm)
        # the op adds positions in the type it computes in; autocast keeps the sum in theirs
        if pos is not None and not has_norm and compute_dtype(images) == pos.dtype:
            return ops.patch_gather(images, keep, proj.weight, proj.bias, pos)
        zeros = proj.weight.new_zeros(grid[0] * grid[1], proj.out_channels)
        tokens = ops.patch_gather(images, keep, proj.weight, proj.bias, zeros)
        return _add_positions(embed.norm(tokens) if has_norm else tokens, keep, pos)

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        """[P + N, D], or [N, D] where the prefix has none."""
        vit = self.vit
        if vit.pos_embed is None:
            return None
        if not vit.dynamic_img_size:
            return vit.pos_embed[0]
        from timm.layers import resample_abs_pos_embed

        return resample_abs_pos_embed(
            vit.pos_embed,
            new_size=list(grid),
            old_size=vit.patch_embed.grid_size,
            num_prefix_tokens=0 if vit.no_embed_class else vit.num_prefix_tokens,
        )[0]

    def _embeds_kept_only(self) -> bool:
        return not self.stock.patch_embed_reason(self.vit.patch_embed)

    def _stock_grid(self, images: Tensor) -> tuple[int, int]:
        """The grid of a stock PatchEmbed, with its checks of the size."""
        embed, (height, width) = self.vit.patch_embed, images.shape[-2:]
        p = embed.patch_size[0]
        check_images(images, embed.proj.in_channels, embed.proj.weight.dtype)
        if embed.img_size is not None and embed.strict_img_size and (height, width) != tuple(embed.img_size):
            raise UsageError(
                f"images: {height} x {width} is not the size {tuple(embed.img_size)} of this model; use "
                "vit.set_input_size, or create it with dynamic_img_size=True"
            )
        if embed.img_size is not None and not embed.strict_img_size and (height % p or width % p):
            raise UsageError(f"images: {height} x {width} is not a multiple of the patch size {p}")
        if height < p or width < p:
            raise UsageError(f"images: {height} x {width} is smaller than a patch of {p}")
        return height // p, width // p

    # ---- blocks ----------------------------------------------------------------------------------

    def _trunk(self, x: Tensor) -> Tensor:
        vit = self.vit
        if self.stock.reason(vit.blocks, nn.Sequential):
            return vit.blocks(x)
        for block in vit.blocks:
            if vit.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._block, block, x, use_reentrant=False)
            else:
                x = self._block(block, x)
        return x

    def _block(self, block: Any, x: Tensor) -> Tensor:
        """`block(x)`; x [R, n, D]."""
        if self.stock.reason(block, self.stock.block):
            return self._fit(block(x), x, block)
        x = x + self._branch(self._attention(block.attn, x, block.norm1), block.ls1, block.drop_path1)
        return x + self._branch(self._mlp(block.mlp, x, block.norm2), block.ls2, block.drop_path2)

    def _branch(self, x: Tensor, *steps: nn.Module) -> Tensor:
        for step in steps:
            x = self._fit(step(x), x, step)
        return x

    def _fit(self, out: Any, x: Tensor, part: nn.Module, width: int | None = None) -> Tensor:
        """What a part returned for x; raises UsageError naming it unless it is [..., width] (default: as wide as x)."""
        shape = x.shape if width is None else torch.Size((*x.shape[:-1], width))
        if isinstance(out, Tensor) and out.shape == shape:
            return out
        return fit(out, shape, next(f"vit.{name}" for name, m in self.vit.named_modules() if m is part))

    def _linear(self, layer: Any, x: Tensor, before: Any = None, width: int | None = None) -> Tensor:
        """`layer(before(x))`, of `width` where it is known; before: a norm, "gelu" or None."""
        if isinstance(before, nn.Module) and self.stock.norm_reason(before):
            x, before = self._fit(before(x), x, before), None
        if self.stock.reason(layer, nn.Linear):
            out = layer(x if before is None else F.gelu(x) if before == "gelu" else before(x))
        else:
            out = affine(x, layer.weight, layer.bias, before)
        return out if width is None else self._fit(out, x, layer, width)

    def _attention(self, attn: Any, x: Tensor, norm: nn.Module) -> Tensor:
        """`attn(norm(x))`; x [R, n, D]."""
        stock = self.stock
        if stock.attention_reason(attn):
            return self._fit(attn(self._fit(norm(x), x, norm)), x, attn)
        r, n, width = x.shape
        qkv = self._linear(attn.qkv, x, norm, 3 * attn.num_heads * attn.head_dim)
        qkv = qkv.view(r, n, 3, attn.num_heads, attn.head_dim)
        if not (stock.is_idle(attn.q_norm) and stock.is_idle(attn.k_norm)):
            q, k, v = qkv.unbind(2)
            # under autocast the norms may return fp32
            qkv = torch.stack([attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype), v], 2)
        x = ops.attention(qkv, self.attention).flatten(2)
        return attn.proj_drop(self._linear(attn.proj, x, getattr(attn, "norm", None), width))

    def _mlp(self, mlp: Any, x: Tensor, norm: nn.Module) -> Tensor:
        """`mlp(norm(x))`; x [R, n, D]."""
        stock = self.stock
        if stock.mlp_reason(mlp):
            return self._fit(mlp(self._fit(norm(x), x, norm)), x, mlp)
        width, hidden = x.shape[-1], reads(mlp.fc2)
        if type(mlp) is stock.swiglu:
            x = self._fit(norm(x), x, norm)
            x = mlp.act(self._linear(mlp.fc1_g, x, None, hidden)) * self._linear(mlp.fc1_x, x, None, hidden)
        elif type(mlp) is stock.glu:
            a, b = self._linear(mlp.fc1, x, norm, hidden and 2 * hidden).chunk(2, -1)
            x = a * mlp.act(b) if mlp.gate_last else mlp.act(a) * b
        else:
            x = self._linear(mlp.fc1, x, norm, hidden)
            if stock.is_gelu(mlp.act) and stock.is_idle(mlp.drop1) and stock.is_idle(mlp.norm):
                return mlp.drop2(self._linear(mlp.fc2, x, "gelu", width))
            x = mlp.act(x)
        return mlp.drop2(self._linear(mlp.fc2, mlp.drop1(x), mlp.norm, width))


class _Stock:
    """timm's classes, and the reasons why a module cannot be replaced.

    A module is replaced only where calling it could do nothing but its class's formula (`ops.stock`): its class is
    exactly timm's or torch's, and it has no submodule that the class does not know.
    """

    def __init__(self) -> None:
        import timm.layers as layers
        from timm.models import vision_transformer as vit

        self.vit, self.block, self.attention = vit.VisionTransformer, vit.Block, vit.Attention
        self.mlp, self.glu, self.swiglu = layers.Mlp, layers.GluMlp, layers.SwiGLU
        self.patch_embed, self.patch_drop = layers.PatchEmbed, layers.PatchDropout
        self.norms = (nn.LayerNorm, layers.LayerNorm)
        self.gelus = (nn.GELU, layers.GELU)
        mlp = "act drop1 norm fc2 drop2"
        submodules = {
            self.block: "norm1 attn ls1 drop_path1 norm2 mlp ls2 drop_path2",
            self.attention: "qkv q_norm k_norm attn_drop norm gate proj proj_drop",
            self.mlp: f"fc1 {mlp}",
            self.glu: f"fc1 {mlp}",
            self.swiglu: f"fc1_g fc1_x {mlp}",
            self.patch_embed: "proj norm",
        }
        # class -> the submodules it may have; other classes: none
        self.submodules = {cls: frozenset(names.split()) for cls, names in submodules.items()}

    # ---- models ----------------------------------------------------------------------------------

    def check_model(self, vit: nn.Module) -> None:
        """Raises UsageError unless `vit` is a VisionTransformer, or a subclass that changes nothing used here."""
        kind = type(vit).__name__
        inner = getattr(vit, "module", None) or getattr(vit, "_orig_mod", None)
        if isinstance(inner, self.vit):
            raise UsageError(
                f"accelerate: got a {kind}; call it with the VisionTransformer inside, in the model's own forward"
            )
        if not isinstance(vit, self.vit):
            hint = (
                "it encodes kept patches by itself, see encode(images, keep)"
                if type(vit).__module__.startswith("extrema_fast.")
                else "it takes timm's VisionTransformer (vit_*, deit*, and others of that class); Eva, NaFlexVit "
                "and models of other libraries compute something else"
            )
            raise UsageError(f"accelerate: got a {kind}; {hint}")
        for name in ("forward_features", "_pos_embed"):
            if getattr(type(vit), name) is not getattr(self.vit, name) or name in vars(vit):
                raise UsageError(
                    f"accelerate: {kind} has its own {name}, which encode would leave out; keep the "
                    "VisionTransformer as it is, and call fast.encode in a module around it"
                )
        self.check_options(vit)

    def check_options(self, vit: Any) -> None:
        """Raises UsageError for options of a VisionTransformer that are not supported."""
        if getattr(vit.patch_embed, "dynamic_img_pad", False):
            raise UsageError(
                "accelerate: dynamic_img_pad is not supported; pad the images to a multiple of the patch size"
            )
        drop = vit.patch_drop
        idle = type(drop) is self.patch_drop and not (drop.training and drop.prob > 0)
        if not (idle or type(drop) is nn.Identity):
            raise UsageError(
                f"accelerate: {type(drop).__name__} is active and would drop patches by itself; give `keep` "
                "instead, and set vit.patch_drop = torch.nn.Identity()"
            )

    # ---- modules: why they are called, empty where they are replaced ---------------------------------

    def reason(self, module: nn.Module, *kinds: type) -> str:
        """Why calling the module could do more than the formula of its class, one of `kinds`."""
        if found := reason(module, *kinds):
            return found
        cls = type(module)
        extra = module._modules.keys() - self.submodules.get(cls, frozenset())
        if extra and cls is not nn.Sequential:
            return f"it has a submodule that stock lacks: {', '.join(sorted(extra))}"
        return ""

    def patch_embed_reason(self, embed: Any) -> str:
        """Of the patch embedding: why all patches are embedded, not the kept ones alone."""
        if reason := self.reason(embed, self.patch_embed):
            return reason
        proj, norm = embed.proj, embed.norm
        if reason := self.reason(proj, nn.Conv2d):
            return f"proj: {reason}"
        side = proj.kernel_size[0]
        square = proj.kernel_size == proj.stride == (side, side) == tuple(embed.patch_size)
        if not square or proj.padding not in ((0, 0), "valid") or proj.dilation != (1, 1) or proj.groups != 1:
            return "proj: its patches overlap, have gaps or are not square"
        reason = "" if self.is_idle(norm) else self.reason(norm, *self.norms)
        return f"norm: {reason}" if reason else ""

    def attention_reason(self, attn: Any) -> str:
        if reason := self.reason(attn, self.attention):
            return reason
        if getattr(attn, "gate", None) is not None:
            return "it is gated"
        if not self.is_idle(attn.attn_drop):
            return self.reason(attn.attn_drop, nn.Dropout) or "attention dropout is active"
        # fused attention has this factor built in
        if not attn.fused_attn and attn.scale != attn.head_dim**-0.5:
            return f"its scale is {attn.scale}, not head_dim ** -0.5"
        return ""

    def mlp_reason(self, mlp: nn.Module) -> str:
        if reason := self.reason(mlp, self.mlp, self.glu, self.swiglu):
            return reason
        return "it is a convolution" if getattr(mlp, "chunk_dim", -1) != -1 else ""

    def norm_reason(self, norm: nn.Module) -> str:
        """Of a norm: why it does not run inside the linear layer that follows."""
        if reason := self.reason(norm, *self.norms):
            return reason
        if norm.weight is None or norm.bias is None:
            return "it has no weight or no bias"
        return "timm's fast norm is on" if getattr(norm, "_fast_norm", False) else ""

    def is_gelu(self, act: nn.Module) -> bool:
        """Whether `act` is the exact GELU, which runs inside the linear layer that follows."""
        return getattr(act, "approximate", "none") == "none" and not self.reason(act, *self.gelus)

    def is_idle(self, module: nn.Module) -> bool:
        """Whether calling `module` would return its input."""
        active = type(module) is nn.Dropout and module.training and module.p > 0
        return not active and not self.reason(module, nn.Identity, nn.Dropout)

    def report(self, name: str, block: Any) -> Report:
        """Of one block."""
        if reason := self.reason(block, self.block):
            return Report({name: reason})
        report = Report()
        for norm, branch, reason in (
            ("norm1", "attn", self.attention_reason(block.attn)),
            ("norm2", "mlp", self.mlp_reason(block.mlp)),
        ):
            report[f"{name}.{norm}"] = self.norm_reason(getattr(block, norm))
            report[f"{name}.{branch}"] = reason
            for key in () if reason else ("qkv", "proj", "fc1", "fc1_g", "fc1_x", "fc2"):
                if (layer := getattr(getattr(block, branch), key, None)) is not None:
                    report[f"{name}.{branch}.{key}"] = self.reason(layer, nn.Linear)
        return report


def _square_grid(n: int, height: int, width: int) -> tuple[int, int]:
    """The grid of n square cells in an image."""
    rows = round((n * height / width) ** 0.5)
    if rows < 1 or n % rows or rows * width != n // rows * height:
        raise UsageError(
            f"vit.patch_embed: its {n} patches are no grid of {height} x {width} pixels; give it a `grid_size`"
        )
    return rows, n // rows


def _add_positions(tokens: Tensor, keep: Tensor, pos: Tensor | None) -> Tensor:
    """tokens [R, K, D], keep [V, B, K], pos [N, D]."""
    return tokens if pos is None else tokens + F.embedding(keep.flatten(0, 1).long(), pos)
