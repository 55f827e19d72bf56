"""T-GATE v2 - Faster Diffusion via Temporal Attention Decomposition

Haozhe Liu, Wentian Zhang, Jinheng Xie, Francesco Faccio, Mengmeng Xu, Tao Xiang, Mike Zheng Shou, Juan-Manuel Perez-Rua,
Jürgen Schmidhuber, TMLR 2025. arXiv:2404.02747v2. Code: HaozheLiu-ST/T-GATE

Idea: the text plans the image in the early steps and hardly matters later, for self-attention it is the other way round. Up
to a gate self-attention is computed every k-th step only; from the gate on cross-attention stays what it was, and with the
text gone so is guidance: the model runs on the null prompt alone.

Map
    semantics planning     self-attention up to the gate, every k-th step         computes
    gate                   caches shrink to the mean of both guidance halves      methods.tgate.mean_of_halves
    fidelity improving     cross-attention reused, one half of the batch          apply, methods.tgate.drop_guidance
    fidelity improving     self-attention every f-th step                         computes
    cache                  outputs behind the projection, before the residual     methods._core.cache.Reuse

Departures
    Outputs are kept wherever they are computed, so that the gate finds one even if another cache skipped the module then.
    Of a run without guidance the cache is kept whole. The official code halves it there, unless told of a consistency model,
    and so fails on one image and mixes the prompts of two.
    A step is one evaluation of the model. The official code moves on at every second one of a second-order solver.
    It also gives attentions a forward of its own, which knows no scale of a LoRA and no image adapter; here they keep
    theirs. Its DeepCache variant for SDXL means to switch the reuse of self-attention off and, by a misspelt name, does not;
    here `sp_interval=1` does.
    The official code covers Stable Diffusion, SDXL, PixArt and SVD. On Latte temporal self-attention is treated as spatial.

Example
    >>> import methods
    >>> from methods import tgate_v2
    >>> pipe = methods.tiny("unet")
    >>> with tgate_v2.apply(pipe, tgate_v2.Config(gate=3, sp_interval=2, warm_up=0)) as patch:
    ...     images = pipe("a red seven", num_inference_steps=5, output_type="np").images
    >>> patch.report()["halved"], patch.report()["reused"]
    (2, 21)
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from methods._core.cache import Reuse
from methods._core.context import Rewrite, StepContext
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim
from methods.tgate import drop_guidance

__all__ = ["OFF", "TINY", "Config", "apply", "computes"]


@dataclass(frozen=True, kw_only=True)
class Config:
    gate: int | None = 10     # g, steps with text and guidance (official code: SDXL 10, PixArt 15 of 25); None: all
    sp_interval: int = 5      # k, of self-attention before the gate (official code: SDXL 5, PixArt 3); 1: always computed
    fi_interval: int = 1      # f, of self-attention from the gate on
    warm_up: int = 2          # w, the first step whose self-attention is reused

    def __post_init__(self):
        if self.gate is not None and self.gate < 1:
            raise ValueError(f"gate={self.gate} must be at least 1")
        for name in ("sp_interval", "fi_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.warm_up < 0:
            raise ValueError(f"warm_up={self.warm_up} must not be negative")


OFF = Config(gate=None, sp_interval=1)
TINY = Config(gate=3, sp_interval=2, warm_up=0)           # the runs of the tests are shorter than the default gate


def computes(i: int, config: Config) -> bool:
    """Whether step `i` computes self-attention: in the warm-up, at multiples of k, just before the gate, at multiples of f."""
    if config.gate is None or i < config.gate - 1:
        return i <= config.warm_up or i % config.sp_interval == 0
    return i == config.gate - 1 or i % config.fi_interval == 0


class _Attention(NamedTuple):
    module: nn.Module
    cross: bool
    reuse: Reuse


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Reuse self-attention before the gate, cross-attention from there on, and drop guidance with it.

    Args:
        target: a diffusers pipeline over a model with cross-attention, or that model, which then runs without guidance.

    Raises:
        ValueError: no cross-attention, a second method that changes guidance, or already applied.
    """
    patch = Patch(target, "tgate_v2")
    if config.gate is None and config.sp_interval == 1:
        return patch
    patch.require_unperturbed()
    blocks = patch.denoiser.blocks
    modules = [(block.cross, True) for block in blocks if block.cross is not None]
    patch.require(modules, "cross-attention")
    if config.gate is None:
        modules.clear()
    if config.sp_interval > 1 or config.fi_interval > 1:
        modules += [(block.attn, False) for block in blocks]
    attentions = [_Attention(module, cross, Reuse(patch.slot)) for module, cross in modules]
    for attention in attentions:
        patch.around(attention.module, attention.reuse.around)

    def gate(context: StepContext) -> Rewrite | None:
        late = context.i >= config.gate and context.guided
        return drop_guidance(patch, context, [attention.reuse.slots[0] for attention in attentions]) if late else None

    def decide(context: StepContext) -> None:
        early = config.gate is None or context.i < config.gate
        for module, cross, reuse in attentions:
            reuse.reuse = reuse.ready and not (early if cross else computes(context.i, config))
            patch.skips((module,) if reuse.reuse else ())
            patch.counts["reused" if reuse.reuse else "computed"] += 1
            patch.tally(len(context.sample) * reuse.reuse, len(context.sample))

    if config.gate is not None:
        patch.rewrite(gate, Claim.GUIDANCE)
    patch.each_call(decide)
    patch.explain(lambda: "the run ends before any attention is reused")
    return patch.on()
