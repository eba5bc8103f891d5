"""The encoders that `python -m benchmarks encode` puts side by side, as they run in a process of their own.

timm's ViT, Hugging Face's and ours accelerated have one set of weights; the product's own encoder (no class token in
the trunk, two class-attention blocks after it) has its own. Masked, the others run as MAE-style projects have it: all
patches embedded, positions added, the kept tokens gathered, blocks.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from extrema_fast import kernels
from extrema_fast.config import SIZES
from extrema_fast.models.accelerate import accelerate
from extrema_fast.models.encoder import create_encoder

from .with_timm import mend_torchvision

PATCH = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# relative error (2-norm) of a batch's first rows against float64 with the same weights; fp32 sums of some thousand
# numbers in 12 blocks end below 1e-5, bf16 has 2^-9 in each of some 50 roundings in a row
LIMITS = {"fp32": 1e-5, "bf16": 3e-2}
CHECKED = 2
SETS = 4
Encode = Callable[[Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class EncodeProvider:
    """One way to encode images.

    name         unique; the first part of a row's key
    library      `ours`, `accelerated`, `timm` or `hf`
    about        one line
    compiled     through torch.compile, a graph per shape
    needs        packages; `cuda`, `triton` (that can run)
    environment  variables of its process
    """

    name: str
    library: str
    about: str
    compiled: bool = False
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def missing(self, device: str) -> str:
        """Why it cannot run there; empty when it can, as far as is known without trying."""
        for need in self.needs:
            if need == "cuda" and not device.startswith("cuda"):
                return "needs a CUDA device"
            if need == "triton" and not kernels.can_run(device)[0]:
                return kernels.can_run(device)[1]
            if need not in ("cuda", "triton") and importlib.util.find_spec(need) is None:
                return f"{need} is not installed"
        return ""


def _pair(library: str, about: str, *needs: str) -> list[EncodeProvider]:
    return [
        EncodeProvider(library, library, f"{about}, eager", False, needs),
        EncodeProvider(f"{library}-compiled", library, f"{about}, torch.compile", True, needs),
    ]


_TRITON = {"EXTREMA_FAST_BACKEND": "triton"}
PROVIDERS: tuple[EncodeProvider, ...] = (
    *_pair("ours", "this project's encoder, encode(images, keep)"),
    *_pair("accelerated", "timm's ViT through accelerate(vit), encode(images, keep)", "timm"),
    *_pair("timm", "timm's ViT; masked: embed all, gather, blocks", "timm"),
    *_pair("hf", "transformers' ViTModel; masked: embed all, gather, layers", "transformers"),
    EncodeProvider("ours-triton", "ours", "ours, every Triton kernel on", False, ("cuda", "triton"), _TRITON),
    EncodeProvider(
        "accelerated-triton", "accelerated", "accelerated, every Triton kernel on", False,
        ("timm", "cuda", "triton"), _TRITON,
    ),
)  # fmt: skip
BY_NAME = {p.name: p for p in PROVIDERS}


# ---- the models -------------------------------------------------------------------------------------


def timm_vit(size: str, img_size: int) -> nn.Module:
    """timm's ViT of that size with class token, no classifier; random weights, the same in every process."""
    mend_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    width, depth, heads = SIZES[size]
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=img_size, patch_size=PATCH, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
    )


def hf_vit(size: str, img_size: int) -> nn.Module:
    """Hugging Face's ViTModel, with the weights of `timm_vit`."""
    vit = timm_vit(size, img_size)
    from transformers import ViTConfig, ViTModel

    width, depth, heads = SIZES[size]
    model = ViTModel(
        ViTConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
            image_size=img_size, patch_size=PATCH, layer_norm_eps=1e-6, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    model.load_state_dict(hf_names(vit.state_dict()))
    return model


def hf_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A timm ViT's weights under the names of transformers' ViTModel."""
    found: dict[str, Tensor] = {}
    for name, x in state.items():
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = name.replace("cls_token", "embeddings.cls_token").replace(
            "pos_embed", "embeddings.position_embeddings"
        )
        name = (
            name.replace("blocks.", "layers.")
            .replace("norm1", "layernorm_before")
            .replace("norm2", "layernorm_after")
        )
        name = f"layernorm.{name[5:]}" if name.startswith("norm.") else name
        name = name.replace("attn.proj", "attention.o_proj")
        if ".attn.qkv." in name:
            for part, y in zip("qkv", x.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"attention.{part}_proj")] = y
        else:
            found[name] = x
    return found


def timm_slow(vit: Any) -> Encode:
    """Tokens [B, 1 + K, D] of timm's ViT the usual way."""

    def encode(images: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            return vit.forward_features(images)
        x = vit._pos_embed(vit.patch_embed(images))
        return vit.norm(vit.blocks(vit.norm_pre(_picked(x, keep))))

    return encode


def hf_slow(model: Any) -> Encode:
    """The same of Hugging Face's."""

    def encode(images: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            return model(images).last_hidden_state
        x = _picked(model.embeddings(images), keep)
        for layer in model.layers:
            x = layer(x, None)
        return model.layernorm(x)

    return encode


def ours_slow(encoder: Any) -> Encode:
    """The definition of our own encoder: all patches, gather, trunk, head."""

    def encode(images: Tensor, keep: Tensor | None) -> Tensor:
        x = encoder.embed(images)
        x = x if keep is None else _rows(x, keep)
        x = encoder.trunk(x)
        return encoder.norm(torch.cat([encoder.pool(x)[0][:, None], x], 1))

    return encode


def _picked(x: Tensor, keep: Tensor) -> Tensor:
    """The class token and the kept patches of x [B, 1 + N, D]."""
    return torch.cat([x[:, :1], _rows(x[:, 1:], keep)], 1)


def _rows(x: Tensor, keep: Tensor) -> Tensor:
    return x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))


def _ours(encoder: Any) -> Encode:
    def encode(images: Tensor, keep: Tensor | None) -> Tensor:
        out = encoder.encode(images, keep)
        return torch.cat([out.cls[:, None], out.patches], 1)

    return encode


def _accelerated(vit: Any) -> Encode:
    fast = accelerate(vit)
    return lambda images, keep: fast.encode(images, keep).tokens


def _own(size: str, img_size: int) -> nn.Module:
    torch.manual_seed(0)
    return create_encoder(f"extrema_vit_{size}_patch{PATCH}_224", img_size=img_size)


# library -> (model of a size, its encode, its definition)
LIBRARIES: dict[
    str, tuple[Callable[[str, int], nn.Module], Callable[[Any], Encode], Callable[[Any], Encode]]
] = {
    "ours": (_own, _ours, ours_slow),
    "accelerated": (timm_vit, _accelerated, timm_slow),
    "timm": (timm_vit, timm_slow, timm_slow),
    # against timm's: that its weights are where they belong is part of the check
    "hf": (hf_vit, hf_slow, timm_slow),
}


# ---- one provider in its process --------------------------------------------------------------------


class Encoding:
    """A provider ready to encode batches; `step` runs one, `check` compares one with float64.

    provider  a name of `PROVIDERS`
    size      tiny, small, base or large;  img_size: pixels of a side
    dtype     of images and weights: fp32 or bf16
    """

    def __init__(
        self, provider: str, size: str, img_size: int, batch: int, dtype: str, device: torch.device
    ) -> None:
        p, self.dtype = BY_NAME[provider], dtype
        build, fast, self._slow = LIBRARIES[p.library]
        model = build(size, img_size).to(device, DTYPES[dtype]).eval().requires_grad_(False)
        if p.library == "hf":
            # the rounded weights, as the model has them
            self._exact = timm_vit(size, img_size).to(device, DTYPES[dtype]).double().eval()
        else:
            self._exact = copy.deepcopy(model).double()
        self.encode = fast(model)
        if p.compiled:
            torch._dynamo.config.recompile_limit = 64
            self.encode = torch.compile(self.encode, dynamic=False)
        self.patches = (img_size // PATCH) ** 2
        generator = torch.Generator().manual_seed(0)
        shape = batch, 3, img_size, img_size
        self.images = [torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for _ in range(SETS)]
        orders = [torch.rand(batch, self.patches, generator=generator).argsort(1) for _ in range(SETS)]
        self.orders = [o.to(device) for o in orders]
        self.kept = 0

    def keep(self, index: int) -> Tensor | None:
        """Indices of set `index`; None: all patches."""
        return self.orders[index][:, : self.kept].contiguous() if self.kept else None

    def choose(self, kept: int) -> list[tuple[Tensor, Tensor | None]]:
        """The inputs with so many patches kept (0: all)."""
        self.kept = kept
        return [(images, self.keep(i)) for i, images in enumerate(self.images)]

    def step(self, inputs: tuple[Tensor, Tensor | None]) -> None:
        """Encodes one batch."""
        with torch.no_grad():
            self.out = self.encode(*inputs)

    def check(self) -> dict[str, Any]:
        """`{"error_of", "limit", "tokens"}` of the first rows, of a whole batch as it is timed."""
        images, keep = self.images[0], self.keep(0)
        self.step((images, keep))
        with torch.no_grad():
            wanted = self._slow(self._exact)(
                images[:CHECKED].double(), None if keep is None else keep[:CHECKED]
            )
        error = float((self.out[:CHECKED].double() - wanted).norm() / wanted.norm())
        return {"error_of": error, "limit": LIMITS[self.dtype], "tokens": self.out.shape[1]}
