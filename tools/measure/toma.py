"""ToMA's round trip of a layer, for tools/bench.py --plans."""
from __future__ import annotations

from torch import Tensor

from methods.toma import Matrices, destinations, regions, weights


def roundtrip(x: Tensor, grid: tuple[int, int, int], ratio: float) -> Tensor:
    """A layer without its attention: tokens x (B, N, C) merged in tiles by matrices made for it, and brought back. In layers
    that reuse the matrices of another, only the products are left of this."""
    places = regions(*grid, "tile", 4).to(x.device)
    tiles = x[:, places]
    dst = destinations(tiles, round(places.shape[1] * (1 - ratio)))
    matrices = Matrices(weights(tiles, dst, 1000.0), places, places.flatten().argsort(), dst)
    return matrices.restore(matrices.reduce(x))
