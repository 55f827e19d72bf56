"""ToMA - Token Merge with Attention for Diffusion Models

Wenbo Lu, Shaoyi Zheng, Yuxuan Xia, Shengjie Wang, ICML 2025. arXiv:2509.10918. Code: WenboLuu/ToMA

Idea: in every small tile of the image a greedy choice finds the tokens that cover all others best. A softmax over these
destinations shares each token out among them; the same matrix, its rows scaled to one, averages the tokens into the
destinations before attention, and its transpose spreads the result back. All of it is small dense products, no sort and no
scatter, and one pair of matrices serves all blocks of a kind.

Map
    regions            tiles, stripes, or the whole grid at once                regions
    facility location  f(A) = sum_i max_{a in A} S_ai, greedily                 destinations
    merge matrix       A = softmax over destinations of tau Xd X^T              weights
    merge, unmerge     Y = (A / row sums) X, X' = A^T Y                         Matrices
    sharing            the first block of a kind computes, the others reuse     _Share
    placement          around self-attention; a Flux single block whole         apply

Departures
    The released script covers Flux alone, leaves the first five blocks of each kind alone and merges at steps 0, 3, 6, ...:
    that is `Config(skip=5, every=3)`. Here every block merges at every step unless told otherwise.
    Every sample chooses its own destinations; the released code takes those of sample 0 for all. Flux and CogVideoX turn
    queries and keys by position inside the attention: there one choice, made on all samples' channels, serves the batch, and
    a merged token is turned to the place of its destination.
    Grids need not be square: a tile is as large as divides the grid, up to `side`.
    Only self-attention is wrapped, in a Flux single block also the MLP beside it, as released. The paper's SDXL setting,
    which is not released, also merges around cross-attention and MLP; it is left out.
    The paper is said to choose every 10 steps and to weigh every 5 (`select_every`, `weigh_every`), which was not checked;
    the released script does both at every step that merges. What falls due between such steps is done at the next one.
    The released code counts blocks across calls and so serves one image, takes 512 text tokens for granted, and its script
    unpacks two values where the pipeline returns one.
    The blocks of a kind are those of one stage of a UNet, or of one stream of a transformer.

Example
    >>> import methods
    >>> from methods import toma
    >>> pipe = methods.tiny("dit")
    >>> with toma.apply(pipe, toma.Config(ratio=0.5)) as patch:
    ...     images = pipe([3], num_inference_steps=2, output_type="np").images
    >>> images.shape
    (1, 32, 32, 1)
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel_kernels.facility_location import facility_location
from methods._core.cache import Slot
from methods._core.context import StepContext
from methods._core.denoiser import Block, Call, Denoiser, check_downsample
from methods._core.patch import Patch, per_denoiser
from methods._core.reduction import Reduction
from methods._core.site import Claim
from methods._core.tokens import joined

__all__ = ["OFF", "Config", "Matrices", "apply", "destinations", "regions", "weights"]


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float = 0.5          # rho: share of tokens merged away
    region: str = "tile"        # where destinations compete: "tile" (released), "stripe", or "global", the exact form
    side: int = 4               # of a tile; a stripe holds side^2 tokens (released: 256 tiles of 4 x 4 on 64 x 64)
    scale: float = 1000.0       # tau of the softmax over destinations; large is nearly a hard choice
    every: int = 1              # merge at every so many steps, others run whole (released Flux script: 3)
    select_every: int = 1       # steps from one choice of destinations to the next, at least
    weigh_every: int = 1        # steps from one computation of the matrices to the next, at least; divides select_every
    skip: int = 0               # leading blocks of each kind left alone (released Flux script: 5)
    max_downsample: int = 1     # merge where the grid is at most this many times coarser than the latent

    def __post_init__(self):
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} outside [0, 1)")
        if self.region not in ("tile", "stripe", "global"):
            raise ValueError(f"region={self.region!r} must be 'tile', 'stripe' or 'global'")
        for name in ("side", "every", "select_every", "weigh_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.select_every % self.weigh_every:
            raise ValueError(f"weigh_every={self.weigh_every} must divide select_every={self.select_every}")
        if self.skip < 0:
            raise ValueError(f"skip={self.skip} must not be negative")
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale} must be positive")
        check_downsample(self.max_downsample)


OFF = Config(ratio=0.0)
TUNE = ({"ratio": 0.25}, {"ratio": 0.5}, {"ratio": 0.75})


def regions(frames: int, height: int, width: int, region: str, side: int) -> Tensor:
    """Positions of each region of each frame, in row-major order inside. -> (P, n), every position once.

    Raises:
        ValueError: no region of two tokens or more divides the grid.
    """
    place = torch.arange(frames * height * width).view(frames, height, width)
    h, w = _fit(height, side), _fit(width, side)
    if region == "global":
        h, w = height, width
    elif region == "stripe":
        place, h, w = place.flatten(1)[:, None], 1, _fit(height * width, side * side)
    if h * w == 1:
        raise ValueError(f"region={region!r} of side={side} holds one token of a {height} x {width} grid, so nothing would "
                         "merge: take another size, side or region")
    return place.view(frames, place.shape[1] // h, h, place.shape[2] // w, w).transpose(2, 3).reshape(-1, h * w)


def _fit(length: int, most: int) -> int:
    """The largest divisor of `length` up to `most`."""
    return next(size for size in range(min(length, most), 0, -1) if length % size == 0)


def destinations(x: Tensor, k: int) -> Tensor:
    """Facility location in every region: x (B, P, n, C) -> (B, P, k) places in the region, in the order of picking."""
    return facility_location(x.flatten(0, 1), k).view(*x.shape[:2], k)


def weights(x: Tensor, dst: Tensor, scale: float) -> Tensor:
    """A: how each token is shared out among its region's destinations. x (B, P, n, C), dst (B, P, k) -> (B, P, k, n) fp32.

    Columns sum to one: the softmax runs over the destinations.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        chosen = x.gather(2, dst[..., None].expand(*dst.shape, x.shape[3]))
        return (scale * (chosen @ x.mT)).softmax(dim=-2)


class Matrices(NamedTuple):
    """Merging as products: `share` A (B or 1, P, k, n); `places` (P, n) positions of the regions, `back` (N,) their inverse;
    `owner` (B or 1, P * k), the position each merged token stands for."""

    share: Tensor
    places: Tensor
    back: Tensor
    owner: Tensor

    def reduce(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, P * k, C): weighted means of the tokens of a region."""
        mean = self.share / self.share.sum(dim=-1, keepdim=True)
        return (mean.to(x.dtype) @ x[:, self.places]).flatten(1, 2)

    def restore(self, y: Tensor) -> Tensor:
        """(B, P * k, C) -> (B, N, C): every token takes back its share of each destination."""
        y = y.unflatten(1, (len(self.places), -1))
        return (self.share.mT.to(y.dtype) @ y).flatten(1, 2)[:, self.back]


class _Share:
    """What the blocks of one kind have in common: destinations and matrices, and when they are due. The host fills it in.

    `selected` and `weighed` are the steps of the last ones, by guidance branch.
    """

    def __init__(self, blocks: list[Block], chosen: Slot, share: Slot):
        self.blocks, self.chosen, self.share = blocks, chosen, share
        self.selected: dict[tuple, int] = {}
        self.weighed: dict[tuple, int] = {}
        self.places = self.back = None
        self.k = 0
        self.select = self.weigh = False

    def due(self, i: int, branch: tuple, select_every: int, weigh_every: int) -> None:
        """Decide what step i, which runs at least one of the blocks, computes."""
        self.select = self.chosen.value is None or i - self.selected[branch] >= select_every
        self.weigh = self.select or self.share.value is None or i - self.weighed[branch] >= weigh_every
        if self.select:
            self.selected[branch] = i
        if self.weigh:
            self.weighed[branch] = i

    def compute(self, x: Tensor, scale: float) -> None:
        """From the tokens x (B, N, C) of the first block of the kind."""
        x = x[:, self.places]
        if self.select:
            self.chosen.value = destinations(x, self.k)
        if self.weigh:
            self.share.value = weights(x, self.chosen.value, scale)

    def matrices(self) -> Matrices:
        dst = self.chosen.value
        owner = self.places.expand(len(dst), -1, -1).gather(2, dst).flatten(1)
        return Matrices(self.share.value, self.places, self.back, owner)


class _Merge(Reduction):
    """Merges what one self-attention reads, matched on that; in a fused block everything between norm and output.

    The host says whether this call merges (`active`) and whether this block computes the matrices of its kind (`leads`).
    """

    def __init__(self, block: Block, share: _Share, scale: float):
        super().__init__(block, reducer=Matrices.reduce)
        self.share, self.scale = share, scale
        self.active = self.leads = False

    def wire(self, patch: Patch) -> None:
        if self.block.branches[0].feeds:
            patch.around(self.block.norm, self.shorten, Claim.TOKENS)
            patch.around(self.block.attn, self.turned, Claim.TOKENS)
            patch.around(self.block.branches[0].module, self.lengthen, Claim.TOKENS)
        else:
            patch.around(self.block.attn, self.around, Claim.TOKENS)

    def plan(self, call: Call) -> Matrices | None:
        return self.matrices(call.x.narrow(1, call.start(self.tokens), self.tokens))

    def matrices(self, x: Tensor) -> Matrices | None:
        """From the tokens x (B, N, C) that enter the attention."""
        if not self.active:
            return None
        if self.leads:
            self.share.compute(joined(x) if self.block.rotary else x, self.scale)
        return self.share.matrices()

    def shorten(self, forward, x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        out, gate = forward(x, *args, **kwargs)
        image, rest = self.block.parted(out, self.tokens, 1)
        plan = self.matrices(image)
        return (out if plan is None else self.block.joined(plan.reduce(image), rest, 1)), gate

    def turned(self, forward, *args, **kwargs) -> Tensor:
        if self.active:
            call, owner = self.block.call(args, kwargs), self.share.matrices().owner
            return forward(**call.turned(self.tokens, owner[0]))
        return forward(*args, **kwargs)

    def lengthen(self, forward, x: Tensor) -> Tensor:
        out = forward(x)
        if not self.active:
            return out
        plan = self.share.matrices()
        image, rest = self.block.parted(out, plan.owner.shape[1], 1)
        return self.block.joined(plan.restore(image), rest, 1)


def _stage(denoiser: Denoiser, block: Block) -> int:
    """The stage of a UNet that holds the block: blocks before and after the middle are of different kinds. 0 elsewhere."""
    holds = [any(part is block.module for part in stage.module.modules()) for stage in denoiser.unet]
    return holds.index(True) if holds else 0


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Merge around the self-attention of every block whose grid is at most `config.max_downsample` times coarser.

    Args:
        target: a diffusers pipeline, or its UNet or transformer.

    Raises:
        ValueError: no such block, `skip` leaves none, or already applied; when it runs, a grid that no region divides.
    """
    patch = Patch(target, "toma")
    if config.ratio == 0:
        return patch
    denoiser = patch.denoiser
    usable = denoiser.blocks_at(config.max_downsample)
    kinds = [list(run)[config.skip:] for _, run in groupby(usable, key=lambda b: (b.stream, _stage(denoiser, b)))]
    kinds = patch.require(filter(None, kinds), f"self-attention at a downsampling of {config.max_downsample} or less "
                                               f"after the first {config.skip} blocks of a kind")
    shares = [_Share(blocks, patch.slot(), patch.slot()) for blocks in kinds]
    merges = [[_Merge(block, share, config.scale) for block in share.blocks] for share in shares]
    for merge in sum(merges, []):
        merge.wire(patch)

    def prepare(context: StepContext) -> None:
        active = context.i % config.every == 0
        for share, members in zip(shares, merges, strict=True):
            reached = [merge for merge in members if patch.reaches(merge.block.attn)]
            frames, height, width = context.grid(share.blocks[0])
            places = regions(frames, height, width, config.region, config.side)
            tokens = places.numel()
            share.k = max(1, (tokens - int(tokens * config.ratio)) // len(places))
            share.places = places.to(context.sample.device)
            share.back = places.flatten().argsort().to(context.sample.device)
            if reached and active:
                share.due(context.i, context.branch, config.select_every, config.weigh_every)
            for merge in members:
                merge.tokens, merge.active = tokens, active and merge in reached
                merge.leads = share.weigh and merge in reached[:1]
            patch.counts["merged"] += active * len(reached)
            patch.tally(active * len(reached) * (tokens - share.k * len(places)), len(reached) * tokens)

    patch.each_call(prepare)
    return patch.on()
