"""ImageFolder on digits, with the features of the digits' judge as its teacher; beside it tokenizers with one branch, and
without the teacher, trained as long."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from accel_tools.measure.generators import judged, linear
from accel_tools.zoo import digits
from methods import imagefolder
from methods._core.learning import Stage
from methods._zoo import load_judge
from methods.imagefolder import TRAINED, build

DATA = "from scratch, with the judge's features as the teacher; rivals are tokenizers alone, trained for as many steps"
BATCH, STEPS = 32, {"tokenizer": 500, "generator": 700}
SHIPPED = TRAINED["imagefolder"]
RIVALS = {"imagefolder": {"one branch": replace(SHIPPED, branches=1), "no teacher": replace(SHIPPED, semantic=0.0)}}


@cache
def teacher() -> nn.Module:
    return load_judge()


def training(pipe: Any, config: imagefolder.Config) -> Iterator[Stage]:
    """The stages of one network, of a rival the first alone. `pipe` is not used."""
    model = build(config)

    def tokenizer(images: Tensor, labels: Tensor, step: int, random: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            features = teacher().to(images.device).features(images)
            if step % 20 == 0 and step < STEPS["tokenizer"] // 2:
                revive(model, images, random)
        return imagefolder.loss(model, "tokenizer", images, features, random)

    def generator(images: Tensor, labels: Tensor, step: int, random: torch.Generator) -> dict[str, Tensor]:
        return imagefolder.loss(model, "generator", images, labels, random)

    imagefolder.enter(model, "tokenizer")
    yield Stage(model=model, loss=tokenizer, steps=STEPS["tokenizer"], batch=BATCH, lr=2e-3)
    if config == SHIPPED:
        imagefolder.enter(model, "generator")
        yield Stage(model=model, loss=generator, steps=STEPS["generator"], batch=BATCH, lr=2e-3)
    model.requires_grad_(True)                                       # all of it is kept


def revive(model: imagefolder.ImageFolder, images: Tensor, random: torch.Generator) -> None:
    """Move each code that none of `images` uses to what a place of one has: in a run so short too few would be reached."""
    for quantiser, f in zip(model.quantisers, model.maps(images), strict=True):
        used = torch.cat([index.flatten() for index in quantiser(f).index]).bincount(minlength=len(quantiser.codes)) > 0
        places = f.flatten(2).mT.flatten(0, 1)
        chosen = torch.randint(len(places), (int((~used).sum()),), generator=random).to(places.device)
        quantiser.codes.data[~used] = places[chosen]


@torch.no_grad()
def metrics(model: imagefolder.ImageFolder, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Of digits held out the error in [0, 1], from all scales and from the first ones; what a linear classifier reads in the
    codes of each branch; and what the judge says of generated ones, if the generator is trained."""
    config, images, labels = model.config, images[1000:], labels[1000:]
    coded = model.encode(images)
    tokens = [torch.stack(each, -1) for each in zip(*(each.index for each in coded), strict=True)]
    x, y = digits.split(held_out=False)
    known = model.encode(x[:3000])
    found: dict[str, Any] = {
        "positions": sum(p * p for p in config.scales), "codes": config.branches * sum(p * p for p in config.scales),
        "codes_used": [len(torch.cat([index.flatten() for index in each.index]).unique()) for each in coded],
        "mse_by_scale": [float(((model.decode(tokens[:n]).clamp(-1, 1) - images) / 2).square().mean())
                         for n in range(1, len(tokens) + 1)],
        "probe_by_branch": [linear(a.z.flatten(1), y[:3000], b.z.flatten(1), labels)
                            for a, b in zip(known, coded, strict=True)]}
    found["mse"] = found["mse_by_scale"][-1]
    if not model.generator.head.linear.weight.any():
        return found
    return found | judged(lambda asked, random: model.decode(imagefolder.generate(model, asked, random)))
