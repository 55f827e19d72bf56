"""Digits by class: a small DiT that predicts v, first at 16x16 (64 tokens, four times cheaper), then at 32x32."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from accel_tools.zoo import digits
from accel_tools.zoo.training import (
    CHECKPOINTS,
    SCHEDULER,
    Run,
    Trained,
    batch,
    carry,
    device,
    position_embedding,
    train,
    zero,
)
from methods._core.noise import Noising

DIT = dict(num_attention_heads=4, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=6, sample_size=32,
           patch_size=2, num_embeds_ada_norm=1000)     # the pipeline hard-codes 1000 as the null class
NULL_CLASS = 1000


def dit_of(size: int):
    """The untrained model for images of `size` pixels; positions carry over from one size to the other."""
    from diffusers import DiTTransformer2DModel
    model = DiTTransformer2DModel(**DIT | {"sample_size": size})
    model.eval()                       # throughout: in training the class drops labels in each block apart; v_loss drops them
    for block in model.transformer_blocks:                                 # start as the identity, the output at zero
        zero(block.norm1.linear)
    zero(model.proj_out_1, model.proj_out_2)
    width = DIT["num_attention_heads"] * DIT["attention_head_dim"]
    model.pos_embed.pos_embed = position_embedding(size // 2, 16, width)
    return model


def v_loss(images: Tensor, y: Tensor, size: int) -> Callable[[Run], Tensor]:
    """Mean squared error of v at stratified noise levels; one label in ten is dropped."""
    from diffusers import DDIMScheduler
    noising = Noising(DDIMScheduler(**SCHEDULER))

    def loss_of(run: Run) -> Tensor:
        x0, label = batch(run, images, y, size)
        label = torch.where(torch.rand(size, generator=run.random) < 0.1, NULL_CLASS, label)
        noisy = noising.sample(x0.to(device()), run.random)
        with torch.autocast(device().type, dtype=torch.bfloat16):
            v = run.model(noisy.x, noisy.t, label.to(device())).sample
        return noising.loss(v, noisy)
    return loss_of


def train_dit(seed: int, scale: float) -> Trained:
    x, y = digits.split(held_out=False)
    torch.manual_seed(seed)
    first = Run(dit_of(16).to(device()), steps=round(2400 * scale), lr=1.5e-3, average=0.999, seed=seed)
    train(first, v_loss(F.avg_pool2d(x, 2), y, 96), CHECKPOINTS / "dit-16.ckpt")
    torch.manual_seed(seed)
    model = dit_of(32).to(device())
    carry(first.averaged, model)
    run = Run(model, steps=round(4000 * scale), lr=8e-4, average=0.999, seed=seed + 1)
    train(run, v_loss(x, y, 32), CHECKPOINTS / "dit.ckpt")
    return Trained(run.after(first), {"transformer": DIT, "scheduler": SCHEDULER}, batch=32, family="dit",
                   data=f"npm {digits.PACKAGE}: 8,000 training images, zero-padded to 32x32; first {first.steps} steps of 96 "
                        f"images at 16x16, then {run.steps} steps of 32 at 32x32")
