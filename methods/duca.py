"""DuCa - Accelerating Diffusion Transformers with Dual Feature Caching

Chang Zou, Evelyn Zhang, Runlin Guo, Haohang Xu, Conghui He, Xuming Hu, Linfeng Zhang, arXiv 2024. arXiv:2412.18911.
Code: Shenyi-Z/DuCa

Idea: reusing everything in a step does little more harm than renewing a few tokens, and the next step that renews a few puts
it right. So the steps between full ones alternate: conservative ones renew tokens as ToCa does, aggressive ones run no block
at all and hand the last hidden state to the final layer, under the timestep at hand.

Map
    cycle              full, conservative and aggressive steps               kinds
    conservative step  renew the chosen tokens                               methods.toca.Layers
    aggressive step    hidden state behind the last block, given again       methods._core.cache.Passed
    score              by attention, as ToCa                                 methods._core.attention.with_mass
    V-caching          tokens of small values first                          small_values
    random choice      equal in both halves of guidance                      drawn

Departures
    What a step does is decided once. The released code for DiT decides in every block, after block 0 has already changed the
    interval, so that steps come about in which blocks differ.
    Random scores are drawn once a step for all layers of a block, the released code draws for each layer.
    On PixArt the released code ranks the values of the mean of both halves of guidance.
    Latte stands in for Open-Sora (no diffusers class), with one cycle for all layers where the released code has a longer one
    for cross-attention. On Flux, for which nothing is released that runs, full steps are those of ToCa.
    All that is said of the renewal of tokens under `methods.toca` holds here.

Example
    >>> from methods import duca
    >>> duca.kinds(20, 3, "pixart")
    'FcAFcAFcAFcAFcAFcAFc'
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods import toca
from methods._core.attention import with_mass
from methods._core.cache import Passed, Reuse
from methods._core.context import StepContext
from methods._core.denoiser import check_whole
from methods._core.patch import Patch, per_denoiser

__all__ = ["OFF", "SCORES", "Config", "apply", "drawn", "kinds", "small_values"]

SCORES = ("attention", "value", "random")
FULL, CONSERVATIVE, AGGRESSIVE = "FcA"
BONUS = {"dit-ddim": 0.8, "dit-ddpm": 0.8}        # of the best token of each cell, where it is not that of ToCa


@dataclass(frozen=True, kw_only=True)
class Config:
    interval: int = 3                 # N, nominal steps between full steps
    fresh: float = 0.05               # share of renewed tokens, before the factors (official code: DiT 0.05, PixArt 0.75)
    score: str = "attention"          # what ranks tokens, one of SCORES (second version of the paper: "random" is as good)
    staleness: float = 0.25           # weight of the steps since a token was renewed
    bonus: float | None = None        # of the best token of each cell; None: 0.8 for DiT, 0.4 for PixArt, else 0
    schedule: str = "auto"            # of intervals and shares, see `methods.toca`
    seed: int = 0                     # of random scores

    def __post_init__(self):
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r} must be one of {', '.join(SCORES)}")
        toca.Config(interval=self.interval, fresh=self.fresh, schedule=self.schedule)


OFF = Config(interval=1)
TUNE = ({"interval": 2}, {"interval": 3}, {"interval": 4})


def kinds(steps: int, interval: int, schedule: str, adaptive: bool = False) -> str:
    """Cycle: a letter for each step, F full, c conservative, A aggressive.

    Full steps are those of `methods.toca.full_steps`. Of the others, those an odd number of steps from the next full one are
    conservative where steps count down (DiT), else those an odd number from the last one. The very first is full.
    """
    full = [i for i, _ in toca.full_steps(steps, interval, schedule, adaptive)]
    down = schedule.startswith("dit")
    found = ""
    for i in range(steps):
        away = next((j for j in full if j >= i), steps) - i if down else i - max(j for j in full if j <= i)
        found += FULL if i in full else CONSERVATIVE if away % 2 else AGGRESSIVE
    return found


def small_values(q: Tensor, k: Tensor, v: Tensor, **more) -> tuple[Tensor, Tensor]:
    """V-caching: the attention product, and the sum over heads of 1 - |v| (B, tokens). q, k, v (B, H, tokens, D)"""
    return F.scaled_dot_product_attention(q, k, v, **more), (1 - v.float().norm(dim=-1)).sum(1)


def drawn(scores: Tensor, parts: int, random: torch.Generator) -> Tensor:
    """Random scores in [0, 1) of the shape of `scores` (B, tokens), equal in all parts of guidance."""
    batch, tokens = scores.shape
    return torch.rand(batch // parts, tokens, generator=random).repeat(parts, 1).to(scores.device)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Between full steps, renew the most important tokens in one step and run no block at all in the next.

    Args:
        target: a diffusers pipeline over DiT, PixArt, Latte or Flux.

    Raises:
        ValueError: a bare model (the schedules need the number of steps), another model, or already applied; in a run, a
            ControlNet.
    """
    patch = Patch(target, "duca")
    if config.interval == 1:
        return patch
    schedule = toca.schedule_of(patch.denoiser.blocks) if config.schedule == "auto" else config.schedule
    settings = toca.Config(interval=config.interval, fresh=config.fresh, staleness=config.staleness, schedule=config.schedule,
                           bonus=BONUS.get(schedule) if config.bonus is None else config.bonus)
    layers = toca.Layers(patch, settings, with_mass if config.score == "attention" else small_values)
    for branch in layers.branches:
        branch.unit = config.score != "random"
    passed, last = [Passed(block) for block in layers.blocks[:-1]], Reuse(patch.slot)
    for block, each in zip(layers.blocks, (*passed, last), strict=True):
        patch.around(block.module, each.around)
    plan: list[str] = []

    def decide(context: StepContext) -> None:
        check_whole(layers.blocks)
        if context.denoiser.adds_between(context.inputs):
            raise ValueError("duca leaves out blocks between which a ControlNet adds to the tokens: run without one")
        if not plan:
            plan.extend(kinds(context.steps, config.interval, schedule, adaptive=schedule != "pixart"))
        kind = FULL if layers.empty or not last.ready else plan[context.i]
        last.reuse = kind == AGGRESSIVE
        for each in passed:
            each.over = kind == AGGRESSIVE
        if kind == AGGRESSIVE:
            patch.skips(block.module for block in layers.blocks)
            whole = len(layers.attentions) + len(layers.branches)
            patch.tally(whole, whole)
        else:
            if kind == CONSERVATIVE and config.score == "random":
                random = context.random(config.seed)
                for attention in layers.attentions:
                    attention.scores.value = drawn(attention.scores.value, len(context.rows.parts), random)
            layers.run(context, kind == FULL)
        patch.counts[{FULL: "full", CONSERVATIVE: "conservative", AGGRESSIVE: "aggressive"}[kind]] += 1

    patch.each_call(decide)
    patch.each_run(plan.clear)
    patch.explain(lambda: "every step of this run is a full one")
    return patch.on()
