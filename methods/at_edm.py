"""AT-EDM - Attention-Driven Training-Free Efficiency Enhancement of Diffusion Models

Hongjie Wang, Difan Liu, Yan Kang, Yijun Li, Zhe Lin, Niraj K. Jha, Yuchen Liu, CVPR 2024. arXiv:2405.05252

Idea: the self-attention map of a transformer's first layer is a weighted graph of its tokens. A page rank on it says which
tokens matter: those that tokens which matter attend to. Only these go on through the other layers; behind the last one every
dropped token gets a copy of the kept token that it attended to most. Early in sampling, where the maps say little, some
transformers are left whole.

Map
    generalised weighted page rank   s <- A^T s, per head; root mean square      page_rank
    pruning                          the (1 - rho) N tokens of highest rank      prune
    similarity-based copy            argmax over kept tokens of the mean map     prune
    denoising-steps-aware schedule   which transformers are whole early          transformers
    placement                        behind layer 0, up to the last layer        _Pruner

Departures
    A reconstruction: no code was released, and the page rank, its aggregation over heads and the copy follow second-hand
    accounts of the paper. `rounds` of the rank is a choice of ours; `early` assumes that the phase is 15 steps of 50.
    The rank, and the partner of each dropped token, are read from queries and keys a tile at a time; the map is never held.
    The rank is that of self-attention, which the authors prefer to the one of cross-attention.
    A diffusion transformer (DiT, PixArt) is taken as one transformer of as many layers as it has blocks, whole in the early
    phase. The paper is about UNets, and ports of it to diffusion transformers by others gave poor images.
    UNets whose transformers have one layer (SD 1.5) have nothing to prune.

Example
    >>> import methods
    >>> from methods import at_edm
    >>> pipe = methods.tiny("dit")
    >>> with at_edm.apply(pipe, at_edm.Config(ratio=0.4)) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["whole"], patch.report()["pruned"]
    (3, 7)
"""
from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel_kernels.attention_graph import flow, log_sums, partner
from accel_kernels.merge import segments
from accel_kernels.rows import gather_rows
from accel_kernels.topk import topk_partition
from methods._core.attention import unmasked
from methods._core.context import StepContext
from methods._core.denoiser import Block, Denoiser
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim
from methods._core.tokens import Plan

__all__ = ["OFF", "Config", "Transformer", "apply", "page_rank", "prune", "transformers"]


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float = 0.63             # rho: share of tokens dropped (0.63 for 4.1 of SDXL's 6.7 TFLOPs)
    rounds: int = 4                 # steps of the page rank (not published; ours)
    early: float = 0.3              # share of the steps, from the first, in which fewer transformers prune (assumed)
    spare: tuple[int, ...] = ()     # levels left alone; (1,) is the paper's variant for fused attention on SDXL
    shared: bool = False            # one ranking for both guidance branches, the sum of theirs (not published; ours)

    def __post_init__(self):
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} outside [0, 1)")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")
        if not 0 <= self.early <= 1:
            raise ValueError(f"early={self.early} outside [0, 1]")
        if not isinstance(self.spare, (tuple, list)) or not all(isinstance(level, int) for level in self.spare):
            raise ValueError(f"spare={self.spare!r} must be a tuple of levels, such as (1,)")


OFF = Config(ratio=0.0)


def page_rank(q: Tensor, k: Tensor, lse: Tensor, rounds: int) -> Tensor:
    """Importance of every token: s = 1/N, then s <- A^T s for each head, joined by the root mean square over heads.

    q, k (B, H, N, D), lse (B, H, N) the log of A's row sums -> (B, N) fp32.
    """
    s = torch.full_like(lse, 1 / q.shape[2])
    for _ in range(rounds):
        s = flow(q, k, lse, s)
    return s.square().mean(1).sqrt()


def prune(q: Tensor, k: Tensor, kept: int, rounds: int, shared: bool = False) -> Plan:
    """The `kept` tokens of highest rank stay; each dropped one stands for the kept one it attends to most, heads averaged.

    q, k (B, H, N, D). `shared` ranks the two halves of the batch as one.
    """
    batch, n_heads, tokens, width = q.shape
    lse = log_sums(q, k)
    score = page_rank(q, k, lse, rounds)
    if shared:
        score = (score[: batch // 2] + score[batch // 2:]).repeat(2, 1)
    keep, drop = topk_partition(score, kept)

    def rows(x: Tensor, index: Tensor) -> Tensor:
        return gather_rows(x.flatten(0, 1), index.repeat_interleave(n_heads, 0)).unflatten(0, (batch, n_heads))

    best = partner(rows(q, drop), rows(k, keep), lse.gather(2, drop[:, None].expand(-1, n_heads, -1)))
    source = torch.empty(batch, tokens, dtype=torch.long, device=q.device)
    source.scatter_(1, keep, torch.arange(kept, device=q.device).expand(batch, -1)).scatter_(1, drop, best)
    return Plan(segments(source, kept), keep)


class Transformer(NamedTuple):
    """A run of blocks over the same tokens; `late`: whole in the early phase."""

    blocks: tuple[Block, ...]
    late: bool


def transformers(denoiser: Denoiser) -> list[Transformer]:
    """Runs of two blocks or more. On a UNet the first of each stage on the way down and the last on the way up are late."""
    if not denoiser.unet:
        chain = all(block.stream == "image" and not block.temporal and not block.rotary for block in denoiser.blocks)
        return [Transformer(denoiser.blocks, late=True)] if chain and len(denoiser.blocks) > 1 else []
    found = []
    for stage in denoiser.unet:
        attentions = stage.attentions
        spared = {"down": 0, "up": len(attentions) - 1}.get(stage.side)
        for i, attention in enumerate(attentions):
            inside = {id(module) for module in attention.modules()}
            blocks = tuple(block for block in denoiser.blocks if id(block.module) in inside)
            if len(blocks) > 1:
                found.append(Transformer(blocks, late=i == spared))
    return found


class _Pruner:
    """Shortens the sequence behind the first block of a transformer and fills it up behind the last. The host sets `kept`,
    None to leave this call whole."""

    def __init__(self, transformer: Transformer, rounds: int):
        self.transformer, self.rounds = transformer, rounds
        self.kept: int | None = None
        self.shared = False
        self.plan: Plan | None = None

    def wire(self, patch: Patch) -> None:
        first, last = self.transformer.blocks[0], self.transformer.blocks[-1]
        patch.attend(first.attn, self.rank, Claim.WHOLE)
        patch.around(first.module, self.cut, Claim.WHOLE)
        patch.around(last.module, self.fill, Claim.WHOLE)
        patch.claim((branch.module for block in self.transformer.blocks for branch in block.branches), Claim.WHOLE)

    def rank(self, product, q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
        if self.kept is not None:
            unmasked(more.get("attn_mask"))
            self.plan = prune(q, k, self.kept, self.rounds, self.shared)
        return product(q, k, v, **more)

    def cut(self, forward, x: Tensor, *args, **kwargs) -> Tensor:
        out = forward(x, *args, **kwargs)
        return out if self.kept is None else self.plan.drop(out)

    def fill(self, forward, x: Tensor, *args, **kwargs) -> Tensor:
        out = forward(x, *args, **kwargs)
        if self.kept is None:
            return out
        plan, self.plan = self.plan, None
        return plan.restore(out)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Prune behind the first layer of every transformer, of fewer ones in the early phase.

    Args:
        target: a diffusers pipeline over a UNet with transformers of several layers (SDXL), DiT or PixArt.

    Raises:
        ValueError: no such transformer, a bare model (the schedule needs the number of steps), or already applied.
    """
    patch = Patch(target, "at_edm")
    if config.ratio == 0:
        return patch
    patch.require_pipeline()
    found = patch.require((each for each in transformers(patch.denoiser) if each.blocks[0].level not in config.spare),
                          "transformer of two layers or more over image tokens alone")
    pruners = [_Pruner(transformer, config.rounds) for transformer in found]
    for pruner in pruners:
        pruner.wire(patch)

    def decide(context: StepContext) -> None:
        early = context.i < int(round(config.early * context.steps, 9))         # 0.7 * 90 is a little less than 63
        for pruner in pruners:
            first = pruner.transformer.blocks[0]
            tokens = prod(context.grid(first))
            pruner.kept = None if early and pruner.transformer.late else tokens - int(config.ratio * tokens)
            pruner.shared = config.shared and context.guided
            if patch.reaches(first.module):
                patch.counts["whole" if pruner.kept is None else "pruned"] += 1
                patch.tally(0 if pruner.kept is None else tokens - pruner.kept, tokens)

    patch.each_call(decide)
    patch.explain(lambda: "every transformer was whole, in the early phase or because too few tokens leave")
    return patch.on()
