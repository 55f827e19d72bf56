"""The digit judge: a small classifier, trained apart from every generator, that scores their images."""
from __future__ import annotations

import torch
from torch import Tensor, nn


def stage(c_in: int, c_out: int) -> nn.Sequential:
    """Two convolutions, (B, c_in, H, W) -> (B, c_out, H / 2, W / 2)."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(),
                         nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(),
                         nn.MaxPool2d(2))


class Judge(nn.Module):
    """(B, 1, 32, 32) in [-1, 1] -> class scores (B, 10); `features` gives the (B, 64) layer before them."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.stages = nn.Sequential(stage(1, width), stage(width, 2 * width), stage(2 * width, 2 * width))
        self.embed = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(2 * width * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.embed(self.stages(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Frechet distance of two Gaussians, (D,) and (D, D) each, in float64: |m_a - m_b|^2 + tr(A + B - 2 (AB)^(1/2)).

    The trace of the root is the sum of the square roots of the eigenvalues of AB, which are real and non-negative
    for covariances; rounding below zero is cut.
    """
    mean_a, cov_a, mean_b, cov_b = (t.double() for t in (mean_a, cov_a, mean_b, cov_b))
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (N, D)."""
    return features.mean(0), features.T.cov()
