"""DiffMAE - Diffusion Models as Masked Autoencoders

Chen Wei, Karttikeya Mangalam, Po-Yao Huang, Yanghao Li, Haoqi Fan, Hu Xu, Huiyu Wang, Cihang Xie, Alan Yuille,
Christoph Feichtenhofer, ICCV 2023. arXiv:2304.03283

In part a reconstruction: there is no official code. Forward process, loss, encoder and decoders are the paper's; how the
decoder is told the noise level, its size, and all that training needs beside the loss are not.

Idea: a masked autoencoder whose decoder denoises. A plain vision transformer encodes the visible patches, clean and once. The
decoder gets the masked patches with noise, looks at what the encoder made of the others, and says the clean pixels. From pure
noise alone that is a masked autoencoder, which says the mean of what could be there; step by step it is a conditional
diffusion model, which draws one. It pre-trains the encoder and fills in images, and makes sampling no faster.

Map
    x_m^t = sqrt(abar_t) x_m + sqrt(1 - abar_t) eps     methods._core.noise.Noising
    random mask of 75 %                                 methods._core.masking.random_mask
    encoder on visible patches                          DiffMAE.encode
    decoders, cross-self and cross                      Reader
    decoder block j reads encoder block L - j           DiffMAE.encode, DiffMAE.decode
    mean of |x_m - D(x_m^t, t, E(x_v))|^2               loss
    visible patches stay, masked ones are drawn         inpaint
    computing of encoder and of a step, closed form     macs

Departures
    The noise level reaches the decoder as a sine embedding through an MLP, added to its tokens: the paper's formula has t, the
    way is ours. Width and depth of the decoder are those of the masked autoencoder's, and the exponent with which the paper
    varies the noise levels is left out. Its third decoder, which attends over both sequences at once, is not here.
    Where unofficial code noises embedded patches, or sends noisy ones through the encoder, here the pixels have the noise and
    the encoder never sees it.

Example
    >>> import methods, torch
    >>> from methods import diffmae
    >>> model = diffmae.build(diffmae.TRAINED["diffmae"])                               # digits
    >>> diffmae.load(model, methods.weights("diffmae"))
    >>> images, random = torch.full((2, 1, 32, 32), -1.0), torch.Generator().manual_seed(0)
    >>> tuple(diffmae.inpaint(model, images, diffmae.random_mask(2, 64, 0.75, random), random, steps=10).shape)
    (2, 1, 32, 32)
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from methods._core import learning
from methods._core.ancestral import ancestral, spaced
from methods._core.dit import Level
from methods._core.learning import check_sizes, load, save, seeded
from methods._core.masking import Masking, random_mask
from methods._core.noise import Noising, stratified
from methods._core.parts import Block, learnt, patchify, unpatchify

__all__ = ["LEVELS", "STAGES", "TINY", "TRAINED", "Config", "DiffMAE", "Reader", "build", "enter", "inpaint", "load", "loss",
           "macs", "random_mask", "save", "schedule"]

LEVELS = 1000                                      # T, of a linear schedule


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 224                                # H = W of an image
    channels: int = 3                              # of an image
    patch: int = 16                                # side of a patch
    width: int = 1024                              # of the encoder, ViT-L
    layers: int = 24                               # its blocks
    heads: int = 16                                # of each
    decoder: str = "cross-self"                    # or "cross", in which noisy tokens do not see each other
    decoder_width: int = 512                       # of the decoder; a masked autoencoder's, as below
    decoder_layers: int = 8                        # its blocks
    decoder_heads: int = 16                        # of each
    ratio: float = 0.75                            # share of the patches that are masked
    lowest: int = 0                                # noise level (of LEVELS) from which on it trains; the last: pure noise alone
    seed: int = 0                                  # of the initial weights

    def __post_init__(self):
        check_sizes(self, [("patch", "size"), ("heads", "width"), ("decoder_heads", "decoder_width")], none=["lowest"])
        if self.decoder not in ("cross-self", "cross"):
            raise ValueError(f"decoder={self.decoder!r} must be 'cross-self' or 'cross'")
        if self.decoder_layers > self.layers:
            raise ValueError(f"decoder_layers={self.decoder_layers} must not exceed layers={self.layers}: each reads one")
        if not (0 < self.ratio < 1 and 0 < int(self.tokens * (1 - self.ratio)) < self.tokens):
            raise ValueError(f"ratio={self.ratio} must leave some of {self.tokens} patches visible and some masked")
        if self.lowest >= LEVELS:
            raise ValueError(f"lowest={self.lowest} must be below {LEVELS}")

    @property
    def tokens(self) -> int:
        """N, patches of an image."""
        return (self.size // self.patch) ** 2


TINY = Config(size=8, channels=2, patch=2, width=16, layers=2, heads=2, decoder_width=8, decoder_layers=2, decoder_heads=2)
TRAINED = {"diffmae": Config(size=32, channels=1, patch=4, width=64, layers=4, heads=4, decoder_width=48, decoder_layers=4,
                             decoder_heads=4)}                                  # on digits
STAGES = {"pretrain": ("embed", "token", "places", "blocks", "norm", "noisy", "masked_places", "level", "readers", "head")}


class Reader(nn.Module):
    """A block of the decoder: noisy tokens read an encoder block's output; with `among` they then attend to each other."""

    def __init__(self, config: Config):
        super().__init__()
        D, d, self.heads = config.width, config.decoder_width, config.decoder_heads
        self.norm, self.q, self.kv, self.out = nn.LayerNorm(d), nn.Linear(d, d), nn.Linear(D, 2 * d), nn.Linear(d, d)
        self.among = Block(d, self.heads) if config.decoder == "cross-self" else None
        self.mlp = None if self.among else nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Tokens (B, M, d) and what they read (B, n, D) -> (B, M, d)."""
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(seen).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.among(x) if self.among is not None else x + self.mlp(x)


class DiffMAE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        pixels, D, d = config.patch ** 2 * config.channels, config.width, config.decoder_width
        self.embed, self.token, self.places = nn.Linear(pixels, D), learnt(1, D), learnt(config.tokens, D)
        self.blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.layers))
        self.norm, self.level = nn.LayerNorm(D), Level(d)
        self.noisy, self.masked_places = nn.Linear(pixels, d), learnt(config.tokens, d)
        self.readers = nn.ModuleList(Reader(config) for _ in range(config.decoder_layers))
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, pixels))

    def encode(self, images: Tensor, masking: Masking | None = None) -> list[Tensor]:
        """Of images (B, C, H, W), or of those of their patches that `masking` keeps, and a class token: what each decoder block
        reads, (B, n + 1, D), from the last encoder block, normed, backwards."""
        patches = patchify(images, self.config.patch)
        x = self.embed(patches if masking is None else masking.keep(patches))
        x = x + (self.places if masking is None else masking.keep(self.places[None]))
        x, found = torch.cat([self.token.expand(len(x), 1, -1), x], dim=1), []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return [self.norm(x), *found[-2:-len(self.readers) - 1:-1]]

    def decode(self, x: Tensor, t: Tensor, masking: Masking, seen: list[Tensor]) -> Tensor:
        """Noisy patches (B, M, P) at levels t (B,) and what `encode` gave -> clean ones, in the same order."""
        x = self.noisy(x) + masking.drop(self.masked_places[None]) + self.level(t)[:, None]
        for reader, each in zip(self.readers, seen, strict=True):
            x = reader(x, each)
        return self.head(x)


def macs(config: Config) -> tuple[int, int]:
    """Multiply-accumulates for one image: of the encoder, which runs once, and of each call of the decoder."""
    D, d, pixels = config.width, config.decoder_width, config.patch ** 2 * config.channels
    n = int(config.tokens * (1 - config.ratio))
    M = config.tokens - n
    encoder = n * pixels * D + config.layers * (12 * (n + 1) * D * D + 2 * (n + 1) ** 2 * D)
    among = 12 * M * d * d + 2 * M * M * d if config.decoder == "cross-self" else 8 * M * d * d
    reader = 2 * M * d * d + 2 * (n + 1) * D * d + 2 * M * (n + 1) * d + among
    return encoder, 2 * M * pixels * d + 256 * d + d * d + config.decoder_layers * reader


def build(config: Config = Config()) -> DiffMAE:
    """The network, untrained."""
    with seeded(config.seed):
        return DiffMAE(config)


def enter(model: DiffMAE, stage: str = "pretrain") -> list[nn.Parameter]:
    """Let train what `stage` trains, a key of STAGES. -> the parameters for its optimiser"""
    return learning.enter(model, STAGES, stage)


def schedule() -> DDPMScheduler:
    """The noise levels, of which the model says the clean pixels."""
    return DDPMScheduler(num_train_timesteps=LEVELS, beta_start=1e-4, beta_end=0.02, prediction_type="sample")


def loss(model: DiffMAE, stage: str, x0: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    """The mean squared error of masked pixels as `loss`, all levels alike.

    Args:
        stage: "pretrain", the only one.
        x0: images (B, C, H, W).
        random: of masks, levels and noise.

    Raises:
        ValueError: another stage.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} must be one of {', '.join(STAGES)}")
    config = model.config
    masking = random_mask(len(x0), config.tokens, config.ratio, random).to(x0.device)
    t = config.lowest + (stratified(len(x0), random) * (LEVELS - config.lowest)).long()
    noisy = Noising(schedule()).sample(masking.drop(patchify(x0, config.patch)), random, t=t)
    said = model.decode(noisy.x, noisy.t, masking, model.encode(x0, masking))
    return {"loss": F.mse_loss(said.to(torch.promote_types(said.dtype, torch.float32)), noisy.target.to(said))}


@torch.no_grad()
def inpaint(model: DiffMAE, images: Tensor, masking: Masking, random: torch.Generator, steps: int = 50) -> Tensor:
    """Images (B, C, H, W) with their masked patches drawn anew in `steps` calls of the decoder, the others as they are. One
    step gives the mean of what could be there.

    Args:
        masking: of B sequences of N patches; any mask will do that has patches of both kinds.

    Raises:
        ValueError: more steps than noise levels that it was trained with, or fewer than one.
    """
    config, patches = model.config, patchify(images, model.config.patch)
    kept, seen = (1 - schedule().betas.double()).cumprod(0).tolist(), model.encode(images.to(model.token), masking)
    times = [config.lowest + t for t in spaced(LEVELS - config.lowest, steps)]
    hidden = masking.drop(patches)
    noise = torch.randn(hidden.shape, generator=random, device=random.device).to(hidden)

    def says(x: Tensor, t: int) -> tuple[Tensor, None]:
        level = torch.full((len(x),), t, device=x.device)
        return model.decode(x.to(model.token), level, masking, seen).to(x), None

    drawn = ancestral(says, noise, kept, times, random)
    return unpatchify(masking.fill(masking.keep(patches), drawn), config.patch, config.size // config.patch)
