"""Put a method on a model at module boundaries, and take it off again.

A patch wraps modules with *around* functions, `around(forward, *args, **kwargs)`, which may change what goes in, what
comes out, or not call `forward` at all. Every patched module holds one `Site`, an ordered list of arounds, so patches
come off in any order. Arounds run inside compiled blocks and therefore decide nothing: what a step does is decided
beforehand, on the host, by the functions given to `Patch.each_call`.
"""
from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from methods._core.context import Run, StepContext, split_target

CACHE, TOKENS = 0, 1     # depth of an around: caches see the outside of a module, token reducers sit inside them


class Site:
    """The arounds of one module, outermost first, and the forward they end in."""

    def __init__(self, module: nn.Module):
        self.original = module.__dict__.get("forward")     # another library's instance-level forward, if any
        self.forward = type(module).forward                 # held as a function: the compiler does not look it up on a class
        self.arounds: list[tuple[int, Patch, Callable]] = []
        self.opaque: Patch | None = None                    # computes the module itself, so nothing can sit inside it
        self.closed: Patch | None = None                    # admits no other patch

    def __deepcopy__(self, memo):
        raise RuntimeError("a patched model cannot be copied: the copy would share its state; remove the patches "
                           f"({', '.join(patch.name for _, patch, _ in self.arounds)}) first")


def _patched_forward(module: nn.Module, *args, **kwargs):
    return _call(module, 0, args, kwargs)


def _call(module: nn.Module, depth: int, args: tuple, kwargs: dict):
    site = module._patch_site
    if depth < len(site.arounds):
        return site.arounds[depth][2](functools.partial(_next, module, depth + 1), *args, **kwargs)
    if site.original is not None:
        return site.original(*args, **kwargs)
    return site.forward(module, *args, **kwargs)


def _next(module: nn.Module, depth: int, *args, **kwargs):
    return _call(module, depth, args, kwargs)


def _as_it_is(forward: Callable, *args, **kwargs):
    return forward(*args, **kwargs)


class Patch:
    """Everything one method has put on one model; `with` or `remove()` takes it off, bit for bit.

    Args:
        target: a diffusers pipeline, or its denoiser alone.
        name: the method's slug; one model carries a method once.
        depth: `CACHE` or `TOKENS`, where its arounds stand among those of other patches on the same module.

    Raises:
        ValueError: the method is already on this model.
    """

    def __init__(self, target: Any, name: str, *, depth: int = CACHE):
        self.pipe, self.model = split_target(target)
        self.name, self.depth = name, depth
        self.solver = None
        self.alone = False          # whether no other patch may be on the model, see `stand_alone`
        self.skipping = False       # whether this call leaves out the inside of the patched modules; set by caches
        self.counts: Counter[str] = Counter()
        self.features: list[Feature] = []
        self._modules: list[nn.Module] = []
        self._on_call: list[Callable[[StepContext], dict | None]] = []
        self._on_run: list[Callable[[], None]] = []
        self.run = Run.of(self.model)
        if any(other.name == name for other in self.run.patches):
            raise ValueError(f"{name} is already on this {type(self.model).__name__}: remove it before applying it again")
        for other in self.run.patches:
            if other.alone:
                raise ValueError(f"{name} and {other.name} cannot stack: {other.name} runs the model in ways of its own")
        self.run.add(self)

    # ---- wiring, used by methods --------------------------------------------------------------------------------------

    def around(self, module: nn.Module, function: Callable, *, opaque: bool = False, closed: bool = False) -> None:
        """Call `function(forward, *args, **kwargs)` in place of `module.forward`.

        `opaque` if it never calls `forward`, so that nothing can stand inside; `closed` if tokens come in numbers that the
        stored outputs of others would not fit, so that nothing else can stand on the module.

        Raises:
            ValueError: it cannot stack with a patch already on this module: both would cache it, both reduce its tokens, one
                is opaque with the other inside, or one is closed.
        """
        site = module.__dict__.get("_patch_site")
        if site is None:
            site = Site(module)
            module._patch_site = site
            module.forward = types.MethodType(_patched_forward, module)
        for depth, other, _ in site.arounds:
            if other is self:
                continue
            outer = next((patch for patch in (self if opaque else None, site.opaque) if patch and patch.depth == CACHE), None)
            shut = self if closed else site.closed
            reason = None
            if depth == self.depth:
                reason = "both cache the output of" if depth == CACHE else "both reduce the tokens of"
            elif shut:
                reason = f"{shut.name} changes how many tokens pass through"
            elif outer:
                reason = f"{outer.name} computes the inside of"
            if reason:
                self.remove()
                raise ValueError(f"{self.name} and {other.name} cannot stack: {reason} the same {type(module).__name__}")
        site.arounds.append((self.depth, self, function))
        site.arounds.sort(key=lambda entry: entry[0])
        site.opaque = self if opaque else site.opaque
        site.closed = self if closed else site.closed
        self._modules.append(module)

    def guard(self, modules: Iterable[nn.Module], *, closed: bool = True) -> None:
        """Leave `modules` as they are and refuse patches of the same depth on them, and of any if `closed`.

        Raises:
            ValueError: such a patch already stands on one of them.
        """
        for module in modules:
            self.around(module, _as_it_is, closed=closed)

    def stand_alone(self) -> None:
        """Refuse every other patch on the model, there already or to come.

        Raises:
            ValueError: another patch is there.
        """
        self.alone = True
        for other in self.run.patches:
            if other is not self:
                self.remove()
                raise ValueError(f"{self.name} and {other.name} cannot stack: {self.name} runs the model in ways of its own")

    def reaches(self, module: nn.Module) -> bool:
        """Whether this call of the denoiser will run `module`, given what the caches on the model skip."""
        return not any(patch.skipping and id(module) in patch.inside for patch in self.run.patches)

    @functools.cached_property
    def inside(self) -> set[int]:
        """Ids of the patched modules and of everything in them."""
        return {id(part) for module in self._modules for part in module.modules()}

    def each_call(self, function: Callable[[StepContext], dict | None]) -> None:
        """Run `function(context)` on the host before every call of the denoiser; it may return inputs to replace, by name."""
        self._on_call.append(function)

    def solve(self, solver: Any) -> None:
        """Let `solver.set_timesteps(call, ...)` and `solver.step(call, ...)` stand around those methods of the scheduler.

        Raises:
            ValueError: another patch already does.
        """
        for other in self.run.patches:
            if other.solver is not None:
                raise ValueError(f"{self.name} and {other.name} cannot stack: both replace the steps of the solver")
        self.solver = solver

    def each_run(self, function: Callable[[], None]) -> None:
        """Run `function()` when a new sampling run starts and when the patch is reset."""
        self._on_run.append(function)

    def feature(self) -> Feature:
        """A new slot for a cached module output, emptied at every run and counted in `report()`."""
        self.features.append(Feature())
        return self.features[-1]

    def require(self, found: Iterable, what: str) -> list:
        """`found` as a list; when it is empty, remove the patch and raise ValueError naming `what` was looked for."""
        found = list(found)
        if not found:
            self.remove()
            raise ValueError(f"{self.name}: this {type(self.model).__name__} has no {what}, so nothing would change")
        return found

    def require_pipeline(self) -> None:
        """On a bare model, which does not say how many steps a run has, remove the patch and raise ValueError."""
        if self.pipe is None:
            self.remove()
            raise ValueError(f"{self.name} follows the steps of a run: apply it to the pipeline, not to the bare model")

    # ---- what a user calls --------------------------------------------------------------------------------------------

    @property
    def off(self) -> bool:
        """True when the configuration engages nothing."""
        return not (self._modules or self._on_call)

    def reset(self) -> None:
        """Forget everything remembered between steps. A pipeline does it by itself; on a bare model, call it before a run."""
        self.run.restart()

    def report(self) -> dict[str, Any]:
        """What the patch did since the last run began: its state, module calls counted by kind, cached bytes."""
        state = "off" if self.off else "engaged" if self.counts else "idle"
        return {"method": self.name, "state": state, "modules": len(self._modules), **self.counts,
                "cached_bytes": sum(feature.bytes for feature in self.features)}

    def remove(self) -> None:
        """Take the patch off. Calling it twice is harmless; other patches stay."""
        for module in self._modules:
            site = module._patch_site
            site.arounds = [entry for entry in site.arounds if entry[1] is not self]
            site.opaque = None if site.opaque is self else site.opaque
            site.closed = None if site.closed is self else site.closed
            ours = getattr(module.__dict__.get("forward"), "__func__", None) is _patched_forward
            if not site.arounds and ours:            # else another library wraps our forward: leave it, it passes through
                del module._patch_site, module.forward
                if site.original is not None:
                    module.forward = site.original
        self._modules = []
        self.run.drop(self)

    def begin_run(self) -> None:
        self.counts.clear()
        for feature in self.features:
            feature.clear()
        for function in self._on_run:
            function()

    def begin_call(self, context: StepContext) -> dict[str, Any]:
        for feature in self.features:
            feature.select(context)
        changed = {}
        for function in self._on_call:
            changed |= function(context) or {}
        return changed

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_) -> None:
        self.remove()


class Feature:
    """The last output of one module: a tensor or a tuple of tensors, kept apart for each guidance branch."""

    def __init__(self):
        self.value: Tensor | tuple[Tensor, ...] | None = None
        self._branch, self._others = 0, {}

    def select(self, context: StepContext) -> None:
        """Switch to the slot of the branch now called; a slot filled for another shape is dropped."""
        if context.branch != self._branch:
            self._others[self._branch] = self.value
            self._branch, self.value = context.branch, self._others.pop(context.branch, None)
        if context.fresh:
            self.value = None

    def clear(self) -> None:
        self.value, self._branch = None, 0
        self._others.clear()

    @property
    def bytes(self) -> int:
        slots = [self.value, *self._others.values()]
        tensors = [t for slot in slots if slot is not None for t in (slot if isinstance(slot, tuple) else (slot,))]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)
