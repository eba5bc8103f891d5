"""Training steps to compare: the released formulation, a strong plain-PyTorch step, and ours.

The first two hold their parameters in the modules of `ExtreMA`, whose names are those of the released checkpoints;
how the parameters are used is written here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from extrema_fast.config import Config, from_dict
from extrema_fast.data.augment import color_jitter, jitter_params
from extrema_fast.data.loader import Batch
from extrema_fast.distributed import World
from extrema_fast.models.extrema import ExtreMA
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
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, cfg: Config, device: torch.device, precision: str) -> None:
        self.cfg, self.device, self.precision = cfg, device, precision
        self.heads = cfg.model.shape[2]
        self.schedule = Schedule(cfg, IMAGES // cfg.train.batch_size)
        self.taken = 0
        self.last_loss: Tensor | float = float("nan")

    def step(self, inputs: Inputs) -> None:
        """Makes one whole optimizer step: masks, both networks, loss, backward pass, optimizer, EMA."""

    def student(self) -> dict[str, nn.Parameter]:
        """Returns the trained parameters by the names of `ExtreMA.student_branch`."""
        return {}

    def teacher(self) -> dict[str, Tensor]:
        """Returns the teacher's by the same names; empty without one."""
        return {}

    def loss(self) -> float:
        """Returns the last step's loss; waits for the device."""
        return float(self.last_loss)

    def load(self, file: Path) -> None:
        """Starts student and teacher from a safetensors file of the student's weights."""
        with safe_open(file, "pt") as weights, torch.no_grad():
            for name in weights.keys():  # noqa: SIM118
                for parameters in (self.student(), self.teacher()):
                    if name in parameters:
                        parameters[name].copy_(weights.get_tensor(name))

    def autocast(self) -> AbstractContextManager:
        """Returns autocast in the provider's precision; does nothing in fp32."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, self.precision != "fp32")

    def views(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Returns the student's and the teacher's normalised images, fp32 [B, C, H, W]."""
        cfg, index = self.cfg, inputs.index.to(self.device)
        params = jitter_params(index, cfg.data, seed=cfg.train.seed, epoch=0)
        return color_jitter(inputs.images, params, cfg.data, cfg.model.in_chans)

    def adamw(self, **options: Any) -> torch.optim.AdamW:
        """Returns AdamW over the student: weight decay on matrices only."""
        named, o = self.student(), self.cfg.optim
        plain = {n: p.dim() <= 1 or n.endswith("cls_token") for n, p in named.items()}
        groups = [
            {"params": [p for n, p in named.items() if plain[n] == without],
             "weight_decay": 0.0 if without else o.weight_decay}
            for without in (False, True)
        ]  # fmt: skip
        return torch.optim.AdamW(groups, lr=1.0, betas=o.betas, eps=o.eps, **options)

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

    def step(self, inputs: Inputs) -> None:
        # its masks follow from seed, row and epoch: `Inputs.keep` holds the same
        drawn = draw(self.run.cfg, inputs.images, inputs.index, 0)
        train_step(self.run, Batch(inputs.images, inputs.index, 0, self.run.step, drawn))
        self.run.step += 1

    def loss(self) -> float:
        value = self.run.counters.read().values()["loss"]
        self.run.counters.restart()
        return float("nan") if value is None else value

    def student(self) -> dict[str, nn.Parameter]:
        return dict(self.run.method.student_parameters())

    def teacher(self) -> dict[str, Tensor]:
        return dict(self.run.method.teacher_branch.named_parameters())


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

    def student(self) -> dict[str, nn.Parameter]:
        return dict(self.net.named_parameters())

    def teacher(self) -> dict[str, Tensor]:
        return dict(self.follower.named_parameters())


# ---- the released formulation ----------------------------------------------------------------------


class Released(_TwoBranches):
    """The step as the released code formulates it, eager.

    All N patches are embedded, then each view is gathered; attention by its formula; the class token is concatenated
    to the tokens and pooling projects keys and values of all n + 1 rows; the EMA goes parameter by parameter into new
    storage; the host reads the loss each step; AdamW is torch's default. fp16 with a loss scaler on a GPU.
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
        torch.stack([p.grad.norm() for p in self.net.parameters() if p.grad is not None]).norm()
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
            m, student = self.schedule.momentum(self.taken), self.student()
            for name, p in teacher.named_parameters():
                p.data = p.data * m + student[name].data * (1 - m)
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
            x = torch.cat(
                [torch.gather(x, 1, view.long()[:, :, None].repeat(1, 1, x.shape[2])) for view in keep]
            )
        for i, block in enumerate(net.blocks):
            rate, factors = (
                (0.0, None) if keep is None else (self.rates[i], None if scale is None else scale[i])
            )
            branch = self.attention(block.attn, norm(block.norm1, x))
            x = x + self.dropped(branch, rate, None if factors is None else factors[0])
            x = x + self.dropped(
                mlp(block.mlp, norm(block.norm2, x)), rate, None if factors is None else factors[1]
            )
        cls = net.cls_token.expand(len(x), -1, -1)
        for block in net.blocks_token:
            cls = self.pooled(block, cls, x)
        return norm(net.norm, torch.cat([cls, x], 1))[:, 0]

    def attention(self, layer: Any, x: Tensor) -> Tensor:
        rows, n, width = x.shape
        qkv = linear(layer.qkv, x).reshape(rows, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(qkv[0], qkv[1].transpose(-1, -2)) * (width // self.heads) ** -0.5
        return linear(
            layer.proj, torch.matmul(scores.softmax(-1), qkv[2]).transpose(1, 2).reshape(rows, n, width)
        )

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


# ---- as well as plain PyTorch can ------------------------------------------------------------------


def trunk(blocks: Any, x: Tensor, heads: int, plain: bool = False, scale: Tensor | None = None) -> Tensor:
    """Transformer blocks on x [R, n, D]; plain: attention by its formula; scale: drop-path factors [L, 2, R]."""
    r, n, width = x.shape
    if scale is not None:
        scale = scale.to(x.dtype)[..., None, None]
    for i, block in enumerate(blocks):
        qkv = linear(block.attn.qkv, norm(block.norm1, x)).view(r, n, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if plain:
            out = ((q * (width // heads) ** -0.5) @ k.mT).float().softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        branch = linear(block.attn.proj, out.transpose(1, 2).reshape(r, n, width))
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
    """The same method as ours, as well as plain PyTorch can; independent of our code.

    Kept patches are gathered before they are embedded, pooling absorbs key and value projections, attention is
    torch's (or the formula: `plain_attention`), student, teacher and loss are one compiled graph, AdamW is fused, the
    EMA is one foreach operation. No gradient norm and no check for non-finite values: less work than ours.
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
        self.plain = plain_attention
        student = self.student()
        self.pairs = [(t, student[name]) for name, t in self.teacher().items()]
        self.optimizer = self.adamw(fused=True)
        self.objective = (
            torch.compile(self.loss_of, fullgraph=True, dynamic=False) if compile else self.loss_of
        )

    def step(self, inputs: Inputs) -> None:
        x, y = self.views(inputs)
        keep, scale = self.draw(len(x)) if inputs.keep is None else (inputs.keep, inputs.scale)
        with torch.no_grad():
            teachers, students = zip(*self.pairs, strict=True)
            torch._foreach_lerp_(teachers, students, 1 - self.schedule.momentum(self.taken))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective(x, y, keep, scale)
        loss.backward()
        self.set_rate()
        self.optimizer.step()
        self.last_loss = loss.detach()

    def draw(self, batch: int) -> tuple[Tensor, Tensor | None]:
        """Returns random masks [V, B, K] and drop-path factors [L, 2, V*B] (None without drop-path)."""
        v, k, n = self.cfg.mask.views, self.cfg.num_keep, self.cfg.model.num_patches
        order = torch.rand(batch, n, device=self.device).argsort(1)[:, : v * k]
        keep, rate, depth = (
            order.view(batch, v, k).transpose(0, 1),
            self.cfg.model.drop_path,
            self.cfg.model.shape[1],
        )
        if not rate:
            return keep, None
        kept = 1 - torch.linspace(0, rate, depth, device=self.device)[:, None, None]
        return keep, (torch.rand(depth, 2, v * batch, device=self.device) < kept) / kept

    def loss_of(self, x: Tensor, y: Tensor, keep: Tensor, scale: Tensor | None) -> Tensor:
        """Mean of |q - k|^2 over views and images; x, y [B, C, H, W] normalised."""
        heads, plain, net = self.heads, self.plain, self.net
        with self.autocast():
            with torch.no_grad():
                t = self.follower.encoder
                tokens = trunk(t.blocks, embed(t, y, None), heads, plain)
                target = head(self.follower.projector, norm(t.norm, pool(t, tokens, heads)))
            s = net.encoder
            tokens = trunk(s.blocks, embed(s, x, keep), heads, plain, scale)
            q = head(net.predictor, head(net.projector, norm(s.norm, pool(s, tokens, heads))))
        q = F.normalize(q.float(), dim=-1).view(keep.shape[0], x.shape[0], -1)
        return (q - F.normalize(target.float(), dim=-1)).square().sum(-1).mean()
