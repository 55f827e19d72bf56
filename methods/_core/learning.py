"""What methods that train have in common: how a run is described, and how the trained part is kept in a file.

The trained part of a model is what has `requires_grad`: a method sets it, and everything else stays as it was.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a training run on a bundled model, as `training(pipe, config)` of a method yields it.

    `loss(images, labels, step, random)` is called with images (B, C, H, W) in [-1, 1], their labels (B,), the number of the
    step from 0 on and the generator of all draws. Of the dict of scalars that it returns, "loss" is minimised, the others
    are shown beside it. The next stage is asked for once this one is done and its averaged weights are in `model`.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor, int, torch.Generator], dict[str, Tensor]]
    steps: int
    batch: int
    lr: float
    rates: Mapping[str, float] = field(default_factory=dict)     # times `lr`, of parameters whose names begin so
    average: float = 0.99                                         # decay of the exponential moving average of the weights


def train_only(model: nn.Module, parts: Sequence[str] | None) -> None:
    """Let those parameters train that have one of `parts` in their names, or all if None; the others are frozen.

    Raises:
        ValueError: no parameter's name has such a part.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in parts or ():
        if not any(part in name for name in names):
            raise ValueError(f"{part!r} is part of no parameter's name in this {type(model).__name__}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(parts is None or any(part in name for part in parts))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def save(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the trained part of `model` to a safetensors file, in its own precision unless `dtype` is given.

    Raises:
        ValueError: nothing in the model trains.
    """
    state = trained(model)
    if not state:
        raise ValueError(f"no parameter of this {type(model).__name__} trains, so there is nothing to save")
    save_file({name: weight.to("cpu", dtype).contiguous() for name, weight in state.items()}, path)


@torch.no_grad()
def load(model: nn.Module, path: str | Path) -> None:
    """Read what `save` wrote into the trained part of `model`, which keeps its precision.

    Raises:
        ValueError: names or shapes are not those of the trained part; the model is as it was.
    """
    state, mine = load_file(path), trained(model)
    for what, names in (("lacks", mine.keys() - state.keys()), ("also holds", state.keys() - mine.keys())):
        if names:
            raise ValueError(f"{Path(path).name} {what} {', '.join(sorted(names)[:3])} ({len(names)} in all): it was trained "
                             "with another configuration or model")
    for name, weight in mine.items():
        if weight.shape != state[name].shape:
            raise ValueError(f"{name} in {Path(path).name} has shape {tuple(state[name].shape)}, not {tuple(weight.shape)}")
    for name, weight in mine.items():
        weight.copy_(state[name])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, what is drawn on the CPU without a generator comes from `seed`; the global generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def enter(model: nn.Module, stages: Mapping[str, Sequence[str]], stage: str) -> list[nn.Parameter]:
    """Freeze all but the parts of `model` that `stage` trains, of `stages`. -> the parameters for its optimiser

    Raises:
        ValueError: no such stage.
    """
    if stage not in stages:
        raise ValueError(f"stage={stage!r} must be one of {', '.join(stages)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in stages[stage])
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def check_sizes(config: Any, divides: Sequence[tuple[str | int, str]] = (), none: Sequence[str] = ()) -> None:
    """Look over the Config of a network: whole numbers are at least 1, or 0 where `none` names them, the others finite and
    at least 0, and of each (part, whole) of `divides` the part, a field or a number, divides the whole.

    Raises:
        ValueError: it names the field.
    """
    for each in fields(config):
        value, kind = getattr(config, each.name), type(each.default)
        least = 0 if each.name in none else 1
        if kind is int and each.name != "seed" and value < least:
            raise ValueError(f"{each.name}={value} must be at least {least}")
        if kind is float and not 0 <= value < math.inf:
            raise ValueError(f"{each.name}={value} must be a number of at least 0")
    for part, whole in divides:
        size, name = (part, str(part)) if isinstance(part, int) else (getattr(config, part), f"{part}={getattr(config, part)}")
        if getattr(config, whole) % size:
            raise ValueError(f"{name} must divide {whole}={getattr(config, whole)}")
