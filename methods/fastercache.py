"""FasterCache - FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality

Zhengyao Lv, Chenyang Si, Junhao Song, Zhenyu Yang, Yu Qiao, Ziwei Liu, Kwan-Yee K. Wong, ICLR 2025. arXiv:2410.19355.
Code: Vchitect/FasterCache

Idea: two reuses at once. Self-attention is computed in some steps only; the others go on in the direction of the last two
that were computed, since a plain copy loses detail. And late in sampling most steps run the conditional branch alone: the
unconditional output differs from it by what it differed last time, low and high frequencies weighed apart.

Map
    dynamic feature reuse   last output plus w of its change, w growing            extrapolate, weight_of
    frequencies             a disk of radius min(H, W) / 5 around the mean         low_pass
    CFG-cache               differences of both bands, kept in a full step         bands, apply
    CFG-cache               output of the unconditional branch                     rebuild
    weights                 low band until, high band from a step, compounding     factors
    schedule                full steps, and steps that compute attention           shares_guidance, computes

Departures
    Bounds are shares of the run, those of the official code for CogVideoX in 50 steps. It has numbers of steps, and in a run
    of another length other shares.
    A step of the conditional branch alone begins with its own half of what is kept. The official code takes the first half,
    which in Latte and Open-Sora-Plan is the unconditional one; the hook of diffusers takes the second half everywhere.
    What is kept are outputs that were computed. The hook of diffusers keeps extrapolated ones too.
    Once the late part has begun, a full step computes its attention. So does the official code, unless no step since the last
    full one has; the hook of diffusers computes it in full steps from the start.
    Guidance in two calls of the model, the conditional one first, gives the same as in one; there the second is left out.

Example
    >>> import methods
    >>> from methods import fastercache
    >>> pipe = methods.tiny("dit")
    >>> with fastercache.apply(pipe) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["alone"], patch.report()["reused"]
    (5, 18)
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods._core.cache import Reuse, Slot
from methods._core.context import Rewrite, StepContext, given
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["OFF", "Config", "apply", "bands", "computes", "extrapolate", "factors", "low_pass", "rebuild", "shares_guidance",
           "weight_of"]


@dataclass(frozen=True, kw_only=True)
class Config:
    interval: int = 5                 # n: late steps of which one runs both branches of guidance; 1: all do
    start: float = 0.34               # share of the run behind which steps are late
    attention_interval: int = 3       # steps of which one computes self-attention (official code: CogVideoX 3, Latte 2)
    attention_offset: int = 0         # numbers, from 1, that are multiples of it plus this one (CogVideoX 0, Latte 1)
    attention_start: float = 0.34     # share of the run behind which others go on without (official code: Latte 0.3)
    weight: tuple[float, float] = (0.3, 0.3)      # w, from attention_start to the end (Latte 0.5, Open-Sora 0.045 to 1.035)
    low: float = 1.1                  # 1 + alpha_1, of the low band up to the share low_until
    low_until: float = 0.8            # t0 of the low band, as a share of the run (official code: Latte 0.88)
    high: float = 1.1                 # 1 + alpha_2, of the high band from the share high_from on
    high_from: float = 0.58           # t0 of the high band (official code: Latte 0.88)

    def __post_init__(self):
        for name in ("interval", "attention_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("start", "attention_start", "low_until", "high_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} outside [0, 1]")


OFF = Config(interval=1, attention_interval=1)


def shares_guidance(i: int, steps: int, config: Config) -> bool:
    """Whether step `i` of `steps` runs the conditional branch alone: a late one whose number, from 1, is no multiple of n."""
    return i >= round(config.start * steps) and (i + 1) % config.interval > 0


def computes(i: int, steps: int, config: Config, guided: bool = True) -> bool:
    """Whether step `i` computes self-attention. A full step does, behind the first that is not full."""
    shared = [shares_guidance(j, steps, config) and guided for j in range(i + 1)]
    full = any(shared) and not shared[i]
    early = i < round(config.attention_start * steps)
    return full or early or (i + 1 - config.attention_offset) % config.attention_interval == 0


def weight_of(i: int, steps: int, config: Config) -> float:
    """w of step `i`, growing evenly from the first step that may go without attention to the last of the run."""
    first, (begin, end) = round(config.attention_start * steps), config.weight
    return begin + (end - begin) * (i - first) / max(1, steps - 1 - first)


def factors(i: int, steps: int, config: Config) -> tuple[float, float]:
    """Weights of the low and of the high band, by which the kept differences grow in a step that has no full guidance."""
    return (config.low if i < round(config.low_until * steps) else 1.0,
            config.high if i >= round(config.high_from * steps) else 1.0)


def extrapolate(before: Tensor, last: Tensor, weight: Tensor | float) -> Tensor:
    """Dynamic feature reuse: F = F_last + w (F_last - F_before)."""
    return last + (last - before) * weight


def low_pass(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The low frequencies among those of `fft2`, as a mask (height, width): within min(H, W) // 5 of none."""
    y, x = torch.arange(height, device=device)[:, None] - height // 2, torch.arange(width, device=device) - width // 2
    return torch.fft.ifftshift(x ** 2 + y ** 2 <= (min(height, width) // 5) ** 2)


def bands(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., H, W) -> its low and its high frequencies, complex, of the same shape, whose sum is its spectrum."""
    spectrum = torch.fft.fft2(x.float())
    low = low_pass(*x.shape[-2:], x.device)
    return spectrum * low, spectrum * ~low


def rebuild(cond: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """CFG-cache: the unconditional output from the conditional one (..., H, W) and the differences of both bands."""
    low_cond, high_cond = bands(cond)
    return torch.fft.ifft2((low + low_cond) + (high + high_cond)).real.to(cond.dtype)


class _Extrapolated(Reuse):
    """Keeps the last two outputs that were computed, of each branch, and gives what follows from them."""

    keeping, weight = True, torch.zeros((), dtype=torch.float64)      # set by the host

    def store(self, slot: Slot, out: Any) -> Any:
        if self.keeping:
            last = out if isinstance(out, tuple) else (out,)
            slot.keep((*(last if slot.value is None else slot.get()[len(last):]), *last))
        return out

    def give(self, slot: Slot) -> Any:
        kept = slot.get()
        half = len(kept) // 2
        out = tuple(extrapolate(*pair, self.weight) for pair in zip(kept[:half], kept[half:], strict=True))
        return out if half > 1 else out[0]


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Extrapolate self-attention in some steps, and run the conditional branch alone in most of the late ones.

    Args:
        target: a diffusers pipeline over any model this library knows.

    Raises:
        ValueError: a bare model (the schedules need the number of steps), a second method that changes guidance, or already
            applied.
    """
    patch = Patch(target, "fastercache")
    if config.interval == config.attention_interval == 1:
        return patch
    patch.require_pipeline()
    modules: list[nn.Module] = [module for block in patch.denoiser.blocks for module in block.self_attentions]
    reuses = [_Extrapolated(patch.slot) for _ in modules]
    delta, first_call = patch.slot(), patch.slot()        # of both bands; what the first of two calls of a step gave
    for module, reuse in zip(modules, reuses, strict=True) if config.attention_interval > 1 else ():
        patch.around(module, reuse.around)
    guided: set[bool] = set()                             # whether there is guidance in this run, once it is known

    def planes(x: Tensor, context: StepContext) -> Tensor:
        """An output with its image in the last two axes."""
        return x if x.ndim > 3 else x.mT.unflatten(2, context.grid(context.denoiser.blocks[0]))

    def unconditional(cond: Tensor, context: StepContext) -> Tensor:
        kept = tuple(band * factor for band, factor in zip(delta.get(), factors(context.i, context.steps, config), strict=True))
        delta.keep(kept)
        dropped = len(cond) * len(modules)
        patch.counts["alone"] += 1
        patch.tally(dropped, dropped)
        out = rebuild(planes(cond, context), *kept)
        return out if cond.ndim > 3 else out.flatten(2).mT

    def note(null: Tensor, cond: Tensor, context: StepContext) -> None:
        if context.left and shares_guidance(context.i + 1, context.steps, config):
            both = zip(bands(planes(null, context)), bands(planes(cond, context)), strict=True)
            delta.keep(tuple(a - b for a, b in both))

    def one_call(context: StepContext) -> Rewrite | None:
        """Guidance in one batch."""
        if sorted(context.rows.parts) != ["cond", "null"]:
            return None
        parts = context.rows.parts

        def full(out: Tensor) -> Tensor:
            note(*(context.rows.take(out, part) for part in ("null", "cond")), context)
            return out

        if delta.value is None or not shares_guidance(context.i, context.steps, config):
            return Rewrite((context,), full)
        half = context.only("cond")
        for slot in (reuse.slots[0] for reuse in reuses if half.fresh and reuse.ready):
            own = tuple(x.unflatten(0, (2, -1))[parts.index("cond")] for x in slot.get())
            earlier = slot.of(half.branch)
            before = own if earlier is None else earlier[len(own) // 2:] * 2
            slot.hand(half.branch, before[:len(own) // 2] + own[len(own) // 2:])
            slot.value = None
        return Rewrite((half,), lambda cond: torch.cat([cond if part == "cond" else unconditional(cond, context)
                                                        for part in parts]))

    def two_calls(context: StepContext) -> Rewrite | None:
        """Guidance in two calls, each of one branch: the second may be left out."""
        if context.call == 0:
            return Rewrite((context,), lambda out: (first_call.hand((1,), out), out)[1])
        if context.call > 1 or first_call.value is None or len(first_call.value) != len(context.sample):
            return None
        cond = first_call.get()
        guided.add(True)
        if delta.value is not None and shares_guidance(context.i, context.steps, config):
            return given(unconditional(cond, context))
        return Rewrite((context,), lambda null: (note(null, cond, context), null)[1])

    def guide(context: StepContext) -> Rewrite | None:
        if context.guided:
            guided.add(True)
            return one_call(context)
        return two_calls(context) if not context.inputs.get("skip_layers") else None

    def decide(context: StepContext) -> None:
        due = computes(context.i, context.steps, config, guided=bool(guided) and config.interval > 1)
        weight = torch.tensor(weight_of(context.i, context.steps, config), dtype=torch.float64)
        for module, reuse in zip(modules, reuses, strict=True):
            reuse.reuse = reuse.ready and not due
            reuse.keeping, reuse.weight = context.i + 2 >= round(config.attention_start * context.steps), weight
            patch.skips((module,) if reuse.reuse else ())
            patch.counts["reused" if reuse.reuse else "computed"] += 1
            patch.tally(len(context.sample) * reuse.reuse, len(context.sample))

    if config.interval > 1:
        patch.rewrite(guide, Claim.GUIDANCE)
    patch.each_call(decide)
    patch.each_run(guided.clear)
    patch.explain(lambda: "the run ends before any step goes without attention or guidance")
    return patch.on()
