"""FORA - FORA: Fast-Forward Caching in Diffusion Transformer Acceleration

Pratheba Selvaraju, Tianyu Ding, Tianyi Chen, Ilya Zharkov, Luming Liang, arXiv 2024. arXiv:2407.01425. Code: prathebaselva/FORA

Idea: the outputs of attention and MLP change slowly from step to step. Every N-th step computes them and keeps them; the
steps between add the kept outputs to the residual stream, each still scaled by the gate of its own timestep.

Map
    static schedule  compute at s = T-1 and every multiple of N, s counting down    computes
    caching          keep the attention and MLP outputs, before their gates         methods._core.cache.Reuse
    reuse            in every block of the transformer                              apply

Departures
    The official code covers DiT only. On PixArt and Latte the cross-attention output is kept alike; on SD3, Flux and
    CogVideoX so are the outputs for the text stream. A Flux single-stream block keeps the projection of its joined
    attention and MLP.
    `count_from="start"` counts steps up instead, and then refreshes other steps than the official code.
    The layer norms of a block still run on reuse steps; the official code skips them. They are under 1 % of a block.

Example
    >>> import methods
    >>> from methods import fora
    >>> pipe = methods.tiny("dit")
    >>> with fora.apply(pipe, fora.Config(interval=2)) as patch:
    ...     images = pipe([3], num_inference_steps=4, output_type="np").images
    >>> patch.report()["computed"], patch.report()["reused"]
    (36, 12)
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods._core.cache import Reuse, over_branches
from methods._core.context import StepContext
from methods._core.patch import Patch, per_denoiser

__all__ = ["OFF", "Config", "apply", "computes"]


@dataclass(frozen=True, kw_only=True)
class Config:
    interval: int = 3             # N; default of the official README
    count_from: str = "end"       # "end": s = T-1 ... 0 as in the official code; "start": s = 0 ... T-1

    def __post_init__(self):
        if self.interval < 1:
            raise ValueError(f"interval={self.interval} must be at least 1")
        if self.count_from not in ("start", "end"):
            raise ValueError(f"count_from={self.count_from!r} must be 'start' or 'end'")


OFF = Config(interval=1)
TUNE = ({"interval": 2}, {"interval": 3}, {"interval": 4}, {"interval": 6})


def computes(i: int, steps: int, interval: int, count_from: str = "end") -> bool:
    """Static schedule: whether step `i` of `steps` computes its features. The first step always does."""
    s = steps - 1 - i if count_from == "end" else i
    return i == 0 or s % interval == 0


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Reuse the branch outputs of every transformer block between compute steps.

    Args:
        target: a diffusers pipeline over a diffusion transformer.

    Raises:
        ValueError: a bare model (the schedule needs the number of steps), a UNet, or already applied.
    """
    patch = Patch(target, "fora")
    if config.interval == 1:
        return patch
    patch.require_pipeline()
    blocks = patch.require(() if patch.denoiser.unet else patch.denoiser.blocks,
                           "chain of transformer blocks (on a UNet use deepcache)")
    reuses = over_branches(patch.around, blocks, lambda: Reuse(patch.slot))

    def decide(context: StepContext) -> None:
        due = context.fresh or computes(context.i, context.steps, config.interval, config.count_from)
        for branch, reuse in reuses:
            reuse.reuse = reuse.ready and not due
            patch.skips((branch.module, *branch.feeds) if reuse.reuse else ())
            patch.counts["reused" if reuse.reuse else "computed"] += 1
            patch.tally(reuse.reuse, 1)

    patch.each_call(decide)
    return patch.on()
