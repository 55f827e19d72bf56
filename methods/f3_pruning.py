"""F³-Pruning - F³-Pruning: A Training-Free and Generalized Pruning Strategy towards Faster and Finer Text-to-Video Synthesis

Sitong Su, Jianzhi Liu, Lianli Gao, Jingkuan Song, AAAI 2024. arXiv:2312.03459

In part a reconstruction: the score by which modules are ranked could not be read, see Departures.

Idea: video models made from image models have temporal attention in every block, and in many blocks it does nothing temporal:
frames look at themselves. The temporal attentions are ranked by how much of their attention goes to other frames, and the
lowest of them are left out, in every step alike.

Map
    attention values, aggregated to a score S of a module       score
    the lowest share rho of the ranking                         pruned
    skipped: x passes through                                   _Layer.around
    scores of a calibration run                                 calibrate

Departures
    No code was released, and the formula by which attention values are aggregated could not be read. That modules are ranked
    by an aggregate of their values and the lowest are removed is the paper's; that it is the mean mass on other frames is a
    reconstruction. The ratios of the paper's tables are not known either: 0.5 is ours.
    Without `scores` each run takes them from its own first step, which runs whole, and prunes from the second on.
    Of a pruned attention the norm before it still runs; what it adds is zero.
    Of the paper's two models only the way of Tune-A-Video is here, temporal attention as a branch of its own. In CogVideo one
    attention mixes a spatial with a temporal channel. Joint attention over space and time has no temporal module to leave out.

Example
    >>> from methods import f3_pruning
    >>> sorted(f3_pruning.pruned([0.4, 0.1, 0.3, 0.2], ratio=0.5))
    [1, 3]
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods._core.attention import mean_map
from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["OFF", "Config", "apply", "calibrate", "pruned", "score"]


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float = 0.5                                     # rho, share of the temporal attentions that is left out
    scores: Sequence[float] | str | Path | None = None     # S of each, or the file that `calibrate` wrote; None: of each run

    def __post_init__(self):
        scores = json.loads(Path(self.scores).read_text()) if isinstance(self.scores, (str, Path)) else self.scores
        object.__setattr__(self, "scores", None if scores is None else tuple(map(float, scores)))
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} outside [0, 1]")


OFF = Config(ratio=0.0)


def score(probabilities: Tensor) -> Tensor:
    """S of attention among frames (..., F, F): the mean mass that a frame gives to others, in [0, 1]."""
    own = probabilities.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (probabilities.sum((-2, -1)) - own).mean() / probabilities.shape[-2]


def pruned(scores: Sequence[float], ratio: float) -> set[int]:
    """The modules left out: floor(rho L) of those with the lowest scores, of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda n: scores[n])
    return set(order[:int(ratio * len(scores) + 1e-9)])


class _Layer:
    """The temporal attention of one block. The host says before each call whether it is skipped or measured."""

    def __init__(self, patch: Patch, block: Block):
        self.block = block
        self.skip = self.measure = False
        self.score: Tensor | None = None
        patch.around(block.attn, self.around)
        patch.attend(block.attn, self.attend, Claim.LOOK)

    def around(self, forward, *args, **kwargs):
        if self.skip:
            return torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return forward(*args, **kwargs)

    def attend(self, product, q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
        if self.measure:
            self.score = score(mean_map(q, k, **more))
        return product(q, k, v, **more)


class _Scores:
    """The mean score of each layer over all calls that were measured."""

    def __init__(self, patch: Patch):
        temporal = (block for block in patch.denoiser.blocks if block.temporal and block.attn is not None)
        self.layers = [_Layer(patch, block) for block in patch.require(temporal, "temporal attention")]
        self.reset()

    def reset(self) -> None:
        self.sums, self.calls = torch.zeros(len(self.layers), dtype=torch.float64), 0

    def add(self) -> None:
        """What the layers measured in this call, unless the call passed over one of them."""
        found = [layer.score for layer in self.layers]
        for layer in self.layers:
            layer.score = None
        if all(each is not None for each in found):
            self.sums, self.calls = self.sums + torch.stack(found).double().cpu(), self.calls + 1

    @property
    def mean(self) -> list[float]:
        return (self.sums / max(1, self.calls)).tolist()


def calibrate(target: Any, run: Callable[[], Any], *, save: Path | None = None) -> list[float]:
    """Scores of all temporal attentions, in the order in which they run, as the mean over the calls made by `run()`.

    Args:
        target: a diffusers pipeline, or its denoiser, that carries no other patch on its temporal attentions.
        run: samples with as many prompts as shall be judged together.
        save: a JSON file for the scores, which `Config(scores=...)` reads.

    Raises:
        ValueError: no temporal attention, or `run` made no call of the model.
    """
    patch = Patch(target, "f3_pruning", edits=True)
    scores = _Scores(patch)
    for layer in scores.layers:
        layer.measure = True
    patch.after_call(lambda *_: scores.add())
    with patch.on():
        run()
    if not scores.calls:
        raise ValueError("f3_pruning: the run made no call of this model in which all temporal attentions ran")
    if save is not None:
        save.write_text(json.dumps(scores.mean) + "\n")
    return scores.mean


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Leave out the temporal attentions with the lowest scores.

    Args:
        target: a diffusers pipeline over a video model with temporal attention of its own, or that model.

    Raises:
        ValueError: no temporal attention, scores of another number of modules, a ratio that prunes none, or already applied.
    """
    patch = Patch(target, "f3_pruning")
    if config.ratio == 0:
        return patch
    scores = _Scores(patch)
    count = len(scores.layers)
    if config.scores is not None and len(config.scores) != count:
        raise ValueError(f"f3_pruning: {len(config.scores)} scores for the {count} temporal attentions of this "
                         f"{type(patch.model).__name__}")
    patch.require(pruned(range(count), config.ratio), f"whole temporal attention in a share of {config.ratio} of its {count}")

    def decide(context: StepContext) -> None:
        measure = config.scores is None and context.i == 0
        chosen = set() if measure or not (config.scores or scores.calls) else pruned(config.scores or scores.mean, config.ratio)
        for n, layer in enumerate(scores.layers):
            layer.measure, layer.skip = measure, n in chosen
            patch.skips([layer.block.attn] if layer.skip else ())
        patch.counts["pruned"] += len(chosen)
        patch.counts["computed"] += count - len(chosen)
        patch.tally(len(chosen), count)

    patch.each_call(decide)
    patch.after_call(lambda *_: scores.add())
    patch.each_run(scores.reset)
    return patch.on()
