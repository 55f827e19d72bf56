"""DiCoDe on digits that move: clips of eight small frames, told in deep tokens, and a language model of what comes next."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import methods
from accel_tools.measure.quality import centroid
from accel_tools.zoo import digits
from accel_tools.zoo.training import device
from methods import dicode
from methods._core.learning import Stage
from methods._zoo import load_judge
from methods.dicode import TRAINED

STEPS = {"noisy": 800, "tokens": 700, "language": 500}        # of 32, 32 and 64 clips or pairs of them
RATE = 1e-3
DATA = ("laid on frames that are shrunk to 16x16; clips go at one height from the left, the middle or the right to one of "
        "them, those of the language model rest in the middle and then go left or right; from scratch, behind two stages of "
        "the judge of moving digits. Tokens are first learnt from the noisier half of all levels, where little else tells of a "
        "clip")
MIDDLE = (digits.CANVAS - digits.SIDE) // 2


def shrunk(clips: Tensor, size: int) -> Tensor:
    """Clips (B, F, 1, 32, 32) with frames of `size`."""
    return F.interpolate(clips.flatten(0, 1), size=(size, size), mode="area").unflatten(0, clips.shape[:2])


def between(start: Tensor, end: Tensor, frames: int) -> Tensor:
    """Places (B, F, 2) on the way from corners (B, 2) to others."""
    share = torch.linspace(0, 1, frames)[:, None]
    return (start[:, None] + share * (end - start)[:, None]).round().long()


def wandering(images: Tensor, config: dicode.Config, random: torch.Generator) -> Tensor:
    """Clips (B, F, 1, size, size) of digits that go, at one height, from the left, the middle or the right to one of them."""
    columns = MIDDLE * torch.randint(3, (2, len(images)), generator=random)
    start, end = torch.stack([torch.full_like(columns, MIDDLE), columns], -1)
    return shrunk(digits.placed(images, between(start, end, config.frames)), config.size)


def leaving(images: Tensor, config: dicode.Config, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clips of digits at rest in the middle, those in which they leave it, and whether to the right (B,) or to the left."""
    right = torch.rand(len(images), generator=random) < 0.5
    start = torch.full((len(images), 2), MIDDLE)
    end = torch.stack([start[:, 0], 2 * MIDDLE * right], 1)
    return *(shrunk(digits.placed(images, between(start, to, config.frames)), config.size) for to in (start, end)), right


def build(config: dicode.Config) -> dicode.DiCoDe:
    """The network behind two stages of the judge, which give maps (B, 64, 4, 4) of frames of 16x16."""
    return dicode.build(config, load_judge("video_judge").stages[:2])


def training(pipe: Any, config: dicode.Config) -> Iterator[Stage]:
    """The stages of one model. `pipe` is not used."""
    model = build(config).to(device())

    def loss(stage: str, images: Tensor, labels: Tensor, step: int, random: torch.Generator) -> dict[str, Tensor]:
        if stage != "language":
            clips = wandering(images.cpu(), config, random).to(device())
            t = (500 + 500 * torch.rand(len(images), generator=random)).long().clamp(max=999) if stage == "noisy" else None
            return {"loss": dicode.loss(model, "tokens", clips, random=random, t=t)}
        with torch.no_grad():
            tokens = torch.cat([model.encode(clip.to(device())) for clip in leaving(images.cpu(), config, random)[:2]], 1)
        return {"loss": dicode.loss(model, stage, tokens, labels[:, None])}

    for (stage, steps), batch in zip(STEPS.items(), (32, 32, 64), strict=True):
        dicode.enter(model, "language" if stage == "language" else "tokens")
        yield Stage(model=model, loss=partial(loss, stage), steps=steps, batch=batch, lr=RATE)
    for part in (model.resampler, model.denoiser):
        part.requires_grad_(True)                              # kept with the language model


def where(clips: Tensor) -> Tensor:
    """Columns (B,) of the digits in the last frames, from 0 at the left end to 1 at the right one, by their bright pixels."""
    ink = (clips[:, -1, 0].clamp(-1, 1) + 1) / 2
    found = centroid(ink * (ink > 0.3))[..., 1] * digits.CANVAS / clips.shape[-1]
    return (found - digits.SIDE / 2) / (2 * MIDDLE)


def on_a_side(clips: Tensor) -> float:
    """Share of clips that end at the left or at the right, within a fifth of the way."""
    place = where(clips)
    return float((torch.minimum(place.abs(), (1 - place).abs()) < 0.2).float().mean())


@torch.no_grad()
def metrics(model: dicode.DiCoDe, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """On digits held out: error of clips drawn from their own tokens, and from those of another clip; the likelihood of the
    clip that follows; and where it ends, drawn and as the mean of the density."""
    model.eval()
    config, random, images, labels = model.config, torch.Generator().manual_seed(0), images[:200], labels[:200]
    clips = wandering(images, config, random)
    tokens = model.encode(clips)
    own, other = (model.decode(each, torch.Generator().manual_seed(1)) for each in (tokens, tokens.roll(1, 0)))
    rest, gone, _ = leaving(images, config, random)
    first, second = model.encode(rest), model.encode(gone)
    words = labels[:, None]
    found = {"n": len(images), "tokens": config.tokens, "components": config.components,
             "error": float(((own - clips) / 2).square().mean()),
             "error_of_others": float(((other - clips) / 2).square().mean()),
             "nll": float(dicode.nll(model.language(words, torch.cat([first, second[:, :-1]], 1))[:, config.tokens:], second,
                                     config.components).mean()),
             "rebuilt_on_a_side": on_a_side(model.decode(second, torch.Generator().manual_seed(3)))}
    for name, change in (("on_a_side", {}), ("mean_on_a_side", {"mean": True})):
        drawn = dicode.generate(model, words, torch.Generator().manual_seed(2), before=first[:, None], **change)
        after = model.decode(drawn[:, 0], torch.Generator().manual_seed(3))
        found[name] = on_a_side(after)
        found[name.replace("on_a_side", "right")] = float((where(after) > 0.5).float().mean())
    return found


def study(folder: Path) -> dict[str, Any]:
    """The bundled mixture beside language models of one Gaussian and of one with fixed variance, over the same tokens."""
    rows = []
    x, y = digits.split(held_out=False)
    for name, components, fixed in (("Mixture of 4 Gaussians", 4, False), ("One Gaussian", 1, False),
                                    ("One Gaussian of variance 1", 1, True)):
        config = TRAINED["dicode"]
        model = build(config)
        dicode.load(model, methods.weights("dicode"))
        if components == 1:
            one = build(replace(config, components=1))
            model.config, model.language = one.config, one.language
            relearn(model, x, y, fixed)
        found = metrics(model, *digits.split(held_out=True))
        rows.append([name, found["nll"], found["on_a_side"], found["mean_on_a_side"]])
    return {"model": "digits", "title": "What comes next, by the density of a token",
            "note": f"{found['n']} digits held out rest for a clip and then leave to the left or to the right. Negative "
                    "log-likelihood of the second clip's tokens, a dimension; share of drawn clips, and of those made from the "
                    "mean of each density, that end at one of both sides.",
            "columns": ["Density", "Nats a dimension", "Drawn, at a side", "Mean, at a side"], "rows": rows}


def relearn(model: dicode.DiCoDe, x: Tensor, y: Tensor, fixed: bool) -> None:
    """Train the language model of a model as its second stage is, with a variance that may be fixed to 1."""
    random, steps = torch.Generator().manual_seed(0), STEPS["language"]
    optimizer = torch.optim.AdamW(dicode.enter(model, "language"), lr=RATE)
    d, head = model.config.depth, model.language.head
    for step in range(steps):
        if fixed:
            with torch.no_grad():
                head.weight[d:2 * d].zero_()
                head.bias[d:2 * d] = 0.5413                    # softplus of which is 1
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * (1 - step / steps)
        index = torch.randint(len(x), (64,), generator=random)
        with torch.no_grad():
            tokens = torch.cat([model.encode(clip) for clip in leaving(x[index], model.config, random)[:2]], 1)
        optimizer.zero_grad()
        dicode.loss(model, "language", tokens, y[index, None]).backward()
        optimizer.step()
    if fixed:
        with torch.no_grad():
            head.weight[d:2 * d].zero_()
            head.bias[d:2 * d] = 0.5413
