"""ToFu - Token Fusion: Bridging the Gap between Token Pruning and Token Merging

Minchul Kim, Shangqian Gao, Yen-Chang Hsu, Yilin Shen, Hongxia Jin, WACV 2024. arXiv:2312.01026

Idea: averaging two tokens is safe only where the layers behind it are nearly linear between them, which the late ones
are and the early ones are not. Tokens are paired as in ToMe; early blocks keep the destination of each group and drop
the rest, late blocks merge the group by an average that does not shrink: the mean's direction with the largest norm.

Map
    matching   as in ToMe, on the block's input                     methods.tome.Matching
    MLERP      norm-preserving mean of a group                      mlerp
    pruning    the destination stands for its group, unchanged      methods._core.tokens.Plan.drop
    placement  prune before the separation depth, MLERP from it on  prunes, apply

Departures
    There is no official code. Two public reimplementations separate at half the depth, which is the default here; one of
    them, OpenToMe, begins to merge one layer later (i > L // 2). Which blocks of a UNet prune is a choice made here: depth is
    the place among all transformer blocks in execution order.
    A widely copied MLERP divides by the destination's own norm instead of the mean's and so keeps no norm.
    The fine-tuned form for classifiers is left out.
    What ToMe's module says of destinations, SD3, Flux and CogVideoX holds here too.

Example
    >>> import methods
    >>> from methods import tofu
    >>> pipe = methods.tiny("dit")
    >>> with tofu.apply(pipe, tofu.Config(ratio=0.5)) as patch:
    ...     images = pipe([3], num_inference_steps=2, output_type="np").images
    >>> patch.report()["pruned"], patch.report()["merged"]
    (6, 6)
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel_kernels import merge
from methods._core.context import StepContext
from methods._core.denoiser import Block, check_downsample
from methods._core.patch import Patch, per_denoiser
from methods._core.reduction import Reduction, reduce_all
from methods._core.tokens import Plan, match_plan, partition, reduction
from methods.tome import Matching

__all__ = ["OFF", "Config", "apply", "mlerp", "prunes", "roundtrip"]


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float = 0.5            # r / N, as in ToMe; capped at 1 - 1 / stride^2
    separation: float = 0.5       # d0 / L: share of the depth that prunes (0: all MLERP, 1: all pruning)
    stride: int = 2               # side of a destination cell, as in ToMe
    max_downsample: int = 1       # where the grid is at most this many times coarser than the latent, as in ToMe
    random: bool = True           # a random destination in each cell, else its top-left corner
    seed: int = 0                 # of the random destinations

    def __post_init__(self):
        for name in ("ratio", "separation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} outside [0, 1]")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")
        check_downsample(self.max_downsample)


OFF = Config(ratio=0.0)
TUNE = ({"ratio": 0.25}, {"ratio": 0.5}, {"ratio": 0.75})


def mlerp(plan: Plan, x: Tensor) -> Tensor:
    """Rows (B, L, C) of x (B, N, C): in each group the direction of the mean with the largest norm, max_i |x_i| * m / |m|."""
    return merge.mlerp(x, plan.segments)


def prunes(index: int, depth: int, separation: float) -> bool:
    """Whether block `index` (from 0) of `depth` lies before the separation depth d0 = separation * depth."""
    return index < round(separation * depth, 9)           # 0.28 * 25 is a little more than 7


def roundtrip(x: Tensor, grid: tuple[int, int, int], ratio: float) -> Tensor:
    """A layer without its attention: tokens x (B, N, C) of `grid` matched, merged by norm, and copied back. For the bench."""
    src, dst = partition(grid, 2, torch.Generator().manual_seed(0), x.device)
    plan = match_plan(x, src, dst, reduction(x.shape[1], len(dst), ratio))
    return plan.restore(mlerp(plan, x))


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Prune or merge around the self-attention of every block whose grid is at most `config.max_downsample` times coarser.

    Args:
        target: a diffusers pipeline, or its UNet or transformer.

    Raises:
        ValueError: no such block (SDXL has none at full resolution: use `max_downsample=2`); or already applied.
    """
    patch = Patch(target, "tofu")
    if config.ratio == 0:
        return patch

    def prunes_at(block: Block) -> bool:
        return prunes(block.index, len(patch.denoiser.blocks), config.separation)

    def prepare(context: StepContext) -> Callable:
        random = context.random(config.seed) if config.random else None

        def place(layer: Reduction, grid: tuple[int, int, int]) -> int:
            patch.counts["pruned" if layer.reducer is Plan.drop else "merged"] += 1
            return layer.planner.place(grid, config.stride, random, config.ratio, context.sample.device)
        return place

    layers = [Reduction(block, Matching(block), Plan.drop if prunes_at(block) else mlerp)
              for block in patch.blocks_at(config.max_downsample)]
    return reduce_all(patch, layers, prepare)
