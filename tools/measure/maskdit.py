"""MaskDiT on digits, and what else can be made of as much computing: a plain DiT on whole sequences, and no reconstruction."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accel_tools.measure.generators import worth
from methods import maskdit
from methods._core.learning import Stage
from methods.maskdit import TRAINED, build, macs

DATA = "from scratch; a quarter of the computing without masks; rivals trained with as many multiply-accumulates"
BATCH, STEPS = 32, 1440                          # as many steps as all of the computing would make with masks
RIVALS = {"maskdit": {"plain DiT, whole sequences": replace(TRAINED["maskdit"], ratio=0.0, decoder_layers=0),
                      "without reconstruction": replace(TRAINED["maskdit"], reconstruction=0.0)}}
SAMPLER = {"steps": 10, "guidance": 1.5}


def lengths(config: maskdit.Config) -> dict[str, int]:
    """Steps of each stage, all of which cost as much as STEPS masked ones of the shipped network."""
    budget = STEPS * macs(TRAINED["maskdit"], TRAINED["maskdit"].ratio)
    shares = {"masked": 0.75, "whole": 0.25} if config.ratio else {"whole": 1.0}
    return {stage: round(share * budget / macs(config, config.ratio if stage == "masked" else 0))
            for stage, share in shares.items()}


def training(pipe: Any, config: maskdit.Config) -> Iterator[Stage]:
    """The stages of one network. `pipe` is not used."""
    model = build(config)

    def loss(stage: str, images: Tensor, labels: Tensor, step: int, random: torch.Generator) -> dict[str, Tensor]:
        return maskdit.loss(model, stage, images, labels, random)

    for stage, steps in lengths(config).items():
        maskdit.enter(model, stage)
        yield Stage(model=model, loss=partial(loss, stage), steps=steps, batch=BATCH, lr=2e-3)
    model.requires_grad_(True)                                       # all of it is kept


def metrics(model: maskdit.MaskDiT, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """The loss on whole sequences held out, and the judge on images of ten steps of Heun's method."""
    return {"training_steps": lengths(model.config), **worth(
        lambda asked, random: maskdit.generate(model, asked, random, **SAMPLER),
        lambda part, names, random: maskdit.loss(model, "whole", part, names, random)["dsm"], images, labels)}
