"""Masks over tokens: which stay, in what order, and how a shorter sequence becomes the whole one again."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """Of each of B sequences of N tokens, places in the order `order` (B, N), of which the first `count` stay."""

    order: Tensor
    count: int

    @property
    def kept(self) -> Tensor:
        """(B, K) places of the tokens that stay, in the order in which `keep` gives them."""
        return self.order[:, :self.count]

    @property
    def masked(self) -> Tensor:
        """(B, N), true where a token is left out."""
        return torch.ones_like(self.order, dtype=torch.bool).scatter(1, self.kept, False)

    def to(self, device: torch.device) -> Masking:
        return self._replace(order=self.order.to(device))

    def keep(self, x: Tensor) -> Tensor:
        """(B or 1, N, C) -> (B, K, C): the tokens that stay."""
        return _rows(x, self.kept)

    def drop(self, x: Tensor) -> Tensor:
        """(B or 1, N, C) -> (B, N - K, C): the others."""
        return _rows(x, self.order[:, self.count:])

    def fill(self, y: Tensor, others: Tensor) -> Tensor:
        """(B, K, C) -> (B, N, C): every token in its place, `others` in those left out: (C,) for all, or (B, N - K, C) in the
        order of `drop`."""
        B, N = self.order.shape
        whole = torch.cat([y, others.to(y).expand(B, N - self.count, y.shape[-1])], 1)
        return _rows(whole, self.order.argsort(1))

    def put(self, y: Tensor, x: Tensor) -> Tensor:
        """(B, N, C): x with the tokens y (B, K, C) in the places of those that stay."""
        return x.scatter(1, self.kept[..., None].expand_as(y), y.to(x))

    def pairs(self, bias: Tensor) -> Tensor:
        """(H, N, N) -> (B, H, K, K): a bias between all places, between those that stay."""
        return bias[:, self.kept[:, :, None], self.kept[:, None, :]].transpose(0, 1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def highest(scores: Tensor, count: int) -> Masking:
    """Keeps the `count` tokens with the highest of `scores` (B, N), highest first; the earlier of equal ones first.

    Raises:
        ValueError: fewer than one, or more than there are.
    """
    if not 1 <= count <= scores.shape[1]:
        raise ValueError(f"{count} of {scores.shape[1]} tokens cannot stay")
    return Masking(scores.argsort(dim=1, descending=True, stable=True), count)


def random_mask(batch: int, tokens: int, ratio: float, random: torch.Generator) -> Masking:
    """Keeps int(tokens (1 - ratio)) tokens of each of `batch` sequences, every choice of them alike likely, in random order.

    Raises:
        ValueError: a `ratio` outside [0, 1), or one that leaves no token.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} must be at least 0 and below 1")
    return highest(torch.rand(batch, tokens, generator=random, device=random.device), int(tokens * (1 - ratio)))


def mean_over(values: Tensor, where: Tensor) -> Tensor:
    """(B, N) -> (B,): the mean of `values` where `where` (B, N) is true; 0 where that is nowhere."""
    return (values * where).sum(1) / where.sum(1).clamp(min=1)
