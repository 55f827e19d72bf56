"""Highlight Diffusion - Highlight Diffusion: Training-Free Attention Guided Acceleration for Text-to-Image Models

Kyuseok Nam, Yulhwa Kim, Jeongwoo Park, Withdrawn from ICLR 2025. OpenReview:Jt1gGIumJo

Idea: the words of a prompt point at regions of the image. A full step computes everything, reads from its cross-attention
which region the words hold on to, and keeps its noise. The partial steps after it compute that region only; everywhere else
the kept noise is used again. A list says how many partial steps follow each full one.

Map
    full step        noise kept, cross-attention maps read                    _Sampler, _Reader
    content words    the prompt's tokens but those the tokenizer calls special   _Words
    highlight        maps of the words, joined, scaled, cut, widened          highlight
    partial step     the region's box through the network, noise composed     _Sampler
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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods._core.attention import cross_map
from methods._core.context import StepContext
from methods._core.denoiser import Block, describe
from methods._core.patch import TOKENS, Feature, Patch

__all__ = ["OFF", "Config", "apply", "full_steps", "highlight"]


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
    text encoder has read since the last run. None where neither is known."""

    def __init__(self, patch: Patch, places: tuple[int, ...]):
        self.places, self.read, self.mask = places, [], None
        encoder, tokenizer = (getattr(patch.pipe, name, None) for name in ("text_encoder", "tokenizer"))
        if not places and encoder is not None and tokenizer is not None:
            self.special = torch.tensor(tokenizer.all_special_ids)
            patch.around(encoder, self.around)

    def around(self, forward, input_ids: Tensor, *args, **kwargs):
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
    """Forms the map (B, N, T) of one cross-attention on full steps."""

    def __init__(self, block: Block, feature: Feature):
        self.block, self.map = block, feature
        self.on = False

    def around(self, forward, x: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        if self.on:
            self.map.value = cross_map(self.block.cross, x, encoder_hidden_states, attention_mask)
        return forward(x, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **kwargs)


class _Sampler:
    """Around the model. The host sets `box`, rows and columns of the latent to compute (None: all of it), and `mask`.

    `step` is the side of a patch of a transformer, in cells of the latent.
    """

    def __init__(self, patch: Patch, noise: Feature, step: int):
        self.run, self.noise, self.step = patch.run, noise, step
        self.box: tuple[slice, slice] | None = None
        self.mask: Tensor | None = None

    def around(self, forward, *args, **kwargs):
        if self.box is None:
            result = forward(*args, **kwargs)
            self.noise.value = result[0]
            return result
        inputs = self.run.inputs(args, kwargs)
        name = "sample" if "sample" in inputs else "hidden_states"
        self.whole = inputs[name]
        result = forward(**inputs | {name: self.whole[..., self.box[0], self.box[1]]})
        self.whole = None
        out = self.noise.value.clone()
        kept = out[..., self.box[0], self.box[1]]
        out[..., self.box[0], self.box[1]] = torch.where(self.mask[:, None], result[0], kept)
        if isinstance(result, tuple):
            return out, *result[1:]
        result.sample = out
        return result

    def embed(self, forward, latent: Tensor) -> Tensor:
        """Around the patch embedding of a transformer, which would stretch its positions over the box."""
        if self.box is None:
            return forward(latent)
        grid = [side // self.step for side in self.whole.shape[-2:]]
        rows, columns = (slice(edge.start // self.step, edge.stop // self.step) for edge in self.box)
        return forward(self.whole).unflatten(1, grid)[:, rows, columns].flatten(1, 2)


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
    step = denoiser.model.config.patch_size if not denoiser.unet else 2 ** max(
        stage.number for stage in denoiser.unet if stage.side == "down")
    sampler, words = _Sampler(patch, patch.feature(), step), _Words(patch, config.words)
    masks = patch.feature()
    patch.around(patch.model, sampler.around, closed=True)
    if not denoiser.unet:
        patch.around(patch.model.pos_embed, sampler.embed)
    own = {id(reader.block.cross) for reader in readers}
    for reader in readers:
        patch.around(reader.block.cross, reader.around, closed=True)
    patch.guard(module for module in denoiser.parts if id(module) not in own)            # they run at two sizes

    def read(context: StepContext) -> None:
        """The mask (B, height, width) of the full step before, from the maps it left."""
        height, width = denoiser.grid(context.inputs, readers[0].block)[1:]
        maps = torch.stack([reader.map.value for reader in readers]).mean(0).mT.unflatten(2, (height, width))
        for reader in readers:
            reader.map.value = None
        size = tuple(context.sample.shape[-2:])
        if context.guided:
            maps = maps.chunk(2)[0 if denoiser.cond_first else 1]
        which = words.of(maps)
        if which is not None:
            mask = highlight(maps, which, size, config.threshold, config.widen)
            masks.value = mask.repeat(1 + context.guided, 1, 1)

    def decide(context: StepContext) -> None:
        if context.i == context.branch == 0:
            words.begin(context)
        due = context.fresh or sampler.noise.value is None or context.i in full_steps(context.steps, config.partial)
        if not due and readers[0].map.value is not None:
            read(context)
        sampler.box = None if due or masks.value is None else _box(masks.value, step, config)
        if sampler.box is not None:
            sampler.mask = masks.value[:, sampler.box[0], sampler.box[1]]
            patch.counts["partial"] += 1                     # full ones are not counted: a run of them alone is an idle one
        for reader in readers:
            reader.on = sampler.box is None

    patch.each_call(decide)
    return patch


def _box(mask: Tensor, step: int, config: Config) -> tuple[slice, slice] | None:
    """The box around all masks with its margin, on multiples of `step`; None if empty or too large."""
    edges = []
    for line in (mask.any(0).any(1), mask.any(0).any(0)):
        found = line.nonzero()[:, 0].tolist()
        if not found:
            return None
        first, last = max(0, found[0] - config.margin), min(len(line), found[-1] + 1 + config.margin)
        edges.append(slice(first // step * step, min(len(line), math.ceil(last / step) * step)))
    area = math.prod(edge.stop - edge.start for edge in edges) / mask[0].numel()
    return None if area > config.largest else tuple(edges)
