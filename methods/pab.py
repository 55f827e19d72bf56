"""PAB - Real-Time Video Generation with Pyramid Attention Broadcast

Xuanlei Zhao, Xiaolong Jin, Kai Wang, Yang You, ICLR 2025. arXiv:2408.12588. Code: NUS-HPC-AI-Lab/VideoSys

Idea: what attention gives changes fast in the first and the last steps and hardly in between, spatial attention most,
temporal attention less, cross-attention least. Within the quiet middle each of them is computed once and then broadcast to
the following steps, to the more the less it changes.

Map
    pyramid       ranges n of spatial, temporal and cross-attention          Config, ranges
    broadcast     outputs given again to the steps that follow               methods._core.cache.Reuse
    window        steps between two timesteps, both excluded                 clock, broadcasts
    schedule      compute when the number of the step is a multiple of n     broadcasts
    MLP           of the first blocks, m steps long from each key timestep   broadcasts_mlp

Departures
    Outputs are kept before their gate, which is that of the step at hand. So does the official code on CogVideoX and the
    hook of diffusers everywhere; on Latte and Open-Sora the official code keeps the gated output, and with it an old gate.
    Layer norms still run in front of an attention that is broadcast.
    Steps are numbered by the run, for each branch of guidance. The official code and the hook of diffusers count calls of
    each module: guidance in two calls then broadcasts from one branch to the other.
    The key timesteps of the MLP are those of a run of 50 steps, and do nothing in the official code where a run does not
    meet them; here the step nearest to each is taken. They are off by default, as in the hook of diffusers.
    `by="step"` measures the window in steps instead, on schedules whose timesteps are not evenly spread.
    Sequence parallelism, which saves communication where temporal attention is broadcast, is not part of this module.

Example
    >>> import methods
    >>> from methods import pab
    >>> pipe = methods.tiny("dit")
    >>> with pab.apply(pipe) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["computed"], patch.report()["broadcast"]
    (42, 18)
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from methods._core.cache import Reuse
from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.patch import Patch, per_denoiser

__all__ = ["LATTE_MLP", "OFF", "Config", "apply", "broadcasts", "broadcasts_mlp", "clock", "ranges"]

LATTE_MLP = (720.0, 640.0, 560.0, 480.0, 400.0)       # key timesteps of the official code for Latte


@dataclass(frozen=True, kw_only=True)
class Config:
    spatial: int = 2              # n, steps that one output serves: of self-attention within a frame, or over all tokens
    temporal: int = 3             # n of self-attention between frames (official code: Latte 3, Open-Sora 4)
    cross: int = 6                # n of cross-attention
    window: tuple[float, float] = (100.0, 800.0)      # timesteps (official code: Latte; CogVideoX 100, 850)
    by: str = "timestep"          # in what the window is given: "timestep", or "step", evenly from 1000 to 0
    mlp: tuple[float, ...] = ()   # key timesteps of MLPs, on the scale of `by` (LATTE_MLP)
    mlp_blocks: int = 5           # of each kind, spatial and temporal, from the first
    mlp_skip: int = 2             # m, steps behind a key that reuse its MLPs

    def __post_init__(self):
        for name in ("spatial", "temporal", "cross"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("mlp_blocks", "mlp_skip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.by not in ("timestep", "step"):
            raise ValueError(f"by={self.by!r} must be 'timestep' or 'step'")


OFF = Config(spatial=1, temporal=1, cross=1)
TUNE = ({}, {"spatial": 4})


def ranges(block: Block, config: Config) -> Iterator[tuple[nn.Module, int]]:
    """Pyramid: the attentions of a block, each with its range n."""
    for module in block.self_attentions:
        yield module, config.temporal if block.temporal else config.spatial
    if block.cross is not None:
        yield block.cross, config.cross


def clock(times: tuple[float, ...], by: str) -> list[float]:
    """The time of each step, in which windows and keys are given: its timestep, or from 1000 (T-1) / T evenly to 0."""
    return list(times) if by == "timestep" else [1000 * left / len(times) for left in reversed(range(len(times)))]


def broadcasts(i: int, time: float, n: int, window: tuple[float, float]) -> bool:
    """Whether step `i` at `time` is given the last output of an attention of range n."""
    return i % n != 0 and window[0] < time < window[1]


def broadcasts_mlp(times: list[float], keys: tuple[float, ...], skip: int) -> list[bool]:
    """Whether each step is one of the `skip` behind a key step, and no key step itself. A key beyond the run has no step."""
    inside = [key for key in keys if min(times) <= key <= max(times)]
    first = {min(range(len(times)), key=lambda i: abs(times[i] - key)) for key in inside}
    return [i not in first and any(start < i <= start + skip for start in first) for i in range(len(times))]


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Broadcast the outputs of attentions to following steps, within the window.

    Args:
        target: a diffusers pipeline over any model this library knows.

    Raises:
        ValueError: a bare model (the window needs the timesteps of a run), ranges that reach no attention of this model, or
            already applied.
    """
    patch = Patch(target, "pab")
    mlps = config.mlp and config.mlp_blocks and config.mlp_skip
    if max(config.spatial, config.temporal, config.cross) == 1 and not mlps:
        return patch
    patch.require_pipeline()
    blocks = patch.denoiser.blocks
    attentions = [(module, n, Reuse(patch.slot)) for block in blocks for module, n in ranges(block, config) if n > 1]
    kinds = [[block for block in blocks if block.temporal == temporal] for temporal in (False, True)]
    few = [block.ff for kind in kinds for block in kind[:config.mlp_blocks] if block.ff is not None] if mlps else []
    feeds = [(module, Reuse(patch.slot)) for module in few]
    patch.require([*attentions, *feeds], "attention or MLP that these ranges concern")
    for module, *_, reuse in (*attentions, *feeds):
        patch.around(module, reuse.around)
    held: list[bool] = []                                         # whether MLPs are broadcast, step by step

    def decide(context: StepContext) -> None:
        times = clock(context.times, config.by)
        held[:] = held or broadcasts_mlp(times, config.mlp, config.mlp_skip)
        i, time = context.i, times[context.i]
        plan = [(module, broadcasts(i, time, n, config.window), reuse) for module, n, reuse in attentions]
        for module, again, reuse in plan + [(module, held[i], reuse) for module, reuse in feeds]:
            reuse.reuse = again and reuse.ready
            patch.skips((module,) if reuse.reuse else ())
            patch.counts["broadcast" if reuse.reuse else "computed"] += 1
            patch.tally(reuse.reuse, 1)

    def release(context: StepContext, _: Tensor) -> None:
        """An MLP is kept no longer than it is broadcast."""
        for slot in (slot for _, reuse in feeds for slot in reuse.slots if not any(held[context.i + 1:context.i + 2])):
            slot.value = None

    patch.each_call(decide)
    patch.after_call(release)
    patch.each_run(held.clear)
    patch.explain(lambda: f"every step of this run is outside the window {config.window} or a multiple of the ranges")
    return patch.on()
