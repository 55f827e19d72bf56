"""Block Caching - Cache Me if You Can: Accelerating Diffusion Models through Block Caching

Felix Wimbauer, Bichen Wu, Edgar Schoenfeld, Xiaoliang Dai, Ji Hou, Zijian He, Artsiom Sanakoyeu, Peizhao Zhang, Sam Tsai,
Jonas Kohler, Christian Rupprecht, Daniel Cremers, Peter Vajda, Jialiang Wang, CVPR 2024. arXiv:2312.03209.

Idea: each block of a UNet changes what it adds to its input in a way of its own: some hardly at first, some hardly at the end,
and nearly the same for every prompt. So the changes are measured once, and each block gets a schedule: what it added is added
again until the changes since have summed up to a threshold.

Map
    L1rel, change of C(x) from step to step            change, observe
    schedule, Eq. 7                                    word, schedule
    cached step of a UNet: C of before, x of now       _Transformer
    the same of a chain of blocks                      methods._core.cache.Delta

Departures
    There is no official code. Blocks are the spatial transformers of a UNet, as in the paper, by their number in the order of
    execution; resnets always run. On a transformer they are its blocks, on which the paper did not try it.
    Eq. 7 can be read in two ways: that the sum stands for the drift of what is reused, so that it may reach the threshold, or
    to the letter, which takes the change behind the step along and computes one step earlier: `early=True`.
    Where a block adds nothing its change is 0, and infinite once it adds something; the ratio would be undefined.
    The adjustment of scale and shift, which is trained, is left out. A run of another length is refused.

Example
    >>> import methods
    >>> from methods import block_caching
    >>> pipe, changes = methods.tiny("dit"), {}
    >>> with block_caching.observe(pipe, changes):
    ...     images = pipe([3], num_inference_steps=6, output_type="np").images
    >>> found = block_caching.schedule(changes, delta=0.6)
    >>> with block_caching.apply(pipe, block_caching.Config(schedule=found)) as patch:
    ...     images = pipe([3], num_inference_steps=6, output_type="np").images
    >>> patch.report()["state"]
    'engaged'
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from methods._core.cache import Delta, Slot
from methods._core.context import StepContext
from methods._core.look import relative_change
from methods._core.patch import Patch, per_denoiser
from methods._core.schedule import Changes, Read, Schedule, always, means, of_length, read, watch

__all__ = ["OFF", "TINY", "TWENTY", "Config", "apply", "change", "observe", "schedule", "word"]

TWENTY = {"0": "10000" + 3 * "1000" + "100"}      # the one that the paper draws: LDM-512, 20 steps of DPM, delta = 0.5


@dataclass(frozen=True, kw_only=True)
class Config:
    schedule: Schedule | Read | str | Path = tuple(TWENTY.items())      # number of a block -> word; or a JSON file; {}: none

    def __post_init__(self):
        object.__setattr__(self, "schedule", read(self.schedule))


OFF = Config(schedule={})
TINY = Config(schedule={number: ["10" * (n // 2) + "1" * (n % 2) for n in range(1, 41)] for number in "01"})


def change(old: Tensor, new: Tensor) -> float:
    """L1rel: how much what a block adds changed, relative to the earlier step."""
    return relative_change(new, old) if old.any() else math.inf if new.any() else 0.0


def word(changes: Sequence[float], delta: float, early: bool = False) -> str:
    """The word of a block for one step more than it has changes from a step to the next.

    A value lasts as long as the changes since it was computed sum up to at most `delta`; with `early` the change from the step
    itself to the next one counts too.
    """
    found, total = "1", 0.0
    for i, last in enumerate(changes, 1):
        total += last
        ahead = changes[i] if early and i < len(changes) else 0.0
        due = total + ahead > delta
        found, total = found + "01"[due], 0.0 if due else total
    return found


def schedule(changes: Changes, delta: float = 0.5, early: bool = False) -> dict[str, str]:
    """The schedule of what `observe` saw in runs of one length: number of a block -> word.

    Raises:
        ValueError: nothing was observed.
    """
    if not changes:
        raise ValueError("nothing was observed: a run of two steps or more is needed")
    return {number: word(rows[0], delta, early) for number, rows in means(changes).items()}


class _Transformer:
    """Around a spatial transformer of a UNet: keeps what it adds, or adds that. The host sets `reuse`."""

    def __init__(self, slot: Slot, module: nn.Module):
        self.slot, self.module, self.reuse = slot, module, False

    @property
    def ready(self) -> bool:
        return self.slot.value is not None

    def around(self, forward, *args, **kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        if self.reuse:
            return (x + self.slot.get(),)
        out = forward(*args, **kwargs)
        self.slot.keep(out[0] - x)
        return out

    def arounds(self):
        return [(self.module, self.around)]


def _blocks(patch: Patch) -> list[tuple[nn.Module, _Transformer | Delta]]:
    """The blocks of a model in the order of execution, each with what may stand around it."""
    denoiser = patch.denoiser
    if denoiser.unet:
        found = [module for stage in denoiser.unet for module in stage.attentions if hasattr(module, "transformer_blocks")]
        return [(module, _Transformer(patch.slot(), module)) for module in patch.require(found, "spatial transformer")]
    chain = patch.require(denoiser.chain, "spatial transformers, nor a chain of transformer blocks")
    return [(block.module, Delta(patch.slot(), [block])) for block in chain]


def observe(target: Any, changes: Changes) -> Patch:
    """Run a model as it is, and append to `changes` how what its blocks add changed in each step, by the number of the block.

    Raises:
        ValueError: no spatial transformers and no chain of blocks.
    """
    patch = Patch(target, "block_caching_observe", edits=True)
    blocks = _blocks(patch)
    for place in (place for _, block in blocks for place in block.arounds()):
        patch.around(*place)
    watch(patch, ((str(n), [block.slot]) for n, (_, block) in enumerate(blocks)), 1, change, changes)
    return patch.on()


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Add again what a block added before, in the steps in which its schedule says so.

    Args:
        target: a diffusers pipeline over a UNet with spatial transformers, or over a chain of transformer blocks.

    Raises:
        ValueError: a bare model (the schedule goes by the steps of a run), no such block, or already applied. While it runs: a
            run of another number of steps.
    """
    patch = Patch(target, "block_caching")
    if always(config.schedule):
        return patch
    patch.require_pipeline()
    blocks = _blocks(patch)
    for number, _ in config.schedule:
        if number not in map(str, range(len(blocks))):
            raise ValueError(f"block_caching: the schedule names block {number}; this {type(patch.model).__name__} has blocks "
                             f"0 to {len(blocks) - 1}")
    chosen = {number: blocks[int(number)] for number, _ in config.schedule}
    for place in (place for _, block in chosen.values() for place in block.arounds()):
        patch.around(*place)

    def decide(context: StepContext) -> None:
        words = of_length(config.schedule, context.steps, patch.name)
        reused = 0
        for number, (module, block) in chosen.items():
            block.reuse = block.ready and words[number][context.i] == "0"
            patch.skips([module] if block.reuse else ())
            reused += block.reuse
        patch.counts["reused"] += reused
        patch.counts["computed"] += len(blocks) - reused
        patch.tally(reused, len(blocks))

    patch.each_call(decide)
    patch.explain(lambda: "the schedule computes every step of this run")
    return patch.on()
