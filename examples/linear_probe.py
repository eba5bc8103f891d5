"""How much do frozen features say about your classes? A linear classifier on them.

    python examples/linear_probe.py                                      # the built-in photographs
    python examples/linear_probe.py --weights runs/mine --train flowers/train --test flowers/test

Folders have one sub-folder per class; without --test every fifth image of --train is held out. Prints the accuracy.
(`extrema-fast probe` is the paper's own protocol; this script is a starting point for your own.)
"""

import argparse

import torch
import torch.nn.functional as F
from demo_weights import demo_weights

import extrema_fast


def main(argv: list[str] | None = None) -> float:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", default="photos", help="images in class folders")
    p.add_argument("--test", help="images in class folders (default: a fifth of --train)")
    p.add_argument("--weights", help="run folder or weights (default: a small encoder made for the examples)")
    p.add_argument("--out", default="runs/linear_probe", help="folder for the features")
    p.add_argument("--steps", type=int, default=400, help="steps of the classifier")
    p.add_argument("--quick", action="store_true", help="little data, for a test")
    args = p.parse_args(argv)
    weights = demo_weights(args.weights, args.quick)
    # of the photographs, the right halves are the test images
    test = args.test or ("photos" if args.train == "photos" else None)

    def features(data: str, split: str) -> tuple[torch.Tensor, list[str]]:
        """Class tokens [n, D], computed once and kept in --out, and n labels."""
        made = extrema_fast.embed(
            data,
            f"{args.out}/{split}",
            weights,
            norm=False,
            split=split,
            limit=180 if args.quick else 0,
            force=True,
        )
        return made.features(), [row.label for row in made.rows()]

    x, labels = features(args.train, "train")
    classes = sorted(set(labels))
    y = torch.tensor([classes.index(label) for label in labels])
    if test is None:
        held = torch.arange(len(x)) % 5 == 4
        x, y, test_x, test_y = x[~held], y[~held], x[held], y[held]
    else:
        test_x, test_labels = features(test, "test")
        test_y = torch.tensor([classes.index(label) for label in test_labels])
    # standardize each dimension on the training images, as the paper's probe does
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, test_x = (x - mean) / std, (test_x - mean) / std

    torch.manual_seed(0)
    linear = torch.nn.Linear(x.shape[1], len(classes))
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.01, weight_decay=0.05)
    for _ in range(args.steps):
        rows = torch.randint(len(x), (512,))
        loss = F.cross_entropy(linear(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    accuracy = (linear(test_x).argmax(1) == test_y).float().mean().item()
    print(f"{accuracy:.1%} of {len(test_y)} test images right ({len(classes)} classes)")
    return accuracy


if __name__ == "__main__":
    main()
