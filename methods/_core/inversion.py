"""Walk a clean latent up to noise along the flow of a model, by a run of its pipeline with the grid turned round."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from methods._core.patch import Patch
from methods._core.site import Claim
from methods._core.solver import FlowGrid, grid_class

Control = Callable[[Tensor, Tensor, float], Tensor]


def require_flow(patch: Patch) -> None:
    """
    Raises:
        ValueError: a bare model, or a scheduler that is not flow-matching Euler.
    """
    patch.require_pipeline()
    if grid_class(patch.pipe.scheduler) is not FlowGrid:
        raise ValueError(f"{patch.name} steps along a flow, and {type(patch.pipe.scheduler).__name__} follows none")


def latent_of(result: Any) -> Tensor:
    """The latent that a scheduler's step came to."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


class Ascent:
    """Inverse Euler: each step goes to the next higher noise level, with the velocity at the latent that it leaves and the time
    of the level that it comes to, at which a sampling step will leave it again.

    `control(velocity, latent, level)` gives another velocity, for the noise level that the step leaves.
    """

    def __init__(self, scheduler: Any, control: Control | None = None):
        self.scheduler, self.control = scheduler, control
        self.passed: list[Tensor] = []

    def set_timesteps(self, call: Callable, *args, **kwargs) -> None:
        call(*args, **kwargs)
        grid = FlowGrid(self.scheduler)
        self.scheduler.timesteps, self.scheduler.sigmas = grid.timesteps.flip(0), grid.sigmas.flip(0)

    def step(self, call: Callable, output: Tensor, t: Any, x: Tensor, *args, **kwargs) -> Any:
        if self.control is not None:
            output = self.control(output, x, float(self.scheduler.sigmas[len(self.passed)]))
        result = call(output, t, x, *args, **kwargs)
        self.passed.append(latent_of(result))
        return result


@torch.no_grad()
def ascend(patch: Patch, latent: Tensor, call: dict[str, Any], control: Control | None = None) -> tuple[Tensor, ...]:
    """The latents (1, ...) from a clean one to noise, one more than steps, under a patch that is not on yet.

    `call` is what the pipeline is called with beside `latents`; `guidance_scale` is 1 unless it says otherwise.

    Raises:
        ValueError: not one image, a scheduler that follows no flow, or another patch there that steps.
    """
    require_flow(patch)
    if len(latent) != 1:
        raise ValueError(f"one image is inverted at a time, and these are {len(latent)}")
    ascent = patch.solve(Ascent(patch.pipe.scheduler, control))
    patch.claim([patch.model], Claim.SOLVER)
    with patch.on():
        patch.pipe(**{"guidance_scale": 1.0, "output_type": "latent"} | call, latents=latent)
    return latent, *ascent.passed
