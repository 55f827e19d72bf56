"""What a method may know about a scheduler: first-order steps of any length along its grid. One row per scheduler class.

A grid has `timesteps` (T,) and `sigmas` (T + 1,), its noise levels in the terms of its class. Between the latent and what the
model is given lies the scheduler's `scale_model_input`: `input(x, at)` scales as it does, `latent(x, at)` takes that back.
"""
from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
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


def arrived(result: Any, x: Tensor) -> Any:
    """What a scheduler's step gave, with `x` for the latent it came to."""
    if isinstance(result, tuple):
        return x, *result[1:]
    result.prev_sample = x
    return result


class _Unscaled:
    """The model is given the latent as it is."""

    def input(self, x: Tensor, at: int) -> Tensor:
        return x

    def latent(self, x: Tensor, at: int) -> Tensor:
        return x


class DDIMGrid(_Unscaled):
    """The grid of a DDIM run: cumulative alphas (T + 1,), the last one the clean end's, in place of noise levels."""

    def __init__(self, scheduler: DDIMScheduler):
        if scheduler.config.thresholding:
            raise ValueError("dynamic thresholding is not a first-order step; use a scheduler with thresholding=False")
        self.timesteps = scheduler.timesteps
        self.alphas = torch.cat([scheduler.alphas_cumprod[self.timesteps.cpu()], scheduler.final_alpha_cumprod[None]])
        self.sigmas = (1 / self.alphas - 1).sqrt()
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

    @staticmethod
    def place(scheduler: Any, times: list[int]) -> None:
        """Make the pipeline loop over these timesteps of training, falling, from 0 on."""
        scheduler.timesteps = torch.tensor(times, device=scheduler.timesteps.device)


class FlowGrid(_Unscaled):
    """The grid of a flow-matching Euler run: noise levels from one to zero."""

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

    @staticmethod
    def place(scheduler: Any, times: list[int]) -> None:
        """Make the pipeline loop over these timesteps of training, falling, of which the last one is all noise."""
        total = scheduler.config.num_train_timesteps
        scheduler.timesteps = torch.tensor(times, device=scheduler.timesteps.device) + 1.0
        scheduler.sigmas = torch.cat([scheduler.timesteps.to(scheduler.sigmas) / total, scheduler.sigmas[-1:]])


class EulerGrid:
    """The grid of an Euler run over standard deviations of noise (T + 1,), the last one zero. Karras et al. 2022, Alg. 1."""

    def __init__(self, scheduler: EulerDiscreteScheduler):
        self.timesteps, self.sigmas = scheduler.timesteps, scheduler.sigmas
        self.prediction = scheduler.config.prediction_type

    def input(self, x: Tensor, at: int) -> Tensor:
        return x / (self.sigmas[at].to(x) ** 2 + 1).sqrt()

    def latent(self, x: Tensor, at: int) -> Tensor:
        return x * (self.sigmas[at].to(x) ** 2 + 1).sqrt()

    def score(self, output: Tensor, x: Tensor, at: int) -> Tensor:
        """dx / dsigma, the noise, that a model output at grid point `at`, latent `x`, stands for."""
        sigma = self.sigmas[at].to(x)
        if self.prediction == "v_prediction":
            return sigma / (sigma ** 2 + 1) * x + output / (sigma ** 2 + 1).sqrt()
        if self.prediction == "sample":
            return (x - output) / sigma
        return output

    def move(self, x: Tensor, score: Tensor, start: int, to: int) -> Tensor:
        return flow_step(x.float(), score, self.sigmas[start].to(x.device), self.sigmas[to].to(x.device)).to(score.dtype)

    def step(self, x: Tensor, output: Tensor, at: int, to: int) -> Tensor:
        return self.move(x, self.score(output, x, at), at, to)

    def thin(self, scheduler: Any, keep: list[int]) -> None:
        """Make the pipeline loop over the grid points `keep` only."""
        scheduler.timesteps, scheduler.sigmas = self.timesteps[keep], self.sigmas[[*keep, -1]]

    @staticmethod
    def place(scheduler: Any, times: list[int]) -> None:
        """Make the pipeline loop over these timesteps of training, falling, from 0 on."""
        scheduler.timesteps = torch.tensor(times, device=scheduler.timesteps.device).float()
        alphas = scheduler.alphas_cumprod[times]
        scheduler.sigmas = torch.cat([((1 - alphas) / alphas).sqrt().to(scheduler.sigmas), scheduler.sigmas[-1:]])


STOCHASTIC = ("Ancestral", "LCM", "TCD", "SDE", "DDPM")           # in the names of classes whose steps add noise
ROWS = {DDIMScheduler: DDIMGrid, FlowMatchEulerDiscreteScheduler: FlowGrid, EulerDiscreteScheduler: EulerGrid}


def grid_class(scheduler: Any) -> type[DDIMGrid] | type[FlowGrid] | type[EulerGrid]:
    """The row of a scheduler's class.

    Raises:
        ValueError: not a first-order solver this library knows; multistep and stochastic ones say why they are none.
    """
    for cls, row in ROWS.items():
        if isinstance(scheduler, cls):
            return row
    name, known = type(scheduler).__name__, ", ".join(cls.__name__ for cls in ROWS)
    if hasattr(scheduler, "model_outputs") or hasattr(scheduler, "ets"):
        raise ValueError(f"{name} steps from several past outputs, which a jump over steps would mix up; use one of {known}")
    if any(word in name for word in STOCHASTIC):
        raise ValueError(f"{name} draws noise in every step, so that a step has no past to go on from; use one of {known}")
    raise ValueError(f"{name} is not a first-order solver this library knows; it knows {known}")
