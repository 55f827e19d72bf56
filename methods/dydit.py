"""DyDiT - Dynamic Diffusion Transformer

Wangbo Zhao, Yizeng Han, Jiasheng Tang, Kai Wang, Yibing Song, Gao Huang, Fan Wang, Yang You, ICLR 2025. arXiv:2410.03456.
Code: alibaba-damo-academy/DyDiT

Idea: a trained diffusion transformer gets three small routers a block. Two read the timestep and say which heads and which
groups of the MLP's channels a step needs; the third reads each token and says whether it takes the MLP or passes by. Model
and routers train together, with a penalty that pulls the share of the computing left to a target.

Map
    routers of heads, channel groups and tokens            Router
    Gumbel-sigmoid with a straight-through gradient        methods._core.routing.gate
    A = 4 N D^2 + 2 N^2 D, M = 8 N D^2                     costs
    F_dynamic / F_static                                   share
    target, annealed from 1                                annealed
    L_dynamic + L_complete + w (mean share - target)^2     loss
    the static sub-network of a timestep                   subnetworks

Departures
    The class-conditional code of the authors multiplies by masks and is no faster. Here a call at one timestep runs on the
    weights of the open heads and groups only, and the MLP on the tokens that take it. Where timesteps differ within a
    batch, and in `loss`, masks are multiplied.
    The official training loop steps its optimiser both before and after it clips the gradient, and leaves the second step
    out where the norm is above the limit. `loss` leaves that to the trainer; ours takes one clipped step.
    Heads and channels keep the order of the pretrained model, as in the official code, where the call that sorts them by
    importance is commented out. Timesteps are stratified over the whole batch instead of over four parts of it.
    In the library's DiT each block embeds the timestep by itself, and its routers read that. On PixArt, for which there is
    no official code, cross-attention is neither routed nor counted.

Example
    >>> import methods
    >>> from methods import dydit
    >>> pipe = methods.tiny("dit")
    >>> pipe.transformer = dydit.convert(pipe.transformer, dydit.TRAINED["dydit-50"])
    >>> dydit.load(pipe.transformer, methods.weights("dydit-50"))
    >>> images = pipe([3, 1, 4], num_inference_steps=10, output_type="np").images
    >>> float(dydit.left(pipe.transformer).mean()) < 0.6                        # of the computing in the last step
    True
"""
from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods._core import width
from methods._core.around import before_calls
from methods._core.denoiser import Block, describe
from methods._core.finetuning import check_trainable, labelled
from methods._core.learning import Stage, load, save, train_only
from methods._core.noise import Noising
from methods._core.routing import gate, through

__all__ = ["OFF", "OUTPUTS", "TINY", "TRAINED", "Config", "Gates", "Router", "annealed", "convert", "costs", "left", "load",
           "loss", "opened", "save", "share", "subnetworks", "training"]


@dataclass(frozen=True, kw_only=True)
class Config:
    target: float = 0.5                 # lambda, the share of the computing of all blocks that is left; 1: no routers
    tau: float = 5.0                    # temperature of the gates in training
    weight: float = 2.0                 # of the penalty, w; of the official code
    warmup: int = 1000                  # steps over which the target falls from 1 to lambda; of the official code, as below
    delay: int = 100                    # first steps, in which it stays at 1
    complete: int = 30_000              # first steps, in which the complete model trains beside the dynamic one
    bias: float = 15.0                  # of the routers of heads and channels at the start, when all gates are open
    token_bias: float = 35.0            # of the routers of tokens
    backbone: tuple[str, ...] | None = None     # parts of names of what trains beside the routers; None: all, as in the paper
    seed: int = 0                       # of the routers' weights

    def __post_init__(self):
        if not (0 < self.target <= 1 and self.tau > 0):
            raise ValueError(f"target={self.target} must be above 0 and at most 1, and tau={self.tau} above 0")
        for name, least in (("weight", 0), ("warmup", 1), ("delay", 0), ("complete", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


OFF = Config(target=1.0)
OUTPUTS = ("attn1.inner.to_out", "ff.inner.net.2")   # the last layers of attention and MLP, which make up for what is missing
TINY = Config(warmup=5, delay=1, complete=3, bias=0.5, token_bias=0.5, backbone=("ff.inner",))       # for tests
TRAINED = {f"dydit-{percent}": Config(target=percent / 100, warmup=300, delay=20, complete=180, backbone=OUTPUTS)
           for percent in (50, 70)}                                                                  # on the bundled digits


class Gates(NamedTuple):
    """What the routers of all L blocks said in a call: heads and channels (B, L, H), tokens (B, L, N), 0 or 1."""

    heads: Tensor
    channels: Tensor
    tokens: Tensor


def costs(tokens: int, dim: int, hidden: int) -> tuple[int, int]:
    """Multiply-accumulates A of the attention and M of the MLP of a block: N `tokens` of D channels, `hidden` in the MLP."""
    return 4 * tokens * dim ** 2 + 2 * tokens ** 2 * dim, 2 * tokens * dim * hidden


def share(gates: Gates, A: float, M: float) -> Tensor:
    """F_dynamic / F_static of each sample, (B,): what is left of the blocks' computing."""
    heads, channels, tokens = (each.mean(-1) for each in gates)
    return (heads * A + channels * tokens * M).mean(-1) / (A + M)


def annealed(step: int, config: Config) -> float:
    """The target at a step of training."""
    return 1 - (1 - config.target) * (0 if step < config.delay else min(1, step / config.warmup))


class Router(nn.Module):
    """The three routers of one block; the first head and the first group need no logit, they are always on."""

    def __init__(self, dim: int, heads: int, config: Config, random: torch.Generator):
        super().__init__()
        sizes = (dim, heads - 1), (dim, heads - 1), (dim, dim // 16), (dim // 16, 1)
        self.heads, self.channels, first, last = (nn.utils.skip_init(nn.Linear, *size) for size in sizes)
        self.tokens = nn.Sequential(first, nn.ReLU(), last)
        for layer, bias in ((self.heads, config.bias), (self.channels, config.bias), (first, 0.0), (last, config.token_bias)):
            nn.init.xavier_uniform_(layer.weight, generator=random)
            nn.init.constant_(layer.bias, bias)


class Mlp(width.Channels):
    """The MLP of a block, for the tokens that take it."""

    tokens: Tensor | None = None                           # gates (B, N); None: all take it

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens is None:
            return super().forward(x)
        if self.tokens.shape != x.shape[:2]:
            raise RuntimeError(f"the MLP got {tuple(x.shape[:2])} tokens of {tuple(self.tokens.shape)}: switch chunking off")
        masked = isinstance(self.open, Tensor)
        return super().forward(x) * self.tokens[..., None].to(x) if masked else through(super().forward, x, self.tokens > 0)


class Routers(nn.ModuleList):
    """The routers of all blocks, `model.routers` of a converted model. They decide before each call of the model."""

    def __init__(self, blocks: Sequence[Block], config: Config):
        random = torch.Generator().manual_seed(config.seed)
        super().__init__(Router(block.attn.to_q.in_features, block.attn.heads, config, random) for block in blocks)
        self.config = config
        self.random: torch.Generator | None = None         # of the gates while `loss` runs; else they are sharp
        self.off = False                                   # whether all gates are open, whatever the routers say
        self.said: tuple[Tensor, Tensor] | None = None     # of heads and channels in the last call

    def decide(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Before a call: open what its timesteps need; where they are one, that is a static sub-network."""
        self.forget(model)
        if self.off:
            return
        t = torch.as_tensor(inputs["timestep"]).to(self[0].heads.weight.device).expand(len(inputs["hidden_states"]))
        static = self.random is None and bool((t == t[0]).all())
        self.said = subnetworks(model, t[:1] if static else t)
        parts = [gates[0].tolist() if static else gates.unbind(1) for gates in self.said]
        for block, *gates in zip(describe(model).blocks, *parts, strict=True):
            for layer, found in zip((block.attn, block.ff), gates, strict=True):
                layer.open = found if not static else None if all(found) else tuple(i for i, on in enumerate(found) if on)

    def look(self, router: Router, mlp: Mlp, _: nn.Module, args: tuple[Tensor]) -> None:
        """Before the norm of the MLP, which is given the residual stream (B, N, D): decide on its tokens."""
        if not self.off:
            mlp.tokens = gate(router.tokens(args[0])[..., 0], self.config.tau, self.random)

    def forget(self, model: nn.Module) -> None:
        self.said = None
        for block in describe(model).blocks:
            block.attn.open = block.ff.open = block.ff.tokens = None

    @contextmanager
    def under(self, model: nn.Module, random: torch.Generator | None = None) -> Iterator[None]:
        """Within, gates have noise from `random`; without it all are open."""
        self.random, self.off = random, random is None
        try:
            yield
        finally:
            self.random, self.off = None, False
            self.forget(model)                                 # gates with a gradient, which could not be copied


def _embeddings(model: nn.Module, block: Block) -> nn.Module | None:         # of the timestep: in each block (DiT), or one
    return getattr(block.norm, "emb", None) or getattr(getattr(model, "adaln_single", None), "emb", None)


def _routers(model: nn.Module) -> Routers:
    if not isinstance(getattr(model, "routers", None), Routers):
        raise ValueError(f"this {type(model).__name__} has no routers: convert it first, with a target below 1")
    return model.routers


def subnetworks(model: nn.Module, t: Tensor) -> tuple[Tensor, Tensor]:
    """Which heads and which groups of channels are open at timesteps t (B,), each (B, L, H): the static sub-networks."""
    said, routers = [], _routers(model)
    for router, block in zip(routers, describe(model).blocks, strict=True):
        emb = _embeddings(model, block)
        e = emb.timestep_embedder(emb.time_proj(t).to(router.heads.weight.dtype))
        said.append([F.pad(gate(part(e), routers.config.tau, routers.random), (1, 0), value=1.0)
                     for part in (router.heads, router.channels)])
    heads, channels = zip(*said, strict=True)
    return torch.stack(heads, 1), torch.stack(channels, 1)


def convert(model: nn.Module, config: Config = Config()) -> nn.Module:
    """A copy of `model` with routers, all gates open; put it in the place of the pipeline's transformer.

    Args:
        model: a DiTTransformer2DModel or PixArtTransformer2DModel. It stays as it is.

    Raises:
        TypeError: no row in methods/_core/families.
        ValueError: already converted; blocks of another kind; a name in `config.backbone` that no parameter has.
    """
    if hasattr(model, "routers"):
        raise ValueError(f"this {type(model).__name__} has routers already")
    blocks = describe(model).blocks
    if not all(block.stream == "image" and not (block.rotary or block.temporal) and block.attn.heads > 1
               and block.attn.to_q.in_features >= 16 and _embeddings(model, block)
               and block.ff.net[0].proj.out_features == block.ff.net[-1].in_features for block in blocks):
        raise ValueError(f"dydit: this {type(model).__name__} has no chain of blocks with an embedded timestep, self-attention "
                         "of several heads and a plain MLP, so there is nothing to route")
    model = copy.deepcopy(model).eval()
    if config.target == 1:
        return model
    blocks = describe(model).blocks
    model.routers = routers = Routers(blocks, config).to(model.dtype).to(model.device)
    for router, block in zip(routers, blocks, strict=True):
        mlp = Mlp(block.ff, block.attn.heads)
        norm = getattr(block.module, "norm3", None) or block.module.norm2               # the one before the MLP
        norm.register_forward_pre_hook(functools.partial(routers.look, router, mlp))
        block.module.attn1, block.module.ff = width.Heads(block.attn), mlp
    before_calls(model, routers.decide)
    train_only(model, None if config.backbone is None else ("routers.", *config.backbone))
    return model


def opened(model: nn.Module) -> Gates:
    """What was open in the last call of a converted model. Raises ValueError where there is none."""
    said, blocks = _routers(model).said, describe(model).blocks
    if said is None:
        raise ValueError("the model has not been called yet")
    tokens = torch.stack([block.ff.tokens for block in blocks], 1)
    return Gates(*(each.expand(len(tokens), -1, -1) for each in said), tokens)


def left(model: nn.Module) -> Tensor:
    """The share (B,) of the blocks' computing that the last call of a converted model made."""
    gates, ff = opened(model), describe(model).blocks[0].ff.inner
    return share(gates, *costs(gates.tokens.shape[-1], ff.net[-1].out_features, ff.net[-1].in_features))


def loss(model: nn.Module, noising: Noising, x0: Tensor, *, step: int, random: torch.Generator, **conditions: Any
         ) -> dict[str, Tensor]:
    """The training loss of a converted model as `loss`, and for show its part `dynamic`, the `share` and its `target`.

    Args:
        noising: of the pipeline's scheduler.
        x0: (B, C, H, W), clean latents.
        step: of the training, from 0 on; the target depends on it, and whether the complete model trains too.
        random: of timesteps, noise and gates.
        conditions: further inputs of the model, such as `class_labels`.

    Raises:
        ValueError: not converted, in training mode, or with gradient checkpointing.
    """
    routers = _routers(model)
    check_trainable(model)
    config, noisy, target = routers.config, noising.sample(x0, random), annealed(step, routers.config)
    call = functools.partial(model, hidden_states=noisy.x, timestep=noisy.t, **conditions)
    with routers.under(model, random):
        dynamic = noising.loss(call().sample, noisy)
        part = left(model).mean()
    total = dynamic + config.weight * (part - target) ** 2
    if step < config.complete:
        with routers.under(model):
            total = total + noising.loss(call().sample, noisy)
    return {"loss": total, "dynamic": dynamic, "share": part, "target": part.new_tensor(target)}


def training(pipe: Any, config: Config) -> Iterator[Stage]:
    """How the bundled DiT is trained on digits, by `python tools/train_zoo.py --method dydit`."""
    yield labelled(pipe, convert(pipe.transformer, config), loss, steps=1200, lr=3e-4, rates={"routers": 30.0})
