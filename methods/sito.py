"""SiTo - Training-Free and Hardware-Friendly Acceleration for Diffusion Models via Similarity-based Token Pruning

Evelyn Zhang, Jiayi Tang, Xuefei Ning, Linfeng Zhang, AAAI 2025. doi:10.1609/aaai.v39i9.33071. Code: EvelynZhang-epiclab/SiTo

Idea: nothing is averaged. In each patch of the image the token most like all others becomes a base token; of the rest,
those most like a base token are left out of self-attention, and each takes the output of the token it resembles most. A
little noise on the score keeps the same tokens from being left out in every step.

Map
    SimScore         sum of the cosines to all tokens, in O(N C)           accel_kernels.similarity_sum
    Noise SimScore   beta * SimScore + alpha * noise                       _Pruning
    base tokens      the argmax of each patch                              base_tokens
    pruned tokens    the non-base tokens most similar to a base token      prune_plan
    recovery         copy the output of the most similar kept token        prune_plan

Departures
    The sum of cosines is one product with the sum of all unit vectors; the official code builds the N x N matrix, in
    half precision. Nothing here needs it.
    Noise comes from `seed` and the step, one draw a block for the whole batch, so that the guidance halves differ only
    by what is in them; the official code draws for each sample from the global generator.
    The released code copies from the most similar kept token, the default here; as the paper tells it, from the most
    similar base token: `recover_from="base"`.
    True height and width are used; the official patch search assumes a square grid. As released the official file does
    not run: `F` is not imported, and without CUDA already its import fails, which makes a tensor there. On MPS it would
    also call an undefined function.
    SD3, Flux and CogVideoX prune the image tokens of the joint attention; where positions enter inside the attention,
    one plan serves the whole batch.

Example
    >>> import methods
    >>> from methods import sito
    >>> pipe = methods.tiny("dit")
    >>> with sito.apply(pipe, sito.Config(ratio=0.5)) as patch:
    ...     images = pipe([3], num_inference_steps=2, output_type="np").images
    >>> patch.report()["pruned"]
    12
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from accel_kernels.cosine_match import cosine_match
from accel_kernels.similarity_sum import similarity_sum
from accel_kernels.topk import topk_partition
from methods._core.context import StepContext
from methods._core.denoiser import Block, check_downsample
from methods._core.patch import Patch, per_denoiser
from methods._core.reduction import Reduction, reduce_all
from methods._core.tokens import Plan, join_plan, joined, merge_plan, reduction

__all__ = ["OFF", "Config", "apply", "base_tokens", "prune_plan", "roundtrip"]


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float = 0.5            # share of tokens pruned; capped at 1 - 1 / stride^2
    stride: int = 2               # side of a patch, which has one base token (sx, sy)
    alpha: float = 0.1            # weight of the noise
    beta: float = 1.0             # weight of SimScore
    recover_from: str = "kept"    # "kept": the most similar kept token (released code); "base": base token (paper)
    max_downsample: int = 1       # prune where the grid is at most this many times coarser than the latent
    seed: int = 0                 # of the noise

    def __post_init__(self):
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} outside [0, 1]")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")
        if self.recover_from not in ("kept", "base"):
            raise ValueError(f"recover_from={self.recover_from!r} must be 'kept' or 'base'")
        check_downsample(self.max_downsample)


OFF = Config(ratio=0.0)
TUNE = ({"ratio": 0.25}, {"ratio": 0.5}, {"ratio": 0.75})


def base_tokens(score: Tensor, grid: tuple[int, int, int], stride: int) -> Tensor:
    """The position of the highest score in each full stride x stride patch of each frame; ties go to the first.

    score (B, N), grid = (frames, height, width) -> (B, patches)
    """
    (frames, height, width), B = grid, len(score)
    rows, cols = height // stride, width // stride
    if not rows * cols:
        raise ValueError(f"stride={stride} is more than the grid of {height} x {width} tokens")
    cut = score.view(B, frames, height, width)[:, :, :rows * stride, :cols * stride]
    patches = cut.unflatten(3, (cols, stride)).unflatten(2, (rows, stride)).transpose(3, 4)        # B, F, rows, cols, s, s
    pick = patches.flatten(4).max(-1).indices
    frame = torch.arange(frames, device=score.device)[:, None, None] * height * width
    y = torch.arange(rows, device=score.device)[:, None] * stride + pick // stride
    x = torch.arange(cols, device=score.device) * stride + pick % stride
    return (frame + y * width + x).flatten(1)


def prune_plan(x: Tensor, base: Tensor, ratio: float, recover_from: str = "kept", batch: int | None = None) -> Plan:
    """Prune the `ratio` of all tokens whose nearest base token (B, D) is the most similar, as far as base tokens are spared.

    Every pruned token joins the kept, or the base, token most similar to it in x (B, N, C). Rows: other kept tokens, base
    tokens, ascending each. One plan serves `batch` samples if B is 1.
    """
    N, D = x.shape[1], base.shape[1]
    mask = torch.zeros(x.shape[:2], device=x.device).scatter_(1, base, 1.0)
    base, others = topk_partition(mask, D)
    score, into = cosine_match(x, others, base)
    P = reduction(N, D, ratio)
    if recover_from == "base" or P == N - D:
        return merge_plan(score, into, others, base, P, batch)
    moved, rest = topk_partition(score, P)                                     # columns of `others`
    pruned, spared = others.gather(1, moved), others.gather(1, rest)
    nearest, row = cosine_match(x, pruned, spared)                             # base tokens were compared already
    row = torch.where(nearest >= score.gather(1, moved), row, spared.shape[1] + into.gather(1, moved))
    return join_plan(torch.cat([spared, base], 1), pruned, row, batch)


class _Pruning:
    """Plans the pruning of one block. The host fills in `grid` and `noise` (N,) before each call of the denoiser."""

    def __init__(self, block: Block, config: Config):
        self.shared, self.config = block.rotary, config
        self.grid = self.noise = None

    def __call__(self, x: Tensor) -> Plan:
        batch, config = len(x), self.config
        if self.shared:
            x = joined(x)
        score = config.beta * similarity_sum(x) + config.alpha * self.noise
        return prune_plan(x, base_tokens(score, self.grid, config.stride), config.ratio, config.recover_from, batch)


def roundtrip(x: Tensor, grid: tuple[int, int, int], ratio: float) -> Tensor:
    """A layer without its attention: tokens x (B, N, C) of `grid` ranked, pruned and copied back. For the bench."""
    plan = prune_plan(x, base_tokens(similarity_sum(x), grid, 2), ratio)
    return plan.restore(plan.drop(x))


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Prune around the self-attention of every block whose grid is at most `config.max_downsample` times coarser.

    Args:
        target: a diffusers pipeline, or its UNet or transformer.

    Raises:
        ValueError: no such block (SDXL has none at full resolution: use `max_downsample=2`); or already applied.
    """
    patch = Patch(target, "sito")
    if config.ratio == 0:
        return patch

    def prepare(context: StepContext) -> Callable:
        random = context.random(config.seed)

        def ready(layer: Reduction, grid: tuple[int, int, int]) -> int:
            layer.planner.grid = grid
            layer.planner.noise = torch.randn(prod(grid), generator=random).to(context.sample.device)
            patch.counts["pruned"] += 1
            return reduction(prod(grid), grid[0] * (grid[1] // config.stride) * (grid[2] // config.stride), config.ratio)
        return ready

    layers = [Reduction(block, _Pruning(block, config), Plan.drop) for block in patch.blocks_at(config.max_downsample)]
    return reduce_all(patch, layers, prepare)
