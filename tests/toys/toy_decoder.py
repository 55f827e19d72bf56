"""Toy decoder - A Toy of Kind Decoder

Ann Bee, Carl Dee, arXiv 2025. arXiv:2503.00012

Idea: the last token is guessed to come again `window` times; the guesses that a single pass confirms are kept.

Map
    Alg. 1   the whole    generate

Departures
    None.

Example
    >>> Config().window
    4
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["OFF", "TINY", "Config", "Decoded", "generate"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is drawn, and how many guesses a pass confirms."""

    tokens: int = 16             # N, Sec. 1
    window: int = 4              # W, Sec. 1
    temperature: float = 1.0     # of the draws, Sec. 1; 0 takes the likeliest
    seed: int = 0                # of the draws, Sec. 1


OFF = Config(window=1)
TINY = Config(tokens=12, window=4)


@dataclass(frozen=True)
class Decoded:
    """Tokens (B, N) and what they took."""

    tokens: Tensor
    report: dict[str, int]


@torch.no_grad()
def generate(model: nn.Module, prompt: Tensor, config: Config = Config()) -> Decoded:
    """`config.tokens` tokens behind `prompt` (B, M), those of sequential sampling with the same seed.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("this model is in training mode; call model.eval() first")
    ids, forwards, wanted, noise = prompt, 0, prompt.shape[1] + config.tokens, None
    while ids.shape[1] < wanted:
        guesses = ids[:, -1:].expand(-1, min(config.window, wanted - ids.shape[1]) - 1)
        scores = model(torch.cat([ids, guesses], 1)).logits[:, ids.shape[1] - 1:].float()
        forwards += 1
        if noise is None:
            random = torch.Generator().manual_seed(config.seed)
            noise = -(-torch.rand((len(ids), wanted, scores.shape[-1]), generator=random).clamp(1e-9).log()).log()
        drawn = (scores + config.temperature * noise[:, ids.shape[1]:ids.shape[1] + scores.shape[1]]).argmax(-1)
        right = int((drawn[:, :-1] == guesses).all(0).cumprod(0).sum())
        ids = torch.cat([ids, drawn[:, :right + 1]], 1)
    return Decoded(ids[:, prompt.shape[1]:], {"forwards": forwards})
