"""TokenCache - Token Caching for Diffusion Transformer Acceleration

Jinming Lou et al., arXiv 2024. arXiv:2409.18523

Idea: most tokens change little from step to step. A small predictor, trained once for a model that stays as it is, says of
every token of every block how much its new value matters at a timestep. In cached steps the blocks that matter least run on
their best tokens alone, and the other tokens take what the block last gave them; full steps return in a fixed round.

Map
    w = g(l, t), a score of each token of each block                   Predictor
    w f(z) + (1 - w) f(z'), of this step and the one before            superpose
    |z - z^|^2 at the last block, and a budget of w                    loss
    1: the top (1 - r) n tokens of the blocks whose sum of w is low    kept
    2: the top (1 - r) n L of all tokens of all blocks                 kept
    1: two-phase round-robin of full steps                             full_steps
    2: full steps at even shares of the importance                     full_steps
    copied from the cache                                              _Layer.around

Departures
    There is no code, and neither version of the preprint could be read in full: equations are those of lecture slides and of a
    reading note. Version 1 caches what a block gives, version 2 what it adds; they differ once the input has moved.
    Version 2 has for predictor a block of the transformer that reads the latent, and adapts the last blocks; that is left out:
    both versions use the predictor of version 1, which knows block, timestep and place, so that all samples share their tokens.
    Ratio, share of blocks, periods, and width and training of the predictor are ours. Something must pull w down, else w = 1 is
    best: here the square of what its mean is off the share that is computed. Version 2 adds the mean of w times a weight that
    is not known; with 0.3 all scores went to 1. The error is in shares of the change from step to step.
    Tokens that are copied are neither queries nor keys. Streams of text are always computed, beside at least one token of the
    image, and so are temporal blocks.
    A block keeps the newest values of all its tokens also in steps in which it runs whole.
    The two steps of training are one clean image with one noise at neighbouring timesteps, not a sampled trajectory.

Example
    >>> import methods
    >>> from methods import tokencache
    >>> pipe = methods.tiny("dit")
    >>> with tokencache.apply(pipe, tokencache.Config(predictor="tokencache-1")) as patch:
    ...     images = pipe([3], num_inference_steps=4, output_type="np").images
    >>> patch.report()["cached"]
    1536
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from accel_kernels.rows import gather_rows, scatter_rows
from methods._core import learning
from methods._core.cache import of_any_length
from methods._core.context import StepContext
from methods._core.denoiser import Block, check_whole, describe
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim
from methods._trained import weights

__all__ = ["OFF", "TRAINED", "Config", "Predictor", "apply", "full_steps", "kept", "loss", "superpose"]


class Predictor(nn.Module):
    """g: a score in (0, 1) for each token of each of `blocks` blocks at a timestep, from its place alone."""

    def __init__(self, blocks: int, width: int = 32, seed: int = 0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.block = nn.Parameter(torch.randn(blocks, 1, width, generator=random))
        self.time, self.place, self.inner, self.head = (nn.utils.skip_init(nn.Linear, *size) for size in (
            (8, width), (24, width), (width, width), (width, 1)))
        for layer in (self.time, self.place, self.inner, self.head):
            nn.init.normal_(layer.weight, std=layer.in_features ** -0.5, generator=random)
            nn.init.zeros_(layer.bias)

    def forward(self, t: float, grid: Sequence[int]) -> Tensor:
        """Scores (L, n) at timestep `t` of 0 to 1000, for the n tokens of a grid (frames, height, width)."""
        like = self.head.weight
        places = torch.cartesian_prod(*(torch.arange(n) / n for n in grid)).to(like)
        x = self.block + self.time(_waves(torch.tensor([t / 1000]).to(like))) + self.place(_waves(places).flatten(-2))
        x = nn.functional.silu(self.inner(nn.functional.silu(x)))
        return self.head(x)[..., 0].sigmoid()


def _waves(x: Tensor) -> Tensor:
    """(..., ) in [0, 1] -> (..., 8): sines and cosines of four frequencies."""
    angles = x[..., None] * math.pi * 2.0 ** torch.arange(4, device=x.device)
    return torch.cat([angles.sin(), angles.cos()], -1)


@dataclass(frozen=True, kw_only=True)
class Config:
    version: int = 1                     # of the preprint
    ratio: float = 0.75                  # r: share of tokens that are copied; ours, as all below
    blocks: float = 0.75                 # share of blocks that are pruned in a cached step; version 1
    periods: tuple[int, int] = (2, 3)    # K of the two phases: one full step, then K - 1 cached ones; version 2 has the second
    switch: float = 0.5                  # share of the steps that is the first phase
    predictor: Predictor | str | Path | None = None     # trained, or its file, or a name in TRAINED; None: random weights
    seed: int = 0                        # of random weights

    def __post_init__(self):
        if self.version not in (1, 2):
            raise ValueError(f"version={self.version} must be 1 or 2")
        for name in ("ratio", "blocks", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} outside [0, 1]")
        if len(self.periods) != 2 or min(self.periods) < 1:
            raise ValueError(f"periods={self.periods} must be two numbers of at least 1")


OFF = Config(ratio=0.0)
TRAINED = {f"tokencache-{version}": Config(version=version) for version in (1, 2)}        # on the bundled digits


def superpose(w: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """w f(z) + (1 - w) f(z'): w (n,), new and old (B, n, C)."""
    return w[:, None] * new + (1 - w[:, None]) * old


def kept(w: Tensor, config: Config) -> list[Tensor | None]:
    """Which tokens of each block are computed, by scores w (L, n): positions (k,) in rising order; None: all of the block's."""
    L, n = w.shape
    if config.version == 2:
        count = L * n - round(config.ratio * L * n)
        marked = torch.zeros(L * n, dtype=torch.bool, device=w.device)
        marked[w.flatten().topk(count).indices] = True
        return [row.nonzero()[:, 0] for row in marked.view(L, n)]
    least = w.sum(1).argsort(stable=True)[:round(config.blocks * L)].tolist()
    rows = w.topk(n - round(config.ratio * n), 1).indices.sort(1).values
    return [rows[block] if block in least else None for block in range(L)]


def full_steps(steps: int, config: Config, importance: Sequence[float] = ()) -> set[int]:
    """Steps in which everything is computed, of `steps`; version 2 wants the importance of each, the sum of its scores."""
    if config.version == 1:
        first = math.ceil(config.switch * steps)
        return {*range(0, first, config.periods[0]), *range(first, steps, config.periods[1])}
    total = np.cumsum(importance) / np.sum(importance)
    count = math.ceil(steps / config.periods[1])
    return {0, *(int(np.searchsorted(total, share)) for share in np.arange(1, count) / count)}


class _Layer:
    """One block. The host sets `index` (1, k), the tokens that are computed, before each call; None: all."""

    def __init__(self, block: Block, slot: Any, update: bool):
        self.block, self.slot, self.update = block, slot, update
        self.index: Tensor | None = None

    def around(self, forward, *args, **kwargs):
        image, text = self.block.streams(args, kwargs)
        if self.index is None:
            out = forward(*args, **kwargs)
            made, _ = self.block.split(out)
            self.slot.keep(made - image if self.update else made)
            return out
        index, old = self.index.expand(len(image), -1), self.slot.get()
        if index.shape[1]:
            rows = gather_rows(image, index)
            words = 0 if text is None else text.shape[1]
            args, kwargs = _replace(args, self.turn(kwargs, words, image.shape[1]), rows)
            made, text = self.block.split(forward(*args, **kwargs))
            old = scatter_rows(old, index, made - rows if self.update else made)
            self.slot.keep(old)
        return self.block.output(image + old if self.update else old, text)

    def turn(self, kwargs: dict[str, Any], words: int, tokens: int) -> dict[str, Any]:
        """Gather the rotary embedding, cosine and sine of (words + tokens, D) or (tokens, D), along with the tokens."""
        rotary = kwargs.get("image_rotary_emb")
        if rotary is None:
            return kwargs
        places = self.index[0]
        if rotary[0].shape[0] > tokens:
            places = torch.cat([torch.arange(words, device=places.device), words + places])
        return {**kwargs, "image_rotary_emb": tuple(part[places.to(part.device)] for part in rotary)}


def _may_shorten(block: Block) -> bool:
    """Whether nothing but the tokens, and a rotary embedding with one row for each, runs along a block's sequence."""
    along = {name.partition(".")[0]: axis for name, axis in block.row.along.items()}
    more = any("pos" in name for name in inspect.signature(block.module.forward).parameters)
    return block.by_rows and not more and (not along or along == {"image_rotary_emb": 0} and block.row.text_first)


def _replace(args: tuple, kwargs: dict[str, Any], image: Tensor) -> tuple[tuple, dict[str, Any]]:
    return ((image, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": image})


def _predictor(config: Config, blocks: int) -> Predictor:
    if isinstance(config.predictor, Predictor):
        found = config.predictor
    else:
        found = Predictor(blocks, seed=config.seed)
        if config.predictor is not None:
            learning.load(found, weights(config.predictor) if config.predictor in TRAINED else config.predictor)
    if len(found.block) != blocks:
        raise ValueError(f"tokencache: the predictor is of {len(found.block)} blocks, this model has {blocks}")
    return found


def loss(model: nn.Module, predictor: Predictor, before: dict[str, Any], now: dict[str, Any], t: float, grid: Sequence[int],
         config: Config = Config(), cost: float = 10.0) -> dict[str, Tensor]:
    """What a predictor minimises: `loss` = `error` + cost * (`mean` - budget)^2, of two steps of a frozen transformer.

    Args:
        before, now: inputs of the model by name, at the step before and at this one, whose timestep is `t` of 0 to 1000.
        grid: (frames, height, width) of the tokens.
        cost: weight of the budget, the share of tokens that `config` computes in a cached step.
    """
    blocks = [block for block in describe(model).blocks if not block.temporal]
    given: list[Tensor] = []                              # what each block gave, or added, in the step before
    last: list[Tensor] = []
    w = predictor(t, grid)

    def run(inputs: dict[str, Any], soft: bool, keep: bool = False) -> Tensor:
        def hook(n: int, block: Block, args: tuple, kwargs: dict, out: Any) -> Any:
            (image, _), (made, text) = block.streams(args, kwargs), block.split(out)
            base = image if config.version == 2 else 0.0
            if keep:
                given.append(made - base)
            if soft:
                made = superpose(w[n], made - base, given[n]) + base
            last[:] = [made]
            return block.output(made, text)

        handles = [block.module.register_forward_hook(lambda m, args, kwargs, out, n=n, block=block: hook(
            n, block, args, kwargs, out), with_kwargs=True) for n, block in enumerate(blocks)]
        try:
            with torch.set_grad_enabled(soft):
                model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return last[0]

    old, new = run(before, False, keep=True), run(now, False)
    error = (run(now, True) - new).square().mean() / (old - new).square().mean()
    budget = 1 - config.ratio * (config.blocks if config.version == 1 else 1)
    return {"loss": error + cost * (w.mean() - budget) ** 2, "error": error, "mean": w.mean()}


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Compute only the tokens with the highest scores between full steps, and take the others from the cache.

    Args:
        target: a diffusers pipeline over a diffusion transformer.

    Raises:
        ValueError: a bare model (the schedule needs the number of steps), a UNet, a predictor of another number of blocks, or
            already applied. RuntimeError while it runs: forward chunking.
    """
    patch = Patch(target, "tokencache")
    if config.ratio == 0 or set(config.periods) == {1}:
        return patch
    patch.require_pipeline()
    found = (block for block in patch.denoiser.chain if not block.temporal and _may_shorten(block))
    blocks = patch.require(found, "chain of blocks that may be given fewer tokens (on a UNet use deepcache)")
    layers = [_Layer(block, patch.slot(), config.version == 2) for block in blocks]
    for layer in layers:
        patch.around(layer.block.module, layer.around)
        inside = (layer.block.attn, layer.block.cross, layer.block.ff)
        patch.claim([part for part in inside if part is not None], Claim.WHOLE)
    predictor = _predictor(config, len(blocks))
    full: set[int] = set()

    @torch.no_grad()
    def decide(context: StepContext) -> None:
        check_whole(blocks)
        grid = context.grid(blocks[0])
        if context.i == 0 and not full:
            importance = [float(predictor(t, grid).sum()) for t in context.times] if config.version == 2 else ()
            full.update(full_steps(context.steps, config, importance))
        due = context.i in full
        w = None if due else predictor(context.t, grid)
        chosen = [None] * len(layers) if w is None else kept(w, config)
        saved, tokens = 0, math.prod(grid)
        for layer, places in zip(layers, chosen, strict=True):
            layer.index = None
            if places is not None and layer.slot.value is not None:
                if not len(places) and "text" in layer.block.row.returns:
                    places = w[layer.block.index].argmax()[None]
                rest = torch.arange(tokens, tokens + layer.block.behind, device=places.device)       # references
                layer.index = of_any_length(torch.cat([places, rest])[None].to(context.sample.device))
                saved += tokens - len(places)
                if not len(places):
                    patch.skips([layer.block.module])
        patch.counts["cached"] += saved
        patch.counts["computed"] += tokens * len(layers) - saved
        patch.tally(saved, tokens * len(layers))

    patch.each_call(decide)
    patch.each_run(full.clear)
    patch.explain(lambda: "every step of this run is a full one")
    return patch.on()
