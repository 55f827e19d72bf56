"""Self-attention on fewer image tokens: a token plan goes around it, whatever the attention is called with."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.patch import Patch
from methods._core.site import Claim
from methods._core.tokens import Plan


class Reduction:
    """Plans on the input of one block, reduces before its self-attention and restores behind it.

    `planner(x)` gives the plan for the block's image tokens x (B, N, C), or None to leave this call alone; `reducer(plan, x)`
    makes the rows. The host fills in `tokens`, the length N of the image part, before each call of the denoiser. The norm of
    a block runs before its attention, so that what `observe` sees is what the next `plan` is made from.
    """

    def __init__(self, block: Block, planner: Callable[[Tensor], Plan | None] | None = None,
                 reducer: Callable[[Plan, Tensor], Tensor] = Plan.reduce):
        self.block, self.planner, self.reducer = block, planner, reducer
        self.tokens = 0
        self.input: Tensor | None = None

    def wire(self, patch: Patch) -> None:
        """Stand around the block's norm, which sees its input, and its self-attention."""
        patch.around(self.block.norm, self.observe, Claim.LOOK)
        patch.around(self.block.attn, getattr(self, self.block.stream), Claim.TOKENS)

    def observe(self, forward, x: Tensor, *args, **kwargs):
        """Around the norm: x is the block's input, (B, N, C), text first in a fused sequence."""
        self.input = x
        return forward(x, *args, **kwargs)

    def plan(self) -> Plan | None:
        x, self.input = self.input, None
        return self.planner(x[:, x.shape[1] - self.tokens:])

    def image(self, forward, x: Tensor, *args, **kwargs) -> Tensor:
        plan = self.plan()
        if plan is None:
            return forward(x, *args, **kwargs)
        return plan.restore(forward(self.reducer(plan, x), *args, **kwargs))

    def joint(self, forward, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        plan = self.plan()
        if plan is None:
            return forward(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)
        kwargs = self.turn(kwargs, plan, encoder_hidden_states.shape[1])
        rows = self.reducer(plan, hidden_states)
        image, text = forward(hidden_states=rows, encoder_hidden_states=encoder_hidden_states, **kwargs)
        return plan.restore(image), text

    def fused(self, forward, hidden_states: Tensor, **kwargs) -> Tensor:
        plan, words = self.plan(), hidden_states.shape[1] - self.tokens
        if plan is None:
            return forward(hidden_states=hidden_states, **kwargs)
        short = torch.cat([hidden_states[:, :words], self.reducer(plan, hidden_states[:, words:])], 1)
        out = forward(hidden_states=short, **self.turn(kwargs, plan, words))
        return torch.cat([out[:, :words], plan.restore(out[:, words:])], 1)

    def turn(self, kwargs: dict[str, Any], plan: Plan, words: int) -> dict[str, Any]:
        """Gather the rotary embedding, cosine and sine of (words + tokens, D) or (tokens, D), along with the tokens."""
        rotary = kwargs.get("image_rotary_emb")
        if rotary is None:
            return kwargs
        owner = plan.owner[0]
        if rotary[0].shape[0] > self.tokens:
            owner = torch.cat([torch.arange(words, device=owner.device), words + owner])
        return {**kwargs, "image_rotary_emb": tuple(part[owner.to(part.device)] for part in rotary)}


def reduce_all(patch: Patch, layers: Sequence[Reduction], prepare: Callable) -> Patch:
    """Put `layers` on the model.

    `prepare(context)`, before each call of the denoiser, gives `ready(layer, grid)`, which is asked for every layer that the
    call will run: it readies the layer for its grid (frames, height, width) and gives how many of the tokens leave.
    """
    for layer in layers:
        layer.wire(patch)

    def decide(context: StepContext) -> None:
        ready = prepare(context)
        for layer in layers:
            if patch.reaches(layer.block.attn):
                grid = patch.denoiser.grid(context.inputs, layer.block)
                layer.tokens = prod(grid)
                patch.tally(ready(layer, grid), layer.tokens)

    patch.each_call(decide)
    return patch.on()
