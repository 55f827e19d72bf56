"""The runs a measurement compares: the model as it is, the same with fewer steps, a method. All are sampled alike."""
from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from accel_tools.catalog import ROOT
from accel_tools.catalog.method_source import definitions
from accel_tools.catalog.source import Source
from methods._core.patch import Patch


@functools.cache
def offering(name: str) -> dict[str, ModuleType]:
    """By slug, the modules of methods that define `name`, or the files tools/measure/<slug>.py beside them that do."""
    source, found = Source(), {}
    for slug in (path.stem for path in sorted((ROOT / "methods").glob("[a-z]*.py"))):
        for folder, package in (("methods", "methods"), ("tools/measure", "accel_tools.measure")):
            file = ROOT / folder / f"{slug}.py"
            if slug not in found and file.is_file() and name in definitions(source.tree(file)):
                found[slug] = importlib.import_module(f"{package}.{slug}")
    return found


@dataclass(frozen=True)
class Arm:
    """`steps` of the sampler (None where a model has none), under `method` with `config` if one is named."""

    steps: int | None
    method: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self, target: Any) -> Iterator[Patch | None]:
        """The method at work on `target`, and not at the end: a patch on a pipeline or its denoiser, or the decoder of a
        token model (tasks.TokenModel). Yields what has the method's `report()`; None where the arm has no method."""
        if self.method is None:
            yield None
            return
        module = importlib.import_module(f"methods.{self.method}")
        at_work = (target.decoding(module, self.config) if hasattr(module, "generate")
                   else module.apply(target, module.Config(**self.config)))
        with at_work as method:
            yield method


def batches(n: int, batch: int) -> list[slice]:
    """The parts in which `n` prompts are sampled."""
    return [slice(start, min(start + batch, n)) for start in range(0, n, batch)]


@torch.no_grad()
def sample_batch(pipe: Any, steps: int, prompts: Sequence[Any], *, seed: int, first: int, guidance: float,
                 **settings: Any) -> Tensor:
    """The images of one batch, of which `first` says where in its set it begins; its noise depends on `seed` and `first`
    alone, so that the batches of a set can be drawn in any order and by several processes. `settings` of the call go on."""
    pipe.set_progress_bar_config(disable=True)
    out = pipe(list(prompts), guidance_scale=guidance, num_inference_steps=steps, output_type="np",
               generator=torch.Generator().manual_seed(seed + 1_000_003 * first), **settings)
    return torch.as_tensor(out.frames if hasattr(out, "frames") else out.images).movedim(-1, -3)


def sample(pipe: Any, steps: int, labels: Sequence[Any], *, seed: int = 0, guidance: float = 2.0, batch: int = 50) -> Tensor:
    """Images (n, C, H, W) or clips (n, F, C, H, W) in [0, 1] of a pipeline asked for `labels`, class numbers or prompts;
    equal seed, labels and batch start from equal noise."""
    return torch.cat([sample_batch(pipe, steps, labels[part], seed=seed, first=part.start, guidance=guidance)
                      for part in batches(len(labels), batch)])
