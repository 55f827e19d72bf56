"""Stable Flow - Stable Flow: Vital Layers for Training-Free Image Editing

Omri Avrahami, Or Patashnik, Ohad Fried, Egor Nemchinov, Kfir Aberman, Dani Lischinski, Daniel Cohen-Or, CVPR 2025.
arXiv:2411.14430. Code: snap-research/stable-flow

Idea: a few layers of a transformer carry what an image shows: without one of them the image is another. An edit is drawn
beside its reference, from the same noise; in the vital layers its image tokens attend to the keys and values of the
reference's image tokens, and to its own text. A real image is first walked back to noise along the flow.

Map
    vitality(l) = 1 - mean similarity with layer l bypassed        vitality
    V, the layers of vitality tau and more                         vital_layers, VITAL
    keys and values of image tokens from row 0, in V               injected, _Layer.attend
    inverse Euler, and the latents on its way                      methods._core.inversion.Ascent, invert
    z_0 scaled by 1.15 (latent nudging)                            invert
    row 0 set to the stored latent of its noise level              _Reference.step
    guidance 1 for the reference                                   apply

Departures
    It saves nothing: the reference is a row more in the batch, and keys and values are copied; the report counts both.
    Keys and values are exchanged behind norms and positions, not before. The places of both rows are the same, so that the
    result is, too, bit for bit.
    Of classifier-free guidance the conditional half alone is edited; FLUX.1-dev has no other. With both halves edited guidance
    takes away what they share, the reference: eight edits on the bundled model then resembled it no more than plain ones.
    The official code sets row 0, after step i, to the stored latent number -i, which lags by two noise levels, and in the first
    step is the cleanest one; and it never stores z_0. Here both are of one level. `released` is the other way.
    Layer 2 is vital in the paper and left out of the official code: both sets stand in VITAL, beside one measured here.
    Similarity is that of DINOv2 features in the paper. Here the features are an argument, and without it the samples
    themselves. That vitality may tell a cache which layers to leave alone is our extension; nothing here relies on it.

Example
    >>> import methods
    >>> from methods import stable_flow
    >>> pipe = methods.tiny("mmdit")
    >>> z = pipe.prepare_latents(1, 3, 32, 32, pipe.dtype, "cpu", None).repeat(2, 1, 1, 1)
    >>> with stable_flow.apply(pipe, stable_flow.Config(vital=stable_flow.VITAL["mmdit"])) as patch:
    ...     images = pipe(["red apple", "green apple"], latents=z, num_inference_steps=2, output_type="np").images
    >>> patch.report()["injected"] == 2 * len(stable_flow.VITAL["mmdit"])       # in two steps
    True
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods._core.cache import Passed
from methods._core.context import Rewrite, StepContext
from methods._core.denoiser import Block
from methods._core.inversion import ascend, latent_of, require_flow
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim
from methods._core.solver import arrived

__all__ = ["OFF", "PROMPTS", "TINY", "VITAL", "Config", "apply", "injected", "invert", "vital_layers", "vitality"]

PROMPTS = 2                       # of a run: a reference and an edit

# Vital layers by index over all blocks. Of FLUX.1-dev: the paper's, and those of the official code; of a bundled model: those
# whose vitality, measured by tools/measure/stable_flow.py, is TAU and more.
VITAL = {"flux-dev": (0, 1, 2, 17, 18, 25, 28, 53, 54, 56), "flux-dev-released": (0, 1, 17, 18, 25, 28, 53, 54, 56),
         "mmdit": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Config:
    vital: tuple[int, ...] = VITAL["flux-dev"]        # V
    inverted: Sequence[Tensor] | None = None          # what `invert` gave of a real image, the reference; None: it is drawn
    guidance: float = 1.0                             # of the row of a real image, where guidance is an input of the model
    nudge: float = 1.15                               # scale of the clean latent of a real image
    restore: bool = False                             # divide by `nudge` at the end, which the official code does not
    released: bool = False                            # take the stored latents as the official code indexes them

    def __post_init__(self):
        if min(self.vital, default=0) < 0:
            raise ValueError(f"vital={self.vital} must not be negative")
        if not 0 < self.nudge < math.inf:
            raise ValueError(f"nudge={self.nudge} must be a positive number")
        if self.inverted is not None and len(self.inverted) < 2:
            raise ValueError("inverted must hold the latents of at least one step, the clean one first")


OFF = Config(vital=())
TINY = Config(vital=(0, 1))


def vital_layers(vitalities: Sequence[float], tau: float) -> tuple[int, ...]:
    """The layers whose vitality is at least `tau`."""
    return tuple(i for i, each in enumerate(vitalities) if each >= tau)


def injected(x: Tensor, rows: Tensor) -> Tensor:
    """Image keys or values x (B n, H, N, D) of B samples, with those of sample `rows` (B,) for each; n are frames or places."""
    return x.unflatten(0, (len(rows), -1))[rows].flatten(0, 1)


class _Layer:
    """A vital layer. The host sets `rows`, from which sample each one takes its image, and `tokens`, of an image."""

    def __init__(self, block: Block):
        self.block = block
        self.rows: Tensor | None = None
        self.tokens = 0

    def attend(self, product: Callable, q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
        parts = [self.block.parted(x, self.tokens) for x in (k, v)]
        k, v = (self.block.joined(injected(image, self.rows), rest) for image, rest in parts)
        return product(q, k, v, **more)


class _Reference:
    """Keeps row 0 of a run on the latents (1, ...) that an inversion passed, the clean one first."""

    def __init__(self, scheduler: Any, config: Config):
        self.scheduler, self.config, self.latents = scheduler, config, config.inverted

    def set_timesteps(self, call: Callable, *args, **kwargs) -> None:
        call(*args, **kwargs)
        if (steps := len(self.scheduler.timesteps)) != len(self.latents) - 1:
            raise ValueError(f"stable_flow: the image was inverted in {len(self.latents) - 1} steps, and this run has {steps}")

    def step(self, call: Callable, output: Tensor, t: Any, x: Tensor, *args, **kwargs) -> Any:
        result = call(output, t, x, *args, **kwargs)
        x = latent_of(result).clone()
        i, last = int((self.scheduler.timesteps == t).nonzero()[0]), len(self.latents) - 1
        level = last - 1 - i
        if self.config.released:                                    # latents 1 .. S, of which number -i
            level = 1 if i == 0 else last + 1 - i
        x[0] = self.latents[level][0].to(x)
        return arrived(result, x / self.config.nudge if self.config.restore and i == last - 1 else x)


def _chain(patch: Patch) -> list[Block]:
    return patch.require(patch.denoiser.chain, "chain of transformer blocks")


@torch.no_grad()
def vitality(target: Any, run: Callable[[], Tensor], features: Callable[[Tensor], Tensor] | None = None) -> list[float]:
    """How far the samples move, layer by layer, when one is bypassed: 1 - mean cosine of their features, 0 for no change.

    Args:
        target: a diffusers pipeline over a transformer.
        run: gives the same samples (K, ...) at every call, as long as the model is the same.
        features: (K, ...) -> (K, C). None: the samples themselves.

    Raises:
        ValueError: no transformer, or a patch on it that caches blocks.
    """
    patch = Patch(target, "stable_flow", edits=True)
    layers = [Passed(block) for block in _chain(patch)]
    for layer in layers:
        patch.around(layer.block.module, layer.around)
    found, features = [], features or partial(torch.flatten, start_dim=1)
    with patch.on():
        whole = features(run()).double()
        for layer in layers:
            layer.over = True
            found.append(1 - float(F.cosine_similarity(features(run()).double(), whole).mean()))
            layer.over = False
    return found


def invert(target: Any, latent: Tensor, config: Config = Config(), **call: Any) -> tuple[Tensor, ...]:
    """The latents (1, ...) of a clean one, from `config.nudge` times it to noise, one more than steps, for `Config.inverted`.

    Args:
        target: a diffusers pipeline over a transformer, with a flow-matching Euler scheduler.
        latent: of one image, as the pipeline takes `latents`.
        call: what the pipeline is called with: the prompt of the image, steps, size. `guidance_scale` is 1 unless given.

    Raises:
        ValueError: a bare model, another scheduler, several images, or another patch that steps or edits.
    """
    patch = Patch(target, "stable_flow", edits=True)
    _chain(patch)
    return ascend(patch, config.nudge * latent, call)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Draw the first prompt of a run as it is, and the others as edits of it. It makes nothing faster.

    Args:
        target: a diffusers pipeline over a transformer. Run it with a reference and its edits, all from the same noise: a list
            of generators with one seed, or equal latents; for a real image the last of `inverted`, repeated.

    Image-to-image pipelines draw their noise by themselves, which may then be another for each.

    Raises:
        ValueError: no transformer, a vital layer it does not have, perturbed attention, another scheduler for a real image, or
            already applied; in a run, a single prompt, other noise or another number of steps than the image was inverted in.
    """
    patch = Patch(target, "stable_flow", edits=True)
    if not config.vital:
        return patch
    blocks = _chain(patch)
    if max(config.vital) >= len(blocks):
        raise ValueError(f"vital={config.vital}: this {type(patch.model).__name__} has {len(blocks)} layers; find its vital "
                         "ones with stable_flow.vitality")
    patch.require_unperturbed()
    layers = [_Layer(block) for block in blocks if block.index in config.vital]
    for layer in layers:
        for attn in layer.block.self_attentions:
            patch.attend(attn, layer.attend)
    if config.inverted is not None:
        require_flow(patch)
        patch.solve(_Reference(patch.pipe.scheduler, config))
        patch.claim([patch.model], Claim.SOLVER)
        patch.rewrite(partial(_guided, config.guidance), Claim.GUIDANCE)

    def decide(context: StepContext) -> None:
        n, z = context.rows.prompts, context.sample[:context.rows.prompts]
        if n < PROMPTS:
            raise ValueError("stable_flow edits beside a reference: run with two prompts or more, the reference first")
        late = patch.pipe is not None and context.steps < len(patch.pipe.scheduler.timesteps)       # image to image
        if context.i == 0 and not late and not all(torch.equal(each, z[0]) for each in z):
            raise ValueError("stable_flow draws an edit from the noise of its reference: give all prompts the same, as a "
                             "list of generators with one seed, or as equal latents")
        rows = torch.arange(n * len(context.rows.parts), device=z.device)
        edits = "cond" in context.rows.parts and (patch.denoiser.row.batched or context.call != 1)  # else the second is null
        if edits:
            rows[context.rows.of("cond")] = context.rows.of("cond").start
        for layer in layers:
            layer.rows, layer.tokens = rows, math.prod(context.grid(layer.block))
        patch.counts["injected"] += edits * len(layers) * (n - 1)
        patch.counts["overhead_rows"] += len(context.rows.parts)

    patch.each_call(decide)
    return patch.on()


def _guided(scale: float, context: StepContext) -> Rewrite | None:
    """Tell a model that reads the guidance's scale another one for row 0."""
    if (told := context.inputs.get("guidance")) is None:
        return None
    told = told.clone()
    told[0] = scale
    return Rewrite((context.replace({"guidance": told}),), lambda out: out)
