"""What methods that fine-tune a pretrained class-conditional model have in common: a stage on labelled images, and checks."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from methods._core.dit import hidden
from methods._core.learning import Stage
from methods._core.noise import Noising

DROPPED = 0.1                            # share of labels that are left out, for guidance


def check_trainable(model: nn.Module) -> None:
    """
    Raises:
        ValueError: the model is in training mode, or with gradient checkpointing.
    """
    if model.training:
        raise ValueError("the model is in training mode, in which each block drops labels by itself: call model.eval()")
    if getattr(model, "gradient_checkpointing", False):
        raise ValueError("gradient checkpointing runs blocks again, with other choices: switch it off")


def plain_loss(model: nn.Module, noising: Noising, x0: Tensor, *, step: int, random: torch.Generator, **conditions: Any
               ) -> dict[str, Tensor]:
    """The ordinary loss of a diffusion model as `loss`. x0 (B, C, ...) clean latents; `random` draws timesteps and noise.

    Raises:
        ValueError: as `check_trainable`.
    """
    check_trainable(model)
    noisy = noising.sample(x0, random)
    return {"loss": noising.loss(model(noisy.x, timestep=noisy.t, return_dict=False, **conditions)[0], noisy)}


def labelled(pipe: Any, model: nn.Module, loss: Callable[..., dict[str, Tensor]], *, steps: int, lr: float, batch: int = 16,
             **more: Any) -> Stage:
    """A stage that trains `model`, made of the transformer of `pipe`, on labelled images, one label in ten dropped.

    `loss` is called as `loss(model, noising, x0, step=, random=, class_labels=)`, in bfloat16 where autocast has it; `more` are
    further fields of the stage.
    """
    noising, null = Noising(pipe.scheduler), model.config.num_embeds_ada_norm

    def step_loss(images: Tensor, labels: Tensor, step: int, random: torch.Generator) -> dict[str, Tensor]:
        labels = hidden(labels, null, DROPPED, random)
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            return loss(model, noising, images, step=step, random=random, class_labels=labels)

    return Stage(model=model, loss=step_loss, steps=steps, batch=batch, lr=lr, **more)
