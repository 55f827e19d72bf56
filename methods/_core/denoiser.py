"""What a method may know about a denoiser: its blocks and their parts, by what they are, never by class or family.

`describe(model)` looks up the names that the row of the model's class gives (`methods._core.families`). A method picks blocks
by what they have: self-attention over the image alone, positions inside, a level of a UNet.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from methods._core.families import Axis, Blocks, Family, families, find
from methods._core.families.grids import Unknown


@dataclass(frozen=True)
class Branch:
    """A residual branch of a block: `module` returns its output before the gate; `feeds` run only to feed it."""

    name: str
    module: nn.Module
    feeds: tuple[nn.Module, ...] = ()


@dataclass(eq=False)
class Block:
    """One transformer block: the modules that its `row` names.

    `level` is the downsampling level in a UNet and 0 elsewhere; `index` counts the blocks in execution order. `attn` is the
    self-attention and `norm` the module before it, whose first argument is the block's input. `behind` are the tokens that
    follow the image's own in its stream (references, padding), as of the present call of the denoiser.
    """

    module: nn.Module
    index: int
    level: int
    row: Blocks
    norm: nn.Module
    attn: nn.Module
    cross: nn.Module | None
    ff: nn.Module | None
    branches: tuple[Branch, ...]
    behind: int = 0

    def __post_init__(self) -> None:
        self._names = tuple(inspect.signature(type(self.attn).forward).parameters)[1:]
        self._takes = tuple(inspect.signature(type(self.module).forward).parameters)[1:]

    @property
    def stream(self) -> str:
        """What the attention is called with: "image" alone, "joint" with the text as a second stream, or "fused" with both in
        one sequence."""
        return {None: "image", "apart": "joint", "within": "fused"}[self.row.text]

    @property
    def rotary(self) -> bool:
        """Positions, or a mask, enter inside the attention, so that all samples must keep the same tokens."""
        return bool(self.row.along)

    @property
    def by_rows(self) -> bool:
        """Rows of its feed-forward can be computed by themselves, and its attention product can be seen."""
        row = self.row
        return row.alone and not row.shared and row.product == "one" and not (row.total and row.text == "apart")

    @property
    def masked(self) -> bool:
        """The attention may be given a mask."""
        return any("mask" in name for name in self.row.along)

    @property
    def text_first(self) -> bool:
        """The text stands before the image in the sequence of the attention product."""
        return self.row.text is not None and self.row.text_first

    @property
    def self_attentions(self) -> list[nn.Module]:
        """`attn`, and in some blocks of SD3 a second one over the image alone."""
        return [self.attn, *(branch.module for branch in self.branches if branch.name == "attn2")]

    @property
    def temporal(self) -> bool:
        return self.row.temporal

    @property
    def chunked(self) -> bool:
        """Whether the feed-forward is called in pieces (forward chunking)."""
        return getattr(self.module, "_chunk_size", None) is not None

    def call(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        """A call of the attention, its arguments by name."""
        return Call(self, {**dict(zip(self._names, args, strict=False)), **kwargs})

    def start(self, length: int, tokens: int) -> int:
        """Where `tokens` of the image begin in the sequence of the attention product, of that length."""
        return length - tokens - self.behind if self.text_first else 0

    def parted(self, x: Tensor, tokens: int, dim: int = 2) -> tuple[Tensor, Tensor]:
        """(image, rest) of what runs along the tokens of the attention product, of which `tokens` are the image's."""
        start, n = self.start(x.shape[dim], tokens), x.shape[dim]
        image, before = x.narrow(dim, start, tokens), x.narrow(dim, 0, start)
        after = x.narrow(dim, start + tokens, n - start - tokens)
        if not before.shape[dim]:
            return image, after
        return image, before if not after.shape[dim] else torch.cat([before, after], dim)

    def joined(self, image: Tensor, rest: Tensor, dim: int = 2) -> Tensor:
        """The sequence of the attention product again, in which the image may have another length."""
        if not self.text_first:
            return torch.cat([image, rest], dim)
        before, after = rest.split([rest.shape[dim] - self.behind, self.behind], dim)
        return torch.cat([before, image, after] if self.behind else [before, image], dim)

    def streams(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """(image, text) of a call of the block; no text where it does not give any back."""
        given = {**dict(zip(self._takes, args, strict=False)), **kwargs}
        return given[self._takes[0]], given.get(self.row.second) if "text" in self.row.returns else None

    def output(self, image: Tensor, text: Tensor | None) -> Tensor | tuple[Tensor | None, ...]:
        """What the block gives for these streams."""
        if len(self.row.returns) == 1:
            return image
        return tuple(image if name == "image" else text for name in self.row.returns)

    def split(self, output: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
        """(image, text) of what the block gave."""
        if len(self.row.returns) == 1:
            return output, None
        return output[self.row.returns.index("image")], output[self.row.returns.index("text")]


class Call:
    """One call of a block's self-attention: `given` are its arguments by name, `x` (B, N, C) what holds the image's tokens."""

    def __init__(self, block: Block, given: dict[str, Any]):
        self.block, self.given = block, given
        self.x: Tensor = given[block._names[0]]
        self.words = 0                                # of a second stream
        if block.row.text == "apart":
            name = next(name for name in block._names if name.endswith("encoder_hidden_states"))
            self.words = given[name].shape[1] if given.get(name) is not None else 0

    def start(self, tokens: int) -> int:
        """Where the image's tokens begin in x."""
        return self.block.start(self.x.shape[1], tokens) if self.block.stream == "fused" else 0

    def shorter(self, tokens: int, owner: Tensor, rows: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The arguments with `rows` of the image's tokens in place of all; what runs along them is gathered by `owner`, the
        positions (rows,) that they stand for."""
        i = self.start(tokens)
        short = torch.cat([self.x[:, :i], rows(self.x[:, i:i + tokens]), self.x[:, i + tokens:]], 1)
        given = {name: short if value is self.x else value for name, value in self.given.items()}
        return given if not self.block.row.along else self._gathered(given, i, self.x.shape[1], tokens, owner)

    def turned(self, tokens: int, owner: Tensor) -> dict[str, Any]:
        """The arguments where x has `owner` in place of the image's `tokens` already."""
        n = self.x.shape[1] + tokens - len(owner)
        start = self.block.start(n, tokens) if self.block.stream == "fused" else 0
        return self._gathered(dict(self.given), start, n, tokens, owner)

    def _gathered(self, given: dict[str, Any], i: int, n: int, tokens: int, owner: Tensor) -> dict[str, Any]:
        """What runs along a sequence of n, in which `owner` stand for the `tokens` from i on."""
        kept = {n: _kept(owner, i, tokens, n)}
        if self.words:
            first = self.words if self.block.row.text_first else 0
            kept[n + self.words] = _kept(owner, first + i, tokens, n + self.words)
        for name, axis in self.block.row.along.items():
            name, _, part = name.partition(".")
            value = given.get(name)
            if value is not None and part:
                given[name] = tuple(_along(each, axis, kept) if j == int(part) else each for j, each in enumerate(value))
            elif value is not None:
                given[name] = _along(value, axis, kept)
        return given

    def restored(self, out: Any, tokens: int, rows: int, restore: Callable[[Tensor], Tensor]) -> Any:
        """What the attention gave for `rows` of the image's tokens, with all of them again."""
        image, i = out[0] if isinstance(out, tuple) else out, self.start(tokens)
        image = torch.cat([image[:, :i], restore(image[:, i:i + rows]), image[:, i + rows:]], 1) if image.shape[1] > rows \
            else restore(image)
        return (image, *out[1:]) if isinstance(out, tuple) else image


def _kept(owner: Tensor, start: int, tokens: int, length: int) -> Tensor:
    """Positions of a sequence in which `owner` stand for the `tokens` from `start` on."""
    rest = torch.arange(length, device=owner.device)
    return torch.cat([rest[:start], start + owner, rest[start + tokens:]])


def _along(value: Any, axis: Axis, kept: Mapping[int, Tensor]) -> Any:
    """The kept positions of a table or a pair of tables; an axis of another length (1, or the words') stays whole."""
    if isinstance(value, (tuple, list)):
        return type(value)(_along(each, axis, kept) for each in value)
    for each in axis if isinstance(axis, tuple) else (axis,):
        if value.ndim > (each if each >= 0 else -each - 1) and value.shape[each] in kept:
            value = value.index_select(each, kept[value.shape[each]].to(value.device))
    return value


@dataclass(frozen=True)
class Stage:
    """One block of a UNet.

    `side` is "down", "mid" or "up"; `number` counts from the full-resolution end; `layers` are its modules in execution
    order, a tuple for each resnet with what follows it; `sampler` is the down- or upsampler that ends them.
    """

    module: nn.Module
    side: str
    number: int
    layers: tuple[tuple[nn.Module, ...], ...]
    sampler: nn.Module | None

    @property
    def attentions(self) -> tuple[nn.Module, ...]:
        """The spatial transformers among its layers."""
        return tuple(getattr(self.module, "attentions", None) or ())


@dataclass(frozen=True)
class Denoiser:
    """A described model: its blocks in execution order, and what its `row` says of its inputs."""

    row: Family
    model: nn.Module
    blocks: tuple[Block, ...]
    unet: tuple[Stage, ...] = field(default=())    # the stages of a UNet in execution order

    @property
    def family(self) -> str:
        return self.row.name

    @property
    def chain(self) -> tuple[Block, ...]:
        """The blocks, if each is given what the one before it gave; none on a UNet."""
        return self.blocks if self.row.chained and not self.row.unet else ()

    @property
    def block_classes(self) -> tuple[type, ...]:
        """Compiled one by one."""
        return tuple(dict.fromkeys(type(block.module) for block in self.blocks))

    @property
    def embed(self) -> nn.Module | None:
        """Called with [text and] latent, gives tokens that carry their positions."""
        return self._named(self.row.embed)

    @property
    def tail(self) -> nn.Module | None:
        """What the tokens enter behind the last block."""
        return self._named(self.row.tail)

    @property
    def head(self) -> nn.Module | None:
        """The last projection, tokens to patches of the output."""
        return self._named(self.row.head)

    def _named(self, name: str | None) -> nn.Module | None:
        return getattr(self.model, name, None) if name else None

    @property
    def multiple(self) -> int:
        """The sides of a latent are multiples of this."""
        return 2 ** (len(self.model.down_blocks) - 1) if self.row.unet else self.row.grid.patch(self.model)[1]

    def grid(self, inputs: dict[str, Any], block: Block) -> tuple[int, int, int]:
        """(frames, height, width) of the block's image tokens, for these inputs."""
        return self.at(self.size(inputs), block)

    def size(self, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """(frames, height, width) of the image tokens at full resolution, for these inputs."""
        return self.row.grid(self.model, inputs, self.row.latent)

    def at(self, size: tuple[int, int, int], block: Block) -> tuple[int, int, int]:
        """(frames, height, width) of the block's image tokens, where at full resolution they have this `size`."""
        frames, height, width = size
        if block.temporal:
            return frames, 1, 1
        step = 2 ** block.level
        return (1 if self.row.grid.per_frame else frames), math.ceil(height / step), math.ceil(width / step)

    def sample(self, inputs: dict[str, Any]) -> Tensor:
        """The latent: (B, C, [F,] H, W) with its frames on axis `row.grid.frames`, or packed (B, N, C)."""
        return self.tensor(inputs[self.row.latent])

    def tensor(self, x: Any) -> Tensor:
        """A latent or an output as one tensor, where the model has a list with one item a sample."""
        return torch.stack(list(x)) if isinstance(x, (list, tuple)) else x

    def as_input(self, sample: Tensor) -> dict[str, Any]:
        """The latent as the model takes it, by name."""
        return {self.row.latent: self.as_output(sample)}

    def as_output(self, x: Tensor) -> Any:
        """A latent or an output as the model takes and gives it."""
        return list(x.unbind()) if self.row.latent in self.row.listed else x

    def behind(self, inputs: dict[str, Any]) -> int:
        """How many tokens follow the image's own in a packed latent: references."""
        return self.sample(inputs).shape[1] - math.prod(self.size(inputs)) if self.row.grid.packed else 0

    def note(self, behind: int) -> None:
        """Note for the blocks how many tokens follow the image's own in this call."""
        for block in self.blocks:
            block.behind = behind

    def blocks_at(self, max_downsample: int) -> list[Block]:
        """Blocks over the tokens of frames whose grid is at most so many times coarser than at full resolution, and whose
        attention costs more than in proportion to them."""
        return [block for block in self.blocks if 2 ** block.level <= max_downsample and not block.temporal
                and block.row.product != "none" and not isinstance(self.row.grid, Unknown)]

    def left_out(self, inputs: dict[str, Any]) -> set[int]:
        """Ids of the modules in those blocks that the inputs tell the model to pass over (skip-layer guidance)."""
        layers = inputs.get("skip_layers") or ()
        return {id(part) for block in self.blocks if block.index in layers for part in block.module.modules()}

    @staticmethod
    def adds_between(inputs: dict[str, Any]) -> bool:
        """Whether the inputs hold what the model adds to its tokens between two blocks (residuals of a ControlNet)."""
        return any("controlnet" in name and value is not None for name, value in inputs.items())


def check_whole(blocks: Iterable[Block]) -> None:
    """
    Raises:
        RuntimeError: a feed-forward is called in pieces, so that rows of a sequence cannot be computed apart.
    """
    if any(block.chunked for block in blocks):
        raise RuntimeError("rows of whole sequences are to be computed here: switch forward chunking off")


def check_downsample(max_downsample: int) -> None:
    """
    Raises:
        ValueError: not a number of times by which the grid of a UNet can be coarser.
    """
    if max_downsample not in (1, 2, 4, 8):
        raise ValueError(f"max_downsample={max_downsample} must be 1, 2, 4 or 8")


# ---- looking the names up -------------------------------------------------------------------------------------------------


def describe(model: nn.Module) -> Denoiser:
    """The row of a model's class, filled in for this model.

    Raises:
        TypeError: no row for this class.
    """
    row = find(type(model))
    if row is None:
        known = ", ".join(sorted(families()))
        raise TypeError(f"{type(model).__name__} is not a denoiser this library knows; see what two steps show of it with "
                        "methods.guess(pipe, run), where run() samples them, or tools/new_family.py, which writes a row. "
                        f"It knows {known}")
    if row.unet:
        stages = tuple(_stages(model))
        return Denoiser(row, model, tuple(_unet_blocks(model, stages)), stages)
    lists = [[(each, module) for module in _walk(model, each.at)] for each in row.lists]
    order = (pair for turn in zip(*lists, strict=True) for pair in turn) if row.interleaved else sum(lists, [])
    return Denoiser(row, model, tuple(_block(each, module, i) for i, (each, module) in enumerate(order)))


def _walk(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules of a list, or with "*" what lies at the path from each of them; none where the model has no such list."""
    found: list[Any] = [model]
    for step in (path if "*" in path else f"{path}.*").split("."):
        found = [each for one in found for each in (one if step == "*" else filter(None, [getattr(one, step, None)]))]
    return found


def _block(row: Blocks, module: nn.Module, index: int, level: int = 0) -> Block:
    def part(name: str | None) -> nn.Module | None:
        return getattr(module, name, None) if name else None

    if row.total:
        projection, *feeds = map(part, row.total)
        branches = [Branch("total", projection, tuple(feeds))]
    else:
        named = {"attn": row.attn, "cross": row.cross, "ff": row.ff, "ff_context": row.ff_text}
        named |= {more: more for more in row.more}
        branches = [Branch(name, part(where)) for name, where in named.items() if part(where) is not None]
    return Block(module, index, level, row, part(row.norm), part(row.attn), part(row.cross), part(row.ff), tuple(branches))


LAYERS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")    # of a stage, in the order of a layer


def _stages(model: nn.Module) -> Iterator[Stage]:
    def stage(module: nn.Module, side: str, number: int, samplers: Any) -> Stage:
        kinds = [list(getattr(module, name, None) or ()) for name in LAYERS]
        layers = [tuple(kind[i] for kind in kinds if i < len(kind) and kind[i] is not None) for i in range(len(module.resnets))]
        return Stage(module, side, number, tuple(layers), samplers[0] if samplers else None)

    for number, module in enumerate(model.down_blocks):
        yield stage(module, "down", number, module.downsamplers)
    if model.mid_block is not None:
        yield stage(model.mid_block, "mid", len(model.down_blocks), None)
    for number, module in zip(reversed(range(len(model.up_blocks))), model.up_blocks, strict=True):
        yield stage(module, "up", number, module.upsamplers)


def _unet_blocks(model: nn.Module, stages: Iterable[Stage]) -> Iterator[Block]:
    """Blocks of the spatial attentions; a stage of a bare attention (Kandinsky 2, IF) has none."""
    index, last = 0, len(model.down_blocks) - 1          # the middle block runs at the resolution of the last down block
    for stage in stages:
        for attention in stage.attentions:
            for module in getattr(attention, "transformer_blocks", ()):
                yield _block(Blocks("transformer_blocks"), module, index, min(stage.number, last))
                index += 1
