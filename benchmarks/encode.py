"""Encoding images, dense and masked: our encoder, timm's ViT accelerated and as it is, Hugging Face's ViT.

python -m benchmarks encode --quick
python -m benchmarks encode --model base --batch 256 --dtypes bf16 --masks 0 75 90
python -m benchmarks encode --batch 1 --providers ours

Forward passes without gradients on random images that are on the device already. Each provider runs in its own
process; they take turns. Masked, timm and Hugging Face run as MAE-style projects have it: all patches embedded,
positions added, the kept tokens gathered, blocks. Of ours, what it looks at in every part before it reads the part's
weights (hooks, adapters and the like: `extrema_fast.ops.stock`) is repeated and timed next to each pass.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from extrema_fast.config import SIZES, did_you_mean, keep_count
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import create_encoder
from extrema_fast.ops import stock
from extrema_fast.weights.vit import accelerate

from . import harness
from .harness import RATIO, TIMES, Record, Row, columns
from .processes import DTYPES, Turns, clock, prepare

PATCH, SETS = 16, 4
# (batch, rounds, timed passes per turn): --quick, and otherwise
DEFAULTS = {"cpu": [(8, 5, 1), (8, 10, 1)], "cuda": [(64, 5, 10), (64, 6, 12)]}
LOOKS = ("row=key", "looks=looks", "microseconds=looks_us:.0f", "% of a pass, CPU time=looks_percent:.2f")
Encode = Callable[[Tensor, "Tensor | None"], Tensor]


def _kept(x: Tensor, keep: Tensor) -> Tensor:
    """Returns the class token and the kept patches of x [B, 1 + N, D]."""
    return torch.cat([x[:, :1], x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))], 1)


def ours(size: Any, img_size: int) -> tuple[torch.nn.Module, Encode]:
    """This project's encoder: no class token in the trunk, two class-attention blocks after it."""
    encoder = create_encoder(f"extrema_vit_{size}_patch{PATCH}_224", img_size=img_size)

    def encode(images: Tensor, keep: Tensor | None) -> Tensor:
        out = encoder.encode(images, keep)
        return torch.cat([out.cls[:, None], out.patches], 1)

    return encoder, encode


def timm(size: Any, img_size: int) -> tuple[torch.nn.Module, Encode]:
    """timm's ViT with class token, no classifier."""
    from timm.models.vision_transformer import VisionTransformer

    width, depth, heads = SIZES[size]
    shape = {"embed_dim": width, "depth": depth, "num_heads": heads}
    vit = VisionTransformer(img_size=img_size, patch_size=PATCH, num_classes=0, **shape)

    def encode(images: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            return vit.forward_features(images)
        x = _kept(vit._pos_embed(vit.patch_embed(images)), keep)
        return vit.norm(vit.blocks(vit.norm_pre(x)))

    return vit, encode


def accelerated(size: Any, img_size: int) -> tuple[torch.nn.Module, Encode]:
    """timm's ViT through `accelerate`."""
    vit, _ = timm(size, img_size)
    fast = accelerate(vit)
    return vit, lambda images, keep: fast.encode(images, keep).tokens


def hf(size: Any, img_size: int) -> tuple[torch.nn.Module, Encode]:
    """transformers' ViTModel."""
    from transformers import ViTConfig, ViTModel

    width, depth, heads = SIZES[size]
    shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    config = ViTConfig(**shape, intermediate_size=4 * width, image_size=img_size, patch_size=PATCH)
    model: Any = ViTModel(config, add_pooling_layer=False)

    def encode(images: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            return model(images).last_hidden_state
        x = _kept(model.embeddings(images), keep)
        for layer in model.layers:
            x = layer(x, None)
        return model.layernorm(x)

    return model, encode


LIBRARIES = {"ours": ours, "accelerated": accelerated, "timm": timm, "hf": hf}
PROVIDERS = [f"{library}{how}" for library in LIBRARIES for how in ("", "-compiled")]


class Encoding:
    """A provider ready to encode; `masks` maps percent masked to the number of patches kept (all at 0)."""

    def __init__(
        self, name: str, args: argparse.Namespace, dtype: str, batch: int, masks: dict[int, int]
    ) -> None:
        self.device = prepare(args.device, args.threads, dtype)
        torch.manual_seed(0)
        library, _, compiled = name.partition("-")
        model, self.encode = LIBRARIES[library](args.model, args.img_size)
        model.to(self.device, DTYPES[dtype]).eval().requires_grad_(False)
        if compiled:
            # a graph per shape
            torch._dynamo.config.recompile_limit = 64
            self.encode = torch.compile(self.encode, dynamic=False)
        shape = batch, 3, args.img_size, args.img_size
        images = [torch.randn(shape).to(self.device, DTYPES[dtype]) for _ in range(SETS)]
        orders = [torch.rand(batch, max(masks.values())).argsort(1).to(self.device) for _ in range(SETS)]
        self.inputs: dict[int, list[tuple[Tensor, Tensor | None]]] = {
            m: [(x, o[:, :kept].contiguous() if m else None) for x, o in zip(images, orders, strict=True)]
            for m, kept in masks.items()
        }
        self.count = 0
        for mask, kept in masks.items():
            tokens = self.one(mask)
            if tokens.shape[:2] != (batch, kept + 1):
                raise UsageError(f"{name}: {tuple(tokens.shape)} tokens for {kept} patches kept")
            self.times(mask, 1 if self.device.type == "cpu" else 19)
        self.looks = {mask: self.seen(mask) for mask in masks} if name == "ours" else {}

    def seen(self, mask: int) -> list[tuple]:
        """Returns the arguments of every look of a pass at a mask."""
        looks: list[tuple] = []
        reason = stock.reason
        with patch.object(stock, "reason", lambda *args: looks.append(args) or reason(*args)):
            self.one(mask)
        return looks

    def look(self, mask: int) -> float:
        """Returns the milliseconds of all looks of a pass, with the caches as a pass has left them."""
        began = time.process_time()
        for args in self.looks[mask]:
            stock.is_stock(*args)
        return 1000 * (time.process_time() - began)

    @torch.no_grad()
    def one(self, mask: int) -> Tensor:
        """Encodes one batch; returns its tokens."""
        self.count += 1
        return self.encode(*self.inputs[mask][self.count % SETS])

    def times(self, mask: int, passes: int) -> list[float]:
        """Returns the milliseconds of passes at a mask."""
        return clock(lambda: self.one(mask), self.device, passes)

    def turn(self, steps: int) -> dict[str, list[float]]:
        """Times `steps` passes at every mask: {percent masked: milliseconds}; `looks` and the mask: of its looks."""
        found = {}
        for mask in self.inputs:
            began = time.process_time()
            found[str(mask)] = self.times(mask, steps)
            if mask in self.looks:
                # a pass is long enough to lose its processor: CPU time
                found[f"cpu {mask}"] = [1000 * (time.process_time() - began) / steps]
                found[f"looks {mask}"] = [self.look(mask)]
                found[f"count {mask}"] = [len(self.looks[mask])]
        return found


def main(argv: list[str]) -> int:
    """Images/s of encoding, dense and at mask ratios, next to timm's ViT and Hugging Face's of the same size."""
    args = options(argv)
    if args.list:
        print(f"  {', '.join(args.providers)}; masks {args.masks}; dtypes {', '.join(args.dtypes)}")
        return 0
    rows = [row for dtype in args.dtypes for batch in args.batch for row in measure(dtype, batch, args)]
    settings = {k: getattr(args, k) for k in ("model", "img_size", "masks", "device", "rounds")}
    settings |= {"threads": torch.get_num_threads(), "steps_per_turn": args.steps}
    what = f"encoding, ViT-{args.model}/{PATCH} at {args.img_size} on {args.device.partition(':')[0]}"
    record = harness.new_record(what, "encode", argv, args.note, settings=settings, rows=rows)
    record["ratios"] = found = ratios(rows)
    texts = [
        f"{r['row']} {r['ratio']:.2f}x {r['other']}" for r in found if r["row"].startswith("accelerated |")
    ]
    texts += [f"{r['key']}: {r['looks_percent']:.2f} % looks" for r in rows if "looks_percent" in r]
    record["headline"] = "; ".join(texts)
    harness.write_record(record, page(record), args)
    return 0


def options(argv: list[str]) -> argparse.Namespace:
    """Reads the command line; raises UsageError."""
    p = harness.parser("encode", main.__doc__)
    add = p.add_argument
    add("--model", choices=list(SIZES), default="small")
    add("--img-size", type=int, default=224, help="pixels of a side (default: %(default)s)")
    add("--batch", type=int, nargs="+", default=[], help="images (default: by device)")
    add("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    add("--masks", type=int, nargs="+", default=[0, 50, 75, 90], metavar="PERCENT", help="0: all patches")
    add("--providers", nargs="+", default=[], metavar="NAME", help="default: all; with --quick eager ones")
    args = p.parse_args(argv)
    batch, rounds, steps = DEFAULTS[harness.settle(args)][int(not args.quick)]
    args.batch, args.rounds, args.steps = args.batch or [batch], args.rounds or rounds, args.steps or steps
    if args.img_size < PATCH or args.img_size % PATCH:
        raise UsageError(f"--img-size: expected a multiple of {PATCH}, got {args.img_size}")
    if min(args.batch) < 1:
        raise UsageError(f"--batch: expected at least 1, got {min(args.batch)}")
    args.patches = (args.img_size // PATCH) ** 2
    for mask in args.masks:
        if not 0 <= mask < 100 or not keep_count(args.patches, mask / 100):
            raise UsageError(
                f"--masks: expected 0 to 99 %, and one of {args.patches} patches left, got {mask}"
            )
    for name in args.providers:
        if name not in PROVIDERS:
            raise UsageError(f"--providers: unknown {name!r}{did_you_mean(name, PROVIDERS)}")
    args.providers = args.providers or [p for p in PROVIDERS if not (args.quick and p.endswith("-compiled"))]
    return args


def measure(dtype: str, batch: int, args: argparse.Namespace) -> list[Row]:
    """Returns one row per provider and mask."""
    masks = {m: keep_count(args.patches, m / 100) if m else args.patches for m in args.masks}
    found: dict[str, Row] = {p: {} for p in args.providers}
    with Turns(found) as turns:
        for p in args.providers:
            turns.start(p, Encoding, p, args, dtype, batch, masks)
        turns.run(args.rounds, args.steps)
    rows = []
    for p in args.providers:
        for mask, kept in masks.items():
            key = f"{p} | {dtype} | batch {batch} | {f'{mask} % masked' if mask else 'dense'}"
            row = {"key": key, "provider": p, "dtype": dtype, "batch": batch, "mask": mask, "kept": kept}
            row |= {"error": found[p]["error"]} if "error" in found[p] else {}
            rows.append(row | {"samples_ms": found[p].get(str(mask), [])})
            harness.speed(rows[-1])
            if looks := found[p].get(f"looks {mask}"):
                rows[-1] |= {"looks": found[p][f"count {mask}"][0], "looks_ms": looks}
                rows[-1]["looks_us"] = 1000 * median(looks)
                rows[-1]["looks_percent"] = 100 * median(looks) / median(found[p][f"cpu {mask}"])
    return rows


def ratios(rows: list[Row]) -> list[dict[str, Any]]:
    """Returns ours and accelerated against the fastest of timm and of hf, and every masked pass against dense."""
    timed, found = [r for r in rows if "p50_ms" in r], []
    for row in timed:
        case = [r for r in timed if (r["dtype"], r["batch"]) == (row["dtype"], row["batch"])]
        others = [r for r in case if r["provider"] == row["provider"] and r["mask"] == 0 and row["mask"]]
        for rival in ("timm", "hf") if row["provider"].startswith(("ours", "accelerated")) else ():
            same = [r for r in case if r["provider"].startswith(rival) and r["mask"] == row["mask"]]
            others += sorted(same, key=lambda r: r["p50_ms"])[:1]
        for other in others:
            name = other["provider"] if other["mask"] == row["mask"] else "dense"
            result = harness.ratio(other["samples_ms"], row["samples_ms"])
            found.append({"row": row["key"], "other": name} | result)
    return found


def page(record: Record) -> list[str]:
    """Returns the record to read."""
    s, rows = record["settings"], [r for r in record["rows"] if "p50_ms" in r]
    looked = [r for r in rows if "looks" in r]
    return [
        f"Forward passes without gradients; {s['rounds']} rounds of {s['steps_per_turn']} timed pass(es) per provider "
        "and mask, in turns. ours is another model of the same size: no class token in the trunk, two class-attention "
        "blocks after it. bf16: weights and images. compiled: torch.compile, a graph per shape.",
        columns(rows, "row=key", "patches=kept", *TIMES, "images/s=images_per_s:.2f"),
        *(["## Looks at parts before their weights are read", columns(looked, *LOOKS)] if looked else []),
        "## Ratios",
        columns(record["ratios"], "row=row", "against=other", *RATIO),
        *harness.lost(record),
    ]
