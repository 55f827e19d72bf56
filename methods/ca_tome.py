"""CA-ToMe - Cached Adaptive Token Merging: Dynamic Token Reduction and Redundant Computation Elimination in Diffusion Model

Omid Saghatchian, Atiyeh Gh. Moghadam, Ahmad Nickabadi, arXiv 2025. arXiv:2501.00946. Code: omidiu/ca_tome

Idea: how alike tokens are differs by block and step, so a fixed ratio merges too much here and too little there. Every
token whose best match is similar enough is merged, and since pairs hardly change from step to step, the pairing is kept
and matched anew only at a few checkpoint steps. Only indices are kept; the features merged are always those of the
step.

Map
    adaptive merging   r: the most sources above the threshold in any sample     adaptive_reduction
    matching           as in ToMe                                                methods._core.tokens.merge_plan
    caching            of each block's pairing, until the next checkpoint        _Layer
    checkpoints        sets of steps, counted from 1                             CHECKPOINTS, computes

Departures
    The pairing is forgotten at the start of every run and when the shape changes; there is no switch for less. The official
    package never forgets: its second image starts from the pairs of the first, and another batch size fails.
    Destinations come from `seed` and the step; where a model calls its two guidance branches apart, each keeps its
    pairing. They are random for any batch; the official code takes the corners where the batch is odd.
    Checkpoint 1 changes nothing, as in the official code: the first step always matches. So do checkpoints that the run
    does not reach; the sets are made for 50 steps and not scaled to others.
    How many tokens merge is read back from the device, so blocks compile with a graph break, not with `fullgraph=True`.
    What ToMe's module says of SD3, Flux and CogVideoX holds here too.

Example
    >>> import methods
    >>> from methods import ca_tome
    >>> pipe = methods.tiny("dit")
    >>> with ca_tome.apply(pipe, ca_tome.Config(checkpoints=(3,))) as patch:
    ...     images = pipe([3], num_inference_steps=5, output_type="np").images
    >>> patch.report()["matched"], patch.report()["reused"]
    (12, 18)
"""
from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from accel_kernels.cosine_match import cosine_match
from accel_kernels.merge import Segments
from methods._core.cache import Slot
from methods._core.context import StepContext
from methods._core.denoiser import Block, check_downsample
from methods._core.patch import Patch, per_denoiser
from methods._core.reduction import Reduction, reduce_all
from methods._core.tokens import Plan, joined, merge_plan, partition

__all__ = ["BREAKS_GRAPH", "CHECKPOINTS", "OFF", "TINY", "Config", "adaptive_reduction", "apply", "computes"]

CHECKPOINTS = {         # of the official code, for 50 steps; a 0 that fires in no step is left out
    "config_1": (1, 2, 3, 5, 10, 15, 25, 35),
    "config_2": (10, 11, 12, 15, 20, 25, 30, 35, 45),
    "config_3": (8, 11, 13, 20, 25, 30, 35, 45, 46, 47, 48, 49),
    "config_4": (9, 13, 14, 15, 28, 29, 32, 36, 45),
    "adaptive": (1, 5, 7, 10, 12, 15, 35, 40, 45, 46, 47, 48, 49, 50, 51),
    "every_five": (5, 10, 15, 20, 25, 30, 35, 40, 45, 50),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    threshold: float = 0.7                                       # T: cosine from which a token merges; 1 merges none
    checkpoints: tuple[int, ...] = CHECKPOINTS["config_3"]       # P: steps, counted from 1, that match anew; recommended set
    stride: int = 2                                              # side of a destination cell, as in ToMe
    max_downsample: int = 1                                      # where the grid is at most this much coarser, as in ToMe
    random: bool = True                                          # a random destination in each cell, else its corner
    seed: int = 0                                                # of the random destinations

    def __post_init__(self):
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} outside [-1, 1]")
        if any(n < 1 for n in self.checkpoints):
            raise ValueError(f"checkpoints={self.checkpoints}: steps are counted from 1")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")
        check_downsample(self.max_downsample)


OFF = Config(threshold=1.0)
TINY = Config(threshold=0.3)            # tokens of random weights are less alike
BREAKS_GRAPH = True             # how many tokens merge is read back from the device


def computes(i: int, checkpoints: Collection[int]) -> bool:
    """Whether step `i`, counted from 0, matches anew."""
    return i == 0 or i + 1 in checkpoints


def adaptive_reduction(score: Tensor, threshold: float) -> int:
    """r: the largest number of sources at or above the threshold in any sample; score (B, S). Waits for the device."""
    return int((score >= threshold).sum(1).max())


class _Layer(Reduction):
    """Merging around one self-attention; `kept` holds the indices of its last matching.

    The host sets `anew`, and then also `src` and `dst`, before each call of the denoiser.
    """

    def __init__(self, block: Block, kept: Slot, threshold: float):
        super().__init__(block, self.pair)
        self.kept, self.threshold = kept, threshold
        self.anew = True
        self.src = self.dst = None

    def pair(self, x: Tensor) -> Plan:
        if self.anew:
            plan = self.match(x)
            self.kept.value = plan.segments.source, plan.segments.order, plan.segments.starts, plan.owner
        *parts, owner = self.kept.value
        return Plan(Segments(*parts, owner.shape[1]), owner)

    def match(self, x: Tensor) -> Plan:
        batch = len(x)
        if self.block.rotary:
            x = joined(x)
        score, into = cosine_match(x, self.src, self.dst)
        return merge_plan(score, into, self.src, self.dst, adaptive_reduction(score, self.threshold), batch)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Merge around the self-attention of every block whose grid is at most `config.max_downsample` times coarser.

    Args:
        target: a diffusers pipeline, or its UNet or transformer.

    Raises:
        ValueError: no such block (SDXL has none at full resolution: use `max_downsample=2`); or already applied.
    """
    patch = Patch(target, "ca_tome")
    if config.threshold == 1:
        return patch
    layers = [_Layer(block, patch.slot(), config.threshold) for block in patch.blocks_at(config.max_downsample)]
    seen: list[_Layer] = []

    def prepare(context: StepContext) -> Callable:
        random = context.random(config.seed) if config.random else None
        due = computes(context.i, config.checkpoints)
        seen.clear()

        def ready(layer: _Layer, grid: tuple[int, int, int]) -> int:
            layer.anew = due or layer.kept.value is None
            patch.counts["matched" if layer.anew else "reused"] += 1
            if layer.anew:
                layer.src, layer.dst = partition(grid, config.stride, random, context.sample.device)
            seen.append(layer)
            return 0                                            # how many leave is known behind the match
        return ready

    def count(context: StepContext, output: Tensor) -> None:
        for layer in seen:
            patch.tally(layer.tokens - layer.kept.value[-1].shape[1], 0)

    patch.after_call(count)
    patch.explain(lambda: f"no two tokens were as alike as threshold={config.threshold}")
    return reduce_all(patch, layers, prepare)
