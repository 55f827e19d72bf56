"""What a method may know about a scheduler: first-order steps of any length along its grid. One row per scheduler class."""
from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor


def ddim_step(x: Tensor, eps: Tensor, a: Tensor, b: Tensor, clip: float | None = None) -> Tensor:
    """DDIM with eta = 0 from cumulative alpha `a` to `b` along the noise `eps`; `clip` bounds the predicted clean sample.

    Song et al., Denoising Diffusion Implicit Models, Eq. 12. `a` must not be zero.
    """
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    return b.sqrt() * x0 + (1 - b).sqrt() * eps


def flow_step(x: Tensor, velocity: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Euler from noise level `a` to `b` along a flow-matching velocity."""
    return x + (b - a) * velocity


class DDIMGrid:
    """The grid of a DDIM run: `timesteps` (T,) and cumulative alphas (T + 1,), the last one the clean end's."""

    def __init__(self, scheduler: DDIMScheduler):
        if scheduler.config.thresholding:
            raise ValueError("dynamic thresholding is not a first-order step; use a scheduler with thresholding=False")
        self.timesteps = scheduler.timesteps
        self.alphas = torch.cat([scheduler.alphas_cumprod[self.timesteps.cpu()], scheduler.final_alpha_cumprod[None]])
        self.prediction = scheduler.config.prediction_type
        self.clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None

    def score(self, output: Tensor, x: Tensor, at: int) -> Tensor:
        """The noise that a model output at grid point `at`, latent `x`, stands for."""
        a = self.alphas[at].to(x)
        if self.prediction == "v_prediction":
            return a.sqrt() * output + (1 - a).sqrt() * x
        if self.prediction == "sample":
            return (x - a.sqrt() * output) / (1 - a).sqrt()
        return output

    def move(self, x: Tensor, score: Tensor, start: int, to: int) -> Tensor:
        return ddim_step(x, score, self.alphas[start].to(x), self.alphas[to].to(x), self.clip)

    def step(self, x: Tensor, output: Tensor, at: int, to: int) -> Tensor:
        """An ordinary step from where the model was evaluated; safe at zero signal, where noise alone says nothing of x0."""
        if self.prediction == "epsilon":
            return self.move(x, output, at, to)
        a, b = self.alphas[at].to(x), self.alphas[to].to(x)
        x0 = output if self.prediction == "sample" else a.sqrt() * x - (1 - a).sqrt() * output
        x0 = x0 if self.clip is None else x0.clamp(-self.clip, self.clip)
        return b.sqrt() * x0 + (1 - b).sqrt() * self.score(output, x, at)

    def thin(self, scheduler: Any, keep: list[int]) -> None:
        """Make the pipeline loop over the grid points `keep` only."""
        scheduler.timesteps = self.timesteps[keep]


class FlowGrid:
    """The grid of a flow-matching Euler run: `timesteps` (T,) and noise levels (T + 1,), the last one zero."""

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler):
        if scheduler.config.stochastic_sampling:
            raise ValueError("stochastic sampling adds noise in every step; use stochastic_sampling=False")
        self.timesteps, self.sigmas = scheduler.timesteps, scheduler.sigmas

    def score(self, output: Tensor, x: Tensor, at: int) -> Tensor:
        return output

    def move(self, x: Tensor, score: Tensor, start: int, to: int) -> Tensor:
        return flow_step(x.float(), score, self.sigmas[start].to(x.device), self.sigmas[to].to(x.device)).to(score.dtype)

    def step(self, x: Tensor, output: Tensor, at: int, to: int) -> Tensor:
        return self.move(x, output, at, to)

    def thin(self, scheduler: Any, keep: list[int]) -> None:
        """Make the pipeline loop over the grid points `keep` only."""
        scheduler.timesteps, scheduler.sigmas = self.timesteps[keep], self.sigmas[[*keep, -1]]


ROWS = {DDIMScheduler: DDIMGrid, FlowMatchEulerDiscreteScheduler: FlowGrid}


def grid_class(scheduler: Any) -> type[DDIMGrid] | type[FlowGrid]:
    """The row of a scheduler's class.

    Raises:
        ValueError: not a first-order solver this library knows.
    """
    for cls, row in ROWS.items():
        if isinstance(scheduler, cls):
            return row
    known = ", ".join(cls.__name__ for cls in ROWS)
    raise ValueError(f"{type(scheduler).__name__} is not a first-order solver this library knows; it knows {known}")
