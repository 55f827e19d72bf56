"""The plain parts of a vision transformer, for methods that are networks of their own: patches and blocks."""
from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def patchify(x: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W) -> patches (B, N, patch^2 C), row by row; within a patch pixel by pixel, channels together.

    Raises:
        ValueError: `patch` does not divide H and W.
    """
    height, width = x.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"patch={patch} must divide both sides of the image, which is {height}x{width}")
    x = x.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))                           # (B, C, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(x: Tensor, patch: int, height: int) -> Tensor:
    """Patches (B, N, patch^2 C) of a grid of `height` rows -> images (B, C, H, W); the inverse of `patchify`."""
    x = x.unflatten(1, (height, -1)).unflatten(-1, (patch, patch, -1))                    # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def learnt(n: int, width: int) -> nn.Parameter:
    """Tokens or positions (n, width) that a network learns, each of a squared length of about 1 at first."""
    return nn.Parameter(torch.randn(n, width) * width ** -0.5)


def zeroed(layer: Layer) -> Layer:
    """The layer, whose output is zero at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """A transformer block that normalises first (Dosovitskiy et al. 2021): attention, then an MLP of four times the width.

    With `cond` channels of a condition it is the adaLN-Zero block of DiT (Peebles and Xie 2023): shift and scale of the
    norms and the gates of both branches are a linear map of the condition that starts at zero, so the block starts as the
    identity.
    """

    def __init__(self, dim: int, heads: int, cond: int | None = None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads={heads} must divide the width {dim}")
        self.heads = heads
        norms = {"eps": 1e-5} if cond is None else {"eps": 1e-6, "elementwise_affine": False}
        self.norm1, self.norm2 = (nn.LayerNorm(dim, **norms) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = None if cond is None else nn.Sequential(nn.SiLU(), zeroed(nn.Linear(cond, 6 * dim)))

    def attention(self, x: Tensor) -> Tensor:
        """Full self-attention over tokens (B, N, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Tokens (B, N, dim), and the condition (B, cond) of a block that has one -> tokens (B, N, dim)."""
        if self.modulation is None:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
