"""MaskDiT - Fast Training of Diffusion Models with Masked Transformers

Hongkai Zheng, Weili Nie, Arash Vahdat, Anima Anandkumar, TMLR 2024. arXiv:2306.09305.
Code: Anima-Lab/MaskDiT

Idea: most of the training of a diffusion transformer runs on a random half of the tokens. The encoder, nearly all of the
network, sees those alone; a small decoder gets mask tokens in the places of the others. The loss denoises where the network
could see and, weakly, rebuilds the noisy image where it could not. A last short stage trains on whole sequences, as sampling
needs them. It makes training cheaper; sampling costs a little more than without the decoder.

Map
    random mask, ratio rho               methods._core.masking.random_mask
    encoder on what stays, decoder       MaskDiT
    preconditioning by noise level       methods._core.noise.Noising
    L_DSM on visible patches             loss
    L_MAE on masked ones                 loss, standardised
    masked training, then unmasked       STAGES, enter
    computing of a call, closed form     macs
    Heun's sampler with guidance         generate, noise_levels

Departures
    The official code leaves masks out where the network is in evaluation mode. Here the stage alone says whether there is one.
    Its schedule of a falling mask ratio is not here, and one of its settings names a schedule that the code does not know.
    Linear layers start as torch starts them, but for those that start at zero. Noise levels are stratified over the batch.
    Without a decoder (`decoder_layers=0`) it is a plain DiT, which takes whole sequences only; the official code also masks
    that one.

Example
    >>> import methods, torch
    >>> from methods import maskdit
    >>> model = maskdit.build(maskdit.TRAINED["maskdit"])              # digits, trained too short to be legible
    >>> maskdit.load(model, methods.weights("maskdit"))
    >>> images = maskdit.generate(model, torch.arange(10), torch.Generator().manual_seed(0), steps=10)
    >>> tuple(images.shape)
    (10, 1, 32, 32)
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import EDMEulerScheduler
from torch import Tensor, nn

from methods._core import learning
from methods._core.dit import Head, Level, blocks, chain_macs, checked, hidden, positions
from methods._core.learning import check_sizes, load, save, seeded
from methods._core.masking import Masking, mean_over, random_mask
from methods._core.noise import Noising, Noisy
from methods._core.parts import learnt, patchify, unpatchify

__all__ = ["STAGES", "TINY", "TRAINED", "Config", "MaskDiT", "build", "enter", "generate", "load", "loss", "macs",
           "noise_levels", "save", "standardised"]


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 32                       # H = W of a latent; the defaults are those of MaskDiT-XL/2 for images of 256
    channels: int = 4                    # of a latent
    patch: int = 2                       # side of a patch
    width: int = 1152                    # of the encoder
    layers: int = 28                     # its blocks
    heads: int = 16                      # of each
    decoder_width: int = 512             # of the decoder
    decoder_layers: int = 8              # its blocks; 0: no decoder, a plain DiT
    decoder_heads: int = 16              # of each
    classes: int = 1000                  # labels; one more id stands for none
    ratio: float = 0.5                   # rho, share of the tokens that are masked
    reconstruction: float = 0.1          # lambda, weight of L_MAE
    drop: float = 0.1                    # share of labels that training hides
    data: float = 0.5                    # sigma_data, of the preconditioning
    seed: int = 0                        # of the initial weights

    def __post_init__(self):
        check_sizes(self, [("patch", "size"), ("heads", "width"), ("decoder_heads", "decoder_width"),
                           (4, "width"), (4, "decoder_width")], none=["decoder_layers"])
        if not (self.ratio < 1 and int(self.tokens * (1 - self.ratio))):
            raise ValueError(f"ratio={self.ratio} leaves none of {self.tokens} tokens")
        if self.ratio and not self.decoder_layers:
            raise ValueError(f"ratio={self.ratio} needs a decoder, to fill the gaps; decoder_layers=0 has none")

    @property
    def tokens(self) -> int:
        """N, of a whole sequence."""
        return (self.size // self.patch) ** 2


TINY = Config(size=8, channels=2, patch=2, width=16, layers=1, heads=2, decoder_width=8, decoder_layers=1, decoder_heads=2,
              classes=4)
TRAINED = {"maskdit": Config(channels=1, patch=4, width=64, layers=6, heads=4, decoder_width=32, decoder_layers=2,
                             decoder_heads=4, classes=10)}    # on digits, for minutes: too short to draw them
STAGES = {"masked": ("embed", "level", "label", "blocks", "project", "mask", "decoder", "head"),
          "whole": ("embed", "level", "label", "blocks", "project", "decoder", "head")}


class MaskDiT(nn.Module):
    """A DiT on tokens that may be some of all, and a narrower one on all of them behind it."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        side, pixels = config.size // config.patch, config.patch ** 2 * config.channels
        D, d = config.width, config.decoder_width
        self.embed, self.level, self.label = nn.Linear(pixels, D), Level(D), nn.Linear(config.classes, D, bias=False)
        self.blocks = blocks(config.layers, D, config.heads, D)
        self.register_buffer("places", positions(D, side), persistent=False)
        if config.decoder_layers:
            self.project, self.mask = Head(D, D, d), learnt(1, d)
            self.decoder = blocks(config.decoder_layers, d, config.decoder_heads, D)
            self.register_buffer("decoder_places", positions(d, side), persistent=False)
        self.head = Head(d if config.decoder_layers else D, D, pixels)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, masking: Masking | None = None) -> Tensor:
        """The network F of the preconditioning.

        Args:
            x: (B, C, H, W), noisy latents times c_in.
            t: (B,), log(sigma) / 4.
            labels: (B,), `classes` for none, whose embedding is zero.
            masking: which tokens the encoder sees; None: all.
        """
        config = self.config
        known = F.one_hot(labels, config.classes + 1)[:, :-1]
        cond = self.level(t) + self.label(known.to(self.label.weight))
        x = self.embed(patchify(x, config.patch)) + self.places
        x = x if masking is None else masking.keep(x)                # in random order: positions are in them already
        for block in self.blocks:
            x = block(x, cond)
        if config.decoder_layers:
            x = self.project(x, cond)
            x = (x if masking is None else masking.fill(x, self.mask[0])) + self.decoder_places
            for block in self.decoder:
                x = block(x, cond)
        return unpatchify(self.head(x, cond), config.patch, config.size // config.patch)

    @property
    def noising(self) -> Noising:
        """The preconditioning of EDM with sigma_data of the Config."""
        return Noising(EDMEulerScheduler(sigma_data=self.config.data))

    def denoise(self, y: Tensor, sigma: float, labels: Tensor) -> Tensor:
        """D(y, sigma), what y (B, C, H, W) with noise of a deviation `sigma` is without it, as the network says."""
        noising, t = self.noising, torch.full((len(y),), sigma, dtype=torch.float64).log().to(y.device) / 4
        x = y * noising.levels(t, y)[0]
        said = self(x.to(self.label.weight), t, labels)
        return noising.denoised(said.to(y), Noisy(x, t, x, x, x))


def macs(config: Config, ratio: float = 0.0) -> int:
    """Multiply-accumulates of one call for one image of which `ratio` is masked."""
    N, D, d, pixels = config.tokens, config.width, config.decoder_width, config.patch ** 2 * config.channels
    n, out = int(N * (1 - ratio)), d if config.decoder_layers else D
    total = N * pixels * D + 256 * D + D * D + config.classes * D + chain_macs(config.layers, n, D, D)
    if config.decoder_layers:
        total += n * D * d + 2 * D * D + chain_macs(config.decoder_layers, N, d, D)
    return total + N * out * pixels + 2 * D * out


def build(config: Config = Config()) -> MaskDiT:
    """The network, untrained: its output is zero at first."""
    with seeded(config.seed):
        return MaskDiT(config)


def enter(model: MaskDiT, stage: str) -> list[nn.Parameter]:
    """Let train what `stage` trains, a key of STAGES. -> the parameters for its optimiser"""
    return learning.enter(model, STAGES, stage)


def standardised(patches: Tensor) -> Tensor:
    """Patches (..., P), each less its mean and over its deviation."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def loss(model: MaskDiT, stage: str, x0: Tensor, labels: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    """The training loss as `loss`, and for show its parts `dsm` and, where there is a mask, `mae`.

    Args:
        stage: "masked", or "whole" for sequences without a mask.
        x0: (B, C, H, W), clean latents.
        labels: (B,), of which some are hidden.
        random: of noise levels, noise, hidden labels and masks.

    Raises:
        ValueError: another stage; labels that the network does not know.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} must be one of {', '.join(STAGES)}")
    config, noising = model.config, model.noising
    checked(labels, config.classes)
    noisy, labels = noising.sample(x0, random), hidden(labels, config.classes, config.drop, random)
    masking = None
    if stage == "masked":
        masking = random_mask(len(x0), config.tokens, config.ratio, random).to(x0.device)
    said = model(noisy.x, noisy.t, labels, masking)
    said = said.to(torch.promote_types(said.dtype, torch.float32))
    error = patchify((said - noisy.target).square(), config.patch).mean(-1)      # by c_out: the weight of EDM is in it
    if masking is None:
        return {"loss": error.mean(), "dsm": error.mean()}
    noise = patchify(noisy.x / noising.levels(noisy.t, noisy.x)[0], config.patch)
    rebuilt = (patchify(noising.denoised(said, noisy), config.patch) - standardised(noise)).square().mean(-1)
    dsm, mae = mean_over(error, ~masking.masked).mean(), mean_over(rebuilt, masking.masked).mean()
    return {"loss": dsm + config.reconstruction * mae, "dsm": dsm, "mae": mae}


def noise_levels(steps: int, lowest: float = 0.002, highest: float = 80.0, rho: float = 7.0) -> list[float]:
    """sigma of each step of the sampler, from the highest, and 0 at the end (Karras et al. 2022, equation 5)."""
    ends = [sigma ** (1 / rho) for sigma in (highest, lowest)]
    return [*((ends[0] + i / max(1, steps - 1) * (ends[1] - ends[0])) ** rho for i in range(steps)), 0.0]


@torch.no_grad()
def generate(model: MaskDiT, labels: Tensor, random: torch.Generator, steps: int = 18, guidance: float = 1.5) -> Tensor:
    """Latents (B, C, H, W) for `labels` (B,) in 2 `steps` - 1 calls of the network, twice as many rows in each where `guidance`
    is not 1. Raises ValueError for labels that the network does not know, and for steps below 1."""
    config = model.config
    checked(labels, config.classes)
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    levels = noise_levels(steps)
    shape = (len(labels), config.channels, config.size, config.size)
    y = torch.randn(shape, generator=random, device=random.device).to(labels.device) * levels[0]

    def slope(y: Tensor, sigma: float) -> Tensor:
        if guidance == 1:
            return (y - model.denoise(y, sigma, labels)) / sigma
        both = torch.cat([labels, torch.full_like(labels, config.classes)])
        cond, uncond = model.denoise(torch.cat([y, y]), sigma, both).chunk(2)
        return (y - uncond - guidance * (cond - uncond)) / sigma

    for sigma, after in zip(levels, levels[1:], strict=False):
        d = slope(y, sigma)
        ahead = y + (after - sigma) * d
        y = ahead if after == 0 else y + (after - sigma) * (d + slope(ahead, after)) / 2
    return y
