"""MDTv2 - Masked Diffusion Transformer is a Strong Image Synthesizer

Shanghua Gao, Pan Zhou, Ming-Ming Cheng, Shuicheng Yan, ICCV 2023. arXiv:2303.14389. Code: sail-sg/MDT

Idea: each step of training takes two passes over the same images at the same noise levels, one over all tokens and one whose
encoder sees a random part of them. A side block, used by the masked pass alone, guesses the missing tokens before the decoder.
So the network learns how parts of an image belong together, and needs fewer steps; sampling is that of a transformer without
masks. This is version 2: the encoder has long skips, the decoder is given the embedded input, the share of masked tokens is
drawn for each step, and the loss is weighted by the clipped ratio of signal to noise.

Map
    attention with a bias by distance        MDTBlock
    long skips, dense shortcut, side block   MDTv2
    L(plain) + L(masked)                     loss
    min(SNR, 5) / SNR                        weighting
    guidance rising as a cosine of a power   guidance_at
    computing of a call, closed form         macs

Departures
    The ICCV paper has version 1; version 2 is the later text of the same preprint, and its code.
    The official guidance changes the first three of four channels only; here all of them. Its table of biases has three rows
    that no pair of places reads; here it has none. Linear layers start as torch starts them, but for those that start at zero.
    Noise levels are stratified over the batch. The optimiser, Adan in the paper, is the trainer's; ours takes AdamW.
    The decoder sees the embeddings of masked tokens through its shortcut, as in the official code.

Example
    >>> import methods, torch
    >>> from methods import mdtv2
    >>> model = mdtv2.build(mdtv2.TRAINED["mdtv2"])                  # digits, trained too short to be legible
    >>> mdtv2.load(model, methods.weights("mdtv2"))
    >>> images = mdtv2.generate(model, torch.arange(10), torch.Generator().manual_seed(0), steps=10)
    >>> tuple(images.shape)
    (10, 1, 32, 32)
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods._core import learning
from methods._core.dit import Head, Level, chain_macs, checked, ddpm, hidden, modulated, positions, sampled
from methods._core.learning import check_sizes, load, save, seeded
from methods._core.masking import Masking, random_mask
from methods._core.noise import Noising, Noisy
from methods._core.parts import Block, learnt, patchify, unpatchify

__all__ = ["STAGES", "TINY", "TRAINED", "Config", "MDTBlock", "MDTv2", "build", "distances", "enter", "generate",
           "guidance_at", "load", "loss", "macs", "save", "weighting"]


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 32                       # H = W of a latent; the defaults are those of MDTv2-XL/2 for images of 256
    channels: int = 4                    # of a latent
    patch: int = 2                       # side of a patch
    width: int = 1152                    # D
    layers: int = 28                     # L, all blocks but the side block
    decoder_layers: int = 4              # of them behind the side block; the others are halves of the encoder
    heads: int = 16                      # of each
    classes: int = 1000                  # labels; one more id stands for none
    ratio: float = 0.3                   # r0, the least share of masked tokens; 0: no masked pass
    more: float = 0.2                    # and the most there are beyond it
    snr: float = 5.0                     # the ratio of signal to noise above which a level weighs less
    drop: float = 0.1                    # share of labels that training hides
    clip: float = 0.0                    # largest value that sampling sees in noise; 0: none, as for latents
    seed: int = 0                        # of the initial weights

    def __post_init__(self):
        check_sizes(self, [("patch", "size"), ("heads", "width"), (4, "width")])
        if (self.layers - self.decoder_layers) % 2 or self.layers <= self.decoder_layers:
            raise ValueError(f"layers={self.layers} less decoder_layers={self.decoder_layers} must be two equal halves")
        if not (self.ratio + self.more < 1 and int(self.tokens * (1 - self.ratio - self.more))):
            raise ValueError(f"ratio={self.ratio} and more={self.more} leave none of {self.tokens} tokens")

    @property
    def tokens(self) -> int:
        """N, of a whole sequence."""
        return (self.size // self.patch) ** 2

    @property
    def half(self) -> int:
        """Blocks in each half of the encoder."""
        return (self.layers - self.decoder_layers) // 2


TINY = Config(size=8, channels=2, patch=2, width=16, layers=5, decoder_layers=1, heads=2, classes=4)
TRAINED = {"mdtv2": Config(channels=1, patch=4, width=64, layers=6, decoder_layers=2, heads=4, classes=10,
                         clip=1.0)}                          # on digits, for minutes: too short to draw them
STAGES = {"both": ("embed", "places", "level", "label", "inner", "outer", "mask", "side", "decoder_places", "decoder", "head")}


def distances(side: int) -> Tensor:
    """(N, N) of the places of a side x side grid: the number of each pair's distance in rows and columns."""
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    rows, columns = at[:, :, None] - at[:, None] + side - 1
    return rows * (2 * side - 1) + columns


class MDTBlock(Block):
    """A DiT block whose attention adds a bias that each head learns for each distance; with `skip` it first takes in a second
    sequence."""

    def __init__(self, config: Config, skip: bool = False):
        super().__init__(config.width, config.heads, cond=config.width)
        self.mlp[1] = nn.GELU(approximate="tanh")
        self.skip = nn.Linear(2 * config.width, config.width) if skip else None
        side = config.size // config.patch
        self.bias = nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * side - 1) ** 2, config.heads), std=0.02))
        self.register_buffer("distance", distances(side), persistent=False)

    def run(self, x: Tensor, cond: Tensor, masking: Masking | None = None, skip: Tensor | None = None) -> Tensor:
        """Tokens (B, n, D), which are those that `masking` keeps, if it is given."""
        if self.skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))
        bias = self.bias[self.distance].permute(2, 0, 1)
        bias = bias[None] if masking is None else masking.pairs(bias)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)
        q, k, v = self.qkv(modulated(self.norm1(x), shift1, scale1)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q))
        x = x + gate1[:, None] * self.out(seen.transpose(1, 2).flatten(2))
        return x + gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2))


class MDTv2(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        side, pixels, D = config.size // config.patch, config.patch ** 2 * config.channels, config.width
        self.embed, self.level, self.label = nn.Linear(pixels, D), Level(D), nn.Embedding(config.classes + 1, D)
        self.places, self.decoder_places = (nn.Parameter(positions(D, side)) for _ in range(2))
        self.inner = nn.ModuleList(MDTBlock(config) for _ in range(config.half))
        self.outer = nn.ModuleList(MDTBlock(config, skip=True) for _ in range(config.half))
        self.decoder = nn.ModuleList(MDTBlock(config, skip=True) for _ in range(config.decoder_layers))
        self.mask, self.side = learnt(1, D), MDTBlock(config)
        self.head = Head(D, D, 2 * pixels)

    def interpolate(self, x: Tensor, cond: Tensor, masking: Masking) -> Tensor:
        """(B, n, D) -> (B, N, D): mask tokens in the gaps, which the side block alone changes."""
        q = masking.fill(x, self.mask[0]) + self.decoder_places
        return torch.where(masking.masked[..., None], self.side.run(q, cond), q)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, masking: Masking | None = None) -> Tensor:
        """Noisy latents (B, C, H, W), times (B,) and labels (B,), `classes` for none -> noise and variance (B, 2C, H, W).
        `masking` says which tokens the encoder sees; None: all."""
        config = self.config
        tokens = self.embed(patchify(x, config.patch)) + self.places
        cond, skips = self.level(t) + self.label(labels), []
        x = tokens if masking is None else masking.keep(tokens)
        for block in self.inner:
            x = block.run(x, cond, masking)
            skips.append(x)
        for block in self.outer:
            x = block.run(x, cond, masking, skips.pop())
        x = x + self.decoder_places if masking is None else self.interpolate(x, cond, masking)
        for block in self.decoder:
            x = block.run(x, cond, skip=tokens)
        return unpatchify(self.head(x, cond), config.patch, config.size // config.patch)


def macs(config: Config, ratio: float = 0.0) -> int:
    """Multiply-accumulates of one call for one image of which `ratio` is masked."""
    N, D, pixels = config.tokens, config.width, config.patch ** 2 * config.channels
    n = int(N * (1 - ratio))
    skips = 2 * D * D * (config.half * n + config.decoder_layers * N)
    whole = config.decoder_layers + (1 if ratio else 0)                          # and the side block
    return (N * pixels * D + 256 * D + D * D + chain_macs(2 * config.half, n, D, D) + chain_macs(whole, N, D, D) + skips
            + 2 * N * D * pixels + 2 * D * D)


def build(config: Config = Config()) -> MDTv2:
    """The network, untrained: its output is zero at first."""
    with seeded(config.seed):
        return MDTv2(config)


def enter(model: MDTv2, stage: str = "both") -> list[nn.Parameter]:
    """Let train what `stage` trains, a key of STAGES. -> the parameters for its optimiser"""
    return learning.enter(model, STAGES, stage)


def weighting(snr: Tensor, most: float) -> Tensor:
    """min(SNR, most) / SNR, the weight of an error of the noise (Hang et al. 2023)."""
    return snr.clamp(max=most) / snr


def loss(model: MDTv2, stage: str, x0: Tensor, labels: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    """The sum of both passes as `loss`, and for show `plain` and `masked`, the weighted errors of the noise in each.

    Args:
        stage: "both", the only one.
        x0: (B, C, H, W), clean latents.
        labels: (B,), of which each pass hides some.
        random: of times, noise, hidden labels, the share of masked tokens and the masks.

    Raises:
        ValueError: another stage; labels that the network does not know.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} must be one of {', '.join(STAGES)}")
    config, noising = model.config, Noising(ddpm())
    checked(labels, config.classes)

    def one(noisy: Noisy, masking: Masking | None = None) -> tuple[Tensor, Tensor]:
        said = model(noisy.x, noisy.t, hidden(labels, config.classes, config.drop, random), masking)
        noise, variance = said.to(torch.promote_types(said.dtype, torch.float32)).chunk(2, dim=1)
        error = (noise - noisy.target).square().flatten(1).mean(1)
        error = (error * weighting(noising.snr(noisy.t), config.snr).to(error)).mean()
        return error, noising.variance_bound(noise.detach(), variance, noisy).mean()

    noisy = noising.sample(x0, random)
    plain, bound = one(noisy)
    if not config.ratio:
        return {"loss": plain + bound, "plain": plain}
    ratio = config.ratio + config.more * float(torch.rand((), generator=random))
    masking = random_mask(len(x0), config.tokens, ratio, random).to(x0.device)
    masked, more = one(noising.sample(x0, random, t=noisy.t), masking)
    return {"loss": plain + bound + masked + more, "plain": plain, "masked": masked}


def guidance_at(t: float, levels: int = 1000, weight: float = 3.8, power: float = 4.0) -> float:
    """The weight at a time: 1 at t = `levels`, and `weight` at 0."""
    return 1 + (weight - 1) * (1 - math.cos(math.pi * (1 - t / levels) ** power)) / 2


def generate(model: MDTv2, labels: Tensor, random: torch.Generator, steps: int = 250, guidance: float = 3.8) -> Tensor:
    """Latents (B, C, H, W) for `labels` (B,). Raises ValueError for labels that the network does not know, and for `steps`
    that are not 1 to 1000."""
    config = model.config
    checked(labels, config.classes)
    shape = (len(labels), config.channels, config.size, config.size)
    x = torch.randn(shape, generator=random, device=random.device).to(model.embed.weight)
    return sampled(model, x, labels, config.classes, steps, lambda t: guidance_at(t, weight=guidance), random,
                   config.clip)
