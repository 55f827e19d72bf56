"""The emoji judge: a small network, trained apart from every generator, in whose features pictures are retrieved."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods._zoo.judge import stage


class EmojiJudge(nn.Module):
    """(B, 3, 32, 32) in [-1, 1] -> cosine scores (B, classes) of known pictures; `features` gives unit vectors (B, 64)."""

    def __init__(self, classes: int, width: int = 32, features: int = 64):
        super().__init__()
        self.stages = nn.Sequential(stage(3, width), stage(width, 2 * width), stage(2 * width, 4 * width))
        self.embed = nn.Sequential(nn.Flatten(), nn.Linear(4 * width * 16, features))
        self.classes = nn.Parameter(torch.randn(classes, features))

    def features(self, x: Tensor) -> Tensor:
        return F.normalize(self.embed(self.stages(x)), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) @ F.normalize(self.classes, dim=-1).T


def nearest_clusters(features: Tensor, known: Tensor, cluster: Tensor, k: int) -> Tensor:
    """The `k` distinct clusters nearest to each of `features` (B, D) among `known` (N, D) of `cluster` (N,). -> (B, k)

    A cluster is as near as its nearest member; clusters are numbered from 0 without gaps.
    """
    score = features @ known.T
    best = torch.full((len(features), int(cluster.max()) + 1), -torch.inf)
    best.scatter_reduce_(1, cluster.expand(len(features), -1), score, "amax")
    return best.topk(k, dim=1).indices
