"""What a patch keeps from one step to another, and the arounds that give it again in place of computing it."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from accel_kernels.rows import gather_rows, scatter_rows
from methods._core.denoiser import Block, Branch


class Slot:
    """One value kept for each branch of a step: a tensor, or tuples, lists and dicts of tensors and anything else.

    `value` is that of the branch now called, None where nothing valid is kept: before the first call of a run, after a step
    in which the branch was not called, in another shape. `keep` and `get` go between what a module computes and `value`,
    which is narrower where the user has set `Patch.limit(dtype=...)`.
    """

    def __init__(self):
        self.value: Any = None
        self.dtype: torch.dtype | None = None         # in which floating-point tensors are kept; None: as they come
        self._wide: torch.dtype | None = None
        self._branch: tuple | None = None
        self._others: dict[tuple, Any] = {}
        self._handed: dict[tuple, Any] = {}

    def select(self, branch: tuple, stale: bool) -> None:
        """Switch to the branch now called, dropping what is kept of it if that is no longer valid."""
        if branch != self._branch:
            if self._branch is not None:
                self._others[self._branch] = self.value
            self._branch, self.value = branch, self._others.pop(branch, None)
        if branch in self._handed:
            self.value = self._handed.pop(branch)
        elif stale:
            self.value = None

    def clear(self) -> None:
        self.value, self._branch = None, None
        self._others.clear()
        self._handed.clear()

    def hand(self, branch: tuple, x: Any) -> None:
        """Let the next call of a branch find a tensor or a tuple of tensors kept, in place of what it has: in a rewrite, its
        part of what is kept of the branch now called."""
        self._handed[branch] = x if self.dtype is None else _cast(x, self.dtype)

    def of(self, branch: tuple) -> Any:
        """What was last kept of another branch, valid or not, in the precision in which it came."""
        value = self._others.get(branch)
        return value if self.dtype is None else _cast(value, self._wide)

    def keep(self, x: Any) -> Any:
        """Keep a tensor or a tuple of tensors. -> x"""
        self.value = x if self.dtype is None else _cast(x, self.dtype)
        self._wide = next(each for each in (x if isinstance(x, tuple) else (x,)) if each is not None).dtype
        return x

    def get(self) -> Any:
        """What was kept, in the precision in which it came."""
        return self.value if self.dtype is None else _cast(self.value, self._wide)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors kept, of every branch."""
        yield from _tensors((self.value, self._others, self._handed))


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, tuple):
        return tuple(_cast(each, dtype) for each in x)
    return x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x


def _tensors(value: Any) -> Iterator[Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


class Reuse:
    """Around a module: keeps what it gives, or gives what was kept. The host sets `reuse` before each call of the denoiser.

    `slot()` makes a place to keep things. A module that is called several times within one call of the denoiser, as under
    forward chunking, has one for each.
    """

    def __init__(self, slot: Callable[[], Slot]):
        self.slot, self.slots = slot, [slot()]
        self.turn = 0
        self._reuse = False

    @property
    def ready(self) -> bool:
        """Whether there is something to give."""
        return self.slots[0].value is not None

    @property
    def reuse(self) -> bool:
        return self._reuse

    @reuse.setter
    def reuse(self, reuse: bool) -> None:
        self._reuse, self.turn = reuse, 0

    def around(self, forward, *args, **kwargs):
        turn, self.turn = self.turn, self.turn + 1
        if self._reuse:
            return self.give(self.slots[turn % len(self.slots)])
        if turn == len(self.slots):
            self.slots.append(self.slot())
        return self.store(self.slots[turn], forward(*args, **kwargs))

    def store(self, slot: Slot, out: Any) -> Any:
        """Keep what the module gave, or what is made of it. -> out"""
        return slot.keep(out)

    def give(self, slot: Slot) -> Any:
        """In place of what the module would give."""
        return slot.get()


class Mute:
    """Around a module that only feeds one that is reused: gives something of the right shape that nobody reads."""

    def __init__(self, reuse: Reuse, module: nn.Module):
        self.reuse = reuse
        self.width = getattr(module, "out_features", None) or module.out_dim

    def around(self, forward, *args, **kwargs):
        if not self.reuse._reuse:
            return forward(*args, **kwargs)
        streams = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
        pair = kwargs.get("encoder_hidden_states") is not None                  # an attention over two streams gives both
        blank = tuple(x[..., :1].expand(*x.shape[:-1], self.width) for x in streams[:1 + pair])
        return blank if pair else blank[0]


def over_branches(around: Callable, blocks: Iterable[Block], make: Callable[[], Reuse]) -> list[tuple[Branch, Reuse]]:
    """Stand, by `Patch.around`, around every branch of these blocks with a `make()` of its own, and mute what only feeds it."""
    made = [(branch, make()) for block in blocks for branch in block.branches]
    for branch, reuse in made:
        around(branch.module, reuse.around)
        for feed in branch.feeds:
            around(feed, Mute(reuse, feed).around)
    return made


class Deep:
    """Around a module of a UNet that shallow steps leave out. The last of them gives the kept feature, which enters the first
    layer that runs; the others something of the right shape, which nobody reads: to it the residuals of a ControlNet or of an
    adapter may be added.

    The host sets `shallow` before each call of the denoiser.
    """

    def __init__(self, slot: Slot | None = None):
        self.slot = slot
        self.shallow = False
        self.blank = None

    def around(self, forward, *args, **kwargs):
        if self.shallow:
            return _fresh(self.blank if self.slot is None else self.slot.get())
        out = forward(*args, **kwargs)
        if self.slot is None:
            self.blank = _shape(out)
            return out
        return self.slot.keep(out)


def _shape(x: Any) -> Any:
    """Its shape, without its memory."""
    return tuple(map(_shape, x)) if isinstance(x, tuple) else x.new_zeros(()).expand(x.shape)


def _fresh(x: Any) -> Any:
    """A copy, since FreeU scales features in place and adapters add to them."""
    return tuple(map(_fresh, x)) if isinstance(x, tuple) else x.clone()


class Delta:
    """Around blocks that follow each other: keeps what they add to their streams together, or adds that in place of them all.

    The host sets `reuse` before each call of the denoiser, and refuses calls of which `Denoiser.adds_between` is true. A call
    that does not reuse forgets what was kept; nothing is kept of one that passes over the first or the last of the blocks.
    """

    def __init__(self, slot: Slot, blocks: Iterable[Block]):
        self.slot, self.parts = slot, [_Part(self, block) for block in blocks]
        self.start: tuple[Tensor, Tensor | None] | None = None
        self._reuse = False
        self.choose(range(self.parts[-1].block.index + 1))

    @property
    def blocks(self) -> list[Block]:
        """Those chosen."""
        return [part.block for part in self.chosen]

    @property
    def ready(self) -> bool:
        """Whether there is something to add."""
        return self.slot.value is not None

    @property
    def reuse(self) -> bool:
        return self._reuse

    @reuse.setter
    def reuse(self, reuse: bool) -> None:
        self._reuse, self.start = reuse, None
        for part in self.chosen:
            part.skip = reuse
        if not reuse:
            self.slot.value = None

    def choose(self, span: range) -> None:
        """Take only those blocks that have an index in `span`, perhaps none, in this call and the following ones."""
        self.chosen = [part for part in self.parts if part.block.index in span]
        for part in self.parts:
            part.skip, part.first, part.last = False, part in self.chosen[:1], part in self.chosen[-1:]

    def arounds(self) -> Iterator[tuple[nn.Module, Callable]]:
        """The modules to stand around, with what stands there."""
        return ((part.block.module, part.around) for part in self.parts)


class _Part:
    """One block of a `Delta`: run, or left out. The delta is added behind the first of them."""

    def __init__(self, delta: Delta, block: Block):
        self.delta, self.block = delta, block
        self.skip = self.first = self.last = False          # set by the host

    def around(self, forward, *args, **kwargs):
        streams, slot = self.block.streams(args, kwargs), self.delta.slot
        if self.skip and self.first:                        # the sum lies in memory as its first term, the kept delta
            streams = (x if more is None else more + x for x, more in zip(streams, slot.get(), strict=True))
        if self.skip:
            return self.block.output(*streams)
        if self.first:
            self.delta.start = tuple(x if x is None else x.contiguous() for x in streams)       # the last compiles once then
        out = forward(*args, **kwargs)
        if self.last and self.delta.start is not None:
            old, self.delta.start = self.delta.start, None
            slot.keep(tuple(None if y is None else y - x for y, x in zip(self.block.split(out), old, strict=True)))
        return out


class Passed:
    """Around a block whose output nobody reads: run, or passed over, its streams as they came.

    The host sets `over` before each call of the denoiser.
    """

    def __init__(self, block: Block):
        self.block, self.over = block, False

    def around(self, forward, *args, **kwargs):
        return self.block.output(*self.block.streams(args, kwargs)) if self.over else forward(*args, **kwargs)


def chains(blocks: Iterable[Block]) -> list[list[Block]]:
    """Blocks in execution order, parted where the model lays its tokens out anew between two of them."""
    def streams(block: Block) -> tuple:
        return block.temporal, block.row.returns, block.stream == "fused" and len(block.row.returns) == 1

    return [list(chain) for _, chain in itertools.groupby(blocks, key=streams)]


class Rows:
    """Around a layer over tokens: all of them, or the rows of `index` (B, k) written into its last output.

    The host sets `index` before each call of the denoiser; None computes all, no rows give the last output as it is.
    """

    def __init__(self, slot: Slot):
        self.slot = slot
        self.index: Tensor | None = None

    def chosen(self, x: Tensor) -> Tensor:
        return x if self.index is None else gather_rows(x, self.index)

    def around(self, forward, x: Tensor, *args, **kwargs):
        if self.index is not None and self.index.shape[1] == 0:
            return self.slot.get()
        return self.written(forward(self.chosen(x), *args, **kwargs))

    def written(self, rows: Tensor) -> Tensor:
        return self.slot.keep(rows if self.index is None else scatter_rows(self.slot.get(), self.index, rows))


def of_any_length(index: Tensor) -> Tensor:
    """index (B, k) as it is, marked so that blocks that compile do so once for every k."""
    index = index.clone(memory_format=torch.contiguous_format)
    torch._dynamo.maybe_mark_dynamic(index, 1)
    return index
