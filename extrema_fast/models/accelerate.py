"""Masked encoding for a timm VisionTransformer that a project has already.

`accelerate(vit)` holds a reference and no weights of its own: the owner's `state_dict`, optimizer, EMA and
DistributedDataParallel do not notice. Kept patches alone are embedded, and only they and the prefix (class token,
registers) run through the blocks (`accelerate_blocks`).

Reference, which outputs and gradients equal: patch_embed, positions, gather of the kept patches, norm_pre, blocks,
norm, all timm's own.

Shape letters: B images, V views, R = V B rows (view-major), K kept patches, N patches, P prefix tokens, D width.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from ..errors import UsageError, cannot_import
from ..ops import dispatch as ops
from ..ops.linear import compute_dtype
from .accelerate_blocks import Blocks, Part, Timm, any_global_hook, timm_classes, why_called
from .layers import check_images
from .masking import check_keep, image_major

log = logging.getLogger(__name__)


class EncodedViT(NamedTuple):
    """What `Accelerated.encode` returns; with views, [B, V, ...] in the place of [B, ...].

    cls      [B, D], or None without class token
    patches  [B, K, D]; row j belongs to patch keep[..., j]
    keep     [B, K] integer
    grid     (rows, columns) of patches in the image
    prefix   [B, P, D]: class token, then registers; None where there are none
    tokens   [B, P + K, D]: prefix and patches in one tensor, of which the three above are views
    """

    cls: Tensor | None
    patches: Tensor
    keep: Tensor
    grid: tuple[int, int]
    prefix: Tensor | None
    tokens: Tensor


class Report(tuple[Part, ...]):
    """The parts of a model, each with `name` and `why` its owner's module is called (empty: it is replaced)."""

    @property
    def replaced(self) -> list[str]:
        """Names of the parts that run on this project's code."""
        return [name for name, why in self if not why]

    @property
    def called(self) -> dict[str, str]:
        """The other parts, and why."""
        return {name: why for name, why in self if why}

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} of {len(self)} parts replaced"]
        return "\n".join(lines + [f"{name}: called as it is ({why})" for name, why in self.called.items()])


def accelerate(vit: nn.Module, *, attention: str = "auto", strict: bool = False) -> Accelerated:
    """Fast masked and dense encoding with the weights of `vit`, which is left as it is.

    vit        a timm VisionTransformer, or a subclass that keeps its `forward_features` and `_pos_embed`
    attention  backend of self-attention, as `Encoder.set_attention`
    strict     a part that cannot be replaced is an error, here and at every pass, instead of being called
    raises     UsageError for another model or an unknown backend, saying what is possible

        fast = extrema_fast.accelerate(vit)
        latent = fast.encode(images, keep).tokens            # class token and kept patches
        loss = decoder(latent, keep)
    """
    return Accelerated(vit, attention, strict)


class Accelerated:
    """What `accelerate` returns; not a Module, so a model that keeps it in an attribute owns no weight twice."""

    def __init__(self, vit: nn.Module, attention: str = "auto", strict: bool = False) -> None:
        ops.check_attention_name(attention)
        self.vit, self.strict = vit, strict
        self.blocks = Blocks(_check_model(vit), attention)
        report = self.report()
        self._check_strict(report)
        log.info("accelerate %s: %s", type(vit).__name__, report)

    def __repr__(self) -> str:
        return f"Accelerated({type(self.vit).__name__}, {str(self.report()).splitlines()[0]})"

    def report(self) -> Report:
        """What the next pass replaces, part by part, and why not the rest."""
        if any_global_hook():
            return Report([Part("model", "hooks are registered for all modules")])
        parts = [Part("patch_embed", self._why_patch_embed())]
        why = self._why_sequence()
        if why:
            parts.append(Part("blocks", why))
        else:
            for i, block in enumerate(self.vit.blocks):
                parts += self.blocks.parts(f"blocks.{i}", block)
        return Report(parts)

    def encode(self, images: Tensor, keep: Tensor | None = None, norm: bool = True) -> EncodedViT:
        """Prefix and kept patches; no other patch is embedded or attended to.

        images:  [B, C, H, W] float, normalised, of the size that `vit` takes
        keep:    None (all), [B, K], or [B, V, K] integer in [0, N), counting patches only; order is kept
        norm     apply the model's final norm (its `fc_norm` belongs to its head, and is not applied)
        returns  EncodedViT(cls, patches, keep, grid, prefix, tokens)
        raises   UsageError naming the argument, what it got and what it needs; in training also for a model with
                 patch dropout

        Gradients of gradients: in fp32 and fp64 only, as the products in 16 bits have a written-out backward pass.
        """
        self._check(images)
        masked = keep is not None
        one_by_one = self._gathers_first()
        grid = self._stock_grid(images) if one_by_one else None
        embedded = None
        if not (masked and one_by_one):
            embedded, grid = self._embed(images)
        b, n = images.shape[0], grid[0] * grid[1]
        if masked:
            x = self._masked(images, embedded, check_keep(keep, b, n), grid)
        else:
            keep = torch.arange(n, device=images.device).expand(b, n)
            x = self.vit._pos_embed(embedded)
        x = self._trunk(self.vit.norm_pre(x))
        x = self.vit.norm(x) if norm else x
        x = image_major(x, keep)
        p = self.vit.num_prefix_tokens
        cls = None if self.vit.cls_token is None else x[..., 0, :]
        return EncodedViT(cls, x[..., p:, :], keep, grid, x[..., :p, :] if p else None, x)

    def forward_features(
        self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As `vit.forward_features(images)`: [B, P + N, D] after the final norm.

        raises  UsageError for attention masks, which are not supported
        """
        if attn_mask is not None or is_causal:
            raise UsageError(
                "attn_mask, is_causal: accelerate attends to all tokens; use vit.forward_features, or `keep` of "
                "encode to leave patches out"
            )
        return self.encode(images).tokens

    # ---- the pieces, in the order they run -------------------------------------------------------

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """All patches as the owner's module returns them, [B, N, D] or [B, rows, columns, D]; and the grid."""
        embed = self.vit.patch_embed
        x = embed(images)
        if x.dim() == 4:
            return x, (x.shape[1], x.shape[2])
        n = x.shape[1]
        grid = getattr(embed, "grid_size", None) or _grid_of(n, *images.shape[-2:])
        if grid[0] * grid[1] != n:
            raise UsageError(f"vit.patch_embed: returned {n} patches, its grid is {grid[0]} x {grid[1]}")
        return x, tuple(grid)

    def _masked(self, images: Tensor, embedded: Tensor | None, keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """keep [V, B, K] -> [R, P + K, D] with positions; embedded: all patches, None: embed the kept ones."""
        vit = self.vit
        pos = self._positions(grid)
        shared = 0 if vit.no_embed_class else vit.num_prefix_tokens
        patch_pos = None if pos is None else pos[shared:]
        if embedded is None:
            tokens = self._embed_kept(images, keep, grid, patch_pos)
        else:
            tokens = _pick(embedded.flatten(1, -2), keep, patch_pos)
        prefix = [t[0] for t in (vit.cls_token, vit.reg_token) if t is not None]
        if prefix:
            # [P, D], the same for every row
            rows = torch.cat(prefix)
            rows = rows if pos is None or not shared else rows + pos[:shared]
            # as under autocast, the widest type wins
            dtype = torch.promote_types(rows.dtype, tokens.dtype)
            rows = rows.to(dtype).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([rows, tokens.to(dtype)], 1)
        # timm drops positions only where there are any
        return tokens if pos is None else vit.pos_drop(tokens)

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

    def _embed_kept(self, images: Tensor, keep: Tensor, grid: tuple[int, int], pos: Tensor | None) -> Tensor:
        """Only the kept patches are read; [R, K, D]."""
        embed = self.vit.patch_embed
        proj, p = embed.proj, embed.patch_size[0]
        # a convolution leaves out the pixels that fill no patch
        images = images[..., : grid[0] * p, : grid[1] * p]
        plain = self.blocks.is_idle(embed.norm)
        # the op adds positions in the type it computes in; autocast keeps the sum in theirs
        if pos is not None and plain and compute_dtype(images) == pos.dtype:
            return ops.patch_gather(images, keep, proj.weight, proj.bias, pos)
        zeros = proj.weight.new_zeros(grid[0] * grid[1], proj.out_channels)
        tokens = ops.patch_gather(images, keep, proj.weight, proj.bias, zeros)
        return _add(tokens if plain else embed.norm(tokens), keep, pos)

    def _trunk(self, x: Tensor) -> Tensor:
        vit = self.vit
        if self._why_sequence():
            return vit.blocks(x)
        for block in vit.blocks:
            if vit.grad_checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(self.blocks, block, x, use_reentrant=False)
            else:
                x = self.blocks(block, x)
        return x

    # ---- what is replaced ------------------------------------------------------------------------

    def _why_patch_embed(self) -> str:
        """Why all patches are embedded by the owner's module; empty when the kept ones alone are."""
        embed, known = self.vit.patch_embed, self.blocks.known
        why = why_called(embed, known)
        if why or type(embed) is not self.blocks.timm.patch_embed:
            return why or f"{type(embed).__name__} is no PatchEmbed"
        proj, norm = embed.proj, embed.norm
        why = why_called(proj, known)
        if why or type(proj) is not nn.Conv2d:
            return f"proj: {why or type(proj).__name__ + ' is not Conv2d'}"
        side = proj.kernel_size[0]
        square = proj.kernel_size == proj.stride == (side, side) == tuple(embed.patch_size)
        if not square or proj.padding not in ((0, 0), "valid") or proj.dilation != (1, 1) or proj.groups != 1:
            return "proj: its patches overlap, have gaps or are not square"
        if not (
            self.blocks.is_idle(norm)
            or (type(norm) in self.blocks.timm.norms and not why_called(norm, known))
        ):
            return f"norm: {why_called(norm, known) or type(norm).__name__ + ' may mix patches'}"
        return ""

    def _why_sequence(self) -> str:
        """Why `vit.blocks` is called as one."""
        blocks = self.vit.blocks
        return why_called(blocks, {nn.Sequential: frozenset(blocks._modules)})

    def _gathers_first(self) -> bool:
        return not (any_global_hook() or self._why_patch_embed())

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

    # ---- checks ----------------------------------------------------------------------------------

    def _check(self, images: Tensor) -> None:
        check_images(images)
        _check_refused(self.vit, self.blocks.timm)
        if self.strict and not torch.compiler.is_compiling():
            self._check_strict(self.report())

    def _check_strict(self, report: Report) -> None:
        if self.strict and report.called:
            raise UsageError(f"accelerate: strict, but {report}")


def _check_model(vit: nn.Module) -> Timm:
    """timm's classes, when `vit` is one of its VisionTransformers or a subclass that changes nothing used here."""
    try:
        timm = timm_classes()
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"accelerate: {cannot_import('timm', error, 'timm')}") from error
    inner = getattr(vit, "module", None) or getattr(vit, "_orig_mod", None)
    if isinstance(inner, timm.vit):
        raise UsageError(
            f"accelerate: got a {type(vit).__name__}; call it with the VisionTransformer inside, in the model's "
            "own forward"
        )
    if not isinstance(vit, timm.vit):
        hint = (
            "it encodes kept patches by itself, see encode(images, keep)"
            if type(vit).__module__.startswith("extrema_fast.")
            else "it takes timm's VisionTransformer (vit_*, deit*, and others of that class); Eva, NaFlexVit and "
            "models of other libraries compute something else"
        )
        raise UsageError(f"accelerate: got a {type(vit).__name__}; {hint}")
    for name in ("forward_features", "_pos_embed"):
        if getattr(type(vit), name) is not getattr(timm.vit, name) or name in vars(vit):
            raise UsageError(
                f"accelerate: {type(vit).__name__} has its own {name}, which encode would leave out; keep the "
                "VisionTransformer as it is, and call fast.encode in a module around it"
            )
    _check_refused(vit, timm)
    return timm


def _check_refused(vit: Any, timm: Timm) -> None:
    if getattr(vit.patch_embed, "dynamic_img_pad", False):
        raise UsageError(
            "accelerate: dynamic_img_pad is not supported; pad the images to a multiple of the patch size"
        )
    drop = vit.patch_drop
    idle = type(drop) is timm.patch_drop and not (drop.training and drop.prob > 0)
    if not (idle or type(drop) is nn.Identity):
        raise UsageError(
            f"accelerate: {type(drop).__name__} is active and would drop patches of its own; give `keep` instead, "
            "and set vit.patch_drop = torch.nn.Identity()"
        )


def _grid_of(n: int, height: int, width: int) -> tuple[int, int]:
    """The grid of n square cells in an image."""
    rows = round((n * height / width) ** 0.5)
    if rows < 1 or n % rows or rows * width != n // rows * height:
        raise UsageError(
            f"vit.patch_embed: its {n} patches are no grid of {height} x {width} pixels; give it a `grid_size`"
        )
    return rows, n // rows


def _pick(tokens: Tensor, keep: Tensor, pos: Tensor | None) -> Tensor:
    """tokens [B, N, D], keep [V, B, K] -> [R, K, D] with positions."""
    if pos is not None and pos.dtype == tokens.dtype:
        return ops.token_gather(tokens, keep, pos)
    return _add(ops.token_gather(tokens, keep), keep, pos)


def _add(tokens: Tensor, keep: Tensor, pos: Tensor | None) -> Tensor:
    return tokens if pos is None else tokens + F.embedding(keep.flatten(0, 1), pos)
