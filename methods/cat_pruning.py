"""CAT Pruning - CAT Pruning: Cluster-Aware Token Pruning For Text-to-Image Diffusion Models

Xinle Cheng, Zhuoming Chen, Zhihao Jia, NeurIPSW 2024. arXiv:2502.00433. Code: ada-cheng/CAT-Pruning

Idea: after a warm-up only a share of the image tokens is computed in each step, the same ones in every block. Queries,
MLP rows and cross-attention rows of the others are left out and their old outputs stay; their keys and values stay in the
attention, stale; their predicted noise is that of the step before. Which tokens: a quarter of the budget where the noise
has moved most since the warm-up, by cluster, and three quarters to those that have waited longest.

Map
    stale keys and values   rows written into a cache of all tokens     _Attention
    pruned layer            rows computed, the rest as they were        methods._core.cache.Rows
    stale noise             unselected patches of the last step         _Head
    clusters                k-means on noise and position               features, kmeans
    cluster score           norm of the cluster's largest changes       pool, smooth
    first selection         by cluster and change                       first_selection
    later selections        a quarter by change, the rest by waiting    next_selection
    waiting                 frequency f <- f / 2, +1 where selected     _Choice

Departures
    Every prompt of a batch has clusters and a selection of its own, from its conditional branch, and both of its guidance
    branches compute the same tokens; the released code looks at the second sample of the batch only. Where a model calls
    its branches apart, each selects for itself.
    A selection always holds int(keep * N) tokens: the first is filled up with those of largest change, later ones with those
    that have waited longest, as in the released variant for compilation (there it may fill up with tokens it holds already);
    the plain variant computes fewer. At least one token is kept, and from each cluster that is asked for change at least one,
    of which the released formula takes none from fewer than 20.
    Where the batch changes after the warm-up, as when guidance ends, two full steps follow, and the selection starts anew from
    the first of them.
    The grid is the model's, not 64 x 64. k-means is our own, with its own draws; the released code calls scikit-learn.
    For the first selection the released code adds up mean, mean and maximum over neighbouring clusters; its graph library
    gives the sum in place of the first of two equal means. `fused_sum=True` repeats that.
    The released count starts anew while no cluster has been selected from twice; here it never does. Released for SD3 and
    reported for PixArt; DiT works alike. Models that turn queries and keys by position are refused.

Example
    >>> import methods
    >>> from methods import cat_pruning
    >>> pipe = methods.tiny("dit")
    >>> with cat_pruning.apply(pipe, cat_pruning.Config(warmup=4)) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["full"], patch.report()["pruned"]
    (4, 6)
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accel_kernels.rows import scatter_rows
from methods._core.attention import unmasked
from methods._core.cache import Rows, Slot
from methods._core.context import StepContext
from methods._core.denoiser import Block, check_whole
from methods._core.patch import Patch, per_denoiser
from methods._core.tokens import others

__all__ = ["OFF", "TINY", "Config", "apply", "features", "first_selection", "kmeans", "next_selection", "pool", "smooth"]


@dataclass(frozen=True, kw_only=True)
class Config:
    keep: float = 0.3           # alpha: share of image tokens computed in a pruned step
    warmup: int = 8             # t0: full steps at the start (official: 8 of 28)
    noise_share: float = 0.25   # of the selected tokens: those chosen by change of noise (official code)
    clusters: int = 20          # of k-means (official code)
    noise_weight: float = 0.05  # of the noise beside the position, in the features of k-means (official code)
    decay: float = 0.5          # of the frequency, each step (official code)
    seed: int = 0               # of k-means
    fused_sum: bool = False     # repeat the released code's slip in the first selection, see Departures

    def __post_init__(self):
        for name in ("noise_share", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} outside [0, 1]")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} outside (0, 1]")
        if self.warmup < 2:
            raise ValueError(f"warmup={self.warmup} must be at least 2: the change of noise needs a step to start from")
        if self.clusters < 1:
            raise ValueError(f"clusters={self.clusters} must be at least 1")


OFF = Config(keep=1.0)
TINY = Config(warmup=2)
TUNE = ({"keep": 0.7}, {"keep": 0.5}, {"keep": 0.3})


def features(noise: Tensor, height: int, width: int, weight: float) -> Tensor:
    """What is clustered: weighted noise (N, C) plus row / height in the first half of the channels, column / width after."""
    place = torch.arange(len(noise), device=noise.device)
    row, column = (place // width / height)[:, None], (place % width / width)[:, None]
    half = noise.shape[1] // 2
    return weight * noise.float() + torch.cat([row.expand(-1, half), column.expand(-1, noise.shape[1] - half)], 1)


def kmeans(x: Tensor, clusters: int, seed: int, rounds: int = 100) -> Tensor:
    """Lloyd's k-means from centres spread by squared distance (k-means++). x (N, C) -> labels (N,) from 0 to clusters - 1."""
    x, random = x.cpu().double(), torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=random)]
    while len(centres) < clusters:
        far = torch.cdist(x, centres).amin(1).square()
        far = far if far.sum() > 0 else torch.ones_like(far)
        centres = torch.cat([centres, x[torch.multinomial(far, 1, generator=random)]])
    labels = None
    for _ in range(rounds):
        before, labels = labels, torch.cdist(x, centres).argmin(1)
        if before is not None and torch.equal(before, labels):
            break
        count = torch.zeros(clusters, dtype=x.dtype).index_add_(0, labels, torch.ones(len(x), dtype=x.dtype))
        mean = torch.zeros_like(centres).index_add_(0, labels, x) / count.clamp_min(1)[:, None]
        centres = torch.where(count[:, None] > 0, mean, centres)
    return labels


def pool(delta: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Largest change in each channel of each cluster: delta (N, C) -> (clusters, C), zero for an empty cluster."""
    largest = delta.new_full((clusters, delta.shape[1]), -torch.inf)
    largest.scatter_reduce_(0, labels[:, None].expand_as(delta), delta, "amax")
    return largest.nan_to_num(neginf=0.0)


def smooth(pooled: Tensor, labels: Tensor, height: int, width: int, fused_sum: bool = False) -> Tensor:
    """Twice the mean plus the maximum over each cluster and those it touches on the grid. pooled (K, C) -> (K, C).

    `fused_sum` takes the sum in place of one of the means.
    """
    grid, near = labels.view(height, width), torch.eye(len(pooled), dtype=torch.bool)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        near[a, b] = near[b, a] = True
    groups = [pooled[row] for row in near]
    return torch.stack([(x.sum(0) if fused_sum else x.mean(0)) + x.mean(0) + x.amax(0) for x in groups])


def _ranked(values: Tensor, places: Tensor, k: int) -> Tensor:
    """The k of `places` with the largest values, largest first, the lower place on equal ones."""
    return places[values[places].argsort(descending=True, stable=True)[:k]]


def first_selection(delta: Tensor, labels: Tensor, height: int, width: int, k: int, clusters: int,
                    fused_sum: bool = False) -> Tensor:
    """At most k / 10 tokens of largest change from each cluster, clusters of highest score first. delta (N, C) -> (k,)."""
    score = smooth(pool(delta, labels, clusters), labels, height, width, fused_sum).norm(dim=1)
    change, chosen = delta.norm(dim=1), []
    for cluster in score.argsort(descending=True, stable=True).tolist():
        chosen.append(_ranked(change, (labels == cluster).nonzero()[:, 0], k // 10))
    return _filled(torch.cat(chosen)[:k], change, k)


def next_selection(delta: Tensor, labels: Tensor, frequency: Tensor, k: int, clusters: int, noise_share: float) -> Tensor:
    """`noise_share` of k tokens by change, the best three clusters giving more; the others by waiting. -> (k,) ascending.

    delta (N, C), labels (N,), frequency (N,): how often each token was selected, decayed.
    """
    score, change = pool(delta, labels, clusters).norm(dim=1), delta.norm(dim=1)
    chosen = []
    for i, cluster in enumerate(score.argsort(descending=True, stable=True).tolist()):
        places = (labels == cluster).nonzero()[:, 0]
        some = max(1, int(k // 5 * noise_share)) if noise_share else 0
        some = min(some * max(1, 3 - i), len(places))
        picked = _ranked(change, places, some)
        if i:
            picked = torch.cat([picked, _ranked(-frequency, places, some // 2)]).unique()
        chosen.append(picked)
        if sum(map(len, chosen)) > noise_share * k:
            break
    everything = torch.arange(len(frequency))
    waiting = _ranked(-frequency, everything, int(k * (1 - noise_share)))
    return _filled(torch.cat([torch.cat(chosen)[: int(k * noise_share)], waiting]), -frequency, k)


def _filled(chosen: Tensor, values: Tensor, k: int) -> Tensor:
    """`chosen` without repeats and, up to k tokens, those of largest value among the others. -> (k,) ascending."""
    more = _ranked(values, others(chosen, len(values)), k - len(chosen.unique()))
    return torch.cat([chosen.unique(), more]).sort().values


class _Attention(Rows):
    """Rows of an attention over image tokens, whose keys and values are those of all tokens, as they were last computed."""

    def __init__(self, block: Block, slots: tuple[Slot, Slot, Slot]):
        super().__init__(slots[0])
        self.block, self.memories = block, slots[1:]
        self.count = 0

    def wire(self, patch: Patch, attn: nn.Module) -> None:
        joint = attn is self.block.attn and self.block.stream == "joint"
        patch.around(attn, self.joint if joint else self.around)
        patch.attend(attn, self.attend)

    def chosen(self, x: Tensor) -> Tensor:
        self.count = x.shape[1] if self.index is None else self.index.shape[1]
        return super().chosen(x)

    def joint(self, forward, hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        image, text = forward(hidden_states=self.chosen(hidden_states), **kwargs)
        return self.written(image), text

    def attend(self, product, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more) -> Tensor:
        unmasked(attn_mask)
        k, v = (self.remembered(memory, x) for memory, x in zip(self.memories, (k, v), strict=True))
        return product(q, k, v, **more)

    def remembered(self, memory: Slot, x: Tensor) -> Tensor:
        """x (B, H, rows and text, D) -> (B, H, N and text, D), with the rows written into what was last computed."""
        image, text = self.block.parted(x, self.count)
        flat = image.flatten(0, 1)
        if self.index is not None:
            flat = scatter_rows(memory.get(), self.index.repeat_interleave(x.shape[1], 0), flat)
        return self.block.joined(memory.keep(flat).unflatten(0, x.shape[:2]), text)


class _Head(Rows):
    """The last projection: keeps the noise it computes, and hands on the last step's noise where a token was not selected."""

    def __init__(self, fresh: Slot, noise: Slot):
        super().__init__(noise)
        self.fresh = fresh

    def around(self, forward, x: Tensor) -> Tensor:
        return self.written(self.chosen(self.fresh.keep(forward(x))))


class _Choice:
    """Which tokens each prompt computes, from the noise of the step before: reference, labels, frequency, selection."""

    def __init__(self, patch: Patch, head: _Head, config: Config):
        self.head, self.config, self.reference, self.state = head, config, patch.slot(), patch.slot()

    def select(self, context: StepContext, height: int, width: int) -> Tensor | None:
        """The tokens of this call, (B, k) on the device of the latent; None computes all."""
        config, noise = self.config, self.head.fresh.get()
        if context.i < config.warmup - 1 or noise is None:
            return None
        if self.reference.value is None:
            self.reference.keep(noise)
            return None
        now, start = (context.rows.take(x, "cond").float().cpu() for x in (noise, self.reference.get()))
        k = max(1, int(config.keep * now.shape[1]))
        clusters = min(config.clusters, now.shape[1])
        if self.state.value is None:
            labels = torch.stack([kmeans(features(x, height, width, config.noise_weight), clusters, config.seed) for x in now])
            frequency = torch.zeros(labels.shape)
            chosen = [first_selection(*each, height, width, k, clusters, config.fused_sum)
                      for each in zip(now - start, labels, strict=True)]
        else:
            labels, frequency, before = self.state.value
            frequency = (config.decay * frequency).scatter_add(1, before, torch.ones(before.shape))
            chosen = [next_selection(*each, k, clusters, config.noise_share)
                      for each in zip(now - start, labels, frequency, strict=True)]
        index = torch.stack(chosen)
        self.state.value = labels, frequency, index
        return index.repeat(len(context.rows.parts), 1).to(noise.device)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """After `config.warmup` steps, compute a share of the image tokens in every block and reuse the rest.

    Raises:
        ValueError: another model, or already applied.
    """
    patch = Patch(target, "cat_pruning")
    if config.keep == 1:
        return patch
    denoiser = patch.denoiser
    able = denoiser.head is not None and all(
        b.by_rows and b.stream != "fused" and not b.rotary and not b.temporal for b in denoiser.blocks)
    blocks = patch.require(denoiser.blocks if able else (), "chain of blocks over one image without rotary positions")
    head = _Head(patch.slot(), patch.slot())
    choice = _Choice(patch, head, config)
    rows: list[Rows] = [head]
    patch.around(denoiser.head, head.around)
    for block in blocks:
        for branch in block.branches:
            if branch.name == "ff_context":                           # text is always computed
                continue
            if branch.name.startswith("attn"):
                rows.append(_Attention(block, (patch.slot(), patch.slot(), patch.slot())))
                rows[-1].wire(patch, branch.module)
            else:
                rows.append(Rows(patch.slot()))
                patch.around(branch.module, rows[-1].around)

    def choose(context: StepContext) -> None:
        check_whole(blocks)
        index = None
        if all(each.slot.value is not None for each in rows):
            index = choice.select(context, *context.grid(blocks[0])[1:])
        for each in rows:
            each.index = index
        patch.counts["full" if index is None else "pruned"] += 1
        patch.tally(0 if index is None else 1 - index.shape[1] / head.slot.value.shape[1], 1)

    patch.each_call(choose)
    patch.explain(lambda: f"the run ends within warmup={config.warmup} steps")
    return patch.on()
