"""Residual quantisation over scales, from coarse to fine (VAR, Tian et al. 2024), and draws from the likeliest codes."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Coded(NamedTuple):
    """z (B, c, K, K) with the gradient of what was quantised, codes (B, p^2) of each scale, and the two losses."""

    z: Tensor
    index: list[Tensor]
    codebook_loss: Tensor
    commitment_loss: Tensor


class Quantiser(nn.Module):
    """Residual quantisation of a map (B, c, K, K) over rising scales, places a side, with one codebook (codes, c) whose nearest
    row is that of the largest cosine. What a row adds passes half through one of the `convolutions` that the scales share."""

    def __init__(self, codes: int, depth: int, scales: Sequence[int], convolutions: int, commitment: float):
        super().__init__()
        self.scales, self.commitment = tuple(scales), commitment
        self.codes = nn.Parameter(F.normalize(torch.rand(codes, depth) * 2 - 1, dim=-1))
        self.phi = nn.ModuleList(nn.Conv2d(depth, depth, 3, padding=1) for _ in range(convolutions))

    def convolution(self, s: int) -> nn.Module:
        """phi of a scale: the one whose tick is nearest to s / (S - 1)."""
        n = len(self.phi)
        edge = 1 / 3 / n if n == 4 else 1 / 2 / n
        ticks = torch.linspace(edge, 1 - edge, n, dtype=torch.float64)
        return self.phi[int((ticks - s / (len(self.scales) - 1)).abs().argmin())]

    def shown(self, index: Tensor, s: int) -> Tensor:
        """What the codes (B, p^2) of a scale add to the map, (B, c, K, K)."""
        p, K = self.scales[s], self.scales[-1]
        h = self.codes[index].mT.unflatten(-1, (p, p))
        h = h if p == K else F.interpolate(h, size=(K, K), mode="bicubic")
        return h / 2 + self.convolution(s)(h) / 2

    def forward(self, f: Tensor, kept: Tensor | None = None) -> Coded:
        """`kept`: of each image the number of scales (B,) that count; None: all. What is left over passes on all the same."""
        clean = f.detach()
        rest, z, index = clean, torch.zeros_like(clean), []
        losses = [f.new_zeros(()), f.new_zeros(())]
        for s, p in enumerate(self.scales):
            small = F.normalize(F.interpolate(rest, size=(p, p), mode="area").flatten(2).mT, dim=-1)
            index.append((small @ F.normalize(self.codes.detach(), dim=-1).T).argmax(-1))
            h = self.shown(index[-1], s)
            on = torch.ones_like(f[:, :1, :1, :1]) if kept is None else (s < kept).to(f)[:, None, None, None]
            z, rest = z + h * on, rest - h.detach()
            for i, error in enumerate(((z - clean).square(), (z.detach() - f).square())):
                losses[i] = losses[i] + (error * on).mean() / on.mean()
        return Coded(f + (z - f).detach(), index, losses[0] / len(self.scales), self.commitment * losses[1])


def nucleus(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities (..., V) of the `top_k` likeliest of `logits`, of those as few as have `top_p` together."""
    order = logits.sort(dim=-1, descending=True)
    p = order.values.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= top_k, -torch.inf).softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return torch.zeros_like(p).scatter(-1, order.indices, p / p.sum(-1, keepdim=True))
