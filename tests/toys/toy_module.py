"""Toy module - A Toy of Kind Module

Ann Bee, Carl Dee, arXiv 2025. arXiv:2503.00013

Idea: vectors pass a narrow layer and come back.

Map
    Eq. 1    the whole    loss

Departures
    None.

Example
    >>> build(TINY).narrow.out_features
    2
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods._core.learning import load, save

__all__ = ["STAGES", "TINY", "Config", "build", "enter", "load", "loss", "save"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes."""

    width: int = 8           # D, Sec. 1
    inside: int = 4          # d, Sec. 1
    seed: int = 0            # of the first weights, Sec. 1

    def __post_init__(self):
        if self.inside < 1:
            raise ValueError(f"inside={self.inside} must be at least 1")


TINY = Config(width=4, inside=2)
STAGES = {"all": ("narrow", "wide")}


class Bottleneck(nn.Module):
    """(B, D) through d channels."""

    def __init__(self, config: Config):
        super().__init__()
        random = torch.Generator().manual_seed(config.seed)
        self.narrow, self.wide = nn.Linear(config.width, config.inside), nn.Linear(config.inside, config.width)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.3, generator=random)

    def forward(self, x: Tensor, random: torch.Generator) -> Tensor:
        noise = torch.randn(x.shape, generator=random).to(x)
        return self.wide(self.narrow(x + 0.01 * noise))


def build(config: Config = Config()) -> Bottleneck:
    """The network, with weights that `config.seed` decides."""
    with torch.random.fork_rng(devices=()):
        return Bottleneck(config)


def enter(model: nn.Module, stage: str) -> Iterable[nn.Parameter]:
    """The parameters of a stage, which train from now on. Raises ValueError for another stage."""
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} is none of {', '.join(STAGES)}")
    return list(model.requires_grad_(True).parameters())


def loss(model: Bottleneck, stage: str, x: Tensor, random: torch.Generator) -> Tensor:
    """Squared error of what comes back."""
    return (model(x, random) - x).square().mean()
