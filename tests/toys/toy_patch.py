"""Toy patch - A Toy of Kind Patch

Ann Bee, Carl Dee, arXiv 2025. arXiv:2503.00011

Idea: on every other step each block of a class-conditional transformer gives what its MLP gave on the step before.

Map
    Eq. 1    the step on which the MLPs are computed    computes
    Alg. 1   the whole                                  apply

Departures
    None.

Example
    >>> [computes(i, 2) for i in range(4)]
    [True, False, True, False]
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods._core.cache import Reuse
from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.patch import Patch

__all__ = ["OFF", "Config", "apply"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How often an MLP is computed."""

    interval: int = 2        # N, Sec. 1


OFF = Config(interval=1)


def computes(i: int, interval: int) -> bool:
    """Whether step `i` computes the MLPs."""
    return i % interval == 0


def labelled(block: Block) -> bool:
    """Whether a block is told a label."""
    return hasattr(getattr(block.norm, "emb", None), "class_embedder")


def apply(target: Any, config: Config = Config()) -> Patch:
    """Reuse the MLPs' outputs between steps.

    Raises:
        ValueError: a bare model, one without labels, or already applied.
    """
    patch = Patch(target, "toy_patch")
    if config.interval == 1:
        return patch
    patch.require_pipeline()
    blocks = patch.require(filter(labelled, patch.denoiser.blocks), "block that is told a label")
    reuses = []
    for block in blocks:
        reuse = Reuse(patch.slot)
        reuses.append((block.ff, reuse))
        patch.around(block.ff, reuse.around)

    def decide(context: StepContext) -> None:
        due = context.fresh or computes(context.i, config.interval)
        for ff, reuse in reuses:
            reuse.reuse = reuse.ready and not due
            patch.skips((ff,) if reuse.reuse else ())
            patch.counts["reused" if reuse.reuse else "computed"] += 1
            patch.tally(reuse.reuse, 1)

    patch.each_call(decide)
    return patch.on()
