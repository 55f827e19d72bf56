"""Spectrum - Adaptive Spectral Feature Forecasting for Diffusion Sampling Acceleration

Jiaqi Han, Juntong Shi, Puheng Li, Haotian Ye, Qiushan Guo, Stefano Ermon, CVPR 2026. arXiv:2603.01623. Code: hanjq17/Spectrum

Idea: every entry of the last hidden state is a function of sampling time. A few Chebyshev polynomials are fitted, by ridge
regression, to its values in all steps that ran the model, and give it in the steps between. Since the fit is one over the
whole run and not at its last step, it reaches far ahead, and the gaps between full steps widen.

Map
    schedule   warm-up, then a window that grows by alpha at each full step      Schedule
    basis      T0 ... TM of tau in [-1, 1]                                       basis
    fit        C = (P'P + lambda I)^-1 P'H, forecast p(tau) C                    weights
    forecast   with h the output of the last block                               apply
    mixture    w times it, 1 - w times the line through the last two             weights

Departures
    C is never formed: for given steps the forecast is a sum of the kept features with weights that depend on the steps alone.
    The weights are found in double precision; the official code has time, basis and C in bfloat16.
    Time spans the steps of the run. The official code spans 50 whatever their number: `horizon=50`.
    A second model that takes over in mid-run (Wan 2.2) begins its own history, with its own warm-up.
    All streams that the last block gives are forecast, so its text too where the model reads it. The residual of a ControlNet
    behind the last block is added to the forecast, as to what the block gives. In the official code it is part of the feature.

Example
    >>> import methods
    >>> from methods import spectrum
    >>> pipe = methods.tiny("dit")
    >>> with spectrum.apply(pipe, spectrum.Config(warmup=3)) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["computed"], patch.report()["forecast"]
    (6, 4)
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods._core.cache import Deep, Passed, Reuse
from methods._core.context import StepContext
from methods._core.patch import Patch, per_denoiser

__all__ = ["OFF", "TINY", "TUNE", "Config", "Schedule", "apply", "basis", "weights"]


@dataclass(frozen=True, kw_only=True)
class Config:
    window: float = 2.0               # N: a full step, then floor(N) - 1 forecast ones
    growth: float = 0.75              # alpha: added to the window at each full step behind the warm-up; 3.0 is the fast setting
    warmup: int = 5                   # full steps at the start
    degree: int = 4                   # M, of the highest polynomial
    ridge: float = 0.1                # lambda
    mix: float = 1.0                  # w: share of the polynomials, the rest a line; 0.5 in the official scripts
    horizon: int | None = None        # steps that time spans; None: those of the run. The official code: 50
    history: int = 100                # features that are fitted at most, the last ones; all are kept

    def __post_init__(self):
        for name, least in (("window", 1), ("growth", 0), ("warmup", 1), ("degree", 0), ("ridge", 0), ("history", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix={self.mix} outside [0, 1]")
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"horizon={self.horizon} must be at least 1")


OFF = Config(window=1.0, growth=0.0)
TINY = Config(warmup=2)               # the runs of the tests are as short as the warm-up
TUNE = tuple({"growth": growth, "mix": 0.5} for growth in (0.0, 0.75, 3.0))


@dataclass(frozen=True)
class Schedule:
    """Where a history stands that began at `start`: its full steps, the window, the forecast steps since the last of them."""

    start: int
    window: float
    full: tuple[int, ...] = ()
    running: int = 0

    def due(self, i: int, config: Config) -> bool:
        """Whether step i is a full one."""
        return i - self.start < config.warmup or (self.running + 1) % math.floor(self.window) == 0

    def after(self, i: int, due: bool, config: Config) -> Schedule:
        """The same behind step i."""
        if not due:
            return replace(self, running=self.running + 1)
        growth = config.growth if i - self.start >= config.warmup else 0.0
        return Schedule(self.start, round(self.window + growth, 3), (*self.full, i)[-config.history:])


def basis(tau: Sequence[float], degree: int) -> np.ndarray:
    """T0 ... TM of Chebyshev at each tau: (len(tau), degree + 1)."""
    return np.polynomial.chebyshev.chebvander(np.asarray(tau, dtype=float), degree)


def weights(full: Sequence[int], i: int, horizon: int, config: Config) -> list[float]:
    """How much of the feature of each of the `full` steps is in the forecast for step i."""
    def known(steps: Sequence[int]) -> np.ndarray:
        return basis([2 * step / horizon - 1 for step in steps], config.degree)

    count, size = len(full), config.degree + 1                 # ridge regression is least squares with these rows besides
    rows = np.vstack([known(full), math.sqrt(config.ridge) * np.eye(size)])
    fitted = np.linalg.lstsq(rows, np.eye(count + size, count), rcond=None)[0]
    found = config.mix * (known([i]) @ fitted)[0]
    ahead = (i - full[-1]) / (full[-1] - full[-2]) if count > 1 else 0.0
    found[-1] += (1 - config.mix) * (1 + ahead)
    if count > 1:
        found[-2] -= (1 - config.mix) * ahead
    return found.tolist()


def _tensors(out: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in (out if isinstance(out, tuple) else (out,)) if x is not None)


def _mixed(features: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = shares[0] * features[0].to(torch.promote_types(features[0].dtype, torch.float32))
    for feature, share in zip(features[1:], shares[1:], strict=True):
        total.add_(feature, alpha=share)
    return total.to(features[0].dtype)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Forecast what the last block gives in the steps between full ones, which run no block.

    Args:
        target: a diffusers pipeline; with a `horizon` also its denoiser.

    Raises:
        ValueError: a bare model without a horizon, no chain of blocks, or already applied.
    """
    patch = Patch(target, "spectrum")
    if config.window < 2 and config.growth == 0:
        return patch
    if config.horizon is None:
        patch.require_pipeline()
    chain = patch.denoiser.chain
    modules = [part.module for part in patch.require(patch.denoiser.unet or chain, "chain of blocks")]
    history, place, last = patch.slot(), patch.slot(), Reuse(patch.slot)      # features; a Schedule; what the last block gives
    deep, passed = [Deep() for _ in patch.denoiser.unet[:-1]], [Passed(block) for block in chain[:-1]]
    for module, each in zip(modules, (*deep, *passed, last), strict=True):
        patch.around(module, each.around)

    def decide(context: StepContext) -> None:
        now, gave = last.slots[0], last.slots[0].value
        state = place.value if history.value is not None else Schedule(context.i, config.window)
        due = history.value is None or gave is None or state.due(context.i, config)
        if due:
            now.value = None
        else:
            kept, shares = history.get(), weights(state.full, context.i, config.horizon or context.steps, config)
            count = len(kept) // len(shares)
            made = iter([_mixed(kept[n::count], shares) for n in range(count)])
            now.keep(tuple(x if x is None else next(made) for x in gave) if isinstance(gave, tuple) else next(made))
        place.value = state.after(context.i, due, config)
        last.reuse = not due
        for each in deep:
            each.shallow = not due
        for each in passed:
            each.over = not due
        patch.skips(() if due else modules)
        patch.counts["computed" if due else "forecast"] += 1
        patch.tally(not due, 1)

    def after(context: StepContext, output: Tensor) -> None:
        if last.reuse:
            return
        found = _tensors(last.slots[0].get()) if last.ready else ()
        kept = (*(history.get() or ()), *found)
        if found:
            history.keep(kept[-len(found) * len(place.value.full):])
        else:                                                      # the model passed over the last block (skip-layer guidance)
            history.value = None

    patch.each_call(decide)
    patch.after_call(after)
    patch.explain(lambda: f"the first {config.warmup} steps are full")
    return patch.on()
