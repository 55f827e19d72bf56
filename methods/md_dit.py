"""MD-DiT - MD-DiT: Step-aware Mixture-of-Depths for Efficient Diffusion Transformers

Mingzhu Shen, Pengtao Chen, Peng Ye, Guoxuan Xia, Tao Chen, Christos-Savvas Bouganis, Yiren Zhao, NeurIPSW 2024.
OpenReview:1jWhiakK7N

Idea: a reconstruction, since the text of the paper could not be had and no code is known. What the title says is that a mixture
of depths, in which a block takes only so many tokens and the others pass it by, depends on the step; others file the method
with feature caching. Here a router scores the tokens of each block with regard to the step, few of them are taken in noisy
steps and more later, and a token that passes by gets what the block added to it when it last took it.

Map
    s = sigmoid(w x + v e_t + b), the score of a token at a step             Router
    k = ceil(rho N) tokens, rho by the phase of the step                     share_at
    y = x + s F(x) of those taken; y = x + C of the others                   Routed
    C, what was last added to a token; every few steps all are taken         Routed
    which call begins a run, and which takes all tokens                      Depth
    L = L_diffusion + ||model - all tokens taken||^2                         loss

Departures
    All of it is ours but the title: the form of the score, the two phases, what a token gets that passes by, the steps that
    take all tokens, and the loss. No number of the paper is known.
    Tokens that are taken attend to each other alone. Where all are taken the block runs as it is, without s.
    In training a call at a level of more noise, of the same sample and noise, takes the place of the step before.
    A call continues a run if its timesteps are lower than those of the last and by at most twice as much as before; else it
    begins one. `forget` clears what is kept after a run that was broken off.

Example
    >>> import methods
    >>> from methods import md_dit
    >>> pipe = methods.tiny("dit")
    >>> pipe.transformer = md_dit.convert(pipe.transformer, md_dit.TRAINED["md_dit"])
    >>> md_dit.load(pipe.transformer, methods.weights("md_dit"))
    >>> images = pipe([3], num_inference_steps=4, output_type="np").images
"""
from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods._core.around import Around, before_calls, image_blocks, swap
from methods._core.denoiser import check_whole, describe
from methods._core.finetuning import check_trainable, labelled
from methods._core.learning import Stage, load, save, train_only
from methods._core.noise import Noising, stratified

__all__ = ["OFF", "RIVALS", "TINY", "TRAINED", "Config", "Depth", "Routed", "Router", "convert", "costs", "forget", "load",
           "loss", "save", "share_at", "training"]


@dataclass(frozen=True, kw_only=True)
class Config:
    early: float = 0.5                  # rho, the share of tokens that are taken in noisy steps
    late: float = 0.75                  # and in the others
    switch: float = 0.3                 # share of the clock that is late, at its end
    refresh: int = 5                    # of so many steps the first takes all tokens
    bypass: str = "cached"              # what a token gets that passes by: "cached", or "plain": nothing
    choice: str = "router"              # who chooses: the "router", or a "random" draw
    bias: float = 4.0                   # of the routers before training, at which s is 0.98
    gap: int = 50                       # timesteps between a call of training and the one before it
    weight: float = 1.0                 # of the distance to the output where all tokens are taken
    tuned: tuple[str, ...] = ()         # parts of names of what trains beside the routers
    seed: int = 0                       # of the routers' weights and of random draws

    def __post_init__(self):
        if not (0 < self.early <= 1 and 0 < self.late <= 1 and 0 <= self.switch <= 1):
            raise ValueError(f"early={self.early} and late={self.late} must be above 0 and at most 1, switch={self.switch} in "
                             "[0, 1]")
        if self.refresh < 1 or self.gap < 1 or self.weight < 0:
            raise ValueError(f"refresh={self.refresh} and gap={self.gap} must be at least 1, weight={self.weight} at least 0")
        if self.bypass not in ("cached", "plain") or self.choice not in ("router", "random"):
            raise ValueError(f"bypass={self.bypass!r} must be 'cached' or 'plain', choice={self.choice!r} 'router' or 'random'")


STEPS, WAVES = 1000, 8                  # timesteps of the clock; cosines in which routers are told the step
OFF = Config(early=1.0, late=1.0)
TINY = Config(tuned=("ff.",))
TRAINED = {"md_dit": Config()}                                                                      # on the bundled digits
RIVALS = {"md_dit": {"nothing kept": Config(bypass="plain"), "random tokens": Config(choice="random")}}


def costs(k: int, D: int) -> int:
    """Multiply-accumulates of self-attention and MLP of a block that takes k tokens of D channels."""
    return 12 * k * D ** 2 + 2 * k ** 2 * D


def share_at(t: float, config: Config) -> float:
    """rho at timestep t of the clock, which runs down."""
    return config.early if t >= config.switch * STEPS else config.late


def waves(t: Tensor) -> Tensor:
    """e_t (B, 8) of timesteps (B,)."""
    return torch.cos(t.float()[:, None] / STEPS * math.pi * torch.arange(1, WAVES + 1, device=t.device))


class Router(nn.Module):
    """The scores of tokens (B, N, D) at a step e_t (B, 8), before the sigmoid: (B, N)."""

    def __init__(self, dim: int, bias: float, random: torch.Generator):
        super().__init__()
        self.token, self.step = nn.utils.skip_init(nn.Linear, dim, 1), nn.utils.skip_init(nn.Linear, WAVES, 1, bias=False)
        nn.init.normal_(self.token.weight, std=0.1 * dim ** -0.5, generator=random)
        nn.init.constant_(self.token.bias, bias)
        nn.init.zeros_(self.step.weight)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.token(x)[..., 0] + self.step(e.to(x))


class Routed(Around):
    """A block that takes the tokens of highest score; the others get what it last added to them."""

    share: float | None = None                             # rho of this call; None: all tokens
    e: Tensor | None = None
    draw: int | None = None                                # seed of a random choice
    kept: Tensor | None = None                             # C (B, N, D)

    def __init__(self, inner: nn.Module, like: nn.Linear, config: Config, random: torch.Generator):
        super().__init__(inner)
        self.config = config
        self.router = Router(like.in_features, config.bias, random).to(like.weight.device, like.weight.dtype)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, caches = hidden_states, self.config.bypass == "cached"
        if self.share is None:
            y = self.inner(x, *args, **kwargs)
            self.kept = (y - x).detach() if caches else None
            return y
        scores = self.router(x, self.e)
        ranked = scores if self.draw is None else torch.rand(scores.shape, generator=torch.Generator().manual_seed(self.draw))
        k = math.ceil(round(self.share * x.shape[1], 6))
        at = ranked.to(x.device).topk(k, dim=1).indices.sort(dim=1).values
        rows = at[..., None].expand(-1, -1, x.shape[2])
        taken = x.gather(1, rows)
        added = scores.gather(1, at).sigmoid()[..., None] * (self.inner(taken, *args, **kwargs) - taken)
        before = self.kept if caches and self.kept is not None else torch.zeros_like(x)
        after = before.scatter(1, rows, added.to(x.dtype))
        self.kept = after.detach() if caches else None
        return x + after


class Depth(nn.Module):
    """Which step of which run a call is, `model.depth` of a converted model."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.forced: str | None = None                     # while `loss` runs: "all" tokens, or "some"
        self.calls, self.last, self.gap = 0, math.inf, math.inf
        self.shape: torch.Size | None = None

    def decide(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Before a call of the model: what share of the tokens the blocks take."""
        check_whole(describe(model).blocks)
        x, config = inputs["hidden_states"], self.config
        times = torch.as_tensor(inputs["timestep"]).to(x.device).flatten().expand(len(x))
        t = float(times.max())
        step = self.last - t
        if self.forced is None and not (0 < step <= 2 * self.gap and x.shape == self.shape):
            forget(model)
            step = math.inf
        every = self.forced == "all" or self.forced is None and self.calls % config.refresh == 0
        for i, block in enumerate(describe(model).blocks):
            routed = block.module
            routed.share, routed.e = None if every else share_at(t, config), waves(times)
            routed.draw = config.seed + i + 1000 * self.calls if config.choice == "random" else None
        self.calls, self.last, self.gap, self.shape = self.calls + 1, t, step, x.shape

    @contextmanager
    def training_calls(self, model: nn.Module) -> Iterator[None]:
        """Within, `forced` says what is taken; nothing is left behind."""
        forget(model)
        try:
            yield
        finally:
            self.forced = None
            forget(model)


def _depth(model: nn.Module) -> Depth:
    if not isinstance(getattr(model, "depth", None), Depth):
        raise ValueError(f"this {type(model).__name__} has no routers: convert it first, with a share below 1")
    return model.depth


def forget(model: nn.Module) -> None:
    """Drop what a converted model keeps of a run. Raises ValueError where it is not converted."""
    depth = _depth(model)
    depth.calls, depth.last, depth.gap, depth.shape = 0, math.inf, math.inf, None
    for block in describe(model).blocks:
        block.module.kept = block.module.share = block.module.e = None


def convert(model: nn.Module, config: Config = Config()) -> nn.Module:
    """A copy of `model` with a router before each block; put it in the place of the pipeline's transformer.

    Args:
        model: a DiTTransformer2DModel or PixArtTransformer2DModel. It stays as it is.

    Raises:
        TypeError: no row in methods/_core/families.
        ValueError: already converted; blocks of another kind; a name in `config.tuned` that no parameter has.
    """
    if hasattr(model, "depth"):
        raise ValueError(f"this {type(model).__name__} has routers already")
    image_blocks(model, "md_dit")
    model = copy.deepcopy(model).eval()
    if config.early == config.late == 1:
        return model
    random = torch.Generator().manual_seed(config.seed)
    swap(model, {block.module: Routed(block.module, block.attn.to_q, config, random) for block in describe(model).blocks})
    model.depth = Depth(config)
    before_calls(model, model.depth.decide)
    train_only(model, ("router.", *config.tuned))
    return model


def loss(model: nn.Module, noising: Noising, x0: Tensor, *, step: int, random: torch.Generator, **conditions: Any
         ) -> dict[str, Tensor]:
    """The training loss of a converted model as `loss`, and for show its parts `task` and `distance`.

    Args:
        noising: of the pipeline's scheduler.
        x0: (B, C, H, W), clean latents.
        step: of the training, not needed here.
        random: of timesteps, which are those of one phase, and noise.
        conditions: further inputs of the model, such as `class_labels`.

    Raises:
        ValueError: not converted, in training mode, or with gradient checkpointing.
    """
    depth = _depth(model)
    check_trainable(model)
    config, late = depth.config, torch.rand((), generator=random) < depth.config.switch
    u = stratified(len(x0), random)
    u = u * config.switch if late else config.switch + u * (1 - config.switch)
    noisy = noising.sample(x0, random, noising.process.t(u))
    before = (noisy.t + config.gap).clamp(max=STEPS - 1)
    a, s = noising.levels(before, x0)
    with depth.training_calls(model):
        with torch.no_grad():
            depth.forced = "all"
            wanted = model(noisy.x, timestep=noisy.t, return_dict=False, **conditions)[0]
            model(a * x0 + s * noisy.eps, timestep=before, return_dict=False, **conditions)
        depth.forced = "some"
        output = model(noisy.x, timestep=noisy.t, return_dict=False, **conditions)[0]
    task, distance = noising.loss(output, noisy), F.mse_loss(output.float(), wanted.float())
    return {"loss": task + config.weight * distance, "task": task, "distance": distance}


def training(pipe: Any, config: Config) -> Iterator[Stage]:
    """How the routers are trained on digits, by `python tools/train_zoo.py --method md_dit`."""
    yield labelled(pipe, convert(pipe.transformer, config), loss, steps=60, lr=2e-2)
