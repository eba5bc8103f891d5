"""Which pixel belongs to what? A linear head on the patch tokens of a frozen encoder.

    python examples/segmentation.py [--weights runs/mine]

The task is made here: two photographs, joined along a random border; the class of each pixel is its photograph. For
your own images and masks, let `composed` return them. Any size works that is a multiple of the patch size. Prints the
mean IoU on unseen images and draws some of them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_weights import demo_weights
from PIL import Image

import extrema_fast
from extrema_fast.config import DataConfig
from extrema_fast.data.augment import normalize
from extrema_fast.data.loader import EvalLoader
from extrema_fast.data.sources import open_source

CLASSES = ("brick", "grass", "gravel", "hubble_deep_field", "ihc", "page")
COLORS = np.array(
    [(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75)]
)


def composed(split: str, count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, H, W, 3] uint8 of two photographs each, and the class of every pixel [n, H, W]."""
    source = open_source("photos", split)
    pixels = torch.cat([x for x, _ in EvalLoader(source, DataConfig(), (side, side))])
    torch.manual_seed(0 if split == "train" else 1)
    pools = [pixels[source.labels == source.classes.index(name)] for name in CLASSES]
    images, masks = [], []
    for _ in range(count):
        a, b = torch.randperm(len(CLASSES))[:2].tolist()
        pair = [pools[c][int(torch.randint(len(pools[c]), ()))] for c in (a, b)]
        first = F.interpolate(torch.randn(1, 1, 4, 4), size=(side, side), mode="bicubic")[0, 0] > 0
        images.append(torch.where(first[..., None], pair[0], pair[1]))
        masks.append(torch.where(first, a, b))
    return torch.stack(images), torch.stack(masks)


def main(argv: list[str] | None = None) -> float:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", help="run folder or weights (default: a small encoder made for the examples)")
    p.add_argument("--out", default="runs/segmentation.png", help="the drawing")
    p.add_argument("--side", type=int, default=48, help="pixels; may differ from the size of pretraining")
    p.add_argument("--images", type=int, default=1500, help="training images")
    p.add_argument("--steps", type=int, default=1000, help="steps of the head")
    p.add_argument("--quick", action="store_true", help="little data, for a test")
    args = p.parse_args(argv)
    if args.quick:
        args.images, args.steps = 60, 60
    encoder = extrema_fast.load_encoder(demo_weights(args.weights, args.quick), img_size=args.side)

    @torch.no_grad()
    def feature_maps(images: torch.Tensor) -> torch.Tensor:
        """Patch tokens before the final norm, [n, D, rows, columns]."""
        maps = []
        for chunk in images.split(64):
            out = encoder.encode(normalize(chunk, encoder.mean, encoder.std), norm=False)
            maps.append(out.patches.mT.unflatten(2, out.grid))
        return torch.cat(maps)

    images, masks = composed("train", args.images, args.side)
    test_images, test_masks = composed("test", args.images // 4, args.side)
    maps, test_maps = feature_maps(images), feature_maps(test_images)

    head = torch.nn.Sequential(
        torch.nn.BatchNorm2d(encoder.embed_dim), torch.nn.Conv2d(encoder.embed_dim, len(CLASSES), 1)
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(args.steps):
        rows = torch.randint(len(maps), (16,))
        logits = F.interpolate(head(maps[rows]), size=masks.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, masks[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        guess = F.interpolate(head.eval()(test_maps), size=test_masks.shape[1:], mode="bilinear").argmax(1)
    # rows: the truth; columns: the guess
    table = torch.bincount((test_masks * len(CLASSES) + guess).flatten(), minlength=len(CLASSES) ** 2)
    table = table.view(len(CLASSES), len(CLASSES)).double()
    iou = table.diag() / (table.sum(0) + table.sum(1) - table.diag()).clamp_min(1)
    rows = [np.concatenate([test_images[i], COLORS[test_masks[i]], COLORS[guess[i]]], 1) for i in range(6)]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    sheet = Image.fromarray(np.concatenate(rows).astype(np.uint8))
    sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST).save(args.out)
    print(f"mean IoU {iou.mean():.1%} on {len(test_masks)} unseen images ({len(CLASSES)} classes)")
    print(f"{args.out}: image, truth, guess")
    return float(iou.mean())


if __name__ == "__main__":
    main()
