"""TiTok - An Image is Worth 32 Tokens for Reconstruction and Generation

Qihang Yu, Mark Weber, Xueqing Deng, Xiaohui Shen, Daniel Cremers, Liang-Chieh Chen, NeurIPS 2024. arXiv:2406.07550.
Code: bytedance/1d-tokenizer

Idea: a tokenizer without a grid. K learnt latents ride behind the N patches through a transformer, and only they leave it,
quantised. A second transformer rebuilds N places from mask tokens and the K codes. A masked generator then has K tokens to
predict, not N. First the places learn to say the codes of a frozen grid tokenizer (proxy codes); then the decoder, with the
pixel decoder of that tokenizer, is tuned on pixels while encoder and codebook rest.

Map
    class token, N places, K latents -> blocks            Tower, Encoder, Decoder
    nearest code by cosine, straight through              TiTok.encode
    soft look-up of proxy codes, then pixels              TiTok.paint
    what each stage trains, what it minimises             STAGES, enter, loss
    masks by arccos for masked token modelling            hide
    tokens still masked after each step                   remaining
    guidance by step                                      guidance
    sampling: draw, rank by noisy confidence, mask again  generate

Departures
    Stage 2 has the squared error alone. The paper adds a perceptual term and a patch discriminator, networks apart from the
    tokenizer. The proxy codes train in it too, as in the official code. The grid tokenizer's decoder is an argument of
    `build`; without one it paints each place by itself, linearly.
    The generator is BERT without dropout, which torch would draw from the global generator; the U-ViT of TiTok-S-128 is not
    here. Linear layers start as torch starts them, not from a normal of 0.02, whose scale suits the paper's widths.
    The released two-stage weights read the latents (B, K, w) as (B, w, K) without a transpose, so that channels and tokens
    mix. Here they keep their channels; `legacy` is the mixed reading, for those weights.
    The official sampler masks more tokens than its schedule says where confidences are equal, and runs the unconditional
    pass where it has no weight. Here neither.
    Both forms of guidance are one weight on cond - uncond added to cond: g for "constant", but g - 1 at the end of
    "power-cosine". "linear" lags a step behind, as in the official code, and never reaches g.

Example
    >>> import methods, torch
    >>> from methods import titok
    >>> model = titok.build(titok.TRAINED["titok-16"])                                  # digits in 16 tokens
    >>> titok.load(model, methods.weights("titok-16"))
    >>> tokens = titok.generate(model, torch.arange(10), torch.Generator().manual_seed(0), steps=4)
    >>> tuple(tokens.shape), tuple(model.decode(tokens).shape)
    ((10, 16), (10, 1, 32, 32))
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

from methods._core import learning
from methods._core.codebook import Quantised, lookup, quantise
from methods._core.learning import check_sizes, load, save, seeded
from methods._core.parts import Block, learnt, patchify

__all__ = ["STAGES", "TINY", "TRAINED", "Config", "TiTok", "build", "enter", "generate", "guidance", "hide", "load", "loss",
           "remaining", "save"]


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 256                                # H = W of an image; the defaults are those of TiTok-L-32
    channels: int = 3                              # of an image
    patch: int = 16                                # f, side of a patch, and of a place of the grid tokenizer
    tokens: int = 32                               # K
    codes: int = 4096                              # V, rows of the codebook
    depth: int = 12                                # D, channels of a code
    width: int = 1024                              # w of encoder and decoder; B: 768, S: 512
    layers: int = 24                               # blocks in each; B: 12, S: 8
    heads: int = 16                                # of each block; B: 12, S: 8
    commitment: float = 0.25                       # weight of the commitment loss
    proxy_codes: int = 1024                        # rows of the grid tokenizer's codebook
    proxy_depth: int = 256                         # channels of its codes
    classes: int = 1000                            # labels; one more id stands for none
    generator_width: int = 768                     # of the generator
    generator_layers: int = 24                     # its blocks
    generator_heads: int = 16                      # of each of them
    steps: int = 8                                 # S, of sampling
    temperature: float = 9.5                       # of the noise at the start; it falls to 0 in the last step
    guidance: float = 4.5                          # g
    schedule: str = "linear"                       # of the guidance: "constant", "linear" or "power-cosine"
    power: float = 3.0                             # exponent of "power-cosine"
    anneal: bool = True                            # divide the logits by 0.5 + 0.8 (1 - rho), as the released sampling does
    legacy: bool = False                           # read the latents as the released two-stage weights do
    seed: int = 0                                  # of the initial weights

    def __post_init__(self):
        check_sizes(self, [("patch", "size"), ("heads", "width"), ("generator_heads", "generator_width")])
        if self.schedule not in ("constant", "linear", "power-cosine"):
            raise ValueError(f"schedule={self.schedule!r} must be 'constant', 'linear' or 'power-cosine'")

    @property
    def side(self) -> int:
        """Places in a row of the grid; N is its square."""
        return self.size // self.patch


TINY = Config(size=12, patch=4, tokens=3, codes=16, depth=4, width=16, layers=1, heads=2, proxy_codes=8, proxy_depth=6,
              classes=4, generator_width=16, generator_layers=1, generator_heads=2)
# Trained on digits; the grid tokenizer is 128 means of patches. `methods.weights(name)` has the weights.
TRAINED = {f"titok-{tokens}": Config(
    size=32, channels=1, patch=4, tokens=tokens, codes=256, depth=8, width=64, layers=2, heads=4, proxy_codes=128,
    proxy_depth=16, classes=10, generator_width=96, generator_layers=3, generator_heads=4, steps=tokens // 2, temperature=2.0,
    guidance=2.0) for tokens in (4, 8, 16)}


class Tower(nn.Module):
    """Class token, N places and K latents, with learnt positions, through LayerNorm, blocks and LayerNorm."""

    def __init__(self, config: Config):
        super().__init__()
        self.sizes = 1, config.side ** 2, config.tokens
        self.token, self.positions, self.latent_positions = (
            learnt(n, config.width) for n in (1, 1 + config.side ** 2, config.tokens))
        self.blocks = nn.Sequential(*(Block(config.width, config.heads) for _ in range(config.layers)))
        self.before, self.after = nn.LayerNorm(config.width), nn.LayerNorm(config.width)

    def run(self, places: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, w), (B, K, w) -> the same."""
        places = torch.cat([self.token.expand(len(places), 1, -1), places], dim=1) + self.positions
        x = self.before(torch.cat([places, latents + self.latent_positions], dim=1))
        return self.after(self.blocks(x)).split(self.sizes, dim=1)[1:]


class Encoder(Tower):
    """Images (B, C, H, W) -> z (B, K, D)."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.patch, self.legacy = config.patch, config.legacy
        self.embed = nn.Linear(config.patch ** 2 * config.channels, config.width)
        self.latents, self.project = learnt(config.tokens, config.width), nn.Linear(config.width, config.depth)

    def forward(self, images: Tensor) -> Tensor:
        latents = self.run(self.embed(patchify(images, self.patch)), self.latents.expand(len(images), -1, -1))[1]
        return self.project(latents.reshape(len(images), -1, self.sizes[2]).mT if self.legacy else latents)


class Decoder(Tower):
    """z_q (B, K, D) -> logits (B, N, proxy_codes)."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.embed, self.mask = nn.Linear(config.depth, config.width), learnt(1, config.width)
        self.head = nn.Sequential(nn.Linear(config.width, 2 * config.width), nn.Tanh(),
                                  nn.Linear(2 * config.width, config.proxy_codes))

    def forward(self, z_q: Tensor) -> Tensor:
        return self.head(self.run(self.mask.expand(len(z_q), self.sizes[1], -1), self.embed(z_q))[0])


class TiTok(nn.Module):
    """The tokenizer, and the generator of its tokens. `proxy` (proxy_codes, proxy_depth) and `pixels`, which makes images of
    (B, proxy_depth, side, side), come from the grid tokenizer."""

    def __init__(self, config: Config, pixels: nn.Module):
        super().__init__()
        self.config, self.encoder, self.decoder, self.pixels = config, Encoder(config), Decoder(config), pixels
        self.codes = nn.Parameter(torch.empty(config.codes, config.depth).uniform_(-1 / config.codes, 1 / config.codes))
        self.proxy = nn.Parameter(torch.randn(config.proxy_codes, config.proxy_depth))
        self.generator = BertForTokenClassification(BertConfig(        # its ids: codes, mask, classes, no class
            vocab_size=config.codes + config.classes + 2, num_labels=config.codes, max_position_embeddings=config.tokens + 1,
            hidden_size=config.generator_width, intermediate_size=4 * config.generator_width, pad_token_id=None,
            num_hidden_layers=config.generator_layers, num_attention_heads=config.generator_heads, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0))

    def encode(self, images: Tensor) -> Quantised:
        """Images (B, C, H, W) -> their codes: `index` (B, K), `z_q` (B, K, D) of length 1, and the quantiser's losses. Raises
        ValueError for images of another shape than `config` says."""
        shape = (self.config.channels, self.config.size, self.config.size)
        if images.shape[1:] != shape:
            raise ValueError(f"images have shape {tuple(images.shape)}; this model takes (B, {', '.join(map(str, shape))})")
        return quantise(self.encoder(images), self.codes, unit=True)

    def paint(self, logits: Tensor) -> Tensor:
        """Logits (B, N, proxy_codes) -> images: the expected proxy code at each place, then the pixel decoder."""
        soft = logits.softmax(-1) @ self.proxy
        return self.pixels(soft.mT.unflatten(-1, (self.config.side, self.config.side)))

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, K) -> images (B, C, H, W)."""
        return self.paint(self.decoder(lookup(tokens, self.codes, unit=True)))

    def predict(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Tokens (B, K), V where masked, and labels (B,), `classes` for none -> logits (B, K, V)."""
        return self.generator(torch.cat([self.config.codes + 1 + labels[:, None], tokens], dim=1)).logits[:, 1:]


def build(config: Config, codebook: Tensor | None = None, pixels: nn.Module | None = None) -> TiTok:
    """The network, untrained. The grid tokenizer's `codebook` (proxy_codes, proxy_depth) and decoder `pixels` become its own.
    Raises ValueError for a codebook of another shape."""
    if codebook is not None and codebook.shape != (config.proxy_codes, config.proxy_depth):
        raise ValueError(f"the codebook has shape {tuple(codebook.shape)}, not ({config.proxy_codes}, {config.proxy_depth})")
    with seeded(config.seed):
        model = TiTok(config, pixels or nn.ConvTranspose2d(config.proxy_depth, config.channels, config.patch, config.patch))
    if codebook is not None:
        model.proxy.data.copy_(codebook)
    return model


STAGES = {"proxy": ("encoder", "codes", "decoder"), "pixels": ("decoder", "proxy", "pixels"), "generator": ("generator",)}


def enter(model: TiTok, stage: str) -> list[nn.Parameter]:
    """Let train what `stage` trains, a key of STAGES. -> the parameters for its optimiser"""
    return learning.enter(model, STAGES, stage)


def hide(batch: int, tokens: int, random: torch.Generator) -> Tensor:
    """Which tokens are masked, (batch, tokens) bool: max(1, round(K arccos(u) / (pi/2))) of each row, u uniform."""
    count = (tokens * torch.rand(batch, generator=random, device=random.device).acos() / (math.pi / 2)).round().clamp(min=1)
    return torch.rand(batch, tokens, generator=random, device=random.device).argsort(-1) < count[:, None]


def loss(model: TiTok, stage: str, x: Tensor, target: Tensor | None = None, random: torch.Generator | None = None) -> Tensor:
    """What a stage, `enter`ed before, minimises.

    "proxy": cross-entropy of `target` (B, N), the grid tokenizer's codes of the images x, and the quantiser's loss.
    "pixels": squared error of the images x painted from their codes.
    "generator": cross-entropy of x, tokens (B, K), of which `random` masks some, given the labels `target` (B,), of which it
    hides one in ten. Smoothed by 0.1; tokens that are not masked weigh 0.1.
    """
    if stage not in STAGES or (stage != "pixels" and target is None) or (stage == "generator" and random is None):
        raise ValueError(f"stage={stage!r} must be one of {', '.join(STAGES)}; all but 'pixels' need a target, the last draws")
    if stage == "pixels":
        with torch.no_grad():
            z_q = model.encode(x).z_q
        return F.mse_loss(model.paint(model.decoder(z_q)), x)
    if stage == "proxy":
        found = model.encode(x)
        error = F.cross_entropy(model.decoder(found.z_q).flatten(0, 1), target.flatten())
        return error + found.codebook_loss + model.config.commitment * found.commitment_loss
    masked = hide(*x.shape, random).to(x.device)
    dropped = torch.rand(len(x), generator=random, device=random.device).to(x.device) < 0.1
    logits = model.predict(x.masked_fill(masked, model.config.codes), target.masked_fill(dropped, model.config.classes))
    error, weight = F.cross_entropy(logits.mT, x, reduction="none", label_smoothing=0.1), torch.where(masked, 1.0, 0.1)
    return (error * weight).sum() / weight.sum()


def remaining(tokens: int, steps: int) -> list[int]:
    """How many tokens stay masked after each step: floor(K arccos(rho) / (pi/2)), but fewer than before and at least one;
    after the last step none."""
    left = [tokens]
    for step in range(1, steps):
        left.append(max(1, min(math.floor(tokens * math.acos(step / steps) / (math.pi / 2)), left[-1] - 1)))
    return [*left[1:], 0]


def guidance(config: Config, step: int) -> float:
    """The weight of cond - uncond beside cond in a step counted from 0."""
    g, s = config.guidance, step / config.steps
    rising = (1 - math.cos(math.pi * s ** config.power)) / 2
    return {"constant": g, "linear": g * s, "power-cosine": (g - 1) * rising}[config.schedule]


def _gumbel(like: Tensor, random: torch.Generator) -> Tensor:
    u = torch.rand(like.shape, dtype=like.dtype, device=random.device, generator=random).to(like.device)
    return -(-u.clamp(min=1e-20).log()).clamp(min=1e-20).log()


@torch.no_grad()
def generate(model: TiTok, labels: Tensor, random: torch.Generator, **changes: Any) -> Tensor:
    """Tokens (B, K) for `labels` (B,), for `model.decode`; `changes` are other values of the Config's fields of sampling.
    Raises ValueError for another field, and for a label that is not below `classes`."""
    if wrong := changes.keys() - {"steps", "temperature", "guidance", "schedule", "power", "anneal"}:
        raise ValueError(f"{', '.join(sorted(wrong))} cannot change in a network that is built")
    config = replace(model.config, **changes)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < config.classes:
        raise ValueError(f"labels must lie in 0..{config.classes - 1}; these reach from {labels.min()} to {labels.max()}")
    tokens = labels.new_full((len(labels), config.tokens), config.codes)
    for step, left in enumerate(remaining(config.tokens, config.steps)):
        rho, weight, logits = (step + 1) / config.steps, guidance(config, step), model.predict(tokens, labels)
        if weight:
            logits = logits + weight * (logits - model.predict(tokens, torch.full_like(labels, config.classes)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (0.5 + 0.8 * (1 - rho) if config.anneal else 1)
        heat, masked = config.temperature * (1 - rho), tokens == config.codes
        drawn = (logits + heat * _gumbel(logits, random)).argmax(-1)
        chosen = logits.gather(-1, drawn[..., None]).squeeze(-1).masked_fill(~masked, torch.inf)
        confidence = chosen + heat * _gumbel(chosen, random)                     # a logit, with noise of its own
        tokens = torch.where(masked, drawn, tokens).scatter(1, confidence.topk(left, largest=False).indices, config.codes)
    return tokens
