"""Where sampling stands: one `StepContext` per call of the denoiser, decided on the host before it runs.

A `Run` stands around one model and watches the scheduler of the pipeline that drives it: `set_timesteps` starts a run, `step`
ends a step, calls of the model between two steps belong to one step. Nothing is counted inside modules, so an interrupted
run, another step count or another batch leaves nothing behind.

Before the model runs, patches may rewrite the call, in the order of their claims: a `Rewrite` names the calls to make
in its place, none, one or several, and joins their outputs. Whoever comes after sees the calls as they are made.
"""
from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from methods._core.denoiser import Block, Denoiser
from methods._core.site import Claim, attach, detach

DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "prior", "decoder")


@dataclass(frozen=True)
class Rows:
    """How guidance lays its branches into one batch: `parts` in order, among "cond", "null" and "perturbed", each with
    `prompts` samples."""

    parts: tuple[str, ...]
    prompts: int

    @property
    def guided(self) -> bool:
        """Whether one call carries the conditional and the unconditional branch."""
        return "null" in self.parts and "cond" in self.parts

    def of(self, part: str) -> slice:
        """The rows of one part; ValueError where the batch has no such part."""
        start = self.parts.index(part) * self.prompts
        return slice(start, start + self.prompts)

    def take(self, value: Any, part: str) -> Any:
        """The rows of one part of a tensor whose first axis is the batch, or of all such in a dict, list or tuple."""
        if isinstance(value, dict):
            return {name: self.take(each, part) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.take(each, part) for each in value)
        if torch.is_tensor(value) and value.ndim:
            times, rest = divmod(len(value), len(self.parts) * self.prompts)
            if not rest and (times == 1 or value.ndim > 2):                   # frames, too, may lie along the first axis
                return value.unflatten(0, (len(self.parts), -1))[self.parts.index(part)]
        return value


@dataclass(frozen=True)
class StepContext:
    """One call of the denoiser.

    `i` counts steps from 0; `steps` is the number of steps of this run (None on a bare model) and `times` are their timesteps
    in the scheduler's scale, of which `t` is this step's, `told` the same in the model's; `call` numbers the calls within one
    step: 0 alone, 0 and 1 where guidance calls the model twice, the next where it makes one more with layers skipped. `branch`
    names the call for whatever is remembered from step to step: its number, and the names that rewrites gave it. `fresh` says
    that nothing remembered of this branch is valid: it is called for the first time in this run, was not called in the step
    before, or had another shape. `rows` says which of the batch belongs to which branch of guidance. `inputs` are the arguments
    of the denoiser's forward by name, as the model will get them.
    """

    i: int
    steps: int | None
    times: tuple[float, ...]
    told: tuple[float, ...]
    t: float | None
    call: int
    branch: tuple[int | str, ...]
    fresh: bool
    rows: Rows
    inputs: dict[str, Any] = field(repr=False)
    denoiser: Denoiser = field(repr=False)
    _seen: dict = field(repr=False)

    @property
    def sample(self) -> Tensor:
        """The latent, the model's first input."""
        return self.denoiser.sample(self.inputs)

    @functools.cached_property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width) of the image's tokens at full resolution. Reading it from packed tokens waits for the
        device."""
        return self.denoiser.size(self.inputs)

    @functools.cached_property
    def behind(self) -> int:
        """How many tokens follow the image's own in a packed latent."""
        return self.denoiser.behind(self.inputs)

    def grid(self, block: Block) -> tuple[int, int, int]:
        """(frames, height, width) of a block's image tokens."""
        return self.denoiser.at(self.size, block)

    @property
    def guided(self) -> bool:
        return self.rows.guided

    @property
    def left(self) -> int:
        """Steps still to come after this one: counts down to 0."""
        return self.steps - 1 - self.i

    def random(self, seed: int) -> torch.Generator:
        """The random draws of this step: the same in every run, apart from the global generator."""
        return torch.Generator().manual_seed(seed * 1_000_003 + self.i)

    def replace(self, inputs: dict[str, Any], *, branch: str | None = None, t: float | None = None) -> StepContext:
        """This call with other inputs, by name. Give it a `branch` of its own where their shape is another."""
        made = replace(self, inputs=self.inputs | inputs, t=self.t if t is None else t)
        return made if branch is None else made._as(branch)

    def only(self, part: str) -> StepContext:
        """This call for one part of `rows` alone, as a branch of that name."""
        row = self.denoiser.row
        inputs = {name: value if name in row.cut or name in row.shared else value[self.rows.of(part)] if name in row.listed
                  else self.rows.take(value, part) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, rows=Rows((part,), self.rows.prompts))._as(part)

    def _as(self, branch: str) -> StepContext:
        name = (*self.branch, branch)
        return replace(self, branch=name, fresh=_meet(self._seen, name, self.i, self.sample))


def _meet(seen: dict, branch: tuple, i: int, sample: Tensor) -> bool:
    """Note that a branch is called in step i. -> whether it is fresh"""
    known = seen.get(branch)
    seen[branch] = i, sample.shape
    return known is None or known[0] < i - 1 or known[1] != sample.shape


class Rewrite(NamedTuple):
    """What to do in place of a call: run the model for each of `calls`, then `finish(*outputs)` of as many tensors."""

    calls: tuple[StepContext, ...]
    finish: Callable[..., Tensor]


def given(output: Tensor) -> Rewrite:
    """In place of a call, without the model."""
    return Rewrite((), lambda: output)


@dataclass(frozen=True)
class Expert:
    """One of several denoisers of a pipeline, as a target."""

    pipe: Any
    name: str


def experts(target: Any) -> list[Any]:
    """A pipeline with several denoisers that share its steps (Wan 2.2, Ideogram 4) -> each as a target; else the target."""
    names = _names(target)
    return [Expert(target, name) for name in names] if len(names) > 1 else [target]


def _names(target: Any) -> list[str]:
    """The attributes of a pipeline that hold a denoiser."""
    found = [name for name in DENOISERS if isinstance(getattr(target, name, None), nn.Module)]
    return found if hasattr(target, "scheduler") else []


def split_target(target: Any) -> tuple[Any | None, nn.Module]:
    """A pipeline, or one expert of it -> (pipeline, its denoiser); a bare denoiser -> (None, itself).

    Raises:
        TypeError: none of these.
    """
    if isinstance(target, Expert):
        return target.pipe, _plain(getattr(target.pipe, target.name))
    if names := _names(target):
        return target, _plain(getattr(target, names[0]))
    if isinstance(target, nn.Module):
        return None, _plain(target)
    raise TypeError(f"expected a diffusers pipeline with a denoiser ({', '.join(DENOISERS)}), or that model, not "
                    f"{type(target).__name__}")


# ---- the pipeline ---------------------------------------------------------------------------------------------------------


class Caller(NamedTuple):
    """The pipeline in whose `__call__` the model is called, and what that call's local variables were."""

    pipe: Any
    known: dict[str, Any]

    def guides(self) -> bool:
        """Whether it asks for classifier-free guidance. Half of the pipelines of diffusers have a property for that, the
        others keep it in a local variable of their call."""
        said = getattr(self.pipe, "do_classifier_free_guidance", None)
        if said is None:
            said = self.known.get("do_classifier_free_guidance")
        return self.known.get("guidance_scale", 1.0) > 1.0 if said is None else bool(said)

    def kept(self, steps: int) -> int:
        """How many points of the scheduler's grid it will keep (image-to-image, inpainting), if it asks for `steps`."""
        strength, cut = self.known.get("strength"), getattr(self.pipe, "get_timesteps", None)
        if strength is None or cut is None:
            return len(self.pipe.scheduler.timesteps)
        return len(cut(steps, strength, self.pipe._execution_device)[0])


def find_caller(model: nn.Module) -> Caller | None:
    """The nearest caller that is a pipeline over `model`."""
    return next((caller for caller in _callers() if _holds(caller.pipe, model)), None)


def within(pipe: Any) -> bool:
    """Whether this runs in a call of that pipeline."""
    return any(caller.pipe is pipe for caller in _callers())


def _callers() -> Iterator[Caller]:
    """The pipelines in whose calls this is, from the innermost."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            known = frame.f_locals
            pipe = known.get("components", known.get("self"))       # a step of a modular pipeline, or a pipeline
            if hasattr(pipe, "scheduler"):
                yield Caller(pipe, known)
        frame = frame.f_back


def _holds(pipe: Any, model: nn.Module) -> bool:
    """Whether the model is one of the pipeline's denoisers, compiled or not."""
    return any(_plain(getattr(pipe, name)) is model for name in _names(pipe))


def _plain(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


def parts_of(denoiser: Denoiser, caller: Caller | None) -> tuple[str, ...]:
    """The parts of the batch of an ordinary call, in the order in which the pipeline lays them out."""
    if caller is None or not denoiser.row.batched:
        return ("cond",)
    parts = ("cond",)
    if caller.guides():
        parts = ("cond", "null") if denoiser.row.cond_first else ("null", "cond")
    return (*parts, "perturbed") if getattr(caller.pipe, "do_perturbed_attention_guidance", False) else parts


# ---- the scheduler --------------------------------------------------------------------------------------------------------


class Watch:
    """What one scheduler says, told to every run that it drives: `set_timesteps` starts them, `step` ends a step of all.

    The scheduler's class is exchanged while it is watched, for a subclass of the same name that reports. Its attributes stay
    as they are, since pipelines copy and swap them, and a copy of it is of the plain class.
    """

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self.runs: list[Run] = []
        self.taken = 0                                    # steps of the present run
        scheduler._patch_watch = self
        scheduler.__class__ = _reporting(_silent(type(scheduler)))

    @classmethod
    def of(cls, scheduler: Any) -> Watch:
        return cls.on(scheduler) or cls(scheduler)

    @staticmethod
    def on(scheduler: Any) -> Watch | None:
        watch = vars(scheduler).get("_patch_watch")
        return watch if watch is not None and watch.scheduler is scheduler else None

    def leave(self, run: Run) -> None:
        self.runs.remove(run)
        if not self.runs:
            self.scheduler.__class__ = _silent(type(self.scheduler))
            del self.scheduler._patch_watch

    def start(self, call: Callable, *args, **kwargs) -> Any:
        self.taken = 0
        for run in self.runs:
            run.begin(self)
        solver = self._solver()
        return solver.set_timesteps(call, *args, **kwargs) if solver else call(*args, **kwargs)

    def step(self, call: Callable, *args, **kwargs) -> Any:
        called = [run for run in self.runs if run.i >= 0]
        for run in called:
            run.end_step(self)
        self.taken += 1
        solver = self._solver()
        if self._replaced() or solver and not called:
            raise RuntimeError("the pipeline's denoiser was replaced under a patch, which then does nothing: remove the patch, "
                               "and apply it again")
        return solver.step(call, *args, **kwargs) if solver else call(*args, **kwargs)

    def _replaced(self) -> bool:
        """Whether a pipeline steps in which a model that was patched for it no longer stands."""
        stepping = {id(pipe) for pipe, _ in _callers()}
        return any(id(patch.pipe) in stepping and not _holds(patch.pipe, patch.model)
                   for run in self.runs for patch in run.patches)

    def _solver(self) -> Any:
        return next((patch.solver for run in self.runs for patch in run.patches if patch.solver is not None), None)

    def __deepcopy__(self, memo) -> Watch:
        return self                                       # of the attributes of its scheduler, which a pipeline may put back


def _silent(scheduler_class: type) -> type:
    """The class as it was; a scheduler made from the class of a watched one is of the reporting class already."""
    return vars(scheduler_class).get("plain", scheduler_class)


@functools.cache
def _reporting(plain: type) -> type:
    class Reporting(plain):
        @functools.wraps(plain.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            call, watch = functools.partial(plain.set_timesteps, self), Watch.on(self)
            return call(*args, **kwargs) if watch is None else watch.start(call, *args, **kwargs)

        @functools.wraps(plain.step)
        def step(self, *args, **kwargs):
            call, watch = functools.partial(plain.step, self), Watch.on(self)
            return call(*args, **kwargs) if watch is None else watch.step(call, *args, **kwargs)

        def __reduce_ex__(self, protocol):
            return object.__new__, (plain,), {name: value for name, value in vars(self).items() if name != "_patch_watch"}

    Reporting.plain = plain
    Reporting.__name__, Reporting.__qualname__, Reporting.__module__ = plain.__name__, plain.__qualname__, plain.__module__
    return Reporting


# ---- the run --------------------------------------------------------------------------------------------------------------

TWO_PIPELINES = ("two pipelines are driving one patched model at once, or it is used outside its run: give each its own copy "
                 "of the model, or let one run end before the next begins")


CACHED = ("a cache of diffusers is enabled on this model, and it and the patch would pass over each other's work: call "
          "disable_cache() on it, or remove the patch")


class Run:
    """The sampling run of one model. Shared by all patches on it; made by the first, dropped with the last."""

    name = None                                             # of no method

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.model = denoiser, denoiser.model
        self.patches: list = []
        self.signature = inspect.signature(type(self.model).forward)
        self.watches: list[Watch] = []        # of the scheduler that drives the run and, behind it, of one left in mid-run
        self.guard = threading.Lock()
        self.busy: int | None = None          # the thread that is inside the model
        self.left_out: set[int] = set()       # ids of the modules that the model itself passes over in the present call
        attach(self.model, self, Claim.CALL, self.call)
        self.restart()

    @classmethod
    def of(cls, denoiser: Denoiser) -> Run:
        return cls.on(denoiser.model) or cls(denoiser)

    @staticmethod
    def on(model: nn.Module) -> Run | None:
        site = vars(model).get("_patch_site")
        return next((owner for _, owner, _ in site.arounds if isinstance(owner, Run)), None) if site else None

    def add(self, patch) -> None:
        self.patches.append(patch)
        self.patches.sort(key=lambda each: each.order)      # caches decide first: what they skip, others need not count
        if patch.pipe is not None and (patch.solver is not None or not self.watches):
            self._follow(patch.pipe.scheduler)

    def drop(self, patch) -> None:
        if patch in self.patches:
            self.patches.remove(patch)
        if not self.patches:
            detach(self.model, self)
            while self.watches:
                self.watches.pop().leave(self)

    # ---- told by the scheduler ----------------------------------------------------------------------------------------

    def begin(self, watch: Watch) -> None:
        self._follow(watch.scheduler)
        self.restart()

    def end_step(self, watch: Watch) -> None:
        if watch is not self.watches[0]:
            raise RuntimeError(TWO_PIPELINES)
        self.stepped = True

    def _follow(self, scheduler: Any) -> None:
        """Let this scheduler drive the run. The one before is watched on only if it was left in mid-run."""
        done = self.i < 0 or self.steps is None or (self.i == self.steps - 1 and self.stepped)
        watch = Watch.of(scheduler)
        if watch in self.watches:
            self.watches.remove(watch)
        else:
            watch.runs.append(self)
        self.watches.insert(0, watch)
        while len(self.watches) > (1 if done else 2):
            self.watches.pop().leave(self)

    def restart(self) -> None:
        """Forget the run: the next call of the model is step 0 of a new one."""
        self.i, self.calls, self.stepped = -1, 0, False
        self.steps: int | None = None
        self.times: tuple[float, ...] = ()
        self.told: tuple[float, ...] = ()
        self.thread = self.timestep = self.rows = None
        self.seen: dict[tuple, tuple[int, torch.Size]] = {}
        for patch in self.patches:
            patch.begin_run()

    # ---- around the model ---------------------------------------------------------------------------------------------

    def call(self, forward: Callable, *args, **kwargs) -> Any:
        with self._entered():
            context = self._context(self.inputs(args, kwargs))
            self.result = None
            rewrites = [(claim, patch, function) for patch in self.patches for claim, function in patch.rewrites]
            out = self._run(forward, context, sorted(rewrites, key=lambda each: each[0]))
            for patch in self.patches:
                patch.drop()
            wrapped, self.result = self._wrapped(out, context.inputs.get("return_dict", True)), None
            return wrapped

    def _run(self, forward: Callable, context: StepContext, rewrites: list[tuple]) -> Tensor:
        for n, (_, patch, rewrite) in enumerate(rewrites):
            patch.select(context)
            if (made := rewrite(context)) is not None:
                outputs = [self._run(forward, each, rewrites[n + 1:]) for each in made.calls]
                patch.select(context)                     # what it keeps belongs to the call it was asked about
                return made.finish(*outputs)
        self.left_out = self.denoiser.left_out(context.inputs)
        for patch in self.patches:
            patch.select(context)
        for patch in self.patches:
            patch.decide(context)
        self.result = forward(**context.inputs)
        out = self.denoiser.tensor(self.result if torch.is_tensor(self.result) else self.result[0])
        for patch in self.patches:
            patch.end_call(context, out)
        return out

    def _wrapped(self, out: Tensor, as_dict: bool) -> Any:
        """`out` in the form in which the model gives its output, with what else it gave."""
        out = self.denoiser.as_output(out)
        if torch.is_tensor(self.result):                        # Kandinsky 5 gives it bare
            return out
        if not as_dict:
            return (out, *(self.result or ())[1:])
        if self.result is not None:
            self.form = type(self.result), next(iter(self.result))
            setattr(self.result, self.form[1], out)
            return self.result
        return self.form[0](**{self.form[1]: out})

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """One thread at a time, and one in a run. A thread that ended inside the model has left it."""
        here = threading.get_ident()
        with self.guard:
            alive = {thread.ident for thread in threading.enumerate()}
            if (self.busy not in (None, here) and self.busy in alive) or (self.watches and self.thread not in (None, here)):
                raise RuntimeError("one patched model is used from two threads; give each thread its own copy of the model")
            self.busy = self.thread = here
        try:
            yield
        finally:
            self.busy = None

    def inputs(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """The arguments of a call of the model by name."""
        bound = dict(self.signature.bind(self.model, *args, **kwargs).arguments)
        bound.pop("self")
        return bound

    def _context(self, inputs: dict) -> StepContext:
        caller = find_caller(self.model)
        pipe = caller.pipe if caller else next((patch.pipe for patch in self.patches if patch.pipe is not None), None)
        if getattr(self.model, "is_cache_enabled", False):
            raise RuntimeError(CACHED)
        sample, timestep = self.denoiser.sample(inputs), inputs.get(self.denoiser.row.time)
        if pipe is not None:
            self._check_scheduler(pipe.scheduler)
        if self.i < 0:
            self.i, self.stepped = 0, False
            if pipe is not None:
                self.i = self.watches[0].taken                  # another expert may have taken the first steps
                self.times, self.told = self._times_from(timestep)
                self.steps = len(self.times)
        elif pipe is None or self.stepped:
            self.i, self.calls, self.stepped = self.i + 1 if pipe is None else self.watches[0].taken, 0, False
            if self.steps is not None and self.i >= self.steps:
                raise RuntimeError(f"step {self.i} of a run of {self.steps}: the patched model is called from outside its "
                                   "pipeline's run; call patch.reset(), or use a separate model")
        else:
            self.calls += 1
            if _first(timestep) != _first(self.timestep):
                raise RuntimeError(TWO_PIPELINES)
        self.timestep = timestep
        if self.calls == 0:
            parts = parts_of(self.denoiser, caller)
            parts = parts if len(sample) % len(parts) == 0 else ("cond",)
            self.rows = Rows(parts, len(sample) // len(parts))
        # an extra call of a step, such as one with layers skipped, carries the prompts once
        rows = self.rows if len(sample) == len(self.rows.parts) * self.rows.prompts else Rows(("cond",), len(sample))
        branch = (self.calls,)
        fresh = _meet(self.seen, branch, self.i, sample)
        t = self.times[self.i] if self.times else None
        return StepContext(self.i, self.steps, self.times, self.told, t, self.calls, branch, fresh, rows, inputs, self.denoiser,
                           self.seen)

    def _check_scheduler(self, scheduler: Any) -> None:
        """Go over to another scheduler: replaced since the patch was applied, or of another pipeline, and already started."""
        if self.watches and scheduler is self.watches[0].scheduler:
            return
        if any(scheduler is watch.scheduler for watch in self.watches):
            raise RuntimeError(TWO_PIPELINES)
        if any(patch.solver is not None for patch in self.patches):
            raise RuntimeError("the scheduler was replaced under a solver-level patch: apply the patch again")
        thread = self.thread
        self._follow(scheduler)
        self.restart()
        self.thread = thread

    def _times_from(self, timestep: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The timesteps of this run, from the first one given to a model on (image-to-image starts late), in the scheduler's
        scale and in the model's."""
        scheduler = self.watches[0].scheduler
        grid = scheduler.timesteps.double().cpu()
        sigmas = getattr(scheduler, "sigmas", None)
        sigmas = grid if sigmas is None else torch.as_tensor(sigmas).double().cpu()[:len(grid)]
        told = self.denoiser.row.clock(grid, sigmas, scheduler.config.num_train_timesteps)
        start = max(0, int((told - _first(timestep)).abs().argmin()) - self.i)
        return tuple(grid[start:].tolist()), tuple(told[start:].tolist())


def _first(timestep: Any) -> float:
    """The time of a call; where tokens have times of their own, given frames are done, and the largest is the run's."""
    return float(torch.as_tensor(timestep).max())
