"""The configuration: frozen dataclasses, presets as functions, and validation.

Precedence on the command line: defaults < preset < `--config` file < dotted flags. The docstring below a field is its
help text. Values that depend only on the configuration (kept tokens, grid, peak learning rate) are computed here.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import json
import logging
import math
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import UsageError
from .files import read_text

log = logging.getLogger(__name__)

# self-attention backends; `extrema_fast.ops.attention` describes each and its requirements
Attention = Literal[
    "auto", "sdpa", "flash", "efficient", "cudnn", "math", "xformers", "short", "matmul", "reference"
]
Size = Literal["tiny", "small", "base", "large", "huge", "giant"]

# (width, depth, heads) of the standard ViT-Ti/S/B/L/H, and of DINOv2's ViT-g, whose heads are 64 wide
SIZES: dict[Size, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "giant": (1536, 40, 24),
}

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
# pixel mean and standard deviation of ImageNet and CIFAR-10
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

# encoder name -> size; the name also gives the patch size
MODELS: dict[str, Size] = {
    f"extrema_vit_{size}_patch{14 if size in ('huge', 'giant') else 16}_224": size for size in SIZES
}

# far above any vision transformer
MAX_PARAMETERS = 100_000_000_000
MAX_PATCHES = 1 << 20
# hidden and output units of the heads
MAX_UNITS = 1 << 20
MAX_THREADS = 1024
MAX_CHANS = 16
# Pillow's default: more pixels count as a decompression bomb
MAX_PIXELS = 178_956_970


def did_you_mean(word: str, known: list[str]) -> str:
    """`"; did you mean 'x'?"`, or the known words if none is similar."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def near_options(option: str, known: Iterable[str]) -> list[str]:
    """The options in `known` that an unknown option may stand for; `-` and `_` are equivalent.

    In order of preference: options of the same name in other groups; options whose name contains it as a word, such as
    `optim.base_lr` for `lr`; the most similar name.
    """
    names = {k.lstrip("-").replace("_", "-"): k for k in known}
    option = option.lstrip("-").replace("_", "-")
    leaf = option.rpartition(".")[2]
    leaves = {n: n.rpartition(".")[2] for n in names}
    near = [n for n in names if leaves[n] == leaf] or [n for n in names if leaf in leaves[n].split("-")]
    return [names[n] for n in near or difflib.get_close_matches(option, names, 1, 0.75)]


def _unknown_option(option: str, cfg: Config) -> UsageError:
    groups = to_dict(cfg)
    near = near_options(option, [*groups, *flatten(cfg)])
    known = ", ".join(sorted(groups.get(option.rpartition(".")[0], groups)))
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {known}"
    return UsageError(f"unknown option {option}; {hint}")


def list_models(pattern: str = "*") -> list[str]:
    """Returns the encoder names that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(MODELS, pattern))


def model_name(size: Size) -> str:
    """The encoder name of a size."""
    return next(name for name, of in MODELS.items() if of == size)


def keep_count(num_patches: int, mask_ratio: float) -> int:
    """Kept tokens per view, `int(N * (1 - r))` in float64, truncated as in the released code.

    Rounding can make this one less than the exact floor: N = 100, r = 0.8 gives 19. Set `mask.keep` to choose the
    number directly.
    """
    return int(num_patches * (1 - mask_ratio))


def _multiples_near(value: int, step: int) -> str:
    low = value // step * step
    return f"{low} or {low + step}" if low else str(step)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UsageError(message)


def _at_least(section: str, cfg: Any, **limits: float) -> None:
    for name, low in limits.items():
        value = getattr(cfg, name)
        _require(value >= low, f"{section}.{name}: expected at least {low}, got {value}")


def _at_most(section: str, cfg: Any, **limits: int) -> None:
    for name, high in limits.items():
        value = getattr(cfg, name)
        _require(value <= high, f"{section}.{name}: expected at most {high}, got {value}")


def _positive(section: str, cfg: Any, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        _require(value > 0, f"{section}.{name}: expected a number above 0, got {value}")


def _share(section: str, cfg: Any, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        _require(0 <= value <= 1, f"{section}.{name}: expected a number from 0 to 1, got {value}")


@dataclass(frozen=True)
class DataConfig:
    """Image sources, cropping and augmentation (paper section 3.3)."""

    train: str = "photos"
    """Training images: `photos` or `synthetic` (built in), a folder of class folders, a flat folder, a list file, a
    manifest, tar shards, zip archives, Arrow or Parquet tables (a file, folder or pattern), or a mixture (TOML)."""
    test: str = ""
    """Labeled images for k-NN and the linear probe. If empty: the test split of a built-in set, the images set aside by
    `holdout`, or no evaluation."""
    holdout: float = 0.0
    """Fraction of the training images to set aside as test images, chosen by a hash of their names; 0 sets none
    aside."""
    policy: Literal["spatial", "spatial+color", "centercrop"] = "spatial+color"
    """`spatial`: random crop and flip; `spatial+color`: also color jitter and grayscale, separate for student and
    teacher; `centercrop`: only resize and center crop."""
    crop: Literal["shared", "separate"] = "shared"
    """`shared`: student and teacher see the same crop of an image; `separate`: each gets its own (paper, Table 4: two
    pictures)."""
    area: tuple[float, float] = (0.2, 1.0)
    """Minimum and maximum crop area, as fractions of the image area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Minimum and maximum aspect ratio of a crop, sampled log-uniformly."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Color jitter strength: brightness, contrast, saturation, hue."""
    jitter_prob: float = 0.8
    """Probability of color jitter."""
    gray_prob: float = 0.2
    """Probability of conversion to grayscale."""
    mean: tuple[float, ...] = IMAGENET[0]
    """Pixel mean to subtract, on the scale 0 to 1: one value, or one per channel. For images other than gray and RGB
    the default is taken from the manifest, or measured when the run starts."""
    std: tuple[float, ...] = IMAGENET[1]
    """Pixel standard deviation to divide by; same format and defaults as `mean`."""
    exif: bool = False
    """Rotate images by their EXIF orientation (off, as in the paper's pipeline)."""
    loader: Literal["auto", "dali", "pil"] = "auto"
    """Image decoder; `auto` uses DALI if it is installed and can read the images, otherwise PIL."""
    threads: int = 0
    """Decoding threads per process; 0 divides the machine's cores among its processes, up to 16 each."""
    hw_decoder_load: float = 0.65
    """Fraction of JPEG images sent to the GPU's hardware decoder, if it has one and DALI decodes on the GPU."""
    resident: Literal["auto", "gpu", "host", "off"] = "auto"
    """Keep the decoded training images in GPU memory (`gpu`) or CPU memory (`host`). `auto`: only for training on a
    GPU, if they fit."""
    order: Literal["global", "shards"] = "global"
    """`global` shuffles all rows; `shards` shuffles tar shards, and rows within a moving window of shards, so that
    reads stay local."""
    window: int = 16
    """Number of shards whose rows are mixed when `order` is `shards`. With all shards the shuffle is as good as
    `global`."""
    range: tuple[float, ...] = (0.0, 0.0)
    """Pixel values that map to black and white in images with more than 8 bits: one pair, or one pair per channel. 0 0
    uses the manifest's range, or else 0 to 65535 for integers and 0 to 1 for floats."""
    max_pixels: int = MAX_PIXELS
    """Treat images with more pixels than this as unreadable (default: Pillow's limit)."""
    bad_budget: float = 1e-4
    """Stop the run when more than this fraction of the images cannot be read. One image is always allowed, and in small
    sets one in fifty, up to ten images; 0 allows none."""
    limit: int = 0
    """Train on a random subset of N images, fixed by the seed; 0 uses all."""

    def __post_init__(self) -> None:
        lo, hi = self.area
        _require(0 < lo <= hi <= 1, f"data.area: expected 0 < low <= high <= 1, got {self.area}")
        lo, hi = self.ratio
        _require(0 < lo <= hi, f"data.ratio: expected 0 < low <= high, got {self.ratio}")
        _require(
            min(self.jitter) >= 0 and self.jitter[3] <= 0.5,
            f"data.jitter: expected strengths of at least 0 with hue <= 0.5, got {self.jitter}",
        )
        _require(min(self.std) > 0, f"data.std: expected numbers above 0, got {self.std}")
        _require(
            self.crop == "shared" or self.policy != "centercrop",
            "data.crop: separate crops are random ones, got data.policy centercrop; use --data.policy spatial",
        )
        _share("data", self, "flip", "jitter_prob", "gray_prob", "hw_decoder_load", "bad_budget")
        _require(
            0 <= self.holdout < 1, f"data.holdout: expected a share from 0 to below 1, got {self.holdout}"
        )
        _require(
            not (self.holdout and self.test),
            f"data.holdout: {self.holdout:g} keeps test images back, and data.test (given, or the preset's) names "
            f"others, {self.test}; give one of them: --data.test '' or --data.holdout 0",
        )
        _require(min(len(self.mean), len(self.std)) > 0, "data.mean, data.std: expected at least one value")
        black, white = self.range[::2], self.range[1::2]
        _require(
            self.range == (0, 0)
            or (len(black) == len(white) > 0 and all(b < w for b, w in zip(black, white, strict=True))),
            "data.range: expected black below white, of all channels or of each, or 0 0, got "
            + " ".join(f"{v:g}" for v in self.range),
        )
        _at_least("data", self, threads=0, window=1, max_pixels=1, limit=0)
        _at_most("data", self, threads=MAX_THREADS)


@dataclass(frozen=True)
class MaskConfig:
    """Which tokens the student sees (paper section 3.1)."""

    ratio: float = 0.8
    """Fraction of the tokens that each view drops."""
    views: int = 5
    """Number of views per image."""
    mode: Literal["disjoint", "independent"] = "disjoint"
    """`disjoint`: the views of an image share no tokens; `independent`: each view is sampled separately."""
    keep: int = 0
    """Number of tokens kept per view; 0 derives it from `ratio`: int(N * (1 - ratio)) of N tokens."""

    def __post_init__(self) -> None:
        _require(0 <= self.ratio < 1, f"mask.ratio: expected 0 <= ratio < 1, got {self.ratio}")
        _at_least("mask", self, views=1, keep=0)

    def num_keep(self, num_patches: int) -> int:
        """Number of tokens kept per view of an image with `num_patches` tokens."""
        return self.keep or keep_count(num_patches, self.ratio)


@dataclass(frozen=True)
class ModelConfig:
    """The encoder: a ViT trunk and class-attention pooling (paper section 3.2)."""

    size: Size = "base"
    """Width, depth and heads of ViT-Ti, -S, -B, -L, -H or -g."""
    img_size: tuple[int, int] = (224, 224)
    """Image height and width in pixels; multiples of the patch size."""
    patch_size: int = 16
    """Patch side in pixels; huge and giant models usually use 14."""
    in_chans: int = 3
    """Number of channels, 1 to 16: 3 for RGB, 1 for gray, or as many as the TIFF or .npy files have."""
    width: int = 0
    """Token width; 0 uses the width of `size`."""
    depth: int = 0
    """Number of trunk blocks; 0 uses the depth of `size`."""
    heads: int = 0
    """Number of attention heads; 0 uses the heads of `size`, or width / 64 if `width` is set."""
    mlp_ratio: float = 4.0
    """Ratio of MLP hidden units to token width."""
    pool_depth: int = 2
    """Number of class-attention blocks."""
    layer_scale: float = 0.1
    """Initial layer scale of the class-attention blocks. Must not be 0, which makes the pooled output constant."""
    patch_init: Literal["xavier", "whitened"] = "xavier"
    """Initial patch kernel: `xavier` (as in the paper), or `whitened`, which also gives the principal directions of
    natural image patches about equal variance. Try it for short runs of small encoders on color images."""
    drop_path: float = 0.1
    """Drop-path rate of the student's last trunk block; the rate rises linearly from 0 at the first."""

    def __post_init__(self) -> None:
        _at_least("model", self, width=0, depth=0, heads=0, patch_size=1, pool_depth=1)
        _require(
            1 <= self.in_chans <= MAX_CHANS,
            f"model.in_chans: expected 1 to {MAX_CHANS} channels, got {self.in_chans}",
        )
        for side, pixels in zip(("height", "width"), self.img_size, strict=True):
            p = self.patch_size
            if pixels < p or pixels % p:
                raise UsageError(
                    f"model.img_size: {side} {pixels} is not a multiple of the patch size {p}; "
                    f"nearest: {_multiples_near(pixels, p)}"
                )
        width, depth, heads = self.shape
        _require(
            width % heads == 0 and width % 4 == 0,
            f"model.width: {width} must be a multiple of heads ({heads}) and of 4 (sin-cos table)",
        )
        _require(
            int(width * self.mlp_ratio) >= 1,
            f"model.mlp_ratio: {self.mlp_ratio} leaves no hidden units at width {width}; try 4",
        )
        _require(0 <= self.drop_path < 1, f"model.drop_path: expected [0, 1), got {self.drop_path}")
        _require(self.layer_scale != 0, "model.layer_scale: 0 makes the pooled output constant; try 0.1")
        # configurations may come from untrusted files: reject absurd sizes before anything is allocated
        layers = depth + self.pool_depth
        block = width * (4 * width + 2 * int(width * self.mlp_ratio))
        count = layers * block + width * self.in_chans * self.patch_size**2
        _require(
            layers <= 4096 and count <= MAX_PARAMETERS,
            f"model: {layers} blocks of width {width} are {count:.1e} parameters, no size that can be built "
            f"(at most {MAX_PARAMETERS:.0e})",
        )
        _require(
            self.num_patches <= MAX_PATCHES,
            f"model.img_size: {self.img_size[0]} x {self.img_size[1]} makes {self.num_patches} patches of "
            f"{self.patch_size}, at most {MAX_PATCHES}",
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(width, depth, heads), with the defaults of the size filled in."""
        width, depth, heads = SIZES[self.size]
        width, depth = self.width or width, self.depth or depth
        return width, depth, self.heads or (max(1, width // 64) if self.width else heads)

    @property
    def read_chans(self) -> int:
        """Channels of the images that the loader delivers; gray is computed from RGB."""
        return 3 if self.in_chans == 1 else self.in_chans

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """Number of patches in the whole image (the teacher's sequence length)."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class HeadConfig:
    """Projector, predictor and loss (paper section 3.4)."""

    loss: Literal["byol", "infonce"] = "byol"
    """`byol`: squared distance between normalized vectors; `infonce`: contrastive loss over the batch."""
    temperature: float = 0.2
    """InfoNCE temperature."""
    queue: int = 0
    """Number of targets from earlier steps that InfoNCE uses as extra negatives (MoCo); 0: none, as in the paper.
    Useful with small batches, which make the contrastive task too easy."""
    targets: Literal["plain", "whitened"] = "plain"
    """BYOL targets: `plain` (as in the paper), or `whitened` over the batch. Try whitening for small batches and short
    runs."""
    decorrelation: float = 0.0
    """Weight of a penalty on correlated dimensions of the student's class token, and on the mean that all class tokens
    share; 0: none, as in the paper. Try 0.01 to 0.03 for short runs of small encoders."""
    norm: Literal["layer", "batch"] = "layer"
    """Normalization of the heads' hidden layers: `layer` (as in the released code), or `batch`, over the whole batch of
    all processes."""
    hidden: int = 4096
    """Hidden units of the projector."""
    out: int = 256
    """Output dimension of the projector and the predictor."""
    predictor_hidden: int = 4096
    """Hidden units of the predictor."""

    def __post_init__(self) -> None:
        _positive("head", self, "temperature")
        _require(
            self.loss == "byol" or self.targets == "plain",
            f"head.targets: {self.targets} is for head.loss byol, got {self.loss}; use head.targets plain",
        )
        _require(
            self.loss == "infonce" or not self.queue,
            f"head.queue: {self.queue} is for head.loss infonce, got {self.loss}; use head.queue 0",
        )
        _at_least("head", self, hidden=1, out=1, predictor_hidden=1, decorrelation=0, queue=0)
        _at_most("head", self, hidden=MAX_UNITS, out=MAX_UNITS, predictor_hidden=MAX_UNITS, queue=MAX_UNITS)

    @property
    def whole_batch(self) -> bool:
        """Whether the loss of an image depends on the targets of all images in the step."""
        return self.loss == "infonce" or self.targets != "plain"

    @property
    def at_once(self) -> str:
        """The option that rules out gradient accumulation, since it needs all rows of a step at once; empty: none."""
        return "decorrelation" if self.decorrelation else "norm" if self.norm == "batch" else ""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, learning rate and teacher momentum."""

    name: Literal["adamw", "lamb", "lars"] = "adamw"
    """`lamb` and `lars` scale each layer's update by the norm of its weights; use them for batches of many
    thousands."""
    base_lr: float = 1.5e-4
    """Peak learning rate for a batch of 256; the actual peak is base_lr * batch_size / 256."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine schedule."""
    warmup_epochs: float = 40.0
    """Epochs of linear learning-rate warm-up from 0."""
    weight_decay: float = 0.1
    """Weight decay of matrices; vectors, the class token and position embeddings have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the optimizer's moments; `lars` uses the first as momentum."""
    eps: float = 1e-8
    """Term added to the square root of the second moment, for `adamw` and `lamb`."""
    clip_grad: float = 0.0
    """Maximum gradient norm. 0 disables clipping; the norm is still logged."""
    momentum: float = 0.996
    """Teacher (EMA) momentum at step 0; it rises to 1 on a cosine schedule."""

    def __post_init__(self) -> None:
        _positive("optim", self, "base_lr", "eps")
        _at_least("optim", self, min_lr=0, warmup_epochs=0, weight_decay=0, clip_grad=0)
        _share("optim", self, "momentum")
        _require(all(0 <= b < 1 for b in self.betas), f"optim.betas: expected [0, 1), got {self.betas}")


@dataclass(frozen=True)
class TrainConfig:
    """Training length, batch size, precision and compilation."""

    epochs: int = 300
    """Passes over the training images."""
    batch_size: int = 2048
    """Images per optimizer step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches per optimizer step. Raise it when a batch does not fit into memory."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matmuls; weights, statistics and loss stay in fp32. `auto`: bf16 on CUDA GPUs and CPUs with native
    bf16 arithmetic, otherwise fp32."""
    compile: Literal["auto", "none", "block", "step"] = "auto"
    """What torch.compile compiles: a few trunk blocks at a time (`block`), or teacher, student and loss as one graph
    (`step`). `auto`: `block` on a GPU, `none` on a CPU."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture the whole step, including the optimizer and the EMA update, as one CUDA graph and replay it (one process
    only). `auto`: on a GPU, if it computes a step faster than the CPU can launch it."""
    recompute: Literal["auto", "none", "gelu", "norm"] = "auto"
    """What the backward pass recomputes instead of storing: GELU outputs (`gelu`), or GELU and LayerNorm outputs
    (`norm`). `auto`: `norm` on a CPU, `none` on a GPU."""
    fp8: Literal["off", "teacher", "trunk"] = "off"
    """FP8 matmuls (torchao) in the teacher's trunk, or in both trunks. Not recommended: accuracy has not been
    measured."""
    seed: int = 0
    """Random seed of weights, image order, crops, color jitter, masks and drop-path."""
    max_nonfinite: int = 3
    """Stop the run after this many steps in a row with a non-finite loss or gradient; such steps do not change the
    weights."""

    def __post_init__(self) -> None:
        _at_least("train", self, epochs=1, batch_size=1, accumulation=1, max_nonfinite=1)
        _require(0 <= self.seed < 2**63, f"train.seed: expected 0 <= seed < 2**63, got {self.seed}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved and which are kept."""

    every_epochs: int = 1
    """Save a checkpoint every N epochs; 0: off. The last step is always saved."""
    every_steps: int = 0
    """Also save a checkpoint every N steps; 0: off."""
    retain: int = 2
    """Number of recent checkpoints to keep, at least 2."""
    milestone_epochs: int = 0
    """Keep the weights of every N-th epoch permanently; 0 keeps only those of the retained checkpoints."""

    def __post_init__(self) -> None:
        _at_least("ckpt", self, retain=2, every_epochs=0, every_steps=0, milestone_epochs=0)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, and k-NN settings."""

    every_epochs: int = 10
    """Evaluate on test images every N epochs, and at the start and end; 0: off. Pretraining measures k-NN accuracy and
    collapse indicators, fine-tuning accuracy."""
    k: int = 20
    """Number of nearest neighbors that vote."""
    temperature: float = 0.07
    """Temperature of the k-NN vote weights."""
    max_train: int = 20000
    """Maximum number of training images that k-NN compares against during training."""
    max_test: int = 5000
    """Maximum number of test images evaluated during training; fine-tuning uses all of them at the end."""
    batch_size: int = 256
    """Images encoded at a time."""

    def __post_init__(self) -> None:
        _at_least("eval", self, every_epochs=0, k=1, max_train=1, max_test=1, batch_size=1)
        _positive("eval", self, "temperature")


# linear probes of `evaluate`: protocol -> title of its results
PROTOCOLS = {
    "paper": "linear probe",
    "grid": "linear probe, best learning rate",
    "logistic": "logistic regression",
}


def unusual_settings(result: Mapping[str, Any], crop_pct: float | None = None) -> list[str]:
    """The settings of an evaluation that are not the defaults, in words: k-NN, resizing, seeds.

    Args:
        result: As returned by `evaluate` or `segment`, or what a record keeps of it.
        crop_pct: The default one; None: any is listed.
    """
    temperature, crop = result.get("temperature"), result.get("crop_pct")
    seed, seeds = result.get("seed", 0), result.get("seeds", 1)
    words = []
    if temperature not in (None, EvalConfig.temperature):
        words.append(f"temperature {temperature}")
    if crop not in (None, crop_pct):
        words.append(f"crop fraction {crop}")
    if result.get("interpolation", "bilinear") != "bilinear":
        words.append(result["interpolation"])
    if seeds > 1:
        words.append(f"{seeds} seeds" + (f" from {seed}" if seed else ""))
    elif seed:
        words.append(f"seed {seed}")
    return words


@dataclass(frozen=True)
class LogConfig:
    """Logging, trackers and the report."""

    every_steps: int = 10
    """Log metrics every N steps."""
    tracker: str = ""
    """Experiment trackers that also receive metrics, settings and the report: `tensorboard`, `wandb`, `trackio`,
    `mlflow`, or several separated by commas."""
    project: str = "extrema-fast"
    """Project name in the trackers (the experiment in MLflow); the run is named after its folder."""
    report: bool = True
    """Write reports/report.html when the run is complete."""

    def __post_init__(self) -> None:
        _at_least("log", self, every_steps=1)
        for name in self.trackers:
            _require(name in TRACKERS, f"log.tracker: got {name!r}{did_you_mean(name, list(TRACKERS))}")
        _require(bool(self.project.strip()), "log.project: expected a name, got an empty one")

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `tracker`, without duplicates."""
        return tuple(dict.fromkeys(name for part in self.tracker.split(",") if (name := part.strip())))


@dataclass(frozen=True)
class SystemConfig:
    """Devices, backends and parallelism; results change only by rounding."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps` (Apple GPUs)."""
    threads: int = 0
    """CPU threads of PyTorch; 0 uses PyTorch's default."""
    backend: str = "auto"
    """Implementation of each op: `auto` (benchmarked on a GPU), `fixed` (no benchmarks), one name for all ops, or a
    list such as `attention_pool=triton,...`."""
    attention: Attention = "auto"
    """Self-attention backend; `auto` benchmarks them on a GPU, and on a CPU chooses by dtype and number of tokens."""
    attention_teacher: Literal["same", Attention] = "same"
    """Self-attention backend of the teacher, whose sequences are longer; `same` uses `attention`."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: `ddp` replicates the model on each; `fsdp` shards weights, optimizer moments and the EMA,
    for models too large for one GPU."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision of the gradient reduction across processes; `bf16` halves the traffic at the cost of rounding."""
    deterministic: bool = False
    """Bitwise reproducible runs on the same hardware: use PyTorch's deterministic algorithms, and skip benchmarking and
    tuning."""

    def __post_init__(self) -> None:
        _at_least("system", self, threads=0)
        _at_most("system", self, threads=MAX_THREADS)


@dataclass(frozen=True)
class Config:
    """Configuration of a pretraining run."""

    out: str = "runs/photos"
    """Run folder."""
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ckpt: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    system: SystemConfig = field(default_factory=SystemConfig)

    def __post_init__(self) -> None:
        n, k, v = self.model.num_patches, self.num_keep, self.mask.views
        if k < 1:
            # strictly below (n - 1) / n, to four digits, since `keep_count` truncates
            largest = max(0, math.ceil((n - 1) / n * 1e4) - 1) / 1e4
            raise UsageError(
                f"mask.ratio: {self.mask.ratio} keeps 0 of {n} tokens; use at most {largest}, or set mask.keep"
            )
        if k > n:
            raise UsageError(f"mask.keep: {k} is more than the image's {n} tokens; use at most {n}")
        if self.mask.mode == "disjoint" and v * k > n:
            fewer = f"mask.keep <= {n // v}, " if self.mask.keep else f"mask.ratio >= {1 - n // v / n:.4g}, "
            raise UsageError(
                f"mask: {v} disjoint views of {k} tokens need {v * k}, the image has {n}; "
                f"use mask.views <= {n // k}, {fewer if v <= n else ''}or mask.mode independent"
            )
        local_batch(self, 1)
        self._check_channels()
        if (self.head.whole_batch or self.head.norm == "batch") and self.train.batch_size == 1:
            raise UsageError(
                "train.batch_size: InfoNCE, whitened targets and batch norm compare an image with the others of its "
                "batch, and 1 leaves none; use at least 2, or head.loss byol with head.targets plain and head.norm "
                "layer"
            )
        if (name := self.head.at_once) and self.train.accumulation > 1:
            raise UsageError(
                f"head.{name}: its statistics are those of the whole batch, which {self.train.accumulation} "
                f"micro-batches do not show; use train.accumulation 1 (and more processes), or head.{name} "
                f"{HeadConfig.__dataclass_fields__[name].default}"
            )
        if self.optim.warmup_epochs >= self.train.epochs:
            raise UsageError(
                f"optim.warmup_epochs: {self.optim.warmup_epochs:g} must be shorter than "
                f"train.epochs ({self.train.epochs})"
            )

    def _check_channels(self) -> None:
        chans, data = self.model.in_chans, self.data
        # RGB defaults, replaced later for other channels (`training.resolve.settle_channels`)
        rgb = (IMAGENET, CIFAR10)
        for i, name in enumerate(("mean", "std")):
            values = getattr(data, name)
            ok = len(values) in (1, chans) or (len(values) == 3 and chans == 1)
            _require(
                ok or values in [known[i] for known in rgb],
                f"data.{name}: model.in_chans is {chans}, got {len(values)} values; give one, or one per channel",
            )
        _require(
            len(data.range) in (2, 2 * chans),
            f"data.range: model.in_chans is {chans}, got {len(data.range)} values; give black and white, or both of "
            "each channel",
        )
        if chans in (1, 3) and 1 in (len(data.mean), len(data.std)):
            mean, std = (v * 3 if len(v) == 1 else v for v in (data.mean, data.std))
            object.__setattr__(self, "data", dataclasses.replace(data, mean=mean, std=std))

    @property
    def num_keep(self) -> int:
        """Number of tokens kept per view."""
        return self.mask.num_keep(self.model.num_patches)

    @property
    def peak_lr(self) -> float:
        """Peak learning rate, base_lr * batch_size / 256."""
        return self.optim.base_lr * self.train.batch_size / 256


@dataclass(frozen=True)
class TuneConfig:
    """Initial weights and regularization (paper appendix, as in BEiT and MAE)."""

    weights: str = ""
    """Initial weights of the trunk: a run, a weights folder or file, another project's ViT, or `none` for random
    weights."""
    which: Literal["student", "teacher"] = "student"
    """Which network of a pretraining run to start from."""
    pool: Literal["mean", "class"] = "mean"
    """`mean`: average the patch tokens and apply a new norm (the pooling head is dropped); `class`: use the pooling
    head."""
    layer_decay: float = 0.65
    """Factor by which the learning rate shrinks from one trunk block to the block before it; 1: no decay."""
    mixup: float = 0.8
    """Mixup alpha; 0: off. If `cutmix` is on as well, each image gets one of the two, at even odds."""
    cutmix: float = 1.0
    """CutMix alpha; 0: off."""
    smoothing: float = 0.1
    """Label smoothing."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment policy in timm's notation (requires timm); empty: none."""
    erasing: float = 0.25
    """Probability of random erasing."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then evaluated, and loaded by default; 0: none."""

    def __post_init__(self) -> None:
        _share("tune", self, "mixup", "cutmix", "smoothing", "erasing")
        _require(
            0 < self.layer_decay <= 1,
            f"tune.layer_decay: expected above 0, at most 1, got {self.layer_decay}",
        )
        _require(0 <= self.ema < 1, f"tune.ema: expected from 0 to below 1, got {self.ema}")


# sections whose fine-tuning defaults differ from pretraining: whole images, no color jitter
_TUNE_SECTIONS: dict[str, Callable[[], Any]] = {
    "data": partial(DataConfig, train="", policy="spatial", area=(0.08, 1.0)),
    "mask": partial(MaskConfig, ratio=0.0, views=1),
    "model": partial(ModelConfig, drop_path=0.2),
    "optim": partial(
        OptimConfig, base_lr=5e-4, min_lr=1e-6, warmup_epochs=5.0, weight_decay=0.05, betas=(0.9, 0.999)
    ),
    "train": partial(TrainConfig, epochs=100, batch_size=1024),
}
# options that do not apply to fine-tuning
NOT_TUNED = (
    *(f"mask.{f.name}" for f in dataclasses.fields(MaskConfig)),
    *(f"head.{f.name}" for f in dataclasses.fields(HeadConfig)),
    *("data.policy", "data.crop", "data.jitter", "data.jitter_prob", "data.gray_prob"),
    *(
        "optim.momentum",
        "train.fp8",
        "eval.k",
        "eval.temperature",
        "eval.max_train",
        "system.attention_teacher",
    ),
)


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """Configuration of a fine-tuning run; `model` describes the loaded weights. The defaults are the paper's recipe."""

    out: str = "runs/finetuned"
    """Run folder."""
    data: DataConfig = field(default_factory=_TUNE_SECTIONS["data"])
    mask: MaskConfig = field(default_factory=_TUNE_SECTIONS["mask"])
    model: ModelConfig = field(default_factory=_TUNE_SECTIONS["model"])
    optim: OptimConfig = field(default_factory=_TUNE_SECTIONS["optim"])
    train: TrainConfig = field(default_factory=_TUNE_SECTIONS["train"])
    tune: TuneConfig = field(default_factory=TuneConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        usual = {f.name: f.default_factory for f in dataclasses.fields(self) if callable(f.default_factory)}
        for option in NOT_TUNED:
            group, _, leaf = option.partition(".")
            value = getattr(getattr(self, group), leaf)
            _require(
                value == getattr(usual[group](), leaf),
                f"{option}: means nothing to fine-tuning, got {value!r}; leave it out",
            )
        _require(
            self.train.compile != "step", "train.compile: fine-tuning compiles blocks; use block, or none"
        )


def local_batch(cfg: Config, world: int) -> int:
    """Images per process and micro-batch; raises UsageError if the batch size is not divisible."""
    b, a = cfg.train.batch_size, cfg.train.accumulation
    if b % (world * a):
        over = f"{world} processes x {a} micro-batches" if world > 1 else f"{a} micro-batches"
        raise UsageError(
            f"train.batch_size: {b} does not divide over {over}; nearest: {_multiples_near(b, world * a)}"
        )
    return b // (world * a)


def derived(cfg: Config, processes: int = 1) -> dict[str, Any]:
    """Values computed from the configuration alone."""
    return {
        "grid": list(cfg.model.grid),
        "num_patches": cfg.model.num_patches,
        "num_keep": cfg.num_keep,
        "width_depth_heads": list(cfg.model.shape),
        "peak_lr": cfg.peak_lr,
        "global_batch": cfg.train.batch_size,
        "processes": processes,
        "local_batch": local_batch(cfg, processes),
    }


# ---- to and from plain data ----------------------------------------------------------------------


def to_dict(cfg: Any) -> dict[str, Any]:
    """The configuration as nested plain data (tuples become lists), as written to `config.json`."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def from_dict(data: dict[str, Any], base: Config | None = None, *, recorded: bool = False) -> Config:
    """Returns `base` with the nested options in `data` replaced.

    Args:
        data: nested options, in the format of `to_dict`; may be partial.
        base: the configuration to change; None: `photos()`, or `FinetuneConfig()` if `data` has a section `tune`.
        recorded: whether `data` was recorded by a run, perhaps of an older version. Options removed since then are
            ignored, and `base` None stands for the defaults, in which newer options are off.

    Raises:
        UsageError: an unknown key (the message suggests similar ones), a value of the wrong type, or a removed option.
    """
    if base is None:
        tune = isinstance(data, dict) and "tune" in data
        base = FinetuneConfig() if tune else Config() if recorded else photos()
    return _replace(base, _scaled_warmup(base, data), "", recorded, base)


def _scaled_warmup(base: Config, data: dict[str, Any]) -> dict[str, Any]:
    """`data`, with the warm-up of `base` scaled down if the epochs in `data` are too few for it."""
    train, optim = (data.get(group, {}) if isinstance(data, dict) else {} for group in ("train", "optim"))
    if not (isinstance(train, dict) and isinstance(optim, dict)):
        return data
    epochs, warmup = train.get("epochs"), base.optim.warmup_epochs
    if type(epochs) is not int or not 0 < epochs <= warmup or "warmup_epochs" in optim:
        return data
    scaled = warmup * epochs / base.train.epochs
    log.warning(
        "train.epochs %d is no longer than the warm-up of %g: optim.warmup_epochs is %g now, the same share of the run",
        epochs, warmup, scaled,
    )  # fmt: skip
    return data | {"optim": optim | {"warmup_epochs": scaled}}


def _replace(obj: Any, data: dict[str, Any], prefix: str, recorded: bool, cfg: Config) -> Any:
    if not isinstance(data, dict):
        raise UsageError(f"{prefix.rstrip('.') or 'config'}: expected a table of options, got {data!r}")
    hints = get_type_hints(type(obj))
    changed = {}
    for key, value in data.items():
        name = key.replace("-", "_")
        option = f"{prefix}{name}"
        if option in REMOVED:
            default, instead = REMOVED[option]
            if value != default and not recorded:
                raise UsageError(f"{option}: this option was removed, got {reprlib.repr(value)}; {instead}")
            continue
        if name not in hints:
            raise _unknown_option(f"{prefix}{key}", cfg)
        if dataclasses.is_dataclass(hints[name]):
            changed[name] = _replace(getattr(obj, name), value, f"{option}.", recorded, cfg)
            continue
        if isinstance(value, str | bool) and (now := RENAMED_VALUES.get(option, {}).get(value)):
            if not recorded:
                raise UsageError(f"{option}: {value!r} is called {now!r} now; use {now}")
            value = now
        changed[name] = _coerce(value, hints[name], option)
    return dataclasses.replace(obj, **changed)


# the largest fp32, since these numbers end up in tensors
MAX_NUMBER = float.fromhex("0x1.fffffep+127")


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """`value`, checked against the annotation `hint`: a Literal, tuple, bool, int, float or str."""
    if get_origin(hint) is Literal:
        choices = list(get_args(hint))
        if value not in choices:
            raise UsageError(f"{name}: got {reprlib.repr(value)}{did_you_mean(str(value), choices)}")
        return value
    if get_origin(hint) is tuple:
        hints = get_args(hint)
        if hints[-1] is Ellipsis and isinstance(value, (list, tuple)):
            hints = hints[:1] * len(value)
        if not isinstance(value, (list, tuple)) or len(value) != len(hints):
            wanted = "a list of" if hints[-1] is Ellipsis else len(hints)
            raise UsageError(f"{name}: expected {wanted} values, got {reprlib.repr(value)}")
        return tuple(_coerce(v, h, name) for v, h in zip(value, hints, strict=True))
    if hint is float and type(value) is int and abs(value) <= 2**53:
        value = float(value)
    # type(), not isinstance, since a bool is not a number here
    if type(value) is not hint or (hint is float and not abs(value) <= MAX_NUMBER):
        kind = "a finite float" if hint is float else hint.__name__
        raise UsageError(f"{name}: expected {kind}, got {reprlib.repr(value)}")
    if hint is int and abs(value) > 2**63 - 1:
        raise UsageError(f"{name}: {reprlib.repr(value)} is more than a 64-bit number")
    return value


def read_config(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """Reads a TOML or JSON configuration file, without validating its options.

    The output of `--print-config` is such a file: its `config` holds every setting. Dotted option names are allowed.

    Returns:
        (the value of `preset` or None, the options as nested dicts).

    Raises:
        UsageError: the file is missing or malformed.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read ({error})") from None
    is_json = path.suffix == ".json" or text.lstrip().startswith("{")
    try:
        data = json.loads(text) if is_json else parse_toml(text)
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if path.suffix in (".yaml", ".yml"):
            problem = "YAML is not read"
        raise UsageError(
            f"--config {path}: not valid {'JSON' if is_json else 'TOML'} ({problem}); write TOML, such as "
            f"`[train]` and `epochs = 20`, or the JSON of --print-config"
        ) from None
    if not isinstance(data, dict):
        raise UsageError(f"--config {path}: expected a table of options at the top")
    if data.keys() in ({"preset", "config", "derived", "sources"}, {"preset", "config"}):
        data = {"preset": data["preset"], **data["config"]}
    of_preset = data.pop("preset", None)
    return of_preset, nested({option.replace("-", "_"): value for option, value in flatten(data).items()})


MAX_TOML = 1 << 18


def parse_toml(text: str) -> dict[str, Any]:
    """Parses TOML text; raises ValueError if it is invalid, too long or too deeply nested."""
    # tomllib stores every prefix of a dotted key
    if len(text) > MAX_TOML or any(line.count(".") > 200 for line in text.splitlines()):
        raise ValueError(f"more than {MAX_TOML} characters, or than 200 dots in a line")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turns options by dotted name into nested ones for `from_dict`; the inverse of `flatten`."""
    tables: dict[str, Any] = {}
    # a value in place of a group is kept, so that it is reported as an error later
    for option, value in sorted(options.items(), key=lambda item: "." not in item[0]):
        group, _, leaf = option.rpartition(".")
        (tables.setdefault(group, {}) if group else tables)[leaf] = value
    return tables


def typed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the names and types of options by dotted name, each separately.

    Raises:
        UsageError: an unknown option, or a value of the wrong type.
    """
    groups = get_type_hints(Config)
    found: dict[str, Any] = {}
    for option, value in options.items():
        name = option.replace("-", "_")
        group, _, leaf = name.rpartition(".")
        hints = get_type_hints(groups[group]) if dataclasses.is_dataclass(groups.get(group)) else groups
        if name in REMOVED or name in RENAMED_VALUES:
            # `from_dict` handles them
            found[name] = value
        elif leaf not in hints or (group and hints is groups) or dataclasses.is_dataclass(hints[leaf]):
            raise _unknown_option(option, Config())
        else:
            found[name] = _coerce(value, hints[leaf], name)
    return found


# removed option -> (its default, what to do instead). Files that set the default still load; other values are an
# error, except in the recorded configuration of an old run.
REMOVED: dict[str, tuple[Any, str]] = {
    "train.compact": (False, "leave it out: the result is the same without it"),
    "log.tensorboard": (False, "use log.tracker tensorboard"),
}

# option -> {old name of a value: its current name}
RENAMED_VALUES: dict[str, dict[Any, str]] = {
    "train.compile": {"loss": "step"},
    "train.cuda_graph": {False: "off", True: "on"},
    "system.attention": {"products": "matmul", "fa3": "xformers"},
    "system.attention_teacher": {"products": "matmul", "fa3": "xformers"},
}

# fields that may change when a run is resumed, since they do not affect what is learned
FREE_FIELDS = (
    *("out", "log.", "ckpt.", "eval.", "system."),
    *("data.test", "data.loader", "data.threads", "data.hw_decoder_load", "data.bad_budget", "data.resident"),
    *("train.compile", "train.cuda_graph", "train.recompute"),
    # removed
    "train.compact",
)


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """The options by dotted name: `{"data.train": ..., "mask.ratio": ...}`."""
    flat: dict[str, Any] = {}
    for key, value in (cfg if isinstance(cfg, dict) else to_dict(cfg)).items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def differing(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Options whose values differ, except `out`: `{"mask.ratio": (0.8, 0.9), ...}`; None stands for a missing one."""
    left, right = flatten(a), flatten(b)
    names = sorted((left.keys() | right.keys()) - {"out"})
    return {k: (left.get(k), right.get(k)) for k in names if left.get(k) != right.get(k)}


def changed_maths(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Changed fields that affect what is learned: `["mask.ratio: 0.8 -> 0.9", ...]`.

    A field missing from `old` was added later; its default is the earlier behavior.
    """
    defaults = FinetuneConfig() if "tune" in new else Config()
    a, b = flatten(defaults) | flatten(old), flatten(new)
    a = {k: v for k, v in a.items() if k not in REMOVED or v != REMOVED[k][0]}
    names = sorted(k for k in a.keys() | b.keys() if not k.startswith(FREE_FIELDS))
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in names if a.get(k) != b.get(k)]


@functools.lru_cache
def config_hash(cfg: Config) -> str:
    """Short hash of the fields that affect what is learned."""
    # `from_dict` makes 1 and 1.0 equal
    flat = flatten(from_dict(to_dict(cfg), cfg))
    maths = {k: v for k, v in flat.items() if not k.startswith(FREE_FIELDS)}
    return hashlib.sha256(json.dumps(maths, sort_keys=True).encode()).hexdigest()[:12]


# ---- presets --------------------------------------------------------------------------------------


def photos() -> Config:
    """32x32 crops of the photographs shipped with scikit-image; trains in minutes on a laptop CPU (the default).

    InfoNCE without color jitter, small batches, a shallow encoder, 6 of 64 tokens per view and a fast-moving teacher,
    chosen by the runs in `benchmarks/records/`, which also has BYOL on the same images.
    """
    return Config(
        out="runs/photos",
        data=DataConfig(train="photos", policy="spatial", area=(0.7, 1.0)),
        mask=MaskConfig(ratio=0.9, views=5),
        model=ModelConfig(
            size="tiny",
            img_size=(32, 32),
            patch_size=4,
            width=96,
            depth=2,
            heads=2,
            mlp_ratio=2.0,
            drop_path=0.0,
        ),
        head=HeadConfig(loss="infonce", temperature=0.07, hidden=512, out=128, predictor_hidden=512),
        optim=OptimConfig(base_lr=5.6e-3, warmup_epochs=2, momentum=0.9),
        train=TrainConfig(epochs=96, batch_size=32),
        ckpt=CheckpointConfig(every_epochs=24),
        eval=EvalConfig(every_epochs=24, max_train=1080, max_test=540),
        log=LogConfig(every_steps=201),
    )


def cifar10() -> Config:
    """CIFAR-10 in class folders (`--data.train DIR/train --data.test DIR/test`)."""
    return Config(
        out="runs/cifar10",
        data=DataConfig(
            train="cifar10/train",
            test="cifar10/test",
            policy="spatial",
            area=(0.4, 1.0),
            mean=CIFAR10[0],
            std=CIFAR10[1],
        ),
        mask=MaskConfig(ratio=0.8, views=5),
        model=ModelConfig(
            size="tiny", img_size=(32, 32), patch_size=4, width=192, depth=6, heads=3, drop_path=0.0
        ),
        head=HeadConfig(loss="infonce", temperature=0.1, hidden=1024, out=128, predictor_hidden=1024),
        optim=OptimConfig(base_lr=2.8e-3, warmup_epochs=2, momentum=0.98),
        train=TrainConfig(epochs=100, batch_size=64),
        eval=EvalConfig(every_epochs=10),
    )


def own() -> Config:
    """Your own images: the starting point that `training.own` adapts to the images and the machine.

    The short recipe of record 2026-11-27_cpu1_own_search. `training.own` adds what depends on the images, and options
    that settings recorded by earlier runs lack: queue, batch norm, decorrelation and the initial patch kernel.
    """
    return Config(
        out="runs/own",
        data=DataConfig(train="", policy="spatial", area=(0.4, 1.0)),
        mask=MaskConfig(ratio=0.9, views=5),
        model=ModelConfig(
            size="tiny",
            img_size=(64, 64),
            patch_size=8,
            width=128,
            depth=2,
            heads=2,
            mlp_ratio=2.0,
            drop_path=0.0,
        ),
        head=HeadConfig(loss="infonce", temperature=0.1, hidden=512, out=128, predictor_hidden=512),
        optim=OptimConfig(base_lr=5.6e-3, warmup_epochs=2, momentum=0.9),
        train=TrainConfig(epochs=34, batch_size=32),
    )


def _paper(size: Size, ratio: float, views: int) -> Config:
    """The paper's recipe: disjoint views, 300 epochs, batch 2048; layer scale 1e-5 for large (the release's advice)."""
    return Config(
        out=f"runs/{_paper_name(size, ratio, views)}",
        data=DataConfig(train="imagenet/train", test="imagenet/val"),
        mask=MaskConfig(ratio=ratio, views=views),
        model=ModelConfig(size=size, layer_scale=1e-5 if size == "large" else 0.1),
        train=TrainConfig(epochs=300, batch_size=2048),
        ckpt=CheckpointConfig(every_epochs=1, milestone_epochs=50),
        eval=EvalConfig(every_epochs=10),
    )


def _paper_name(size: Size, ratio: float, views: int) -> str:
    return f"paper_{size}_{round(ratio * 100)}x{views}"


def smoke() -> Config:
    """Smoke test: generated images, seconds on a CPU."""
    return Config(
        out="runs/smoke",
        data=DataConfig(train="synthetic", loader="auto", limit=64),
        mask=MaskConfig(ratio=0.75, views=2),
        model=ModelConfig(size="tiny", img_size=(32, 32), patch_size=8, width=64, depth=2, heads=1),
        head=HeadConfig(hidden=64, out=32, predictor_hidden=64),
        optim=OptimConfig(warmup_epochs=0.5),
        train=TrainConfig(epochs=2, batch_size=16, precision="fp32"),
        ckpt=CheckpointConfig(every_steps=2),
        eval=EvalConfig(every_epochs=1, batch_size=32),
        log=LogConfig(every_steps=1),
    )


_PAPER: list[tuple[Size, float, int]] = [
    (size, ratio, views) for size in ("small", "base", "large") for ratio, views in ((0.8, 5), (0.9, 8))
]
PRESETS: dict[str, Callable[[], Config]] = {
    "own": own,
    "photos": photos,
    "cifar10": cifar10,
    **{_paper_name(*setting): partial(_paper, *setting) for setting in _PAPER},
    "smoke": smoke,
}


def preset(name: str) -> Config:
    """Returns the configuration of a preset.

    Raises:
        UsageError: an unknown name; the message suggests a similar one.
    """
    key = str(name).replace("-", "_")
    if key not in PRESETS:
        raise UsageError(f"unknown preset {name!r}{did_you_mean(key, list(PRESETS))}")
    return PRESETS[key]()


def finetune_small() -> FinetuneConfig:
    """Thousands of small images in minutes on a CPU, without timm; weights `none` start from the `cifar10` encoder."""
    return FinetuneConfig(
        data=DataConfig(train="", policy="spatial", area=(0.4, 1.0), mean=CIFAR10[0], std=CIFAR10[1]),
        model=cifar10().model,
        optim=OptimConfig(base_lr=4e-3, warmup_epochs=1, weight_decay=0.05, betas=(0.9, 0.999)),
        train=TrainConfig(epochs=20, batch_size=64),
        tune=TuneConfig(layer_decay=0.75, mixup=0.0, cutmix=0.0, rand_augment="", erasing=0.0),
        eval=EvalConfig(every_epochs=1),
    )


FINETUNE_PRESETS: dict[str, Callable[[], FinetuneConfig]] = {"small": finetune_small, "paper": FinetuneConfig}


def nearest_preset(cfg: Config) -> tuple[str, Config]:
    """The preset that differs from `cfg` in the fewest options: (name, configuration)."""
    return min(((n, make()) for n, make in PRESETS.items()), key=lambda p: len(differing(cfg, p[1])))
