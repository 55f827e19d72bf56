"""MagCache - MagCache: Fast Video Generation with Magnitude-Aware Cache

Zehong Ma, Longhui Wei, Feng Wang, Shiliang Zhang, Qi Tian, NeurIPS 2025. arXiv:2506.09045. Code: Zehong-Ma/MagCache

Idea: what all blocks add together keeps its direction from step to step, and its magnitude falls in a way that hardly depends
on the prompt. The ratios of magnitudes, measured once in one run, say how far a residual that is added again will be off. Their
product since the last computed step gives the error of a step, and while the sum of errors stays within a threshold the blocks
are left out. Nothing is looked at in a run: the steps that compute are known before it.

Map
    gamma   mean over tokens of |r_t| / |r_(t-1)|                  observe
    grid    gamma of the nearest step of the calibrated run        nearest
    A, E    A *= gamma, E += |1 - A|, from 1 and 0 on              accumulate
    rule    leave out while E <= threshold, at most K in a row     accumulate, Config
    reuse   add the residual of the last computed step             methods._core.cache.Delta

Departures
    The ratios in here are the official ones for FLUX.1-dev; any other model is refused until `observe` has measured it.
    They are spread over the steps of a run; one that starts late (image-to-image) wants ratios of such runs.
    The official code for Wan2.1 computes where E equals the threshold, rounds the share of steps in front down, and has two
    calls of guidance in one list; here a second call has a list of its own, else that of the first.
    threshold = 0 is off. In the official code it leaves out where a ratio is exactly 1.
    A call with residuals of a ControlNet or with nothing kept computes. On Latte each block has a residual; their sum is that
    of the model.

Example
    >>> import methods
    >>> from methods import magcache
    >>> pipe, ratios = methods.tiny("dit"), {}
    >>> with magcache.observe(pipe, ratios):
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> with magcache.apply(pipe, magcache.Config(ratios=tuple(ratios[0]), threshold=0.3)) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["computed"] + patch.report()["reused"]
    10
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from methods._core.cache import Delta, chains
from methods._core.context import StepContext, experts
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["OFF", "RATIOS", "TINY", "TUNE", "Config", "Since", "accumulate", "apply", "nearest", "observe"]

CHAIN = "chain of transformer blocks (on a UNet use deepcache)"
RATIOS = {                        # of the official code, by family: FLUX.1-dev, 28 steps
    "flux": (1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
             1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
             0.89062),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    threshold: float = 0.12           # delta (official code: FLUX.1-dev 0.24, Wan2.1 1.3B 0.12, 14B 0.24; diffusers 0.06)
    max_reused: int = 4               # K, steps left out in a row (FLUX.1-dev 5, Wan2.1 1.3B 4 or 2, 14B 6; diffusers 3)
    warmup: float = 0.2               # rho, share of the steps, from the start, that computes (FLUX.1-dev 0.1)
    ratios: tuple[float, ...] | None = None       # gamma of each step of a calibrated run; None: RATIOS
    second: tuple[float, ...] | None = None       # the same of the second call of a step, that of guidance; None: ratios
    always: tuple[int, ...] = ()      # steps of the calibrated run that compute (official code: FLUX.1-dev 11)

    def __post_init__(self):
        if self.threshold < 0:
            raise ValueError(f"threshold={self.threshold} must not be negative")
        if self.max_reused < 0:
            raise ValueError(f"max_reused={self.max_reused} must not be negative")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup={self.warmup} must be within [0, 1]")
        for name in ("ratios", "second"):
            ratios = getattr(self, name)
            if ratios is not None and not (ratios and all(0 <= ratio < float("inf") for ratio in ratios)):
                raise ValueError(f"{name}={ratios} must hold numbers, none negative")


OFF = Config(threshold=0.0)
TINY = Config(max_reused=2, ratios=(1.0,))        # no ratios were measured for random weights
TUNE = ({"threshold": 0.06, "max_reused": 3}, {"threshold": 0.12}, {"threshold": 0.24, "max_reused": 6})


class Since(NamedTuple):
    """Of the steps left out since one computed: A, their ratios multiplied; E, the sum of their errors; how many."""

    magnitude: float = 1.0
    error: float = 0.0
    steps: int = 0


def accumulate(since: Since, ratio: float, threshold: float, max_reused: int) -> tuple[bool, Since]:
    """Whether a step computes, and what goes on: nothing, after computing."""
    magnitude = since.magnitude * ratio
    then = Since(magnitude, since.error + abs(1 - magnitude), since.steps + 1)
    return (False, then) if then.error <= threshold and then.steps <= max_reused else (True, Since())


def nearest(i: int, steps: int, length: int) -> int:
    """The step of a run of `length` that is nearest to step `i` of one of `steps`; both ends are kept."""
    return length - 1 if steps == 1 else round(i * ((length - 1) / (steps - 1)))


def observe(target: Any, ratios: dict[int, list[float]]) -> Patch:
    """Run a transformer as it is, and write into `ratios`, for each call within a step (0; and 1 where guidance makes two), the
    magnitude of what all blocks add in each step of the last run, by that of the step before; 1 for the first.

    Raises:
        ValueError: a UNet, a pipeline with several denoisers, or nothing stands behind the blocks where their tokens could be
            met; in a run, the tokens there are not those that entered the first block.
    """
    if len(experts(target)) > 1:
        raise ValueError("magcache_observe follows one denoiser, and this pipeline has several")
    patch = Patch(target, "magcache_observe", edits=True)
    first = patch.require(patch.denoiser.chain, CHAIN)[0]
    tail = patch.require(filter(None, [patch.denoiser.tail]), "module behind its blocks")[0]
    last, entered, left = patch.slot(), [], []                # norms of the step before; tokens of this call

    def enter(forward, *args, **kwargs):
        entered.append(first.streams(args, kwargs)[0].clone())           # some blocks write into what they are given
        return forward(*args, **kwargs)

    def leave(forward, x: Tensor, *args, **kwargs):
        left.append(x)
        return forward(x, *args, **kwargs)

    def after(context: StepContext, output: Tensor) -> None:
        before, behind = entered.pop(), left.pop()
        if before.shape != behind.shape:
            raise ValueError(f"{patch.name}: {tuple(before.shape)} enters the blocks and {tuple(behind.shape)} leaves them")
        norms = (behind - before).float().norm(dim=-1)
        ratio = 1.0 if last.value is None else float((norms / last.get().clamp_min(1e-8)).mean())
        ratios.setdefault(context.call, []).append(ratio)
        last.keep(norms)
        patch.counts["observed"] += 1

    patch.around(first.module, enter, Claim.LOOK)
    patch.around(tail, leave, Claim.LOOK)
    patch.after_call(after)
    for values in (entered, left, ratios):
        patch.each_run(values.clear)
    return patch.on()


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Leave out all blocks while the error that the ratios tell, summed since they last ran, is within the threshold.

    Raises:
        ValueError: a bare model (it does not say how many steps a run has), a UNet, no ratios, or already applied.
    """
    patch = Patch(target, "magcache")
    if config.threshold == 0 or config.max_reused == 0:
        return patch
    patch.require_pipeline()
    blocks = patch.require(patch.denoiser.chain, CHAIN)
    ratios = config.ratios or RATIOS.get(patch.denoiser.family)
    if ratios is None:
        raise ValueError(f"magcache: no ratios are known for this {type(patch.model).__name__}; magcache.observe measures them")
    since, seen = patch.slot(), []                            # a Since; the errors of all steps asked about
    deltas = [Delta(patch.slot(), chain) for chain in chains(blocks)]
    for place in (place for delta in deltas for place in delta.arounds()):
        patch.around(*place)

    def decide(context: StepContext) -> None:
        told = config.second if config.second and context.call == 1 else ratios
        at = nearest(context.i, context.steps, len(told))
        due, then = True, Since()
        able = all(delta.ready for delta in deltas) and not context.denoiser.adds_between(context.inputs)
        if able and context.i >= int(config.warmup * context.steps + 0.5):
            known = since.value or Since()
            seen.append(known.error + abs(1 - known.magnitude * told[at]))
            due, then = accumulate(known, told[at], config.threshold, config.max_reused)
            if at in config.always:
                due, then = True, Since()
        since.value = then
        for delta in deltas:
            delta.reuse = not due
        patch.skips(() if due else (block.module for block in blocks))
        patch.counts["computed" if due else "reused"] += 1
        patch.tally(not due, 1)

    patch.each_call(decide)
    patch.each_run(seen.clear)
    patch.explain(lambda: f"the error of leaving out a step was {min(seen):.3g} at least, the threshold is {config.threshold}"
                  if seen else "the first steps compute, and those with a ControlNet")
    return patch.on()
