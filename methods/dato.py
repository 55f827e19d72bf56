"""DaTo - Token Pruning for Caching Better: 9 Times Acceleration on Stable Diffusion for Free

Evelyn Zhang et al., arXiv 2024. arXiv:2501.00375. Code: EvelynZhang-epiclab/DaTo

Idea: a plan, searched once for a model, says of each step whether the UNet runs whole, at its shallowest depth, or not
at all. What runs prunes its self-attention: tokens that changed most between the last two outputs become base tokens,
so that their change spreads to the pruned tokens that copy them and makes up for what the cache has frozen.

Map
    cache plan         full, shallow or no computation at a step               stage_of, apply
    base tokens        largest temporal difference, with noise, of a patch     base_score
    token pruning      as in SiTo, at the ratio of the step                    methods.sito.prune_plan
    search             NSGA-II over plans, with an objective passed in         search, rank, crowding, cross, mutate

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
    writes down every generation, so that it can be interrupted.

Example
    >>> from methods import dato
    >>> [dato.stage_of(dato.Config().plan, i, 50) for i in range(9)]
    ['full', 'reused', 'shallow', 'shallow', 'shallow', 'shallow', 'shallow', 'full', 'shallow']
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from methods._core.context import StepContext
from methods._core.denoiser import Block, describe
from methods._core.patch import CACHE, TOKENS, Feature, Patch
from methods._core.reduction import Reduction
from methods._core.tokens import Plan
from methods.deepcache import deep_modules
from methods.sito import base_tokens, prune_plan

__all__ = ["OFF", "PLAN", "Config", "apply", "base_score", "cross", "crowding", "mutate", "rank", "search", "sparse_plan",
           "stage_of"]

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
        if self.max_downsample not in (1, 2, 4, 8):
            raise ValueError(f"max_downsample={self.max_downsample} must be 1, 2, 4 or 8")


OFF = Config(plan=(2,), ratios=(0.0,))


def stage_of(plan: Sequence[int], i: int, steps: int) -> str:
    """What call `i` of `steps` computes: "full", "shallow" or "reused" (nothing). Call 0 is always full."""
    place = i - 1 if steps - len(plan) in (0, 1) else (i - 1) * len(plan) // steps
    return "full" if i == 0 else ("reused", "shallow", "full")[plan[place]]


def base_score(change: Tensor | None, noise: Tensor, gamma: float, alpha: float) -> Tensor:
    """q = g * e + alpha * noise from the temporal difference e (B, N); noise (N,) alone where there is none yet. -> (B, N)"""
    return noise[None] if change is None else gamma * change + alpha * noise


# ---- search -----------------------------------------------------------------------------------------------------------


def rank(costs: np.ndarray) -> np.ndarray:
    """Non-dominated front of each row of costs (n, m), all to be minimised: 0 the best."""
    no_worse = (costs[:, None] <= costs[None]).all(-1)
    dominates = no_worse & (costs[:, None] < costs[None]).any(-1)
    fronts, left, front = np.zeros(len(costs), dtype=int), np.ones(len(costs), dtype=bool), 0
    while left.any():
        best = left & ~(dominates & left[:, None]).any(0)
        fronts[best], left, front = front, left & ~best, front + 1
    return fronts


def crowding(costs: np.ndarray) -> np.ndarray:
    """Crowding distance of each row of one front (n, m): sides of the box to its neighbours, infinite at the ends."""
    distance = np.zeros(len(costs))
    for column in costs.T:
        order = np.argsort(column, kind="stable")
        distance[order[[0, -1]]] = np.inf
        if np.isfinite(column).all() and np.ptp(column) > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / np.ptp(column)
    return distance


def cross(a: np.ndarray, b: np.ndarray, high: int, eta: float, random: np.random.Generator) -> np.ndarray:
    """Simulated binary crossover of two parents in [0, high] within bounds, gene by gene with probability 1/2, rounded."""
    low, top = np.minimum(a, b).astype(float), np.maximum(a, b).astype(float)
    gap, u = np.maximum(top - low, 1e-14), random.random(len(a))
    children = []
    for edge, sign in ((low, -1), (high - top, 1)):
        spread = 2 - (1 + 2 * edge / gap) ** -(eta + 1)
        inside = u <= 1 / spread
        power = np.where(inside, u * spread, 1 / np.where(inside, 1, 2 - u * spread)) ** (1 / (eta + 1))
        children.append(0.5 * (low + top + sign * power * gap))
    child = np.where(random.random(len(a)) < 0.5, *children)
    child = np.where((random.random(len(a)) < 0.5) & (a != b), child, a)
    return np.clip(np.rint(child), 0, high).astype(int)


def mutate(x: np.ndarray, high: int, eta: float, random: np.random.Generator) -> np.ndarray:
    """Polynomial mutation in [0, high], of one gene in `len(x)` on average (at most half), rounded."""
    u = random.random(len(x))
    down, up = 1 - x / high, x / high                       # 1 - the distances to the two bounds
    fall = (2 * u + (1 - 2 * u) * down ** (eta + 1)) ** (1 / (eta + 1)) - 1
    rise = 1 - (2 * (1 - u) + (2 * u - 1) * up ** (eta + 1)) ** (1 / (eta + 1))
    moved = np.clip(np.rint(x + np.where(u < 0.5, fall, rise) * high), 0, high).astype(int)
    return np.where(random.random(len(x)) < min(0.5, 1 / len(x)), moved, x)


def sparse_plan(length: int, random: np.random.Generator) -> np.ndarray:
    """A plan to start from: at most one full step in the middle 40 % and one in the last 30 %, else 0 or 1 evenly."""
    plan = random.integers(0, 2, length)
    for start, stop in ((0.3, 0.7), (0.7, 1.0)):
        if random.random() < 0.5:
            plan[random.integers(int(start * length), max(int(start * length) + 1, int(stop * length)))] = 2
    return plan


def search(objective: Callable[[tuple[int, ...]], Sequence[float]], length: int, high: int = 2, *, population: int = 15,
           generations: int = 30, crossover: tuple[float, float] = (0.8, 15), mutation: tuple[float, float] = (0.8, 15),
           initial: Callable[[int, np.random.Generator], np.ndarray] = sparse_plan, seed: int = 0,
           state: Path | None = None) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """NSGA-II: the plans of integers 0..high that no other one found beats in all costs, by their first cost.

    Args:
        objective: costs of a plan, to be minimised; infinite ones for a plan that is not allowed.
        crossover, mutation: probability and distribution index eta.
        state: a JSON file, written after each generation; if it exists, the search goes on from there.
    """
    random = np.random.default_rng(seed)
    plans = costs = None
    done = 0
    if state is not None and state.exists():
        saved = json.loads(state.read_text())
        done, random.bit_generator.state = saved["generation"], saved["random"]
        plans, costs = np.array(saved["plans"]), np.array(saved["costs"], dtype=float)

    def child() -> np.ndarray:
        mother, father = (plans[min(random.integers(0, len(plans), 2))] for _ in range(2))    # sorted: the lower is better
        x = cross(mother, father, high, crossover[1], random) if random.random() < crossover[0] else mother
        return mutate(x, high, mutation[1], random) if random.random() < mutation[0] else x

    for generation in range(done, generations):
        make = child if generation else lambda: initial(length, random)
        known, new = {tuple(plan) for plan in plans} if generation else set(), []
        for _ in range(100 * population):                                     # plans met before are not measured again
            if len(new) < population and (x := tuple(int(gene) for gene in make())) not in known:
                known.add(x)
                new.append(x)
        if new:
            measured = np.array([objective(x) for x in new], dtype=float)
            plans = np.concatenate([plans, new]) if generation else np.array(new)
            costs = np.concatenate([costs, measured]) if generation else measured
        fronts = rank(costs)
        spread = np.zeros(len(costs))
        for front in set(fronts):
            spread[fronts == front] = crowding(costs[fronts == front])
        keep = np.lexsort((-spread, fronts))[:population]
        plans, costs = plans[keep], costs[keep]
        if state is not None:
            state.write_text(json.dumps({"generation": generation + 1, "random": random.bit_generator.state,
                                         "plans": plans.tolist(), "costs": costs.tolist()}) + "\n")
    best = [i for i in np.argsort(costs[:, 0], kind="stable") if rank(costs)[i] == 0]
    return [(tuple(plans[i].tolist()), tuple(costs[i].tolist())) for i in best]


# ---- wiring -----------------------------------------------------------------------------------------------------------


class _Deep:
    """A module below the shallowest depth. On shallow steps the last of them gives its kept output, the others an empty one."""

    def __init__(self, feature: Feature | None):
        self.feature, self.empty, self.shallow = feature, None, False

    def around(self, forward, *args, **kwargs):
        if not self.shallow:
            out = forward(*args, **kwargs)
            if self.feature is None:
                self.empty = _no_channels(out)
            else:
                self.feature.value = out
            return out
        return self.empty if self.feature is None else self.feature.value


def _no_channels(out):
    return tuple(map(_no_channels, out)) if isinstance(out, tuple) else out[:, :0].clone()


class _Output:
    """The model's output: kept, given again on steps without computation, and compared with the one before.

    `change` (B, height, width) is the mean over the channels of how far the last two lie apart.
    """

    def __init__(self, last: Feature, change: Feature):
        self.last, self.change, self.reuse = last, change, False

    def around(self, forward, *args, **kwargs):
        if self.reuse:
            self.change.value = torch.zeros_like(self.last.value[:, 0], dtype=torch.float32)
            return self.kind(self.last.value)
        out = forward(*args, **kwargs)
        new, old = out[0], self.last.value
        self.kind = (lambda x: (x,)) if isinstance(out, tuple) else type(out)
        self.last.value = new
        self.change.value = None if old is None else (new.float() - old.float()).abs().mean(1)
        return out


class _Layer(Reduction):
    """The pruned self-attention of one block. The host fills in `base` (B, patches) or (1, patches), and `ratio`."""

    def __init__(self, block: Block):
        super().__init__(block, self.prune, Plan.drop)
        self.base, self.ratio = None, 0.0

    def prune(self, x: Tensor) -> Plan | None:
        return prune_plan(x, self.base.expand(len(x), -1), self.ratio) if self.ratio else None


def apply(target: Any, config: Config = Config()) -> Patch:
    """Run the UNet by the plan, and prune its self-attention at a downsampling of `config.max_downsample` or less.

    Args:
        target: a diffusers pipeline over a UNet.

    Raises:
        ValueError: not a UNet, no self-attention to prune (SDXL has none at full resolution: use `max_downsample=2`), a bare
            model, or already applied.
    """
    patch = Patch(target, "dato", depth=CACHE)
    if set(config.plan) == {2} and not any(config.ratios):
        return patch
    denoiser = describe(patch.model)
    deep = deep_modules(tuple(patch.require(denoiser.unet, "UNet stages with skip connections")), 0)
    layers = []
    if any(config.ratios):
        layers = patch.require((_Layer(block) for block in denoiser.blocks if 2 ** block.level <= config.max_downsample),
                               f"self-attention at a downsampling of {config.max_downsample} or less")
    patch.require_pipeline()
    output = _Output(patch.feature(), patch.feature())
    patch.around(patch.model, output.around)
    skips = [_Deep(patch.feature() if module is deep[-1] else None) for module in deep]
    for module, skip in zip(deep, skips, strict=True):
        patch.around(module, skip.around)
    patch.depth = TOKENS                                     # these sit where token reducers do, and exclude others
    for layer in layers:
        layer.wire(patch)
    below = {id(part) for module in deep for part in module.modules()}

    def decide(context: StepContext) -> None:
        stage = "full" if context.fresh else stage_of(config.plan, context.i, context.steps)
        output.reuse = patch.skipping = stage == "reused"
        for skip in skips:
            skip.shallow = stage == "shallow"
        patch.counts[stage] += 1
        if stage == "reused":
            return
        random = context.random(config.seed)
        ratio = config.ratios[context.i * len(config.ratios) // context.steps]
        for layer in layers:
            if stage == "shallow" and id(layer.block.module) in below:
                continue
            grid = denoiser.grid(context.inputs, layer.block)
            layer.tokens, layer.ratio = grid[1] * grid[2], ratio
            noise = torch.randn(layer.tokens, generator=random).to(context.sample.device)
            turned = config.random_sign and bool(torch.rand((), generator=random) < 0.5)
            change = output.change.value
            if change is not None:
                change = F.adaptive_avg_pool2d(change, grid[1:]).flatten(1)
            score = base_score(change, noise, -config.gamma if turned else config.gamma, config.alpha)
            layer.base = base_tokens(score, grid, config.stride)
            if context.guided and config.align_guidance and len(layer.base) > 1:
                layer.base = layer.base[:len(layer.base) // 2].repeat(2, 1)
            patch.counts["pruned"] += bool(ratio)

    patch.each_call(decide)
    return patch
