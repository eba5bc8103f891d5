"""Masked encoding in somebody else's project: a small MAE whose timm encoder computes kept patches only.

    python examples/masked_mae.py [--data my_images]

The whole change to such a project is two lines, marked below: `accelerate` once, `encode(images, keep)` in the
place of "embed all, add positions, gather, run the blocks". Weights stay timm's: optimizer, checkpoints and
`state_dict` do not notice. Ends in the loss on unseen images, and a picture of what was filled in.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

import extrema_fast
from extrema_fast.config import DataConfig
from extrema_fast.data.loader import EvalLoader, TrainLoader
from extrema_fast.data.sources import open_source, subset

SIDE, PATCH, KEPT = 32, 4, 16  # 16 of 64 patches: 75 % masked


class MAE(nn.Module):
    """Encoder on kept patches, light decoder on all of them (arXiv 2111.06377)."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=SIDE, patch_size=PATCH, embed_dim=96, depth=4, num_heads=3, num_classes=0
        )
        self.fast = extrema_fast.accelerate(self.vit)  # line one of two
        self.to_decoder = nn.Linear(96, 64)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 64))
        self.position = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, 64) * 0.02)
        self.decoder = nn.Sequential(
            Block(64, 2), Block(64, 2), nn.LayerNorm(64), nn.Linear(64, 3 * PATCH**2)
        )

    def forward(self, images: Tensor, keep: Tensor) -> Tensor:
        """images [B, 3, H, W], keep [B, K] -> pixels of every patch [B, N, P * P * 3]."""
        tokens = self.to_decoder(self.fast.encode(images, keep).patches)  # line two of two
        n = self.position.shape[1]
        index = keep.long()[..., None].expand(-1, -1, tokens.shape[2])
        full = self.mask_token.to(tokens.dtype).expand(len(images), n, -1).scatter(1, index, tokens)
        return self.decoder(full + self.position)


def patches(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, N, P * P * 3]."""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


def masked_loss(guess: Tensor, images: Tensor, keep: Tensor) -> Tensor:
    """Mean squared error over the patches that the encoder did not see."""
    hidden = torch.ones(guess.shape[:2]).scatter(1, keep.long(), 0)
    error = (guess - patches(images)).square().mean(2)
    return (error * hidden).sum() / hidden.sum()


def main(argv: list[str] | None = None) -> float:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="photos", help="images: a folder, list file, shards or manifest")
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--out", default="runs/masked_mae.png", help="the picture")
    p.add_argument("--quick", action="store_true", help="few steps, for a test")
    args = p.parse_args(argv)
    steps = 24 if args.quick else args.steps

    torch.manual_seed(0)
    mae = MAE()
    print("accelerate:", mae.fast.report())
    optimizer = torch.optim.AdamW(mae.parameters(), lr=1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)

    def scaled(images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> [B, 3, H, W] in -1 .. 1."""
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    test = open_source("photos", "test") if args.data == "photos" else open_source(args.data)
    test = subset(test, torch.arange(0, len(test), max(1, len(test) // 256)))
    test, index = next(iter(EvalLoader(test, DataConfig(), (SIDE, SIDE), batch_size=512)))
    test, test_keep = scaled(test), extrema_fast.sample_views(index, 64, KEPT, 1)[:, 0]

    def test_loss() -> float:
        with torch.no_grad():
            return masked_loss(mae.eval()(test, test_keep), test, test_keep).item()

    before = test_loss()
    mae.train()
    with TrainLoader(
        open_source(args.data), DataConfig(area=(0.5, 1.0)), (SIDE, SIDE), batch_size=64, seed=0
    ) as loader:
        for _, batch in zip(range(steps), loader, strict=False):
            images = scaled(batch.images)
            keep = extrema_fast.sample_views(batch.index, 64, KEPT, 1, epoch=batch.epoch)[:, 0]
            loss = masked_loss(mae(images, keep), images, keep)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    after = test_loss()

    def pixels(parts: Tensor) -> np.ndarray:
        images = F.fold(parts.transpose(1, 2), SIDE, PATCH, stride=PATCH)
        return ((images + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()

    rows = torch.arange(0, len(test), max(1, len(test) // 8))[:8]
    with torch.no_grad():
        guess, truth = mae(test[rows], test_keep[rows]), patches(test[rows])
    seen = torch.zeros(guess.shape[:2]).scatter(1, test_keep[rows].long(), 1)[..., None].bool()
    columns = [pixels(truth), pixels(torch.where(seen, truth, 0.0)), pixels(torch.where(seen, truth, guess))]
    sheet = Image.fromarray(np.concatenate([np.concatenate(list(c)) for c in columns], 1))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((4 * sheet.width, 4 * sheet.height), Image.Resampling.NEAREST).save(args.out)
    print(f"loss on unseen images {before:.4f} before, {after:.4f} after {steps} steps")
    print(f"{args.out}: image, what the encoder saw, what was filled in")
    return after / before


if __name__ == "__main__":
    main()
