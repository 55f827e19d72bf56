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
from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from methods._core.attention import cross_map
from methods._core.context import StepContext
from methods._core.denoiser import Stage, describe
from methods._core.patch import Patch

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


def _watched(stages: tuple[Stage, ...]) -> tuple[nn.Module, ...]:
    """Cross-attentions of blocks 1 to 3 of the middle attention of the deepest up stage that has any (of its only block)."""
    for stage in stages:
        attentions = [attention for _, attention in stage.layers if attention is not None]
        if stage.side == "up" and attentions:
            blocks = attentions[len(attentions) // 2].transformer_blocks
            return tuple(block.attn2 for block in (blocks[1:4] or blocks))
    return ()


class _Binding:
    """The text of one run, (B, T, C) in `text`, and of its objects the anchor latents and the schedulers that step them."""

    def __init__(self, patch: Patch, config: Config):
        self.patch, self.config = patch, config
        self.text, self.anchors = patch.feature(), patch.feature()
        self.schedulers: list[Any] = []
        self.nouns = [noun[0] for noun, _ in config.objects]
        self.maps: list[Tensor] | None = None             # filled while the entropy is measured

    def look(self, attn: nn.Module, forward, x: Tensor, **kwargs) -> Tensor:
        """Around the cross-attention `attn`."""
        if self.maps is not None:
            text = kwargs["encoder_hidden_states"]
            text = text[0] if isinstance(text, tuple) else text                # behind it the images of an adapter
            self.maps.append(cross_map(attn, x, text, kwargs.get("attention_mask")))
        return forward(x, **kwargs)

    def prepare(self, context: StepContext) -> dict[str, Tensor]:
        """Before each call: what the model is to read instead of the latent and the prompt of this step."""
        config, given = self.config, context.inputs["encoder_hidden_states"]
        start = len(given) // 2 if context.guided else 0                       # the conditional half is the second one
        length = given.shape[1] - 1 if config.length is None else config.length
        if max(max(noun + modifiers) for noun, modifiers in config.objects) > length:
            raise ValueError(f"objects={config.objects} point behind the {length} tokens of the prompt")
        if self.text.value is None:
            self.text.value = merge_tokens(given[start:], config.objects, config.noun_weight, config.modifier_weight)
        if config.simplified is not None and context.i == config.simplify_at:
            self.text.value = replace_end(self.text.value, self.embed(config.simplified, given), length)
        x = context.sample[start:]
        with torch.enable_grad():
            if config.anchors and context.i < config.token_steps:
                self.tune_tokens(context, given, start)
            if context.i < config.attention_steps:
                x = self.refine(context, x, start, length)
        self.patch.counts["bound"] += len(config.objects)
        sample = torch.cat([x, x]) if context.guided else x
        return {"sample": sample, "encoder_hidden_states": torch.cat([given[:start], self.text.value])}

    def embed(self, prompt: str | Tensor, like: Tensor) -> Tensor:
        """An embedding (T, C) of words, by the pipeline's text encoder, or as given."""
        if isinstance(prompt, str):
            prompt = self.patch.pipe.encode_prompt(prompt=prompt, device=like.device, num_images_per_prompt=1,
                                                   do_classifier_free_guidance=False)[0][0]
        return prompt.to(like)

    def predict(self, context: StepContext, x: Tensor, text: Tensor, start: int) -> Tensor:
        """The model's output for latents x and text (B, T', C), with the other inputs of the conditional half."""
        def half(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: half(each) for name, each in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(half(each) for each in value)
            return value[start:] if torch.is_tensor(value) and value.ndim and len(value) == len(context.sample) else value

        inputs = half(context.inputs)
        extra = inputs.get("added_cond_kwargs") or {}
        if "text_embeds" in extra:
            extra["text_embeds"] = torch.zeros_like(extra["text_embeds"])
        inputs |= dict(sample=x, encoder_hidden_states=text, encoder_attention_mask=None, added_cond_kwargs=extra,
                       return_dict=False)
        self.patch.counts["extra_calls"] += 1
        return type(self.patch.model).forward(self.patch.model, **inputs)[0]   # not a step: no hook may count it

    def tune_tokens(self, context: StepContext, given: Tensor, start: int) -> None:
        """Semantic binding loss: each merged row alone is to do what its whole phrase does on the object's anchor latent."""
        t, random, latents = context.timestep, context.random(0), []
        if self.anchors.value is None:
            self.schedulers = [_twin(self.patch.pipe.scheduler) for _ in self.nouns]
            scale = self.schedulers[0].scale_model_input(torch.ones_like(context.sample[:1]), t)
            self.anchors.value = (context.sample[start:] / scale,) * len(self.nouns)
        for noun, anchor, latent, scheduler in zip(self.nouns, self.config.anchors, self.anchors.value, self.schedulers,
                                                   strict=True):
            x, text = scheduler.scale_model_input(latent, t), self.text.value.clone()
            with torch.no_grad():
                phrase = self.embed(anchor, given).expand(len(x), -1, -1)
                target = self.predict(context, x, phrase, start)
            text[:, noun] = self.tune_token(context, x, text[:, noun], target, start)
            self.text.value = text
            with torch.no_grad():
                noise = target
                if start:
                    null = self.predict(context, x, given[:start], start)
                    sign = -1 if self.config.reversed_anchor else 1
                    noise = null + sign * self.patch.pipe.guidance_scale * (target - null)
                draws = {"generator": random} if "generator" in inspect.signature(scheduler.step).parameters else {}
                latents.append(scheduler.step(noise, t, latent, return_dict=False, **draws)[0])
        self.anchors.value = tuple(latents)

    def tune_token(self, context: StepContext, x: Tensor, row: Tensor, target: Tensor, start: int) -> Tensor:
        """row (B, C) after gradient steps on the mean squared error of each sample against `target`."""
        for _ in range(self.config.token_updates):
            row = row.detach().requires_grad_()
            error = (self.predict(context, x, row[:, None], start).float() - target.float()).square()
            row = row - self.config.token_rate * torch.autograd.grad(error.flatten(1).mean(1).sum(), row)[0]
            self.patch.counts["token_updates"] += 1
        return row.detach()

    def refine(self, context: StepContext, x: Tensor, start: int, length: int) -> Tensor:
        """Entropy loss: gradient steps on latent and text until each sample's objects are compact enough. -> latent"""
        config, i = self.config, context.i
        step = config.rate * (1 - i / max(1, context.steps - 1))
        threshold = config.thresholds[min(i, len(config.thresholds) - 1)] / 2 * len(self.nouns) - 2
        late = float(torch.as_tensor(context.timestep).flatten()[0]) <= 900
        text, active = self.text.value, torch.ones(len(x), dtype=torch.bool, device=x.device)
        for _ in range(config.attention_updates[late]):
            x, text, self.maps = x.detach().requires_grad_(), text.detach().requires_grad_(), []
            try:
                self.predict(context, x, text, start)
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


def _twin(scheduler: Any) -> Any:
    """A copy of a patched scheduler as it is now, without the patch."""
    twin = object.__new__(type(scheduler))
    vars(twin).update(copy.deepcopy({name: value for name, value in vars(scheduler).items()
                                     if name not in ("set_timesteps", "step")}))
    return twin


def apply(target: Any, config: Config = Config()) -> Patch:
    """Bind the attributes of each object of the prompt to it.

    Args:
        target: a diffusers pipeline over a text-conditional UNet.

    Raises:
        ValueError: a bare model (the schedules need the number of steps), no UNet with cross-attention, another method is
            on the model, or already applied.
    """
    patch = Patch(target, "tome_binding")
    if not config.objects:
        return patch
    watched = patch.require(_watched(describe(patch.model).unet), "UNet stage with cross-attention on its way up")
    patch.require_pipeline()
    patch.stand_alone()
    binding = _Binding(patch, config)
    for cross in watched:
        patch.around(cross, partial(binding.look, cross))
    patch.each_call(binding.prepare)
    return patch
