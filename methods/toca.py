"""ToCa - Accelerating Diffusion Transformers with Token-wise Feature Caching

Chang Zou, Xuyang Liu, Ting Liu, Siteng Huang, Linfeng Zhang, ICLR 2025. arXiv:2410.05317. Code: Shenyi-Z/ToCa

Idea: between full steps, attention is reused for all tokens, but the MLP (and the cross-attention) is computed anew for
the few tokens where a stale value hurts most: those that many others attend to, those that were not renewed for long,
and the most important one of every small cell of the image. Their rows replace the old ones in the cache.

Map
    score s1       influence: column sums of the self-attention map      methods._core.attention.with_mass
    score s2       control: entropy of the cross-attention               methods._core.attention.entropy
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
    The released PixArt map holds the text of both guidance halves in separate columns, so that its entropy is the mean of
    the halves' entropies and log 2. So it is here; the formula's entropy of the mean map is `mean_map_entropy=True`.
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

from collections.abc import Callable, Iterable
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
from methods._core.renew import Held

__all__ = ["OFF", "Config", "Layers", "apply", "entropy", "fresh_ratio", "full_steps", "schedule_of", "select", "spread"]

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
    mean_map_entropy: bool = False    # s2 of the mean of the guidance halves' maps, see Departures
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

    def __init__(self, block: Block, branch: Branch, slots: tuple[Slot, Slot, Slot, Slot], depth: float, mean_first: bool):
        super().__init__(slots[0])
        self.block, self.branch, self.depth, self.mean_first = block, branch, depth, mean_first
        self.guided, self.unit = False, True
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
        value = entropy(mean_map(q, k, **more), self.guided, self.mean_first)
        self.entropy.value = value if self.index is None else self.entropy.value.scatter(1, self.index, value)
        return product(q, k, v, **more)

    def importance(self, tokens: int) -> Tensor:
        """Scores of the branch's tokens, the text's or the image's, scaled to unit length if `unit`. -> (B, tokens)"""
        text = self.branch.name == "ff_context"
        score = self.mass.value if self.entropy.value is None else 1 + self.entropy.value
        score = score.narrow(1, score.shape[1] - tokens if text != self.block.text_first else 0, tokens)
        return score / score.norm(dim=1, keepdim=True) if self.unit else score


class Layers:
    """What is run whole or renewed in part, as the host says of each call.

    `weigh(q, k, v, **more)` -> (attention product, scores (B, tokens)) at the self-attention of a block. By default those with
    cross-attention are scored by its entropy.
    """

    def __init__(self, patch: Patch, config: Config, weigh: Callable | None = with_mass):
        patch.require_pipeline()
        self.patch, self.config, denoiser = patch, config, patch.denoiser
        able = not denoiser.unet and denoiser.row.latents == 1 and all(block.by_rows for block in denoiser.blocks)
        self.blocks = patch.require(denoiser.blocks if able else (), "chain of blocks over one latent with feed-forwards")
        self.schedule = schedule_of(self.blocks) if config.schedule == "auto" else config.schedule
        bonus, cell = SPREAD.get(self.schedule, (0.0, 1))
        self.bonus, self.cell = (b if a is None else a for a, b in ((config.bonus, bonus), (config.cell, cell)))
        self.attentions, self.branches = [], []
        by_entropy = weigh is with_mass
        streams = {stream: [b for b in self.blocks if b.stream == stream and not b.temporal]
                   for stream in ("image", "joint", "fused")}
        for block in self.blocks:
            mass, scored_by = patch.slot(), patch.slot()
            place = next((i for i, b in enumerate(streams[block.stream]) if b is block), block.index // 2)
            depth = place / (27 if self.schedule == "flux" else max(1, len(streams[block.stream]) - 1))
            total = None
            for branch in block.branches:
                if branch.module is not block.attn:
                    slots = patch.slot(), patch.slot(), mass, scored_by
                    self.branches.append(_Branch(block, branch, slots, depth, config.mean_map_entropy))
                    self.branches[-1].wire(patch, by_entropy)
                    total = self.branches[-1] if branch.feeds else None
            self.attentions.append(Held(block, patch.slot(), mass, total, weigh))
            patch.around(block.attn, self.attentions[-1].around)
            if weigh and not (by_entropy and block.cross is not None):
                patch.attend(block.attn, self.attentions[-1].measure)

    @property
    def empty(self) -> bool:
        """Whether something is not kept that a partial step needs."""
        return any(each.slot.value is None for each in (*self.attentions, *self.branches))

    def run(self, context: StepContext, full: bool, deep: bool | None = None) -> None:
        """Say, in `each_call`, that this call computes all or renews a part; `deep` is said of the blocks behind the first."""
        patch, deep = self.patch, full if deep is None else deep
        for attention in self.attentions:
            attention.full = full if attention is self.attentions[0] else deep
            patch.tally(not attention.full, 1)
            patch.skips(() if attention.full else (attention.block.attn,))
        for branch in self.branches:
            branch.guided, branch.index = context.guided, None
            if full if branch.block.index == 0 else deep:
                branch.stale.value, renewed = None, 1.0
            else:
                branch.index = self._choose(branch, context)
                patch.counts["rows"] += branch.index.shape[1]
                renewed = branch.index.shape[1] / branch.slot.value.shape[1]
            patch.tally(1 - renewed, 1)

    def _choose(self, branch: _Branch, context: StepContext) -> Tensor:
        """Which rows (B, k) a branch renews; counts how long the others have waited."""
        config, (batch, tokens, *_), stale = self.config, branch.slot.value.shape, branch.stale.value
        stale = torch.zeros(batch, tokens, device=context.sample.device) if stale is None else stale
        ratio = fresh_ratio(self.schedule, config.fresh, context.i, context.steps, branch.depth, branch.branch.name)
        index = torch.empty(batch, 0, dtype=torch.long, device=stale.device)
        if k := int(torch.tensor(ratio) * tokens):                # in single precision, which decides where k is whole
            frames, height, width = context.grid(branch.block)
            cells = (height, width, self.cell, self.bonus) if self.bonus and frames == 1 and tokens == height * width else None
            index = of_any_length(select(branch.importance(tokens), stale, k, config.interval, config.staleness, cells))
        branch.stale.value = (stale + 1).scatter(1, index, 0.0)
        return index


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Reuse attention, and all but the most important rows of MLPs and cross-attentions, between full steps.

    Raises:
        ValueError: a UNet, a bare model (the schedules need the number of steps), or already applied.
    """
    patch = Patch(target, "toca")
    if config.interval == 1:
        return patch
    layers, plan = Layers(patch, config, with_mass if config.fresh > 0 else None), {}

    def decide(context: StepContext) -> None:
        check_whole(layers.blocks)
        if context.i == 0:
            plan.clear()
            plan.update(full_steps(context.steps, config.interval, layers.schedule, adaptive=config.fresh > 0))
        full = layers.empty or context.i in plan
        layers.run(context, full, full and (layers.empty or plan[context.i] or not config.per_block_decision))
        patch.counts["full" if full else "partial"] += 1

    patch.each_call(decide)
    patch.explain(lambda: "every step of this run is a full one")
    return patch.on()
