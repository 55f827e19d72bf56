"""SmoothCache - SmoothCache: A Universal Inference Acceleration Technique for Diffusion Transformers

Joseph Liu, Joshua Geddes, Ziyu Guo, Haomiao Jiang, Mahesh Kumar Nandwana, CVPRW 2025. arXiv:2411.10510.
Code: Roblox/SmoothCache

Idea: how much the outputs of attention and MLP change from step to step hardly depends on what is drawn. So it is measured
once, in a run of the model as it is, and a schedule is fixed from it: an output is reused for as many steps, up to three, as it
lies within a threshold of the one that would take its place. All blocks share the schedule of a kind of branch.

Map
    error        relative L1 distance of outputs 1 to R steps apart, mean over blocks       observe
    schedule     from each step that computes the longest reuse within the threshold        scan, schedule
    reuse        outputs of branches, before their gates                                    methods._core.cache.Reuse

Departures
    The official helper for diffusers reuses self-attention alone; here it is each kind of branch that the schedule names, as
    in its helper for DiT: "attn", "cross", "ff", on two streams "ff_context", on single-stream blocks "total".
    The official code keys a schedule by counting calls, and goes on counting in the next run, which then computes everything;
    guidance in two calls counts double. Here a step is one of the run, and each branch of guidance keeps its own.
    A run of another length than those of the schedule is refused; the official code computes what lies behind its end.
    Of a module that gives several tensors all are one vector. Schedules for single blocks, which the official code has for
    comparison with another method, are left out.

Example
    >>> import methods
    >>> from methods import smoothcache
    >>> pipe, changes = methods.tiny("dit"), {}
    >>> with smoothcache.observe(pipe, changes):
    ...     images = pipe([3], num_inference_steps=6, output_type="np").images
    >>> found = smoothcache.schedule(changes, threshold=1.0)
    >>> with smoothcache.apply(pipe, smoothcache.Config(schedule=found)) as patch:
    ...     images = pipe([3], num_inference_steps=6, output_type="np").images
    >>> patch.report()["state"]
    'engaged'
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from methods._core.cache import Reuse, over_branches
from methods._core.context import StepContext
from methods._core.denoiser import Branch
from methods._core.look import relative_change
from methods._core.patch import Patch, per_denoiser
from methods._core.schedule import Changes, Read, Schedule, always, means, of_length, read, watch

__all__ = ["FIFTY", "OFF", "TINY", "Config", "apply", "observe", "scan", "schedule"]

WORD = "1000" + 2 * "100" + 19 * "10" + "11"
FIFTY = {"attn": WORD, "ff": WORD}                # of the authors, for DiT-XL/2 and 50 steps of DDIM, with a threshold of 0.18


@dataclass(frozen=True, kw_only=True)
class Config:
    schedule: Schedule | Read | str | Path = tuple(FIFTY.items())       # or a JSON file; {}: nothing is reused

    def __post_init__(self):
        object.__setattr__(self, "schedule", read(self.schedule))


OFF = Config(schedule={})
TINY = Config(schedule={kind: ["10" * (n // 2) + "1" * (n % 2) for n in range(1, 41)] for kind in ("attn", "ff", "total")})


def scan(errors: Sequence[Sequence[float]], threshold: float) -> str:
    """A word of the schedule from errors, one row for each lag from 1 on, of which the first has one entry less than steps.

    From each step that computes the longest lag whose error is at most the threshold is reused. The last step computes.
    """
    steps, word = len(errors[0]) + 1, ""
    while len(word) < steps:
        i = len(word)
        reused = max((lag for lag, row in enumerate(errors, 1) if i < len(row) and row[i] <= threshold), default=0)
        word += "1" + "0" * reused
    return word[:steps - 1] + "1"


def schedule(changes: Changes, threshold: float) -> dict[str, str]:
    """The schedule of what `observe` saw in runs of one length: kind of branch -> word.

    Raises:
        ValueError: nothing was observed.
    """
    if not changes:
        raise ValueError("nothing was observed: a run of two steps or more is needed")
    return {kind: scan(errors, threshold) for kind, errors in means(changes).items()}


def _branches(patch: Patch, kinds: Iterable[str] | None = None) -> list[tuple[Branch, Reuse]]:
    """What stands around every branch of every block, or around those of `kinds`."""
    blocks = patch.require(() if patch.denoiser.unet else patch.denoiser.blocks,
                           "chain of transformer blocks (on a UNet use block_caching)")
    if kinds is not None:
        blocks = [replace(block, branches=tuple(each for each in block.branches if each.name in kinds)) for block in blocks]
    return over_branches(patch.around, blocks, lambda: Reuse(patch.slot))


def observe(target: Any, changes: Changes, lags: int = 3) -> Patch:
    """Run a transformer as it is, and append to `changes` how the outputs of its branches changed, for every step and lag.

    Raises:
        ValueError: `lags` is less than 1, or a UNet.
    """
    if lags < 1:
        raise ValueError(f"lags={lags} must be at least 1")
    patch = Patch(target, "smoothcache_observe", edits=True)
    branches = _branches(patch)

    def compute(context: StepContext) -> None:
        for _, reuse in branches:
            reuse.reuse = False

    patch.each_call(compute)
    places = ((branch.name, reuse.slots) for branch, reuse in branches)
    watch(patch, places, lags, relative_change, changes)                  # called with (old, new), it divides by the later
    return patch.on()


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Reuse the outputs of the branches of every block in the steps in which the schedule says so.

    Args:
        target: a diffusers pipeline over a diffusion transformer.

    Raises:
        ValueError: a bare model (the schedule goes by the steps of a run), a UNet, a schedule that names no kind of branch of
            this model, or already applied. While it runs: a run of another number of steps.
    """
    patch = Patch(target, "smoothcache")
    if always(config.schedule):
        return patch
    patch.require_pipeline()
    kinds = [kind for kind, _ in config.schedule]
    branches = patch.require(_branches(patch, kinds), f"branch of kind {' or '.join(kinds)}")

    def decide(context: StepContext) -> None:
        words = of_length(config.schedule, context.steps, patch.name)
        for branch, reuse in branches:
            reuse.reuse = reuse.ready and words[branch.name][context.i] == "0"
            patch.skips((branch.module, *branch.feeds) if reuse.reuse else ())
            patch.counts["reused" if reuse.reuse else "computed"] += 1
            patch.tally(reuse.reuse, 1)

    patch.each_call(decide)
    patch.explain(lambda: "the schedule computes every step of this run")
    return patch.on()
