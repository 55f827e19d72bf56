"""Toy training - A Toy of Kind Training

Ann Bee, Carl Dee, arXiv 2025. arXiv:2503.00014

Idea: the MLPs of the last blocks give way to one matrix each, which is learnt.

Map
    Eq. 1    the matrix       Matrix
    Alg. 1   the whole        convert, loss

Departures
    None.

Example
    >>> Matrix(2)(torch.ones(2)).tolist()
    [1.0, 1.0]
"""
from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods._core.denoiser import Block, describe
from methods._core.learning import load, save
from methods._core.noise import Noising

__all__ = ["OFF", "TINY", "Config", "convert", "load", "loss", "save"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is replaced."""

    blocks: int = 3          # how many of the last ones, Sec. 1


OFF = Config(blocks=0)
TINY = Config()


class Matrix(nn.Module):
    """W x for x (..., D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.w = nn.Parameter(torch.eye(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.mT


def labelled(block: Block) -> bool:
    """Whether a block is told a label."""
    return hasattr(getattr(block.norm, "emb", None), "class_embedder")


def convert(model: nn.Module, config: Config = Config()) -> nn.Module:
    """A copy of the model with matrices in place of MLPs, which alone train.

    Raises:
        ValueError: no block is told a label, or the model is converted already.
    """
    if not any(map(labelled, describe(model).blocks)):
        raise ValueError(f"no block of this {type(model).__name__} is told a label")
    if any(isinstance(part, Matrix) for part in model.modules()):
        raise ValueError("this model is converted already")
    made = copy.deepcopy(model).requires_grad_(False)
    for block in made.transformer_blocks[len(made.transformer_blocks) - config.blocks:]:
        weight = block.ff.net[-1].weight
        block.ff = Matrix(weight.shape[0]).to(weight)
    return made


def loss(model: nn.Module, noising: Noising, x0: Tensor, *, step: int, random: torch.Generator,
         **conditions: Any) -> dict[str, Tensor]:
    """What the scheduler asks for, of noisy samples of `x0`. Raises ValueError where nothing was converted."""
    if not any(isinstance(part, Matrix) for part in model.modules()):
        raise ValueError(f"this {type(model).__name__} has no matrices; convert it first")
    noisy = noising.sample(x0, random)
    out = model(noisy.x, timestep=noisy.t, **conditions).sample
    return {"loss": noising.loss(out, noisy)}
