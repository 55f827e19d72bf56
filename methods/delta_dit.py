"""∆-DiT - ∆-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers

Pengtao Chen, Mingzhu Shen, Peng Ye, Jianjian Cao, Chongjun Tu, Christos-Savvas Bouganis, Yiren Zhao, Tao Chen, arXiv 2024.
arXiv:2406.01125.

Idea: a transformer has no long skip connections, so a kept feature would hide the new latent. What is kept is what a range
of blocks adds to its input. Early steps draw outlines, for which the front blocks matter: they leave out the rear ones.
Late steps draw details and leave out the front.

Map
    Delta cache       x_out = x_in + (F(x) - x) of the last computing step       methods._core.cache.Delta
    cache interval    one computing step, then N - 1 that reuse                  stage
    stage adaptivity  rear range up to step b, front range behind it             stage, span

Departures
    There is no official code. Of the settings b = 12 of 20 steps is reported; that the range holds three quarters of the
    blocks follows from N = 2 and the reported speed-up of 1.6, and is not stated.
    Sources differ in the end from which b is counted: `count_from="start"` makes the first b steps the outline stage,
    "end" the last b steps the detail stage.
    Each stage begins with a computing step, which keeps the delta of its own range only.
    Where text is a stream of its own (SD3, Flux, CogVideoX) it has a delta too. On Latte, which lays its tokens out anew
    between blocks, each block of the range has its own: their sum is that of the range.

Example
    >>> import methods
    >>> from methods import delta_dit
    >>> pipe = methods.tiny("dit")
    >>> with delta_dit.apply(pipe, delta_dit.Config(share=0.5, switch=2)) as patch:
    ...     images = pipe([3], num_inference_steps=4, output_type="np").images
    >>> patch.report()["computed"], patch.report()["skipped"]
    (18, 6)
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods._core.cache import Delta, chains
from methods._core.context import StepContext
from methods._core.patch import Patch, per_denoiser

__all__ = ["OFF", "TINY", "Config", "apply", "span", "stage"]


@dataclass(frozen=True, kw_only=True)
class Config:
    interval: int = 2             # N
    share: float = 0.75           # N_c / N_b, the blocks of the range among all
    switch: int = 12              # b, steps of one stage, see count_from
    count_from: str = "start"     # "start": the first b steps are the outline stage; "end": the last b the detail stage

    def __post_init__(self):
        if self.interval < 1:
            raise ValueError(f"interval={self.interval} must be at least 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} outside [0, 1]")
        if self.switch < 0:
            raise ValueError(f"switch={self.switch} must not be negative")
        if self.count_from not in ("start", "end"):
            raise ValueError(f"count_from={self.count_from!r} must be 'start' or 'end'")


OFF = Config(interval=1)
TINY = Config(share=0.5, switch=2)                # the runs of the tests are shorter than the default stage
TUNE = ({"share": 0.5}, {"share": 0.75}, {"share": 0.75, "interval": 3})


def stage(i: int, steps: int | None, config: Config) -> tuple[bool, int]:
    """Stage adaptivity: whether step `i` of `steps` is of the outline stage, and its number within its stage, from 0, of
    which every N-th computes."""
    first = config.switch if config.count_from == "start" else max(0, steps - config.switch)       # of the detail stage
    return (True, i) if i < first else (False, i - first)


def span(depth: int, share: float, outline: bool) -> range:
    """The N_c of `depth` blocks that a stage leaves out: the rear ones in the outline stage, else the front."""
    count = round(share * depth)
    return range(depth - count, depth) if outline else range(count)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Leave out the rear blocks in early steps and the front blocks in late ones, adding what they added before.

    Args:
        target: a diffusers pipeline over a diffusion transformer, or with `count_from="start"` that transformer.

    Raises:
        ValueError: a UNet, a bare model where b is counted from the end, too small a share, or already applied; in a run,
            a ControlNet.
    """
    patch = Patch(target, "delta_dit")
    if config.interval == 1 or config.share == 0:
        return patch
    if config.count_from == "end":
        patch.require_pipeline()
    blocks = patch.require(patch.denoiser.chain, "chain of transformer blocks (on a UNet use deepcache)")
    patch.require(span(len(blocks), config.share, True), f"range of share={config.share}")
    deltas = [Delta(patch.slot(), chain) for chain in chains(blocks)]
    for module, around in (place for delta in deltas for place in delta.arounds()):
        patch.around(module, around)

    def decide(context: StepContext) -> None:
        if context.denoiser.adds_between(context.inputs):
            raise ValueError("delta_dit leaves out blocks between which a ControlNet adds to the tokens: run without one")
        outline, number = stage(context.i, context.steps, config)
        skipped = 0
        for delta in deltas:
            delta.choose(span(len(blocks), config.share, outline))
            delta.reuse = delta.ready and number % config.interval > 0
            patch.skips([block.module for block in delta.blocks] if delta.reuse else ())
            skipped += len(delta.blocks) * delta.reuse
        patch.counts["skipped"] += skipped
        patch.counts["computed"] += len(blocks) - skipped
        patch.tally(skipped, len(blocks))

    patch.each_call(decide)
    patch.explain(lambda: "every step of this run begins a stage or an interval")
    return patch.on()
