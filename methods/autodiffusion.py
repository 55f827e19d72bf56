"""AutoDiffusion - AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model
Acceleration

Lijiang Li et al., ICCV 2023. arXiv:2309.10438. Code: lilijiangg/AutoDiffusion

Idea: few steps need not be evenly spaced, and not every step needs every layer. A plan names the timesteps of a run and for
each of them the layers that are left out. It is found once for a model and a number of steps, by evolution: plans are judged
by the images they give, the best are mutated and crossed, and layers may be left out once the timesteps have settled.

Map
    steps of any length over a subset of the timesteps       methods._core.solver
    left out: a branch adds nothing, a resnet is its shortcut    _Layer.around
    budget: sum over steps of (layers - left out) <= N_max   cost, legal
    random candidates, within the budget                     random_plan
    mutation of steps, then of layers                        mutate
    crossover, step by step                                  cross
    shares of layers that may be left out, epoch by epoch    skip_range
    evolution                                                search

Departures
    The official code is for the networks of guided diffusion, whose layers are resnets and attentions; so are those of a UNet
    here, whose attentions have cross-attention and an MLP. In a transformer, and over videos, it is each branch of each block.
    Another number of steps reads a plan in proportion. Steps are DDIM with eta = 0 or flow-matching Euler, without the official
    PLMS and DPM-Solver.
    The official joint search compares steps with `==` where it means to assign, compares lists where lengths are meant, may
    take one timestep twice, breaks the budget, gives skipped layers of unsorted steps to other steps, and judges one plan in
    two orders twice. Here plans are sorted together with their layers, and what is not legal is drawn again.
    What judges a plan is passed in; the official code takes the FID of some thousand images.

Example
    >>> import methods
    >>> from methods import autodiffusion
    >>> pipe = methods.tiny("dit")
    >>> plan = [(990, []), (700, [3, 5]), (350, [7]), (120, [2, 4])]
    >>> with autodiffusion.apply(pipe, autodiffusion.Config(plan=plan)) as patch:
    ...     images = pipe([3], num_inference_steps=4, output_type="np").images
    >>> patch.report()["skipped"], patch.report()["computed"]
    (5, 43)
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from methods._core.cache import Mute
from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.patch import Patch, per_denoiser
from methods._core.search import Candidate, Journal, Pool
from methods._core.site import Claim
from methods._core.solver import arrived, grid_class

__all__ = ["OFF", "TINY", "Config", "Plan", "apply", "cost", "cross", "legal", "mutate", "random_plan", "read", "search",
           "skip_range"]

Plan = tuple[tuple[int, tuple[int, ...]], ...]      # (timestep, numbers of the layers left out), timesteps falling
SIX = tuple((t, ()) for t in (944, 834, 574, 354, 217, 94))         # found by the authors for ADM-G on ImageNet 64, 6 steps


@dataclass(frozen=True, kw_only=True)
class Config:
    plan: Plan | Sequence | str | Path = SIX        # or the file that `search` wrote; (): nothing is changed

    def __post_init__(self):
        plan = json.loads(Path(self.plan).read_text()) if isinstance(self.plan, (str, Path)) else self.plan
        plan = tuple(sorted(((int(t), tuple(sorted(layers))) for t, layers in plan), reverse=True))
        object.__setattr__(self, "plan", plan)
        times = [t for t, _ in plan]
        if len(set(times)) < len(times) or any(t < 0 for t in times):
            raise ValueError(f"the timesteps of a plan, {times}, must differ and be at least 0")


OFF = Config(plan=())
TINY = Config(plan=((944, ()), (834, (0, 3)), (574, (1,)), (354, (2, 3)), (217, (0, 5)), (94, (1, 2))))


def read(plan: Plan, steps: int) -> Plan:
    """The plan of a run of `steps`: itself, or another one in proportion.

    Raises ValueError for so many steps that two would fall on one timestep.
    """
    places = np.linspace(0, len(plan) - 1, steps) if steps > 1 else [0]
    times = np.rint(np.interp(places, range(len(plan)), [t for t, _ in plan])).astype(int).tolist()
    if len(set(times)) < steps:
        raise ValueError(f"a plan of {len(plan)} steps cannot be read as one of {steps}: two would fall on one timestep")
    return tuple((t, plan[i * len(plan) // steps][1]) for i, t in enumerate(times))


def cost(plan: Plan, layers: int) -> int:            # how many layers a plan runs in all
    return sum(layers - len(skipped) for _, skipped in plan)


def legal(plan: Plan, layers: int, budget: int) -> bool:
    """Whether all timesteps differ and the budget is kept."""
    return len({t for t, _ in plan}) == len(plan) > 0 and cost(plan, layers) <= budget


def skip_range(epoch: int, settled: bool, found: tuple[float, float], least: float, most: float) -> tuple[float, float]:
    """The share of layers that may be left out, from and to: the end opens by most / 5 an epoch, behind the fifth or once the
    best plan stays the same; behind the sixth the start is `least`."""
    low, high = found
    if high == 0 and (settled or epoch > 4):
        high = most / 5
    elif 0 < high < most:
        high = min(most, high + most / 5)
    return (least if epoch > 5 else low), high


def _some(layers: int, share: tuple[float, float], random: np.random.Generator) -> tuple[int, ...]:     # layers to leave out
    count = int((share[0] + random.random() * (share[1] - share[0])) * layers)
    return tuple(sorted(random.permutation(layers)[:count].tolist()))


def random_plan(layers: int, budget: int, timesteps: int, share: tuple[float, float], random: np.random.Generator) -> Plan:
    """Timesteps at random, with layers left out at random, as many as the budget allows."""
    steps: list[tuple[int, tuple[int, ...]]] = []
    least = layers - int(layers * share[1])                     # that one more step must run
    for t in random.permutation(timesteps).tolist():
        left = budget - cost(tuple(steps), layers)
        if left < least:
            break
        skipped = _some(layers, share, random)
        while layers - len(skipped) > left:                     # the last step leaves out as much as it must
            skipped = _some(layers, (share[1], share[1]), random)
        steps.append((t, skipped))
    return tuple(sorted(steps, reverse=True))


def mutate(plan: Plan, layers: int, timesteps: int, p: float, share: tuple[float, float], random: np.random.Generator) -> Plan:
    """With probability p each step moves to a free timestep, leaves out some layers if it may and leaves out none yet, and else
    runs each of those left out in exchange for one that runs."""
    free = random.permutation([t for t in range(timesteps) if t not in dict(plan)]).tolist()
    made = []
    for t, skipped in plan:
        t = free.pop() if free and random.random() < p else t
        if share[1] > 0 and not skipped and random.random() < p:
            skipped = _some(layers, share, random)
        elif share[1] > 0 and skipped:
            running = random.permutation(sorted({*range(layers)} - {*skipped})).tolist()
            skipped = tuple(sorted(running.pop() if running and random.random() < p else layer for layer in skipped))
        made.append((t, skipped))
    return tuple(sorted(made, reverse=True))


def cross(a: Plan, b: Plan, random: np.random.Generator) -> Plan:
    """Step by step that of one parent or the other, with its layers; the longer one gives its last steps too."""
    made = [one if random.random() < 0.5 else other for one, other in zip(a, b, strict=False)]
    return tuple(sorted([*made, *max(a, b, key=len)[len(made):]], reverse=True))


def _encoded(plan: Plan) -> Candidate:                      # timestep and set of layers, as bits of a number, step by step
    return tuple(gene for t, skipped in plan for gene in (t, sum(2 ** layer for layer in skipped)))


def _decoded(candidate: Candidate) -> Plan:
    return tuple((t, tuple(n for n in range(bits.bit_length()) if bits >> n & 1))
                 for t, bits in zip(candidate[::2], candidate[1::2], strict=True))


def search(objective: Callable[[Plan], float], steps: int, layers: int, *, timesteps: int = 1000, budget: int | None = None,
           population: int = 50, parents: int = 10, mutations: int = 25, crossovers: int = 10, p: float = 0.25,
           epochs: int = 15, least: float = 0.0, most: float = 0.0, seed: int = 0, journal: Path | None = None,
           save: Path | None = None, tell: Callable[[str], None] | None = None) -> list[tuple[Plan, float]]:
    """Evolution of plans with as many layers in all as `steps` whole steps; defaults of the official scripts. -> best first

    Args:
        objective: of a plan, to be minimised; the distance of its images from real ones.
        layers: how many the model has.
        budget: N_max, layers that a plan runs in all; None: steps * layers.
        population: plans of an epoch: at first the even one, random ones and slight mutations of it, then `mutations` and
            `crossovers` of the best `parents` so far, filled up at random.
        p: probability of a mutation.
        least, most: the shares of layers that may be left out in a step.
        journal: a file that takes every judged plan down; a search that was stopped goes on from it.
        save: a JSON file for the best plan, which `Config(plan=...)` reads. `tell` gets a line for each plan judged.
    """
    random, share, last = np.random.default_rng(seed), (0.0, 0.0), None
    budget = steps * layers if budget is None else budget
    work = Journal(lambda candidate: (objective(_decoded(candidate)),), journal, tell)
    pool = Pool(lambda plan: work.judge(_encoded(plan))[0], lambda plan: legal(plan, layers, budget))

    def drawn(share: tuple[float, float]) -> Plan:
        return random_plan(layers, budget, timesteps, share, random)

    def child(elders: Sequence[Plan], share: tuple[float, float] = (0.0, 0.0), p: float | None = None) -> Plan:
        a, b = (elders[i] for i in random.integers(len(elders), size=2))
        return cross(a, b, random) if p is None else mutate(a, layers, timesteps, p, share, random)

    even = tuple((t, ()) for t in sorted(range(0, timesteps, timesteps // steps), reverse=True)[-steps:])
    pool.add(lambda: even, 1)
    pool.add(partial(drawn, share), population // 2 - 1)
    pool.add(partial(child, [even], share, 0.1), population - population // 2)
    for epoch in range(epochs - 1):
        elders, size = pool.best(parents), len(pool.costs)
        share, last = skip_range(epoch, elders[0] == last, share, least, most), elders[0]
        pool.add(partial(child, elders, share, p), mutations)
        pool.add(partial(child, elders), crossovers)
        pool.add(partial(drawn, share), max(0, size + population - len(pool.costs)))
    if save is not None:
        save.write_text(json.dumps(pool.best(1)[0]) + "\n")
    return [(plan, pool.costs[plan]) for plan in pool.best()]


class _Layer:
    """One layer that may be left out, as the host says."""

    def __init__(self, module: nn.Module, block: Block | None = None, feeds: Sequence[nn.Module] = ()):
        self.module, self.block, self.feeds, self._reuse = module, block, feeds, False      # a Mute asks for `_reuse`

    def around(self, forward, *args, **kwargs):
        if not self._reuse:
            return forward(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        if self.block is None:
            return self.beside(x)
        x = x.new_zeros(*x.shape[:-1], self.module.out_features) if self.feeds else x      # a projection of what they give
        if self.module is not self.block.attn or self.block.stream != "joint":
            return torch.zeros_like(x)
        given = self.block.call(args, kwargs).given.items()
        return tuple(torch.zeros_like(each) for name, each in given if name.endswith("hidden_states") or each is x)

    def beside(self, x: Tensor) -> Tensor | tuple[Tensor]:
        """What goes past a resnet, its shortcut, or past the transformer of a UNet."""
        if not hasattr(self.module, "conv1"):
            return (x,)
        for part in filter(None, (getattr(self.module, name, None) for name in ("upsample", "downsample", "conv_shortcut"))):
            x = part(x)
        return x / self.module.output_scale_factor


class _Solver:
    """Lets the pipeline loop over the timesteps of the plan."""

    def __init__(self, patch: Patch, plan: Plan):
        self.patch, self.plan, self.now, self.at = patch, plan, plan, 0

    def set_timesteps(self, call, *args, **kwargs) -> None:
        call(*args, **kwargs)
        row = grid_class(scheduler := self.patch.pipe.scheduler)
        self.now = read(self.plan, len(scheduler.timesteps))
        row.place(scheduler, [t for t, _ in self.now])
        self.grid = row(scheduler)

    def step(self, call, model_output: Tensor, timestep: Any, sample: Tensor, *args, eta: float = 0.0, **kwargs):
        if eta:
            raise ValueError(f"autodiffusion takes deterministic steps: eta={eta} must be 0")
        result = call(model_output, timestep, sample, *args, **kwargs)                  # for its bookkeeping and its type
        return arrived(result, self.grid.step(sample, model_output, self.at, self.at + 1).to(sample.dtype))


@per_denoiser
def apply(pipe: Any, config: Config = Config()) -> Patch:
    """Run the steps of the plan without the layers that it leaves out.

    Args:
        pipe: a diffusers pipeline with a DDIM or a flow-matching Euler scheduler.

    Raises:
        ValueError: a bare model, another scheduler, no such layer, a second solver-level method, or already applied.
    """
    patch = Patch(pipe, "autodiffusion")
    if not config.plan:
        return patch
    patch.require_pipeline()
    grid_class(patch.pipe.scheduler)
    stages = patch.denoiser.unet if patch.denoiser.row.grid.frames is None else ()
    layers = [_Layer(module) for stage in stages for group in stage.layers for module in group] or [
        _Layer(branch.module, block, branch.feeds) for block in patch.denoiser.blocks for branch in block.branches]
    if (top := max((layer for _, skipped in config.plan for layer in skipped), default=0)) >= len(layers):
        raise ValueError(f"autodiffusion: the plan leaves out layer {top}; this {type(patch.model).__name__} has layers 0 to "
                         f"{len(layers) - 1}")
    for layer in layers:
        patch.around(layer.module, layer.around)
        for feed in layer.feeds:
            patch.around(feed, Mute(layer, feed).around)
    solver = patch.solve(_Solver(patch, config.plan))
    patch.claim([patch.model], Claim.SOLVER)

    def decide(context: StepContext) -> None:
        solver.at = len(solver.now) - context.steps + context.i
        skipped = solver.now[solver.at][1]
        for n, layer in enumerate(layers):
            layer._reuse = n in skipped
            patch.skips((layer.module, *layer.feeds) if layer._reuse else ())
        patch.counts["skipped"] += len(skipped)
        patch.counts["computed"] += len(layers) - len(skipped)
        patch.tally(len(skipped), len(layers))

    patch.each_call(decide)
    patch.explain(lambda: "the plan leaves out no layer of this run: its timesteps are others, at the same cost")
    return patch.on()
