"""HiCache - HiCache: A Plug-in Scaled-Hermite Upgrade for Taylor-Style Cache-then-Forecast Diffusion Acceleration

Liang Feng, Shikang Zheng, Jiacheng Liu, Yuqi Lin, Qinming Zhou, Peiliang Cai, Xinyu Wang, Junjie Chen, Chang Zou, Yue Ma,
Linfeng Zhang, ICLR 2026. arXiv:2508.16984. Code: fenglang918/HiCache

Idea: TaylorSeer with another basis. The powers k^n of the Taylor polynomial grow fast with the distance k from the last full
step. Hermite polynomials take their place, with an argument and a result that are both scaled by sigma below 1: the one stays
where they oscillate, the other damps high orders.

Map
    schedule     the first steps, then every N-th, are full           methods.taylorseer.is_full
    differences  D0 = F, D(n+1) = (D(n) - old D(n)) / gap             methods.taylorseer.Forecast
    basis        Ht_n(k) = sigma^n H_n(sigma k)                       hermite
    forecast     F + sum of D(n) Ht_n(k) / n!, n from 1               terms

Departures
    Modules, schedule and differences are those of taylorseer. What the scaled basis does to the slope is meant: the first
    order goes 2 sigma^2 of the way, half of it with sigma = 0.5, all of it with 1/sqrt(2), where it is TaylorSeer.
    The basis is evaluated in double precision on the host, in the official code in the precision of the features.
    Only a fixed sigma is here. The official code can also set one for each layer, from the running size of its differences.

Example
    >>> import methods
    >>> from methods import hicache
    >>> pipe = methods.tiny("dit")
    >>> with hicache.apply(pipe, hicache.Config(interval=3, first_enhance=2)) as patch:
    ...     images = pipe([3], num_inference_steps=8, output_type="np").images
    >>> patch.report()["computed"], patch.report()["forecast"]
    (48, 48)
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from methods import taylorseer
from methods._core.cache import over_branches
from methods._core.context import StepContext
from methods._core.patch import Patch, per_denoiser

__all__ = ["OFF", "TUNE", "Config", "apply", "hermite", "terms"]


@dataclass(frozen=True, kw_only=True)
class Config:
    interval: int = 6             # N; the official code on FLUX.1-dev
    max_order: int = 2            # O; there 1 or 2; 0 reuses
    first_enhance: int = 3        # full steps at the start
    sigma: float = 0.5            # there 0.5, in its launcher 0.7; in (0, 1]
    basis: str = "hermite"        # "power": sigma^(2n) k^n, an ablation of the authors

    def __post_init__(self):
        taylorseer.Config(interval=self.interval, max_order=self.max_order, first_enhance=self.first_enhance)
        if not 0 < self.sigma <= 1:
            raise ValueError(f"sigma={self.sigma} outside (0, 1]")
        if self.basis not in ("hermite", "power"):
            raise ValueError(f"basis={self.basis!r} must be 'hermite' or 'power'")


OFF = Config(interval=1)
TUNE = tuple({"interval": interval, "first_enhance": 2} for interval in (2, 3, 4, 6))


def hermite(x: float, order: int) -> list[float]:
    """H_0(x) ... H_order(x) of the physicists: H_(n+1) = 2x H_n - 2n H_(n-1)."""
    found = [1.0, 2.0 * x]
    for n in range(1, order):
        found.append(2 * x * found[n] - 2 * n * found[n - 1])
    return found[:order + 1]


def terms(k: int, config: Config) -> list[float]:
    """What each factor D0 ... DO is multiplied by, k steps behind the last full one."""
    orders, sigma = range(config.max_order + 1), config.sigma
    values = hermite(sigma * k, config.max_order) if config.basis == "hermite" else [(sigma * k) ** n for n in orders]
    return [sigma ** n * values[n] / math.factorial(n) for n in orders]


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Forecast the branch outputs of every transformer block between full steps.

    Raises:
        ValueError: a UNet, or already applied.
    """
    patch = Patch(target, "hicache")
    if config.interval == 1:
        return patch
    what = "chain of transformer blocks (on a UNet use deepcache)"
    blocks = patch.require(() if patch.denoiser.unet else patch.denoiser.blocks, what)
    schedule = taylorseer.Config(interval=config.interval, max_order=config.max_order, first_enhance=config.first_enhance)
    known, at = patch.slot(), {}                                # known: (last full step, highest order of differences then)
    seers = over_branches(patch.around, blocks, lambda: taylorseer.Forecast(patch.slot, at))

    def decide(context: StepContext) -> None:
        last, order = known.value or (None, 0)
        full = taylorseer.is_full(context.i, last, schedule)
        if full:
            order = min(order + 1, config.max_order) if last is not None and context.i > config.first_enhance - 2 else 0
            known.value = context.i, order
        k = 0 if last is None else context.i - last
        kind = dict(dtype=torch.promote_types(context.sample.dtype, torch.float32), device=context.sample.device)
        at["gaps"] = [torch.tensor(k if n < order else math.inf, **kind) for n in range(config.max_order)]
        at["terms"] = [torch.tensor(term, **kind) for term in terms(k, config)]
        for branch, seer in seers:
            seer.reuse = seer.ready and not full
            patch.skips((branch.module, *branch.feeds) if seer.reuse else ())
            patch.counts["forecast" if seer.reuse else "computed"] += 1
            patch.tally(seer.reuse, 1)

    patch.each_call(decide)
    patch.explain(lambda: f"the first {config.first_enhance} steps are full")
    return patch.on()
