"""What reducing tokens costs by itself: plan, reduction and restoration of one self-attention, beside the tomesd package.

    python tools/bench.py --plans      writes catalog/plans.json

Random tokens of the shapes named. First the attention between reduction and restoration is left out; the floor of a matching
plan is its own product of sources with destinations, by the library that the match itself uses, timed in the same rounds.
Then the whole layer, attention and its projections, with its peak memory.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from accel_tools.measure.arms import offering
from accel_tools.measure.memory import peak_allocated
from accel_tools.measure.timing import interleave
from methods._core.tokens import match_plan, partition, reduction

SHAPES = {"SD-1.5 UNet, 64x64 latents": (2, 64, 64, 320), "SD-1.5 UNet, 128x128 latents": (2, 128, 128, 320),
          "PixArt, 4,096 tokens": (2, 64, 64, 1152)}                       # batch, height, width, channels
RATIO = 0.5
CPU = torch.device("cpu")


def _matched(x: Tensor, grid: tuple[int, int, int]):
    src, dst = partition(grid, 2, torch.Generator().manual_seed(0), CPU)
    return match_plan(x, src, dst, reduction(x.shape[1], len(dst), RATIO))


def tome_pair(x: Tensor, grid: tuple[int, int, int]):
    plan = _matched(x, grid)
    return plan.reduce, plan.restore


def tomesd_pair(x: Tensor, grid: tuple[int, int, int]):
    from tomesd.merge import bipartite_soft_matching_random2d
    _, height, width = grid
    return bipartite_soft_matching_random2d(x, width, height, 2, 2, int(x.shape[1] * RATIO),
                                            generator=torch.Generator().manual_seed(0))


def product(x: Tensor, grid: tuple[int, int, int]) -> list[Tensor]:
    """The matching's own product, through oneDNN like the match, in pieces of 2^18 so that none has to leave the cache."""
    D = x.shape[1] // 4
    weights = [sample[:D].to_mkldnn() for sample in x]
    return [F.linear(rows.to_mkldnn(), weight) for sample, weight in zip(x, weights, strict=True)
            for rows in sample[D:].split(2 ** 18 // D)]


def layer(way: Callable[..., Any] | None, attention: nn.Module, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """`attention` of x, on all tokens or between what `way` gives as reduction and restoration."""
    if way is None:
        return attention(x)
    reduce, restore = way(x, grid)
    return restore(attention(reduce(x)))


def ways() -> dict[str, Callable[[Tensor, tuple[int, int, int]], Any]]:
    """What is timed, by name: two packages, every method whose module offers `roundtrip`, and parts of the first."""
    others = {slug: partial(module.roundtrip, ratio=RATIO) for slug, module in offering("roundtrip").items()}
    return {"tomesd": partial(layer, tomesd_pair, nn.Identity()), "tome": partial(layer, tome_pair, nn.Identity()), **others,
            "plan of tome": _matched, "product": product}


def measure(rounds: int = 9) -> dict[str, list[dict[str, Any]]]:
    """The plans by themselves (`rows`), and whole layers around which they stand (`layers`)."""
    return {"rows": measure_plans(rounds), "layers": measure_layers(max(1, rounds // 3))}


@torch.no_grad()
def measure_layers(rounds: int) -> list[dict[str, Any]]:
    """For each shape and way: median seconds, the median ratio of plain to it, and the peak of memory in bytes."""
    found = []
    for name, (batch, height, width, channels) in SHAPES.items():
        heads = 8 if channels == 320 else 16
        torch.manual_seed(0)
        attention = Attention(channels, heads=heads, dim_head=channels // heads).eval()
        x = torch.randn(batch, height * width, channels)
        calls = {label: partial(layer, way, attention, x, (1, height, width))
                 for label, way in {"plain": None, "tomesd": tomesd_pair, "tome": tome_pair}.items()}
        seconds = interleave(calls, rounds)
        found += [{"tokens": name, "way": way, "seconds": median(times), "peak_bytes": peak_allocated(calls[way]),
                   "speedup": median(a / b for a, b in zip(seconds["plain"], times, strict=True))}
                  for way, times in seconds.items()]
    return found


@torch.no_grad()
def measure_plans(rounds: int) -> list[dict[str, Any]]:
    """For each shape and way: median seconds, and the median over rounds of its ratio to tomesd's and to the product's."""
    rows = []
    for name, (batch, height, width, channels) in SHAPES.items():
        x = torch.randn(batch, height * width, channels, generator=torch.Generator().manual_seed(0))
        seconds = interleave({way: lambda f=f, x=x, g=(1, height, width): f(x, g) for way, f in ways().items()}, rounds)
        rows += [{"tokens": name, "shape": [batch, height * width, channels], "way": way, "seconds": median(times),
                  **{f"of_{other}": median(a / b for a, b in zip(times, seconds[other], strict=True))
                     for other in ("tomesd", "tome", "product")}} for way, times in seconds.items()]
    return rows
