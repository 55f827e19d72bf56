"""How a latent becomes a grid of tokens: frames, rows and columns, from the inputs of the model's forward."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Grid:
    """Places of a latent that is an image or a video: `frames`, `height` its axes, the width behind the height.

    `patch_size` in the configuration of the model is the side of a patch, or the three sides.
    """

    frames: int | None = None
    height: int = -2
    per_frame: bool = False           # frames are samples to the spatial blocks
    packed: ClassVar[bool] = False    # (B, N, C), in which references may follow the image's own tokens

    def patch(self, model: nn.Module) -> Size:
        """Places that make one token: frames, rows, columns."""
        side = getattr(model.config, "patch_size", 1) or 1
        if isinstance(side, (list, tuple)):
            return tuple(side) if len(side) == 3 else (1, *side)
        return getattr(model.config, "patch_size_t", None) or 1, side, side

    def __call__(self, model: nn.Module, inputs: dict[str, Any], latent: str) -> Size:
        shape = inputs[latent].shape
        frames = 1 if self.frames is None or len(shape) == 4 else shape[self.frames]
        sides = frames, shape[self.height], shape[self.height + 1]
        return tuple(n // p for n, p in zip(sides, self.patch(model), strict=True))


@dataclass(frozen=True)
class Places(Grid):
    """Every place of the latent is a token: at full resolution of a UNet, or packed."""

    def patch(self, model: nn.Module) -> Size:
        return 1, 1, 1


@dataclass(frozen=True)
class Packed(Places):
    """A latent (B, N, C) of packed tokens whose `ids` (N, 3 or 4), or (B, N, 3), name frame, row and column of each.

    Tokens that follow with another frame than the first are references (Kontext, editing).
    """

    ids: str = "img_ids"
    packed = True

    def __call__(self, model: nn.Module, inputs: dict[str, Any], latent: str) -> Size:
        ids = inputs[self.ids]
        ids = (ids if ids.ndim == 2 else ids[0])[-inputs[latent].shape[1]:]
        ids = ids[ids[:, 0] == ids[0, 0]]
        height, width = (int(axis.max() - axis.min()) + 1 for axis in ids[:, 1:3].unbind(-1))
        return len(ids) // (height * width), height, width


@dataclass(frozen=True)
class Named(Places):
    """A packed latent whose sides are inputs of their own."""

    names: tuple[str, str, str] = ("num_frames", "height", "width")

    def __call__(self, model: nn.Module, inputs: dict[str, Any], latent: str) -> Size:
        return tuple(inputs[name] for name in self.names)


@dataclass(frozen=True)
class Shapes(Places):
    """A packed latent whose sides are the first item of an input with the shapes of all images of each sample."""

    name: str = "img_shapes"
    packed = True

    def __call__(self, model: nn.Module, inputs: dict[str, Any], latent: str) -> Size:
        first = inputs[self.name][0]
        return tuple(first[0] if isinstance(first[0], (tuple, list)) else first)


@dataclass(frozen=True)
class Listed(Grid):
    """A list of (C, F, H, W), one a sample; the call names the side of a patch."""

    def patch(self, model: nn.Module) -> Size:
        side, frames = model.config.all_patch_size[0], model.config.all_f_patch_size[0]
        return frames, side, side

    def __call__(self, model: nn.Module, inputs: dict[str, Any], latent: str) -> Size:
        side, frames = inputs.get("patch_size", 2), inputs.get("f_patch_size", 1)
        return tuple(n // p for n, p in zip(inputs[latent][0].shape[1:], (frames, side, side), strict=True))


@dataclass(frozen=True)
class Marked(Places):
    """One sequence of words and image, in which `indicator` marks the kind of each token and `position_ids` its place."""

    def __call__(self, model: nn.Module, inputs: dict[str, Any], latent: str) -> Size:
        marks = inputs["indicator"][0]
        ids = inputs["position_ids"][0][marks == marks[-1]]
        height, width = (int(axis.max() - axis.min()) + 1 for axis in ids[:, 1:].unbind(-1))
        return len(ids) // (height * width), height, width


@dataclass(frozen=True)
class Unknown(Grid):
    """Not known: nothing that needs to know which tokens are the image's can be applied."""

    def __call__(self, model: nn.Module, inputs: dict[str, Any], latent: str) -> Size:
        raise ValueError(f"which tokens of {type(model).__name__} are the image's is not known")
