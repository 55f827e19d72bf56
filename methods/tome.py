"""ToMe - Token Merging for Fast Stable Diffusion

Daniel Bolya, Judy Hoffman, CVPRW 2023. arXiv:2303.17604. Code: dbolya/tomesd

Idea: neighbouring image tokens are nearly alike. Before each self-attention the r most redundant ones are averaged into
their best match among a sparse set of destinations; attention runs on N - r tokens; its output is copied back to all N
places, so the residual stream keeps full resolution.

Map
    partition   one random destination in each cell                 methods._core.tokens.partition
    reduction   r = ratio * N, at most N - destinations             methods._core.tokens.reduction
    merging     match sources, merge by the mean, unmerge           Matching, methods._core.tokens.match_plan
    placement   around self-attention, matched on the block's input  apply, methods._core.reduction.Reduction

Departures
    Destinations come from `seed` and the step, afresh in every run; the official generator is forked once and drifts, and
    for an odd batch the official code takes the first token of each cell instead of a random one.
    Where a model calls its two guidance branches apart, both share the destinations of the step.
    SD3 merges the image tokens of the joint attention. Flux and CogVideoX turn queries and keys by position inside the
    attention: there one plan serves the whole batch, and a merged token is turned to the place of its destination.
    Only self-attention is wrapped: the official switches for cross-attention and MLP, off by default, are left out.

Example
    >>> import methods
    >>> from methods import tome
    >>> pipe = methods.tiny("dit")
    >>> with tome.apply(pipe, tome.Config(ratio=0.5)) as patch:
    ...     images = pipe([3], num_inference_steps=2, output_type="np").images
    >>> images.shape
    (1, 32, 32, 1)
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from methods._core.context import StepContext
from methods._core.denoiser import Block, check_downsample
from methods._core.patch import Patch, per_denoiser
from methods._core.reduction import Reduction, reduce_all
from methods._core.tokens import Plan, match_plan, partition, reduction

__all__ = ["OFF", "Config", "Matching", "apply"]


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float = 0.5            # r / N; capped at 1 - 1 / stride^2
    stride: int = 2               # side of a destination cell
    max_downsample: int = 1       # merge where the grid is at most this many times coarser than the latent
    random: bool = True           # a random destination in each cell, else its top-left corner
    seed: int = 0                 # of the random destinations

    def __post_init__(self):
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} outside [0, 1]")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")
        check_downsample(self.max_downsample)


OFF = Config(ratio=0.0)
TUNE = ({"ratio": 0.25}, {"ratio": 0.5}, {"ratio": 0.75})


class Matching:
    """Plans one block: matches sources with destinations and cuts the list at r. The host calls `place` before each call."""

    def __init__(self, block: Block):
        self.shared = block.rotary
        self.src = self.dst = None
        self.r = 0

    def place(self, grid: tuple[int, int, int], stride: int, random: torch.Generator | None, ratio: float,
              device: torch.device) -> int:
        """Partition a grid (frames, height, width) and choose how much of it to merge. -> r"""
        self.src, self.dst = partition(grid, stride, random, device)
        self.r = reduction(prod(grid), len(self.dst), ratio)
        return self.r

    def __call__(self, x: Tensor) -> Plan:
        return match_plan(x, self.src, self.dst, self.r, shared=self.shared)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Merge around the self-attention of every block whose grid is at most `config.max_downsample` times coarser.

    Args:
        target: a diffusers pipeline, or its UNet or transformer.

    Raises:
        ValueError: no such block (SDXL has none at full resolution: use `max_downsample=2`); or already applied.
    """
    patch = Patch(target, "tome")
    if config.ratio == 0:
        return patch

    def prepare(context: StepContext) -> Callable:
        random = context.random(config.seed) if config.random else None

        def place(layer: Reduction, grid: tuple[int, int, int]) -> int:
            patch.counts["merged"] += 1
            return layer.planner.place(grid, config.stride, random, config.ratio, context.sample.device)
        return place

    layers = [Reduction(block, Matching(block)) for block in patch.blocks_at(config.max_downsample)]
    return reduce_all(patch, layers, prepare)
