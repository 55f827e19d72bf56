"""SparseDiT - SparseDiT: Token Sparsification for Efficient Diffusion Transformer

Shuning Chang, Pichao Wang, Jiasheng Tang, Fan Wang, Yi Yang, NeurIPS 2025. arXiv:2412.06028. Code: changsn/SparseDiT

Idea: a trained diffusion transformer is built anew from its own weights. The first blocks take the mean of all tokens in
place of attention. The middle ones come in modules: the map is pooled, the few tokens query the many, are worked on, and are
widened again by querying them from the map as it was. The last blocks stay. Over the steps of sampling the pooled grid may
grow, since early steps need little detail. Then the whole is tuned.

Map
    X = X + W_o mean(W_v X)                                                  Pooling
    X_s = pool(X), X_s queries X, then works on X_s                          Generation
    X = W_1 up(X_s) + W_2 X, which queries X_s; W_1 = 0, W_2 = 1 at first    Recovery
    roles of the blocks: pooling, [g, s, r, d] times K, dense                roles
    Eq. 5, the side of the pooled grid over the steps                        side_at
    multiply-accumulates of each role                                        costs

Departures
    The mean goes through W_v and W_o once, not every token through W_v before it; the two are equal.
    A block that queries is called with both sets of tokens one behind the other, of which the projections take what they
    need, so that no forward is written again; modulation and gates are those of the block, shared as in the official code.
    The released code has one side for all steps. Where `last_side` says so the side follows the timestep as in Eq. 5; a
    batch of training then comes from timesteps of one side, where the authors give each GPU its own range.
    On grids that are not square the longer side of the pooled grid is `side`.
    The released model reads an attribute that it never sets, so it does not run as it is. In the paper positions are added
    again where tokens become fewer or more; not in its code, and not here. Latte, which the paper serves too, is refused:
    the library's model repeats the embedding of time for as many places as the map has, between any two of its blocks.

Example
    >>> import methods
    >>> from methods import flexdit
    >>> pipe = methods.tiny("dit")
    >>> pipe.transformer = flexdit.convert(pipe.transformer, flexdit.TRAINED["flexdit"])
    >>> flexdit.load(pipe.transformer, methods.weights("flexdit"))
    >>> images = pipe([3], num_inference_steps=2, output_type="np").images
    >>> flexdit.roles(6, flexdit.TRAINED["flexdit"])
    ['pooling', 'generation', 'recovery', 'generation', 'recovery', 'dense']
"""
from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods._core.around import Around, First, FirstAsk, before_calls, image_blocks, swap
from methods._core.denoiser import Block, check_whole, describe
from methods._core.finetuning import check_trainable, labelled
from methods._core.learning import Stage, load, save, train_only
from methods._core.noise import Noising, stratified
from methods._core.parts import zeroed

__all__ = ["OFF", "RIVALS", "TINY", "TRAINED", "Config", "Density", "Generation", "Pooling", "Recovery", "convert", "costs",
           "load", "loss", "pool", "roles", "save", "side_at", "training", "widen"]


@dataclass(frozen=True, kw_only=True)
class Config:
    pooling: int = 2                                # first blocks, without attention
    modules: int = 4                                # K, sparse-dense token modules
    group: tuple[int, int, int, int] = (1, 3, 1, 1)     # g, s, r, d: generation, sparse, recovery and dense blocks of a module
    side: int = 8                                   # of the pooled grid
    last_side: int | None = None                    # to which it grows from a quarter of the steps on; None: it stays
    tuned: tuple[str, ...] | None = None            # parts of names of what trains; None: all, as in the paper

    def __post_init__(self):
        if min(self.pooling, self.modules, *self.group) < 0 or len(self.group) != 4 or self.group[0] < 1 or self.group[2] < 1:
            raise ValueError(f"pooling={self.pooling}, modules={self.modules} and group={self.group} must count blocks, of "
                             "which each module generates and recovers with at least one")
        if not 1 <= self.side <= (self.last_side or self.side):
            raise ValueError(f"side={self.side} must be at least 1 and at most last_side={self.last_side}")


OFF = Config(pooling=0, modules=0)
TINY = Config(pooling=1, modules=1, group=(1, 0, 1, 0), side=4, tuned=("attn1", "from_sparse", "from_dense"))
TUNED = ("from_sparse", "from_dense", "to_out", "net.2")
TRAINED = {"flexdit": Config(pooling=1, modules=2, group=(1, 0, 1, 0), tuned=TUNED)}                 # on the bundled digits
RIVALS = {"flexdit": {"one module": Config(pooling=1, modules=1, group=(1, 1, 1, 1), tuned=TUNED)}}  # of as many MACs
STEPS = 1000                                        # of a clock that runs down, in which timesteps are told


def roles(depth: int, config: Config) -> list[str]:
    """What each of `depth` blocks becomes.

    Raises:
        ValueError: the modules need more blocks.
    """
    names = "generation", "sparse", "recovery", "dense"
    module = [name for name, n in zip(names, config.group, strict=True) for _ in range(n)]
    found = ["pooling"] * config.pooling + module * config.modules
    if len(found) > depth:
        raise ValueError(f"pooling={config.pooling} and modules={config.modules} of {config.group} are {len(found)} blocks; "
                         f"the model has {depth}")
    return found + ["dense"] * (depth - len(found))


def costs(N: int, M: int, D: int) -> dict[str, int]:
    """Multiply-accumulates of a block of each role: N tokens, M pooled ones, D channels."""
    return {"dense": 12 * N * D ** 2 + 2 * N ** 2 * D, "pooling": 2 * D ** 2 + 8 * N * D ** 2,
            "generation": (10 * M + 2 * N) * D ** 2 + 2 * M * N * D, "sparse": 12 * M * D ** 2 + 2 * M ** 2 * D,
            "recovery": (12 * N + 2 * M) * D ** 2 + 2 * M * N * D}


def side_at(progress: float, side: int, last_side: int) -> int:
    """The side of the pooled grid where this share of the steps is done: `side` for a quarter, then linear to `last_side`."""
    return round(side + (last_side - side) * min(1.0, max(0.0, (progress - 0.25) / 0.75)))


def pool(x: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """(B, h w, D) -> (B, h' w', D): means of the windows of a grid."""
    return F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, grid), to).flatten(2).transpose(1, 2)


def widen(x: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """(B, h' w', D) -> (B, h w, D): each token takes the nearest of a grid."""
    return F.interpolate(x.transpose(1, 2).unflatten(2, grid), to, mode="nearest").flatten(2).transpose(1, 2)


class Density(nn.Module):
    """The two grids of the present call, `model.density` of a converted model, and the map at its entry to a module."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dense = self.sparse = (0, 0)
        self.full: Tensor | None = None

    def decide(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Before a call of the model. Of different timesteps the one that needs most tokens counts."""
        denoiser = describe(model)
        check_whole(denoiser.blocks)
        h, w = self.dense = denoiser.size(inputs)[1:]
        t = float(torch.as_tensor(inputs["timestep"]).min())
        side = side_at(1 - (t + 1) / STEPS, self.config.side, self.config.last_side or self.config.side)
        self.sparse = min(h, max(1, round(side * h / max(h, w)))), min(w, max(1, round(side * w / max(h, w))))
        self.full = None


class Pooling(nn.Module):
    """Attention without queries and keys: every token (B, N, D) gets the mean of all values."""

    def __init__(self, attn: nn.Module):
        super().__init__()
        self.to_v, self.to_out = attn.to_v, attn.to_out

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.to_out[0](self.to_v(hidden_states.mean(1, keepdim=True))).expand(-1, hidden_states.shape[1], -1)


class Query(Around):
    """A block whose tokens query others, with its own norm, modulation and weights for both."""

    def __init__(self, block: Block, density: Density):
        super().__init__(block.module)
        self.density = density
        block.module.attn1, block.module.ff = FirstAsk(block.attn), First(block.ff)
        if block.cross is not None:
            block.module.attn2 = First(block.cross)

    def query(self, x: Tensor, others: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, M, D), (B, N, D) -> (B, M, D)"""
        for part in (self.inner.attn1, self.inner.attn2, self.inner.ff):
            if part is not None:
                part.count = x.shape[1]
        return self.inner(torch.cat([x, others], 1), *args, **kwargs)[:, :x.shape[1]]


class Generation(Query):
    """Fewer tokens, which query the whole map; the `first` of a module makes them."""

    first = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        density, x = self.density, hidden_states
        if self.first:
            density.full, x = x, pool(x, density.dense, density.sparse)
        return self.query(x, density.full, *args, **kwargs)


class Recovery(Query):
    """The map as it was and what became of the fewer tokens, merged; it queries these. The `last` of a module forgets it."""

    last = True

    def __init__(self, block: Block, density: Density):
        super().__init__(block, density)
        like = block.attn.to_q
        self.from_sparse, self.from_dense = (zeroed(nn.utils.skip_init(
            nn.Linear, like.in_features, like.in_features, device=like.weight.device, dtype=like.weight.dtype))
            for _ in range(2))
        nn.init.eye_(self.from_dense.weight)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        density, x = self.density, hidden_states
        h, w = density.dense
        up = x if x.shape[1] == h * w else widen(x, density.sparse, (h, w))
        merged = self.from_sparse(up) + self.from_dense(density.full)
        if self.last:
            density.full = None
        return self.query(merged, x, *args, **kwargs)


def convert(model: nn.Module, config: Config = Config()) -> nn.Module:
    """A copy of `model` that works on few tokens in the middle; put it in the place of the pipeline's transformer.

    Args:
        model: a DiTTransformer2DModel or PixArtTransformer2DModel. It stays as it is.

    Raises:
        TypeError: no row in methods/_core/families.
        ValueError: already converted; blocks of another kind or too few; a name in `config.tuned` that no parameter has.
    """
    if hasattr(model, "density"):
        raise ValueError(f"this {type(model).__name__} is sparse already")
    image_blocks(model, "flexdit")
    model = copy.deepcopy(model).eval()
    blocks = describe(model).blocks
    found = roles(len(blocks), config)
    if not (config.pooling or config.modules):
        return model
    model.density = density = Density(config)
    made: dict[nn.Module, nn.Module] = {}
    for i, (role, block) in enumerate(zip(found, blocks, strict=True)):
        if role == "pooling":
            block.module.attn1 = Pooling(block.attn)
        elif role in ("generation", "recovery"):
            made[block.module] = query = (Generation if role == "generation" else Recovery)(block, density)
            query.first, query.last = found[i - 1:i] != ["generation"], found[i + 1:i + 2] != ["recovery"]
    swap(model, made)
    before_calls(model, density.decide)
    train_only(model, config.tuned)
    return model


def loss(model: nn.Module, noising: Noising, x0: Tensor, *, step: int, random: torch.Generator, **conditions: Any
         ) -> dict[str, Tensor]:
    """The ordinary loss of a converted model as `loss`, and for show the `side` of the pooled grid.

    Args:
        noising: of the pipeline's scheduler.
        x0: (B, C, H, W), clean latents.
        step: of the training, not needed here.
        random: of timesteps and noise, and of the side where it changes: one for all of the batch.
        conditions: further inputs of the model, such as `class_labels`.

    Raises:
        ValueError: not converted, in training mode, or with gradient checkpointing.
    """
    if not isinstance(getattr(model, "density", None), Density):
        raise ValueError(f"this {type(model).__name__} is not sparse: convert it first")
    check_trainable(model)
    u, config = stratified(len(x0), random), model.density.config
    last = config.last_side or config.side
    if last > config.side:                                       # the part of the clock in which the side is that of one draw
        clock = torch.arange(STEPS) / STEPS
        sides = torch.tensor([side_at(1 - float(at) - 1 / STEPS, config.side, last) for at in clock])
        same = clock[sides == sides[torch.randint(STEPS, (), generator=random)]]
        u = same[0] + u * (same[-1] + 1 / STEPS - same[0])
    noisy = noising.sample(x0, random, noising.process.t(u))
    found = noising.loss(model(noisy.x, timestep=noisy.t, return_dict=False, **conditions)[0], noisy)
    return {"loss": found, "side": found.new_tensor(max(model.density.sparse))}


def training(pipe: Any, config: Config) -> Iterator[Stage]:
    """How the bundled DiT is tuned on digits, by `python tools/train_zoo.py --method flexdit`."""
    yield labelled(pipe, convert(pipe.transformer, config), loss, steps=160, lr=4e-3)
