"""Where sampling stands: one `StepContext` per call of the denoiser, decided on the host before it runs.

A `Run` watches one model and the schedulers of the pipelines that drive it: `set_timesteps` starts a run, `step` ends a
step, calls of the model between two steps are the guidance branches of one step. Nothing is counted inside modules, so
an interrupted run, another step count or another batch leaves nothing behind.
"""
from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods._core.denoiser import describe


@dataclass(frozen=True)
class StepContext:
    """One call of the denoiser.

    `i` counts steps from 0; `steps` is the number of steps of this run (None on a bare model); `branch` numbers the calls
    within one step (0 alone, 0 and 1 when guidance calls the model twice); `fresh` says that nothing remembered from an
    earlier call of this branch is valid: the first step of a run, or a changed shape. `guided` says that one call carries
    both guidance branches as the halves of its batch. `inputs` are the bound arguments of the denoiser's forward.
    """

    i: int
    steps: int | None
    branch: int
    fresh: bool
    guided: bool
    sample: Tensor
    timestep: Any
    inputs: dict[str, Any]

    @property
    def left(self) -> int:
        """Steps still to come after this one: counts down to 0."""
        return self.steps - 1 - self.i

    def random(self, seed: int) -> torch.Generator:
        """The random draws of this step: the same in every run, apart from the global generator."""
        return torch.Generator().manual_seed(seed * 1_000_003 + self.i)


def split_target(target: Any) -> tuple[Any | None, nn.Module]:
    """A pipeline -> (pipeline, its denoiser); a bare denoiser -> (None, itself).

    Raises:
        TypeError: neither of the two.
    """
    for name in ("unet", "transformer"):
        model = getattr(target, name, None)
        if hasattr(target, "scheduler") and isinstance(model, nn.Module):
            return target, getattr(model, "_orig_mod", model)
    if isinstance(target, nn.Module):
        return None, getattr(target, "_orig_mod", target)
    raise TypeError(f"expected a diffusers pipeline with a `unet` or `transformer`, or that model, not {type(target).__name__}")


class _Uncopied:
    """A function put on a model or a scheduler. Copying its owner is refused: the copy would report to the original."""

    def __init__(self, function, wraps=None):
        self.function = function
        self.__wrapped__ = wraps or function          # pipelines read the signature of scheduler methods

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo):
        raise RuntimeError("a patched model or scheduler cannot be copied: the copy would share its state; remove the patches")


def _doubled(sample: Tensor) -> bool:
    """Whether the two halves of the batch are the same latents, as they are where guidance puts its branches together."""
    return len(sample) % 2 == 0 and torch.equal(*sample.chunk(2))


class Run:
    """The sampling run of one model. Shared by all patches on it; made by the first, dropped with the last."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.timestep_scale = describe(model).timestep_scale
        self.patches: list = []
        self.signature = inspect.signature(type(model).forward)
        self.watched: dict[int, Any] = {}       # schedulers whose set_timesteps and step report here
        self.lock = threading.Lock()
        self.scheduler = None                   # the one that drives the run now
        model._patch_run = self
        self.handles = [model.register_forward_pre_hook(_Uncopied(self._before), with_kwargs=True),
                        model.register_forward_hook(_Uncopied(self._after), always_call=True)]
        self.restart()

    @classmethod
    def of(cls, model: nn.Module) -> Run:
        return model.__dict__.get("_patch_run") or cls(model)

    def add(self, patch) -> None:
        self.patches.append(patch)
        self.patches.sort(key=lambda each: each.depth)          # caches decide first: what they skip, others need not count
        if patch.pipe is not None:
            self._watch(patch.pipe.scheduler)

    def drop(self, patch) -> None:
        if patch in self.patches:
            self.patches.remove(patch)
        if not self.patches and self.model.__dict__.get("_patch_run") is self:
            for handle in self.handles:
                handle.remove()
            for scheduler in self.watched.values():
                del scheduler.set_timesteps, scheduler.step
            self.watched.clear()
            del self.model._patch_run

    # ---- the scheduler ------------------------------------------------------------------------------------------------

    def _watch(self, scheduler) -> None:
        if id(scheduler) in self.watched:
            return
        set_timesteps, step = scheduler.set_timesteps, scheduler.step

        def starts(*args, **kwargs):
            self.scheduler = scheduler
            self.restart()
            solver = self._solver()
            return solver.set_timesteps(set_timesteps, *args, **kwargs) if solver else set_timesteps(*args, **kwargs)

        def steps(*args, **kwargs):
            if self.scheduler is not scheduler:
                raise RuntimeError("two pipelines are driving one patched model at once; give each its own copy of the model")
            self.stepped = True
            solver = self._solver()
            return solver.step(step, *args, **kwargs) if solver else step(*args, **kwargs)

        scheduler.set_timesteps = _Uncopied(starts, wraps=set_timesteps)
        scheduler.step = _Uncopied(steps, wraps=step)
        self.watched[id(scheduler)] = scheduler

    def _solver(self):
        return next((patch.solver for patch in self.patches if patch.solver is not None), None)

    def restart(self) -> None:
        """Forget the run: the next call of the model is step 0 of a new one."""
        self.i, self.calls, self.stepped, self.steps = -1, 0, False, None
        self.thread = self.last = None
        self.shapes: dict[int, torch.Size] = {}
        for patch in self.patches:
            patch.begin_run()

    # ---- the model ----------------------------------------------------------------------------------------------------

    def _before(self, module, args, kwargs):
        here = threading.get_ident()
        if self.thread not in (None, here) or not self.lock.acquire(blocking=False):
            raise RuntimeError("one patched model is used from two threads; give each thread its own copy of the model")
        self.thread = here
        inputs = self.inputs(args, kwargs)
        context = self._context(inputs)
        changed = {}
        for patch in self.patches:
            changed |= patch.begin_call(context)
        return ((), {**inputs, **changed}) if changed else None

    def _after(self, module, args, output) -> None:
        if self.lock.locked() and self.thread == threading.get_ident():
            self.lock.release()

    def inputs(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """The arguments of a call of the model by name."""
        bound = dict(self.signature.bind(self.model, *args, **kwargs).arguments)
        bound.pop("self")
        return bound

    def _context(self, inputs: dict) -> StepContext:
        sample = inputs["sample"] if "sample" in inputs else inputs["hidden_states"]
        timestep = inputs.get("timestep")
        pipes = [patch.pipe for patch in self.patches if patch.pipe is not None]
        for pipe in pipes:
            if id(pipe.scheduler) not in self.watched:             # replaced since the patch was applied, and already started
                if self._solver():
                    raise RuntimeError("the scheduler was replaced under a solver-level patch: apply the patch again")
                self._watch(pipe.scheduler)
                self.scheduler = pipe.scheduler
                self.restart()
                self.thread = threading.get_ident()
        if self.i < 0:
            self.i = 0
            self.guided = _doubled(sample)
            if pipes:
                self.scheduler = self.scheduler or pipes[0].scheduler
                self.steps = self._steps_from(timestep)
        elif not pipes or self.stepped:
            self.i, self.calls, self.stepped = self.i + 1, 0, False
            if self.steps is not None and self.i >= self.steps:
                raise RuntimeError(f"step {self.i} of a run of {self.steps}: the patched model is called from outside its "
                                   "pipeline's run; call patch.reset(), or use a separate model")
        else:
            self.calls += 1
            before_t, before_x = self.last
            same = before_x.shape == sample.shape and torch.equal(before_x, sample) and bool(
                torch.equal(torch.as_tensor(before_t), torch.as_tensor(timestep)))
            if not same:
                raise RuntimeError("the patched model was called twice in one step with different latents: two pipelines are "
                                   "driving it, or it is used outside its run; give each its own copy of the model")
        self.last = timestep, sample
        fresh = self.shapes.get(self.calls) != sample.shape
        self.shapes[self.calls] = sample.shape
        if fresh and self.guided:                              # guidance may end during a run
            self.guided = _doubled(sample)
        return StepContext(self.i, self.steps, self.calls, fresh, self.guided, sample, timestep, inputs)

    def _steps_from(self, timestep) -> int:
        """Steps of this run: those from the first timestep given to the model on (image-to-image starts late)."""
        grid = self.scheduler.timesteps.double().cpu()
        first = torch.as_tensor(timestep).double().cpu().flatten()[0] * self.timestep_scale
        return len(grid) - int((grid - first).abs().argmin())
