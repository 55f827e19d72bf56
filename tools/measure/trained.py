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

SEEDS = (0, 1, 2)                                # of sampling


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


def rivals(slug: str, name: str) -> dict[str, Any]:
    """What `name` is held against, trained and judged in the same way but not shipped: words -> Config."""
    return getattr(recipe(slug), "RIVALS", {}).get(name, {})


def fit(slug: str, config: Any, label: str, seed: int, scale: float) -> tuple[nn.Module, list[dict[str, Any]], list[Any]]:
    """Train a config of a method stage by stage, with checkpoints named by `label`. -> model, stages, losses of each"""
    x, y = digits.split(held_out=False)
    torch.manual_seed(seed)
    history, stages = [], []
    for i, stage in enumerate(recipe(slug).training(methods.tiny("dit"), config)):
        def loss_of(run: Run, stage=stage):
            images, labels = batch(run, x, y, stage.batch)
            return stage.loss(images.to(device()), labels.to(device()), run.step, run.random)

        run = Run(stage.model.to(device()), steps=round(stage.steps * scale), lr=stage.lr, average=stage.average,
                  rates=stage.rates, seed=seed + i)
        train(run, loss_of, CHECKPOINTS / f"{label}-{i}.ckpt", save_every=100)
        stage.model.load_state_dict(run.averaged.state_dict())
        stages.append({"steps": run.steps, "batch": stage.batch, "lr": stage.lr, "seconds": round(run.seconds),
                       "shown": ["step", *run.shown]})
        history += [run.losses[:: max(1, len(run.losses) // 100)]]
    return stage.model, stages, history


def train_method(slug: str, name: str, seed: int, scale: float, command: str) -> dict[str, Any]:
    """Train `name` of TRAINED and write its weights and its card, which is returned."""
    module = recipe(slug)
    config = module.TRAINED[name]
    model, stages, history = fit(slug, config, name, seed, scale)
    path = _trained.FOLDER / f"{name}.safetensors"
    learning.save(model, path, torch.float16)
    card = {"name": name, "method": slug, "config": asdict(config), "command": command, "seed": seed, "stages": stages,
            "data": f"npm {digits.PACKAGE}: 8,000 training images, zero-padded to 32x32; "
                    + getattr(module, "DATA", "from the bundled dit"),
            "hardware": hardware(), "torch": torch.__version__, "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "metrics": {}, "loss": history}
    write(card)
    return card


def write(card: dict[str, Any]) -> None:
    (_trained.FOLDER / f"{card['name']}.json").write_text(json.dumps(card, indent=1) + "\n")


def drop_in(module: Any, name: str) -> nn.Module:
    """The bundled DiT converted, or compressed, with the trained weights `name`."""
    model = methods.tiny("dit").transformer
    if hasattr(module, "compress"):
        return module.load(model, _trained.weights(name))
    model = module.convert(model, module.TRAINED[name])
    learning.load(model, _trained.weights(name))
    return model


def metrics(slug: str, name: str, n: int, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """What the trained weights are worth, and what its rivals are, which are trained here: by the module's own
    `metrics(model, images, labels)` on held-out digits if it has one, else by `n` images of the converted DiT, split over
    SEEDS, beside plain ones of as many steps and of as many as cost the same."""
    module, others = recipe(slug), rivals(slug, name)
    against = {words: fit(slug, config, "-".join([name, *words.split()]), seed, scale)[0].eval()
               for words, config in others.items()}
    if hasattr(module, "metrics"):
        model = module.build(module.TRAINED[name])
        learning.load(model, _trained.weights(name))
        held_out = digits.split(held_out=True)
        found = module.metrics(model, *held_out)
        return rounded(found | ({"rivals": {words: module.metrics(each, *held_out) for words, each in against.items()}}
                                if against else {}))
    task, made = TASKS["dit"], drop_in(module, name)
    rows = {"plain": drawn(n, task.steps), slug: drawn(n, task.steps, made)}
    fewer = equal_cost_steps(rows[slug]["macs_per_image"], rows["plain"]["macs_per_image"], task.steps)
    rows |= {words: drawn(n, task.steps, each) for words, each in against.items()} | {"plain, fewer steps": drawn(n, fewer)}
    each = n // len(SEEDS)
    return rounded({"guidance": task.guidance, "seeds": list(SEEDS), "n": n, **rows,
                    "frechet_real_vs_real": task.real_frechet(each)["frechet"]})


def averaged(name: str, values: list[float]) -> dict[str, Any]:
    """The mean of `values` by its name, and their range."""
    return {name: sum(values) / len(values), f"{name}_spread": [min(values), max(values)]}


@cache
def drawn(n: int, steps: int, model: nn.Module | None = None) -> dict[str, Any]:
    """What `n` digits cost and what the judge says of them, drawn by the bundled DiT, or by `model` in its pipeline: means
    and ranges over SEEDS, of which each draws a part."""
    task, pipe = TASKS["dit"], methods.tiny("dit")
    pipe.transformer = model or pipe.transformer
    prompts = task.prompts(n // len(SEEDS))
    macs = count_macs(lambda: task.sample(pipe, steps, prompts[:10])) // len(prompts[:10])
    found = [task.quality(task.sample(pipe, steps, prompts, seed=seed), prompts) for seed in SEEDS]
    row: dict[str, Any] = {"steps": steps, "macs_per_image": macs}
    for key in ("label_accuracy", "frechet"):
        row |= averaged(key, [each[key] for each in found])
    return row
