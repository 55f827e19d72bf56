"""The predictors of TokenCache on digits, behind the bundled DiT, and what they are worth beside scores at random."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import methods
from accel_tools.measure.macs import count_macs, equal_cost_steps
from accel_tools.measure.quality import psnr
from accel_tools.measure.tasks import TASKS
from accel_tools.zoo.training import device
from methods import tokencache
from methods._core.denoiser import describe
from methods._core.learning import Stage
from methods._core.noise import Noising
from methods.tokencache import TRAINED, Config, Predictor

__all__ = ["DATA", "TRAINED", "build", "metrics", "training"]

STEPS, GRID = 300, 20                     # of training, of 8 images; and steps of the sampler whose neighbours are compared
SAMPLES = 20                              # images that are judged
DATA = "the predictor alone, beside the bundled dit, which stays as it is"


def build(config: Config) -> Predictor:
    return Predictor(len(describe(methods.tiny("dit").transformer).blocks), seed=config.seed)


def training(pipe: Any, config: Config) -> Iterator[Stage]:
    """One stage: of one image with one noise, neighbouring steps of the sampler's grid."""
    model, noising, predictor = pipe.transformer.to(device()).requires_grad_(False), Noising(pipe.scheduler), build(config)
    pipe.scheduler.set_timesteps(GRID)
    times, null = pipe.scheduler.timesteps.tolist(), model.config.num_embeds_ada_norm
    denoiser = describe(model)

    def loss(images: Tensor, labels: Tensor, step: int, random: torch.Generator) -> dict[str, Tensor]:
        at = int(torch.randint(1, GRID, (), generator=random))
        labels = labels.where((torch.rand(len(labels), generator=random) >= 0.5).to(labels.device), null)     # both halves
        eps = torch.randn(images.shape, generator=random).to(images)

        def inputs(t: int) -> dict[str, Tensor]:
            many = torch.full((len(images),), t, device=images.device)
            a, s = noising.levels(many, images)
            return dict(hidden_states=a * images + s * eps, timestep=many, class_labels=labels)

        before, now = inputs(times[at - 1]), inputs(times[at])
        return tokencache.loss(model, predictor, before, now, times[at], denoiser.grid(now, denoiser.blocks[0]), config)

    yield Stage(model=predictor, loss=loss, steps=STEPS, batch=8, lr=3e-3)


@torch.no_grad()
def metrics(model: Predictor, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Of digits drawn plain, in fewer steps, and with cached tokens by these scores and by scores at random. PSNR is to the
    plain digits. The held-out `images` and `labels` are not used."""
    task, pipe = TASKS["dit"], methods.tiny("dit")
    prompts, arms = task.prompts(SAMPLES), {"trained": model, "random": None}
    plain = task.sample(pipe, task.steps, prompts)
    rows: dict[str, Any] = {"plain": _row(pipe, task.steps, plain)}
    for version in (1, 2):
        for name, predictor in arms.items():
            with tokencache.apply(pipe, Config(version=version, predictor=predictor)):
                drawn = task.sample(pipe, task.steps, prompts)
                rows[f"version {version}, {name}"] = _row(pipe, task.steps, drawn) | {"psnr": psnr(drawn, plain)}
    fewer = equal_cost_steps(rows["version 1, trained"]["macs_per_image"], rows["plain"]["macs_per_image"], task.steps)
    drawn = task.sample(pipe, fewer, prompts)
    rows["plain, fewer steps"] = {"steps": fewer} | _row(pipe, fewer, drawn) | {"psnr": psnr(drawn, plain)}
    return {"guidance": task.guidance, "seed": 0, "n": SAMPLES, **rows}


def _row(pipe: Any, steps: int, drawn: Tensor) -> dict[str, Any]:
    task = TASKS["dit"]
    macs = count_macs(lambda: task.sample(pipe, steps, task.prompts(1)))
    return {"macs_per_image": macs, "label_accuracy": task.quality(drawn, task.prompts(len(drawn)))["label_accuracy"]}
