"""Highlight Diffusion - Highlight Diffusion: Training-Free Attention Guided Acceleration for Text-to-Image Models

Kyuseok Nam, Yulhwa Kim, Jeongwoo Park, Withdrawn from ICLR 2025. OpenReview:Jt1gGIumJo

Idea: the words of a prompt point at regions of the image. A full step computes everything, reads from its cross-attention
which region the words hold on to, and keeps its noise. The partial steps after it compute that region only; everywhere else
the kept noise is used again. A list says how many partial steps follow each full one.

Map
    full step        noise kept, cross-attention maps read                    _Reader, apply
    content words    the prompt's tokens but those the tokenizer calls special   _Words
    highlight        maps of the words, joined, scaled, cut, widened          highlight
    partial step     the region's box through the network, noise composed     methods._core.crop.Crop, apply
    schedule         partial steps between full ones, by phase of sampling    full_steps

Departures
    A reinterpretation, not a reproduction: the submission was withdrawn, its code is not public, and layers, threshold,
    refinement and list are not known. All of them are ours and stand in Config.
    Maps of the blocks at `level` are averaged over heads and layers, summed over the words, scaled to [0, 1], cut at
    `threshold`, and widened by `widen` cells of the latent.
    Words are known where the pipeline's text encoder reads the prompt, which comes before the negative one; where embeddings
    are given instead, their places must be given in `words`. A prompt without words makes all steps full.
    One box serves all prompts of a batch, so that they stay one batch; inside it each prompt has its own mask. Both guidance
    branches use the mask of the conditional one. Where a model calls its branches apart, each reads its own.
    The region runs through the network as a crop with a margin. Its statistics and its context are those of the crop; the
    positions of its tokens are those they have in the whole image.
    A box that covers more than `largest` of the image, or no highlight at all, makes the step a full one: an empty mask could
    also be taken to mean that nothing is computed and the kept noise is used everywhere.

Example
    >>> from methods import highlight_diffusion
    >>> highlight_diffusion.full_steps(10, (1, 3))
    [0, 2, 4, 6]
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods._core.attention import mean_map
from methods._core.cache import Slot
from methods._core.context import Rewrite, StepContext, within
from methods._core.crop import Crop
from methods._core.denoiser import Block
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["OFF", "TINY", "Config", "apply", "full_steps", "highlight"]


@dataclass(frozen=True, kw_only=True)
class Config:
    partial: tuple[int, ...] = (2,)   # [N]: partial steps behind each full one, one number for each phase (ours)
    level: int = 1                    # downsampling level of the maps, or the coarsest below it that has any (ours); 16 x 16
                                      # is level 1 of a latent of 32 x 32, level 2 of one of 64 x 64
    threshold: float = 0.4            # of the scaled map (ours)
    widen: int = 1                    # cells of the latent by which the mask grows (ours)
    margin: int = 2                   # cells of the latent around the mask that are computed with it (ours)
    largest: float = 0.8              # share of the image above which a step is full (ours)
    words: tuple[int, ...] = ()       # places of the words among the tokens, the same for all prompts; (): the tokenizer's

    def __post_init__(self):
        if not self.partial or min(self.partial) < 0:
            raise ValueError(f"partial={self.partial} must be numbers of at least 0")
        for name in ("level", "widen", "margin"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if min(self.words, default=0) < 0:
            raise ValueError(f"words={self.words} must not be negative")
        for name in ("threshold", "largest"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} outside [0, 1]")


OFF = Config(partial=(0,))
TINY = Config(threshold=0.8, widen=0, margin=0, words=(4,))      # what highlights something on random weights


def full_steps(steps: int, partial: Sequence[int]) -> list[int]:
    """The full steps of a run, which is cut into as many phases of equal length as `partial` has numbers."""
    full, i = [], 0
    while i < steps:
        full.append(i)
        i += 1 + partial[i * len(partial) // steps]
    return full


def highlight(maps: Tensor, words: Tensor, size: tuple[int, int], threshold: float, widen: int) -> Tensor:
    """Which cells of the latent the words hold on to.

    maps (B, T, h, w): attention of every place to every token, mean over heads and layers; words (B, T): which tokens are
    words -> bool (B, height, width) for `size`.
    """
    held = (maps * words[:, :, None, None]).sum(1, keepdim=True).float()
    low, high = held.amin((1, 2, 3), keepdim=True), held.amax((1, 2, 3), keepdim=True)
    scaled = F.interpolate((held - low) / (high - low).clamp_min(1e-12), size, mode="bilinear")
    mask = (scaled > threshold) & (high > low)
    return F.max_pool2d(mask.float(), 2 * widen + 1, 1, widen)[:, 0] > 0


class _Words:
    """Which tokens (prompts, T) of the prompts are words: those given in `places`, or those of the texts that the pipeline's
    text encoder has read within this call of it. None where neither is known."""

    def __init__(self, patch: Patch, places: tuple[int, ...]):
        self.places, self.read, self.mask, self.pipe = places, [], None, patch.pipe
        encoder, tokenizer = (getattr(patch.pipe, name, None) for name in ("text_encoder", "tokenizer"))
        if not places and encoder is not None and tokenizer is not None:
            self.special = torch.tensor(tokenizer.all_special_ids)
            patch.around(encoder, self.around, Claim.LOOK)

    def around(self, forward, input_ids: Tensor, *args, **kwargs):
        if within(self.pipe):                                # a text encoded beforehand may be of any image, or of none
            self.read.append(~torch.isin(input_ids, self.special.to(input_ids.device)))
        return forward(input_ids, *args, **kwargs)

    def begin(self, context: StepContext) -> None:
        """At the first call of a run: its prompt was the last text read or, with guidance, the one before the last."""
        last = 1 + context.guided
        self.mask = self.read[-last] if len(self.read) >= last else None
        self.read = []

    def of(self, maps: Tensor) -> Tensor | None:
        """Words (B, T) for maps (B, T, h, w), in which each prompt is repeated for its images; None if any has none."""
        if self.places:
            mask = torch.zeros(maps.shape[:2], dtype=torch.bool, device=maps.device)
            mask[:, list(self.places)] = True
            return mask
        if self.mask is None or len(maps) % len(self.mask) or not self.mask.any(1).all():
            return None
        return self.mask.to(maps.device).repeat_interleave(len(maps) // len(self.mask), 0)


class _Reader:
    """Forms the map (B, N, T) of one cross-attention on full steps. The host sets `on`."""

    def __init__(self, block: Block, slot: Slot):
        self.block, self.map = block, slot
        self.on = False

    def attend(self, product, q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
        if self.on:
            self.map.value = mean_map(q, k, **more)
        return product(q, k, v, **more)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Compute only the highlighted region between full steps.

    Args:
        target: a diffusers pipeline over a text-to-image model with cross-attention (a UNet or PixArt).

    Raises:
        ValueError: no cross-attention over one image, a bare model, another crop, or already applied.
    """
    patch = Patch(target, "highlight_diffusion")
    if not any(config.partial):
        return patch
    patch.require_pipeline()
    denoiser = patch.denoiser
    able = [b for b in denoiser.blocks if b.cross is not None] if denoiser.row.grid.frames is None else []
    blocks = patch.require(able, "cross-attention between one image and its text")
    level = max((b.level for b in blocks if b.level <= config.level), default=min(b.level for b in blocks))
    readers = [_Reader(block, patch.slot()) for block in blocks if block.level == level]
    crop, words, noise, masks = Crop(patch), _Words(patch, config.words), patch.slot(), patch.slot()
    for reader in readers:
        patch.attend(reader.block.cross, reader.attend)

    def read(context: StepContext) -> None:
        """The mask (B, height, width) of the full step before, from the maps it left."""
        grid = context.grid(readers[0].block)[1:]
        maps = torch.stack([reader.map.value for reader in readers]).mean(0).mT.unflatten(2, grid)
        for reader in readers:
            reader.map.value = None
        maps = context.rows.take(maps, "cond")
        which = words.of(maps)
        if which is not None:
            mask = highlight(maps, which, tuple(context.sample.shape[-2:]), config.threshold, config.widen)
            masks.value = mask.repeat(len(context.rows.parts), 1, 1)

    def sample(context: StepContext) -> Rewrite | None:
        """Partial step: the box around what is highlighted, into the noise of the step before."""
        if context.i == context.call == 0:
            words.begin(context)
        due = noise.value is None or context.i in full_steps(context.steps, config.partial)
        places = prod(context.grid(readers[0].block))          # another method may have asked for a few rows
        if not due and all(each.map.value is not None and each.map.value.shape[1] == places for each in readers):
            read(context)
        due = due or masks.value is None or not crop.place(context, masks.value.any(0), config.margin)
        if due or crop.area > config.largest:
            patch.tally(0, 1)
            return Rewrite((context,), noise.keep)
        patch.counts["partial"] += 1
        patch.tally(1 - crop.area, 1)
        mask = crop.window(masks.value)[:, None]
        part = context.replace(crop.inputs(context), branch="crop")
        return Rewrite((part,), lambda out: crop.paste(out, noise.get(), mask))

    def decide(context: StepContext) -> None:
        for reader in readers:
            reader.on = "crop" not in context.branch

    patch.rewrite(sample, Claim.CROP)
    patch.each_call(decide)
    patch.explain(lambda: "no region smaller than the image was highlighted: no words are known, no map has a peak above "
                          f"threshold={config.threshold}, its box is over largest={config.largest}, or the run is too short")
    return patch.on()
