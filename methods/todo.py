"""ToDo - Token Downsampling for Efficient Generation of High-Resolution Images

Ethan Smith, Nayan Saxena, Aninda Saha, IJCAI 2024. arXiv:2402.13573. Code: ethansmith2000/ImprovedTokenMerge

Idea: in self-attention every token still asks (all queries are kept), but keys and values are read from a regular
sub-grid only. Neighbours are alike, so a fixed grid does what matching does, without computing any similarity, and the
output already has all N tokens.

Map
    downsampling    nearest-neighbour sub-grid of factor s                    subgrid
    attention       keys and values from the sub-grid                         _Downsample

Departures
    Layers are chosen by downsampling level; the official code goes by channel width and so never touches SDXL.
    The paper's setting is the default (nearest, all steps, level 2 off); the library default of the official code
    (nearest-exact, similarity merging in the last 20 % of steps) is `method="nearest-exact"` without the second phase.
    Grids that the factor does not divide keep their true height and width; the official code fails there.
    SD3, Flux and CogVideoX drop keys and values of the image tokens only, text stays whole. There, and where projections are
    fused, all tokens are projected and the sub-grid is taken behind norms and positions.

Example
    >>> import methods
    >>> from methods import todo
    >>> pipe = methods.tiny("dit")
    >>> with todo.apply(pipe, todo.Config(factor=2)) as patch:
    ...     images = pipe([3], num_inference_steps=2, output_type="np").images
    >>> patch.report()["state"]
    'engaged'
"""
from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from methods._core.attention import at_product
from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["OFF", "Config", "apply", "subgrid"]


@dataclass(frozen=True, kw_only=True)
class Config:
    factor: int = 2             # s at full resolution: 2 at 1024 px, 3 at 1536, 4 at 2048
    factor_level_2: int = 1     # s where the grid is half as fine; 1 leaves it alone
    method: str = "nearest"     # which row of each s the sub-grid takes: "nearest" the first, "nearest-exact" the middle

    def __post_init__(self):
        for name in ("factor", "factor_level_2"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.method not in ("nearest", "nearest-exact"):
            raise ValueError(f"method={self.method!r} must be 'nearest' or 'nearest-exact'")


OFF = Config(factor=1)


def subgrid(frames: int, height: int, width: int, factor: int, method: str = "nearest") -> Tensor:
    """Positions of the nearest-neighbour downsampling by `factor` of each frame. -> (frames * (h // s) * (w // s),)

    A side of n is cut to m = n // s places; place j reads floor(j n / m), or floor((j + 1/2) n / m) when exact.
    """
    shift = 0.5 if method == "nearest-exact" else 0.0

    def pick(n: int) -> Tensor:
        m = max(1, n // factor)
        return ((torch.arange(m) + shift) * (n / m)).long()

    frame = torch.arange(frames)[:, None, None] * height * width
    return (frame + pick(height)[:, None] * width + pick(width)).flatten()


class _Downsample:
    """Lets one self-attention read the rows of `index` only. The host sets `index`.

    Where tokens are handed to the attention apart from what it asks with, keys and values of the others are not even
    projected; elsewhere, with text in the sequence or fused projections, they are dropped at the product.
    """

    def __init__(self, block: Block):
        self.block = block
        self.index: Tensor | None = None
        self.tokens = 0

    def wire(self, patch: Patch) -> None:
        if self.block.stream == "image" and not self.block.rotary:
            patch.around(self.block.attn, self.image, Claim.INSIDE)
        else:
            patch.attend(self.block.attn, self.attend)

    def image(self, forward, x: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs) -> Tensor:
        if getattr(self.block.attn, "fused_projections", False):
            return at_product(self.attend)(forward, x, encoder_hidden_states=encoder_hidden_states, **kwargs)
        return forward(x, encoder_hidden_states=x[:, self.index], **kwargs)

    def attend(self, product, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more) -> Tensor:
        def short(x: Tensor, dim: int = 2) -> Tensor:
            image, text = self.block.parted(x, self.tokens, dim)
            return self.block.joined(image.index_select(dim, self.index), text, dim)

        if attn_mask is not None and attn_mask.shape[-1] > 1:
            attn_mask = short(attn_mask, attn_mask.ndim - 1)
        return product(q, short(k), short(v), attn_mask=attn_mask, **more)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Downsample keys and values in the self-attention of the first two levels.

    Raises:
        ValueError: no self-attention at those levels, or already applied.
    """
    patch = Patch(target, "todo")
    factors = {level: s for level, s in enumerate((config.factor, config.factor_level_2)) if s > 1}
    if not factors:
        return patch
    layers = [_Downsample(block) for block in patch.require(
        (b for b in patch.denoiser.blocks_at(2) if b.level in factors), "self-attention at the chosen levels")]
    for layer in layers:
        layer.wire(patch)

    def choose(context: StepContext) -> None:
        grids: dict = {}
        for layer in layers:
            key = *context.grid(layer.block), factors[layer.block.level]
            if key not in grids:
                grids[key] = subgrid(*key, config.method).to(context.sample.device)
            layer.index, layer.tokens = grids[key], prod(key[:3])
            if patch.reaches(layer.block.attn):
                patch.counts["downsampled"] += 1
                patch.tally(layer.tokens - len(layer.index), layer.tokens)

    patch.each_call(choose)
    return patch.on()
