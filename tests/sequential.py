"""Guidance as it is where memory is short: the model is called once for each branch."""
import torch

from methods._core.context import Rewrite
from methods._core.patch import Patch
from methods._core.site import Claim


def in_two_calls(pipe):
    """A patch that makes two calls of each that carries two branches of guidance."""
    patch = Patch(pipe, "in_two_calls")

    def part(context):
        if not context.guided:
            return None
        patch.counts["parted"] += 1
        return Rewrite(tuple(map(context.only, context.rows.parts)), lambda *outs: torch.cat(outs))

    patch.rewrite(part, Claim.GUIDANCE)
    return patch.on()
