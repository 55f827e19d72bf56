"""DiffMAE on digits, and with as much computing: from pure noise alone, a masked autoencoder, and the decoder without
self-attention."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accel_tools.measure.generators import linear
from accel_tools.measure.quality import quality
from accel_tools.measure.trained import SEEDS, averaged
from accel_tools.zoo import digits
from methods import diffmae
from methods._core.learning import Stage
from methods._core.masking import random_mask
from methods._core.noise import Noising
from methods._core.parts import patchify
from methods.diffmae import LEVELS, TRAINED, build, macs

DATA = "from scratch, without labels; rivals trained with as many multiply-accumulates"
BATCH, STEPS = 32, 1800
DRAWN, STEPS_DRAWN, AT = 100, 50, (0, 250, 500, 750, 999)             # images for each seed, steps, levels of the error
RIVALS = {"diffmae": {"pure noise alone, as a masked autoencoder": replace(TRAINED["diffmae"], lowest=LEVELS - 1),
                      "cross decoder": replace(TRAINED["diffmae"], decoder="cross")}}


def steps_of(config: diffmae.Config) -> int:
    """As many as cost what STEPS of the shipped network do."""
    return round(STEPS * sum(macs(TRAINED["diffmae"])) / sum(macs(config)))


def training(pipe: Any, config: diffmae.Config) -> Iterator[Stage]:
    """The stage of one network. `pipe` is not used."""
    model = build(config)

    def loss(images: Tensor, labels: Tensor, step: int, random: torch.Generator) -> dict[str, Tensor]:
        return diffmae.loss(model, "pretrain", images, random)

    yield Stage(model=model, loss=loss, steps=steps_of(config), batch=BATCH, lr=2e-3)


def sharpness(images: Tensor) -> float:
    """The mean variance of an image's Laplacian."""
    kernel = images.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return float(F.conv2d(images, kernel).flatten(1).var(1).mean())


def features(model: diffmae.DiffMAE, images: Tensor) -> Tensor:
    """(n, 2D): mean and maximum of the patches' encodings, of whole images."""
    seen = torch.cat([model.encode(part)[0][:, 1:] for part in images.split(250)])
    return torch.cat([seen.mean(1), seen.amax(1)], dim=1)


def probe(model: diffmae.DiffMAE, images: Tensor, labels: Tensor) -> float:
    """The share of `images` that a linear classifier gets right on the frozen encoder."""
    x, y = digits.split(held_out=False)
    return linear(features(model, x[:4000]), y[:4000], features(model, images), labels)


@torch.no_grad()
def metrics(model: diffmae.DiffMAE, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """On digits held out: the error of masked pixels by noise level; of images completed in one step and in many, their error,
    sharpness and whether the judge sees the digit; and a linear classifier on the encoder. Means over SEEDS, and ranges."""
    config, images, labels = model.config, images[1000:], labels[1000:]
    encoder, step = macs(config)
    found: dict[str, Any] = {"n": DRAWN * len(SEEDS), "seeds": list(SEEDS), "training_steps": steps_of(config),
                             "macs_of_encoder": encoder, "macs_of_step": step, "probe_accuracy": probe(model, images, labels)}
    random, noising = torch.Generator().manual_seed(0), Noising(diffmae.schedule())
    some, found["error_at_level"] = images[:500], {}
    masking = random_mask(len(some), config.tokens, config.ratio, random)
    clean, seen = masking.drop(patchify(some, config.patch)), model.encode(some, masking)
    for t in AT:
        noisy = noising.sample(clean, random, t=torch.full((len(some),), t))
        if t >= config.lowest:
            found["error_at_level"][t] = float(F.mse_loss(model.decode(noisy.x, noisy.t, masking, seen), clean))
    rows: dict[str, list[float]] = {}
    for seed in SEEDS:
        random, part = torch.Generator().manual_seed(seed), slice(DRAWN * seed, DRAWN * (seed + 1))
        whole = images[part]
        masking = random_mask(DRAWN, config.tokens, config.ratio, random)
        drawn = {"one step": diffmae.inpaint(model, whole, masking, random, steps=1)}
        if not config.lowest:
            drawn[f"{STEPS_DRAWN} steps"] = diffmae.inpaint(model, whole, masking, random, steps=STEPS_DRAWN)
        for how, each in ({"real": whole} | drawn).items():
            each = each.clamp(-1, 1)
            judged = quality((each + 1) / 2, labels[part])
            for what, value in (("error of masked pixels", float((each - whole).square().mean()) / config.ratio),
                                ("sharpness", sharpness(each)), ("label_accuracy", judged["label_accuracy"])):
                rows.setdefault(f"{what}, {how}", []).append(value)
    for name, values in rows.items():
        found |= averaged(name, values)
    return found
