"""Digits one token at a time: first a VQ tokenizer with its decoder, then Chameleon over its tokens."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from accel_tools.zoo import digits
from accel_tools.zoo.recipes.judges import jitter
from accel_tools.zoo.training import CHECKPOINTS, Run, Trained, batch, device, train
from methods._zoo.ar import BEGIN, CODES, DIGITS, FIRST, build

VIEWS = 4                          # of each scan, slightly moved, for the language model to learn from


def tokenizer_loss(x: Tensor, y: Tensor, size: int) -> Callable[[Run], Tensor]:
    """Squared error of the decoded image, and the tokenizer's own loss. A code nobody used for 50 steps moves to a vector
    that is used."""
    used = torch.zeros(CODES, device=device())

    def loss_of(run: Run) -> Tensor:
        vq = run.model["model"].model.vqmodel
        images, _ = batch(run, x, y, size)
        images = jitter(images, run.random, 0.4).to(device())
        code = vq.quant_conv(vq.encoder(images))
        quantised, loss, indices = vq.quantize(code)
        used.add_(indices.bincount(minlength=CODES))
        if run.step % 50 == 49 and run.step < run.steps // 2:
            dead = (used == 0).nonzero().squeeze(1)
            places = torch.randint(indices.numel(), (len(dead),), generator=run.random)
            with torch.no_grad():
                vq.quantize.embedding.weight[dead] = code.permute(0, 2, 3, 1).flatten(0, 2)[places.to(device())]
            used.zero_()
        return F.mse_loss(run.model["decoder"](quantised), images) + loss
    return loss_of


def language_loss(tokens: Tensor, y: Tensor, size: int) -> Callable[[Run], Tensor]:
    """Cross-entropy of the 64 image tokens after the digit and the begin of the image; one digit in ten is hidden."""

    def loss_of(run: Run) -> Tensor:
        image, label = batch(run, tokens, y, size)
        ids = torch.cat([DIGITS + label[:, None], torch.full((size, 1), BEGIN), FIRST + image], 1).to(device())
        seen = torch.ones_like(ids)
        seen[:, 0] = (torch.rand(size, generator=run.random) >= 0.1).long().to(device())
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        chameleon = run.model["model"]
        with torch.autocast(device().type, dtype=torch.bfloat16):
            hidden = chameleon.model(ids[:, :-1], attention_mask=seen[:, :-1], position_ids=positions[:, :-1],
                                     use_cache=False).last_hidden_state
            logits = chameleon.lm_head(hidden[:, 1:])
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 2:].flatten())
    return loss_of


@torch.no_grad()
def tokens_of(model, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The codes (VIEWS N, 64) of slightly moved scans, and their digits."""
    random, vq = torch.Generator().manual_seed(seed), model["model"].model.vqmodel
    codes = [vq.encode(jitter(part, random, 0.4).to(device())).image_tokens.view(len(part), -1).cpu()
             for part in x.repeat(VIEWS, 1, 1, 1).split(250)]
    return torch.cat(codes), y.repeat(VIEWS)


def train_ar(seed: int, scale: float) -> Trained:
    x, y = digits.split(held_out=False)
    torch.manual_seed(seed)
    first = Run(build().to(device()), steps=round(1200 * scale), lr=2e-3, average=0.99, seed=seed)
    train(first, tokenizer_loss(x, y, 48), CHECKPOINTS / "ar-vq.ckpt")
    tokens, labels = tokens_of(first.averaged.eval(), x, y, seed)
    run = Run(first.averaged.requires_grad_(True), steps=round(1000 * scale), lr=2e-3, average=0.997, seed=seed + 1)
    run.model["model"].model.vqmodel.requires_grad_(False)
    run.model["decoder"].requires_grad_(False)
    train(run, language_loss(tokens, labels, 64), CHECKPOINTS / "ar.ckpt")
    run.seconds += first.seconds                       # its losses are of another kind and stay out of the curve
    return Trained(run, {"layers": 6, "width": 128}, batch=64,
                   data=f"npm {digits.PACKAGE}: 8,000 training images at 32x32; a tokenizer of {CODES} codes, 8x8 an image, in "
                        f"{first.steps} steps of 48 images, then the language model in {run.steps} steps of 64")
