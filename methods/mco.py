"""MCO - Multistage Compression Optimization Strategies for Accelerating Diffusion Models

Weiquan Huang, Qiang Chen, PRCV 2024. doi:10.1007/978-981-97-8487-5_16

Idea: a reconstruction, since neither text nor abstract of the paper could be had and no code is known; of the paper it has the
title and the kind under which the source list files it, compression of tokens with training. Tokens are merged before
self-attention and copied back behind it; how many depends on the stage of sampling, most while the image is noise; and the
model so compressed is tuned towards the one it was.

Map
    stage A, bipartite matching, merge, attention, copy      Merged
    stage B, the share merged in each third of the steps     ratio_at
    stage C, ||eps - eps_S||^2 + lambda ||eps_T - eps_S||^2  loss
    multiply-accumulates of a block                          costs

Departures
    All of it is ours but the title. No number of the paper is known. The matching is that of ToMe, with the top left token of
    each 2 x 2 cell as a destination, on what the attention is given, behind the norm and its modulation.
    A batch of training comes from one third of the timesteps, so that all of its samples merge equally many tokens. A call
    with timesteps of several thirds merges as many as the one of them that merges fewest.
    A narrower model, as from `diff_pruning`, can be converted too; that makes a further stage.

Example
    >>> import methods
    >>> from methods import mco
    >>> pipe = methods.tiny("dit")
    >>> pipe.transformer = mco.convert(pipe.transformer, mco.TRAINED["mco"])
    >>> mco.load(pipe.transformer, methods.weights("mco"))
    >>> images = pipe([3], num_inference_steps=2, output_type="np").images
"""
from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods._core.around import Around, before_calls, image_blocks
from methods._core.denoiser import describe
from methods._core.finetuning import check_trainable, labelled
from methods._core.learning import Stage, load, save, train_only
from methods._core.noise import Noising, stratified
from methods._core.tokens import match_plan, partition, reduction

__all__ = ["OFF", "RIVALS", "TINY", "TRAINED", "Config", "Merged", "Stages", "convert", "costs", "load", "loss", "ratio_at",
           "save", "training"]


@dataclass(frozen=True, kw_only=True)
class Config:
    early: float = 0.5                  # r, share of the tokens that are merged in the first third of the steps
    middle: float = 0.3                 # in the second
    late: float = 0.1                   # and in the last
    stride: int = 2                     # side of the cells, of which one token each stays
    distance: float = 1.0               # lambda, weight of the distance to the teacher
    tuned: tuple[str, ...] | None = None    # parts of names of what trains; None: all

    def __post_init__(self):
        for name in ("early", "middle", "late"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.stride < 2 or self.distance < 0:
            raise ValueError(f"stride={self.stride} must be at least 2, distance={self.distance} at least 0")


STEPS = 1000                            # timesteps of the clock
OFF = Config(early=0.0, middle=0.0, late=0.0)
TINY = Config(tuned=("ff.",))
BUNDLED = {"tuned": ("to_out", "net.2")}
TRAINED = {"mco": Config(**BUNDLED)}                                                                # on the bundled digits
RIVALS = {"mco": {"equal stages": Config(early=0.289, middle=0.289, late=0.289, **BUNDLED)}}        # of as many MACs


def costs(M: int, N: int, D: int) -> int:
    """Multiply-accumulates of a block of N tokens of D channels, of which M stay in self-attention; without the matching."""
    return 4 * M * D ** 2 + 2 * M ** 2 * D + 8 * N * D ** 2


def ratio_at(t: float, config: Config) -> float:
    """The share that is merged at timestep t of the clock, which runs down."""
    return (config.late, config.middle, config.early)[min(2, max(0, int(3 * t / STEPS)))]


class Merged(Around):
    """Self-attention over fewer tokens."""

    grid = (1, 0, 0)
    ratio = 0.0
    stride = 2

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, tokens = hidden_states, prod(self.grid)
        src, dst = partition(self.grid, self.stride, None, x.device)
        if not (r := reduction(tokens, len(dst), self.ratio)):
            return self.inner(x, *args, **kwargs)
        plan = match_plan(x.detach(), src, dst, r)
        return plan.restore(self.inner(plan.reduce(x), *args, **kwargs))


class Stages(nn.Module):
    """`model.stages` of a converted model: which stage a call belongs to."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def decide(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Before a call of the model: how many tokens its blocks merge."""
        denoiser = describe(model)
        size = denoiser.size(inputs)
        ratio = min(ratio_at(float(t), self.config) for t in torch.as_tensor(inputs["timestep"]).flatten().unique())
        for block in denoiser.blocks:
            block.attn.grid, block.attn.ratio, block.attn.stride = (1, *size[1:]), ratio, self.config.stride


def convert(model: nn.Module, config: Config = Config()) -> nn.Module:
    """A copy of `model` that merges tokens; put it in the place of the pipeline's transformer.

    Args:
        model: a DiTTransformer2DModel or PixArtTransformer2DModel. It stays as it is.

    Raises:
        TypeError: no row in methods/_core/families.
        ValueError: already converted; blocks of another kind; a name in `config.tuned` that no parameter has.
    """
    if hasattr(model, "stages"):
        raise ValueError(f"this {type(model).__name__} has stages already")
    image_blocks(model, "mco")
    model = copy.deepcopy(model).eval()
    if not (config.early or config.middle or config.late):
        return model
    for block in describe(model).blocks:
        setattr(block.module, block.row.attn, Merged(block.attn))
    model.stages = Stages(config)
    before_calls(model, model.stages.decide)
    train_only(model, config.tuned)
    return model


def loss(model: nn.Module, noising: Noising, x0: Tensor, *, step: int, random: torch.Generator,
         teacher: nn.Module | None = None, **conditions: Any) -> dict[str, Tensor]:
    """The training loss of a converted model as `loss`, and for show its parts `task` and `distance`.

    Args:
        noising: of the pipeline's scheduler.
        x0: (B, C, H, W), clean latents.
        step: of the training, not needed here.
        random: of timesteps, which are those of one third, and noise.
        teacher: the model as it was; None leaves the distance to it out.
        conditions: further inputs of the model, such as `class_labels`.

    Raises:
        ValueError: not converted, in training mode, or with gradient checkpointing.
    """
    if not isinstance(getattr(model, "stages", None), Stages):
        raise ValueError(f"this {type(model).__name__} has no stages: convert it first")
    check_trainable(model)
    u = (torch.randint(3, (), generator=random) + stratified(len(x0), random)) / 3
    noisy = noising.sample(x0, random, noising.process.t(u))
    output = model(noisy.x, timestep=noisy.t, return_dict=False, **conditions)[0]
    task = noising.loss(output, noisy)
    distance = torch.zeros_like(task)
    if teacher is not None:
        with torch.no_grad():
            wanted = teacher(noisy.x, timestep=noisy.t, return_dict=False, **conditions)[0]
        distance = F.mse_loss(output.float(), wanted.float())
    return {"loss": task + model.stages.config.distance * distance, "task": task, "distance": distance}


def training(pipe: Any, config: Config) -> Iterator[Stage]:
    """How the bundled DiT is tuned on digits, by `python tools/train_zoo.py --method mco`."""
    tuning = functools.partial(loss, teacher=copy.deepcopy(pipe.transformer).requires_grad_(False))
    yield labelled(pipe, convert(pipe.transformer, config), tuning, steps=80, lr=3e-3)
