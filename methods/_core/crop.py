"""A part of the frame as a call of the model: what is cut from its inputs, and how the tokens keep their places."""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods._core.context import StepContext
from methods._core.patch import Patch
from methods._core.site import Claim

RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals",
             "block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")


class Crop:
    """One box of the frame, set by the host with `place`.

    Where a model keeps its positions in the embedding of its patches, the crop stands around that, so that they are those of
    the frame; where they are inputs, they are cut.
    """

    def __init__(self, patch: Patch):
        """
        Raises:
            ValueError: the model makes positions for the latent's size as it gets it, so that a crop would be misplaced.
        """
        self.denoiser = patch.denoiser
        if not (self.denoiser.unet or self.denoiser.embed is not None or self.denoiser.row.cut):
            raise ValueError(f"{patch.name} calls the model on a part of the frame, where {type(patch.model).__name__} would "
                             "place it anew, at the corner")
        self.box: tuple[slice, slice] | None = None       # rows and columns, in cells of the latent or of a packed one's grid
        self.size = (0, 0)                                 # of the frame in the same cells
        self.count = 0                                     # tokens of the frame; those of references may follow
        self.tokens: Tensor | None = None                  # positions of the crop among them
        if patch.denoiser.embed is not None:
            patch.around(patch.denoiser.embed, self.embed, Claim.LOOK)

    def place(self, context: StepContext, inside: Tensor, margin: int = 0) -> bool:
        """Box the cells that are true in `inside` (height, width), with a margin, on multiples of what the model can take.

        -> whether there is a box smaller than the frame
        """
        frames, rows, columns = context.grid(self.denoiser.blocks[0])
        self.box, self.size = None, tuple(inside.shape)
        step = self.denoiser.multiple
        if not inside.any():
            return False
        edges = []
        for line in (inside.any(1), inside.any(0)):
            found = line.nonzero()[:, 0].tolist()
            first, last = max(0, found[0] - margin), min(len(line), found[-1] + 1 + margin)
            edges.append(slice(first // step * step, min(len(line), math.ceil(last / step) * step)))
        if all(edge == slice(0, size) for edge, size in zip(edges, self.size, strict=True)):
            return False
        self.box = tuple(edges)
        self.count = frames * rows * columns
        places = torch.arange(self.count).view(frames, rows, columns)
        self.tokens = self.window(places).flatten().to(context.sample.device)
        return True

    @property
    def area(self) -> float:
        """Share of the frame in the box."""
        return math.prod(edge.stop - edge.start for edge in self.box) / math.prod(self.size)

    def window(self, x: Tensor) -> Tensor:
        """The box of x (..., height, width), which may be coarser than the frame."""
        edges = zip(self.box, x.shape[-2:], self.size, strict=True)
        rows, columns = (slice(edge.start * n // size, edge.stop * n // size) for edge, n, size in edges)
        return x[..., rows, columns]

    def inputs(self, context: StepContext) -> dict[str, Any]:
        """The inputs of the model that differ for the box: latent, residuals of control models, and positions."""
        def part(x: Tensor) -> Tensor:
            return self.window(x) if x.ndim > 3 else rows(x, 1)

        def rows(x: Tensor, axis: int) -> Tensor:
            behind = torch.arange(self.count, x.shape[axis], device=x.device)
            return x.index_select(axis, torch.cat([self.tokens.to(x.device), behind]))

        given = context.inputs
        cut = self.denoiser.as_input(part(context.sample))
        for name in RESIDUALS:
            if (residual := given.get(name)) is not None:
                cut[name] = part(residual) if torch.is_tensor(residual) else [part(each) for each in residual]
        for name, axis in self.denoiser.row.cut.items():
            if (table := given.get(name)) is not None:
                cut[name] = rows(table, axis) if torch.is_tensor(table) else tuple(rows(each, axis) for each in table)
        return cut

    def paste(self, part: Tensor, frame: Tensor, mask: Tensor) -> Tensor:
        """The frame's output with that of the box in it where the box's `mask` is true. Shapes as the model gives them."""
        def planes(x: Tensor, size: tuple[int, ...]) -> Tensor:
            return x if x.ndim > 3 else x[:, :math.prod(size)].mT.unflatten(2, size)

        out = planes(frame, self.size).clone()
        box = (..., *self.box)
        out[box] = torch.where(mask, planes(part, mask.shape[-2:]), out[box])
        return out if frame.ndim > 3 else torch.cat([out.flatten(2).mT, frame[:, self.count:]], 1)

    def embed(self, forward, *inputs: Tensor) -> Tensor:
        """Around the patch embedding, called with x or with text and x."""
        *text, x = inputs
        if self.box is None or tuple(x.shape[-2:]) == self.size:
            return forward(*inputs)
        rows, columns = self.box
        whole = F.pad(x, (columns.start, self.size[1] - columns.stop, rows.start, self.size[0] - rows.stop))
        out, words = forward(*text, whole), sum(each.shape[1] for each in text)
        return torch.cat([out[:, :words], out[:, words:][:, self.tokens]], 1)
