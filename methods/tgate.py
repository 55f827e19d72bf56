"""T-GATE - Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models

Wentian Zhang, Haozhe Liu, Jinheng Xie, Francesco Faccio, Mike Zheng Shou, Jürgen Schmidhuber, arXiv 2024. arXiv:2404.02747v1.
Code: HaozheLiu-ST/T-GATE

Idea: what cross-attention gives settles within a few steps, and the text is needed only until then. From the gate on each
cross-attention gives again what it gave at the gate, the mean of both halves of guidance. With the text gone so is guidance:
the model runs on the null prompt alone, which saves half of everything.

Map
    semantics planning    text and guidance, up to the gate m                  apply
    gate                  what is kept shrinks to the mean of both halves      mean_of_halves, drop_guidance
    fidelity improving    cross-attention reused, half of the batch            drop_guidance, apply
    cache                 outputs behind the projection, before the residual   methods._core.cache.Reuse

Departures
    Outputs are kept in every step up to the gate, so that there is one even if another cache skips the module at the gate.
    Of a run without guidance the cache is kept whole. The official code halves it there, unless told of a consistency model,
    and so fails on one image and mixes the prompts of two.
    A step is one evaluation of the model. The official code moves on at every second one of a second-order solver.
    It also gives attentions a forward of its own, which knows no scale of a LoRA and no image adapter; here they keep theirs.
    The official code covers Stable Diffusion, SDXL and PixArt.

Example
    >>> import methods
    >>> from methods import tgate
    >>> pipe = methods.tiny("unet")
    >>> with tgate.apply(pipe, tgate.Config(gate=3)) as patch:
    ...     images = pipe("a red seven", num_inference_steps=5, output_type="np").images
    >>> patch.report()["halved"], patch.report()["reused"]
    (2, 14)
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods._core.cache import Reuse, Slot
from methods._core.context import Rewrite, Rows, StepContext
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["OFF", "TINY", "Config", "apply", "drop_guidance", "mean_of_halves"]


@dataclass(frozen=True, kw_only=True)
class Config:
    gate: int | None = 10     # m, steps with text and guidance (official code: UNets 10, PixArt 8 of 25; LCM 1 of 4); None: all

    def __post_init__(self):
        if self.gate is not None and self.gate < 1:
            raise ValueError(f"gate={self.gate} must be at least 1")


OFF = Config(gate=None)
TINY = Config(gate=3)                                     # the runs of the tests are shorter than the default gate
TUNE = ({"gate": 15}, {"gate": 10}, {"gate": 5})


def mean_of_halves(x: Tensor, rows: Rows) -> Tensor:
    """Gate: the mean of the conditional and the unconditional part of x, whose first axis holds the parts one by one.

    x (parts * b, ...) -> (b, ...); b is a multiple of the prompts where a model folds frames or places into the batch.
    """
    null, cond = (x.unflatten(0, (len(rows.parts), -1))[rows.parts.index(part)] for part in ("null", "cond"))
    return (null + cond) / 2


def drop_guidance(patch: Patch, context: StepContext, slots: list[Slot]) -> Rewrite:
    """Gate: run a guided call for the null prompt alone, which begins with the mean of both halves of what `slots` keep."""
    half, parts = context.only("null"), len(context.rows.parts)
    for slot in slots:
        if slot.value is not None:
            slot.hand(half.branch, mean_of_halves(slot.get(), context.rows))
        slot.value = None
    dropped = (len(context.sample) - len(half.sample)) * len(slots)
    patch.counts["halved"] += 1
    patch.tally(dropped, dropped)
    return Rewrite((half,), lambda null: torch.cat([null] * parts))              # guidance between equals changes nothing


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Reuse cross-attention from the gate on, and drop guidance with it.

    Args:
        target: a diffusers pipeline over a model with cross-attention, or that model, which then runs without guidance.

    Raises:
        ValueError: no cross-attention, a second method that changes guidance, or already applied.
    """
    patch = Patch(target, "tgate")
    if config.gate is None:
        return patch
    patch.require_unperturbed()
    modules = patch.require((block.cross for block in patch.denoiser.blocks if block.cross is not None), "cross-attention")
    reuses = [Reuse(patch.slot) for _ in modules]
    for module, reuse in zip(modules, reuses, strict=True):
        patch.around(module, reuse.around)

    def gate(context: StepContext) -> Rewrite | None:
        late = context.i >= config.gate and context.guided
        return drop_guidance(patch, context, [reuse.slots[0] for reuse in reuses]) if late else None

    def decide(context: StepContext) -> None:
        for module, reuse in zip(modules, reuses, strict=True):
            reuse.reuse = reuse.ready and context.i >= config.gate
            patch.skips((module,) if reuse.reuse else ())
            patch.counts["reused" if reuse.reuse else "computed"] += 1
            patch.tally(len(context.sample) * reuse.reuse, len(context.sample))

    patch.rewrite(gate, Claim.GUIDANCE)
    patch.each_call(decide)
    patch.explain(lambda: "the run ends before the gate")
    return patch.on()
