"""What a method may know about an autoregressive image model. One row per model class; no other file names a model.

`describe(model)` says which ids are image tokens, and gives next-token logits without the model's own masking of them.
`Prefix` keeps the keys and values of a batch of prefixes that grow by different amounts.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ChameleonForConditionalGeneration,
    DynamicCache,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)


@dataclass(frozen=True)
class ImageLM:
    """A described model.

    `logits(tokens, count, **inputs)` -> (B, count, V): what follows each of the last `count` of `tokens` (B, T), where
    `inputs` are the attention mask, positions and cache in the names of transformers. `image_tokens`: the ids of image
    patches; all ids where the model does not tell them apart.
    """

    model: PreTrainedModel
    vocab_size: int
    image_tokens: tuple[int, ...]
    logits: Callable[..., Tensor]


class Prefix:
    """Keys and values of B accepted prefixes; with `guided`, of B more without their prompt below them.

    The unconditional rows see the last prompt token and what follows. Rows may keep different numbers of new tokens: the
    cache is cropped to the longest row, and what a shorter row did not keep stays in it, masked out for good.
    """

    def __init__(self, lm: ImageLM, prompt: Tensor, guided: bool, longest: int):
        self.lm, self.longest = lm, longest       # of a sequence; rows that have ended take any position below it
        self.cache = DynamicCache()
        self.mask = prompt.new_zeros(((1 + guided) * len(prompt), 0))
        self._hidden = prompt.shape[1] - 1 if guided else 0

    def logits(self, tokens: Tensor, count: int) -> tuple[Tensor, ...]:
        """Append `tokens` (B, T); what follows each of the last `count`, (B, count, V), once per half."""
        halves = len(self.mask) // len(tokens)
        new = torch.ones_like(tokens).repeat(halves, 1)
        if self.mask.shape[1] == 0:
            new[len(tokens):, :self._hidden] = 0
        self.mask = torch.cat([self.mask, new], dim=1)
        positions = (self.mask.cumsum(dim=1) - 1)[:, -tokens.shape[1]:].clamp(0, self.longest - 1)
        logits = self.lm.logits(tokens.repeat(halves, 1), count, attention_mask=self.mask, position_ids=positions,
                                past_key_values=self.cache, use_cache=True)
        return logits.chunk(halves)

    def keep(self, counts: Tensor, of: int) -> None:
        """Of the last `of` tokens, row b keeps the first `counts[b]`."""
        kept = torch.arange(of, device=counts.device) < counts[:, None]
        self.mask[:, -of:] *= kept.repeat(len(self.mask) // len(counts), 1)
        drop = of - int(counts.max())
        if drop:
            self.cache.crop(-drop)
            self.mask = self.mask[:, :-drop]


def _causal(model: PreTrainedModel) -> ImageLM:
    def logits(tokens: Tensor, count: int, **inputs: Any) -> Tensor:
        return model(input_ids=tokens, logits_to_keep=count, **inputs).logits
    size = model.config.vocab_size
    return ImageLM(model, size, tuple(range(size)), logits)


def _chameleon(model: ChameleonForConditionalGeneration) -> ImageLM:
    def logits(tokens: Tensor, count: int, **inputs: Any) -> Tensor:     # model.forward would rule out every image token
        return model.lm_head(model.model(input_ids=tokens, **inputs).last_hidden_state[:, -count:])
    return ImageLM(model, model.config.vocab_size, tuple(model.model.vocabulary_mapping.image_tokens), logits)


ROWS: dict[type, Callable[[Any], ImageLM]] = {
    ChameleonForConditionalGeneration: _chameleon,
    GPT2LMHeadModel: _causal,
    LlamaForCausalLM: _causal,
}


def describe(model: PreTrainedModel) -> ImageLM:
    """The row of a model's class, filled in for this model.

    Raises:
        TypeError: no row for this class.
    """
    for cls, row in ROWS.items():
        if isinstance(model, cls):
            return row(model)
    known = ", ".join(cls.__name__ for cls in ROWS)
    raise TypeError(f"{type(model).__name__} is not an autoregressive image model this library knows; it knows {known}")
