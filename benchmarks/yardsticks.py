"""Training steps of other methods at the same size, batch and images: how much does an ExtreMA step cost?

`Mae`: masked autoencoder (arXiv 2111.06377), 75 % dropped, decoder of 8 blocks, width 512, targets normalised
per patch. `Supervised`: classification by a plain ViT with a class token, from this project's strong baseline or
from timm. bf16 autocast or fp32, torch's fused attention, fused AdamW, no host wait.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extrema_fast.config import Config
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import sincos_table

from . import weights
from .stepper import Inputs, Stepper, decayed
from .strong import trunk
from .with_timm import mend_torchvision

CLASSES = 1000
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS, MAE_RATIO = 512, 8, 16, 0.75


class _Yardstick(Stepper):
    """What both have in common: fused AdamW, optional compilation of the loss."""

    net: nn.Module

    def finish(self, compile: bool) -> None:
        """After `self.net` is there: moves it, builds the optimizer, compiles the loss."""
        self.net.to(self.device).train()
        o = self.cfg.optim
        groups = decayed(self.student(), o.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=o.betas, eps=o.eps, fused=True)
        self.objective = torch.compile(self.loss_of, dynamic=False) if compile else self.loss_of

    def student(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.net.named_parameters() if p.requires_grad}

    def loss_of(self, x: Tensor, drawn: Tensor) -> Tensor:
        raise NotImplementedError

    def draw(self, batch: int) -> Tensor:
        """What chance decides in a step."""
        raise NotImplementedError

    def step(self, inputs: Inputs) -> None:
        x, _ = self.pictures(inputs)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective(x, self.draw(len(x)))
        loss.backward()
        for g in self.optimizer.param_groups:
            g["lr"] = self.schedule.lr(self.taken)
        self.optimizer.step()
        self.last_loss = loss.detach()
        self.taken += 1


def _trunk_flops(width: int, depth: int, n: int) -> float:
    return depth * (24 * width**2 * n + 4 * n**2 * width)


class Mae(_Yardstick):
    """One masked-autoencoder step."""

    def __init__(self, cfg: Config, device: torch.device, precision: str, compile: bool = False) -> None:
        super().__init__(cfg, device, precision)
        model = cfg.model
        width, depth, _ = model.shape
        self.n = int(model.num_patches * (1 - MAE_RATIO))
        pixels = model.in_chans * model.patch_size**2
        self.net = weights.group(
            embed=weights.linear(pixels, width),
            cls_token=nn.Parameter(torch.randn(1, 1, width) * 0.02),
            blocks=nn.ModuleList(weights.trunk_block(width, model.mlp_ratio) for _ in range(depth)),
            norm=weights.norm(width),
            enter=weights.linear(width, DECODER_WIDTH),
            mask_token=nn.Parameter(torch.randn(1, 1, DECODER_WIDTH) * 0.02),
            decoder=nn.ModuleList(weights.trunk_block(DECODER_WIDTH) for _ in range(DECODER_DEPTH)),
            decoder_norm=weights.norm(DECODER_WIDTH),
            predict=weights.linear(DECODER_WIDTH, pixels),
        )
        self.net.register_buffer("where", sincos_table(width, model.grid))
        self.net.register_buffer("decoder_where", sincos_table(DECODER_WIDTH, model.grid))
        self.finish(compile)

    def draw(self, batch: int) -> Tensor:
        return torch.rand(batch, self.cfg.model.num_patches, device=self.device).argsort(1)

    def loss_of(self, x: Tensor, drawn: Tensor) -> Tensor:
        """Mean squared error on the dropped patches; drawn [B, N]: a permutation, the kept ones first."""
        net, side, heads = self.net, self.cfg.model.patch_size, self.cfg.model.shape[2]
        patches = F.pixel_unshuffle(x, side).flatten(2).transpose(1, 2)
        with self.autocast():
            keep = drawn[:, : self.n]
            rows = torch.arange(len(x), device=x.device)[:, None]
            tokens = net.embed(patches[rows, keep])
            tokens = tokens + net.where[keep].to(tokens.dtype)
            tokens = torch.cat([net.cls_token.expand(len(x), -1, -1).to(tokens.dtype), tokens], 1)
            seen = net.enter(net.norm(trunk(net.blocks, tokens, heads, False)))
            hidden = net.mask_token.expand(len(x), drawn.shape[1] - self.n, -1).to(seen.dtype)
            # the inverse permutation puts tokens and mask tokens back in their places
            full = torch.cat([seen[:, 1:], hidden], 1)[rows, drawn.argsort(1)]
            full = full + net.decoder_where.to(full.dtype)
            full = trunk(net.decoder, torch.cat([seen[:, :1], full], 1), DECODER_HEADS, False)
            predicted = net.predict(net.decoder_norm(full[:, 1:])).float()
        deviation, mean = torch.var_mean(patches, -1, keepdim=True)
        error = (predicted - (patches - mean) / (deviation + 1e-6).sqrt()).square().mean(-1)
        return error[rows, drawn[:, self.n :]].mean()

    def flops_per_image(self) -> float:
        model = self.cfg.model
        width, depth, _ = model.shape
        n, pixels = model.num_patches, model.in_chans * model.patch_size**2
        encoder = _trunk_flops(width, depth, self.n + 1) + 2 * (self.n + 1) * width * DECODER_WIDTH
        decoder = _trunk_flops(DECODER_WIDTH, DECODER_DEPTH, n + 1) + 2 * n * DECODER_WIDTH * pixels
        return 3 * (encoder + decoder) + 2 * 2 * self.n * pixels * width


class Supervised(_Yardstick):
    """One classification step on random labels; library `own` or `timm`."""

    def __init__(
        self, cfg: Config, device: torch.device, precision: str, compile: bool = False, library: str = "own"
    ) -> None:
        super().__init__(cfg, device, precision)
        model = cfg.model
        width, depth, heads = model.shape
        self.library = library
        if library == "timm":
            self.net = self._timm()
        else:
            self.net = weights.group(
                embed=weights.linear(model.in_chans * model.patch_size**2, width),
                cls_token=nn.Parameter(torch.randn(1, 1, width) * 0.02),
                where=nn.Parameter(torch.randn(1, model.num_patches + 1, width) * 0.02),
                blocks=nn.ModuleList(weights.trunk_block(width, model.mlp_ratio) for _ in range(depth)),
                norm=weights.norm(width),
                head=weights.linear(width, CLASSES),
            )
        self.finish(compile)

    def _timm(self) -> nn.Module:
        mend_torchvision()
        try:
            from timm.models.vision_transformer import VisionTransformer
        except ImportError:
            raise UsageError(
                'provider supervised-timm: timm is not installed; pip install "extrema-fast[timm]"'
            ) from None
        model = self.cfg.model
        width, depth, heads = model.shape
        return VisionTransformer(
            model.img_size, model.patch_size, model.in_chans, CLASSES,
            embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=model.mlp_ratio, drop_path_rate=model.drop_path,
        )  # fmt: skip

    def draw(self, batch: int) -> Tensor:
        return torch.randint(CLASSES, (batch,), device=self.device)

    def loss_of(self, x: Tensor, drawn: Tensor) -> Tensor:
        """Cross entropy; drawn [B] labels."""
        net, model = self.net, self.cfg.model
        with self.autocast():
            if self.library == "timm":
                logits = net(x)
            else:
                tokens = net.embed(F.pixel_unshuffle(x, model.patch_size).flatten(2).transpose(1, 2))
                cls = net.cls_token.expand(len(x), -1, -1).to(tokens.dtype)
                tokens = torch.cat([cls, tokens], 1) + net.where.to(tokens.dtype)
                scale = self._path_factors(len(x))
                logits = net.head(net.norm(trunk(net.blocks, tokens, model.shape[2], False, scale))[:, 0])
        return F.cross_entropy(logits.float(), drawn)

    def _path_factors(self, batch: int) -> Tensor | None:
        rate, depth = self.cfg.model.drop_path, self.cfg.model.shape[1]
        if not rate:
            return None
        kept = 1 - torch.linspace(0, rate, depth, device=self.device)[:, None, None]
        return (torch.rand(depth, 2, batch, device=self.device) < kept) / kept

    def flops_per_image(self) -> float:
        model = self.cfg.model
        width, depth, _ = model.shape
        patches = 2 * 2 * model.num_patches * model.in_chans * model.patch_size**2 * width
        return 3 * (_trunk_flops(width, depth, model.num_patches + 1) + 2 * width * CLASSES) + patches
