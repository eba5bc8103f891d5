"""Training steps to compare: the released formulation or a checkout of it, a strong plain-PyTorch step, and ours.

Parameters have the names of `ExtreMA`, which are those of the released checkpoints.
"""

from __future__ import annotations

import math
import sys
import types
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from extrema_fast.config import Config, from_dict
from extrema_fast.data.augment import color_jitter, jitter_params
from extrema_fast.data.loader import Batch
from extrema_fast.distributed import World
from extrema_fast.errors import UsageError
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.ops import attention as attentions
from extrema_fast.train import train_step
from extrema_fast.training.draw import draw
from extrema_fast.training.optim import Schedule
from extrema_fast.training.run import build, prepare_torch
from extrema_fast.training.step import wrap

# images of the imagined training set, so that every provider has the same schedules
IMAGES = 100_000


@dataclass(frozen=True)
class Inputs:
    """One step's data.

    Attributes:
        images: [B, H, W, 3] uint8 on the device.
        index: [B] int64 sample rows on the CPU.
        keep: [V, B, K] masks and
        scale: [L, 2, V*B] fp32 drop-path factors to use in place of the provider's own random ones; None while timing.
    """

    images: Tensor
    index: Tensor
    keep: Tensor | None = None
    scale: Tensor | None = None


class Stepper:
    """A provider of training steps: built once, stepped many times; subclasses write `step`.

    Args:
        cfg: model, masks, heads, optimizer, batch size.
        device: where it runs.
        precision: fp32, bf16 or fp16 of the matmuls.

    Attributes:
        student: trained parameters by the names of `ExtreMA.student_branch`.
        teacher: the teacher's by the same names.
        attention: what the self-attention of student and teacher runs on.
    """

    student: dict[str, nn.Parameter]
    teacher: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    attention: tuple[str, str] = ("formula", "formula")

    def __init__(self, cfg: Config, device: torch.device, precision: str) -> None:
        self.cfg, self.device, self.precision = cfg, device, precision
        self.heads = cfg.model.shape[2]
        self.schedule = Schedule(cfg, IMAGES // cfg.train.batch_size)
        self.taken = 0
        self.last_loss: Tensor | float = float("nan")

    def step(self, inputs: Inputs) -> None:
        """Makes one whole optimizer step: masks, both networks, loss, backward pass, optimizer, EMA."""

    def loss(self) -> float:
        """Returns the last step's loss; waits for the device."""
        return float(self.last_loss)

    def load(self, file: Path) -> None:
        """Starts student and teacher from a safetensors file of the student's weights."""
        with safe_open(file, "pt") as weights, torch.no_grad():
            for parameters in (self.student, self.teacher):
                for name in parameters.keys() & weights.keys():
                    parameters[name].copy_(weights.get_tensor(name))

    def autocast(self) -> AbstractContextManager:
        """Returns autocast in the provider's precision; does nothing in fp32."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, self.precision != "fp32")

    def views(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Returns the student's and the teacher's normalized images, fp32 [B, C, H, W]."""
        cfg, index = self.cfg, inputs.index.to(self.device)
        params = jitter_params(index, cfg.data, seed=cfg.train.seed, epoch=0)
        return color_jitter(inputs.images, params, cfg.data, cfg.model.in_chans)

    def adamw(self, **options: Any) -> torch.optim.AdamW:
        """Returns AdamW over the student: weight decay on matrices only."""
        o = self.cfg.optim
        groups: dict[float, list[nn.Parameter]] = {0.0: [], o.weight_decay: []}
        for name, p in self.student.items():
            groups[0.0 if p.dim() <= 1 or name.endswith("cls_token") else o.weight_decay].append(p)
        split = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
        return torch.optim.AdamW(split, lr=1.0, betas=o.betas, eps=o.eps, **options)

    def set_rate(self) -> None:
        """Sets this step's learning rate and counts the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(self.taken)
        self.taken += 1


class Ours(Stepper):
    """`extrema_fast.train.train_step`; `settings` are dotted options such as `train.compile`."""

    def __init__(self, cfg: Config, device: torch.device, precision: str, **settings: Any) -> None:
        cfg = with_settings(cfg, {"train.precision": precision} | settings)
        super().__init__(cfg, device, precision)
        prepare_torch(cfg.system)
        self.run = build(cfg, World(device), range(IMAGES))  # type: ignore[arg-type]
        wrap(self.run)
        self.attention = (self.run.resolved.attention, self.run.resolved.attention_teacher)
        self.student = dict(self.run.method.student_parameters())
        self.teacher = dict(self.run.method.teacher_branch.named_parameters())

    def step(self, inputs: Inputs) -> None:
        # its masks follow from seed, row and epoch: `Inputs.keep` holds the same
        drawn = draw(self.run.cfg, inputs.images, inputs.index, 0)
        train_step(self.run, Batch(inputs.images, inputs.index, 0, self.run.step, drawn))
        self.run.step += 1

    def loss(self) -> float:
        value = self.run.counters.read().values()["loss"]
        self.run.counters.restart()
        return float("nan") if value is None else value


def with_settings(cfg: Config, settings: dict[str, Any]) -> Config:
    """Returns `cfg` with dotted options replaced; raises UsageError for an unknown one."""
    nested: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, field = name.partition(".")
        nested.setdefault(section, {})[field] = value
    return from_dict(nested, cfg)


# ---- arithmetic that both formulations share -------------------------------------------------------


def linear(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def norm(layer: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def mlp(layer: Any, x: Tensor) -> Tensor:
    return linear(layer.fc2, F.gelu(linear(layer.fc1, x)))


def head(layers: Any, x: Tensor) -> Tensor:
    """Projector or predictor: linear layers with LayerNorm and GELU between them."""
    for layer in layers:
        if isinstance(layer, nn.LayerNorm):
            x = norm(layer, x)
        else:
            x = F.gelu(x) if isinstance(layer, nn.GELU) else linear(layer, x)
    return x


class _TwoBranches(Stepper):
    """Student and teacher as `ExtreMA` holds them."""

    def __init__(self, cfg: Config, device: torch.device, precision: str) -> None:
        super().__init__(cfg, device, precision)
        method = ExtreMA(cfg).to(device)
        # their sub-modules are read by name
        self.net: Any = method.student_branch
        self.follower: Any = method.teacher_branch.requires_grad_(False)
        self.student = dict(self.net.named_parameters())
        self.teacher = dict(self.follower.named_parameters())


# ---- the released formulation ----------------------------------------------------------------------


class Released(_TwoBranches):
    """The step as the released code formulates it, eager.

    All N patches are embedded, then each view is gathered; attention by its formula; the class token is concatenated
    to the tokens and pooling projects keys and values of all n + 1 rows; the EMA goes parameter by parameter into new
    storage; the loss is read each step; AdamW is torch's default. fp16 with a loss scaler on a GPU.
    """

    def __init__(self, cfg: Config, device: torch.device, precision: str) -> None:
        super().__init__(cfg, device, precision)
        depth = cfg.model.shape[1]
        self.rates = [cfg.model.drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.optimizer = self.adamw()
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step(self, inputs: Inputs) -> None:
        with self.autocast():
            loss = self.objective(inputs)
        # the released loop waits for the device here
        self.last_loss = loss.item()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.stack([p.grad.norm() for p in self.student.values() if p.grad is not None]).norm()
        self.set_rate()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def objective(self, inputs: Inputs) -> Tensor:
        """Returns the loss after the EMA update."""
        x, y = self.views(inputs)
        keep = self.masks(len(x)) if inputs.keep is None else inputs.keep
        net, teacher = self.net, self.follower
        q = head(net.predictor, head(net.projector, self.encode(net.encoder, x, keep, inputs.scale)))
        with torch.no_grad():
            m = self.schedule.momentum(self.taken)
            for name, p in self.teacher.items():
                p.data = p.data * m + self.student[name].data * (1 - m)
            target = F.normalize(head(teacher.projector, self.encode(teacher.encoder, y)), dim=1)
        losses = [(F.normalize(view, dim=1) - target).square().sum(1).mean() for view in q.chunk(len(keep))]
        return torch.stack(losses).mean()

    def masks(self, batch: int) -> Tensor:
        """Returns [V, B, K]: disjoint slices of one random permutation per image."""
        v, k = self.cfg.mask.views, self.cfg.num_keep
        order = torch.argsort(torch.rand(batch, self.cfg.model.num_patches, device=self.device), dim=1)
        return torch.stack([order[:, i * k : (i + 1) * k] for i in range(v)])

    def encode(
        self, net: Any, images: Tensor, keep: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Returns the class token after the final norm, [V*B, D]; keep None: all patches, no drop-path."""
        proj = net.patch_embed.proj
        x = F.conv2d(images, proj.weight, proj.bias, proj.stride).flatten(2).transpose(1, 2) + net.pos_embed
        if keep is not None:
            views = [torch.gather(x, 1, view.long()[:, :, None].repeat(1, 1, x.shape[2])) for view in keep]
            x = torch.cat(views)
        for i, block in enumerate(net.blocks):
            rate = 0.0 if keep is None else self.rates[i]
            first, second = (None, None) if scale is None else scale[i]
            x = x + self.dropped(self.attend(block.attn, norm(block.norm1, x)), rate, first)
            x = x + self.dropped(mlp(block.mlp, norm(block.norm2, x)), rate, second)
        cls = net.cls_token.expand(len(x), -1, -1)
        for block in net.blocks_token:
            cls = self.pooled(block, cls, x)
        return norm(net.norm, torch.cat([cls, x], 1))[:, 0]

    def attend(self, layer: Any, x: Tensor) -> Tensor:
        rows, n, width = x.shape
        qkv = linear(layer.qkv, x).reshape(rows, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(qkv[0], qkv[1].transpose(-1, -2)) * (width // self.heads) ** -0.5
        mixed = torch.matmul(scores.softmax(-1), qkv[2])
        return linear(layer.proj, mixed.transpose(1, 2).reshape(rows, n, width))

    def dropped(self, branch: Tensor, rate: float, factor: Tensor | None) -> Tensor:
        """A residual branch under drop-path; factor [R]: given, else drawn."""
        if factor is not None:
            return branch * factor.to(branch.dtype)[:, None, None]
        if rate == 0:
            return branch
        random = torch.rand(branch.shape[0], 1, 1, dtype=branch.dtype, device=branch.device)
        return branch.div(1 - rate) * (random + (1 - rate)).floor()

    def pooled(self, block: Any, cls: Tensor, tokens: Tensor) -> Tensor:
        """Class attention over [cls; tokens] with projected keys and values; cls [R, 1, D]."""
        x = norm(block.norm1, torch.cat([cls, tokens], 1))
        rows, _, width = x.shape
        shape = (rows, -1, self.heads, width // self.heads)
        q = linear(block.attn.q, x[:, :1]).reshape(shape).transpose(1, 2) * (width // self.heads) ** -0.5
        k, v = (linear(layer, x).reshape(shape).transpose(1, 2) for layer in (block.attn.k, block.attn.v))
        mixed = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).softmax(-1), v)
        cls = cls + block.gamma_1 * linear(block.attn.proj, mixed.transpose(1, 2).reshape(rows, 1, width))
        return cls + block.gamma_2 * mlp(block.mlp, norm(block.norm2, cls))


# ---- a checkout of microsoft/ExtreMA ----------------------------------------------------------------

FILES = ("vits.py", "lib/builder.py", "lib/misc.py")
# width -> its function; ViT/16 with 196 patches is hard-coded there
MODELS = {384: "vit_small", 768: "vit_base", 1024: "vit_large"}


def check_checkout(path: Path, cfg: Config) -> None:
    """Raises UsageError where the checkout cannot be stepped, before anything is built."""
    for file in FILES:
        if not (path / file).is_file():
            raise UsageError(
                f"--released-code {path}: {file} is not there; give the folder of a checkout of "
                "https://github.com/microsoft/ExtreMA"
            )
    if cfg.model.shape[0] not in MODELS or cfg.model.num_patches != 196 or cfg.mask.mode != "disjoint":
        raise UsageError(
            f"--released-code: its models are ViT-S, B and L/16 at 224, got {cfg.model.size}; use --model small"
        )


class ReleasedCode(Stepper):
    """The model and loss scaler of the checkout at `path`.

    Changed only so that it runs in one process on current versions: the module `torch._six` and the name `np.float`
    are put back, on a CPU the masks are drawn on the images' device, and masks and drop-path factors can be given. The
    loop around the model (main.py reads its command line when imported) is written here as the release has it.
    """

    def __init__(self, cfg: Config, device: torch.device, precision: str, path: str) -> None:
        super().__init__(cfg, device, precision)
        six = types.ModuleType("torch._six")
        six.inf = math.inf  # type: ignore[attr-defined]
        sys.modules.setdefault("torch._six", six)
        np.float = float  # type: ignore[attr-defined]
        sys.path.insert(0, str(Path(path).resolve()))
        try:
            import lib.builder
            import lib.misc
            import vits
        except Exception as error:
            raise UsageError(
                f"--released-code {path}: it does not import ({type(error).__name__}: {error}); see the "
                "requirements of its README"
            ) from error
        model, h = cfg.model, cfg.head
        encoder = partial(
            getattr(vits, MODELS[model.shape[0]]),
            init_values=model.layer_scale,
            class_attention_layers=model.pool_depth,
        )
        student = partial(encoder, drop_path_rate=model.drop_path)
        # temperature 1.0 is that of its InfoNCE, not used here; True: disjoint views
        arguments = student, encoder, h.out, h.hidden, 1.0, cfg.mask.ratio, cfg.mask.views, True
        self.net: Any = lib.builder.ExtreMA(*arguments).to(device).train()
        with warnings.catch_warnings():
            # its scaler warns where there is no GPU
            warnings.simplefilter("ignore")
            self.scaler = lib.misc.NativeScalerWithGradNormCount()
        self.scaler._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.draw_masks = self.net.generate_mask
        self.paths = [_DropPath(block) for block in self.net.base_encoder.blocks]
        named = {n: p for n, p in self.named(self.net.base_encoder).items() if p.requires_grad}
        self.student = named | {f"predictor.{n}": p for n, p in self.net.predictor.named_parameters()}
        self.teacher = {n: p for n, p in self.named(self.net.momentum_encoder).items() if n in self.student}
        self.optimizer = self.adamw()

    def named(self, branch: nn.Module) -> dict[str, Any]:
        """Parameters by our names."""
        return {
            f"projector.{n[5:]}" if n.startswith("head.") else f"encoder.{n}": p
            for n, p in branch.named_parameters()
        }

    def masks(self, given: Tensor | None, x: Tensor, count: int, ratio: float = 0.0) -> list[Tensor] | None:
        """In place of its `generate_mask`: the given masks, or its own."""
        if given is not None and ratio > 0:
            return list(given.long())
        return self.draw_masks(_OnDevice(x), count, ratio)

    def step(self, inputs: Inputs) -> None:
        x, y = self.views(inputs)
        self.net.generate_mask = partial(self.masks, inputs.keep)
        for i, path in enumerate(self.paths):
            path.factors = [] if inputs.scale is None else list(inputs.scale[i])
        with self.autocast():
            loss = self.net([x, y], self.schedule.momentum(self.taken), "byol")
        self.last_loss = loss.item()
        self.optimizer.zero_grad()
        self.set_rate()
        self.scaler(loss, self.optimizer, parameters=self.net.parameters(), clip_grad=None)


class _DropPath(nn.Module):
    """Takes the place of a block's drop-path: given factors for its two branches, or its own random ones."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.own: Any = block.drop_path
        self.factors: list[Tensor] = []
        block.drop_path = self

    def forward(self, branch: Tensor) -> Tensor:
        if not self.factors:
            return self.own(branch)
        return branch * self.factors.pop(0).to(branch.dtype)[:, None, None]


class _OnDevice:
    """An image batch whose `get_device()` also works on a CPU, where torch's answers -1."""

    def __init__(self, x: Tensor) -> None:
        self.size, self.device = x.size, x.device

    def get_device(self) -> torch.device:
        return self.device


# ---- as well as plain PyTorch can ------------------------------------------------------------------


Attention = Callable[[Tensor], Tensor]


def formula(qkv: Tensor) -> Tensor:
    """Self-attention by its formula, qkv [R, n, 3, H, d] -> [R, n, H, d]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    p = ((q * q.shape[-1] ** -0.5) @ k.mT).float().softmax(-1)
    return (p.to(v.dtype) @ v).transpose(1, 2)


# torch's kernels on a GPU, up to so many tokens the fastest first: benchmarks/records/2026-11-27_nvidia-h200_choices
FASTEST = ((64, ("efficient", "cudnn", "flash")), (attentions.ANY, ("cudnn", "flash", "efficient")))


def fastest_attention(device: torch.device, dtype: torch.dtype, n: int, d: int, train: bool) -> str:
    """Returns the name of torch's attention kernel for `n` tokens; `sdpa` on a CPU, and where none of these runs."""
    names = next(names for most, names in FASTEST if n <= most) if device.type == "cuda" else ()
    attentions.settle_sdpa_order(device)
    return next((x for x in names if not attentions.unsupported(x, device, dtype, n, d, train)), "sdpa")


def trunk(blocks: Any, x: Tensor, heads: int, attend: Attention, scale: Tensor | None = None) -> Tensor:
    """Transformer blocks on x [R, n, D]; scale: drop-path factors [L, 2, R]."""
    r, n, width = x.shape
    if scale is not None:
        scale = scale.to(x.dtype)[..., None, None]
    for i, block in enumerate(blocks):
        qkv = linear(block.attn.qkv, norm(block.norm1, x)).view(r, n, 3, heads, width // heads)
        branch = linear(block.attn.proj, attend(qkv).reshape(r, n, width))
        x = x + (branch if scale is None else scale[i, 0] * branch)
        branch = mlp(block.mlp, norm(block.norm2, x))
        x = x + (branch if scale is None else scale[i, 1] * branch)
    return x


def pool(net: Any, tokens: Tensor, heads: int) -> Tensor:
    """Class token before the final norm [R, D]; keys and values of the tokens are never formed.

    The key bias adds the same to all scores of a head, so it is left out: its gradient is None.
    """
    r, _, width = tokens.shape
    d = width // heads
    cls = net.cls_token[0].expand(r, -1)
    for block in net.blocks_token:
        a, u, own = block.attn, norm(block.norm1, tokens), norm(block.norm1, cls)
        q = (linear(a.q, own) * d**-0.5).view(r, heads, d)
        # the key projection is applied to the query: [R, H, D]
        query = torch.einsum("rhd,hdc->rhc", q, a.k.weight.view(heads, d, width).to(q.dtype))
        scores = torch.cat([query @ own[:, :, None].to(query.dtype), query @ u.mT.to(query.dtype)], -1)
        p = scores.float().softmax(-1).to(u.dtype)
        mixed = p[..., :1] * own[:, None].to(p.dtype) + p[..., 1:] @ u
        value = torch.einsum("rhc,hdc->rhd", mixed, a.v.weight.view(heads, d, width).to(mixed.dtype))
        cls = cls + block.gamma_1 * linear(a.proj, value.reshape(r, width) + a.v.bias.to(value.dtype))
        cls = cls + block.gamma_2 * mlp(block.mlp, norm(block.norm2, cls))
    return cls


def embed(net: Any, images: Tensor, keep: Tensor | None) -> Tensor:
    """images [B, C, H, W], keep [V, B, K] or None -> tokens with positions [V*B, K, D]; gathers, then embeds."""
    kernel, position = net.patch_embed.proj, net.pos_embed[0]
    # [B, C * P * P, N] -> [B, N, C * P * P]
    patches = F.pixel_unshuffle(images, kernel.weight.shape[-1]).flatten(2).transpose(1, 2)
    if keep is not None:
        keep = keep.long()
        patches = patches[torch.arange(len(images), device=images.device)[None, :, None], keep].flatten(0, 1)
        position = position[keep.flatten(0, 1)]
    tokens = F.linear(patches, kernel.weight.flatten(1), kernel.bias)
    return tokens + position.to(tokens.dtype)


class Strong(_TwoBranches):
    """The same method as ours, as well as plain PyTorch can, without our kernels.

    Kept patches are gathered before they are embedded, pooling absorbs key and value projections, attention is torch's
    kernel that is fastest at its length (or the formula: `plain_attention`), student, teacher and loss are one compiled
    graph, AdamW is fused, the EMA is one foreach operation. No gradient norm and no check for non-finite values: less
    work than ours.
    """

    def __init__(
        self,
        cfg: Config,
        device: torch.device,
        precision: str,
        compile: bool = True,
        plain_attention: bool = False,
    ) -> None:
        super().__init__(cfg, device, precision)
        if not plain_attention:
            width, _, heads = cfg.model.shape
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
            fastest = partial(fastest_attention, device, dtype)
            self.attention = (
                fastest(cfg.num_keep, width // heads, True),
                fastest(cfg.model.num_patches, width // heads, False),
            )
        self.followed: list[Tensor] = [self.student[name] for name in self.teacher]
        self.optimizer = self.adamw(fused=True)
        whole = torch.compile(self.loss_of, fullgraph=True, dynamic=False)
        self.objective = whole if compile else self.loss_of

    def step(self, inputs: Inputs) -> None:
        x, y = self.views(inputs)
        keep, scale = self.draw(len(x)) if inputs.keep is None else (inputs.keep, inputs.scale)
        with torch.no_grad():
            weight = 1 - self.schedule.momentum(self.taken)
            torch._foreach_lerp_(list(self.teacher.values()), self.followed, weight)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective(x, y, keep, scale)
        loss.backward()
        self.set_rate()
        self.optimizer.step()
        self.last_loss = loss.detach()

    def draw(self, batch: int) -> tuple[Tensor, Tensor | None]:
        """Returns random masks [V, B, K] and drop-path factors [L, 2, V*B] (None without drop-path)."""
        v, k, model = self.cfg.mask.views, self.cfg.num_keep, self.cfg.model
        order = torch.rand(batch, model.num_patches, device=self.device).argsort(1)[:, : v * k]
        keep, depth = order.view(batch, v, k).transpose(0, 1), model.shape[1]
        if not model.drop_path:
            return keep, None
        kept = 1 - torch.linspace(0, model.drop_path, depth, device=self.device)[:, None, None]
        return keep, (torch.rand(depth, 2, v * batch, device=self.device) < kept) / kept

    def loss_of(self, x: Tensor, y: Tensor, keep: Tensor, scale: Tensor | None) -> Tensor:
        """Mean of |q - k|^2 over views and images; x, y [B, C, H, W] normalized."""
        heads, net = self.heads, self.net
        attend, teacher_attend = (attentions.BACKENDS.get(name, formula) for name in self.attention)
        with self.autocast():
            with torch.no_grad():
                t = self.follower.encoder
                tokens = trunk(t.blocks, embed(t, y, None), heads, teacher_attend)
                target = head(self.follower.projector, norm(t.norm, pool(t, tokens, heads)))
            s = net.encoder
            tokens = trunk(s.blocks, embed(s, x, keep), heads, attend, scale)
            q = head(net.predictor, head(net.projector, norm(s.norm, pool(s, tokens, heads))))
        q = F.normalize(q.float(), dim=-1).view(keep.shape[0], x.shape[0], -1)
        return (q - F.normalize(target.float(), dim=-1)).square().sum(-1).mean()
