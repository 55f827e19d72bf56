"""SeaCache - SeaCache: Spectral-Evolution-Aware Cache for Accelerating Diffusion Models

Jiwoo Chung, Sangeek Hyun, MinKyu Lee, Byeongju Han, Geonho Cha, Dongyoon Wee, Youngjun Hong, Jae-Pil Heo, CVPR 2026.
arXiv:2602.18993. Code: jiwoogit/SeaCache

Idea: as in TeaCache the tokens that enter the first block are compared from step to step, and while the sum of the changes
stays below a threshold the blocks are left out. But at high noise most of a change is noise. So the tokens are filtered first,
by the linear filter that would best bring out the image at the noise of their step, if its spectrum were a power law.

Map
    I        modulated input of the first block, on its grid          methods._core.look.modulated_input
    S        1 / |f|^beta along each axis, f in cycles a token        gain
    G        a S / (a^2 S + b^2), product over axes, over its mean    gain
    P        inverse transform of the transform of I times G          filtered
    d        mean |P - P'| / mean |P'|, P' of the step before         methods._core.look.relative_change
    reuse    add the last residual of all blocks                      methods._core.cache.Delta

Departures
    a and b of a step are those of the pipeline's scheduler: 1 - sigma and sigma in flow matching, the roots of alphas_cumprod
    and of its complement where it has a table.
    Tokens of a text or of a reference image that share the sequence are left out of the signal.
    diffusers' hook filters the latent itself, and continues the residual along a line: its thresholds are others.
    On Latte each block has a residual; the signal is that of the frames, each filtered by itself.

Example
    >>> import methods
    >>> from methods import seacache
    >>> pipe = methods.tiny("dit")
    >>> with seacache.apply(pipe, seacache.Config(threshold=0.3)) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["computed"] + patch.report()["reused"]
    10
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods._core.cache import Delta, chains
from methods._core.context import StepContext
from methods._core.families.grids import Unknown
from methods._core.look import relative_change
from methods._core.noise import Noising
from methods._core.patch import Patch, per_denoiser

__all__ = ["OFF", "TINY", "TUNE", "Config", "apply", "filtered", "gain"]

SMALL, LEAST = 1e-16, 1e-6          # of the released code, against 1 / 0, and a where there is noise alone


@dataclass(frozen=True, kw_only=True)
class Config:
    threshold: float = 0.3          # delta (official code: FLUX.1-dev 0.3 or 0.6, HunyuanVideo 0.2, Wan2.1 0.2 or 0.35)
    beta: float | None = None       # of the power law; None: 3 for videos, else 2, as there

    def __post_init__(self):
        if self.threshold < 0:
            raise ValueError(f"threshold={self.threshold} must not be negative")
        if self.beta is not None and self.beta < 0:
            raise ValueError(f"beta={self.beta} must not be negative")


OFF = Config(threshold=0.0)
TINY = Config(threshold=1.2)        # random weights change more from step to step
TUNE = ({"threshold": 0.1}, {"threshold": 0.2}, {"threshold": 0.3}, {"threshold": 0.6})


def gain(grid: tuple[int, ...], a: float, b: float, beta: float) -> Tensor:
    """G on the frequencies of a grid, for tokens a x0 + b eps whose x0 has the power |f|^-beta along each axis; mean 1."""
    product, a = torch.ones((), dtype=torch.float64), max(a, LEAST)
    for size in grid:
        power = 1 / (torch.fft.fftfreq(size, dtype=torch.float64).abs() ** beta + SMALL)
        product = product[..., None] * (a * power / (a * a * power + b * b + SMALL))
    return product / product.mean()


def filtered(tokens: Tensor, grid: tuple[int, ...], response: Tensor) -> Tensor:
    """Tokens (B, N, C) of a grid with their frequencies times a `response` of its shape, in single precision at least."""
    axes = tuple(range(1, len(grid) + 1))
    x = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).unflatten(1, grid)
    spectrum = torch.fft.fftn(x, dim=axes) * response.to(x)[..., None]
    return torch.fft.ifftn(spectrum, dim=axes).real.flatten(1, len(grid))


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Leave out all blocks while the changes of the filtered input since they last ran sum up to less than the threshold.

    Raises:
        ValueError: a bare model, a UNet, a grid or a scheduler whose noise is not known, or already applied.
    """
    patch = Patch(target, "seacache")
    if config.threshold == 0:
        return patch
    patch.require_pipeline()
    blocks = patch.require(patch.denoiser.chain, "chain of transformer blocks (on a UNet use deepcache)")
    first = blocks[0]
    if isinstance(patch.denoiser.row.grid, Unknown):
        raise ValueError(f"which tokens of this {type(patch.model).__name__} are the image's is not known")
    noising = Noising(patch.pipe.scheduler)
    memory, seen = patch.slot(), []                               # (filtered input, sum) of the call before; all changes
    deltas = [Delta(patch.slot(), chain) for chain in chains(blocks)]
    for place in (place for delta in deltas for place in delta.arounds()):
        patch.around(*place)

    def signal(context: StepContext) -> Tensor:
        grid = context.grid(first)
        tokens = first.parted(patch.look(context), math.prod(grid), 1)[0]
        t = torch.tensor([context.t], dtype=torch.float64)
        a, b = (float(level) for level in noising.levels(t.long() if hasattr(patch.pipe.scheduler, "alphas_cumprod") else t, t))
        beta = config.beta if config.beta is not None else 3.0 if context.size[0] > 1 else 2.0
        return filtered(tokens, grid, gain(grid, a, b, beta))

    def decide(context: StepContext) -> None:
        new, total = signal(context), 0.0
        due = (memory.value is None or not all(delta.ready for delta in deltas) or context.left == 0
               or context.denoiser.adds_between(context.inputs))
        if not due:
            old, total = memory.get()
            seen.append(relative_change(new, old))
            total += seen[-1]
            due = not total < config.threshold
        memory.keep((new, 0.0 if due else total))
        for delta in deltas:
            delta.reuse = not due
        patch.skips(() if due else (block.module for block in blocks))
        patch.counts["computed" if due else "reused"] += 1
        patch.tally(not due, 1)

    patch.each_call(decide)
    patch.each_run(seen.clear)
    patch.explain(lambda: f"the sum reached {config.threshold} in every step; the smallest change seen was {min(seen):.3g}"
                  if seen else "the first step, the last, and those with a ControlNet always compute")
    return patch.on()
