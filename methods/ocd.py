"""OCD - Object-Centric Diffusion for Efficient Video Editing

Kumara Kahatapitiya, Adil Karjauv, Davide Abati, Fatih Porikli, Yuki M. Asano, Amirhossein Habibian, ECCV 2024.
arXiv:2401.05735

Idea: in an edited video the object matters more than its background. While the noise is high, the object is sampled in a
crop of its own, step by step, and the background in steps several times as long; then both are finished together. In the
attention, keys and values are merged, and what is merged comes from the background first.

Map
    object-centric sampling   crop in every step, whole frame in each phi-th      apply
    high-noise phase          the first (1 - gamma) N steps                       apply
    recombination             the crop's noise in the mask, the frame's outside   methods._core.crop.Crop
    object-centric merging    similarity of foreground sources times eta          weighted
    merging                   keys and values only, every query keeps its output  _Merge

Departures
    A reconstruction: no code was released, and eta, gamma, phi, the merge ratio and the cell size are not published. Those
    in Config are ours, and so is the multiplicative form of the weighting.
    The mask, made by a detector in the paper, is given: a box in relative coordinates, or a mask of the latent.
    A background step of phi grid steps holds the model's output for phi steps, with no second latent. For first-order
    solvers that is the same as one step of that length where the output is a noise, a clean image or the velocity of a flow
    (DDIM, flow-matching Euler). A velocity under DDIM (v_prediction) turns with the latent, so there it is only near that;
    multistep solvers take each held output for a new one, and ancestral ones add noise in between.
    Cosines are moved to [0, 1] before they are weighted, else a negative one would gain by it.
    The normalisation after recombination is left out: what it matches is not known. So is the floor on the tokens of
    coarse stages below which nothing is merged: its value is not known.
    Keys are averaged after norm and rotation. Destinations are drawn once for a video, anew for each frame.
    The inflated and 3D UNets of the paper's editors are not known here (TypeError). A UNet over images has one grid, on
    which a mask of several frames becomes their union.
    The crop's tokens keep the positions of the frame. Residuals of ControlNet and adapters are cropped with the latent.
    Pairing stored in an inversion and used again in the edit is left to the editor: the draw is the same for both.

Example
    >>> import methods
    >>> from methods import ocd
    >>> pipe = methods.tiny("dit")
    >>> with ocd.apply(pipe, ocd.Config(box=(0.25, 0.25, 0.75, 0.75))) as patch:
    ...     images = pipe([3], num_inference_steps=8, output_type="np").images
    >>> patch.report()["crops"], patch.report()["frames"]
    (6, 4)
"""
from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel_kernels.cosine_match import cosine_match
from methods._core.attention import of_mask
from methods._core.context import Rewrite, StepContext
from methods._core.crop import Crop
from methods._core.denoiser import Block
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim
from methods._core.tokens import Plan, merge_plan, partition, reduction

__all__ = ["ELSEWHERE", "OFF", "Config", "apply", "foreground", "weighted"]


@dataclass(frozen=True, kw_only=True, eq=False)             # two masks have no single truth value
class Config:
    box: tuple[float, float, float, float] = (0.25, 0.25, 0.75, 0.75)   # the object: top, left, bottom, right of the frame
    mask: Tensor | None = None  # (frames, height, width), above 0.5 where the object is; in place of the box
    phi: int = 4                # steps of the grid in one background step (not published; ours)
    gamma: float = 0.25         # share of the steps, the last, that are taken together (not published; ours)
    ratio: float = 0.5          # r / N of keys and values merged away (not published; ours)
    eta: float = 0.5            # weight of the similarity of foreground sources (not published; ours)
    stride: int = 2             # side of a destination cell (not published; ours)
    seed: int = 0               # of the random destinations

    def __post_init__(self):
        top, left, bottom, right = self.box
        if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
            raise ValueError(f"box={self.box} must be top < bottom and left < right in [0, 1]")
        if self.mask is not None and self.mask.ndim != 3:
            raise ValueError(f"mask has shape {tuple(self.mask.shape)}, must be (frames, height, width)")
        for name in ("phi", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("gamma", "ratio", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} outside [0, 1]")


ELSEWHERE = ({"phi": 1},)               # where a model cannot be called on a part of the frame
OFF = Config(phi=1, ratio=0.0)
KEY = 1 / 8                     # of what a token costs in a block, about what a merged key saves of it


def foreground(config: Config, frames: int, height: int, width: int) -> Tensor:
    """The object on a grid: bool (frames, height, width), true where any of it falls into the cell."""
    if config.mask is None:
        top, left, bottom, right = config.box
        rows, columns = torch.arange(height), torch.arange(width)
        inside = ((rows + 1 > top * height) & (rows < bottom * height))[:, None] & (
            (columns + 1 > left * width) & (columns < right * width))
        return inside.expand(frames, -1, -1)
    return F.adaptive_max_pool3d(config.mask[None].float(), (frames, height, width))[0] > 0.5


def weighted(cosine: Tensor, fore: Tensor, eta: float) -> Tensor:
    """Similarity moved to [0, 1] and, for foreground sources, times eta. cosine (B, S), fore (S,) bool -> (B, S)."""
    return (1 + cosine) / 2 * torch.where(fore, eta, 1.0)


class _Merge:
    """One self-attention with merged keys and values. The host sets `cut`: sources, destinations, which sources are foreground,
    and how many merge, or None."""

    def __init__(self, block: Block, eta: float):
        self.block, self.eta = block, eta
        self.cut: tuple[Tensor, Tensor, Tensor, int] | None = None
        self.plan: Plan | None = None

    def wire(self, patch: Patch) -> None:
        patch.around(self.block.attn, self.match, Claim.INSIDE)
        patch.attend(self.block.attn, self.attend)

    def match(self, forward, *args, **kwargs) -> Tensor | tuple[Tensor, Tensor]:
        self.plan = None
        if self.cut is not None:
            call, (src, dst, fore, r) = self.block.call(args, kwargs), self.cut
            tokens = len(src) + len(dst)
            cosine, into = cosine_match(call.x.narrow(1, call.start(tokens), tokens), src, dst)
            self.plan = merge_plan(weighted(cosine, fore, self.eta), into, src, dst, r)
        return forward(*args, **kwargs)

    def attend(self, product, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more) -> Tensor:
        if self.plan is None:
            return product(q, k, v, attn_mask=attn_mask, **more)
        plan, self.plan = self.plan, None
        attn_mask = of_mask(self.block, attn_mask, plan.segments.source.shape[1], plan.owner[:, None], -1)

        def short(x: Tensor) -> Tensor:
            image, text = self.block.parted(x, plan.segments.source.shape[1])
            rows = plan.reduce(image.transpose(1, 2).flatten(2))
            return self.block.joined(rows.unflatten(2, (x.shape[1], -1)).transpose(1, 2), text)

        return product(q, short(k), short(v), attn_mask=attn_mask, **more)


def _partition(grid: tuple[int, int, int], fore: Tensor, config: Config,
               device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Sources, destinations, which sources are foreground (`fore`, on the grid), and how many sources merge."""
    src, dst = partition(grid, config.stride, torch.Generator().manual_seed(config.seed), torch.device("cpu"))
    r = reduction(len(src) + len(dst), len(dst), config.ratio)
    return src.to(device), dst.to(device), fore.flatten()[src].to(device), r


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Sample the object in a crop and the background in longer steps; merge keys and values, background first.

    Args:
        target: a diffusers pipeline; with `phi=1` also a bare model.

    Raises:
        ValueError: a bare model (the phases need the number of steps), another crop or reduction, or already applied.
    """
    patch = Patch(target, "ocd")
    if config.phi == 1 and config.ratio == 0:
        return patch
    patch.require_unperturbed()
    denoiser = patch.denoiser
    if config.phi > 1:
        patch.require_pipeline()
        crop, frame = Crop(patch), patch.slot()
    merges = [_Merge(block, config.eta) for block in denoiser.blocks if not block.temporal]
    for merge in merges if config.ratio else ():
        merge.wire(patch)

    wholes: list[tuple[int, int, int]] = []                     # grids of the frame whose crop is called

    def sample(context: StepContext) -> Rewrite | None:
        """Object-centric sampling: the crop in every step of the high-noise phase, the whole frame in each phi-th."""
        if context.i >= int(round((1 - config.gamma) * context.steps, 9)):
            return None
        x, axis = context.sample, denoiser.row.grid.frames
        wholes[:] = [context.grid(merge.block) for merge in merges]
        height, width = x.shape[-2:] if x.ndim > 3 else wholes[0][1:]
        inside = foreground(config, 1 if axis is None else x.shape[axis], height, width)
        if not crop.place(context, inside.any(0)):
            return None
        mask = crop.window(inside)
        mask = (mask[:, None] if axis == 1 else mask).to(x.device)
        due = context.i % config.phi == 0 or frame.value is None
        part = context.replace(crop.inputs(context), branch="crop")
        left = (1 - due - crop.area) * sum(map(prod, wholes))
        patch.tally(left, left)
        patch.counts["crops"] += 1
        if not due:
            return Rewrite((part,), lambda out: crop.paste(out, frame.get(), mask))
        whole = context.replace({}, branch="frame")
        return Rewrite((whole, part), lambda out, inner: crop.paste(inner, frame.keep(out), mask))

    def place(context: StepContext) -> None:
        cropped = "crop" in context.branch
        patch.counts["frames"] += not cropped
        for number, merge in enumerate(merges):
            grid, merge.cut = context.grid(merge.block), None
            if config.ratio and min(grid[1:]) >= config.stride:                           # else no cell fits
                fore = foreground(config, *(wholes[number] if cropped else grid))
                merge.cut = _partition(grid, crop.window(fore) if cropped else fore, config, context.sample.device)
            if patch.reaches(merge.block.attn):
                r = merge.cut[3] if merge.cut else 0
                patch.counts["merged"] += r > 0
                patch.tally(r * KEY, prod(grid))

    if config.phi > 1:
        patch.rewrite(sample, Claim.CROP)
    patch.each_call(place)
    patch.explain(lambda: "the object fills the frame and its grids hold no cell, or the run is too short" if config.ratio else
                  "the object fills the frame")
    return patch.on()
