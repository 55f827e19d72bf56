"""DiCoDe - DiCoDe: Diffusion-Compressed Deep Tokens for Autoregressive Video Generation with Language Models

Yizhuo Li, Yuying Ge, Yixiao Ge, Ping Luo, Ying Shan, arXiv 2024. arXiv:2412.04446. Code: liyz15/DiCoDe

Idea: a clip of two seconds is told by its first and its last frame, and a video diffusion model draws the rest. Learnt queries
read each of the two into a few continuous tokens, and learn it from the loss of that model, which must rebuild the clip. A
plain causal language model then has 16 tokens a clip to predict; since they are continuous and the future is open, it says a
mixture of Gaussians for each, where a regression would say the mean of all futures.

Map
    deep tokens of the end frames                        DiCoDe.encode, Resampler
    de-tokenizer, tokens by cross-attention              Denoiser, DiCoDe.decode
    L_A, mean squared error of v                         loss
    [text][clip 1][clip 2]..., causal                    Language
    mixture of k diagonal Gaussians, 2kd + k outputs     density
    negative log-likelihood, divided by d                nll
    j from pi, y from N(mu_j, var_scale s_j^2)           draw
    clip by clip, sliding context; 16 tokens a clip      generate, token_count

Departures
    A reconstruction of the first stage: its code could not be had, and tokens a frame, the resampler, and what of the
    diffusion model trains are not known. Sizes that are not known stand in Config.
    The density is that of the sister project Divot, as its code has it: softplus gives the variance, not the deviation.
    The frame encoder, OpenCLIP ViT-H in the paper, is an argument of `build`; without one it is one layer of patches with its
    first weights. Nothing trains it. The de-tokenizer is a small transformer over the patches of all frames, from noise, in the
    place of a latent video UNet that was trained before.
    Tokens leave the resampler with mean 0 and variance 1 over their channels, so that likelihoods of two models compare.
    Clips share no frame: the last of one and the first of the next are told twice. A frame alone gives its tokens, too.

Example
    >>> import methods, torch
    >>> from methods import dicode
    >>> model = dicode.build(dicode.TRAINED["dicode"], methods._zoo.load_judge("video_judge").stages[:2])
    >>> dicode.load(model, methods.weights("dicode"))
    >>> tokens = dicode.generate(model, torch.tensor([[3]]), torch.Generator().manual_seed(0), clips=2)     # of a three
    >>> tuple(tokens.shape), tuple(model.decode(tokens[:, 1], torch.Generator().manual_seed(0)).shape)
    ((1, 2, 8, 8), (1, 8, 1, 16, 16))
    >>> dicode.token_count(60, dicode.Config())                         # of a minute, at the size of the paper
    480
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from methods._core import learning
from methods._core.learning import check_sizes, load, save, seeded
from methods._core.noise import Noising
from methods._core.parts import Block, learnt, patchify, unpatchify

__all__ = ["STAGES", "TINY", "TRAINED", "Config", "DiCoDe", "build", "density", "draw", "enter", "expected", "generate", "load",
           "loss", "nll", "save", "token_count"]


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 256                    # H = W of a frame
    channels: int = 3                  # of a frame
    frames: int = 16                   # of a clip
    per_frame: int = 8                 # tokens of an end frame; a clip has twice as many
    depth: int = 256                   # d, channels of a token (ours)
    features: int = 1280               # channels of what the frame encoder gives,
    places: int = 256                  # and its places, h w
    patch: int = 16                    # side of a patch in the de-tokenizer (ours)
    width: int = 768                   # of resampler and de-tokenizer (ours)
    layers: int = 12                   # of the de-tokenizer (ours); the resampler has a third
    heads: int = 12                    # of both (ours)
    words: int = 50257                 # ids of the text
    text: int = 64                     # most tokens of a text (ours)
    context: int = 30                  # clips that the language model sees
    language_width: int = 1280         # of the language model, as layers and heads: GPT-2 large
    language_layers: int = 36          # its blocks
    language_heads: int = 20           # of each of them
    components: int = 16               # k of the mixture, as in Divot
    var_scale: float = 0.1             # of the variances when tokens are drawn, as in Divot
    steps: int = 50                    # of the diffusion that draws a clip (ours)
    seed: int = 0                      # of the initial weights

    def __post_init__(self):
        check_sizes(self, [("patch", "size"), ("heads", "width"), ("language_heads", "language_width")])

    @property
    def tokens(self) -> int:
        return 2 * self.per_frame             # of a clip


TINY = Config(size=8, channels=1, frames=3, per_frame=2, depth=4, features=6, places=4, patch=4, width=16, layers=2, heads=2,
              words=5, text=2, context=3, language_width=16, language_layers=1, language_heads=2, components=2, steps=2)
# Trained on moving digits, behind the stages of a judge of them. `methods.weights(name)` has the weights.
TRAINED = {"dicode": Config(
    size=16, channels=1, frames=8, per_frame=4, depth=8, features=64, places=16, patch=8, width=96, layers=3, heads=4, words=10,
    text=1, context=2, language_width=96, language_layers=3, language_heads=4, components=4, steps=10)}


def token_count(seconds: float, config: Config) -> int:
    """Deep tokens of a video, whose clips last two seconds."""
    return config.tokens * math.ceil(seconds / 2)


def density(raw: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means (..., k, d), variances (..., k, d) and logits (..., k) of k diagonal Gaussians from raw (..., 2 k d + k)."""
    means, variances, logits = raw.split([(raw.shape[-1] - components) // 2] * 2 + [components], -1)
    means, variances = (x.unflatten(-1, (components, -1)) for x in (means, variances))
    return means, F.softplus(variances).clamp(min=1e-5), logits


def nll(raw: Tensor, y: Tensor, components: int) -> Tensor:
    """-log p(y) / d (...) of tokens y (..., d): the sum over d before that over components, one component a token."""
    means, variances, logits = density(raw.float(), components)
    each = -0.5 * ((y[..., None, :] - means) ** 2 / variances + variances.log() + math.log(2 * math.pi)).sum(-1)
    return -(logits.log_softmax(-1) + each).logsumexp(-1) / y.shape[-1]


def draw(raw: Tensor, components: int, scale: float, random: torch.Generator) -> Tensor:
    """Tokens (..., d): a component, then a normal vector of its mean and `scale` times its variance."""
    means, variances, logits = density(raw.float(), components)
    chosen = torch.multinomial(logits.softmax(-1).reshape(-1, components).to(random.device), 1, generator=random)
    chosen = chosen.view(*logits.shape[:-1], 1, 1).to(raw.device)
    mean, variance = (x.gather(-2, chosen.expand(*x.shape[:-2], 1, x.shape[-1])).squeeze(-2) for x in (means, variances))
    noise = torch.randn(mean.shape, generator=random, device=random.device).to(mean)
    return (mean + (scale * variance).sqrt() * noise).to(raw.dtype)


def expected(raw: Tensor, components: int) -> Tensor:
    """The mean of the mixture (..., d), what a regression would say."""
    means, _, logits = density(raw, components)
    return (logits.softmax(-1)[..., None] * means).sum(-2)


class Cross(nn.Module):
    """Tokens (B, N, w) read a context (B, M, w)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm, self.before = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y in (self.q(self.norm(x)), *self.kv(self.before(context)).chunk(2, -1)))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Features of a frame (B, places, features) -> its tokens (B, per_frame, d)."""

    def __init__(self, config: Config):
        super().__init__()
        self.queries, self.embed = learnt(config.per_frame, config.width), nn.Linear(config.features, config.width)
        self.cross, self.blocks = (nn.ModuleList(kind(config.width, config.heads) for _ in range(math.ceil(config.layers / 3)))
                                   for kind in (Cross, Block))
        self.positions, self.project = learnt(config.places, config.width), nn.Linear(config.width, config.depth)

    def forward(self, features: Tensor) -> Tensor:
        x, features = self.queries.expand(len(features), -1, -1), self.embed(features) + self.positions
        for cross, block in zip(self.cross, self.blocks, strict=True):
            x = block(cross(x, features))
        return F.layer_norm(self.project(x), (self.project.out_features,))


class Denoiser(nn.Module):
    """Noisy clips (B, F, C, H, W), times (B,) and deep tokens (B, 2 per_frame, d) -> v, as the clips."""

    def __init__(self, config: Config):
        super().__init__()
        self.patch, self.side, pixels = config.patch, config.size // config.patch, config.patch ** 2 * config.channels
        self.embed, self.embed_tokens = nn.Linear(pixels, config.width), nn.Linear(config.depth, config.width)
        self.positions = learnt(config.frames * self.side ** 2, config.width)
        self.token_positions = learnt(config.tokens, config.width)
        self.time = nn.Sequential(nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        self.cross, self.blocks = (nn.ModuleList(kind(config.width, config.heads) for _ in range(config.layers))
                                   for kind in (Cross, Block))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, pixels)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        (batch, frames), half = x.shape[:2], self.embed.out_features // 2
        angle = t[:, None] * (-math.log(10000) * torch.arange(half, device=t.device) / half).exp()
        time = self.time(F.pad(torch.cat([angle.cos(), angle.sin()], -1), (0, self.embed.out_features % 2)).to(x.dtype))
        x = self.embed(patchify(x.flatten(0, 1), self.patch)).unflatten(0, (batch, frames)).flatten(1, 2)
        x = torch.cat([time[:, None], x + self.positions], 1)
        tokens = self.embed_tokens(tokens) + self.token_positions
        for cross, block in zip(self.cross, self.blocks, strict=True):
            x = block(cross(x, tokens))
        x = self.head(self.norm(x[:, 1:])).reshape(batch * frames, self.side ** 2, -1)
        return unpatchify(x, self.patch, self.side).unflatten(0, (batch, frames))


class Language(nn.Module):
    """Words (B, T) and tokens (B, N, d) -> the density (B, N + 1, 2kd + k) of each token behind the words, and of the next."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.language_width
        self.words, self.embed = nn.Embedding(config.words, width), nn.Linear(config.depth, width)
        self.model = GPT2Model(GPT2Config(
            vocab_size=1, bos_token_id=0, eos_token_id=0, resid_pdrop=0, n_embd=width, n_layer=config.language_layers,
            n_head=config.language_heads, embd_pdrop=0, attn_pdrop=0, n_positions=config.text + config.context * config.tokens))
        self.model.wte = nn.Identity()                                  # it is given vectors
        self.head = nn.Linear(width, 2 * config.components * config.depth + config.components)

    def forward(self, words: Tensor, tokens: Tensor) -> Tensor:
        x = torch.cat([self.words(words), self.embed(tokens.to(self.embed.weight))], 1)
        return self.head(self.model(inputs_embeds=x).last_hidden_state[:, words.shape[1] - 1:])


class DiCoDe(nn.Module):
    """The tokenizer of clips, and the language model of its tokens. `frames` gives features (B, features, h, w) of frames."""

    def __init__(self, config: Config, frames: nn.Module):
        super().__init__()
        self.config, self.frames, self.language = config, frames, Language(config)
        self.resampler, self.denoiser = Resampler(config), Denoiser(config)
        self.scheduler = DDIMScheduler(beta_schedule="linear", prediction_type="v_prediction", clip_sample=False,
                                       rescale_betas_zero_snr=True, timestep_spacing="trailing")

    def encode(self, x: Tensor) -> Tensor:
        """Deep tokens (B, 2 per_frame, d) of clips (B, F, C, H, W), from their end frames; of frames (B, C, H, W) half as many.
        Raises ValueError for another size."""
        c = self.config
        if x.shape[-3:] != (c.channels, c.size, c.size):
            raise ValueError(f"frames have shape {tuple(x.shape[-3:])}; this model takes ({c.channels}, {c.size}, {c.size})")
        if x.ndim == 5:
            return torch.cat([self.encode(x[:, 0]), self.encode(x[:, -1])], 1)
        with torch.no_grad():
            features = self.frames(x)
        return self.resampler(features.flatten(2).mT)

    @torch.no_grad()
    def decode(self, tokens: Tensor, random: torch.Generator, steps: int | None = None) -> Tensor:
        """Clips (B, F, C, H, W) drawn for deep tokens (B, 2 per_frame, d) by DDIM with eta = 0."""
        c = self.config
        x = torch.randn((len(tokens), c.frames, c.channels, c.size, c.size), generator=random, device=random.device).to(tokens)
        self.scheduler.set_timesteps(c.steps if steps is None else steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.denoiser(x, t.to(x.device).expand(len(x)), tokens), t, x).prev_sample.to(x.dtype)
        return x


def build(config: Config, frames: nn.Module | None = None) -> DiCoDe:
    """The network, untrained, with a frame encoder (B, C, H, W) -> (B, features, h, w) that nothing trains."""
    with seeded(config.seed):
        layer = nn.Conv2d(config.channels, config.features, config.patch, config.patch)
        return DiCoDe(config, layer if frames is None else frames.eval().requires_grad_(False))


STAGES = {"tokens": ("resampler", "denoiser"), "language": ("language",)}


def enter(model: DiCoDe, stage: str) -> list[nn.Parameter]:
    """Let train what `stage` trains, a key of STAGES. -> the parameters for its optimiser"""
    return learning.enter(model, STAGES, stage)


def loss(model: DiCoDe, stage: str, x: Tensor, words: Tensor | None = None, random: torch.Generator | None = None,
         t: Tensor | None = None) -> Tensor:
    """What a stage, `enter`ed before, minimises.

    "tokens": squared error of v on clips x (B, F, C, H, W), given their tokens; noise by `random`, at times t (B,) or at all.
    "language": `nll` of deep tokens x (B, N, d), several clips one after the other, behind `words` (B, T).
    """
    if stage not in STAGES or (random if stage == "tokens" else words) is None:
        raise ValueError(f"stage={stage!r} must be 'tokens', with draws, or 'language', with words")
    if stage == "language":
        return nll(model.language(words, x[:, :-1]), x, model.config.components).mean()
    noisy = (noising := Noising(model.scheduler)).sample(x, random, t)
    return noising.loss(model.denoiser(noisy.x, noisy.t, model.encode(x)), noisy)


@torch.no_grad()
def generate(model: DiCoDe, words: Tensor, random: torch.Generator, clips: int = 1, before: Tensor | None = None,
             **changes: float) -> Tensor:
    """Deep tokens (B, clips, 2 per_frame, d), for `model.decode`, behind `words` (B, T) and those of clips `before`. `changes`:
    another `var_scale`, or `mean=True` for the mean of each density in place of a draw. Raises ValueError for others."""
    config = model.config
    if wrong := changes.keys() - {"var_scale", "mean"}:
        raise ValueError(f"{', '.join(sorted(wrong))} cannot change in a network that is built")
    tokens = torch.zeros(len(words), 0, config.depth, device=words.device) if before is None else before.flatten(1, 2)
    for _ in range(clips * config.tokens):                             # the context ends with the clip that is told now
        seen = tokens[:, max(0, tokens.shape[1] // config.tokens + 1 - config.context) * config.tokens:]
        raw = model.language(words, seen)[:, -1]
        y = expected(raw, config.components) if changes.get("mean") else draw(
            raw, config.components, changes.get("var_scale", config.var_scale), random)
        tokens = torch.cat([tokens, y[:, None].to(tokens.dtype)], 1)
    return tokens[:, -clips * config.tokens:].unflatten(1, (clips, config.tokens))
