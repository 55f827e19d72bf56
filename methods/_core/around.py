"""A part of a model in the place of another, and around it."""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from methods._core.denoiser import Block, describe


def image_blocks(model: nn.Module, method: str) -> tuple[Block, ...]:
    """The blocks of `model`, if they are a chain over the tokens of an image alone, any part of which could take a block.

    Raises:
        TypeError: no row in methods/_core/families.
        ValueError: they are not.
    """
    denoiser = describe(model)
    if not denoiser.chain or not all(block.stream == "image" and not (block.rotary or block.temporal) and block.ff is not None
                                     and block.row.product == "one" and block.row.alone for block in denoiser.blocks):
        raise ValueError(f"{method}: this {type(model).__name__} has no chain of blocks over the tokens of an image alone")
    return denoiser.blocks


def swap(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value of `made` in the place of its key, a part of `model` that it may hold."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in made and made[child] is not parent:
                parent._modules[name] = made[child]


def before_calls(model: nn.Module, decide: Callable[[nn.Module, dict[str, Any]], None]) -> None:
    """Have `decide(model, inputs)` called before each call of `model`, with its inputs by name."""
    model.register_forward_pre_hook(functools.partial(_by_name, decide), with_kwargs=True)


def _by_name(decide: Callable, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    decide(model, inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments)


class Around(nn.Module):
    """Stands in the place of `inner`, such as a block or its feed-forward; what it does not have itself is asked of `inner`."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class First(Around):
    """Of tokens (B, N, D) only the first `count` are given to `inner`, which may be called with more; the others get 0."""

    count = 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.pad(self.inner(x[:, :self.count], *args, **kwargs), (0, 0, 0, x.shape[1] - self.count))


class FirstAsk(First):
    """Attention in which the first `count` of tokens (B, N, D) ask the others, which get 0."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs |= {"encoder_hidden_states": x[:, self.count:], "attention_mask": None}
        return F.pad(self.inner(x[:, :self.count], **kwargs), (0, 0, 0, x.shape[1] - self.count))
