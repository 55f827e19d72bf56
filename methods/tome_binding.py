"""ToMe (semantic binding) - Token Merging for Training-Free Semantic Binding in Text-to-Image Synthesis

Taihang Hu et al., NeurIPS 2024. arXiv:2411.07132. Code: hutaiHang/ToMe

Idea: in "a red ball and a blue cube" attributes drift to the wrong object, since every token attends on its own. The
tokens of each object are summed into one, so that an object and its attributes share one attention map; in the first
steps that token is tuned to stand for its phrase, and the latent to give every object one compact place. It merges
words, not image tokens, and makes sampling slower: it is no accelerator.

Map
    token merging             noun and modifiers become one row          merge_tokens
    end token substitution    end rows of a simplified prompt            replace_end
    semantic binding loss     the row against its phrase, on an anchor   _Binding.tune_token
    entropy loss              spread of the objects' attention maps      entropy_loss
    iterative update          of latent and text, by the entropy         _Binding.refine

Departures
    The official code is one pipeline for SDXL and one prompt. Here any pipeline over a UNet with cross-attention will do, a
    batch must be of one prompt, its samples are refined apart, and the maps come from the same place: the middle attention
    of the deepest up block.
    Phrases are named by token positions; the automatic parsing is left out, and so is the position loss of one demo.
    Anchors need an embedding of their phrase, given as a tensor or as words for the pipeline's text encoder; without
    them, or without a simplified prompt, those two parts are off.
    The official guidance of the anchor latent has its sign turned round, null + g (null - anchor); `reversed_anchor=True`
    repeats that. It also scales the anchor latent anew in every step, in place; that is not repeated.
    Each anchor is stepped by a copy of the scheduler, with its own history and random draws.
    A map that is the same everywhere has no least and most to be stretched between; it counts as spread evenly.
    Learning rates and thresholds are those for 32 x 32 maps of SDXL at 1024 pixels; other models want their own.

Example
    >>> import torch
    >>> from methods import tome_binding
    >>> text = torch.arange(6.0).view(1, 6, 1)                       # start, "a", "red", "ball", end, end
    >>> tome_binding.merge_tokens(text, objects=(((3,), (2,)),)).flatten().tolist()
    [0.0, 1.0, 0.0, 5.700000286102295, 4.0, 5.0]
"""
from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor

from methods._core.attention import mean_map
from methods._core.context import Rewrite, StepContext
from methods._core.denoiser import Block, Denoiser
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["OFF", "Config", "apply", "entropy_loss", "merge_tokens", "replace_end", "uniform_entropy"]

Objects = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, kw_only=True, eq=False)         # two tensors have no single truth value
class Config:
    objects: Objects = (((2,), (1,)),)             # of each object: positions of its noun, then of its modifiers; start is 0
    anchors: tuple[str | Tensor, ...] = ()         # c_k: phrase of each object, in words or as its embedding (T, C)
    simplified: str | Tensor | None = None         # prompt without modifiers, in words or as its embedding (T, C)
    length: int | None = None                      # L: tokens between start and end; None: all rows but the start
    noun_weight: float = 1.1                       # official code (the paper sums plainly)
    modifier_weight: float = 1.2                   # official code
    simplify_at: int = 0                           # e: step from which end rows are those of the simplified prompt
    token_steps: int = 5                           # T1: steps that tune the merged tokens
    token_updates: int = 3                         # updates of a token in each of them
    token_rate: float = 10_000.0                   # learning rate of a token
    attention_steps: int = 5                       # T2: steps that refine by the entropy loss
    attention_updates: tuple[int, int] = (4, 4)    # most updates a step, above timestep 900 and below
    thresholds: tuple[float, ...] = (26, 25, 24, 23, 22.5, 22, 21.5, 21)     # by step; updates stop below h K / 2 - 2
    rate: float = 3.0                              # eta at the first step, falling to 0 at the last
    reversed_anchor: bool = False                  # repeat the sign of the official code, see Departures

    def __post_init__(self):
        if any(not noun or min(noun + modifiers) < 1 for noun, modifiers in self.objects):
            raise ValueError(f"objects={self.objects}: each needs a noun, and positions from 1 on")
        if self.anchors and len(self.anchors) != len(self.objects):
            raise ValueError(f"anchors: {len(self.anchors)} for {len(self.objects)} objects; one for each, or none")
        if self.simplified is not None and self.length is None:
            raise ValueError("simplified: the rows to replace stand behind the prompt, whose length must be given")
        for name in ("simplify_at", "token_steps", "token_updates", "attention_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if min(self.attention_updates) < 1 or len(self.attention_updates) != 2 or not self.thresholds:
            raise ValueError(f"attention_updates={self.attention_updates} must be two numbers from 1 on, with thresholds")


OFF = Config(objects=())


def merge_tokens(text: Tensor, objects: Objects, noun_weight: float = 1.1, modifier_weight: float = 1.2) -> Tensor:
    """Token merging: the first row of each noun becomes 1.1 * its rows + 1.2 * its modifiers', the others of both zero.

    text (B, T, C) -> (B, T, C)
    """
    merged = text.clone()
    for noun, modifiers in objects:
        merged[:, [*noun[1:], *modifiers]] = 0
        merged[:, noun[0]] = noun_weight * text[:, list(noun)].sum(1) + modifier_weight * text[:, list(modifiers)].sum(1)
    return merged


def replace_end(text: Tensor, simplified: Tensor, length: int) -> Tensor:
    """End token substitution: the rows behind token `length` of text (B, T, C) become those of `simplified` (T, C)."""
    return torch.cat([text[:, :length + 1], simplified[length + 1:].expand(len(text), -1, -1)], 1)


def entropy_loss(maps: Tensor, nouns: list[int], length: int) -> Tensor:
    """-2 sum_k sum_xy p log(p + 1e-5) over the objects' places p, from cross-attention maps (B, N, T). -> (B,)

    The map of each noun, after a softmax over tokens 1..length at temperature 1/2, stretched to [0, 1], scaled to sum 1;
    a flat one is even.
    """
    shares = (maps[..., 1:length + 1] / 0.5).softmax(-1)[..., [noun - 1 for noun in nouns]]
    low, high = shares.amin(1, keepdim=True), shares.amax(1, keepdim=True)
    flat = low == high
    p = (shares - low) / (high - low).masked_fill(flat, 1)
    p = torch.where(flat, 1 / p.shape[1], p / p.sum(1, keepdim=True).masked_fill(flat, 1))
    return -2 * (p * (p + 1e-5).log()).sum((1, 2))


def uniform_entropy(tokens: int, objects: int) -> float:
    """The entropy loss of objects spread evenly over `tokens` places: what a refined one is to be measured against."""
    return -2 * objects * log(1 / tokens + 1e-5)


def _watched(denoiser: Denoiser) -> list[Block]:
    """Blocks 1 to 3 of the middle attention of the deepest up stage that has any with cross-attention (of its only block)."""
    for stage in denoiser.unet if denoiser.row.grid.frames is None else ():
        attentions = stage.attentions
        if stage.side == "up" and attentions:
            inside = {id(module) for module in attentions[len(attentions) // 2].modules()}
            blocks = [block for block in denoiser.blocks if id(block.module) in inside]
            return blocks[1:4] or blocks
    return []


class _Binding:
    """The text of one run, (B, T, C) in `text`, and of its objects the anchor latents and the schedulers that step them."""

    def __init__(self, patch: Patch, config: Config):
        self.patch, self.config = patch, config
        self.text, self.anchors = patch.slot(), patch.slot()
        self.schedulers: list[Any] = []
        self.nouns = [noun[0] for noun, _ in config.objects]
        self.maps: list[Tensor] | None = None             # filled while the entropy is measured

    def look(self, product, q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
        """At the product of a cross-attention with the text."""
        if self.maps is not None:
            self.maps.append(mean_map(q, k, **more))
        return product(q, k, v, **more)

    def prepare(self, context: StepContext) -> Rewrite:
        """Before each call: what the model is to read instead of the latent and the prompt of this step."""
        config, given = self.config, context.inputs["encoder_hidden_states"]
        length = given.shape[1] - 1 if config.length is None else config.length
        if max(max(noun + modifiers) for noun, modifiers in config.objects) > length:
            raise ValueError(f"objects={config.objects} point behind the {length} tokens of the prompt")
        cond = context.rows.of("cond")
        if self.text.value is None:
            self.text.value = merge_tokens(given[cond], config.objects, config.noun_weight, config.modifier_weight)
        if config.simplified is not None and context.i == config.simplify_at:
            self.text.value = replace_end(self.text.value, self.embed(config.simplified, given), length)
        x = context.sample[cond]
        with torch.enable_grad():
            if config.anchors and context.i < config.token_steps:
                self.tune_tokens(context, given)
            if context.i < config.attention_steps:
                x = self.refine(context, x, length)
        self.patch.counts["bound"] += len(config.objects)
        text = given.clone()
        text[cond] = self.text.value
        inputs = {"sample": x.repeat(len(context.rows.parts), 1, 1, 1), "encoder_hidden_states": text}
        return Rewrite((context.replace(inputs),), lambda out: out)

    def embed(self, prompt: str | Tensor, like: Tensor) -> Tensor:
        """An embedding (T, C) of words, by the pipeline's text encoder, or as given."""
        if isinstance(prompt, str):
            prompt = self.patch.pipe.encode_prompt(prompt=prompt, device=like.device, num_images_per_prompt=1,
                                                   do_classifier_free_guidance=False)[0][0]
        return prompt.to(like)

    def predict(self, context: StepContext, x: Tensor, text: Tensor) -> Tensor:
        """The model's output for latents x and text (B, T', C), with the other inputs of the conditional rows."""
        inputs = {name: context.rows.take(value, "cond") for name, value in context.inputs.items()}
        extra = inputs.get("added_cond_kwargs") or {}
        if "text_embeds" in extra:
            extra["text_embeds"] = torch.zeros_like(extra["text_embeds"])
        inputs |= dict(sample=x, encoder_hidden_states=text, encoder_attention_mask=None, added_cond_kwargs=extra,
                       return_dict=False)
        self.patch.counts["extra_calls"] += 1
        return type(self.patch.model).forward(self.patch.model, **inputs)[0]   # not a step: no patch may be told of it

    def tune_tokens(self, context: StepContext, given: Tensor) -> None:
        """Semantic binding loss: each merged row alone is to do what its whole phrase does on the object's anchor latent."""
        t, random, latents = context.inputs["timestep"], context.random(0), []
        if self.anchors.value is None:
            self.schedulers = [copy.deepcopy(self.patch.pipe.scheduler) for _ in self.nouns]
            scale = self.schedulers[0].scale_model_input(torch.ones_like(context.sample[:1]), t)
            self.anchors.value = (context.rows.take(context.sample, "cond") / scale,) * len(self.nouns)
        for noun, anchor, latent, scheduler in zip(self.nouns, self.config.anchors, self.anchors.value, self.schedulers,
                                                   strict=True):
            x, text = scheduler.scale_model_input(latent, t), self.text.value.clone()
            with torch.no_grad():
                phrase = self.embed(anchor, given).expand(len(x), -1, -1)
                target = self.predict(context, x, phrase)
            text[:, noun] = self.tune_token(context, x, text[:, noun], target)
            self.text.value = text
            with torch.no_grad():
                noise = target
                if context.guided:
                    null = self.predict(context, x, context.rows.take(given, "null"))
                    sign = -1 if self.config.reversed_anchor else 1
                    noise = null + sign * self.patch.pipe.guidance_scale * (target - null)
                draws = {"generator": random} if "generator" in inspect.signature(scheduler.step).parameters else {}
                latents.append(scheduler.step(noise, t, latent, return_dict=False, **draws)[0])
        self.anchors.value = tuple(latents)

    def tune_token(self, context: StepContext, x: Tensor, row: Tensor, target: Tensor) -> Tensor:
        """row (B, C) after gradient steps on the mean squared error of each sample against `target`."""
        for _ in range(self.config.token_updates):
            row = row.detach().requires_grad_()
            error = (self.predict(context, x, row[:, None]).float() - target.float()).square()
            row = row - self.config.token_rate * torch.autograd.grad(error.flatten(1).mean(1).sum(), row)[0]
            self.patch.counts["token_updates"] += 1
        return row.detach()

    def refine(self, context: StepContext, x: Tensor, length: int) -> Tensor:
        """Entropy loss: gradient steps on latent and text until each sample's objects are compact enough. -> latent"""
        config, i = self.config, context.i
        step = config.rate * (1 - i / max(1, context.steps - 1))
        threshold = config.thresholds[min(i, len(config.thresholds) - 1)] / 2 * len(self.nouns) - 2
        late = context.t <= 900
        text, active = self.text.value, torch.ones(len(x), dtype=torch.bool, device=x.device)
        for _ in range(config.attention_updates[late]):
            x, text, self.maps = x.detach().requires_grad_(), text.detach().requires_grad_(), []
            try:
                self.predict(context, x, text)
                loss = entropy_loss(torch.stack(self.maps).mean(0), self.nouns, length)
            finally:
                self.maps = None
            by_x, by_text = torch.autograd.grad(loss[active].sum(), [x, text])
            x, text = x - 0.5 * step * by_x, text - step * by_text
            self.patch.counts["attention_updates"] += 1
            active &= loss >= threshold
            if not active.any():
                break
        self.text.value = text.detach()
        return x.detach()


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Bind the attributes of each object of the prompt to it.

    Args:
        target: a diffusers pipeline over a text-conditional UNet.

    Raises:
        ValueError: a bare model (the schedules need the number of steps), no UNet with cross-attention, another method is
            on the model, or already applied.
    """
    patch = Patch(target, "tome_binding", edits=True)
    if not config.objects:
        return patch
    patch.require_unperturbed()
    watched = patch.require(_watched(patch.denoiser), "UNet stage for one image with cross-attention on its way up")
    patch.require_pipeline()
    binding = _Binding(patch, config)
    for block in watched:
        patch.attend(block.cross, binding.look, Claim.LOOK)
    patch.rewrite(binding.prepare, Claim.WHOLE)
    return patch.on()
