"""Masked encoding in an existing project: a small MAE whose timm encoder computes kept patches only.

    python examples/masked_mae.py [--data my_images]

Such a project changes two lines, marked below: `accelerate` once, and `encode(images, keep)` in place of "embed all,
add positions, gather, run the blocks". The weights stay timm's: optimizer, checkpoints and `state_dict` do not
notice. Prints the loss on unseen images and draws what was filled in. The encoder is saved as timm's, and
`extrema-fast pretrain --init-from` continues from it.
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
N = (SIDE // PATCH) ** 2


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
        self.position = nn.Parameter(torch.randn(1, N, 64) * 0.02)
        self.decoder = nn.Sequential(
            Block(64, 2), Block(64, 2), nn.LayerNorm(64), nn.Linear(64, 3 * PATCH**2)
        )

    def forward(self, images: Tensor, keep: Tensor) -> Tensor:
        """images [B, 3, H, W], keep [B, K] -> pixels of every patch [B, N, 3 * P * P]."""
        tokens = self.to_decoder(self.fast.encode(images, keep).patches)  # line two of two
        index = keep.long()[..., None].expand_as(tokens)
        full = self.mask_token.to(tokens.dtype).expand(len(images), N, -1).scatter(1, index, tokens)
        return self.decoder(full + self.position)


def random_keep(index: Tensor, epoch: int = 0) -> Tensor:
    """Kept patches [B, K] of images with these row numbers."""
    return extrema_fast.sample_views(index, N, KEPT, num_views=1, epoch=epoch)[:, 0]


def scaled(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in -1 .. 1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def patches(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, N, 3 * P * P]."""
    return F.unfold(images, PATCH, stride=PATCH).mT


def masked_loss(guess: Tensor, images: Tensor, keep: Tensor) -> Tensor:
    """Mean squared error over the patches that the encoder did not get."""
    hidden = torch.ones(guess.shape[:2]).scatter(1, keep.long(), 0)
    return ((guess - patches(images)).square().mean(2) * hidden).sum() / hidden.sum()


def draw(mae: MAE, images: Tensor, keep: Tensor, out: str) -> None:
    """Saves image, kept patches and result, side by side."""
    with torch.no_grad():
        guess, truth = mae(images, keep), patches(images)
    kept = torch.zeros(guess.shape[:2]).scatter(1, keep.long(), 1)[..., None].bool()
    columns = []
    for tokens in (truth, torch.where(kept, truth, 0.0), torch.where(kept, truth, guess)):
        pixels = (F.fold(tokens.mT, SIDE, PATCH, stride=PATCH) + 1) * 127.5
        columns.append(np.concatenate(list(pixels.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy())))
    sheet = Image.fromarray(np.concatenate(columns, 1))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((4 * sheet.width, 4 * sheet.height), Image.Resampling.NEAREST).save(out)


def main(argv: list[str] | None = None) -> float:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="photos", help="images: a folder, list file, shards or manifest")
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--out", default="runs/masked_mae.png", help="the drawing")
    p.add_argument("--quick", action="store_true", help="few steps, for a test")
    args = p.parse_args(argv)
    steps = 24 if args.quick else args.steps

    torch.manual_seed(0)
    mae = MAE()
    print("accelerate:", mae.fast.report())
    optimizer = torch.optim.AdamW(mae.parameters(), lr=1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)

    source = open_source(args.data)
    test = open_source("photos", "test") if args.data == "photos" else source
    test = subset(test, torch.arange(0, len(test), max(1, len(test) // 256)))
    pixels, index = next(iter(EvalLoader(test, DataConfig(), (SIDE, SIDE), batch_size=512)))
    test_images, test_keep = scaled(pixels), random_keep(index)

    def test_loss() -> float:
        with torch.no_grad():
            return masked_loss(mae(test_images, test_keep), test_images, test_keep).item()

    before = test_loss()
    with TrainLoader(source, DataConfig(area=(0.5, 1.0)), (SIDE, SIDE), batch_size=64, seed=0) as loader:
        for _, batch in zip(range(steps), loader, strict=False):
            images, keep = scaled(batch.images), random_keep(batch.index, batch.epoch)
            loss = masked_loss(mae(images, keep), images, keep)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    after = test_loss()
    rows = torch.arange(0, len(test_images), max(1, len(test_images) // 8))[:8]
    draw(mae, test_images[rows], test_keep[rows], args.out)
    weights = Path(args.out).with_suffix(".pth")
    torch.save(mae.vit.state_dict(), weights)
    print(f"loss on unseen images {before:.4f} before, {after:.4f} after {steps} steps")
    print(f"{args.out}: image, kept patches, filled in")
    # the images of this project are scaled to -1 .. 1
    print(
        f"extrema-fast pretrain photos --init-from {weights} --model.width 96 --model.heads 3 "
        "--data.mean 0.5 0.5 0.5 --data.std 0.5 0.5 0.5"
    )
    return after / before


if __name__ == "__main__":
    main()
