"""A method that trains, on real digits and from the bundled DiT: all that is particular to it stands in its own module."""
from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

import methods
from accel_tools.measure.macs import count_macs, equal_cost_steps
from accel_tools.measure.records import hardware, rounded
from accel_tools.measure.tasks import TASKS
from accel_tools.zoo import digits
from accel_tools.zoo.training import CHECKPOINTS, Run, batch, device, train
from methods import _trained
from methods._core import learning


def names(slug: str) -> list[str]:
    """What the module of a method says is to be trained. Raises ValueError where it says nothing."""
    module = import_module(f"methods.{slug}")
    if not hasattr(module, "TRAINED"):
        raise ValueError(f"methods/{slug}.py has no TRAINED, so there is nothing to train")
    return list(module.TRAINED)


def recipe(slug: str) -> Any:
    """What says how a method is trained: its own module, or tools/measure/<slug>.py beside one that is full."""
    module = import_module(f"methods.{slug}")
    return module if hasattr(module, "training") else import_module(f"accel_tools.measure.{slug}")


def train_method(slug: str, name: str, seed: int, scale: float, command: str) -> dict[str, Any]:
    """Train `name` of TRAINED stage by stage and write its weights and its card, which is returned."""
    module = recipe(slug)
    config = module.TRAINED[name]
    x, y = digits.split(held_out=False)
    torch.manual_seed(seed)
    history, stages = [], []
    for i, stage in enumerate(module.training(methods.tiny("dit"), config)):
        def loss_of(run: Run, stage=stage):
            images, labels = batch(run, x, y, stage.batch)
            return stage.loss(images.to(device()), labels.to(device()), run.step, run.random)

        run = Run(stage.model.to(device()), steps=round(stage.steps * scale), lr=stage.lr, average=stage.average,
                  rates=stage.rates, seed=seed + i)
        train(run, loss_of, CHECKPOINTS / f"{name}-{i}.ckpt", save_every=100)
        stage.model.load_state_dict(run.averaged.state_dict())
        stages.append({"steps": run.steps, "batch": stage.batch, "lr": stage.lr, "seconds": round(run.seconds),
                       "shown": ["step", *run.shown]})
        history += [run.losses[:: max(1, len(run.losses) // 100)]]
    path = _trained.FOLDER / f"{name}.safetensors"
    learning.save(stage.model, path, torch.float16)
    card = {"name": name, "method": slug, "config": asdict(config), "command": command, "seed": seed, "stages": stages,
            "data": f"npm {digits.PACKAGE}: 8,000 training images, zero-padded to 32x32; "
                    + getattr(module, "DATA", "from the bundled dit"),
            "hardware": hardware(), "torch": torch.__version__, "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "metrics": {}, "loss": history}
    write(card)
    return card


def write(card: dict[str, Any]) -> None:
    (_trained.FOLDER / f"{card['name']}.json").write_text(json.dumps(card, indent=1) + "\n")


def metrics(slug: str, name: str, n: int, seed: int = 0) -> dict[str, Any]:
    """What the trained weights are worth: by the module's own `metrics(model, images, labels)` on held-out digits if it has
    one, else by `n` images of the converted DiT beside plain ones, of as many steps and of as many as cost the same."""
    module = recipe(slug)
    config = module.TRAINED[name]
    if hasattr(module, "metrics"):
        model = module.build(config)
        learning.load(model, _trained.weights(name))
        return rounded(module.metrics(model, *digits.split(held_out=True)))
    task, converted = TASKS["dit"], module.convert(methods.tiny("dit").transformer, config)
    learning.load(converted, _trained.weights(name))
    rows = {"plain": drawn(n, task.steps, seed), slug: drawn(n, task.steps, seed, converted)}
    fewer = equal_cost_steps(rows[slug]["macs_per_image"], rows["plain"]["macs_per_image"], task.steps)
    rows["plain, fewer steps"] = drawn(n, fewer, seed)
    return rounded({"guidance": task.guidance, "seed": seed, "n": n, **rows,
                    "frechet_real_vs_real": task.real_frechet(n)["frechet"]})


@cache
def drawn(n: int, steps: int, seed: int, model: nn.Module | None = None) -> dict[str, Any]:
    """What `n` digits cost and what the judge says of them, drawn by the bundled DiT, or by `model` in its pipeline."""
    task, pipe = TASKS["dit"], methods.tiny("dit")
    pipe.transformer = model or pipe.transformer
    prompts = task.prompts(n)
    macs = count_macs(lambda: task.sample(pipe, steps, prompts[:10], seed=seed)) // 10
    found = task.quality(task.sample(pipe, steps, prompts, seed=seed), prompts)
    return {"steps": steps, "macs_per_image": macs, "label_accuracy": found["label_accuracy"], "frechet": found["frechet"]}
