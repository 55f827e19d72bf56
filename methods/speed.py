"""SPEED - Spectral Progressive Diffusion for Efficient Image and Video Generation

Howard Xiao, Brian Chao, Lior Yariv, Gordon Wetzstein, arXiv 2026. arXiv:2605.18736. Code: howardhx/speed

Idea: early in a run all but the lowest frequencies of a latent are noise, so that nothing is lost where they are left out. The
run starts on a small grid. Before the step in which the next higher frequencies begin to carry something the latent is enlarged
in a basis of cosines: its coefficients become the low ones of the larger grid, the others are noise of the present level.

Map
    P(w) = A w ** -beta, power at a frequency        fit
    activation time, Eq. 9                           activation
    stages: before the first level below it, Eq. 10  stages
    expansion by noise in the cosine basis           expand
    alignment of latent and level, Eqs. 5 and 6      align
    the levels of the run, one of them moved         _Solver

Departures
    The official script has a loop of its own; here the pipeline carries the small latent through its own loop. It starts from
    the low coefficients of the noise that the pipeline drew, and the high ones join when the grid grows; the script draws anew.
    Cosines only. The official wavelets halve grids, and its Fourier variant misplaces them where parities differ.
    Where sides are rounded to patches the ratio is that of the grids, so that a mean stays what it is; there it is the nominal.
    The last step is of full size; where no level lies below its time, the official loops end in an IndexError.
    A run from an image starts from its low coefficients, with noise added until their level is that of the run again (ours).
    Flow matching in Euler steps. Maps of full size beside the latent, as of a ControlNet, are refused.

Example
    >>> import methods
    >>> from methods import speed
    >>> pipe = methods.tiny("mmdit")
    >>> with speed.apply(pipe, speed.Config(delta=0.1)) as patch:
    ...     images = pipe("red heart", num_inference_steps=10, output_type="np").images
    >>> patch.report()["state"]
    'engaged'
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from methods._core.context import Rewrite, StepContext
from methods._core.families.grids import Grid, Packed
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim
from methods._core.solver import FlowGrid, arrived, flow_step, grid_class

__all__ = ["OFF", "TINY", "Config", "activation", "align", "apply", "cosines", "expand", "fit", "reduce", "stages"]

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Config:
    scales: tuple[float, ...] = (0.5, 1.0)    # of the sides of the grid, rising to 1; (1,): nothing is changed
    delta: float = 0.01           # error of the velocity that counts as noise; larger grows the grid later
    amplitude: float = 203.615097     # A of the latents of FLUX.1; 219.484718 of Wan 2.1
    exponent: float = 1.915461        # beta; 2.422687 of Wan 2.1

    def __post_init__(self):
        object.__setattr__(self, "scales", tuple(self.scales))
        if self.scales[-1:] != (1,) or self.scales[0] <= 0 or any(a >= b for a, b in pairwise(self.scales)):
            raise ValueError(f"scales={self.scales} must rise from above 0 to 1")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta={self.delta} outside (0, 1)")
        if self.amplitude <= 0 or self.exponent <= 0:
            raise ValueError(f"amplitude={self.amplitude} and exponent={self.exponent} must be positive")


OFF = Config(scales=(1.0,))
TINY = Config(amplitude=5.0, delta=0.3)            # what is small has fewer frequencies, and they matter sooner


def activation(power: float, delta: float) -> float:
    """t_w: the noise level at which the best velocity of a component of this power (white noise: 1) departs by `delta` from the
    noise alone."""
    return 1 / (1 + math.sqrt(delta / (power * (1 + power - delta))))


def align(t: float, r: float) -> tuple[float, float]:
    """(kappa, t~) for a latent at level t that was expanded by r: the factor that makes it a latent at level t~."""
    kappa = r / (1 + (r - 1) * t)
    return kappa, kappa * t


def stages(sigmas: Sequence[float], config: Config, size: Size) -> list[tuple[int, float]]:
    """(first step, scale) of each stage of a run over these noise levels, one a step, for a latent of full `size`.

    A stage without a step of its own is left out; the last step is of full size.
    """
    found: list[tuple[int, float]] = []
    start = 0
    for n, scale in enumerate(config.scales):
        if n:
            nyquist = config.scales[n - 1] * min(size) / 2           # cycles per image
            time = activation(config.amplitude * nyquist ** -config.exponent, config.delta)
            start = max(start, next((i for i, sigma in enumerate(sigmas[:-1]) if sigma <= time), len(sigmas) - 1))
        found = [stage for stage in found if stage[0] < start] + [(start, scale)]
    return found


def cosines(n: int, like: Tensor) -> Tensor:
    """Orthonormal DCT-II (n, n): coefficients are its product with a signal."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * k * (i + 0.5) / n) * math.sqrt(2 / n)
    basis[0] = math.sqrt(1 / n)
    return basis.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _there(x: Tensor) -> Tensor:
    rows, columns = (cosines(n, x) for n in x.shape[-2:])
    return rows @ x.to(rows.dtype) @ columns.mT


def _back(x: Tensor) -> Tensor:
    rows, columns = (cosines(n, x) for n in x.shape[-2:])
    return rows.mT @ x @ columns


def reduce(x: Tensor, size: Size) -> Tensor:
    """x (..., height, width) on a smaller grid, by its low coefficients; white noise stays white."""
    return _back(_there(x)[..., :size[0], :size[1]])


def expand(x: Tensor, noise: Tensor) -> Tensor:
    """x (..., height, width) on the grid of `noise`, of which come all but the low coefficients."""
    found = _there(noise)
    found[..., :x.shape[-2], :x.shape[-1]] = _there(x)
    return _back(found)


def ratio(small: Size, size: Size) -> float:         # r
    return math.sqrt(math.prod(size) / math.prod(small))


def fit(latents: Tensor) -> tuple[float, float]:
    """(A, beta) of clean latents (..., height, width): least squares of log power over log frequency, all components alike."""
    found = _there(latents).square().flatten(0, -3).mean(0).double()
    rows, columns = (torch.arange(n, dtype=torch.float64, device=found.device) / 2 for n in found.shape)
    frequency = (rows[:, None].square() + columns.square()).sqrt().flatten()[1:].log()
    level = found.flatten()[1:].clamp_min(1e-30).log()
    centred = frequency - frequency.mean()
    slope = (centred * level).sum() / centred.square().sum()
    return float((level.mean() - slope * frequency.mean()).exp()), float(-slope)


class _Planes:
    """A latent as the model takes it, to and from (..., height, width). ValueError where a smaller one would not do."""

    def __init__(self, patch: Patch):
        row, model, pipe = patch.denoiser.row, patch.model, patch.pipe
        on = f"{patch.name} runs on smaller grids, and"
        names = inspect.signature(getattr(pipe, "_pack_latents", lambda: None)).parameters
        self.packed = isinstance(row.grid, Packed) and row.grid.ids in row.cut and "num_channels_latents" in names
        if not self.packed and (type(row.grid) is not Grid or row.grid.height != -2):
            raise ValueError(f"{on} how {type(model).__name__} lays out its latent is not known")
        channels = getattr(model.config, "in_channels", None)
        control = "control_hidden_states" in inspect.signature(type(model).forward).parameters
        if control or (getattr(model.config, "out_channels", None) or channels) != channels:
            raise ValueError(f"{on} {type(model).__name__} takes conditions of full size beside its latent")
        if row.cut and not self.packed:
            raise ValueError(f"{on} the pipelines of {type(model).__name__} make positions for the full one")
        if any(hasattr(part, "momentum_buffer") for part in pipe.components.values()):
            raise ValueError(f"{on} the guidance of {type(pipe).__name__} sums up over steps of one size")
        self.multiple = 2 if self.packed else patch.denoiser.multiple

    def full(self, context: StepContext) -> Size:                 # of the latent of this call
        sides = context.size[1:] if self.packed else context.sample.shape[-2:]
        return sides[0] * (1 + self.packed), sides[1] * (1 + self.packed)

    def smaller(self, size: Size, scale: float) -> Size:
        m = self.multiple
        return size if scale == 1 else (max(m, round(scale * size[0]) // m * m), max(m, round(scale * size[1]) // m * m))

    def there(self, x: Tensor, size: Size) -> Tensor:
        squares = x.unflatten(2, (-1, 2, 2)).unflatten(1, (size[0] // 2, -1)) if self.packed else x
        return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3) if self.packed else x

    def back(self, x: Tensor) -> Tensor:
        squares = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)) if self.packed else x
        return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2) if self.packed else x

    @staticmethod
    def corner(table: Tensor, axis: int, full: Size, size: Size) -> Tensor:
        """What runs along packed tokens, for those of a smaller grid and for references, which are behind all."""
        places = torch.arange(table.shape[axis], device=table.device)
        own, behind = places.split([full[0] * full[1] // 4, len(places) - full[0] * full[1] // 4])
        inside = own.view(full[0] // 2, -1)[:size[0] // 2, :size[1] // 2].flatten()
        return table.index_select(axis, torch.cat([inside, behind]))


class _Solver:
    """Drives one run: says what grid a step is on, makes the model's inputs for it, and steps."""

    def __init__(self, patch: Patch, config: Config):
        self.patch, self.config, self.planes = patch, config, _Planes(patch)
        self.at = self.first = 0

    def set_timesteps(self, call, *args, **kwargs) -> None:
        call(*args, **kwargs)
        self.grid = FlowGrid(self.patch.pipe.scheduler)

    def begin(self, context: StepContext) -> None:
        """At the first call of a run, when the size and the number of steps are known."""
        self.sigmas = self.grid.sigmas.tolist()
        self.first = len(self.sigmas) - 1 - context.steps         # a run from an image leaves out the first levels
        self.size = self.planes.full(context)
        found = stages(self.sigmas[self.first:-1], self.config, self.size)
        self.stages = [(self.first + start, self.planes.smaller(self.size, scale)) for start, scale in found]
        self.levels = list(self.sigmas)                           # of the calls: that behind a change of size is moved
        for (_, small), (start, size) in pairwise(self.stages):
            self.levels[start] = align(self.levels[start], ratio(small, size))[1]
        self.random, self.prompts, self.noise = context.random(0), context.rows.prompts, None

    def now(self) -> Size:                                        # of the present step
        return next(size for start, size in reversed(self.stages) if start <= self.at)

    def small(self, x: Tensor) -> Tensor:
        """The latent that the pipeline starts from, perhaps with references behind it, on the first grid."""
        size, own = self.stages[0][1], math.prod(self.size) // 4 if self.planes.packed else x.shape[1]
        if size == self.size:
            return x
        low = reduce(self.planes.there(x[:, :own], self.size), size)
        if self.first:                    # r (1 - t) of an image of that size and t of noise: as much of an image as t leaves
            r, t = ratio(size, self.size), self.sigmas[self.first]
            if self.noise is None:
                self.noise = torch.randn(self.prompts, *low.shape[1:], generator=self.random)
            noise = self.noise.to(low).repeat(len(low) // self.prompts, *[1] * (low.ndim - 1))
            low = low / r + t * math.sqrt(1 - 1 / r ** 2) * noise
        low = self.planes.back(low).to(x.dtype)
        return torch.cat([low, x[:, own:]], 1) if self.planes.packed else low

    def substitute(self, context: StepContext) -> Rewrite | None:
        if context.i == context.call == 0:
            self.begin(context)
        self.at = self.first + context.i
        row, size, level = context.denoiser.row, self.now(), self.levels[self.at]
        self.patch.counts["full" if size == self.size else "small"] += context.call == 0
        self.patch.tally(1 - math.prod(size) / math.prod(self.size), 1)
        if size == self.size and level == self.sigmas[self.at]:
            return None
        if context.denoiser.adds_between(context.inputs):
            raise ValueError("speed runs on smaller grids, and a ControlNet adds residuals of the full one: run without one")
        inputs, t, branch = {}, None, None
        if size != self.size:             # in a branch of its own, since what others keep is of another shape
            branch = f"{size[0]}x{size[1]}"
            inputs = context.denoiser.as_input(self.small(context.sample) if context.i == 0 else context.sample)
            for name, axis in row.cut.items():
                inputs[name] = self.planes.corner(context.inputs[name], axis, self.size, size)
        if level != self.sigmas[self.at]:
            given, train = torch.as_tensor(context.inputs[row.time]), self.patch.pipe.scheduler.config.num_train_timesteps
            t = level * train
            told = torch.as_tensor(row.clock(torch.tensor(t), torch.tensor(level), train)).to(given)
            inputs[row.time] = torch.where(given == given.max(), told, given)          # given frames stay at their time
        return Rewrite((context.replace(inputs, t=t, branch=branch),), lambda out: out)

    def step(self, call, model_output: Tensor, timestep: Any, sample: Tensor, *args, **kwargs):
        """From the level of this step to that of the next, on the grid of this step; then on that of the next."""
        if self.at == self.first:
            self.start, sample = sample, self.small(sample)
            model_output = model_output[:, :sample.shape[1]]                            # of packed tokens, not of references
        result = call(model_output, timestep, sample, *args, **kwargs)                  # for its bookkeeping and its type
        small, t = self.now(), self.sigmas[self.at + 1]
        level, to = (torch.tensor(each, device=sample.device) for each in (self.levels[self.at], t))
        x = flow_step(sample.float(), model_output, level, to).to(model_output.dtype)
        self.at += 1
        if (size := self.now()) != small:
            noise = reduce(self.planes.there(self.start, self.size), size) * (t / self.sigmas[self.first])
            kappa = align(t, ratio(small, size))[0]
            x = self.planes.back(kappa * expand(self.planes.there(x, small), noise)).to(x.dtype)
        self.start = None if size == self.size else self.start
        return arrived(result, x)


@per_denoiser
def apply(pipe: Any, config: Config = Config()) -> Patch:
    """Run the first steps on a smaller grid.

    Args:
        pipe: a diffusers pipeline with a flow-matching Euler scheduler.

    Raises:
        ValueError: a bare model, another scheduler, a latent that is not known to have sides or has conditions of full size
            beside it, a second solver-level method, or already applied. While it runs: a ControlNet.
    """
    patch = Patch(pipe, "speed")
    if len(config.scales) == 1:
        return patch
    patch.require_pipeline()
    if grid_class(patch.pipe.scheduler) is not FlowGrid or patch.pipe.scheduler.config.get("invert_sigmas"):
        raise ValueError(f"speed needs the falling levels of flow matching; {type(patch.pipe.scheduler).__name__} has others")
    solver = patch.solve(_Solver(patch, config))
    patch.rewrite(solver.substitute, Claim.SOLVER)
    patch.explain(lambda: f"with delta={config.delta} what a smaller grid leaves out matters from the first step on")
    return patch.on()
