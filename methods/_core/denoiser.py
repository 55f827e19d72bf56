"""What a method may know about a denoiser. One row per model class; no other file names a model.

`describe(model)` lists the transformer blocks in execution order with handles on their parts, and says how the latent
becomes a token grid. A method picks blocks by what they have (self-attention, rotary positions, level), never by class.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    LatteTransformer3DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

STREAMS = ("hidden_states", "encoder_hidden_states")      # the first arguments of every block


@dataclass(frozen=True)
class Branch:
    """A residual branch of a block: `module` returns its output before the gate; `feeds` run only to feed it."""

    name: str
    module: nn.Module
    feeds: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class Block:
    """One transformer block.

    `level` is the downsampling level in a UNet and 0 elsewhere; `index` counts the blocks in execution order. `attn` is the
    self-attention and `norm` the module before it, whose first argument is the block's input. `stream` says what the
    attention is called with: "image" -> attn(x, ...) gives x; "joint" -> attn(hidden_states=x, encoder_hidden_states=text)
    gives (x, text); "fused" -> attn(hidden_states=[text, x]), one sequence. `text_first`: where the text stands in the
    sequence of the attention product. `rotary`: positions enter inside the attention. `temporal`: tokens are the frames at
    one place. `returns`: what the block itself gives, among "image" and "text".
    """

    module: nn.Module
    index: int
    level: int
    norm: nn.Module
    attn: nn.Module
    cross: nn.Module | None
    ff: nn.Module | None
    stream: str
    branches: tuple[Branch, ...]
    rotary: bool = False
    temporal: bool = False
    text_first: bool = True
    returns: tuple[str, ...] = ("image",)

    @property
    def chunked(self) -> bool:
        """Whether the feed-forward is called in pieces (forward chunking)."""
        return getattr(self.module, "_chunk_size", None) is not None

    def parted(self, x: Tensor, tokens: int, dim: int = 2) -> tuple[Tensor, Tensor]:
        """(image, text) of what runs along the tokens of the attention product, of which `tokens` are the image's."""
        words = x.shape[dim] - tokens
        return x.narrow(dim, words if self.text_first else 0, tokens), x.narrow(dim, 0 if self.text_first else tokens, words)

    def joined(self, image: Tensor, text: Tensor, dim: int = 2) -> Tensor:
        """The sequence of the attention product again, in which the image may have another length."""
        return torch.cat([text, image] if self.text_first else [image, text], dim)

    def streams(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """(image, text) of a call of the block; no text where it does not give any back."""
        image, text = (args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(STREAMS))
        return image, text if "text" in self.returns else None

    def output(self, image: Tensor, text: Tensor | None) -> Tensor | tuple[Tensor | None, ...]:
        """What the block gives for these streams."""
        return image if len(self.returns) == 1 else tuple(image if name == "image" else text for name in self.returns)

    def split(self, output: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
        """(image, text) of what the block gave."""
        if len(self.returns) == 1:
            return output, None
        return output[self.returns.index("image")], output[self.returns.index("text")]


@dataclass(frozen=True)
class Denoiser:
    """A described model.

    `grid(inputs, block)` -> (frames, height, width) of the block's image tokens, for these inputs. `latent` and `time` name
    the inputs of forward that hold them, `latent` (B, C, [F,] H, W) with its frames on axis `frame_axis`, or packed (B, N, C).
    """

    family: str
    model: nn.Module
    blocks: tuple[Block, ...]
    grid: Callable[[dict[str, Any], Block], tuple[int, int, int]]
    block_classes: tuple[type, ...]                # compiled one by one
    latent: str = "hidden_states"
    time: str = "timestep"
    batched_guidance: bool = True                  # pipelines put the branches of guidance into one batch
    cond_first: bool = False                       # order of these in the batch
    timestep_scale: float = 1.0                    # scheduler timestep / timestep given to the model
    unet: tuple[Stage, ...] = field(default=())    # the stages of a UNet in execution order
    embed: nn.Module | None = None                 # of a transformer: called with [text and] latent, gives placed tokens
    tail: nn.Module | None = None                  # of a transformer: what the tokens enter behind the last block
    head: nn.Module | None = None                  # of a transformer: the last projection, tokens to patches of the output
    multiple: int = 1                              # the sides of a latent are multiples of this
    frame_axis: int | None = None                  # of a video latent

    def blocks_at(self, max_downsample: int) -> list[Block]:
        """Blocks over the tokens of frames whose grid is at most so many times coarser than at full resolution."""
        return [block for block in self.blocks if 2 ** block.level <= max_downsample and not block.temporal]

    def left_out(self, inputs: dict[str, Any]) -> set[int]:
        """Ids of the modules in those blocks that the inputs tell the model to pass over (skip-layer guidance)."""
        layers = inputs.get("skip_layers") or ()
        return {id(part) for block in self.blocks if block.index in layers for part in block.module.modules()}

    @staticmethod
    def adds_between(inputs: dict[str, Any]) -> bool:
        """Whether the inputs hold what the model adds to its tokens between two blocks (residuals of a ControlNet)."""
        return any("controlnet" in name and value is not None for name, value in inputs.items())

    @property
    def parts(self) -> list[nn.Module]:
        """What has an output that a patch may store or shorten: branches of blocks, and stages, layers, samplers of a UNet."""
        parts = [branch.module for block in self.blocks for branch in block.branches]
        for stage in self.unet:
            parts += [stage.module, *(module for pair in stage.layers for module in pair), stage.sampler]
        return [module for module in parts if module is not None]


@dataclass(frozen=True)
class Stage:
    """One block of a UNet.

    `side` is "down", "mid" or "up"; `number` counts from the full-resolution end; `layers` are (resnet, attention or None)
    pairs in execution order; `sampler` is the down- or upsampler that follows them.
    """

    module: nn.Module
    side: str
    number: int
    layers: tuple[tuple[nn.Module, nn.Module | None], ...]
    sampler: nn.Module | None


def _basic(module: nn.Module, index: int, level: int = 0, temporal: bool = False) -> Block:
    branches = [Branch("attn", module.attn1)]
    if module.attn2 is not None:
        branches.append(Branch("cross", module.attn2))
    branches.append(Branch("ff", module.ff))
    return Block(module, index, level, module.norm1, module.attn1, module.attn2, module.ff, "image", tuple(branches),
                 temporal=temporal)


def _patch_grid(model: nn.Module) -> Callable:
    p = model.config.patch_size

    def grid(inputs: dict, block: Block) -> tuple[int, int, int]:
        *_, height, width = inputs["hidden_states"].shape
        return 1, height // p, width // p
    return grid


def _stages(model: UNet2DConditionModel) -> Iterator[Stage]:
    def stage(module, side, number, samplers):
        attentions = getattr(module, "attentions", None) or [None] * len(module.resnets)
        sampler = samplers[0] if samplers else None
        return Stage(module, side, number, tuple(zip(module.resnets, attentions, strict=False)), sampler)

    for number, module in enumerate(model.down_blocks):
        yield stage(module, "down", number, module.downsamplers)
    if model.mid_block is not None:
        yield stage(model.mid_block, "mid", len(model.down_blocks), None)
    for number, module in zip(reversed(range(len(model.up_blocks))), model.up_blocks, strict=True):
        yield stage(module, "up", number, module.upsamplers)


def _unet(model: UNet2DConditionModel) -> Denoiser:
    stages = tuple(_stages(model))
    blocks, last = [], len(model.down_blocks) - 1
    for stage in stages:
        level = min(stage.number, last)              # the middle block runs at the resolution of the last down block
        for attention in getattr(stage.module, "attentions", None) or ():
            blocks += [_basic(module, len(blocks) + i, level) for i, module in enumerate(attention.transformer_blocks)]

    def grid(inputs: dict, block: Block) -> tuple[int, int, int]:
        *_, height, width = inputs["sample"].shape
        return 1, math.ceil(height / 2 ** block.level), math.ceil(width / 2 ** block.level)

    classes = tuple({type(block.module) for block in blocks})
    return Denoiser("unet", model, tuple(blocks), grid, classes, latent="sample", unet=stages, multiple=2 ** last)


def _transformer(family: str, cond_first: bool = False) -> Callable[[nn.Module], Denoiser]:
    def row(model: nn.Module) -> Denoiser:
        blocks = tuple(_basic(module, i) for i, module in enumerate(model.transformer_blocks))
        head = model.proj_out_2 if family == "dit" else model.proj_out
        return Denoiser(family, model, blocks, _patch_grid(model), (type(blocks[0].module),), cond_first=cond_first,
                        embed=model.pos_embed, tail=model.norm_out, head=head, multiple=model.config.patch_size)
    return row


def _latte(model: LatteTransformer3DModel) -> Denoiser:
    pairs = zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)
    modules = [(module, side == 1) for pair in pairs for side, module in enumerate(pair)]
    blocks = tuple(_basic(module, i, temporal=temporal) for i, (module, temporal) in enumerate(modules))
    spatial = _patch_grid(model)

    def grid(inputs: dict, block: Block) -> tuple[int, int, int]:
        return (inputs["hidden_states"].shape[2], 1, 1) if block.temporal else spatial(inputs, block)

    return Denoiser("latte", model, blocks, grid, (type(blocks[0].module),), embed=model.pos_embed, tail=model.norm_out,
                    head=model.proj_out, multiple=model.config.patch_size, frame_axis=2)


def _sd3(model: SD3Transformer2DModel) -> Denoiser:
    blocks = []
    for i, module in enumerate(model.transformer_blocks):
        branches = [Branch("attn", module.attn), Branch("attn2", module.attn2), Branch("ff", module.ff),
                    Branch("ff_context", module.ff_context)]
        blocks.append(Block(module, i, 0, module.norm1, module.attn, None, module.ff, "joint",
                            tuple(branch for branch in branches if branch.module is not None), text_first=False,
                            returns=("text", "image")))
    return Denoiser("sd3", model, tuple(blocks), _patch_grid(model), (type(blocks[0].module),), embed=model.pos_embed,
                    tail=model.norm_out, head=model.proj_out, multiple=model.config.patch_size)


def _flux(model: FluxTransformer2DModel) -> Denoiser:
    blocks = []
    for module in model.transformer_blocks:
        branches = (Branch("attn", module.attn), Branch("ff", module.ff), Branch("ff_context", module.ff_context))
        blocks.append(Block(module, len(blocks), 0, module.norm1, module.attn, None, module.ff, "joint",
                            branches, rotary=True, returns=("text", "image")))
    for module in model.single_transformer_blocks:
        branch = Branch("total", module.proj_out, feeds=(module.attn, module.proj_mlp))
        blocks.append(Block(module, len(blocks), 0, module.norm, module.attn, None, None, "fused", (branch,), rotary=True,
                            returns=("text", "image")))

    def grid(inputs: dict, block: Block) -> tuple[int, int, int]:
        ids = inputs["img_ids"]                                  # (N, 3): frame, row, column of each packed token
        height, width = (int(axis.max() - axis.min()) + 1 for axis in ids.reshape(-1, 3)[:, 1:].unbind(-1))
        return ids.reshape(-1, 3).shape[0] // (height * width), height, width

    classes = tuple(dict.fromkeys(type(block.module) for block in blocks))
    return Denoiser("flux", model, tuple(blocks), grid, classes, batched_guidance=False, timestep_scale=1000.0,
                    tail=model.norm_out, head=model.proj_out)


def _cogvideox(model: CogVideoXTransformer3DModel) -> Denoiser:
    blocks = tuple(Block(module, i, 0, module.norm1, module.attn1, None, module.ff, "joint",
                         (Branch("attn", module.attn1), Branch("ff", module.ff)), rotary=True, returns=("image", "text"))
                   for i, module in enumerate(model.transformer_blocks))
    p = model.config.patch_size

    def grid(inputs: dict, block: Block) -> tuple[int, int, int]:
        _, frames, _, height, width = inputs["hidden_states"].shape
        return frames // (model.config.patch_size_t or 1), height // p, width // p

    return Denoiser("cogvideox", model, blocks, grid, (type(blocks[0].module),), embed=model.patch_embed,
                    tail=model.norm_final, head=model.proj_out, multiple=p, frame_axis=1)


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


ROWS: dict[type, Callable[[Any], Denoiser]] = {
    UNet2DConditionModel: _unet,
    DiTTransformer2DModel: _transformer("dit", cond_first=True),
    PixArtTransformer2DModel: _transformer("pixart"),
    SD3Transformer2DModel: _sd3,
    FluxTransformer2DModel: _flux,
    LatteTransformer3DModel: _latte,
    CogVideoXTransformer3DModel: _cogvideox,
}


def describe(model: nn.Module) -> Denoiser:
    """The row of a model's class, filled in for this model.

    Raises:
        TypeError: no row for this class.
    """
    for cls, row in ROWS.items():
        if isinstance(model, cls):
            return row(model)
    known = ", ".join(cls.__name__ for cls in ROWS)
    raise TypeError(f"{type(model).__name__} is not a denoiser this library knows; it knows {known}")
