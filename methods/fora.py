"""FORA - FORA: Fast-Forward Caching in Diffusion Transformer Acceleration

Pratheba Selvaraju, Tianyu Ding, Tianyi Chen, Ilya Zharkov, Luming Liang, arXiv 2024. arXiv:2407.01425. Code: prathebaselva/FORA

Idea: the outputs of attention and MLP change slowly from step to step. Every N-th step computes them and keeps them; the
steps between add the kept outputs to the residual stream, each still scaled by the gate of its own timestep.

Map
    static schedule  compute at s = T-1 and every multiple of N, s counting down    computes
    caching          keep the attention and MLP outputs, before their gates         _Reuse
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

from methods._core.context import StepContext
from methods._core.denoiser import describe
from methods._core.patch import Feature, Patch

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


def computes(i: int, steps: int, interval: int, count_from: str = "end") -> bool:
    """Static schedule: whether step `i` of `steps` computes its features. The first step always does."""
    s = steps - 1 - i if count_from == "end" else i
    return i == 0 or s % interval == 0


class _Reuse:
    """Keeps the output of one module, or gives back the kept one. The host sets `reuse` before each call."""

    def __init__(self, feature: Feature):
        self.feature = feature
        self.reuse = False

    def around(self, forward, *args, **kwargs):
        if not self.reuse:
            self.feature.value = forward(*args, **kwargs)
        return self.feature.value


class _Mute:
    """Skips a module that only feeds a reused one: gives something of the right shape that nobody reads."""

    def __init__(self, reuse: _Reuse, width: int):
        self.reuse, self.width = reuse, width

    def around(self, forward, *args, **kwargs):
        if not self.reuse.reuse:
            return forward(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        return x[..., :1].expand(*x.shape[:-1], self.width)


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
    denoiser = describe(patch.model)
    blocks = patch.require(() if denoiser.unet else denoiser.blocks, "chain of transformer blocks (on a UNet use deepcache)")
    reuses = []
    for branch in (branch for block in blocks for branch in block.branches):
        reuse = _Reuse(patch.feature())
        reuses.append(reuse)
        patch.around(branch.module, reuse.around)
        for feed in branch.feeds:
            patch.around(feed, _Mute(reuse, getattr(feed, "out_features", None) or feed.out_dim).around)

    def decide(context: StepContext) -> None:
        reuse = not (context.fresh or computes(context.i, context.steps, config.interval, config.count_from))
        patch.skipping = reuse
        for each in reuses:
            each.reuse = reuse
        patch.counts["reused" if reuse else "computed"] += len(reuses)

    patch.each_call(decide)
    return patch
