"""EasyCache - Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching

Xin Zhou, Dingkang Liang, Kaijin Chen, Tianrui Feng, Xiwu Chen, Hongkai Lin, Yikang Ding, Feiyang Tan, Hengshuang Zhao,
Xiang Bai, arXiv 2025. arXiv:2507.02860. Code: H-EmbodVis/EasyCache

Idea: behind the first steps a change of the latent changes the model's output at a nearly constant rate. The rate of the last
two computed steps tells how much the output would change in this one. While the sum of that stays below a threshold the model
is not run at all: what it last added to its input is added to the new one.

Map
    k       mean |v - v'| / mean |x - x'|, both computed                  rate
    eps     k mean |x - x of the call before| / mean |v'|                 expected
    when    compute once the sum of eps reaches the threshold             apply
    how     v = x + (v' - x'), of the last computed step                  reused

Departures
    Where guidance lies in one batch the conditional rows alone decide, as the conditional call does of two.
    Where a model gives more than it takes, as a learned variance, that is the last computed one; where it takes more, as the
    channels of a first frame, they are left aside.
    What is kept belongs to a run and a branch of guidance. The official code keeps it on the model's class and counts calls:
    a run that was interrupted, or of another length, meets what the last one left.
    Between equal inputs there is no rate (0 / 0 in the official code), and the next step computes. threshold = 0 is off.

Example
    >>> import methods
    >>> from methods import easycache
    >>> pipe = methods.tiny("dit")
    >>> with easycache.apply(pipe, easycache.Config(threshold=0.2, warmup=2)) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["computed"] + patch.report()["reused"]
    10
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from methods._core.context import Rewrite, StepContext, given
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["ELSEWHERE", "OFF", "TINY", "TUNE", "Config", "Known", "apply", "expected", "rate", "reused"]


@dataclass(frozen=True, kw_only=True)
class Config:
    threshold: float = 0.05       # tau (official code: Wan2.1 0.05, HunyuanVideo 0.025)
    warmup: int = 10              # R, steps at the start that compute (official code: Wan2.1 10, HunyuanVideo 5)

    def __post_init__(self):
        if self.threshold < 0:
            raise ValueError(f"threshold={self.threshold} must not be negative")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup} must not be negative")


OFF = Config(threshold=0.0)
TINY = Config(threshold=3.0, warmup=3)        # random weights change more from step to step
ELSEWHERE = ({"warmup": 2},)                  # where one of two denoisers runs a few of the steps
TUNE = tuple({"threshold": threshold, "warmup": 4} for threshold in (0.025, 0.05, 0.1, 0.2))


class Known(NamedTuple):
    """What a branch keeps: its input in the call before; input and output of the last computed step; the rate of the last two
    computed steps, None where there is none; the changes expected since, summed. Inputs are cut to what the output covers."""

    before: Tensor
    x: Tensor
    v: Tensor
    rate: float | None = None
    total: float = 0.0


def rate(known: Known, x: Tensor, v: Tensor) -> float | None:
    """k: how much the output changed to v, by the change of the input to x; None where the input did not change."""
    moved = _mean(x - known.x)
    return _mean(v[_own(x)] - known.v[_own(x)]) / moved if moved else None


def expected(known: Known, x: Tensor) -> float | None:
    """eps: by how much of itself the output should have changed since the call before; None where no rate is known."""
    size = _mean(known.v[_own(x)])
    return None if known.rate is None or not size else known.rate * _mean(x - known.before) / size


def reused(x: Tensor, known: Known) -> Tensor:
    """The output for x, without the model: what it last added to its input, added to this."""
    out, own = known.v.clone(), _own(x)
    out[own] = x + (known.v[own] - known.x)
    return out


def _deciding(context: StepContext, value: Any) -> Any:
    """The rows of a tensor, or of all in a `Known`, by which a step is decided: of guidance in one batch the conditional."""
    part = "cond" if "cond" in context.rows.parts else context.rows.parts[0]
    return Known(*(context.rows.take(each, part) for each in value)) if isinstance(value, Known) else \
        context.rows.take(value, part)


def _moved(context: StepContext, v: Tensor) -> Tensor:
    """What of the input the output v moves: no channels of a condition, no tokens of a reference."""
    x = context.sample[tuple(map(slice, v.shape))]
    return x[:, :x.shape[1] - context.behind] if context.behind else x


def _mean(x: Tensor) -> float:
    return float(x.float().abs().mean())


def _own(x: Tensor) -> tuple[slice, ...]:
    """Where an output holds what moves x: not a learned variance behind it."""
    return tuple(map(slice, x.shape))


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Leave out the whole model while the change expected of its output, summed since it last ran, is below the threshold.

    Raises:
        ValueError: a bare model (the last step always computes), a model of several latents, a second method that leaves out
            the model, or already applied.
    """
    patch = Patch(target, "easycache")
    if config.threshold == 0:
        return patch
    patch.require_pipeline()
    memory, computes, seen = patch.slot(), [True], []       # a Known; whether the present step does; all changes expected

    def summed(context: StepContext, known: Known, x: Tensor) -> float | None:
        """The sum of changes with that of this call, by which it is left out; None where it computes."""
        if context.call:                                    # guidance in a second call follows the first
            return None if computes[0] else 0.0
        if context.i < config.warmup or context.left == 0:
            return None
        change = expected(_deciding(context, known), _deciding(context, x))
        if change is None:
            return None
        seen.append(change)
        return known.total + change if known.total + change < config.threshold else None

    def decide(context: StepContext) -> Rewrite:
        known = Known(*memory.get()) if memory.value is not None else None
        x = context.sample if known is None else context.sample[_own(known.x)]
        total = None if known is None else summed(context, known, x)
        if context.call == 0:
            computes[0] = total is None
        patch.counts["computed" if total is None else "reused"] += 1
        patch.tally(total is not None, 1)
        if known is not None and total is not None:
            memory.keep(known._replace(before=x.clone(), total=total))
            return given(reused(x, known))

        def remember(v: Tensor) -> Tensor:
            x = _moved(context, v).clone()
            k = None if known is None or context.call else rate(*(_deciding(context, each) for each in (known, x, v)))
            memory.keep(Known(x, x, v.clone(), k))
            return v

        return Rewrite((context,), remember)

    patch.rewrite(decide, Claim.SKIP)
    patch.each_run(seen.clear)
    patch.explain(lambda: f"the sum reached {config.threshold} in every step; the smallest change expected was {min(seen):.3g}"
                  if seen else f"the first {config.warmup} steps, and the last, always compute")
    return patch.on()
