"""TeaCache - Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model

Feng Liu, Shiwei Zhang, Xiaofeng Wang, Yujie Wei, Haonan Qiu, Yuzhong Zhao, Yingya Zhang, Qixiang Ye, Fang Wan, CVPR 2025.
arXiv:2411.19108. Code: ali-vilab/TeaCache

Idea: how much the output will change can be told from the input. The tokens that enter the first block, modulated by the
timestep, are compared with those of the step before; a polynomial makes an expected change of the output of their change.
While the sum of these stays below a threshold, the blocks are left out: what they added when they last ran is added again.

Map
    indicator     relative L1 distance of modulated inputs            methods._core.look.relative_change
    rescaling     polynomial, fitted on pairs of changes              COEFFICIENTS, observe, fit
    accumulation  compute when the sum reaches the threshold          accumulate
    reuse         add the last residual of all blocks                 methods._core.cache.Delta

Departures
    The polynomials are the official ones for FLUX.1-dev and Latte. Other families take the change itself, until `fit` gives
    them one. For CogVideoX the official code looks at the timestep embedding alone; here every family looks at its tokens.
    Distances are taken in single precision. On Latte each block has a residual; their sum is the official one.
    What is kept belongs to a branch of guidance and a run. The official code keeps it on the model's class and counts calls:
    a run of another length or size, or an interrupted one, meets what the last one left.

Example
    >>> import methods
    >>> from methods import teacache
    >>> pipe = methods.tiny("dit")
    >>> with teacache.apply(pipe, teacache.Config(threshold=0.3)) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["computed"] + patch.report()["reused"]
    10
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from methods._core.cache import Delta, chains
from methods._core.context import StepContext
from methods._core.look import relative_change
from methods._core.patch import Patch, per_denoiser

__all__ = ["COEFFICIENTS", "OFF", "TINY", "Config", "accumulate", "apply", "fit", "observe", "relative_change"]

CHAIN = "chain of transformer blocks (on a UNet use deepcache)"
COEFFICIENTS = {                  # of the official code, highest power first, by family
    "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "latte": (-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    threshold: float = 0.2        # delta; the official code: 0.1 slow and 0.2 fast on Latte, 0.25 to 0.8 on FLUX.1-dev
    coefficients: tuple[float, ...] | None = None     # of the polynomial, highest power first; None: COEFFICIENTS, else (1, 0)

    def __post_init__(self):
        if self.threshold < 0:
            raise ValueError(f"threshold={self.threshold} must not be negative")


OFF = Config(threshold=0.0)
TINY = Config(threshold=1.2, coefficients=(1.0, 0.0))       # random weights change more from step to step
TUNE = ({"threshold": 0.05}, {"threshold": 0.1}, {"threshold": 0.2}, {"threshold": 0.3}, {"threshold": 0.5})


def accumulate(total: float, change: float, coefficients: tuple[float, ...], threshold: float) -> tuple[bool, float]:
    """Whether to compute, and the sum that goes on: 0 after computing. A polynomial may be negative and lower the sum."""
    total += float(np.polyval(coefficients, change))
    return (False, total) if total < threshold else (True, 0.0)


def fit(pairs: list[tuple[float, float]], degree: int = 4) -> tuple[float, ...]:
    """Least-squares polynomial through pairs (change in, change out), highest power first; ValueError if they are too few."""
    if len(pairs) <= degree:
        raise ValueError(f"{len(pairs)} pairs do not fix a polynomial of degree {degree}: observe more steps")
    return tuple(np.polyfit(*zip(*pairs, strict=True), degree).tolist())


def observe(target: Any, pairs: list[tuple[float, float]]) -> Patch:
    """Run a transformer as it is, and append to `pairs` how its modulated input and its output changed in each step."""
    patch = Patch(target, "teacache_observe", edits=True)
    patch.require(patch.denoiser.chain, CHAIN)
    last = patch.slot()                                           # (modulated input, output) of the call before

    def after(context: StepContext, output: Tensor) -> None:
        now = patch.look(context), output
        if last.value is not None:
            pairs.append(tuple(map(relative_change, now, last.get())))
            patch.counts["observed"] += 1
        last.keep(now)

    patch.after_call(after)
    return patch.on()


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Leave out all blocks while the expected change of the output, summed since they last ran, is below the threshold.

    Raises:
        ValueError: a bare model (the last step always computes), a UNet, or already applied.
    """
    patch = Patch(target, "teacache")
    if config.threshold == 0:
        return patch
    patch.require_pipeline()
    blocks = patch.require(patch.denoiser.chain, CHAIN)
    coefficients = config.coefficients or COEFFICIENTS.get(patch.denoiser.family, (1.0, 0.0))
    memory, seen = patch.slot(), []                               # (modulated input, sum) of the call before; all changes
    deltas = [Delta(patch.slot(), chain) for chain in chains(blocks)]
    for place in (place for delta in deltas for place in delta.arounds()):
        patch.around(*place)

    def decide(context: StepContext) -> None:
        signal, total = patch.look(context), 0.0
        due = (memory.value is None or not all(delta.ready for delta in deltas) or context.left == 0
               or context.denoiser.adds_between(context.inputs))
        if not due:
            old, total = memory.get()
            seen.append(relative_change(signal, old))
            due, total = accumulate(total, seen[-1], coefficients, config.threshold)
        memory.keep((signal, total))
        for delta in deltas:
            delta.reuse = not due
        patch.skips(() if due else (block.module for block in blocks))
        patch.counts["computed" if due else "reused"] += 1
        patch.tally(not due, 1)

    patch.each_call(decide)
    patch.each_run(seen.clear)
    patch.explain(lambda: f"the sum reached {config.threshold} in every step; the smallest change seen was {min(seen):.3g}"
                  if seen else "the first step, the last, and those with a ControlNet always compute")
    return patch.on()
