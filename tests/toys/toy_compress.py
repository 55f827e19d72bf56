"""Toy compress - A Toy of Kind Compress

Ann Bee, Carl Dee, arXiv 2025. arXiv:2503.00015

Idea: of the hidden channels of every MLP those with the smallest weights are cut off.

Map
    Eq. 1    which channels stay    kept
    Alg. 1   the whole              compress

Departures
    None.

Example
    >>> kept(torch.tensor([[3.0], [1.0], [2.0], [0.0]]), 0.5).tolist()
    [0, 2]
"""
from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from methods._core.denoiser import Block, describe
from methods._core.noise import Noising

__all__ = ["OFF", "TINY", "Config", "compress", "load", "save"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much is cut off."""

    ratio: float = 0.5       # of the channels, Sec. 1


OFF = Config(ratio=0.0)
TINY = Config()


def kept(weight: Tensor, ratio: float) -> Tensor:
    """Rows of `weight` (D, C) with the largest norms, in their order."""
    return weight.norm(dim=1).topk(round(len(weight) * (1 - ratio))).indices.sort().values


@torch.no_grad()
def cut(ff: nn.Module, rows: Tensor) -> None:
    """Leave only these hidden channels of an MLP."""
    up, down = ff.net[0].proj, ff.net[-1]
    up.weight, up.bias = nn.Parameter(up.weight[rows].clone()), nn.Parameter(up.bias[rows].clone())
    down.weight = nn.Parameter(down.weight[:, rows].clone())
    up.out_features = down.in_features = len(rows)


def labelled(block: Block) -> bool:
    """Whether a block is told a label."""
    return hasattr(getattr(block.norm, "emb", None), "class_embedder")


def mlps(model: nn.Module) -> list[nn.Module]:
    """The MLPs of the blocks. Raises ValueError for a model whose blocks are told no label, TypeError for an unknown one."""
    found = [block.ff for block in describe(model).blocks if labelled(block)]
    if not found:
        raise ValueError(f"no block of this {type(model).__name__} is told a label")
    return found


def compress(model: nn.Module, config: Config, noising: Noising, batches: Iterable[tuple[Tensor, dict[str, Any]]]) -> nn.Module:
    """A narrower copy of the model. Raises ValueError as `mlps` does."""
    made = copy.deepcopy(model)
    for ff in mlps(made):
        cut(ff, kept(ff.net[0].proj.weight, config.ratio))
    return made


def save(model: nn.Module, path: str | Path) -> None:
    """Write all weights of a compressed model."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """A copy of `model`, as wide as what was saved, with its weights. Raises ValueError where they do not fit."""
    state, made = load_file(path), copy.deepcopy(model)
    if state.keys() != made.state_dict().keys():
        raise ValueError(f"{Path(path).name} holds other weights than this {type(model).__name__} has")
    names = {part: name for name, part in made.named_modules()}
    for ff in mlps(made):
        cut(ff, torch.arange(len(state[f"{names[ff]}.net.0.proj.bias"])))
    made.load_state_dict(state)
    return made
