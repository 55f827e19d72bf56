"""MDTv2 on digits, and the same network without the masked pass, trained with as much computing, which makes more steps, and
for as many steps."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accel_tools.measure.generators import worth
from methods import mdtv2
from methods._core.learning import Stage
from methods.mdtv2 import TRAINED, build, macs

DATA = "from scratch; rivals have the same network and batch, and as many multiply-accumulates in training, or steps"
BATCH, STEPS = 32, 600
PLAIN = replace(TRAINED["mdtv2"], ratio=0.0)
SAMPLER = {"steps": 15, "guidance": 2.0}


def of_equal_computing() -> int:
    """Steps with one pass that cost as much as STEPS with two, at the mean share of masked tokens."""
    config = TRAINED["mdtv2"]
    return round(STEPS * (1 + macs(config, config.ratio + config.more / 2) / macs(config)))


RIVALS = {"mdtv2": {"plain pass alone": (PLAIN, of_equal_computing()), "plain pass alone, equal steps": (PLAIN, STEPS)}}


def training(pipe: Any, config: mdtv2.Config | tuple[mdtv2.Config, int]) -> Iterator[Stage]:
    """The stage of one network, or of a rival and its number of steps. `pipe` is not used."""
    config, steps = config if isinstance(config, tuple) else (config, STEPS)
    model = build(config)

    def loss(images: Tensor, labels: Tensor, step: int, random: torch.Generator) -> dict[str, Tensor]:
        return mdtv2.loss(model, "both", images, labels, random)

    mdtv2.enter(model)
    yield Stage(model=model, loss=loss, steps=steps, batch=BATCH, lr=2e-3)


def metrics(model: mdtv2.MDTv2, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """The weighted error of the noise held out, of the pass without masks, and the judge on images of 15 steps."""
    return worth(lambda asked, random: mdtv2.generate(model, asked, random, **SAMPLER),
                 lambda part, names, random: mdtv2.loss(model, "both", part, names, random)["plain"], images, labels)
