"""Turbo - Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Large Models

Chen Ju et al., ECCV 2024. arXiv:2407.11717. Code: anakin-skywalker-Joseph/Folder

Idea: a token may be dropped from attention if it is redundant, that is very similar to another, and if it means little,
that is draws little attention. Token merging ranks by similarity alone; here the attention a token receives is taken
off its similarity, so that informative tokens survive. This is the diffusion form, a reconstruction: see Departures.

Map
    mutual redundancy    cosine to the most similar destination               accel_kernels.cosine_match
    semantic value       share of attention a token receives                  _Layer.attend
    information degree   redundancy minus, or over, semantic value            edge_score, weight
    merging              merge before self-attention, copy back after it      methods._core.tokens.merge_plan

Departures
    The released code covers vision-language models; the paper says that for generation merged tokens are restored after
    each attention, and gives no formula there that could be checked.
    From the released code: the score with its constants.
    Reconstructed: tokens are split as in ToMe; there is no class token, so the semantic value is the mean attention
    from all tokens; it is that of the block's last step, since the map of this step is known only after merging. The
    first step of a run ranks by similarity alone. A merged token's attention goes to each of its members whole, not divided
    among them. What the constants should be for diffusion is not known.
    A destination's own semantic value does not count, as in the released code.
    What ToMe's module says of SD3, Flux and CogVideoX holds here too; a plan for the whole batch takes the mean value.
    Tokens are restored in every block, so there are no token sizes to carry along and no size term in the attention.

Example
    >>> import methods
    >>> from methods import turbo
    >>> pipe = methods.tiny("dit")
    >>> with turbo.apply(pipe, turbo.Config(ratio=0.5)) as patch:
    ...     images = pipe([3], num_inference_steps=3, output_type="np").images
    >>> patch.report()["by_similarity"], patch.report()["by_information"]
    (6, 12)
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from accel_kernels.cosine_match import cosine_match
from methods._core.attention import with_mass
from methods._core.cache import Slot
from methods._core.context import StepContext
from methods._core.denoiser import Block, check_downsample
from methods._core.patch import Patch, per_denoiser
from methods._core.reduction import Reduction, reduce_all
from methods._core.tokens import Plan, joined, merge_plan, partition, reduction

__all__ = ["OFF", "Config", "apply", "edge_score", "weight"]


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float = 0.5            # r / N, as in ToMe; capped at 1 - 1 / stride^2
    alpha: float = 5.0            # weight of the semantic value; released scripts, and the code multiplies it by 30
    beta: float = 1.0             # decay of that weight per layer away from gamma; released code
    gamma: int = 0                # layer of full weight, counted over those that merge; released code
    fusion: str = "difference"    # redundancy minus ("difference", released code) or over ("ratio") the semantic value;
                                  # "ratio" leaves alpha, beta and gamma without effect
    stride: int = 2               # side of a destination cell, as in ToMe
    max_downsample: int = 1       # where the grid is at most this many times coarser than the latent, as in ToMe
    random: bool = True           # a random destination in each cell, else its top-left corner
    seed: int = 0                 # of the random destinations

    def __post_init__(self):
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} outside [0, 1]")
        for name in ("alpha", "beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.fusion not in ("difference", "ratio"):
            raise ValueError(f"fusion={self.fusion!r} must be 'difference' or 'ratio'")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")
        check_downsample(self.max_downsample)


OFF = Config(ratio=0.0)
TUNE = ({"ratio": 0.25}, {"ratio": 0.5}, {"ratio": 0.75})


def weight(layer: int, alpha: float, beta: float, gamma: int) -> float:
    """30 alpha beta^|gamma - l|: what the semantic value counts in merging layer l."""
    return 30 * alpha * beta ** abs(gamma - layer)


def edge_score(redundancy: Tensor, value: Tensor, weight: float | Tensor, fusion: str = "difference") -> Tensor:
    """Score by which sources merge, the highest first, of redundancy R and semantic value s (B, S) each.

    difference: R - weight * s    ratio: R / s
    """
    if fusion == "ratio":
        return redundancy / value.clamp_min(torch.finfo(value.dtype).tiny)
    return redundancy - weight * value


class _Layer(Reduction):
    """Merging around one self-attention, and at its product, to see what attention every token receives.

    `value` keeps the semantic value (B, N) for the next step. The host fills in `src`, `dst` and `r` before each call.
    """

    def __init__(self, block: Block, value: Slot, weight: float, fusion: str):
        super().__init__(block, self.match)
        self.value, self.fusion = value, fusion
        self.weight = torch.tensor(weight)              # a tensor, for which blocks that compile do so once
        self.src = self.dst = self.used = None
        self.r = 0

    def wire(self, patch: Patch) -> None:
        super().wire(patch)
        patch.attend(self.block.attn, self.attend)

    def match(self, x: Tensor) -> Plan:
        batch, value = len(x), self.value.value
        if self.block.rotary:
            x, value = joined(x), None if value is None else value.mean(0, keepdim=True)
        score, into = cosine_match(x, self.src, self.dst)
        if value is not None:
            score = edge_score(score, value[:, self.src], self.weight, self.fusion)
        self.used = merge_plan(score, into, self.src, self.dst, self.r, batch)
        return self.used

    def attend(self, product, q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
        """The attention of the merged tokens and the text, if there is any; keeps the column means of its map."""
        out, mass = with_mass(q, k, v, **more)
        plan, self.used = self.used, None
        image, _ = self.block.parted(mass, plan.segments.length, 1)
        self.value.value = plan.restore(image[..., None].contiguous()).squeeze(-1) / mass.shape[1]
        return out


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Merge around the self-attention of every block whose grid is at most `config.max_downsample` times coarser.

    Args:
        target: a diffusers pipeline, or its UNet or transformer.

    Raises:
        ValueError: no such block (SDXL has none at full resolution: use `max_downsample=2`); or already applied.
    """
    patch = Patch(target, "turbo")
    if config.ratio == 0:
        return patch
    patch.require_unperturbed()
    layers = [_Layer(block, patch.slot(), weight(place, config.alpha, config.beta, config.gamma), config.fusion)
              for place, block in enumerate(patch.blocks_at(config.max_downsample))]

    def prepare(context: StepContext) -> Callable:
        random = context.random(config.seed) if config.random else None

        def ready(layer: _Layer, grid: tuple[int, int, int]) -> int:
            layer.src, layer.dst = partition(grid, config.stride, random, context.sample.device)
            layer.r = reduction(prod(grid), len(layer.dst), config.ratio)
            patch.counts["by_similarity" if layer.value.value is None else "by_information"] += 1
            return layer.r
        return ready

    return reduce_all(patch, layers, prepare)
