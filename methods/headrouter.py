"""HeadRouter - HeadRouter: A Training-free Image Editing Framework for MM-DiTs by Adaptively Routing Attention Heads

Yu Xu, Fan Tang, Juan Cao, Yuxin Zhang, Xiaoyu Kong, Jintao Li, Oliver Deussen, Tong-Yee Lee, ACM TOG 2025.
arXiv:2411.15034. Code: ICTMCG/HeadRouter

Idea: the heads of a joint attention over text and image react to different words. An edit is drawn beside its source; in
every attention the heads whose output the edited prompt has changed most are made stronger. What text and image say is kept
from fading by two more steps: channels that single tokens stand out in are weighed up, and each block reads a little of the
text that the block before it read. A real image is walked back to noise, and the run is drawn towards it for some steps.

Map
    c_h, cosine of head h in source and edit                       dissimilarity
    r_h, its min-max over heads, turned round                      dissimilarity
    w_h = 1 + gamma sigmoid(r_h - delta)                           weights
    image tokens: A alpha sigmoid(upsilon softmax(A))              enhanced
    text: 0.1 of the text before + 0.9 of the text now             _Text.around
    inversion: u + gamma_inv ((noise - z) / (1 - t) - u)           invert
    controller: v + eta ((z_t - z_0) / t - v)                      _Controller.step

Departures
    It saves nothing: the source is a row more in the batch, which the report counts, and every attention has its output read
    once more for the cosines.
    The released processor lacks the attention product, so that it would weigh its input, and stops at a name that is not
    defined; the released transformer passes blocks arguments that single ones do not take. The pipeline of its entry script
    is missing. Constants and formulas are the released ones, applied to what the product gives, as the paper has it.
    The released transformer blends the text of the source, too; here, as in the paper, the source is drawn as it is.
    Image tokens are found from shapes, not at the places 512 to 4608. Cosines and softmax are computed in single precision.
    Several edits may stand beside one source, and each half of guidance is routed by itself.
    The paper gates image tokens by attention weights of chosen words; the released code, and so this, by the features.

Example
    >>> import torch
    >>> from methods import headrouter
    >>> c = torch.tensor([1.0, 0.9, 0.5])
    >>> [round(float(w), 5) for w in headrouter.weights((c.max() - c) / (c.max() - c.min()), 0.2, 0.5)]
    [1.07551, 1.08511, 1.12449]
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.inversion import ascend, require_flow
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["OFF", "PROMPTS", "Config", "apply", "dissimilarity", "enhanced", "invert", "weights"]

PROMPTS = 2                       # of a run: a source and an edit


@dataclass(frozen=True, kw_only=True)
class Config:
    gamma: float = 0.2                    # gamma, how much heads are weighed up; 0: not
    delta: float = 0.5                    # delta, the dissimilarity in the middle
    alpha: float | None = 2.0             # alpha, scale of image tokens; None: they stay as they are
    upsilon: float = 5.0                  # upsilon, slope of their gate
    blend: float = 0.1                    # share of the text before; 0: none
    image: Tensor | None = None           # z_0 (1, ...), the clean latent of a real image; None: the source is drawn
    eta: float = 0.9                      # eta, strength of the controller towards it
    start: int = 0                        # first step of the controller
    stop: int = 9                         # step in which it no longer acts
    strength: float = 0.5                 # gamma of the inversion: 1 goes straight to the noise
    seed: int = 0                         # of that noise

    def __post_init__(self):
        for name in ("blend", "eta", "strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} outside [0, 1]")
        for name in ("gamma", "upsilon"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number of at least 0")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be a positive number, or None")
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"start={self.start} and stop={self.stop} must be steps in this order")


OFF = Config(gamma=0.0, alpha=None, blend=0.0)


def dissimilarity(source: Tensor, edit: Tensor) -> Tensor:
    """r (B, H) in [0, 1] of head outputs (B, H, N, D): 0 for the head that is most alike in both, 1 for the least."""
    c = F.cosine_similarity(source.float().flatten(2), edit.float().flatten(2), dim=-1)
    low, high = c.amin(1, keepdim=True), c.amax(1, keepdim=True)
    return (high - c) / (high - low).clamp(min=1e-6)


def weights(r: Tensor, gamma: float, delta: float) -> Tensor:
    """w = 1 + gamma sigmoid(r - delta)."""
    return 1 + gamma * torch.sigmoid(r - delta)


def enhanced(a: Tensor, alpha: float, upsilon: float) -> Tensor:
    """Image tokens a (..., N, C), each channel weighed by the softmax over its tokens."""
    return a * (alpha * torch.sigmoid(upsilon * a.float().softmax(-2))).to(a.dtype)


class _Rows:
    """Of each row of the batch, the row of its source, and whether it is an edit (B, 1, 1). The host sets both."""

    source: Tensor
    edit: Tensor


class _Heads:
    """At the attention product of a block. The host sets `tokens`, of the image."""

    def __init__(self, block: Block, rows: _Rows, config: Config):
        self.block, self.rows, self.config, self.tokens = block, rows, config, 0

    def attend(self, product: Callable, q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
        out, config, edit = product(q, k, v, **more), self.config, self.rows.edit[..., None]
        if config.gamma:
            w = weights(dissimilarity(out[self.rows.source], out), config.gamma, config.delta)[..., None, None]
            out = out * torch.where(edit, w, 1).to(out.dtype)
        if config.alpha is not None and self.block.stream == "fused":
            image, rest = self.block.parted(out, self.tokens)
            image = torch.where(edit, enhanced(image, config.alpha, config.upsilon), image)
            out = self.block.joined(image, rest)
        return out


class _Text:
    """Before a block with a second stream. The host sets `first`, of the first block of a call that runs."""

    def __init__(self, block: Block, rows: _Rows, share: float, before: dict[str, Tensor]):
        self.block, self.rows, self.share, self.before, self.first = block, rows, share, before, True

    def around(self, forward: Callable, *args, **kwargs):
        text = old = self.block.streams(args, kwargs)[1]
        if not self.first:
            text = torch.where(self.rows.edit, self.share * self.before["text"] + (1 - self.share) * old, old)
        self.before["text"] = text

        def put(x: Any) -> Any:
            return text if x is old else x
        return forward(*map(put, args), **{name: put(x) for name, x in kwargs.items()})


class _Controller:
    """Draws the latents of a run to a real image in steps `start` to `stop`."""

    def __init__(self, scheduler: Any, config: Config):
        self.scheduler, self.config = scheduler, config

    def set_timesteps(self, call: Callable, *args, **kwargs) -> None:
        call(*args, **kwargs)

    def step(self, call: Callable, output: Tensor, t: Any, x: Tensor, *args, **kwargs) -> Any:
        i = int((self.scheduler.timesteps == t).nonzero()[0])
        if self.config.start <= i < self.config.stop:
            target = (x.float() - self.config.image.to(x.device).float()) / self.scheduler.sigmas[i].to(x.device)
            output = (output.float() + self.config.eta * (target - output.float())).to(output.dtype)
        return call(output, t, x, *args, **kwargs)


def _joint(patch: Patch) -> list[Block]:
    found = [block for block in patch.denoiser.chain if block.stream != "image"]
    return patch.require(found, "attention over text and image together")


def _to_noise(noise: Tensor, strength: float, velocity: Tensor, z: Tensor, level: float) -> Tensor:
    target = (noise.to(z) - z) / (1 - level)
    return velocity + strength * (target - velocity)


def invert(target: Any, latent: Tensor, config: Config = Config(), **call: Any) -> Tensor:
    """The noisy latent (1, ...) from which a run gives the image again, and its edits.

    Args:
        target: a diffusers pipeline over a transformer with joint attention and a flow-matching Euler scheduler.
        latent: clean, of one image, as the pipeline takes `latents`.
        call: what the pipeline is called with: the prompt of the image, steps, size. `guidance_scale` is 1 unless given.

    Raises:
        ValueError: a bare model, another model or scheduler, several images, or another patch that steps or edits.
    """
    patch = Patch(target, "headrouter", edits=True)
    _joint(patch)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(config.seed))
    return ascend(patch, latent, call, partial(_to_noise, noise, config.strength))[-1]


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Draw the first prompt of a run as it is, and the others as edits of it. It makes nothing faster.

    Args:
        target: a diffusers pipeline over a transformer with joint attention. Run it with a source and its edits, all from the
            same noise: a list of generators with one seed, or for a real image what `invert` gave, repeated.

    Raises:
        ValueError: another model, perturbed attention, another scheduler for a real image, or already applied; in a run, a
            single prompt.
    """
    patch = Patch(target, "headrouter", edits=True)
    if not config.gamma and config.alpha is None and not config.blend and config.image is None:
        return patch
    blocks, rows, before = _joint(patch), _Rows(), {}
    patch.require_unperturbed()
    heads = [_Heads(block, rows, config) for block in blocks]
    texts = [_Text(block, rows, config.blend, before) for block in blocks
             if config.blend and block.stream == "joint" and "text" in block.row.returns]
    for each in heads:
        patch.attend(each.block.attn, each.attend)
    for each in texts:
        patch.around(each.block.module, each.around, Claim.INSIDE)
    if config.image is not None:
        require_flow(patch)
        patch.solve(_Controller(patch.pipe.scheduler, config))
        patch.claim([patch.model], Claim.SOLVER)

    def decide(context: StepContext) -> None:
        n, parts, device = context.rows.prompts, len(context.rows.parts), context.sample.device
        if n < PROMPTS:
            raise ValueError("headrouter edits beside a source: run with two prompts or more, the source first")
        rows.source = torch.arange(parts, device=device).repeat_interleave(n) * n
        rows.edit = (torch.arange(parts * n, device=device) != rows.source)[:, None, None]
        for each in heads:
            each.tokens = math.prod(context.grid(each.block))
        run = [each for each in texts if patch.reaches(each.block.module)]
        for each in texts:
            each.first = each in run[:1]
        patch.counts["routed"] += len(heads) * parts * (n - 1)
        patch.counts["overhead_rows"] += parts

    patch.each_call(decide)
    patch.each_run(before.clear)
    return patch.on()
