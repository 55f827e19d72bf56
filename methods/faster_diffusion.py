"""Faster Diffusion - Faster Diffusion: Rethinking the Role of the Encoder for Diffusion Model Inference

Senmao Li, Taihang Hu, Joost van de Weijer, Fahad Shahbaz Khan, Tao Liu, Linxuan Li, Shiqi Yang, Yaxing Wang, Ming-Ming Cheng,
Jian Yang, NeurIPS 2024. arXiv:2312.09608. Code: hutaiHang/Faster-Diffusion

Idea: what the encoder of a UNet gives changes little over the steps, what the decoder gives changes a lot. Key steps run all;
the steps up to the next key step decode the features of that step, each with its own timestep. Their latents do not enter the
model, so all of them can be decoded in one batch. A little of the initial noise is added late, against loss of texture.

Map
    key steps             by lists, by triangular numbers, or every n-th             key_steps
    encoder propagation   skip and middle features of the last key step again        _Encoder
    parallel decoding     one batch for all steps up to the next key step            apply, tiled
    noise injection       z + alpha z_T before a solver step, below tau              _Injection
    DiT                   the first 18 of 28 blocks are the encoder                  encoder

Departures
    A key step is decoded alone, the steps behind it together; the official code puts the key step into that batch as well.
    `together` bounds the batch, and 1 decodes step by step, as the serial mode of the official code.
    Lists of key steps are those for 50, 75 or 100 steps, drawn out or in for another number. The official code fits none else.
    All inputs but the timestep are those of the key step, residuals of a ControlNet among them. Their ControlNet still runs.
    The scale that a solver gives its input is that of the key step; the official code forgets it when it decodes in parallel.
    Each branch of guidance is tiled by itself; the official code cuts any batch in two, also one without guidance.
    On DiT the official code adds the noise behind a step of the solver.
    Layers that bring the latent in, and that add to the timestep, still run.
    The official code covers Stable Diffusion, DeepFloyd-IF, two video UNets and DiT.

Example
    >>> from methods import faster_diffusion
    >>> sorted(faster_diffusion.key_steps(50, "50ls"))
    [0, 1, 2, 3, 5, 10, 15, 25, 35]
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from methods._core.cache import Passed, Reuse, Slot
from methods._core.context import Rewrite, Rows, StepContext, given
from methods._core.denoiser import Block, Denoiser
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["OFF", "Config", "apply", "encoder", "key_steps", "tiled"]

SPAN = "span"                         # name of the branch that decodes several steps
LIST = (0, 1, 2, 3, 5, 10, 15, 25, 35)
SCHEDULES = ("auto", "50ls", "75ls", "100ls", "pro", "dit")


@dataclass(frozen=True, kw_only=True)
class Config:
    keys: str | int = "auto"          # one of SCHEDULES, or every so many steps (official code: 4 for community models)
    together: int = 15                # steps that one batch decodes at most; 1: one by one
    share: float = 18 / 28            # of a transformer's blocks, from the first, that are its encoder
    noise: float = 0.003              # alpha, of the initial noise that is added before a step of the solver; 0: none
    below: float | None = None        # tau, in steps with a smaller timestep / 1000; None: 0.5 for a UNet, else 0.3

    def __post_init__(self):
        if self.keys not in SCHEDULES and not (isinstance(self.keys, int) and self.keys > 0):
            raise ValueError(f"keys={self.keys!r} must be a number of steps or one of {', '.join(SCHEDULES)}")
        if self.together < 1:
            raise ValueError(f"together={self.together} must be at least 1")
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share} outside [0, 1)")


OFF = Config(keys=1, noise=0.0)


def key_steps(steps: int, keys: str | int) -> set[int]:
    """The steps that run all, the first among them.

    "50ls" has 9 of 50, "75ls" 31 of 75, "100ls" 40 of 100; "pro" those i of which 9 + 8 i is a square; "dit" all but the first
    six of every ten, up to 92 % of the run; a number every so many.
    """
    if isinstance(keys, int):
        return set(range(0, steps, keys))
    if keys == "50ls":
        return {i for i in (round(key * steps / 50) for key in LIST) if i < steps}
    if keys == "pro":
        return {i for i in range(steps) if math.isqrt(9 + 8 * i) ** 2 == 9 + 8 * i}
    if keys == "dit":
        return {i for i in range(steps) if i == 0 or i > 0.916 * steps or i % 10 >= 6}
    begin, end = (10 / 75, 65 / 75) if keys == "75ls" else (0.1, 0.85)
    return {i for i in range(steps) if i < begin * steps or i > end * steps or i % 5 == 0}


def tiled(value: Any, rows: Rows, steps: int) -> Any:
    """Parallel decoding: a value for so many steps, whose first axis holds the parts of guidance, in each of them step by step.

    Anything else than a tensor over the batch, or dicts, lists and tuples with such, stays as it is.
    """
    if isinstance(value, dict):
        return {name: tiled(each, rows, steps) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(tiled(each, rows, steps) for each in value)
    if torch.is_tensor(value) and value.ndim and len(value) == len(rows.parts) * rows.prompts:
        return _of_each(value, len(rows.parts), steps)
    return value


def encoder(denoiser: Denoiser, share: float) -> list[nn.Module | Block]:
    """What key steps alone run: the way down and the middle of a UNet, or the first blocks of a transformer."""
    if denoiser.unet:
        return [stage.module for stage in denoiser.unet if stage.side != "up"]
    return list(denoiser.blocks[:round(share * len(denoiser.blocks))])


class _Encoder(Reuse):
    """Around a stage of a UNet or the last block of an encoder: keeps what it gives, and gives it to each step of a span."""

    steps, rows = 1, Rows(("cond",), 1)           # set by the host

    def give(self, slot: Slot) -> Any:
        return _of_each(slot.get(), len(self.rows.parts), self.steps)


def _of_each(x: Any, parts: int, steps: int) -> Any:
    if isinstance(x, tuple):
        return tuple(_of_each(each, parts, steps) for each in x)
    return x if x is None else x.unflatten(0, (parts, -1)).repeat(1, steps, *[1] * (x.ndim - 1)).flatten(0, 1)


class _Injection:
    """Noise injection: adds alpha z_T to the latent that a step of the solver starts from, where t / 1000 < tau."""

    def __init__(self, patch: Patch, noise: float, below: float):
        self.patch, self.noise, self.below = patch, noise, below
        self.first: Tensor | None = None          # z_T

    def set_timesteps(self, call: Callable, *args, **kwargs) -> Any:
        self.first = None
        return call(*args, **kwargs)

    def step(self, call: Callable, model_output: Tensor, timestep: Any, sample: Tensor, *args, **kwargs) -> Any:
        self.first = sample if self.first is None else self.first
        if float(timestep) / 1000 < self.below:
            self.patch.counts["injected"] += 1
            sample = sample + self.noise * self.first
        return call(model_output, timestep, sample, *args, **kwargs)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Run the encoder in key steps only, and decode the steps between from its features.

    Args:
        target: a diffusers pipeline over any model this library knows.

    Raises:
        ValueError: a bare model (the schedule needs the number of steps), too small a share, or already applied.
    """
    patch = Patch(target, "faster_diffusion")
    if config.keys == 1 and config.noise == 0:
        return patch
    patch.require_pipeline()
    unet = bool(patch.denoiser.unet)
    row = patch.denoiser.row
    able = row.by_sample and not (row.unet and row.grid.frames) and all(
        block.row.sequence_axis == 1 for block in patch.denoiser.blocks)
    parts = patch.require(encoder(patch.denoiser, config.share) if able else (), f"encoder of share={config.share}")
    modules = [part.module if isinstance(part, Block) else part for part in parts]
    whole = len(patch.denoiser.unet or patch.denoiser.blocks)
    kept = [_Encoder(patch.slot) for _ in (parts if unet else parts[-1:])]
    passed = [Passed(part) for part in parts[:-1] if isinstance(part, Block)]
    for module, around in zip(modules, (*passed, *kept), strict=True):
        patch.around(module, around.around)
    inputs, decoded = patch.slot(), patch.slot()          # of the last key step; outputs of the steps to come, by number
    keys: set[int] = set()
    schedule = ("50ls" if unet else "dit") if config.keys == "auto" else config.keys

    def decode(context: StepContext) -> Rewrite | None:
        keys.update(() if keys else key_steps(context.steps, schedule))
        waiting = decoded.value or {}
        if context.i in waiting:
            out = waiting.pop(context.i)
            patch.counts["decoded"] += 1
            return given(out.to(context.sample.dtype))
        ready = inputs.value is not None and all(each.ready for each in kept)
        if context.i in keys or context.fresh or not ready:
            inputs.value = context.inputs
            return None
        last = min([key for key in keys if key > context.i] + [context.steps, context.i + config.together])
        return span(context, list(range(context.i, last)))

    def span(context: StepContext, steps: list[int]) -> Rewrite:
        rows, denoiser, n = context.rows, context.denoiser, len(steps)
        time = torch.as_tensor(context.inputs[denoiser.row.time])
        times = torch.tensor([context.told[i] for i in steps], dtype=torch.float64)
        own = times.to(time).repeat_interleave(rows.prompts).repeat(len(rows.parts))
        whole = {*denoiser.row.cut, *denoiser.row.shared}             # the same for all samples
        tiles = {name: value if name in whole else tiled(value, rows, n) for name, value in inputs.value.items()}
        made = context.replace(tiles | {denoiser.row.time: own}, branch=f"{SPAN}{n}")
        for slot in (slot for each in kept for slot in each.slots):
            slot.hand(made.branch, slot.get())

        def finish(out: Tensor) -> Tensor:
            by_step = out.unflatten(0, (len(rows.parts), n, -1)).unbind(1)
            outs = dict(zip(steps, (x.flatten(0, 1) for x in by_step), strict=True))
            patch.counts["decoded"] += 1
            first = outs.pop(steps[0])
            decoded.value = outs
            return first

        return Rewrite((replace(made, rows=Rows(rows.parts, rows.prompts * n)),), finish)

    def decide(context: StepContext) -> None:
        spans = isinstance(context.branch[-1], str) and context.branch[-1].startswith(SPAN) and all(each.ready for each in kept)
        n = int(context.branch[-1].removeprefix(SPAN)) if spans else 1
        for each in kept:
            each.reuse, each.steps, each.rows = spans, n, context.rows
        for block in passed:
            block.over = spans
        patch.skips(modules if spans else ())
        patch.counts["batches" if spans else "keys"] += 1
        patch.tally(len(context.sample) * len(modules) * spans, len(context.sample) * whole)

    if config.keys != 1:
        patch.rewrite(decode, Claim.SKIP)
    if config.noise:
        patch.solve(_Injection(patch, config.noise, (0.5 if unet else 0.3) if config.below is None else config.below))
    patch.each_call(decide)
    patch.each_run(keys.clear)
    patch.explain(lambda: "every step of this run is a key step")
    return patch.on()
