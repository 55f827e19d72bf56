"""TaylorSeer - From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers

Jiacheng Liu, Chang Zou, Yuanhuiyi Lyu, Junjie Chen, Linfeng Zhang, ICCV 2025. arXiv:2503.06923. Code: Shenyi-Z/TaylorSeer

Idea: the output of a module moves along a smooth path over the steps. Every N-th step computes it, and with it its finite
differences; the steps between compute nothing and follow the Taylor polynomial from the last computed step.

Map
    schedule     the first steps, then every N-th, are full            is_full
    differences  D0 = F, D(n+1) = (D(n) - old D(n)) / gap              factors
    forecast     sum of D(n) k^n / n!, k steps after the last full     forecast
    caching      attention and MLP outputs, before their gates         Forecast

Departures
    The differences are the official ones: recursive, each over the last gap alone. The second is thus exact for a parabola
    neither after uneven gaps nor between the steps, as divided differences would be.
    Modules are those of FORA: on PixArt and Latte the cross-attention too, on SD3, Flux and CogVideoX the text stream, in
    a Flux single-stream block the projection of its joined attention and MLP. Layer norms still run on forecast steps.
    The port in diffusers by default forecasts attention alone, computes the second step after the first ones and counts its
    intervals from there, and finds no attention that is called `attn1`. None of that is done here.

Example
    >>> import methods
    >>> from methods import taylorseer
    >>> pipe = methods.tiny("dit")
    >>> with taylorseer.apply(pipe, taylorseer.Config(interval=3, first_enhance=2)) as patch:
    ...     images = pipe([3], num_inference_steps=8, output_type="np").images
    >>> patch.report()["computed"], patch.report()["forecast"]
    (48, 48)
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods._core.cache import Reuse, Slot, over_branches
from methods._core.context import StepContext
from methods._core.patch import Patch, per_denoiser

__all__ = ["OFF", "Config", "apply", "factors", "forecast", "is_full"]


@dataclass(frozen=True, kw_only=True)
class Config:
    interval: int = 6             # N; the official code has 6 on FLUX.1-dev, 4 on DiT, 5 on HunyuanVideo and Wan2.1
    max_order: int = 1            # O; there 1, on DiT 4; 0 reuses
    first_enhance: int = 3        # full steps at the start; there 3 on FLUX.1-dev, 2 on DiT, else 1

    def __post_init__(self):
        for name, least in (("interval", 1), ("max_order", 0), ("first_enhance", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


OFF = Config(interval=1)
TUNE = tuple({"interval": interval, "first_enhance": 2} for interval in (2, 3, 4, 6))


def is_full(i: int, last: int | None, config: Config) -> bool:
    """Whether step `i` computes, `last` being the last that did (None: none has)."""
    return last is None or i < config.first_enhance or i - last >= config.interval


def factors(new: Tensor, old: Sequence[Tensor] | None, gaps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(D0 ... DO) of a feature, from those of the last full step; where the gap is infinite none is known yet, and it is 0."""
    found = [new]
    for n, gap in enumerate(gaps):
        found.append(torch.zeros_like(new) if old is None else (found[n] - old[n]) / gap)
    return tuple(found)


def forecast(found: Sequence[Tensor], terms: Sequence[Tensor]) -> Tensor:
    """The Taylor polynomial of these factors, `terms` being k^n / n!."""
    return sum(term * factor for term, factor in zip(terms, found, strict=True))


class Forecast(Reuse):
    """Keeps the factors of what a module gives. `at` holds what the host sets before each call: its `gaps` and `terms`."""

    def __init__(self, slot: Any, at: dict[str, list[Tensor]]):
        super().__init__(slot)
        self.at = at

    def store(self, slot: Slot, out: Any) -> Any:
        gaps, old = self.at["gaps"], None if slot.value is None else slot.get()
        size, made = len(gaps) + 1, ()
        for n, x in enumerate(out if isinstance(out, tuple) else (out,)):
            made += factors(x, None if old is None else old[n * size:(n + 1) * size], gaps)
        slot.keep(made)
        return out

    def give(self, slot: Slot) -> Any:
        terms, kept = self.at["terms"], slot.get()
        out = tuple(forecast(kept[n:n + len(terms)], terms) for n in range(0, len(kept), len(terms)))
        return out[0] if len(out) == 1 else out


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Forecast the branch outputs of every transformer block between full steps.

    Raises:
        ValueError: a UNet, or already applied.
    """
    patch = Patch(target, "taylorseer")
    if config.interval == 1:
        return patch
    what = "chain of transformer blocks (on a UNet use deepcache)"
    blocks = patch.require(() if patch.denoiser.unet else patch.denoiser.blocks, what)
    known, at = patch.slot(), {}                                # known: (last full step, highest order of differences then)
    seers = over_branches(patch.around, blocks, lambda: Forecast(patch.slot, at))

    def decide(context: StepContext) -> None:
        last, order = known.value or (None, 0)
        full = is_full(context.i, last, config)
        if full:
            order = min(order + 1, config.max_order) if last is not None and context.i > config.first_enhance - 2 else 0
            known.value = context.i, order
        k = 0 if last is None else context.i - last
        kind = dict(dtype=torch.promote_types(context.sample.dtype, torch.float32), device=context.sample.device)
        at["gaps"] = [torch.tensor(k if n < order else math.inf, **kind) for n in range(config.max_order)]
        at["terms"] = [torch.tensor(k ** n / math.factorial(n), **kind) for n in range(config.max_order + 1)]
        for branch, seer in seers:
            seer.reuse = seer.ready and not full
            patch.skips((branch.module, *branch.feeds) if seer.reuse else ())
            patch.counts["forecast" if seer.reuse else "computed"] += 1
            patch.tally(seer.reuse, 1)

    patch.each_call(decide)
    patch.explain(lambda: f"the first {config.first_enhance} steps are full")
    return patch.on()
