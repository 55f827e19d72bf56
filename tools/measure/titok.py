"""TiTok on digits, in three stages behind the means of their patches, and what it is worth on digits held out."""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import methods
from accel_tools.measure.macs import count_macs
from accel_tools.measure.quality import psnr, quality
from accel_tools.zoo import digits
from accel_tools.zoo.training import CHECKPOINTS, device
from methods import titok
from methods._core.codebook import quantise
from methods._core.learning import Stage
from methods._core.parts import patchify
from methods.titok import TRAINED, build

STEPS = {"proxy": 1200, "pixels": 400, "generator": 1500}           # of 64 images
RATES = {"proxy": 3e-3, "pixels": 1e-3, "generator": 1e-3}
DATA = ("from scratch, behind 128 means of patches; in the first third of the first stage codes that a batch leaves unused "
        "move to vectors of it")
SAMPLED, SAMPLES = (1, 2, 4, 8), 500                                # steps that are judged, and images of each


def means(patches: Tensor, count: int, rounds: int = 30) -> Tensor:
    """The k-means of `patches` (n, D), from `count` of them that differ; a mean that nothing is nearest to stays."""
    distinct = patches.unique(dim=0)
    found = distinct[torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0))[:count]]
    for _ in range(rounds):
        index = quantise(patches, found).index
        size = index.bincount(minlength=count)[:, None]
        found = torch.where(size > 0, torch.zeros_like(found).index_add(0, index, patches) / size.clamp(min=1), found)
    return found


def grid_tokenizer(config: titok.Config) -> tuple[Tensor, nn.Module]:
    """Means (proxy_codes, patch^2) of patches of digits, and what pastes one at each place of the grid."""
    patches = patchify(digits.split(held_out=False)[0][:1000], config.patch).flatten(0, 1)
    paste = nn.ConvTranspose2d(config.proxy_depth, 1, config.patch, config.patch)
    with torch.no_grad():
        paste.weight.copy_(torch.eye(config.proxy_depth).view_as(paste.weight))
        paste.bias.zero_()
    return means(patches, config.proxy_codes), paste


def training(pipe: Any, config: titok.Config) -> Iterator[Stage]:
    """The stages of one model. `pipe` is not used."""
    codebook, paste = grid_tokenizer(config)
    model = build(config, codebook, paste).to(device())
    codebook = codebook.to(device())

    @torch.no_grad()
    def seen(stage: str, images: Tensor, labels: Tensor, step: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        if stage == "proxy":
            if step % 20 == 0 and step < STEPS["proxy"] // 3:
                revive(model, images, random)
            return images, quantise(patchify(images, config.patch), codebook).index
        return (model.encode(images).index if stage == "generator" else images), labels

    def loss(stage: str, images: Tensor, labels: Tensor, step: int, random: torch.Generator) -> dict[str, Tensor]:
        return {"loss": titok.loss(model, stage, *seen(stage, images, labels, step, random), random)}

    for stage, steps in STEPS.items():
        titok.enter(model, stage)
        yield Stage(model=model, loss=partial(loss, stage), steps=steps, batch=64, lr=RATES[stage])
    model.requires_grad_(True)                                       # all of it is kept


def revive(model: titok.TiTok, images: Tensor, random: torch.Generator) -> None:
    """Move each code that none of `images` uses to a vector that one of them has: in a run so short too few codes would be
    reached otherwise."""
    z = model.encoder(images).flatten(0, 1)
    dead = model.encode(images).index.flatten().bincount(minlength=len(model.codes)) == 0
    model.codes[dead] = z[torch.randint(len(z), (int(dead.sum()),), generator=random).to(z.device)]


def errors(images: Tensor, painted: Tensor) -> dict[str, float]:
    """Between images in [-1, 1], as they are in [0, 1]."""
    a, b = ((x.clamp(-1, 1) + 1) / 2 for x in (images, painted))
    return {"mse": float((a - b).square().mean()), "psnr": psnr(a, b)}


@torch.no_grad()
def reconstruction(model: titok.TiTok, images: Tensor) -> dict[str, float]:
    """Of images (n, 1, 32, 32) painted from their tokens: the errors, and how many codes are used."""
    tokens = torch.cat([model.encode(part).index for part in images.split(250)])
    painted = torch.cat([model.decode(part) for part in tokens.split(250)])
    return errors(images, painted) | {"codes_used": len(tokens.unique())}


@torch.no_grad()
def of_grid(images: Tensor) -> dict[str, float]:
    """The errors of the grid tokenizer on the images that `metrics` paints."""
    config, images = next(iter(TRAINED.values())), images[1000:]
    codebook, paste = grid_tokenizer(config)
    found = quantise(patchify(images, config.patch), codebook).z_q
    return errors(images, paste(found.mT.unflatten(-1, (config.side, config.side))))


@torch.no_grad()
def metrics(model: titok.TiTok, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Reconstruction of the second thousand of digits held out, of which the first made the judge's reference; and what the
    judge says of generated ones by the number of steps."""
    model.eval()
    asked = torch.arange(SAMPLES) % 10
    found: dict[str, Any] = {"n": SAMPLES, "tokens": model.config.tokens, **reconstruction(model, images[1000:])}
    for key in ("label_accuracy", "frechet", "macs"):
        found[key] = {}
    for steps in SAMPLED:
        def draw(asked: Tensor, steps: int = steps) -> Tensor:
            tokens = titok.generate(model, asked, torch.Generator().manual_seed(0), steps=steps)
            return ((model.decode(tokens) + 1) / 2).clamp(0, 1)
        judged = quality(draw(asked), asked)
        found["label_accuracy"][steps], found["frechet"][steps] = judged["label_accuracy"], judged["frechet"]
        found["macs"][steps] = count_macs(lambda: draw(asked[:1]))
    return found


def study(folder: Path) -> dict[str, Any]:
    """Reconstruction and generation by the number of tokens. Needs the checkpoints of `train_zoo.py --method titok`."""
    images, labels = digits.split(held_out=True)
    grid, first = of_grid(images), next(iter(titok.TRAINED.values()))
    rows = [[f"{first.proxy_codes} means of patches", first.side ** 2, first.side ** 2 * (first.proxy_codes - 1).bit_length(),
             None, grid["mse"], grid["psnr"], *[None] * 2 * len(SAMPLED)]]
    for name, config in titok.TRAINED.items():
        model = titok.build(config)
        states = [torch.load(CHECKPOINTS / f"{name}-{stage}.ckpt", map_location="cpu")["averaged"] for stage in (0, 1)]
        moved = {key.split(".")[0] for key, value in states[0].items() if not torch.equal(value, states[1][key])}
        if moved != set(titok.STAGES["pixels"]):
            raise RuntimeError(f"tuning {name} on pixels changed {', '.join(sorted(moved))}")
        model.load_state_dict(states[0])
        before = reconstruction(model, images[1000:])["mse"]
        titok.load(model, methods.weights(name))
        found = metrics(model, images, labels)
        rows.append([name, config.tokens, config.tokens * (config.codes - 1).bit_length(), before, found["mse"], found["psnr"],
                     *found["label_accuracy"].values(), *found["frechet"].values()])
    return {"model": "digits", "title": "Digits by the number of tokens",
            "note": "Squared error in [0, 1] over 1,000 digits that nothing was trained on, after the stage of proxy codes and "
                    "after the decoder was tuned on pixels, which left encoder, latents and codebook as they were to the bit; "
                    f"then the share of {SAMPLES} generated digits in which a judge sees the one asked for, and "
                    "their Fréchet distance, by the number of steps; in a single step all digits of a class are the same. The "
                    "first row is the grid tokenizer whose codes are the proxy.",
            "columns": ["Tokenizer", "Tokens", "Bits an image", "Error, proxy stage", "Error", "PSNR (dB)",
                        *[f"{what}, {n}" for what in ("Right", "Fréchet") for n in SAMPLED]], "rows": rows}
