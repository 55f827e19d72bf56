"""Adaptive Guidance - Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models

Angela Castillo, Jonas Kohler, Juan C. Pérez, Juan Pablo Pérez, Albert Pumarola, Bernard Ghanem, Pablo Arbeláez, Ali Thabet,
AAAI 2025. arXiv:2312.12487.

Idea: guidance costs a second prediction in every step, and late in sampling the two hardly differ. Once the conditional and
the unconditional prediction of a sample point the same way, guidance stops, and the rest of the run is conditional alone.

Map
    gamma_t             cosine of both predictions, over all entries of a sample    similarity
    gamma_t >= gamma    from here on the conditional prediction alone               reached
    guided step         two predictions                                             apply
    step behind it      one prediction, where guidance has no effect                apply

Departures
    There is no official code, and the text of the paper was not at hand: the rule is that of accounts of it.
    The step that reaches the threshold gives the conditional prediction, too, though both are there. A node for ComfyUI,
    asagi4/ComfyUI-Adaptive-Guidance, guides it once more, takes one cosine for the whole batch, and compares denoised samples.
    Each sample of a batch stops for itself, and the unconditional branch is left out once all have: a batch gives what its
    samples give alone, and costs what the slowest does.
    The cosine is that of what the model predicts, noise or velocity, without a learned variance and without references. At high
    noise predictions of noise are close to the input and so to each other: the default threshold is that of the authors'
    model, and `observe` tells what another model has.
    Where the unconditional branch is left out, the pipeline gets the conditional prediction in its place, and what it combines
    is that one, up to rounding for a pipeline that rescales it. Guidance by skipped layers goes on.
    A guider that is not plain classifier-free guidance is refused: with a momentum it goes on between equal predictions.
    Of several models of a pipeline each looks for itself; one that is unconditional by itself runs in every step.
    LinearAG, which replaces unconditional predictions by combinations of earlier ones, fitted on stored runs, is not here.

Example
    >>> import methods
    >>> from methods import adaptive_guidance
    >>> pipe = methods.tiny("dit")
    >>> with adaptive_guidance.apply(pipe, adaptive_guidance.Config(threshold=-1.0)) as patch:
    ...     images = pipe([3], num_inference_steps=10, output_type="np").images
    >>> patch.report()["guided"], patch.report()["alone"], patch.report()["saved"]
    (1, 9, 0.45)
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods._core.context import Rewrite, StepContext, given
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["OFF", "TINY", "Config", "apply", "observe", "reached", "similarity"]


@dataclass(frozen=True, kw_only=True)
class Config:
    threshold: float | None = 0.991       # gamma, a cosine, of the authors' latent diffusion model; None: guidance never stops

    def __post_init__(self):
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} is no cosine, which lies in [-1, 1]")


OFF = Config(threshold=None)
TINY = Config(threshold=-1.0)             # predictions of random weights need not come closer
TUNE = ({"threshold": 0.999}, {"threshold": 0.991}, {"threshold": 0.97}, {"threshold": 0.9})


def similarity(cond: Tensor, null: Tensor) -> Tensor:
    """gamma of predictions (B, ...): the cosine over all entries of each sample, (B,), in single precision or better."""
    wide = torch.promote_types(cond.dtype, torch.float32)
    return F.cosine_similarity(cond.flatten(1).to(wide), null.flatten(1).to(wide), dim=1)


def reached(before: list[bool], similarities: list[float], threshold: float) -> list[bool]:
    """Which samples are done with guidance, given those that were: once reached, the threshold stays reached."""
    return [done or gamma >= threshold for done, gamma in zip(before, similarities, strict=True)]


def _predicted(out: Tensor, context: StepContext) -> Tensor:
    """What of an output moves the latent: no variance behind its channels, no references behind its tokens."""
    return out[:, :context.sample.shape[1] - context.behind]


def _require_plain_guider(patch: Patch) -> None:
    """
    Raises:
        ValueError: a guider of the pipeline combines predictions in another way, such as with a momentum, and need not end
            where they are equal. When it runs, too, for a guider that was exchanged.
    """
    def check(*_: Any) -> None:
        for name in ("guider", "ocr_guider"):
            guider = getattr(patch.pipe, name, None)
            if guider is not None and type(guider).__name__ != "ClassifierFreeGuidance":
                raise ValueError(f"{patch.name} ends classifier-free guidance, and the {name} of this pipeline is of type "
                                 f"{type(guider).__name__}")

    check()
    patch.each_call(check)


def _guide(patch: Patch, stopped: Callable[[], bool], settle: Callable[[Tensor, Tensor, StepContext], Tensor]) -> None:
    """Meet guidance in one batch or in two calls, of which the first is conditional.

    Args:
        stopped: whether the unconditional branch is left out.
        settle: (conditional, unconditional prediction, context) -> what takes the place of the unconditional one.
    """
    first: list[Tensor] = []                              # the conditional prediction, between the two calls of a step

    def one_call(context: StepContext) -> Rewrite:
        rows, alone = context.rows, stopped()
        patch.counts["alone" if alone else "guided"] += 1
        patch.tally(alone, 2)
        if alone:
            return Rewrite((context.only("cond"),), lambda cond: torch.cat([cond, cond]))

        def both(out: Tensor) -> Tensor:
            parts = {part: rows.take(out, part) for part in rows.parts}
            null = settle(parts["cond"], parts["null"], context)
            return out if null is parts["null"] else torch.cat([(parts | {"null": null})[part] for part in rows.parts])
        return Rewrite((context,), both)

    def remember(out: Tensor) -> Tensor:
        first[:] = [out]
        return out

    def guide(context: StepContext) -> Rewrite | None:
        if sorted(context.rows.parts) == ["cond", "null"]:
            return one_call(context)
        if context.inputs.get("skip_layers"):
            return None
        if context.call == 0:
            patch.tally(0, 1)
            return Rewrite((context,), remember)
        if not first or len(first[0]) != len(context.sample):
            return None
        cond, alone = first.pop(), stopped()
        patch.counts["alone" if alone else "guided"] += 1
        patch.tally(alone, 1)
        return given(cond) if alone else Rewrite((context,), lambda null: settle(cond, null, context))

    patch.require_pipeline()
    patch.require_unperturbed()
    _require_plain_guider(patch)
    patch.rewrite(guide, Claim.GUIDANCE)
    patch.each_run(first.clear)


def observe(target: Any, seen: list[list[float]]) -> Patch:
    """Run a pipeline as it is, and append to `seen` the similarity of each sample in every guided step.

    Raises:
        ValueError: as `apply`.
    """
    patch = Patch(target, "adaptive_guidance_observe", edits=True)

    def settle(cond: Tensor, null: Tensor, context: StepContext) -> Tensor:
        seen.append(similarity(_predicted(cond, context), _predicted(null, context)).tolist())
        return null

    _guide(patch, lambda: False, settle)
    return patch.on()


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Stop guidance for each sample once its two predictions are similar, and leave the unconditional one out once all are.

    Args:
        target: a diffusers pipeline with guidance, in one batch or in two calls.

    Raises:
        ValueError: a bare model (which does not say what is guided), perturbed attention guidance, a guider other than
            `ClassifierFreeGuidance`, a second method that changes guidance, or already applied.
    """
    patch = Patch(target, "adaptive_guidance")
    threshold = config.threshold
    if threshold is None:
        return patch
    done: list[bool] = []                                 # of each sample, once it is known
    seen: list[float] = []                                # the similarity of the farthest sample in each guided step

    def settle(cond: Tensor, null: Tensor, context: StepContext) -> Tensor:
        gammas = similarity(_predicted(cond, context), _predicted(null, context)).tolist()
        seen.append(min(gammas))
        done[:] = reached(done or [False] * len(gammas), gammas, threshold)
        if not any(done):
            return null
        stop = torch.tensor(done, device=null.device).view(-1, *[1] * (null.ndim - 1))
        return torch.where(stop, cond, null)

    _guide(patch, lambda: bool(done) and all(done), settle)
    patch.each_run(done.clear)
    patch.each_run(seen.clear)
    patch.explain(lambda: f"no step follows one by which all samples came to {threshold}; the highest similarity seen "
                  f"was {max(seen):.4g}" if seen else "no call is guided")
    return patch.on()
