"""AsymRnR - AsymRnR: Video Diffusion Transformers Acceleration with Asymmetric Reduction and Restoration

Wenhao Sun, Rong-Cheng Tu, Jingyi Liao, Zhao Jin, Dacheng Tao, ICML 2025. arXiv:2412.11706. Code: wenhao728/AsymRnR

Idea: video tokens repeat themselves, but not equally in every feature, block and step. Inside the attention, head by head,
queries are reduced by one ratio and keys with values by another. Queries that leave get a copy of the output of the query
that stands for them; keys and values need no restoring. How redundant each feature is in each block and step is measured
once, without reduction, and sorted into tiers; the tiers decide the ratios.

Map
    partition           one random destination in each 2 x 2 x 2 cell          cells
    matching            nearest destination by squared Euclidean distance      accel_kernels.distance_match
    reduction           the closest sources leave, the farthest stay           kept, methods._core.tokens.merge_plan
    queries             reduced after norm and rotation, output restored       _Attention
    keys and values     matched on the values, one choice for both             _Attention
    matching cache      partition and matching last a window of steps          apply
    reduction schedule  ratio of the largest threshold at or below the tier    ratio
    redundancy tiers    measured on the unreduced model                        measure, tiers

Departures
    The released tiers belong to four large models and are not copied. Without tiers every block and step counts as the
    highest; `measure` makes them for the model at hand. How the authors scale distances into tiers is not known: here the
    mean distance, relative to the size of the features, is cut into ten equal ranges.
    The reduction of the block's input, which no released configuration uses, is left out.
    Destinations come from `seed`, the block and the window, afresh in every run.
    Reduced sequences keep the order of positions, not of distances; attention does not see the difference.
    Released for CogVideoX, HunyuanVideo and Mochi; of these only CogVideoX is known here, the others and Wan and LTX raise
    TypeError. Any other self-attention over tokens on a grid is reduced too; where that is one frame, cells are 2 x 2.

Example
    >>> import methods
    >>> from methods import asymrnr
    >>> pipe = methods.tiny("dit")
    >>> with asymrnr.apply(pipe) as patch:
    ...     images = pipe([3], num_inference_steps=2, output_type="np").images
    >>> patch.report()["state"]
    'engaged'
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel_kernels.distance_match import distance_match
from methods._core.attention import of_mask
from methods._core.cache import Slot
from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.patch import Patch, per_denoiser
from methods._core.tokens import Plan, merge_plan, others

__all__ = ["OFF", "Config", "Tiers", "apply", "cells", "kept", "measure", "ratio", "tiers"]

Tiers = Mapping[str, Sequence[Sequence[int]]]       # "q" or "v" -> block -> step -> 0 to 9, higher is more redundant


@dataclass(frozen=True, kw_only=True)
class Config:
    q: tuple[tuple[int, float], ...] = ((6, 0.4), (7, 0.8))     # (tier, ratio) of queries (CogVideoX-2B, base)
    v: tuple[tuple[int, float], ...] = ((8, 0.3),)              # (tier, ratio) of keys and values (CogVideoX-2B, base)
    tiers: Tiers | None = None                                  # redundancy of the model, see `measure`; None: all highest
    window: int = 5                                             # s, steps that share a matching (CogVideoX 5, others 3 or 1)
    stride: tuple[int, int, int] = (2, 2, 2)                    # frames, rows and columns of a destination cell
    mean: bool = False                                          # average the sources into their destination, else drop them
    seed: int = 0                                               # of the random destinations

    def __post_init__(self):
        for name in ("q", "v"):
            if any(not 0 <= share < 1 for _, share in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} has a ratio outside [0, 1)")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        if min(self.stride) < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")


OFF = Config(q=(), v=())


def cells(grid: tuple[int, int, int], stride: tuple[int, int, int], random: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random destination in each full cell of the grid; positions left over at the edges are sources.

    grid: frames, height, width; a stride beyond the grid's side is cut to it -> dst (D,), src (S,), ascending.
    """
    stride = tuple(min(pair) for pair in zip(grid, stride, strict=True))
    counts = [n // s for n, s in zip(grid, stride, strict=True)]
    pick = torch.randint(math.prod(stride), counts, generator=random)
    rests = [n % s for n, s in zip(grid, stride, strict=True)]
    shift = [int(torch.randint(rest, (), generator=random)) if rest else 0 for rest in rests]
    inside = pick // (stride[1] * stride[2]), pick // stride[2] % stride[1], pick % stride[2]
    start = torch.meshgrid(*(torch.arange(n) for n in counts), indexing="ij")
    f, y, x = (a * s + b + c for a, s, b, c in zip(start, stride, inside, shift, strict=True))
    dst = ((f * grid[1] + y) * grid[2] + x).flatten().sort().values
    return dst, others(dst, math.prod(grid))


def kept(tokens: int, dst: int, share: float) -> int:
    """How many sources stay when `share` of `tokens` shall leave and the `dst` destinations cannot."""
    return max(0, int(tokens * (1 - share)) - dst)


def ratio(thresholds: Sequence[tuple[int, float]], tier: int) -> float:
    """The largest ratio among the thresholds at or below `tier`; 0 below all of them."""
    return max((share for least, share in thresholds if tier >= least), default=0.0)


def tiers(distance: Tensor, window: int, levels: int = 10) -> list[list[int]]:
    """Distances (blocks, steps) to integers: the least redundant range is 0, constant over windows of steps."""
    means = torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in distance.split(window, dim=1)], 1)
    low, high = means.min(), means.max()
    return ((high - means) / (high - low).clamp_min(1e-12) * levels).long().clamp(max=levels - 1).tolist()


class _Matched:
    """One feature of one attention, queries or values: the matching of the present window and the cut of the present step."""

    def __init__(self, slot: Slot):
        self.slot = slot
        self.src = self.dst = self.place = None         # a partition, and the window, grid and device it was drawn for
        self.r = 0

    def match(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B * H, N, D) -> distance and destination of every source, kept for the window."""
        if self.slot.value is None:
            self.slot.value = distance_match(x, self.src, self.dst)
        return self.slot.value

    def plan(self, x: Tensor) -> Plan:
        distance, into = self.match(x)
        return merge_plan(-distance, into, self.src, self.dst, self.r)


class _Attention:
    """One self-attention with fewer queries and fewer keys and values. The host sets the cuts and `tokens`."""

    def __init__(self, block: Block, slots: tuple[Slot, Slot], mean: bool):
        self.block = block
        self.q, self.v = (_Matched(slot) for slot in slots)
        self.reduce = Plan.reduce if mean else Plan.drop
        self.tokens = 0

    def attend(self, product, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more) -> Tensor:
        restore = None
        if self.v.r:
            plan = self.v.plan(self.rows(v))
            attn_mask = self.cut(attn_mask, plan, v, -1)
            k, v = self.shorter(k, plan), self.shorter(v, plan)
        if self.q.r:
            restore = self.q.plan(self.rows(q))
            attn_mask = self.cut(attn_mask, restore, q, -2)
            q = self.shorter(q, restore)
        out = product(q, k, v, attn_mask=attn_mask, **more)
        if restore is None:
            return out
        image, text = self.block.parted(out, restore.owner.shape[1])
        return self.block.joined(restore.restore(image.flatten(0, 1)).unflatten(0, image.shape[:2]), text)

    def rows(self, x: Tensor) -> Tensor:
        """The image's part of (B, H, tokens and text, D) -> (B * H, N, D)."""
        return self.block.parted(x, self.tokens)[0].flatten(0, 1)

    def cut(self, mask: Tensor | None, plan: Plan, x: Tensor, dim: int) -> Tensor | None:
        """The mask of what stays; of a cut for each head of the keys, one for each head of the queries."""
        return of_mask(self.block, mask, self.tokens, plan.owner.unflatten(0, x.shape[:2]), dim)

    def shorter(self, x: Tensor, plan: Plan) -> Tensor:
        """(B, H, tokens and text, D) -> (B, H, rows and text, D); text stays whole."""
        image, text = self.block.parted(x, self.tokens)
        return self.block.joined(self.reduce(plan, image.flatten(0, 1)).unflatten(0, x.shape[:2]), text)


def _tier(table: Tiers | None, name: str, block: int, context: StepContext) -> int:
    """The tier of this step; a run of another length than the measured one is read in proportion. 9 without any tiers, 0 for
    a feature that they leave out."""
    if table is None or name not in table:
        return 9 if table is None else 0
    row = table[name][block]
    return row[context.i * len(row) // context.steps]


def measure(pipe: Any, run: Callable[[], Any], config: Config = Config()) -> Tiers:
    """The redundancy tiers of a model, from runs without reduction.

    For every block and step: the mean squared distance of the sources to their nearest destination, divided by the mean
    square of the feature itself, for queries and for values.

    Args:
        pipe: a diffusers pipeline.
        run: calls the pipeline, with as many prompts as shall be averaged in one call.
        config: its stride, window and seed are used.
    """
    patch = Patch(pipe, "asymrnr")
    blocks = patch.blocks_at(1)
    seen: dict[str, list[dict[int, list[Tensor]]]] = {name: [{} for _ in blocks] for name in ("q", "v")}
    split: list = [None] * len(blocks)
    step = {"i": 0}

    def watch(number: int, block: Block) -> Callable:
        def attend(product, q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
            dst, src = split[number]
            for name, x in (("q", q), ("v", v)):
                x = block.parted(x, len(dst) + len(src))[0].flatten(0, 1)
                distance = distance_match(x, src, dst)[0].mean() / x.float().square().sum(-1).mean()
                seen[name][number].setdefault(step["i"], []).append(distance.cpu())
            return product(q, k, v, **more)
        return attend

    for number, block in enumerate(blocks):
        patch.attend(block.attn, watch(number, block))

    def draw(context: StepContext) -> None:
        step["i"] = context.i
        for number, block in enumerate(blocks):
            random = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
            parts = cells(context.grid(block), config.stride, random)
            split[number] = tuple(part.to(context.sample.device) for part in parts)

    patch.each_call(draw)
    with patch.on():
        run()
    return {name: tiers(torch.tensor([[torch.stack(steps[i]).mean() for i in sorted(steps)] for steps in found]), config.window)
            for name, found in seen.items()}


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Reduce queries, and keys with values, in the self-attention of every block at full resolution.

    Args:
        target: a diffusers pipeline, or its UNet or transformer; with `config.tiers`, a pipeline.

    Raises:
        ValueError: no such block, tiers for another number of blocks, a bare model with tiers, or already applied.
    """
    patch = Patch(target, "asymrnr")
    if not (config.q or config.v):
        return patch
    blocks = patch.blocks_at(1)
    if config.tiers is not None:
        patch.require_pipeline()
        for name, table in config.tiers.items():
            if len(table) != len(blocks):
                raise ValueError(f"tiers[{name!r}] has {len(table)} rows for {len(blocks)} blocks")
    attentions = [_Attention(block, (patch.slot(), patch.slot()), config.mean) for block in blocks]
    for attention in attentions:
        patch.attend(attention.block.attn, attention.attend)

    def decide(context: StepContext) -> None:
        for number, attention in enumerate(attentions):
            grid = context.grid(attention.block)
            attention.tokens = math.prod(grid)
            for name, matched in (("q", attention.q), ("v", attention.v)):
                if context.i % config.window == 0:
                    matched.slot.value = None
                place = context.i // config.window, grid, context.sample.device
                if matched.place != place:
                    random = torch.Generator().manual_seed(
                        ((config.seed * 1_000_003 + place[0]) * 1009 + number) * 2 + (name == "v"))
                    matched.dst, matched.src = (part.to(place[2]) for part in cells(grid, config.stride, random))
                    matched.place = place
                share = ratio(getattr(config, name), _tier(config.tiers, name, number, context))
                matched.r = len(matched.src) - kept(attention.tokens, len(matched.dst), share) if share else 0
                if patch.reaches(attention.block.attn):
                    patch.tally(matched.r, attention.tokens)
                    if matched.r:
                        patch.counts["queries" if name == "q" else "values"] += 1

    patch.each_call(decide)
    patch.explain(lambda: "no tier reaches the least threshold")
    return patch.on()
