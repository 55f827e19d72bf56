"""DeepCache - DeepCache: Accelerating Diffusion Models for Free

Xinyin Ma, Gongfan Fang, Xinchao Wang, CVPR 2024. arXiv:2312.00858. Code: horseee/DeepCache

Idea: in a UNet, what comes up from the deep levels changes slowly over the steps, what comes through the shallow skip
connections does not. Every N-th step runs the whole UNet and keeps the feature that enters one shallow up layer; the
steps between run only the layers above that point, fed with fresh skips and the kept feature.

Map
    full step      keep the feature that enters an up layer            methods._core.cache.Deep
    retrieve step  leave out what lies below the branch               branch_point, deep_modules
    1:N inference  uniform schedule                                   uniform_steps
    1:N inference  non-uniform schedule                               nonuniform_steps

Departures
    Only the one feature that is read again is kept. The official extension keeps the output of every module it wraps.
    A branch is counted in skip connections, as in the paper, from the UNet's own layers; the official extension divides by
    three, which is wrong where a block has not two layers.
    Both schedules work; the official extension accepts the non-uniform one and then fails in the first step.
    Steps are those of the run, not looked up by timestep, so solvers that repeat a timestep and runs that start late
    (image-to-image) begin with a full step.

Example
    >>> from methods import deepcache
    >>> deepcache.uniform_steps(10, 3)
    [0, 3, 6, 9]
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from methods._core.cache import Deep
from methods._core.context import StepContext
from methods._core.denoiser import Stage
from methods._core.patch import Patch, per_denoiser

__all__ = ["OFF", "Config", "apply", "branch_point", "deep_modules", "nonuniform_steps", "uniform_steps"]


@dataclass(frozen=True, kw_only=True)
class Config:
    interval: int = 5             # N: one full step in N; default of the official README
    branch: int = 0               # skip connection above which everything is fresh, counted from the output
    power: float | None = None    # p of the non-uniform schedule (1.4 for SD in the official code); None: uniform
    center: int = 15              # c of the non-uniform schedule: where full steps are densest

    def __post_init__(self):
        if self.interval < 1:
            raise ValueError(f"interval={self.interval} must be at least 1")
        if self.branch < 0:
            raise ValueError(f"branch={self.branch} must not be negative")
        if self.power is not None and self.power <= 1:
            raise ValueError(f"power={self.power} must be above 1")


OFF = Config(interval=1)
TUNE = ({"interval": 2}, {"interval": 3}, {"interval": 5})


def uniform_steps(steps: int, interval: int) -> list[int]:
    """1:N inference: full steps of the uniform 1:N schedule."""
    return list(range(0, steps, interval))


def nonuniform_steps(steps: int, interval: int, center: int, power: float) -> list[int]:
    """1:N inference, non-uniform: ceil(T / N) full steps, densest around `center`.

    Equally spaced points between the complex roots (-c)^(1/p) and (T - c)^(1/p) are raised to the power p again; real
    parts are cut to integers; the distinct ones but the lowest and the highest, shifted by c, are the full steps after step 0.
    The power shrinks by 0.02 until there are enough of them.

    Raises:
        ValueError: no power above 1 gives enough distinct steps.
    """
    count = -(-steps // interval)
    while power > 1:
        grid = np.linspace(complex(-center) ** (1 / power), complex(steps - center) ** (1 / power), count + 1)
        inner = sorted({int((x ** power).real) for x in grid})[1:-1]
        if len(full := [0, *(x + center for x in inner)]) == count:
            return full
        power -= 0.02
    raise ValueError(f"no non-uniform schedule of {count} distinct steps among {steps} around {center}")


def branch_point(stages: tuple[Stage, ...], branch: int) -> tuple[int, int]:
    """Where skip connection `branch` leaves the way down: (stage, layers of that stage before it).

    Skip 0 is the output of the input convolution, each later one that of a layer or, ending a stage, of its downsampler.

    Raises:
        ValueError: the UNet has fewer skip connections.
    """
    down = [stage for stage in stages if stage.side == "down"]
    points = [(stage.number, layer) for stage in down for layer in range(len(stage.layers) + 1)]
    if branch >= len(points):
        raise ValueError(f"branch={branch}: this UNet has skip connections 0 to {len(points) - 1}")
    return points[branch]


def deep_modules(stages: tuple[Stage, ...], branch: int) -> list[nn.Module]:
    """What shallow steps leave out, in execution order; the last one's output enters the first up layer they run."""
    number, layer = branch_point(stages, branch)
    deep: list[nn.Module | None] = []
    for stage in stages:
        if stage.number > number or stage.side == "mid":
            deep.append(stage.module)
        elif stage.number == number:
            below = stage.layers[layer:] if stage.side == "down" else stage.layers[: len(stage.layers) - 1 - layer]
            deep += [module for pair in below for module in pair]
            deep += [stage.sampler] if stage.side == "down" else []
    return [module for module in deep if module is not None]


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Skip everything below one skip connection on all but every N-th step.

    Args:
        target: a diffusers pipeline over a UNet.

    Raises:
        ValueError: not a UNet, no such skip connection, a bare model with the non-uniform schedule, or already applied.
    """
    patch = Patch(target, "deepcache")
    if config.interval == 1:
        return patch
    if config.power is not None:                                   # the non-uniform schedule spans the whole run
        patch.require_pipeline()
    stages = patch.require(patch.denoiser.unet, "UNet stages with skip connections (on a transformer use fora)")
    modules = deep_modules(tuple(stages), config.branch)
    feature = patch.slot()
    skips = [Deep(feature if module is modules[-1] else None) for module in modules]
    for module, skip in zip(modules, skips, strict=True):
        patch.around(module, skip.around)
    full: set[int] = set()

    def decide(context: StepContext) -> None:
        if config.power is None:
            due = context.i % config.interval == 0
        else:
            if context.i == 0:
                full.update(nonuniform_steps(context.steps, config.interval, config.center, config.power))
            due = context.i in full
        shallow = not due and feature.value is not None
        patch.skips(modules if shallow else ())
        for skip in skips:
            skip.shallow = shallow
        patch.counts["skipped" if shallow else "computed"] += len(skips)
        patch.tally(len(skips) * shallow, len(skips))

    patch.each_call(decide)
    patch.each_run(full.clear)
    return patch.on()
