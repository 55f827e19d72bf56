"""Attention that is computed for all tokens or given again for all, beside layers of which a few rows are renewed."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from methods._core.cache import Rows, Slot
from methods._core.denoiser import Block


class Held:
    """Around the self-attention of a block: computed where `full`, which the host sets before each call, else given again.

    Behind a layer `total` that joins it with the MLP only the rows which that renews are handed on. At its product,
    `weigh(q, k, v, **more)` -> (product, scores (B, tokens)), which are kept in `scores`.
    """

    def __init__(self, block: Block, slot: Slot, scores: Slot, total: Rows | None, weigh: Callable | None):
        self.block, self.slot, self.scores, self.total, self.weigh, self.full = block, slot, scores, total, weigh, True

    def around(self, forward, *args, **kwargs) -> Any:
        out = self.slot.keep(forward(*args, **kwargs)) if self.full else self.slot.get()
        return out if self.full or self.total is None else self.total.chosen(out)

    def measure(self, _, q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
        """At the attention product, see `Patch.attend`."""
        out, self.scores.value = self.weigh(q, k, v, **more)
        return out
