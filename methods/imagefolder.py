"""ImageFolder - ImageFolder: Autoregressive Image Generation with Folded Tokens

Xiang Li, Kai Qiu, Hao Chen, Jason Kuen, Jiuxiang Gu, Bhiksha Raj, Zhe Lin, ICLR 2025. arXiv:2410.01756.
Code: lxa9867/ImageFolder

Idea: an image becomes P grids of codes in place of one, which lie over each other: a branch for details, and a last one whose
mean is drawn to the features of a frozen teacher. Each is quantised over rising scales, what is left over going to the next.
A generator predicts scale by scale and says the P codes of a place from one hidden state, so that its sequence is as long as
for one grid.

Map
    image patches and P K^2 latents with shared positions     ImageFolder.encode
    residual quantiser over scales, phi, dropout of scales    methods._core.residual.Quantiser
    P maps on channels -> image                               ImageFolder.paint
    contrast with the teacher, last branch only               contrast
    input of each scale: what the ones before give            ImageFolder.inputs
    block-causal transformer, P logits a place                Folded
    guidance rising by scale, top-k and top-p                 generate, methods._core.residual.nucleus

Departures
    Perceptual loss and discriminator, networks apart from this one, are not here, nor drop path and the joint sampling of two
    branches. Encoder and decoder start at random, not from DINOv2; the teacher's features are an argument of `loss`.
    The generator keeps no keys and values: each scale runs over all before it. Its blocks are those of DiT, without the
    normalised attention of VAR.
    The official commitment loss is summed over the scales where the other one is averaged; so it is here. Its last scale is
    left as it is only where it has 16 places a side; here wherever it fills the grid, which is the same.
    A gather over processes in the contrast is left to who trains on several.

Example
    >>> import methods, torch
    >>> from methods import imagefolder
    >>> model = imagefolder.build(imagefolder.TRAINED["imagefolder"])        # digits, its generator trained too short
    >>> imagefolder.load(model, methods.weights("imagefolder"))
    >>> tokens = imagefolder.generate(model, torch.arange(10), torch.Generator().manual_seed(0))
    >>> [tuple(scale.shape) for scale in tokens], tuple(model.decode(tokens).shape)
    ([(10, 1, 2), (10, 4, 2), (10, 16, 2)], (10, 1, 32, 32))
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods._core import learning
from methods._core.dit import Head, checked, hidden
from methods._core.learning import check_sizes, load, save, seeded
from methods._core.parts import Block, learnt, patchify, unpatchify
from methods._core.residual import Coded, Quantiser, nucleus

__all__ = ["STAGES", "TINY", "TRAINED", "Config", "Folded", "ImageFolder", "build", "contrast", "enter", "generate", "load",
           "loss", "save", "scale_of"]


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 256                                              # H = W of an image
    channels: int = 3                                            # of an image
    patch: int = 16                                              # side of a patch
    width: int = 768                                             # of encoder and decoder
    layers: int = 12                                             # blocks in each
    heads: int = 12                                              # of each block
    branches: int = 2                                            # P
    scales: tuple[int, ...] = (1, 1, 2, 3, 3, 4, 5, 6, 8, 11)    # places a side in each scale; the last is K
    codes: int = 4096                                            # V, rows of each codebook
    depth: int = 32                                              # c, channels of a code
    convolutions: int = 4                                        # phi, which the scales share
    commitment: float = 0.25                                     # beta
    semantic: float = 0.1                                        # weight of the contrast with the teacher
    scale: float = 1.0                                           # of its logits
    drop: float = 0.1                                            # share of a batch that keeps its first scales only
    first: int = 3                                               # and the fewest that it keeps
    classes: int = 1000                                          # labels; one more id stands for none
    generator_width: int = 1088                                  # of the generator
    generator_layers: int = 17                                   # its blocks
    generator_heads: int = 17                                    # of each
    empty: float = 0.15                                          # most places of an input that training blanks
    hide: float = 0.1                                            # share of labels that training hides
    guidance: float = 3.25                                       # at the last scale
    top_k: int = 750                                             # codes that may be drawn
    top_p: float = 0.95                                          # and their probability
    seed: int = 0                                                # of the initial weights

    def __post_init__(self):
        check_sizes(self, [("patch", "size"), ("heads", "width"), ("generator_heads", "generator_width")])
        if len(self.scales) < 2 or min(self.scales) < 1 or list(self.scales) != sorted(self.scales):
            raise ValueError(f"scales={self.scales} must be two or more that do not fall")
        if self.first > len(self.scales):
            raise ValueError(f"first={self.first} must not exceed the number of scales, {len(self.scales)}")
        for name in ("drop", "empty", "hide"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be below 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")

    @property
    def grid(self) -> int:
        """K, places a side of a map."""
        return self.scales[-1]


TINY = Config(size=8, patch=4, width=16, layers=1, heads=2, scales=(1, 2), codes=6, depth=4, convolutions=2, first=1, drop=0.5,
              classes=4, generator_width=16, generator_layers=1, generator_heads=2, top_k=6)
TRAINED = {"imagefolder": Config(size=32, channels=1, patch=4, width=64, layers=2, heads=4, scales=(1, 2, 4), codes=64, depth=8,
                                 convolutions=3, first=1, classes=10, generator_width=64, generator_layers=3,
                                 generator_heads=4, guidance=2.0, top_k=64)}     # on digits; its generator for minutes
STAGES = {"tokenizer": ("embed", "places", "latents", "levels", "encoder", "code", "quantisers", "back", "mask",
                        "decoder_places", "decoder_levels", "decoder", "pixels"), "generator": ("generator",)}


def scale_of(scales: Sequence[int]) -> Tensor:
    """The number of the scale that each place of the sequence belongs to."""
    return torch.cat([torch.full((p * p,), s) for s, p in enumerate(scales)])


class Causal(Block):
    """A block of DiT in which a place sees its own scale and those before it."""

    def __init__(self, config: Config):
        super().__init__(config.generator_width, config.generator_heads, cond=config.generator_width)
        scale = scale_of(config.scales)
        self.register_buffer("sees", scale[:, None] >= scale, persistent=False)

    def attention(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=self.sees[:n, :n]).transpose(1, 2).flatten(2))


class Folded(nn.Module):
    """The generator: what the scales before give at each place -> logits of all branches there."""

    def __init__(self, config: Config):
        super().__init__()
        w, L = config.generator_width, sum(p * p for p in config.scales)
        self.branches = config.branches
        self.word, self.label = nn.Linear(config.branches * config.depth, w), nn.Embedding(config.classes + 1, w)
        self.start, self.places, self.empty = learnt(config.scales[0] ** 2, w), learnt(L, w), learnt(1, w)
        self.levels, self.blocks = learnt(len(config.scales), w), nn.ModuleList(
            Causal(config) for _ in range(config.generator_layers))
        self.register_buffer("scale", scale_of(config.scales), persistent=False)
        self.head = Head(w, w, config.branches * config.codes)

    def forward(self, labels: Tensor, inputs: Tensor, blank: Tensor | None = None) -> Tensor:
        """Labels (B,), `inputs` (B, n, P c) of the places behind the first scale, as far as they are known, of which those
        where `blank` (B, n) is true are hidden -> logits (B, first + n, P, V)."""
        cond, words = self.label(labels), self.word(inputs)
        words = words if blank is None else torch.where(blank[..., None], self.empty[0], words)
        x = torch.cat([cond[:, None] + self.start, words], dim=1)
        x = x + (self.places + self.levels[self.scale])[:x.shape[1]]
        for block in self.blocks:
            x = block(x, cond)
        return self.head(x, cond).unflatten(-1, (self.branches, -1))


class ImageFolder(nn.Module):
    """The tokenizer, and the generator of its tokens."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        w, N, pixels = config.width, (config.size // config.patch) ** 2, config.patch ** 2 * config.channels
        self.embed, self.places, self.levels = nn.Linear(pixels, w), learnt(N, w), learnt(config.branches + 1, w)
        self.latents = nn.Parameter(1e-6 * torch.randn(config.branches * config.grid ** 2, w))
        self.encoder = nn.Sequential(*(Block(w, config.heads) for _ in range(config.layers)), nn.LayerNorm(w))
        self.code = nn.Linear(w, config.depth)
        self.quantisers = nn.ModuleList(Quantiser(config.codes, config.depth, config.scales, config.convolutions,
                                                  config.commitment) for _ in range(config.branches))
        self.back, self.mask = nn.Linear(config.branches * config.depth, w), learnt(1, w)
        self.decoder_places, self.decoder_levels = learnt(N, w), learnt(2, w)
        self.decoder = nn.Sequential(*(Block(w, config.heads) for _ in range(config.layers)), nn.LayerNorm(w))
        self.pixels, self.generator = nn.Linear(w, pixels), Folded(config)

    def _grid(self, places: Tensor) -> Tensor:
        """(K^2, w): the positions of the image's patches, interpolated to those of a map."""
        side = self.config.size // self.config.patch
        table = places.T.unflatten(-1, (side, side))[None]
        return F.interpolate(table, size=(self.config.grid,) * 2, mode="bicubic")[0].flatten(1).T

    def maps(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> a map (B, c, K, K) for each branch."""
        config, P = self.config, self.config.branches
        x = self.embed(patchify(images, config.patch)) + self.places + self.levels[0]
        latents = self.latents + self._grid(self.places).repeat(P, 1) + self.levels[1:].repeat_interleave(config.grid ** 2, 0)
        x = self.encoder(torch.cat([x, latents.expand(len(x), -1, -1)], dim=1))[:, -len(latents):]
        return [each.mT.unflatten(-1, (config.grid,) * 2) for each in self.code(x).chunk(P, dim=1)]

    def encode(self, images: Tensor, kept: Tensor | None = None) -> list[Coded]:
        """Of each branch what the quantiser makes of its map."""
        return [quantiser(f, kept) for quantiser, f in zip(self.quantisers, self.maps(images), strict=True)]

    def paint(self, z: Tensor) -> Tensor:
        """Maps (B, P c, K, K) -> images."""
        config = self.config
        latents = self.back(z.flatten(2).mT) + self._grid(self.decoder_places) + self.decoder_levels[1]
        image = (self.mask + self.decoder_places + self.decoder_levels[0]).expand(len(z), -1, -1)
        x = self.decoder(torch.cat([image, latents], dim=1))[:, :image.shape[1]]
        return unpatchify(self.pixels(x), config.patch, config.size // config.patch)

    def summed(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Tokens (B, p^2, P) of the first scales -> the maps (B, P c, K, K) that they give, after each scale."""
        found, z = [], 0
        for s, index in enumerate(tokens):
            z = z + torch.cat([quantiser.shown(index[..., i], s) for i, quantiser in enumerate(self.quantisers)], dim=1)
            found.append(z)
        return found

    def inputs(self, tokens: Sequence[Tensor]) -> Tensor:
        """(B, n, P c): what the generator is given at the places behind the first scale, as far as `tokens` reach."""
        scales = self.config.scales
        maps = [F.interpolate(z, size=(p, p), mode="area").flatten(2).mT
                for z, p in zip(self.summed(tokens), scales[1:], strict=False)]
        return torch.cat(maps, dim=1)

    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """Tokens (B, p^2, P) of all scales, or of the first ones -> images (B, C, H, W)."""
        return self.paint(self.summed(tokens)[-1])


def build(config: Config = Config()) -> ImageFolder:
    """The network, untrained."""
    with seeded(config.seed):
        return ImageFolder(config)


def enter(model: ImageFolder, stage: str) -> list[nn.Parameter]:
    """Let train what `stage` trains, a key of STAGES. -> the parameters for its optimiser"""
    return learning.enter(model, STAGES, stage)


def contrast(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """How well rows of a (B, c) and b (B, c) find each other by their products: cross-entropy both ways, halved."""
    logits, own = scale * a @ b.T, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def loss(model: ImageFolder, stage: str, images: Tensor, target: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    """What a stage, `enter`ed before, minimises as `loss`; its parts for show.

    Args:
        target: "tokenizer": the frozen teacher's features of the images, (B, width). "generator": labels (B,), of which some
            are hidden.
        random: of the images that keep their first scales only, and of what is blanked and hidden.

    Raises:
        ValueError: another stage; labels that the network does not know.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} must be one of {', '.join(STAGES)}")
    config, S = model.config, len(model.config.scales)
    if stage == "tokenizer":
        few, kept = int(len(images) * config.drop), torch.full((len(images),), S, device=images.device)
        kept[:few] = torch.randint(config.first, S + 1, (few,), generator=random, device=random.device).to(kept)
        coded = model.encode(images, kept)
        error = F.mse_loss(model.paint(torch.cat([each.z for each in coded], dim=1)), images)
        same = contrast(coded[-1].z.mean((2, 3))[few:], model.code(target)[few:], config.scale)
        quantised = sum(each.codebook_loss + each.commitment_loss for each in coded) / config.branches
        return {"loss": error + quantised + config.semantic * same, "error": error, "quantised": quantised, "contrast": same}
    checked(target, config.classes)
    with torch.no_grad():
        tokens = [torch.stack(each, dim=-1) for each in zip(*(each.index for each in model.encode(images)), strict=True)]
        inputs = model.inputs(tokens)
    share = config.empty * torch.rand((), generator=random, device=random.device)
    blank = (torch.rand(inputs.shape[:2], generator=random, device=random.device) < share).to(inputs.device)
    logits = model.generator(hidden(target, config.classes, config.hide, random), inputs, blank)
    return {"loss": F.cross_entropy(logits.flatten(0, 2), torch.cat(tokens, dim=1).flatten())}


@torch.no_grad()
def generate(model: ImageFolder, labels: Tensor, random: torch.Generator, guidance: float | None = None) -> list[Tensor]:
    """Tokens (B, p^2, P) of each scale for `labels` (B,), for `model.decode`; `guidance` other than the Config's. Raises
    ValueError for labels that the network does not know."""
    config, tokens = model.config, []
    checked(labels, config.classes)
    both = torch.cat([labels, torch.full_like(labels, config.classes)])
    inputs = model.code.weight.new_zeros(len(labels), 0, config.branches * config.depth)
    for s, p in enumerate(config.scales):
        t = (config.guidance if guidance is None else guidance) * s / (len(config.scales) - 1)
        cond, uncond = model.generator(both, inputs.repeat(2, 1, 1))[:, -p * p:].chunk(2)
        p_of = nucleus(((1 + t) * cond - t * uncond).float().to(random.device), config.top_k, config.top_p)
        drawn = torch.multinomial(p_of.flatten(0, 2), 1, generator=random).view(p_of.shape[:3])
        tokens.append(drawn.to(labels.device))
        inputs = model.inputs(tokens)
    return tokens
