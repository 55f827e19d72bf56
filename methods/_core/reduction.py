"""Self-attention on fewer image tokens: a token plan goes around it, whatever the attention is called with."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from torch import Tensor

from methods._core.context import StepContext
from methods._core.denoiser import Block, Call
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
        patch.around(self.block.attn, self.around, Claim.TOKENS)

    def observe(self, forward, x: Tensor, *args, **kwargs):
        """Around the norm: x is the block's input, (B, N, C), with the text in it where that is one sequence."""
        self.input = x.movedim(self.block.row.sequence_axis, 1)
        return forward(x, *args, **kwargs)

    def plan(self, call: Call) -> Plan | None:
        """From the block's input: the image's tokens in it."""
        x, self.input = self.input, None
        return self.planner(x.narrow(1, call.start(self.tokens), self.tokens))

    def around(self, forward, *args, **kwargs):
        call = self.block.call(args, kwargs)
        plan = self.plan(call)
        if plan is None:
            return forward(*args, **kwargs)
        out = forward(**call.shorter(self.tokens, plan.owner[0], lambda x: self.reducer(plan, x)))
        return call.restored(out, self.tokens, plan.owner.shape[1], plan.restore)


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
                grid = context.grid(layer.block)
                layer.tokens = prod(grid)
                patch.tally(ready(layer, grid), layer.tokens)

    patch.each_call(decide)
    return patch.on()
