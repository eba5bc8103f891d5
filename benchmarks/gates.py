"""Correctness before time: every provider of the step against the product, with the same weights and coins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from extrema_fast.config import Config, from_dict
from extrema_fast.errors import UsageError
from extrema_fast.models.drop_path import drop_path_scale
from extrema_fast.models.masking import draw_views

from .providers import Provider
from .stepper import Inputs, Stepper

# relative errors allowed: loss and gradients in fp32; the loss of a first step in 16 bits against fp32
LOSS_FP32, GRADIENTS_FP32, LOSS_16 = 1e-4, 2e-3, 1e-2


@dataclass(frozen=True)
class Gate:
    """One check: its name, whether it passed, what was found."""

    name: str
    passed: bool
    found: str


class Truth(NamedTuple):
    """What the product computes in fp32, eagerly: loss and gradients by name."""

    loss: float
    gradients: dict[str, Tensor]


def random_images(cfg: Config, sets: int, device: torch.device, seed: int = 0) -> list[Inputs]:
    """`sets` batches of random uint8 images with their row numbers; the same for every provider."""
    generator = torch.Generator().manual_seed(seed)
    b, (h, w) = cfg.train.batch_size, cfg.model.img_size
    return [
        Inputs(
            torch.randint(0, 256, (b, h, w, 3), dtype=torch.uint8, generator=generator).to(device),
            torch.arange(i * b, (i + 1) * b),
        )
        for i in range(sets)
    ]


def check_inputs(images: Tensor) -> None:
    """Raises UsageError for images that would be timed wrongly: constant ones draw less power."""
    low, high = images.amin().item(), images.amax().item()
    if low == high:
        raise UsageError(
            f"inputs: all values are {low}; a benchmark needs random images (zeros draw less power and raise "
            "clocks); use gates.random_images"
        )


def with_coins(inputs: Inputs, cfg: Config, device: torch.device) -> Inputs:
    """The product's own masks and drop-path factors for these rows, for the others to use."""
    index, keys = inputs.index.to(device), {"seed": cfg.train.seed, "epoch": 0}
    model, mask = cfg.model, cfg.mask
    keep = draw_views(index, model.num_patches, cfg.num_keep, mask.views, mode=mask.mode, **keys)
    scale = drop_path_scale(index, mask.views, model.shape[1], model.drop_path, **keys)
    return inputs._replace(keep=keep, scale=scale)


def small(cfg: Config, batch: int = 2) -> Config:
    """The same model at a small batch without drop-path, for the exact comparison."""
    return from_dict({"model": {"drop_path": 0.0}, "train": {"batch_size": batch}}, cfg)


def reference(cfg: Config, device: torch.device) -> Stepper:
    """The product in fp32 without compilation."""
    from .ours import Ours

    settings = {"train.compile": "none", "train.cuda_graph": False, "system.threads": cfg.system.threads}
    return Ours(cfg, device, "fp32", **settings)


def save_student(stepper: Stepper, file: Path) -> Path:
    """The student's weights under its names, for `Stepper.load`."""
    save_file({n: p.detach().cpu().contiguous() for n, p in stepper.student().items()}, file)
    return file


def one_step(stepper: Stepper, inputs: Inputs) -> Truth:
    """Loss and gradients of one step (whose optimizer step is of no interest)."""
    stepper.step(inputs)
    gradients = {n: p.grad.detach().clone() for n, p in stepper.student().items() if p.grad is not None}
    return Truth(stepper.loss(), gradients)


def compare(name: str, found: Truth, truth: Truth) -> Gate:
    """Whether a provider's fp32 loss and gradients are the product's.

    The key biases' gradients are zero in exact arithmetic and rounding noise otherwise: left out.
    """
    error = abs(found.loss - truth.loss) / max(abs(truth.loss), 1e-12)
    largest = max(float(g.abs().max()) for g in truth.gradients.values())
    worst, where = 0.0, ""
    for key, g in truth.gradients.items():
        g = without_key_bias(key, g)
        if g is None:
            continue
        if key not in found.gradients:
            return Gate(name, False, f"no gradient for {key}")
        other = without_key_bias(key, found.gradients[key])
        # a gradient that is nearly zero everywhere is judged beside the others
        scale = max(float(g.abs().max()), 1e-4 * largest)
        gap = float((other - g).abs().max()) / scale
        if not gap <= worst:
            worst, where = gap, key
    told = f"fp32 loss {found.loss:.6f}, off by {error:.1e}; gradients by {worst:.1e}" + (
        f" ({where})" if where else ""
    )
    return Gate(name, error <= LOSS_FP32 and worst <= GRADIENTS_FP32, told)


def without_key_bias(name: str, x: Tensor) -> Tensor | None:
    """`x` without the entries of key biases: their exact gradient is zero. None when nothing is left."""
    if name.endswith("attn.k.bias"):
        return None
    if name.endswith("qkv.bias"):
        third = len(x) // 3
        return torch.cat([x[:third], x[2 * third :]])
    return x


def exact(providers: list[Provider], cfg: Config, device: torch.device, folder: Path) -> list[Gate]:
    """Each provider's fp32 loss and gradients against the product's: same weights, masks and images, eager.

    folder  where the weights go for the providers to start from
    """
    tiny = small(cfg)
    inputs = with_coins(random_images(tiny, 1, device)[0], tiny, device)
    product = reference(tiny, device)
    weights = save_student(product, folder / "exact.safetensors")
    truth = one_step(product, inputs)
    del product
    gates = []
    for p in providers:
        if p.family == "yardstick":
            continue
        stepper = replace(p.eager(), precision="fp32").make(tiny, device)
        stepper.load(weights)
        gates.append(compare(p.name, one_step(stepper, inputs), truth))
    return gates


def first_loss(cfg: Config, device: torch.device, file: Path) -> float:
    """The fp32 loss of the first timed configuration's first step; its weights go to `file`."""
    product = reference(cfg, device)
    save_student(product, file)
    inputs = with_coins(random_images(cfg, 1, device)[0], cfg, device)
    with torch.no_grad():
        method = product.run.method  # type: ignore[attr-defined]
        x, y = product.pictures(inputs)
        return float(method(x, y, inputs.keep, inputs.scale).loss)


def first_step(provider: Provider, precision: str, loss: float, truth: float) -> Gate:
    """Whether the first real step (own precision, compiled) has the loss of the fp32 reference."""
    if provider.family == "yardstick":
        return Gate(
            provider.name, loss == loss, f"loss {loss:.4f} (another method: finite is all that is asked)"
        )
    if provider.build.startswith("released_code"):
        # it draws its own drop-path coins, so only the exact comparison applies
        return Gate(provider.name, loss == loss, f"first step's loss {loss:.4f} with its own drop-path coins")
    limit = LOSS_FP32 if precision == "fp32" else LOSS_16
    error = abs(loss - truth) / max(abs(truth), 1e-12)
    told = f"first step's {precision} loss {loss:.5f}, off by {error:.1e} from fp32"
    return Gate(provider.name, error <= limit, told)
