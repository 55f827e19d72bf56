"""U-DiT on digits, 2x2 cells of pixels as four channels; beside it a plain DiT trained with as much computing."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel_tools.measure.generators import worth
from methods import u_dit
from methods._core.dit import Head, Level, blocks, chain_macs, positions
from methods._core.learning import Stage, seeded
from methods._core.parts import patchify, unpatchify
from methods.u_dit import TRAINED, build, macs

DATA = "from scratch, 2x2 cells of pixels as four channels; the rival trained with as many multiply-accumulates"
BATCH, STEPS = 32, 400
SAMPLER = {"steps": 15, "guidance": 2.0}


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A DiT with patches of 2, on the same latents."""

    size: int = 16
    channels: int = 4
    width: int = 64
    layers: int = 6
    heads: int = 4
    classes: int = 10
    drop: float = 0.1
    clip: float = 1.0

    @property
    def macs(self) -> int:
        """Of one call for one image."""
        N, D, pixels = self.size ** 2 // 4, self.width, 4 * self.channels
        return N * pixels * D + 256 * D + D * D + chain_macs(self.layers, N, D, D) + 2 * N * D * pixels + 2 * D * D


class DiT(nn.Module):
    def __init__(self, config: Plain):
        super().__init__()
        self.config, D = config, config.width
        self.embed, self.level, self.label = nn.Linear(4 * config.channels, D), Level(D), nn.Embedding(config.classes + 1, D)
        self.register_buffer("places", positions(D, config.size // 2), persistent=False)
        self.blocks, self.head = blocks(config.layers, D, config.heads, D), Head(D, D, 8 * config.channels)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        cond, x = self.level(t) + self.label(labels), self.embed(patchify(x, 2)) + self.places
        for block in self.blocks:
            x = block(x, cond)
        return unpatchify(self.head(x, cond), 2, self.config.size // 2)


RIVALS = {"u_dit": {"plain DiT": Plain()}}


def steps_of(config: u_dit.Config | Plain) -> int:
    """As many as cost what STEPS of the shipped network do, unfolded as it trains."""
    cost = config.macs if isinstance(config, Plain) else macs(config, folded=False)
    return round(STEPS * macs(TRAINED["u_dit"], folded=False) / cost)


def training(pipe: Any, config: u_dit.Config | Plain) -> Iterator[Stage]:
    """The stage of one network. `pipe` is not used."""
    with seeded(0):
        model = DiT(config) if isinstance(config, Plain) else build(config)

    def loss(images: Tensor, labels: Tensor, step: int, random: torch.Generator) -> dict[str, Tensor]:
        return u_dit.loss(model, "all", F.pixel_unshuffle(images, 2), labels, random)

    yield Stage(model=model, loss=loss, steps=steps_of(config), batch=BATCH, lr=2e-3)


def metrics(model: u_dit.UDiT | DiT, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """The error of the noise held out, and the judge on images of 15 steps."""
    used = u_dit.fold(model) if isinstance(model, u_dit.UDiT) else model
    found = worth(lambda asked, random: F.pixel_shuffle(u_dit.generate(used, asked, random, **SAMPLER), 2),
                  lambda part, names, random: u_dit.loss(used, "all", F.pixel_unshuffle(part, 2), names,
                                                         random)["simple"], images, labels)
    return found | {"training_steps": steps_of(model.config),
                    "parameters": sum(weight.numel() for weight in model.parameters())}
