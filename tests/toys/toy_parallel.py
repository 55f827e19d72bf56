"""Toy parallel - A Toy of Kind Parallel

Ann Bee, Carl Dee, arXiv 2025. arXiv:2503.00016

Idea: each process computes the MLPs for a part of the tokens, and gives the result to the others.

Map
    Alg. 1   the whole    apply

Departures
    None.

Example
    >>> Config()
    Config()
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.patch import Patch
from methods._core.processes import Processes
from methods._core.site import Claim

__all__ = ["Config", "apply"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing can be set."""


def labelled(block: Block) -> bool:
    """Whether a block is told a label."""
    return hasattr(getattr(block.norm, "emb", None), "class_embedder")


def apply(target: Any, group: Any = None, config: Config = Config()) -> Patch:
    """Spread the MLPs of a transformer with labels over the processes of `group`.

    Raises:
        ValueError: another model, or already applied.
    """
    patch, processes = Patch(target, "toy_parallel"), Processes(group, "toy_parallel")
    blocks = patch.require(filter(labelled, patch.denoiser.blocks), "block that is told a label")
    if processes.size == 1:
        return patch

    def share(forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before = processes.sent
        whole = processes.gather(forward(processes.part(x, 1), *args, **kwargs), 1, x.shape[1])
        patch.counts["bytes sent"] += processes.sent - before
        return whole

    def tally(context: StepContext) -> None:
        patch.tally(len(blocks) * (1 - 1 / processes.size), len(blocks))

    for block in blocks:
        patch.around(block.ff, share, Claim.OUTPUT)
    patch.each_call(tally)
    return patch.on()
