"""ToCa - Accelerating Diffusion Transformers with Token-wise Feature Caching

Chang Zou, Xuyang Liu, Ting Liu, Siteng Huang, Linfeng Zhang, ICLR 2025. arXiv:2410.05317. Code: Shenyi-Z/ToCa

Idea: between full steps, attention is reused for all tokens, but the MLP (and the cross-attention) is computed anew for
the few tokens where a stale value hurts most: those that many others attend to, those that were not renewed for long,
and the most important one of every small cell of the image. Their rows replace the old ones in the cache.

Map
    score s1       influence: column sums of the self-attention map      methods._core.attention.with_mass
    score s2       control: entropy of the cross-attention               entropy
    score s3       staleness: steps since a token was renewed            select
    score s4       spatial spread: a bonus for the best of each cell     spread
    score S        the sum of the scores, and the top k of it            select
    cache ratio R  how many, by step, depth and kind of layer            fresh_ratio
    cycle          which steps are full                                  full_steps
    partial step   renew the chosen rows, reuse all others               _Branch

Departures
    The released code decides whether a step is full inside each block, after block 0 has already changed the interval, so
    that on some steps only block 0 is full. Here it is decided once a step; `per_block_decision=True` repeats the original.
    Depth runs from 0 to 1 over the blocks of the model at hand; the released code divides by 27 whatever the depth, right
    for the 28 blocks of DiT-XL/2 and PixArt. For Flux it is kept as it is, per stream.
    The tokens of a step are chosen before the model runs, from the state the last step left. The released PixArt block lets
    its MLP see the entropies that the cross-attention has renewed in the same step.
    The released PixArt map packs the text of both guidance halves into separate columns, so that its entropy is the mean of
    the halves' entropies (plus a constant); here it is the entropy of the mean map, as the formula has it.
    Latte stands in for Open-Sora (no diffusers class): entropy in its spatial blocks, influence in the temporal ones, three
    full steps first, one interval for all layers where the released code has six for cross-attention.

Example
    >>> import methods
    >>> from methods import toca
    >>> pipe = methods.tiny("dit")
    >>> with toca.apply(pipe) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["full"] + patch.report()["partial"]
    10
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel_kernels.topk import topk_partition
from methods._core.attention import entropy, mean_map, with_mass
from methods._core.cache import Rows, Slot, of_any_length
from methods._core.context import StepContext
from methods._core.denoiser import Block, Branch, check_whole
from methods._core.patch import Patch, per_denoiser

__all__ = ["OFF", "Config", "apply", "entropy", "fresh_ratio", "full_steps", "select", "spread"]

SCHEDULES = ("dit-ddim", "dit-ddpm", "pixart", "open-sora", "flux")
SPREAD = {"dit-ddim": (0.6, 2), "dit-ddpm": (0.6, 2), "pixart": (0.4, 4)}                   # bonus and cell


@dataclass(frozen=True, kw_only=True)
class Config:
    interval: int = 3                 # N, nominal steps between full steps (official code: DiT 3 or 4, Flux 4)
    fresh: float = 0.07               # r0, base share of renewed tokens (official code: DiT 0.07, PixArt 0.3, Flux 0.1)
    staleness: float = 0.25           # weight of s3
    bonus: float | None = None        # weight of s4; None: 0.6 for DiT, 0.4 for PixArt, else 0
    cell: int | None = None           # side of a cell of s4; None: 2 for DiT, 4 for PixArt
    schedule: str = "auto"            # of intervals and ratios: "auto" by model, or one of SCHEDULES
    per_block_decision: bool = False  # repeat the released code's slip, see Departures

    def __post_init__(self):
        for name in ("interval", "cell"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.fresh <= 1:
            raise ValueError(f"fresh={self.fresh} outside [0, 1]")
        if self.schedule not in ("auto", *SCHEDULES):
            raise ValueError(f"schedule={self.schedule!r} must be 'auto' or one of {', '.join(SCHEDULES)}")


OFF = Config(interval=1)


def schedule_of(blocks: Iterable[Block]) -> str:
    """The released schedule of the model that is built most alike."""
    if any(block.temporal for block in blocks):
        return "open-sora"
    if any(block.stream != "image" for block in blocks):
        return "flux"
    return "pixart" if any(block.cross is not None for block in blocks) else "dit-ddim"


def full_steps(steps: int, interval: int, schedule: str, adaptive: bool = True) -> list[tuple[int, bool]]:
    """Cycle: the full steps, as (index from 0, whether blocks after the first would agree in the released code).

    DiT counts down and shortens the interval towards the end of sampling (2 between 20 % and 40 % of the steps left);
    PixArt counts up; Flux makes three full steps, then each N-th after the third; Open-Sora three, then the multiples of N.
    `adaptive=False` keeps N throughout, from the first step on.
    """
    if schedule == "open-sora":
        return [(i, True) for i in range(steps) if i < 3 or i % interval == 0]
    if schedule == "flux":
        lead = 3 if adaptive else 1
        return [(i, True) for i in range(steps) if i < lead or (i - lead + 1) % interval == 0]
    down = schedule.startswith("dit")

    def after(s: int) -> int:
        if not adaptive:
            return interval
        if down and int(0.2 * steps) <= s < int(0.4 * steps):
            return 2
        length = torch.tensor(1.4 - 0.8 * s / steps if down else 0.8 + 0.4 * s / steps, dtype=torch.float32)
        return max(1, int(torch.round(interval / length)))         # in single precision, which decides where a half goes

    full, gap = [], 1
    for i in range(steps):
        s = steps - 1 - i if down else i
        if i == 0 or s % gap == 0:
            gap = after(s)
            full.append((i, i == 0 or s % gap == 0))
    return full


def fresh_ratio(schedule: str, base: float, i: int, steps: int, depth: float, kind: str) -> float:
    """Cache ratio R: share of tokens a layer renews at step `i`, clamped to [0, 1].

    `depth`: 0 to 1 over the blocks (block / 27 for Flux); `kind`: "cross", "ff" or, in a Flux single block, "total".
    """
    if schedule.startswith("dit"):
        left = (steps - 1 - i) / steps
        step, layer = (3 - 4 * left, 0.8 + 0.4 * depth) if schedule == "dit-ddim" else (1.4 - 0.8 * left, 1.8 - 1.6 * depth)
        factor = step * layer * 2.5
    elif schedule == "pixart":
        factor = (1.9 - 1.8 * i / steps) * (1.6 - 1.2 * depth) * (0.6 if kind == "cross" else 1.6)
    elif schedule == "open-sora":
        factor = 1 - 0.67 * 1.5 if kind == "cross" else 1.495
    else:
        factor = (1.5 - depth) * (1.6 if kind == "total" else 0.4)
    return min(1.0, max(0.0, base * factor))


def spread(score: Tensor, height: int, width: int, cell: int, bonus: float) -> Tensor:
    """s4: in each cell x cell square, the token of highest score (B, N) gains `bonus` times its own score."""
    B = score.shape[0]
    rows, cols = -(-height // cell), -(-width // cell)
    grid = score.new_full((B, rows * cell, cols * cell), -torch.inf)
    grid[:, :height, :width] = score.view(B, height, width)
    cells = grid.view(B, rows, cell, cols, cell).transpose(2, 3).reshape(B, rows, cols, cell * cell)
    best = torch.zeros_like(cells).scatter_(-1, cells.argmax(-1, keepdim=True), 1.0)
    best = best.view(B, rows, cols, cell, cell).transpose(2, 3).reshape_as(grid)[:, :height, :width]
    return score * (1 + bonus * best.reshape(B, -1))


def select(importance: Tensor, stale: Tensor, k: int, interval: int, weight: float,
           cells: tuple[int, int, int, float] | None = None) -> Tensor:
    """Score S: the k tokens of highest score. importance (B, N), stale (B, N) steps since renewal -> (B, k), ascending.

    `cells` = (height, width, cell, bonus) adds the spatial term.
    """
    score = importance + weight * stale / interval
    if cells is not None:
        score = spread(score, *cells)
    return topk_partition(score, k)[0]


class _Branch(Rows):
    """MLP or cross-attention: computed for all tokens on full steps, for the rows of `index` on partial ones.

    What ranks the tokens is common to a block: the mass (B, N) of its self-attention or the entropy of its cross-attention.
    """

    def __init__(self, block: Block, branch: Branch, slots: tuple[Slot, Slot, Slot, Slot], depth: float):
        super().__init__(slots[0])
        self.block, self.branch, self.depth, self.guided = block, branch, depth, False
        self.stale, self.mass, self.entropy = slots[1:]

    def wire(self, patch: Patch, scored: bool) -> None:
        if self.branch.feeds:                                     # in a Flux single block x joins attention and MLP
            patch.around(self.branch.module, lambda forward, x: self.written(forward(x)))
        else:
            patch.around(self.branch.module, self.around)
        if scored and self.branch.name == "cross":                # its entropy is the block's score
            patch.attend(self.branch.module, self.measure)
        for feed in self.branch.feeds:
            if feed is not self.block.attn:                       # the MLP
                patch.around(feed, lambda forward, x: forward(self.chosen(x)))

    def measure(self, product, q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
        """At the product of a cross-attention: the entropy of its map, of all rows or of those that are renewed."""
        value = entropy(mean_map(q, k, **more), self.guided)
        self.entropy.value = value if self.index is None else self.entropy.value.scatter(1, self.index, value)
        return product(q, k, v, **more)

    def importance(self, tokens: int) -> Tensor:
        """Scores of the branch's tokens, the text's or the image's, scaled to unit length. -> (B, tokens)"""
        text = self.branch.name == "ff_context"
        score = self.mass.value if self.entropy.value is None else 1 + self.entropy.value
        score = score.narrow(1, score.shape[1] - tokens if text != self.block.text_first else 0, tokens)
        return score / score.norm(dim=1, keepdim=True)


class _Attention:
    """Self-attention: computed on full steps, with its mass where that is the score, and reused whole on partial ones.

    In a Flux single block, whose output `total` is cached behind it, only the rows which that renews are handed on.
    """

    def __init__(self, block: Block, slot: Slot, mass: Slot, total: _Branch | None):
        self.block, self.slot, self.mass, self.total, self.full = block, slot, mass, total, True

    def around(self, forward, *args, **kwargs):
        out = self.slot.keep(forward(*args, **kwargs)) if self.full else self.slot.get()
        return out if self.full or self.total is None else self.total.chosen(out)

    def measure(self, product, q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
        out, self.mass.value = with_mass(q, k, v, **more)
        return out


def _wire(patch: Patch, blocks: list[Block], schedule: str, scored: bool) -> tuple[list[_Attention], list[_Branch]]:
    """Put the two kinds of hook on every block; blocks with cross-attention are scored by its entropy, others by mass."""
    attentions, branches = [], []
    streams = {stream: [b for b in blocks if b.stream == stream and not b.temporal] for stream in ("image", "joint", "fused")}
    for block in blocks:
        mass, scored_by = patch.slot(), patch.slot()
        place = next((i for i, b in enumerate(streams[block.stream]) if b is block), block.index // 2)
        depth = place / (27 if schedule == "flux" else max(1, len(streams[block.stream]) - 1))
        total = None
        for branch in block.branches:
            if branch.module is not block.attn:
                branches.append(_Branch(block, branch, (patch.slot(), patch.slot(), mass, scored_by), depth))
                branches[-1].wire(patch, scored)
                total = branches[-1] if branch.feeds else None
        attentions.append(_Attention(block, patch.slot(), mass, total))
        patch.around(block.attn, attentions[-1].around)
        if scored and block.cross is None:
            patch.attend(block.attn, attentions[-1].measure)
    return attentions, branches


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Reuse attention, and all but the most important rows of MLPs and cross-attentions, between full steps.

    Raises:
        ValueError: a UNet, a bare model (the schedules need the number of steps), or already applied.
    """
    patch = Patch(target, "toca")
    if config.interval == 1:
        return patch
    patch.require_pipeline()
    denoiser = patch.denoiser
    able = not denoiser.unet and denoiser.row.latents == 1 and all(block.by_rows for block in denoiser.blocks)
    blocks = patch.require(denoiser.blocks if able else (), "chain of blocks over one latent, each with its own feed-forward")
    schedule = schedule_of(blocks) if config.schedule == "auto" else config.schedule
    bonus, cell = SPREAD.get(schedule, (0.0, 1))
    bonus, cell = bonus if config.bonus is None else config.bonus, cell if config.cell is None else config.cell
    attentions, branches = _wire(patch, blocks, schedule, scored=config.fresh > 0)
    plan: dict[int, bool] = {}

    def decide(context: StepContext) -> None:
        check_whole(blocks)
        if context.i == 0:
            plan.clear()
            plan.update(full_steps(context.steps, config.interval, schedule, adaptive=config.fresh > 0))
        empty = any(each.slot.value is None for each in (*attentions, *branches))
        full = empty or context.i in plan
        deep = full and (empty or plan[context.i] or not config.per_block_decision)
        for attention in attentions:
            attention.full = full if attention is attentions[0] else deep
            patch.tally(not attention.full, 1)
        patch.skips(attention.block.attn for attention in attentions if not attention.full)
        for branch in branches:
            branch.guided, branch.index = context.guided, None
            if full if branch.block.index == 0 else deep:
                branch.stale.value = None
            else:
                branch.index = choose(branch, context)
                patch.counts["rows"] += branch.index.shape[1]
            patch.tally(0 if branch.index is None else 1 - branch.index.shape[1] / branch.slot.value.shape[1], 1)
        patch.counts["full" if full else "partial"] += 1

    def choose(branch: _Branch, context: StepContext) -> Tensor:
        """Which rows (B, k) a branch renews; counts how long the others have waited."""
        (batch, tokens, *_), stale = branch.slot.value.shape, branch.stale.value
        stale = torch.zeros(batch, tokens, device=context.sample.device) if stale is None else stale
        ratio = fresh_ratio(schedule, config.fresh, context.i, context.steps, branch.depth, branch.branch.name)
        index = torch.empty(batch, 0, dtype=torch.long, device=stale.device)
        if k := math.floor(ratio * tokens):
            frames, height, width = denoiser.grid(context.inputs, branch.block)
            cells = (height, width, cell, bonus) if bonus and frames == 1 and tokens == height * width else None
            index = of_any_length(select(branch.importance(tokens), stale, k, config.interval, config.staleness, cells))
        branch.stale.value = (stale + 1).scatter(1, index, 0.0)
        return index

    patch.each_call(decide)
    patch.explain(lambda: "every step of this run is a full one")
    return patch.on()
