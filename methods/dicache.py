"""DiCache - DiCache: Let Diffusion Model Determine Its Own Cache

Jiazi Bu, Pengyang Ling, Yujie Zhou, Yibin Wang, Yuhang Zang, Tong Wu, Dahua Lin, Jiaqi Wang, ICLR 2026. arXiv:2508.17356.
Code: Bujiazi/DiCache

Idea: a shallow probe, the first m blocks, runs in every step. How much its output changes from step to step is summed up, and
while the sum stays below a threshold the other blocks are left out. Where the probe now stands between what it added in the
last two full steps tells how far the residual of all blocks has moved, too: it is continued along the line through their two
residuals, by that share.

Map
    probe      p of the first m blocks; Q = p - x                     methods._core.look.first_blocks
    e          mean |p - p'| / mean |p'|, p' of the step before       methods._core.look.relative_change
    when       compute when the sum of e reaches the threshold        apply
    g          mean |Q - Q2| / mean |Q1 - Q2|, within [1, clip]       gain
    how        R2 + g (R1 - R2), R1 and R2 of the last full steps     Pair.continued

Departures
    The residual of all blocks is that of the probe and those of the others together; where a model lays its tokens out anew
    between blocks each part has its own, and their sum is the official one.
    g is 0 / 0 where nothing moved, which leaves NaN in the official code; here it is 1 then, plain reuse.
    Only what is read of earlier steps is kept, two residuals; the official code keeps those of all full steps of FLUX.
    The official scripts differ: FLUX computes one step more at the start, and the last (ends=True), Wan clips g at 2.
    The probe runs ahead of the call, without other patches, and its output then given. A call with residuals of a ControlNet or
    with skipped layers computes all. Branches of guidance that are called apart decide apart.

Example
    >>> import methods
    >>> from methods import dicache
    >>> pipe = methods.tiny("dit")
    >>> with dicache.apply(pipe, dicache.Config(threshold=0.4)) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["computed"] + patch.report()["reused"]
    10
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from methods._core.cache import Delta, Passed, Slot, chains
from methods._core.context import StepContext
from methods._core.look import relative_change
from methods._core.patch import Patch, per_denoiser

__all__ = ["OFF", "TINY", "TUNE", "Config", "Pair", "apply", "forced", "gain"]


@dataclass(frozen=True, kw_only=True)
class Config:
    threshold: float = 0.1       # of the sum of e (official code: HunyuanVideo 0.1, Wan2.1 0.08, FLUX.1-dev 0.4)
    probe: int = 1               # m, blocks of the probe; the authors advise 1 to 5
    warmup: float = 0.2          # share of the steps, from the start, that computes
    ends: bool = False           # one step more at the start, and the last, compute (official code: FLUX.1-dev)
    clip: float = 1.5            # largest g (official code: Wan2.1 2); 1: plain reuse
    beside_input: bool = False   # e is |e of the probe - e of its input| (official code: an option for FLUX.1-dev, at 0.08)

    def __post_init__(self):
        if self.threshold < 0:
            raise ValueError(f"threshold={self.threshold} must not be negative")
        if self.probe < 1:
            raise ValueError(f"probe={self.probe} must be at least 1")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup={self.warmup} must be within [0, 1]")
        if self.clip < 1:
            raise ValueError(f"clip={self.clip} must be at least 1")


OFF = Config(threshold=0.0)
TINY = Config(threshold=1.6, warmup=0.0)      # random weights change more from step to step
TUNE = ({"threshold": 0.05}, {"threshold": 0.1}, {"threshold": 0.2}, {"threshold": 0.4})


def forced(config: Config, i: int, steps: int) -> bool:
    """Whether step i of a run computes whatever the probe says."""
    return i < int(config.warmup * steps) + config.ends or config.ends and i == steps - 1


def gain(now: Tensor, newest: Tensor, older: Tensor, clip: float) -> float:
    """g of three residuals of the probe (B, N, C); 1 where they do not tell."""
    moved, step = (float((x.float() - older.float()).abs().mean()) for x in (now, newest))
    return 1.0 if moved == step == 0 or moved != moved else min(max(moved / step if step else clip, 1.0), clip)


class Pair:
    """What was given in the last two full steps: a tensor, or the tensors of two streams, None where there is none."""

    def __init__(self, newest: Slot, older: Slot):
        self.newest, self.older = newest, older

    def push(self, x: tuple[Tensor | None, ...]) -> None:
        if self.newest.value is not None:
            self.older.keep(self.newest.get())
        self.newest.keep(x)

    def continued(self, g: float) -> tuple[Tensor | None, ...]:
        """older + g (newest - older); the newest where it is alone."""
        newest = self.newest.get()
        if self.older.value is None or g == 1:
            return newest
        return tuple(y if y is None else x + g * (y - x) for x, y in zip(self.older.get(), newest, strict=True))


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Leave out all blocks behind the probe while its changes since a full step sum up to less than `threshold`.

    Raises:
        ValueError: a bare model, a UNet, no block behind the probe, or already applied.
    """
    patch = Patch(target, "dicache")
    if config.threshold == 0:
        return patch
    patch.require_pipeline()
    chain = patch.require(patch.denoiser.chain, "chain of transformer blocks (on a UNet use deepcache)")
    head, rest = chain[:config.probe], patch.require(chain[config.probe:], "block behind the probe")
    memory, probes = patch.slot(), Pair(patch.slot(), patch.slot())     # (p, x, sum) of the call before; Q
    ahead, seen, full = [], [], []                  # what the probe gives; all e; Q of a call that computes
    passed = [Passed(block) for block in head[:-1]]
    for block, each in zip(head, passed, strict=False):
        patch.around(block.module, each.around)
    patch.around(head[-1].module, lambda forward, *args, **kwargs: ahead.pop() if ahead else forward(*args, **kwargs))
    deltas = [Delta(patch.slot(), blocks) for blocks in chains(rest)]
    residuals = [Pair(patch.slot(), patch.slot()) for _ in deltas]
    for place in (place for delta in deltas for place in delta.arounds()):
        patch.around(*place)

    def decide(context: StepContext) -> None:
        ahead.clear()
        full.clear()
        denoiser, due = context.denoiser, True
        if not denoiser.left_out(context.inputs):
            added, out = patch.run_first(context, len(head))
            probe, text = head[-1].split(out)
            before, total = probe - added, 0.0
            able = all(pair.newest.value is not None for pair in (probes, *residuals))
            if able and memory.value is not None and not denoiser.adds_between(context.inputs):
                old, entered, total = memory.get()
                change = relative_change(probe, old)
                if config.beside_input:
                    change = abs(change - relative_change(before, entered))
                total += change
                seen.append(change)
                due = forced(config, context.i, context.steps) or not total < config.threshold
            memory.keep((probe, before, 0.0 if due else total))
            if due:
                full.append(added)
            else:
                out = head[-1].output(probe + continue_from(added), text)
            if not due or all(patch.unshared(block.module) for block in head):
                ahead.append(out)
        for each in passed:
            each.over = bool(ahead)
        for delta in deltas:
            delta.reuse = not due
        patch.skips([block.module for block in head] * bool(ahead) + [block.module for block in rest] * (not due))
        patch.counts["computed" if due else "reused"] += 1
        patch.tally((not due) * len(rest), len(chain))

    def continue_from(added: Tensor) -> Tensor:
        """Give the parts behind the probe their continued residuals. -> what that of the probe is more than `added`"""
        alone = probes.older.value is None
        g = 1.0 if alone else gain(added, probes.newest.get()[0], probes.older.get()[0], config.clip)
        for delta, pair in zip(deltas, residuals, strict=True):
            delta.slot.keep(pair.continued(g))
        return probes.continued(g)[0] - added

    def remember(context: StepContext, output: Tensor) -> None:
        if full and all(delta.ready for delta in deltas):
            probes.push((full[0],))
            for delta, pair in zip(deltas, residuals, strict=True):
                pair.push(delta.slot.get())

    patch.each_call(decide)
    patch.after_call(remember)
    patch.each_run(seen.clear)
    patch.explain(lambda: f"the changes of the probe reached {config.threshold} in every step; the smallest was {min(seen):.3g}"
                  if seen else "the first steps compute, and those with a ControlNet or skipped layers")
    return patch.on()
