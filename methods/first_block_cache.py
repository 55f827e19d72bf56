"""First Block Cache - First Block Cache, the dynamic cache of ParaAttention

Zeyi Cheng, GitHub 2025. https://github.com/chengzeyi/ParaAttention. Code: chengzeyi/ParaAttention

Idea: the first block always runs. What it adds to its tokens is compared with what it added when the other blocks last ran. If
it changed little, the others are left out, and what they added then is added again. The distance is to the last computed step,
so that it holds all drift since; nothing is summed up, fitted or forced.

Map
    r = x1 - x of the first block                            methods._core.look.first_blocks
    d = mean |r - R| / mean |R|                              methods._core.look.relative_change
    compute where d > threshold, then R = r                  apply
    reuse: what the other blocks added, to x1                methods._core.cache.Delta

Departures
    The first block is run ahead of the call, without other patches, and its output then given: so the decision falls on the
    host, and blocks compile whole. That one block runs uncompiled, and embedders run twice. Where another patch stands within
    it, computed steps run it once more, with that patch.
    One distance is taken over the batch, as there; branches of guidance that are called apart have one each.
    A call with residuals of a ControlNet or with skipped layers computes all: diffusers' hooks lose residuals on reuse.
    Where a model lays its tokens out anew between blocks each part has its residual; their sum is that of diffusers.
    threshold = 0 is off. With it diffusers' hooks still reuse where two inputs are equal.

Example
    >>> import methods
    >>> from methods import first_block_cache
    >>> pipe = methods.tiny("dit")
    >>> with first_block_cache.apply(pipe, first_block_cache.Config(threshold=0.3)) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["computed"] + patch.report()["reused"]
    10
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods._core.cache import Delta, chains
from methods._core.context import StepContext
from methods._core.look import relative_change
from methods._core.patch import Patch, per_denoiser

__all__ = ["OFF", "TINY", "Config", "apply"]


@dataclass(frozen=True, kw_only=True)
class Config:
    threshold: float = 0.05       # diffusers; ParaAttention's guide has 0.08 for FLUX.1-dev, up to 0.12
    warmup: int = 0               # steps at the start that compute; the first always does

    def __post_init__(self):
        if self.threshold < 0:
            raise ValueError(f"threshold={self.threshold} must not be negative")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup} must not be negative")


OFF = Config(threshold=0.0)
TINY = Config(threshold=1.4)      # random weights change more from step to step
TUNE = ({"threshold": 0.05}, {"threshold": 0.1}, {"threshold": 0.2}, {"threshold": 0.3})


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Leave out all blocks but the first while what it adds is within `threshold` of what it added when they last ran.

    Raises:
        ValueError: a bare model, a UNet, a single block, or already applied.
    """
    patch = Patch(target, "first_block_cache")
    if config.threshold == 0:
        return patch
    patch.require_pipeline()
    chain = patch.require(patch.denoiser.chain, "chain of transformer blocks (on a UNet use deepcache)")
    first, rest = chain[0], patch.require(chain[1:], "second block to leave out")
    ahead, memory, seen = [], patch.slot(), []            # what the first block gives; R; all distances
    deltas = [Delta(patch.slot(), blocks) for blocks in chains(rest)]
    patch.around(first.module, lambda forward, *args, **kwargs: ahead.pop() if ahead else forward(*args, **kwargs))
    for place in (place for delta in deltas for place in delta.arounds()):
        patch.around(*place)

    def decide(context: StepContext) -> None:
        ahead.clear()
        denoiser, due = context.denoiser, True
        if not denoiser.left_out(context.inputs):
            added, out = patch.run_first(context)
            if (memory.value is not None and all(delta.ready for delta in deltas) and context.i >= config.warmup
                    and not denoiser.adds_between(context.inputs)):
                seen.append(relative_change(added, memory.get()))
                due = not seen[-1] <= config.threshold            # NaN, where nothing was added, computes
            if due:
                memory.keep(added)
            if not due or patch.unshared(first.module):
                ahead.append(out)
        for delta in deltas:
            delta.reuse = not due
        patch.skips([first.module] * bool(ahead) + [block.module for block in rest] * (not due))
        patch.counts["computed" if due else "reused"] += 1
        patch.tally((not due) * len(rest), len(chain))

    patch.each_call(decide)
    patch.each_run(seen.clear)
    patch.explain(lambda: f"the first block changed by more than {config.threshold} in every step; by {min(seen):.3g} at least"
                  if seen else "the first steps compute, and those with a ControlNet or skipped layers")
    return patch.on()
