"""Token plans: which tokens of a sequence are kept, which move, and where to.

A plan sends every position of a sequence to a row of a shorter one (`segments`). `plan.reduce` averages the positions of
each row, `plan.drop` keeps one of them as it is, `plan.restore` copies each row back to its positions. `plan.owner` is the
position a row stands for, so that whatever belongs to positions (rotary embeddings) can be gathered along.

`match_plan` pairs sources with destinations by cosine and cuts the list of pairs; `merge_plan` is the cut alone, for other
scores; `nearest_plan` drops given positions in favour of their nearest kept one.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accel_kernels.cosine_match import cosine_match
from accel_kernels.merge import Segments, merge, segments, unmerge
from accel_kernels.rows import gather_rows
from accel_kernels.topk import topk_partition


class Plan(NamedTuple):
    """`segments` maps positions to rows; `owner` (B, rows), or (1, rows) for all, is the position each row stands for."""

    segments: Segments
    owner: Tensor

    def reduce(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, rows, C): the mean over the positions of each row."""
        return merge(x, self.segments)

    def drop(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, rows, C): the owner of each row; the other positions are left out."""
        return gather_rows(x, self.owner.expand(len(x), -1))

    def restore(self, y: Tensor) -> Tensor:
        """(B, rows, C) -> (B, N, C): every position receives a copy of its row."""
        return unmerge(y, self.segments)


def others(positions: Tensor, tokens: int) -> Tensor:
    """The positions of 0 to `tokens` - 1 that are not among `positions` (K,), ascending."""
    return torch.ones(tokens, dtype=torch.bool).index_fill_(0, positions, False).nonzero().squeeze(1)


def match_plan(x: Tensor, src: Tensor, dst: Tensor, r: int, *, shared: bool = False) -> Plan:
    """Greedy bipartite matching: the `r` sources most similar to a destination go into it, the others stay alone.

    x (B, N, C); src (S,) or (B, S) and dst (D,) or (B, D) positions that together are 0..N-1; 0 <= r <= S. Similarity is the
    cosine; ties keep the lower position. `shared` gives all samples one plan, matched on the channels of all of them, as
    positions that are turned inside an attention require.
    """
    batch = len(x)
    if shared:
        x = joined(x)
    score, into = cosine_match(x, src, dst)
    return merge_plan(score, into, src, dst, r, batch)


def joined(x: Tensor) -> Tensor:
    """(B, N, C) -> (1, N, B * C): the channels of all samples side by side, for a plan that all of them share."""
    return x.transpose(0, 1).flatten(1)[None]


def merge_plan(score: Tensor, into: Tensor, src: Tensor, dst: Tensor, r: int, batch: int | None = None) -> Plan:
    """The `r` sources of highest score (B, S) go into their destination `into` (B, S), a column of dst; the others stay alone.

    src (S,) or (B, S), dst (D,) or (B, D). Rows: the kept sources in order of `src`, then the destinations. One plan serves
    `batch` samples if B is 1.
    """
    B, N = len(score), src.shape[-1] + dst.shape[-1]
    src, dst = src.expand(B, -1), dst.expand(B, -1)
    moved, kept = topk_partition(score, r)                                     # columns of src
    rows = torch.empty_like(score, dtype=torch.long)                           # row of each source
    rows.scatter_(1, kept, torch.arange(kept.shape[1], device=score.device).expand(B, -1))
    rows.scatter_(1, moved, kept.shape[1] + into.gather(1, moved))
    source = torch.empty(B, N, dtype=torch.long, device=score.device)
    source.scatter_(1, src, rows)
    source.scatter_(1, dst, torch.arange(kept.shape[1], N - r, device=score.device).expand(B, -1))
    owner = torch.cat([src.gather(1, kept), dst], dim=1)
    return Plan(segments(source.expand(batch or B, -1), N - r), owner)


def nearest_plan(x: Tensor, kept: Tensor, dropped: Tensor, batch: int | None = None) -> Plan:
    """Every dropped position (B, P) joins the most similar kept one (B, K), by the cosine of x (B, N, C). Rows: `kept`.

    One plan serves `batch` samples if B is 1.
    """
    B, K = kept.shape
    nearest = cosine_match(x, dropped, kept)[1]
    source = torch.empty(B, K + dropped.shape[1], dtype=torch.long, device=x.device)
    source.scatter_(1, kept, torch.arange(K, device=x.device).expand(B, -1)).scatter_(1, dropped, nearest)
    return Plan(segments(source.expand(batch or B, -1), K), kept)
