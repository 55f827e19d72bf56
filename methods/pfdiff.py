"""PFDiff - PFDiff: Training-Free Acceleration of Diffusion Models Combining Past and Future Scores

Guangyi Wang, Yuren Cai, Lijiang Li, Wei Peng, Songzhi Su, ICLR 2025. arXiv:2408.08822. Code: onefly123/PFDiff

Idea: one network evaluation serves k + 1 steps of the grid. The score of the past evaluation carries the latent h steps
ahead (a springboard, free of cost), the network is evaluated there, and its "future" score then moves the latent from
where it was over all k + 1 steps. A score from the middle of an interval fits its integral better than one from the end.

Map
    PFDiff-k_h    which grid points are evaluated, and the jumps          jumps
    past score    springboard to i + h                                    _Solver.springboard
    future score  evaluate there                                          _Solver.substitute
    update        jump from i to i + k + 1, keep the score                _Solver.step
    solver        a first-order step of any length                        methods._core.solver

Departures
    The number of steps given to the pipeline is the grid, T. The pipeline then loops over 1 + ceil((T-1) / (k+1)) network
    evaluations only, and its progress bar and callbacks count those.
    A tail of r <= k intervals is covered as in the official code: r = 1 an ordinary step, else a springboard of one
    interval and a jump of r: those for DDIM and FLUX. Of its samplers for Stable Diffusion 2_2, 3_2 and 3_3 fail in a
    tail of two on an undefined name, and 2_1 and 3_1 evaluate the network at the springboard of the jump before.
    A jump ends at the noise level of its grid point; the library's DDIM steps by 1000 // T instead, which differs where T
    does not divide 1000.
    A run that starts late (image-to-image) begins with an ordinary step to its next evaluation.
    First-order solvers only: DDIM with eta = 0 and flow-matching Euler. The paper finds the future score of use to these
    alone; its variant for higher orders, a springboard without it, is left out.

Example
    >>> import methods
    >>> from methods import pfdiff
    >>> pipe = methods.tiny("dit")
    >>> with pfdiff.apply(pipe, pfdiff.Config(k=1, h=1)) as patch:
    ...     images = pipe([3], num_inference_steps=7, output_type="np").images
    >>> patch.report()["evaluations"]
    4
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from methods._core.context import Rewrite, StepContext, find_caller
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim
from methods._core.solver import arrived, grid_class

__all__ = ["OFF", "Config", "Jump", "apply", "jumps"]


@dataclass(frozen=True, kw_only=True)
class Config:
    k: int = 1     # k: grid steps saved by each evaluation; larger for fewer evaluations
    h: int = 1     # h: how many grid steps ahead the future score is taken, 1 <= h <= k

    def __post_init__(self):
        if not 0 <= self.k <= 3:
            raise ValueError(f"k={self.k} outside 0 to 3")
        if self.k and not 1 <= self.h <= self.k:
            raise ValueError(f"h={self.h} outside 1 to k={self.k}")


OFF = Config(k=0)
TUNE = ({"k": 1}, {"k": 2}, {"k": 3})


class Jump(NamedTuple):
    """One evaluation: from grid point `start`, evaluate at `at`, move to `to`."""

    start: int
    at: int
    to: int


def jumps(grid: int, k: int, h: int) -> list[Jump]:
    """PFDiff-k_h: the evaluations that cover a grid of `grid` intervals, 1 + ceil((grid - 1) / (k + 1)) of them."""
    path = [Jump(0, 0, 1)]
    while (i := path[-1].to) < grid:
        left = grid - i
        if left > k:
            path.append(Jump(i, i + h if k else i, i + k + 1))
        else:
            path.append(Jump(i, i + (left > 1), grid))
    return path


class _Solver:
    """Drives one run: thins the grid, moves the model's input to the springboard, and takes the long steps."""

    def __init__(self, patch: Patch, config: Config):
        self.patch, self.config = patch, config
        self.grid = self.past = None
        self.path: list[Jump] = []
        self.jump = Jump(0, 0, 0)

    def set_timesteps(self, call, *args, **kwargs) -> None:
        call(*args, **kwargs)
        scheduler = self.patch.pipe.scheduler
        self.grid, self.past = grid_class(scheduler)(scheduler), None
        points, caller = len(self.grid.timesteps), find_caller(self.patch.model)
        cut = points - caller.kept(points) if caller else 0      # image-to-image leaves out the first points of the grid
        self.path = [Jump(*(cut + point for point in jump)) for jump in jumps(points - cut, self.config.k, self.config.h)]
        given = kwargs.get("sigmas") is not None or kwargs.get("timesteps") is not None
        for lead in range(cut + 1):                              # points in front that it leaves out of the thinned grid, too
            self.grid.thin(scheduler, [*range(lead), *(jump.start for jump in self.path)])
            if not cut or caller.kept(lead + len(self.path) if given else points) == len(self.path):
                break

    def substitute(self, context: StepContext) -> Rewrite | None:
        """Past and future: before the model runs, move its latent and its timestep to where the future score is taken."""
        self.jump = self.path[len(self.path) - context.steps + context.i]
        if context.call == 0:
            self.patch.counts["evaluations"] += 1
            self.patch.tally(self.jump.to - self.jump.start - 1, self.jump.to - self.jump.start)
        if self.past is None or self.jump.at == self.jump.start:
            return None
        denoiser, t, given = context.denoiser, self.grid.timesteps[self.jump.at], context.inputs[context.denoiser.row.time]
        given, train = torch.as_tensor(given), self.patch.pipe.scheduler.config.num_train_timesteps
        told = denoiser.row.clock(t, self.grid.sigmas[self.jump.at], train).to(given)
        inputs = denoiser.as_input(self.moved_input(context.sample))
        inputs[denoiser.row.time] = torch.where(given == given.max(), told, given)     # given frames stay at their time
        return Rewrite((context.replace(inputs, t=float(t)),), lambda out: out)

    def moved_input(self, x: Tensor) -> Tensor:
        """The model's input (B, ...) with its latent, the first channels or tokens of it, moved; conditions follow behind."""
        past = self.past if self.past.ndim == x.ndim else self.past.view(len(self.past), *x.shape[1:])
        own = tuple(slice(n) for n in (len(x), *past.shape[1:]))
        x = x.clone()
        latent = self.grid.latent(x[own], self.jump.start)
        x[own] = self.grid.input(self.springboard(latent, past), self.jump.at).to(x.dtype)
        return x

    def springboard(self, x: Tensor, past: Tensor) -> Tensor:
        past = past.repeat(len(x) // len(past), *[1] * (x.ndim - 1))                    # both guidance halves alike
        return self.grid.move(x, past, self.jump.start, self.jump.at).to(x.dtype)

    def step(self, call, model_output: Tensor, timestep: Any, sample: Tensor, *args, eta: float = 0.0, **kwargs):
        """Update: keep the (guided) future score and move the latent from where it was."""
        if eta:
            raise ValueError(f"pfdiff is deterministic: eta={eta} must be 0")
        result = call(model_output, timestep, sample, *args, **kwargs)                  # for its bookkeeping and its type
        start, at, to = self.jump
        if self.past is None or at == start:
            self.past = self.grid.score(model_output, sample, start)
            moved = self.grid.step(sample, model_output, start, to)
        else:
            self.past = self.grid.score(model_output, self.springboard(sample, self.past), at)
            moved = self.grid.move(sample, self.past, start, to)
        return arrived(result, moved)


@per_denoiser
def apply(pipe: Any, config: Config = Config()) -> Patch:
    """Cover every k + 1 steps of the grid with one evaluation of the network.

    Args:
        pipe: a diffusers pipeline with a DDIM or a flow-matching Euler scheduler.

    Raises:
        ValueError: a bare model, another scheduler, a second solver-level method, or already applied.
    """
    patch = Patch(pipe, "pfdiff")
    if config.k == 0:
        return patch
    patch.require_pipeline()
    grid_class(patch.pipe.scheduler)
    solver = patch.solve(_Solver(patch, config))
    patch.rewrite(solver.substitute, Claim.SOLVER)
    patch.explain(lambda: "a grid of two steps leaves nothing to jump over")
    return patch.on()
