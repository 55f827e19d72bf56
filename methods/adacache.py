"""AdaCache - Adaptive Caching for Faster Video Generation with Diffusion Transformers

Kumara Kahatapitiya, Haozhe Liu, Sen He, Ding Liu, Menglin Jia, Chenyang Zhang, Michael S. Ryoo, Tian Xie, ICCV 2025.
arXiv:2411.02397. Code: AdaCache-DiT/AdaCache

Idea: some videos can be drawn in fewer steps than others. Each time the blocks are computed, the residual of one of them in
the middle is compared with what it was before; a codebook says for how many steps, given that change, all blocks may be left
out and what they added be added again. Much motion between frames makes the change count for more.

Map
    c = |r' - r|_1 / |r'|_1 / tau                                  norms, change
    tau, the rate of the first threshold above c                   rate
    m = (motion between frames / 0.385)^8                          frame_norms, motion
    c (m + |mg|), mg = 10 (m - m') / tau                           regularised
    compute steps 1, 2, the last two, and each tau behind one      _Pace
    x + r in place of a block                                      methods._core.cache.Delta

Departures
    The official code is for Open-Sora. Here blocks that follow each other have one residual, the sum of theirs. The monitored
    block is the middle temporal one, or the middle one where there are none; what is compared is its self-attention behind the
    gate, or where no module stands between attention and MLP (single-stream blocks) the whole block. Of CogVideoX and of
    two streams it is the image's.
    Codebooks hold for one model, number of steps and metric: `observe` and `codebook` make one, the thresholds being evenly
    spaced quantiles of the changes seen. That is a choice made here; the authors read theirs off curves.
    Norms are summed over the calls of a step, so that guidance in two calls gives the schedule of guidance in one.
    m' is forgotten with the run; the official code takes it along into the next video.

Example
    >>> import methods
    >>> from methods import adacache
    >>> pipe, changes = methods.tiny("dit"), []
    >>> with adacache.observe(pipe, changes):
    ...     images = pipe([3, 1], num_inference_steps=10, output_type="np").images
    >>> with adacache.apply(pipe, adacache.Config(codebook=adacache.codebook(changes, (4, 2, 1)))) as patch:
    ...     images = pipe([3, 1], num_inference_steps=10, output_type="np").images
    >>> patch.report()["computed"] + patch.report()["reused"]
    10
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods._core.cache import Delta, chains
from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["CODEBOOKS", "OFF", "TINY", "Config", "apply", "change", "codebook", "frame_norms", "motion", "norms", "observe",
           "rate", "regularised"]

Codebook = tuple[tuple[float, int], ...]          # (threshold of c, rate tau), thresholds rising; the last rate holds beyond

CODEBOOKS: Mapping[str, Codebook] = {             # of the official code, for Open-Sora 1.2
    "fast": ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1)),              # 30 steps
    "slow": ((0.08, 3), (0.16, 2), (0.24, 1), (0.32, 1), (0.40, 1), (1.0, 1)),              # 30 steps
    "long": ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3)),            # 100 steps
}


@dataclass(frozen=True, kw_only=True)
class Config:
    codebook: str | Codebook = "fast"             # a name in CODEBOOKS, or (threshold, rate) pairs
    monitored: tuple[int, ...] = ()               # numbers of blocks, among the temporal ones if there are any; (): middle
    motion: bool = False                          # motion regularisation (MoReg), for videos
    window: tuple[int, int] = (4, 26)             # steps, from 1, in which m is taken; (10, 90) for 100
    strides: tuple[int, ...] = (1,)               # of the frames that are compared
    gradient: float = 10.0                        # weight of mg

    def __post_init__(self):
        if isinstance(self.codebook, str):
            if self.codebook not in CODEBOOKS:
                raise ValueError(f"codebook={self.codebook!r} must be one of {', '.join(CODEBOOKS)}, or pairs")
            object.__setattr__(self, "codebook", CODEBOOKS[self.codebook])
        object.__setattr__(self, "codebook", tuple(map(tuple, self.codebook)))
        thresholds, rates = zip(*self.codebook, strict=True) if self.codebook else ((), ())
        if not rates or min(rates) < 1 or list(thresholds) != sorted(thresholds):
            raise ValueError(f"codebook={self.codebook} must be pairs of rising thresholds and rates of at least 1")
        if not self.strides or min(self.strides) < 1:
            raise ValueError(f"strides={self.strides} must be at least 1")


OFF = Config(codebook=((1.0, 1),))
TINY = Config(codebook=((10.0, 3),))              # random weights change more from step to step


def rate(c: float, codebook: Codebook) -> int:
    """tau, of the first threshold above c; the last one where there is none."""
    return next((tau for threshold, tau in codebook if c < threshold), codebook[-1][1])


def norms(new: Tensor, old: Tensor) -> Tensor:
    """|old - new|_1 and |old|_1 of two residuals of one shape, over all axes, -> (2,) float32."""
    new, old = new.float(), old.float()
    return torch.stack([(old - new).abs().sum(), old.abs().sum()])


def change(sums: Tensor, tau: int) -> float:
    """c of `norms` summed over the calls of a step (M, 2), mean over M monitored blocks; tau is the rate that led here."""
    return float((sums[:, 0] / sums[:, 1]).mean()) / tau


def frame_norms(r: Tensor, stride: int) -> Tensor:
    """|r[i:] - r[:-i]|_1 and |r[i:]|_1 + |r[:-i]|_1 for frames a stride i apart: r (B, F, ...) -> (2,) float32."""
    later, earlier = r[:, stride:].float(), r[:, :-stride].float()
    return torch.stack([(later - earlier).abs().sum(), later.abs().sum() + earlier.abs().sum()])


def motion(sums: Tensor) -> float:
    """m of `frame_norms` summed over the calls of a step (S, 2), mean over S strides, in double precision."""
    return (float((sums[:, 0] / sums[:, 1]).mean()) / 0.385) ** 8


def regularised(c: float, m: float, before: float, tau: int, gradient: float) -> float:
    """c (m + |mg|): `before` is m at the compute step before. The official code takes |mg|, the paper mg."""
    return c * (m + abs(gradient * (m - before) / tau))


def codebook(changes: Sequence[float], rates: Sequence[int]) -> Codebook:
    """A codebook that gives each of the falling `rates` to as many of the changes observed."""
    shares = np.arange(1, len(rates) + 1) / len(rates)
    return tuple(zip(np.quantile(changes, shares).tolist(), rates, strict=True))


class _Monitor:
    """Looks at one block: what its self-attention, behind the gate, adds to the image tokens."""

    def __init__(self, patch: Patch, block: Block):
        self.block, self.slot = block, patch.slot()         # the residual at the last compute step
        self.input: Tensor | None = None
        self.residual: Tensor | None = None
        behind = (getattr(block.module, name, None) for name in ("norm3", "norm2"))
        self.behind = block.cross or next((module for module in behind if module is not None), None)
        patch.around(block.module, self.look, Claim.LOOK)
        if self.behind is not None:                         # it is given the stream to which the attention has been added
            patch.around(self.behind, self.look_behind, Claim.LOOK)

    def look(self, forward, *args, **kwargs):
        self.input, _ = self.block.streams(args, kwargs)
        out = forward(*args, **kwargs)
        if self.behind is None:
            self.residual = self.block.split(out)[0] - self.input
        return out

    def look_behind(self, forward, x: Tensor, *args, **kwargs):
        self.residual = x - self.input
        return forward(x, *args, **kwargs)

    def by_frame(self, r: Tensor, context: StepContext) -> Tensor:
        """(B, F, ...) of a residual in which frames lie in the batch, along the tokens, or are the tokens."""
        frames, *_ = context.grid(self.block)
        batch = len(context.sample)
        return r if self.block.temporal else r.reshape(batch, max(frames, len(r) // batch), -1, r.shape[-1])


class _Pace:
    """When to compute, for one run. All calls of a compute step are heard before the next step asks."""

    def __init__(self, config: Config):
        self.config = config
        self.reset()

    def reset(self) -> None:
        self.last, self.rate, self.motion = -1, 1, 1.0      # the last compute step, tau and m since

    def due(self, context: StepContext) -> bool:
        if due := context.i == self.last or context.i >= self.last + self.rate or context.left < 2:
            if context.i != self.last:
                self.last, self.tau, self.before = context.i, self.rate, self.motion
                self.blocks = self.frames = torch.zeros(())
        return due

    def hear(self, blocks: Tensor, frames: Tensor | None) -> float:
        """One call of this compute step: `norms` (M, 2), and the `frame_norms` (S, 2) of the last monitored block. -> c"""
        self.blocks = self.blocks + blocks.double().cpu()
        c = change(self.blocks, self.tau)
        if frames is not None:
            self.frames = self.frames + frames.double().cpu()
            low, high = self.config.window
            self.motion = motion(self.frames) if low <= self.last + 1 <= high else 1.0
            c = regularised(c, self.motion, self.before, self.tau, self.config.gradient)
        self.rate = rate(c, self.config.codebook)
        return c


def _put(patch: Patch, config: Config, tell: Callable[[float], None]) -> Patch:
    patch.require_pipeline()
    blocks = patch.require(patch.denoiser.chain, "chain of transformer blocks (on a UNet use deepcache)")
    if config.motion and patch.denoiser.row.grid.frames is None:
        raise ValueError(f"{patch.name}: motion is that of frames, and a {type(patch.model).__name__} draws none")
    found = [block for block in blocks if block.temporal] or blocks
    chosen = config.monitored or ((len(found) - 1) // 2,)
    if not all(0 <= n < len(found) for n in chosen):
        raise ValueError(f"{patch.name}: monitored={config.monitored} must be numbers of blocks, 0 to {len(found) - 1}")
    monitors = [_Monitor(patch, found[n]) for n in chosen]
    deltas = [Delta(patch.slot(), chain) for chain in chains(blocks)]
    for place in (place for delta in deltas for place in delta.arounds()):
        patch.around(*place)
    pace = _Pace(config)

    def decide(context: StepContext) -> None:
        due = pace.due(context) or not all(delta.ready for delta in deltas) or context.denoiser.adds_between(context.inputs)
        for delta in deltas:
            delta.reuse = not due
        patch.skips(() if due else (block.module for block in blocks))
        patch.counts["computed" if due else "reused"] += 1
        patch.tally(not due, 1)

    def after(context: StepContext, _: Tensor) -> None:
        residuals = [monitor.residual for monitor in monitors]
        for monitor in monitors:
            monitor.input = monitor.residual = None
        if context.i != pace.last or any(residual is None for residual in residuals):      # no compute step, or passed over
            return
        if all(monitor.slot.value is not None for monitor in monitors):
            moved = [monitors[-1].by_frame(residuals[-1], context)] if config.motion else []
            frames = [frame_norms(each, stride) for each in moved for stride in config.strides]
            blocks = [norms(new, monitor.slot.get()) for new, monitor in zip(residuals, monitors, strict=True)]
            tell(pace.hear(torch.stack(blocks), torch.stack(frames) if frames else None))
        for residual, monitor in zip(residuals, monitors, strict=True):
            monitor.slot.keep(residual)

    patch.each_call(decide)
    patch.after_call(after)
    patch.each_run(pace.reset)
    patch.explain(lambda: "no change was small enough for the codebook, or all steps lie beside the first and the last")
    return patch.on()


def observe(target: Any, changes: list[float], config: Config = Config()) -> Patch:
    """Run a transformer as it is, and append to `changes` the c of every step from the second on."""
    return _put(Patch(target, "adacache_observe", edits=True), replace(config, codebook=OFF.codebook), changes.append)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Leave out all blocks for as many steps as the codebook says, adding what they added before.

    Args:
        target: a diffusers pipeline over a diffusion transformer.

    Raises:
        ValueError: a bare model (the last two steps always compute), a UNet, no such block to monitor, motion of a model that
            draws no frames, or already applied.
    """
    patch = Patch(target, "adacache")
    if all(tau == 1 for _, tau in config.codebook):
        return patch
    return _put(patch, config, lambda c: None)
