"""OCD - Object-Centric Diffusion for Efficient Video Editing

Kumara Kahatapitiya, Adil Karjauv, Davide Abati, Fatih Porikli, Yuki M. Asano, Amirhossein Habibian, ECCV 2024.
arXiv:2401.05735

Idea: in an edited video the object matters more than its background. While the noise is high, the object is sampled in a
crop of its own, step by step, and the background in steps several times as long; then both are finished together. In the
attention, keys and values are merged, and what is merged comes from the background first.

Map
    object-centric sampling   crop in every step, whole frame in each phi-th      _Sampler
    high-noise phase          the first (1 - gamma) N steps                       apply
    recombination             the crop's noise in the mask, the frame's outside   _Sampler
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

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel_kernels.cosine_match import cosine_match
from methods._core.attention import leave, qkv
from methods._core.context import StepContext
from methods._core.denoiser import Block, Denoiser, describe
from methods._core.patch import TOKENS, Patch
from methods._core.tokens import merge_plan
from methods.tome import partition, reduction

__all__ = ["OFF", "Config", "apply", "foreground", "weighted"]


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


OFF = Config(phi=1, ratio=0.0)
RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals",
             "block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")


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
    """One self-attention with merged keys and values. The host fills in a partition for the whole frame and one for the crop;
    `part` says which is in use."""

    def __init__(self, block: Block, eta: float):
        self.block, self.eta = block, eta
        self.parts: dict[str, tuple[Tensor, Tensor, Tensor, int]] = {}         # src, dst, foreground sources, r
        self.part = "frame"

    def around(self, forward, hidden_states: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor, Tensor]:
        if self.part not in self.parts or not self.parts[self.part][3]:
            return forward(hidden_states, *args, **kwargs)
        src, dst, fore, r = self.parts[self.part]
        tokens = len(src) + len(dst)
        cosine, into = cosine_match(hidden_states[:, hidden_states.shape[1] - tokens:], src, dst)
        plan = merge_plan(weighted(cosine, fore, self.eta), into, src, dst, r)
        q, k, v = qkv(self.block.attn, hidden_states, *args, **kwargs)
        words = q.shape[2] - tokens

        def short(x: Tensor) -> Tensor:
            rows = plan.reduce(x[:, :, words:].transpose(1, 2).flatten(2))
            return torch.cat([x[:, :, :words], rows.unflatten(2, (x.shape[1], -1)).transpose(1, 2)], 2)

        out = F.scaled_dot_product_attention(q, short(k), short(v))
        return leave(self.block.attn, out, words if self.block.stream == "joint" else 0)


class _Sampler:
    """Around the model: the crop's noise inside the mask, and outside the noise of the whole frame, kept for phi steps.

    The host sets `crop`, rows and columns of the object (None: whole frame only), in cells of the latent or, where that is a
    sequence, of its `grid`; `inside`, where in the crop the object is; `tokens`, positions of the crop in the token grid; and
    `frame`, whether this call computes the whole frame.
    """

    def __init__(self, patch: Patch, merges: list[_Merge]):
        self.run, self.feature, self.merges = patch.run, patch.feature(), merges
        self.crop: tuple[slice, slice] | None = None
        self.grid: tuple[int, int] = (0, 0)
        self.inside = self.tokens = None
        self.frame = True

    def around(self, forward, *args, **kwargs):
        if self.crop is None:
            return forward(*args, **kwargs)
        inputs = self.run.inputs(args, kwargs)
        cut = self.cut(inputs)                                    # before the frame: a UNet empties its list of residuals
        if self.frame:
            self.feature.value = forward(**inputs)[0]
        for merge in self.merges:
            merge.part = "crop"
        result = forward(**cut)
        for merge in self.merges:
            merge.part = "frame"
        out, part = self.planes(self.feature.value, self.grid), self.planes(result[0], self.inside.shape[-2:])
        out = out.clone()
        out[..., self.crop[0], self.crop[1]] = torch.where(self.inside, part, out[..., self.crop[0], self.crop[1]])
        out = out if self.feature.value.ndim > 3 else out.flatten(2).mT
        if isinstance(result, tuple):
            return out, *result[1:]
        result.sample = out
        return result

    def embed(self, forward, *inputs: Tensor) -> Tensor:
        """Around the patch embedding, called with x or with text and x: the crop's tokens get their positions in the frame."""
        *text, x = inputs
        if self.crop is None or x.shape[-2:] == self.grid:
            return forward(*inputs)
        rows, columns = self.crop
        whole = F.pad(x, (columns.start, self.grid[1] - columns.stop, rows.start, self.grid[0] - rows.stop))
        out, words = forward(*text, whole), sum(each.shape[1] for each in text)
        return torch.cat([out[:, :words], out[:, words:][:, self.tokens]], 1)

    def window(self, x: Tensor) -> Tensor:
        """The crop of x (..., height, width), which may be coarser than the frame."""
        edges = zip(self.crop, x.shape[-2:], self.grid, strict=True)
        rows, columns = (slice(edge.start * n // size, edge.stop * n // size) for edge, n, size in edges)
        return x[..., rows, columns]

    def planes(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(..., height, width): a latent as it is, a sequence (B, N, C) laid out on its grid."""
        return x if x.ndim > 3 else x.mT.unflatten(2, size)

    def cut(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the model for the crop: latent, residuals, and positions where they are given from outside."""
        def part(x: Tensor) -> Tensor:
            return self.window(x) if x.ndim > 3 else x[:, self.tokens]

        name = "sample" if "sample" in inputs else "hidden_states"
        cut = {name: part(inputs[name])}
        for name in RESIDUALS:
            if (given := inputs.get(name)) is not None:
                cut[name] = part(given) if torch.is_tensor(given) else [part(each) for each in given]
        if inputs.get("img_ids") is not None:
            cut["img_ids"] = inputs["img_ids"][..., self.tokens, :]
        if inputs.get("image_rotary_emb") is not None:
            cut["image_rotary_emb"] = tuple(each[self.tokens.to(each.device)] for each in inputs["image_rotary_emb"])
        return inputs | cut


def apply(target: Any, config: Config = Config()) -> Patch:
    """Sample the object in a crop and the background in longer steps; merge keys and values, background first.

    Args:
        target: a diffusers pipeline; with `phi=1` also a bare model.

    Raises:
        ValueError: a bare model (the phases need the number of steps), another patch inside the model, or already applied.
    """
    patch = Patch(target, "ocd", depth=TOKENS)
    if config.phi == 1 and config.ratio == 0:
        return patch
    denoiser = describe(patch.model)
    merges = [_Merge(block, config.eta) for block in denoiser.blocks if not block.temporal]
    sampler = _Sampler(patch, merges)
    if config.phi > 1:
        patch.require_pipeline()
        patch.around(patch.model, sampler.around, closed=True)
        own = {id(merge.block.attn) for merge in merges}
        name = {"unet": None, "flux": None, "cogvideox": "patch_embed"}.get(denoiser.family, "pos_embed")
        if name:
            patch.around(getattr(patch.model, name), sampler.embed)
        patch.guard(module for module in denoiser.parts if id(module) not in own)        # they run at two sizes
    for merge in merges:
        patch.around(merge.block.attn, merge.around, closed=True)

    def decide(context: StepContext) -> None:
        noisy = config.phi > 1 and context.i < int(round((1 - config.gamma) * context.steps, 9))
        sampler.crop = None
        if noisy:
            _place(sampler, denoiser, config, context)
        sampler.frame = sampler.crop is None or context.i % config.phi == 0 or sampler.feature.value is None
        patch.counts["crops"] += sampler.crop is not None
        patch.counts["frames"] += sampler.frame
        inputs = {"frame": context.inputs} if sampler.frame else {}
        if sampler.crop is not None:
            inputs["crop"] = sampler.cut(context.inputs)
        for merge in merges:
            merge.part = "frame"
            fore = foreground(config, *denoiser.grid(context.inputs, merge.block))
            grids = {part: denoiser.grid(given, merge.block) for part, given in inputs.items()}
            merge.parts = {
                part: _partition(grid, fore if part == "frame" else sampler.window(fore), config, context.sample.device)
                for part, grid in grids.items() if min(grid[1:]) >= config.stride}               # else no cell fits
            patch.counts["merged"] += sum(part[3] > 0 for part in merge.parts.values())

    patch.each_call(decide)
    return patch


def _partition(grid: tuple[int, int, int], fore: Tensor, config: Config,
               device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Sources, destinations, which sources are foreground (`fore`, on the grid), and how many sources merge."""
    src, dst = partition(grid, config.stride, torch.Generator().manual_seed(config.seed), torch.device("cpu"))
    r = reduction(len(src) + len(dst), len(dst), config.ratio)
    return src.to(device), dst.to(device), fore.flatten()[src].to(device), r


def _place(sampler: _Sampler, denoiser: Denoiser, config: Config, context: StepContext) -> None:
    """The crop around the object, its sides on multiples of what the model can take; None if that is the whole frame."""
    x, block = context.sample, denoiser.blocks[0]
    frames, rows, columns = denoiser.grid(context.inputs, block)
    if x.ndim == 3:
        height, width, step, count = rows, columns, 1, 1
    else:
        height, width = x.shape[-2:]
        step = 2 ** max(s.number for s in denoiser.unet if s.side == "down") if denoiser.unet else height // rows
        axis = {"cogvideox": 1, "latte": 2}.get(denoiser.family)
        count = 1 if axis is None else x.shape[axis]
    inside = foreground(config, count, height, width)
    edges = []
    for line, size in ((inside.any(0).any(1), height), (inside.any(0).any(0), width)):
        found = line.nonzero()[:, 0]
        first, last = (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 1)
        edges.append(slice(first // step * step, min(size, math.ceil(last / step) * step)))
    if all(edge == slice(0, size) for edge, size in zip(edges, (height, width), strict=True)):
        return
    sampler.crop, sampler.grid = tuple(edges), (height, width)
    inside = sampler.window(inside)
    sampler.inside = (inside[:, None] if denoiser.family == "cogvideox" else inside).to(x.device)
    places = torch.arange(frames * rows * columns).view(frames, rows, columns)
    sampler.tokens = sampler.window(places).flatten().to(x.device)
