"""Highlight Diffusion - Highlight Diffusion: Training-Free Attention Guided Acceleration for Text-to-Image Models

Kyuseok Nam, Yulhwa Kim, Jeongwoo Park, OpenReview 2024. OpenReview:Jt1gGIumJo

Idea: the words of a prompt point at regions of the image. A full step computes everything, reads from its cross-attention
which region the words hold on to, and keeps its noise. The partial steps after it compute that region only; everywhere else
the kept noise is used again. A list says how many partial steps follow each full one.

Map
    full step        noise kept, cross-attention maps read                    _Sampler, _Reader
    highlight        maps of the words, joined, scaled, cut, widened          highlight
    partial step     the region's box through the network, noise composed     _Sampler
    schedule         partial steps between full ones, by phase of sampling    full_steps

Departures
    A reinterpretation, not a reproduction: the submission was withdrawn, its code is not public, and layers, threshold,
    refinement and list are not known. All of them are ours and stand in Config.
    Maps of the blocks at `level` are averaged over heads and layers, summed over the words without the first token, which
    holds what belongs to no word, scaled to [0, 1], cut at `threshold`, and widened by `widen` cells of the latent.
    One box serves all prompts of a batch, so that they stay one batch; inside it each prompt has its own mask. Both guidance
    branches use the mask of the conditional one. Where a model calls its branches apart, each reads its own.
    The region runs through the UNet as a crop with a margin. Its statistics and its context are those of the crop.
    A box that covers more than `largest` of the image, or no highlight at all, makes the step a full one.

Example
    >>> from methods import highlight_diffusion
    >>> highlight_diffusion.full_steps(10, (1, 3))
    [0, 2, 4, 6]
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods._core.attention import cross_map
from methods._core.context import StepContext
from methods._core.denoiser import Block, Denoiser, describe
from methods._core.patch import TOKENS, Feature, Patch

__all__ = ["OFF", "Config", "apply", "full_steps", "highlight"]


@dataclass(frozen=True, kw_only=True)
class Config:
    partial: tuple[int, ...] = (2,)   # [N]: partial steps behind each full one, one number for each phase (ours)
    level: int = 1                    # downsampling level of the maps, or the coarsest below it that has any (ours)
    threshold: float = 0.4            # of the scaled map (ours)
    widen: int = 1                    # cells of the latent by which the mask grows (ours)
    margin: int = 2                   # cells of the latent around the mask that are computed with it (ours)
    largest: float = 0.8              # share of the image above which a step is full (ours)

    def __post_init__(self):
        if not self.partial or min(self.partial) < 0:
            raise ValueError(f"partial={self.partial} must be numbers of at least 0")
        for name in ("level", "widen", "margin"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("threshold", "largest"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} outside [0, 1]")


OFF = Config(partial=(0,))


def full_steps(steps: int, partial: Sequence[int]) -> list[int]:
    """The full steps of a run, which is cut into as many phases of equal length as `partial` has numbers."""
    full, i = [], 0
    while i < steps:
        full.append(i)
        i += 1 + partial[i * len(partial) // steps]
    return full


def highlight(maps: Tensor, size: tuple[int, int], threshold: float, widen: int) -> Tensor:
    """Which cells of the latent the words hold on to.

    maps (B, T, h, w): attention of every place to every token, mean over heads and layers; the first token stands for no
    word -> bool (B, height, width) for `size`.
    """
    words = maps[:, 1:].sum(1, keepdim=True).float()
    low, high = words.amin((1, 2, 3), keepdim=True), words.amax((1, 2, 3), keepdim=True)
    scaled = F.interpolate((words - low) / (high - low).clamp_min(1e-12), size, mode="bilinear")
    mask = (scaled > threshold) & (high > low)
    return F.max_pool2d(mask.float(), 2 * widen + 1, 1, widen)[:, 0] > 0


class _Reader:
    """Forms the map (B, N, T) of one cross-attention on full steps."""

    def __init__(self, block: Block, feature: Feature):
        self.block, self.map = block, feature
        self.on = False

    def around(self, forward, x: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        if self.on:
            self.map.value = cross_map(self.block.cross, x, encoder_hidden_states, attention_mask)
        return forward(x, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **kwargs)


class _Sampler:
    """Around the model. The host sets `box`, rows and columns of the latent to compute (None: all of it), and `mask`."""

    def __init__(self, patch: Patch, noise: Feature):
        self.run, self.noise = patch.run, noise
        self.box: tuple[slice, slice] | None = None
        self.mask: Tensor | None = None

    def around(self, forward, *args, **kwargs):
        if self.box is None:
            result = forward(*args, **kwargs)
            self.noise.value = result[0]
            return result
        inputs = self.run.inputs(args, kwargs)
        name = "sample" if "sample" in inputs else "hidden_states"
        result = forward(**inputs | {name: inputs[name][..., self.box[0], self.box[1]]})
        out = self.noise.value.clone()
        kept = out[..., self.box[0], self.box[1]]
        out[..., self.box[0], self.box[1]] = torch.where(self.mask[:, None], result[0], kept)
        if isinstance(result, tuple):
            return out, *result[1:]
        result.sample = out
        return result


def apply(target: Any, config: Config = Config()) -> Patch:
    """Compute only the highlighted region between full steps.

    Args:
        target: a diffusers pipeline over a text-to-image model with cross-attention (a UNet or PixArt).

    Raises:
        ValueError: no cross-attention over one image, a bare model, another patch inside the model, or already applied.
    """
    patch = Patch(target, "highlight_diffusion", depth=TOKENS)
    if not any(config.partial):
        return patch
    patch.require_pipeline()
    denoiser = describe(patch.model)
    able = [b for b in denoiser.blocks if b.cross is not None] if not any(b.temporal for b in denoiser.blocks) else []
    blocks = patch.require(able, "cross-attention between one image and its text")
    level = max((b.level for b in blocks if b.level <= config.level), default=min(b.level for b in blocks))
    readers = [_Reader(block, patch.feature()) for block in blocks if block.level == level]
    sampler = _Sampler(patch, patch.feature())
    masks = patch.feature()
    patch.around(patch.model, sampler.around, opaque=True)
    own = {id(reader.block.cross) for reader in readers}
    for reader in readers:
        patch.around(reader.block.cross, reader.around, opaque=True)
    patch.guard(module for module in denoiser.parts if id(module) not in own)            # they run at two sizes

    def read(context: StepContext) -> None:
        """The mask (B, height, width) of the full step before, from the maps it left."""
        height, width = denoiser.grid(context.inputs, readers[0].block)[1:]
        maps = torch.stack([reader.map.value for reader in readers]).mean(0).mT.unflatten(2, (height, width))
        for reader in readers:
            reader.map.value = None
        size = tuple(context.sample.shape[-2:])
        if context.guided:
            half = len(maps) // 2
            maps = (maps[:half] if denoiser.cond_first else maps[half:]).repeat(2, 1, 1, 1)
        masks.value = highlight(maps, size, config.threshold, config.widen)

    def decide(context: StepContext) -> None:
        due = context.fresh or sampler.noise.value is None or context.i in full_steps(context.steps, config.partial)
        if not due and readers[0].map.value is not None:
            read(context)
        sampler.box = None if due or masks.value is None else _box(masks.value, denoiser, config)
        if sampler.box is not None:
            sampler.mask = masks.value[:, sampler.box[0], sampler.box[1]]
        for reader in readers:
            reader.on = sampler.box is None
        patch.counts["full" if sampler.box is None else "partial"] += 1

    patch.each_call(decide)
    return patch


def _box(mask: Tensor, denoiser: Denoiser, config: Config) -> tuple[slice, slice] | None:
    """The box around all masks with its margin, on multiples of what the model can take; None if empty or too large."""
    step = denoiser.model.config.patch_size if not denoiser.unet else 2 ** max(
        stage.number for stage in denoiser.unet if stage.side == "down")
    edges = []
    for line in (mask.any(0).any(1), mask.any(0).any(0)):
        found = line.nonzero()[:, 0].tolist()
        if not found:
            return None
        first, last = max(0, found[0] - config.margin), min(len(line), found[-1] + 1 + config.margin)
        edges.append(slice(first // step * step, min(len(line), math.ceil(last / step) * step)))
    area = math.prod(edge.stop - edge.start for edge in edges) / mask[0].numel()
    return None if area > config.largest else tuple(edges)
