"""The model families this library knows, as data: one file a family, found by looking, so that a new row edits none.

A row says where a class of diffusers keeps its blocks and how each calls its attention, by names. Classes are named by
strings, so that a release of diffusers without one of them still imports. What a row says is proved on a running pipeline by
`tests/test_families.py`; a class that would need an exception beyond the flags of `Blocks` has no row.
"""
from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from methods._core.families.clocks import scheduler_time
from methods._core.families.grids import Grid

Axis = int | tuple[int, ...]


@dataclass(frozen=True)
class Blocks:
    """One list of equal transformer blocks, by the names of their parts.

    Attributes:
        at: path from the model to the blocks, "*" for each item ("double_stream_blocks.*.block").
        attn, norm, cross, ff: the self-attention; the module before it, which is first called with the block's input;
            cross-attention; feed-forward. None where there is none.
        ff_text: feed-forward of the text.
        more: further modules whose output joins the residual stream.
        total: (projection, what feeds it, ...) of blocks that project attention and feed-forward together.
        text: where the words are at the attention. None: not here. "apart": a second stream, which it takes and gives back
            behind the image's. "within": in one sequence with the image.
        text_first: the words stand before the image in the sequence of the attention product.
        along: arguments of the attention that run along its tokens (rotary tables, masks) -> the axis, or axes, on which
            they do; "name.0" for the first of a pair.
        returns: what the block gives, among "image" and "text".
        second: the argument of the block that holds its second stream.
        temporal: tokens are the frames at one place.
        product: how its self-attention computes: "one" scaled dot product, "each" sample by itself, or "none" (linear).
        alone: the attention module computes nothing but attention.
        sequence_axis: of what enters the norm.
        shared: the feed-forward is called once for the image and once for the text.
    """

    at: str
    attn: str = "attn1"
    norm: str = "norm1"
    cross: str | None = "attn2"
    ff: str | None = "ff"
    ff_text: str | None = None
    more: tuple[str, ...] = ()
    total: tuple[str, ...] = ()
    text: str | None = None
    text_first: bool = True
    along: Mapping[str, Axis] = field(default_factory=dict)
    returns: tuple[str, ...] = ("image",)
    second: str = "encoder_hidden_states"
    temporal: bool = False
    product: str = "one"
    alone: bool = True
    sequence_axis: int = 1
    shared: bool = False


@dataclass(frozen=True)
class Family:
    """A row: model classes that are built alike.

    Attributes:
        name: of the family, as the catalogue has it.
        classes: names of the classes.
        lists: of blocks, in the order in which they run; none for a UNet, whose stages are found by themselves.
        grid: how the latent becomes frames, rows and columns of tokens.
        latent, time: the inputs of the model's forward that hold the latent and the time.
        clock: (t, sigma, train steps) of the scheduler -> the model's time.
        embed: the module that gives tokens which carry their positions, called with [text and] latent.
        tail: the module that the tokens enter behind the last block.
        head: the last projection, of tokens to patches.
        cut: inputs of the model that run along the image tokens -> axis.
        shared: further inputs that are the same for all samples.
        listed: inputs of the model that are lists with one item a sample.
        by_sample: what is given for one sample does not depend on the others: no padding to the longest, no packing.
        batched: pipelines put the branches of guidance into one batch.
        cond_first: in that batch the conditional branch stands first.
        interleaved: the lists of blocks take turns.
        chained: each block is given what the one before it gave.
        plain: the model's input is the scheduler's sample, and its output what the scheduler steps with.
        latents: sequences that are denoised at once.
        unet: stages with skip connections.
    """

    name: str
    classes: tuple[str, ...]
    lists: tuple[Blocks, ...] = ()
    grid: Grid = Grid()
    latent: str = "hidden_states"
    time: str = "timestep"
    clock: Callable[..., float] = scheduler_time
    embed: str | None = None
    tail: str | None = None
    head: str | None = None
    cut: Mapping[str, int] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    by_sample: bool = True
    batched: bool = True
    cond_first: bool = False
    interleaved: bool = False
    chained: bool = True
    plain: bool = True
    latents: int = 1
    unet: bool = False


@functools.cache
def families() -> dict[str, Family]:
    """Name of each model class -> its row."""
    rows = {}
    for module in pkgutil.iter_modules(__path__):
        row = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        rows |= {name: row for name in row.classes} if row else {}
    return rows


def find(model_class: type) -> Family | None:
    """The row of a model class or of the nearest class it derives from."""
    return next((families()[base.__name__] for base in model_class.__mro__ if base.__name__ in families()), None)
