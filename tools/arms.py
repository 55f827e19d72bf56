"""The runs a measurement compares: the model as it is, the same with fewer steps, a method. All are sampled alike."""
from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods._core.patch import Patch


@dataclass(frozen=True)
class Arm:
    """`steps` of the sampler, under `method` with `config` if one is named."""

    steps: int
    method: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self, target: Any) -> Iterator[Patch | None]:
        """The method's patch on a pipeline or its denoiser, taken off at the end; None where the arm has no method."""
        if self.method is None:
            yield None
            return
        module = importlib.import_module(f"methods.{self.method}")
        with module.apply(target, module.Config(**self.config)) as patch:
            yield patch


@torch.no_grad()
def sample(pipe: Any, steps: int, labels: Sequence[int], *, seed: int = 0, guidance: float = 2.0, batch: int = 50) -> Tensor:
    """Images (n, C, H, W) in [0, 1] of a class-conditional pipeline; equal seed, labels and batch start from equal noise."""
    pipe.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(labels), batch):
        out = pipe(list(labels[start:start + batch]), guidance_scale=guidance, num_inference_steps=steps,
                   generator=random, output_type="np").images
        images.append(torch.from_numpy(out).permute(0, 3, 1, 2))
    return torch.cat(images)
