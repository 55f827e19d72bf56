"""DaTo - Token Pruning for Caching Better: 9 Times Acceleration on Stable Diffusion for Free

Evelyn Zhang et al., arXiv 2024. arXiv:2501.00375. Code: EvelynZhang-epiclab/DaTo

Idea: a plan, searched once for a model, says of each step whether the UNet runs whole, at its shallowest depth, or not
at all. What runs prunes its self-attention: tokens that changed most between the last two outputs become base tokens,
so that their change spreads to the pruned tokens that copy them and makes up for what the cache has frozen.

Map
    cache plan         full, shallow or no computation at a step               stage_of, apply
    base tokens        largest temporal difference, with noise, of a patch     base_score
    token pruning      as in SiTo, at the ratio of the step                    methods.sito.prune_plan
    search             NSGA-II over plans, with an objective passed in         search, methods._core.search.evolve

Departures
    The released patch prunes 0.4 at every step, its plan of ratios being commented out; that is the default here. In each
    block it turns the sign of the temporal difference at random: `random_sign=True`; the paper picks the most changed tokens.
    A plan is read call by call where its length fits the run, with or without the one more call of PLMS; for another number
    of steps at the same relative place. The released code refuses others.
    On a step without computation the last output is given again, which is what the cached last block would lead to. At
    the shallowest depth only what deeper blocks hand up is kept; the released code keeps, and wraps, every layer, and by a
    slip of names computes the middle block there too, which nothing reads.
    On coarser grids (`max_downsample`) the temporal difference is the mean over the pixels of a token.
    State belongs to the model and the run; the released code has it in globals that outlive both.
    Noise comes from `seed` and the step, one draw a block for the whole batch.
    The search is started from plans as sparse as the released ones. It is not tied to a reward model or a clock, and it
    writes down every plan it judges, so that it can be interrupted.

Example
    >>> from methods import dato
    >>> [dato.stage_of(dato.Config().plan, i, 50) for i in range(9)]
    ['full', 'reused', 'shallow', 'shallow', 'shallow', 'shallow', 'shallow', 'full', 'shallow']
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from methods._core.cache import Deep
from methods._core.context import Rewrite, StepContext, given
from methods._core.denoiser import Block, check_downsample
from methods._core.patch import Patch, per_denoiser
from methods._core.reduction import Reduction, reduce_all
from methods._core.search import Candidate, Costs, Journal, evolve
from methods._core.site import Claim
from methods._core.tokens import Plan, reduction
from methods.deepcache import deep_modules
from methods.sito import base_tokens, prune_plan

__all__ = ["OFF", "PLAN", "Config", "apply", "base_score", "search", "sparse_plan", "stage_of"]

# The plan of the official ratio search: from call 1 on, 2 computes everything, 1 the shallowest depth, 0 nothing.
PLAN = (0, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 0, 0, 2, 1, 1, 1, 0, 2, 1, 0, 1,
        1, 1, 1, 1, 2, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    plan: tuple[int, ...] = PLAN           # c: what calls 1, 2, ... compute (call 0 computes all); (2,) caches nothing
    ratios: tuple[float, ...] = (0.4,)     # rho_t: share pruned at each step; one for all as released; (0,) prunes nothing
    gamma: float = 0.1                     # g: weight of the temporal difference
    alpha: float = 0.1                     # weight of the noise
    stride: int = 2                        # side of a patch, which has one base token (sx, sy)
    max_downsample: int = 1                # prune where the grid is at most this many times coarser than the latent
    align_guidance: bool = True            # both guidance halves take the base tokens of the first (align_cfg)
    random_sign: bool = False              # turn the sign of the difference at random, block by block, as the released code
    seed: int = 0                          # of the noise

    def __post_init__(self):
        if not self.plan or any(stage not in (0, 1, 2) for stage in self.plan):
            raise ValueError(f"plan={self.plan} must be a sequence of 0 (nothing), 1 (shallowest depth) and 2 (everything)")
        if not self.ratios or any(not 0 <= ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"ratios={self.ratios} outside [0, 1]")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")
        check_downsample(self.max_downsample)


OFF = Config(plan=(2,), ratios=(0.0,))


def stage_of(plan: Sequence[int], i: int, steps: int) -> str:
    """What call `i` of `steps` computes: "full", "shallow" or "reused" (nothing). Call 0 is always full."""
    place = i - 1 if steps - len(plan) in (0, 1) else (i - 1) * len(plan) // steps
    return "full" if i == 0 else ("reused", "shallow", "full")[plan[place]]


def base_score(change: Tensor | None, noise: Tensor, gamma: float, alpha: float) -> Tensor:
    """q = g * e + alpha * noise from the temporal difference e (B, N); noise (N,) alone where there is none yet. -> (B, N)"""
    return noise[None] if change is None else gamma * change + alpha * noise


def sparse_plan(length: int, random: np.random.Generator) -> np.ndarray:
    """A plan to start from: at most one full step in the middle 40 % and one in the last 30 %, else 0 or 1 evenly."""
    plan = random.integers(0, 2, length)
    for start, stop in ((0.3, 0.7), (0.7, 1.0)):
        if random.random() < 0.5:
            plan[random.integers(int(start * length), max(int(start * length) + 1, int(stop * length)))] = 2
    return plan


def search(objective: Callable[[Candidate], Sequence[float]], length: int, *, journal: Path | None = None,
           tell: Callable[[str], None] | None = None, **settings: Any) -> list[tuple[Candidate, Costs]]:
    """Search: NSGA-II over plans of `length` calls, from sparse ones; see `methods._core.search.evolve` for the settings.

    Args:
        objective: costs of a plan, to be minimised; infinite ones for a plan that is not allowed.
        journal: a file that takes every judged plan down; a search that was stopped goes on from it.
        tell: called with a line of progress for each.
    """
    settings = {"high": 2, "initial": sparse_plan} | settings
    return evolve(Journal(objective, journal, tell), length, **settings)


class _Layer(Reduction):
    """The pruned self-attention of one block. The host fills in `base` (B, patches) or (1, patches), and `ratio`."""

    def __init__(self, block: Block):
        super().__init__(block, self.prune, Plan.drop)
        self.base, self.ratio = None, 0.0

    def prune(self, x: Tensor) -> Plan | None:
        return prune_plan(x, self.base.expand(len(x), -1), self.ratio) if self.ratio else None


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Run the UNet by the plan, and prune its self-attention at a downsampling of `config.max_downsample` or less.

    Args:
        target: a diffusers pipeline over a UNet.

    Raises:
        ValueError: not a UNet, no self-attention to prune (SDXL has none at full resolution: use `max_downsample=2`), a bare
            model, or already applied.
    """
    patch = Patch(target, "dato")
    if set(config.plan) == {2} and not any(config.ratios):
        return patch
    stages = patch.denoiser.unet if patch.denoiser.row.grid.frames is None else ()
    deep = deep_modules(tuple(patch.require(stages, "UNet stages with skip connections for one image")), 0)
    layers = [_Layer(block) for block in patch.blocks_at(config.max_downsample)] if any(config.ratios) else []
    patch.require_pipeline()
    feature, last, change = patch.slot(), patch.slot(), patch.slot()
    skips = [Deep(feature if module is deep[-1] else None) for module in deep]
    for module, skip in zip(deep, skips, strict=True):
        patch.around(module, skip.around)

    below = [block for block in patch.denoiser.blocks
             if any(block.module is part for module in deep for part in module.modules())]

    def count(context: StepContext, left_out: Sequence[Block]) -> None:
        tokens = sum(prod(context.grid(block)) for block in left_out)
        patch.tally(tokens, tokens)

    def skip_step(context: StepContext) -> Rewrite | None:
        """On a step without computation, the last output again: nothing has changed between the two."""
        if last.value is None or stage_of(config.plan, context.i, context.steps) != "reused":
            return None
        change.value = torch.zeros_like(last.value[:, 0], dtype=torch.float32)
        patch.counts["reused"] += 1
        count(context, patch.denoiser.blocks)
        return given(last.get())

    def observe(context: StepContext, output: Tensor) -> None:
        """The temporal difference (B, height, width): how far the last two outputs lie apart, mean over the channels."""
        change.value = None if last.value is None else (output.float() - last.get().float()).abs().mean(1)
        last.keep(output)

    def prepare(context: StepContext) -> Callable:
        shallow = feature.value is not None and stage_of(config.plan, context.i, context.steps) == "shallow"
        for skip in skips:
            skip.shallow = shallow
        patch.skips(deep if shallow else ())
        patch.counts["shallow" if shallow else "full"] += 1
        count(context, below if shallow else ())
        random = context.random(config.seed)
        ratio = config.ratios[context.i * len(config.ratios) // context.steps]

        def ready(layer: _Layer, grid: tuple[int, int, int]) -> int:
            layer.ratio = ratio
            noise = torch.randn(grid[1] * grid[2], generator=random).to(context.sample.device)
            turned = config.random_sign and bool(torch.rand((), generator=random) < 0.5)
            moved = None if change.value is None else F.adaptive_avg_pool2d(change.value, grid[1:]).flatten(1)
            score = base_score(moved, noise, -config.gamma if turned else config.gamma, config.alpha)
            layer.base = base_tokens(score, grid, config.stride)
            if config.align_guidance and len(layer.base) > 1:
                first = context.rows.prompts
                layer.base = layer.base[:first].repeat(len(context.rows.parts), 1)
            patch.counts["pruned"] += bool(ratio)
            return reduction(grid[1] * grid[2], layer.base.shape[1], ratio)
        return ready

    patch.rewrite(skip_step, Claim.SKIP)
    patch.after_call(observe)
    return reduce_all(patch, layers, prepare)
