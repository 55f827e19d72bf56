"""SpeCa - SpeCa: Accelerating Diffusion Transformers with Speculative Feature Caching

Jiacheng Liu, Chang Zou, Yuanhuiyi Lyu, Fei Ren, Shaobo Wang, Kaixin Li, Linfeng Zhang, ACM MM 2025. arXiv:2509.11628.
Code: Shenyi-Z/Cache4Diffusion

Idea: TaylorSeer drafts, one block verifies. In a forecast step the last block is also computed, from the forecast that enters
it, and the difference from its own forecast measures how far the draft has gone astray. Above a threshold, which falls over the
run, the next step is a full one: so the gaps between full steps follow the sample.

Map
    draft      Taylor polynomials of attention and MLP outputs         methods.taylorseer.Forecast
    verify     the last block, forecast and computed                   METRICS, apply
    threshold  max(tau0 beta^p, floor), p the part of the run done     threshold
    rule       warm-up, longest and shortest draft, error              Draft.due, Draft.checked

Departures
    As in the code, a step that fails is kept and the next one is full.
    As there, what is compared is the output of the last block, and in a Flux single-stream block that of the projection of its
    joined attention and MLP. One number decides for the whole batch. The computed block runs uncompiled.
    The first step of the run has p = 0, as in the code for FLUX; that for DiT counts the present step as done.
    The code for HunyuanVideo verifies in every forecast step, also where the result is not asked for. Not done here.
    "relative_l1" and "relative_l2" are means of the ratios of single elements, as in the code: elements near 0 weigh most, and
    thresholds are large. "norm" is the ratio of L2 norms and wants another threshold.

Example
    >>> import methods
    >>> from methods import speca
    >>> pipe = methods.tiny("dit")
    >>> with speca.apply(pipe, speca.Config(threshold=0.5, longest=4)) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["verified"] > 0
    True
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from methods import taylorseer
from methods._core.cache import Slot, over_branches
from methods._core.context import StepContext
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim, underneath

__all__ = ["METRICS", "OFF", "TINY", "TUNE", "Config", "Draft", "apply", "threshold"]

METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {       # of a forecast and what was computed
    "relative_l1": lambda a, b: ((a - b).abs() / (b.abs() + 1e-10)).mean(),
    "relative_l2": lambda a, b: ((a - b) / (b.abs() + 1e-10)).square().mean().sqrt(),
    "norm": lambda a, b: (a - b).norm() / (b.norm() + 1e-10),
    "l1": lambda a, b: (a - b).abs().mean(),
    "l2": lambda a, b: (a - b).square().mean().sqrt(),
    "cosine": lambda a, b: 1 - F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1).mean(),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    threshold: float = 7.0        # tau0; the official code on FLUX.1-dev, 0.1 on DiT, 1.0 on HunyuanVideo
    decay: float = 0.3            # beta; there 0.3, 0.01, 0.1
    floor: float = 0.1            # least threshold; there 0.1, on DiT 0.01
    shortest: int = 2             # forecast steps from which on the last block verifies; there 2, on HunyuanVideo 4
    longest: int = 8              # forecast steps in a row at most; there 8, 5, 12; 0 is off
    max_order: int = 2            # O; there 2, 4, 1; 0 reuses
    first_enhance: int = 3        # warm-up, in which full and forecast steps take turns; there 3, on HunyuanVideo 1
    metric: str = "relative_l1"   # see METRICS

    def __post_init__(self):
        for name, least in (("threshold", 0), ("decay", 0), ("floor", 0), ("shortest", 1), ("longest", 0), ("max_order", 0),
                            ("first_enhance", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.metric not in METRICS:
            raise ValueError(f"metric={self.metric!r} must be one of {', '.join(METRICS)}")


OFF = Config(longest=0)
TINY = Config(shortest=1, longest=2)       # runs of the tests are as short as a draft
TUNE = tuple({"metric": "norm", "threshold": bound, "floor": bound / 5, "shortest": 1, "max_order": 1}
             for bound in (0.1, 0.2, 0.4))


def threshold(i: int, steps: int, config: Config) -> float:
    """max(tau0 beta^p, floor) in step `i` of `steps`."""
    return max(config.threshold * config.decay ** (i / steps), config.floor)


@dataclass(frozen=True)
class Draft:
    """Where a branch stands: its last full step, the highest order of differences then, the forecast steps since, and the last
    error measured in them."""

    last: int | None = None
    order: int = 0
    running: int = 0
    error: float | None = None

    def failed(self, i: int, steps: int, config: Config) -> bool:
        """Whether the draft is to end at step i because its error is too large."""
        return self.checked(config) and self.error is not None and self.error > threshold(i, steps, config)

    def checked(self, config: Config) -> bool:
        """Whether the next step, if forecast, is verified."""
        return self.running >= config.shortest

    def due(self, i: int, steps: int, config: Config) -> bool:
        """Whether step i is a full one. The one behind a full step never is, even in the warm-up."""
        if self.last is None or self.running == 0:
            return self.last is None
        return i < config.first_enhance or self.running >= config.longest or self.failed(i, steps, config)

    def after(self, i: int, due: bool, config: Config) -> Draft:
        """The same behind step i."""
        if not due:
            return replace(self, running=self.running + 1)
        grows = self.last is not None and i > config.first_enhance - 2
        return Draft(i, min(self.order + 1, config.max_order) if grows else 0)


class _Forecast(taylorseer.Forecast):
    """As TaylorSeer's, or, where the host sets `exact`, what the module gives, of which nothing is kept. `out` is what it gave
    last, where the host sets `noted`."""

    def __init__(self, slot: Any, at: dict[str, list[Tensor]]):
        super().__init__(slot, at)
        self.exact = self.noted = False
        self.out: Any = None

    def store(self, slot: Slot, out: Any) -> Any:
        if self.noted:
            self.out = out
        return out if self.exact else super().store(slot, out)

    def give(self, slot: Slot) -> Any:
        out = super().give(slot)
        if self.noted:
            self.out = out
        return out


class _Probe:
    """Around the last block, where the host sets `noted`: notes with what it is called and what it gives."""

    def __init__(self) -> None:
        self.noted = False
        self.given: tuple[tuple, dict[str, Any]] | None = None
        self.out: Any = None

    def around(self, forward, *args, **kwargs):
        if not self.noted:
            return forward(*args, **kwargs)
        self.given = tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}
        self.out = forward(*args, **kwargs)
        return self.out


def _copied(x: Any) -> Any:
    return x.clone() if torch.is_tensor(x) else x              # some blocks write into what they are given


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Forecast the branch outputs of every transformer block until the last block, computed beside, tells that they are off.

    Raises:
        ValueError: a bare model (the threshold follows the run), a UNet, or already applied.
    """
    patch = Patch(target, "speca")
    if config.longest == 0:
        return patch
    patch.require_pipeline()
    what = "chain of transformer blocks (on a UNet use deepcache)"
    blocks = patch.require(() if patch.denoiser.unet else patch.denoiser.blocks, what)
    state, at, probe, block = patch.slot(), {}, _Probe(), blocks[-1]
    seers = over_branches(patch.around, blocks, lambda: _Forecast(patch.slot, at))
    ends = [seer for branch, seer in seers if branch in block.branches]
    total = next((seer for branch, seer in seers if branch in block.branches and branch.name == "total"), None)
    patch.around(block.module, probe.around, Claim.LOOK)

    def decide(context: StepContext) -> None:
        draft = state.value or Draft()
        i, steps = context.i, context.steps
        due = draft.due(i, steps, config)
        patch.counts["rejected"] += due and config.first_enhance <= i and 0 < draft.running < config.longest
        state.value = after = draft.after(i, due, config)
        k = 0 if draft.last is None else i - draft.last
        kind = dict(dtype=torch.promote_types(context.sample.dtype, torch.float32), device=context.sample.device)
        at["gaps"] = [torch.tensor(k if n < after.order else math.inf, **kind) for n in range(config.max_order)]
        at["terms"] = [torch.tensor(k ** n / math.factorial(n), **kind) for n in range(config.max_order + 1)]
        for _, seer in seers:
            seer.reuse = seer.ready and not due
            patch.counts["forecast" if seer.reuse else "computed"] += 1
            patch.tally(seer.reuse, 1)
        probe.given = probe.out = None
        probe.noted = not due and draft.checked(config) and all(seer.reuse for seer in ends)
        for branch, seer in seers:
            patch.skips((branch.module, *branch.feeds) if seer.reuse and not (probe.noted and seer in ends) else ())
        if total is not None:
            total.noted = probe.noted

    def verify(context: StepContext, output: Tensor) -> None:
        if not probe.noted or probe.given is None:
            return
        args, kwargs = probe.given
        drafted = block.split(probe.out)[0] if total is None else total.out
        for seer in ends:
            seer.reuse, seer.exact = False, True
        out = underneath(block.module, *args, **kwargs)
        for seer in ends:
            seer.exact = False
        computed = block.split(out)[0] if total is None else total.out
        error = float(METRICS[config.metric](drafted.float(), computed.float()))
        state.value = replace(state.value, error=error)
        probe.given = probe.out = None
        if total is not None:
            total.out = None
        patch.counts["verified"] += 1
        patch.tally(-len(ends), 0)

    patch.each_call(decide)
    patch.after_call(verify)
    patch.explain(lambda: "a run of one step has nothing to forecast")
    return patch.on()
