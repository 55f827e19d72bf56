"""IToMe - Importance-Based Token Merging for Efficient Image and Video Generation

Haoyu Wu, Jingyi Xu, Hieu Le, Dimitris Samaras, ICCV 2025. arXiv:2411.16720. Code: cvlab-stonybrook/importance-token-merge

Idea: where the conditional and the unconditional prediction differ, the prompt is at work. That difference comes for
free with guidance and ranks the tokens of the next step: destinations are drawn from the most important ones, and every
token outside that pool is merged. The first steps, which set the layout, copy a destination instead of averaging.

Map
    importance      |conditional - unconditional|, mean over channels    importance
    sizes           r merged, D destinations, M in the pool              sizes
    pool            the M most important; D of them are destinations     draw
    matching        by cosine on a UNet, by place on a transformer       nearest_place, apply
    forced merging  of every token below the pool's least importance     draw, _Layer.make, apply
    schedule        grid, then importance; prune, then merge             apply

Departures
    The draw is made once a step, from `seed`, and shared by all blocks; the official code draws in every block from the
    global generator, and its pipelines apply the patch anew at every step, which restarts the generator of the grid.
    The noise that breaks ties of distance is shared by the images of a batch while destinations come from a grid.
    The destination modes top_k, bottom_k and evenly_k are left out. The official `original_tome` is `places=False` here,
    which leaves cross-attention alone.
    Steps, layers, sizes and matching of the two official demos are the defaults of UNet and transformer.
    Without guidance there is no importance, and destinations come from a grid throughout, as in the first step; so too where
    a model is called once for each guidance branch, or by no pipeline, which alone could say which rows are which.
    The official demos switch fused attention off, so that their times compare with attention that is not fused.
    Transformers other than PixArt merge in the same middle half of their depth; Latte in its spatial blocks.

Example
    >>> import methods
    >>> from methods import itome
    >>> pipe = methods.tiny("dit")
    >>> with itome.apply(pipe) as patch:
    ...     images = pipe([3], num_inference_steps=5, guidance_scale=4.0, output_type="np").images
    >>> patch.report()["pruned"], patch.report()["merged"]
    (12, 3)
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel_kernels.cosine_match import cosine_match
from accel_kernels.topk import topk_partition
from methods._core.context import StepContext
from methods._core.denoiser import Block, check_downsample
from methods._core.patch import Patch, per_denoiser
from methods._core.reduction import Reduction, reduce_all
from methods._core.site import Claim
from methods._core.tokens import Plan, merge_plan, partition, reduction

__all__ = ["OFF", "Config", "apply", "draw", "importance", "nearest_place", "roundtrip", "sizes"]

FORCE = 1e5                         # added to the score of a token that must merge
UNET = {"ratio": 0.7, "pool": 1.4, "importance_from": 2, "merge_from": 2, "places": False}              # SD 2 demo
TRANSFORMER = {"ratio": 0.5, "pool": 1.0, "importance_from": 1, "merge_from": 4, "places": True}        # PixArt demo


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float | None = None            # rho, share of tokens merged away; None: 0.7 on a UNet, 0.5 on a transformer
    pool: float | None = None             # p, pool size over tokens kept; None: 1.4 on a UNet, 1.0 on a transformer
    destinations: float = 0.25            # kappa, destinations over all tokens
    importance_from: int | None = None    # first step that uses importance, at least 1; None: 2 on a UNet, 1 on a transformer
    merge_from: int | None = None         # first step that averages, earlier ones prune; None: 2 on a UNet, 4 on a transformer
    places: bool | None = None            # match by place instead of by cosine; None: on a transformer
    depth: tuple[float, float] = (0.25, 0.75)   # share of a transformer's blocks that merge (blocks 7 to 20 of 28)
    max_downsample: int = 1               # UNet: where the grid is at most this many times coarser than the latent
    seed: int = 0                         # of the random destinations

    def __post_init__(self):
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} outside [0, 1]")
        if self.pool is not None and self.pool < 1:
            raise ValueError(f"pool={self.pool} must be at least 1")
        if not 0 < self.destinations <= 1:
            raise ValueError(f"destinations={self.destinations} outside (0, 1]")
        if self.importance_from is not None and self.importance_from < 1:
            raise ValueError(f"importance_from={self.importance_from} must be at least 1: the first step has no importance")
        if not 0 <= self.depth[0] < self.depth[1] <= 1:
            raise ValueError(f"depth={self.depth} must be an interval within [0, 1]")
        check_downsample(self.max_downsample)


OFF = Config(ratio=0.0)


def importance(cond: Tensor, null: Tensor, channels: int, height: int, width: int) -> Tensor:
    """|conditional - unconditional| of model outputs (B, C, [F,] H, W), mean over their first `channels`, the noise.

    Area-averaged to the token grid and flattened. -> (B, height * width), or (B * F, ...) for F frames
    """
    maps = (cond.float() - null.float())[:, :channels].abs().mean(1).flatten(0, -3)
    return F.interpolate(maps[:, None], size=(height, width), mode="area").flatten(1)


def sizes(tokens: int, ratio: float, destinations: float, pool: float) -> tuple[int, int, int]:
    """(r, D, M): tokens merged away, destinations, and pool size of a sequence.

    Raises:
        ValueError: more tokens are to be merged away than there are sources.
    """
    r, D = int(tokens * ratio), int(tokens * destinations)
    if r > tokens - D:
        raise ValueError(f"ratio={ratio} merges away {r} of {tokens - D} sources; it may be at most "
                         f"1 - destinations = {1 - destinations:.4g}")
    return r, D, min(int((tokens - r) * pool), tokens)


def draw(importance: Tensor, D: int, M: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pool, destinations and what must merge, from importance (B, N).

    -> dst (B, D) drawn from the M most important tokens, src (B, N - D) the others, ascending, and (B, N - D) true where a
    source is less important than the whole pool.
    """
    pool = importance.argsort(dim=1, descending=True, stable=True)[:, :M]
    picks = torch.stack([torch.randperm(M, generator=random)[:D] for _ in importance])
    dst = pool.gather(1, picks.to(pool.device))
    src = topk_partition(torch.zeros_like(importance).scatter_(1, dst, 1.0), D)[1]
    return dst, src, importance.gather(1, src) < importance.gather(1, pool[:, -1:])


def nearest_place(src: Tensor, dst: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Minus the distance on the grid from each source (B, S) to the closest destination (B, D), and that one's column."""
    source, target = (torch.stack([at // width, at % width], -1).float() for at in (src, dst))
    return (-torch.cdist(source, target, compute_mode="donot_use_mm_for_euclid_dist")).max(dim=-1)


class _Layer(Reduction):
    """Merges around the self-attention of one block, and around its cross-attention where places decide.

    The host fills in `match`, (src, dst, forced, r), or the whole `ready` plan, before each call of the denoiser.
    """

    def __init__(self, block: Block):
        super().__init__(block, self.make)
        self.match = self.ready = None

    def make(self, x: Tensor) -> Plan:
        if self.ready is not None:
            return self.ready
        src, dst, forced, r = self.match
        score, into = cosine_match(x, src.expand(len(x), -1), dst.expand(len(x), -1))
        return merge_plan(score + forced, into, src, dst, r)

    def cross(self, forward, x: Tensor, *args, **kwargs) -> Tensor:
        return self.ready.restore(forward(self.reducer(self.ready, x), *args, **kwargs))


def roundtrip(x: Tensor, grid: tuple[int, int, int], ratio: float) -> Tensor:
    """A layer without its attention: tokens x (B, N, C) drawn by a random importance, matched as on a UNet, merged and copied
    back. For the bench; importance itself, one product of a latent a step, is no part of a layer's cost."""
    B, N, _ = x.shape
    r, D, M = sizes(N, ratio, 0.25, UNET["pool"])
    dst, src, below = draw(torch.rand(1, N, generator=torch.Generator().manual_seed(1)).to(x).expand(B, -1), D, M,
                           torch.Generator().manual_seed(0))
    score, into = cosine_match(x, src, dst)
    plan = merge_plan(score + below * FORCE, into, src, dst, r)
    return plan.restore(plan.reduce(x))


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Merge around attention, with destinations where guidance changed the last prediction most.

    Args:
        target: a diffusers pipeline, or its UNet or transformer, sampled with classifier-free guidance.

    Raises:
        ValueError: no such block, or positions enter inside the attention; too few sources for the ratio; already applied.
    """
    patch = Patch(target, "itome")
    if config.ratio == 0:
        return patch
    denoiser = patch.denoiser
    preset = UNET if denoiser.unet else TRANSFORMER
    ratio, pool, importance_from, merge_from, places = (
        preset[name] if getattr(config, name) is None else getattr(config, name) for name in preset)
    low, high = (0, len(denoiser.blocks)) if denoiser.unet else (share * len(denoiser.blocks) for share in config.depth)
    able = denoiser.row.grid.frames in (None, 2)                                   # the channels follow the batch
    layers = [_Layer(block) for block in patch.blocks_at(
        config.max_downsample, lambda b: able and low <= b.index < high and not b.rotary, " without rotary positions")]
    sizes(1 << 20, ratio, config.destinations, pool)
    last = patch.slot()                                                            # output of the step before
    patch.after_call(lambda context, output: last.keep(output))
    for layer in layers:
        if places and layer.block.cross is not None:
            patch.around(layer.block.cross, layer.cross, Claim.TOKENS)

    def prepare(context: StepContext) -> Callable:
        halves = last.get() if context.guided and context.i >= importance_from else None
        random = context.random(config.seed)
        drawn: dict[tuple, tuple] = {}

        def ready(layer: _Layer, grid: tuple[int, int, int]) -> int:
            if grid not in drawn:
                drawn[grid] = choose(context, grid, halves, random)
            layer.match, layer.ready, r = drawn[grid]
            layer.reducer = Plan.drop if context.i < merge_from else Plan.reduce
            patch.counts["pruned" if context.i < merge_from else "merged"] += 1
            return r
        return ready

    def choose(context: StepContext, grid: tuple[int, int, int], halves: Tensor | None, random: torch.Generator) -> tuple:
        tokens, sample, copies = prod(grid), context.sample, 1
        if halves is None:
            src, dst = (at[None] for at in partition(grid, 2, random, sample.device))
            r = reduction(tokens, dst.shape[1], ratio)
            forced = torch.zeros(1, 1, device=sample.device)
        else:
            r, D, M = sizes(tokens, ratio, config.destinations, pool)
            null, cond = (halves[context.rows.of(part)] for part in ("null", "cond"))
            dst, src, below = draw(importance(cond, null, sample.shape[1], *grid[1:]), D, M, random)
            forced, copies = below * FORCE, len(context.rows.parts)
        if not places:
            return tuple(each.repeat(copies, 1) for each in (src, dst, forced)) + (r,), None, r
        score, into = nearest_place(src, dst, grid[2])
        score = score + forced + 1e-5 * torch.rand(score.shape, generator=random).to(score.device)      # which breaks ties
        score, into, src, dst = (each.repeat(copies, 1) for each in (score, into, src, dst))
        return None, merge_plan(score, into, src, dst, r, sample[:, 0].flatten(0, -3).shape[0]), r

    return reduce_all(patch, layers, prepare)
