"""Streamlined Inference - Fast and Memory-Efficient Video Diffusion Using Streamlined Inference

Zheng Zhan et al., NeurIPS 2024. arXiv:2411.01171. Code: wuyushuwys/FMEDiffusion

Idea: what a video model holds at one time is mostly what its layers make on the way. Layers within frames take the frames
slice by slice, layers between frames the places, and all operators that can take the same slices do so together, so that only
the output of such a group is ever whole. Steps much like the one before take up a late feature of that step and leave out
what leads to it.

Map
    feature slicer      ceil(n / chunks) frames, or places, at a time              slices
    operator grouping   a whole block for one slice, then for the next             in_slices
    Step Rehash         which steps run whole                                      evenly, least_similar
    Step Rehash         the output of a late temporal block, given again           methods._core.cache.Reuse

Departures
    The official code slices the UNets of Stable Video Diffusion and AnimateDiff. Here the method is on video transformers. A
    group is one block: where temporal blocks stand beside spatial ones the tokens are laid out anew behind each. Under joint
    attention over space and time a block takes the samples slice by slice, the halves of guidance among them, and its MLP,
    for which all tokens are alike, slices of the tokens.
    Norms in such models are over channels, so that slices are exact. The official code slices temporal group norms along the
    width, which changes their statistics; its middle block for AnimateDiff leaves out the first half of the layers by a slip,
    and in a batch of two videos its mixer takes the wrong slices or fails. Slices are not pipelined.
    Step Rehash was not released: how steps are chosen is a reconstruction. A transformer has no skip connections around the
    blocks that are left out: a step that takes up the feature sees its time, not its latent. `full=1.0` is without it, and
    exact.
    The decoder is left as it is; pipelines have `enable_vae_slicing` for that.
    Whatever is computed for a whole batch inside a block has no place in its slices: methods that work there are refused.

Example
    >>> from methods import streamlined_inference
    >>> [part.stop - part.start for part in streamlined_inference.slices(14, 4)]
    [4, 4, 4, 2]
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods._core.cache import Reuse
from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["OFF", "Config", "apply", "evenly", "in_slices", "least_similar", "observe", "slices"]


@dataclass(frozen=True, kw_only=True)
class Config:
    temporal_chunks: int = 8                  # slices of the frames, in spatial blocks; 7 for SVD, 8 for AnimateDiff
    spatial_chunks: int = 16                  # slices of the places, in temporal blocks; 7 for SVD, 16 for AnimateDiff
    full: float | tuple[int, ...] = 13 / 25   # share of the steps that run whole, or their numbers from 0
    depth: float = 0.75                       # share of the blocks before the feature that is taken up; ours

    def __post_init__(self):
        for name in ("temporal_chunks", "spatial_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not isinstance(self.full, (int, float)):
            object.__setattr__(self, "full", tuple(self.full))
        elif not 0 < self.full <= 1:
            raise ValueError(f"full={self.full} must be above 0 and at most 1, or the numbers of steps")
        if not 0 < self.depth <= 1:
            raise ValueError(f"depth={self.depth} must be above 0 and at most 1")


OFF = Config(temporal_chunks=1, spatial_chunks=1, full=1.0)


def slices(n: int, chunks: int) -> list[slice]:
    """Feature slicer: n rows in slices of ceil(n / chunks)."""
    size = math.ceil(n / chunks)
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]


def in_slices(forward: Callable, chunks: int, axis: int, *args, **kwargs) -> Any:
    """Operator grouping: `forward` for one slice after the other, the tensors that it gives put together.

    Every tensor among the arguments that is as long on that axis as the first argument is sliced along.
    """
    n = (args[0] if args else kwargs["hidden_states"]).shape[axis]
    parts = slices(n, chunks)
    if len(parts) == 1:
        return forward(*args, **kwargs)

    def cut(value: Any, part: slice) -> Any:
        along = torch.is_tensor(value) and value.ndim > axis and value.shape[axis] == n
        return value.narrow(axis, part.start, part.stop - part.start) if along else value

    whole: list[Tensor] = []
    for part in parts:
        out = forward(*(cut(each, part) for each in args), **{name: cut(each, part) for name, each in kwargs.items()})
        outs = out if isinstance(out, tuple) else (out,)
        whole = whole or [each.new_empty(*each.shape[:axis], n, *each.shape[axis + 1:]) for each in outs]
        for each, piece in zip(whole, outs, strict=True):
            each.narrow(axis, part.start, part.stop - part.start).copy_(piece)
    return tuple(whole) if isinstance(out, tuple) else whole[0]


def evenly(steps: int, share: float) -> set[int]:
    """ceil(share * steps) steps that run whole, evenly spread, the first among them."""
    count = math.ceil(share * steps - 1e-9)
    return {-(-n * steps // count) for n in range(count)}


def least_similar(similarities: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` steps that run whole: the first, and those whose feature is least like that of the step before."""
    order = sorted(range(1, len(similarities) + 1), key=lambda i: similarities[i - 1])
    return tuple(sorted([0, *order[:count - 1]]))


class _Skipped:
    """A block before the feature that is taken up: in a step that takes it up, it gives what it was given."""

    def __init__(self, block: Block):
        self.block, self.skip = block, False

    def around(self, forward, *args, **kwargs):
        if self.skip:
            return self.block.output(*self.block.streams(args, kwargs))
        return forward(*args, **kwargs)


def _blocks(patch: Patch) -> tuple[list[Block], bool]:
    """Those of a video transformer, and whether some of them are temporal and the others spatial."""
    video = patch.denoiser.row.grid.frames is not None
    blocks = patch.require(patch.denoiser.chain if video else (), "blocks over the tokens of a video")
    return blocks, any(block.temporal for block in blocks)


def _late(blocks: Sequence[Block], apart: bool, depth: float) -> int:
    """Index of the last block that attends between frames among the first share `depth` of the blocks, or of the first one."""
    found = [block.index for block in blocks if block.temporal or not apart]
    return max([index for index in found if index < round(depth * len(blocks))], default=found[0])


def observe(target: Any, similarities: list[float], config: Config = Config()) -> Patch:
    """Run a model as it is, and append to `similarities` the cosine of the late feature with that of the step before."""
    patch = Patch(target, "streamlined_inference_observe", edits=True)
    blocks, apart = _blocks(patch)
    late = blocks[_late(blocks, apart, config.depth)]
    now, last = Reuse(patch.slot), patch.slot()
    patch.around(late.module, now.around)

    def after(*_) -> None:
        feature, _ = late.split(now.slots[0].get())
        if last.value is not None:
            similarities.append(float(torch.cosine_similarity(feature.flatten().float(), last.get().flatten().float(), 0)))
            patch.counts["observed"] += 1
        last.keep(feature)

    patch.each_call(lambda context: setattr(now, "reuse", False))
    patch.after_call(after)
    return patch.on()


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Run every block in slices, and take up a late feature in the steps that do not run whole.

    Args:
        target: a diffusers pipeline over a video transformer; with `full=1.0` or numbers of steps also that model.

    Raises:
        ValueError: a model of images, a UNet, a bare model where `full` is a share of a run, or already applied.
    """
    patch = Patch(target, "streamlined_inference", edits=True)
    if config == OFF:
        return patch
    blocks, apart = _blocks(patch)
    reuse, before = Reuse(patch.slot), []
    if config.full != 1:
        if not isinstance(config.full, tuple):
            patch.require_pipeline()
        late = _late(blocks, apart, config.depth)
        before = [_Skipped(block) for block in blocks[:late]]
        for each in before:
            patch.around(each.block.module, each.around)
        patch.around(blocks[late].module, reuse.around)

    def sliced(chunks: int, axis: int) -> Callable:
        return lambda forward, *args, **kwargs: in_slices(forward, chunks, axis, *args, **kwargs)

    for block in blocks:
        patch.around(block.module, sliced(config.spatial_chunks if block.temporal else config.temporal_chunks, 0), Claim.TOKENS)
        patch.claim([part for part in (block.attn, block.cross) if part is not None], Claim.WHOLE)
        if block.ff is not None:
            patch.around(block.ff, sliced(1 if apart else config.spatial_chunks, 1), Claim.WHOLE)

    def decide(context: StepContext) -> None:
        if config.full != 1:
            whole = config.full if isinstance(config.full, tuple) else evenly(context.steps, config.full)
            reuse.reuse = reuse.ready and context.i not in whole
        skipped = [*(each.block.module for each in before), blocks[len(before)].module] if reuse.reuse else []
        for each in before:
            each.skip = reuse.reuse
        patch.skips(skipped)
        patch.counts["skipped"] += len(skipped)
        patch.counts["computed"] += len(blocks) - len(skipped)

    patch.each_call(decide)
    return patch.on()
