"""U-DiT - U-DiTs: Downsample Tokens in U-Shaped Diffusion Transformers

Yuchuan Tian, Zhijun Tu, Hanting Chen, Jie Hu, Chao Xu, Yunhe Wang, NeurIPS 2024. arXiv:2405.02730. Code: YuchuanTian/U-DiT

Idea: a diffusion transformer in the shape of a U-Net, on feature maps. Self-attention splits its map into the four maps that
hold one pixel of each 2x2 cell; these attend each within itself, with the same weights, so that attention costs a quarter and
no token is lost. The MLP has depthwise convolutions, and more layers in training than in use: those are folded together.

Map
    split into maps of one pixel a cell, and back    phases, cells
    cosine attention within each                     Attention
    positions by rotation                            rotated
    MLP of three depthwise kernels                   FeedForward
    folded for use                                   FeedForward.folded, fold
    three stages down and up, skips                  UDiT
    L_simple + L_vlb of DiT                          loss
    computing of a call, closed form                 macs

Departures
    The official code folds in place, into the weights that it trains: folding twice counts the smaller kernels and the
    identity twice, and its averaged model begins so. Here `fold` makes a copy, and the network itself is left as it is.
    In training it hides the label in each of the three stages by itself. Here a label is hidden in all of them or in none.
    Guidance there changes the first three of four channels only; here all of them.
    The vanilla variant, and the ablations other than attention over whole maps (`factor=1`), are not here. Layers start as
    torch starts them, but for those that start at zero. Noise levels are stratified over the batch.

Example
    >>> import methods, torch
    >>> from methods import u_dit
    >>> model = u_dit.build(u_dit.TRAINED["u_dit"])         # digits, cells as channels; trained too short to be legible
    >>> u_dit.load(model, methods.weights("u_dit"))
    >>> maps = u_dit.generate(u_dit.fold(model), torch.arange(10), torch.Generator().manual_seed(0), steps=10)
    >>> tuple(torch.nn.functional.pixel_shuffle(maps, 2).shape)
    (10, 1, 32, 32)
"""
from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods._core import learning
from methods._core.dit import Level, checked, ddpm, hidden, sampled
from methods._core.learning import check_sizes, load, save, seeded
from methods._core.noise import Noising
from methods._core.parts import zeroed

__all__ = ["STAGES", "TINY", "TRAINED", "Attention", "Config", "FeedForward", "UDiT", "build", "cells", "enter", "fold",
           "generate", "load", "loss", "macs", "phases", "rotated", "save"]


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 32                                 # H = W of a latent; the defaults are those of U-DiT-L
    channels: int = 4                              # of a latent
    width: int = 384                               # C of the first stage, 2C and 4C of those below; B: 192, S: 96
    heads: int = 16                                # of each attention; B: 8, S: 4
    depth: tuple[int, ...] = (2, 5, 8, 5, 2)       # pairs of attention and MLP, times two, in each of the five stages
    factor: int = 2                                # side of a cell; 1: attention over whole maps
    ratio: int = 2                                 # of the MLP's channels to C
    classes: int = 1000                            # labels; one more id stands for none
    drop: float = 0.1                              # share of labels that training hides
    clip: float = 0.0                              # largest value that sampling sees in noise; 0: none, as for latents
    seed: int = 0                                  # of the initial weights

    def __post_init__(self):
        check_sizes(self, [(4 * self.factor, "size"), (4 * self.heads, "width")])
        if len(self.depth) != 5 or min(self.depth) < 1:
            raise ValueError(f"depth={self.depth} must be five numbers of at least 1")


TINY = Config(size=8, channels=2, width=8, heads=2, depth=(1, 1, 1, 1, 1), classes=4)
TRAINED = {"u_dit": Config(size=16, channels=4, width=16, heads=2, depth=(1, 1, 1, 1, 1), classes=10,
                         clip=1.0)}                              # on digits, for minutes: too short to draw them
STAGES = {"all": ("embed", "level", "label", "stages", "down", "up", "merge", "last", "modulation", "head")}


def phases(x: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) -> (B, f^2, HW / f^2, C): number i f + j holds the pixels [i::f, j::f]."""
    x = x.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))                           # (B, C, h, i, w, j)
    return x.permute(0, 3, 5, 2, 4, 1).flatten(3, 4).flatten(1, 2)


def cells(x: Tensor, factor: int, height: int) -> Tensor:
    """The inverse of `phases`, for maps of `height` rows."""
    x = x.unflatten(2, (height // factor, -1)).unflatten(1, (factor, factor))             # (B, i, j, h, w, C)
    return x.permute(0, 5, 3, 1, 4, 2).flatten(4).flatten(2, 3)


def rotated(x: Tensor, height: int, theta: float = 10_000.0) -> Tensor:
    """(..., N, d), tokens of a map of `height` rows: each pair of channels turned by an angle, in turn that of the column and
    that of the row."""
    N, d = x.shape[-2:]
    at = torch.arange(N, device=x.device)
    frequencies = theta ** -(torch.arange(0, d, 4, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)) / d)
    row, column = at // (N // height), at % (N // height)
    angles = torch.stack([column[:, None] * frequencies, row[:, None] * frequencies], dim=-1).flatten(1)      # (N, d / 2)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Self-attention over a map (B, d, H, W), within each of its phases. Its logits are cosines times at most 100."""

    def __init__(self, dim: int, heads: int, factor: int):
        super().__init__()
        self.heads, self.factor = heads, factor
        self.near = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Conv2d(dim, dim, 1)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        z = phases(x + self.near(x), self.factor)
        q, k, v = self.qkv(z).flatten(0, 1).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (F.normalize(rotated(each, height // self.factor), dim=-1) for each in (q, k))
        y = F.scaled_dot_product_attention(q * self.scale.clamp(max=math.log(100)).exp(), k, v, scale=1.0)
        return self.out(cells(y.transpose(1, 2).flatten(2).unflatten(0, z.shape[:2]), self.factor, height))


class FeedForward(nn.Module):
    """The MLP of a map (B, d, H, W) as it is trained."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        half = hidden // 2
        self.rise = nn.Sequential(nn.Conv2d(dim, half, 1), nn.Conv2d(half, hidden, 1))
        self.near = nn.ModuleList(nn.Conv2d(hidden, hidden, k, padding=k // 2, groups=hidden) for k in (5, 3, 1))
        self.fall = nn.Sequential(nn.Conv2d(hidden, half, 1), nn.Conv2d(half, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.rise(x))
        return self.fall(sum((near(x) for near in self.near), x))

    @torch.no_grad()
    def folded(self) -> nn.Sequential:
        """The same map in three layers, with weights of its own."""
        hidden = self.near[0].in_channels
        near = nn.utils.skip_init(nn.Conv2d, hidden, hidden, 5, padding=2, groups=hidden)
        near.weight.copy_(sum(F.pad(each.weight, [(5 - each.weight.shape[-1]) // 2] * 4) for each in self.near))
        near.weight[:, :, 2, 2] += 1
        near.bias.copy_(sum(each.bias for each in self.near))
        return nn.Sequential(_product(*self.rise), nn.GELU(), near.to(self.rise[0].weight), _product(*self.fall))


def _product(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """Two convolutions of size 1 in one."""
    made = nn.utils.skip_init(nn.Conv2d, first.in_channels, second.out_channels, 1).to(first.weight)
    a, b = first.weight[..., 0, 0], second.weight[..., 0, 0]
    made.weight.copy_((b @ a)[..., None, None])
    made.bias.copy_(b @ first.bias + second.bias)
    return made


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm over the channels of a map, modulated by (B, d) each."""
    x = F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=1e-6).movedim(-1, 1)
    return x * (1 + scale[..., None, None]) + shift[..., None, None]


class Layer(nn.Module):
    """Attention and MLP, modulated and gated by a condition (B, d); at first the identity."""

    def __init__(self, dim: int, config: Config):
        super().__init__()
        self.attn, self.mlp = Attention(dim, config.heads, config.factor), FeedForward(dim, config.ratio * dim)
        self.modulation = zeroed(nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(cond)).chunk(6, dim=-1)
        x = x + gate1[..., None, None] * self.attn(_norm(x, shift1, scale1))
        return x + gate2[..., None, None] * self.mlp(_norm(x, shift2, scale2))


class UDiT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config, C = config, config.width
        widths = C, 2 * C, 4 * C, 2 * C, 2 * C
        self.embed = nn.Conv2d(config.channels, C, 3, padding=1)
        self.level = nn.ModuleList(Level(width) for width in widths[:3])
        self.label = nn.ModuleList(nn.Embedding(config.classes + 1, width) for width in widths[:3])
        self.stages = nn.ModuleList(nn.ModuleList(Layer(width, config) for _ in range(2 * count))
                                    for width, count in zip(widths, config.depth, strict=True))
        self.down = nn.ModuleList(nn.Sequential(nn.Conv2d(n, n // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))
                                  for n in (C, 2 * C))
        self.up = nn.ModuleList(nn.Sequential(nn.Conv2d(n, 2 * n, 3, padding=1, bias=False), nn.PixelShuffle(2))
                                for n in (4 * C, 2 * C))
        self.merge = nn.ModuleList(nn.Conv2d(n, 2 * C, 1) for n in (4 * C, 2 * C))
        self.last, self.modulation = nn.Conv2d(2 * C, 2 * C, 3, padding=1), zeroed(nn.Linear(2 * C, 4 * C))
        self.head = zeroed(nn.Conv2d(2 * C, 2 * config.channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Noisy latents (B, C, H, W), times (B,) and labels (B,), `classes` for none -> noise and variance (B, 2C, H, W)."""
        conds = [level(t) + label(labels) for level, label in zip(self.level, self.label, strict=True)]
        x, skips = self.embed(x), []
        for i, (stage, cond) in enumerate(zip(self.stages, (*conds, conds[1], conds[1]), strict=True)):
            if i > 2:
                x = self.merge[i - 3](torch.cat([self.up[i - 3](x), skips.pop()], dim=1))
            for layer in stage:
                x = layer(x, cond)
            if i < 2:
                skips.append(x)
                x = self.down[i](x)
        return self.head(_norm(self.last(x), *self.modulation(F.silu(conds[1])).chunk(2, dim=-1)))


def macs(config: Config, folded: bool = True) -> int:
    """Multiply-accumulates of one call for one image, of the folded network or of that in training."""
    C, n, f = config.width, config.size ** 2, config.factor
    total = 0
    for d, tokens, count in zip((C, 2 * C, 4 * C, 2 * C, 2 * C), (n, n // 4, n // 16, n // 4, n), config.depth, strict=True):
        hidden = config.ratio * d
        attention = tokens * (25 * d + 4 * d * d + 2 * tokens // f ** 2 * d)
        mlp = 2 * d * hidden + 25 * hidden if folded else (d + hidden) * 2 * (hidden // 2) + 35 * hidden
        total += 2 * count * (attention + tokens * mlp + 6 * d * d)
    total += sum(256 * d + d * d for d in (C, 2 * C, 4 * C)) + 8 * C * C                       # levels, the head's modulation
    convolutions = 9 * n * (config.channels * C + C * C // 2 + (2 * C) ** 2 + 2 * C * 2 * config.channels)
    convolutions += 9 * (n // 4) * (2 * C * C + 8 * C * C) + 9 * (n // 16) * 32 * C * C
    return total + convolutions + (n // 4) * 8 * C * C + n * 4 * C * C                         # and the merges


def build(config: Config = Config()) -> UDiT:
    """The network, untrained: its output is zero at first."""
    with seeded(config.seed):
        return UDiT(config)


def fold(model: UDiT) -> UDiT:
    """A copy for use, whose MLPs have three layers each; it says the same."""
    made = copy.deepcopy(model)
    for layer in (layer for stage in made.stages for layer in stage):
        if isinstance(layer.mlp, FeedForward):
            layer.mlp = layer.mlp.folded()
    return made


def enter(model: UDiT, stage: str = "all") -> list[nn.Parameter]:
    """Let train what `stage` trains, a key of STAGES. -> the parameters for its optimiser"""
    return learning.enter(model, STAGES, stage)


def loss(model: nn.Module, stage: str, x0: Tensor, labels: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    """DiT's loss as `loss`, and for show `simple`, the error of the noise without the bound of the variance.

    Args:
        stage: "all", the only one.
        x0: (B, C, H, W), clean latents.
        labels: (B,), of which some are hidden.
        random: of times, noise and hidden labels.

    Raises:
        ValueError: another stage; labels that the network does not know.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} must be one of {', '.join(STAGES)}")
    config, noising = model.config, Noising(ddpm())
    checked(labels, config.classes)
    noisy = noising.sample(x0, random)
    said = model(noisy.x, noisy.t, hidden(labels, config.classes, config.drop, random))
    simple = F.mse_loss(said[:, :x0.shape[1]].detach(), noisy.target.to(said))
    return {"loss": noising.loss(said, noisy), "simple": simple}


def generate(model: nn.Module, labels: Tensor, random: torch.Generator, steps: int = 250, guidance: float = 1.5) -> Tensor:
    """Latents (B, C, H, W) for `labels` (B,), best with a network that is folded. Raises ValueError for labels that the network
    does not know, and for `steps` that are not 1 to 1000."""
    config = model.config
    checked(labels, config.classes)
    shape = (len(labels), config.channels, config.size, config.size)
    x = torch.randn(shape, generator=random, device=random.device).to(next(model.parameters()))
    return sampled(model, x, labels, config.classes, steps, lambda t: guidance, random,
                   config.clip)
