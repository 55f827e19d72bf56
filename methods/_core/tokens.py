"""Token plans: which tokens of a sequence are kept, which move, and where to.

A plan sends every position of a sequence to a row of a shorter one (`segments`). `plan.reduce` averages the positions of
each row, `plan.restore` copies each row back to its positions. `plan.owner` is the position a row stands for, so that
whatever belongs to positions (rotary embeddings) can be gathered along.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accel_kernels.cosine_match import cosine_match
from accel_kernels.merge import Segments, merge, segments, unmerge
from accel_kernels.topk import topk_partition


class Plan(NamedTuple):
    """`segments` maps positions to rows; `owner` (B, rows) is the position each row stands for."""

    segments: Segments
    owner: Tensor

    def reduce(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, rows, C): the mean over the positions of each row."""
        return merge(x, self.segments)

    def restore(self, y: Tensor) -> Tensor:
        """(B, rows, C) -> (B, N, C): every position receives a copy of its row."""
        return unmerge(y, self.segments)


def match_plan(x: Tensor, src: Tensor, dst: Tensor, r: int, *, shared: bool = False) -> Plan:
    """Greedy bipartite matching: the `r` sources most similar to a destination go into it, the others stay alone.

    x (B, N, C); src (S,) and dst (D,) positions that together are 0..N-1; 0 <= r <= S. Rows: the kept sources in order of
    position, then the destinations. Similarity is the cosine; ties keep the lower position. `shared` gives all samples
    one plan, matched on the channels of all of them, as positions that are turned inside an attention require.
    """
    batch = len(x)
    if shared:
        x = x.transpose(0, 1).flatten(1)[None]
    B, N, _ = x.shape
    score, into = cosine_match(x, src, dst)
    moved, kept = topk_partition(score, r)                                     # columns of src
    rows = torch.empty_like(score, dtype=torch.long)                           # row of each source
    rows.scatter_(1, kept, torch.arange(kept.shape[1], device=x.device).expand(B, -1))
    rows.scatter_(1, moved, kept.shape[1] + into.gather(1, moved))
    source = torch.empty(B, N, dtype=torch.long, device=x.device)
    source[:, src] = rows
    source[:, dst] = torch.arange(kept.shape[1], N - r, device=x.device)
    owner = torch.cat([src[kept], dst.expand(B, -1)], dim=1)
    return Plan(segments(source.expand(batch, -1), N - r), owner)
