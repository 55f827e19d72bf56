"""Put a method on a model at module boundaries, and take it off again.

A method says what it wants around which module, and what it decides before each call of the denoiser; nothing of the model
changes until `Patch.on`, which puts all of it there or none. Arounds run inside compiled blocks and therefore decide nothing:
what a step does is decided beforehand, on the host, by the functions given to `rewrite` and `each_call`.
"""
from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from methods._core.attention import at_product
from methods._core.cache import Slot
from methods._core.context import CACHED, Rewrite, Run, StepContext, Watch, experts, split_target
from methods._core.denoiser import Block, describe
from methods._core.families.grids import Unknown
from methods._core.look import first_blocks, modulated_input
from methods._core.site import Claim, attach, conflict, detach

P = ParamSpec("P")


def per_denoiser(apply: Callable[P, Patch]) -> Callable[P, Patch]:
    """Let `apply(target, config)` patch every denoiser of a pipeline that has several, all or none, as one patch.

    Raises:
        TypeError: the second argument is not of the method's `Config`, before anything is done.
    """
    default = inspect.signature(apply).parameters["config"].default

    @functools.wraps(apply)
    def applied(*args: P.args, **kwargs: P.kwargs) -> Patch:
        given = inspect.signature(apply).bind(*args, **kwargs).arguments
        config = given.get("config", default)
        if not isinstance(config, type(default)):
            raise TypeError(f"config must be a {type(default).__module__}.{type(default).__qualname__}, not {config!r}")
        first, *others = experts(next(iter(given.values())))
        patch = apply(first, config)
        try:
            for expert in others:
                patch.also.append(apply(expert, config))
        except BaseException:
            patch.remove()
            raise
        return patch
    return applied


class Patch:
    """Everything one method puts on one model; `with` or `remove()` takes it off, bit for bit.

    Args:
        target: a diffusers pipeline, or its denoiser alone.
        name: the method's slug; one model carries a method once.
        edits: the method changes what is made and saves nothing, so that `report` asks whether it did something.

    Raises:
        TypeError: neither a pipeline nor a denoiser this library knows.
    """

    def __init__(self, target: Any, name: str, *, edits: bool = False):
        self.pipe, self.model = split_target(target)
        self.denoiser = describe(self.model)
        self.name, self.edits = name, edits
        self.also: list[Patch] = []                         # the same method on the pipeline's other denoisers
        self.solver = None
        self.counts: Counter[str] = Counter()               # what was done, by the method's own words, for `report`
        self.rewrites: list[tuple[Claim, Callable[[StepContext], Rewrite | None]]] = []
        self.run: Run | None = None
        self._engages = False
        self._claims: list[tuple[nn.Module, Claim, Callable | None]] = [(self.model, Claim.CALL, None)]
        self._slots: list[Slot] = []
        self._before: list[Callable[[StepContext], None]] = []
        self._after: list[Callable[[StepContext, Tensor], None]] = []
        self._on_run: list[Callable[[], None]] = []
        self._why: Callable[[], str] | None = None
        self._skipped: set[int] = set()
        self._bytes: int | None = None
        self._dropped = 0
        self._tally = [0.0, 0.0]
        self._context: StepContext | None = None            # of the call that was begun last
        self._met: dict[tuple, int] = {}                    # the step in which each branch was last called

    # ---- wiring, used by methods before `on` --------------------------------------------------------------------------

    def around(self, module: nn.Module, function: Callable, claim: Claim = Claim.OUTPUT) -> None:
        """Call `function(forward, *args, **kwargs)` in place of `module.forward`, claiming `claim` of the module.

        Raises:
            ValueError: for TOKENS and INSIDE, it is not known which tokens are the image's.
        """
        if claim in (Claim.TOKENS, Claim.INSIDE) and isinstance(self.denoiser.row.grid, Unknown):
            raise ValueError(f"{self.name} needs to know which tokens of {type(self.model).__name__} are the image's, and that "
                             "was not proved")
        self._claims.append((module, claim, function))

    def attend(self, attn: nn.Module, function: Callable, claim: Claim = Claim.INSIDE) -> None:
        """Call `function(product, q, k, v, **more)` in place of the attention product of `attn`; see `at_product`.

        Raises:
            ValueError: `attn` makes no scaled dot product, or one for each sample.
        """
        row = next((block.row for block in self.denoiser.blocks if block.attn is attn), None)
        if row is not None and row.product != "one":
            does = "attends without a map" if row.product == "none" else "attends sample by sample"
            raise ValueError(f"{self.name} stands at the attention product, and this {type(self.model).__name__} {does}")
        self.around(attn, at_product(function), claim)

    def claim(self, modules: Iterable[nn.Module], claim: Claim) -> None:
        """Leave `modules` as they are, but claim them."""
        self._claims += [(module, claim, None) for module in modules]

    def rewrite(self, function: Callable[[StepContext], Rewrite | None], claim: Claim) -> None:
        """Ask `function(context)` on the host, before any call of the denoiser, whether to make other calls in its place.

        `claim` says what of the call it changes, SOLVER, GUIDANCE, CROP or SKIP, and is the order in which patches are asked.

        Raises:
            ValueError: the model denoises several latents at once, of which a rewritten call would know one; or, for GUIDANCE,
                its samples cannot be taken apart.
        """
        if self.denoiser.row.latents > 1:
            raise ValueError(f"{self.name} changes calls of the denoiser, and {type(self.model).__name__} denoises several "
                             "latents in one call")
        if claim == Claim.GUIDANCE and not self.denoiser.row.by_sample:
            raise ValueError(f"{self.name} takes calls of the denoiser apart, and {type(self.model).__name__} pads or packs "
                             "its samples together")
        self.rewrites.append((claim, function))
        self.claim([self.model], claim)

    def each_call(self, function: Callable[[StepContext], None]) -> None:
        """Run `function(context)` on the host before every call of the denoiser, as it will really be made."""
        self._before.append(function)

    def after_call(self, function: Callable[[StepContext, Tensor], None]) -> None:
        """Run `function(context, output)` on the host after every call of the denoiser."""
        self._after.append(function)

    def each_run(self, function: Callable[[], None]) -> None:
        """Run `function()` when a new sampling run starts and when the patch is reset."""
        self._on_run.append(function)

    def solve(self, solver: Any) -> Any:
        """Let `solver.set_timesteps(call, ...)` and `solver.step(call, ...)` stand around those methods of the scheduler.

        -> the solver that does: the one of the pipeline's first denoiser, where it has several

        Raises:
            ValueError: the scheduler does not step with what the model takes and gives.
        """
        if not self.denoiser.row.plain:
            raise ValueError(f"{self.name} moves the latent between steps, and the pipelines of {type(self.model).__name__} "
                             "scale it before and behind every call")
        watch = Watch.on(self.pipe.scheduler)
        first = next((patch for run in watch.runs for patch in run.patches if patch.name == self.name), None) if watch else None
        self.solver = first.solver if first else solver
        return self.solver

    def slot(self) -> Slot:
        """A new place to keep a value for each branch, emptied at every run and counted in `report()`."""
        made = Slot()
        self._slots.append(made)
        made.dtype = self._slots[0].dtype
        if self._context is not None:                       # made within a call
            made.select(self._context.branch, stale=False)
        return made

    def explain(self, function: Callable[[], str]) -> None:
        """Let `function()` say in `report()` why nothing was saved."""
        self._why = function

    def require(self, found: Iterable, what: str) -> list:
        """`found` as a list.

        Raises:
            ValueError: it is empty; names `what` was looked for.
        """
        found = list(found)
        if not found:
            raise ValueError(f"{self.name}: this {type(self.model).__name__} has no {what}, so nothing would change")
        return found

    def blocks_at(self, max_downsample: int, where: Callable[[Block], bool] | None = None, what: str = "") -> list[Block]:
        """`Denoiser.blocks_at`, of which those `where` says so.

        Raises:
            ValueError: there is none (SDXL has none at full resolution: use `max_downsample=2`).
        """
        linear = any(block.row.product == "none" for block in self.denoiser.blocks)
        return self.require(filter(where, self.denoiser.blocks_at(max_downsample)),
                            f"self-attention{what} at a downsampling of {max_downsample} or less"
                            + " whose cost grows faster than the tokens" * linear)

    def require_pipeline(self) -> None:
        """
        Raises:
            ValueError: the target is a bare model, which does not say how many steps a run has.
        """
        if self.pipe is None:
            raise ValueError(f"{self.name} follows the steps of a run: apply it to the pipeline, not to the bare model")

    def require_unperturbed(self) -> None:
        """
        Raises:
            ValueError: the pipeline guides by perturbed attention, whose processors attend for a part of the batch only. When
                it runs, too, for a model that such a pipeline shares.
        """
        reason = f"{self.name} needs the attention of the whole batch, and perturbed attention guidance computes a part of it"
        if getattr(self.pipe, "pag_applied_layers", None):
            raise ValueError(reason)

        def check(context: StepContext) -> None:
            if "perturbed" in context.rows.parts:
                raise ValueError(reason)

        self.each_call(check)

    def on(self) -> Patch:
        """Put it on the model, all or nothing. -> itself

        Raises:
            ValueError: the method is already on this model, makes claims that another patch on it does not admit, or a cache of
                diffusers is enabled there.
        """
        if getattr(self.model, "is_cache_enabled", False):
            raise ValueError(f"{self.name}: {CACHED}")
        there = Run.on(self.model)
        for other in there.patches if there else ():
            if other.name == self.name:
                raise ValueError(f"{self.name} is already on this {type(self.model).__name__}: remove it before applying it "
                                 "again")
            self._check(other)
        try:
            self.run = Run.of(self.denoiser)
            for module, claim, function in self._claims:
                if function is not None:
                    attach(module, self, claim, function)
            self.run.add(self)
            self._engages = True
        except BaseException:
            self.remove()
            raise
        return self

    def _check(self, other: Patch) -> None:
        theirs: dict[int, list[Claim]] = {}
        for module, claim, _ in other._claims:
            theirs.setdefault(id(module), []).append(claim)
        for module, claim, _ in self._claims:
            for that in theirs.get(id(module), ()):
                if reason := conflict(claim, self.name, that, other.name):
                    raise ValueError(f"{self.name} and {other.name} cannot stack: {reason} the same {type(module).__name__}")

    # ---- on the host, during a run ------------------------------------------------------------------------------------

    @property
    def order(self) -> Claim:
        """Its place among the patches that are told of a call: the outermost claim it makes."""
        return min((claim for _, claim, _ in self._claims if claim != Claim.CALL), default=Claim.LOOK)

    def look(self, context: StepContext) -> Tensor:
        """`modulated_input` of this call, as the model without any patch would have it."""
        return modulated_input(self.denoiser, context.inputs, _patched(self.run.patches))

    def run_first(self, context: StepContext, count: int = 1) -> tuple[Tensor, Any]:
        """`first_blocks` of this call, as the model without any patch would have them."""
        return first_blocks(self.denoiser, context.inputs, _patched(self.run.patches), count)

    def skips(self, modules: Iterable[nn.Module]) -> None:
        """Say, in `each_call`, that this call of the denoiser will not run the inside of these patched modules."""
        self._skipped.update(map(id, modules))

    def reaches(self, module: nn.Module) -> bool:
        """Whether this call of the denoiser will run `module`, given what the caches on the model, and the pipeline, skip."""
        return id(module) not in self.run.left_out and not any(
            patch._skipped and not patch._skipped.isdisjoint(patch._holders.get(id(module), ())) for patch in self.run.patches)

    def unshared(self, module: nn.Module) -> bool:
        """Whether no other patch of the model stands around `module` or within it."""
        parts = set(map(id, module.modules()))
        return not any(id(part) in parts for part in _patched(patch for patch in self.run.patches if patch is not self))

    @functools.cached_property
    def _holders(self) -> dict[int, set[int]]:
        """Id of each module -> ids of the patched modules that it is or lies in."""
        holders: dict[int, set[int]] = {}
        for module, _, function in self._claims:
            for part in module.modules() if function is not None else ():
                holders.setdefault(id(part), set()).add(id(module))
        return holders

    def tally(self, saved: float, of: float) -> None:
        """Add to what was saved of what the plain run computes: module calls, tokens, rows or evaluations, in one unit."""
        self._tally[0] += saved
        self._tally[1] += of

    def begin_run(self) -> None:
        self.counts.clear()
        self._tally, self._dropped, self._context = [0.0, 0.0], 0, None
        self._met.clear()
        for slot in self._slots:
            slot.clear()
        for function in self._on_run:
            function()

    def select(self, context: StepContext) -> None:
        """Turn all slots to the branch of this call, empty if it is fresh and met for the first time in its step."""
        stale = context.fresh and self._met.get(context.branch) != context.i
        self._context, self._met[context.branch] = context, context.i
        self._skipped.clear()
        for slot in self._slots:
            slot.select(context.branch, stale)

    def decide(self, context: StepContext) -> None:
        self.denoiser.note(context.behind)
        for function in self._before:
            function(context)

    def end_call(self, context: StepContext, output: Tensor) -> None:
        for function in self._after:
            function(context, output)

    def drop(self) -> None:
        """Empty the slots, from the last, that do not fit into the limit."""
        if self._bytes is None:
            return
        kept: dict[int, int] = {}
        for slot in self._slots:
            more = {id(x): x.numel() * x.element_size() for x in slot.tensors()}
            if sum((kept | more).values()) > self._bytes:
                slot.clear()
                self._dropped += 1
            else:
                kept |= more

    # ---- what a user calls --------------------------------------------------------------------------------------------

    @property
    def off(self) -> bool:
        """True when the configuration engages nothing, so that nothing was put on the model."""
        return not self._engages

    def limit(self, *, bytes: int | None = None, dtype: torch.dtype | None = None) -> Patch:
        """Bound what is kept from step to step, and keep its floating-point tensors in `dtype`. -> itself

        What does not fit into `bytes` is not kept but computed, module by module. The bound holds between calls of the model.

        Raises:
            ValueError: `bytes` is negative, or `dtype` is not a floating-point type.
        """
        if bytes is not None and bytes < 0:
            raise ValueError(f"bytes={bytes} must not be negative")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} must be a floating-point type")
        for patch in self.also:
            patch.limit(bytes=None if bytes is None else bytes // (1 + len(self.also)), dtype=dtype)
        self._bytes = None if bytes is None else bytes // (1 + len(self.also))
        for slot in self._slots:
            slot.clear()
            slot.dtype = dtype
        return self

    def reset(self) -> None:
        """Forget everything remembered between steps. A pipeline does it by itself; on a bare model, call it before a run."""
        for patch in (self, *self.also):
            if patch.run is not None:
                patch.run.restart()

    def report(self) -> dict[str, Any]:
        """What the patch did since the last run began.

        `state` is "off" where the configuration engages nothing, "idle" before a run, "engaged" if something was saved, else
        "no gain", with the `reason`. `saved` is the share of module calls, tokens, rows or evaluations that was left out.
        What the method counts follows by its own words, then the bytes kept.
        """
        patches = (self, *self.also)
        saved, of = (sum(patch._tally[side] for patch in patches) for side in (0, 1))
        counts: Counter[str] = Counter()
        for patch in patches:
            counts.update(patch.counts)
        acted = bool(counts) if self.edits else saved > 0
        state = "off" if self.off else "engaged" if acted else "no gain" if of or counts else "idle"
        found: dict[str, Any] = {"method": self.name, "state": state}
        if state == "no gain":
            found["reason"] = self._reason()
        if not self.edits:
            found["saved"] = round(saved / of, 4) if of else 0.0
        kept = {id(x): x.numel() * x.element_size() for patch in patches for slot in patch._slots for x in slot.tensors()}
        return found | dict(counts) | {"cached_bytes": sum(kept.values())}

    def _reason(self) -> str:
        if self._dropped:
            return f"what it keeps does not fit into the limit of {self._bytes} bytes"
        if self._context is not None and self._context.steps == 1:
            return "the run has one step"
        return self._why() if self._why else "nothing was left out in this run"

    def remove(self) -> None:
        """Take the patch off. Calling it twice is harmless; other patches stay."""
        for patch in self.also:
            patch.remove()
        for module, _, function in self._claims:
            if function is not None:
                detach(module, self)
        run, self.run = self.run, None
        if run is not None:
            run.drop(self)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_) -> None:
        self.remove()


def _patched(patches: Iterable[Patch]) -> list[nn.Module]:
    """The modules in whose place these patches have something called."""
    return [module for patch in patches for module, _, function in patch._claims if function is not None]
