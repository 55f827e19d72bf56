"""The company that real pipelines keep, one file a situation, found by looking.

A file says `SITUATION`, how a pipeline in it is made, and how it is run so that what the companion is given can be moved.
tests/test_surroundings.py puts every method on each.
"""
from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Situation:
    """`family` is that of the model. `run(pipe, 0)` and `run(pipe, 1)` differ in what the companion is given, or in how strong
    it is."""

    name: str
    family: str
    make: Callable[[], Any]
    run: Callable[..., torch.Tensor]

    def seeded(self, pipe: Any, moved: int, **setting: Any) -> torch.Tensor:
        torch.manual_seed(0)                                          # some pipelines draw the latent of a picture from it
        return self.run(pipe, moved, **setting)


def situations() -> dict[str, Situation]:
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"surroundings.{name}").SITUATION for name in modules]
    return {each.name: each for each in found}
