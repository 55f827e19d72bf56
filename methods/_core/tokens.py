"""Token plans: which tokens of a sequence are kept, which move, and where to.

A plan sends every position of a sequence to a row of a shorter one (`segments`). `plan.reduce` averages the positions of
each row, `plan.drop` keeps one of them as it is, `plan.restore` copies each row back to its positions. `plan.owner` is the
position a row stands for, so that whatever belongs to positions (rotary embeddings) can be gathered along.

`partition` divides a grid into sources and destinations. `match_plan` pairs them by cosine and cuts the list of pairs;
`merge_plan` is the cut alone, for other scores; `join_plan` is the plan in which given positions join given others.
"""
from __future__ import annotations

from math import prod
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


def destinations(frames: int, height: int, width: int, stride: int, random: torch.Generator | None) -> Tensor:
    """Partition: one position in each full stride x stride cell of each frame, random or (None) the top-left one. -> (D,)

    Raises:
        ValueError: no cell fits the grid.
    """
    rows, cols = height // stride, width // stride
    if not rows * cols:
        raise ValueError(f"stride={stride} is more than the grid of {height} x {width} tokens")
    pick = torch.zeros(frames, rows, cols, dtype=torch.long)
    if random is not None:
        pick = torch.randint(stride * stride, pick.shape, generator=random)
    frame = torch.arange(frames)[:, None, None] * height * width
    y = torch.arange(rows)[:, None] * stride + pick // stride
    x = torch.arange(cols) * stride + pick % stride
    return (frame + y * width + x).flatten()


def others(positions: Tensor, tokens: int) -> Tensor:
    """The positions of 0 to `tokens` - 1 that are not among `positions` (K,), ascending."""
    return torch.ones(tokens, dtype=torch.bool).index_fill_(0, positions, False).nonzero().squeeze(1)


def reduction(tokens: int, dst: int, ratio: float) -> int:
    """How many of `tokens` are merged away when `dst` of them are destinations."""
    return min(int(tokens * ratio), tokens - dst)


def partition(grid: tuple[int, int, int], stride: int, random: torch.Generator | None, device: torch.device
              ) -> tuple[Tensor, Tensor]:
    """Sources and destinations of a grid (frames, height, width), ascending positions on `device`. -> (S,), (D,)"""
    dst = destinations(*grid, stride, random).sort().values
    src = others(dst, prod(grid))
    return src.to(device), dst.to(device)


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
    src, dst = src.expand(len(score), -1), dst.expand(len(score), -1)
    moved, alone = topk_partition(score, r)                                    # columns of src
    kept = torch.cat([src.gather(1, alone), dst], dim=1)
    return join_plan(kept, src.gather(1, moved), alone.shape[1] + into.gather(1, moved), batch)


def join_plan(kept: Tensor, dropped: Tensor, into: Tensor, batch: int | None = None) -> Plan:
    """Every dropped position (B, P) joins the kept one (B, K) of column `into` (B, P). Rows: `kept`.

    One plan serves `batch` samples if B is 1.
    """
    B, K = kept.shape
    source = torch.empty(B, K + dropped.shape[1], dtype=torch.long, device=kept.device)
    source.scatter_(1, kept, torch.arange(K, device=kept.device).expand(B, -1)).scatter_(1, dropped, into)
    return Plan(segments(source.expand(batch or B, -1), K), kept)
