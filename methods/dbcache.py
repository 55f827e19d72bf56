"""DBCache - Cache-DiT: A PyTorch-native Inference Engine with Cache, Parallelism, Quantization and CPU Offload for DiTs

DefTruth, vipshop.com, GitHub 2025. https://github.com/vipshop/cache-dit. Code: vipshop/cache-dit

Idea: First Block Cache with several blocks at both ends. The first n always run, and what they add to their tokens is compared
with what they added when the middle last ran. If it changed little, the middle is left out, and what it added then is added
again. The last m always run too, on a state that is in part up to date, and repair some of the loss. Counters and a list of
steps bound how often the middle may be left out.

Map
    Fn      the first n blocks; r = what they add          Config.first, methods._core.look.first_blocks
    Bn      the last m blocks, outside of what is kept     Config.last
    d       mean |R - r| / mean |R|                        methods._core.look.relative_change
    rule    warm-up, mask, counters, threshold             Rule.due
    reuse   what the middle added, to x1                   methods._core.cache.Delta

Departures
    Fn + Bn that leave no middle are refused; the release takes them and does nothing, or runs blocks twice.
    The first blocks are run ahead of the call, without other patches, and their output then given, as in first_block_cache;
    with a static mask nothing is compared, and nothing runs ahead. A call with residuals of a ControlNet or with skipped layers
    computes all. Branches of guidance that are called apart decide apart.
    FLUX.1's double and single blocks count as one list, as there by default. Calibrators (TaylorSeer, FoCa), the filter of
    important tokens, and a distance over every s-th channel are left out.

Example
    >>> import methods
    >>> from methods import dbcache
    >>> pipe = methods.tiny("dit")
    >>> with dbcache.apply(pipe, dbcache.Config(first=2, last=1, warmup=2, threshold=0.3)) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["computed"] + patch.report()["reused"]
    10
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods._core.cache import Delta, Passed, chains
from methods._core.context import StepContext
from methods._core.look import relative_change
from methods._core.patch import Patch, per_denoiser

__all__ = ["ELSEWHERE", "OFF", "TINY", "TUNE", "Config", "Rule", "apply"]


@dataclass(frozen=True, kw_only=True)
class Config:
    first: int = 8                       # n of Fn, blocks that always run and are compared
    last: int = 0                        # m of Bn, blocks that always run behind the middle
    threshold: float = 0.08              # d below which the middle is left out; 1 or more: always, 0: never
    warmup: int = 8                      # steps at the start that compute
    warmup_interval: int = 1             # of these, one in so many; the others are decided
    max_reused: int | None = None        # steps left out in a run; None: any
    max_running: int | None = None       # steps left out in a row; None: any
    max_total: float | None = None       # sum of all d from which on every step computes; None: any
    mask: tuple[int, ...] = ()           # for each step 1: compute, 0: decide, or leave out; (): decide in all
    static: bool = False                 # steps with 0 are left out without a look

    def __post_init__(self):
        if self.first < 1 or self.last < 0:
            raise ValueError(f"first={self.first} must be at least 1 and last={self.last} not negative")
        if self.threshold < 0:
            raise ValueError(f"threshold={self.threshold} must not be negative")
        if self.warmup < 0 or self.warmup_interval < 1:
            raise ValueError(f"warmup={self.warmup} must not be negative, warmup_interval={self.warmup_interval} at least 1")
        if not set(self.mask) <= {0, 1}:
            raise ValueError(f"mask={self.mask} must be of 0 and 1")
        if self.static and not self.mask:
            raise ValueError("static=True needs a mask")


OFF = Config(threshold=0.0)
TINY = Config(first=1, threshold=1.4, warmup=1, max_running=2)      # random weights change more from step to step
ELSEWHERE = ({"first": 1},)                          # where eight blocks leave no middle
TUNE = ({"threshold": 0.05}, {"threshold": 0.1}, {"threshold": 0.15}, {"threshold": 0.25})


@dataclass(frozen=True)
class Rule:
    """What a branch has done in a run: steps left out in all and in a row, and the sum of all changes."""

    reused: int = 0
    running: int = 0
    total: float = 0.0

    def due(self, config: Config, i: int, change: float | None) -> bool:
        """Whether the middle is computed in step i; `change` d, None where there is nothing to compare with."""
        ones = config.mask.index(0) if 0 in config.mask else len(config.mask)
        warmup = min(config.warmup, ones) if config.mask else config.warmup
        if i in range(0, warmup, config.warmup_interval) or config.mask[i:i + 1] == (1,):
            return True
        if config.static:
            return False
        bounds = ((self.reused, config.max_reused), (self.running, config.max_running), (self.total, config.max_total))
        if any(limit is not None and value >= limit for value, limit in bounds) or config.threshold <= 0 or change is None:
            return True
        return config.threshold < 1 and not change < config.threshold       # NaN, where nothing was added, computes

    def after(self, due: bool, change: float | None) -> Rule:
        """The same behind a step."""
        return Rule(self.reused + (not due), 0 if due else self.running + 1, self.total + (change or 0.0))


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Leave out the blocks between the first and the last ones while what the first add has changed little.

    Raises:
        ValueError: a bare model, a UNet, no middle, or already applied; in a run, a mask of another length.
    """
    patch = Patch(target, "dbcache")
    if config.threshold == 0 and not config.static:
        return patch
    patch.require_pipeline()
    chain = patch.require(patch.denoiser.chain, "chain of transformer blocks (on a UNet use deepcache)")
    head, middle = chain[:config.first], chain[config.first:len(chain) - config.last]
    if not middle:
        raise ValueError(f"first={config.first} and last={config.last} leave none of {len(chain)} blocks between them")
    ahead, memory, rule, seen = [], patch.slot(), patch.slot(), []      # what the first blocks give; R; a Rule; all changes
    passed = [Passed(block) for block in head[:-1]]
    for block, each in zip(head, passed, strict=False):
        patch.around(block.module, each.around)
    patch.around(head[-1].module, lambda forward, *args, **kwargs: ahead.pop() if ahead else forward(*args, **kwargs))
    deltas = [Delta(patch.slot(), blocks) for blocks in chains(middle)]
    for place in (place for delta in deltas for place in delta.arounds()):
        patch.around(*place)

    def decide(context: StepContext) -> None:
        if config.mask and len(config.mask) != context.steps:
            raise ValueError(f"the mask is for {len(config.mask)} steps, this run has {context.steps}")
        ahead.clear()
        denoiser, done, due, change = context.denoiser, rule.value or Rule(), True, None
        if not denoiser.left_out(context.inputs):
            able = all(delta.ready for delta in deltas) and not denoiser.adds_between(context.inputs)
            if not config.static:
                added, out = patch.run_first(context, len(head))
                if able and memory.value is not None:
                    change = relative_change(added, memory.get())
                    seen.append(change)
            due = not able or done.due(config, context.i, change)
            if not config.static:
                if due:
                    memory.keep(added)
                if not due or all(patch.unshared(block.module) for block in head):
                    ahead.append(out)
        rule.value = done.after(due, change)
        for each in passed:
            each.over = bool(ahead)
        for delta in deltas:
            delta.reuse = not due
        patch.skips([block.module for block in head] * bool(ahead) + [block.module for block in middle] * (not due))
        patch.counts["computed" if due else "reused"] += 1
        patch.tally((not due) * len(middle), len(chain))

    patch.each_call(decide)
    patch.each_run(seen.clear)
    patch.explain(lambda: f"the first blocks changed by {min(seen):.3g} at least, which is not below {config.threshold}"
                  if seen else "the first steps compute, and those with a ControlNet or skipped layers")
    return patch.on()
